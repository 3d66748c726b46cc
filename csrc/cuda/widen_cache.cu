// An int8 cache times its factors, rounded once, for attention over more rows than its int8 kernel
// takes. Slots that hold no key are left as they are.
//
// A thread takes 8 elements of a row. Memory bounds it: 3 bytes an element in 16 bits.
//
// widen_cache_kernel: at most 40 registers, no shared memory.
#include "kernels.h"
#include "vector.cuh"

namespace gemma2 {
namespace cuda {
namespace {

constexpr int kThreads = 256, kElements = 8;

template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads) widen_cache_kernel(const WidenCacheParams p) {
  const int64_t vectors = p.head_dim / kElements;
  const int64_t count = p.batch * p.num_kv_heads * p.capacity * vectors;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += int64_t(gridDim.x) * kThreads) {
    const int64_t row = i / vectors, column = i % vectors * kElements;
    const int64_t slot = row % p.capacity, head = row / p.capacity % p.num_kv_heads;
    const int64_t batch = row / p.capacity / p.num_kv_heads;
    if (slot >= p.key_lengths[batch]) continue;
    const auto offset = [&](const HeadsView& view) {
      return batch * view.batch_stride + slot * view.seqlen_stride + head * view.head_stride;
    };
    const int8_t* from = static_cast<const int8_t*>(p.cache.data) + offset(p.cache) + column;
    Vector8 bytes{};
    if constexpr (kAligned) {
      bytes = load_8(from);
    } else {
#pragma unroll
      for (int j = 0; j < kElements; ++j)
        bytes.words[j / 4] |= uint32_t(uint8_t(from[j])) << (8 * (j % 4));
    }
    const float factor = static_cast<const float*>(p.scales.data)[offset(p.scales)];
    T* const out = static_cast<T*>(p.out) + row * p.head_dim + column;
    constexpr int kSize = kVectorSize<T>;
#pragma unroll
    for (int first = 0; first < kElements; first += kSize) {
      float x[kSize];
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        const int at = first + j;
        x[j] = float(int8_t(bytes.words[at / 4] >> (8 * (at % 4)))) * factor;
      }
      store_16(out + first, pack_vector(x, T{}));
    }
  }
}

}  // namespace
}  // namespace cuda

void launch_widen_cache(const WidenCacheParams& p, cudaStream_t stream) {
  using namespace cuda;
  const int64_t count = p.batch * p.num_kv_heads * p.capacity * (p.head_dim / kElements);
  if (count == 0) return;
  bool aligned = reinterpret_cast<uintptr_t>(p.cache.data) % kElements == 0;
  for (const int64_t stride : {p.cache.batch_stride, p.cache.seqlen_stride, p.cache.head_stride}) {
    aligned = aligned && stride % kElements == 0;
  }
  dispatch_dtype("attention_cache", p.dtype, [&](auto t) {
    using T = decltype(t);
    launch("attention_cache", aligned ? widen_cache_kernel<T, true> : widen_cache_kernel<T, false>,
           row_grid(divide_up(count, kThreads)), kThreads, 0, stream, p);
  });
}

}  // namespace gemma2
