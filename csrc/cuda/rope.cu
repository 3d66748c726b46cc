// Half-split rotation: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin), angle = position * inv_freq,
// of q and k (batch, seqlen, heads, head_dim); with a cache, k and v go into slot
// position % capacity of it, and a position below 0 is padding: neither rotated nor written.
//
// A thread takes a vector of each half of a head at a time. Angle, cosine and sine in float32, one
// rounding at the end. Memory bounds it: 4 bytes an element of q, k and (with a cache) v in 16
// bits. Source: transformers, apply_rotary_pos_emb.
//
// Few tokens: a block a token, whose cosines and sines are computed once, into shared memory. Many:
// a thread has one vector's columns of a token in all heads, several on the way at once; its angles
// stay in registers, and no barrier is met.
//
// A cache of int8: a warp a head, which finds the largest magnitude of its row.
//
// rope_kernel: at most 64 registers, 4 head_dim bytes of shared memory.
// rope_many_kernel: at most 128 registers, no shared memory.
// rope_int8_kernel: at most 64 registers, no shared memory.
#include "kernels.h"
#include "rope.cuh"
#include "vector.cuh"

namespace gemma2 {
namespace cuda {
namespace {

constexpr int kMaxThreads = 256;

GEMMA2_DEVICE int64_t offset(const HeadsView& t, int64_t batch, int64_t token, int64_t head) {
  return batch * t.batch_stride + token * t.seqlen_stride + head * t.head_stride;
}

// A token's place among the tensors; a position below 0 is padding where there is a cache.
struct Token {
  int64_t batch, index, slot;
  bool padding;

  GEMMA2_DEVICE Token(const RopeParams& p, int64_t unit, int64_t position)
      : batch(unit / p.seqlen), index(unit % p.seqlen), slot(index), padding(false) {
    if (p.capacity == 0) return;
    padding = position < 0;
    slot = padding ? 0 : position % p.capacity;
  }
  // Of q, k and, with a cache, v.
  GEMMA2_DEVICE int heads(const RopeParams& p) const {
    const int64_t k_heads = padding ? 0 : p.num_kv_heads;
    return int(p.num_heads + k_heads + (p.capacity > 0 ? k_heads : 0));
  }
};

GEMMA2_DEVICE int64_t position_of(const RopeParams& p, int64_t unit) {
  if (!p.positions) return p.key_lengths[unit / p.seqlen] - p.seqlen + unit % p.seqlen;
  return p.positions[unit / p.seqlen * p.positions_batch_stride + unit % p.seqlen];
}

// Vectors of both halves of one head, `n` columns of which exist.
template <class T, bool kAligned>
struct Pair {
  T* to;
  int column;
  int n;
  bool rotated;
  Vector16 halves[2];

  GEMMA2_DEVICE void load(const RopeParams& p, const Token& token, int head, int first_column) {
    const int half = int(p.head_dim / 2);
    const T* from;
    column = first_column;
    n = half - column;
    rotated = !token.padding;
    const auto at = [&](const HeadsView& view, int64_t row) {
      return static_cast<T*>(view.data) + offset(view, token.batch, row, head) + column;
    };
    if (head < int(p.num_heads)) {
      from = at(p.q, token.index);
      to = at(p.q_out, token.index);
    } else if ((head -= int(p.num_heads)) < int(p.num_kv_heads)) {
      from = at(p.k, token.index);
      to = at(p.capacity > 0 ? p.k_cache : p.k_out, token.slot);
    } else {
      head -= int(p.num_kv_heads);
      from = at(p.v, token.index);
      to = at(p.v_cache, token.slot);
      rotated = false;
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) halves[h] = load_whole<kAligned>(from + h * half, n);
  }
  GEMMA2_DEVICE void rotate(const float (&c)[kVectorSize<T>], const float (&s)[kVectorSize<T>]) {
    constexpr int kSize = kVectorSize<T>;
    float x1[kSize], x2[kSize], y1[kSize], y2[kSize];
    unpack(halves[0], x1, T{});
    unpack(halves[1], x2, T{});
#pragma unroll
    for (int j = 0; j < kSize; ++j) rotate_by(c[j], s[j], x1[j], x2[j], y1[j], y2[j]);
    halves[0] = pack_vector(y1, T{});
    halves[1] = pack_vector(y2, T{});
  }
  GEMMA2_DEVICE void store(int half) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) store_vector<kAligned>(to + h * half, n, halves[h]);
  }
};

template <class T, bool kAligned>
__global__ void __launch_bounds__(kMaxThreads, 4) rope_kernel(const RopeParams p) {
  constexpr int kSize = kVectorSize<T>;
  float* cosines = reinterpret_cast<float*>(shared_memory());
  const int half = int(p.head_dim / 2), vectors = (half + kSize - 1) / kSize;
  float* sines = cosines + half;
  allow_next_kernel();
  // Nothing of a step in front writes positions: the first token's angles are computed early.
  const auto make_angles = [&](int64_t position) {
    for (int j = threadIdx.x; j < half; j += blockDim.x)
      sincosf(float(position) * p.inv_freq[j], sines + j, cosines + j);
  };
  const int64_t units = p.batch * p.seqlen;
  int64_t position = blockIdx.x < units ? position_of(p, blockIdx.x) : 0;
  make_angles(position);
  wait_for_previous_kernels();

  for (int64_t unit = blockIdx.x; unit < units; unit += gridDim.x) {
    if (unit != blockIdx.x) position = position_of(p, unit);
    const Token token(p, unit, position);
    const int pairs = token.heads(p) * vectors;
    // The first pair is on its way while the angles are computed.
    int i = threadIdx.x;
    Pair<T, kAligned> pair;
    const auto load = [&] { pair.load(p, token, i / vectors, i % vectors * kSize); };
    if (i < pairs) load();
    if (unit != blockIdx.x) make_angles(position);
    __syncthreads();
    while (i < pairs) {
      if (pair.rotated) {
        float c[kSize], s[kSize];
#pragma unroll
        for (int j = 0; j < kSize; ++j) {
          const bool there = j < pair.n;
          c[j] = there ? cosines[pair.column + j] : 0.0f;
          s[j] = there ? (p.inverse ? -sines[pair.column + j] : sines[pair.column + j]) : 0.0f;
        }
        pair.rotate(c, s);
      }
      pair.store(half);
      i += blockDim.x;
      if (i < pairs) load();
    }
    __syncthreads();  // the angles are written again for the next token
  }
}

constexpr int kManyThreads = 128;

// lanes: threads a token.
template <class T, bool kAligned>
__global__ void __launch_bounds__(kManyThreads, 4)
    rope_many_kernel(const RopeParams p, const int lanes) {
  constexpr int kSize = kVectorSize<T>, kAtOnce = 4;  // heads
  const int half = int(p.head_dim / 2);
  const int tokens = kManyThreads / lanes, first = int(threadIdx.x) / lanes;
  const int64_t units = p.batch * p.seqlen;
  if (first >= tokens) return;
  for (int64_t unit = int64_t(blockIdx.x) * tokens + first; unit < units;
       unit += int64_t(gridDim.x) * tokens) {
    const int64_t position = position_of(p, unit);
    const Token token(p, unit, position);
    const int heads = token.heads(p);
    for (int column = int(threadIdx.x) % lanes * kSize; column < half; column += lanes * kSize) {
      float c[kSize], s[kSize];
      for (int head = 0; head < heads; head += kAtOnce) {
        Pair<T, kAligned> pairs[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          if (head + i < heads) pairs[i].load(p, token, head + i, column);
        }
        if (head == 0) {  // while the first heads are on their way
#pragma unroll
          for (int j = 0; j < kSize; ++j) {
            const float frequency = column + j < half ? p.inv_freq[column + j] : 0.0f;
            sincosf(float(position) * frequency, s + j, c + j);
            if (p.inverse) s[j] = -s[j];
          }
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          if (head + i >= heads) break;
          if (pairs[i].rotated) pairs[i].rotate(c, s);
          pairs[i].store(half);
        }
      }
    }
  }
}

constexpr int kInt8HeadDim = 256, kInt8Warps = kMaxThreads / kWarpSize;

// Rotates q; writes k, rotated, and v as int8 times a factor each: the row's largest magnitude over
// 127. A row that is not finite gets a NaN as factor; one below 2^-100, whose inverse would
// overflow, 0. Rounded once, from float32.
template <class T>
__global__ void __launch_bounds__(kMaxThreads, 4) rope_int8_kernel(const RopeParams p) {
  constexpr int kPairs = kInt8HeadDim / 2 / kWarpSize;  // of a lane: columns lane + 32 i
  allow_next_kernel();
  wait_for_previous_kernels();
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int half = int(p.head_dim / 2);
  const int64_t heads = p.num_heads + 2 * p.num_kv_heads;
  const int64_t rows = p.batch * p.seqlen * heads;
  for (int64_t row = int64_t(blockIdx.x) * kInt8Warps + warp; row < rows;
       row += int64_t(gridDim.x) * kInt8Warps) {
    const int64_t unit = row / heads, position = position_of(p, unit);
    const Token token(p, unit, position);
    int64_t head = row % heads;
    const bool of_q = head < p.num_heads, of_v = head >= p.num_heads + p.num_kv_heads;
    if (token.padding && !of_q) continue;
    if (!of_q) head -= of_v ? p.num_heads + p.num_kv_heads : p.num_heads;
    const HeadsView& source = of_q ? p.q : of_v ? p.v : p.k;
    const T* from =
        static_cast<const T*>(source.data) + offset(source, token.batch, token.index, head);
    float x[2][kPairs];
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int column = lane + i * kWarpSize;
      const bool there = column < half;
      const float x1 = there ? to_float(from[column]) : 0.0f;
      const float x2 = there ? to_float(from[half + column]) : 0.0f;
      x[0][i] = x1, x[1][i] = x2;
      if (of_v || token.padding || !there) continue;
      float s, c;
      sincosf(float(position) * p.inv_freq[column], &s, &c);
      rotate_by(c, s, x1, x2, x[0][i], x[1][i]);
    }
    if (of_q) {
      T* to = static_cast<T*>(p.q_out.data) + offset(p.q_out, token.batch, token.index, head);
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        const int column = lane + i * kWarpSize;
        if (column >= half) continue;
        to[column] = from_float<T>(x[0][i]);
        to[half + column] = from_float<T>(x[1][i]);
      }
      continue;
    }
    float largest = 0.0f, difference = 0.0f;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        largest = fmaxf(largest, fabsf(x[h][i]));
        difference += x[h][i] - x[h][i];  // NaN where x is not finite
      }
    }
#pragma unroll
    for (int mask = kWarpSize / 2; mask > 0; mask /= 2)
      largest = fmaxf(largest, shuffle_xor(largest, mask));
    const bool finite = !ballot(difference != 0.0f);
    const bool zero = !finite || largest < 0x1p-100f;
    const float inverse = zero ? 0.0f : 127.0f / largest;
    const HeadsView& cache = of_v ? p.v_cache : p.k_cache;
    int8_t* to = static_cast<int8_t*>(cache.data) + offset(cache, token.batch, token.slot, head);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int column = lane + i * kWarpSize;
      if (column >= half) continue;
#pragma unroll
      for (int h = 0; h < 2; ++h)
        to[h * half + column] = zero ? int8_t(0) : int8_t(rintf(x[h][i] * inverse));
    }
    if (lane != 0) continue;
    const HeadsView& scales = of_v ? p.v_scales : p.k_scales;
    static_cast<float*>(scales.data)[offset(scales, token.batch, token.slot, head)] =
        !finite ? bits_to_float(0x7fc00000u)
        : zero  ? 0.0f
                : largest / 127.0f;
  }
}

}  // namespace
}  // namespace cuda

void launch_rope(const RopeParams& p, cudaStream_t stream) {
  using namespace cuda;
  dispatch_dtype("rope", p.dtype, [&](auto t) {
    using T = decltype(t);
    if (p.k_scales.data) {
      const int64_t rows = p.batch * p.seqlen * (p.num_heads + 2 * p.num_kv_heads);
      return launch_early("rope", rope_int8_kernel<T>, row_grid(divide_up(rows, kInt8Warps)),
                          kMaxThreads, 0, stream, p);
    }
    bool aligned = p.head_dim / 2 % kVectorSize<T> == 0;
    for (const HeadsView* view : {&p.q, &p.k, &p.v, &p.q_out, &p.k_out, &p.k_cache, &p.v_cache}) {
      aligned = aligned && is_aligned(view->data, view->batch_stride * sizeof(T)) &&
                is_aligned(view->data, view->seqlen_stride * sizeof(T)) &&
                is_aligned(view->data, view->head_stride * sizeof(T));
    }
    const int64_t vectors = divide_up(p.head_dim / 2, kVectorSize<T>);
    const int64_t units = p.batch * p.seqlen;
    if (are_many_rows(units)) {
      const int lanes = int(vectors < kManyThreads ? vectors : kManyThreads);
      launch("rope", aligned ? rope_many_kernel<T, true> : rope_many_kernel<T, false>,
             row_grid(divide_up(units, kManyThreads / lanes)), kManyThreads, 0, stream, p, lanes);
      return;
    }
    const int64_t heads = p.num_heads + p.num_kv_heads * (p.capacity > 0 ? 2 : 1);
    const int64_t threads = divide_up(heads * vectors, kWarpSize) * kWarpSize;
    launch_early("rope", aligned ? rope_kernel<T, true> : rope_kernel<T, false>, row_grid(units),
                 int(threads < kMaxThreads ? threads : kMaxThreads),
                 p.head_dim * int64_t(sizeof(float)), stream, p);
  });
}

}  // namespace gemma2
