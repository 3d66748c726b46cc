// The parts of an RMSNorm of one row, for the files that are compiled once per instruction set.
#pragma once
#include <math.h>

#include "simd.h"

namespace gemma2 {
namespace GEMMA2_ISA {
namespace {

template <class T>
GEMMA2_INLINE float sum_of_squares(const T* x, int64_t n) {
  VecF sum0 = zero(), sum1 = zero();
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    const VecF a = load(x + i), b = load(x + i + kLanes);
    sum0 = fma(a, a, sum0);
    sum1 = fma(b, b, sum1);
  }
  for (; i < n; i += kLanes) {
    const VecF a = i + kLanes <= n ? load(x + i) : load_n(x + i, n - i);
    sum0 = fma(a, a, sum0);
  }
  return reduce_sum(sum0 + sum1);
}

// rsqrt(mean + eps) in every lane.
GEMMA2_INLINE VecF rms_scale(float sum_of_squares, int64_t n, double eps) {
  return set(1.0f / sqrtf(sum_of_squares / float(n) + float(eps)));
}

// kLanes elements from i on of a row of n, zeros past its end.
template <class T>
GEMMA2_INLINE VecF load_at(const T* row, int64_t i, int64_t n) {
  return i + kLanes <= n ? load(row + i) : load_n(row + i, n - i);
}
template <class T>
GEMMA2_INLINE void store_at(T* row, int64_t i, int64_t n, VecF v) {
  if (i + kLanes <= n) {
    store(row + i, v);
  } else {
    store_n(row + i, v, n - i);
  }
}

// Sum of count parts of n columns, parts_stride apart, in their order, rounded to T: the columns of
// one run of kNormColumns.
template <class T>
GEMMA2_INLINE void add_parts(const float* parts, int64_t parts_stride, int64_t count, int64_t run,
                             int64_t n, T* out) {
  const int64_t begin = run * kNormColumns;
  const int64_t end = begin + kNormColumns < n ? begin + kNormColumns : n;
  for (int64_t i = begin; i < end; i += kLanes) {
    VecF sum = zero();
    for (int64_t b = 0; b < count; ++b) sum += load_at(parts + b * parts_stride, i, end);
    store_at(out, i, end, sum);
  }
}

// out = x * scale * (1 + weight)
template <class T, class W>
GEMMA2_INLINE void rms_scale_row(const T* x, const W* weight, T* out, int64_t n, VecF scale) {
  const VecF one = set(1.0f);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    store(out + i, load(x + i) * scale * (one + load(weight + i)));
  if (i < n) {
    const VecF y = load_n(x + i, n - i) * scale * (one + load_n(weight + i, n - i));
    store_n(out + i, y, n - i);
  }
}

}  // namespace
}  // namespace GEMMA2_ISA
}  // namespace gemma2
