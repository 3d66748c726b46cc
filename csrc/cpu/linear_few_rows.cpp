// out = x weight^T for few rows, as in decoding; x (rows, in_features), weight (out_features,
// in_features).
//
// A unit is kLinearFewColumns columns of out. The weights stream once from memory, which bounds
// this: each is unpacked in registers and multiplied with all rows of a group, several weight rows
// at once. x is packed before, in groups of rows: [step][row][kStep]. Every sum runs over k in the
// same order (kLanes partial sums, then reduce_sum), whatever the number of rows and threads, so a
// row's result does not depend on its neighbours.
#include "kernels.h"
#include "linear-inl.h"

namespace gemma2 {
namespace GEMMA2_ISA {
namespace {

// Rows that one pass over the weights serves, and the weight rows beside each other then: enough
// sums to hide the latency of an addition, few enough to stay in registers with the weights.
constexpr int kGroupRows = kRegisters == 32 ? 8 : 4;
constexpr int group_columns(int rows) {
  return kRegisters == 32 ? (rows <= 3   ? 8
                             : rows == 4 ? 6
                             : rows <= 6 ? 4
                                         : 3)
                          : (rows == 1   ? 8
                             : rows == 2 ? 4
                                         : 3);
}
// k is walked in blocks of this many elements: few enough for a group's part of x to stay in the
// first-level cache and for rounding errors of a sum to stay small, many enough for weights to
// stream. The blocks' sums are added up in memory.
constexpr int64_t kBlock = 2304;

// Below AVX-512 the processor's own prefetcher makes more of a few long streams than of
// neighbouring rows that are fetched by instruction.
constexpr bool kLongStreams = kRegisters == 16;
constexpr int kStreams = 6;
template <int n>
struct Count {
  static constexpr int value = n;
};

GEMMA2_INLINE int64_t group_count(const LinearParams& p) { return divide_up(p.rows, kGroupRows); }
GEMMA2_INLINE int64_t group_begin(const LinearParams& p, int64_t group) {
  return p.rows * group / group_count(p);
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
      T elements[kStep];
      copy_tail(x + s * kStep, min_of<int64_t>(kStep, p.in_features - s * kStep), elements);
      for (int part = 0; part < M::kParts; ++part) {
        const typename M::Vec factors = M::load_part(elements, part);
        memcpy(packed + (s * rows + r) * kFactors + part * kLanes, &factors, sizeof factors);
      }
    }
  }
}

// sums[r][c] += x[r] . w[c] over n elements of k, for kRows rows of a group and kColumns rows of
// weight. With kFetch the tile that follows, at `next`, is fetched.
template <class T, int kRows, int kColumns, bool kFetch = true>
void dot_tile(const T* w, const T* next, int64_t w_stride, const typename Math<T>::Factor* x,
              int64_t n, VecF (*sums)[kLinearFewColumns]) {
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
          sum[r][c] = M::multiply_add(weights[c], factors, sum[r][c]);
      }
    }
    x += kRows * kFactors;
  };
  int64_t k = 0;
  for (; k + kStep <= n; k += kStep) {
    // The processor's own prefetcher starts anew at every row.
    GEMMA2_UNROLL
    for (int c = 0; c < kColumns && kFetch; ++c) prefetch(next + c * w_stride + k);
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

// Adds elements [k, k + n) of k to the sums of kRows rows and columns [begin, end).
template <class T, int kRows>
void dot_group(const LinearParams& p, int64_t first_row, int64_t begin, int64_t end, int64_t k,
               int64_t n, VecF (*sums)[kLinearFewColumns]) {
  constexpr int kColumns = group_columns(kRows);
  constexpr int kPerFactor = Math<T>::kPerFactor;
  const int64_t padded = divide_up(p.in_features, kStep) * kStep;
  const auto* x =
      (const typename Math<T>::Factor*)p.packed_x + (first_row * padded + k * kRows) / kPerFactor;
  const T* w = (const T*)p.weight + k;
  // Behind the last columns of a block of k come the first ones of the next block, or of the next
  // unit. (Where there is none, a prefetch past the weights does no harm.)
  const T* following = k + n < p.in_features ? w + begin * p.weight_stride + n
                                             : (const T*)p.weight + end * p.weight_stride;
  int64_t c = begin;
  for (; c + kColumns <= end; c += kColumns) {
    const T* row = w + c * p.weight_stride;
    dot_tile<T, kRows, kColumns>(
        row, c + kColumns < end ? row + kColumns * p.weight_stride : following, p.weight_stride, x,
        n, (VecF(*)[kLinearFewColumns])(sums[0] + c - begin));
  }
  for (; c < end; ++c) {
    const T* row = w + c * p.weight_stride;
    dot_tile<T, kRows, 1>(row, c + 1 < end ? row + p.weight_stride : following, p.weight_stride, x,
                          n, (VecF(*)[kLinearFewColumns])(sums[0] + c - begin));
  }
}

// Calls the instance for `rows` rows, 1 to kGroupRows.
template <class T, int kRows, class... Args>
void dot_rows(int64_t rows, const Args&... args) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return dot_rows<T, kRows - 1>(rows, args...);
  }
  dot_group<T, kRows>(args...);
}

// One row with columns [begin, end), by kStreams streams of whole rows of weight, one row behind
// the other.
template <class T>
void dot_streams(const LinearParams& p, int64_t begin, int64_t end, VecF* sums) {
  using Factor = typename Math<T>::Factor;
  const int64_t length = (end - begin) / kStreams;
  const auto walk = [&](auto streams, int64_t column) {
    constexpr int kCount = decltype(streams)::value;
    VecF tile[1][kLinearFewColumns] = {};
    const T* w = (const T*)p.weight + (begin + column) * p.weight_stride;
    for (int64_t k = 0; k < p.in_features; k += kBlock) {
      dot_tile<T, 1, kCount, false>(w + k, nullptr, length * p.weight_stride,
                                    (const Factor*)p.packed_x + k / Math<T>::kPerFactor,
                                    min_of(kBlock, p.in_features - k), tile);
    }
    for (int s = 0; s < kCount; ++s) sums[column + s * length] = tile[0][s];
  };
  for (int64_t c = 0; c < length; ++c) walk(Count<kStreams>{}, c);
  for (int64_t c = length * kStreams; c < end - begin; ++c) walk(Count<1>{}, c);
}

template <class T>
void dot_columns(const LinearParams& p, int64_t begin, int64_t end) {
  VecF sums[kLinearFewRows][kLinearFewColumns];
  memset(sums, 0, sizeof sums[0] * p.rows);
  if (kLongStreams && p.rows == 1) {
    dot_streams<T>(p, begin, end, sums[0]);
  } else {
    for (int64_t k = 0; k < p.in_features; k += kBlock) {
      const int64_t n = min_of(kBlock, p.in_features - k);
      for (int64_t g = 0; g < group_count(p); ++g) {
        const int64_t row = group_begin(p, g), rows = group_begin(p, g + 1) - row;
        dot_rows<T, kGroupRows>(rows, p, row, begin, end, k, n, sums + row);
      }
    }
  }
  for (int64_t r = 0; r < p.rows; ++r) {
    float line[kLinearFewColumns];
    for (int64_t c = 0; c < end - begin; ++c) line[c] = reduce_sum(sums[r][c]);
    finish_row(p, r, begin, end - begin, line);
  }
}

}  // namespace

// One unit: all of x.
void linear_pack_rows(const LinearParams& p, int64_t, int64_t) {
  dispatch_dtype(p.dtype, [&](auto t) {
    for (int64_t g = 0; g < group_count(p); ++g)
      pack_group<decltype(t)>(p, group_begin(p, g), group_begin(p, g + 1) - group_begin(p, g));
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
