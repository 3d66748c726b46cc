// out = x weight^T for 1 to 16 rows, as in decoding; x (rows, in_features), weight (out_features,
// in_features), 16-bit. Sums in float32; then the soft-cap, or GeGLU of the two halves of weight.
//
// Memory bounds it: the weights stream once. A tile is 16 rows of weight (with GeGLU 8 of gate and
// the 8 of up that go with them); a block's warps take every kWarps-th chunk of 32 columns. A
// tensor core sums over k in any order, so 16 bytes of a row are a lane's operands as they lie:
// element 8t + 4s + (0, 1) stands for column 2t of step s, 8t + 4s + (2, 3) for column 2t + 8.
// Warps' sums are added in order, and a row takes part in no other row's sum: a result does not
// depend on the rows beside it, nor on the kernel. linear_early_kernel starts while others are at
// work (see launch_early) and fills a ring in shared memory, of which a thread reads only what it
// copied.
//
// linear_kernel: at most 128 registers, 8192 bytes of shared memory.
// linear_early_kernel: at most 128 registers, 104 KiB of shared memory.
#include <limits.h>

#include "gelu.cuh"
#include "kernels.h"
#include "vector.cuh"

namespace gemma2 {
namespace cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kTile = 16;   // rows of weight in a tile, of x in two mma
constexpr int kChunk = 32;  // columns that a warp takes at once: 8 for each of 4 lanes
constexpr int kAhead = 4;   // chunks of x on the way to a thread's registers

constexpr int kUnroll = 4;  // chunks whose loads are on the way together
// Chunks of weights on the way in a thread's ring; two blocks share a multiprocessor. They are 192
// KiB there: more than hides the memory's latency, but the ring is filled while others work. Where
// a block has no more chunks than the smaller ring, that leaves room for another kernel's blocks.
constexpr int kRing = 12, kSmallRing = 8;
constexpr int64_t ring_bytes(int ring) { return int64_t(ring) * 2 * kThreads * 16; }

// Columns of out in a whole tile.
__host__ __device__ inline int64_t whole_tile(const LinearParams& p) {
  return p.geglu ? kTile / 2 : kTile;
}

// This lane's rows of weight in a tile of `columns` columns of out, at its first column, and
// whether they exist. Beyond the last row that is read again, and its sums are not used.
template <class T>
GEMMA2_DEVICE void weight_rows(const LinearParams& p, int64_t tile, int columns,
                               const T* (&rows)[2], bool (&there)[2]) {
  const int lane = threadIdx.x % kWarpSize, of_tile = lane / 4;
  const int64_t first = tile * columns, left = p.out_features - first;
  const int last = int(left < columns ? left : columns) - 1;
  const int second = p.geglu ? of_tile : of_tile + 8;
  there[0] = of_tile <= last;
  there[1] = second <= last;
  const int64_t row_0 = first + min(of_tile, last);
  const int64_t row_1 = first + min(second, last) + (p.geglu ? p.out_features : 0);
  rows[0] = static_cast<const T*>(p.weight) + row_0 * p.weight_stride + 8 * (lane % 4);
  rows[1] = static_cast<const T*>(p.weight) + row_1 * p.weight_stride + 8 * (lane % 4);
}

// This lane's part of the chunk of x at column k.
template <class T, bool kAligned, int kRowTiles>
GEMMA2_DEVICE void load_x(const LinearParams& p, int64_t k, Vector16 (&v)[kRowTiles]) {
  const int lane = threadIdx.x % kWarpSize, g = lane / 4;
  k += 8 * (lane % 4);
  const T* x = static_cast<const T*>(p.x) + g * p.x_stride + k;
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
    v[i] = Vector16{};
    if (g + 8 * i >= p.rows) continue;
    v[i] = load_vector<kAligned>(x + 8 * i * p.x_stride, p.in_features - k);
  }
}

template <class T, int kRowTiles>
GEMMA2_DEVICE void multiply(float (&sums)[kRowTiles][4], const Vector16 (&w)[2],
                            const Vector16 (&v)[kRowTiles]) {
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    const uint32_t a[4] = {w[0].words[2 * s], w[1].words[2 * s], w[0].words[2 * s + 1],
                           w[1].words[2 * s + 1]};
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
      mma_m16n8k16<T>(sums[i], a, v[i].words[2 * s], v[i].words[2 * s + 1]);
  }
}

// Adds up the warps' sums of a tile, through scratch[warp][row of x][row of weight], and stores.
// Another tile may use the same scratch after the next barrier.
template <class T, int kRowTiles>
GEMMA2_DEVICE void finish_tile(const LinearParams& p, int64_t tile, int columns,
                               const float (&sums)[kRowTiles][4], float* scratch) {
  constexpr int kSums = 8 * kRowTiles * kTile;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j)
      scratch[warp * kSums + (8 * i + 2 * t + j % 2) * kTile + g + 8 * (j / 2)] = sums[i][j];
  }
  __syncthreads();
  const int row = threadIdx.x / kTile, column = threadIdx.x % kTile;
  const int64_t first = tile * columns;
  if (row >= p.rows || column >= columns || first + column >= p.out_features) return;
  const auto total = [&](int at) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) sum += scratch[i * kSums + row * kTile + at];
    return sum;
  };
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

template <class T, bool kAligned, int kRowTiles>
__global__ void __launch_bounds__(kThreads, 2) linear_kernel(const LinearParams p) {
  const int warp = threadIdx.x / kWarpSize, t = threadIdx.x % 4;
  const int columns = int(whole_tile(p));
  const int64_t tiles = (p.out_features + columns - 1) / columns;
  const int64_t chunks = (p.in_features + kChunk - 1) / kChunk;
  const int64_t whole_chunks = p.in_features / kChunk;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const T* rows[2];
    bool there[2];
    weight_rows(p, tile, columns, rows, there);
    float sums[kRowTiles][4] = {};
    int64_t chunk = warp;
    if (kAligned) {
      for (; chunk + (kUnroll - 1) * kWarps < whole_chunks; chunk += kUnroll * kWarps) {
        Vector16 w[kUnroll][2], x[kUnroll][kRowTiles];
#pragma unroll
        for (int i = 0; i < kUnroll; ++i) {
          const int64_t k = (chunk + i * kWarps) * kChunk;
          w[i][0] = load_16_once(rows[0] + k);
          w[i][1] = load_16_once(rows[1] + k);
        }
#pragma unroll
        for (int i = 0; i < kUnroll; ++i) load_x<T, true>(p, (chunk + i * kWarps) * kChunk, x[i]);
#pragma unroll
        for (int i = 0; i < kUnroll; ++i) multiply<T>(sums, w[i], x[i]);
      }
    }
#pragma unroll 1
    for (; chunk < chunks; chunk += kWarps) {
      const int64_t k = chunk * kChunk, n = p.in_features - k - 8 * t;
      Vector16 w[2], x[kRowTiles];
      w[0] = load_vector<kAligned>(rows[0] + k, n);
      w[1] = load_vector<kAligned>(rows[1] + k, n);
      load_x<T, kAligned>(p, k, x);
      multiply<T>(sums, w, x);
    }
    finish_tile<T>(p, tile, columns, sums, reinterpret_cast<float*>(shared_memory()));
    __syncthreads();  // scratch is written again for the next tile
  }
}

// Where all is aligned and in_features is a multiple of 8. Tiles have `columns` columns of out, so
// that every block has as many. kRowTiles: groups of 8 rows of x, 1 or 2.
template <class T, int kRowTiles, int kRing>
__global__ void __launch_bounds__(kThreads, 2)
    linear_early_kernel(const LinearParams p, int columns) {
  constexpr int kScratch = kWarps * 8 * kRowTiles * kTile;
  constexpr int kStep = kWarps * kChunk;  // columns of weight that the warps take at once
  constexpr int kStage = 2 * kThreads;    // vectors
  allow_next_kernel();
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int tiles = int((p.out_features + columns - 1) / columns);
  const int in_features = int(p.in_features), steps = (in_features + kStep - 1) / kStep;
  const int lane_column = warp * kChunk + 8 * (lane % 4);
  Vector16* const ring = reinterpret_cast<Vector16*>(shared_memory()) + threadIdx.x;
  Vector16* const ring_end = ring + kRing * kStage;
  float* const scratch_begin = reinterpret_cast<float*>(ring_end - threadIdx.x);
  float* scratch = scratch_begin;

  // The copies go through steps and tiles as the sums do, kRing steps in front of them. `left`:
  // columns from the lane's next one on.
  int copied_tile = blockIdx.x, steps_left = 0, left = 0;
  const T* rows[2];
  bool there[2];
  const auto begin_tile = [&] {
    weight_rows(p, copied_tile, columns, rows, there);
    rows[0] += warp * kChunk, rows[1] += warp * kChunk;
    steps_left = steps, left = in_features - lane_column;
  };
  const auto start_copy = [&](Vector16* stage) {
    cp_async_beside(stage, rows[0], there[0] && left > 0);
    cp_async_beside(stage + kThreads, rows[1], there[1] && left > 0);
    cp_async_commit();
    rows[0] += kStep, rows[1] += kStep, left -= kStep;
    if (--steps_left > 0) return;
    copied_tile += gridDim.x;
    if (copied_tile < tiles) {
      begin_tile();
    } else {
      left = 0;  // only zeros from here on, so that the waits count alike
    }
  };
  begin_tile();
#pragma unroll 1
  for (Vector16* stage = ring; stage != ring_end; stage += kStage) start_copy(stage);

  wait_for_previous_kernels();
  // x of step s is at s % kAhead.
  const T* const x_lane = static_cast<const T*>(p.x) + lane / 4 * p.x_stride + lane_column;
  const auto x_of_step = [&](int step, Vector16(&v)[kRowTiles]) {
    const bool inside = step * kStep + lane_column < in_features;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      v[i] = Vector16{};
      if (inside && lane / 4 + 8 * i < p.rows)
        v[i] = load_16(x_lane + 8 * i * p.x_stride + step * kStep);
    }
  };
  Vector16 x[kAhead][kRowTiles];
#pragma unroll
  for (int i = 0; i < kAhead; ++i) x_of_step(i, x[i]);
  Vector16* stage = ring;
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    float sums[kRowTiles][4] = {};
    for (int first = 0; first < steps; first += kAhead) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int step = first + i;
        if (step >= steps) break;
        cp_async_wait<kRing - 1>();
        const Vector16 w[2] = {stage[0], stage[kThreads]};
        multiply<T>(sums, w, x[i]);
        x_of_step(step + kAhead < steps ? step + kAhead : i, x[i]);  // or of the next tile
        start_copy(stage);
        stage = stage + kStage == ring_end ? ring : stage + kStage;
      }
    }
    finish_tile<T>(p, tile, columns, sums, scratch);
    scratch += scratch == scratch_begin ? kScratch : -kScratch;
  }
}

template <class T, int kRowTiles>
void launch_row_tiles(const LinearParams& p, cudaStream_t stream) {
  constexpr int64_t kMostFeatures = INT_MAX / 2;
  const int64_t scratch_bytes = kWarps * 8 * kRowTiles * kTile * sizeof(float);
  const bool aligned =
      is_aligned(p.x, p.x_stride * sizeof(T)) && is_aligned(p.weight, p.weight_stride * sizeof(T));
  // Of more rows the ring's x takes longer than the early start saves.
  if constexpr (kRowTiles == 1) {
    const DeviceProperties& device = device_properties();
    const int64_t shared_bytes = ring_bytes(kRing) + 2 * scratch_bytes;
    if (starts_early() && aligned && p.in_features % 8 == 0 && p.in_features < kMostFeatures &&
        p.out_features < kMostFeatures && shared_bytes <= device.shared_bytes) {
      const int64_t resident =
          device.multiprocessors * resident_blocks(shared_bytes, kThreads, 128, device);
      const int64_t turns = divide_up(p.out_features, resident * whole_tile(p));
      const int64_t columns = divide_up(p.out_features, resident * turns);
      const int64_t tiles = divide_up(p.out_features, columns);
      const bool small = divide_up(p.in_features, kWarps * kChunk) * turns <= kSmallRing;
      const auto kernel = small ? linear_early_kernel<T, kRowTiles, kSmallRing>
                                : linear_early_kernel<T, kRowTiles, kRing>;
      return launch_early("linear", kernel, row_grid(tiles < resident ? tiles : resident), kThreads,
                          shared_bytes - (small ? ring_bytes(kRing - kSmallRing) : 0), stream, p,
                          int(columns));
    }
  }
  launch("linear", aligned ? linear_kernel<T, true, kRowTiles> : linear_kernel<T, false, kRowTiles>,
         row_grid(divide_up(p.out_features, whole_tile(p))), kThreads, scratch_bytes, stream, p);
}

template <class T>
void launch_16_bit(const LinearParams& p, cudaStream_t stream) {
  if (p.rows <= 8) return launch_row_tiles<T, 1>(p, stream);
  launch_row_tiles<T, 2>(p, stream);
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
