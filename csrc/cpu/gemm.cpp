// out = a b^T, or added to out; a (rows, depth), b (columns, depth), each with either dimension
// contiguous: the products of a backward pass.
//
// b is packed before, once for all units; a unit of gemm_rows is unit_rows rows of out and all its
// columns (gemm-inl.h says how sums are made). float32 sums go to out itself, a block of k after
// another; narrower ones through scratch, rounded once. Arithmetic bounds this.
#include "gemm-inl.h"
#include "kernels.h"

namespace gemma2 {
namespace GEMMA2_ISA {
namespace {

// Calls f(T{}) with the storage type whose Math<T> takes the products.
template <class F>
GEMMA2_INLINE void dispatch_product(DType product, F f) {
#if defined(GEMMA2_BFLOAT16_PAIRS)
  if (product == DType::kBFloat16) return f(BFloat16{});
#endif
  (void)product;
  f(float{});
}

GEMMA2_INLINE uint32_t bfloat16_bits(float x) { return from_float<BFloat16>(x).bits; }
GEMMA2_INLINE uint32_t bfloat16_bits(BFloat16 x) { return x.bits; }
GEMMA2_INLINE uint32_t bfloat16_bits(Half x) { return bfloat16_bits(to_float(x)); }

// Columns of a panel: the last one is narrow where that suffices.
GEMMA2_INLINE int panel_width(int64_t columns, int64_t panel) {
  return columns - panel * kPanelWidth <= kLanes ? kLanes : kPanelWidth;
}

// The factor of elements k and k + 1 (0 where there is none), or of element k alone.
template <class T, class S>
GEMMA2_INLINE typename Math<T>::Factor make_factor(const S* from, int64_t stride, bool second) {
  if constexpr (Math<T>::kPerFactor == 1) {
    return to_float(*from);
  } else {
    return {bfloat16_bits(*from) | (second ? bfloat16_bits(from[stride]) << 16 : 0)};
  }
}

// kLanes elements as bfloat16, in the upper halves.
template <class S>
GEMMA2_INLINE VecU bfloat16_bits(const S* from) {
  return (VecU)round_to<BFloat16>(load(from));
}
GEMMA2_INLINE VecU bfloat16_bits(const BFloat16* from) { return (VecU)load(from); }

// kLanes columns of one factor, n of them real.
template <class T, class S>
GEMMA2_INLINE void pack_lanes(const S* from, int64_t stride, bool second, int64_t n,
                              typename Math<T>::Factor* to) {
  if (n < kLanes) {
    for (int64_t c = 0; c < kLanes; ++c) {
      to[c] = {};
      if (c < n) to[c] = make_factor<T>(from + c, stride, second);
    }
  } else if constexpr (Math<T>::kPerFactor == 1) {
    store(to, load(from));
  } else {
    const VecU low = bfloat16_bits(from) >> 16;
    const VecU pair = second ? low | bfloat16_bits(from + stride) : low;
    memcpy(to, &pair, sizeof pair);
  }
}

template <class T, class S>
void pack_panel(const GemmParams& p, int64_t panel) {
  using M = Math<T>;
  const int width = panel_width(p.columns, panel);
  const int64_t n = divide_up(p.depth, M::kPerFactor), first = panel * kPanelWidth;
  const int64_t with_zeros = factors<T>(p.depth);
  typename M::Factor* packed = (typename M::Factor*)p.packed_b + first * with_zeros;
  const S* b = (const S*)p.b + first * p.b_row;
  if constexpr (kPacksRows<T, S>) {
    if (p.b_k == 1)
      return pack_panel_of_rows<T>(b, p.b_row, p.columns - first, width, p.depth, packed);
  }
  memset((void*)(packed + n * width), 0, (with_zeros - n) * width * sizeof *packed);
  const int64_t columns = min_of<int64_t>(width, p.columns - first);
  if (p.b_row == 1 && p.b_k != 1) {
    for (int64_t i = 0; i < n; ++i) {
      const bool second = i * M::kPerFactor + 1 < p.depth;
      for (int c = 0; c < width; c += kLanes)
        pack_lanes<T>(b + i * M::kPerFactor * p.b_k + c, p.b_k, second, columns - c,
                      packed + i * width + c);
    }
    return;
  }
  for (int c = 0; c < width; ++c) {
    for (int64_t i = 0; i < n; ++i) {
      typename M::Factor factor{};
      if (c < columns)
        factor = make_factor<T>(b + c * p.b_row + i * M::kPerFactor * p.b_k, p.b_k,
                                i * M::kPerFactor + 1 < p.depth);
      packed[i * width + c] = factor;
    }
  }
}

// Rows [row, row + rows) x [k, k + depth) of a to factors, kGemmDepthStride a row; then rows of
// zeros up to a multiple of kNarrowRows<T>.
template <class T, class S>
void unpack_rows(const GemmParams& p, int64_t row, int64_t rows, int64_t k, int64_t depth,
                 typename Math<T>::Factor* to) {
  using M = Math<T>;
  const S* a = (const S*)p.a + row * p.a_row + k * p.a_k;
  const int64_t n = divide_up(depth, M::kPerFactor), zeros = factors<T>(depth) - n;
  for (int64_t r = 0; zeros > 0 && r < rows; ++r)
    memset((void*)(to + r * kGemmDepthStride + n), 0, zeros * sizeof *to);
  if (p.a_k == 1) {
    for (int64_t r = 0; r < rows; ++r) {
      const S* from = a + r * p.a_row;
      typename M::Factor* line = to + r * kGemmDepthStride;
      int64_t i = 0;
      if constexpr (M::kPerFactor == 1) {
        for (; i + kLanes <= n; i += kLanes) store(line + i, load(from + i));
      } else {
        // In memory a line of pairs is the line of elements.
        for (; 2 * i + kLanes <= depth; i += kLanes / 2)
          store((BFloat16*)line + 2 * i, load(from + 2 * i));
      }
      for (; i < n; ++i)
        line[i] = make_factor<T>(from + i * M::kPerFactor, 1, i * M::kPerFactor + 1 < depth);
    }
  } else {
    for (int64_t i = 0; i < n; ++i) {
      const S* from = a + i * M::kPerFactor * p.a_k;
      for (int64_t r = 0; r < rows; ++r)
        to[r * kGemmDepthStride + i] =
            make_factor<T>(from + r * p.a_row, p.a_k, i * M::kPerFactor + 1 < depth);
    }
  }
  for (; rows % kNarrowRows<T>; ++rows)
    memset((void*)(to + rows * kGemmDepthStride), 0, kGemmDepthStride * sizeof *to);
}

// A tile of which only rows x columns exist in sums.
template <class T, int kVectors, int kRows, class Factor = typename Math<T>::Factor>
void edge_tile(const Factor* panel, const Factor* lines, int64_t depth, float* sums,
               int64_t sums_stride, bool add, int64_t rows, int64_t columns) {
  constexpr int kWidth = kVectors * kLanes;
  float tile[kRows * kWidth];
  rows = min_of<int64_t>(rows, kRows);
  if constexpr (kInTiles<T>) {
    // AMX adds to the sums before, product by product.
    memset(tile, 0, sizeof tile);
    for (int64_t r = 0; add && r < rows; ++r)
      memcpy(tile + r * kWidth, sums + r * sums_stride, columns * sizeof *tile);
    tile_product<T, kVectors>(panel, lines, kGemmDepthStride, depth, tile, kWidth, add, nullptr, 0);
    add = false;
  } else {
    gemm_tile<T, kWidth, kRows>(panel, lines, kGemmDepthStride, depth, tile, kWidth, false);
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      float* to = sums + r * sums_stride + c;
      const float sum = tile[r * kWidth + c];
      *to = add ? *to + sum : sum;
    }
  }
}

// All rows with one panel, meanwhile the next one's part is fetched.
template <class T, int kVectors, int kRows, class Factor = typename Math<T>::Factor>
void multiply_panel(const Factor* panel, const Factor* lines, int64_t depth, float* sums,
                    int64_t sums_stride, bool add, int64_t rows, int64_t columns,
                    const Factor* next) {
  static_assert(sizeof(T) * Math<T>::kPerFactor == sizeof(Factor), "rows are as large as fetched");
  for (int64_t r = 0; r < rows; r += kRows) {
    const Factor* at = lines + r * kGemmDepthStride;
    float* to = sums + r * sums_stride;
    if (r + kRows <= rows && columns == kVectors * kLanes) {
      if constexpr (kInTiles<T>) {
        const int64_t of_next = next ? divide_up(kPanelWidth, divide_up(rows, kRows)) : 0;
        tile_product<T, kVectors>(panel, at, kGemmDepthStride, depth, to, sums_stride, add,
                                  next + r / kRows * of_next * depth, of_next);
      } else if (next && r < kPanelWidth) {
        gemm_tile<T, kVectors * kLanes, kRows, true>(
            panel, at, kGemmDepthStride, depth, to, sums_stride, add, (const T*)(next + r * depth));
      } else {
        gemm_tile<T, kVectors * kLanes, kRows>(panel, at, kGemmDepthStride, depth, to, sums_stride,
                                               add);
      }
    } else {
      edge_tile<T, kVectors, kRows>(panel, at, depth, to, sums_stride, add, rows - r, columns);
    }
  }
}

template <class T, class S>
void multiply_rows(const GemmParams& p, int64_t row) {
  using Factor = typename Math<T>::Factor;
  constexpr int64_t kDepth = kBlockDepth<T> * Math<T>::kPerFactor;
  const int64_t rows = min_of(p.unit_rows, p.rows - row);
  const bool direct = p.out_dtype == DType::kFloat32;
  Factor* lines = (Factor*)p.scratch;
  float* sums = direct ? (float*)p.out + row * p.out_stride : p.scratch + kGemmScratch;
  const int64_t stride = direct ? p.out_stride : divide_up(p.columns, kLanes) * kLanes;
  for (int64_t r = 0; p.depth == 0 && !p.add && r < rows; ++r)
    memset(sums + r * stride, 0, p.columns * sizeof *sums);
  for (int64_t k = 0; k < p.depth; k += kDepth) {
    const int64_t depth = min_of(kDepth, p.depth - k), n = factors<T>(depth);
    unpack_rows<T, S>(p, row, rows, k, depth, lines);
    const bool add = k > 0 || p.add;
    for (int64_t first = 0; first < p.columns; first += kPanelWidth) {
      const int width = panel_width(p.columns, first / kPanelWidth);
      const Factor* panel =
          (const Factor*)p.packed_b + first * factors<T>(p.depth) + factors<T>(k) * width;
      const int64_t columns = min_of<int64_t>(width, p.columns - first);
      const int64_t following = first + kPanelWidth;
      const Factor* next = following < p.columns
                               ? (const Factor*)p.packed_b + following * factors<T>(p.depth) +
                                     factors<T>(k) * panel_width(p.columns, following / kPanelWidth)
                               : nullptr;
      if (width == kPanelWidth) {
        multiply_panel<T, 2, kTileRows<T>>(panel, lines, n, sums + first, stride, add, rows,
                                           columns, next);
      } else {
        multiply_panel<T, 1, kNarrowRows<T>>(panel, lines, n, sums + first, stride, add, rows,
                                             columns, next);
      }
    }
  }
  if (!direct) {
    for (int64_t r = 0; r < rows; ++r)
      finish_row(p.out, p.out_dtype, p.out_stride, row + r, 0, p.columns, sums + r * stride, 0);
  }
}

}  // namespace

// A unit is a panel of kPanelWidth columns; surplus units are empty.
void gemm_pack_panels(const GemmParams& p, int64_t begin, int64_t end) {
  dispatch_product(p.product, [&](auto t) {
    dispatch_dtype(p.b_dtype, [&](auto s) {
      for (int64_t panel = begin; panel < min_of(end, divide_up(p.columns, kPanelWidth)); ++panel)
        pack_panel<decltype(t), decltype(s)>(p, panel);
    });
  });
}

// A unit is unit_rows rows of out.
void gemm_rows(const GemmParams& p, int64_t begin, int64_t end) {
#if defined(GEMMA2_ISA_avx512_amx)
  const Tiles tiles(kTileWords);
#endif
  dispatch_product(p.product, [&](auto t) {
    dispatch_dtype(p.a_dtype, [&](auto s) {
      for (int64_t unit = begin; unit < end; ++unit)
        multiply_rows<decltype(t), decltype(s)>(p, unit * p.unit_rows);
    });
  });
}

// A unit is a row of out, rounded from float32 sums in scratch (row by row, no gaps).
void gemm_round_rows(const GemmParams& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row)
    finish_row(p.out, p.out_dtype, p.out_stride, row, 0, p.columns, p.scratch + row * p.columns, 0);
}

}  // namespace GEMMA2_ISA
}  // namespace gemma2
