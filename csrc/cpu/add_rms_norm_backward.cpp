// Backward of r = residual + norm(x; post_weight), out = norm(r; pre_weight): the gradient of r is
// grad_r + backward(norm(r; pre_weight)), which is that of residual too and goes on through
// norm(x; post_weight). All (rows, hidden_size).
//
// A unit of the first kernel is a block of norm_block_rows rows: the gradients of x and residual,
// and the block's parts of the weights'; of the second a run of kNormColumns columns of both
// weights. The gradient of r stays in float32 between the two norms, kept in the row of scratch
// behind the parts. Memory bounds it. Source: derived from transformers' Gemma2DecoderLayer.
#include "kernels.h"
#include "rms_norm.h"

namespace gemma2 {
namespace GEMMA2_ISA {
namespace {

// One row; grad_r is scratch for it.
template <class T, class W>
void backward_row(const T* grad_residual_out, const T* grad_out, const T* x, const T* r,
                  const W* post_weight, const W* pre_weight, T* grad_x, T* grad_residual,
                  float* grad_r, float* post_partial, float* pre_partial, int64_t n, double eps) {
  const VecF one = set(1.0f);
  VecF r_squares = zero(), r_products = zero(), x_squares = zero();
  for (int64_t i = 0; i < n; i += kLanes) {
    const VecF a = load_at(r, i, n), b = load_at(x, i, n);
    r_squares = fma(a, a, r_squares);
    r_products = fma(load_at(grad_out, i, n) * (one + load_at(pre_weight, i, n)), a, r_products);
    x_squares = fma(b, b, x_squares);
  }
  const VecF r_scale = rms_scale(reduce_sum(r_squares), n, eps);
  const VecF x_scale = rms_scale(reduce_sum(x_squares), n, eps);
  const VecF r_shrink = r_scale * r_scale * set(reduce_sum(r_products) / float(n));
  VecF x_products = zero();
  for (int64_t i = 0; i < n; i += kLanes) {
    const VecF a = load_at(r, i, n), up = load_at(grad_out, i, n);
    const VecF g = up * (one + load_at(pre_weight, i, n));
    const VecF sum = load_at(grad_residual_out, i, n) + r_scale * (g - a * r_shrink);
    store_at(grad_residual, i, n, sum);
    store_at(grad_r, i, n, sum);
    store_at(pre_partial, i, n, fma(up, a * r_scale, load_at(pre_partial, i, n)));
    x_products = fma(sum * (one + load_at(post_weight, i, n)), load_at(x, i, n), x_products);
  }
  const VecF x_shrink = x_scale * x_scale * set(reduce_sum(x_products) / float(n));
  for (int64_t i = 0; i < n; i += kLanes) {
    const VecF b = load_at(x, i, n), up = load_at(grad_r, i, n);
    const VecF g = up * (one + load_at(post_weight, i, n));
    store_at(grad_x, i, n, x_scale * (g - b * x_shrink));
    store_at(post_partial, i, n, fma(up, b * x_scale, load_at(post_partial, i, n)));
  }
}

}  // namespace

void add_rms_norm_backward_blocks(const AddRmsNormBackwardParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    dispatch_dtype(p.weight_dtype, [&](auto w) {
      using W = decltype(w);
      const int64_t n = p.hidden_size, block_rows = norm_block_rows(p.rows);
      for (int64_t block = begin; block < end; ++block) {
        float* partial = p.partial + block * 3 * n;
        memset(partial, 0, 2 * n * sizeof(float));
        const int64_t rows_end =
            (block + 1) * block_rows < p.rows ? (block + 1) * block_rows : p.rows;
        for (int64_t r = block * block_rows; r < rows_end; ++r) {
          backward_row((const T*)p.grad_residual_out + r * p.grad_residual_out_stride,
                       (const T*)p.grad_out + r * p.grad_out_stride, (const T*)p.x + r * p.x_stride,
                       (const T*)p.residual_out + r * p.residual_out_stride,
                       (const W*)p.post_weight, (const W*)p.pre_weight, (T*)p.grad_x + r * n,
                       (T*)p.grad_residual + r * n, partial + 2 * n, partial, partial + n, n,
                       p.eps);
        }
      }
    });
  });
}

void add_rms_norm_backward_columns(const AddRmsNormBackwardParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.weight_dtype, [&](auto w) {
    using W = decltype(w);
    const int64_t n = p.hidden_size, blocks = norm_blocks(p.rows);
    for (int64_t u = begin; u < end; ++u) {
      add_parts(p.partial, 3 * n, blocks, u, n, (W*)p.grad_post_weight);
      add_parts(p.partial + n, 3 * n, blocks, u, n, (W*)p.grad_pre_weight);
    }
  });
}

}  // namespace GEMMA2_ISA
}  // namespace gemma2
