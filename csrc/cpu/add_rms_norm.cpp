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
void add_rms_norm_row(const T* x, const T* residual, const W* post_weight, const W* pre_weight,
                      T* residual_out, T* out, int64_t n, double eps) {
  const VecF one = set(1.0f), scale = rms_scale(sum_of_squares(x, n), n, eps);
  VecF sum = zero();
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const VecF normed = round_to<T>(load(x + i) * scale * (one + load(post_weight + i)));
    const VecF r = round_to<T>(load(residual + i) + normed);
    store_rounded(residual_out + i, r);
    sum = fma(r, r, sum);
  }
  if (i < n) {
    const int64_t left = n - i;
    const VecF weight = one + load_n(post_weight + i, left);
    const VecF normed = round_to<T>(load_n(x + i, left) * scale * weight);
    const VecF r = round_to<T>(load_n(residual + i, left) + normed);
    store_n(residual_out + i, r, left);
    sum = fma(r, r, sum);
  }
  rms_scale_row(residual_out, pre_weight, out, n, rms_scale(reduce_sum(sum), n, eps));
}

}  // namespace

void add_rms_norm_rows(const AddRmsNormParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    dispatch_dtype(p.weight_dtype, [&](auto w) {
      using W = decltype(w);
      const int64_t n = p.hidden_size;
      for (int64_t r = begin; r < end; ++r) {
        add_rms_norm_row((const T*)p.x + r * p.x_stride,
                         (const T*)p.residual + r * p.residual_stride, (const W*)p.post_weight,
                         (const W*)p.pre_weight, (T*)p.residual_out + r * n, (T*)p.out + r * n, n,
                         p.eps);
      }
    });
  });
}

}  // namespace GEMMA2_ISA
}  // namespace gemma2
