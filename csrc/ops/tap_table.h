// The compacted weight of a convolution or linear layer, and its packed form.
//
// As stored (little, canonical, in state dicts and files):
//   taps           int32 [total taps]  kept columns j = flat index of (channel within the conv group, *kernel position)
//   block_filters  int32 [blocks]      filters of each block; blocks are in filter order and none crosses a conv group
//   block_taps     int32 [blocks + 1]  where each block's taps begin
//   weight         f32 [nnz]           block after block, each [block_filters[b]][taps of b]
//   bias           f32 [filters] or null
// Column sparsity is one block per conv group, block-column many; a filter without taps emits its bias.
//
// As packed (opaque bytes, of one process): panels of 16, 8 or 4 filters for the gemm_compact kernels, with taps
// decoded and validated. All three instruction sets read the same layout; `layout` tells it from those to come.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>
#include <span>
#include <vector>

#include "base/tensor_view.h"
#include "kernels/gemm_compact/gemm_compact.h"
#include "kernels/gemm_compact/packed.h"

namespace structadmm {

struct TapTable {
  std::span<const float> weight, bias;  // bias may be empty
  bool has_bias = false;
  std::span<const int32_t> taps, block_filters, block_taps;
  int64_t in_channels = 0;  // of all conv groups
  int64_t kernel_size[2] = {1, 1};
  int64_t conv_groups = 1;
};

// The packed form, read in place.
using kernels::PackedHeader;
using kernels::Panel;

// Packed bytes begin at a cache line: a vector of weights that lies across two lines is two loads, and a kernel of four
// panels then ran a third slower.
template <class T>
struct LineAllocator {
  using value_type = T;
  static constexpr std::align_val_t kLine{64};
  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), kLine)); }
  void deallocate(T* p, size_t) { ::operator delete(p, kLine); }
  bool operator==(const LineAllocator&) const = default;
};
using PackedBytes = std::vector<std::byte, LineAllocator<std::byte>>;

struct Packed {
  const PackedHeader* header;
  std::span<const Panel> panels;
  const kernels::Tap* taps;
  std::span<const int32_t> channels;  // input channels that some tap reads, ascending
  const float* weights;
  const float* bias;  // [out_channels], and zeros behind it for the width of a panel
};

// The table in these tensors. Throws Error, worded for `op`, where a dtype, a device or a number of dimensions is
// wrong; `bias` may be null.
TapTable tap_table(const char* op, const TensorView& weight, const TensorView* bias, const TensorView& taps,
                   const TensorView& block_filters, const TensorView& block_taps, int64_t in_channels, int64_t kernel_h,
                   int64_t kernel_w, int64_t conv_groups);

// Throws Error if the table is not well formed.
void check(const char* op, const TapTable& table);

// check() and pack().
PackedBytes pack(const char* op, const TapTable& table);

// How many panels from the i-th on one filters kernel should take: those of the same block, as wide, in as few jobs as
// the kernels allow, of about the same size.
int next_panels(const Packed& packed, int64_t i, const kernels::GemmCompact& kernels);

// The feature that each tap of a linear layer reads.
std::vector<int64_t> features_of(const Packed& packed);

// Throws Error if these bytes are not a whole packed form of this build.
Packed unpack(const char* op, std::span<const std::byte> bytes);

}  // namespace structadmm
