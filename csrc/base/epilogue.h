// What is applied to a sum before it is stored: y = activation(sum + bias + residual), clamped to [low, high].
#pragma once

#include <limits>

namespace structadmm {

// kClamp covers none (low = -inf, high = inf), ReLU (0, inf), ReLU6 (0, 6) and hardtanh. NaN stays NaN.
enum class Activation { kClamp, kSilu, kGelu, kGeluTanh, kHardswish, kHardsigmoid, kSigmoid, kTanh, kLeakyRelu };

struct Epilogue {
  Activation activation = Activation::kClamp;
  float low = -std::numeric_limits<float>::infinity();  // of kClamp
  float high = std::numeric_limits<float>::infinity();
  float slope = 0;        // of kLeakyRelu
  bool residual = false;  // whether another value of the output's shape is added before the activation
  bool operator==(const Epilogue&) const = default;
  bool none() const { return *this == Epilogue{}; }
};

}  // namespace structadmm
