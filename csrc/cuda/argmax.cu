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
#include "argmax.cuh"
#include "kernels.h"

namespace gemma2 {
namespace cuda {
namespace {

template <bool kAligned, bool kDraws>
__global__ void __launch_bounds__(kRowThreads) argmax_kernel(const ArgmaxParams p, int blocks) {
  allow_next_kernel();
  wait_for_previous_kernels();
  const int64_t row = blockIdx.x / unsigned(blocks);
  const int rank = int(blockIdx.x) % blocks, warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const uint32_t first_key = kDraws ? p.keys[2 * row] : 0;
  const uint32_t second_key = kDraws ? p.keys[2 * row + 1] : 0;
  uint64_t best = 0;
  for_each_of_row<kAligned, 4>(
      p.x + row * p.x_stride, p.columns, rank, blocks, [&](float value, uint32_t column) {
        if (kDraws) value = draw_score(value, p.inverse_temperature, first_key, second_key, column);
        best = larger(best, key_of(value, column));
      });
  // keys[2][warp]: the halves of each warp's.
  float* const keys = reinterpret_cast<float*>(shared_memory());
  const auto halves = [&](uint64_t key, int at) {
    keys[at] = high_half(key), keys[kRowWarps + at] = low_half(key);
  };
  best = warp_largest(best);
  if (lane == 0) halves(best, warp);
  __syncthreads();
  if (warp == 0) best = warp_largest(whole(keys[lane], keys[kRowWarps + lane]));
  if (blocks > 1) {
    // The first keys of both halves take the block's.
    if (threadIdx.x == 0) halves(best, 0);
    cluster_barrier();
    if (rank == 0 && warp == 0) {
      float both[2];
      static_assert(kRowWarps == kWarpSize, "the low halves are that far behind the high ones");
      load_of_block(both, keys, lane % blocks);
      best = warp_largest(whole(both[0], both[1]));
    }
    cluster_barrier_after_reads();
  }
  if (rank == 0 && threadIdx.x == 0) p.out[row] = int64_t(column_of(best));
}

}  // namespace
}  // namespace cuda

void launch_argmax(const ArgmaxParams& p, cudaStream_t stream) {
  using namespace cuda;
  const char* op = "argmax";
  if (p.rows == 0) return;
  const int blocks = row_blocks(op, p.rows, p.columns);
  const bool aligned = is_aligned(p.x, p.x_stride * sizeof(float));
  const auto kernel = p.keys ? (aligned ? argmax_kernel<true, true> : argmax_kernel<false, true>)
                             : (aligned ? argmax_kernel<true, false> : argmax_kernel<false, false>);
  launch_clusters(op, kernel, blocks, dim3(unsigned(p.rows * blocks)), kRowThreads,
                  2 * kRowWarps * int64_t(sizeof(float)), stream, p, blocks);
}

}  // namespace gemma2
