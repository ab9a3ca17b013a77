// How a step splits its units of work (planes, rows) into tasks.
#pragma once

#include <algorithm>
#include <cstdint>

#include "base/parallel.h"

namespace structadmm {

// Calls run(begin, end) on ranges that make up [0, units): one, if the `work` in all is below `serial_below`, for
// waking threads costs about ten microseconds; else a few per thread.
template <class Run>
void split(Parallel& parallel, int64_t units, int64_t work, int64_t serial_below, const Run& run) {
  const bool serial = work < serial_below || parallel.threads() == 1;
  const int64_t tasks = serial ? 1 : std::min<int64_t>(units, 4 * parallel.threads());
  if (units <= 0) return;
  parallel.run(tasks, [&](int64_t task) { run(task * units / tasks, (task + 1) * units / tasks); });
}

}  // namespace structadmm
