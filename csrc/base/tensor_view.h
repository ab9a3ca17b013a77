// A tensor as the core sees it: a pointer, a dtype, sizes and strides. It owns nothing; the bindings make it.
#pragma once

#include <cstdint>
#include <string>

namespace structadmm {

// Storage types without arithmetic: kernels convert to f32 on load.
struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

enum class Dtype { kF32, kBf16, kF16, kF64, kBool, kI32, kOther };
enum class Device { kCpu, kCuda, kOther };

constexpr const char* dtype_name(Dtype dtype) {
  constexpr const char* names[] = {"f32", "bf16", "f16", "f64", "bool", "i32", "another dtype"};
  return names[static_cast<int>(dtype)];
}

constexpr int64_t dtype_size(Dtype dtype) {
  constexpr int64_t sizes[] = {4, 2, 2, 8, 1, 4, 0};
  return sizes[static_cast<int>(dtype)];
}

inline constexpr int kMaxDims = 8;

// Strides are in elements and may have any sign.
struct TensorView {
  void* data = nullptr;
  Dtype dtype = Dtype::kOther;
  Device device = Device::kCpu;
  int device_index = 0;
  int dims = 0;
  int64_t sizes[kMaxDims] = {};
  int64_t strides[kMaxDims] = {};

  int64_t numel() const {
    int64_t n = 1;
    for (int i = 0; i < dims; ++i) n *= sizes[i];
    return n;
  }

  bool same_shape(const TensorView& other) const {
    if (dims != other.dims) return false;
    for (int i = 0; i < dims; ++i) {
      if (sizes[i] != other.sizes[i]) return false;
    }
    return true;
  }

  std::string shape() const {
    std::string text = "[";
    for (int i = 0; i < dims; ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
    return text + "]";
  }
};

}  // namespace structadmm
