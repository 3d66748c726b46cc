// What both forms of linear share: how weights become factors, and what happens to a finished sum.
#pragma once
#include "linear.h"
#include "simd.h"

namespace gemma2 {
namespace GEMMA2_ISA {
namespace {

// Elements of k in one step of linear_few_rows: two vectors of floats, or one of bfloat16 pairs.
constexpr int kStep = 2 * kLanes;

template <class T>
GEMMA2_INLINE T min_of(T a, T b) {
  return a < b ? a : b;
}
GEMMA2_INLINE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls f with the number of rows, kMin to kMax.
template <int kMin, int kMax, class F>
void dispatch_rows(int64_t rows, const F& f) {
  if constexpr (kMax > kMin) {
    if (rows < kMax) return dispatch_rows<kMin, kMax - 1>(rows, f);
  }
  f(Count<kMax>{});
}

GEMMA2_INLINE VecU load_bits(const void* p) {
  VecU v;
  memcpy(&v, p, sizeof v);
  return v;
}

// How one weight dtype is multiplied. Factor: what x is packed to, `kPerFactor` elements of k each.
template <class T>
struct Math {
  using Factor = float;
  static constexpr int kPerFactor = 1;
  using Vec = VecF;  // of factors
  using Low = LowF;
  static GEMMA2_INLINE Vec load_factors(const Factor* x) { return load(x); }
  template <bool kLower>
  static GEMMA2_INLINE auto broadcast(Factor w) {
    if constexpr (kLower) {
      return w - Low{};
    } else {
      return set(w);
    }
  }
  template <class V, class Sum>
  static GEMMA2_INLINE Sum multiply_add(V a, V b, Sum sum) {
    return fma(a, b, sum);
  }
  // Vector `part` of the kStep weights at w. x is packed in the same order.
  static constexpr int kParts = 2;
  static GEMMA2_INLINE Vec load_part(const T* w, int part) { return load(w + part * kLanes); }
};

#if defined(GEMMA2_BFLOAT16_PAIRS)
// Two elements of k, the even one in the low half.
struct Pair {
  uint32_t bits;
};

template <>
struct Math<BFloat16> {
  using Factor = Pair;
  static constexpr int kPerFactor = 2;
  using Vec = VecU;
  using Low = LowU;
  static GEMMA2_INLINE Vec load_factors(const Factor* x) { return load_bits(x); }
  template <bool kLower>
  static GEMMA2_INLINE auto broadcast(Factor w) {
    if constexpr (kLower) {
      return Low{} + w.bits;
    } else {
      return Vec{} + w.bits;
    }
  }
  template <class V, class Sum>
  static GEMMA2_INLINE Sum multiply_add(V a, V b, Sum sum) {
    return dot_pairs(sum, a, b);
  }
  static constexpr int kParts = 1;
  static GEMMA2_INLINE Vec load_part(const BFloat16* w, int) { return load_bits(w); }
};
#elif defined(__AVX512F__) || defined(__aarch64__)
// The even elements of k are the low halves of 32-bit words, the odd ones the high halves: a shift
// and a mask unpack them, without a shuffle. (Of 16 registers none is left for the mask.)
template <>
GEMMA2_INLINE VecF Math<BFloat16>::load_part(const BFloat16* w, int part) {
  const VecU bits = load_bits(w);
  return part == 0 ? even_bfloat16(bits) : odd_bfloat16(bits);
}
#endif

// Stores n sums to columns [column, column + n) of a row of out, soft-capped where cap > 0.
GEMMA2_INLINE void finish_row(void* out_rows, DType out_dtype, int64_t out_stride, int64_t row,
                              int64_t column, int64_t n, const float* sums, float cap) {
  dispatch_dtype(out_dtype, [&](auto t) {
    using T = decltype(t);
    T* out = (T*)out_rows + row * out_stride + column;
    const VecF softcap = set(cap);
    for (int64_t i = 0; i < n; i += kLanes) {
      const bool full = i + kLanes <= n;
      VecF y = full ? load(sums + i) : load_n(sums + i, n - i);
      if (cap > 0) y = softcap * tanh(y / softcap);
      if (full) {
        store(out + i, y);
      } else {
        store_n(out + i, y, n - i);
      }
    }
  });
}
GEMMA2_INLINE void finish_row(const LinearParams& p, int64_t row, int64_t column, int64_t n,
                              const float* sums) {
  finish_row(p.out, p.out_dtype, p.out_stride, row, column, n, sums, p.softcap);
}

}  // namespace
}  // namespace GEMMA2_ISA
}  // namespace gemma2
