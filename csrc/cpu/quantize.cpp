// Weights to 8 and 4 bits, in the layout that python/gemma2_ext/quantize.py describes, a unit being
// a block of kQuantRows rows; and rows of those, looked up.
//
// int4: of all scales f s|s| that take the group's largest magnitude to 6 .. 8.75, of either sign,
// the one whose rounded numbers err least in the sum of squares; f is the row's, such that s = 127
// serves its largest group. Arithmetic bounds this: about 30 scales are tried a group.
#include "integers.h"
#include "kernels.h"
#include "linear-inl.h"
#include "quantized.h"

namespace gemma2 {
namespace GEMMA2_ISA {
namespace {

// Vectors of an int4 group.
constexpr int kGroupVectors = kInt4Group / kLanes;
// The range of numbers that a group's largest magnitude may be taken to. Where it is beyond 7 or 8
// it is clipped, which costs it and spares the others.
constexpr float kFewest = 6.0f, kMost = 8.75f;
constexpr int kLargestScale = 127;

// Of x >= 0, the smallest bfloat16 that is not below.
GEMMA2_INLINE BFloat16 round_up(float x) { return {uint16_t((float_to_bits(x) + 0xffff) >> 16)}; }

// kQuantDepth weights of a row, with zeros behind its end.
template <class T>
GEMMA2_INLINE void load_weights(const QuantizeParams& p, int64_t row, int64_t k, float* to) {
  const T* from = (const T*)p.weight + row * p.weight_stride + k;
  const int64_t n = min_of(kQuantDepth, p.in_features - k);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + i));
  for (; i < kQuantDepth; ++i) to[i] = i < n ? to_float(from[i]) : 0.0f;
}

GEMMA2_INLINE float largest_of(const float* x, int64_t n) {
  VecF largest = zero();
  for (int64_t i = 0; i < n; i += kLanes) largest = max(largest, abs(load(x + i)));
  return reduce_max(largest);
}

GEMMA2_INLINE VecF rounded(VecF x, float low, float high) {
  return max(set(low), min(set(high), round_small(x)));
}

// Where a row's quads of bytes and its scales are.
struct PackedRow {
  uint8_t* data;
  uint8_t* scales;  // of the row's block
  int64_t block_rows;
  int64_t row;  // within the block

  template <class Params>
  PackedRow(const Params& p, int64_t row, int64_t row_bytes, int64_t scale_bytes,
            int64_t factor_bytes) {
    const int64_t first = row / kQuantRows * kQuantRows;
    const int64_t pieces = divide_up(p.in_features, kQuantDepth);
    block_rows = min_of(kQuantRows, p.out_features - first);
    data = (uint8_t*)p.data + first * pieces * row_bytes;
    scales = (uint8_t*)p.scales + first * (pieces * scale_bytes + factor_bytes);
    this->row = row - first;
  }
  uint8_t* quad(int64_t quad) const { return data + (quad * block_rows + row) * 4; }
  BFloat16& int8_scale(int64_t group) const {
    return ((BFloat16*)scales)[group * block_rows + row];
  }
  BFloat16& int4_factor() const { return ((BFloat16*)scales)[row]; }
  int8_t& int4_scale(int64_t group) const {
    return ((int8_t*)scales + block_rows * kInt4FactorBytes)[group * block_rows + row];
  }
};

template <class T>
void quantize_int8_row(const QuantizeParams& p, int64_t row) {
  const PackedRow target(p, row, kInt8RowBytes, kInt8ScaleBytes, 0);
  for (int64_t k = 0; k < p.in_features; k += kQuantDepth) {
    float w[kQuantDepth];
    load_weights<T>(p, row, k, w);
    BFloat16 scale = round_up(largest_of(w, kQuantDepth) / 127);
    float inverse = 1 / to_float(scale);
    if (!(inverse < 0x1p127f)) scale = {}, inverse = 0;  // too small to be told from 0
    int8_t q[kQuantDepth];
    for (int64_t i = 0; i < kQuantDepth; i += kLanes)
      store_integers(q + i, to_int(rounded(load(w + i) * set(inverse), -127, 127)));
    for (int64_t i = 0; i < kQuantDepth; i += 4) memcpy(target.quad((k + i) / 4), q + i, 4);
    target.int8_scale(k / kInt8Group) = scale;
  }
}

// The squared error of a group with this scale. (Summed in one order for any kLanes.)
GEMMA2_INLINE float error_of(const VecF* w, float scale) {
  const VecF inverse = set(1 / scale);
  VecF squares[kGroupVectors];
  GEMMA2_UNROLL
  for (int i = 0; i < kGroupVectors; ++i) {
    const VecF error = w[i] - rounded(w[i] * inverse, -8, 7) * set(scale);
    squares[i] = error * error;
  }
  GEMMA2_UNROLL
  for (int half = kGroupVectors / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) squares[i] += squares[i + half];
  return reduce_sum(squares[0]);
}

GEMMA2_INLINE float square_root(float x) { return __builtin_sqrtf(x); }

// The s of least error for a group over the row's factor; 0 where it is nothing beside the row.
GEMMA2_INLINE int best_scale(const VecF* w, float largest) {
  float least = 0;
  {
    VecF squares = zero();
    for (int i = 0; i < kGroupVectors; ++i) squares += w[i] * w[i];
    least = reduce_sum(squares);
  }
  int low = int(square_root(largest / kMost));
  int high = int(square_root(largest / kFewest)) + 1;
  low = low < 1 ? 1 : low;
  high = high > kLargestScale ? kLargestScale : high;
  int best = 0;
  for (int s = low; s <= high; ++s) {
    const float scale = float(s * s);
    const float plus = error_of(w, scale), minus = error_of(w, -scale);
    if (plus < least) least = plus, best = s;
    if (minus < least) least = minus, best = -s;
  }
  return best;
}

template <class T>
void quantize_int4_row(const QuantizeParams& p, int64_t row) {
  const PackedRow target(p, row, kInt4RowBytes, kInt4ScaleBytes, kInt4FactorBytes);
  float w[kQuantDepth], largest = 0;
  for (int64_t k = 0; k < p.in_features; k += kQuantDepth) {
    load_weights<T>(p, row, k, w);
    const float here = largest_of(w, kQuantDepth);
    largest = here > largest ? here : largest;
  }
  BFloat16 factor = round_up(largest / (kFewest * kLargestScale * kLargestScale));
  float per_factor = 1 / to_float(factor);
  if (!(per_factor < 0x1p127f)) factor = {}, per_factor = 0;  // too small to be told from 0
  target.int4_factor() = factor;

  for (int64_t k = 0; k < p.in_features; k += kQuantDepth) {
    load_weights<T>(p, row, k, w);
    uint8_t q[kQuantDepth];
    for (int64_t g = 0; g < kQuantDepth; g += kInt4Group) {
      VecF group[kGroupVectors];
      for (int i = 0; i < kGroupVectors; ++i) group[i] = load(w + g + i * kLanes) * set(per_factor);
      const float here = largest_of(w + g, kInt4Group) * per_factor;
      const int s = here > 0 ? best_scale(group, here) : 0;
      const VecF inverse = set(s ? 1.0f / float(s * (s < 0 ? -s : s)) : 0.0f);
      for (int i = 0; i < kGroupVectors; ++i)
        store_integers(q + g + i * kLanes, to_int(rounded(group[i] * inverse, -8, 7)) + 8);
      target.int4_scale((k + g) / kInt4Group) = int8_t(s);
    }
    for (int64_t i = 0; i < kInt4Group; i += 4) {
      uint8_t bytes[4];
      for (int j = 0; j < 4; ++j) bytes[j] = uint8_t(q[i + j] | q[kInt4Group + i + j] << 4);
      memcpy(target.quad(k / kQuantDepth * 4 + i / 4), bytes, 4);
    }
  }
}

// The next n floats of a row, of which it has `left`, rounded to out's dtype, then times p.scale.
template <class T>
GEMMA2_INLINE void store_scaled(const EmbeddingParams& p, const float* from, int64_t n,
                                int64_t left, T* out) {
  for (int64_t j = 0; j < min_of(n, left); ++j)
    out[j] = from_float<T>(to_float(from_float<T>(from[j])) * p.scale);
}

template <class T>
void embed_int8_row(const EmbeddingParams& p, int64_t i) {
  const PackedRow from(p, p.ids[i], kInt8RowBytes, kInt8ScaleBytes, 0);
  T* out = (T*)p.out + i * p.in_features;
  for (int64_t k = 0; k < p.in_features; k += kInt8Group) {
    const float scale = to_float(from.int8_scale(k / kInt8Group));
    float group[kInt8Group];
    for (int64_t j = 0; j < kInt8Group; ++j)
      group[j] = float(int8_t(from.quad((k + j) / 4)[j % 4])) * scale;
    store_scaled(p, group, kInt8Group, p.in_features - k, out + k);
  }
}

template <class T>
void embed_int4_row(const EmbeddingParams& p, int64_t i) {
  const PackedRow from(p, p.ids[i], kInt4RowBytes, kInt4ScaleBytes, kInt4FactorBytes);
  T* out = (T*)p.out + i * p.in_features;
  for (int64_t k = 0; k < p.in_features; k += kInt4Group) {
    const int64_t quad = k / kQuantDepth * 4;
    const int shift = k % kQuantDepth ? 4 : 0;
    const float s = float(from.int4_scale(k / kInt4Group));
    const float scale = to_float(from.int4_factor()) * (s * (s < 0 ? -s : s));
    float group[kInt4Group];
    for (int64_t j = 0; j < kInt4Group; ++j)
      group[j] = float((from.quad(quad + j / 4)[j % 4] >> shift & 15) - 8) * scale;
    store_scaled(p, group, kInt4Group, p.in_features - k, out + k);
  }
}

template <class F>
GEMMA2_INLINE void for_rows(const QuantizeParams& p, int64_t begin, int64_t end, F f) {
  for (int64_t row = begin * kQuantRows; row < min_of(end * kQuantRows, p.out_features); ++row)
    f(row);
}

}  // namespace

void quantize_int8_blocks(const QuantizeParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto t) {
    for_rows(p, begin, end, [&](int64_t row) { quantize_int8_row<decltype(t)>(p, row); });
  });
}

void quantize_int4_blocks(const QuantizeParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto t) {
    for_rows(p, begin, end, [&](int64_t row) { quantize_int4_row<decltype(t)>(p, row); });
  });
}

// A unit is an id.
void embed_int8_rows(const EmbeddingParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto t) {
    for (int64_t i = begin; i < end; ++i) embed_int8_row<decltype(t)>(p, i);
  });
}
void embed_int4_rows(const EmbeddingParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto t) {
    for (int64_t i = begin; i < end; ++i) embed_int4_row<decltype(t)>(p, i);
  });
}

}  // namespace GEMMA2_ISA
}  // namespace gemma2
