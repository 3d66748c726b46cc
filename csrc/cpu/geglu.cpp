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

// Far below zero the exponential is inf and the quotient -0, as it should be.
template <class T>
GEMMA2_INLINE VecF gelu_tanh(VecF g) {
  return g / (set(1.0f) + exp_minus_2z(T{}, g));
}

template <class T>
void geglu_run(const T* gate, const T* up, T* out, int64_t n) {
  walk_pairs<T>(n, [&](int64_t i, auto count) {
    VecPair<T> y = load_pair<T>(gate + i, count);
    y = {gelu_tanh<T>(y.first), gelu_tanh<T>(y.second)};
    store_pair<false>(out + i, y * load_pair<T>(up + i, count), count);
  });
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
