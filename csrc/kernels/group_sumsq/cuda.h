// group_sumsq on the GPU, by the same summation contract (group_sumsq.h), so the same bits. w, u, mask have the shape's
// sizes; u and mask may have null data. Launchers return a status (base/cuda_status.h) and wait for nothing.
#pragma once

#include "base/strided.h"

namespace structadmm {

// Bands of consecutive filters, as in ops/group_view.h.
struct CudaBands {
  int64_t group_filters, band_filters, bands_per_group, bands;
};

// cells: f32 [bands * row], at band * row + j.
int group_sumsq_cells_cuda(const WeightShape& shape, const CudaBands& bands, const StridedWeight& w,
                           const StridedWeight& u, const StridedWeight& mask, float* cells, void* stream);

// scores[i] = the sum of taps consecutive cells, in ascending order, i in [0, n).
int group_sumsq_fold_cuda(const float* cells, int64_t n, int64_t taps, float* scores, void* stream);

// scores: f32 [filters]; the lanes run in channels-last order if asked.
int group_sumsq_rows_cuda(const WeightShape& shape, bool channels_last, const StridedWeight& w, const StridedWeight& u,
                          const StridedWeight& mask, float* scores, void* stream);

}  // namespace structadmm
