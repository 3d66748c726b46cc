// out = gelu_tanh(gate) * up, with gelu_tanh(g) = g/2 (1 + tanh z), z = sqrt(2/pi) (g + 0.044715
// g^3).
//
// A unit is a run of kGegluColumns columns of a row: unit u is run u % runs of row u / runs, so
// that one wide row is shared out too. As (1 + tanh z) / 2 = 1 / (1 + e^-2z), one exponential and
// one division do, without tanh's cancellation where g is negative. Everything in float32, one
// rounding at the end; for 16 bits the exponential need not be better than these. Memory bounds it
// in bfloat16 on many cores, arithmetic on few. Source: transformers, models/gemma2, Gemma2MLP with
// gelu_pytorch_tanh.
#include "gelu.h"
#include "kernels.h"

namespace gemma2 {
namespace GEMMA2_ISA {
namespace {

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
