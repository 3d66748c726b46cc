// The products of linear_quantized.cpp for many rows by AMX's tiles; results are the same to the
// bit.
//
// x is packed to tiles of 16 rows and one piece. A unit's blocks are taken one after another, each
// kPartPieces pieces at a time: these, as int8 in the order of a tile's second factor, meet all
// tiles of x, at most kMostTiles of them. A tile's integers go through memory to the registers
// where they are scaled and added to the rows' sums. Arithmetic bounds this: more of it scales than
// multiplies, as few columns share a scale.
#include "kernels.h"
#include "linear_quantized-inl.h"
#include "tiles.h"

namespace gemma2 {
namespace GEMMA2_ISA {
namespace {

// Weights of a part (16 KiB) and a tile of x stay in the first-level cache.
constexpr int64_t kPartPieces = 32;
constexpr int64_t kMostTiles = 32;
constexpr int64_t kPieceBytes = kQuantRows * kQuantDepth;  // as int8
static_assert(kQuantRows == kTileLines && kBlockVectors == 1, "a block is a tile's columns");

// kQuantDepth columns of 16 rows of x.
struct XTile {
  int8_t q[kTileLines][kQuantDepth];
  float scale[kTileLines];
};
static_assert(sizeof(XTile) <= (kQuantFewRows + 1) * kQuantPackedBytes &&
                  2 * sizeof(XTile) <= (kTileLines + 1) * kQuantPackedBytes,
              "room for rows that fill up the last tile");

using Sums = VecF[kTileLines];
using Integers = int32_t[kTileLines][kTileWords];

// The integers of a product, by the tiles kSum, kA and kB, of the depth that these are set up for.
template <int kSum, int kA, int kB>
GEMMA2_INLINE void multiply_piece(const int8_t* x, const int8_t* w, Integers& to) {
  Tiles::clear<kSum>();
  Tiles::load<kA>(x, kQuantDepth);
  Tiles::load<kB>(w, kQuadBytes);
  Tiles::multiply_bytes<kSum, kA, kB>();
  Tiles::store<kSum>(to, sizeof to[0]);
}

GEMMA2_INLINE VecI load_integers(const int32_t* from) {
  VecI v;
  memcpy(&v, from, sizeof v);
  return v;
}

struct Int8 {
  static constexpr int64_t kRowBytes = kInt8RowBytes, kScaleBytes = kInt8ScaleBytes;
  static constexpr int64_t kFactorBytes = 0;
  static constexpr int kDepthWords = kInt8Group / 4;
  using Scale = BFloat16;
  using Scales = VecF;

  static GEMMA2_INLINE Scales load_scales(const uint8_t* from) {
    return load((const BFloat16*)from);
  }
  static GEMMA2_INLINE void unpack(const uint8_t* from, int8_t* to) {
    memcpy(to, from, kPieceBytes);
  }
  using Room = Integers;
  template <int kOdd>
  static GEMMA2_INLINE void multiply(const XTile& x, const int8_t* w, Room& to) {
    multiply_piece<kOdd, 4 + kOdd, 6 + kOdd>(x.q[0], w, to);
  }
  static GEMMA2_INLINE VecF scale(const Room& from, int row, const XTile& x, Scales scales,
                                  VecF sum) {
    return fma(to_floats(load_integers(from[row])), scales * set(x.scale[row]), sum);
  }
};

struct Int4 {
  static constexpr int64_t kRowBytes = kInt4RowBytes, kScaleBytes = kInt4ScaleBytes;
  static constexpr int64_t kFactorBytes = kInt4FactorBytes;
  static constexpr int kDepthWords = kInt4Group / 4;
  using Scale = int8_t;
  using Scales = VecI16;  // s|s| of both groups

  static GEMMA2_INLINE Scales load_scales(const uint8_t* from) {
    return join_squares((const int8_t*)from);
  }
  // Both groups' numbers from -8 to 7, one group behind the other.
  static GEMMA2_INLINE void unpack(const uint8_t* from, int8_t* to) {
    GEMMA2_UNROLL
    for (int64_t i = 0; i < kInt4Group / 4; ++i) {
      const VecU bits = load_bits(from + i * kQuadBytes);
      const VecI8 low = (VecI8)(bits & 0x0f0f0f0fu) - 8,
                  high = (VecI8)(bits >> 4 & 0x0f0f0f0fu) - 8;
      memcpy(to + i * kQuadBytes, &low, sizeof low);
      memcpy(to + kPieceBytes / 2 + i * kQuadBytes, &high, sizeof high);
    }
  }
  using Room = Integers[2];
  template <int kOdd>
  static GEMMA2_INLINE void multiply(const XTile& x, const int8_t* w, Room& to) {
    multiply_piece<2 * kOdd, 4, 6>(x.q[0], w, to[0]);
    multiply_piece<2 * kOdd + 1, 5, 7>(x.q[0] + kInt4Group, w + kPieceBytes / 2, to[1]);
  }
  // Both sums are below 2^14.
  static GEMMA2_INLINE VecF scale(const Room& from, int row, const XTile& x, Scales scales,
                                  VecF sum) {
    const VecI16 both = join_words(load_integers(from[0][row]), load_integers(from[1][row]));
    return fma(to_floats(multiply_add_words(both, scales)), set(x.scale[row]), sum);
  }
};

template <class F>
void pack_rows(const LinearParams& p, int64_t begin, int64_t end) {
  const int64_t pieces = piece_count(p);
  for (int64_t row = begin; row < end; ++row) {
    XTile* to = (XTile*)p.packed_x + row / kTileLines * pieces;
    const int64_t line = row % kTileLines;
    dispatch_dtype(p.dtype, [&](auto t) {
      const auto* x = (const decltype(t)*)p.x + row * p.x_stride;
      for (int64_t k = 0; k < p.in_features; k += kLanes * kQuantDepth, to += kLanes)
        quantize_pieces(x + k, p.in_features - k, [&](int64_t piece, const Quantized& q) {
          memcpy(to[piece].q[line], q.q, kQuantDepth);
          to[piece].scale[line] = q.scale;
        });
    });
  }
}

// A product is scaled so many products later: what a tile stores has to reach the cache before it
// is loaded.
constexpr int64_t kDelay = 2, kRooms = 4;

// Adds `pieces` products to the sums of 16 rows.
template <class F>
void add_products(const XTile* x, const int8_t* w, const typename F::Scales* scales, int64_t pieces,
                  Sums& to) {
  alignas(64) typename F::Room rooms[kRooms];
  Sums sums;
  memcpy(&sums, &to, sizeof sums);
  for (int64_t i = 0; i < pieces + kDelay; ++i) {
    if (i < pieces) {
      if (i % 2)
        F::template multiply<1>(x[i], w + i * kPieceBytes, rooms[i % kRooms]);
      else
        F::template multiply<0>(x[i], w + i * kPieceBytes, rooms[i % kRooms]);
    }
    if (i < kDelay) continue;
    const int64_t before = i - kDelay;
    GEMMA2_UNROLL
    for (int r = 0; r < kTileLines; ++r)
      sums[r] = F::scale(rooms[before % kRooms], r, x[before], scales[before], sums[r]);
  }
  memcpy(&to, &sums, sizeof sums);
}

// Products of `rows` rows of x with a block.
template <class F>
void multiply_block(const LinearParams& p, int64_t block_index, const XTile* x, int64_t first_row,
                    int64_t rows) {
  alignas(64) int8_t weights[kPartPieces * kPieceBytes];
  alignas(64) typename F::Scales scales[kPartPieces];
  alignas(64) Sums sums[kMostTiles];
  const Block<F> block(p, block_index);
  const int64_t pieces = piece_count(p), tiles = divide_up(rows, kTileLines);
  constexpr int64_t kData = kQuantRows * F::kRowBytes, kScales = kQuantRows * F::kScaleBytes;
  memset(sums, 0, tiles * sizeof(Sums));
  for (int64_t begin = 0; begin < pieces; begin += kPartPieces) {
    const int64_t n = min_of(kPartPieces, pieces - begin);
    for (int64_t i = 0; i < n; ++i) {
      if (block.rows == kQuantRows) {
        F::unpack(block.data + (begin + i) * kData, weights + i * kPieceBytes);
        scales[i] = F::load_scales(block.scales + (begin + i) * kScales);
      } else {
        const WidePiece<F> wide(block, begin + i);
        F::unpack(wide.data, weights + i * kPieceBytes);
        scales[i] = F::load_scales(wide.scales);
      }
    }
    // What follows, of this block or the next one, is fetched meanwhile: each tile takes its share.
    const uint8_t* next = block.data + (begin + n) * kData;
    const uint8_t* next_scales = block.scales + (begin + n) * kScales;
    const int64_t share = divide_up(kPartPieces, tiles);
    for (int64_t t = 0; t < tiles; ++t) {
      for (int64_t at = t * share * kData; at < (t + 1) * share * kData; at += kLineBytes)
        prefetch(next + at);
      for (int64_t at = t * share * kScales; at < (t + 1) * share * kScales; at += kLineBytes)
        prefetch(next_scales + at);
      add_products<F>(x + t * pieces + begin, weights, scales, n, sums[t]);
    }
  }
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t row = t * kTileLines;
    finish_block<F>(p, block, block_index * kQuantRows, first_row + row,
                    min_of<int64_t>(kTileLines, rows - row), (const VecF(*)[1])sums[t]);
  }
}

template <class F>
void dot_units(const LinearParams& p, int64_t begin, int64_t end) {
  constexpr int64_t kMostRows = kMostTiles * kTileLines;
  const Tiles tiles(F::kDepthWords);
  const int64_t pieces = piece_count(p), blocks = divide_up(p.out_features, kQuantRows);
  end = min_of(end * kQuantUnitBlocks, blocks);
  for (int64_t b = begin * kQuantUnitBlocks; b < end; ++b) {
    for (int64_t row = 0; row < p.rows; row += kMostRows) {
      multiply_block<F>(p, b, (const XTile*)p.packed_x + row / kTileLines * pieces, row,
                        min_of(kMostRows, p.rows - row));
    }
  }
}

}  // namespace

void linear_int8_pack(const LinearParams& p, int64_t begin, int64_t end) {
  pack_rows<Int8>(p, begin, end);
}
void linear_int4_pack(const LinearParams& p, int64_t begin, int64_t end) {
  pack_rows<Int4>(p, begin, end);
}
void linear_int8_units(const LinearParams& p, int64_t begin, int64_t end) {
  dot_units<Int8>(p, begin, end);
}
void linear_int4_units(const LinearParams& p, int64_t begin, int64_t end) {
  dot_units<Int4>(p, begin, end);
}

}  // namespace GEMMA2_ISA
}  // namespace gemma2
