// Choice of a variant from a room's table, best last: the last row (of the dtype) that needs no more than the ISA. So a
// room without kernels for a later instruction set runs its best of the earlier ones.
#pragma once

#include "base/check.h"
#include "base/isa.h"
#include "base/tensor_view.h"

namespace structadmm {

template <class Kernel, int kSize>
const Kernel& select_kernel(const char* family, const Kernel* const (&table)[kSize], Isa isa, Dtype dtype) {
  for (int i = kSize - 1; i >= 0; --i) {
    if (table[i]->dtype == dtype && table[i]->isa <= isa) return *table[i];
  }
  fail(family, ": dtype got ", dtype_name(dtype), ", wanted f32, bf16 or f16");
}

template <class Kernel>
struct IsaRow {
  Isa isa;
  Kernel kernel;
};

template <class Kernel, int kSize>
constexpr Kernel select_row(const IsaRow<Kernel> (&rows)[kSize], Isa isa) {
  int i = kSize - 1;
  while (i > 0 && rows[i].isa > isa) --i;
  return rows[i].kernel;
}

}  // namespace structadmm
