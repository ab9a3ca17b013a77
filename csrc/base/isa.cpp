#include "base/isa.h"

#include <atomic>
#include <cstdlib>

#include "base/check.h"

#if SADMM_X86
#include <cpuid.h>
#endif

namespace structadmm {
namespace {

std::atomic<int> override_isa{-1};

Isa best_isa() {
  Isa best = Isa::kScalar;
  for (Isa isa : kAllIsas) {
    if (isa_supported(isa)) best = isa;
  }
  return best;
}

Isa checked(const char* source, const std::string& name) {
  std::string have;
  for (Isa isa : kAllIsas) {
    if (isa_supported(isa)) have += (have.empty() ? "" : ", ") + std::string(isa_name(isa));
  }
  const auto isa = isa_from_name(name);
  SADMM_CHECK(isa, source, ": got '", name, "', wanted one of ", have);
  SADMM_CHECK(isa_supported(*isa), source, ": got '", name, "', which this CPU lacks; wanted one of ", have);
  return *isa;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kScalar:
      return "scalar";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
  }
  return "unknown";
}

std::optional<Isa> isa_from_name(std::string_view name) {
  for (Isa isa : kAllIsas) {
    if (name == isa_name(isa)) return isa;
  }
  return std::nullopt;
}

bool isa_supported(Isa isa) {
  if (isa == Isa::kScalar) return true;
#if SADMM_X86
  // The builtins also ask whether the operating system saves the wide registers.
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & (1u << 29)) != 0;
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c;
  if (isa == Isa::kAvx2) return avx2;
  return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

Isa current_isa() {
  if (const int isa = override_isa.load(std::memory_order_relaxed); isa >= 0) return static_cast<Isa>(isa);
  // A throwing initialiser is run again at the next call, so a bad STRUCTADMM_ISA is an error every time.
  static const Isa isa = [] {
    const char* name = std::getenv("STRUCTADMM_ISA");
    return name && *name ? checked("STRUCTADMM_ISA", name) : best_isa();
  }();
  return isa;
}

void set_isa(const std::string& name) {
  override_isa.store(name.empty() ? -1 : static_cast<int>(checked("set_isa", name)));
}

}  // namespace structadmm
