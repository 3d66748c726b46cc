// gelu_tanh, for the kernels that end with it.
#pragma once
#include "ptx.cuh"

namespace gemma2 {
namespace cuda {

// g/2 (1 + tanh(u)), u = sqrt(2/pi) (g + 0.044715 g^3), as g / (1 + exp(-2u)): where g is negative,
// 1 + tanh(u) would cancel.
GEMMA2_DEVICE float gelu_tanh(float g) {
  constexpr float kLog2E = 1.4426950408889634f, kSqrt2OverPi = 0.7978845608028654f;
  const float u = g + 0.044715f * g * g * g;
  return g * reciprocal_approx(1.0f + exp2_approx(-2.0f * kSqrt2OverPi * kLog2E * u));
}

}  // namespace cuda
}  // namespace gemma2
