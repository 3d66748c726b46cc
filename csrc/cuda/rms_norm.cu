// out[r] = x[r] * rsqrt(mean(x[r]^2) + eps) * (1 + weight), in float32, rounded once.
//
// A block a row; x is read once, into registers, as far as kHeld vectors a thread reach (16384
// 16-bit elements), and a second time beyond. Memory bounds it: 4 bytes an element in 16 bits,
// weights from the cache; of many rows a warp or two have one each, so that an SM has 140 KiB on
// the way. At one row only the launch counts.
//
// rms_norm_kernel: at most 64 registers, 128 bytes of shared memory.
#include "kernels.h"
#include "vector.cuh"

namespace gemma2 {
namespace cuda {
namespace {

// Vectors of x in a thread's registers: of few rows and of many.
constexpr int kHeldOfFew = 2, kHeldOfMany = 9;
constexpr int max_threads(int held) { return held == kHeldOfFew ? 1024 : 256; }

template <class T, bool kAligned, int kHeld>
__global__ void __launch_bounds__(max_threads(kHeld), 1024 / max_threads(kHeld))
    rms_norm_kernel(const RmsNormParams p) {
  constexpr int kSize = kVectorSize<T>;
  float* scratch = reinterpret_cast<float*>(shared_memory());
  const int64_t stride = int64_t(blockDim.x) * kSize, first = threadIdx.x * kSize;
  if constexpr (kHeld == kHeldOfFew) {
    allow_next_kernel();
    wait_for_previous_kernels();
  }
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
    T* out = static_cast<T*>(p.out) + row * p.hidden_size;
    float sum = 0;
    const auto add_squares = [&](const Vector16& vector) {
      float values[kSize];
      unpack(vector, values, T{});
#pragma unroll
      for (int i = 0; i < kSize; ++i) sum += values[i] * values[i];
    };
    const auto finish = [&](const Vector16& vector, int64_t at, float scale) {
      float values[kSize], weight[kSize];
      unpack(vector, values, T{});
      load_floats_as<kAligned>(p.weight, p.weight_dtype, at, p.hidden_size - at, weight);
#pragma unroll
      for (int i = 0; i < kSize; ++i) values[i] = values[i] * scale * (1.0f + weight[i]);
      store_vector<kAligned>(out + at, p.hidden_size - at, pack_vector(values, T{}));
    };

    Vector16 held[kHeld];
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int64_t at = first + i * stride;
      held[i] = load_whole<kAligned>(x + at, p.hidden_size - at);
    }
#pragma unroll
    for (int i = 0; i < kHeld; ++i) add_squares(held[i]);
    for (int64_t at = first + kHeld * stride; at < p.hidden_size; at += stride)
      add_squares(load_vector<kAligned>(x + at, p.hidden_size - at));
    const float mean = block_sum(sum, scratch) / float(p.hidden_size);
    const float scale = 1.0f / sqrtf(mean + float(p.eps));
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int64_t at = first + i * stride;
      if (at < p.hidden_size) finish(held[i], at, scale);
    }
    for (int64_t at = first + kHeld * stride; at < p.hidden_size; at += stride)
      finish(load_vector<kAligned>(x + at, p.hidden_size - at), at, scale);
    __syncthreads();  // scratch is written again for the next row
  }
}

template <class T, int kHeld>
void launch_held(const RmsNormParams& p, cudaStream_t stream) {
  const bool aligned = is_aligned(p.x, p.x_stride * sizeof(T)) &&
                       is_aligned(p.out, p.hidden_size * sizeof(T)) && is_aligned(p.weight, 0);
  const auto kernel = aligned ? rms_norm_kernel<T, true, kHeld> : rms_norm_kernel<T, false, kHeld>;
  const int threads = row_threads(p.hidden_size, kVectorSize<T>, kHeld, max_threads(kHeld));
  constexpr int64_t kSharedBytes = kWarpSize * sizeof(float);
  if constexpr (kHeld == kHeldOfFew) {
    launch_early("rms_norm", kernel, row_grid(p.rows), threads, kSharedBytes, stream, p);
  } else {
    launch("rms_norm", kernel, row_grid(p.rows), threads, kSharedBytes, stream, p);
  }
}

}  // namespace
}  // namespace cuda

void launch_rms_norm(const RmsNormParams& p, cudaStream_t stream) {
  using namespace cuda;
  dispatch_dtype("rms_norm", p.dtype, [&](auto t) {
    using T = decltype(t);
    if (are_many_rows(p.rows)) {
      launch_held<T, kHeldOfMany>(p, stream);
    } else {
      launch_held<T, kHeldOfFew>(p, stream);
    }
  });
}

}  // namespace gemma2
