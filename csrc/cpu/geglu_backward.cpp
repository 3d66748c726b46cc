// Backward of out = gelu_tanh(gate) * up: grad_up = grad_out gelu(gate), grad_gate = grad_out up
// gelu'(gate), with gelu(g) = g / (1 + e^-2z), z = sqrt(2/pi) (g + 0.044715 g^3).
//
// Units as in geglu: a run of kGegluColumns columns of a row. With q = 1 / (1 + e^-2z),
// gelu' = q + g q (1 - q) 2z'. Everything in float32, one rounding at the end. Memory bounds it in
// bfloat16 on many cores, arithmetic on few. Source: derived from transformers' Gemma2MLP.
#include "gelu.h"
#include "kernels.h"

namespace gemma2 {
namespace GEMMA2_ISA {
namespace {

struct Gelu {
  VecF value, slope;
};

template <class T>
GEMMA2_INLINE Gelu gelu_tanh(VecF g) {
  const VecF one = set(1.0f);
  const VecF q = one / (one + exp_minus_2z(T{}, g));  // 0 far below zero
  // Past 30 the slope is 0 or 1 to a float's precision, and its factors would overflow. Operands in
  // the order for a NaN.
  const VecF h = max(set(-30.0f), min(set(30.0f), g));
  const VecF minus_2z_slope = fma(set(3.0f * kB), h * h, set(kA));
  return {g * q, q - h * q * (one - q) * minus_2z_slope};
}

}  // namespace

void geglu_backward_runs(const GegluBackwardParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    const int64_t runs = (p.columns + kGegluColumns - 1) / kGegluColumns;
    for (int64_t u = begin; u < end; ++u) {
      const int64_t row = u / runs, first = u % runs * kGegluColumns;
      const int64_t last = first + kGegluColumns < p.columns ? first + kGegluColumns : p.columns;
      const T* grad_out = (const T*)p.grad_out + row * p.grad_out_stride;
      const T* gate = (const T*)p.gate + row * p.gate_stride;
      const T* up = (const T*)p.up + row * p.up_stride;
      T* grad_gate = (T*)p.grad_gate + row * p.columns;
      T* grad_up = (T*)p.grad_up + row * p.columns;
      walk_pairs<T>(last - first, [&](int64_t i, auto count) {
        i += first;
        const VecPair<T> dy = load_pair<T>(grad_out + i, count);
        const VecPair<T> g = load_pair<T>(gate + i, count);
        const Gelu a = gelu_tanh<T>(g.first), b = gelu_tanh<T>(g.second);
        const VecPair<T> value{a.value, b.value}, slope{a.slope, b.slope};
        store_pair<false>(grad_gate + i, dy * load_pair<T>(up + i, count) * slope, count);
        store_pair<false>(grad_up + i, dy * value, count);
      });
    }
  });
}

}  // namespace GEMMA2_ISA
}  // namespace gemma2
