// admm_update on the GPU (admm_update.h), on tensors of any strides. Pointers are on the device. Launchers return a
// status (base/cuda_status.h) and wait for nothing.
#pragma once

#include "base/strided.h"

namespace structadmm {

// The keep byte of weight (o, j) is keep[band(o) * groups_per_band + j / width]; bands as in ops/group_view.h.
struct CudaKeep {
  const uint8_t* keep;  // null: the mask alone
  int64_t group_filters, band_filters, bands_per_group;
  int64_t groups_per_band;  // 1 (filter), the channels, or the row
  int64_t width;            // positions of a group in a row: the row, the taps, or 1
};

// Weights whose squares one block adds; partial has 5 doubles for each such tile.
inline constexpr int64_t kCudaTile = 4096;

// bad: null, or a flag that, if set, leaves z and u as they are and makes the sums NaN. partial: f64 [tiles * 5],
// scratch. sums: f64 [5].
int admm_update_cuda(const WeightShape& shape, const CudaKeep& keep, const StridedWeight& w, const StridedWeight& z,
                     const StridedWeight& u, const StridedWeight& mask, const int* bad, double* partial, double* sums,
                     void* stream);

int admm_penalty_cuda(const WeightShape& shape, const StridedWeight& g, const StridedWeight& w, const StridedWeight& z,
                      const StridedWeight& u, float rho, void* stream);

}  // namespace structadmm
