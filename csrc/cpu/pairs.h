// Two vectors at a time, for passes over rows.
//
// 2 * kLanes bfloat16 come apart into the even and the odd elements by a shift and a mask, and are
// put together again by a shift and a blend: half of what it takes to widen and to narrow one half
// after the other. So a pair of bfloat16 holds these; with AVX512_BF16, whose instructions narrow
// in order, and for other types, it holds the first and the second half. Elementwise arithmetic and
// sums do not mind.
#pragma once
#include "simd.h"

namespace gemma2 {
namespace GEMMA2_ISA {
namespace {

constexpr int64_t kPair = 2 * kLanes;

// T is whose order of elements it has.
template <class T>
struct VecPair {
  VecF first, second;
};
template <class T>
GEMMA2_INLINE VecPair<T> operator+(VecPair<T> a, VecPair<T> b) {
  return {a.first + b.first, a.second + b.second};
}
template <class T>
GEMMA2_INLINE VecPair<T> operator-(VecPair<T> a, VecPair<T> b) {
  return {a.first - b.first, a.second - b.second};
}
template <class T>
GEMMA2_INLINE VecPair<T> operator*(VecPair<T> a, VecPair<T> b) {
  return {a.first * b.first, a.second * b.second};
}
template <class T>
GEMMA2_INLINE VecPair<T> operator*(VecPair<T> a, VecF b) {
  return {a.first * b, a.second * b};
}
template <class T>
GEMMA2_INLINE VecPair<T> operator+(VecF a, VecPair<T> b) {
  return {a + b.first, a + b.second};
}

template <class T>
GEMMA2_INLINE float sum_of(VecPair<T> v) {
  return reduce_sum(v.first + v.second);
}
// sum + a * b, both halves.
template <class T>
GEMMA2_INLINE VecF add_products(VecF sum, VecPair<T> a, VecPair<T> b) {
  return a.second * b.second + (a.first * b.first + sum);
}

template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

template <class T>
constexpr bool kEvenOdd = false;
#if !defined(__AVX512BF16__) && !defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
template <>
constexpr bool kEvenOdd<BFloat16> = true;
#endif

#if defined(__AVX512BF16__)
// kPair elements in their order, by one instruction each: widened, a half of them, rounded, and the
// upper halves of the two vectors' lanes.
struct PairOrder {
  uint32_t first[kLanes], second[kLanes];  // of the element that a lane's upper half takes
  uint16_t upper[kPair];                   // upper halves
};
alignas(64) constexpr PairOrder kPairOrder = [] {
  PairOrder order = {};
  for (int i = 0; i < kLanes; ++i) order.first[i] = i << 16, order.second[i] = (kLanes + i) << 16;
  for (int i = 0; i < kPair; ++i) order.upper[i] = 2 * i + 1;
  return order;
}();
GEMMA2_INLINE VecF widen_half(__m512i elements, const uint32_t* order) {
  const __m512i index = _mm512_loadu_si512(order);
  return (VecF)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, index, elements);
}
GEMMA2_INLINE VecPair<BFloat16> widen_pair(__m512i elements) {
  return {widen_half(elements, kPairOrder.first), widen_half(elements, kPairOrder.second)};
}
template <class T>
GEMMA2_INLINE __m512i narrow_pair(VecPair<T> v) {
  return (__m512i)_mm512_cvtne2ps_pbh((__m512)v.second, (__m512)v.first);
}
#endif

// In place of a number of elements: all kPair of them.
struct Whole {};

// The first n of kPair elements, 0 < n < kPair, between a row and an array of kPair that holds the
// rest: kLoad fills it, with zeros behind them. Copied by length, they would have to wait for each
// other's stores.
template <bool kLoad, class T>
GEMMA2_INLINE void copy_first(T* to, const T* from, int64_t n) {
#if defined(__AVX512BW__) && GEMMA2_LANES == 16
  if constexpr (sizeof(T) == 2) {
    const __mmask32 first = __mmask32((1ull << n) - 1);
    if constexpr (kLoad) {
      _mm512_storeu_si512(to, _mm512_maskz_loadu_epi16(first, from));
    } else {
      _mm512_mask_storeu_epi16(to, first, _mm512_loadu_si512(from));
    }
  } else {
    static_assert(sizeof(T) == 4, "");
    for (int64_t i = 0; i < kPair; i += kLanes) {
      const __mmask16 first = __mmask16(((1ull << n) - 1) >> i);
      if constexpr (kLoad) {
        _mm512_storeu_si512(to + i, _mm512_maskz_loadu_epi32(first, from + i));
      } else {
        _mm512_mask_storeu_epi32(to + i, first, _mm512_loadu_si512(from + i));
      }
    }
  }
#else
  if constexpr (kLoad) memset(to, 0, kPair * sizeof(T));
  memcpy(to, from, n * sizeof(T));
#endif
}

// kPair elements of a row, in the order of T.
template <class T, class From>
GEMMA2_INLINE VecPair<T> load_pair(const From* p, Whole) {
  if constexpr (kEvenOdd<T> && kSame<From, T>) {
    VecU both;
    memcpy(&both, p, sizeof both);
    return {even_bfloat16(both), odd_bfloat16(both)};
#if defined(__AVX512BF16__)
  } else if constexpr (kSame<T, BFloat16> && kSame<From, BFloat16>) {
    __m512i elements = _mm512_loadu_si512(p);
    asm("" : "+v"(elements));  // read once: GCC may even copy it to the stack to read it twice
    return widen_pair(elements);
#endif
  } else {
    const VecF a = load(p), b = load(p + kLanes);
    if constexpr (kEvenOdd<T>) return {even_elements(a, b), odd_elements(a, b)};
    return {a, b};
  }
}
// The first n of them, 0 < n < kPair; the rest reads as 0 and is not touched in memory.
template <class T, class From>
GEMMA2_INLINE VecPair<T> load_pair(const From* p, int64_t n) {
  From elements[kPair];
  copy_first<true>(elements, p, n);
  return load_pair<T>(elements, Whole{});
}

// The nearest bfloat16, ties to even, in the upper half. Without kAnyNaN a NaN must be bfloat16's
// own or the processor's (of inf - inf): arithmetic keeps their lower halves empty, so rounding
// cannot make a number of them.
template <bool kAnyNaN>
GEMMA2_INLINE VecU rounded_bits(VecF v) {
  const VecU bits = (VecU)v;
  return kAnyNaN ? round_bits(v) : bits + 0x7fff + ((bits >> 16) & 1);
}

// The upper halves of a's and b's lanes in turns.
GEMMA2_INLINE VecU put_together(VecU a, VecU b) {
  a >>= 16;
#if defined(__AVX512BW__)
  return (VecU)_mm512_mask_mov_epi16((__m512i)a, 0xaaaaaaaa, (__m512i)b);
#elif defined(__AVX2__)
  for (int i = 0; i < kLanes / 8; ++i) {
    __m256i& part = ((__m256i*)&a)[i];
    part = _mm256_blend_epi16(part, ((const __m256i*)&b)[i], 0xaa);
  }
  return a;
#else
  return a | (b & 0xffff0000u);
#endif
}

// Rounds to T and widens again.
template <bool kAnyNaN, class T>
GEMMA2_INLINE VecPair<T> round_pair(VecPair<T> v) {
  if constexpr (kEvenOdd<T>) {
    return {(VecF)(rounded_bits<kAnyNaN>(v.first) & 0xffff0000u),
            (VecF)(rounded_bits<kAnyNaN>(v.second) & 0xffff0000u)};
#if defined(__AVX512BF16__)
  } else if constexpr (kSame<T, BFloat16>) {
    return widen_pair(narrow_pair(v));
#endif
  } else {
    return {round_to<T>(v.first), round_to<T>(v.second)};
  }
}

// Stores what round_pair returned.
template <class T>
GEMMA2_INLINE void store_rounded_pair(T* p, VecPair<T> v, Whole) {
  if constexpr (kEvenOdd<T>) {
    const VecU both = put_together((VecU)v.first, (VecU)v.second);
    memcpy(p, &both, sizeof both);
#if defined(__AVX512BF16__)
  } else if constexpr (kSame<T, BFloat16>) {
    const __m512i upper = _mm512_loadu_si512(kPairOrder.upper);
    _mm512_storeu_si512(p, _mm512_permutex2var_epi16((__m512i)v.first, upper, (__m512i)v.second));
#endif
  } else {
    store_rounded(p, v.first);
    store_rounded(p + kLanes, v.second);
  }
}
template <class T>
GEMMA2_INLINE void store_rounded_pair(T* p, VecPair<T> v, int64_t n) {
  T elements[kPair];
  store_rounded_pair(elements, v, Whole{});
  copy_first<false>(p, elements, n);
}

// Rounds to To and stores all elements, or the first n of them.
template <bool kAnyNaN, class T, class To>
GEMMA2_INLINE void store_pair(To* p, VecPair<T> v, Whole) {
  if constexpr (kEvenOdd<T> && kSame<To, T>) {
    const VecU first = rounded_bits<kAnyNaN>(v.first), second = rounded_bits<kAnyNaN>(v.second);
    const VecU both = put_together(first, second);
    memcpy(p, &both, sizeof both);
#if defined(__AVX512BF16__)
  } else if constexpr (kSame<To, BFloat16>) {
    _mm512_storeu_si512(p, narrow_pair(v));
#endif
  } else {
    const VecPair<T> x = v;
    if (kEvenOdd<T>) v = {interleave_lower(x.first, x.second), interleave_upper(x.first, x.second)};
    store(p, v.first);
    store(p + kLanes, v.second);
  }
}
template <bool kAnyNaN, class T, class To>
GEMMA2_INLINE void store_pair(To* p, VecPair<T> v, int64_t n) {
  To elements[kPair];
  store_pair<kAnyNaN>(elements, v, Whole{});
  copy_first<false>(p, elements, n);
}

// Rows of float32 for the same kernel's later passes: whole pairs stay in the order of T.
template <class T>
GEMMA2_INLINE VecPair<T> load_scratch(const float* p, Whole) {
  return {load(p), load(p + kLanes)};
}
template <class T>
GEMMA2_INLINE VecPair<T> load_scratch(const float* p, int64_t n) {
  return load_pair<T>(p, n);
}
template <class T>
GEMMA2_INLINE void store_scratch(float* p, VecPair<T> v, Whole) {
  store(p, v.first);
  store(p + kLanes, v.second);
}
template <class T>
GEMMA2_INLINE void store_scratch(float* p, VecPair<T> v, int64_t n) {
  store_pair<true>(p, v, n);
}

// Calls body(i, Whole{}) for every pair of n elements and body(i, count) for the count that are
// left; before, fetch(i) for the line of T that begins at element i.
// (A lambda that only fetches must be always_inline: else it has no effect and GCC drops it.)
template <class T, class F, class Fetch>
GEMMA2_INLINE void walk_lines(int64_t n, F body, Fetch fetch) {
  constexpr int64_t kLine = kLineBytes / sizeof(T), kStep = kPair > kLine ? kPair : kLine;
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    GEMMA2_UNROLL
    for (int64_t k = 0; k < kStep; k += kLine) fetch(i + k);
    GEMMA2_UNROLL
    for (int64_t k = 0; k < kStep; k += kPair) body(i + k, Whole{});
  }
  for (; i + kPair <= n; i += kPair) body(i, Whole{});
  if (i < n) body(i, n - i);
}

// The same; the elements of the rows `ahead`, of T, are fetched meanwhile, so that memory works in
// this pass over a row too.
template <class T, class F, class... Rows>
GEMMA2_INLINE void walk_pairs(int64_t n, F body, const Rows*... ahead) {
  walk_lines<T>(n, body, [&]([[maybe_unused]] int64_t i) __attribute__((always_inline)) {
    (prefetch(ahead + i), ...);
  });
}

}  // namespace
}  // namespace GEMMA2_ISA
}  // namespace gemma2
