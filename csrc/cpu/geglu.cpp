// out = gelu_tanh(gate) * up, with gelu_tanh(g) = g/2 (1 + tanh z), z = sqrt(2/pi) (g + 0.044715
// g^3).
//
// A unit is a run of kGegluColumns columns of a row: unit u is run u % runs of row u / runs, so
// that one wide row is shared out too. As (1 + tanh z) / 2 = 1 / (1 + e^-2z), one exponential and
// one division do, without tanh's cancellation where g is negative. Everything in float32, one
// rounding at the end; for 16 bits the exponential need not be better than these. Memory bounds it
// in bfloat16 on many cores, arithmetic on few. Source: transformers, models/gemma2, Gemma2MLP with
// gelu_pytorch_tanh.
#include "kernels.h"
#include "simd.h"

namespace gemma2 {
namespace GEMMA2_ISA {
namespace {

// 2^x for a result of type T, 0 below -126, inf from 128 on, NaN of NaN. 2^n 2^r with n the nearest
// integer; 2^r by a polynomial, minimax in the relative error on [-0.5, 0.5]: 7.5e-5 for bfloat16,
// 2.6e-6 for float16, of whose roundings these are a twenty-sixth and a ninetieth.
template <class T>
GEMMA2_INLINE VecF exp2_for(VecF x);
GEMMA2_INLINE VecF scale_by_exp2(VecF y, VecF shifted) {
  return y * (VecF)(((VecU)shifted << 23) + 0x3f800000u);
}
template <>
GEMMA2_INLINE VecF exp2_for<BFloat16>(VecF x) {
  const VecF clamped = max(set(-127.0f), min(set(128.0f), x));  // operands in the order for a NaN
  const VecF shifted = clamped + set(0x1.8p23f);                // its lowest bits are n
  const VecF r = clamped - (shifted - set(0x1.8p23f));
  VecF y = set(0x1.c3f766p-5f);
  y = fma(y, r, set(0x1.f0de1ap-3f));
  y = fma(y, r, set(0x1.62f31ap-1f));
  return scale_by_exp2(fma(y, r, set(0x1.fff692p-1f)), shifted);
}
template <>
GEMMA2_INLINE VecF exp2_for<Half>(VecF x) {
  const VecF clamped = max(set(-127.0f), min(set(128.0f), x));
  const VecF shifted = clamped + set(0x1.8p23f);
  const VecF r = clamped - (shifted - set(0x1.8p23f));
  VecF y = set(0x1.3997d6p-7f);
  y = fma(y, r, set(0x1.ca1440p-5f));
  y = fma(y, r, set(0x1.ec06dap-3f));
  y = fma(y, r, set(0x1.62e0dcp-1f));
  return scale_by_exp2(fma(y, r, set(0x1.ffffe8p-1f)), shifted);
}
// In two steps: 2^x of an x that was rounded as -2z / ln 2 would not be as good as e^-2z.
template <>
GEMMA2_INLINE VecF exp2_for<float>(VecF x) {
  return exp(x);
}

template <class T>
GEMMA2_INLINE VecF gelu_tanh(VecF g) {
  const float kSqrt2OverPi = 0.7978845608028654f;
  // The exponent is g (a + b g^2). Far below zero the exponential is inf and the quotient -0, as it
  // should be.
  const float scale = sizeof(T) == 2 ? -2.0f * 0x1.715476p0f : -2.0f;  // 1 / ln 2
  const VecF a = set(scale * kSqrt2OverPi), b = set(scale * kSqrt2OverPi * 0.044715f);
  return g / (set(1.0f) + exp2_for<T>(g * fma(b, g * g, a)));
}

template <class T>
void geglu_run(const T* gate, const T* up, T* out, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, gelu_tanh<T>(load(gate + i)) * load(up + i));
  if (i < n) {
    const VecF y = gelu_tanh<T>(load_n(gate + i, n - i)) * load_n(up + i, n - i);
    store_n(out + i, y, n - i);
  }
}

}  // namespace

void geglu_runs(const GegluParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    const int64_t runs = (p.columns + kGegluColumns - 1) / kGegluColumns;
    for (int64_t u = begin; u < end; ++u) {
      const int64_t row = u / runs, column = u % runs * kGegluColumns;
      const int64_t left = p.columns - column;
      geglu_run((const T*)p.gate + row * p.gate_stride + column,
                (const T*)p.up + row * p.up_stride + column, (T*)p.out + row * p.columns + column,
                left < kGegluColumns ? left : kGegluColumns);
    }
  });
}

}  // namespace GEMMA2_ISA
}  // namespace gemma2
