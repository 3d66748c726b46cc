// out = gelu_tanh(gate) * up, with gelu_tanh(g) = g/2 (1 + tanh z), z = sqrt(2/pi) (g + 0.044715
// g^3).
//
// A unit is a run of kGegluColumns columns of a row: unit u is run u % runs of row u / runs, so
// that one wide row is shared out too. As (1 + tanh z) / 2 = 1 / (1 + e^-2z), one exponential and
// one division do, without tanh's cancellation where g is negative. Everything in float32, one
// rounding at the end. Memory bounds it in bfloat16 on many cores, the exponential on few. Source:
// transformers, models/gemma2, Gemma2MLP with gelu_pytorch_tanh.
#include "kernels.h"
#include "simd.h"

namespace gemma2 {
namespace GEMMA2_ISA {
namespace {

GEMMA2_INLINE VecF gelu_tanh(VecF g) {
  const float kSqrt2OverPi = 0.7978845608028654f;
  // -2z = g (a + b g^2). Far below zero e^-2z is inf and the quotient -0, as it should be.
  const VecF a = set(-2.0f * kSqrt2OverPi), b = set(-2.0f * kSqrt2OverPi * 0.044715f);
  return g / (set(1.0f) + exp(g * fma(b, g * g, a)));
}

template <class T>
void geglu_run(const T* gate, const T* up, T* out, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, gelu_tanh(load(gate + i)) * load(up + i));
  if (i < n) {
    const VecF y = gelu_tanh(load_n(gate + i, n - i)) * load_n(up + i, n - i);
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
