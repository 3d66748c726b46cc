// out = gelu_tanh(gate) * up, in float32, rounded once.
//
// A block computes one vector a thread of one row: 1024 columns in 16 bits, which divides every
// Gemma 2's intermediate_size. Memory bounds it: 6 bytes an element in 16 bits, against two of the
// special functions (16 a clock and multiprocessor).
//
// geglu_kernel: at most 40 registers, 0 bytes of shared memory.
#include "gelu.cuh"
#include "kernels.h"
#include "vector.cuh"

namespace gemma2 {
namespace cuda {
namespace {

constexpr int kThreads = 128;
constexpr unsigned kMaxGridY = 65535;

template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads) geglu_kernel(const GegluParams p) {
  constexpr int kSize = kVectorSize<T>;
  const int64_t at = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kSize, n = p.columns - at;
  allow_next_kernel();
  wait_for_previous_kernels();
  if (n <= 0) return;
  for (int64_t row = blockIdx.y; row < p.rows; row += gridDim.y) {
    float gate[kSize], up[kSize];
    load_floats<kAligned>(static_cast<const T*>(p.gate) + row * p.gate_stride + at, n, gate);
    load_floats<kAligned>(static_cast<const T*>(p.up) + row * p.up_stride + at, n, up);
#pragma unroll
    for (int i = 0; i < kSize; ++i) gate[i] = gelu_tanh(gate[i]) * up[i];
    store_vector<kAligned>(static_cast<T*>(p.out) + row * p.columns + at, n,
                           pack_vector(gate, T{}));
  }
}

}  // namespace
}  // namespace cuda

void launch_geglu(const GegluParams& p, cudaStream_t stream) {
  using namespace cuda;
  dispatch_dtype("geglu", p.dtype, [&](auto t) {
    using T = decltype(t);
    const bool aligned = is_aligned(p.gate, p.gate_stride * sizeof(T)) &&
                         is_aligned(p.up, p.up_stride * sizeof(T)) &&
                         is_aligned(p.out, p.columns * sizeof(T));
    dim3 grid(unsigned(divide_up(p.columns, kThreads * kVectorSize<T>)));
    grid.y = min(row_grid(p.rows).x, kMaxGridY);
    launch_early("geglu", aligned ? geglu_kernel<T, true> : geglu_kernel<T, false>, grid, kThreads,
                 0, stream, p);
  });
}

}  // namespace gemma2
