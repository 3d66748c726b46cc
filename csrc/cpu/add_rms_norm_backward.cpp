// Backward of r = residual + norm(x; post_weight), out = norm(r; pre_weight): the gradient of r is
// grad_r + backward(norm(r; pre_weight)), which is that of residual too and goes on through
// norm(x; post_weight). All (rows, hidden_size).
//
// A unit of the first kernel is a block of norm_block_rows rows: the gradients of x and residual,
// and the block's parts of the weights'; of the second a run of kNormColumns columns of both
// weights. Three passes over kNormGroup rows at a time, of which each asks for the lines that the
// next one writes. The gradient of r stays in float32 between the two norms, in scratch. Memory
// bounds it. Source: derived from transformers' Gemma2DecoderLayer.
#include "kernels.h"
#include "rms_norm_backward.h"

namespace gemma2 {
namespace GEMMA2_ISA {
namespace {

// grad_r is scratch, (kRows, n).
template <int kRows, class T, class W>
void backward_rows(RowGroup<T> grad_residual_out, RowGroup<T> grad_out, RowGroup<T> x,
                   RowGroup<T> r, const W* post_weight, const W* pre_weight, T* grad_x,
                   T* grad_residual, float* grad_r, float* post_partial, float* pre_partial,
                   int64_t n, double eps) {
  constexpr bool kAny = kAnyNaN<T, W>;
  RowScales<kRows> scales = scales_of<kRows>(grad_out, r, pre_weight, grad_residual, n, eps);
  VecF squares[kRows] = {}, products[kRows] = {};
  walk_lines<T>(
      n,
      [&](int64_t i, auto count) {
        const VecPair<T> post_factor = set(1.0f) + load_pair<T>(post_weight + i, count);
        add_gradients(
            scales, r, pre_weight, pre_partial, i, count,
            [&](int j) { return load_pair<T>(grad_out[j] + i, count); },
            [&](int j, VecPair<T> grad) {
              const VecPair<T> sum = grad + load_pair<T>(grad_residual_out[j] + i, count);
              store_pair<kAny>(grad_residual + j * n + i, sum, count);
              store_scratch(grad_r + j * n + i, sum, count);
              const VecPair<T> b = load_pair<T>(x[j] + i, count);
              squares[j] = add_products(squares[j], b, b);
              products[j] = add_products(products[j], sum * post_factor, b);
            });
      },
      [&](int64_t i) __attribute__((always_inline)) {
        GEMMA2_UNROLL
        for (int j = 0; j < kRows; ++j) {
          prefetch(grad_x + j * n + i);
          grad_residual_out.fetch(j, i), r.fetch(j, i);
        }
      });
  scales.make(squares, products, n, eps);
  walk_lines<T>(
      n,
      [&](int64_t i, auto count) {
        add_gradients(
            scales, x, post_weight, post_partial, i, count,
            [&](int j) { return load_scratch<T>(grad_r + j * n + i, count); },
            [&](int j, VecPair<T> grad) { store_pair<kAny>(grad_x + j * n + i, grad, count); });
      },
      [&](int64_t i) __attribute__((always_inline)) {
        GEMMA2_UNROLL
        for (int j = 0; j < kRows; ++j) grad_out.fetch(j, i), x.fetch(j, i);
      });
}

}  // namespace

void add_rms_norm_backward_blocks(const AddRmsNormBackwardParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    dispatch_dtype(p.weight_dtype, [&](auto w) {
      using W = decltype(w);
      const int64_t n = p.hidden_size, block_rows = norm_block_rows(p.rows);
      for (int64_t block = begin; block < end; ++block) {
        float* partial = p.partial + block * 2 * n;
        memset(partial, 0, 2 * n * sizeof(float));
        const int64_t rows_end =
            (block + 1) * block_rows < p.rows ? (block + 1) * block_rows : p.rows;
        walk_groups<T>(block * block_rows, rows_end, n, [&](int64_t r, auto count) {
          constexpr int kRows = decltype(count)::value;
          const auto rows = [&](const void* first, int64_t stride) {
            return group_of<kRows, T>(first, stride, r, p.rows, n);
          };
          backward_rows<kRows>(rows(p.grad_residual_out, p.grad_residual_out_stride),
                               rows(p.grad_out, p.grad_out_stride), rows(p.x, p.x_stride),
                               rows(p.residual_out, p.residual_out_stride), (const W*)p.post_weight,
                               (const W*)p.pre_weight, (T*)p.grad_x + r * n,
                               (T*)p.grad_residual + r * n, p.scratch, partial, partial + n, n,
                               p.eps);
        });
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
        add_parts<T>(p.partial, 2 * n, blocks, u, n, (W*)p.grad_post_weight);
        add_parts<T>(p.partial + n, 2 * n, blocks, u, n, (W*)p.grad_pre_weight);
      }
    });
  });
}

}  // namespace GEMMA2_ISA
}  // namespace gemma2
