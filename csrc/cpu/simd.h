// Vectors of GEMMA2_LANES floats for files that are compiled once per instruction set.
//
// Built on the compiler's vector extension: + - * /, comparisons and `mask ? a : b` are the
// language's own, and one source serves every instruction set (a vector wider than the machine's is
// lowered to several). What the extension lacks, or expresses badly, stands here. Everything is in
// an anonymous namespace of the instruction set: nothing that is compiled with wide instructions
// can be picked by the linker for code that runs before the check.
#pragma once
#include <stdint.h>
#include <string.h>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "../params.h"

namespace gemma2 {
namespace GEMMA2_ISA {
namespace {

#define GEMMA2_INLINE inline __attribute__((always_inline))
#define GEMMA2_UNROLL _Pragma("GCC unroll 32")

constexpr int kLanes = GEMMA2_LANES;

typedef float VecF __attribute__((vector_size(kLanes * 4)));
typedef int32_t VecI __attribute__((vector_size(kLanes * 4)));
typedef uint32_t VecU __attribute__((vector_size(kLanes * 4)));
typedef uint16_t VecU16 __attribute__((vector_size(kLanes * 2)));

// Storage types. BFloat16 is the upper half of a float; Half is IEEE binary16.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

GEMMA2_INLINE VecF set(float x) { return x - VecF{}; }
GEMMA2_INLINE VecF zero() { return VecF{}; }

// ---- one element
// ----------------------------------------------------------------------------------------------------

GEMMA2_INLINE float bits_to_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
GEMMA2_INLINE uint32_t float_to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

GEMMA2_INLINE float to_float(float x) { return x; }
GEMMA2_INLINE float to_float(BFloat16 x) { return bits_to_float(uint32_t(x.bits) << 16); }
GEMMA2_INLINE float to_float(Half x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  // Moved to float's fields the exponent is off by 127 - 15; a multiplication mends it, subnormals
  // included.
  float y = bits_to_float(magnitude << 13) * 0x1p112f;
  if (magnitude >= 0x7c00) y = bits_to_float(magnitude << 13 | 0x7f800000);  // inf, nan
  return bits_to_float(float_to_bits(y) | sign);
#endif
}

template <class T>
T from_float(float x);
template <>
GEMMA2_INLINE float from_float<float>(float x) {
  return x;
}
template <>
GEMMA2_INLINE BFloat16 from_float<BFloat16>(float x) {
  const uint32_t bits = float_to_bits(x);
  if (x != x) return {uint16_t(bits >> 16 | 0x40)};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};  // round to nearest, ties to even
}
template <>
GEMMA2_INLINE Half from_float<Half>(float x) {
#if defined(__F16C__)
  return {uint16_t(_cvtss_sh(x, 0))};
#else
  const uint32_t bits = float_to_bits(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return {uint16_t(sign | 0x7e00)};
  if (magnitude >= 0x477ff000)
    return {uint16_t(sign | 0x7c00)};  // rounds to 65536 or more: infinity
  if (magnitude < 0x38800000) {
    // Subnormal: adding 0.5 leaves the wanted bits, rounded to nearest even, at the end of the
    // fraction.
    const float shifted = bits_to_float(magnitude) + 0.5f;
    return {uint16_t(sign | (float_to_bits(shifted) - 0x3f000000))};
  }
  const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
  return {uint16_t(sign | ((rounded - 0x38000000) >> 13))};
#endif
}

// ---- loads and stores of kLanes elements, any alignment
// -------------------------------------------------------------

GEMMA2_INLINE VecF load(const float* p) {
  VecF v;
  memcpy(&v, p, sizeof v);
  return v;
}
GEMMA2_INLINE VecF load(const BFloat16* p) {
  VecU16 h;
  memcpy(&h, p, sizeof h);
  return (VecF)(__builtin_convertvector(h, VecU) << 16);
}
GEMMA2_INLINE void store(float* p, VecF v) { memcpy(p, &v, sizeof v); }
GEMMA2_INLINE void store(BFloat16* p, VecF v) {
  const VecU bits = (VecU)v;
  const VecU rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const VecU nan = (bits >> 16) | 0x40;
  const VecU16 h = __builtin_convertvector(v != v ? nan : rounded, VecU16);
  memcpy(p, &h, sizeof h);
}
#if defined(__F16C__)
GEMMA2_INLINE VecF load(const Half* p) {
  VecF v;
  for (int i = 0; i < kLanes; i += 8) {
    const __m256 part = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + i)));
    memcpy((char*)&v + 4 * i, &part, 32);
  }
  return v;
}
GEMMA2_INLINE void store(Half* p, VecF v) {
  for (int i = 0; i < kLanes; i += 8) {
    __m256 part;
    memcpy(&part, (const char*)&v + 4 * i, 32);
    _mm_storeu_si128((__m128i*)(p + i), _mm256_cvtps_ph(part, 0));
  }
}
#else
GEMMA2_INLINE VecF load(const Half* p) {
  VecF v;
  for (int i = 0; i < kLanes; ++i) v[i] = to_float(p[i]);
  return v;
}
GEMMA2_INLINE void store(Half* p, VecF v) {
  for (int i = 0; i < kLanes; ++i) p[i] = from_float<Half>(v[i]);
}
#endif

// The first n of kLanes elements, 0 < n < kLanes; the rest reads as `fill` and is not touched in
// memory.
template <class T>
GEMMA2_INLINE VecF load_n(const T* p, int64_t n, float fill = 0.0f) {
  float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = i < n ? to_float(p[i]) : fill;
  return load(lanes);
}
template <class T>
GEMMA2_INLINE void store_n(T* p, VecF v, int64_t n) {
  float lanes[kLanes];
  store(lanes, v);
  for (int64_t i = 0; i < n; ++i) p[i] = from_float<T>(lanes[i]);
}

// ---- arithmetic
// -----------------------------------------------------------------------------------------------------

// Contracted to one instruction where the machine has it (-ffp-contract=fast).
GEMMA2_INLINE VecF fma(VecF a, VecF b, VecF c) { return a * b + c; }
GEMMA2_INLINE VecF min(VecF a, VecF b) { return a < b ? a : b; }
GEMMA2_INLINE VecF max(VecF a, VecF b) { return a > b ? a : b; }
GEMMA2_INLINE VecF abs(VecF a) { return (VecF)((VecU)a & 0x7fffffffu); }
// To the nearest integer, ties to even, for |a| < 2^22: adding 1.5 * 2^23 leaves no fraction bits.
GEMMA2_INLINE VecF round_small(VecF a) {
  const VecF magic = set(0x1.8p23f);
  VecF r = a + magic;
  asm("" : "+m"(r));  // the compiler must not fold (a + magic) - magic
  return r - magic;
}
GEMMA2_INLINE VecI to_int(VecF a) { return __builtin_convertvector(a, VecI); }

// In a fixed order (halves, quarters, ...), so that a sum is the same wherever it is computed.
GEMMA2_INLINE float reduce_sum(VecF v) {
  float lanes[kLanes];
  store(lanes, v);
  GEMMA2_UNROLL
  for (int half = kLanes / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}
GEMMA2_INLINE float reduce_max(VecF v) {
  float lanes[kLanes];
  store(lanes, v);
  GEMMA2_UNROLL
  for (int half = kLanes / 2; half; half /= 2)
    for (int i = 0; i < half; ++i)
      lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
  return lanes[0];
}

// e^x, relative error below 2e-7; 0 below -87.3 (no subnormals), inf above 88.7; exp(-inf) = 0.
// x = n ln 2 + r, |r| <= ln 2 / 2; e^r by its Taylor polynomial of degree 7 (remainder 5e-9).
GEMMA2_INLINE VecF exp(VecF x) {
  const VecF clamped = min(max(x, set(-88.0f)), set(89.0f));
  const VecF n = round_small(clamped * set(0x1.715476p0f));  // 1 / ln 2
  VecF r = fma(n, set(-0x1.62e4p-1f), clamped);  // ln 2 in two parts, the first exact times n
  r = fma(n, set(-0x1.7f7d1cp-20f), r);
  VecF y = set(1.0f / 5040.0f);
  y = fma(y, r, set(1.0f / 720.0f));
  y = fma(y, r, set(1.0f / 120.0f));
  y = fma(y, r, set(1.0f / 24.0f));
  y = fma(y, r, set(1.0f / 6.0f));
  y = fma(y, r, set(0.5f));
  y = fma(y, r, set(1.0f));
  y = fma(y, r, set(1.0f));
  // 2^n in two factors: n reaches 128, one above a float's largest exponent.
  const VecI half = to_int(n) >> 1, rest = to_int(n) - half;
  y = y * (VecF)((half + 127) << 23) * (VecF)((rest + 127) << 23);
  y = x < set(-87.33f) ? zero() : y;
  return x != x ? x : y;
}

// tanh(x), relative error below 4e-7. Large |x|: 1 - 2 / (e^2|x| + 1); small: an odd polynomial
// (Cephes' tanhf), as the first form cancels there.
GEMMA2_INLINE VecF tanh(VecF x) {
  const VecF a = abs(x);
  const VecF e = exp(min(a, set(10.0f)) * set(2.0f));
  const VecF large = set(1.0f) - set(2.0f) / (e + set(1.0f));
  const VecF s = a * a;
  VecF p = set(-5.70498872745e-3f);
  p = fma(p, s, set(2.06390887954e-2f));
  p = fma(p, s, set(-5.37397155531e-2f));
  p = fma(p, s, set(1.33314422036e-1f));
  p = fma(p, s, set(-3.33332819422e-1f));
  const VecF small = fma(p * s, a, a);
  const VecF y = a < set(0.625f) ? small : large;
  const VecF signed_y = (VecF)((VecU)y | ((VecU)x & 0x80000000u));
  return x != x ? x : signed_y;
}

// ---- dispatch
// -------------------------------------------------------------------------------------------------------

// Calls f(T{}) with the storage type of dtype; the callers have checked that dtype is one of these.
template <class F>
GEMMA2_INLINE void dispatch_dtype(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float{});
    case DType::kBFloat16:
      return f(BFloat16{});
    case DType::kFloat16:
      return f(Half{});
  }
}

}  // namespace
}  // namespace GEMMA2_ISA
}  // namespace gemma2
