// The machine's own instructions, each behind a function; no other file has PTX or `__shared__`.
//
// nvcc compiles them to PTX. Any other compiler takes the same functions from emulation.h
// (tests/host_cuda), where the threads of a block are fibers on a CPU: so a kernel is tested
// without a GPU. Conventions: "shared" pointers point into shared_memory(); a warp function must be
// reached by all 32 lanes. Source: PTX ISA 8.7, fragment layouts of mma.m16n8k16 and ldmatrix.
#pragma once
#include <stdint.h>

namespace gemma2 {
namespace cuda {

// Storage types. BFloat16 is the upper half of a float; Half is IEEE binary16.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

constexpr int kWarpSize = 32;
constexpr unsigned kFullMask = 0xffffffffu;
constexpr float kLog2E = 0x1.715476p+0f;  // log2(e)

// 16 bytes: what one thread moves at best.
struct alignas(16) Vector16 {
  uint32_t words[4];
};
struct alignas(8) Vector8 {
  uint32_t words[2];
};

}  // namespace cuda
}  // namespace gemma2

#ifndef __CUDACC__
#include "emulation.h"
#else
#include <cuda_runtime.h>

namespace gemma2 {
namespace cuda {

#define GEMMA2_DEVICE __device__ __forceinline__

// ---- memory

// All shared memory of the block, aligned to 1024 bytes (bulk tensor copies with a 128-byte swizzle
// need that); its size is given at the launch.
GEMMA2_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char gemma2_shared_memory[];
  return gemma2_shared_memory;
}

GEMMA2_DEVICE uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

GEMMA2_DEVICE uint32_t load_4(const void* p) { return *static_cast<const uint32_t*>(p); }
GEMMA2_DEVICE Vector16 load_16(const void* p) {
  const uint4 v = *static_cast<const uint4*>(p);
  return {{v.x, v.y, v.z, v.w}};
}
// For memory that no thread of the grid writes, and that is read once: it stays out of the first
// cache.
GEMMA2_DEVICE Vector16 load_16_once(const void* p) {
  Vector16 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.words[0]), "=r"(v.words[1]), "=r"(v.words[2]), "=r"(v.words[3])
               : "l"(p));
  return v;
}
GEMMA2_DEVICE Vector8 load_8(const void* p) {
  const uint2 v = *static_cast<const uint2*>(p);
  return {{v.x, v.y}};
}
GEMMA2_DEVICE uint32_t load_4_once(const void* p) {
  uint32_t v;
  asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}
GEMMA2_DEVICE void store_16(void* p, const Vector16& v) {
  *static_cast<uint4*>(p) = make_uint4(v.words[0], v.words[1], v.words[2], v.words[3]);
}
GEMMA2_DEVICE void store_8(void* p, const Vector8& v) {
  *static_cast<uint2*>(p) = make_uint2(v.words[0], v.words[1]);
}

// Starts a copy of kBytes (4, 8 or 16, both sides aligned to that) from global to shared memory;
// zeros where `valid` is false, and then nothing is read. It has landed, for this thread, after a
// cp_async_wait that covers its group; for others after a barrier behind that.
template <int kBytes>
GEMMA2_DEVICE void cp_async(void* shared, const void* global, bool valid) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "");
  const int source_bytes = valid ? kBytes : 0;
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
                 "l"(global), "r"(source_bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(shared_address(shared)),
                 "l"(global), "r"(source_bytes), "n"(kBytes)
                 : "memory");
  }
}
// The same of 16 bytes, the second cache to fetch the 256 bytes around them, which the other warps
// copy next.
GEMMA2_DEVICE void cp_async_beside(void* shared, const void* global, bool valid) {
  const int source_bytes = valid ? 16 : 0;
  asm volatile(
      "cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
      "l"(global), "r"(source_bytes)
      : "memory");
}
// Closes the group of the copies started since the last commit.
GEMMA2_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most kGroups groups of this thread, the latest ones, are still on their way.
template <int kGroups>
GEMMA2_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// ---- a kernel that starts before those in front of it have ended (see launch_early)

// Lets the next kernel start once every block of this one has come here or ended. That one waits
// for the end of this one too, so nothing depends on where this stands.
GEMMA2_DEVICE void allow_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// Waits until the kernels in front have ended and what they wrote can be read.
GEMMA2_DEVICE void wait_for_previous_kernels() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ---- a cluster of blocks: from sm_90 on

// Of all threads of the cluster; what they wrote to shared memory before, others read behind it.
GEMMA2_DEVICE void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
#endif
}
// The same where nothing was written: what a thread has read before, it has.
GEMMA2_DEVICE void cluster_barrier_after_reads() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed;\nbarrier.cluster.wait;" ::: "memory");
#endif
}
// What block `rank` of the cluster has at this place of its shared memory, and at every 32nd float
// behind it.
template <int kCount>
GEMMA2_DEVICE void load_of_block(float (&x)[kCount], const float* shared, int rank) {
#if __CUDA_ARCH__ >= 900
  uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(there)
               : "r"(shared_address(shared)), "r"(rank));
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    asm volatile("ld.shared::cluster.f32 %0, [%1];"
                 : "=f"(x[i])
                 : "r"(there + 4 * kWarpSize * i)
                 : "memory");
  }
#endif
}

// ---- lanes of a warp

// This thread's place in its warp, read anew: no register holds it through the loop in front.
GEMMA2_DEVICE int read_lane() {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}
// The value that lane `lane ^ mask` gives.
template <class T>
GEMMA2_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(kFullMask, value, mask);
}
// The value that lane `source` gives.
template <class T>
GEMMA2_DEVICE T shuffle(T value, int source) {
  return __shfl_sync(kFullMask, value, source);
}
// Bit l: whether lane l's predicate holds.
GEMMA2_DEVICE uint32_t ballot(bool predicate) { return __ballot_sync(kFullMask, predicate); }

// ---- a part of a block

// Barrier number id (1 to 15) of `threads` threads, a multiple of 32.
GEMMA2_DEVICE void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// Arrives there without waiting.
GEMMA2_DEVICE void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- conversions

GEMMA2_DEVICE float to_float(float x) { return x; }
GEMMA2_DEVICE float to_float(BFloat16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
GEMMA2_DEVICE float to_float(Half x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

// Rounded to the nearest, ties to even.
template <class T>
GEMMA2_DEVICE T from_float(float x);
template <>
GEMMA2_DEVICE float from_float<float>(float x) {
  return x;
}
template <>
GEMMA2_DEVICE BFloat16 from_float<BFloat16>(float x) {
  BFloat16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
template <>
GEMMA2_DEVICE Half from_float<Half>(float x) {
  Half y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}

// Two values in one register, the first in the low half.
template <class T>
GEMMA2_DEVICE uint32_t pack(float low, float high);
template <>
GEMMA2_DEVICE uint32_t pack<BFloat16>(float low, float high) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
template <>
GEMMA2_DEVICE uint32_t pack<Half>(float low, float high) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

GEMMA2_DEVICE float bits_to_float(uint32_t bits) { return __uint_as_float(bits); }
GEMMA2_DEVICE uint32_t float_to_bits(float x) { return __float_as_uint(x); }

// ---- arithmetic

// (x & mask) | bits in one instruction, which holds one constant only: the compiler would take two.
GEMMA2_DEVICE uint32_t and_or(uint32_t x, uint32_t mask, uint32_t bits) {
  uint32_t y;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(y) : "r"(x), "r"(mask), "r"(bits));
  return y;
}

// Four of the eight bytes of high:low; each digit of the selector, the last one first, names one.
GEMMA2_DEVICE uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  return __byte_perm(low, high, selector);
}

// a * b + c of both elements of a word, rounded once.
template <class T>
GEMMA2_DEVICE uint32_t multiply_add_2(uint32_t a, uint32_t b, uint32_t c);
template <>
GEMMA2_DEVICE uint32_t multiply_add_2<BFloat16>(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t y;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(c));
  return y;
}
template <>
GEMMA2_DEVICE uint32_t multiply_add_2<Half>(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t y;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(c));
  return y;
}

// 2^x; relative error 2^-22, subnormal results are 0.
GEMMA2_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// log2(x); absolute error 2^-22 for x in [0.5, 2], relative elsewhere.
GEMMA2_DEVICE float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// tanh(x); relative error 2^-11: enough where the result is rounded to BFloat16 or goes through a
// softmax in 16 bits, not for float32.
GEMMA2_DEVICE float tanh_approx(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// 1 / x; relative error 2^-23.
GEMMA2_DEVICE float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---- tensor cores

// 8 x 8 matrices of 16-bit elements from shared memory. Lane l gives the address of row l % 8 of
// matrix l / 8 (16 bytes, aligned); it gets elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4 of
// each matrix, or of column l / 4 with `_trans`. _x2 reads the addresses of lanes 0 to 15 only.
GEMMA2_DEVICE void ldmatrix_x4(uint32_t (&d)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(shared_address(shared))
               : "memory");
}
GEMMA2_DEVICE void ldmatrix_x4_trans(uint32_t (&d)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(shared_address(shared))
               : "memory");
}
GEMMA2_DEVICE void ldmatrix_x2(uint32_t (&d)[2], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(d[0]), "=r"(d[1])
               : "r"(shared_address(shared))
               : "memory");
}
GEMMA2_DEVICE void ldmatrix_x2_trans(uint32_t (&d)[2], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(d[0]), "=r"(d[1])
               : "r"(shared_address(shared))
               : "memory");
}

// d += a b; a is 16 x 16, b 16 x 8 (as column n's rows), d 16 x 8 in float32. With g = lane / 4 and
// t = lane % 4 a lane holds, each register two neighbours in k:
//   a[0] (g, 2t)  a[1] (g + 8, 2t)  a[2] (g, 2t + 8)  a[3] (g + 8, 2t + 8)    (row, k)
//   b[0] (2t, g)  b[1] (2t + 8, g)                                          (k, column)
//   d[0], d[1] (g, 2t), (g, 2t + 1)     d[2], d[3] the same in row g + 8     (row, column)
template <class T>
GEMMA2_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
GEMMA2_DEVICE void mma_m16n8k16<BFloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                          uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
GEMMA2_DEVICE void mma_m16n8k16<Half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                      uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace cuda
}  // namespace gemma2
#endif
