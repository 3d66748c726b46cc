// The inner loop of every blocked product: a tile of sums from packed operands.
//
// One operand is packed in panels of kPanelWidth columns, [k][column], so that a vector holds one k
// of kLanes columns. The other goes kGemmDepth factors of a row at a time, and each factor is
// broadcast. The sums of a block of k are added to those of the blocks before, so a sum's order
// does not depend on the sizes of the other dimensions, nor on the threads.
#pragma once
#include "linear-inl.h"
#if defined(GEMMA2_ISA_avx512_amx)
#include "tiles.h"
#endif

namespace gemma2 {
namespace GEMMA2_ISA {
namespace {

constexpr int kPanelWidth = 2 * kLanes;
// Whether the products of T are those of AMX's tiles.
#if defined(GEMMA2_ISA_avx512_amx)
template <class T>
constexpr bool kInTiles = Math<T>::kPerFactor == 2;
#else
template <class T>
constexpr bool kInTiles = false;
#endif
// Rows of a register tile; of a tile of no more than one vector of columns kNarrowRows.
template <class T>
constexpr int kTileRows = kInTiles<T>        ? 32
                          : kRegisters == 32 ? 12
                                             : 6;
template <class T>
constexpr int kNarrowRows = kInTiles<T> ? 32 : 12;
// Factors of a row at a time. A tile of products takes them from memory, not from registers: two
// rows of tiles stay in a first-level cache with a panel.
template <class T>
constexpr int64_t kBlockDepth = kInTiles<T> ? kGemmDepth / 2 : kGemmDepth;

// Factors that hold k elements; where tiles take them, whole rows of tiles, with zeros behind.
template <class T>
GEMMA2_INLINE int64_t factors(int64_t k) {
  const int64_t n = divide_up(k, Math<T>::kPerFactor);
  return kInTiles<T> ? divide_up(n, kLanes) * kLanes : n;
}

template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;
// Whether rows of S are factors of T, or are widened to them, without rounding.
template <class T, class S>
constexpr bool kPacksRows = Math<T>::kPerFactor == 1 || kSame<T, S>;

// Factors [i, i + kLanes) of a row.
template <class T, class S>
GEMMA2_INLINE VecF load_words(const S* row, int64_t i) {
  if constexpr (Math<T>::kPerFactor == 1) {
    return load(row + i);
  } else {
    return (VecF)load_bits(row + 2 * i);
  }
}
// Factor i, 0 behind the last one.
template <class T, class S>
GEMMA2_INLINE typename Math<T>::Factor load_factor(const S* row, int64_t i, int64_t depth) {
  typename Math<T>::Factor factor{};
  if constexpr (Math<T>::kPerFactor == 1) {
    factor = to_float(row[i]);
  } else if (2 * i < depth) {
    memcpy(&factor, row + 2 * i, 2);
    if (2 * i + 1 < depth) memcpy((char*)&factor + 2, row + 2 * i + 1, 2);
  }
  return factor;
}

// A panel of `width` columns, each a row of `depth` elements, `stride` apart; the first `rows` of
// them are there, the others zeros.
template <class T, class S, class Factor = typename Math<T>::Factor>
void pack_panel_of_rows(const S* from, int64_t stride, int64_t rows, int width, int64_t depth,
                        Factor* packed) {
  static_assert(kPacksRows<T, S>, "");
  const int64_t k_factors = factors<T>(depth);
  const int64_t whole = depth / (kLanes * Math<T>::kPerFactor) * kLanes;
  for (int first = 0; first < width; first += kLanes) {
    const S* row[kLanes];
    for (int r = 0; r < kLanes; ++r)
      row[r] = first + r < rows ? from + (first + r) * stride : nullptr;
    for (int64_t i = 0; i < whole; i += kLanes) {
      VecF v[kLanes];
      GEMMA2_UNROLL
      for (int r = 0; r < kLanes; ++r) v[r] = row[r] ? load_words<T>(row[r], i) : zero();
      transpose(v);
      GEMMA2_UNROLL
      for (int j = 0; j < kLanes; ++j) {
        float* to = (float*)packed + (i + j) * width + first;
        if (first + kLanes <= width) {
          store(to, v[j]);
        } else {
          memcpy(to, &v[j], sizeof(LowF));
        }
      }
    }
    for (int64_t i = whole; i < k_factors; ++i) {
      for (int r = 0; r < min_of(kLanes, width - first); ++r)
        packed[i * width + first + r] = row[r] ? load_factor<T>(row[r], i, depth) : Factor{};
    }
  }
}

// sums[r][c] (+)= over i of rows[r][i] * panel[i][c], for kRows rows, `stride` factors apart, and
// kWidth columns: whole vectors, or half a one behind them. With kFetch as many bytes of T as the
// rows have are fetched from `next` on.
template <class T, int kWidth, int kRows, bool kFetch = false,
          class Factor = typename Math<T>::Factor>
void gemm_tile(const Factor* panel, const Factor* rows, int64_t stride, int64_t depth, float* sums,
               int64_t sums_stride, bool add, const T* next = nullptr) {
  using M = Math<T>;
  static_assert(!kFetch || kRows * M::kPerFactor * sizeof(T) <= kLineBytes, "a line a step");
  constexpr int kVectors = kWidth / kLanes, kLow = kWidth % kLanes;
  static_assert(kLow == 0 || kLow == kLanes / 2, "");
  VecF sum[kRows][kVectors > 0 ? kVectors : 1] = {};
  LowF low_sum[kRows] = {};
#if defined(GEMMA2_ISA_neon_bf16)
  if constexpr (M::kPerFactor == 2) {
    multiply_pairs_tile([&](int r) { return rows + r * stride; }, (const float*)panel, kWidth,
                        depth, sum,
                        [&](int64_t i) {
                          if constexpr (kFetch) prefetch(next + i * kRows * M::kPerFactor);
                        });
  } else
#endif
  {
    for (int64_t i = 0; i < depth; ++i) {
      if constexpr (kFetch) prefetch(next + i * kRows * M::kPerFactor);
      typename M::Vec columns[kVectors > 0 ? kVectors : 1];
      typename M::Low low_columns{};
      GEMMA2_UNROLL
      for (int v = 0; v < kVectors; ++v) columns[v] = M::load_factors(panel + v * kLanes);
      if constexpr (kLow != 0) memcpy(&low_columns, panel + kVectors * kLanes, sizeof low_columns);
      GEMMA2_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const auto row = M::template broadcast<kVectors == 0>(rows[r * stride + i]);
        if constexpr (kVectors > 0) {
          GEMMA2_UNROLL
          for (int v = 0; v < kVectors; ++v)
            sum[r][v] = M::multiply_add(columns[v], row, sum[r][v]);
        }
        if constexpr (kLow != 0) low_sum[r] = M::multiply_add(low_columns, lower(row), low_sum[r]);
      }
      panel += kWidth;
    }
  }
  GEMMA2_UNROLL
  for (int r = 0; r < kRows; ++r) {
    GEMMA2_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      float* to = sums + r * sums_stride + v * kLanes;
      store(to, add ? load(to) + sum[r][v] : sum[r][v]);
    }
    if constexpr (kLow != 0) {
      float* to = sums + r * sums_stride + kVectors * kLanes;
      LowF before = {};
      if (add) memcpy(&before, to, sizeof before);
      const LowF after = add ? before + low_sum[r] : low_sum[r];
      memcpy(to, &after, sizeof after);
    }
  }
}

// The same by tiles (kInTiles<T>): 32 rows and kVectors times 16 columns, `depth` a multiple of 16.
// The registers have to be set up for 16 words. In every step `lines` lines are fetched, from
// `next` on.
template <class T, int kVectors, class Factor = typename Math<T>::Factor>
void tile_product(const Factor* panel, const Factor* rows, int64_t stride, int64_t depth,
                  float* sums, int64_t sums_stride, bool add, const void* next, int64_t lines);
#if defined(GEMMA2_ISA_avx512_amx)
template <class T, int kVectors, class Factor>
void tile_product(const Factor* panel, const Factor* rows, int64_t stride, int64_t depth,
                  float* sums, int64_t sums_stride, bool add, const void* next, int64_t lines) {
  static_assert(kTileRows<T> == 2 * kTileLines && sizeof(Factor) == 4, "");
  const char* line = (const char*)next;
  multiply_tiles<2, kVectors>({rows, stride * 4}, {panel, kVectors * kTileWords * 4}, depth, sums,
                              sums_stride, add, [&] {
                                for (int64_t i = 0; i < lines; ++i, line += kLineBytes)
                                  prefetch(line);
                              });
}
#endif

}  // namespace
}  // namespace GEMMA2_ISA
}  // namespace gemma2
