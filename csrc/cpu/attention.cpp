// out = softmax(softcap * tanh(scale * q k^T / softcap) + mask) v, with grouped query heads, causal
// and sliding-window masks, padding, variable lengths and ring caches; q (batch, seqlen_q,
// num_heads, head_dim), k and v (batch, seqlen_k, num_kv_heads, head_dim).
//
// A unit is (block of query rows of a group, sequence, key head or heads, split of the keys). It
// walks over the keys that its rows see, a block at a time, with the online softmax; no row is
// longer than a block in memory. Many rows: K and V blocks are packed and meet the rows in register
// tiles (arithmetic bounds it). Few rows, as in decoding: keys are read once where they lie (memory
// bounds it), and the keys are split over units. int8 keys (K is their type, T that of queries)
// become T where they are packed; for few rows scores and weights take their factors instead.
// Source: FlashAttention-2 (arXiv 2307.08691), Flash-Decoding.
#include "attention_few_rows.h"
#include "attention_int8.h"
#include "attention_many_rows.h"
#include "kernels.h"

namespace gemma2 {
namespace GEMMA2_ISA {
namespace {

// ---- few rows

template <class T, class K, class Fetch>
struct Stream {
  using Word = typename Packed<K>::Word;
  const AttentionWork& w;
  const Unit& u;
  const AttentionParams& p = w.p;
  ScoreScale scale = score_scale(p);
  // Key heads, the room for rows of each, and these rows with those that fill up the last step.
  int64_t heads = w.unit_heads, head_rows = w.block_rows, steps = attention_stream_rows(u.rows);
  int64_t rows = heads * head_rows, o_stride = attention_padded_dim(p.head_dim);
  float *q = w.scratch, *s = q + rows * kQueryStride;
  float* o = s + attention_score_rows(rows) * kScoreStride;
  K* room = (K*)(o + rows * o_stride);  // (kKeyBlock, head_dim), where there are several heads
  float largest[kAttentionStreamRows] = {}, sum[kAttentionStreamRows] = {};
  float k_factors[kKeyBlock] = {}, v_factors[kKeyBlock] = {};  // of int8 rows; 0 past those at work
  float q_factors[kAttentionStreamRows] = {};                  // where q is in integers
  // The first key that a row sees, and the end of those, where rows are taken in steps.
  int64_t first_keys[kAttentionStreamRows] = {}, end_keys[kAttentionStreamRows] = {};

  void set_query(int64_t r, const T* row) {
    float* to = q + r * kQueryStride;
#if defined(GEMMA2_ISA_avx512_bf16)
    if constexpr (kInIntegers<T, K>) {
      q_factors[r] = split_query(row, p.head_dim, (uint8_t*)to);
      return;
    }
#endif
    constexpr int kPart = kParts<Word, K>;
    const int64_t depth = p.head_dim / kPerWord<Word>;
    for (int64_t d = 0; d < depth; d += kPart * kLanes) {
      VecF words[kPart];
      load_parts<Word>(row, d, depth, words);
      for (int i = 0; i < kPart; ++i) store(to + d + i * kLanes, words[i]);
    }
  }

  // The weights of kRows rows of scores; what came before is scaled to fit.
  template <int kRows, class First, class Last>
  void softmax(int64_t r, float* scores, First first, Last last) {
    float factors[kRows];
    softmax_rows<kRows, Word>(scores, kKeyBlock, first, last, scale, largest + r, sum + r, factors);
    scale_rows<kRows>(r, factors);
  }
  template <int kRows>
  void scale_rows(int64_t r, const float* factors) {
    for (int i = 0; i < kRows; ++i) {
      if (factors[i] != 1.0f) scale_row(o + (r + i) * o_stride, o_stride, factors[i]);
    }
  }

  // n keys, of which the first is number `first` of its block.
  template <int kRows, class Rows>
  void block(int64_t r, int64_t first, int64_t n, const Rows& k, const Rows& v) {
#if defined(GEMMA2_ISA_avx512_bf16)
    if constexpr (kInIntegers<T, K>) {
      block_in_integers<kRows>(r, first, n, k, v);
    } else
#endif
    {
      if (heads == 1)
        meet<kRows>(r, first, n, k, v, OneHead{}, OneHead{});
      else
        meet<kRows>(r, first, n, k, v, Heads{heads, head_rows, p.k.head_stride},
                    Heads{heads, head_rows, p.v.head_stride});
    }
  }
  template <int kRows, class Rows, class Heads>
  void meet(int64_t r, int64_t first, int64_t n, const Rows& k, const Rows& v, const Heads& k_heads,
            const Heads& v_heads) {
    dot_keys<kRows, Fetch>(Word{}, q + r * kQueryStride, k, n, p.head_dim / kPerWord<Word>,
                           s + first, k_heads);
    for (int64_t h = 0; h < k_heads.count; ++h) {
      float* scores = s + h * k_heads.rows * kScoreStride;
      for (int i = 0; kScaled<K> && i < kRows; ++i)
        multiply_row(scores + i * kScoreStride, k_factors);
      softmax<kRows>(
          h * k_heads.rows + r, scores, [&](int) { return first; }, [&](int) { return first + n; });
      for (int i = 0; kScaled<K> && i < kRows; ++i)
        multiply_row(scores + i * kScoreStride, v_factors);
    }
    add_values<kRows, Fetch>(Word{}, s, v, first, n, p.head_dim, o + r * o_stride, o_stride,
                             v_heads);
  }

#if defined(GEMMA2_ISA_avx512_bf16)
  template <int kRows>
  void block_in_integers(int64_t r, int64_t first, int64_t n, const KeyRows<int8_t>& k,
                         const KeyRows<int8_t>& v) {
    dot_keys<kRows, Fetch>(q + r * kQueryStride, k, n, p.head_dim, s + first);
    for (int i = 0; i < kRows; ++i) {
      multiply_row(s + i * kScoreStride, k_factors, q_factors[r + i]);
    }
    float factors[kRows];
    softmax_rows<kRows, float>(
        s, kKeyBlock, [&](int) { return first; }, [&](int) { return first + n; }, scale,
        largest + r, sum + r, factors);
    SplitWeights w[kRows];
    for (int i = 0; i < kRows; ++i) {
      float *weights = s + i * kScoreStride, *to = o + (r + i) * o_stride;
      if (factors[i] != 1.0f) scale_row(to, o_stride, factors[i]);
      multiply_row(weights, v_factors);
      if (split_weights(weights, w[i])) continue;
      add_values_in_floats(weights + first, v, n, p.head_dim, to);
      w[i] = {};
    }
    constexpr int kAtOnce = kRows < 2 ? 1 : 2;  // with their sums in registers
    for (int i = 0; i < kRows; i += kAtOnce)
      add_values<kAtOnce, Fetch>(w + i, v, first, n, p.head_dim, o + (r + i) * o_stride, o_stride);
  }
#endif

#if defined(GEMMA2_BFLOAT16_PAIRS)
  // What head h of the unit fetches of a block that begins with key j of `rows`: all heads' rows of
  // some of its keys, so that together they fetch it as it lies.
  LineFetcher fetcher(const KeyRows<K>& rows, int64_t j, int64_t h, int64_t head_stride) const {
    const int64_t share = (kKeyBlock + heads - 1) / heads;
    return make_fetcher(rows, j + h * share, (heads - 1) * head_stride + p.head_dim);
  }

  // All rows meet keys [begin, end) of one block, each those of them that it sees.
  void shared_keys(int64_t begin, int64_t end) {
    const KeyRows<K> k = key_rows<K>(p, u, u.k, p.k, begin);
    const KeyRows<K> v = key_rows<K>(p, u, u.v, p.v, begin);
    const int64_t first = begin % kKeyBlock, n = end - begin;
    const Heads k_heads{heads, head_rows, p.k.head_stride};
    const Heads v_heads{heads, head_rows, p.v.head_stride};
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t row = h * head_rows;
      // One head's values of this block are in time; of several, the next block's.
      dot_block(q + row * kQueryStride, steps, of_head(k, k_heads, h), n, p.head_dim / 2, s + first,
                fetcher(v, heads > 1 ? n : 0, h, p.v.head_stride));
      for (int64_t r = 0; r < steps; r += kAttentionRowStep) {
        int64_t from[kAttentionRowStep], to[kAttentionRowStep];
        for (int i = 0; i < kAttentionRowStep; ++i) {
          from[i] = first + min64(n, max64(0, first_keys[r + i] - begin));
          to[i] = first + min64(n, max64(0, end_keys[r + i] - begin));
        }
        softmax<kAttentionRowStep>(
            row + r, s + r * kScoreStride, [&](int i) { return from[i]; },
            [&](int i) { return to[i]; });
      }
      // Rows that far apart would compete for few sets of the first cache.
      const KeyRows<K> values = of_head(v, v_heads, h);
      for (int64_t j = 0; j < n && heads > 1; ++j)
        memcpy(room + j * p.head_dim, values.row(j), p.head_dim * sizeof(K));
      add_block(s, steps, heads > 1 ? KeyRows<K>{room, p.head_dim, 0, INT64_MAX} : values, first, n,
                p.head_dim, o + row * o_stride, o_stride, fetcher(k, n, h, p.k.head_stride));
    }
  }

  // How many of the blocks from key `begin` on, up to `end`, go as a span: whole ones, of rows that
  // lie one behind another.
  int64_t span_blocks(int64_t begin, int64_t end) const {
    const int64_t dim = p.head_dim;
    const bool dense = heads == 1 && p.k.seqlen_stride == dim && p.v.seqlen_stride == dim;
    if (!dense || (dim != 256 && dim != 128)) return 0;
    const KeyRows<K> k = key_rows<K>(p, u, u.k, p.k, begin);
    int64_t blocks = min64(kAttentionSpanBlocks, (end - begin) / kKeyBlock);
    while (blocks > 0 && !k.in_line(0, blocks * kKeyBlock)) --blocks;
    return blocks;
  }

  // Rows meet the keys of all blocks of a span and then their values: memory is faster where what
  // is read changes less often.
  void span(int64_t begin, int64_t blocks) {
    int64_t r = 0;
    for (; r + 4 <= u.rows; r += 4) meet_span<4>(r, begin, blocks);
    for (; r + 2 <= u.rows; r += 2) meet_span<2>(r, begin, blocks);
    for (; r < u.rows; ++r) meet_span<1>(r, begin, blocks);
  }
  template <int kRows>
  void meet_span(int64_t r, int64_t begin, int64_t blocks) {
    if (p.head_dim == 256)
      meet_span<kRows, 256>(r, begin, blocks);
    else
      meet_span<kRows, 128>(r, begin, blocks);
  }
  template <int kRows, int kDim>
  void meet_span(int64_t r, int64_t begin, int64_t blocks) {
    constexpr int64_t kBlock = kKeyBlock * kDim, kScores = kRows * kScoreStride;
    const K* k = key_rows<K>(p, u, u.k, p.k, begin).row(0);
    const KeyRows<K> values = key_rows<K>(p, u, u.v, p.v, begin);
    const K* v = values.row(0);
    // Keys of this unit behind the span may be read.
    const int64_t rest = u.key_end - begin;
    const K* end = v + (values.in_line(0, rest) ? rest : blocks * kKeyBlock) * kDim;
    float factors[kAttentionSpanBlocks][kRows];
    for (int64_t i = 0; i < blocks; ++i) {
      float* scores = s + i * kScores;
      dot_dense<kRows, kDim, Fetch>(q + r * kQueryStride, k + i * kBlock, scores);
      softmax_rows<kRows, Word>(
          scores, kKeyBlock, [](int) { return 0; }, [](int) { return kKeyBlock; }, scale,
          largest + r, sum + r, factors[i]);
    }
    float* to = o + r * o_stride;
    for (int64_t i = 0; i < blocks; ++i) {
      scale_rows<kRows>(r, factors[i]);
      add_dense<kRows, kDim, Fetch>((const Pair*)(s + i * kScores), v + i * kBlock, end, to,
                                    o_stride);
    }
  }

  // Fetches the first block of keys, as no block before it has.
  void fetch(int64_t begin, int64_t end) const {
    const KeyRows<K> k = key_rows<K>(p, u, u.k, p.k, begin);
    const KeyRows<K> v = key_rows<K>(p, u, u.v, p.v, begin);
    for (int64_t j = 0; j < end - begin; ++j) {
      for (int64_t h = 0; h < heads; ++h) {
        for (int64_t d = 0; d < p.head_dim; d += kLineBytes / int64_t(sizeof(K))) {
          prefetch(k.row(j) + h * p.k.head_stride + d);
          if (heads > 1) prefetch(v.row(j) + h * p.v.head_stride + d);
        }
      }
    }
  }

  bool finite_values(int64_t begin, int64_t end) const {
    const KeyRows<K> v = key_rows<K>(p, u, u.v, p.v, begin);
    for (int64_t j = 0; j < end - begin; ++j) {
      for (int64_t h = 0; h < heads; ++h) {
        if (not_finite(v.row(j) + h * p.v.head_stride, p.head_dim)) return false;
      }
    }
    return true;
  }
#endif

  // Rows [row_begin, row_end) meet keys [begin, end) of one block, all of which they see.
  void keys(int64_t row_begin, int64_t row_end, int64_t begin, int64_t end) {
    if (begin >= end) return;
    const KeyRows<K> k = key_rows<K>(p, u, u.k, p.k, begin);
    const KeyRows<K> v = key_rows<K>(p, u, u.v, p.v, begin);
    const int64_t first = begin % kKeyBlock, n = end - begin;
    if (kScaled<K>) {
      memset(k_factors, 0, sizeof k_factors);
      memset(v_factors, 0, sizeof v_factors);
      load_factors(p, u, p.k_scales, begin, n, k_factors + first);
      load_factors(p, u, p.v_scales, begin, n, v_factors + first);
    }
    if constexpr (kPerWord<Word> == 1 && !kInIntegers<T, K>) {
      const K *k_rows[kBlockRows], *v_rows[kBlockRows];
      list_rows(k, n, k_rows), list_rows(v, n, v_rows);
      const bool far = row_end - row_begin > 4 &&
                       4 * heads * kKeyBlock * p.head_dim * int64_t(sizeof(K)) <= kFarRoom;
      const int64_t ahead = far ? kKeyBlock : Fetch::template kAhead<K>;
      blocks(row_begin, row_end, first, n, ListedRows<K>{k_rows, 0, ahead},
             ListedRows<K>{v_rows, 0, ahead});
    } else {
      blocks(row_begin, row_end, first, n, k, v);
    }
  }
  template <class Rows>
  void blocks(int64_t r, int64_t end, int64_t first, int64_t n, const Rows& k, const Rows& v) {
    for (; r + 4 <= end; r += 4) block<4>(r, first, n, k, v);
    for (; r + 2 <= end; r += 2) block<2>(r, first, n, k, v);
    for (; r < end; ++r) block<1>(r, first, n, k, v);
  }
};

template <class T, class K, class Fetch>
void stream_unit(const AttentionWork& w, const Unit& u, [[maybe_unused]] bool fetch) {
  using Word = typename Packed<K>::Word;
  constexpr int kPart = kParts<Word, K>;
  const AttentionParams& p = w.p;
  constexpr bool kSteps = kPerWord<Word> == 2;  // whether rows are taken in steps
  Stream<T, K, Fetch> stream{w, u};
  for (int64_t i = 0; i < stream.rows; ++i) stream.largest[i] = -INFINITY;
  for (float* at = stream.o; at < stream.o + stream.rows * stream.o_stride; at += kLanes)
    store(at, zero());
  for (int64_t h = 0; h < stream.heads; ++h) {
    for (int64_t r = 0; r < u.rows; ++r)
      stream.set_query(h * stream.head_rows + r, query_row<T>(p, head_of(u, h), r));
  }
  const bool shared = kSteps && stream.steps >= kAttentionSharedRows;
  for (int64_t r = 0; shared && r < stream.steps; ++r) {
    const int64_t i = u.query(min64(r, u.rows - 1));
    stream.first_keys[r] = first_key(p, u, i), stream.end_keys[r] = end_key(p, u, i);
    for (int64_t h = 0; r >= u.rows && h < stream.heads; ++h)
      memset(stream.q + (h * stream.head_rows + r) * kQueryStride, 0, kQueryStride * 4);
  }

  // Keys that all rows see serve all rows at once. A block of which some rows see a part is taken
  // position by position where a weight of 0 would not hide a value, as that is not finite.
  const int64_t last = u.query(u.rows - 1);
  const int64_t common_begin = first_key(p, u, last), common_end = end_key(p, u, u.query(0));
  for (int64_t j = u.key_begin / kKeyBlock * kKeyBlock; j < u.key_end; j += kKeyBlock) {
    const int64_t begin = max64(j, u.key_begin), end = min64(j + kKeyBlock, u.key_end);
    const bool common = common_begin <= begin && end <= common_end;
#if defined(GEMMA2_BFLOAT16_PAIRS)
    if constexpr (kSteps) {
      if (shared && (common || stream.finite_values(begin, end))) {
        if (fetch && begin == u.key_begin) stream.fetch(begin, end);
        stream.shared_keys(begin, end);
        continue;
      }
      const int64_t blocks =
          common && begin == j ? stream.span_blocks(j, min64(u.key_end, common_end)) : 0;
      if (blocks > 0) {
        stream.span(j, blocks);
        j += (blocks - 1) * kKeyBlock;
        continue;
      }
    }
#endif
    if (common) {
      stream.keys(0, u.rows, begin, end);
      continue;
    }
    for (int64_t r = 0; r < u.rows; r += u.group) {
      const int64_t i = u.query(r);
      stream.keys(r, r + u.group, max64(begin, first_key(p, u, i)), min64(end, end_key(p, u, i)));
    }
  }
  float* o = stream.o;
  if (kPart > 1) {  // even and odd elements lie apart
    for (float* at = o; at < o + stream.rows * stream.o_stride; at += 2 * kLanes) {
      const VecF even = load(at), odd = load(at + kLanes);
      store(at, interleave_lower(even, odd));
      store(at + kLanes, interleave_upper(even, odd));
    }
  }
#if defined(GEMMA2_BFLOAT16_PAIRS)
  if constexpr (kSteps) sort_parts(o, stream.rows * stream.o_stride);
#endif
#if defined(GEMMA2_ISA_avx512_bf16)
  if constexpr (kInIntegers<T, K>) {
    for (int64_t r = 0; r < u.rows; ++r) sort_joined(o + r * stream.o_stride, p.head_dim);
  }
#endif
  for (int64_t h = 0; h < stream.heads; ++h) {
    const int64_t at = h * stream.head_rows;
    finish_unit<T>(w, head_of(u, h), o + at * stream.o_stride, stream.o_stride, stream.largest + at,
                   stream.sum + at);
  }
}

template <class T, class K>
void units(const AttentionWork& w, int64_t begin, int64_t end) {
  for (int64_t index = begin; index < end; ++index) {
    Unit u;
    if (!make_unit<K>(w, index, u)) continue;
    if (w.stream) {
      const bool fetch = u.split == 0 || *w.next != index;
#if defined(GEMMA2_ISA_avx512_bf16)
      (w.zen4 ? stream_unit<T, K, FetchFar> : stream_unit<T, K, FetchNear>)(w, u, fetch);
#else
      stream_unit<T, K, FetchNear>(w, u, fetch);
#endif
      *w.next = index + 1;
    } else {
      tile_unit<T, K>(w, u);
    }
  }
}

}  // namespace

void attention_units(const AttentionWork& w, int64_t begin, int64_t end) {
  dispatch_dtype(w.p.dtype, [&](auto t) {
    using T = decltype(t);
    if (w.p.k_scales.data)
      units<T, int8_t>(w, begin, end);
    else
      units<T, T>(w, begin, end);
  });
}

// A unit is a (sequence, key head): the splits of its rows, in their order.
void attention_combine(const AttentionWork& w, int64_t begin, int64_t end) {
  dispatch_dtype(w.p.dtype, [&](auto t) {
    using T = decltype(t);
    const int64_t stride = w.p.head_dim + 2;
    AttentionWork of_heads = w;
    of_heads.unit_heads = 1;
    for (int64_t index = begin; index < end; ++index) {
      Unit u;
      if (!make_unit<T>(of_heads, index * w.splits, u)) continue;
      for (int64_t r = 0; r < u.rows; ++r) {
        // The first split takes the sum.
        float* total = w.partial + (index * w.splits * w.block_rows + r) * stride;
        float* parts_end = total + w.splits * w.block_rows * stride;
        float& largest = total[w.p.head_dim];
        float& sum = total[w.p.head_dim + 1];
        for (float* part = total + w.block_rows * stride; part < parts_end;
             part += w.block_rows * stride) {
          const float part_max = part[w.p.head_dim], part_sum = part[w.p.head_dim + 1];
          if (part_sum == 0) continue;
          const bool rises = !(part_max <= largest);
          float factors[kLanes];
          store(factors, exp2_negative(set(rises ? largest - part_max : part_max - largest)));
          const float old_factor = rises ? factors[0] : 1.0f, factor = rises ? 1.0f : factors[0];
          for (int64_t d = 0; d < w.p.head_dim; ++d)
            total[d] = total[d] * old_factor + part[d] * factor;
          sum = sum * old_factor + part_sum * factor;
          if (rises) largest = part_max;
        }
        float row[256];
        memcpy(row, total, w.p.head_dim * 4);
        finish_row<T>(w.p, u, r, row, largest, sum);
      }
    }
  });
}

}  // namespace GEMMA2_ISA
}  // namespace gemma2
