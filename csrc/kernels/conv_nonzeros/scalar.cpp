// The baseline of the platform: vectors of four through the compiler, multiply and add rounded separately.
#include <cstring>
#include <utility>

#include "kernels/conv_nonzeros/conv_nonzeros.h"
#include "kernels/conv_nonzeros/isa_tables.h"
#include "simd/activate.h"

namespace structadmm::kernels {
namespace {

#include "kernels/conv_nonzeros/generic.h"

struct Vec4 {
  typedef float Reg __attribute__((vector_size(16)));
  static constexpr int kLanes = 4;
  static Reg zero() { return Reg{}; }
  static Reg load(const float* p) {
    Reg r;
    std::memcpy(&r, p, sizeof r);
    return r;
  }
  static Reg broadcast(float x) { return Reg{x, x, x, x}; }
  static Reg fma(Reg a, Reg b, Reg c) { return a * b + c; }
  static Reg add(Reg a, Reg b) { return a + b; }
  static Reg clamp(Reg x, Reg low, Reg high) {
    x = low > x ? low : x;
    return high < x ? high : x;
  }
  static Reg curve(Reg x, const Epilogue& epilogue) {
    ActiveVec v = ActiveVec::zero();
    std::memcpy(v.a, &x, sizeof x);
    v = activate(v, epilogue);
    std::memcpy(&x, v.a, sizeof x);
    return x;
  }
  static void store(float* p, Reg r) { std::memcpy(p, &r, sizeof r); }

  static Reg permute(Reg r, const int32_t* from) {
    Reg to{};
    for (int i = 0; i < 4; ++i) {
      if (from[i] >= 0) to[i] = r[from[i]];
    }
    return to;
  }
  static Reg load_pieces(const float* p, const int64_t* lane) { return load(p + lane[0]); }
  static Reg load_pieces(const float* p, const int64_t* lane, const uint8_t* bits) {
    Reg r{};
    for (int i = 0; i < 4; ++i) {
      if (*bits >> i & 1) r[i] = p[lane[0] + i];
    }
    return r;
  }
  static void store_pieces(float* p, const int64_t* lane, Reg r) { store(p + lane[0], r); }
  static void store_pieces(float* p, const int64_t* lane, const uint8_t* bits, Reg r) {
    for (int i = 0; i < 4; ++i) {
      if (*bits >> i & 1) p[lane[0] + i] = r[i];
    }
  }
  static void transpose(Reg (&r)[4]) {
    for (int i = 0; i < 4; ++i) {
      for (int j = 0; j < i; ++j) {
        const float t = r[i][j];
        r[i][j] = r[j][i];
        r[j][i] = t;
      }
    }
  }
};

}  // namespace

extern constinit const ConvNonzeros conv_nonzeros_scalar = make<Vec4, 8>("scalar", 576, 576);

}  // namespace structadmm::kernels
