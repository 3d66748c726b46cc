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

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "../params.h"

namespace gemma2 {
namespace GEMMA2_ISA {
namespace {

#define GEMMA2_INLINE inline __attribute__((always_inline))
#define GEMMA2_UNROLL _Pragma("GCC unroll 32")
// For what takes an instruction where vectors are the machine's and, emulated, one for each lane:
// inlined everywhere it would multiply the time that compiling takes.
#if GEMMA2_LANES == 16 && !defined(__AVX512F__)
#define GEMMA2_INLINE_IF_SHORT __attribute__((noinline, unused))
#else
#define GEMMA2_INLINE_IF_SHORT GEMMA2_INLINE
#endif

constexpr int kLanes = GEMMA2_LANES;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif
// Where an instruction multiplies pairs of bfloat16 and sums them up in a float.
#if defined(GEMMA2_ISA_avx512_bf16) || defined(GEMMA2_ISA_neon_bf16)
#define GEMMA2_BFLOAT16_PAIRS
#endif
constexpr int64_t kLineBytes = 64;  // of a cache

// A number known to the compiler, as an argument.
template <int n>
struct Count {
  static constexpr int value = n;
};

typedef float VecF __attribute__((vector_size(kLanes * 4)));
typedef int32_t VecI __attribute__((vector_size(kLanes * 4)));
typedef uint32_t VecU __attribute__((vector_size(kLanes * 4)));
typedef uint16_t VecU16 __attribute__((vector_size(kLanes * 2)));
// Lower halves of vectors.
typedef float LowF __attribute__((vector_size(kLanes * 2)));
typedef uint32_t LowU __attribute__((vector_size(kLanes * 2)));

#if defined(__AVX512F__)
GEMMA2_INLINE LowF lower(VecF v) { return (LowF)_mm512_castps512_ps256((__m512)v); }
GEMMA2_INLINE LowU lower(VecU v) { return (LowU)_mm512_castsi512_si256((__m512i)v); }
#else
GEMMA2_INLINE LowF lower(VecF v) {
  LowF half;
  memcpy(&half, &v, sizeof half);
  return half;
}
GEMMA2_INLINE LowU lower(VecU v) { return (LowU)lower((VecF)v); }
#endif
GEMMA2_INLINE LowF lower(LowF v) { return v; }
GEMMA2_INLINE LowU lower(LowU v) { return v; }

// Storage types. BFloat16 is the upper half of a float; Half is IEEE binary16.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// Fetches p's line into the second-level cache; p may lie behind what can be read. Into the first
// cache a stream comes more slowly: by one thread of a Zen 4 23 GB/s for 29.
GEMMA2_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }
// Into the first cache, for what is used soon.
GEMMA2_INLINE void prefetch_near(const void* p) { __builtin_prefetch(p, 0, 3); }

// What a stream through memory asks for where it enters a page of 4 KiB: a line of a page a few
// ahead, so that the page's address is there before its first element is, which is most of what
// smaller pages cost. In huge pages, whose addresses are known, it may cost more than it brings.
enum class Touch { kNone, kFar, kNear };  // a line into the second, or into the first cache
template <Touch kTouch>
GEMMA2_INLINE void touch_page(const void* p, int64_t bytes) {
  constexpr int64_t kPage = 4096, kAhead = 4 * kPage;
  if (kTouch == Touch::kNone || int64_t(uintptr_t(p) % kPage) >= bytes) return;
  const char* line = (const char*)p + kAhead;
  kTouch == Touch::kNear ? prefetch_near(line) : prefetch(line);
}

// Reads a line for the sake of the processor's prefetcher, which may follow what is read, not what
// is fetched by instruction. It has to be there.
GEMMA2_INLINE void read_line(const void* p) {
#if defined(__AVX512F__)
  asm volatile("" : : "v"(_mm512_loadu_ps(p)));
#else
  prefetch(p);
#endif
}
// Leaves what makes v, or loads from p, where it stands among other such.
GEMMA2_INLINE void keep_order([[maybe_unused]] VecF& v) {
#if defined(__AVX512F__)
  asm volatile("" : "+v"(v));
#endif
}
template <class T>
GEMMA2_INLINE void keep_order(const T*& p) {
  asm volatile("" : "+r"(p));
}

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
GEMMA2_INLINE float to_float(int8_t x) { return x; }
GEMMA2_INLINE float to_float(BFloat16 x) { return bits_to_float(uint32_t(x.bits) << 16); }
GEMMA2_INLINE float to_float(Half x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#elif defined(__aarch64__)
  __fp16 half;
  memcpy(&half, &x, sizeof half);
  return half;
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
#elif defined(__aarch64__)
  const __fp16 half = x;
  Half result;
  memcpy(&result, &half, sizeof result);
  return result;
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

// GCC splits the conversions themselves into halves.
GEMMA2_INLINE VecU widen(VecU16 h) {
#if defined(__AVX512F__)
  return (VecU)_mm512_maskz_cvtepu16_epi32(__mmask16(-1), (__m256i)h);
#elif defined(__AVX2__)
  VecU v;
  for (int i = 0; i < kLanes / 8; ++i)
    ((__m256i*)&v)[i] = _mm256_cvtepu16_epi32(((const __m128i*)&h)[i]);
  return v;
#else
  return __builtin_convertvector(h, VecU);
#endif
}
// Of values below 2^16.
GEMMA2_INLINE VecU16 narrow(VecU v) {
#if defined(__AVX512F__)
  return (VecU16)_mm512_maskz_cvtepi32_epi16(__mmask16(-1), (__m512i)v);
#elif defined(__AVX2__)
  VecU16 h;
  for (int i = 0; i < kLanes / 8; ++i) {
    const __m256i part = ((const __m256i*)&v)[i];
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(part, part), 0x08);
    ((__m128i*)&h)[i] = _mm256_castsi256_si128(packed);
  }
  return h;
#else
  return __builtin_convertvector(v, VecU16);
#endif
}

// Of 2 * kLanes bfloat16, the even and the odd ones: the lower and the upper halves of lanes.
GEMMA2_INLINE VecF even_bfloat16(VecU v) { return (VecF)(v << 16); }
GEMMA2_INLINE VecF odd_bfloat16(VecU v) { return (VecF)(v & 0xffff0000u); }

// The lower and the upper halves of a and b, element by element in turn.
#if GEMMA2_LANES == 4
#define GEMMA2_LOWER 0, 4, 1, 5
#define GEMMA2_UPPER 2, 6, 3, 7
#define GEMMA2_EVEN 0, 2, 4, 6
#define GEMMA2_ODD 1, 3, 5, 7
#elif GEMMA2_LANES == 8
#define GEMMA2_LOWER 0, 8, 1, 9, 2, 10, 3, 11
#define GEMMA2_UPPER 4, 12, 5, 13, 6, 14, 7, 15
#define GEMMA2_EVEN 0, 2, 4, 6, 8, 10, 12, 14
#define GEMMA2_ODD 1, 3, 5, 7, 9, 11, 13, 15
#else
#define GEMMA2_LOWER 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define GEMMA2_UPPER 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#define GEMMA2_EVEN 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define GEMMA2_ODD 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#endif
#if defined(__clang__)
#define GEMMA2_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define GEMMA2_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, VecI{__VA_ARGS__})
#endif
GEMMA2_INLINE_IF_SHORT VecF interleave_lower(VecF a, VecF b) {
  return GEMMA2_SHUFFLE(a, b, GEMMA2_LOWER);
}
GEMMA2_INLINE_IF_SHORT VecF interleave_upper(VecF a, VecF b) {
  return GEMMA2_SHUFFLE(a, b, GEMMA2_UPPER);
}
// And back: every other element of a and then b.
GEMMA2_INLINE_IF_SHORT VecF even_elements(VecF a, VecF b) {
  return GEMMA2_SHUFFLE(a, b, GEMMA2_EVEN);
}
GEMMA2_INLINE_IF_SHORT VecF odd_elements(VecF a, VecF b) {
  return GEMMA2_SHUFFLE(a, b, GEMMA2_ODD);
}
#undef GEMMA2_SHUFFLE
#undef GEMMA2_LOWER
#undef GEMMA2_UPPER
#undef GEMMA2_EVEN
#undef GEMMA2_ODD

// Lane i is lane index(i) of a and b one behind the other.
template <class Index>
GEMMA2_INLINE_IF_SHORT VecF shuffle(VecF a, VecF b, Index index) {
#if defined(__clang__)
  VecF w;
  for (int i = 0; i < kLanes; ++i) w[i] = index(i) < kLanes ? a[index(i)] : b[index(i) - kLanes];
  return w;
#else
  VecI lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = index(i);
  return __builtin_shuffle(a, b, lane);
#endif
}

// Shuffles of a and b within runs of four lanes, the cheapest on x86: the first or second two
// elements of either, one by one (a0 b0 a1 b1) or as they are (a0 a1 b0 b1).
template <int kHalf>
GEMMA2_INLINE VecF interleave_in_runs(VecF a, VecF b) {
  return shuffle(a, b, [](int i) { return i % 2 * kLanes + i / 4 * 4 + 2 * kHalf + i % 4 / 2; });
}
template <int kHalf>
GEMMA2_INLINE VecF join_in_runs(VecF a, VecF b) {
  return shuffle(a, b, [](int i) { return i % 4 / 2 * kLanes + i / 4 * 4 + 2 * kHalf + i % 2; });
}
// Whole runs: the first or second half of a's and b's, and every other one.
template <int kHalf>
GEMMA2_INLINE VecF half_runs(VecF a, VecF b) {
  constexpr int kBoth = kLanes / 2;
  return shuffle(a, b, [](int i) { return i / kBoth * kLanes + kHalf * kBoth + i % kBoth; });
}
template <int kOdd>
GEMMA2_INLINE VecF every_other_run(VecF a, VecF b) {
  return shuffle(a, b, [](int i) { return (i / 4 * 2 + kOdd) * 4 + i % 4; });
}

GEMMA2_INLINE void transpose(VecF (&v)[kLanes]) {
  VecF w[kLanes];  // w[i + c]: element c of each run of rows i to i + 3
  GEMMA2_UNROLL
  for (int i = 0; i < kLanes; i += 4) {
    const VecF a = interleave_in_runs<0>(v[i], v[i + 1]), b = interleave_in_runs<1>(v[i], v[i + 1]);
    const VecF c = interleave_in_runs<0>(v[i + 2], v[i + 3]);
    const VecF d = interleave_in_runs<1>(v[i + 2], v[i + 3]);
    w[i] = join_in_runs<0>(a, c), w[i + 1] = join_in_runs<1>(a, c);
    w[i + 2] = join_in_runs<0>(b, d), w[i + 3] = join_in_runs<1>(b, d);
  }
  GEMMA2_UNROLL
  for (int c = 0; c < 4; ++c) {
    if constexpr (kLanes == 4) {
      v[c] = w[c];
    } else if constexpr (kLanes == 8) {
      v[c] = half_runs<0>(w[c], w[4 + c]), v[4 + c] = half_runs<1>(w[c], w[4 + c]);
    } else {
      const VecF a = half_runs<0>(w[c], w[4 + c]), b = half_runs<1>(w[c], w[4 + c]);
      const VecF d = half_runs<0>(w[8 + c], w[12 + c]), e = half_runs<1>(w[8 + c], w[12 + c]);
      v[c] = every_other_run<0>(a, d), v[4 + c] = every_other_run<1>(a, d);
      v[8 + c] = every_other_run<0>(b, e), v[12 + c] = every_other_run<1>(b, e);
    }
  }
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
  return (VecF)(widen(h) << 16);
}
// Bytes, widened. (The language's own conversion goes byte by byte.)
GEMMA2_INLINE VecI load_bytes(const int8_t* p) {
#if defined(__AVX512F__)
  const __m128i bytes = _mm_loadu_si128((const __m128i*)p);
  return (VecI)_mm512_maskz_cvtepi8_epi32(__mmask16(-1), bytes);
#elif defined(__AVX2__)
  VecI v;
  for (int i = 0; i < kLanes / 8; ++i)
    ((__m256i*)&v)[i] = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8 * i)));
  return v;
#elif defined(__aarch64__)
  int32_t bytes;
  memcpy(&bytes, p, sizeof bytes);
  return (VecI)vmovl_s16(vget_low_s16(vmovl_s8((int8x8_t)vdup_n_s32(bytes))));
#else
  VecI v;
  for (int i = 0; i < kLanes; ++i) v[i] = p[i];
  return v;
#endif
}
GEMMA2_INLINE VecF load(const int8_t* p) { return __builtin_convertvector(load_bytes(p), VecF); }
GEMMA2_INLINE void store(float* p, VecF v) { memcpy(p, &v, sizeof v); }
// The nearest bfloat16, ties to even, in the upper half; the lower half is what rounding left.
GEMMA2_INLINE VecU round_bits(VecF v) {
  const VecU bits = (VecU)v;
  return v != v ? bits | 0x400000 : bits + 0x7fff + ((bits >> 16) & 1);
}
GEMMA2_INLINE VecU16 to_bfloat16(VecF v) {
#if defined(__AVX512BF16__)
  const auto rounded = _mm512_cvtneps_pbh((__m512)v);  // subnormals become 0
  VecU16 h;
  memcpy(&h, &rounded, sizeof h);
  return h;
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
  return (VecU16)vcvt_bf16_f32((float32x4_t)v);
#else
  return narrow(round_bits(v) >> 16);
#endif
}
GEMMA2_INLINE void store(BFloat16* p, VecF v) {
  const VecU16 h = to_bfloat16(v);
  memcpy(p, &h, sizeof h);
}
#if defined(__AVX512F__)
GEMMA2_INLINE VecF load(const Half* p) {
  return (VecF)_mm512_maskz_cvtph_ps(__mmask16(-1), _mm256_loadu_si256((const __m256i*)p));
}
GEMMA2_INLINE void store(Half* p, VecF v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_maskz_cvtps_ph(__mmask16(-1), (__m512)v, 0));
}
#elif defined(__F16C__)
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
#elif defined(__aarch64__)
GEMMA2_INLINE VecF load(const Half* p) { return (VecF)vcvt_f32_f16(vld1_f16((const __fp16*)p)); }
GEMMA2_INLINE void store(Half* p, VecF v) { vst1_f16((__fp16*)p, vcvt_f16_f32((float32x4_t)v)); }
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
// memory. Put together in memory, they would have to wait for every store before them.
#if defined(__AVX512BW__) && defined(__AVX512VL__)
GEMMA2_INLINE __mmask16 first_lanes(int64_t n) { return __mmask16((1u << n) - 1); }
GEMMA2_INLINE VecF load_n(const float* p, int64_t n, float fill = 0.0f) {
  return (VecF)_mm512_mask_loadu_ps((__m512)set(fill), first_lanes(n), p);
}
template <class T>
GEMMA2_INLINE VecF load_n(const T* p, int64_t n, float fill = 0.0f) {
  T lanes[kLanes];
  if constexpr (sizeof(T) == 1) {
    _mm_storeu_si128((__m128i*)lanes, _mm_maskz_loadu_epi8(first_lanes(n), p));
  } else {
    _mm256_storeu_si256((__m256i*)lanes, _mm256_maskz_loadu_epi16(first_lanes(n), p));
  }
  return (VecF)_mm512_mask_mov_ps((__m512)set(fill), first_lanes(n), (__m512)load(lanes));
}
GEMMA2_INLINE void store_n(float* p, VecF v, int64_t n) {
  _mm512_mask_storeu_ps(p, first_lanes(n), (__m512)v);
}
template <class T>
GEMMA2_INLINE void store_n(T* p, VecF v, int64_t n) {
  static_assert(sizeof(T) == 2, "");
  T lanes[kLanes];
  store(lanes, v);
  _mm256_mask_storeu_epi16(p, first_lanes(n), _mm256_loadu_si256((const __m256i*)lanes));
}
#else
template <class T>
GEMMA2_INLINE VecF load_n(const T* p, int64_t n, float fill = 0.0f) {
  float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = i < n ? to_float(p[i]) : fill;
  return load(lanes);
}
#if defined(__AVX2__) && GEMMA2_LANES == 8
template <>
GEMMA2_INLINE VecF load_n(const float* p, int64_t n, float fill) {
  const VecI lane = {0, 1, 2, 3, 4, 5, 6, 7}, mask = lane < int32_t(n);
  const VecF v = (VecF)_mm256_maskload_ps(p, (__m256i)mask);
  return mask ? v : set(fill);
}
#endif
template <class T>
GEMMA2_INLINE void store_n(T* p, VecF v, int64_t n) {
  T lanes[kLanes];
  store(lanes, v);
  memcpy(p, lanes, n * sizeof(T));
}
#endif

// Rounds every lane to T and widens it again.
template <class T>
GEMMA2_INLINE VecF round_to(VecF v) {
  T lanes[kLanes];
  store(lanes, v);
  return load(lanes);
}
template <>
GEMMA2_INLINE VecF round_to<float>(VecF v) {
  return v;
}
template <>
GEMMA2_INLINE VecF round_to<BFloat16>(VecF v) {
#if defined(__AVX512BF16__)
  return (VecF)(widen(to_bfloat16(v)) << 16);
#else
  return (VecF)(round_bits(v) & 0xffff0000u);
#endif
}
// Stores what round_to<T> returned.
template <class T>
GEMMA2_INLINE void store_rounded(T* p, VecF v) {
  store(p, v);
}
template <>
GEMMA2_INLINE void store_rounded<BFloat16>(BFloat16* p, VecF v) {
#if defined(__AVX512BF16__)
  store(p, v);
#else
  const VecU16 h = narrow((VecU)v >> 16);
  memcpy(p, &h, sizeof h);
#endif
}

// ---- arithmetic
// -----------------------------------------------------------------------------------------------------

#if defined(__AVX2__)
GEMMA2_INLINE __m256& part(VecF& v, int i) { return ((__m256*)&v)[i]; }
#endif

// Contracted to one instruction where the machine has it (-ffp-contract=fast).
GEMMA2_INLINE VecF fma(VecF a, VecF b, VecF c) { return a * b + c; }
GEMMA2_INLINE LowF fma(LowF a, LowF b, LowF c) { return a * b + c; }

#if defined(GEMMA2_BFLOAT16_PAIRS)
// Of pairs of bfloat16: sum[i] + a[2i + 1] * b[2i + 1] + a[2i] * b[2i].
GEMMA2_INLINE_IF_SHORT VecF dot_pairs(VecF sum, VecU a, VecU b) {
#if defined(__AVX512BF16__)
  return (VecF)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
  return (VecF)vbfdotq_f32((float32x4_t)sum, (bfloat16x8_t)a, (bfloat16x8_t)b);
#else
  sum = fma(odd_bfloat16(a), odd_bfloat16(b), sum);
  return fma(even_bfloat16(a), even_bfloat16(b), sum);
#endif
}
GEMMA2_INLINE LowF dot_pairs(LowF sum, LowU a, LowU b) {
#if defined(__AVX512BF16__)
  return (LowF)_mm256_dpbf16_ps((__m256)sum, (__m256bh)a, (__m256bh)b);
#else
  sum = fma((LowF)(a & 0xffff0000), (LowF)(b & 0xffff0000), sum);
  return fma((LowF)(a << 16), (LowF)(b << 16), sum);
#endif
}
#endif

#if defined(GEMMA2_ISA_neon_bf16)
// Of two rows of two pairs in a and two in b: sum + (a0 b0, a0 b1, a1 b0, a1 b1).
GEMMA2_INLINE VecF multiply_pairs(VecF sum, VecU a, VecU b) {
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
  return (VecF)vbfmmlaq_f32((float32x4_t)sum, (bfloat16x8_t)a, (bfloat16x8_t)b);
#else
  const VecF a_even = even_bfloat16(a), a_odd = odd_bfloat16(a);
  const VecF b_even = even_bfloat16(b), b_odd = odd_bfloat16(b);
  for (int i = 0; i < kLanes; ++i) {
    for (int k = 0; k < 2; ++k) {
      const int m = i / 2 * 2 + k, n = i % 2 * 2 + k;
      sum[i] += a_even[m] * b_even[n] + a_odd[m] * b_odd[n];
    }
  }
  return sum;
#endif
}

// The first two pairs of a and of b.
GEMMA2_INLINE VecU join_pairs(const void* a, const void* b) {
#if defined(__aarch64__)
  return (VecU)vcombine_u32(vld1_u32((const uint32_t*)a), vld1_u32((const uint32_t*)b));
#else
  VecU joined;
  memcpy(&joined, a, 8);
  memcpy((char*)&joined + 8, b, 8);
  return joined;
#endif
}

// Sums of kRows rows and kVectors vectors of columns, of words that are pairs, by two rows and two
// columns of two words at a time. row_of(r): its words; a step's are `stride` apart in the panel.
template <int kRows, int kVectors, class RowOf, class Ahead>
GEMMA2_INLINE void multiply_pairs_tile(const RowOf& row_of, const float* panel, int64_t stride,
                                       int64_t depth, VecF (&sum)[kRows][kVectors],
                                       const Ahead& ahead) {
  static_assert(kRows % 2 == 0, "");
  VecF squares[kRows / 2][kVectors][2] = {};
  const auto step = [&](const VecF(&a)[kVectors], const VecF(&b)[kVectors], const auto& rows)
                        __attribute__((always_inline)) {
                          VecU columns[kVectors][2];
                          GEMMA2_UNROLL
                          for (int v = 0; v < kVectors; ++v) {
                            columns[v][0] = (VecU)interleave_in_runs<0>(a[v], b[v]);
                            columns[v][1] = (VecU)interleave_in_runs<1>(a[v], b[v]);
                          }
                          GEMMA2_UNROLL
                          for (int r = 0; r < kRows; r += 2) {
                            const VecU both = rows(r);
                            GEMMA2_UNROLL
                            for (int i = 0; i < 2 * kVectors; ++i) {
                              VecF& square = squares[r / 2][i / 2][i % 2];
                              square = multiply_pairs(square, both, columns[i / 2][i % 2]);
                            }
                          }
                        };
  int64_t k = 0;
  VecF first[kVectors], second[kVectors];
  for (; k + 2 <= depth; k += 2, panel += 2 * stride) {
    ahead(k), ahead(k + 1);
    GEMMA2_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      first[v] = load(panel + v * kLanes);
      second[v] = load(panel + stride + v * kLanes);
    }
    step(first, second, [&](int r) { return join_pairs(row_of(r) + k, row_of(r + 1) + k); });
  }
  if (k < depth) {
    ahead(k);
    GEMMA2_UNROLL
    for (int v = 0; v < kVectors; ++v) first[v] = load(panel + v * kLanes), second[v] = zero();
    step(first, second, [&](int r) {
      uint32_t words[4] = {};
      memcpy(words, row_of(r) + k, 4);
      memcpy(words + 2, row_of(r + 1) + k, 4);
      return join_pairs(words, words + 2);
    });
  }
  GEMMA2_UNROLL
  for (int r = 0; r < kRows; ++r) {
    GEMMA2_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const VecF(&square)[2] = squares[r / 2][v];
      sum[r][v] = r % 2 == 0 ? join_in_runs<0>(square[0], square[1])
                             : join_in_runs<1>(square[0], square[1]);
    }
  }
}
#endif

// The second operand where either is NaN, as x86's own instructions do it; written as a comparison
// and a selection they are not recognised. (maskz: the plain ones warn in some GCC.)
GEMMA2_INLINE VecF min(VecF a, VecF b) {
#if defined(__AVX512F__)
  return (VecF)_mm512_maskz_min_ps(__mmask16(-1), (__m512)a, (__m512)b);
#elif defined(__AVX2__)
  for (int i = 0; i < kLanes / 8; ++i) part(a, i) = _mm256_min_ps(part(a, i), part(b, i));
  return a;
#else
  return a < b ? a : b;
#endif
}
GEMMA2_INLINE VecF max(VecF a, VecF b) {
#if defined(__AVX512F__)
  return (VecF)_mm512_maskz_max_ps(__mmask16(-1), (__m512)a, (__m512)b);
#elif defined(__AVX2__)
  for (int i = 0; i < kLanes / 8; ++i) part(a, i) = _mm256_max_ps(part(a, i), part(b, i));
  return a;
#else
  return a > b ? a : b;
#endif
}
GEMMA2_INLINE VecF abs(VecF a) { return (VecF)((VecU)a & 0x7fffffffu); }
// To the nearest integer, ties to even, for |a| < 2^22: adding 1.5 * 2^23 leaves no fraction bits.
GEMMA2_INLINE VecF round_small(VecF a) { return a + set(0x1.8p23f) - set(0x1.8p23f); }
GEMMA2_INLINE VecI to_int(VecF a) { return __builtin_convertvector(a, VecI); }

// v's first 2 kHalves vectors become kHalves; one alone stands for both of a pair.
template <int kHalves, int kCount, class Take>
GEMMA2_INLINE void reduce_pairs(VecF (&v)[kCount], Take take) {
  if constexpr (kHalves == 0) {
    v[0] = take(v[0], v[0]);
  } else {
    GEMMA2_UNROLL
    for (int i = 0; i < kHalves; ++i) v[i] = take(v[2 * i], v[2 * i + 1]);
  }
}

// Lane i is the lanes of v[i], i < kCount, taken together by op in a fixed order, so that a sum is
// the same wherever it is computed; higher lanes repeat those. In a run of four lanes those 2 apart
// are the first to meet, runs those kLanes / 2 apart.
template <int kCount, class Op>
GEMMA2_INLINE VecF reduce_each(VecF (&v)[kCount], Op op) {
  reduce_pairs<kCount / 2>(v, [&](VecF a, VecF b) __attribute__((always_inline)) {
    return op(interleave_in_runs<0>(a, b), interleave_in_runs<1>(a, b));
  });
  reduce_pairs<kCount / 4>(v, [&](VecF a, VecF b) __attribute__((always_inline)) {
    return op(join_in_runs<0>(a, b), join_in_runs<1>(a, b));
  });
  if constexpr (kLanes >= 8) {
    reduce_pairs<kCount / 8>(v, [&](VecF a, VecF b) __attribute__((always_inline)) {
      return op(half_runs<0>(a, b), half_runs<1>(a, b));
    });
  }
  if constexpr (kLanes >= 16) {
    reduce_pairs<kCount / 16>(v, [&](VecF a, VecF b) __attribute__((always_inline)) {
      return op(every_other_run<0>(a, b), every_other_run<1>(a, b));
    });
  }
  return v[0];
}
template <int kCount>
GEMMA2_INLINE VecF reduce_sums(VecF (&v)[kCount]) {
  return reduce_each(v, [](VecF a, VecF b) __attribute__((always_inline)) { return a + b; });
}
template <int kCount>
GEMMA2_INLINE VecF reduce_maxima(VecF (&v)[kCount]) {
  return reduce_each(v, [](VecF a, VecF b) __attribute__((always_inline)) { return max(a, b); });
}
GEMMA2_INLINE float reduce_sum(VecF v) {
  VecF one[] = {v};
  return reduce_sums(one)[0];
}
GEMMA2_INLINE float reduce_max(VecF v) {
  VecF one[] = {v};
  return reduce_maxima(one)[0];
}

// e^x, relative error below 2.5e-7; 0 below -87.7, inf above 88.4, NaN of NaN.
// x = n ln 2 + r, |r| <= ln 2 / 2; e^r = 1 + r + r^2 p(r).
GEMMA2_INLINE VecF exp(VecF x) {
  // Operands in the order that keeps a NaN.
  const VecF clamped = max(set(-88.0f), min(set(89.0f), x));
  // Adding 1.5 * 2^23 leaves n in the last bits of the sum.
  const VecF shifted = fma(clamped, set(0x1.715476p0f), set(0x1.8p23f));  // 1 / ln 2
  const VecF n = shifted - set(0x1.8p23f);
  VecF r = fma(n, set(-0x1.62e4p-1f), clamped);  // ln 2 in two parts, the first exact times n
  r = fma(n, set(-0x1.7f7d1cp-20f), r);
  // p by minimax: relative error 1.1e-7.
  VecF y = set(0x1.106208p-7f);
  y = fma(y, r, set(0x1.572a3cp-5f));
  y = fma(y, r, set(0x1.5557bp-3f));
  y = fma(y, r, set(0x1.fffdfcp-2f));
  y = fma(r * r, y, r) + set(1.0f);
  // 2^n by its exponent's bits: n = -127 gives 0, n = 128 inf.
  return y * (VecF)(((VecU)shifted << 23) + 0x3f800000u);
}

// tanh(x), relative error below 5e-7 and never beyond 1; NaN of NaN.
// x p(x^2) / q(x^2), minimax over |x| <= 9.02, where tanh is 1 to a float's precision.
GEMMA2_INLINE VecF tanh(VecF x) {
  const VecF a = max(set(-9.02f), min(set(9.02f), x));  // operands in the order that keeps a NaN
  const VecF s = a * a;
  VecF p = set(0x1.c9a176p-27f);
  p = fma(p, s, set(0x1.59548ap-16f));
  p = fma(p, s, set(0x1.c9f7f2p-9f));
  p = fma(p, s, set(0x1.120434p-3f));
  p = fma(p, s, set(1.0f));
  VecF q = set(0x1.a0b6dep-21f);
  q = fma(q, s, set(0x1.584154p-12f));
  q = fma(q, s, set(0x1.a7def4p-6f));
  q = fma(q, s, set(0x1.de5764p-2f));
  q = fma(q, s, set(1.0f));
  // Rounding can lead one step beyond 1, and a soft-cap must not be exceeded.
  return max(set(-1.0f), min(set(1.0f), a * p / q));
}

// sin(x) and cos(x), absolute error below 1.5e-7 for every finite x; NaN of inf and NaN.
// x = n pi/2 + r, |r| <= pi/4, in double; sine and cosine of r by polynomials; n's last two bits
// say which is which and their signs.
GEMMA2_INLINE void sincos(VecF x, VecF* sine, VecF* cosine) {
  typedef double VecD __attribute__((vector_size(kLanes * 8)));
  const VecD wide = __builtin_convertvector(x, VecD);
  const VecD shifted = wide * 0x1.45f306dc9c883p-1 + 0x1.8p52;  // 2 / pi
  const VecD n = shifted - 0x1.8p52;
  // pi/2 in two parts, the first of 33 bits: exact times n for |x| < 2^20.
  const VecF r =
      __builtin_convertvector(wide - n * 0x1.921fb544p0 - n * 0x1.0b4611a626331p-34, VecF);
  const VecI quadrant = __builtin_convertvector(n, VecI);
  const VecF s = r * r;
  VecF p = set(-0x1.98dc1cp-13f);  // sin r = r + r^3 p(r^2)
  p = fma(p, s, set(0x1.1105bcp-7f));
  p = fma(p, s, set(-0x1.555554p-3f));
  const VecF sin_r = fma(p * s, r, r);
  VecF q = set(0x1.99e0ecp-16f);  // cos r = 1 - r^2/2 + r^4 q(r^2)
  q = fma(q, s, set(-0x1.6c0c1ap-10f));
  q = fma(q, s, set(0x1.55554ap-5f));
  q = fma(q, s, set(-0.5f));
  const VecF cos_r = fma(q, s, set(1.0f));
  const VecI odd = (quadrant & 1) != 0;
  const VecU sign = (VecU)quadrant << 30 & 0x80000000u;
  const VecU cos_sign = (VecU)(quadrant + 1) << 30 & 0x80000000u;
  *sine = (VecF)((VecU)(odd ? cos_r : sin_r) ^ sign);
  *cosine = (VecF)((VecU)(odd ? sin_r : cos_r) ^ cos_sign);
  const VecI far = abs(x) >= set(0x1p20f);  // rare, so one by one and in full precision
  int32_t any = 0;
  for (int i = 0; i < kLanes; ++i) any |= far[i];
  for (int i = 0; any && i < kLanes; ++i) {
    if (!far[i]) continue;
    (*sine)[i] = float(__builtin_sin(double(x[i])));
    (*cosine)[i] = float(__builtin_cos(double(x[i])));
  }
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
    case DType::kFloat64:
      return;  // has kernels of its own, float64.h
  }
}

}  // namespace
}  // namespace GEMMA2_ISA
}  // namespace gemma2
