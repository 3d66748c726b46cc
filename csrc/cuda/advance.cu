// The end of a decoding step: what was drawn becomes the tokens of the rows that run, and a row
// that drew a stop runs no more. A thread a row, for what torch does in eight launches.
//
// advance_kernel: at most 32 registers, 0 bytes of shared memory.
#include "kernels.h"
#include "vector.cuh"

namespace gemma2 {
namespace cuda {
namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads) advance_kernel(const AdvanceParams p) {
  allow_next_kernel();
  wait_for_previous_kernels();
  for (int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x; row < p.rows;
       row += int64_t(gridDim.x) * kThreads) {
    const bool running = p.running[row];
    const int64_t token = running ? p.drawn[row] : p.pad;
    bool stops = false;
    for (int64_t i = 0; i < p.stop_count; ++i) stops = stops || token == p.stops[i];
    p.tokens[row] = token;
    p.running[row] = running && !stops;
    ++p.key_lengths[row];
  }
}

}  // namespace
}  // namespace cuda

void launch_advance(const AdvanceParams& p, cudaStream_t stream) {
  using namespace cuda;
  if (p.rows == 0) return;
  launch_early("advance", advance_kernel, row_grid(divide_up(p.rows, kThreads)), kThreads, 0,
               stream, p);
}

}  // namespace gemma2
