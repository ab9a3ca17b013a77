#include "base/isa.h"

#include <atomic>
#include <cstdlib>

#include "base/check.h"

#if SADMM_X86
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace structadmm {
namespace {

std::atomic<int> override_isa{-1};

#if SADMM_X86
bool has_avx512_bf16() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & (1u << 5)) != 0;
}

bool has_amx_bf16() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kOsXsave = 1u << 27;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & kBf16) == 0 || (edx & kTile) == 0) return false;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || (ecx & kOsXsave) == 0) return false;
  unsigned low = 0, high = 0;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr unsigned kTileState = 3u << 17;  // XTILECFG and XTILEDATA
  if ((low & kTileState) != kTileState) return false;
#if defined(__linux__) && defined(SYS_arch_prctl)
  // The 8 KiB of tile data are in no thread's saved state until the process asks; threads and children inherit it.
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  static const bool permitted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return permitted;
#else
  return false;
#endif
}

Core512 core_of_cpu() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid(0, &eax, &ebx, &ecx, &edx) || ebx != signature_AMD_ebx) return Core512::kIntel;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return Core512::kIntel;
  const unsigned family = (eax >> 8 & 0xF) + (eax >> 20 & 0xFF);
  const unsigned model = (eax >> 4 & 0xF) | (eax >> 12 & 0xF0);
  if (family == 0x19) return Core512::kZen4;  // and Zen 3, which has none of it
  // The Zen 5 of notebooks runs halves too.
  const bool notebook = family == 0x1A && ((model >= 0x20 && model < 0x40) || (model >= 0x60 && model < 0x70));
  return notebook ? Core512::kZen4 : Core512::kZen5;
}
#endif

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
    case Isa::kAvx512Bf16:
      return "avx512_bf16";
    case Isa::kAmxBf16:
      return "amx_bf16";
  }
  return "unknown";
}

std::optional<Isa> isa_from_name(std::string_view name) {
  for (Isa isa : kAllIsas) {
    if (name == isa_name(isa)) return isa;
  }
  return std::nullopt;
}

std::string isa_names() {
  std::string names;
  for (Isa isa : kAllIsas) names += (names.empty() ? "" : ", ") + std::string(isa_name(isa));
  return names;
}

bool isa_supported(Isa isa) {
  if (isa == Isa::kScalar) return true;
#if SADMM_X86
  // The builtins also ask whether the operating system saves the wide registers.
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & (1u << 29)) != 0;
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c;
  if (isa == Isa::kAvx2) return avx2;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (isa == Isa::kAvx512) return avx512;
  const bool bf16 = avx512 && has_avx512_bf16();
  return isa == Isa::kAvx512Bf16 ? bf16 : bf16 && has_amx_bf16();
#else
  return false;
#endif
}

Core512 core512() {
  if (const char* name = std::getenv("STRUCTADMM_AVX512_CORE"); name && *name) {
    const std::string_view given = name;
    if (given == "intel") return Core512::kIntel;
    if (given == "zen4") return Core512::kZen4;
    SADMM_CHECK(given == "zen5", "STRUCTADMM_AVX512_CORE: got '", name, "', wanted intel, zen4 or zen5");
    return Core512::kZen5;
  }
#if SADMM_X86
  static const Core512 core = core_of_cpu();
  return core;
#else
  return Core512::kIntel;
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
