// out = x weight^T for many rows: a blocked GEMM; x (rows, in_features), weight (out_features,
// in_features).
//
// A unit is unit_columns columns of out for all rows (at most kLinearRowBlock). x is packed before,
// once for all units, in panels of kPanelRows rows: [k][row], so that a vector holds one k of
// kLanes rows. Weights stay row major: up to kGroupRows rows at a time meet all of x, one
// block of k after another, and each factor is broadcast; where they lie in memory, or unpacked to
// factors where they are none as they lie. Meanwhile the rows behind them are fetched, in the order
// of memory. The sums of a block of k are added to those of the blocks before, so a sum's order
// does not depend on the number of rows or threads. Arithmetic bounds this, memory where rows are
// few.
#include "gemm-inl.h"
#include "kernels.h"

namespace gemma2 {
namespace GEMMA2_ISA {
namespace {

constexpr int kPanelRows = kPanelWidth;
// So many rows of weight meet all of x before the next ones do, where x is no larger than this;
// else a unit's do, one block of k after another.
template <class T>
constexpr int64_t kGroupRows = kInTiles<T> ? 64 : 24;
constexpr int64_t kGroupBytes = 3 << 19;
// From this size on the next panel's part of x is fetched too, by the products of its first
// kFetchRows rows of weight.
constexpr int64_t kFetchBytes = 3 << 20;
template <class T>
constexpr int64_t kFetchRows =
    (kPanelRows * 4 / (Math<T>::kPerFactor * int64_t(sizeof(T))) + kNarrowRows<T> - 1) /
    kNarrowRows<T> * kNarrowRows<T>;
// Whether weights are factors as they lie in memory.
template <class T>
constexpr bool kInPlace = sizeof(T) * Math<T>::kPerFactor == sizeof(typename Math<T>::Factor);
// Whether rows of weight so far apart lie in one set of the first-level cache, where a tile has
// more of them than a set has lines. (Tiles of AMX read a line of each row at once.)
template <class T>
GEMMA2_INLINE bool rows_collide(int64_t stride) {
  return !kInTiles<T> && kTileRows<T> > 8 && stride * int64_t(sizeof(T)) % kLinearWayBytes == 0;
}

// Rows of a panel: of the last one as many as suffice, by half vectors where a processor may make
// two passes of a whole one.
template <class T>
GEMMA2_INLINE int panel_width(const LinearParams& p, int64_t panel) {
  constexpr int kStep = kLanes == 16 && !kInTiles<T> ? kLanes / 2 : kLanes;
  const int64_t rows = p.rows - panel * kPanelRows;
  return int(min_of<int64_t>(divide_up(rows, kStep) * kStep, kPanelRows));
}
// Calls f with the width, as panel_width has it.
template <class F>
GEMMA2_INLINE void dispatch_width(int width, const F& f) {
  if constexpr (kLanes == 16) {
    if (width == kLanes / 2) return f(Count<kLanes / 2>{});
    if (width == kLanes / 2 * 3) return f(Count<kLanes / 2 * 3>{});
  }
  if (width == kLanes) return f(Count<kLanes>{});
  f(Count<kPanelRows>{});
}

template <class T>
void pack_panel(const LinearParams& p, int64_t panel) {
  const int64_t first = panel * kPanelRows;
  auto* packed = (typename Math<T>::Factor*)p.packed_x + first * factors<T>(p.in_features);
  pack_panel_of_rows<T>((const T*)p.x + first * p.x_stride, p.x_stride, p.rows - first,
                        panel_width<T>(p, panel), p.in_features, packed);
}

// `rows` rows of weight, `depth` elements each, to factors, kGemmDepthStride a row; then rows of
// zeros up to a multiple of kNarrowRows<T>.
template <class T>
void unpack_weights(const T* w, int64_t w_stride, int64_t rows, int64_t depth,
                    typename Math<T>::Factor* to) {
  for (int64_t r = 0; r < rows; ++r, w += w_stride, to += kGemmDepthStride) {
    if constexpr (Math<T>::kPerFactor == 1) {
      int64_t i = 0;
      for (; i + kLanes <= depth; i += kLanes) store(to + i, load(w + i));
      for (; i < depth; ++i) to[i] = to_float(w[i]);
    } else {
      for (int64_t i = depth / 2; i < factors<T>(depth); ++i) to[i] = {};
      memcpy(to, w, depth * sizeof(T));
    }
  }
  for (; rows % kNarrowRows<T>; ++rows, to += kGemmDepthStride)
    memset((void*)to, 0, kGemmDepthStride * sizeof *to);
}

// Rows [begin, end) of weight (multiples of kNarrowRows<T>) with one panel.
template <class T, int kWidth, bool kFetch, class Factor = typename Math<T>::Factor>
void multiply_panel(const Factor* panel, const Factor* rows, int64_t begin, int64_t end,
                    int64_t stride, int64_t depth, float* sums, bool add, const T* next) {
  constexpr int kRows = kWidth > kLanes ? kTileRows<T> : kNarrowRows<T>;
  for (int64_t r = begin; r < end; r += kRows) {
    gemm_tile<T, kWidth, kRows, kFetch>(panel, rows + r * stride, stride, depth, sums + r * kWidth,
                                        kWidth, add, next + r * depth * Math<T>::kPerFactor);
  }
}

// All `rows` rows of weight with one panel of `width` rows of x, by tiles.
template <class T, class Factor = typename Math<T>::Factor>
void tile_panel(int width, const Factor* panel, const Factor* weights, int64_t rows, int64_t stride,
                int64_t depth, float* sums, bool add, const char* next, int64_t lines) {
  for (int64_t r = 0; r < rows; r += kTileRows<T>) {
    const auto* at = weights + r * stride;
    if (width == kPanelRows) {
      tile_product<T, 2>(panel, at, stride, depth, sums + r * width, width, add, next, lines);
    } else {
      tile_product<T, 1>(panel, at, stride, depth, sums + r * width, width, add, next, lines);
    }
    next += lines * kLineBytes * (depth / kLanes);
  }
}

template <class T>
void gemm_columns(const LinearParams& p, int64_t column, int64_t columns) {
  using M = Math<T>;
  using Factor = typename M::Factor;
  constexpr int64_t kDepth = kBlockDepth<T> * M::kPerFactor;
  static_assert(kLinearManyColumns % kNarrowRows<T> == 0 && kLinearManyColumns % kLanes == 0, "");
  const int64_t panels = divide_up(p.rows, kPanelRows);
  const int64_t k_factors = factors<T>(p.in_features);
  const int64_t x_bytes = p.rows * k_factors * int64_t(sizeof(Factor));
  const int64_t group_rows = kInTiles<T> || x_bytes <= kGroupBytes ? kGroupRows<T> : columns;
  const bool in_place = kInPlace<T> && p.weight_stride % M::kPerFactor == 0 &&
                        uintptr_t(p.weight) % sizeof(Factor) == 0 &&
                        !rows_collide<T>(p.weight_stride);
  Factor* unpacked = (Factor*)p.scratch;
  float* sums = p.scratch + kLinearManyColumns * kGemmDepthStride;  // [panel][column][row]
  for (int64_t c = 0; c < columns; c += group_rows) {
    const int64_t w_rows = min_of(group_rows, columns - c);
    const int64_t tile_rows = divide_up(w_rows, kNarrowRows<T>) * kNarrowRows<T>;
    const T* w = (const T*)p.weight + (column + c) * p.weight_stride;
    // (Of a last few rows, what is fetched ends behind the weights, which does no harm.)
    const bool fetch = p.weight_stride == p.in_features && column + c + w_rows < p.out_features;
    const T* next = w + w_rows * p.weight_stride;
    for (int64_t k = 0; k < p.in_features; k += kDepth) {
      const int64_t depth = min_of(kDepth, p.in_features - k), n = factors<T>(depth);
      const Factor* rows = unpacked;
      int64_t stride = kGemmDepthStride;
      if (in_place && w_rows == tile_rows && depth == n * M::kPerFactor) {
        rows = (const Factor*)(w + k);
        stride = p.weight_stride / M::kPerFactor;
      } else {
        unpack_weights(w + k, p.weight_stride, w_rows, depth, unpacked);
      }
      const auto x_block = [&](int64_t panel) {
        return (const Factor*)p.packed_x + panel * kPanelRows * k_factors +
               factors<T>(k) * panel_width<T>(p, panel);
      };
      for (int64_t panel = 0; panel < panels; ++panel) {
        const int width = panel_width<T>(p, panel);
        const Factor* x = x_block(panel);
        float* to = sums + panel * kPanelRows * kLinearManyColumns + c * width;
        if constexpr (kInTiles<T>) {
          // Each panel fetches its share of what follows.
          const int64_t lines = fetch ? divide_up(kTileRows<T>, panels) : 0;
          const int64_t steps = tile_rows / kTileRows<T> * (n / kLanes);
          tile_panel<T>(width, x, rows, tile_rows, stride, n, to, k > 0,
                        (const char*)next + panel * steps * lines * kLineBytes, lines);
        } else {
          const auto multiply = [&](auto fetches, int64_t begin, int64_t end, const T* from) {
            constexpr bool kFetch = decltype(fetches)::value;
            dispatch_width(width, [&](auto columns_of_panel) {
              multiply_panel<T, decltype(columns_of_panel)::value, kFetch>(
                  x, rows, begin, end, stride, n, to, k > 0, from);
            });
          };
          if (fetch && panel == 0) {
            multiply(Count<true>{}, 0, tile_rows, next);
          } else if (x_bytes >= kFetchBytes && panel + 1 < panels) {
            const int64_t fetching = min_of(kFetchRows<T>, tile_rows);
            multiply(Count<true>{}, 0, fetching, (const T*)(x_block(panel + 1)));
            multiply(Count<false>{}, fetching, tile_rows, next);
          } else {
            multiply(Count<false>{}, 0, tile_rows, next);
          }
        }
      }
      next += tile_rows * depth;
    }
  }
  for (int64_t first = 0; first < p.rows; first += kLanes) {
    const int64_t panel = first / kPanelRows;
    const int width = panel_width<T>(p, panel);
    const float* from = sums + panel * kPanelRows * kLinearManyColumns + first % kPanelRows;
    float lines[kLanes][kLinearManyColumns];
    for (int64_t c = 0; c < columns; c += kLanes) {
      VecF v[kLanes];
      GEMMA2_UNROLL
      for (int i = 0; i < kLanes; ++i) v[i] = load(from + (c + i) * width);
      transpose(v);
      GEMMA2_UNROLL
      for (int i = 0; i < kLanes; ++i) store(lines[i] + c, v[i]);
    }
    for (int64_t r = 0; r < min_of<int64_t>(kLanes, p.rows - first); ++r)
      finish_row(p, first + r, column, columns, lines[r]);
  }
}

}  // namespace

// A unit is a panel of kPanelRows rows; surplus units are empty.
void linear_pack_panels(const LinearParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto t) {
    for (int64_t panel = begin; panel < min_of(end, divide_up(p.rows, kPanelRows)); ++panel)
      pack_panel<decltype(t)>(p, panel);
  });
}

// A unit is unit_columns columns of out.
void linear_many_rows(const LinearParams& p, int64_t begin, int64_t end) {
#if defined(GEMMA2_ISA_avx512_amx)
  const Tiles tiles(kTileWords);
#endif
  dispatch_dtype(p.dtype, [&](auto t) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t range = unit / p.range_units * p.range_columns;
      const int64_t in_range = unit % p.range_units * p.unit_columns, first = range + in_range;
      const int64_t columns =
          min_of(min_of(p.unit_columns, p.range_columns - in_range), p.out_features - first);
      if (columns > 0) gemm_columns<decltype(t)>(p, first, columns);
    }
  });
}

}  // namespace GEMMA2_ISA
}  // namespace gemma2
