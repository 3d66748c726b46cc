// Vectors of small integers, beside simd.h's floats: products of bytes and words, summed into
// 32-bit lanes. Every wide instruction has its portable form
// beside it, which gives the same bits.
#pragma once
#include "simd.h"

namespace gemma2 {
namespace GEMMA2_ISA {
namespace {

typedef int8_t VecI8 __attribute__((vector_size(kLanes * 4)));
typedef uint8_t VecU8 __attribute__((vector_size(kLanes * 4)));
typedef int16_t VecI16 __attribute__((vector_size(kLanes * 4)));

#if defined(__AVX2__)
template <class V>
GEMMA2_INLINE __m256i& integer_part(V& v, int i) {
  return ((__m256i*)&v)[i];
}
#endif

// Four bytes in every lane.
GEMMA2_INLINE VecI broadcast_bits(const void* p) {
  int32_t bits;
  memcpy(&bits, p, sizeof bits);
  return VecI{} + bits;
}

// Integers that fit in words: low[i] and high[i] in one lane.
GEMMA2_INLINE VecI16 join_words(VecI low, VecI high) {
  return (VecI16)(high << 16 | (low & 0xffff));
}

// a[2i] * b[2i] + a[2i + 1] * b[2i + 1] of words, in 32 bits.
GEMMA2_INLINE VecI multiply_add_words(VecI16 a, VecI16 b) {
#if defined(__AVX512BW__)
  return (VecI)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  VecI sum;
  for (int i = 0; i < kLanes / 8; ++i)
    integer_part(sum, i) = _mm256_madd_epi16(integer_part(a, i), integer_part(b, i));
  return sum;
#elif defined(__SSE2__)
  return (VecI)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
  const VecI x = (VecI)a, y = (VecI)b;
  return (x << 16 >> 16) * (y << 16 >> 16) + (x >> 16) * (y >> 16);
#endif
}

// a[2i] * b[2i] + a[2i + 1] * b[2i + 1] of bytes, in 16 bits. The sum has to fit there.
GEMMA2_INLINE VecI16 multiply_add_bytes(VecU8 a, VecI8 b) {
#if defined(__AVX512BW__)
  return (VecI16)_mm512_maddubs_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  VecI16 sum;
  for (int i = 0; i < kLanes / 8; ++i)
    integer_part(sum, i) = _mm256_maddubs_epi16(integer_part(a, i), integer_part(b, i));
  return sum;
#else
  const VecI16 x = (VecI16)a, y = (VecI16)b;
  return (x & 0xff) * (y << 8 >> 8) + (x >> 8 & 0xff) * (y >> 8);
#endif
}

// w where x is positive, -w where it is negative; anything where it is 0.
GEMMA2_INLINE VecI8 with_sign(VecI8 w, VecI8 x) {
#if defined(__AVX512BW__)
  const __mmask64 negative = _mm512_movepi8_mask((__m512i)x);
  return (VecI8)_mm512_mask_sub_epi8((__m512i)w, negative, _mm512_setzero_si512(), (__m512i)w);
#elif defined(__AVX2__)
  for (int i = 0; i < kLanes / 8; ++i)
    integer_part(w, i) = _mm256_sign_epi8(integer_part(w, i), integer_part(x, i));
  return w;
#else
  const VecI8 negative = x < 0;
  return (w ^ negative) - negative;
#endif
}

// Where a product of bytes sums four of them in 32 bits.
#if defined(GEMMA2_ISA_neon_dot) || defined(GEMMA2_ISA_neon_bf16)
#define GEMMA2_DOT_QUADS
#define GEMMA2_SIGNED_QUADS
#elif defined(GEMMA2_ISA_avx2_vnni) || defined(GEMMA2_ISA_avx512_vnni) || \
    defined(GEMMA2_ISA_avx512_bf16)
#define GEMMA2_DOT_QUADS
#endif

#if defined(GEMMA2_DOT_QUADS)
// Of such a product the first factor has a sign (NEON) or none: then a number with one is kUnsigned
// less than the factor that stands for it.
#if defined(GEMMA2_SIGNED_QUADS)
typedef VecI8 VecQuads;
constexpr int32_t kUnsigned = 0;
#else
typedef VecU8 VecQuads;
constexpr int32_t kUnsigned = 128;
#endif
GEMMA2_INLINE VecQuads to_quads(VecU bits) {
  return (VecQuads)(kUnsigned ? bits ^ 0x80808080u : bits);
}

// sum[i] + a[4i] * b[4i] + ... + a[4i + 3] * b[4i + 3].
GEMMA2_INLINE_IF_SHORT VecI dot_quads(VecI sum, VecQuads a, VecI8 b) {
#if defined(__AVX512VNNI__)
  return (VecI)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(__AVXVNNI__)
  return (VecI)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)a, (__m256i)b);
#elif defined(__ARM_FEATURE_DOTPROD)
  return (VecI)vdotq_s32((int32x4_t)sum, (int8x16_t)a, (int8x16_t)b);
#else
  const VecI16 x = (VecI16)a, y = (VecI16)b;
  const VecI16 even = kUnsigned ? x & 0xff : x << 8 >> 8;
  const VecI16 odd = kUnsigned ? x >> 8 & 0xff : x >> 8;
  return sum + multiply_add_words(even, y << 8 >> 8) + multiply_add_words(odd, y >> 8);
#endif
}
#endif

#if defined(GEMMA2_SIGNED_QUADS)
typedef int8_t VecEight __attribute__((vector_size(8)));

// dot_quads with b's first or last four bytes in every lane.
template <int kLast>
GEMMA2_INLINE VecI dot_quads_with(VecI sum, VecQuads a, VecEight b) {
#if defined(__ARM_FEATURE_DOTPROD)
  return (VecI)vdotq_lane_s32((int32x4_t)sum, (int8x16_t)a, (int8x8_t)b, kLast);
#else
  return dot_quads(sum, a, (VecI8)broadcast_bits((const char*)&b + 4 * kLast));
#endif
}

GEMMA2_INLINE VecI8 join_eights(VecEight a, VecEight b) {
#if defined(__aarch64__)
  return (VecI8)vcombine_s8((int8x8_t)a, (int8x8_t)b);
#else
  const VecEight both[] = {a, b};
  VecI8 joined;
  memcpy(&joined, both, sizeof joined);
  return joined;
#endif
}
#endif

#if defined(GEMMA2_ISA_neon_bf16)
// Of two rows of eight bytes a and two b: sum + (a0 b0, a0 b1, a1 b0, a1 b1).
GEMMA2_INLINE VecI multiply_eights(VecI sum, VecI8 a, VecI8 b) {
#if defined(__ARM_FEATURE_MATMUL_INT8)
  return (VecI)vmmlaq_s32((int32x4_t)sum, (int8x16_t)a, (int8x16_t)b);
#else
  for (int i = 0; i < kLanes; ++i) {
    for (int k = 0; k < 8; ++k) sum[i] += a[i / 2 * 8 + k] * b[i % 2 * 8 + k];
  }
  return sum;
#endif
}
#endif

#if defined(GEMMA2_ISA_avx512_bf16)
// Byte 4i + k of to[u] is byte 16 (i / 4) + 4 u + i % 4 of rows[k]: the bytes of four rows side by
// side, 128 bits of a row to 128 bits of the result.
GEMMA2_INLINE_IF_SHORT void join_rows(const VecI8 (&rows)[4], VecI8 (&to)[4]) {
#if defined(__AVX512BW__)
  const __m512i a = (__m512i)rows[0], b = (__m512i)rows[1], c = (__m512i)rows[2];
  const __m512i d = (__m512i)rows[3];
  const __m512i ab_lower = _mm512_unpacklo_epi8(a, b), ab_upper = _mm512_unpackhi_epi8(a, b);
  const __m512i cd_lower = _mm512_unpacklo_epi8(c, d), cd_upper = _mm512_unpackhi_epi8(c, d);
  to[0] = (VecI8)_mm512_unpacklo_epi16(ab_lower, cd_lower);
  to[1] = (VecI8)_mm512_unpackhi_epi16(ab_lower, cd_lower);
  to[2] = (VecI8)_mm512_unpacklo_epi16(ab_upper, cd_upper);
  to[3] = (VecI8)_mm512_unpackhi_epi16(ab_upper, cd_upper);
#else
  for (int u = 0; u < 4; ++u) {
    for (int i = 0; i < kLanes; ++i) {
      for (int k = 0; k < 4; ++k) to[u][4 * i + k] = rows[k][16 * (i / 4) + 4 * u + i % 4];
    }
  }
#endif
}
#endif

// kLanes integers that fit, narrowed.
template <class T>
GEMMA2_INLINE void store_integers(T* p, VecI v) {
  typedef T Narrow __attribute__((vector_size(kLanes * sizeof(T))));
  const Narrow narrow = __builtin_convertvector(v, Narrow);
  memcpy(p, &narrow, sizeof narrow);
}

GEMMA2_INLINE VecF to_floats(VecI v) { return __builtin_convertvector(v, VecF); }

}  // namespace
}  // namespace GEMMA2_ISA
}  // namespace gemma2
