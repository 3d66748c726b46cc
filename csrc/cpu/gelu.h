// The exponential in gelu_tanh(g) = g / (1 + e^-2z), z = sqrt(2/pi) (g + 0.044715 g^3): for 16 bits
// it need not be better than these.
#pragma once
#include "pairs.h"

namespace gemma2 {
namespace GEMMA2_ISA {
namespace {

// 2^r for r in [-0.5, 0.5], minimax in the relative error: 7.5e-5 for a result in bfloat16, 2.6e-6
// in float16, a twenty-sixth and a ninetieth of what rounding to these may change.
GEMMA2_INLINE VecF exp2_fraction(BFloat16, VecF r) {
  VecF y = set(0x1.c3f766p-5f);
  y = fma(y, r, set(0x1.f0de1ap-3f));
  y = fma(y, r, set(0x1.62f31ap-1f));
  return fma(y, r, set(0x1.fff692p-1f));
}
GEMMA2_INLINE VecF exp2_fraction(Half, VecF r) {
  VecF y = set(0x1.3997d6p-7f);
  y = fma(y, r, set(0x1.ca1440p-5f));
  y = fma(y, r, set(0x1.ec06dap-3f));
  y = fma(y, r, set(0x1.62e0dcp-1f));
  return fma(y, r, set(0x1.ffffe8p-1f));
}

// e^-2z for a result of the first argument's type; inf far below zero, NaN of NaN.
// -2z = g (a + b g^2), in units of ln 2 for 16 bits: 2^n 2^r with n the nearest integer.
constexpr float kA = -2.0f * 0.7978845608028654f, kB = kA * 0.044715f;  // sqrt(2 / pi)
template <class T>
GEMMA2_INLINE VecF exp_minus_2z(T t, VecF g) {
  const float log2_e = 0x1.715476p0f;
  const VecF x = g * fma(set(kB * log2_e), g * g, set(kA * log2_e));
  const VecF clamped = max(set(-127.0f), min(set(128.0f), x));  // operands in the order for a NaN
  const VecF shifted = clamped + set(0x1.8p23f);                // its lowest bits are n
  const VecF r = clamped - (shifted - set(0x1.8p23f));
  return exp2_fraction(t, r) * (VecF)(((VecU)shifted << 23) + 0x3f800000u);
}
GEMMA2_INLINE VecF exp_minus_2z(float, VecF g) { return exp(g * fma(set(kB), g * g, set(kA))); }

}  // namespace
}  // namespace GEMMA2_ISA
}  // namespace gemma2
