// r = residual + norm(x; post_weight); out = norm(r; pre_weight); all (rows, hidden_size), with
// norm(x; w) = x * rsqrt(mean(x^2) + eps) * (1 + w).
//
// A unit is a row. Three passes over it: the squares of x; r and its squares; the second norm. All
// but the first find the row in the first-level cache, so memory bounds it. Norms are in float32;
// norm(x) and r are each rounded to the dtype, as transformers does, and the second norm is of the
// rounded r. Source: transformers, models/gemma2, Gemma2DecoderLayer.
#include <math.h>

#include "kernels.h"
#include "rms_norm.h"
#include "simd.h"

namespace gemma2 {
namespace GEMMA2_ISA {
namespace {

template <class T, class W>
void add_rms_norm_row(Row<T> x, Row<T> residual, const W* post_weight, const W* pre_weight,
                      T* residual_out, T* out, int64_t n, double eps) {
  constexpr bool kAny = kAnyNaN<T, W>;
  const VecF one = set(1.0f), scale = rms_scale(sum_of_squares(x.begin, n), n, eps);
  VecPair<T> sum = {};
  walk_pairs<T>(
      n,
      [&](int64_t i, auto count) {
        const VecPair<T> factor = one + load_pair<T>(post_weight + i, count);
        const VecPair<T> normed = load_pair<T>(x.begin + i, count) * scale * factor;
        const VecPair<T> r =
            round_pair<kAny>(load_pair<T>(residual.begin + i, count) + round_pair<kAny>(normed));
        store_rounded_pair(residual_out + i, r, count);
        sum = r * r + sum;
      },
      x.ahead);
  const VecF pre_scale = rms_scale(sum_of(sum), n, eps);
  rms_scale_row(residual_out, pre_weight, out, n, pre_scale, residual.ahead);
}

}  // namespace

void add_rms_norm_rows(const AddRmsNormParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    dispatch_dtype(p.weight_dtype, [&](auto w) {
      using W = decltype(w);
      const int64_t n = p.hidden_size;
      for (int64_t r = begin; r < end; ++r) {
        add_rms_norm_row(row_of<T>(p.x, p.x_stride, r, p.rows, n),
                         row_of<T>(p.residual, p.residual_stride, r, p.rows, n),
                         (const W*)p.post_weight, (const W*)p.pre_weight,
                         (T*)p.residual_out + r * n, (T*)p.out + r * n, n, p.eps);
      }
    });
  });
}

}  // namespace GEMMA2_ISA
}  // namespace gemma2
