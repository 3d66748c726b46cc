// The parts of an RMSNorm's gradients, for the files that are compiled once per instruction set.
//
// With s = rsqrt(mean(x^2) + eps) and g = up * (1 + weight), up being the gradient of its result:
// grad_x = s (g - x s (s mean(g x))), and each row adds up x s to the weight's.
#pragma once
#include "rms_norm.h"

namespace gemma2 {
namespace GEMMA2_ISA {
namespace {

// Sum of count parts of n columns, parts_stride apart, in their order, rounded to W: the columns of
// one run of kNormColumns. The parts are scratch in the order of T.
template <class T, class W>
GEMMA2_INLINE void add_parts(const float* parts, int64_t parts_stride, int64_t count, int64_t run,
                             int64_t n, W* out) {
  static_assert(kNormColumns % kPair == 0, "pairs lie within a run");
  const int64_t begin = run * kNormColumns;
  const int64_t columns = n - begin < kNormColumns ? n - begin : kNormColumns;
  walk_pairs<float>(columns, [&](int64_t i, auto elements) {
    VecPair<T> sum = {};
    for (int64_t b = 0; b < count; ++b)
      sum = sum + load_scratch<T>(parts + begin + i + b * parts_stride, elements);
    store_pair<true>(out + begin + i, sum, elements);
  });
}

// Rows that gradients work on together, so that weights and sums are loaded once for all of them.
// Row `ahead` behind each is fetched meanwhile: of the next group, or the row itself.
template <class T>
struct RowGroup {
  const T* begin;
  int64_t stride;
  int64_t ahead;
  GEMMA2_INLINE const T* operator[](int row) const { return begin + row * stride; }
  GEMMA2_INLINE void fetch(int row, int64_t i) const {
    prefetch(begin + (row + ahead) * stride + i);
  }
};

// f(row, Count) over rows [begin, end) of n elements of T, kNormGroup of them at a time unless they
// would push each other out of the second-level cache.
template <class T, class F>
GEMMA2_INLINE void walk_groups(int64_t begin, int64_t end, int64_t n, F f) {
  int64_t r = begin;
  if (n * int64_t(sizeof(T)) <= 16 << 10) {
    for (; r + kNormGroup <= end; r += kNormGroup) f(r, Count<kNormGroup>{});
  }
  for (; r < end; ++r) f(r, Count<1>{});
}

// The kRows rows from r on of (rows, n).
template <int kRows, class T>
GEMMA2_INLINE RowGroup<T> group_of(const void* first, int64_t stride, int64_t r, int64_t rows,
                                   int64_t n) {
  const bool next = r + 2 * kRows <= rows && n * int64_t(sizeof(T)) <= 64 << 10;
  return {(const T*)first + r * stride, stride, next ? kRows : 0};
}

// s, and s mean(g x), of each row.
template <int kRows>
struct RowScales {
  VecF scale[kRows], shrink[kRows];

  GEMMA2_INLINE void make(const VecF (&squares)[kRows], const VecF (&products)[kRows], int64_t n,
                          double eps) {
    for (int r = 0; r < kRows; ++r) {
      scale[r] = rms_scale(reduce_sum(squares[r]), n, eps);
      shrink[r] = scale[r] * set(reduce_sum(products[r]) / float(n));
    }
  }
};

// Those of a group; `to` are the kRows rows of n that the next pass writes, whose lines are asked
// for here: there they would be waited for among other loads and stores.
template <int kRows, class T, class W>
GEMMA2_INLINE RowScales<kRows> scales_of(RowGroup<T> up, RowGroup<T> x, const W* weight,
                                         const T* to, int64_t n, double eps) {
  VecF squares[kRows] = {}, products[kRows] = {};
  walk_lines<T>(
      n,
      [&](int64_t i, auto count) {
        const VecPair<T> factor = set(1.0f) + load_pair<T>(weight + i, count);
        GEMMA2_UNROLL
        for (int r = 0; r < kRows; ++r) {
          const VecPair<T> a = load_pair<T>(x[r] + i, count);
          squares[r] = add_products(squares[r], a, a);
          products[r] = add_products(products[r], load_pair<T>(up[r] + i, count) * factor, a);
        }
      },
      [&](int64_t i) __attribute__((always_inline)) {
        GEMMA2_UNROLL
        for (int r = 0; r < kRows; ++r) prefetch(to + r * n + i);
      });
  RowScales<kRows> scales;
  scales.make(squares, products, n, eps);
  return scales;
}

// Elements [i, i + kPair) of a group's gradients, all or `count` of them: emit(r, gradient of row
// r) with up(r), and up x s added to the weight's at `partial`.
template <int kRows, class T, class W, class C, class Up, class Emit>
GEMMA2_INLINE void add_gradients(const RowScales<kRows>& scales, RowGroup<T> x, const W* weight,
                                 float* partial, int64_t i, C count, Up up, Emit emit) {
  const VecPair<T> factor = set(1.0f) + load_pair<T>(weight + i, count);
  VecPair<T> part = load_scratch<T>(partial + i, count);
  GEMMA2_UNROLL
  for (int r = 0; r < kRows; ++r) {
    const VecPair<T> normed = load_pair<T>(x[r] + i, count) * scales.scale[r];
    const VecPair<T> of_row = up(r);
    emit(r, (of_row * factor - normed * scales.shrink[r]) * scales.scale[r]);
    part = of_row * normed + part;
  }
  store_scratch(partial + i, part, count);
}

}  // namespace
}  // namespace GEMMA2_ISA
}  // namespace gemma2
