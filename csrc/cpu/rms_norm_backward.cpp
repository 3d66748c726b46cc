// Backward of out = x * s * (1 + weight), s = rsqrt(mean(x^2) + eps), x (rows, hidden_size):
// with g = grad_out * (1 + weight), grad_x = s (g - x s^2 mean(g x)), and
// grad_weight = sum over the rows of grad_out x s.
//
// A unit of the first kernel is a block of norm_block_rows rows: grad_x, and the block's part of
// grad_weight; of the second a run of kNormColumns columns, where the parts are added in their
// order. Two passes over a row, the second from the first-level cache; memory bounds it. Everything
// in float32, one rounding at the end. Source: derived from transformers' Gemma2RMSNorm.
#include "kernels.h"
#include "rms_norm.h"

namespace gemma2 {
namespace GEMMA2_ISA {
namespace {

template <class T, class W>
void backward_row(Row<T> grad_out, Row<T> x, const W* weight, T* grad_x, float* partial, int64_t n,
                  double eps) {
  const VecF one = set(1.0f);
  VecPair<T> squares = {}, products = {};
  walk_pairs<T>(n, [&](int64_t i, auto count) {
    const VecPair<T> a = load_pair<T>(x.begin + i, count);
    const VecPair<T> up = load_pair<T>(grad_out.begin + i, count);
    squares = a * a + squares;
    products = up * (one + load_pair<T>(weight + i, count)) * a + products;
  });
  const VecF s = rms_scale(sum_of(squares), n, eps);
  const VecF shrink = s * s * set(sum_of(products) / float(n));
  walk_pairs<T>(
      n,
      [&](int64_t i, auto count) {
        const VecPair<T> a = load_pair<T>(x.begin + i, count);
        const VecPair<T> up = load_pair<T>(grad_out.begin + i, count);
        const VecPair<T> g = up * (one + load_pair<T>(weight + i, count));
        store_pair<kAnyNaN<T, W>>(grad_x + i, (g - a * shrink) * s, count);
        const VecPair<T> part = load_scratch<T>(partial + i, count);
        store_scratch(partial + i, up * (a * s) + part, count);
      },
      grad_out.ahead, x.ahead);
}

}  // namespace

void rms_norm_backward_blocks(const RmsNormBackwardParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    dispatch_dtype(p.weight_dtype, [&](auto w) {
      using W = decltype(w);
      const int64_t n = p.hidden_size, block_rows = norm_block_rows(p.rows);
      for (int64_t block = begin; block < end; ++block) {
        float* partial = p.partial + block * n;
        memset(partial, 0, n * sizeof(float));
        const int64_t rows_end =
            (block + 1) * block_rows < p.rows ? (block + 1) * block_rows : p.rows;
        for (int64_t r = block * block_rows; r < rows_end; ++r) {
          backward_row(row_of<T>(p.grad_out, p.grad_out_stride, r, p.rows, n),
                       row_of<T>(p.x, p.x_stride, r, p.rows, n), (const W*)p.weight,
                       (T*)p.grad_x + r * n, partial, n, p.eps);
        }
      }
    });
  });
}

void rms_norm_backward_columns(const RmsNormBackwardParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto t) {
    dispatch_dtype(p.weight_dtype, [&](auto w) {
      const int64_t n = p.hidden_size, blocks = norm_blocks(p.rows);
      for (int64_t u = begin; u < end; ++u)
        add_parts<decltype(t)>(p.partial, n, blocks, u, n, (decltype(w)*)p.grad_weight);
    });
  });
}

}  // namespace GEMMA2_ISA
}  // namespace gemma2
