// out = x weight^T for few rows, as in decoding; x (rows, in_features), weight (out_features,
// in_features).
//
// A unit is kLinearFewColumns columns of out. The weights stream once from memory, which bounds
// this: each is unpacked in registers and multiplied with all rows of a group. x is packed before,
// in groups of rows: [step][row][kStep]. Every sum runs over k in the same order (kLanes partial
// sums, then reduce_sum), whatever the number of rows and threads, so a row's result does not
// depend on its neighbours.
#include "kernels.h"
#include "linear-inl.h"

namespace gemma2 {
namespace GEMMA2_ISA {
namespace {

// Rows that one pass over the weights serves, and the weight rows beside each other then: enough
// sums to hide the latency of an addition and to read x seldom, few enough to stay in registers
// with the weights (where all 32 are taken, as by 8 rows of floats, the compiler does not find
// room).
template <class T>
constexpr int kGroupRows = kRegisters == 32 ? (Math<T>::kPerFactor == 2 ? 8 : 6) : 4;
constexpr int group_columns(int rows) { return rows <= (kRegisters == 32 ? 6 : 2) ? 4 : 3; }
// k is walked in blocks of this many elements: few enough for a group's part of x to stay in the
// first-level cache and for rounding errors of a sum to stay small, many enough for weights to
// stream. The blocks' sums are added up in memory.
constexpr int64_t kBlock = kRegisters == 32 ? 1152 : 2304;

// One row goes by kStreams streams of whole rows of weight, one row behind the other. With AVX-512
// a single one, fetched kStreamAhead bytes ahead (of one row by the processor itself, on a Zen 4),
// comes fastest, and serves up to kStreamRows rows too where all of x stays in the first-level
// cache: kStreamBytes. Below, the processor's own prefetcher makes more of a few long streams.
constexpr int kStreams = kRegisters == 32 ? 1 : 6;
// Streams on a Zen 4 where x and a row of weight together are more than kStreamBytes, so that one
// drives the other out of the first-level cache: they share x.
constexpr int kSharingStreams = 4;
constexpr int64_t kStreamAhead = kRegisters == 32 ? 6144 : 0;
constexpr int kStreamRows = kRegisters == 32 ? 6 : 1;
constexpr int64_t kStreamBytes = 24 << 10;
// Of more rows the first kSplitRows do, where one group holds the others, an instruction multiplies
// two elements, and the weights are so many bytes that they come from memory: the group meets a
// unit's weights in the second-level cache then. With more rows at once, memory and arithmetic wait
// for each other, though not on a Zen 4.
constexpr int kSplitRows = 2;
constexpr int64_t kSplitBytes = 4 << 20;
template <class T>
constexpr bool kSplits = kRegisters == 32 && Math<T>::kPerFactor == 2;

// From so many rows on, groups fetch on a Zen 4 what follows in the same rows of weight, a block of
// k ahead; elsewhere, and of fewer rows, the next rows' elements.
template <class T>
constexpr int64_t kAheadRows = 7;
template <>
constexpr int64_t kAheadRows<Half> = 2;

// A row of packed x.
template <class T>
GEMMA2_INLINE int64_t row_bytes(const LinearParams& p) {
  return p.in_features * sizeof(typename Math<T>::Factor) / Math<T>::kPerFactor;
}
// The first rows of x, which go as streams; the others are in groups.
template <class T>
GEMMA2_INLINE int64_t stream_rows(const LinearParams& p) {
  const int64_t bytes = row_bytes<T>(p);
  if (p.rows == 1 || (p.rows <= kStreamRows && p.rows * bytes <= kStreamBytes)) return p.rows;
  const bool splits = kSplits<T> && !p.zen4 && p.rows <= kSplitRows + kGroupRows<T> &&
                      kSplitRows * bytes <= kStreamBytes &&
                      p.out_features * p.weight_stride * int64_t(sizeof(T)) >= kSplitBytes;
  return splits ? kSplitRows : 0;
}
template <class T>
GEMMA2_INLINE int64_t group_count(const LinearParams& p) {
  return divide_up(p.rows - stream_rows<T>(p), kGroupRows<T>);
}
template <class T>
GEMMA2_INLINE int64_t group_begin(const LinearParams& p, int64_t group) {
  const int64_t first = stream_rows<T>(p);
  return first + (p.rows - first) * group / group_count<T>(p);
}

// n <= kStep elements, followed by zeros up to kStep.
template <class T>
GEMMA2_INLINE void copy_tail(const T* from, int64_t n, T* to) {
  memset(to, 0, kStep * sizeof(T));
  memcpy(to, from, n * sizeof(T));
}

template <class T>
void pack_group(const LinearParams& p, int64_t first_row, int64_t rows) {
  using M = Math<T>;
  constexpr int kFactors = kStep / M::kPerFactor;
  const int64_t steps = divide_up(p.in_features, kStep);
  auto* packed = (typename M::Factor*)p.packed_x + first_row * steps * kFactors;
  for (int64_t r = 0; r < rows; ++r) {
    const T* x = (const T*)p.x + (first_row + r) * p.x_stride;
    for (int64_t s = 0; s < steps; ++s) {
      const int64_t left = p.in_features - s * kStep;
      const T* elements = x + s * kStep;
      T tail[kStep];
      if (left < kStep) {
        copy_tail(elements, left, tail);
        elements = tail;
      }
      for (int part = 0; part < M::kParts; ++part) {
        const typename M::Vec factors = M::load_part(elements, part);
        memcpy(packed + (s * rows + r) * kFactors + part * kLanes, &factors, sizeof factors);
      }
    }
  }
}

// As an instruction that adds to its operand: of the forms with another one in its place some
// compilers take so many that sums go through memory, where 12 of 16 registers are sums.
template <class T, class V>
GEMMA2_INLINE VecF multiply_add_in_place(V a, V b, VecF sum) {
#if defined(__FMA__) && GEMMA2_LANES == 8
  asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
  return sum;
#else
  return Math<T>::multiply_add(a, b, sum);
#endif
}

// sums[r][c] += x[r] . w[c] over n elements of k, for kRows rows of a group and kColumns rows of
// weight. With kFetch the same elements of those at `next` are fetched.
template <class T, int kRows, int kColumns, bool kFetch, Touch kTouch, size_t kStride>
void dot_tile(const T* w, const T* next, int64_t w_stride, const typename Math<T>::Factor* x,
              int64_t n, VecF (*sums)[kStride]) {
  using M = Math<T>;
  constexpr int kFactors = kStep / M::kPerFactor;
  VecF sum[kRows][kColumns] = {};
  const auto step = [&](const T* at, int64_t stride) __attribute__((always_inline)) {
    GEMMA2_UNROLL
    for (int part = 0; part < M::kParts; ++part) {
      typename M::Vec weights[kColumns];
      GEMMA2_UNROLL
      for (int c = 0; c < kColumns; ++c) weights[c] = M::load_part(at + c * stride, part);
      GEMMA2_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const typename M::Vec factors = M::load_factors(x + r * kFactors + part * kLanes);
        GEMMA2_UNROLL
        for (int c = 0; c < kColumns; ++c)
          sum[r][c] = multiply_add_in_place<T>(weights[c], factors, sum[r][c]);
      }
    }
    x += kRows * kFactors;
  };
  int64_t k = 0;
  for (; k + kStep <= n; k += kStep) {
    // The processor's own prefetcher starts anew at every row.
    GEMMA2_UNROLL
    for (int c = 0; c < kColumns && kFetch; ++c) {
      GEMMA2_UNROLL
      for (int64_t i = 0; i < kStep; i += kLineBytes / int64_t(sizeof(T)))
        prefetch(next + c * w_stride + k + i);
    }
    GEMMA2_UNROLL
    for (int c = 0; c < kColumns; ++c)
      touch_page<kTouch>(w + c * w_stride + k, kStep * int64_t(sizeof(T)));
    step(w + k, w_stride);
  }
  if (k < n) {
    T tails[kColumns][kStep];
    for (int c = 0; c < kColumns; ++c) copy_tail(w + c * w_stride + k, n - k, tails[c]);
    step(tails[0], kStep);
  }
  GEMMA2_UNROLL
  for (int r = 0; r < kRows; ++r) {
    GEMMA2_UNROLL
    for (int c = 0; c < kColumns; ++c) sums[r][c] += sum[r][c];
  }
}

// Element k of kRows rows of packed x.
template <class T>
GEMMA2_INLINE const typename Math<T>::Factor* packed_at(const LinearParams& p, int64_t first_row,
                                                        int64_t rows, int64_t k) {
  const int64_t padded = divide_up(p.in_features, kStep) * kStep;
  return (const typename Math<T>::Factor*)p.packed_x +
         (first_row * padded + k * rows) / Math<T>::kPerFactor;
}

// Adds elements [k, k + n) of k to the sums of kRows rows and columns [begin, end).
template <class T, int kRows, bool kFetch>
void dot_group(const LinearParams& p, int64_t first_row, int64_t begin, int64_t end, int64_t k,
               int64_t n, VecF (*sums)[kLinearFewColumns]) {
  const auto* x = packed_at<T>(p, first_row, kRows, k);
  const T* w = (const T*)p.weight + k;
  // Behind the last columns of a block of k come the first ones of the next block, or of the next
  // unit. (Where there is none, a prefetch past the weights does no harm.)
  const T* following = k + n < p.in_features ? w + begin * p.weight_stride + n
                                             : (const T*)p.weight + end * p.weight_stride;
  const bool block_ahead = kRegisters == 32 && p.zen4 && p.rows >= kAheadRows<T>;
  int64_t c = begin;
  const auto walk = [&](auto columns) {
    constexpr int kColumns = decltype(columns)::value;
    for (; c + kColumns <= end; c += kColumns) {
      const T* row = w + c * p.weight_stride;
      const int64_t ahead = c + (block_ahead ? kLinearFewColumns : kColumns);
      const T* next =
          ahead < end ? w + ahead * p.weight_stride : following + (ahead - end) * p.weight_stride;
      dot_tile<T, kRows, kColumns, kFetch, Touch::kNone>(
          row, next, p.weight_stride, x, n, (VecF(*)[kLinearFewColumns])(sums[0] + c - begin));
    }
  };
  walk(Count<group_columns(kRows)>{});
  walk(Count<1>{});
}

// The first kRows rows with columns [begin, end), by kCount streams of whole rows of weight, one
// row behind the other.
template <class T, int kRows, int kCount, bool kFetch, Touch kTouch>
void dot_streams(const LinearParams& p, int64_t begin, int64_t end,
                 VecF (*sums)[kLinearFewColumns]) {
  const int64_t length = (end - begin) / kCount;
  const auto walk = [&](auto streams, int64_t column) {
    constexpr int kBeside = decltype(streams)::value;
    VecF tile[kRows][kBeside] = {};
    const T* w = (const T*)p.weight + (begin + column) * p.weight_stride;
    for (int64_t k = 0; k < p.in_features; k += kBlock) {
      dot_tile<T, kRows, kBeside, kFetch, kTouch>(
          w + k, w + k + kStreamAhead / int64_t(sizeof(T)), length * p.weight_stride,
          packed_at<T>(p, 0, kRows, k), min_of(kBlock, p.in_features - k), tile);
    }
    for (int r = 0; r < kRows; ++r)
      for (int s = 0; s < kBeside; ++s) sums[r][column + s * length] = tile[r][s];
  };
  for (int64_t c = 0; c < length; ++c) walk(Count<kCount>{}, c);
  for (int64_t c = length * kCount; c < end - begin; ++c) walk(Count<1>{}, c);
}

template <class T>
void dot_columns(const LinearParams& p, int64_t begin, int64_t end) {
  VecF sums[kLinearFewRows][kLinearFewColumns];
  memset(sums, 0, divide_up(p.rows * kLinearFewColumns, kLanes) * sizeof(VecF[kLanes]));
  const int64_t first = stream_rows<T>(p);
  if (first) {
    constexpr bool kFetch = kStreamAhead != 0;
    if (kFetch && p.zen4 && p.rows == 1) {
      const bool share = row_bytes<T>(p) + p.in_features * int64_t(sizeof(T)) > kStreamBytes;
      (share ? dot_streams<T, 1, kSharingStreams, false, Touch::kFar>
             : dot_streams<T, 1, kStreams, false, Touch::kFar>)(p, begin, end, sums);
    } else {
      dispatch_rows<1, kStreamRows>(first, [&](auto rows) {
        constexpr int kRows = decltype(rows)::value;
        (kFetch && p.zen4
             ? dot_streams<T, kRows, kStreams, kFetch, Touch::kNear>
             : dot_streams<T, kRows, kStreams, kFetch, Touch::kNone>)(p, begin, end, sums);
      });
    }
  }
  // A split's groups find their weights in a cache, and fetch none.
  const auto add_groups = [&](auto split) {
    constexpr bool kSplit = decltype(split)::value;
    for (int64_t k = 0; k < p.in_features; k += kBlock) {
      const int64_t n = min_of(kBlock, p.in_features - k);
      for (int64_t g = 0; g < group_count<T>(p); ++g) {
        const int64_t row = group_begin<T>(p, g);
        dispatch_rows<kSplit ? 1 : 2, kGroupRows<T>>(
            group_begin<T>(p, g + 1) - row, [&](auto rows) {
              dot_group<T, decltype(rows)::value, !kSplit>(p, row, begin, end, k, n, sums + row);
            });
      }
    }
  };
  if (first == 0) {
    add_groups(Count<false>{});
  } else if (kSplits<T> && first < p.rows) {
    add_groups(Count<kSplits<T>>{});
  }
  // As many sums as there are lanes at once, whichever rows they are of.
  float lines[kLinearFewRows * kLinearFewColumns];
  for (int64_t i = 0; i < p.rows * kLinearFewColumns; i += kLanes) {
    VecF group[kLanes];
    memcpy(group, sums[0] + i, sizeof group);
    store(lines + i, reduce_sums(group));
  }
  for (int64_t r = 0; r < p.rows; ++r)
    finish_row(p, r, begin, end - begin, lines + r * kLinearFewColumns);
}

}  // namespace

// One unit: all of x.
void linear_pack_rows(const LinearParams& p, int64_t, int64_t) {
  dispatch_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    pack_group<T>(p, 0, stream_rows<T>(p));
    for (int64_t g = 0; g < group_count<T>(p); ++g)
      pack_group<T>(p, group_begin<T>(p, g), group_begin<T>(p, g + 1) - group_begin<T>(p, g));
  });
}

void linear_few_rows(const LinearParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto t) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t first = unit * kLinearFewColumns;
      dot_columns<decltype(t)>(p, first, min_of(first + kLinearFewColumns, p.out_features));
    }
  });
}

}  // namespace GEMMA2_ISA
}  // namespace gemma2
