// residual_out = residual + norm(x; post_weight); out = norm(residual_out; pre_weight), where
// norm(x; w) = x * rsqrt(mean(x^2) + eps) * (1 + w). The first norm and the sum are each rounded to
// the dtype, as in transformers; the rest is in float32.
//
// A block a row, one launch for what torch does in about a dozen. x and residual are read once,
// into registers, as far as kHeld vectors a thread reach (6144 16-bit elements of few rows, 9216 of
// many); beyond, x is read twice and residual_out again. Memory bounds it: 8 bytes an element in 16
// bits, weights from the cache; of many rows one warp or two have one each, so that an SM has 110
// KiB on the way.
//
// add_rms_norm_kernel: at most 168 registers, 256 bytes of shared memory.
#include "kernels.h"
#include "vector.cuh"

namespace gemma2 {
namespace cuda {
namespace {

// Vectors of x, and of residual, in a thread's registers: of few rows and of many.
constexpr int kHeldOfFew = 1, kHeldOfMany = 9;
// Of blocks, one or three of which a multiprocessor has registers for.
constexpr int max_threads(int held) { return held == kHeldOfFew ? 768 : 128; }

// Walks the vectors of a row that belong to this thread, the held ones first: f(at, i), i the
// number of a held one, or -1.
template <int kSize, int kHeld, class F>
GEMMA2_DEVICE void for_vectors(int64_t columns, const F& f) {
  const int64_t stride = int64_t(blockDim.x) * kSize, first = threadIdx.x * kSize;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    if (first + i * stride < columns) f(first + i * stride, i);
  }
  for (int64_t at = first + kHeld * stride; at < columns; at += stride) f(at, -1);
}

template <int kSize>
GEMMA2_DEVICE void copy(float (&to)[kSize], const float (&from)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) to[i] = from[i];
}

template <class T, bool kAligned, int kHeld>
__global__ void __launch_bounds__(max_threads(kHeld), kHeld == kHeldOfFew ? 1 : 3)
    add_rms_norm_kernel(const AddRmsNormParams p) {
  constexpr int kSize = kVectorSize<T>;
  float* scratch = reinterpret_cast<float*>(shared_memory());
  const int64_t size = p.hidden_size;
  // Of few rows, the weights that go with the held vectors: on the way before x is there.
  constexpr bool kEarly = kHeld == kHeldOfFew;
  float post_weight[kHeld][kSize], pre_weight[kHeld][kSize];
  if constexpr (kEarly) {
    allow_next_kernel();
    for_vectors<kSize, kHeld>(size, [&](int64_t at, int i) {
      if (i < 0) return;
      load_floats_as<kAligned>(p.post_weight, p.weight_dtype, at, size - at, post_weight[i]);
      load_floats_as<kAligned>(p.pre_weight, p.weight_dtype, at, size - at, pre_weight[i]);
    });
    wait_for_previous_kernels();
  }
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
    const T* residual = static_cast<const T*>(p.residual) + row * p.residual_stride;
    T* residual_out = static_cast<T*>(p.residual_out) + row * size;
    T* out = static_cast<T*>(p.out) + row * size;
    const auto squares = [](const Vector16& vector) {
      float values[kSize], sum = 0;
      unpack(vector, values, T{});
#pragma unroll
      for (int j = 0; j < kSize; ++j) sum += values[j] * values[j];
      return sum;
    };
    const auto scale_of = [&](float sum, float* at) {
      return 1.0f / sqrtf(block_sum(sum, at) / float(size) + float(p.eps));
    };

    // The two sums have a scratch each: a barrier of the one stands between two uses of the other.
    Vector16 held_x[kHeld], held[kHeld];  // held: residual, then residual_out
    float sum = 0;
    for_vectors<kSize, kHeld>(size, [&](int64_t at, int i) {
      const Vector16 vector = load_whole<kAligned>(x + at, size - at);
      if (i >= 0) {
        held_x[i] = vector;
        held[i] = load_whole<kAligned>(residual + at, size - at);
      }
      sum += squares(vector);
    });
    const float x_scale = scale_of(sum, scratch);

    sum = 0;
    for_vectors<kSize, kHeld>(size, [&](int64_t at, int i) {
      float values[kSize], weight[kSize], before[kSize];
      unpack(i >= 0 ? held_x[i] : load_vector<kAligned>(x + at, size - at), values, T{});
      unpack(i >= 0 ? held[i] : load_vector<kAligned>(residual + at, size - at), before, T{});
      if (kEarly && i >= 0) {
        copy(weight, post_weight[i]);
      } else {
        load_floats_as<kAligned>(p.post_weight, p.weight_dtype, at, size - at, weight);
      }
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        const float normed = values[j] * x_scale * (1.0f + weight[j]);
        values[j] = before[j] + to_float(from_float<T>(normed));
      }
      const Vector16 vector = pack_vector(values, T{});
      store_vector<kAligned>(residual_out + at, size - at, vector);
      if (i >= 0) held[i] = vector;
      sum += squares(vector);
    });
    const float r_scale = scale_of(sum, scratch + kWarpSize);

    for_vectors<kSize, kHeld>(size, [&](int64_t at, int i) {
      float values[kSize], weight[kSize];
      unpack(i >= 0 ? held[i] : load_vector<kAligned>(residual_out + at, size - at), values, T{});
      if (kEarly && i >= 0) {
        copy(weight, pre_weight[i]);
      } else {
        load_floats_as<kAligned>(p.pre_weight, p.weight_dtype, at, size - at, weight);
      }
#pragma unroll
      for (int j = 0; j < kSize; ++j) values[j] *= r_scale * (1.0f + weight[j]);
      store_vector<kAligned>(out + at, size - at, pack_vector(values, T{}));
    });
  }
}

template <class T, int kHeld>
void launch_held(const AddRmsNormParams& p, cudaStream_t stream) {
  const bool aligned = is_aligned(p.x, p.x_stride * sizeof(T)) &&
                       is_aligned(p.residual, p.residual_stride * sizeof(T)) &&
                       is_aligned(p.out, p.hidden_size * sizeof(T)) &&
                       is_aligned(p.residual_out, p.hidden_size * sizeof(T)) &&
                       is_aligned(p.post_weight, 0) && is_aligned(p.pre_weight, 0);
  const auto kernel =
      aligned ? add_rms_norm_kernel<T, true, kHeld> : add_rms_norm_kernel<T, false, kHeld>;
  const int threads = row_threads(p.hidden_size, kVectorSize<T>, kHeld, max_threads(kHeld));
  constexpr int64_t kSharedBytes = 2 * kWarpSize * sizeof(float);
  if constexpr (kHeld == kHeldOfFew) {
    launch_early("add_rms_norm", kernel, row_grid(p.rows), threads, kSharedBytes, stream, p);
  } else {
    launch("add_rms_norm", kernel, row_grid(p.rows), threads, kSharedBytes, stream, p);
  }
}

}  // namespace
}  // namespace cuda

void launch_add_rms_norm(const AddRmsNormParams& p, cudaStream_t stream) {
  using namespace cuda;
  dispatch_dtype("add_rms_norm", p.dtype, [&](auto t) {
    using T = decltype(t);
    if (are_many_rows(p.rows)) {
      launch_held<T, kHeldOfMany>(p, stream);
    } else {
      launch_held<T, kHeldOfFew>(p, stream);
    }
  });
}

}  // namespace gemma2
