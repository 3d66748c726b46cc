// wgmma's shapes that only attention's backward has, and its soft-cap. Beside wgmma.cuh.
// Source: PTX ISA 8.7, section on wgmma.
#pragma once
#include "attention.cuh"
#include "wgmma.cuh"

#if defined(GEMMA2_HOPPER)
namespace gemma2 {
namespace cuda {

#ifdef __CUDACC__
// d = a b: as wgmma_shared, of which kColumns are 64 only here. d is an output alone, so that the
// compiler has nothing to put into its registers while other products are at work.
template <class T, int kColumns>
GEMMA2_DEVICE void wgmma_first(float (&d)[kColumns / 8][4], uint64_t a, uint64_t b);

#define GEMMA2_D4(c, x) c(x[0]), c(x[1]), c(x[2]), c(x[3])
#define GEMMA2_D32(c, d, i)                                                                   \
  GEMMA2_D4(c, d[i]), GEMMA2_D4(c, d[i + 1]), GEMMA2_D4(c, d[i + 2]), GEMMA2_D4(c, d[i + 3]), \
      GEMMA2_D4(c, d[i + 4]), GEMMA2_D4(c, d[i + 5]), GEMMA2_D4(c, d[i + 6]),                 \
      GEMMA2_D4(c, d[i + 7])
#define GEMMA2_R32                                                                             \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
  "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define GEMMA2_R64                                                                               \
  GEMMA2_R32                                                                                     \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, " \
  "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define GEMMA2_WGMMA(T, name)                                                                 \
  template <>                                                                                 \
  GEMMA2_DEVICE void wgmma_first<T, 64>(float (&d)[8][4], uint64_t a, uint64_t b) {           \
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." name "." name " {" GEMMA2_R32  \
                 "}, %32, %33, 0, 1, 1, 0, 0;"                                                \
                 : GEMMA2_D32("=f", d, 0)                                                     \
                 : "l"(a), "l"(b));                                                           \
  }                                                                                           \
  template <>                                                                                 \
  GEMMA2_DEVICE void wgmma_first<T, 128>(float (&d)[16][4], uint64_t a, uint64_t b) {         \
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." name "." name " {" GEMMA2_R64 \
                 "}, %64, %65, 0, 1, 1, 0, 0;"                                                \
                 : GEMMA2_D32("=f", d, 0), GEMMA2_D32("=f", d, 8)                             \
                 : "l"(a), "l"(b));                                                           \
  }                                                                                           \
  template <>                                                                                 \
  GEMMA2_DEVICE void wgmma_shared<T, 64>(float (&d)[8][4], uint64_t a, uint64_t b, bool) {    \
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." name "." name " {" GEMMA2_R32  \
                 "}, %32, %33, 1, 1, 1, 0, 0;"                                                \
                 : GEMMA2_D32("+f", d, 0)                                                     \
                 : "l"(a), "l"(b));                                                           \
  }
GEMMA2_WGMMA(BFloat16, "bf16")
GEMMA2_WGMMA(Half, "f16")
#undef GEMMA2_WGMMA
#undef GEMMA2_R64
#undef GEMMA2_R32
#undef GEMMA2_D32
#undef GEMMA2_D4
#endif

// tanh(x) for |x| <= 1, absolute error 4e-7: seven multiplications where tanh_by_exp takes two
// results of the special-function unit, a sixteenth as fast. Minimax in x^2.
GEMMA2_DEVICE float tanh_by_polynomial(float x) {
  const float u = x * x;
  float y = -0.0029830436687916517f;
  y = y * u + 0.016532715409994125f;
  y = y * u - 0.0514252595603466f;
  y = y * u + 0.13275611400604248f;
  y = y * u - 0.33328670263290405f;
  return x + x * u * y;
}

// scale_scores, by the polynomial where it holds for all of the warp's scores.
template <int kTiles>
GEMMA2_DEVICE void scale_small_scores(float (&s)[kTiles][4], const ScoreScale& c) {
  if (!c.capped) return scale_scores(s, c);
  float largest = 0.0f;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int j = 0; j < 4; ++j) largest = fmaxf(largest, fabsf(s[n][j]));
  }
  if (ballot(largest * fabsf(c.inner) > 1.0f)) return scale_scores(s, c);
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int j = 0; j < 4; ++j) s[n][j] = tanh_by_polynomial(s[n][j] * c.inner);
  }
}

}  // namespace cuda
}  // namespace gemma2
#endif
