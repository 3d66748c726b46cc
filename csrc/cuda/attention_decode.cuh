// What attention_decode_kernel does with a warp's 16 keys: how their K and V come to shared memory,
// and the products with them, for keys of 16 bits and for a cache of int8.
#pragma once
#include "attention.cuh"
#include "int8.cuh"

namespace gemma2 {
namespace cuda {

constexpr int kDecodeKeys = 16;  // of a tile

// The token that a block appends, in shared memory.
template <class T, int kHeadDim>
struct NewToken {
  Angle angles[kHeadDim / 2];
  T rows[2][kHeadDim];  // of k, rotated, and of v

  // This thread's: it has dimensions d and kHalf + d of every kStep-th row.
  static constexpr int kHalf = kHeadDim / 2;
  static constexpr int kStep = kAttentionDecodeWarps * kWarpSize / kHalf;

  GEMMA2_DEVICE Angle make_angle(const AttentionParams& p, int64_t position) {
    const int d = threadIdx.x % kHalf;
    Angle a;
    sincosf(float(position) * p.inv_freq[d], &a.sine, &a.cosine);
    if (int(threadIdx.x) < kHalf) angles[d] = a;
    return a;
  }
  // By all threads of a block, before a barrier: query rows, rotated, and zeros behind them into a
  // tile of 16; where the unit has the token, its rows of k and v into `rows` and the cache.
  GEMMA2_DEVICE void rotate(const AttentionParams& p, const AttentionPlan& plan, const Unit<T>& u,
                            const Angle& angle, T* q_tile) {
    using Layout = RowLayout<kHeadDim>;
    constexpr int kAtOnce = 4, kChunks = kHeadDim / 8;
    const int d = threadIdx.x % kHalf, behind = d + kHalf, first = int(threadIdx.x) / kHalf;
    const auto of = [&](const HeadsView& view) {
      return static_cast<T*>(view.data) + u.batch * view.batch_stride +
             u.kv_head * view.head_stride;
    };
    const bool has_token = u.stored < u.keys && first == 0;
    T k[2] = {}, v[2] = {};
    if (has_token) {
      const T *const k_row = of(p.new_k), *const v_row = of(p.new_v);
      k[0] = k_row[d], k[1] = k_row[behind];
      v[0] = v_row[d], v[1] = v_row[behind];
    }
#pragma unroll 1
    for (int begin = first; begin < u.rows; begin += kAtOnce * kStep) {
      T x[kAtOnce][2] = {};
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int r = begin + i * kStep;
        if (r >= u.rows) break;
        const T* row = query_row(p, u, r);
        x[i][0] = row[d], x[i][1] = row[behind];
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int r = begin + i * kStep;
        if (r >= u.rows) break;
        float y1, y2;
        rotate_by(angle.cosine, angle.sine, to_float(x[i][0]), to_float(x[i][1]), y1, y2);
        q_tile[Layout::offset(r, d / 8) + d % 8] = from_float<T>(y1);
        q_tile[Layout::offset(r, behind / 8) + d % 8] = from_float<T>(y2);
      }
    }
    for (int i = threadIdx.x; i < kAttentionDecodeRows * kChunks; i += blockDim.x) {
      if (i / kChunks >= u.rows) store_16(q_tile + 8 * i, Vector16{});
    }
    if (!has_token) return;
    float y1, y2;
    rotate_by(angle.cosine, angle.sine, to_float(k[0]), to_float(k[1]), y1, y2);
    k[0] = from_float<T>(y1), k[1] = from_float<T>(y2);
    const int64_t slot = key_slot(plan, u, u.keys - 1);
    T* const k_cache = of(p.k) + slot * plan.k_stride;
    T* const v_cache = of(p.v) + slot * plan.v_stride;
    k_cache[d] = rows[0][d] = k[0], k_cache[behind] = rows[0][behind] = k[1];
    v_cache[d] = rows[1][d] = v[0], v_cache[behind] = rows[1][behind] = v[1];
  }
  // By a whole warp: the row of k or v into row `row` of a tile that has landed.
  GEMMA2_DEVICE void put(unsigned char* tile, bool of_v, int row, int lane) const {
    if (lane < kHeadDim / 8) {
      store_16(reinterpret_cast<T*>(tile) + RowLayout<kHeadDim>::offset(row, lane),
               load_16(rows[of_v] + 8 * lane));
    }
    __syncwarp();
  }
};

// Keys and values of type T.
template <class T, int kHeadDim_>
struct DecodeTiles {
  using Element = T;
  using Keys = T;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kStages = attention_decode_stages(kHeadDim);
  static constexpr int kStageBytes = attention_decode_stage_bytes(kHeadDim);
  static constexpr bool kAppends = true;  // can take a token that is not in the cache yet

  GEMMA2_DEVICE static void start_copy(unsigned char* stage, const AttentionParams& p,
                                       const AttentionPlan& plan, const Unit<T>& u, bool of_v,
                                       int key, int lane) {
    copy_run<RowLayout<kHeadDim>, kDecodeKeys>(reinterpret_cast<T*>(stage), p, plan, u, of_v, key,
                                               lane);
  }
  GEMMA2_DEVICE static void begin(const RowKeys (&)[2]) {}
  // -inf for keys that a row does not see, of the tile from `key` on.
  GEMMA2_DEVICE static void mask(float (&s)[1][2][4], const RowKeys (&seen)[2], int key) {
    mask_scores(s[0], seen, key);
  }
  // Row lane / 4 + 8 i of mma's operand a, for the whole head; zero in columns that do not exist.
  GEMMA2_DEVICE static void load_query(uint32_t (&q)[kHeadDim / 16][4], int i, const T* row,
                                       int head_dim, int lane) {
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int d = 16 * step + 8 * half;
        if (d < head_dim) q[step][i + 2 * half] = load_4(row + d + lane % 4 * 2);
      }
    }
  }
  GEMMA2_DEVICE static void multiply_keys(float (&s)[1][2][4], const unsigned char* stage,
                                          const uint32_t (&q)[kHeadDim / 16][4], int) {
    cuda::multiply_keys<T, kHeadDim, 1, 2>(s, reinterpret_cast<const T*>(stage),
                                           [&](int step, uint32_t (&a)[1][4]) {
#pragma unroll
                                             for (int i = 0; i < 4; ++i) a[0][i] = q[step][i];
                                           });
  }
  // Adds weights s times the values of next(), a tile, to earlier output, times `factor`.
  template <class F>
  GEMMA2_DEVICE static void add_values(float (&o)[1][kHeadDim / 8][4], float (&s)[1][2][4],
                                       float (&factor)[2], int, const F& next) {
    scale_output(o[0], factor);
    uint32_t weights[1][1][4];
    pack_weights<T>(weights[0], s[0]);
    cuda::multiply_values<T, kHeadDim>(o, weights, reinterpret_cast<const T*>(next()));
  }
  GEMMA2_DEVICE static void spill(float* to, const float (&o)[1][kHeadDim / 8][4], int rows,
                                  int lane) {
    spill_output<kHeadDim>(to, o[0], lane, rows);
  }
};

// Where chunk (16 bytes) `chunk` of a row of kHeadDim int8 is. Permuted so that lanes hit different
// banks where they read 16 bytes of rows g and g + 1, as K is read, and 8 of rows 2t, as V.
template <int kHeadDim>
struct Int8Layout {
  static constexpr int kChunks = kHeadDim / 16;
  static_assert(kChunks >= 8, "");
  GEMMA2_DEVICE static int moved(int row) { return (row / 2 % 4 * 2) ^ (row % 2 * 4); }
  GEMMA2_DEVICE static int offset(int row, int chunk) {
    return row * kHeadDim + (chunk ^ moved(row)) * 16;
  }
};
// The 64-byte parts of such a row from its `byte`-th byte (below 64) on, and of the row behind it,
// for an even row; and of those 8 further. Two addresses for all of them, the rest is constants.
template <int kHeadDim>
struct Int8Row {
  const unsigned char* at[2];

  GEMMA2_DEVICE Int8Row(const unsigned char* tile, int row, int byte) {
    const int first = byte ^ (Int8Layout<kHeadDim>::moved(row) * 16);
    at[0] = tile + row * kHeadDim + first;
    at[1] = tile + row * kHeadDim + (first ^ 64);
  }
  GEMMA2_DEVICE const unsigned char* part(int i, int behind = 0) const {
    return at[(i + behind) % 2] + i / 2 * 128 + behind * kHeadDim;
  }
};

// A cache of int8: a tile is 16 rows, then their factors. The numbers go through the tensor cores
// as they are, exact in T; scores are multiplied with K's factors, and weights with V's.
//
// A product adds up any order of k and has columns in any order, so a lane reads what lies
// together: of K 16 bytes of a row, which are k = 2t, 2t + 8, 2t + 1, 2t + 9 of four steps; of V 8
// bytes, which are column g of eight tiles of columns.
template <class T, int kHeadDim_>
struct Int8DecodeTiles {
  using Element = T;
  using Keys = int8_t;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kStages = kAttentionInt8Stages;
  static constexpr int kStageBytes = attention_int8_stage_bytes(kHeadDim);
  static constexpr bool kAppends = false;
  static constexpr int kRowBytes = kDecodeKeys * kHeadDim;
  using Layout = Int8Layout<kHeadDim>;

  // What a thread keeps in shared memory, for itself alone, since registers are full.
  struct Kept {
    // Output is in units of this, a power of two not far below the largest factor of V so far: as
    // Half, weights times smaller factors would have few bits left.
    float unit;
    RowKeys seen[2];
  };
  static_assert(sizeof(Kept) == kAttentionInt8KeptBytes, "");
  GEMMA2_DEVICE static Kept& kept() {
    constexpr int kTileBytes = kAttentionDecodeWarps * kStages * kStageBytes;
    return reinterpret_cast<Kept*>(shared_memory() + kTileBytes + kAttentionUnitBytes)[threadIdx.x];
  }

  GEMMA2_DEVICE static void begin(const RowKeys (&seen)[2]) {
    kept() = {0x1p-126f, {seen[0], seen[1]}};
  }
  GEMMA2_DEVICE static void mask(float (&s)[1][2][4], const RowKeys (&)[2], int key) {
    mask_scores(s[0], kept().seen, key);
  }
  GEMMA2_DEVICE static void start_copy(unsigned char* stage, const AttentionParams& p,
                                       const AttentionPlan& plan, const Unit<T, int8_t>& u,
                                       bool of_v, int key, int lane) {
    copy_run<Layout, kDecodeKeys>(reinterpret_cast<int8_t*>(stage), p, plan, u, of_v, key, lane);
    if (lane >= kDecodeKeys) return;
    const bool exists = key + lane < u.keys;
    const HeadsView& scales = of_v ? p.v_scales : p.k_scales;
    cp_async<4>(stage + kRowBytes + 4 * lane,
                exists ? key_factor(plan, u, scales, key + lane) : nullptr, exists);
  }
  GEMMA2_DEVICE static void load_query(uint32_t (&q)[kHeadDim / 16][4], int i, const T* row,
                                       int head_dim, int lane) {
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
      const int d = step / 4 * 64 + lane % 4 * 16 + step % 4 * 4;
      if (d >= head_dim) continue;
      const Vector8 four = load_8(row + d);
      q[step][i] = permute_bytes(four.words[0], four.words[1], 0x5410);      // 0 and 2
      q[step][i + 2] = permute_bytes(four.words[0], four.words[1], 0x7632);  // 1 and 3
    }
  }
  // The factors of the keys whose scores a lane has: 8 n + 2t and the next.
  GEMMA2_DEVICE static void load_factors(float (&factors)[2][2], const unsigned char* stage,
                                         int lane) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const Vector8 two = load_8(stage + kRowBytes + 4 * (8 * n + lane % 4 * 2));
      factors[n][0] = bits_to_float(two.words[0]);
      factors[n][1] = bits_to_float(two.words[1]);
    }
  }
  GEMMA2_DEVICE static void multiply_keys(float (&s)[1][2][4], const unsigned char* stage,
                                          const uint32_t (&q)[kHeadDim / 16][4], int lane) {
    const Int8Row<kHeadDim> row(stage, lane / 4, lane % 4 * 16);
#pragma unroll
    for (int part = 0; part < kHeadDim / 64; ++part) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const Vector16 k = load_16(row.part(part, 8 * n));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          uint32_t b[2];
          widen(k.words[i], b, T{});
          mma_m16n8k16<T>(s[0][n], q[4 * part + i], b[0], b[1]);
        }
      }
    }
    float factors[2][2];
    load_factors(factors, stage, lane);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int j = 0; j < 4; ++j) s[0][n][j] *= factors[n][j % 2];
    }
  }
  template <class F>
  GEMMA2_DEVICE static void add_values(float (&o)[1][kHeadDim / 8][4], float (&s)[1][2][4],
                                       float (&factor)[2], int lane, const F& next) {
    const unsigned char* const stage = next();
    float factors[2][2];
    load_factors(factors, stage, lane);
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) largest = fmaxf(largest, fabsf(factors[i / 2][i % 2]));
    largest = quad_max(largest);
    const float power = bits_to_float(float_to_bits(largest) & 0x7f800000u);
    const float before = kept().unit, now = fmaxf(before, power), inverse = 1.0f / now;  // exact
    kept().unit = now;
#pragma unroll
    for (int i = 0; i < 2; ++i) factor[i] *= before * inverse;
    scale_output(o[0], factor);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int j = 0; j < 4; ++j) s[0][n][j] *= factors[n][j % 2] * inverse;
    }
    uint32_t weights[1][4];
    pack_weights<T>(weights, s[0]);

    const Int8Row<kHeadDim> pair(stage, lane % 4 * 2, lane / 4 * 8);
#pragma unroll
    for (int part = 0; part < kHeadDim / 64; ++part) {
      Vector8 v[4];  // of keys 2t, 2t + 1, 2t + 8, 2t + 9
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] = load_8(pair.part(part, i % 2 + i / 2 * 8));
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        // Dimensions j and j + 1 of both keys of a pair, which widen puts side by side.
        const uint32_t selector = j % 4 == 0 ? 0x5410 : 0x7632;
        uint32_t first[2], second[2];
        widen(permute_bytes(v[0].words[j / 4], v[1].words[j / 4], selector), first, T{});
        widen(permute_bytes(v[2].words[j / 4], v[3].words[j / 4], selector), second, T{});
        mma_m16n8k16<T>(o[0][8 * part + j], weights[0], first[0], second[0]);
        mma_m16n8k16<T>(o[0][8 * part + j + 1], weights[0], first[1], second[1]);
      }
    }
  }
  // Column n of o[8 part + j] is dimension 64 part + 8 n + j.
  GEMMA2_DEVICE static void spill(float* to, const float (&o)[1][kHeadDim / 8][4], int rows,
                                  int lane) {
    const float unit = kept().unit;
    to += lane / 4 * kOutputStride<kHeadDim> + lane % 4 * 16;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (lane / 4 + 8 * i >= rows) continue;
#pragma unroll
      for (int at = 0; at < kHeadDim / 4; at += 4) {  // of this lane's, in runs of 16
        const int part = at / 16, column = at / 8 % 2, j = at % 8;
        Vector16 four;
#pragma unroll
        for (int n = 0; n < 4; ++n)
          four.words[n] = float_to_bits(o[0][8 * part + j + n][2 * i + column] * unit);
        store_16(to + 8 * i * kOutputStride<kHeadDim> + 64 * part + at % 16, four);
      }
    }
  }
};

}  // namespace cuda
}  // namespace gemma2
