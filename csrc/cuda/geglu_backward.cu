// grad_up = grad_out gelu_tanh(gate); grad_gate = grad_out up gelu_tanh'(gate), where with
// s = 1 / (1 + exp(-2u)), u = sqrt(2/pi) (g + 0.044715 g^3): gelu_tanh(g) = g s and
// gelu_tanh'(g) = s + 2 g s (1 - s) u'. In float32, rounded once.
//
// A block computes one vector a thread of one row. Memory bounds it: 10 bytes an element in 16
// bits.
//
// geglu_backward_kernel: at most 48 registers, 0 bytes of shared memory.
#include "gelu.cuh"
#include "kernels.h"
#include "vector.cuh"

namespace gemma2 {
namespace cuda {
namespace {

constexpr int kThreads = 128;
constexpr unsigned kMaxGridY = 65535;

template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads) geglu_backward_kernel(const GegluBackwardParams p) {
  constexpr int kSize = kVectorSize<T>;
  const int64_t at = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kSize, n = p.columns - at;
  if (n <= 0) return;
  for (int64_t row = blockIdx.y; row < p.rows; row += gridDim.y) {
    float gate[kSize], up[kSize], grad[kSize];
    load_floats<kAligned>(static_cast<const T*>(p.gate) + row * p.gate_stride + at, n, gate);
    load_floats<kAligned>(static_cast<const T*>(p.up) + row * p.up_stride + at, n, up);
    load_floats<kAligned>(static_cast<const T*>(p.grad_out) + row * p.grad_out_stride + at, n,
                          grad);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      // 1 - s is the other side's s, where it would cancel; beyond 16 it, or s, is 0.
      const float g = gate[i], s = gelu_sigmoid(g), rest = gelu_sigmoid(-g);
      const float slope = 2.0f * kGeluScale * (1.0f + 3.0f * kGeluCube * fminf(g * g, 256.0f));
      gate[i] = grad[i] * up[i] * (s + g * s * rest * slope);
      up[i] = grad[i] * (g * s);
    }
    const int64_t to = row * p.columns + at;
    store_vector<kAligned>(static_cast<T*>(p.grad_gate) + to, n, pack_vector(gate, T{}));
    store_vector<kAligned>(static_cast<T*>(p.grad_up) + to, n, pack_vector(up, T{}));
  }
}

}  // namespace
}  // namespace cuda

void launch_geglu_backward(const GegluBackwardParams& p, cudaStream_t stream) {
  using namespace cuda;
  dispatch_dtype("geglu_backward", p.dtype, [&](auto t) {
    using T = decltype(t);
    const int64_t out_bytes = p.columns * sizeof(T);
    const bool aligned = is_aligned(p.gate, p.gate_stride * sizeof(T)) &&
                         is_aligned(p.up, p.up_stride * sizeof(T)) &&
                         is_aligned(p.grad_out, p.grad_out_stride * sizeof(T)) &&
                         is_aligned(p.grad_gate, out_bytes) && is_aligned(p.grad_up, out_bytes);
    dim3 grid(unsigned(divide_up(p.columns, kThreads * kVectorSize<T>)));
    grid.y = min(row_grid(p.rows).x, kMaxGridY);
    launch("geglu_backward",
           aligned ? geglu_backward_kernel<T, true> : geglu_backward_kernel<T, false>, grid,
           kThreads, 0, stream, p);
  });
}

}  // namespace gemma2
