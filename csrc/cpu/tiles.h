// Matrix products by AMX's tile registers: eight of 16 rows of 64 bytes. In a build that emulates
// instruction sets they are memory.
//
// A tile of sums has 16 x 16 numbers of 32 bits. A product adds a tile of 16 rows of words of 32
// bits (pairs of bfloat16, or four int8) and one whose row k has word k of 16 columns:
// sums[r][c] += over k of the products of the elements of a[r][k] and b[k][c]. Only where
// GEMMA2_ISA_avx512_amx is defined.
// Source: Intel's Software Developer's Manual, volume 2.
#pragma once
#include "simd.h"

namespace gemma2 {
namespace GEMMA2_ISA {
namespace {

constexpr int kTileLines = 16;  // rows of a tile
constexpr int kTileWords = 16;  // words of a row
constexpr int64_t kTileFloats = kTileLines * kTileWords;
static_assert(kTileWords == kLanes, "a row is a vector");

// Tiles 0 to 3 are sums, 4 and 5 the first factors, 6 and 7 the second ones, with `depth` words a
// row of the first. The registers hold this from construction to destruction, and no longer: a
// thread that leaves them in use is slower to switch, and other libraries set them up as they like.
class Tiles {
 public:
  explicit Tiles(int depth) {
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } setup;
    static_assert(sizeof setup == 64, "");
    for (int i = 0; i < 8; ++i) {
      setup.rows[i] = uint8_t(i < 6 ? kTileLines : depth);
      setup.row_bytes[i] = uint16_t(4 * (i == 4 || i == 5 ? depth : kTileWords));
    }
#if defined(__AMX_TILE__)
    asm volatile("ldtilecfg %0" ::"m"(setup));
#else
    for (int i = 0; i < 8; ++i) {
      rows(i) = setup.rows[i], words(i) = setup.row_bytes[i] / 4;
      memset(tile(i), 0, kTileFloats * 4);
    }
#endif
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
  ~Tiles() {
#if defined(__AMX_TILE__)
    asm volatile("tilerelease" ::: "memory");
#else
    for (int i = 0; i < 8; ++i) rows(i) = words(i) = 0;
#endif
  }

  // Rows of tile kTile, `stride` bytes apart, from memory and to it.
  template <int kTile>
  static GEMMA2_INLINE void load(const void* from, int64_t stride) {
#if defined(__AMX_TILE__)
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kTile) : "memory");
#else
    memset(tile(kTile), 0, kTileFloats * 4);
    for (int r = 0; r < rows(kTile); ++r)
      memcpy(tile(kTile) + r * kTileWords, (const char*)from + r * stride, words(kTile) * 4);
#endif
  }
  template <int kTile>
  static GEMMA2_INLINE void store(void* to, int64_t stride) {
#if defined(__AMX_TILE__)
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(kTile) : "memory");
#else
    for (int r = 0; r < rows(kTile); ++r)
      memcpy((char*)to + r * stride, tile(kTile) + r * kTileWords, words(kTile) * 4);
#endif
  }
  template <int kTile>
  static GEMMA2_INLINE void clear() {
#if defined(__AMX_TILE__)
    asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
#else
    memset(tile(kTile), 0, kTileFloats * 4);
#endif
  }

  // Sums of products of bfloat16 pairs, in float32: those of the first elements and those of the
  // second ones, each from zero in the order of k, then both to the sum before. Subnormals are 0
  // (but not where tiles are memory).
  template <int kSum, int kA, int kB>
  static GEMMA2_INLINE void multiply_pairs() {
#if defined(__AMX_BF16__)
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kA), "i"(kB));
#else
    for (int r = 0; r < rows(kSum); ++r) {
      VecF even{}, odd{}, sum;
      for (int k = 0; k < words(kA); ++k) {
        const VecU a = VecU{} + tile(kA)[r * kTileWords + k];
        VecU b;
        memcpy(&b, tile(kB) + k * kTileWords, sizeof b);
        even = fma(even_bfloat16(a), even_bfloat16(b), even);
        odd = fma(odd_bfloat16(a), odd_bfloat16(b), odd);
      }
      memcpy(&sum, tile(kSum) + r * kTileWords, sizeof sum);
      sum += even + odd;
      memcpy(tile(kSum) + r * kTileWords, &sum, sizeof sum);
    }
#endif
  }
  // Sums of products of four int8 each, in int32.
  template <int kSum, int kA, int kB>
  static GEMMA2_INLINE void multiply_bytes() {
#if defined(__AMX_INT8__)
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kA), "i"(kB));
#else
    for (int r = 0; r < rows(kSum); ++r) {
      for (int k = 0; k < words(kA); ++k) {
        const int8_t* a = (const int8_t*)(tile(kA) + r * kTileWords + k);
        const int8_t* b = (const int8_t*)(tile(kB) + k * kTileWords);
        for (int c = 0; c < kTileWords; ++c, b += 4)
          tile(kSum)[r * kTileWords + c] +=
              uint32_t(a[0] * b[0] + a[1] * b[1] + a[2] * b[2] + a[3] * b[3]);
      }
    }
#endif
  }

 private:
#if !defined(__AMX_TILE__)
  struct Registers {
    uint32_t words[8][kTileFloats];
    int rows[8], row_words[8];
  };
  static Registers& registers() {
    static thread_local Registers all;
    return all;
  }
  static uint32_t* tile(int i) { return registers().words[i]; }
  static int& rows(int i) { return registers().rows[i]; }
  static int& words(int i) { return registers().row_words[i]; }
#endif
};

// Rows of words in memory.
struct TileRows {
  const void* data;
  int64_t stride;  // bytes

  GEMMA2_INLINE TileRows(const void* rows, int64_t row_bytes) : data(rows), stride(row_bytes) {}
  GEMMA2_INLINE TileRows at(int64_t row, int64_t word) const {
    return {(const char*)data + row * stride + word * 4, stride};
  }
};

// sums (kRowTiles * 16, kColumnTiles * 16) = a (rows, depth) b (depth, columns), plus sums with
// `add`, in words of bfloat16 pairs; depth a multiple of kTileWords, for which the registers have
// to be set up. `beside` is called once a step of depth.
template <int kRowTiles, int kColumnTiles, class F>
GEMMA2_INLINE void multiply_tiles(TileRows a, TileRows b, int64_t depth, float* sums,
                                  int64_t sums_stride, bool add, const F& beside) {
  static_assert(kRowTiles <= 2 && kColumnTiles <= 2, "");
  const int64_t sum_bytes = sums_stride * 4;
  float* lower = sums + kTileLines * sums_stride;
  if (add) {
    Tiles::load<0>(sums, sum_bytes);
    if constexpr (kColumnTiles == 2) Tiles::load<1>(sums + kTileWords, sum_bytes);
    if constexpr (kRowTiles == 2) Tiles::load<2>(lower, sum_bytes);
    if constexpr (kRowTiles * kColumnTiles == 4) Tiles::load<3>(lower + kTileWords, sum_bytes);
  } else {
    Tiles::clear<0>(), Tiles::clear<1>(), Tiles::clear<2>(), Tiles::clear<3>();
  }
  for (int64_t k = 0; k < depth; k += kTileWords) {
    const TileRows from_a = a.at(0, k), from_b = b.at(k, 0);
    Tiles::load<4>(from_a.data, a.stride);
    Tiles::load<6>(from_b.data, b.stride);
    Tiles::multiply_pairs<0, 4, 6>();
    if constexpr (kColumnTiles == 2) {
      Tiles::load<7>(from_b.at(0, kTileWords).data, b.stride);
      Tiles::multiply_pairs<1, 4, 7>();
    }
    if constexpr (kRowTiles == 2) {
      Tiles::load<5>(from_a.at(kTileLines, 0).data, a.stride);
      Tiles::multiply_pairs<2, 5, 6>();
    }
    if constexpr (kRowTiles * kColumnTiles == 4) Tiles::multiply_pairs<3, 5, 7>();
    beside();
  }
  Tiles::store<0>(sums, sum_bytes);
  if constexpr (kColumnTiles == 2) Tiles::store<1>(sums + kTileWords, sum_bytes);
  if constexpr (kRowTiles == 2) Tiles::store<2>(lower, sum_bytes);
  if constexpr (kRowTiles * kColumnTiles == 4) Tiles::store<3>(lower + kTileWords, sum_bytes);
}

}  // namespace
}  // namespace GEMMA2_ISA
}  // namespace gemma2
