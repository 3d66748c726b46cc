// The parts of an RMSNorm of one row, for the files that are compiled once per instruction set.
#pragma once
#include <math.h>

#include "pairs.h"

namespace gemma2 {
namespace GEMMA2_ISA {
namespace {

template <class T>
GEMMA2_INLINE float sum_of_squares(const T* x, int64_t n) {
  VecPair<T> sums[2] = {};  // two, so that one addition does not wait for the other
  const auto add = [&](VecPair<T>& sum, int64_t i, auto count) {
    const VecPair<T> a = load_pair<T>(x + i, count);
    sum = a * a + sum;
  };
  int64_t i = 0;
  for (; i + 2 * kPair <= n; i += 2 * kPair) {
    add(sums[0], i, Whole{});
    add(sums[1], i + kPair, Whole{});
  }
  const bool pair = i + kPair <= n;
  if (pair) add(sums[0], i, Whole{}), i += kPair;
  if (i < n) add(sums[pair], i, n - i);
  return sum_of(sums[0] + sums[1]);
}

// rsqrt(mean + eps) in every lane.
GEMMA2_INLINE VecF rms_scale(float sum_of_squares, int64_t n, double eps) {
  return set(1.0f / sqrtf(sum_of_squares / float(n) + float(eps)));
}

// Whether rounding to T must look after any NaN there is, see rounded_bits.
template <class T, class W>
constexpr bool kAnyNaN = !kSame<T, W>;

// A row, and what to fetch while it is worked on: the row behind it, or the row itself where there
// is none or rows would push each other out of the second-level cache.
template <class T>
struct Row {
  const T* begin;
  const T* ahead;
};

// Row r of (rows, n).
template <class T>
GEMMA2_INLINE Row<T> row_of(const void* first, int64_t stride, int64_t r, int64_t rows, int64_t n) {
  const T* row = (const T*)first + r * stride;
  return {row, r + 1 < rows && n * int64_t(sizeof(T)) <= 64 << 10 ? row + stride : row};
}

// out = x * scale * (1 + weight); `ahead` is fetched.
template <class T, class W>
GEMMA2_INLINE void rms_scale_row(const T* x, const W* weight, T* out, int64_t n, VecF scale,
                                 const T* ahead) {
  const VecF one = set(1.0f);
  walk_pairs<T>(
      n,
      [&](int64_t i, auto count) {
        const VecPair<T> factor = one + load_pair<T>(weight + i, count);
        store_pair<kAnyNaN<T, W>>(out + i, load_pair<T>(x + i, count) * scale * factor, count);
      },
      ahead);
}

}  // namespace
}  // namespace GEMMA2_ISA
}  // namespace gemma2
