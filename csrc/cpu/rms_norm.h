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
GEMMA2_INLINE VecF rms_scale(float sum_of_squares, int64_t n, float eps) {
  return set(1.0f / sqrtf(sum_of_squares / float(n) + eps));
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
