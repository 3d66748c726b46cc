// out = x weight^T for 1 to 16 rows, as in decoding; x (rows, in_features), weight (out_features,
// in_features), 16-bit. Sums in float32; then the soft-cap, or GeGLU of the two halves of weight.
//
// Memory bounds it: the weights stream once. A block has 16 rows of weight (with GeGLU 8 of gate
// and the 8 of up that go with them), its warps every kWarps-th chunk of 32 columns. A tensor core
// sums over k in any order, so a lane loads 16 bytes of a row and they are its operands as they
// lie: element 8t + 4s + (0, 1) stands for column 2t of step s, 8t + 4s + (2, 3) for column 2t + 8.
// No shared memory for weights, no conversion, and 32 KiB of them on the way in each block. x comes
// from the caches: rows / 16 of the weights' bytes. The warps' sums are added in their order, and a
// row takes part in no other row's sum: a result does not depend on the rows beside it.
//
// linear_kernel: at most 128 registers, 8192 bytes of shared memory.
#include "gelu.cuh"
#include "kernels.h"
#include "vector.cuh"

namespace gemma2 {
namespace cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kTile = 16;   // rows of weight in a block, of x in two mma
constexpr int kChunk = 32;  // columns that a warp takes at once: 8 for each of 4 lanes
constexpr int kUnroll = 4;  // chunks whose loads are on the way together

// kRowTiles: groups of 8 rows of x, 1 or 2.
template <class T, bool kAligned, int kRowTiles>
__global__ void __launch_bounds__(kThreads, 2) linear_kernel(const LinearParams p) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int g = lane / 4, t = lane % 4;
  const int64_t columns_a_block = p.geglu ? kTile / 2 : kTile;
  const int64_t chunks = (p.in_features + kChunk - 1) / kChunk;
  const int64_t whole_chunks = p.in_features / kChunk;

  for (int64_t first = blockIdx.x * columns_a_block; first < p.out_features;
       first += gridDim.x * columns_a_block) {
    // Beyond the last row of weight it is read again, and its sums are not used.
    const int64_t last = p.out_features - 1;
    const int64_t row_0 = first + g < last ? first + g : last;
    const int64_t row_1 = p.geglu                ? p.out_features + row_0
                          : first + g + 8 < last ? first + g + 8
                                                 : last;
    const T* weight[2] = {static_cast<const T*>(p.weight) + row_0 * p.weight_stride + 8 * t,
                          static_cast<const T*>(p.weight) + row_1 * p.weight_stride + 8 * t};
    const T* x = static_cast<const T*>(p.x) + g * p.x_stride + 8 * t;
    float sums[kRowTiles][4] = {};

    const auto multiply = [&](const Vector16(&w)[2], const Vector16(&v)[kRowTiles]) {
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        const uint32_t a[4] = {w[0].words[2 * s], w[1].words[2 * s], w[0].words[2 * s + 1],
                               w[1].words[2 * s + 1]};
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i)
          mma_m16n8k16<T>(sums[i], a, v[i].words[2 * s], v[i].words[2 * s + 1]);
      }
    };
    const auto load_x = [&](int64_t k, int64_t n, Vector16(&v)[kRowTiles]) {
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        v[i] = Vector16{};
        if (g + 8 * i < p.rows) v[i] = load_vector<kAligned>(x + 8 * i * p.x_stride + k, n);
      }
    };

    int64_t chunk = warp;
    if (kAligned) {
      for (; chunk + (kUnroll - 1) * kWarps < whole_chunks; chunk += kUnroll * kWarps) {
        Vector16 w[kUnroll][2], v[kUnroll][kRowTiles];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          const int64_t k = (chunk + u * kWarps) * kChunk;
          w[u][0] = load_16_once(weight[0] + k);
          w[u][1] = load_16_once(weight[1] + k);
        }
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) load_x((chunk + u * kWarps) * kChunk, kChunk, v[u]);
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) multiply(w[u], v[u]);
      }
    }
#pragma unroll 1
    for (; chunk < chunks; chunk += kWarps) {
      const int64_t k = chunk * kChunk, n = p.in_features - k - 8 * t;
      Vector16 w[2], v[kRowTiles];
      w[0] = load_vector<kAligned>(weight[0] + k, n);
      w[1] = load_vector<kAligned>(weight[1] + k, n);
      load_x(k, n, v);
      multiply(w, v);
    }

    // scratch[warp][row of x][row of weight]
    float* scratch = reinterpret_cast<float*>(shared_memory());
    constexpr int kSums = 8 * kRowTiles * kTile;
    float* mine = scratch + warp * kSums;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j)
        mine[(8 * i + 2 * t + j % 2) * kTile + g + 8 * (j / 2)] = sums[i][j];
    }
    __syncthreads();
    const int row = threadIdx.x / kTile, column = threadIdx.x % kTile;
    const auto total = [&](int at) {
      float sum = 0;
#pragma unroll
      for (int i = 0; i < kWarps; ++i) sum += scratch[i * kSums + row * kTile + at];
      return sum;
    };
    if (row < p.rows && column < columns_a_block && first + column < p.out_features) {
      float result = total(column);
      if (p.geglu) result = gelu_tanh(result) * total(column + 8);
      if (p.softcap > 0) result = p.softcap * tanhf(result / p.softcap);
      const int64_t at = row * p.out_stride + first + column;
      if (p.out_dtype == DType::kFloat32) {
        static_cast<float*>(p.out)[at] = result;
      } else {
        static_cast<T*>(p.out)[at] = from_float<T>(result);
      }
    }
    __syncthreads();  // scratch is written again for the next columns
  }
}

template <class T>
void launch_16_bit(const LinearParams& p, cudaStream_t stream) {
  const bool aligned =
      is_aligned(p.x, p.x_stride * sizeof(T)) && is_aligned(p.weight, p.weight_stride * sizeof(T));
  const bool few = p.rows <= 8;
  const auto kernel = aligned ? (few ? linear_kernel<T, true, 1> : linear_kernel<T, true, 2>)
                              : (few ? linear_kernel<T, false, 1> : linear_kernel<T, false, 2>);
  launch("linear", kernel, row_grid(divide_up(p.out_features, p.geglu ? kTile / 2 : kTile)),
         kThreads, kWarps * kTile * (few ? 8 : 16) * sizeof(float), stream, p);
}

}  // namespace
}  // namespace cuda

void launch_linear(const LinearParams& p, cudaStream_t stream) {
  using namespace cuda;
  if (p.dtype == DType::kBFloat16) return launch_16_bit<BFloat16>(p, stream);
  if (p.dtype == DType::kFloat16) return launch_16_bit<Half>(p, stream);
  throw std::invalid_argument("gemma2_ext::linear: the CUDA kernel takes 16-bit weights");
}

}  // namespace gemma2
