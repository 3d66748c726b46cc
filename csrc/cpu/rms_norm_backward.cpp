// Backward of out = x * s * (1 + weight), s = rsqrt(mean(x^2) + eps), x (rows, hidden_size):
// with g = grad_out * (1 + weight), grad_x = s (g - x s^2 mean(g x)), and
// grad_weight = sum over the rows of grad_out x s.
//
// A unit of the first kernel is a block of norm_block_rows rows: grad_x, and the block's part of
// grad_weight; of the second a run of kNormColumns columns, where the parts are added in their
// order. Two passes over kNormGroup rows at a time; the first asks for the lines that the second
// writes, which would wait for them among its other loads and stores. Memory bounds it. Everything
// in float32, one rounding at the end. Source: derived from transformers' Gemma2RMSNorm.
#include "kernels.h"
#include "rms_norm.h"

namespace gemma2 {
namespace GEMMA2_ISA {
namespace {

template <int kRows, class T, class W>
void backward_rows(RowGroup<T> grad_out, RowGroup<T> x, const W* weight, T* grad_x, float* partial,
                   int64_t n, double eps) {
  const VecF one = set(1.0f);
  VecF squares[kRows] = {}, products[kRows] = {};
  walk_lines<T>(
      n,
      [&](int64_t i, auto count) {
        const VecPair<T> factor = one + load_pair<T>(weight + i, count);
        GEMMA2_UNROLL
        for (int r = 0; r < kRows; ++r) {
          const VecPair<T> a = load_pair<T>(x[r] + i, count);
          squares[r] = add_products(squares[r], a, a);
          products[r] = add_products(products[r], load_pair<T>(grad_out[r] + i, count) * factor, a);
        }
      },
      [&](int64_t i) __attribute__((always_inline)) {
        GEMMA2_UNROLL
        for (int r = 0; r < kRows; ++r) prefetch(grad_x + r * n + i);
      });
  VecF s[kRows], shrink[kRows];
  for (int r = 0; r < kRows; ++r) {
    s[r] = rms_scale(reduce_sum(squares[r]), n, eps);
    shrink[r] = s[r] * set(reduce_sum(products[r]) / float(n));
  }
  walk_lines<T>(
      n,
      [&](int64_t i, auto count) {
        const VecPair<T> factor = one + load_pair<T>(weight + i, count);
        VecPair<T> part = load_scratch<T>(partial + i, count);
        GEMMA2_UNROLL
        for (int r = 0; r < kRows; ++r) {
          const VecPair<T> normed = load_pair<T>(x[r] + i, count) * s[r];
          const VecPair<T> up = load_pair<T>(grad_out[r] + i, count);
          const VecPair<T> grad = (up * factor - normed * shrink[r]) * s[r];
          store_pair<kAnyNaN<T, W>>(grad_x + r * n + i, grad, count);
          part = up * normed + part;
        }
        store_scratch(partial + i, part, count);
      },
      [&](int64_t i) __attribute__((always_inline)) {
        GEMMA2_UNROLL
        for (int r = 0; r < kRows; ++r) grad_out.fetch(r, i), x.fetch(r, i);
      });
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
        walk_groups<T>(block * block_rows, rows_end, n, [&](int64_t r, auto count) {
          constexpr int kRows = decltype(count)::value;
          backward_rows<kRows>(group_of<kRows, T>(p.grad_out, p.grad_out_stride, r, p.rows, n),
                               group_of<kRows, T>(p.x, p.x_stride, r, p.rows, n),
                               (const W*)p.weight, (T*)p.grad_x + r * n, partial, n, p.eps);
        });
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
