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
void backward_row(Row<T> grad_residual_out, Row<T> grad_out, Row<T> x, Row<T> r,
                  const W* post_weight, const W* pre_weight, T* grad_x, T* grad_residual,
                  float* grad_r, float* post_partial, float* pre_partial, int64_t n, double eps) {
  constexpr bool kAny = kAnyNaN<T, W>;
  const VecF one = set(1.0f);
  VecPair<T> r_squares = {}, r_products = {}, x_squares = {};
  walk_pairs<T>(n, [&](int64_t i, auto count) {
    const VecPair<T> a = load_pair<T>(r.begin + i, count), b = load_pair<T>(x.begin + i, count);
    const VecPair<T> up = load_pair<T>(grad_out.begin + i, count);
    r_squares = a * a + r_squares;
    r_products = up * (one + load_pair<T>(pre_weight + i, count)) * a + r_products;
    x_squares = b * b + x_squares;
  });
  const VecF r_scale = rms_scale(sum_of(r_squares), n, eps);
  const VecF x_scale = rms_scale(sum_of(x_squares), n, eps);
  const VecF r_shrink = r_scale * r_scale * set(sum_of(r_products) / float(n));
  VecPair<T> x_products = {};
  walk_pairs<T>(
      n,
      [&](int64_t i, auto count) {
        const VecPair<T> a = load_pair<T>(r.begin + i, count);
        const VecPair<T> b = load_pair<T>(x.begin + i, count);
        const VecPair<T> up = load_pair<T>(grad_out.begin + i, count);
        const VecPair<T> g = up * (one + load_pair<T>(pre_weight + i, count));
        const VecPair<T> sum =
            (g - a * r_shrink) * r_scale + load_pair<T>(grad_residual_out.begin + i, count);
        store_pair<kAny>(grad_residual + i, sum, count);
        store_scratch(grad_r + i, sum, count);
        const VecPair<T> part = load_scratch<T>(pre_partial + i, count);
        store_scratch(pre_partial + i, up * (a * r_scale) + part, count);
        x_products = sum * (one + load_pair<T>(post_weight + i, count)) * b + x_products;
      },
      grad_residual_out.ahead, r.ahead);
  const VecF x_shrink = x_scale * x_scale * set(sum_of(x_products) / float(n));
  walk_pairs<T>(
      n,
      [&](int64_t i, auto count) {
        const VecPair<T> b = load_pair<T>(x.begin + i, count);
        const VecPair<T> up = load_scratch<T>(grad_r + i, count);
        const VecPair<T> g = up * (one + load_pair<T>(post_weight + i, count));
        store_pair<kAny>(grad_x + i, (g - b * x_shrink) * x_scale, count);
        const VecPair<T> part = load_scratch<T>(post_partial + i, count);
        store_scratch(post_partial + i, up * (b * x_scale) + part, count);
      },
      grad_out.ahead, x.ahead);
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
          const auto row = [&](const void* first, int64_t stride) {
            return row_of<T>(first, stride, r, p.rows, n);
          };
          backward_row(row(p.grad_residual_out, p.grad_residual_out_stride),
                       row(p.grad_out, p.grad_out_stride), row(p.x, p.x_stride),
                       row(p.residual_out, p.residual_out_stride), (const W*)p.post_weight,
                       (const W*)p.pre_weight, (T*)p.grad_x + r * n, (T*)p.grad_residual + r * n,
                       partial + 2 * n, partial, partial + n, n, p.eps);
        }
      }
    });
  });
}

void add_rms_norm_backward_columns(const AddRmsNormBackwardParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    dispatch_dtype(p.weight_dtype, [&](auto w) {
      using W = decltype(w);
      const int64_t n = p.hidden_size, blocks = norm_blocks(p.rows);
      for (int64_t u = begin; u < end; ++u) {
        add_parts<T>(p.partial, 3 * n, blocks, u, n, (W*)p.grad_post_weight);
        add_parts<T>(p.partial + n, 3 * n, blocks, u, n, (W*)p.grad_pre_weight);
      }
    });
  });
}

}  // namespace GEMMA2_ISA
}  // namespace gemma2
