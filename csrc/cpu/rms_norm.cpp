// out = x * rsqrt(mean(x^2) + eps) * (1 + weight), row by row; x (rows, hidden_size).
//
// A unit is a row. Two passes over the row: the sum of squares, then the products; the second finds
// the row in the first-level cache, so memory bounds it. Everything in float32, one rounding at the
// end. Source: transformers, models/gemma2, Gemma2RMSNorm.
#include <math.h>

#include "kernels.h"
#include "simd.h"

namespace gemma2 {
namespace GEMMA2_ISA {
namespace {

template <class T>
GEMMA2_INLINE float sum_of_squares(const T* x, int64_t n) {
  VecF sum0 = zero(), sum1 = zero();
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    const VecF a = load(x + i), b = load(x + i + kLanes);
    sum0 = fma(a, a, sum0);
    sum1 = fma(b, b, sum1);
  }
  for (; i < n; i += kLanes) {
    const VecF a = i + kLanes <= n ? load(x + i) : load_n(x + i, n - i);
    sum0 = fma(a, a, sum0);
  }
  return reduce_sum(sum0 + sum1);
}

template <class T, class W>
void rms_norm_row(const T* x, const W* weight, T* out, int64_t n, float eps) {
  const VecF scale = set(1.0f / sqrtf(sum_of_squares(x, n) / float(n) + eps));
  const VecF one = set(1.0f);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    store(out + i, load(x + i) * scale * (one + load(weight + i)));
  if (i < n) {
    const VecF y = load_n(x + i, n - i) * scale * (one + load_n(weight + i, n - i));
    store_n(out + i, y, n - i);
  }
}

}  // namespace

void rms_norm_rows(const RmsNormParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    dispatch_dtype(p.weight_dtype, [&](auto w) {
      using W = decltype(w);
      for (int64_t r = begin; r < end; ++r) {
        rms_norm_row((const T*)p.x + r * p.x_stride, (const W*)p.weight,
                     (T*)p.out + r * p.hidden_size, p.hidden_size, p.eps);
      }
    });
  });
}

}  // namespace GEMMA2_ISA
}  // namespace gemma2
