// out = x * rsqrt(mean(x^2) + eps) * (1 + weight), row by row; x (rows, hidden_size).
//
// A unit is a row. Two passes over the row: the sum of squares, then the products; the second finds
// the row in the first-level cache, so memory bounds it. Everything in float32, one rounding at the
// end. Source: transformers, models/gemma2, Gemma2RMSNorm.
#include "rms_norm.h"

#include "kernels.h"
#include "simd.h"

namespace gemma2 {
namespace GEMMA2_ISA {

void rms_norm_rows(const RmsNormParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    dispatch_dtype(p.weight_dtype, [&](auto w) {
      using W = decltype(w);
      const int64_t n = p.hidden_size;
      for (int64_t r = begin; r < end; ++r) {
        const Row<T> x = row_of<T>(p.x, p.x_stride, r, p.rows, n);
        const VecF scale = rms_scale(sum_of_squares(x.begin, n), n, p.eps);
        rms_scale_row(x.begin, (const W*)p.weight, (T*)p.out + r * n, n, scale, x.ahead);
      }
    });
  });
}

}  // namespace GEMMA2_ISA
}  // namespace gemma2
