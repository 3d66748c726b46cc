// With s = rsqrt(mean(x^2) + eps) and g = grad_out (1 + weight), row by row:
// grad_x = s (g - x s^2 mean(g x)), plus another gradient where one is given; grad_weight = sum
// over the rows of grad_out x s.
//
// A block takes norm_block_rows(rows) rows one after another; a thread has the same columns of
// each, so that its part of grad_weight stays in its registers (in `partial` from 8192 16-bit
// elements on). A second kernel adds the blocks' parts in their order: equal to the bit at every
// run. Memory bounds it: 6 bytes an element in 16 bits.
//
// rms_norm_backward_kernel: at most 128 registers, 256 bytes of shared memory.
// sum_partials_kernel: at most 40 registers, 1024 bytes of shared memory.
#include "kernels.h"
#include "vector.cuh"

namespace gemma2 {
namespace cuda {
namespace {

constexpr int kMaxThreads = 512;  // of more, a thread would have too few registers
constexpr int kHeld = 2;          // vectors of x, and of grad_out, in a thread's registers
constexpr int kSumColumns = 32, kSumGroups = 8;

template <class T, bool kAligned>
__global__ void __launch_bounds__(kMaxThreads)
    rms_norm_backward_kernel(const RmsNormBackwardParams p, int64_t block_rows) {
  constexpr int kSize = kVectorSize<T>;
  float* scratch = reinterpret_cast<float*>(shared_memory());
  const int64_t size = p.hidden_size;
  const int64_t stride = int64_t(blockDim.x) * kSize, first = threadIdx.x * kSize;
  const int64_t begin = blockIdx.x * block_rows;
  const int64_t end = begin + block_rows < p.rows ? begin + block_rows : p.rows;
  float* partial = p.partial + blockIdx.x * size;
  float grad_weight[kHeld][kSize] = {};

  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
    const T* grad_out = static_cast<const T*>(p.grad_out) + row * p.grad_out_stride;
    T* grad_x = static_cast<T*>(p.grad_x) + row * size;
    float squares = 0, products = 0;
    const auto add = [&](const Vector16& x_vector, const Vector16& grad_vector, int64_t at) {
      float v[kSize], g[kSize], w[kSize];
      unpack(x_vector, v, T{});
      unpack(grad_vector, g, T{});
      load_floats_as<kAligned>(p.weight, p.weight_dtype, at, size - at, w);
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        squares += v[j] * v[j];
        products += g[j] * (1.0f + w[j]) * v[j];
      }
    };
    Vector16 held_x[kHeld], held_grad[kHeld];
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int64_t at = first + i * stride;
      held_x[i] = load_vector<kAligned>(x + at, size - at);
      held_grad[i] = load_vector<kAligned>(grad_out + at, size - at);
    }
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (first + i * stride < size) add(held_x[i], held_grad[i], first + i * stride);
    }
    for (int64_t at = first + kHeld * stride; at < size; at += stride) {
      add(load_vector<kAligned>(x + at, size - at), load_vector<kAligned>(grad_out + at, size - at),
          at);
    }
    const float mean = block_sum(squares, scratch) / float(size);
    const float scale = 1.0f / sqrtf(mean + float(p.eps));
    const float factor = block_sum(products, scratch + kWarpSize) / float(size) * scale * scale;

    const auto finish = [&](const Vector16& x_vector, const Vector16& grad_vector, int64_t at,
                            float (&of_weight)[kSize]) {
      float v[kSize], g[kSize], w[kSize];
      unpack(x_vector, v, T{});
      unpack(grad_vector, g, T{});
      load_floats_as<kAligned>(p.weight, p.weight_dtype, at, size - at, w);
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        of_weight[j] += g[j] * (v[j] * scale);
        v[j] = scale * (g[j] * (1.0f + w[j]) - v[j] * factor);
      }
      if (p.added) {
        float more[kSize];
        load_floats<kAligned>(static_cast<const T*>(p.added) + row * p.added_stride + at, size - at,
                              more);
#pragma unroll
        for (int j = 0; j < kSize; ++j) v[j] += more[j];
      }
      store_vector<kAligned>(grad_x + at, size - at, pack_vector(v, T{}));
    };
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int64_t at = first + i * stride;
      if (at < size) finish(held_x[i], held_grad[i], at, grad_weight[i]);
    }
    for (int64_t at = first + kHeld * stride; at < size; at += stride) {
      float sums[kSize];
#pragma unroll
      for (int j = 0; j < kSize; ++j)
        sums[j] = row > begin && at + j < size ? partial[at + j] : 0.0f;
      finish(load_vector<kAligned>(x + at, size - at),
             load_vector<kAligned>(grad_out + at, size - at), at, sums);
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        if (at + j < size) partial[at + j] = sums[j];
      }
    }
    // The two sums have a scratch each: a barrier of the one stands between two uses of the other.
  }
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      const int64_t at = first + i * stride + j;
      if (at < size) partial[at] = grad_weight[i][j];
    }
  }
}

// grad_weight[c] = sum over the blocks of partial[block][c]: kSumGroups threads a column, each a
// run of blocks.
template <class W>
__global__ void __launch_bounds__(kSumColumns* kSumGroups)
    sum_partials_kernel(const RmsNormBackwardParams p, int64_t blocks) {
  float* scratch = reinterpret_cast<float*>(shared_memory());
  const int column = threadIdx.x % kSumColumns, group = threadIdx.x / kSumColumns;
  const int64_t at = int64_t(blockIdx.x) * kSumColumns + column;
  float sum = 0;
  if (at < p.hidden_size) {
    const int64_t end = blocks * (group + 1) / kSumGroups;
    for (int64_t b = blocks * group / kSumGroups; b < end; ++b)
      sum += p.partial[b * p.hidden_size + at];
  }
  scratch[threadIdx.x] = sum;
  __syncthreads();
  if (group > 0 || at >= p.hidden_size) return;
  for (int i = 1; i < kSumGroups; ++i) sum += scratch[i * kSumColumns + column];
  static_cast<W*>(p.grad_weight)[at] = from_float<W>(sum);
}

}  // namespace
}  // namespace cuda

void launch_rms_norm_backward(const RmsNormBackwardParams& p, cudaStream_t stream) {
  using namespace cuda;
  const char* op = "rms_norm_backward";
  const int64_t blocks = norm_blocks(p.rows);
  if (blocks > 0) {
    dispatch_dtype(op, p.dtype, [&](auto t) {
      using T = decltype(t);
      const bool aligned = is_aligned(p.x, p.x_stride * sizeof(T)) &&
                           is_aligned(p.grad_out, p.grad_out_stride * sizeof(T)) &&
                           is_aligned(p.added, p.added_stride * sizeof(T)) &&
                           is_aligned(p.grad_x, p.hidden_size * sizeof(T)) &&
                           is_aligned(p.weight, 0);
      launch(op, aligned ? rms_norm_backward_kernel<T, true> : rms_norm_backward_kernel<T, false>,
             dim3(unsigned(blocks)), row_threads(p.hidden_size, kVectorSize<T>, kHeld, kMaxThreads),
             2 * kWarpSize * sizeof(float), stream, p, norm_block_rows(p.rows));
    });
  }
  dispatch_dtype(op, p.weight_dtype, [&](auto w) {
    launch(op, sum_partials_kernel<decltype(w)>,
           dim3(unsigned(divide_up(p.hidden_size, kSumColumns))), kSumColumns * kSumGroups,
           kSumColumns * kSumGroups * sizeof(float), stream, p, blocks);
  });
}

}  // namespace gemma2
