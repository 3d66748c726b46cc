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

constexpr int kHeld = 3;    // vectors of a row that a thread has, with a norm in front

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

// This lane's part of the chunk of x at column k. kWhole: in_features is a multiple of 8.
template <class T, bool kAligned, bool kWhole, int kRowTiles>
GEMMA2_DEVICE void load_x(const LinearParams& p, int64_t k, Vector16 (&v)[kRowTiles]) {
  const int lane = threadIdx.x % kWarpSize, g = lane / 4;
  k += 8 * (lane % 4);
  const T* x = static_cast<const T*>(p.x) + g * p.x_stride + k;
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
    v[i] = Vector16{};
    if (g + 8 * i >= p.rows) continue;
    const T* from = x + 8 * i * p.x_stride;
    v[i] = kWhole ? load_whole<kAligned>(from, p.in_features - k)
                  : load_vector<kAligned>(from, p.in_features - k);
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
        for (int i = 0; i < kUnroll; ++i)
          load_x<T, true, false>(p, (chunk + i * kWarps) * kChunk, x[i]);
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
      load_x<T, kAligned, false>(p, k, x);
      multiply<T>(sums, w, x);
    }
    finish_tile<T>(p, tile, columns, sums, reinterpret_cast<float*>(shared_memory()));
    __syncthreads();  // scratch is written again for the next tile
  }
}

// Puts norm(residual + norm(x; post); pre) of a single row into `to`, `padded` columns, zeros from
// hidden_size on; and residual_out where `store`. As add_rms_norm.cu has it, to the bit: a vector's
// place among warps is that of its thread there. `scratch`: 2 * kWarpSize floats. All aligned, and
// in the weights' dtype.
template <class T>
GEMMA2_DEVICE void normalize_row(const AddRmsNormParams& p, T* to, int padded, float* scratch,
                                 bool store) {
  constexpr int kSize = kVectorSize<T>;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int vectors = int(p.hidden_size) / kSize;
  const int warps = (vectors + kWarpSize - 1) / kWarpSize;
  Vector16 x[kHeld], sum[kHeld], post[kHeld], pre[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int v = threadIdx.x + i * kThreads;
    x[i] = sum[i] = post[i] = pre[i] = Vector16{};
    if (v >= vectors) continue;
    x[i] = load_16(static_cast<const T*>(p.x) + v * kSize);
    sum[i] = load_16(static_cast<const T*>(p.residual) + v * kSize);
    post[i] = load_16(static_cast<const T*>(p.post_weight) + v * kSize);
    pre[i] = load_16(static_cast<const T*>(p.pre_weight) + v * kSize);
  }
  const auto scale_of = [&](const Vector16(&row)[kHeld], float* at) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      float values[kSize], squares = 0;
      unpack(row[i], values, T{});
#pragma unroll
      for (int j = 0; j < kSize; ++j) squares += values[j] * values[j];
      squares = warp_sum(squares);
      if (lane == 0) at[warp + i * kWarps] = squares;
    }
    __syncthreads();
    const float total = warp_sum(lane < warps ? at[lane] : 0.0f);
    return 1.0f / sqrtf(total / float(p.hidden_size) + float(p.eps));
  };
  const float x_scale = scale_of(x, scratch);
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    float values[kSize], weight[kSize], before[kSize];
    unpack(x[i], values, T{});
    unpack(post[i], weight, T{});
    unpack(sum[i], before, T{});
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      const float normed = values[j] * x_scale * (1.0f + weight[j]);
      values[j] = before[j] + to_float(from_float<T>(normed));
    }
    sum[i] = pack_vector(values, T{});
    const int v = threadIdx.x + i * kThreads;
    if (store && v < vectors) store_16(static_cast<T*>(p.residual_out) + v * kSize, sum[i]);
  }
  const float scale = scale_of(sum, scratch + kWarpSize);
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    float values[kSize], weight[kSize];
    unpack(sum[i], values, T{});
    unpack(pre[i], weight, T{});
#pragma unroll
    for (int j = 0; j < kSize; ++j) values[j] *= scale * (1.0f + weight[j]);
    const int v = threadIdx.x + i * kThreads;
    if (v < vectors) store_16(to + v * kSize, pack_vector(values, T{}));
  }
  for (int at = int(p.hidden_size) + threadIdx.x; at < padded; at += kThreads)
    to[at] = from_float<T>(0.0f);
  __syncthreads();
}

// Where all is aligned and in_features is a multiple of 8. Tiles have `columns` columns of out, so
// that every block has as many. kRowTiles: groups of 8 rows of x, 1 or 2. kNorm: one row, which
// every block makes by `norm`.
template <class T, int kRowTiles, int kRing, bool kNorm>
__global__ void __launch_bounds__(kThreads, 2)
    linear_early_kernel(const LinearParams p, int columns, const AddRmsNormParams norm) {
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
  const T* x_lane = static_cast<const T*>(p.x) + lane / 4 * p.x_stride + lane_column;
  if constexpr (kNorm) {
    T* const row = reinterpret_cast<T*>(scratch + 2 * kScratch);
    normalize_row(norm, row, steps * kStep, scratch, blockIdx.x == 0);
    x_lane = row + lane_column;
  }
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

template <int kRowTiles>
constexpr int64_t kScratchBytes = kWarps * 8 * kRowTiles * kTile * sizeof(float);

// How linear_early_kernel's blocks share the work. Its own sums do not depend on that.
struct EarlyPlan {
  int64_t columns;  // of a tile
  int64_t blocks;
  int64_t shared_bytes;
  bool small_ring;
};

bool is_aligned_linear(const LinearParams& p) {
  return is_aligned(p.x, p.x_stride * 2) && is_aligned(p.weight, p.weight_stride * 2);
}

// False where it cannot serve: then linear_kernel does.
bool plan_early(const LinearParams& p, bool normed, EarlyPlan& plan) {
  constexpr int64_t kMostFeatures = INT_MAX / 2, kStep = kWarps * kChunk;
  const DeviceProperties& device = device_properties();
  const int64_t steps = divide_up(p.in_features, kStep);
  const int64_t other_bytes = 2 * kScratchBytes<1> + (normed ? steps * kStep * 2 : 0);
  plan.shared_bytes = ring_bytes(kRing) + other_bytes;
  if (!starts_early() || p.in_features % 8 || p.in_features >= kMostFeatures ||
      p.out_features >= kMostFeatures || plan.shared_bytes > device.shared_bytes) {
    return false;
  }
  const int64_t resident =
      device.multiprocessors * resident_blocks(plan.shared_bytes, kThreads, 128, device);
  const int64_t turns = divide_up(p.out_features, resident * whole_tile(p));
  plan.columns = divide_up(p.out_features, resident * turns);
  const int64_t tiles = divide_up(p.out_features, plan.columns);
  plan.blocks = tiles < resident ? tiles : resident;
  plan.small_ring = steps * turns <= kSmallRing;
  if (plan.small_ring) plan.shared_bytes = ring_bytes(kSmallRing) + other_bytes;
  return true;
}

template <class T, bool kNorm>
void launch_planned(const char* op, const LinearParams& p, const AddRmsNormParams& norm,
                    const EarlyPlan& plan, cudaStream_t stream) {
  const auto kernel = plan.small_ring ? linear_early_kernel<T, 1, kSmallRing, kNorm>
                                      : linear_early_kernel<T, 1, kRing, kNorm>;
  launch_early(op, kernel, row_grid(plan.blocks), kThreads, plan.shared_bytes, stream, p,
               int(plan.columns), norm);
}

template <class T, int kRowTiles>
void launch_row_tiles(const LinearParams& p, cudaStream_t stream) {
  const bool aligned = is_aligned_linear(p);
  EarlyPlan plan;
  // Of more rows the ring's x takes longer than the early start saves.
  if (kRowTiles == 1 && aligned && plan_early(p, false, plan))
    return launch_planned<T, false>("linear", p, {}, plan, stream);
  launch("linear", aligned ? linear_kernel<T, true, kRowTiles> : linear_kernel<T, false, kRowTiles>,
         row_grid(divide_up(p.out_features, whole_tile(p))), kThreads, kScratchBytes<kRowTiles>,
         stream, p);
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

bool add_rms_norm_linear_fits(const AddRmsNormLinearParams& p) {
  using namespace cuda;
  const AddRmsNormParams& norm = p.norm;
  EarlyPlan plan;
  return (norm.dtype == DType::kBFloat16 || norm.dtype == DType::kFloat16) &&
         norm.weight_dtype == norm.dtype && norm.rows == 1 &&
         norm.hidden_size <= kHeld * kThreads * 8 && is_aligned(norm.x, 0) &&
         is_aligned(norm.residual, 0) && is_aligned(norm.post_weight, 0) &&
         is_aligned(norm.pre_weight, 0) && is_aligned(norm.residual_out, 0) &&
         is_aligned(p.linear.weight, p.linear.weight_stride * 2) &&
         plan_early(p.linear, true, plan);
}

void launch_add_rms_norm_linear(const AddRmsNormLinearParams& p, cudaStream_t stream) {
  using namespace cuda;
  if (!add_rms_norm_linear_fits(p))
    throw std::invalid_argument("gemma2_ext::add_rms_norm_linear: no kernel for these tensors");
  EarlyPlan plan;
  plan_early(p.linear, true, plan);
  if (p.norm.dtype == DType::kBFloat16) {
    launch_planned<BFloat16, true>("add_rms_norm_linear", p.linear, p.norm, plan, stream);
  } else {
    launch_planned<Half, true>("add_rms_norm_linear", p.linear, p.norm, plan, stream);
  }
}

}  // namespace gemma2
