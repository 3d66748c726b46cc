// Pieces of attention on CUDA: units of work, results of a row, softmax, tiles in shared memory,
// and products with them. attention.cu and attention_wgmma.cu make kernels of them.
//
// The query heads of one key head are packed into rows, position * group + head, so that a block of
// rows shares every key it reads. A unit is (block of rows, sequence, key head, split of the keys).
// Source: FlashAttention-2 (arXiv 2307.08691).
#pragma once
#include <limits.h>
#include <math.h>

#include "attention.h"
#include "rope.cuh"
#include "vector.cuh"

namespace gemma2 {
namespace cuda {

constexpr float kLn2 = 0x1.62e43p-1f;
constexpr int kMaxHeadDim = 256;
constexpr int kLaneDims = kMaxHeadDim / kWarpSize;  // a lane's dimensions are lane + 32 i

// Of a position and dimension d, by which d and head_dim / 2 + d are rotated.
struct Angle {
  float cosine, sine;
};

GEMMA2_DEVICE int64_t clamp(int64_t x, int64_t low, int64_t high) {
  return x < low ? low : x > high ? high : x;
}

// ---- what a block works on

// Keys [first, end) that a row sees, counted from the unit's first key.
struct RowKeys {
  int first, end;
};

// Keys: the type of k and v, T or, of a cache of int8, int8_t.
template <class T, class Keys = T>
struct Unit {
  int64_t batch, kv_head, block, split;
  int group, row_begin, rows;                 // row r of the unit is row_begin + r of the group
  int64_t q_offset, seqlen_q, length, start;  // of the sequence; its keys are [start, length)
  int64_t k_offset;                           // of the sequence in k's rows
  int64_t key_begin;                          // that some row sees, of this split
  int keys;
  int stored;         // of these, that are in the cache: all but one that is to be appended
  const Keys *k, *v;  // of the sequence and head, paged: of the head
  int slot;           // of the first key, from k and v on

  GEMMA2_DEVICE int query(int r) const { return (row_begin + r) / group; }
  GEMMA2_DEVICE int64_t head(int r) const { return kv_head * group + (row_begin + r) % group; }
  GEMMA2_DEVICE RowKeys row_keys(const AttentionParams& p, int r) const;
};

static_assert(sizeof(Unit<float>) <= kAttentionUnitBytes, "");

// The first key that query i sees, and the end of those; both rise with i.
template <class T, class Keys>
GEMMA2_DEVICE int64_t first_key(const AttentionParams& p, const Unit<T, Keys>& u, int i) {
  int64_t first = u.start;
  if (p.window) first = clamp(u.length - u.seqlen_q + i - p.window + 1, first, INT64_MAX);
  return p.capacity ? clamp(u.length - p.capacity, first, INT64_MAX) : first;
}
template <class T, class Keys>
GEMMA2_DEVICE int64_t end_key(const AttentionParams& p, const Unit<T, Keys>& u, int i) {
  const int64_t end = p.causal ? clamp(u.length - u.seqlen_q + i + 1, 0, u.length) : u.length;
  return clamp(end, first_key(p, u, i), INT64_MAX);
}

template <class T, class Keys>
GEMMA2_DEVICE RowKeys Unit<T, Keys>::row_keys(const AttentionParams& p, int r) const {
  const int i = query(r);
  return {int(clamp(first_key(p, *this, i) - key_begin, 0, keys)),
          int(clamp(end_key(p, *this, i) - key_begin, 0, keys))};
}

template <class T, class Keys>
GEMMA2_DEVICE int key_slot(const AttentionPlan& plan, const Unit<T, Keys>& u, int key) {
  const int slot = u.slot + key;
  return slot >= plan.capacity ? slot - plan.capacity : slot;
}
// The row of a key, counted from the unit's first one; as the unit's k and v, of those.
template <class T, class Keys>
GEMMA2_DEVICE const Keys* key_row(const AttentionPlan& plan, const Unit<T, Keys>& u,
                                  const Keys* data, int stride, int key) {
  return data + int64_t(key_slot(plan, u, key)) * stride;
}
template <class T, class Keys>
GEMMA2_DEVICE const Keys* paged_key_row(const AttentionParams& p, const Unit<T, Keys>& u,
                                        const Keys* data, int stride, int64_t page_stride,
                                        int key) {
  const int slot = u.slot + key;
  const int64_t page = p.block_table[u.batch * p.block_table_stride + (slot >> p.page_shift)];
  return data + page * page_stride + int64_t(slot & ((1 << p.page_shift) - 1)) * stride;
}

// Where the factor of a key's row in a cache of int8 is, in k_scales or v_scales.
template <class T, class Keys>
GEMMA2_DEVICE const float* key_factor(const AttentionPlan& plan, const Unit<T, Keys>& u,
                                      const HeadsView& scales, int key) {
  return static_cast<const float*>(scales.data) + u.batch * scales.batch_stride +
         key_slot(plan, u, key) * scales.seqlen_stride + u.kv_head * scales.head_stride;
}

// Returns false where the unit has no rows, as the blocks past the end of a short sequence. Lengths
// and starts are clamped to what exists: the host cannot check values on the device.
template <class T, class Keys>
GEMMA2_DEVICE bool make_unit(const AttentionParams& p, const AttentionPlan& plan, unsigned index,
                             Unit<T, Keys>& u) {
  const auto next_digit = [&](int64_t size) {
    const unsigned digit = index % unsigned(size);
    index /= unsigned(size);
    return digit;
  };
  u.split = next_digit(plan.splits);
  u.kv_head = next_digit(p.num_kv_heads);
  u.batch = next_digit(p.batch);
  u.block = plan.row_blocks - 1 - index;  // those that see most keys come first

  u.k_offset = 0;
  u.q_offset = 0, u.seqlen_q = p.seqlen_q, u.length = p.seqlen_k, u.start = 0;
  if (p.cu_seqlens_q) {
    u.q_offset = clamp(p.cu_seqlens_q[u.batch], 0, p.total_q);
    u.seqlen_q = clamp(p.cu_seqlens_q[u.batch + 1], u.q_offset, p.total_q) - u.q_offset;
    u.k_offset = clamp(p.cu_seqlens_k[u.batch], 0, p.total_k);
    u.length = clamp(p.cu_seqlens_k[u.batch + 1], u.k_offset, p.total_k) - u.k_offset;
  }
  if (p.key_lengths) {
    u.length = clamp(p.key_lengths[u.batch], 0, p.capacity ? INT64_MAX : p.seqlen_k);
  }
  if (p.key_starts) u.start = clamp(p.key_starts[u.batch], 0, u.length);
  u.group = int(unsigned(p.num_heads) / unsigned(p.num_kv_heads));
  u.row_begin = int(u.block * plan.block_rows);
  u.rows = int(clamp(u.seqlen_q * u.group - u.row_begin, 0, plan.block_rows));
  if (u.rows == 0) return false;

  u.key_begin = first_key(p, u, u.query(0));
  int64_t keys = end_key(p, u, u.query(u.rows - 1)) - u.key_begin;
  if (plan.splits > 1) {
    // By the keys there are, which only the device knows: the splits of a short sequence are short.
    const int64_t share = (keys + plan.splits - 1) / plan.splits;
    const int64_t step = (share + plan.split_step - 1) / plan.split_step * plan.split_step;
    const int64_t begin = clamp(u.split * step, 0, keys);
    u.key_begin += begin;
    keys = clamp(keys - begin, 0, step);
  }
  u.keys = u.stored = int(keys);
  u.k = static_cast<const Keys*>(p.k.data) + u.kv_head * p.k.head_stride;
  u.v = static_cast<const Keys*>(p.v.data) + u.kv_head * p.v.head_stride;
  u.slot = int(p.capacity ? u.key_begin % p.capacity : u.key_begin);
  if (!p.block_table) {
    u.k += u.batch * p.k.batch_stride + u.k_offset * p.k.seqlen_stride;
    u.v += u.batch * p.v.batch_stride + u.k_offset * p.v.seqlen_stride;
  }
  return true;
}

template <class T, class Keys>
GEMMA2_DEVICE const T* query_row(const AttentionParams& p, const Unit<T, Keys>& u, int r) {
  return static_cast<const T*>(p.q.data) + u.batch * p.q.batch_stride +
         (u.q_offset + u.query(r)) * p.q.seqlen_stride + u.head(r) * p.q.head_stride;
}

// ---- results of a row

// A row's output before normalization, in float32, and its softmax so far: weights are
// 2^(score - largest) with scores in units of ln 2.
struct RowResult {
  float o[kLaneDims];
  float largest, sum;
};

// Where a split of a row keeps its RowResult: head_dim floats of output, largest, sum.
template <class T, class Keys>
GEMMA2_DEVICE float* partial_row(const AttentionParams& p, const AttentionPlan& plan,
                                 const Unit<T, Keys>& u, int64_t split, int r) {
  const int64_t unit = ((u.block * p.batch + u.batch) * p.num_kv_heads + u.kv_head) * plan.splits;
  return p.partial + ((unit + split) * plan.block_rows + r) * (p.head_dim + 2);
}

// Adds the result of other keys; o(j) is this lane's part j of their output.
template <class F>
GEMMA2_DEVICE void add_result(RowResult& result, float largest, float sum, const F& o) {
  if (sum == 0) return;  // no key
  const float common = fmaxf(result.largest, largest);
  const float base = common == -INFINITY ? 0.0f : common;
  const float mine = exp2f(result.largest - base), other = exp2f(largest - base);
#pragma unroll
  for (int j = 0; j < kLaneDims; ++j) result.o[j] = result.o[j] * mine + o(j) * other;
  result.sum = result.sum * mine + sum * other;
  result.largest = common;
}

// By a whole warp. A row without keys has sum 0: it gives 0 and -inf.
template <class T, class Keys>
GEMMA2_DEVICE void store_out(const AttentionParams& p, const Unit<T, Keys>& u, int r,
                             const RowResult& result) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t i = u.q_offset + u.query(r), head = u.head(r);
  T* out = static_cast<T*>(p.out.data) + u.batch * p.out.batch_stride + i * p.out.seqlen_stride +
           head * p.out.head_stride;
  const float factor = result.sum == 0 ? 0.0f : 1.0f / result.sum;
#pragma unroll
  for (int j = 0; j < kLaneDims; ++j) {
    const int d = lane + j * kWarpSize;
    if (d < p.head_dim) out[d] = from_float<T>(result.o[j] * factor);
  }
  if (p.lse && lane == 0) {
    p.lse[u.batch * p.lse_batch_stride + head * p.lse_head_stride + i] =
        result.sum == 0 ? -INFINITY : result.largest * kLn2 + logf(result.sum);
  }
}

template <class T, class Keys>
GEMMA2_DEVICE void store_row(const AttentionParams& p, const AttentionPlan& plan,
                             const Unit<T, Keys>& u, int r, const RowResult& result) {
  if (plan.splits == 1) return store_out(p, u, r, result);
  const int lane = threadIdx.x % kWarpSize;
  float* to = partial_row(p, plan, u, u.split, r);
#pragma unroll
  for (int j = 0; j < kLaneDims; ++j) {
    const int d = lane + j * kWarpSize;
    if (d < p.head_dim) to[d] = result.o[j];
  }
  if (lane == 0) to[p.head_dim] = result.largest, to[p.head_dim + 1] = result.sum;
}

// Rows behind the last sequence belong to none.
template <class T>
GEMMA2_DEVICE void clear_rows_of_no_sequence(const AttentionParams& p) {
  if (!p.cu_seqlens_q) return;
  const int64_t row_size = p.num_heads * p.head_dim;
  T* out = static_cast<T*>(p.out.data);
  for (int64_t i = clamp(p.cu_seqlens_q[p.batch], 0, p.total_q) + blockIdx.x; i < p.total_q;
       i += gridDim.x) {
    for (int64_t d = threadIdx.x; d < row_size; d += blockDim.x)
      out[i * row_size + d] = from_float<T>(0.0f);
    for (int64_t h = threadIdx.x; p.lse && h < p.num_heads; h += blockDim.x)
      p.lse[h * p.lse_head_stride + i] = -INFINITY;
  }
}

// ---- softmax

// Weights are 2^(outer * (z - largest z)), z = tanh(inner * dot) with a soft-cap, else
// inner * dot: so a negative scale keeps the order of z and of the scores the same.
struct ScoreScale {
  float inner;
  float outer;
  bool capped;
};

GEMMA2_DEVICE ScoreScale score_scale(const AttentionParams& p) {
  const float scale = float(p.scale), softcap = float(p.softcap);  // doubles for the CPU's float64
  if (softcap > 0) return {scale / softcap, softcap * kLog2E, true};
  if (scale == 0) return {0.0f, 1.0f, false};
  return {scale < 0 ? -1.0f : 1.0f, fabsf(scale) * kLog2E, false};
}

// 1 - 2 / (e^2x + 1); doubled_x is 2 x / ln 2. Absolute error 3e-7: 1.5e-5 of a score at a soft-cap
// of 50. tanh.approx's 2^-11 would be 0.024 of a score, 2.4 % of a weight: more than bfloat16 may.
GEMMA2_DEVICE float tanh_by_exp(float doubled_x) {
  return 1.0f - 2.0f * reciprocal_approx(exp2_approx(doubled_x) + 1.0f);
}

GEMMA2_DEVICE float quad_max(float x) {
  x = fmaxf(x, shuffle_xor(x, 1));
  return fmaxf(x, shuffle_xor(x, 2));
}
GEMMA2_DEVICE float quad_sum(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}

// The softmax of the two rows whose scores a lane has a share of, over the keys so far. `sum` is of
// this lane's keys only.
struct QuadRows {
  float largest[2];  // in units of z
  float sum[2];

  GEMMA2_DEVICE void clear() {
    largest[0] = largest[1] = -INFINITY;
    sum[0] = sum[1] = 0.0f;
  }
};

// z of the dot products of 16 rows with 8 kTiles keys (mma's accumulators).
template <int kTiles>
GEMMA2_DEVICE void scale_scores(float (&s)[kTiles][4], const ScoreScale& c) {
  if (c.capped) {
    const float doubled = 2.0f * kLog2E * c.inner;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int j = 0; j < 4; ++j) s[n][j] = tanh_by_exp(s[n][j] * doubled);
    }
  } else if (c.inner != 1.0f) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int j = 0; j < 4; ++j) s[n][j] *= c.inner;
    }
  }
}

// -inf for keys that a row does not see.
template <int kTiles>
GEMMA2_DEVICE void mask_scores(float (&s)[kTiles][4], const RowKeys (&seen)[2], int key_begin) {
  const int lane_key = key_begin + threadIdx.x % 4 * 2;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int key = lane_key + 8 * n + j % 2;
      if (key < seen[j / 2].first || key >= seen[j / 2].end) s[n][j] = -INFINITY;
    }
  }
}

// The largest z that a row's weights are relative to, given the largest so far. One that is larger
// by a few powers of two only is left as it is, so that the output need not be scaled for it:
// weights are then below 2^8, which no type here minds.
GEMMA2_DEVICE float next_base(float base, float largest, float outer) {
  constexpr float kSlack = 8.0f;
  return (largest - base) * outer <= kSlack ? base : largest;
}

// Turns z into weights; factor is what earlier output of each row has to be multiplied with.
template <int kTiles>
GEMMA2_DEVICE void softmax_tile(float (&s)[kTiles][4], const ScoreScale& c, QuadRows& rows,
                                float (&factor)[2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float largest = rows.largest[i];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) largest = fmaxf(largest, fmaxf(s[n][2 * i], s[n][2 * i + 1]));
    largest = next_base(rows.largest[i], quad_max(largest), c.outer);
    const float finite = largest == -INFINITY ? 0.0f : largest;  // no key so far
    const float base = finite * c.outer;
    factor[i] = exp2_approx((rows.largest[i] - finite) * c.outer);  // just 1 where it stays
    rows.largest[i] = largest;
    float sum = rows.sum[i] * factor[i];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int j = 2 * i; j < 2 * i + 2; ++j) {
        s[n][j] = exp2_approx(s[n][j] * c.outer - base);
        sum += s[n][j];
      }
    }
    rows.sum[i] = sum;
  }
}

// ---- a row by a warp, in float32

GEMMA2_DEVICE float warp_max(float x) {
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) x = fmaxf(x, shuffle_xor(x, mask));
  return x;
}

// 32 keys at a time: lane j keeps the score of the j-th. Reads only keys that the row sees. Rows of
// int8 are multiplied with their factors. kRotated: head_dim, where q is rotated here, by `angles`.
template <int kRotated = 0, class T, class Keys>
GEMMA2_DEVICE void plain_row(const AttentionParams& p, const AttentionPlan& plan,
                             const Unit<T, Keys>& u, int r, RowResult& result,
                             const Angle* angles = nullptr) {
  constexpr bool kScaled = sizeof(Keys) == 1;
  const int lane = threadIdx.x % kWarpSize;
  const T* q_row = query_row(p, u, r);
  float q[kLaneDims];
#pragma unroll
  for (int j = 0; j < kLaneDims; ++j) {
    const int d = lane + j * kWarpSize;
    q[j] = d < p.head_dim ? to_float(q_row[d]) : 0.0f;
    result.o[j] = 0.0f;
  }
  if constexpr (kRotated > 0) {
    constexpr int kHalf = kRotated / 2 / kWarpSize;  // of a lane's dimensions
#pragma unroll
    for (int j = 0; angles && j < kHalf; ++j) {
      const Angle a = angles[lane + j * kWarpSize];
      float y1, y2;
      rotate_by(a.cosine, a.sine, q[j], q[j + kHalf], y1, y2);
      q[j] = to_float(from_float<T>(y1)), q[j + kHalf] = to_float(from_float<T>(y2));
    }
  }
  result.largest = -INFINITY, result.sum = 0.0f;
  const auto k_row = [&](int key) {
    return p.block_table ? paged_key_row(p, u, u.k, plan.k_stride, p.k.batch_stride, key)
                         : key_row(plan, u, u.k, plan.k_stride, key);
  };
  const auto v_row = [&](int key) {
    return p.block_table ? paged_key_row(p, u, u.v, plan.v_stride, p.v.batch_stride, key)
                         : key_row(plan, u, u.v, plan.v_stride, key);
  };
  const RowKeys seen = u.row_keys(p, r);
  const float scale = float(p.scale), softcap = float(p.softcap);
  for (int begin = seen.first; begin < seen.end; begin += kWarpSize) {
    const int count = seen.end - begin < kWarpSize ? seen.end - begin : kWarpSize;
    float score = -INFINITY;
    for (int i = 0; i < count; ++i) {
      const Keys* k = k_row(begin + i);
      float dot = 0.0f;
#pragma unroll
      for (int j = 0; j < kLaneDims; ++j) {
        const int d = lane + j * kWarpSize;
        if (d < p.head_dim) dot += q[j] * to_float(k[d]);
      }
      dot = warp_sum(dot) * scale;
      if constexpr (kScaled) dot *= *key_factor(plan, u, p.k_scales, begin + i);
      if (softcap > 0) dot = softcap * tanhf(dot / softcap);
      if (lane == i) score = dot * kLog2E;
    }
    const float largest = fmaxf(result.largest, warp_max(score));
    const float base = largest == -INFINITY ? 0.0f : largest;
    const float factor = exp2f(result.largest - base);
    const float weight = lane < count ? exp2f(score - base) : 0.0f;
    result.largest = largest;
    result.sum = result.sum * factor + warp_sum(weight);
#pragma unroll
    for (int j = 0; j < kLaneDims; ++j) result.o[j] *= factor;
    for (int i = 0; i < count; ++i) {
      const Keys* v = v_row(begin + i);
      float w = shuffle(weight, i);
      if constexpr (kScaled) w *= *key_factor(plan, u, p.v_scales, begin + i);
#pragma unroll
      for (int j = 0; j < kLaneDims; ++j) {
        const int d = lane + j * kWarpSize;
        if (d < p.head_dim) result.o[j] += w * to_float(v[d]);
      }
    }
  }
}

// In a tile, weight 0 of a key that row r does not see meets that key's value: where this is NaN or
// infinite, the row is computed anew from the keys that it does see.
template <int kRotated = 0, class T, class Keys>
GEMMA2_DEVICE void mend_row(const AttentionParams& p, const AttentionPlan& plan,
                            const Unit<T, Keys>& u, int r, RowResult& result,
                            const Angle* angles = nullptr) {
  float check = 0.0f;  // 0 * o is NaN where o is no finite number
#pragma unroll
  for (int j = 0; j < kLaneDims; ++j) check += 0.0f * result.o[j];
  if (ballot(check != 0.0f)) plain_row<kRotated>(p, plan, u, r, result, angles);
}
template <class T, class Keys>
GEMMA2_DEVICE void finish_row(const AttentionParams& p, const AttentionPlan& plan,
                              const Unit<T, Keys>& u, int r, RowResult& result) {
  mend_row(p, plan, u, r, result);
  store_row(p, plan, u, r, result);
}

// ---- tiles in shared memory

// Where element (row, 8 chunk) of a tile is: rows of kHeadDim elements. The chunks (16 bytes) of
// each run of 128 bytes are permuted by the row, so that the eight rows of a matrix that ldmatrix
// reads lie in different banks.
template <int kHeadDim>
struct RowLayout {
  static constexpr int kChunks = kHeadDim / 8;
  GEMMA2_DEVICE static int offset(int row, int chunk) {
    return row * kHeadDim + (chunk ^ (row % 8)) * 8;
  }
  // Of float32, half as many rows.
  GEMMA2_DEVICE static int float_offset(int row, int column) { return row * kHeadDim + column; }
};

// Starts the copy of kRows rows by kThreads threads; zeros from row `end` and column head_dim on.
// row_pointer(r) is asked for rows below `end` only. kUnroll: copies whose addresses are in
// registers at once.
template <class Layout, int kRows, int kThreads, int kUnroll = kRows, class T, class F>
GEMMA2_DEVICE void copy_tile(T* tile, int end, int head_dim, int thread, const F& row_pointer) {
  constexpr int kChunks = Layout::kChunks, kStep = kThreads / kChunks;
  static_assert(kThreads % kChunks == 0 && kRows % kStep == 0, "");
  const int chunk = thread % kChunks, first = thread / kChunks;
  const bool inside = chunk * 8 < head_dim;
#pragma unroll kUnroll
  for (int i = 0; i < kRows / kStep; ++i) {
    const int row = first + i * kStep;
    const bool valid = inside && row < end;
    const T* from = valid ? row_pointer(row) + chunk * 8 : nullptr;
    cp_async<16>(tile + Layout::offset(row, chunk), from, valid);
  }
}

// The tile of K or V of the keys from `key` on.
template <class Layout, int kKeys, int kThreads, bool kOfV, int kUnroll = kKeys, class T>
GEMMA2_DEVICE void copy_keys(T* tile, const AttentionParams& p, const AttentionPlan& plan,
                             const Unit<T>& u, int key, int thread) {
  const T* data = kOfV ? u.v : u.k;
  const int stride = kOfV ? plan.v_stride : plan.k_stride;
  const int end = u.keys - key, head_dim = int(p.head_dim);
  if (p.block_table) {
    const int64_t page_stride = kOfV ? p.v.batch_stride : p.k.batch_stride;
    copy_tile<Layout, kKeys, kThreads, kUnroll>(tile, end, head_dim, thread, [&](int row) {
      return paged_key_row(p, u, data, stride, page_stride, key + row);
    });
  } else {
    copy_tile<Layout, kKeys, kThreads, kUnroll>(tile, end, head_dim, thread, [&](int row) {
      return key_row(plan, u, data, stride, key + row);
    });
  }
}

// The same by one warp, in little code: for rows one behind the other a pointer goes along.
template <class Layout, int kKeys, class T, class Keys>
GEMMA2_DEVICE void copy_run(Keys* tile, const AttentionParams& p, const AttentionPlan& plan,
                            const Unit<T, Keys>& u, bool of_v, int key, int lane) {
  constexpr int kChunks = Layout::kChunks, kStep = kWarpSize / kChunks;
  constexpr int kElements = 16 / int(sizeof(Keys));  // of a chunk
  const Keys* data = of_v ? u.v : u.k;
  const int stride = of_v ? plan.v_stride : plan.k_stride;
  const int chunk = lane % kChunks, first = lane / kChunks;
  // This lane's rows that exist.
  const int end = chunk * kElements < int(p.head_dim) ? u.stored - key - first : 0;
  const int slot = key_slot(plan, u, key);
  const bool paged = sizeof(Keys) != 1 && p.block_table;  // a cache of int8 never is
  if (!paged && slot + kKeys <= plan.capacity) {
    const Keys* from = data + int64_t(slot + first) * stride + chunk * kElements;
#pragma unroll
    for (int i = 0; i < kKeys / kStep; ++i) {
      cp_async<16>(tile + Layout::offset(first + i * kStep, chunk), from, i * kStep < end);
      from += kStep * stride;
    }
    return;
  }
#pragma unroll 1
  for (int i = 0; i < kKeys; i += kStep) {
    const Keys* from = nullptr;
    if (i < end && !paged) {
      from = key_row(plan, u, data, stride, key + first + i) + chunk * kElements;
    } else if (i < end) {
      const int64_t page_stride = of_v ? p.v.batch_stride : p.k.batch_stride;
      from = paged_key_row(p, u, data, stride, page_stride, key + first + i) + chunk * kElements;
    }
    cp_async<16>(tile + Layout::offset(first + i, chunk), from, i < end);
  }
}

template <bool kValue>
struct Flag {
  static constexpr bool value = kValue;
};
template <int kValue>
struct Count {
  static constexpr int value = kValue;
};

// start_copy(tile, of_v, stage) for the tiles that fill the ring.
template <int kTiles, class F>
GEMMA2_DEVICE void start_first_copies(const F& start_copy) {
  if constexpr (kTiles > 0) {
    start_first_copies<kTiles - 1>(start_copy);
    start_copy(kTiles - 1, Flag<(kTiles - 1) % 2 == 1>{}, kTiles - 1);
  }
}

// s += q k^T of 16 rows and 8 kKeyTiles keys. `q(k_step, a)` gives mma's operand a.
template <class T, int kHeadDim, int kMTiles, int kKeyTiles, class F>
GEMMA2_DEVICE void multiply_keys(float (&s)[kMTiles][kKeyTiles][4], const T* k_tile, const F& q) {
  const int lane = threadIdx.x % kWarpSize;
  const int row = lane % 8 + lane / 16 * 8, chunk = lane / 8 % 2;
#pragma unroll
  for (int step = 0; step < kHeadDim / 16; ++step) {
    uint32_t a[kMTiles][4];
    q(step, a);
#pragma unroll
    for (int n = 0; n < kKeyTiles / 2; ++n) {
      uint32_t b[4];
      ldmatrix_x4(b, k_tile + RowLayout<kHeadDim>::offset(16 * n + row, 2 * step + chunk));
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) {
        mma_m16n8k16<T>(s[m][2 * n], a[m], b[0], b[1]);
        mma_m16n8k16<T>(s[m][2 * n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// o += weights v of 16 rows and 16 kSteps keys; weights are mma's operand a.
template <class T, int kHeadDim, int kMTiles, int kSteps>
GEMMA2_DEVICE void multiply_values(float (&o)[kMTiles][kHeadDim / 8][4],
                                   const uint32_t (&weights)[kMTiles][kSteps][4], const T* v_tile) {
  const int lane = threadIdx.x % kWarpSize;
  const int row = lane % 16, chunk = lane / 16;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int n = 0; n < kHeadDim / 16; ++n) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, v_tile + RowLayout<kHeadDim>::offset(16 * step + row, 2 * n + chunk));
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) {
        mma_m16n8k16<T>(o[m][2 * n], weights[m][step], b[0], b[1]);
        mma_m16n8k16<T>(o[m][2 * n + 1], weights[m][step], b[2], b[3]);
      }
    }
  }
}

// mma's accumulators of 16 rows and 8 kTiles keys as its operand a.
template <class T, int kTiles>
GEMMA2_DEVICE void pack_weights(uint32_t (&a)[kTiles / 2][4], const float (&s)[kTiles][4]) {
#pragma unroll
  for (int step = 0; step < kTiles / 2; ++step) {
    a[step][0] = pack<T>(s[2 * step][0], s[2 * step][1]);
    a[step][1] = pack<T>(s[2 * step][2], s[2 * step][3]);
    a[step][2] = pack<T>(s[2 * step + 1][0], s[2 * step + 1][1]);
    a[step][3] = pack<T>(s[2 * step + 1][2], s[2 * step + 1][3]);
  }
}

// Multiplies the earlier output of 16 rows; mostly no row of the warp has a new largest score.
template <int kTiles>
GEMMA2_DEVICE void scale_output(float (&o)[kTiles][4], const float (&factor)[2]) {
  if (!ballot(factor[0] != 1.0f || factor[1] != 1.0f)) return;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    o[n][0] *= factor[0], o[n][1] *= factor[0];
    o[n][2] *= factor[1], o[n][3] *= factor[1];
  }
}

// ---- rows of a warp's accumulators

// 1 / sum of a row's weights; 0 where it saw no key.
GEMMA2_DEVICE float row_factor(float sum) { return sum == 0 ? 0.0f : reciprocal_approx(sum); }

// Whether all of the lane's output is finite, of rows that there are.
template <int kTiles>
GEMMA2_DEVICE bool all_finite(const float (&o)[kTiles][4], int rows) {
  bool finite = true;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float check[2] = {0.0f, 0.0f};  // 0 * o is NaN where o is no finite number
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      check[0] = fmaf(0.0f, o[n][2 * i], check[0]);
      check[1] = fmaf(0.0f, o[n][2 * i + 1], check[1]);
    }
    const bool exists = int(threadIdx.x % kWarpSize / 4) + 8 * i < rows;
    finite = finite && (check[0] + check[1] == 0.0f || !exists);
  }
  return finite;
}

// The warp's 16 rows, from row `first` of the unit on, as partial_row has them.
template <class T, int kHeadDim>
GEMMA2_DEVICE void store_partial(const AttentionParams& p, const AttentionPlan& plan,
                                 const Unit<T>& u, int first, const float (&o)[kHeadDim / 8][4],
                                 const float (&largest)[2], const float (&sum)[2]) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int r = first + lane / 4 + 8 * i;
    if (r >= u.rows) continue;
    float* const row = partial_row(p, plan, u, u.split, r);
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
      if (8 * n < p.head_dim) {
        store_8(row + 8 * n + lane % 4 * 2,
                {{float_to_bits(o[n][2 * i]), float_to_bits(o[n][2 * i + 1])}});
      }
    }
    if (lane % 4 == 0) row[p.head_dim] = largest[i], row[p.head_dim + 1] = sum[i];
  }
}

// The same to out and lse, by way of `tile`.
template <class T, int kHeadDim, class Layout>
GEMMA2_DEVICE void store_final(const AttentionParams& p, const Unit<T>& u, int first, T* tile,
                               const float (&o)[kHeadDim / 8][4], const float (&largest)[2],
                               const float (&sum)[2]) {
  constexpr int kChunks = kHeadDim / 8, kAtOnce = kWarpSize / kChunks;
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = lane / 4 + 8 * i;
    const float factor = row_factor(sum[i]);
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
      *reinterpret_cast<uint32_t*>(tile + Layout::offset(row, n) + lane % 4 * 2) =
          pack<T>(o[n][2 * i] * factor, o[n][2 * i + 1] * factor);
    }
  }
  __syncwarp();
  // Lane r knows where row r goes.
  const int r = first + lane % 16, query = u.query(r);
  const int64_t i = u.q_offset + query;
  const int64_t head = u.kv_head * u.group + (u.row_begin + r - query * u.group);
  const int64_t offset = i * p.out.seqlen_stride + head * p.out.head_stride;
  T* const out = static_cast<T*>(p.out.data) + u.batch * p.out.batch_stride;
  const int chunk = lane % kChunks;
#pragma unroll
  for (int pass = 0; pass < 16 / kAtOnce; ++pass) {
    const int row = pass * kAtOnce + lane / kChunks;
    T* const to = out + shuffle(offset, row) + chunk * 8;
    if (first + row < u.rows && chunk * 8 < p.head_dim)
      store_16(to, load_16(tile + Layout::offset(row, chunk)));
  }
  if (!p.lse) return;
  float row_largest[2], row_sum[2];
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    row_largest[j] = shuffle(largest[j], lane % 8 * 4), row_sum[j] = shuffle(sum[j], lane % 8 * 4);
  }
  const float all = lane < 8 ? row_sum[0] : row_sum[1];
  const float most = lane < 8 ? row_largest[0] : row_largest[1];
  if (lane < 16 && r < u.rows) {
    p.lse[u.batch * p.lse_batch_stride + head * p.lse_head_stride + i] =
        all == 0 ? -INFINITY : most * kLn2 + logf(all);
  }
}

// The same of all rows, where one has to be computed anew, or rows are not in 16-byte pieces.
template <class T, int kHeadDim, class Layout, int kMTiles>
GEMMA2_DEVICE void store_one_by_one(const AttentionParams& p, const AttentionPlan& plan,
                                    const Unit<T>& u, int first, T* tile,
                                    const float (&o)[kMTiles][kHeadDim / 8][4],
                                    const float (&largest)[kMTiles][2],
                                    const float (&sum)[kMTiles][2]) {
  const int lane = threadIdx.x % kWarpSize;
  // Eight rows of float32 at a time, where 16 of T were.
#pragma unroll 1
  for (int eight = 0; eight < 2 * kMTiles; ++eight) {
    const auto chosen = [&](const float (&of_first)[2], const float (&of_last)[2]) {
      const float first = eight % 2 == 0 ? of_first[0] : of_first[1];
      return eight < 2 ? first : eight % 2 == 0 ? of_last[0] : of_last[1];
    };
    __syncwarp();
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
      float* const to =
          reinterpret_cast<float*>(tile) + Layout::float_offset(lane / 4, 8 * n + lane % 4 * 2);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        to[j] =
            chosen({o[0][n][j], o[0][n][2 + j]}, {o[kMTiles - 1][n][j], o[kMTiles - 1][n][2 + j]});
      }
    }
    __syncwarp();
#pragma unroll 1
    for (int row = 0; row < 8 && first + 8 * eight + row < u.rows; ++row) {
      RowResult result{{},
                       shuffle(chosen(largest[0], largest[kMTiles - 1]), 4 * row),
                       shuffle(chosen(sum[0], sum[kMTiles - 1]), 4 * row)};
#pragma unroll
      for (int j = 0; j < kHeadDim / kWarpSize; ++j) {
        result.o[j] =
            reinterpret_cast<float*>(tile)[Layout::float_offset(row, lane + j * kWarpSize)];
      }
      finish_row(p, plan, u, first + 8 * eight + row, result);
    }
  }
}

// The warp's 16 kMTiles rows, from row `first` of the unit on, to where they belong. tile: where
// its rows of Q were, as Layout says, that nobody reads any more.
template <class T, int kHeadDim, class Layout, int kMTiles>
GEMMA2_DEVICE void store_rows(const AttentionParams& p, const AttentionPlan& plan, const Unit<T>& u,
                              int first, T* tile, const float (&o)[kMTiles][kHeadDim / 8][4],
                              const QuadRows (&rows)[kMTiles], float outer) {
  static_assert(kMTiles <= 2, "");
  const HeadsView& out = p.out;
  const bool in_pieces =
      p.head_dim % 8 == 0 &&
      (plan.splits > 1 || ((out.batch_stride | out.seqlen_stride | out.head_stride) % 8 == 0 &&
                           reinterpret_cast<uintptr_t>(out.data) % 16 == 0));
  float sum[kMTiles][2], largest[kMTiles][2];
  bool finite = true;
#pragma unroll
  for (int m = 0; m < kMTiles; ++m) {
    finite = finite && all_finite(o[m], u.rows - first - 16 * m);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      sum[m][i] = quad_sum(rows[m].sum[i]), largest[m][i] = rows[m].largest[i] * outer;
    }
  }
  if (!in_pieces || ballot(!finite)) {
    return store_one_by_one<T, kHeadDim, Layout>(p, plan, u, first, tile, o, largest, sum);
  }
#pragma unroll
  for (int m = 0; m < kMTiles; ++m) {
    const int row = first + 16 * m;
    if (plan.splits > 1) {
      store_partial<T, kHeadDim>(p, plan, u, row, o[m], largest[m], sum[m]);
    } else {
      store_final<T, kHeadDim, Layout>(p, u, row, tile + Layout::offset(16 * m, 0), o[m],
                                       largest[m], sum[m]);
    }
  }
}

// Rows of float32 output on their way from accumulators to whole rows; off the powers of two, so
// that the rows of an accumulator lie in different banks.
template <int kHeadDim>
constexpr int kOutputStride = kHeadDim + 8;

template <int kHeadDim>
GEMMA2_DEVICE void spill_output(float* to, const float (&o)[kHeadDim / 8][4], int lane,
                                int rows = 16) {
  to += lane / 4 * kOutputStride<kHeadDim> + lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (lane / 4 + 8 * i >= rows) continue;
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
      to[8 * i * kOutputStride<kHeadDim> + 8 * n] = o[n][2 * i];
      to[8 * i * kOutputStride<kHeadDim> + 8 * n + 1] = o[n][2 * i + 1];
    }
  }
}

}  // namespace cuda
}  // namespace gemma2
