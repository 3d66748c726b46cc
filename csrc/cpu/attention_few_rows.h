// The inner loops of few rows of queries, over keys and values where they lie.
#pragma once
#include "attention-inl.h"

namespace gemma2 {
namespace GEMMA2_ISA {
namespace {

// Some keys at a time go through their rows side by side, to hide the latency of additions. With
// AVX-512 and with int8 they are neighbours, and rows ahead are fetched. Below, they are of kShares
// shares of a block, each read as it lies in memory: there a processor fetches few long streams
// ahead of their use by itself, faster than one, and much faster than several short rows.
constexpr int kSideBySide = 4;
template <class T>
constexpr int kShares = kScaled<T> || kLanes >= 16 ? 1 : kSideBySide;

// Where later rows are fetched to, and how many rows ahead.
struct FetchNear {
  static constexpr bool kReads = false;
  template <class T>
  static constexpr int64_t kAhead = kScaled<T> ? 16 : 8;
  static constexpr int64_t kKeysInIntegers = 32;
  static GEMMA2_INLINE void line(const void* p) { prefetch_near(p); }
};
// A Zen 4's first cache takes few lines at a time from memory, its second cache many. Its own
// prefetcher follows one head's rows as fast as memory gives them (kReads), as long as they are
// read whole and in their order: what is fetched by instruction does not count.
struct FetchFar {
  static constexpr bool kReads = true;
  template <class T>
  static constexpr int64_t kAhead = 16;
  static constexpr int64_t kKeysInIntegers = 64;
  static GEMMA2_INLINE void line(const void* p) { prefetch(p); }
};
// Fetches a later row: whole, or, where a step of so many bytes takes a line or half of one, step
// by step. Below AVX-512 the processor's own prefetcher does better, but for several rows, which
// keep arithmetic at work (kBusy).
template <class T>
GEMMA2_INLINE void prefetch_row(const T* row, int64_t n) {
  if (!kScaled<T>) return;
  for (int64_t d = 0; d < n; d += 64 / int64_t(sizeof(T))) prefetch(row + d);
}
template <class Fetch, int64_t kBytes, bool kBusy = false, class T>
GEMMA2_INLINE void prefetch_step(const T* row, int64_t d) {
  if (kBytes >= 32 && (kLanes >= 16 || kBusy)) Fetch::line(row + d);
}

// Key heads whose rows lie side by side are taken together: each meets some keys before any meets
// the next ones, so that these are read as they lie. A head's rows of q, s and o begin `rows` rows
// behind those of the head before, its keys or values `stride` elements.
struct Heads {
  static constexpr bool kOne = false;
  int64_t count, rows, stride;
};
struct OneHead {  // for the compiler to know
  static constexpr bool kOne = true;
  static constexpr int64_t count = 1, rows = 0, stride = 0;
};
template <class T, class Heads>
GEMMA2_INLINE KeyRows<T> of_head(const KeyRows<T>& rows, const Heads& heads, int64_t h) {
  KeyRows<T> of = rows;
  of.base += h * heads.stride;
  return of;
}

// Where rows are asked for one by one: those of a block's n keys, and as many behind them as are
// asked for ahead, by the places of the (first) head's.
constexpr int64_t kRowsBehind = 96, kBlockRows = kKeyBlock + kRowsBehind;
// Where several groups of rows meet a block, they fetch the next one, as long as these keys and
// values and the next have room in a second-level cache.
constexpr int64_t kFarRoom = kLanes < 16 ? 256 << 10 : 512 << 10;
template <class T>
struct ListedRows {
  const T* const* rows;
  int64_t offset;
  int64_t ahead;

  GEMMA2_INLINE const T* row(int64_t j) const { return rows[j] + offset; }
};
template <class T>
GEMMA2_INLINE void list_rows(const KeyRows<T>& k, int64_t n, const T** rows) {
  for (int64_t j = 0; j < n + kRowsBehind; ++j) rows[j] = k.row(j);
}
template <class T, class Heads>
GEMMA2_INLINE ListedRows<T> of_head(const ListedRows<T>& listed, const Heads& heads, int64_t h) {
  return {listed.rows, listed.offset + h * heads.stride, listed.ahead};
}

// Whether rows are fetched in the order of memory. More rows of queries are busy with arithmetic,
// and what it takes to count would show.
template <class T, int kRows>
constexpr bool kInOrder = kLanes >= 16 && kRows <= 2 && !kScaled<T>;

template <class T>
GEMMA2_INLINE const T* next_row(const ListedRows<T>& rows, const T*, int64_t j) {
  return rows.row(j);
}
template <class T>
GEMMA2_INLINE const T* next_row(const KeyRows<T>& rows, const T* before, int64_t j) {
  return rows.table ? rows.row(j) : before + rows.stride;
}
// What is fetched in the order of memory: parts of a row of all heads that are taken together, then
// of the next row. (Where a ring ends it goes on behind it, in vain, up to the end of a block.)
template <class Fetch, class Rows, class T>
struct RowsAhead {
  const Rows& rows;
  const T* row;
  int64_t j, end;  // of a row
  int64_t at = 0;

  // From row j on.
  template <class Heads>
  GEMMA2_INLINE RowsAhead(const Rows& rows, int64_t j, const Heads& heads, int64_t head_dim)
      : rows(rows),
        row(rows.row(j)),
        j(j),
        end(Heads::kOne ? head_dim : heads.count * heads.stride) {}

  GEMMA2_INLINE const T* next(int64_t n) {
    const T* part = row + at;
    at += n;
    if (at >= end) {
      at = 0;
      row = next_row(rows, row, ++j);
    }
    return part;
  }
  template <int64_t n>
  GEMMA2_INLINE void fetch() {
    const T* part = next(n);
    GEMMA2_UNROLL
    for (int64_t i = 0; i < n; i += kLineBytes / int64_t(sizeof(T))) Fetch::line(part + i);
  }
  // Whether steps of `step` elements of so many rows take a head's rows, and parts as large as
  // those a row of all heads, without a rest: then as much is fetched as is read.
  template <class Heads>
  GEMMA2_INLINE bool fits(const Heads& heads, int64_t head_dim, int64_t step, int64_t rows) const {
    return (Heads::kOne || heads.stride == head_dim) && head_dim % step == 0 &&
           end % (step * rows) == 0;
  }
};

// s[r, j] = q[r] . k[j] for kRows rows of `depth` words and the n keys. kKeys keys together fill
// whole vectors of sums.
template <int kRows, class Fetch, class T, class Heads>
void dot_keys(float, const float* first_q, const ListedRows<T>& first_k, int64_t n, int64_t depth,
              float* first_s, const Heads& heads) {
  constexpr int kVecs = kLanes < 8 ? 2 : 1, kKeys = kVecs * kLanes / kRows;
  constexpr int kAtOnce = kSideBySide < kKeys ? kSideBySide : kKeys;
  constexpr int kParted = kShares<T> < kAtOnce ? kShares<T> : kAtOnce;
  constexpr int kOfShare = kKeys / kParted, kNeighbours = kAtOnce / kParted;
  constexpr int kPart = kParts<float, T>, kStep = kPart * kLanes;
  constexpr int64_t kBytes = kStep * sizeof(T);
  constexpr bool kBusy = kRows == 4 && Heads::kOne;
  const int64_t whole = depth / kStep * kStep, share = (n + kParted - 1) / kParted;
  static_assert(kParted + kOfShare + kKeyBlock < kRowsBehind, "");
  RowsAhead<Fetch, ListedRows<T>, T> ahead(first_k, first_k.ahead, heads, depth);
  const bool in_order = kInOrder<T, kRows> && ahead.fits(heads, depth, kStep, kAtOnce);
  for (int64_t j = 0; j < share; j += kOfShare) {
    for (int64_t h = 0; h < heads.count; ++h) {
      const ListedRows<T> k = of_head(first_k, heads, h);
      const float* q = first_q + h * heads.rows * kQueryStride;
      float* s = first_s + h * heads.rows * kScoreStride;
      VecF sum[kVecs][kLanes];  // (kRows, kParted, kOfShare)
      GEMMA2_UNROLL
      for (int first = 0; first < kOfShare; first += kNeighbours) {
        VecF part_sum[kRows][kAtOnce];
        const T *rows[kAtOnce], *later[kAtOnce];
        GEMMA2_UNROLL
        for (int i = 0; i < kAtOnce; ++i) {
          const int64_t key = i / kNeighbours * share + j + first + i % kNeighbours;
          rows[i] = k.row(min64(key, n - 1));
          later[i] = k.row(key + k.ahead);
          prefetch_row(later[i], depth);
          GEMMA2_UNROLL
          for (int r = 0; r < kRows; ++r) part_sum[r][i] = zero();
        }
        const auto step = [&](int64_t d, int64_t words) __attribute__((always_inline)) {
          VecF query[kRows][kPart];
          if (in_order) {
            ahead.template fetch<kAtOnce * kStep>();
          } else {
            GEMMA2_UNROLL
            for (int i = 0; i < kAtOnce; ++i) prefetch_step<Fetch, kBytes, kBusy>(later[i], d);
          }
          GEMMA2_UNROLL
          for (int r = 0; r < kRows * kPart; ++r)
            query[r / kPart][r % kPart] =
                load(q + r / kPart * kQueryStride + d + r % kPart * kLanes);
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
}

// o[r] += the sum over kKeys keys of w[r, key] v[key]: kNeighbours from j on, as many at j + apart,
// and so on.
template <int kRows, int kKeys, int kNeighbours, bool kBusy, class Fetch, class T>
GEMMA2_INLINE void add_some_values(const float* w, const ListedRows<T>& v, int64_t j, int64_t apart,
                                   int64_t head_dim, float* o, int64_t o_stride, bool in_order,
                                   RowsAhead<Fetch, ListedRows<T>, T>& ahead) {
  constexpr int kPart = kParts<float, T>, kStep = kPart * kLanes;
  constexpr int64_t kBytes = kStep * sizeof(T);
  const T *rows[kKeys], *later[kKeys];
  VecF weight[kRows][kKeys];
  GEMMA2_UNROLL
  for (int i = 0; i < kKeys; ++i) {
    const int64_t key = j + i / kNeighbours * apart + i % kNeighbours;
    rows[i] = v.row(key);
    later[i] = v.row(key + v.ahead);
    prefetch_row(later[i], head_dim);
    GEMMA2_UNROLL
    for (int r = 0; r < kRows; ++r) weight[r][i] = set(w[r * kScoreStride + key]);
  }
  const auto step = [&](int64_t d, int64_t end) __attribute__((always_inline)) {
    VecF value[kKeys][kPart];
    if (in_order) {
      ahead.template fetch<kKeys * kStep>();
    } else {
      GEMMA2_UNROLL
      for (int i = 0; i < kKeys; ++i) prefetch_step<Fetch, kBytes, kBusy>(later[i], d);
    }
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
template <int kRows, class Fetch, class T, class Heads>
GEMMA2_INLINE void add_values(float, const float* first_w, const ListedRows<T>& first_v,
                              int64_t first, int64_t n, int64_t head_dim, float* first_o,
                              int64_t o_stride, const Heads& heads) {
  constexpr int kKeys = kSideBySide, kParted = kShares<T>;
  constexpr int kNeighbours = kKeys / kParted;
  constexpr bool kBusy = kRows == 4 && Heads::kOne;
  const int64_t share = n / kKeys * kNeighbours;
  constexpr int kPart = kParts<float, T>, kStep = kPart * kLanes;
  RowsAhead<Fetch, ListedRows<T>, T> ahead(first_v, first_v.ahead, heads, head_dim);
  const bool in_order = kInOrder<T, kRows> && ahead.fits(heads, head_dim, kStep, kKeys);
  for (int64_t j = 0; j < share; j += kNeighbours) {
    for (int64_t h = 0; h < heads.count; ++h) {
      const ListedRows<T> v = of_head(first_v, heads, h);
      const float* w = first_w + h * heads.rows * kScoreStride + first;
      float* o = first_o + h * heads.rows * o_stride;
      if (kParts<float, T> > 1 && kRows > 2) {  // all their weights would fill the registers
        for (int i = 0; i < kKeys; i += 2)
          add_some_values<kRows, 2, kNeighbours == 1 ? 1 : 2, kBusy>(
              w, v, kNeighbours == 1 ? j + i * share : j + i, share, head_dim, o, o_stride,
              in_order, ahead);
      } else {
        add_some_values<kRows, kKeys, kNeighbours, kBusy>(w, v, j, share, head_dim, o, o_stride,
                                                          in_order, ahead);
      }
    }
  }
  for (int64_t j = share * kParted; j < n; ++j) {
    for (int64_t h = 0; h < heads.count; ++h) {
      const ListedRows<T> v = of_head(first_v, heads, h);
      const float* w = first_w + h * heads.rows * kScoreStride + first;
      float* o = first_o + h * heads.rows * o_stride;
      add_some_values<kRows, 1, 1, kBusy>(w, v, j, 0, head_dim, o, o_stride, false, ahead);
    }
  }
}

#if defined(GEMMA2_BFLOAT16_PAIRS)

template <class Fetch>
using PairsAhead = RowsAhead<Fetch, KeyRows<BFloat16>, BFloat16>;

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
template <int kRows, class Fetch, class Heads>
GEMMA2_INLINE void dot_keys(Pair, const float* first_q, const KeyRows<BFloat16>& first_k, int64_t n,
                            int64_t depth, float* first_s, const Heads& heads) {
  constexpr int kKeys = kLanes / kRows;
  const int64_t whole = depth / kLanes * kLanes;
  PairsAhead<Fetch> ahead(first_k, Fetch::template kAhead<BFloat16>, heads, 2 * depth);
  for (int64_t j = 0; j < n; j += kKeys) {
    for (int64_t h = 0; h < heads.count; ++h) {
      const KeyRows<BFloat16> k = of_head(first_k, heads, h);
      const float* q = first_q + h * heads.rows * kQueryStride;
      float* s = first_s + h * heads.rows * kScoreStride;
      VecF sum[kLanes];  // (kRows, kKeys)
      const auto dot = [&](const auto& row_of) __attribute__((always_inline)) {
        GEMMA2_UNROLL
        for (int i = 0; i < kKeys; ++i) {
          const BFloat16* row = row_of(i);
          const BFloat16* later = ahead.next(Heads::kOne ? ahead.end : heads.stride);
          VecF part_sum[kRows];
          GEMMA2_UNROLL
          for (int r = 0; r < kRows; ++r) part_sum[r] = zero();
          const auto step = [&](int64_t d, int64_t words) __attribute__((always_inline)) {
            prefetch_step<Fetch, 64>(later, 2 * d);
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
}

// What stands for the key that a pair lacks.
alignas(64) constexpr BFloat16 kNoValue[256] = {};

// o[r] += the sum over kPairs pairs of weight[r] (lower, upper), two vectors of each row.
template <int kRows, int kPairs>
GEMMA2_INLINE void add_products(const VecF (&weight)[kRows][kPairs], const VecF (&lower)[kPairs],
                                const VecF (&upper)[kPairs], float* o, int64_t o_stride) {
  GEMMA2_UNROLL
  for (int r = 0; r < kRows; ++r) {
    float* to = o + r * o_stride;
    VecF first = load(to), second = load(to + kLanes);
    GEMMA2_UNROLL
    for (int i = 0; i < kPairs; ++i) {
      first = multiply_add(Pair{}, weight[r][i], lower[i], first);
      second = multiply_add(Pair{}, weight[r][i], upper[i], second);
    }
    store(to, first);
    store(to + kLanes, second);
  }
}

// As add_values, with kPairs pairs of weights w[r] for the values j, j + 1, ..., of which those
// outside [0, n) are not read; o's elements lie as pair_rows leaves them.
template <int kRows, int kPairs, bool kAllHeads, class Fetch>
GEMMA2_INLINE void add_pairs(const Pair* w, const KeyRows<BFloat16>& v, int64_t j, int64_t n,
                             int64_t head_dim, float* o, int64_t o_stride,
                             PairsAhead<Fetch>& ahead) {
  constexpr int64_t kStep = kPairs * 4 * kLanes;
  constexpr int64_t kAhead = Fetch::template kAhead<BFloat16>;
  const int64_t depth = head_dim / 2;
  const auto add = [&](const auto& row_of, const auto& later_of,
                       const auto& weight_of) __attribute__((always_inline)) {
    const BFloat16* rows[2 * kPairs];
    GEMMA2_UNROLL
    for (int i = 0; i < 2 * kPairs; ++i) rows[i] = row_of(i);
    VecF weight[kRows][kPairs];
    GEMMA2_UNROLL
    for (int r = 0; r < kRows; ++r) {
      GEMMA2_UNROLL
      for (int i = 0; i < kPairs; ++i) weight[r][i] = broadcast(weight_of(r, i));
    }
    const auto step = [&](int64_t d, int64_t words) __attribute__((always_inline)) {
      if (kAllHeads) {
        ahead.template fetch<kStep>();
      } else {
        GEMMA2_UNROLL
        for (int i = 0; i < 2 * kPairs; ++i) prefetch_step<Fetch, 64>(later_of(i), 2 * d);
      }
      VecF lower[kPairs], upper[kPairs];
      GEMMA2_UNROLL
      for (int i = 0; i < kPairs; ++i) {
        pair_rows<true>(load_words(Pair{}, rows[2 * i], d, words),
                        load_words(Pair{}, rows[2 * i + 1], d, words), lower[i], upper[i]);
      }
      add_products(weight, lower, upper, o + 2 * d, o_stride);
    };
    const int64_t whole = depth / kLanes * kLanes;
    for (int64_t d = 0; d < whole; d += kLanes) step(d, d + kLanes);
    if (whole < depth) step(whole, depth);
  };
  if (j >= 0 && j + 2 * kPairs <= n && v.in_line(j, 2 * kPairs)) {
    const BFloat16 *first = v.row(j), *later = v.row(j + kAhead);
    add([&](int i) { return first + i * v.stride; }, [&](int i) { return later + i * v.stride; },
        [&](int r, int i) { return w[r * kScoreStride + i]; });
  } else {
    const BFloat16* later[2 * kPairs];
    for (int i = 0; i < 2 * kPairs; ++i) later[i] = v.row(j + i + kAhead);
    add([&](int i) { return j + i >= 0 && j + i < n ? v.row(j + i) : kNoValue; },
        [&](int i) { return later[i]; },
        [&](int r, int i) { return j + 2 * i < n ? w[r * kScoreStride + i] : Pair{}; });
  }
}

template <int kRows, class Fetch, class Heads>
GEMMA2_INLINE void add_values(Pair, const float* w, const KeyRows<BFloat16>& v, int64_t first,
                              int64_t n, int64_t head_dim, float* o, int64_t o_stride,
                              const Heads& heads) {
  const Pair* pairs = (const Pair*)w + first / 2;
  int64_t j = -(first & 1);                   // the first pair's first key
  constexpr int kPairs = kRows <= 2 ? 4 : 2;  // with their weights in registers
  PairsAhead<Fetch> ahead(v, j + Fetch::template kAhead<BFloat16>, heads, head_dim);
  const auto add = [&](auto all_heads) __attribute__((always_inline)) {
    for (; j < n; j += 2 * kPairs, pairs += kPairs) {
      for (int64_t h = 0; h < heads.count; ++h) {
        add_pairs<kRows, kPairs, all_heads.value>(pairs + h * heads.rows * kScoreStride,
                                                  of_head(v, heads, h), j, n, head_dim,
                                                  o + h * heads.rows * o_stride, o_stride, ahead);
      }
    }
  };
  if (ahead.fits(heads, head_dim, 2 * kLanes, 2 * kPairs))
    add(Count<1>{});
  else
    add(Count<0>{});
}

// ---- rows of pairs that lie one behind another, as the model's cache has one head's
//
// The same sums in the same order. Loops whose lengths the compiler knows take two thirds of the
// time.

// s[r, j] = q[r] . k[j] of a block's keys. (Where the compiler mixes the loads of some, they come
// slower from memory.)
template <int kRows, int kDim, class Fetch>
__attribute__((noinline)) void dot_dense(const float* q, const BFloat16* k, float* s) {
  constexpr int kKeys = kLanes / kRows;
  for (int64_t j = 0; j < kKeyBlock; j += kKeys, k += kKeys * kDim) {
    VecF sum[kLanes];  // (kRows, kKeys)
    GEMMA2_UNROLL
    for (int i = 0; i < kKeys; ++i) {
      const BFloat16* row = k + i * kDim;
      keep_order(row);
      if (Fetch::kReads) touch_page<Touch::kFar>(row, kDim * 2);
      VecF part_sum[kRows];
      GEMMA2_UNROLL
      for (int r = 0; r < kRows; ++r) part_sum[r] = zero();
      GEMMA2_UNROLL
      for (int d = 0; d < kDim; d += 2 * kLanes) {
        if (!Fetch::kReads)
          prefetch_step<Fetch, 64>(row + Fetch::template kAhead<BFloat16> * kDim, d);
        const VecF key = load((const float*)(row + d));
        GEMMA2_UNROLL
        for (int r = 0; r < kRows; ++r)
          part_sum[r] = multiply_add(Pair{}, load(q + r * kQueryStride + d / 2), key, part_sum[r]);
      }
      GEMMA2_UNROLL
      for (int r = 0; r < kRows; ++r) {
        keep_order(part_sum[r]);
        sum[r * kKeys + i] = part_sum[r];
      }
    }
    store_dots<kRows>(reduce_sums(sum), s, j, kKeyBlock);
  }
}

// o[r] += sum over a block's keys of w[r, j] v[j]. What is read ahead ends at `end`.
// (The values of a pair come from two rows, so not in the order of memory; what is read ahead
// does.)
template <int kRows, int kDim, class Fetch>
__attribute__((noinline)) void add_dense(const Pair* w, const BFloat16* v, const BFloat16* end,
                                         float* o, int64_t o_stride) {
  constexpr int kPairs = 4, kKeys = 2 * kPairs;
  constexpr int64_t kStep = kKeys * 2 * kLanes;  // elements
  constexpr int64_t kReadAhead = 4096 / sizeof(BFloat16);
  const BFloat16* ahead =
      v + (Fetch::kReads ? kReadAhead : Fetch::template kAhead<BFloat16> * kDim);
  for (int64_t j = 0; j < kKeyBlock; j += kKeys, v += kKeys * kDim, w += kPairs) {
    VecF weight[kRows][kPairs];
    GEMMA2_UNROLL
    for (int r = 0; r < kRows; ++r) {
      GEMMA2_UNROLL
      for (int i = 0; i < kPairs; ++i) weight[r][i] = broadcast(w[r * kScoreStride + i]);
    }
    if (Fetch::kReads) touch_page<Touch::kFar>(v, kKeys * kDim * 2);
    for (int d = 0; d < kDim; d += 2 * kLanes) {
      const BFloat16* lines = Fetch::kReads && ahead > end - kStep ? end - kStep : ahead;
      VecF value[kKeys], lower[kPairs], upper[kPairs];
      GEMMA2_UNROLL
      for (int i = 0; i < kKeys; ++i) {
        if (Fetch::kReads)
          read_line(lines + i * 2 * kLanes);
        else
          prefetch_step<Fetch, 64>(lines, i * 2 * kLanes);
        value[i] = load((const float*)(v + i * kDim + d));
        if (Fetch::kReads) keep_order(value[i]);
      }
      GEMMA2_UNROLL
      for (int i = 0; i < kPairs; ++i)
        pair_rows<true>(value[2 * i], value[2 * i + 1], lower[i], upper[i]);
      add_products(weight, lower, upper, o + d, o_stride);
      ahead += kStep;
    }
  }
}

// ---- rows that are bound by arithmetic, of pairs
//
// Every load serves several products, in the order of additions of dot_keys and add_values: a row's
// result is the same. Keys and values come out of the second cache, into which the next block's are
// fetched meanwhile.

// s[r, j] = q[r] . k[j] for the rows, a multiple of kAttentionRowStep, and the n keys.
inline void dot_block(const float* q, int64_t rows, const KeyRows<BFloat16>& k, int64_t n,
                      int64_t depth, float* s, LineFetcher fetcher) {
  constexpr int kRows = kAttentionRowStep, kKeys = kLanes / kRows;
  const auto dots = [&](auto fetch, int64_t r, int64_t j,
                        const BFloat16* const(&keys)[kKeys]) __attribute__((always_inline)) {
    VecF part_sum[kRows][kKeys];
    GEMMA2_UNROLL
    for (int i = 0; i < kLanes; ++i) part_sum[i / kKeys][i % kKeys] = zero();
    const float* query = q + r * kQueryStride;
    for (int64_t d = 0; d < depth; d += kLanes) {
      for (int i = 0; i < kKeys && fetch.value; i += 2) fetcher.next();
      VecF key[kKeys];
      GEMMA2_UNROLL
      for (int i = 0; i < kKeys; ++i) key[i] = load_words(Pair{}, keys[i], d, depth);
      GEMMA2_UNROLL
      for (int i = 0; i < kRows; ++i) {
        const VecF words = load(query + i * kQueryStride + d);
        GEMMA2_UNROLL
        for (int c = 0; c < kKeys; ++c)
          part_sum[i][c] = multiply_add(Pair{}, words, key[c], part_sum[i][c]);
      }
    }
    VecF sum[kLanes];
    GEMMA2_UNROLL
    for (int i = 0; i < kLanes; ++i) sum[i] = part_sum[i / kKeys][i % kKeys];
    store_dots<kRows>(reduce_sums(sum), s + r * kScoreStride, j, n);
  };
  for (int64_t j = 0; j < n; j += kKeys) {
    const BFloat16* keys[kKeys];
    for (int i = 0; i < kKeys; ++i) keys[i] = k.row(min64(j + i, n - 1));
    dots(Count<1>{}, 0, j, keys);
    for (int64_t r = kRows; r < rows; r += kRows) dots(Count<0>{}, r, j, keys);
  }
}

// o[r, words d to d + kLanes] += sum over the pairs of w[r, pair] (row_of(2 pair), row_of(2 pair +
// 1)), for kRows rows.
template <int kRows, bool kFetch, class RowOf>
GEMMA2_INLINE void add_words(const Pair* w, const RowOf& row_of, int64_t begin, int64_t n,
                             int64_t d, int64_t depth, float* o, int64_t o_stride,
                             LineFetcher& fetcher) {
  VecF sum[kRows][2];
  GEMMA2_UNROLL
  for (int i = 0; i < 2 * kRows; ++i)
    sum[i / 2][i % 2] = load(o + i / 2 * o_stride + 2 * d + i % 2 * kLanes);
  for (int64_t j = begin; j < n; j += 2, ++w) {
    if (kFetch) fetcher.next();
    VecF lower, upper;
    pair_rows<true>(load_words(Pair{}, row_of(j), d, depth),
                    load_words(Pair{}, row_of(j + 1), d, depth), lower, upper);
    GEMMA2_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const VecF weight = broadcast(w[r * kScoreStride]);
      sum[r][0] = multiply_add(Pair{}, weight, lower, sum[r][0]);
      sum[r][1] = multiply_add(Pair{}, weight, upper, sum[r][1]);
    }
  }
  GEMMA2_UNROLL
  for (int i = 0; i < 2 * kRows; ++i)
    store(o + i / 2 * o_stride + 2 * d + i % 2 * kLanes, sum[i / 2][i % 2]);
}

// o[r] += sum over the n keys of w[r, first + j] v[j] for the rows, as many as in dot_block.
inline void add_block(const float* weights, int64_t rows, const KeyRows<BFloat16>& v, int64_t first,
                      int64_t n, int64_t head_dim, float* o, int64_t o_stride,
                      LineFetcher fetcher) {
  const Pair* w = (const Pair*)weights + first / 2;
  const int64_t depth = head_dim / 2, begin = -(first & 1);
  const auto add = [&](const auto& row_of) __attribute__((always_inline)) {
    for (int64_t d = 0; d < depth; d += kLanes) {
      add_words<8, true>(w, row_of, begin, n, d, depth, o, o_stride, fetcher);
      int64_t r = 8;
      for (; r + 8 <= rows; r += 8)
        add_words<8, false>(w + r * kScoreStride, row_of, begin, n, d, depth, o + r * o_stride,
                            o_stride, fetcher);
      if (r < rows)
        add_words<4, false>(w + r * kScoreStride, row_of, begin, n, d, depth, o + r * o_stride,
                            o_stride, fetcher);
    }
  };
  if (begin == 0 && n % 2 == 0 && v.in_line(0, n)) {
    const BFloat16* row = v.row(0);
    add([&](int64_t j) { return row + j * v.stride; });
  } else {
    add([&](int64_t j) { return j >= 0 && j < n ? v.row(j) : kNoValue; });
  }
}

#endif

}  // namespace
}  // namespace GEMMA2_ISA
}  // namespace gemma2
