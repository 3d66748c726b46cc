// Backward of out = x * s * (1 + weight), s = rsqrt(mean(x^2) + eps), x (rows, hidden_size):
// with g = grad_out * (1 + weight), grad_x = s (g - x s^2 mean(g x)), and
// grad_weight = sum over the rows of grad_out x s.
//
// A unit of the first kernel is a block of norm_block_rows rows: grad_x, and the block's part of
// grad_weight; of the second a run of kNormColumns columns, where the parts are added in their
// order. Two passes over kNormGroup rows at a time; the first asks for the lines that the second
// writes. Memory bounds it. Everything in float32, one rounding at the end. Source: derived from
// transformers' Gemma2RMSNorm.
#include "rms_norm_backward.h"

#include "kernels.h"

namespace gemma2 {
namespace GEMMA2_ISA {
namespace {

template <int kRows, class T, class W>
void backward_rows(RowGroup<T> grad_out, RowGroup<T> x, const W* weight, T* grad_x, float* partial,
                   int64_t n, double eps) {
  const RowScales<kRows> scales = scales_of<kRows>(grad_out, x, weight, grad_x, n, eps);
  walk_lines<T>(
      n,
      [&](int64_t i, auto count) {
        add_gradients(
            scales, x, weight, partial, i, count,
            [&](int r) { return load_pair<T>(grad_out[r] + i, count); },
            [&](int r, VecPair<T> grad) {
              store_pair<kAnyNaN<T, W>>(grad_x + r * n + i, grad, count);
            });
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
