// An artefact as a graph that runs: layers become steps, BatchNorm is folded, activations and additions are fused.
//
// What can be lowered: convolutions and linear layers (dense or compacted), BatchNorm, activations, pooling, additions,
// products, concatenation of channels, slices and zero padding of channels, and the reshapes between maps [N, C, H, W]
// and features [N, C]. The batch and the sizes of maps stay free.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "format/artefact.h"
#include "runtime/graph.h"

namespace structadmm::runtime {

// Throws Error naming the first node that cannot be lowered.
Graph lower(const format::Artefact& artefact);

// For each node of the artefact's graph its name and why it cannot be lowered, "what got ..., wanted ...", or an empty
// text. What a refused node would have computed counts as one more input to the nodes behind it.
std::vector<std::pair<std::string, std::string>> why_not(const format::Artefact& artefact);

}  // namespace structadmm::runtime
