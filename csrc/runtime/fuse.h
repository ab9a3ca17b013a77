// Makes fewer steps of a graph: scale and shift into the weights before them, activations and additions into epilogues.
#pragma once

#include <functional>
#include <vector>

#include "runtime/graph.h"

namespace structadmm::runtime {

// y = x * scale[c] + shift[c] in double precision, so that a folded weight is rounded once.
struct Affine {
  std::vector<double> scale, shift;
};

// affine[i]: of node i where it is a kScaleShift (whose own vectors are not read), else empty. Nodes without a consumer
// are left out, inputs excepted.
Graph fuse(Graph graph, std::vector<Affine> affine);

// A 1 x 1 convolution with a stride reads one pixel of every few: where it has work enough, those are copied out first,
// and the convolution runs on neighbouring pixels. reads_strides: nodes left alone, whose family packs pixels anyway.
Graph subsample_first(Graph graph, const std::function<bool(const Node&)>& reads_strides);

}  // namespace structadmm::runtime
