// out = x weight^T with packed weights of 8 or 4 bits; x (rows, in_features), weight (out_features,
// in_features) in blocks of 16 rows, as python/gemma2_ext/quantize.py describes them.
//
// A unit is kQuantUnitBlocks blocks: 64 columns of out. x is packed before, kQuantDepth columns of
// a row together with one scale, to 8 bits. A piece of weights (kQuantDepth columns of a vector of
// rows) is unpacked to registers and meets all rows of x: its products are summed as integers,
// exactly, then scaled and added to the row's sums in float32. Every lane is a row of weight, so
// nothing is summed across lanes, and a row of x is computed the same way whatever rows and threads
// are beside it. Memory bounds few rows, arithmetic many.
#include "kernels.h"
#include "linear_quantized-inl.h"

namespace gemma2 {
namespace GEMMA2_ISA {
namespace {

// How far ahead of their use weights are asked for.
constexpr int64_t kPrefetchBytes = kLanes == 16 ? 6144 : 2048;

#if !defined(GEMMA2_DOT_QUADS)

struct Int8 {
  static constexpr int64_t kRowBytes = kInt8RowBytes, kScaleBytes = kInt8ScaleBytes;
  static constexpr int64_t kFactorBytes = 0;
  using Scale = BFloat16;
  // One factor of a product of bytes is unsigned: the magnitude of one, whose sign goes to the
  // other. Of one row that is x's, of several the weight's, so that x is read once.
  struct X {
    int8_t q[kQuantDepth];
    uint8_t magnitude[kQuantDepth];
    float scale;
  };
  struct Scales {
    VecF s[kBlockVectors];
  };
  struct Weights {
    VecI8 w[8];
    VecU8 magnitude[8];
    VecF scale;
  };

  static GEMMA2_INLINE X pack(const Quantized& from) {
    X x;
    memcpy(x.q, from.q, sizeof x.q);
    for (int i = 0; i < kQuantDepth; ++i)
      x.magnitude[i] = uint8_t(from.q[i] < 0 ? -from.q[i] : from.q[i]);
    x.scale = from.scale;
    return x;
  }
  static GEMMA2_INLINE Scales load_scales(const uint8_t* from) {
    Scales scales;
    GEMMA2_UNROLL
    for (int v = 0; v < kBlockVectors; ++v) scales.s[v] = load((const BFloat16*)from + v * kLanes);
    return scales;
  }
  static GEMMA2_INLINE Weights load_piece(const uint8_t* data, const Scales& scales, int vector) {
    Weights w;
    data += vector * kLanes * 4;
    GEMMA2_UNROLL
    for (int i = 0; i < 8; ++i) {
      w.w[i] = (VecI8)load_bits(data + i * kQuadBytes);
      w.magnitude[i] = (VecU8)with_sign(w.w[i], w.w[i]);
    }
    w.scale = scales.s[vector];
    return w;
  }
  // Two products of bytes sum up to 2 * 127 * 127 < 2^15; there is no room for more.
  static GEMMA2_INLINE VecF dot(const Weights& w, const X& x, VecF sum) {
    const VecI16 ones = VecI16{} + 1;
    VecI total = {};
    GEMMA2_UNROLL
    for (int i = 0; i < 8; ++i) {
      const VecI8 q = with_sign((VecI8)broadcast_bits(x.q + 4 * i), w.w[i]);
      total += multiply_add_words(multiply_add_bytes(w.magnitude[i], q), ones);
    }
    return fma(to_floats(total), w.scale * set(x.scale), sum);
  }
  // One row of x against kVectors vectors of rows of weight, whose data begin at data[v]: as `dot`
  // does it, but with x's part in registers.
  template <int kVectors>
  static GEMMA2_INLINE void dot_row(const uint8_t* const (&data)[kVectors],
                                    const Scales (&scales)[kVectors / kBlockVectors], const X& x,
                                    VecF (&sums)[kVectors]) {
    const VecI16 ones = VecI16{} + 1;
    VecI total[kVectors] = {};
    GEMMA2_UNROLL
    for (int i = 0; i < 8; ++i) {
      const VecI8 signs = (VecI8)broadcast_bits(x.q + 4 * i);
      const VecU8 magnitudes = (VecU8)broadcast_bits(x.magnitude + 4 * i);
      GEMMA2_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        const VecI8 w = with_sign((VecI8)load_bits(data[v] + i * kQuadBytes), signs);
        total[v] += multiply_add_words(multiply_add_bytes(magnitudes, w), ones);
      }
    }
    GEMMA2_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const VecF scale = scales[v / kBlockVectors].s[v % kBlockVectors];
      sums[v] = fma(to_floats(total[v]), scale * set(x.scale), sums[v]);
    }
  }
};

// s|s| of a block's rows in 16 bits, of each row twice.
GEMMA2_INLINE void square_twice(const int8_t* from, VecI16 (&to)[kBlockVectors]) {
#if defined(__AVX2__) && GEMMA2_LANES == 8
  // Rows 0-3, 8-11 and 4-7, 12-15, each with a byte of 0: unpacking works within halves.
  const __m256i order =
      _mm256_setr_epi8(0, -1, 1, -1, 2, -1, 3, -1, 8, -1, 9, -1, 10, -1, 11, -1, 4, -1, 5, -1, 6,
                       -1, 7, -1, 12, -1, 13, -1, 14, -1, 15, -1);
  const __m256i twice = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)from));
  const __m256i s = _mm256_shuffle_epi8(twice, order);
  const __m256i squares = _mm256_maddubs_epi16(_mm256_abs_epi8(s), s);
  to[0] = (VecI16)_mm256_unpacklo_epi16(squares, squares);
  to[1] = (VecI16)_mm256_unpackhi_epi16(squares, squares);
#else
  GEMMA2_UNROLL
  for (int v = 0; v < kBlockVectors; ++v) {
    const VecI s = load_bytes(from + v * kLanes);
    const VecI16 twice = join_words(s, s), sign = twice >> 15;
    to[v] = twice * ((twice ^ sign) - sign);
  }
#endif
}

struct Int4 {
  static constexpr int64_t kRowBytes = kInt4RowBytes, kScaleBytes = kInt4ScaleBytes;
  static constexpr int64_t kFactorBytes = kInt4FactorBytes;
  using Scale = int8_t;
  struct X {
    int8_t q[kQuantDepth];
    // Of each group, -8 times the sum of columns 0, 1 of every four and of columns 2, 3: what makes
    // numbers 0..15 those from -8 to 7.
    int16_t offset[2][2];
    float scale;
  };
  // s|s| of each row twice, of both groups.
  struct Scales {
    VecI16 s[2][kBlockVectors];
  };
  struct Weights {
    VecU8 w[8];
    VecI16 scale[2];
  };

  static GEMMA2_INLINE X pack(const Quantized& from) {
    X x;
    memcpy(x.q, from.q, sizeof x.q);
    for (int g = 0; g < 2; ++g) {
      int32_t sums[4] = {};  // of every fourth column
      for (int i = 0; i < kInt4Group; ++i) sums[i % 4] += from.q[g * kInt4Group + i];
      x.offset[g][0] = int16_t(-8 * (sums[0] + sums[1]));
      x.offset[g][1] = int16_t(-8 * (sums[2] + sums[3]));
    }
    x.scale = from.scale;
    return x;
  }
  static GEMMA2_INLINE Scales load_scales(const uint8_t* from) {
    Scales scales;
    GEMMA2_UNROLL
    for (int g = 0; g < 2; ++g) square_twice((const int8_t*)from + g * kQuantRows, scales.s[g]);
    return scales;
  }
  static GEMMA2_INLINE Weights load_piece(const uint8_t* data, const Scales& scales, int vector) {
    Weights w;
    data += vector * kLanes * 4;
    GEMMA2_UNROLL
    for (int i = 0; i < 4; ++i) {
      const VecU bits = load_bits(data + i * kQuadBytes);
      w.w[i] = (VecU8)(bits & 0x0f0f0f0fu);
      w.w[4 + i] = (VecU8)(bits >> 4 & 0x0f0f0f0fu);
    }
    for (int g = 0; g < 2; ++g) w.scale[g] = scales.s[g][vector];
    return w;
  }
  // A lane's products of a group sum up to 8 * 8 * 127 at most, in 16 bits; times s|s| < 2^14, and
  // of two groups, below 2^29.
  static GEMMA2_INLINE VecF dot(const Weights& w, const X& x, VecF sum) {
    VecI total = {};
    GEMMA2_UNROLL
    for (int g = 0; g < 2; ++g) {
      VecI16 words = (VecI16)broadcast_bits(x.offset[g]);
      GEMMA2_UNROLL
      for (int i = 0; i < 4; ++i)
        words +=
            multiply_add_bytes(w.w[4 * g + i], (VecI8)broadcast_bits(x.q + kInt4Group * g + 4 * i));
      total += multiply_add_words(words, w.scale[g]);
    }
    return fma(to_floats(total), set(x.scale), sum);
  }
  template <int kVectors>
  static GEMMA2_INLINE void dot_row(const uint8_t* const (&data)[kVectors],
                                    const Scales (&scales)[kVectors / kBlockVectors], const X& x,
                                    VecF (&sums)[kVectors]) {
    VecI16 words[2][kVectors];
    GEMMA2_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      words[0][v] = (VecI16)broadcast_bits(x.offset[0]);
      words[1][v] = (VecI16)broadcast_bits(x.offset[1]);
    }
    GEMMA2_UNROLL
    for (int i = 0; i < 4; ++i) {
      const VecI8 low = (VecI8)broadcast_bits(x.q + 4 * i);
      const VecI8 high = (VecI8)broadcast_bits(x.q + kInt4Group + 4 * i);
      GEMMA2_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        const VecU bits = load_bits(data[v] + i * kQuadBytes);
        words[0][v] += multiply_add_bytes((VecU8)(bits & 0x0f0f0f0fu), low);
        words[1][v] += multiply_add_bytes((VecU8)(bits >> 4 & 0x0f0f0f0fu), high);
      }
    }
    GEMMA2_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const Scales& s = scales[v / kBlockVectors];
      const VecI total = multiply_add_words(words[0][v], s.s[0][v % kBlockVectors]) +
                         multiply_add_words(words[1][v], s.s[1][v % kBlockVectors]);
      sums[v] = fma(to_floats(total), set(x.scale), sums[v]);
    }
  }
};

#else

#if GEMMA2_LANES == 4

// Whether an instruction multiplies two rows of eight bytes with two.
#if defined(GEMMA2_ISA_neon_bf16)
constexpr bool kEights = true;
#else
constexpr bool kEights = false;
#endif

// kRows rows of x at eight columns.
template <int kRows>
struct EightFactors {
  static constexpr bool kPairs = kEights && kRows % 2 == 0;
  VecEight q[kRows];

  template <class X>
  GEMMA2_INLINE EightFactors(const X* x, int column) {
    GEMMA2_UNROLL
    for (int r = 0; r < kRows; ++r) memcpy(&q[r], x[r].q + column, sizeof q[r]);
  }
};
// Sums of kRows rows of x with four rows of weight.
template <int kRows>
struct EightSums {
  static constexpr bool kPairs = EightFactors<kRows>::kPairs;
  VecI sums[kRows];  // of a pair's two, those of rows 0, 1 of weight, then those of 2, 3

  // a, b: four columns, and the next four.
  GEMMA2_INLINE void add(VecQuads a, VecQuads b, const EightFactors<kRows>& x) {
    if constexpr (kPairs) {
      const VecI8 first = (VecI8)interleave_in_runs<0>((VecF)a, (VecF)b);
      const VecI8 second = (VecI8)interleave_in_runs<1>((VecF)a, (VecF)b);
      GEMMA2_UNROLL
      for (int r = 0; r < kRows; r += 2) {
        const VecI8 pair = join_eights(x.q[r], x.q[r + 1]);
        sums[r] = multiply_eights(sums[r], first, pair);
        sums[r + 1] = multiply_eights(sums[r + 1], second, pair);
      }
    } else {
      GEMMA2_UNROLL
      for (int r = 0; r < kRows; ++r) {
        sums[r] = dot_quads_with<0>(sums[r], a, x.q[r]);
        sums[r] = dot_quads_with<1>(sums[r], b, x.q[r]);
      }
    }
  }
  GEMMA2_INLINE VecI row(int r) const {
    if constexpr (!kPairs) return sums[r];
    const VecF a = (VecF)sums[r - r % 2], b = (VecF)sums[r - r % 2 + 1];
    return (VecI)(r % 2 == 0 ? even_elements(a, b) : odd_elements(a, b));
  }
};

// s|s| of both groups of int4, of kLanes rows of a block.
struct GroupScales {
  VecI s[2];
};
GEMMA2_INLINE GroupScales load_squares(const int8_t* s) {
  GroupScales scales;
  for (int g = 0; g < 2; ++g) {
    const VecI v = load_bytes(s + g * kQuantRows), sign = v >> 31;
    scales.s[g] = v * ((v ^ sign) - sign);
  }
  return scales;
}
GEMMA2_INLINE VecI scale_groups(VecI first, VecI second, const GroupScales& scales) {
  return first * scales.s[0] + second * scales.s[1];
}
// Numbers 0..15 of the second group, times 1 << kHighBits.
constexpr int kHighBits = 0;
GEMMA2_INLINE VecQuads high_quads(VecU bits) { return (VecQuads)((VecU8)bits >> 4); }

#else

using GroupScales = VecI16;
GEMMA2_INLINE GroupScales load_squares(const int8_t* s) { return join_squares(s); }
// Numbers 0..15 of the second group, times 1 << kHighBits: what a factor of 16 costs no instruction
// to take out again.
constexpr int kHighBits = 4;
GEMMA2_INLINE VecQuads high_quads(VecU bits) { return (VecQuads)(bits & 0xf0f0f0f0u); }
// Both groups' sums are below 2^14, the second's before its factor.
GEMMA2_INLINE VecI scale_groups(VecI first, VecI second, GroupScales scales) {
  const VecI words = second << (16 - kHighBits) | (first & 0xffff);
  return multiply_add_words((VecI16)words, scales);
}

#endif

struct Int8 {
  static constexpr int64_t kRowBytes = kInt8RowBytes, kScaleBytes = kInt8ScaleBytes;
  static constexpr int64_t kFactorBytes = 0;
  using Scale = BFloat16;
  struct X {
    int8_t q[kQuantDepth];
    int32_t offset;  // -kUnsigned times the sum
    float scale;
  };
  struct Scales {
    VecF s[kBlockVectors];
  };
  struct Weights {
    VecQuads w[8];
    VecF scale;
  };

  static GEMMA2_INLINE X pack(const Quantized& from) {
    X x;
    memcpy(x.q, from.q, sizeof x.q);
    x.offset = -kUnsigned * (from.sums[0] + from.sums[1]);
    x.scale = from.scale;
    return x;
  }
  static GEMMA2_INLINE Scales load_scales(const uint8_t* from) {
    Scales scales;
    GEMMA2_UNROLL
    for (int v = 0; v < kBlockVectors; ++v) scales.s[v] = load((const BFloat16*)from + v * kLanes);
    return scales;
  }
  static GEMMA2_INLINE Weights load_piece(const uint8_t* data, const Scales& scales, int vector) {
    Weights w;
    data += vector * kLanes * 4;
    GEMMA2_UNROLL
    for (int i = 0; i < 8; ++i) w.w[i] = to_quads(load_bits(data + i * kQuadBytes));
    w.scale = scales.s[vector];
    return w;
  }
  static GEMMA2_INLINE VecF dot(const Weights& w, const X& x, VecF sum) {
    VecI total[2] = {VecI{} + x.offset, VecI{}};
    GEMMA2_UNROLL
    for (int i = 0; i < 8; ++i)
      total[i % 2] = dot_quads(total[i % 2], w.w[i], (VecI8)broadcast_bits(x.q + 4 * i));
    return fma(to_floats(total[0] + total[1]), w.scale * set(x.scale), sum);
  }
#if GEMMA2_LANES == 4
  // As `dot`, of kRows rows of x and kTileVectors vectors from number `vector` on.
  static constexpr int kTileRows = kEights ? 8 : 4, kTileVectors = kEights ? 2 : 4;
  template <int kRows>
  static GEMMA2_INLINE void dot_tile(const uint8_t* data, const Scales& scales, int vector,
                                     const X* x, VecF (*sums)[kBlockVectors]) {
    EightSums<kRows> total[kTileVectors] = {};
    data += vector * kLanes * 4;
    GEMMA2_UNROLL
    for (int i = 0; i < 8; i += 2) {
      const EightFactors<kRows> q(x, 4 * i);
      GEMMA2_UNROLL
      for (int v = 0; v < kTileVectors; ++v) {
        const uint8_t* quads = data + i * kQuadBytes + v * kLanes * 4;
        total[v].add(to_quads(load_bits(quads)), to_quads(load_bits(quads + kQuadBytes)), q);
      }
    }
    GEMMA2_UNROLL
    for (int v = 0; v < kTileVectors; ++v) {
      GEMMA2_UNROLL
      for (int r = 0; r < kRows; ++r) {
        VecF& sum = sums[r][vector + v];
        sum = fma(to_floats(total[v].row(r)), scales.s[vector + v] * set(x[r].scale), sum);
      }
    }
  }
#endif
  // One row of x against kVectors vectors of rows of weight, whose data begin at data[v].
  template <int kVectors>
  static GEMMA2_INLINE void dot_row(const uint8_t* const (&data)[kVectors],
                                    const Scales (&scales)[kVectors / kBlockVectors], const X& x,
                                    VecF (&sums)[kVectors]) {
    VecI total[kVectors];
    GEMMA2_UNROLL
    for (int v = 0; v < kVectors; ++v) total[v] = VecI{} + x.offset;
    GEMMA2_UNROLL
    for (int i = 0; i < 8; ++i) {
      const VecI8 q = (VecI8)broadcast_bits(x.q + 4 * i);
      GEMMA2_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        const VecQuads w = to_quads(load_bits(data[v] + i * kQuadBytes));
        total[v] = dot_quads(total[v], w, q);
      }
    }
    GEMMA2_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const VecF scale = scales[v / kBlockVectors].s[v % kBlockVectors];
      sums[v] = fma(to_floats(total[v]), scale * set(x.scale), sums[v]);
    }
  }
  // As `dot`, of kBlocks blocks and kRows rows of x.
  template <int kRows, int kBlocks>
  static GEMMA2_INLINE void dot_blocks(const Weights (&w)[kBlocks], const X* x,
                                       VecF (*sums)[kBlocks]) {
    VecI total[kRows][kBlocks][2];  // of every other four columns, so that no sum waits long
    GEMMA2_UNROLL
    for (int i = 0; i < 8; ++i) {
      GEMMA2_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const VecI8 q = (VecI8)broadcast_bits(x[r].q + 4 * i);
        GEMMA2_UNROLL
        for (int b = 0; b < kBlocks; ++b) {
          VecI& sum = total[r][b][i % 2];
          if (i < 2) sum = i == 0 ? VecI{} + x[r].offset : VecI{};
          sum = dot_quads(sum, w[b].w[i], q);
        }
      }
    }
    GEMMA2_UNROLL
    for (int r = 0; r < kRows; ++r) {
      GEMMA2_UNROLL
      for (int b = 0; b < kBlocks; ++b) {
        const VecF product = to_floats(total[r][b][0] + total[r][b][1]);
        sums[r][b] = fma(product, w[b].scale * set(x[r].scale), sums[r][b]);
      }
    }
  }
  // As `dot`, of kRows rows of x, whose sums stay in registers from piece to piece.
  template <int kRows>
  static GEMMA2_INLINE void dot_rows(const uint8_t* data, const Scales& scales, const X* x,
                                     VecF (&sums)[kRows]) {
    VecI total[kRows][2];  // of every other four columns, so that no sum waits long
    GEMMA2_UNROLL
    for (int i = 0; i < 8; ++i) {
      const VecQuads w = to_quads(load_bits(data + i * kQuadBytes));
      GEMMA2_UNROLL
      for (int r = 0; r < kRows; ++r) {
        VecI& sum = total[r][i % 2];
        if (i < 2) sum = i == 0 ? VecI{} + x[r].offset : VecI{};
        sum = dot_quads(sum, w, (VecI8)broadcast_bits(x[r].q + 4 * i));
      }
    }
    GEMMA2_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const VecF product = to_floats(total[r][0] + total[r][1]);
      sums[r] = fma(product, scales.s[0] * set(x[r].scale), sums[r]);
    }
  }
};

struct Int4 {
  static constexpr int64_t kRowBytes = kInt4RowBytes, kScaleBytes = kInt4ScaleBytes;
  static constexpr int64_t kFactorBytes = kInt4FactorBytes;
  using Scale = int8_t;
  struct X {
    int8_t q[kQuantDepth];
    // -8 times each group's sum, the second's times 1 << kHighBits: makes numbers 0..15 those from
    // -8 to 7.
    int32_t offset[2];
    float scale;
  };
  struct Scales {
    GroupScales s[kBlockVectors];  // s|s|
  };
  struct Weights {
    VecQuads w[8];
    GroupScales scale;
  };

  static GEMMA2_INLINE X pack(const Quantized& from) {
    X x;
    memcpy(x.q, from.q, sizeof x.q);
    for (int g = 0; g < 2; ++g) x.offset[g] = from.sums[g] * -(8 << g * kHighBits);
    x.scale = from.scale;
    return x;
  }
  static GEMMA2_INLINE Scales load_scales(const uint8_t* from) {
    Scales scales;
    GEMMA2_UNROLL
    for (int v = 0; v < kBlockVectors; ++v)
      scales.s[v] = load_squares((const int8_t*)from + v * kLanes);
    return scales;
  }
  static GEMMA2_INLINE Weights load_piece(const uint8_t* data, const Scales& scales, int vector) {
    Weights w;
    data += vector * kLanes * 4;
    GEMMA2_UNROLL
    for (int i = 0; i < 4; ++i) {
      const VecU bits = load_bits(data + i * kQuadBytes);
      w.w[i] = (VecQuads)(bits & 0x0f0f0f0fu);
      w.w[4 + i] = high_quads(bits);
    }
    w.scale = scales.s[vector];
    return w;
  }
  static GEMMA2_INLINE VecF dot(const Weights& w, const X& x, VecF sum) {
    VecI total[2] = {VecI{} + x.offset[0], VecI{} + x.offset[1]};
    GEMMA2_UNROLL
    for (int i = 0; i < 8; ++i)
      total[i / 4] = dot_quads(total[i / 4], w.w[i], (VecI8)broadcast_bits(x.q + 4 * i));
    return fma(to_floats(scale_groups(total[0], total[1], w.scale)), set(x.scale), sum);
  }
#if GEMMA2_LANES == 4
  static constexpr int kTileRows = 4, kTileVectors = 2;
  template <int kRows>
  static GEMMA2_INLINE void dot_tile(const uint8_t* data, const Scales& scales, int vector,
                                     const X* x, VecF (*sums)[kBlockVectors]) {
    EightSums<kRows> total[2][kTileVectors] = {};
    data += vector * kLanes * 4;
    GEMMA2_UNROLL
    for (int i = 0; i < 4; i += 2) {
      const EightFactors<kRows> low(x, 4 * i), high(x, kInt4Group + 4 * i);
      GEMMA2_UNROLL
      for (int v = 0; v < kTileVectors; ++v) {
        const uint8_t* quads = data + i * kQuadBytes + v * kLanes * 4;
        const VecU a = load_bits(quads), b = load_bits(quads + kQuadBytes);
        total[0][v].add((VecQuads)(a & 0x0f0f0f0fu), (VecQuads)(b & 0x0f0f0f0fu), low);
        total[1][v].add(high_quads(a), high_quads(b), high);
      }
    }
    GEMMA2_UNROLL
    for (int v = 0; v < kTileVectors; ++v) {
      GEMMA2_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const VecI product =
            scale_groups(total[0][v].row(r) + x[r].offset[0], total[1][v].row(r) + x[r].offset[1],
                         scales.s[vector + v]);
        sums[r][vector + v] = fma(to_floats(product), set(x[r].scale), sums[r][vector + v]);
      }
    }
  }
#endif
  template <int kVectors>
  static GEMMA2_INLINE void dot_row(const uint8_t* const (&data)[kVectors],
                                    const Scales (&scales)[kVectors / kBlockVectors], const X& x,
                                    VecF (&sums)[kVectors]) {
    VecI total[2][kVectors];
    GEMMA2_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      total[0][v] = VecI{} + x.offset[0];
      total[1][v] = VecI{} + x.offset[1];
    }
    GEMMA2_UNROLL
    for (int i = 0; i < 4; ++i) {
      const VecI8 low = (VecI8)broadcast_bits(x.q + 4 * i);
      const VecI8 high = (VecI8)broadcast_bits(x.q + kInt4Group + 4 * i);
      GEMMA2_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        const VecU bits = load_bits(data[v] + i * kQuadBytes);
        total[0][v] = dot_quads(total[0][v], (VecQuads)(bits & 0x0f0f0f0fu), low);
        total[1][v] = dot_quads(total[1][v], high_quads(bits), high);
      }
    }
    GEMMA2_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const GroupScales& scale = scales[v / kBlockVectors].s[v % kBlockVectors];
      const VecI product = scale_groups(total[0][v], total[1][v], scale);
      sums[v] = fma(to_floats(product), set(x.scale), sums[v]);
    }
  }
  template <int kRows, int kBlocks>
  static GEMMA2_INLINE void dot_blocks(const Weights (&w)[kBlocks], const X* x,
                                       VecF (*sums)[kBlocks]) {
    VecI total[kRows][kBlocks][2];
    GEMMA2_UNROLL
    for (int i = 0; i < 8; ++i) {
      GEMMA2_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const VecI8 q = (VecI8)broadcast_bits(x[r].q + 4 * i);
        GEMMA2_UNROLL
        for (int b = 0; b < kBlocks; ++b) {
          VecI& sum = total[r][b][i / 4];
          if (i % 4 == 0) sum = VecI{} + x[r].offset[i / 4];
          sum = dot_quads(sum, w[b].w[i], q);
        }
      }
    }
    GEMMA2_UNROLL
    for (int r = 0; r < kRows; ++r) {
      GEMMA2_UNROLL
      for (int b = 0; b < kBlocks; ++b) {
        const VecI product = scale_groups(total[r][b][0], total[r][b][1], w[b].scale);
        sums[r][b] = fma(to_floats(product), set(x[r].scale), sums[r][b]);
      }
    }
  }
  template <int kRows>
  static GEMMA2_INLINE void dot_rows(const uint8_t* data, const Scales& scales, const X* x,
                                     VecF (&sums)[kRows]) {
    VecI total[kRows][2];
    GEMMA2_UNROLL
    for (int i = 0; i < 4; ++i) {
      const VecU bits = load_bits(data + i * kQuadBytes);
      const VecQuads low = (VecQuads)(bits & 0x0f0f0f0fu), high = high_quads(bits);
      GEMMA2_UNROLL
      for (int r = 0; r < kRows; ++r) {
        if (i == 0) {
          total[r][0] = VecI{} + x[r].offset[0];
          total[r][1] = VecI{} + x[r].offset[1];
        }
        const int8_t* q = x[r].q + 4 * i;
        total[r][0] = dot_quads(total[r][0], low, (VecI8)broadcast_bits(q));
        total[r][1] = dot_quads(total[r][1], high, (VecI8)broadcast_bits(q + kInt4Group));
      }
    }
    GEMMA2_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const VecI product = scale_groups(total[r][0], total[r][1], scales.s[0]);
      sums[r] = fma(to_floats(product), set(x[r].scale), sums[r]);
    }
  }
};

#endif

// x of chunk `chunk` of rows: [piece][row].
template <class F>
GEMMA2_INLINE typename F::X* packed_chunk(const LinearParams& p, int64_t chunk) {
  static_assert(sizeof(typename F::X) <= kQuantPackedBytes, "");
  return (typename F::X*)p.packed_x + chunk * kQuantChunk * piece_count(p);
}
GEMMA2_INLINE int64_t chunk_rows(const LinearParams& p, int64_t chunk) {
  return min_of(kQuantChunk, p.rows - chunk * kQuantChunk);
}

template <class F>
void pack_row(const LinearParams& p, int64_t row) {
  const int64_t chunk = row / kQuantChunk, rows = chunk_rows(p, chunk);
  typename F::X* to = packed_chunk<F>(p, chunk) + row % kQuantChunk;
  dispatch_dtype(p.dtype, [&](auto t) {
    const auto* x = (const decltype(t)*)p.x + row * p.x_stride;
    for (int64_t k = 0; k < p.in_features; k += kLanes * kQuantDepth, to += kLanes * rows) {
      quantize_pieces(x + k, p.in_features - k,
                      [&](int64_t piece, const Quantized& q)
                          __attribute__((always_inline)) { to[piece * rows] = F::pack(q); });
    }
  });
}

#if defined(GEMMA2_DOT_QUADS) && GEMMA2_LANES == 4
// A call of its own, as the compiler does not find room for the registers of several.
template <class F, int kRows>
__attribute__((noinline)) void add_tiles(const uint8_t* data, const typename F::Scales& scales,
                                         const typename F::X* x, VecF (*sums)[kBlockVectors]) {
  for (int v = 0; v < kBlockVectors; v += F::kTileVectors)
    F::template dot_tile<kRows>(data, scales, v, x, sums);
}
#endif

// sums[r] += the products of one piece with row r of x, for `rows` rows.
template <class F>
GEMMA2_INLINE void add_piece(const uint8_t* data, const uint8_t* scales, const typename F::X* x,
                             int64_t rows, VecF (*sums)[kBlockVectors]) {
  const typename F::Scales unpacked = F::load_scales(scales);
#if defined(GEMMA2_DOT_QUADS) && GEMMA2_LANES == 4
  int64_t r = 0;
  const auto walk = [&](auto tile_rows) __attribute__((always_inline)) {
    constexpr int kRows = decltype(tile_rows)::value;
    for (; r + kRows <= rows; r += kRows) add_tiles<F, kRows>(data, unpacked, x + r, sums + r);
  };
  walk(Count<F::kTileRows>{});
  walk(Count<2>{});
  walk(Count<1>{});
#else
  GEMMA2_UNROLL
  for (int v = 0; v < kBlockVectors; ++v) {
    const typename F::Weights w = F::load_piece(data, unpacked, v);
    for (int64_t r = 0; r < rows; ++r) sums[r][v] = F::dot(w, x[r], sums[r][v]);
  }
#endif
}

// The sums of a chunk of rows.
template <class F>
void dot_block(const Block<F>& block, int64_t pieces, const typename F::X* x, int64_t rows,
               VecF (*sums)[kBlockVectors]) {
  memset(sums, 0, rows * sizeof *sums);
  if (block.rows == kQuantRows) {
    const uint8_t *data = block.data, *scales = block.scales;
    for (int64_t i = 0; i < pieces; ++i, x += rows) {
      GEMMA2_UNROLL
      for (int64_t b = 0; b < kQuantRows * F::kRowBytes; b += 64)
        prefetch(data + kPrefetchBytes + b);
      prefetch(scales + kPrefetchBytes / 8);
      add_piece<F>(data, scales, x, rows, sums);
      data += kQuantRows * F::kRowBytes;
      scales += kQuantRows * F::kScaleBytes;
    }
  } else {
    for (int64_t i = 0; i < pieces; ++i, x += rows) {
      const WidePiece<F> wide(block, i);
      add_piece<F>(wide.data, wide.scales, x, rows, sums);
    }
  }
}

#if defined(GEMMA2_DOT_QUADS) && GEMMA2_LANES == 16

// Whole blocks that a row of x meets at once, of several rows: their weights fill half the
// registers. Otherwise reading x takes as long as the products.
constexpr int kBlocksAtOnce = 2;

// Whole blocks are taken so many bytes of each at a time at most, while those that follow are
// fetched into the second-level cache, in the order of memory.
constexpr int64_t kFetchBytes = 36 << 10;

// Adds the products of a chunk of rows with pieces [begin, end) of kBlocksAtOnce whole blocks, one
// behind the other, to their sums. `behind`: whose pieces from behind_begin on follow, or null.
template <class F>
void dot_blocks(const Block<F>& first, int64_t pieces, int64_t begin, int64_t end,
                const typename F::X* x, int64_t rows, const Block<F>* behind, int64_t behind_begin,
                VecF (*sums)[kBlocksAtOnce]) {
  static_assert(kBlockVectors == 1, "");
  constexpr int64_t kPieceBytes = kQuantRows * F::kRowBytes;
  constexpr int64_t kPieceScales = kQuantRows * F::kScaleBytes;
  const int64_t data_stride = pieces * kPieceBytes;
  const int64_t scales_stride = pieces * kPieceScales + kQuantRows * F::kFactorBytes;
  const uint8_t* next = behind ? behind->data + behind_begin * kPieceBytes : nullptr;
  const uint8_t* next_scales = behind ? behind->scales + behind_begin * kPieceScales : nullptr;
  const int64_t half = begin + (end - begin + 1) / 2;
  x += begin * rows;
  for (int64_t i = begin; i < end; ++i, x += rows) {
    if (behind) {
      if (i == half) {
        next += data_stride - (half - begin) * kBlocksAtOnce * kPieceBytes;
        next_scales += scales_stride - (half - begin) * kBlocksAtOnce * kPieceScales;
      }
      for (int b = 0; b < kBlocksAtOnce; ++b, next += kPieceBytes) {
        GEMMA2_UNROLL
        for (int64_t line = 0; line < kPieceBytes; line += 64) prefetch(next + line);
      }
      static_assert(kBlocksAtOnce * kPieceScales == 64, "");
      prefetch(next_scales);
      next_scales += kBlocksAtOnce * kPieceScales;
    }
    typename F::Weights w[kBlocksAtOnce];
    GEMMA2_UNROLL
    for (int b = 0; b < kBlocksAtOnce; ++b) {
      const uint8_t* data = first.data + b * data_stride + i * kPieceBytes;
      const uint8_t* scales = first.scales + b * scales_stride + i * kPieceScales;
      w[b] = F::load_piece(data, F::load_scales(scales), 0);
      GEMMA2_UNROLL
      for (int64_t line = kPieceBytes; line < 2 * kPieceBytes; line += 64)
        prefetch_near(data + line);
    }
    int64_t r = 0;
    for (; r + 2 <= rows; r += 2) F::template dot_blocks<2>(w, x + r, sums + r);
    if (r < rows) F::template dot_blocks<1>(w, x + r, sums + r);
  }
}

// Up to this many rows meet a block at once, with all their sums in registers.
constexpr int kFewRows = int(kQuantFewRows);

// Who fetches the weights of few rows.
enum class Fetch {
  kFar,   // the kernel, kPrefetchBytes ahead
  kNear,  // the kernel, half as far, into the first cache
  kNone,  // the processor
};
// Of so few rows on a Zen 4: int8 leaves room for the processor's own prefetcher; int4 has too much
// work a byte.
template <class F>
constexpr bool kIsInt8 = F::kRowBytes == kInt8RowBytes;
template <class F>
constexpr Fetch kZen4Fetch = kIsInt8<F> ? Fetch::kNone : Fetch::kNear;
template <class F>
constexpr int kZen4Rows = kIsInt8<F> ? 2 : 1;

// The sums of kRows rows of x with a whole block. One block after the other is one stream through
// memory, which comes faster than two or more side by side.
template <class F, int kRows, Fetch kFetch, Touch kTouch>
void dot_few_rows(const Block<F>& block, int64_t pieces, const typename F::X* x,
                  VecF (*to)[kBlockVectors]) {
  const uint8_t *data = block.data, *scales = block.scales;
  VecF sums[kRows] = {};
  for (int64_t i = 0; i < pieces; ++i, x += kRows) {
    GEMMA2_UNROLL
    for (int64_t line = 0; line < kQuantRows * F::kRowBytes; line += 64) {
      if (kFetch == Fetch::kFar) prefetch(data + kPrefetchBytes + line);
      if (kFetch == Fetch::kNear) prefetch_near(data + kPrefetchBytes / 2 + line);
    }
    touch_page<kTouch>(data, kQuantRows * F::kRowBytes);
    touch_page<kTouch>(scales, kQuantRows * F::kScaleBytes);
    F::template dot_rows<kRows>(data, F::load_scales(scales), x, sums);
    data += kQuantRows * F::kRowBytes;
    scales += kQuantRows * F::kScaleBytes;
  }
  memcpy(to, sums, sizeof sums);
}

#else

// Vectors of rows of weight that one row of x meets at once: few enough for the sums of both groups
// of int4 to stay in registers, many enough to read x seldom. With AVX2 int4
// comes faster from one block than from two side by side.
template <class F>
constexpr int kRowVectors = kLanes == 8 && F::kRowBytes < 32 ? 2 : 4;
// The blocks that they are.
template <class F>
constexpr int kRowBlocks = kRowVectors<F> / kBlockVectors;

// The sums of one row of x with kRowBlocks whole blocks, one behind the other.
template <class F>
void dot_row_blocks(const Block<F>& first, int64_t pieces, const typename F::X* x,
                    VecF (*to)[kBlockVectors]) {
  const int64_t data_stride = kQuantRows * pieces * F::kRowBytes;
  const int64_t scales_stride = kQuantRows * (pieces * F::kScaleBytes + F::kFactorBytes);
  const uint8_t *data = first.data, *scales = first.scales;
  // Below AVX-512 int8's two long streams come faster by the processor's own prefetcher. int4,
  // whose arithmetic takes nearly as long as memory, hides more of it under fetching, nearer ahead.
  constexpr bool kFetch = kLanes == 16 || F::kRowBytes < 32;
  constexpr int64_t kFetchBytes = kLanes == 8 ? kPrefetchBytes * 3 / 4 : kPrefetchBytes;
  VecF sums[kRowVectors<F>] = {};
  for (int64_t i = 0; i < pieces; ++i, ++x) {
    const uint8_t* at[kRowVectors<F>];
    typename F::Scales unpacked[kRowBlocks<F>];
    GEMMA2_UNROLL
    for (int b = 0; b < kRowBlocks<F>; ++b) {
      const uint8_t* block = data + b * data_stride;
      GEMMA2_UNROLL
      for (int64_t line = 0; line < kQuantRows * F::kRowBytes && kFetch; line += 64)
        prefetch(block + kFetchBytes + line);
      GEMMA2_UNROLL
      for (int v = 0; v < kBlockVectors; ++v) at[b * kBlockVectors + v] = block + v * kLanes * 4;
      unpacked[b] = F::load_scales(scales + b * scales_stride);
    }
    F::dot_row(at, unpacked, *x, sums);
    data += kQuantRows * F::kRowBytes;
    scales += kQuantRows * F::kScaleBytes;
  }
  memcpy(to, sums, sizeof sums);
}

#endif

template <class F>
void pack_rows(const LinearParams& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) pack_row<F>(p, row);
}

template <class F>
void dot_units(const LinearParams& p, int64_t begin, int64_t end) {
  const int64_t pieces = piece_count(p), blocks = divide_up(p.out_features, kQuantRows);
  VecF sums[kQuantChunk][kBlockVectors];
  int64_t b = begin * kQuantUnitBlocks;
  end = min_of(end * kQuantUnitBlocks, blocks);
#if defined(GEMMA2_DOT_QUADS) && GEMMA2_LANES == 16
  for (; p.rows <= kFewRows && (b + 1) * kQuantRows <= p.out_features && b < end; ++b) {
    const Block<F> block(p, b);
    const auto* x = packed_chunk<F>(p, 0);
    dispatch_rows<1, kFewRows>(p.rows, [&](auto rows) {
      constexpr int kRows = decltype(rows)::value;
      constexpr bool kFewest = kRows <= kZen4Rows<F>;
      constexpr Fetch kFetch = kFewest ? kZen4Fetch<F> : Fetch::kFar;
      constexpr Touch kTouch = kFewest ? Touch::kNone : Touch::kNear;
      (p.zen4 ? dot_few_rows<F, kRows, kFetch, kTouch>
              : dot_few_rows<F, kRows, Fetch::kFar, Touch::kNone>)(block, pieces, x, sums);
    });
    finish_block<F>(p, block, b * kQuantRows, 0, p.rows, sums);
  }
  VecF wide[kQuantChunk][kBlocksAtOnce];
  const int64_t parts = divide_up(pieces * kQuantRows * F::kRowBytes, kFetchBytes);
  for (; p.rows > kFewRows && (b + kBlocksAtOnce) * kQuantRows <= p.out_features &&
         b + kBlocksAtOnce <= end;
       b += kBlocksAtOnce) {
    const Block<F> block(p, b), next(p, b + kBlocksAtOnce);
    for (int64_t chunk = 0; chunk * kQuantChunk < p.rows; ++chunk) {
      const int64_t rows = chunk_rows(p, chunk);
      memset(wide, 0, rows * sizeof *wide);
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t to = pieces * (part + 1) / parts;
        const bool last = part == parts - 1;
        dot_blocks<F>(block, pieces, pieces * part / parts, to, packed_chunk<F>(p, chunk), rows,
                      chunk > 0 ? nullptr
                      : last    ? &next
                                : &block,
                      last ? 0 : to, wide);
      }
      for (int i = 0; i < kBlocksAtOnce; ++i) {
        for (int64_t r = 0; r < rows; ++r) sums[r][0] = wide[r][i];
        finish_block<F>(p, Block<F>(p, b + i), (b + i) * kQuantRows, chunk * kQuantChunk, rows,
                        sums);
      }
    }
  }
#else
  if (p.rows == 1) {
    constexpr int kBlocks = kRowBlocks<F>;
    for (; (b + kBlocks) * kQuantRows <= p.out_features && b + kBlocks <= end; b += kBlocks) {
      dot_row_blocks<F>(Block<F>(p, b), pieces, packed_chunk<F>(p, 0), sums);
      for (int i = 0; i < kBlocks; ++i)
        finish_block<F>(p, Block<F>(p, b + i), (b + i) * kQuantRows, 0, 1, sums + i);
    }
  }
#endif
  for (; b < end; ++b) {
    const Block<F> block(p, b);
    for (int64_t chunk = 0; chunk * kQuantChunk < p.rows; ++chunk) {
      const int64_t rows = chunk_rows(p, chunk);
      dot_block<F>(block, pieces, packed_chunk<F>(p, chunk), rows, sums);
      finish_block<F>(p, block, b * kQuantRows, chunk * kQuantChunk, rows, sums);
    }
  }
}

}  // namespace

// A unit is a row of x.
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
