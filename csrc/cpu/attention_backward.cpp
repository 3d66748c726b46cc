// Gradients of attention from its inputs and results. With S the scores before the soft-cap of row
// i and key j, P = e^(softcap(S) - lse) and delta_i = grad_out_i . out_i - grad_lse_i:
//   dS_ij = P_ij (grad_out_i . v_j - delta_i) (1 - tanh^2(S_ij / softcap)), 0 where j is not seen;
//   grad_q_i = sum_j dS_ij k_j, grad_k_j = sum_i dS_ij q_i, grad_v_j = sum_i P_ij grad_out_i,
// the first two times the scale. P is computed anew: no score matrix is stored.
//
// A unit is (block of keys, sequence, key head): it packs its keys and values once, walks over the
// blocks of query rows that see them, and keeps its sums of grad_k and grad_v. The sums of grad_q
// are shared: each block of rows takes its blocks of keys in their order, a unit waiting for its
// turn; units are handed out so that each waits for earlier ones only. So results are equal to the
// bit for any number of threads. Five products in register tiles: arithmetic bounds it. Source:
// FlashAttention-2 (arXiv 2307.08691).
#include <sched.h>

#include "attention-inl.h"
#include "kernels.h"

namespace gemma2 {
namespace GEMMA2_ISA {
namespace {

constexpr int64_t kRows = kAttentionBackwardBlock, kKeys = kAttentionBackwardBlock;
constexpr int64_t kWeightStride = kAttentionBackwardStride;
static_assert(kRows % kRowsAtOnce == 0 && kKeys % kTileRows == 0 && kKeys % kTileCols == 0, "");
// Whether products are those of AMX's tiles.
#if defined(GEMMA2_ISA_avx512_amx)
constexpr bool kInTiles = true;
#else
constexpr bool kInTiles = false;
#endif

// A block of query rows of one sequence and key head.
struct RowBlock {
  int64_t index;               // in the terms of the rows, the sums of grad_q and the turns
  int64_t begin, rows;         // rows of the group, position * group + head
  int64_t first_key, end_key;  // keys that some row sees

  GEMMA2_INLINE bool sees(int64_t begin_key, int64_t n) const {
    return first_key < end_key && first_key < begin_key + n && end_key > begin_key;
  }
};

GEMMA2_INLINE int64_t row_blocks(const Sequence& s) {
  return (s.seqlen_q * s.group + kRows - 1) / kRows;
}

GEMMA2_INLINE RowBlock row_block(const AttentionBackwardWork& w, const Sequence& s, int64_t block) {
  const AttentionParams& p = w.p.forward;
  RowBlock r;
  r.index = (w.first_row_block[s.batch] + block) * p.num_kv_heads + s.kv_head;
  r.begin = block * kRows;
  r.rows = min64(kRows, s.seqlen_q * s.group - r.begin);
  r.first_key = first_key(p, s, s.query(r.begin));
  r.end_key = end_key(p, s, s.query(r.begin + r.rows - 1));
  return r;
}

template <class T>
GEMMA2_INLINE T* row_of(const HeadsView& t, const Sequence& s, int64_t row) {
  return (T*)t.data + s.batch * t.batch_stride + (s.q_offset + s.query(row)) * t.seqlen_stride +
         s.head(row) * t.head_stride;
}
template <class T>
GEMMA2_INLINE T* key_of(const HeadsView& t, const Sequence& s, int64_t key) {
  return (T*)t.data + s.batch * t.batch_stride + (s.k_offset + key) * t.seqlen_stride +
         s.kv_head * t.head_stride;
}

template <class T>
GEMMA2_INLINE void store_scaled(const float* sums, float scale, int64_t n, T* out) {
  for (int64_t d = 0; d < n; d += kLanes) {
    const VecF y = load(sums + d) * set(scale);
    if (d + kLanes <= n)
      store(out + d, y);
    else
      store_n(out + d, y, n - d);
  }
}

// delta of each row, and lse in units of ln 2; inf in a row that sees no key, so that its weights
// are 0. Zeros to grad_q where no row of the block sees a key.
template <class T>
void prepare_rows(const AttentionBackwardWork& w, const Sequence& s, const RowBlock& block) {
  const AttentionParams& p = w.p.forward;
  const float log2_e = 0x1.715476p+0f;
  float* delta = w.row_terms + block.index * 2 * w.row_room;
  float* lse = delta + w.row_room;
  for (int64_t r = 0; r < w.row_room; ++r) {
    delta[r] = 0.0f;
    lse[r] = INFINITY;
    if (r >= block.rows) continue;
    const int64_t row = block.begin + r, i = s.query(row);
    if (block.first_key >= block.end_key) {
      T* grad_q = row_of<T>(w.p.grad_q, s, row);
      for (int64_t d = 0; d < p.head_dim; ++d) grad_q[d] = from_float<T>(0.0f);
    }
    if (first_key(p, s, i) >= end_key(p, s, i)) continue;
    const T* grad_out = row_of<const T>(w.p.grad_out, s, row);
    const T* out = row_of<const T>(p.out, s, row);
    VecF sum = zero();
    for (int64_t d = 0; d < p.head_dim; d += kLanes) {
      const VecF y = load_words(0.0f, out, d, p.head_dim);
      sum = fma(load_words(0.0f, grad_out, d, p.head_dim), y, sum);
    }
    const int64_t at =
        s.batch * p.lse_batch_stride + s.head(row) * p.lse_head_stride + s.q_offset + i;
    delta[r] = reduce_sum(sum) - w.p.grad_lse[at];
    lse[r] = p.lse[at] * log2_e;
  }
}

// ---- packing; an absent row is null and gives zeros

// A row of a left factor over dimensions, in words; of a right factor over rows where those are
// floats.
template <class Word, class T>
GEMMA2_INLINE void pack_row(const T* row, int64_t depth, int64_t padded, float* out) {
  for (int64_t d = 0; d < padded; d += kLanes)
    store(out + d, row && d < depth ? load_words(Word{}, row, d, depth) : zero());
}

// Two rows of a right factor over rows, as pairs.
template <class Word>
GEMMA2_INLINE void pack_row_pair(const BFloat16* even, const BFloat16* odd, int64_t padded,
                                 int64_t head_dim, float* out) {
  for (int64_t d = 0; d < padded; d += kTileCols) {
    const bool inside = d < head_dim;
    store_value_words(Word{}, inside ? even : nullptr, inside ? odd : nullptr, d, head_dim,
                      out + d);
  }
}

// Two vectors as bfloat16: by themselves, and as pairs (a[i], b[i]).
struct RoundedPairs {
  VecU16 a, b;
  VecU pairs;
};
GEMMA2_INLINE RoundedPairs round_pairs(VecF a, VecF b) {
#if defined(__AVX512BF16__)
  const auto both = (VecPairs)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
  VecPairs index;
  for (int i = 0; i < kLanes; ++i)
    index[2 * i] = uint16_t(i), index[2 * i + 1] = uint16_t(kLanes + i);
  const __mmask8 all = __mmask8(-1);
  return {(VecU16)_mm512_maskz_extracti64x4_epi64(all, (__m512i)both, 0),
          (VecU16)_mm512_maskz_extracti64x4_epi64(all, (__m512i)both, 1),
          (VecU)_mm512_permutexvar_epi16((__m512i)index, (__m512i)both)};
#else
  const VecU16 x = to_bfloat16(a), y = to_bfloat16(b);
  return {x, y, widen(x) | widen(y) << 16};
#endif
}

// ---- one block of keys

// P and dS of kLanes scores.
struct Weights {
  VecF p, ds;
};

GEMMA2_INLINE Weights weights_of(VecF dot, VecF product, float lse, float delta,
                                 const ScoreScale& c) {
  const VecF x = dot * set(c.inner);
  const VecF t = c.capped ? tanh_rational(x) : x;
  VecF above = (c.capped ? set(c.outer) * t : x) - set(lse);
  above = above > zero() ? zero() : above;  // by rounding only; keeps a NaN
  const VecF p = exp2_negative(above);
  const VecF ds = p * (product - set(delta));
  if (!c.capped) return {p, ds};
  // Past 9 the slope is below 2^-24, and 1 - t t is but tanh's rounding.
  const VecF slope = abs(x) > set(9.0f) ? zero() : set(1.0f) - t * t;
  return {p, ds * slope};
}

template <class T>
struct KeyBlock {
  using Word = typename Packed<T>::Word;
  static constexpr int kStep = kPerWord<Word>;

  const AttentionBackwardWork& w;
  const AttentionParams& p;
  const Sequence s;
  const int64_t key, n;  // keys [key, key + n) of the sequence
  const ScoreScale scale;
  // head_dim in words, those with zeros behind that products take, and in floats with the padding
  // of a tile.
  const int64_t words, depth, padded;
  // Keys of whole tiles and vectors.
  const int64_t columns;
  // Scratch. Right factors over dimensions: k_panels, v_panels; over keys: k_rows; over query rows:
  // q_rows, grad_out_rows. Left factors over dimensions: q, grad_out. The scores become P, and the
  // products of grad_out and v become dS, left factors over query rows; ds_keys is dS as a left
  // factor over keys. Where words are floats one copy is both. A factor of tiles is rows of words:
  // there P and dS over query rows are transposed to by_keys.
  float *k_panels, *v_panels, *k_rows, *grad_k, *grad_v;
  float *q, *grad_out, *q_rows, *grad_out_rows, *scores, *products, *ds_keys, *by_keys;
  int64_t from[kRows], to[kRows];  // keys of the block that a row sees; both rise
  int64_t next_row = 0;            // rows from here on are fetched, which the next block needs

  KeyBlock(const AttentionBackwardWork& work, const Sequence& sequence, int64_t first,
           int64_t count)
      : w(work),
        p(work.p.forward),
        s(sequence),
        key(first),
        n(count),
        scale(score_scale(work.p.forward)),
        words(work.p.forward.head_dim / kStep),
        depth(round_up(words, kDepthStep)),
        padded(attention_padded_dim(work.p.forward.head_dim)),
        columns(round_up(round_up(count, kRowsAtOnce), kLanes)) {
    float* free = w.scratch;
    const auto take = [&free](int64_t size) {
      float* part = free;
      free += size;
      return part;
    };
    const int64_t row_room = w.row_room, key_room = w.key_room;
    k_panels = take(key_room * padded), v_panels = take(key_room * padded);
    k_rows = take(key_room * kQueryStride);
    grad_k = take(key_room * kQueryStride), grad_v = take(key_room * kQueryStride);
    q = take(row_room * kQueryStride), grad_out = take(row_room * kQueryStride);
    scores = take(row_room * kWeightStride), products = take(row_room * kWeightStride);
    q_rows = q, grad_out_rows = grad_out, ds_keys = products;
    if (kStep == 2) {
      q_rows = take(row_room / 2 * kQueryStride), grad_out_rows = take(row_room / 2 * kQueryStride);
      ds_keys = take(row_room * kWeightStride);
    }
    by_keys = kInTiles ? take(key_room * kWeightStride) : nullptr;
  }

  void pack_keys_and_values() {
    const KeyRows<T> k{key_of<const T>(p.k, s, 0), p.k.seqlen_stride, key, INT64_MAX};
    const KeyRows<T> v{key_of<const T>(p.v, s, 0), p.v.seqlen_stride, key, INT64_MAX};
    pack_keys<Word>(k, n, words, depth, k_panels);
    pack_keys<Word>(v, n, words, depth, v_panels);
    for (int64_t j = 0; j < columns; j += kStep) {
      float* to_row = k_rows + j / kStep * kQueryStride;
      const T* row = j < n ? k.row(j) : nullptr;
      if constexpr (kStep == 1) {
        pack_row<Word>(row, words, padded, to_row);
      } else {
        pack_row_pair<Word>(row, j + 1 < n ? k.row(j + 1) : nullptr, padded, p.head_dim, to_row);
      }
    }
    for (int64_t j = 0; j < columns; ++j) {
      memset(grad_k + j * kQueryStride, 0, padded * sizeof(float));
      memset(grad_v + j * kQueryStride, 0, padded * sizeof(float));
    }
  }

  // Rows that see no key, or fill up the last tile, are zeros whatever they hold.
  void pack_rows(const RowBlock& block, int64_t rows, const float* lse) {
    const T* q_of[kRows];
    const T* grad_out_of[kRows];
    for (int64_t r = 0; r < rows; ++r) {
      const bool used = r < block.rows && lse[r] != INFINITY;
      q_of[r] = used ? row_of<const T>(p.q, s, block.begin + r) : nullptr;
      grad_out_of[r] = used ? row_of<const T>(w.p.grad_out, s, block.begin + r) : nullptr;
      pack_row<Word>(q_of[r], words, padded, q + r * kQueryStride);
      pack_row<Word>(grad_out_of[r], words, padded, grad_out + r * kQueryStride);
      if (r < block.rows) {
        const int64_t i = s.query(block.begin + r);
        from[r] = min64(n, max64(0, first_key(p, s, i) - key));
        to[r] = min64(n, max64(0, end_key(p, s, i) - key));
      } else {
        from[r] = from[r - 1], to[r] = to[r - 1];
      }
    }
    if constexpr (kStep == 2) {
      for (int64_t r = 0; r < rows; r += 2) {
        const int64_t at = r / 2 * kQueryStride;
        pack_row_pair<Word>(q_of[r], q_of[r + 1], padded, p.head_dim, q_rows + at);
        pack_row_pair<Word>(grad_out_of[r], grad_out_of[r + 1], padded, p.head_dim,
                            grad_out_rows + at);
      }
    }
  }

  // Fetches its share of the next block's rows, of so many tiles of products.
  void fetch_rows() {
    constexpr int64_t kTiles = 2 * (kKeys / kTileCols) * (kRows / kRowsAtOnce);
    const int64_t end = min64(next_row + (kRows + kTiles - 1) / kTiles, s.seqlen_q * s.group);
    for (; next_row < end; ++next_row) {
      const T* q_row = row_of<const T>(p.q, s, next_row);
      const T* grad_out_row = row_of<const T>(w.p.grad_out, s, next_row);
      for (int64_t d = 0; d < p.head_dim; d += kLineBytes / int64_t(sizeof(T)))
        prefetch(q_row + d), prefetch(grad_out_row + d);
    }
  }

  // out (rows, keys) = a (rows, head_dim) times panels (head_dim, keys), in the tiles where some
  // row sees some key.
  void multiply_panels(const float* a, const float* panels, int64_t rows, float* out) {
    for (int64_t c = 0; c < n; c += kTileCols) {
      for (int64_t r = 0; r < rows; r += kRowsAtOnce) {
        if (from[r] >= c + kTileCols || to[r + kRowsAtOnce - 1] <= c) continue;
        fetch_rows();
        NoFetcher none;
        multiply_rows<kQueryStride, kTileCols, false>(
            kRowsAtOnce, (const Word*)a + r * kQueryStride, panels + c * depth, depth,
            out + r * kWeightStride + c, kWeightStride, none, 0);
      }
    }
  }

  GEMMA2_INLINE Weights visible_weights(int64_t r, int64_t j, const float* lse,
                                        const float* delta) {
    const int64_t at = r * kWeightStride + j;
    Weights y = weights_of(load(scores + at), load(products + at), lse[r], delta[r], scale);
    if (j < from[r] || j + kLanes > to[r]) {
      VecI column;
      for (int i = 0; i < kLanes; ++i) column[i] = int32_t(j) + i;
      const VecI inside = (column >= int32_t(from[r])) & (column < int32_t(to[r]));
      y.p = inside ? y.p : zero();
      y.ds = inside ? y.ds : zero();
    }
    return y;
  }

  // P and dS in the place of scores and products, 0 where a row does not see a key. A pair of rows
  // takes the place of its first row.
  void weigh(int64_t rows, const float* lse, const float* delta) {
    for (int64_t r = 0; r < rows; r += kStep) {
      float* p_row = scores + r * kWeightStride;
      float* ds_row = products + r * kWeightStride;
      BFloat16* even_keys = (BFloat16*)(ds_keys + r * kWeightStride);
      BFloat16* odd_keys = even_keys + 2 * kWeightStride;
      const int64_t last = r + kStep - 1;
      const bool none = from[r] >= to[r] && from[last] >= to[last];
      const int64_t begin = none ? 0 : from[r] / kLanes * kLanes;
      const int64_t end = none ? 0 : (to[last] + kLanes - 1) / kLanes * kLanes;
      for (int64_t j = 0; j < columns; j += kLanes) {
        if (j >= begin && j < end) {
          const Weights a = visible_weights(r, j, lse, delta);
          if constexpr (kStep == 1) {
            store(p_row + j, a.p);
            store(ds_row + j, a.ds);
          } else {
            const Weights b = visible_weights(last, j, lse, delta);
            const RoundedPairs p_pairs = round_pairs(a.p, b.p), ds = round_pairs(a.ds, b.ds);
            store(p_row + j, (VecF)p_pairs.pairs);
            store(ds_row + j, (VecF)ds.pairs);
            memcpy(even_keys + j, &ds.a, sizeof ds.a);
            memcpy(odd_keys + j, &ds.b, sizeof ds.b);
          }
        } else {
          store(p_row + j, zero());
          store(ds_row + j, zero());
          if constexpr (kStep == 2) {
            store(even_keys + j, zero());
            store(odd_keys + j, zero());
          }
        }
      }
    }
  }

  // Words [pair of rows][key] to [key][pair of rows].
  void transpose_weights(const float* weights, int64_t rows) {
    for (int64_t j = 0; j < columns; j += kLanes) {
      for (int64_t pair = 0; pair < rows / 2; pair += kLanes) {
        VecF v[kLanes];
        GEMMA2_UNROLL
        for (int i = 0; i < kLanes; ++i) v[i] = load(weights + (pair + i) * 2 * kWeightStride + j);
        transpose(v);
        GEMMA2_UNROLL
        for (int i = 0; i < kLanes; ++i) store(by_keys + (j + i) * kWeightStride + pair, v[i]);
      }
    }
  }

  // What add_to_keys does, by tiles.
  void add_tiles_to_keys(const float* weights, const float* right, int64_t rows, float* sums) {
    transpose_weights(weights, rows);
    for (int64_t d = 0; d < p.head_dim; d += kTileCols) {
      int64_t begin = 0, end = 0;
      for (int64_t c = 0; c < n; c += kRowsAtOnce) {
        while (begin < rows && to[begin] <= c) ++begin;
        while (end < rows && from[end] < c + kRowsAtOnce) ++end;
        const int64_t first = begin / kStep / kDepthStep * kDepthStep;
        const int64_t last = round_up(end, kStep * kDepthStep) / kStep;
        if (begin >= end) continue;
        NoFetcher none;
        multiply_rows<kWeightStride, kQueryStride, true>(
            kRowsAtOnce, (const Word*)by_keys + c * kWeightStride + first,
            right + first * kQueryStride + d, last - first, sums + c * kQueryStride + d,
            kQueryStride, none, 0);
      }
    }
  }

  // sums (keys, head_dim) += weights^T (keys, rows) times right (rows, head_dim).
  void add_to_keys(const float* weights, const float* right, int64_t rows, float* sums) {
    for (int64_t d = 0; d < p.head_dim; d += kTileCols) {
      int64_t begin = 0, end = 0;  // rows that see some key of the tile
      for (int64_t c = 0; c < n; c += kTileRows) {
        while (begin < rows && to[begin] <= c) ++begin;
        while (end < rows && from[end] < c + kTileRows) ++end;
        const int64_t first = begin / kStep, words = (end + kStep - 1) / kStep - first;
        if (words <= 0) continue;
        multiply_tile<1, kStep * kWeightStride, kQueryStride, true>(
            (const Word*)weights + first * kStep * kWeightStride + c,
            right + first * kQueryStride + d, words, sums + c * kQueryStride + d, kQueryStride);
      }
    }
  }

  // Fetches a tile of sums.
  void fetch_sums(const float* sums, int64_t r, int64_t d) {
    for (int64_t i = 0; i < kRowsAtOnce; ++i) {
      for (int64_t at = d; at < d + kTileCols; at += kLineBytes / int64_t(sizeof(float)))
        prefetch_near(sums + (r + i) * padded + at);
    }
  }

  // sums (rows, head_dim) += dS (rows, keys) times k_rows (keys, head_dim).
  void add_to_rows(int64_t rows, float* sums) {
    for (int64_t d = 0; d < p.head_dim; d += kTileCols) {
      for (int64_t r = 0; r < rows; r += kRowsAtOnce) {
        const bool last = r + kRowsAtOnce >= rows;  // of a column of tiles
        fetch_sums(sums, last ? 0 : r + kRowsAtOnce, last ? d + kTileCols : d);
        const int64_t first = from[r] / kStep / kDepthStep * kDepthStep;
        const int64_t end = round_up(to[r + kRowsAtOnce - 1], kStep * kDepthStep) / kStep;
        if (first >= end) continue;
        NoFetcher none;
        multiply_rows<kWeightStride, kQueryStride, true>(
            kRowsAtOnce, (const Word*)(ds_keys + r * kWeightStride) + first,
            k_rows + first * kQueryStride + d, end - first, sums + r * padded + d, padded, none, 0);
      }
    }
  }

  void meet(const RowBlock& block) {
    const int64_t rows = round_up(block.rows, kRowsAtOnce);
    const float* delta = w.row_terms + block.index * 2 * w.row_room;
    const float* lse = delta + w.row_room;
    pack_rows(block, rows, lse);
    next_row = block.begin + kRows;
    multiply_panels(q, k_panels, rows, scores);
    multiply_panels(grad_out, v_panels, rows, products);
    weigh(rows, lse, delta);
    if constexpr (kInTiles) {
      add_tiles_to_keys(scores, grad_out_rows, rows, grad_v);
      add_tiles_to_keys(products, q_rows, rows, grad_k);
    } else {
      add_to_keys(scores, grad_out_rows, rows, grad_v);
      add_to_keys(products, q_rows, rows, grad_k);
    }

    // Blocks of keys begin at multiples of kKeys from the sequence's first key.
    const int64_t turn = (key - s.start) / kKeys - (block.first_key - s.start) / kKeys;
    int32_t* done = w.turns + block.index;
    for (int tries = 0; __atomic_load_n(done, __ATOMIC_ACQUIRE) != turn;) {
      if (tries < 1000)
        ++tries;
      else
        sched_yield();
    }
    float* sums = w.grad_q + block.index * w.row_room * padded;
    if (turn == 0) memset(sums, 0, rows * padded * sizeof(float));
    add_to_rows(rows, sums);
    if (key + n >= block.end_key) {
      for (int64_t r = 0; r < block.rows; ++r) {
        store_scaled(sums + r * padded, float(p.scale), p.head_dim,
                     row_of<T>(w.p.grad_q, s, block.begin + r));
      }
    }
    __atomic_store_n(done, int32_t(turn + 1), __ATOMIC_RELEASE);
  }

  void store_sums() {
    for (int64_t j = 0; j < n; ++j) {
      T* to_k = key_of<T>(w.p.grad_k, s, key + j);
      T* to_v = key_of<T>(w.p.grad_v, s, key + j);
      store_scaled(grad_k + j * kQueryStride, float(p.scale), p.head_dim, to_k);
      store_scaled(grad_v + j * kQueryStride, 1.0f, p.head_dim, to_v);
    }
  }
};

}  // namespace

#if !defined(GEMMA2_ISA_avx512_amx)
// A unit is (block of query rows, sequence, key head).
void attention_backward_rows(const AttentionBackwardWork& w, int64_t begin, int64_t end) {
  const AttentionParams& p = w.p.forward;
  dispatch_dtype(p.dtype, [&](auto t) {
    for (int64_t index = begin; index < end; ++index) {
      const int64_t heads = p.batch * p.num_kv_heads, at = index % heads, block = index / heads;
      const Sequence s = make_sequence(p, at / p.num_kv_heads, at % p.num_kv_heads);
      if (block < row_blocks(s)) prepare_rows<decltype(t)>(w, s, row_block(w, s, block));
    }
  });
}

#endif

// By tiles bfloat16 alone.
void attention_backward_keys(const AttentionBackwardWork& w, int64_t begin, int64_t end) {
  const AttentionParams& p = w.p.forward;
  const auto run = [&](auto t) {
    for (int64_t index = begin; index < end; ++index) {
      const int64_t heads = p.batch * p.num_kv_heads, at = index % heads, block = index / heads;
      const Sequence s = make_sequence(p, at / p.num_kv_heads, at % p.num_kv_heads);
      const int64_t key = s.start + block * kKeys;
      if (key >= s.length) continue;
      KeyBlock<decltype(t)> keys(w, s, key, min64(kKeys, s.length - key));
      keys.pack_keys_and_values();
      for (int64_t i = 0; i < row_blocks(s); ++i) {
        const RowBlock rows = row_block(w, s, i);
        if (rows.sees(key, keys.n)) keys.meet(rows);
      }
      keys.store_sums();
    }
  };
#if defined(GEMMA2_ISA_avx512_amx)
  const Tiles tiles(kTileWords);
  run(BFloat16{});
#else
  dispatch_dtype(p.dtype, run);
#endif
}

}  // namespace GEMMA2_ISA
}  // namespace gemma2
