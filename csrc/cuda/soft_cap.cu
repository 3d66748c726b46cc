// x = softcap * tanh(x / softcap), float32, in place: behind a product that another library made.
//
// Memory bounds it: 8 bytes an element. tanh is CUDA's own, good to 2 units of the last place.
//
// soft_cap_kernel: at most 32 registers, 0 bytes of shared memory.
#include "kernels.h"
#include "vector.cuh"

namespace gemma2 {
namespace cuda {
namespace {

constexpr int kThreads = 256;

template <bool kAligned>
__global__ void __launch_bounds__(kThreads) soft_cap_kernel(const SoftCapParams p) {
  const int64_t stride = int64_t(gridDim.x) * kThreads * 4;
  for (int64_t at = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * 4; at < p.size; at += stride) {
    float x[4];
    load_floats<kAligned>(p.x + at, p.size - at, x);
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = p.softcap * tanhf(x[i] / p.softcap);
    store_vector<kAligned>(p.x + at, p.size - at, pack_vector(x, float{}));
  }
}

}  // namespace
}  // namespace cuda

void launch_soft_cap(const SoftCapParams& p, cudaStream_t stream) {
  using namespace cuda;
  launch("soft_cap", is_aligned(p.x, 0) ? soft_cap_kernel<true> : soft_cap_kernel<false>,
         row_grid(divide_up(p.size, kThreads * 4)), kThreads, 0, stream, p);
}

}  // namespace gemma2
