// What the machine itself can do, which benchmarks hold against what the kernels reach.
//
// probe_memory: a unit is kProbeRun bytes of one or two sources, read as they lie, and, with an
// output, added up into it: the same mix of reads and writes as an elementwise op; with the next
// run fetched by instruction or not, as either can be the faster one. probe_multiply: a unit is
// kProbeSteps rounds of independent multiply-adds that never leave the registers.
#include "kernels.h"
#include "linear-inl.h"

namespace gemma2 {
namespace GEMMA2_ISA {
namespace {

// A run is read as this many parts beside each other, as rows of a weight are: memory delivers more
// to several streams than to one.
constexpr int kParts = 8;
constexpr int64_t kPart = kProbeRun / kParts;

template <bool kTwo, bool kWrite, bool kFetch>
void memory_run(const ProbeParams& p, int64_t offset) {
  const char* a = (const char*)p.a + offset;
  const char* b = (const char*)p.b + offset;
  char* out = (char*)p.out + offset;
  constexpr int kVectors = kLineBytes / (4 * kLanes);  // of a line
  VecU seen[kVectors] = {};
  for (int64_t i = 0; i < kPart; i += kLineBytes) {
    GEMMA2_UNROLL
    for (int64_t at = i; at < kProbeRun; at += kPart) {
      // The same line of the next run. (Past the last one a prefetch does no harm.)
      if (kFetch) prefetch(a + at + kProbeRun);
      if (kFetch && kTwo) prefetch(b + at + kProbeRun);
      GEMMA2_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        const int64_t vector = at + v * 4 * kLanes;
        VecF x = load((const float*)(a + vector));
        if (kTwo) x = x + load((const float*)(b + vector));
        if (kWrite) {
          store((float*)(out + vector), x);
        } else {
          seen[v] |= (VecU)x;
        }
      }
    }
  }
  if (kWrite) return;
  uint32_t any = 0;
  for (int v = 0; v < kVectors; ++v)
    for (int lane = 0; lane < kLanes; ++lane) any |= seen[v][lane];
  if (any == 0x5eed5eed) *p.sink = any;  // never, but the compiler cannot know
}

// Sums beside each other: enough to hide an instruction's latency, few enough for the registers.
constexpr int kSums = kRegisters == 32 ? 24 : 12;

// Products of an instruction.
#if defined(GEMMA2_ISA_neon_bf16)
constexpr int kMatrix = 2;  // times those of a dot product, where it multiplies small matrices
#else
constexpr int kMatrix = 1;
#endif
template <class T>
constexpr int64_t kProducts =
    Math<T>::kPerFactor * kLanes * (Math<T>::kPerFactor == 2 ? kMatrix : 1);
template <class T, class V>
GEMMA2_INLINE VecF multiply_most(V a, V b, VecF sum) {
#if defined(GEMMA2_ISA_neon_bf16)
  if constexpr (Math<T>::kPerFactor == 2) return multiply_pairs(sum, a, b);
#endif
  return Math<T>::multiply_add(a, b, sum);
}

template <class T>
void multiply_run(const ProbeParams& p) {
  using M = Math<T>;
  VecF sum[kSums] = {};
  float ones[kLanes];
  for (int i = 0; i < kLanes; ++i) ones[i] = p.factor;
  typename M::Vec a, b;
  memcpy(&a, ones, sizeof a);
  memcpy(&b, ones, sizeof b);
  for (int64_t step = 0; step < kProbeSteps; step += 16) {
    GEMMA2_UNROLL
    for (int repeat = 0; repeat < 16; ++repeat) {
      GEMMA2_UNROLL
      for (int s = 0; s < kSums; ++s) sum[s] = multiply_most<T>(a, b, sum[s]);
    }
    asm volatile("" : "+m"(a));  // else the product is the same every time, and is taken once
  }
  float total = 0;
  for (int s = 0; s < kSums; ++s) total += reduce_sum(sum[s]);
  if (total == 0x1.23456p-30f) *p.sink = 1;
}

// Dot products of four int8 each into int32; returns the operations, 0 where there is none.
int64_t multiply_run_int8() {
#if defined(__AVX2__)
#if defined(__AVX512VNNI__)
  typedef __m512i V;
  const auto dot = [](V sum, V a, V) { return _mm512_dpbusd_epi32(sum, a, a); };
  V a = _mm512_set1_epi8(1), ones = a;
#elif defined(__AVXVNNI__)
  typedef __m256i V;
  const auto dot = [](V sum, V a, V) { return _mm256_dpbusd_avx_epi32(sum, a, a); };
  V a = _mm256_set1_epi8(1), ones = a;
#else
  typedef __m256i V;
  const auto dot = [](V sum, V a, V ones) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(a, a), ones));
  };
  V a = _mm256_set1_epi8(1), ones = _mm256_set1_epi16(1);
#endif
  V sums[kSums] = {};
  for (int64_t step = 0; step < kProbeSteps; ++step) {
    GEMMA2_UNROLL
    for (int s = 0; s < kSums; ++s) {
      asm volatile("" : "+x"(a));  // else the product is the same every time, and is taken once
      sums[s] = dot(sums[s], a, ones);
    }
  }
  GEMMA2_UNROLL
  for (int s = 0; s < kSums; ++s) asm volatile("" ::"x"(sums[s]));
  return int64_t(2) * sizeof(V) * kSums * kProbeSteps;
#elif defined(__ARM_FEATURE_DOTPROD)
  int8x16_t a = vdupq_n_s8(1);
  int32x4_t sums[kSums] = {};
  for (int64_t step = 0; step < kProbeSteps; ++step) {
    GEMMA2_UNROLL
    for (int s = 0; s < kSums; ++s) {
      asm volatile("" : "+w"(a));
#if defined(__ARM_FEATURE_MATMUL_INT8)
      sums[s] = vmmlaq_s32(sums[s], a, a);
#else
      sums[s] = vdotq_s32(sums[s], a, a);
#endif
    }
  }
  GEMMA2_UNROLL
  for (int s = 0; s < kSums; ++s) asm volatile("" ::"w"(sums[s]));
  return int64_t(2) * kMatrix * sizeof a * kSums * kProbeSteps;
#else
  return 0;
#endif
}

template <bool kFetch>
void memory_runs(const ProbeParams& p, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t offset = unit * kProbeRun;
    if (p.out) {
      p.b ? memory_run<true, true, kFetch>(p, offset) : memory_run<false, true, kFetch>(p, offset);
    } else {
      p.b ? memory_run<true, false, kFetch>(p, offset)
          : memory_run<false, false, kFetch>(p, offset);
    }
  }
}

}  // namespace

void probe_memory(const ProbeParams& p, int64_t begin, int64_t end) {
  p.fetch ? memory_runs<true>(p, begin, end) : memory_runs<false>(p, begin, end);
}

void probe_multiply(const ProbeParams& p, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit) {
    if (p.int8) {
      *p.operations += multiply_run_int8();
    } else if (p.dtype == DType::kBFloat16) {
      multiply_run<BFloat16>(p);
      *p.operations += 2 * kProducts<BFloat16> * kSums * kProbeSteps;
    } else {
      multiply_run<float>(p);
      *p.operations += 2 * kProducts<float> * kSums * kProbeSteps;
    }
  }
}

}  // namespace GEMMA2_ISA
}  // namespace gemma2
