// Hopper's own instructions (sm_90a): wgmma, mbarriers and what orders memory between them. Other
// compilers than nvcc take them from emulation_wgmma.h, as those of ptx.cuh. Kernels that use them
// have code where GEMMA2_HOPPER is defined.
// Source: PTX ISA 8.7, sections on wgmma, mbarrier and asynchronous proxies.
#pragma once
#include "ptx.cuh"

#ifndef __CUDACC__
#define GEMMA2_HOPPER
#include "emulation_wgmma.h"
#elif defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define GEMMA2_HOPPER
namespace gemma2 {
namespace cuda {

// ---- mbarriers: 8 bytes of shared memory each

GEMMA2_DEVICE void mbarrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}
GEMMA2_DEVICE void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.shared::cta.b64 state, [%0]; }" ::"r"(
                   shared_address(barrier))
               : "memory");
}
// Returns once the phase with this parity is complete. A new barrier is in phase 0; the phase
// before it, parity 1, counts as complete.
GEMMA2_DEVICE void mbarrier_wait(uint64_t* barrier, int parity) {
  asm volatile(
      "{ .reg .pred done; "
      "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; "
      "@!done bra again; }" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}
// Whether the phase with this parity is complete.
GEMMA2_DEVICE bool mbarrier_test(uint64_t* barrier, int parity) {
  uint32_t done;
  asm volatile(
      "{ .reg .pred p; "
      "mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
      : "=r"(done)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return done;
}

// Arrives, and adds bytes of bulk copies to what the phase has to wait for.
GEMMA2_DEVICE void mbarrier_arrive_and_expect(uint64_t* barrier, int bytes) {
  asm volatile(
      "{ .reg .b64 state; mbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1; }" ::"r"(
          shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
// Initialized barriers are seen by bulk copies of whoever synchronizes with this thread.
GEMMA2_DEVICE void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// Starts the copy of a box of a tensor (CUtensorMap, in the kernel's parameters) to shared memory;
// its bytes count for the barrier. Zeros where the box lies outside the tensor.
GEMMA2_DEVICE void copy_box(void* shared, const void* tensor_map, int x, int y, int z, int w,
                            uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(shared_address(shared)),
      "l"(tensor_map), "r"(x), "r"(y), "r"(z), "r"(w), "r"(shared_address(barrier))
      : "memory");
}
// The same of a tensor of five dimensions.
GEMMA2_DEVICE void copy_box(void* shared, const void* tensor_map, int x, int y, int z, int w, int v,
                            uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4, %5, %6}], [%7];" ::"r"(shared_address(shared)),
      "l"(tensor_map), "r"(x), "r"(y), "r"(z), "r"(w), "r"(v), "r"(shared_address(barrier))
      : "memory");
}
// What this thread has written to shared memory is seen by wgmma of whoever synchronizes with it.
GEMMA2_DEVICE void fence_shared_for_wgmma() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Registers a thread, of a warpgroup that all call it; a multiple of 8.
template <int kRegisters>
GEMMA2_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
GEMMA2_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- wgmma, by the four warps of a warpgroup together

// Before the first wgmma, and wherever its registers were written by other instructions.
GEMMA2_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
GEMMA2_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most kGroups groups, the latest ones, are still at work.
template <int kGroups>
GEMMA2_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
}
// The compiler moves no use of these registers across this place.
template <int kTiles>
GEMMA2_DEVICE void keep_in_order(float (&d)[kTiles][4]) {
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    asm volatile("" : "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])::"memory");
  }
}

// A matrix in shared memory whose rows of 128 bytes have their 16-byte chunks permuted by the row
// (chunk ^ row % 8), eight rows after eight rows. Where the rows run along the product's depth
// (V: a row a key), `panel_bytes` leads to the next 64 columns; elsewhere (Q, K) it is not used.
GEMMA2_DEVICE uint64_t wgmma_matrix(const void* shared, int panel_bytes) {
  constexpr uint64_t kPermuted128 = uint64_t(1) << 62, kEightRows = 1024;
  return kPermuted128 | kEightRows / 16 << 32 | uint64_t(panel_bytes / 16) << 16 |
         (shared_address(shared) >> 4 & 0x3fff);
}

// The same so many bytes further on, in one instruction: no address carries out of its bits.
GEMMA2_DEVICE uint64_t wgmma_matrix_behind(uint64_t matrix, int bytes) {
  return (matrix & ~uint64_t(0xffffffff)) | (uint32_t(matrix) + uint32_t(bytes) / 16);
}

// The same matrix, of which the compiler keeps nothing in registers between uses.
GEMMA2_DEVICE uint64_t wgmma_matrix_anew(uint64_t matrix) {
  asm volatile("" : "+l"(matrix));
  return matrix;
}

// d = a b, or d += a b where `add`; a is 64 x 16, b 16 x kColumns; both by rows along the depth.
// Warp w of the warpgroup has rows 16 w to 16 w + 15 of d, laid out as by mma_m16n8k16.
template <class T, int kColumns>
GEMMA2_DEVICE void wgmma_shared(float (&d)[kColumns / 8][4], uint64_t a, uint64_t b, bool add);
// d += a b; a in registers, laid out as mma_m16n8k16's; b by rows along the columns.
template <class T, int kColumns>
GEMMA2_DEVICE void wgmma_registers(float (&d)[kColumns / 8][4], const uint32_t (&a)[4], uint64_t b);

#define GEMMA2_D4(x) "+f"(x[0]), "+f"(x[1]), "+f"(x[2]), "+f"(x[3])

template <>
GEMMA2_DEVICE void wgmma_shared<BFloat16, 80>(float (&d)[10][4], uint64_t a, uint64_t b, bool add) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %42, 0; "
      "wgmma.mma_async.sync.aligned.m64n80k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39}, "
      "%40, %41, p, 1, 1, 0, 0; }"
      : GEMMA2_D4(d[0]), GEMMA2_D4(d[1]), GEMMA2_D4(d[2]), GEMMA2_D4(d[3]), GEMMA2_D4(d[4]),
        GEMMA2_D4(d[5]), GEMMA2_D4(d[6]), GEMMA2_D4(d[7]), GEMMA2_D4(d[8]), GEMMA2_D4(d[9])
      : "l"(a), "l"(b), "r"(int(add)));
}
template <>
GEMMA2_DEVICE void wgmma_shared<BFloat16, 128>(float (&d)[16][4], uint64_t a, uint64_t b,
                                               bool add) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %66, 0; "
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "%64, %65, p, 1, 1, 0, 0; }"
      : GEMMA2_D4(d[0]), GEMMA2_D4(d[1]), GEMMA2_D4(d[2]), GEMMA2_D4(d[3]), GEMMA2_D4(d[4]),
        GEMMA2_D4(d[5]), GEMMA2_D4(d[6]), GEMMA2_D4(d[7]), GEMMA2_D4(d[8]), GEMMA2_D4(d[9]),
        GEMMA2_D4(d[10]), GEMMA2_D4(d[11]), GEMMA2_D4(d[12]), GEMMA2_D4(d[13]), GEMMA2_D4(d[14]),
        GEMMA2_D4(d[15])
      : "l"(a), "l"(b), "r"(int(add)));
}
template <>
GEMMA2_DEVICE void wgmma_registers<BFloat16, 128>(float (&d)[16][4], const uint32_t (&a)[4],
                                                  uint64_t b) {
  asm volatile(
      "{ .reg .pred p; setp.eq.b32 p, 0, 0; "
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "{%64, %65, %66, %67}, %68, p, 1, 1, 1; }"
      : GEMMA2_D4(d[0]), GEMMA2_D4(d[1]), GEMMA2_D4(d[2]), GEMMA2_D4(d[3]), GEMMA2_D4(d[4]),
        GEMMA2_D4(d[5]), GEMMA2_D4(d[6]), GEMMA2_D4(d[7]), GEMMA2_D4(d[8]), GEMMA2_D4(d[9]),
        GEMMA2_D4(d[10]), GEMMA2_D4(d[11]), GEMMA2_D4(d[12]), GEMMA2_D4(d[13]), GEMMA2_D4(d[14]),
        GEMMA2_D4(d[15])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
template <>
GEMMA2_DEVICE void wgmma_registers<BFloat16, 256>(float (&d)[32][4], const uint32_t (&a)[4],
                                                  uint64_t b) {
  asm volatile(
      "{ .reg .pred p; setp.eq.b32 p, 0, 0; "
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, "
      "%127}, "
      "{%128, %129, %130, %131}, %132, p, 1, 1, 1; }"
      : GEMMA2_D4(d[0]), GEMMA2_D4(d[1]), GEMMA2_D4(d[2]), GEMMA2_D4(d[3]), GEMMA2_D4(d[4]),
        GEMMA2_D4(d[5]), GEMMA2_D4(d[6]), GEMMA2_D4(d[7]), GEMMA2_D4(d[8]), GEMMA2_D4(d[9]),
        GEMMA2_D4(d[10]), GEMMA2_D4(d[11]), GEMMA2_D4(d[12]), GEMMA2_D4(d[13]), GEMMA2_D4(d[14]),
        GEMMA2_D4(d[15]), GEMMA2_D4(d[16]), GEMMA2_D4(d[17]), GEMMA2_D4(d[18]), GEMMA2_D4(d[19]),
        GEMMA2_D4(d[20]), GEMMA2_D4(d[21]), GEMMA2_D4(d[22]), GEMMA2_D4(d[23]), GEMMA2_D4(d[24]),
        GEMMA2_D4(d[25]), GEMMA2_D4(d[26]), GEMMA2_D4(d[27]), GEMMA2_D4(d[28]), GEMMA2_D4(d[29]),
        GEMMA2_D4(d[30]), GEMMA2_D4(d[31])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
template <>
GEMMA2_DEVICE void wgmma_shared<Half, 80>(float (&d)[10][4], uint64_t a, uint64_t b, bool add) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %42, 0; "
      "wgmma.mma_async.sync.aligned.m64n80k16.f32.f16.f16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39}, "
      "%40, %41, p, 1, 1, 0, 0; }"
      : GEMMA2_D4(d[0]), GEMMA2_D4(d[1]), GEMMA2_D4(d[2]), GEMMA2_D4(d[3]), GEMMA2_D4(d[4]),
        GEMMA2_D4(d[5]), GEMMA2_D4(d[6]), GEMMA2_D4(d[7]), GEMMA2_D4(d[8]), GEMMA2_D4(d[9])
      : "l"(a), "l"(b), "r"(int(add)));
}
template <>
GEMMA2_DEVICE void wgmma_shared<Half, 128>(float (&d)[16][4], uint64_t a, uint64_t b, bool add) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %66, 0; "
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "%64, %65, p, 1, 1, 0, 0; }"
      : GEMMA2_D4(d[0]), GEMMA2_D4(d[1]), GEMMA2_D4(d[2]), GEMMA2_D4(d[3]), GEMMA2_D4(d[4]),
        GEMMA2_D4(d[5]), GEMMA2_D4(d[6]), GEMMA2_D4(d[7]), GEMMA2_D4(d[8]), GEMMA2_D4(d[9]),
        GEMMA2_D4(d[10]), GEMMA2_D4(d[11]), GEMMA2_D4(d[12]), GEMMA2_D4(d[13]), GEMMA2_D4(d[14]),
        GEMMA2_D4(d[15])
      : "l"(a), "l"(b), "r"(int(add)));
}
template <>
GEMMA2_DEVICE void wgmma_registers<Half, 128>(float (&d)[16][4], const uint32_t (&a)[4],
                                              uint64_t b) {
  asm volatile(
      "{ .reg .pred p; setp.eq.b32 p, 0, 0; "
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "{%64, %65, %66, %67}, %68, p, 1, 1, 1; }"
      : GEMMA2_D4(d[0]), GEMMA2_D4(d[1]), GEMMA2_D4(d[2]), GEMMA2_D4(d[3]), GEMMA2_D4(d[4]),
        GEMMA2_D4(d[5]), GEMMA2_D4(d[6]), GEMMA2_D4(d[7]), GEMMA2_D4(d[8]), GEMMA2_D4(d[9]),
        GEMMA2_D4(d[10]), GEMMA2_D4(d[11]), GEMMA2_D4(d[12]), GEMMA2_D4(d[13]), GEMMA2_D4(d[14]),
        GEMMA2_D4(d[15])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
template <>
GEMMA2_DEVICE void wgmma_registers<Half, 256>(float (&d)[32][4], const uint32_t (&a)[4],
                                              uint64_t b) {
  asm volatile(
      "{ .reg .pred p; setp.eq.b32 p, 0, 0; "
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.f16.f16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, "
      "%127}, "
      "{%128, %129, %130, %131}, %132, p, 1, 1, 1; }"
      : GEMMA2_D4(d[0]), GEMMA2_D4(d[1]), GEMMA2_D4(d[2]), GEMMA2_D4(d[3]), GEMMA2_D4(d[4]),
        GEMMA2_D4(d[5]), GEMMA2_D4(d[6]), GEMMA2_D4(d[7]), GEMMA2_D4(d[8]), GEMMA2_D4(d[9]),
        GEMMA2_D4(d[10]), GEMMA2_D4(d[11]), GEMMA2_D4(d[12]), GEMMA2_D4(d[13]), GEMMA2_D4(d[14]),
        GEMMA2_D4(d[15]), GEMMA2_D4(d[16]), GEMMA2_D4(d[17]), GEMMA2_D4(d[18]), GEMMA2_D4(d[19]),
        GEMMA2_D4(d[20]), GEMMA2_D4(d[21]), GEMMA2_D4(d[22]), GEMMA2_D4(d[23]), GEMMA2_D4(d[24]),
        GEMMA2_D4(d[25]), GEMMA2_D4(d[26]), GEMMA2_D4(d[27]), GEMMA2_D4(d[28]), GEMMA2_D4(d[29]),
        GEMMA2_D4(d[30]), GEMMA2_D4(d[31])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
#undef GEMMA2_D4

}  // namespace cuda
}  // namespace gemma2
#endif
