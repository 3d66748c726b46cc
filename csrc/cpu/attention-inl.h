// Pieces of attention: the online softmax, packing, and the two inner loops (a register tile of a
// matrix product for blocks of rows, dot products over unpacked keys for few rows).
//
// Packed matrices consist of 32-bit words along the depth of the product: a float, or a pair of
// bfloat16 where the machine multiplies those directly. So one tile loop serves both.
#pragma once
#include <math.h>

#include "attention.h"
#include "simd.h"

namespace gemma2 {
namespace GEMMA2_ISA {
namespace {

constexpr int64_t kRowBlock = kAttentionRowBlock, kKeyBlock = kAttentionKeyBlock;
// Longest sum of a float product: a matrix product by a good library rounds no worse.
constexpr int64_t kDepthBlock = 64;
constexpr int64_t kQueryStride = kAttentionQueryStride, kScoreStride = kAttentionScoreStride;

GEMMA2_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
GEMMA2_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

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

// Accumulators of a tile: 12 of 16 registers, or 24 of 32.
constexpr int kTileRows = kLanes >= 16 ? 12 : 6;
constexpr int kTileVecs = 2;
constexpr int kTileCols = kTileVecs * kLanes;
static_assert(kRowBlock % kTileRows == 0 && kKeyBlock % kTileCols == 0 && 32 % kTileCols == 0, "");

// ---- words

struct Pair {
  uint32_t bits;  // two bfloat16, the first in the lower half
};

template <class T>
struct Packed {
  using Word = float;
};
#if defined(GEMMA2_ISA_avx512_bf16)
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
GEMMA2_INLINE VecF multiply_add(Pair, VecF a, VecF b, VecF sum) {
#if defined(__AVX512BF16__)
  return (VecF)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
  sum = fma(even_bfloat16((VecU)a), even_bfloat16((VecU)b), sum);
  return fma(odd_bfloat16((VecU)a), odd_bfloat16((VecU)b), sum);
#endif
}

// kLanes words of a row of `depth` words from word k on; zero past the end.
template <class T>
GEMMA2_INLINE VecF load_words(float, const T* row, int64_t k, int64_t depth) {
  return k + kLanes <= depth ? load(row + k) : load_n(row + k, depth - k);
}
GEMMA2_INLINE VecF load_words(Pair, const BFloat16* row, int64_t k, int64_t depth) {
  VecF words = zero();
  if (k + kLanes <= depth)
    memcpy(&words, row + 2 * k, sizeof words);
  else
    memcpy(&words, row + 2 * k, 4 * (depth - k));
  return words;
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
        x = (column >= int32_t(first(r))) & (column < int32_t(last(r))) ? x : minus_infinity;
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

// Rows of K or V for consecutive keys, which in a ring continue at slot 0.
template <class T>
struct KeyRows {
  const T* base;
  int64_t stride;
  int64_t slot;      // of the first key
  int64_t capacity;  // slots of the ring

  GEMMA2_INLINE const T* row(int64_t j) const {
    const int64_t s = slot + j;
    return base + (s < capacity ? s : s - capacity) * stride;
  }
  // Whether the rows of n keys from j on follow each other at distances of `stride`.
  GEMMA2_INLINE bool in_line(int64_t j, int64_t n) const {
    return slot + j + n <= capacity || slot + j >= capacity;
  }
};

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
// kTileCols). Keys past n are zero, up to the end of their panel.
template <class Word, class T>
void pack_keys(const KeyRows<T>& k, int64_t n, int64_t depth, float* out) {
  for (int64_t j0 = 0; j0 < n; j0 += kTileCols) {
    for (int64_t j = j0; j < j0 + kTileCols; j += kLanes) {
      float* column = out + j0 * depth + (j - j0);
      const T* rows[kLanes];
      for (int i = 0; i < kLanes; ++i) rows[i] = j + i < n ? k.row(j + i) : nullptr;
      for (int64_t d = 0; d < depth; d += kLanes) {
        VecF v[kLanes];
        GEMMA2_UNROLL
        for (int i = 0; i < kLanes; ++i)
          v[i] = rows[i] ? load_words(Word{}, rows[i], d, depth) : zero();
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

GEMMA2_INLINE VecF value_words(float, VecF even, VecF) { return even; }
GEMMA2_INLINE VecF value_words(Pair, VecF even, VecF odd) {  // both are bfloat16 widened to float
  return (VecF)((VecU)even >> 16 | (VecU)odd);
}

// n keys' values as panels of kTileCols dimensions: (panel, kKeyBlock / kPerWord, kTileCols). Keys
// in `skip` (bit j) and dimensions past head_dim are zero.
template <class Word, class T>
void pack_values(const KeyRows<T>& v, int64_t n, int64_t head_dim, uint64_t skip, float* out) {
  constexpr int kStep = kPerWord<Word>;
  for (int64_t j = 0; j < n; j += kStep) {
    const T* even = skip >> j & 1 ? nullptr : v.row(j);
    const T* odd = kStep == 1 || j + 1 >= n || skip >> (j + 1) & 1 ? nullptr : v.row(j + 1);
    for (int64_t d0 = 0; d0 < head_dim; d0 += kTileCols) {
      float* to = out + d0 * (kKeyBlock / kStep) + j / kStep * kTileCols;
      GEMMA2_UNROLL
      for (int64_t i = 0; i < kTileCols; i += kLanes) {
        const int64_t d = d0 + i;
        const bool inside = d < head_dim;
        const VecF a = even && inside ? load_words(0.0f, even, d, head_dim) : zero();
        const VecF b = odd && inside ? load_words(0.0f, odd, d, head_dim) : zero();
        store(to + i, value_words(Word{}, a, b));
      }
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

// ---- inner loops

// Some keys at a time go through their rows side by side, to hide the latency of additions. They
// are of kShares shares of a block, each read as it lies in memory: a processor fetches few long
// streams ahead of their use by itself, faster than one, and much faster than several short rows.
// Rows of int8 are too short for that: those side by side are neighbours, and rows ahead are
// fetched.
constexpr int kSideBySide = 4;
template <class T>
constexpr int kShares = kScaled<T> ? 1 : kSideBySide;

// Fetches a later row: whole, or, where a step of so many bytes takes a line or half of one, step
// by step.
template <class T>
constexpr int64_t kAhead = kScaled<T> ? 16 : 8;
template <class T>
GEMMA2_INLINE void prefetch_row(const T* row, int64_t n) {
  if (!kScaled<T>) return;
  for (int64_t d = 0; d < n; d += 64 / int64_t(sizeof(T))) prefetch(row + d);
}
template <int64_t kBytes, class T>
GEMMA2_INLINE void prefetch_step(const T* row, int64_t d) {
  if (kBytes >= 32 && kLanes >= 16) prefetch_near(row + d);
}

// c (kTileRows, kTileCols) = a (kTileRows, depth) b (depth, kTileCols), plus c with kAdd; element
// (r, k) of a is a[r * kARow + k * kADepth]. The sum over depth starts at zero, so that its
// rounding errors stay those of a short sum.
template <int64_t kARow, int64_t kADepth, int64_t kBStride, bool kAdd, class Word>
__attribute__((noinline)) void multiply_tile(const Word* a, const float* b, int64_t depth, float* c,
                                             int64_t c_stride) {
  VecF sum[kTileRows][kTileVecs];
  GEMMA2_UNROLL
  for (int r = 0; r < kTileRows; ++r) {
    GEMMA2_UNROLL
    for (int v = 0; v < kTileVecs; ++v) sum[r][v] = zero();
  }
  for (int64_t k = 0; k < depth; ++k) {
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
  GEMMA2_UNROLL
  for (int r = 0; r < kTileRows; ++r) {
    GEMMA2_UNROLL
    for (int v = 0; v < kTileVecs; ++v) {
      float* to = c + r * c_stride + v * kLanes;
      store(to, kAdd ? load(to) + sum[r][v] : sum[r][v]);
    }
  }
}

// s[r, j] = q[r] . k[j] for kRows rows of `depth` words and the n keys. kKeys keys together fill
// whole vectors of sums.
template <int kRows, class T>
void dot_keys(float, const float* q, const KeyRows<T>& k, int64_t n, int64_t depth, float* s) {
  constexpr int kVecs = kLanes < 8 ? 2 : 1, kKeys = kVecs * kLanes / kRows;
  constexpr int kAtOnce = kSideBySide < kKeys ? kSideBySide : kKeys;
  constexpr int kParted = kShares<T> < kAtOnce ? kShares<T> : kAtOnce;
  constexpr int kOfShare = kKeys / kParted, kNeighbours = kAtOnce / kParted;
  constexpr int kPart = kParts<float, T>, kStep = kPart * kLanes;
  constexpr int64_t kBytes = kStep * sizeof(T);
  const int64_t whole = depth / kStep * kStep, share = (n + kParted - 1) / kParted;
  for (int64_t j = 0; j < share; j += kOfShare) {
    VecF sum[kVecs][kLanes];  // (kRows, kParted, kOfShare)
    GEMMA2_UNROLL
    for (int first = 0; first < kOfShare; first += kNeighbours) {
      VecF part_sum[kRows][kAtOnce];
      const T *rows[kAtOnce], *later[kAtOnce];
      GEMMA2_UNROLL
      for (int i = 0; i < kAtOnce; ++i) {
        const int64_t key = i / kNeighbours * share + j + first + i % kNeighbours;
        rows[i] = k.row(min64(key, n - 1));
        later[i] = k.row(key + kAhead<T>);
        prefetch_row(later[i], depth);
        GEMMA2_UNROLL
        for (int r = 0; r < kRows; ++r) part_sum[r][i] = zero();
      }
      const auto step = [&](int64_t d, int64_t words) __attribute__((always_inline)) {
        VecF query[kRows][kPart];
        GEMMA2_UNROLL
        for (int i = 0; i < kAtOnce; ++i) prefetch_step<kBytes>(later[i], d);
        GEMMA2_UNROLL
        for (int r = 0; r < kRows * kPart; ++r)
          query[r / kPart][r % kPart] = load(q + r / kPart * kQueryStride + d + r % kPart * kLanes);
        GEMMA2_UNROLL
        for (int i = 0; i < kAtOnce; ++i) {
          VecF key[kPart];
          load_parts<float>(rows[i], d, words, key);
          GEMMA2_UNROLL
          for (int r = 0; r < kRows * kPart; ++r) {
            VecF& to = part_sum[r / kPart][i];
            to = multiply_add(0.0f, query[r / kPart][r % kPart], key[r % kPart], to);
          }
        }
      };
      for (int64_t d = 0; d < whole; d += kStep) step(d, d + kStep);
      if (whole < depth) step(whole, depth);
      GEMMA2_UNROLL
      for (int r = 0; r < kRows; ++r) {
        GEMMA2_UNROLL
        for (int i = 0; i < kAtOnce; ++i) {
          const int at = r * kKeys + i / kNeighbours * kOfShare + first + i % kNeighbours;
          sum[at / kLanes][at % kLanes] = part_sum[r][i];
        }
      }
    }
    float sums[kVecs * kLanes];
    GEMMA2_UNROLL
    for (int i = 0; i < kVecs; ++i) store(sums + i * kLanes, reduce_sums(sum[i]));
    GEMMA2_UNROLL
    for (int i = 0; i < kRows * kParted; ++i) {
      const int64_t key = i % kParted * share + j;
      const int64_t count = min64(min64(kOfShare, share - j), n - key);
      float* to = s + i / kParted * kScoreStride + key;
      if (count == kOfShare)
        memcpy(to, sums + i * kOfShare, kOfShare * 4);
      else if (count > 0)
        memcpy(to, sums + i * kOfShare, count * 4);
    }
  }
}

// o[r] += the sum over kKeys keys of w[r, key] v[key]: kNeighbours from j on, as many at j + apart,
// and so on.
template <int kRows, int kKeys, int kNeighbours, class T>
GEMMA2_INLINE void add_some_values(const float* w, const KeyRows<T>& v, int64_t j, int64_t apart,
                                   int64_t head_dim, float* o, int64_t o_stride) {
  constexpr int kPart = kParts<float, T>, kStep = kPart * kLanes;
  constexpr int64_t kBytes = kStep * sizeof(T);
  const T *rows[kKeys], *later[kKeys];
  VecF weight[kRows][kKeys];
  GEMMA2_UNROLL
  for (int i = 0; i < kKeys; ++i) {
    const int64_t key = j + i / kNeighbours * apart + i % kNeighbours;
    rows[i] = v.row(key);
    later[i] = v.row(key + kAhead<T>);
    prefetch_row(later[i], head_dim);
    GEMMA2_UNROLL
    for (int r = 0; r < kRows; ++r) weight[r][i] = set(w[r * kScoreStride + key]);
  }
  const auto step = [&](int64_t d, int64_t end) __attribute__((always_inline)) {
    VecF value[kKeys][kPart];
    GEMMA2_UNROLL
    for (int i = 0; i < kKeys; ++i) prefetch_step<kBytes>(later[i], d);
    GEMMA2_UNROLL
    for (int i = 0; i < kKeys; ++i) load_parts<float>(rows[i], d, end, value[i]);
    GEMMA2_UNROLL
    for (int r = 0; r < kRows * kPart; ++r) {
      float* to = o + r / kPart * o_stride + d + r % kPart * kLanes;
      // float32 is added up in sums of kKeys first, which round less; no other type would show it.
      VecF sum = sizeof(T) == 4 ? zero() : load(to);
      GEMMA2_UNROLL
      for (int i = 0; i < kKeys; ++i) sum = fma(weight[r / kPart][i], value[i][r % kPart], sum);
      store(to, sizeof(T) == 4 ? load(to) + sum : sum);
    }
  };
  const int64_t whole = head_dim / kStep * kStep;
  for (int64_t d = 0; d < whole; d += kStep) step(d, d + kStep);
  if (whole < head_dim) step(whole, head_dim);
}

// o[r] += sum over the n keys of w[r, first + j] v[j], for kRows rows; o's elements lie as
// load_parts gives them. The order of additions is the same for any number of rows.
template <int kRows, class T>
GEMMA2_INLINE void add_values(float, const float* w, const KeyRows<T>& v, int64_t first, int64_t n,
                              int64_t head_dim, float* o, int64_t o_stride) {
  constexpr int kKeys = kSideBySide, kParted = kShares<T>;
  constexpr int kNeighbours = kKeys / kParted;
  const int64_t share = n / kKeys * kNeighbours;
  w += first;
  for (int64_t j = 0; j < share; j += kNeighbours) {
    if (kParts<float, T> > 1 && kRows > 2) {  // all their weights would fill the registers
      static_assert(kNeighbours == 1 || kParts<float, T> == 1, "");
      for (int i = 0; i < kParted; i += 2)
        add_some_values<kRows, 2, 1>(w, v, j + i * share, share, head_dim, o, o_stride);
    } else {
      add_some_values<kRows, kKeys, kNeighbours>(w, v, j, share, head_dim, o, o_stride);
    }
  }
  for (int64_t j = share * kParted; j < n; ++j)
    add_some_values<kRows, 1, 1>(w, v, j, 0, head_dim, o, o_stride);
}

#if defined(GEMMA2_ISA_avx512_bf16)

// s[r, j], s[r, j + 1], ... of the n keys: the dot products (kRows, kLanes / kRows).
template <int kRows>
GEMMA2_INLINE void store_dots(VecF dots, float* s, int64_t j, int64_t n) {
  constexpr int kKeys = kLanes / kRows;
  float values[kLanes];
  store(values, dots);
  GEMMA2_UNROLL
  for (int r = 0; r < kRows; ++r) {
    if (j + kKeys <= n)
      memcpy(s + r * kScoreStride + j, values + r * kKeys, kKeys * 4);
    else
      memcpy(s + r * kScoreStride + j, values + r * kKeys, (n - j) * 4);
  }
}

// The same of pairs, a key at a time: so keys come in the order of memory.
template <int kRows>
GEMMA2_INLINE void dot_keys(Pair, const float* q, const KeyRows<BFloat16>& k, int64_t n,
                            int64_t depth, float* s) {
  constexpr int kKeys = kLanes / kRows;
  const int64_t whole = depth / kLanes * kLanes;
  for (int64_t j = 0; j < n; j += kKeys) {
    VecF sum[kLanes];  // (kRows, kKeys)
    const auto dot = [&](const auto& row_of) __attribute__((always_inline)) {
      GEMMA2_UNROLL
      for (int i = 0; i < kKeys; ++i) {
        const BFloat16* row = row_of(i);
        const BFloat16* later = row + kAhead<BFloat16> * k.stride;
        VecF part_sum[kRows];
        GEMMA2_UNROLL
        for (int r = 0; r < kRows; ++r) part_sum[r] = zero();
        const auto step = [&](int64_t d, int64_t words) __attribute__((always_inline)) {
          prefetch_step<64>(later, 2 * d);
          const VecF key = load_words(Pair{}, row, d, words);
          GEMMA2_UNROLL
          for (int r = 0; r < kRows; ++r)
            part_sum[r] = multiply_add(Pair{}, load(q + r * kQueryStride + d), key, part_sum[r]);
        };
        for (int64_t d = 0; d < whole; d += kLanes) step(d, d + kLanes);
        if (whole < depth) step(whole, depth);
        GEMMA2_UNROLL
        for (int r = 0; r < kRows; ++r) sum[r * kKeys + i] = part_sum[r];
      }
    };
    if (j + kKeys <= n && k.in_line(j, kKeys)) {
      const BFloat16* first = k.row(j);
      dot([&](int i) { return first + i * k.stride; });
    } else {
      dot([&](int i) { return k.row(min64(j + i, n - 1)); });
    }
    store_dots<kRows>(reduce_sums(sum), s, j, n);
  }
}

// The pairs (a[i], b[i]) of two rows' elements, of the lower and of the upper half.
typedef uint16_t VecPairs __attribute__((vector_size(kLanes * 4)));
GEMMA2_INLINE void pair_rows(VecF a, VecF b, VecF& lower, VecF& upper) {
  VecPairs low, high;
  for (int i = 0; i < kLanes; ++i) {
    low[2 * i] = uint16_t(i), low[2 * i + 1] = uint16_t(2 * kLanes + i);
    high[2 * i] = uint16_t(kLanes + i), high[2 * i + 1] = uint16_t(3 * kLanes + i);
  }
#if defined(__AVX512BW__)
  lower = (VecF)_mm512_permutex2var_epi16((__m512i)a, (__m512i)low, (__m512i)b);
  upper = (VecF)_mm512_permutex2var_epi16((__m512i)a, (__m512i)high, (__m512i)b);
#else
  VecPairs first, second;
  for (int i = 0; i < 2 * kLanes; ++i) {
    first[i] = low[i] < 2 * kLanes ? ((VecPairs)a)[low[i]] : ((VecPairs)b)[low[i] - 2 * kLanes];
    second[i] = high[i] < 2 * kLanes ? ((VecPairs)a)[high[i]] : ((VecPairs)b)[high[i] - 2 * kLanes];
  }
  lower = (VecF)first, upper = (VecF)second;
#endif
}

// What stands for the key that a pair lacks.
alignas(64) constexpr BFloat16 kNoValue[256] = {};

// As add_values, with kPairs pairs of weights w[r] for the values j, j + 1, ..., of which those
// outside [0, n) are not read.
template <int kRows, int kPairs>
GEMMA2_INLINE void add_pairs(const Pair* w, const KeyRows<BFloat16>& v, int64_t j, int64_t n,
                             int64_t head_dim, float* o, int64_t o_stride) {
  const int64_t depth = head_dim / 2;
  const auto add = [&](const auto& row_of, const auto& weight_of) __attribute__((always_inline)) {
    const BFloat16* rows[2 * kPairs];
    GEMMA2_UNROLL
    for (int i = 0; i < 2 * kPairs; ++i) rows[i] = row_of(i);
    const int64_t ahead = kAhead<BFloat16> * v.stride;
    VecF weight[kRows][kPairs];
    GEMMA2_UNROLL
    for (int r = 0; r < kRows; ++r) {
      GEMMA2_UNROLL
      for (int i = 0; i < kPairs; ++i) weight[r][i] = broadcast(weight_of(r, i));
    }
    const auto step = [&](int64_t d, int64_t words) __attribute__((always_inline)) {
      GEMMA2_UNROLL
      for (int i = 0; i < 2 * kPairs; ++i) prefetch_step<64>(rows[i] + ahead, 2 * d);
      VecF lower[kPairs], upper[kPairs];
      GEMMA2_UNROLL
      for (int i = 0; i < kPairs; ++i) {
        pair_rows(load_words(Pair{}, rows[2 * i], d, words),
                  load_words(Pair{}, rows[2 * i + 1], d, words), lower[i], upper[i]);
      }
      GEMMA2_UNROLL
      for (int r = 0; r < kRows; ++r) {
        float* to = o + r * o_stride + 2 * d;
        VecF first = load(to), second = load(to + kLanes);
        GEMMA2_UNROLL
        for (int i = 0; i < kPairs; ++i) {
          first = multiply_add(Pair{}, weight[r][i], lower[i], first);
          second = multiply_add(Pair{}, weight[r][i], upper[i], second);
        }
        store(to, first);
        store(to + kLanes, second);
      }
    };
    const int64_t whole = depth / kLanes * kLanes;
    for (int64_t d = 0; d < whole; d += kLanes) step(d, d + kLanes);
    if (whole < depth) step(whole, depth);
  };
  if (j >= 0 && j + 2 * kPairs <= n && v.in_line(j, 2 * kPairs)) {
    const BFloat16* first = v.row(j);
    add([&](int i) { return first + i * v.stride; },
        [&](int r, int i) { return w[r * kScoreStride + i]; });
  } else {
    add([&](int i) { return j + i >= 0 && j + i < n ? v.row(j + i) : kNoValue; },
        [&](int r, int i) { return j + 2 * i < n ? w[r * kScoreStride + i] : Pair{}; });
  }
}

template <int kRows>
GEMMA2_INLINE void add_values(Pair, const float* w, const KeyRows<BFloat16>& v, int64_t first,
                              int64_t n, int64_t head_dim, float* o, int64_t o_stride) {
  const Pair* pairs = (const Pair*)w + first / 2;
  int64_t j = -(first & 1);                   // the first pair's first key
  constexpr int kPairs = kRows <= 2 ? 4 : 2;  // with their weights in registers
  for (; j < n; j += 2 * kPairs, pairs += kPairs)
    add_pairs<kRows, kPairs>(pairs, v, j, n, head_dim, o, o_stride);
}

#endif

}  // namespace
}  // namespace GEMMA2_ISA
}  // namespace gemma2
