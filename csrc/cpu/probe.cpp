// What the machine can do, as the limit that kernels are measured against: multiplications and
// additions out of registers, and reading memory.
//
// A unit is one thread's loop: kChains independent sums, enough to hide an instruction's latency
// (4 cycles, 2 a cycle), or a walk over `bytes` bytes that keeps several lines on their way.
#include "kernels.h"
#include "simd.h"

namespace gemma2 {
namespace GEMMA2_ISA {
namespace {

constexpr int kChains = 12;

// Runs step(sum) on every chain, `iterations` times. The compiler may not see through a step.
template <class V, class Step>
GEMMA2_INLINE void run_chains(int64_t iterations, Step step) {
  V sums[kChains] = {};
  for (int64_t i = 0; i < iterations; ++i) {
    GEMMA2_UNROLL
    for (int c = 0; c < kChains; ++c) {
      step(sums[c]);
      asm volatile("" : "+x"(sums[c]));
    }
  }
}

#if defined(__x86_64__)
double multiply_float32(int64_t iterations) {
#if defined(__AVX512F__)
  typedef __m512 V;
#elif defined(__AVX2__)
  typedef __m256 V;
#else
  typedef float V __attribute__((vector_size(16)));
#endif
  V a = V{} + 1.0f, b = V{} + 0.5f;
  asm volatile("" : "+x"(a), "+x"(b));
  run_chains<V>(iterations, [&](V& sum) { sum = a * b + sum; });
  return 2.0 * kChains * double(sizeof(V) / 4) * double(iterations);
}
#else
double multiply_float32(int64_t) { return 0; }
#endif

double multiply_bfloat16(int64_t iterations) {
#if defined(__AVX512BF16__)
  const __m512bh a = (__m512bh)(VecU{} + 0x3f803f80u);
  run_chains<__m512>(iterations, [&](__m512& sum) { sum = _mm512_dpbf16_ps(sum, a, a); });
  return 2.0 * kChains * 32 * double(iterations);
#else
  return iterations * 0.0;
#endif
}

double multiply_int8(int64_t iterations) {
#if defined(__AVX512VNNI__)
  const __m512i a = _mm512_set1_epi8(1);
  run_chains<__m512i>(iterations, [&](__m512i& sum) { sum = _mm512_dpbusd_epi32(sum, a, a); });
  return 2.0 * kChains * 64 * double(iterations);
#elif defined(__AVX2__)
  __m256i a = _mm256_set1_epi8(1), ones = _mm256_set1_epi16(1);
  asm volatile("" : "+x"(a), "+x"(ones));
  run_chains<__m256i>(iterations, [&](__m256i& sum) {
    asm volatile("" : "+x"(a));  // or the products would be the same every time
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(a, a), ones));
  });
  return 2.0 * kChains * 32 * double(iterations);
#else
  return iterations * 0.0;
#endif
}

// Four streams, as far from each other as they go: the processor's prefetcher keeps up with
// several.
double read_bytes(const char* data, int64_t bytes) {
  constexpr int kStreams = 4, kLine = 64;
  const int64_t part = bytes / kStreams / kLine * kLine;
  VecU sums[kStreams] = {};
  for (int64_t i = 0; i < part; i += kLine) {
    GEMMA2_UNROLL
    for (int s = 0; s < kStreams; ++s) {
      const char* line = data + s * part + i;
      __builtin_prefetch(line + 1024);
      GEMMA2_UNROLL
      for (int64_t j = 0; j < kLine; j += int64_t(sizeof(VecU))) {
        VecU v;
        memcpy(&v, line + j, sizeof v);
        sums[s] ^= v;
      }
    }
  }
  GEMMA2_UNROLL
  for (int s = 0; s < kStreams; ++s) asm volatile("" ::"m"(sums[s]));
  return double(part) * kStreams;
}

}  // namespace

void probe_once(const ProbeParams& p, int64_t, int64_t) {
  switch (p.probe) {
    case Probe::kFloat32:
      *p.done = multiply_float32(p.iterations);
      return;
    case Probe::kBFloat16:
      *p.done = multiply_bfloat16(p.iterations);
      return;
    case Probe::kInt8:
      *p.done = multiply_int8(p.iterations);
      return;
    case Probe::kRead:
      *p.done = read_bytes((const char*)p.data, p.bytes);
      return;
  }
}

}  // namespace GEMMA2_ISA
}  // namespace gemma2
