// out[row] = the place of the largest of x[row], float32: of equals the first, and NaN is larger
// than any number, as torch has it. Logits in a decoding step; with keys the largest of what makes
// it a draw.
//
// A row is a megabyte from the second cache, of which one multiprocessor, at 64 bytes a clock,
// would read for eight microseconds: a cluster of blocks shares it. Where there are no clusters one
// block has a row.
//
// argmax_kernel: at most 64 registers, 512 bytes of shared memory.
#include "../draw.h"
#include "kernels.h"
#include "vector.cuh"

namespace gemma2 {
namespace cuda {
namespace {

constexpr int kThreads = 1024, kWarps = kThreads / kWarpSize, kCluster = 8;

// A number that rises with x and, of equal x, falls with its place. -0 equals 0.
GEMMA2_DEVICE uint64_t key_of(float x, uint32_t column) {
  const uint32_t bits = float_to_bits(x + 0.0f);
  const uint32_t order = x != x ? 0xffffffffu : bits >> 31 ? ~bits : bits | 0x80000000u;
  return uint64_t(order) << 32 | uint32_t(~column);
}
GEMMA2_DEVICE uint64_t larger(uint64_t a, uint64_t b) { return a < b ? b : a; }
GEMMA2_DEVICE uint64_t warp_largest(uint64_t key) {
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) key = larger(key, shuffle_xor(key, mask));
  return key;
}

template <bool kAligned, bool kDraws>
__global__ void __launch_bounds__(kThreads) argmax_kernel(const ArgmaxParams p, int blocks) {
  constexpr int kSize = kVectorSize<float>, kAtOnce = 4;
  allow_next_kernel();
  wait_for_previous_kernels();
  const int64_t row = blockIdx.x / unsigned(blocks);
  const int rank = int(blockIdx.x) % blocks, warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const float* const x = p.x + row * p.x_stride;
  const int64_t step = int64_t(blocks) * kThreads * kSize;
  const uint32_t first_key = kDraws ? p.keys[2 * row] : 0;
  const uint32_t second_key = kDraws ? p.keys[2 * row + 1] : 0;
  uint64_t best = 0;
  for (int64_t first = (int64_t(rank) * kThreads + threadIdx.x) * kSize; first < p.columns;
       first += kAtOnce * step) {
    float values[kAtOnce][kSize];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int64_t at = first + i * step;
      if (at < p.columns) load_floats<kAligned>(x + at, p.columns - at, values[i]);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        const int64_t at = first + i * step + j;
        if (at >= p.columns) continue;
        float value = values[i][j];
        if (kDraws) value = draw_score(value, p.inverse_temperature, first_key, second_key, at);
        best = larger(best, key_of(value, uint32_t(at)));
      }
    }
  }
  // keys[2][warp]: the halves of each warp's, which is what another block's thread can read.
  float* const keys = reinterpret_cast<float*>(shared_memory());
  const auto halves = [&](uint64_t key, int at) {
    keys[at] = bits_to_float(uint32_t(key >> 32));
    keys[kWarps + at] = bits_to_float(uint32_t(key));
  };
  const auto whole = [](float high, float low) {
    return uint64_t(float_to_bits(high)) << 32 | float_to_bits(low);
  };
  best = warp_largest(best);
  if (lane == 0) halves(best, warp);
  __syncthreads();
  if (warp == 0) best = warp_largest(whole(keys[lane], keys[kWarps + lane]));
  if (blocks > 1) {
    // The first keys of both halves take the block's.
    if (threadIdx.x == 0) halves(best, 0);
    cluster_barrier();
    if (rank == 0 && warp == 0) {
      float both[2];
      static_assert(kWarps == kWarpSize, "the low halves are that far behind the high ones");
      load_of_block(both, keys, lane % blocks);
      best = warp_largest(whole(both[0], both[1]));
    }
    cluster_barrier_after_reads();
  }
  if (rank == 0 && threadIdx.x == 0) p.out[row] = int64_t(uint32_t(~best));
}

}  // namespace
}  // namespace cuda

void launch_argmax(const ArgmaxParams& p, cudaStream_t stream) {
  using namespace cuda;
  const char* op = "argmax";
  if (p.rows == 0) return;
  const int blocks = device_properties().clusters ? kCluster : 1;
  if (p.columns > UINT32_MAX || p.rows * blocks > device_properties().max_blocks)
    throw std::invalid_argument("gemma2_ext::argmax: too many elements for CUDA");
  const bool aligned = is_aligned(p.x, p.x_stride * sizeof(float));
  const auto kernel = p.keys ? (aligned ? argmax_kernel<true, true> : argmax_kernel<false, true>)
                             : (aligned ? argmax_kernel<true, false> : argmax_kernel<false, false>);
  launch_clusters(op, kernel, blocks, dim3(unsigned(p.rows * blocks)), kThreads,
                  2 * kWarps * int64_t(sizeof(float)), stream, p, blocks);
}

}  // namespace gemma2
