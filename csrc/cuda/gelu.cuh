// gelu_tanh and what its derivative needs.
#pragma once
#include "ptx.cuh"

namespace gemma2 {
namespace cuda {

constexpr float kGeluScale = 0.7978845608028654f;  // sqrt(2 / pi)
constexpr float kGeluCube = 0.044715f;

// s = 1 / (1 + exp(-2u)), u = sqrt(2/pi) (g + 0.044715 g^3).
GEMMA2_DEVICE float gelu_sigmoid(float g) {
  const float u = g + kGeluCube * g * g * g;
  return reciprocal_approx(1.0f + exp2_approx(-2.0f * kGeluScale * kLog2E * u));
}

// g/2 (1 + tanh(u)), as g s: where g is negative, 1 + tanh(u) would cancel.
GEMMA2_DEVICE float gelu_tanh(float g) { return g * gelu_sigmoid(g); }

}  // namespace cuda
}  // namespace gemma2
