// What the kernels over packed weights share: x in 8 bits, blocks of weights, finished sums.
#pragma once
#include "integers.h"
#include "linear-inl.h"
#include "quantized.h"

namespace gemma2 {
namespace GEMMA2_ISA {
namespace {

// Vectors that hold a block's rows.
constexpr int kBlockVectors = kQuantRows / kLanes;
// Bytes of one group of four columns of a block.
constexpr int64_t kQuadBytes = kQuantRows * 4;
// kQuantDepth values of x as integers from -127 to 127, times a scale. Inf and NaN make the scale
// NaN.
struct Quantized {
  const int8_t* q;
  int32_t sums[2];  // of its halves
  float scale;
};

// Of the n elements of a row at x, n > 0, as many pieces as there are lanes at most: f(piece,
// Quantized) of each. Beside each other, so that their maxima are found together.
template <class T, class F>
GEMMA2_INLINE void quantize_pieces(const T* x, int64_t n, const F& f) {
  constexpr float limit = 127;
  constexpr int kPieceVectors = kQuantDepth / kLanes;
  VecF values[kLanes][kPieceVectors];
  VecF largest[kLanes], nan[kLanes];
  const int64_t pieces = min_of<int64_t>(kLanes, divide_up(n, kQuantDepth));
  for (int64_t i = 0; i < kLanes; ++i) {
    VecF most = zero(), not_finite = zero();
    GEMMA2_UNROLL
    for (int v = 0; v < kPieceVectors; ++v) {
      const int64_t k = i * kQuantDepth + v * kLanes;
      const VecF value = k + kLanes <= n ? load(x + k) : k < n ? load_n(x + k, n - k) : zero();
      most = max(most, abs(value));
      not_finite += value * zero();
      values[i][v] = value;
    }
    largest[i] = most;
    nan[i] = not_finite;
  }
  const VecF most = reduce_maxima(largest);
  float scales[kLanes], inverses[kLanes];
  store(scales, most / set(limit) + reduce_sums(nan));
  // What is smaller has an inverse beyond float's range, and counts as 0.
  store(inverses, most > set(1e-30f) ? set(limit) / most : zero());
  int8_t q[kLanes][kQuantDepth];
  VecF halves[2][kLanes];
  for (int64_t i = 0; i < kLanes; ++i) {
    const VecF inverse = set(inverses[i]);
    VecF sum[2] = {};
    GEMMA2_UNROLL
    for (int v = 0; v < kPieceVectors; ++v) {
      const VecF rounded = max(min(round_small(values[i][v] * inverse), set(limit)), set(-limit));
      store_integers(q[i] + v * kLanes, to_int(rounded));
      sum[v * 2 / kPieceVectors] += rounded;
    }
    for (int half = 0; half < 2; ++half) halves[half][i] = sum[half];
  }
  float sums[2][kLanes];
  for (int half = 0; half < 2; ++half) store(sums[half], reduce_sums(halves[half]));
  for (int64_t i = 0; i < pieces; ++i)
    f(i, Quantized{q[i], {int32_t(sums[0][i]), int32_t(sums[1][i])}, scales[i]});
}

// s|s| of both groups of int4, of kLanes rows of a block.
GEMMA2_INLINE VecI16 join_squares(const int8_t* s) {
#if defined(__AVX512BW__) && GEMMA2_LANES == 16
  static constexpr int16_t kJoined[] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                        21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                        11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i groups = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)s));
  const __m512i squares = _mm512_mullo_epi16(groups, _mm512_abs_epi16(groups));
  return (VecI16)_mm512_permutexvar_epi16(_mm512_loadu_si512(kJoined), squares);
#else
  const VecI16 both = join_words(load_bytes(s), load_bytes(s + kQuantRows)), sign = both >> 15;
  return both * ((both ^ sign) - sign);
#endif
}

GEMMA2_INLINE int64_t piece_count(const LinearParams& p) {
  return divide_up(p.in_features, kQuantDepth);
}

// One block of weights in memory.
template <class F>
struct Block {
  const uint8_t* data;
  const uint8_t* scales;  // behind the rows' own factors
  int64_t rows;

  GEMMA2_INLINE Block(const LinearParams& p, int64_t block) {
    const int64_t first = block * kQuantRows, pieces = piece_count(p);
    rows = min_of(kQuantRows, p.out_features - first);
    data = (const uint8_t*)p.weight + first * pieces * F::kRowBytes;
    scales = (const uint8_t*)p.scales + first * (pieces * F::kScaleBytes + F::kFactorBytes) +
             rows * F::kFactorBytes;
  }
};

// A piece of a block of fewer than kQuantRows rows, with zeros for the others.
template <class F>
struct WidePiece {
  alignas(64) uint8_t data[kQuantRows * F::kRowBytes];
  alignas(64) uint8_t scales[kQuantRows * F::kScaleBytes];

  WidePiece(const Block<F>& block, int64_t piece) {
    memset(this, 0, sizeof *this);
    const uint8_t* from = block.data + piece * block.rows * F::kRowBytes;
    for (int64_t i = 0; i < F::kRowBytes / 4; ++i)
      memcpy(data + i * kQuadBytes, from + i * block.rows * 4, block.rows * 4);
    const int64_t width = block.rows * sizeof(typename F::Scale);
    from = block.scales + piece * block.rows * F::kScaleBytes;
    for (int64_t i = 0; i < int64_t(F::kScaleBytes / sizeof(typename F::Scale)); ++i)
      memcpy(scales + i * kQuantRows * sizeof(typename F::Scale), from + i * width, width);
  }
};

// Multiplies sums with the factors that int4's rows have, and stores them.
template <class F>
void finish_block(const LinearParams& p, const Block<F>& block, int64_t column, int64_t first_row,
                  int64_t rows, const VecF (*sums)[kBlockVectors]) {
  float factors[kQuantRows];
  for (int64_t i = 0; i < block.rows; ++i)
    factors[i] = F::kFactorBytes
                     ? to_float(((const BFloat16*)(block.scales - block.rows * F::kFactorBytes))[i])
                     : 1.0f;
  for (int64_t r = 0; r < rows; ++r) {
    float line[kQuantRows];
    memcpy(line, sums[r], sizeof line);
    for (int64_t i = 0; i < block.rows; ++i) line[i] *= factors[i];
    finish_row(p, first_row + r, column, block.rows, line);
  }
}

}  // namespace
}  // namespace GEMMA2_ISA
}  // namespace gemma2
