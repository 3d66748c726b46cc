// Pieces of attention: the online softmax, packing, and the register tile of the products for
// blocks of rows. (For few rows: attention_few_rows.h.)
//
// Packed matrices consist of 32-bit words along the depth of the product: a float, or a pair of
// bfloat16 where the machine multiplies those directly. So one tile loop serves both.
#pragma once
#include <math.h>

#include "attention.h"
#include "simd.h"
#if defined(GEMMA2_ISA_avx512_amx)
#include "tiles.h"
#endif

namespace gemma2 {
namespace GEMMA2_ISA {
namespace {

constexpr int64_t kRowBlock = kAttentionRowBlock, kKeyBlock = kAttentionKeyBlock;
// Longest sum of a float product: a matrix product by a good library rounds no worse.
constexpr int64_t kDepthBlock = 64;
constexpr int64_t kQueryStride = kAttentionQueryStride, kScoreStride = kAttentionScoreStride;

GEMMA2_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
GEMMA2_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
GEMMA2_INLINE int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

// One sequence and key head of a batch.
struct Sequence {
  int64_t batch, kv_head;
  int64_t group, seqlen_q, length, start;  // keys [start, length)
  int64_t q_offset, k_offset;              // of the sequence in q's and k's rows

  // Rows are numbered position * group + head.
  GEMMA2_INLINE int64_t query(int64_t row) const { return row / group; }
  GEMMA2_INLINE int64_t head(int64_t row) const { return kv_head * group + row % group; }
};

GEMMA2_INLINE Sequence make_sequence(const AttentionParams& p, int64_t batch, int64_t kv_head) {
  Sequence s{batch, kv_head, p.num_heads / p.num_kv_heads, p.seqlen_q, p.seqlen_k, 0, 0, 0};
  if (p.cu_seqlens_q) {
    s.q_offset = p.cu_seqlens_q[batch], s.seqlen_q = p.cu_seqlens_q[batch + 1] - s.q_offset;
    s.k_offset = p.cu_seqlens_k[batch], s.length = p.cu_seqlens_k[batch + 1] - s.k_offset;
  }
  if (p.key_lengths) s.length = p.key_lengths[batch];
  if (p.key_starts) s.start = p.key_starts[batch];
  return s;
}

// The first key that query i sees, and the end of those; both rise with i.
GEMMA2_INLINE int64_t first_key(const AttentionParams& p, const Sequence& s, int64_t i) {
  int64_t first = s.start;
  if (p.window) first = max64(first, s.length - s.seqlen_q + i - p.window + 1);
  return p.capacity ? max64(first, s.length - p.capacity) : first;
}
GEMMA2_INLINE int64_t end_key(const AttentionParams& p, const Sequence& s, int64_t i) {
  const int64_t end = p.causal ? min64(s.length, s.length - s.seqlen_q + i + 1) : s.length;
  return max64(end, first_key(p, s, i));
}

// Accumulators of a tile: 12 of 16 registers, or 24 of 32; or those of AMX.
#if defined(GEMMA2_ISA_avx512_amx)
constexpr int kTileRows = kTileLines;
#else
constexpr int kTileRows = kLanes >= 16 || kRegisters == 32 ? 12 : 6;
#endif
constexpr int kTileVecs = 2;
constexpr int kTileCols = kTileVecs * kLanes;
static_assert(kRowBlock % kTileRows == 0 && kKeyBlock % kTileCols == 0 && 32 % kTileCols == 0, "");

// ---- words

struct Pair {
  uint32_t bits;  // two bfloat16, the first in the lower half
};
typedef uint16_t VecPairs __attribute__((vector_size(kLanes * 4)));

template <class T>
struct Packed {
  using Word = float;
};
#if defined(GEMMA2_BFLOAT16_PAIRS)
template <>
struct Packed<BFloat16> {
  using Word = Pair;
};
#endif

template <class Word>
constexpr int kPerWord = 1;
template <>
constexpr int kPerWord<Pair> = 2;

GEMMA2_INLINE VecF broadcast(float x) { return set(x); }
GEMMA2_INLINE VecF broadcast(Pair x) { return (VecF)(x.bits + VecU{}); }

// sum + a * b, over both halves of pairs.
GEMMA2_INLINE VecF multiply_add(float, VecF a, VecF b, VecF sum) { return fma(a, b, sum); }
#if defined(GEMMA2_BFLOAT16_PAIRS)
GEMMA2_INLINE VecF multiply_add(Pair, VecF a, VecF b, VecF sum) {
  return dot_pairs(sum, (VecU)a, (VecU)b);
}
#endif

// kLanes words of a row of `depth` words from word k on; zero past the end.
template <class T>
GEMMA2_INLINE VecF load_words(float, const T* row, int64_t k, int64_t depth) {
  return k + kLanes <= depth ? load(row + k) : load_n(row + k, depth - k);
}
GEMMA2_INLINE VecF load_words(Pair, const BFloat16* row, int64_t k, int64_t depth) {
#if defined(__AVX512F__)
  const float* words = (const float*)(row + 2 * k);
  return k + kLanes <= depth ? load(words) : load_n(words, depth - k);
#else
  VecF words = zero();
  memcpy(&words, row + 2 * k, 4 * min64(kLanes, depth - k));
  return words;
#endif
}

// For few rows bfloat16 are read two vectors at once, which come apart into the even and the odd
// elements by a shift and a mask; widening one half and then the other takes two more.
template <class Word, class T>
constexpr int kParts = 1;
template <>
constexpr int kParts<float, BFloat16> = 2;

// kCount * kLanes words of a row of `depth` words from word k on; zero past the end.
template <class Word, class T, int kCount>
GEMMA2_INLINE void load_parts(const T* row, int64_t k, int64_t depth, VecF (&to)[kCount]) {
  if constexpr (kCount == 1) {
    to[0] = load_words(Word{}, row, k, depth);
  } else {
    VecU both{};
    if (k + 2 * kLanes <= depth)
      memcpy(&both, row + k, sizeof both);
    else
      memcpy(&both, row + k, 2 * (depth - k));
    to[0] = even_bfloat16(both);
    to[1] = odd_bfloat16(both);
  }
}

// ---- softmax

// Scores are kept in units of ln 2, so that weights are 2^(score - maximum).
struct ScoreScale {
  float inner;  // score = outer * tanh(inner * dot), or inner * dot
  float outer;
  bool capped;
};

GEMMA2_INLINE ScoreScale score_scale(const AttentionParams& p) {
  const float log2_e = 0x1.715476p+0f, scale = float(p.scale), softcap = float(p.softcap);
  if (p.softcap > 0) return {scale / softcap, softcap * log2_e, true};
  return {scale * log2_e, 1.0f, false};
}

// x P(x^2) / Q(x^2), relative error below 2e-8 before rounding; |x| clamped to 9, where tanh is 1.
// Coefficients: minimax fit of the relative error on [0, 9].
GEMMA2_INLINE VecF tanh_rational(VecF x) {
  x = max(set(-9.0f), min(set(9.0f), x));  // in the order that keeps a NaN
  const VecF u = x * x;
  VecF p = set(1.3354728737734647e-08f);
  p = fma(p, u, set(2.0609136598809834e-05f));
  p = fma(p, u, set(0.0034955916805588685f));
  p = fma(p, u, set(0.1338102871810496f));
  p = fma(p, u, set(0.9999999794800648f));
  VecF q = set(7.776587513589528e-07f);
  q = fma(q, u, set(0.000328564044932534f));
  q = fma(q, u, set(0.02587699598366567f));
  q = fma(q, u, set(0.4671434431715617f));
  q = fma(q, u, set(1.0f));
  return x * p / q;
}

// 2^x for x <= 0, relative error below 1.5e-7; 0 below -126, -inf included. 2^n 2^r with n the
// nearest integer; 2^r by a polynomial of degree 5, minimax in the relative error on [-0.5, 0.5].
GEMMA2_INLINE VecF exp2_negative(VecF x) {
  const VecF floor = set(-126.0f), magic = set(0x1.8p23f);
  const VecF clamped = max(floor, x);    // in the order that keeps a NaN
  const VecF shifted = clamped + magic;  // its lowest bits are n
  const VecF r = clamped - (shifted - magic);
  VecF y = set(0.0013276472190222668f);
  y = fma(y, r, set(0.009675541616091507f));
  y = fma(y, r, set(0.05550713275336897f));
  y = fma(y, r, set(0.24022119718655643f));
  y = fma(y, r, set(0.6931469670621024f));
  y = fma(y, r, set(1.0000000716557247f));
  y = y * (VecF)(((VecU)shifted + 127) << 23);
  return x < floor ? zero() : y;
}

GEMMA2_INLINE VecF score(VecF dot, const ScoreScale& c) {
  const VecF x = dot * set(c.inner);
  return c.capped ? set(c.outer) * tanh_rational(x) : x;
}

GEMMA2_INLINE void store_weights(float* s, int64_t j, VecF w, float) { store(s + j, w); }
// In place: pairs need half the room, so they never overtake the scores still to be read.
GEMMA2_INLINE void store_weights(float* s, int64_t j, VecF w, Pair) { store((BFloat16*)s + j, w); }

// A few floats as the first lanes of a vector.
template <int kCount>
GEMMA2_INLINE VecF load_first(const float* p) {
  VecF v{};
  memcpy(&v, p, kCount * 4);
  return v;
}

// Turns kRows rows' dot products, n each, a multiple of kLanes, into softmax weights relative to
// the row's largest score so far, as Words; columns outside [first(r), last(r)) get 0 whatever they
// hold. factors[r] is what the row's earlier output has to be multiplied with. A row's result does
// not depend on the others, nor on how many they are.
template <int kRows, class Word, class First, class Last>
GEMMA2_INLINE void softmax_rows(float* s, int64_t n, First first, Last last, const ScoreScale& c,
                                float* row_max, float* row_sum, float* factors) {
  const VecF minus_infinity = set(-INFINITY);
  VecI lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  const auto begin = [&](int r) { return first(r) / kLanes * kLanes; };
  const auto end = [&](int r) {
    return first(r) < last(r) ? (last(r) + kLanes - 1) / kLanes * kLanes : begin(r);
  };

  VecF largest[kRows];
  for (int r = 0; r < kRows; ++r) {
    float* row = s + r * kScoreStride;
    VecF most = minus_infinity;
    for (int64_t j = begin(r); j < end(r); j += kLanes) {
      VecF x = score(load(row + j), c);
      if (j < first(r) || j + kLanes > last(r)) {
        const VecI column = lane + int32_t(j);
        const VecI inside = (column >= int32_t(first(r))) & (column < int32_t(last(r)));
        x = inside ? x : minus_infinity;
      }
      store(row + j, x);
      most = max(most, x);
    }
    largest[r] = most;
  }
  const VecF before = load_first<kRows>(row_max), block_max = reduce_maxima(largest);
  const auto keeps = block_max <= before;  // not where it is NaN, which goes on to the output
  const VecF after = keeps ? before : block_max;
  const VecF factor = keeps ? set(1.0f) : exp2_negative(before - block_max);
  memcpy(row_max, &after, kRows * 4);
  memcpy(factors, &factor, kRows * 4);

  VecF sums[kRows];
  for (int r = 0; r < kRows; ++r) {
    float* row = s + r * kScoreStride;
    const VecF reference = set(row_max[r]);
    VecF sum = zero();
    for (int64_t j = 0; j < begin(r); j += kLanes) store_weights(row, j, zero(), Word{});
    for (int64_t j = begin(r); j < end(r); j += kLanes) {
      const VecF w = exp2_negative(load(row + j) - reference);
      sum += w;
      store_weights(row, j, w, Word{});
    }
    for (int64_t j = end(r); j < n; j += kLanes) store_weights(row, j, zero(), Word{});
    sums[r] = sum;
  }
  const VecF total = load_first<kRows>(row_sum) * factor + reduce_sums(sums);
  memcpy(row_sum, &total, kRows * 4);
}

GEMMA2_INLINE void scale_row(float* o, int64_t n, float factor) {
  const VecF f = set(factor);
  for (int64_t d = 0; d < n; d += kLanes) store(o + d, load(o + d) * f);
}

// ---- packing

// Rows of K or V for consecutive keys. In a ring they continue at slot 0. In pages, slots are
// positions: page table[s >> page_shift] holds slot s, and slots from `capacity` on stand for the
// last one, so that rows ahead can be asked for.
template <class T>
struct KeyRows {
  const T* base;
  int64_t stride;
  int64_t slot;      // of the first key
  int64_t capacity;  // slots of the ring, or with pages the end of the keys
  const int32_t* table = nullptr;
  int64_t page_stride = 0, page_shift = 0;

  GEMMA2_INLINE const T* row(int64_t j) const {
    int64_t s = slot + j;
    if (table) {
      s = min64(s, capacity - 1);
      const int64_t page = s >> page_shift;
      return base + table[page] * page_stride + (s - (page << page_shift)) * stride;
    }
    return base + (s < capacity ? s : s - capacity) * stride;
  }
  // Whether the rows of n keys from j on follow each other at distances of `stride`.
  GEMMA2_INLINE bool in_line(int64_t j, int64_t n) const {
    if (table) return (slot + j) >> page_shift == (slot + j + n - 1) >> page_shift;
    return slot + j + n <= capacity || slot + j >= capacity;
  }
};

// Lines of rows, one after another, a pair at a time.
struct LineFetcher {
  KeyRows<char> rows;  // of bytes
  const char* row;
  int64_t end;  // of a row
  int64_t at;
  int64_t j;

  GEMMA2_INLINE void next() {
    prefetch(row + at);
    prefetch(row + at + kLineBytes);
    at += 2 * kLineBytes;
    if (at < end) return;
    at = 0;
    row = rows.table ? rows.row(++j) : row + rows.stride;
  }
};
// Of the rows of n elements from row j on. (Where a ring ends it fetches what follows, in vain.)
template <class T>
GEMMA2_INLINE LineFetcher make_fetcher(const KeyRows<T>& rows, int64_t j, int64_t n) {
  constexpr int64_t kSize = sizeof(T);
  const KeyRows<char> bytes{(const char*)rows.base, rows.stride * kSize, rows.slot,
                            rows.capacity,          rows.table,          rows.page_stride * kSize,
                            rows.page_shift};
  return {bytes, bytes.row(j), n * kSize, 0, j};
}

// Whether rows are stored as int8 with a factor each.
template <class K>
constexpr bool kScaled = false;
template <>
constexpr bool kScaled<int8_t> = true;

// A block of scores or weights times its keys' factors and its row's.
GEMMA2_INLINE void multiply_row(float* s, const float* factors, float of_row = 1.0f) {
  for (int64_t j = 0; j < kKeyBlock; j += kLanes)
    store(s + j, load(s + j) * (load(factors + j) * set(of_row)));
}

// n int8 rows times their factors, one behind another.
template <class T>
GEMMA2_INLINE void widen_rows(const KeyRows<int8_t>& from, const float* factors, int64_t n,
                              int64_t head_dim, T* to) {
  for (int64_t j = 0; j < n; ++j, to += head_dim) {
    const int8_t* row = from.row(j);
    const VecF factor = set(factors[j]);
    int64_t d = 0;
    for (; d + kLanes <= head_dim; d += kLanes) store(to + d, load(row + d) * factor);
    if (d < head_dim) store_n(to + d, load_n(row + d, head_dim - d) * factor, head_dim - d);
  }
}

// n keys as panels of kTileCols keys, in each the words of all keys side by side: (panel, depth,
// kTileCols). Keys past n are zero, up to the end of their panel, and words past those of a key.
template <class Word, class T>
void pack_keys(const KeyRows<T>& k, int64_t n, int64_t words, int64_t depth, float* out) {
  for (int64_t j0 = 0; j0 < n; j0 += kTileCols) {
    for (int64_t j = j0; j < j0 + kTileCols; j += kLanes) {
      float* column = out + j0 * depth + (j - j0);
      const T* rows[kLanes];
      for (int i = 0; i < kLanes; ++i) rows[i] = j + i < n ? k.row(j + i) : nullptr;
      for (int64_t d = 0; d < depth; d += kLanes) {
        VecF v[kLanes];
        GEMMA2_UNROLL
        for (int i = 0; i < kLanes; ++i)
          v[i] = rows[i] ? load_words(Word{}, rows[i], d, words) : zero();
        transpose(v);
        if (d + kLanes <= depth) {
          GEMMA2_UNROLL
          for (int i = 0; i < kLanes; ++i) store(column + (d + i) * kTileCols, v[i]);
        } else {
          for (int i = 0; i < depth - d; ++i) store(column + (d + i) * kTileCols, v[i]);
        }
      }
    }
  }
}

// The pairs (a[i], b[i]) of two rows' elements: those of the lower and those of the upper half.
// With kByParts they are the halves of every 128 bits, which x86 pairs by a cheaper instruction.
#if defined(GEMMA2_BFLOAT16_PAIRS)
template <bool kByParts>
GEMMA2_INLINE void pair_rows(VecF a, VecF b, VecF& lower, VecF& upper) {
#if defined(__aarch64__)
  lower = (VecF)vzip1q_u16((uint16x8_t)a, (uint16x8_t)b);
  upper = (VecF)vzip2q_u16((uint16x8_t)a, (uint16x8_t)b);
#else
  constexpr int kHalf = kByParts ? 4 : kLanes;
  VecPairs low, high;
  for (int i = 0; i < kLanes; ++i) {
    const int from = i / kHalf * 2 * kHalf + i % kHalf;
    low[2 * i] = uint16_t(from), low[2 * i + 1] = uint16_t(2 * kLanes + from);
  }
  high = low + uint16_t(kHalf);
#if defined(__AVX512BW__)
  if (kByParts) {
    lower = (VecF)_mm512_unpacklo_epi16((__m512i)a, (__m512i)b);
    upper = (VecF)_mm512_unpackhi_epi16((__m512i)a, (__m512i)b);
  } else {
    lower = (VecF)_mm512_permutex2var_epi16((__m512i)a, (__m512i)low, (__m512i)b);
    upper = (VecF)_mm512_permutex2var_epi16((__m512i)a, (__m512i)high, (__m512i)b);
  }
#else
  VecPairs first, second;
  for (int i = 0; i < 2 * kLanes; ++i) {
    first[i] = low[i] < 2 * kLanes ? ((VecPairs)a)[low[i]] : ((VecPairs)b)[low[i] - 2 * kLanes];
    second[i] = high[i] < 2 * kLanes ? ((VecPairs)a)[high[i]] : ((VecPairs)b)[high[i] - 2 * kLanes];
  }
  lower = (VecF)first, upper = (VecF)second;
#endif
#endif
}

// A row of sums of pairs by parts, n elements, a multiple of 2 * kLanes, in their order.
GEMMA2_INLINE void sort_parts(float* o, int64_t n) {
  for (int64_t d = 0; d < n; d += 2 * kLanes) {
    const auto from = [](int i) __attribute__((always_inline)) {
      return i / 4 % 2 * kLanes + i / 8 * 4 + i % 4;
    };
    const VecF lower = load(o + d), upper = load(o + d + kLanes);
    store(o + d, shuffle(lower, upper, from));
    store(o + d + kLanes, shuffle(lower, upper, [&](int i) { return from(kLanes + i); }));
  }
}
#endif

// kTileCols words from dimension d on of the values of as many keys as go into a word; a null row
// is zero.
template <class T>
GEMMA2_INLINE void store_value_words(float, const T* row, const T*, int64_t d, int64_t head_dim,
                                     float* to) {
  GEMMA2_UNROLL
  for (int64_t i = 0; i < kTileCols; i += kLanes)
    store(to + i, row && d + i < head_dim ? load_words(0.0f, row, d + i, head_dim) : zero());
}
#if defined(GEMMA2_BFLOAT16_PAIRS)
GEMMA2_INLINE void store_value_words(Pair, const BFloat16* even, const BFloat16* odd, int64_t d,
                                     int64_t head_dim, float* to) {
  static_assert(kTileCols == 2 * kLanes, "");
  const VecF a = even ? load_words(Pair{}, even, d / 2, head_dim / 2) : zero();
  const VecF b = odd ? load_words(Pair{}, odd, d / 2, head_dim / 2) : zero();
  VecF lower, upper;
  pair_rows<false>(a, b, lower, upper);
  store(to, lower), store(to + kLanes, upper);
}
#endif

// n keys' values as panels of kTileCols dimensions: (panel, kKeyBlock / kPerWord, kTileCols). Keys
// in `skip` (bit j), those from n up to `end` and dimensions past head_dim are zero.
template <class Word, class T>
void pack_values(const KeyRows<T>& v, int64_t n, int64_t end, int64_t head_dim, uint64_t skip,
                 float* out) {
  constexpr int kStep = kPerWord<Word>;
  for (int64_t j = 0; j < end; j += kStep) {
    const T* even = j >= n || skip >> j & 1 ? nullptr : v.row(j);
    const T* odd = kStep == 1 || j + 1 >= n || skip >> (j + 1) & 1 ? nullptr : v.row(j + 1);
    for (int64_t d = 0; d < head_dim; d += kTileCols) {
      store_value_words(Word{}, even, odd, d, head_dim,
                        out + d * (kKeyBlock / kStep) + j / kStep * kTileCols);
    }
  }
}

// Whether any of a row's elements is infinite or NaN.
template <class T>
GEMMA2_INLINE bool not_finite(const T* row, int64_t n) {
  VecF sum = zero();
  for (int64_t d = 0; d < n; d += kLanes) {
    const VecF x = load_words(0.0f, row, d, n);
    sum += x - x;
  }
  return reduce_sum(sum) != 0;  // true for NaN
}

// ---- the inner loop

// What multiply_tile does beside each step of depth.
struct NoFetcher {
  GEMMA2_INLINE void next() {}
};
// Fetches some pairs of lines of keys, then lines of values, a pair at every `period`-th step: one
// stream at a time, and no more at once than a processor asks memory for.
struct BlockFetcher {
  LineFetcher keys, values;
  int64_t period, key_pairs;
  int64_t steps = 1;  // left until the next pair

  GEMMA2_INLINE void next() {
    if (--steps > 0) return;
    steps = period;
    if (key_pairs > 0)
      keys.next(), --key_pairs;
    else
      values.next();
  }
};

// c (kTileRows, kTileCols) = a (kTileRows, depth) b (depth, kTileCols), plus c with kAdd; element
// (r, k) of a is a[r * kARow + k * kADepth]. The sum over depth starts at zero, so that its
// rounding errors stay those of a short sum.
template <int64_t kARow, int64_t kADepth, int64_t kBStride, bool kAdd, class Word, class Fetcher>
__attribute__((noinline)) void multiply_tile(const Word* a, const float* b, int64_t depth, float* c,
                                             int64_t c_stride, Fetcher& fetcher) {
  VecF sum[kTileRows][kTileVecs];
#if defined(GEMMA2_ISA_neon_bf16)
  if constexpr (kPerWord<Word> == 2 && kADepth == 1) {
    multiply_pairs_tile([&](int r) { return a + r * kARow; }, b, kBStride, depth, sum,
                        [&](int64_t) { fetcher.next(); });
  } else
#endif
  {
    GEMMA2_UNROLL
    for (int r = 0; r < kTileRows; ++r) {
      GEMMA2_UNROLL
      for (int v = 0; v < kTileVecs; ++v) sum[r][v] = zero();
    }
    for (int64_t k = 0; k < depth; ++k) {
      fetcher.next();
      VecF column[kTileVecs];
      GEMMA2_UNROLL
      for (int v = 0; v < kTileVecs; ++v) column[v] = load(b + k * kBStride + v * kLanes);
      GEMMA2_UNROLL
      for (int r = 0; r < kTileRows; ++r) {
        const VecF row = broadcast(a[r * kARow + k * kADepth]);
        GEMMA2_UNROLL
        for (int v = 0; v < kTileVecs; ++v)
          sum[r][v] = multiply_add(Word{}, row, column[v], sum[r][v]);
      }
    }
  }
  GEMMA2_UNROLL
  for (int r = 0; r < kTileRows; ++r) {
    GEMMA2_UNROLL
    for (int v = 0; v < kTileVecs; ++v) {
      float* to = c + r * c_stride + v * kLanes;
      store(to, kAdd ? load(to) + sum[r][v] : sum[r][v]);
    }
  }
}
template <int64_t kARow, int64_t kADepth, int64_t kBStride, bool kAdd, class Word>
GEMMA2_INLINE void multiply_tile(const Word* a, const float* b, int64_t depth, float* c,
                                 int64_t c_stride) {
  NoFetcher none;
  multiply_tile<kARow, kADepth, kBStride, kAdd>(a, b, depth, c, c_stride, none);
}

#if defined(GEMMA2_ISA_avx512_amx)
// Rows that meet a panel together, and words of depth that they do at a time.
constexpr int64_t kRowsAtOnce = 2 * kTileRows;
constexpr int64_t kDepthStep = kTileWords;

// c (+)= a b: scores or output of `rows` rows, kTileRows or kRowsAtOnce of them, and kTileCols
// columns. `steps` pairs of lines are fetched for each step of depth.
template <int64_t kARow, int64_t kBStride, bool kAdd, class Word, class Fetcher>
void multiply_rows(int64_t rows, const Word* a, const float* b, int64_t depth, float* c,
                   int64_t c_stride, Fetcher& fetcher, int64_t steps) {
  static_assert(kPerWord<Word> == 2, "");
  const TileRows rows_of_a(a, kARow * 4), rows_of_b(b, kBStride * 4);
  const auto fetch = [&] {
    for (int64_t i = 0; i < steps; ++i) fetcher.next();
  };
  if (rows == kTileRows) {
    multiply_tiles<1, 2>(rows_of_a, rows_of_b, depth, c, c_stride, kAdd, fetch);
  } else {
    multiply_tiles<2, 2>(rows_of_a, rows_of_b, depth, c, c_stride, kAdd, fetch);
  }
}
#else
constexpr int64_t kRowsAtOnce = kTileRows;
constexpr int64_t kDepthStep = 1;

template <int64_t kARow, int64_t kBStride, bool kAdd, class Word, class Fetcher>
GEMMA2_INLINE void multiply_rows(int64_t, const Word* a, const float* b, int64_t depth, float* c,
                                 int64_t c_stride, Fetcher& fetcher, int64_t) {
  const int64_t first = kAdd ? depth : min64(depth, kDepthBlock);
  multiply_tile<kARow, 1, kBStride, kAdd>(a, b, first, c, c_stride, fetcher);
  for (int64_t d = first; d < depth; d += kDepthBlock)
    multiply_tile<kARow, 1, kBStride, true>(a + d, b + d * kBStride, min64(depth - d, kDepthBlock),
                                            c, c_stride, fetcher);
}
#endif

}  // namespace
}  // namespace GEMMA2_ISA
}  // namespace gemma2
