// Which instruction set the kernels use: the best that this CPU has, or the one that STRUCTADMM_ISA names.
#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace structadmm {

// In order of preference: later is better, and a CPU that has one has those before it. kAvx512Bf16 adds dot products of
// bf16 pairs to kAvx512, kAmxBf16 adds tiles of them; what has no use for either runs its kernels of kAvx512.
enum class Isa { kScalar, kAvx2, kAvx512, kAvx512Bf16, kAmxBf16 };
inline constexpr Isa kAllIsas[] = {Isa::kScalar, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16, Isa::kAmxBf16};

const char* isa_name(Isa isa);
std::optional<Isa> isa_from_name(std::string_view name);
std::string isa_names();  // all, separated by commas

// Whether this CPU and operating system run it and it was compiled in. The first question after tiles asks Linux for
// the process's permission to use them.
bool isa_supported(Isa isa);

// How a CPU runs 512-bit arithmetic: two units and one shuffle at a time beside them (Intel); in two halves of 256
// bits, so that one such instruction costs what two do and loads and shuffles beside it cost little (AMD Zen 4); two
// units and loads and shuffles that keep up with them (AMD Zen 5).
enum class Core512 { kIntel, kZen4, kZen5 };

// That of this CPU. STRUCTADMM_AVX512_CORE (intel, zen4, zen5) stands in for what the CPU says, so that a test sees the
// plans of other machines. Throws Error if it names another.
Core512 core512();

// The one in use. Throws Error if STRUCTADMM_ISA names one that does not exist or that this CPU lacks.
Isa current_isa();

// Overrides it for this process; an empty name returns to STRUCTADMM_ISA or the best. Not for use while ops run.
void set_isa(const std::string& name);

}  // namespace structadmm
