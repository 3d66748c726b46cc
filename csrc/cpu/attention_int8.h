// Few rows over keys and values of int8, in integers, where the machine sums products of four bytes
// in one instruction (of an unsigned and a signed one).
//
// A query's elements, and a block's weights, become integers of 16 bits with one factor, so that
// they keep more than a bfloat16 or float16 holds; each is two bytes, multiplied one after the
// other. Sums are exact, and so do not depend on their order.
#pragma once
#include "attention_few_rows.h"
#include "integers.h"

namespace gemma2 {
namespace GEMMA2_ISA {
namespace {

// Whether few rows of T over keys of K go this way.
template <class T, class K>
constexpr bool kInIntegers = false;

#if defined(GEMMA2_ISA_avx512_bf16)

template <>
constexpr bool kInIntegers<BFloat16, int8_t> = true;
template <>
constexpr bool kInIntegers<Half, int8_t> = true;

constexpr int64_t kBytes = 4 * kLanes;    // of a vector
constexpr int64_t kLowBytes = 256;        // where a query's low bytes begin; the high ones at 0
constexpr float kLeastSplit = 0x1p-100f;  // 65535 over less than this may be no number
static_assert(2 * kLowBytes <= 4 * kQueryStride, "");

// The first n bytes of a vector, n < kBytes, the others 0.
GEMMA2_INLINE VecI8 load_bytes_n(const int8_t* p, int64_t n) {
  VecI8 v{};
  memcpy(&v, p, n);
  return v;
}
GEMMA2_INLINE VecI8 load_bytes_of_row(const int8_t* row, int64_t d, int64_t head_dim) {
  VecI8 v;
  if (d + kBytes > head_dim) return load_bytes_n(row + d, head_dim - d);
  memcpy(&v, row + d, sizeof v);
  return v;
}

// n elements as factor * (256 high + low - 32768); returns the factor, NaN where one is not finite.
template <class T>
GEMMA2_INLINE float split_query(const T* row, int64_t n, uint8_t* to) {
  VecF largest = zero(), nan = zero();
  const auto at = [&](int64_t d) {
    return d + kLanes <= n ? load(row + d) : load_n(row + d, n - d);
  };
  for (int64_t d = 0; d < n; d += kLanes) {
    const VecF v = at(d);
    largest = max(largest, abs(v));
    nan += v * zero();
  }
  const float most = reduce_max(largest);
  // Smaller ones count as 0.
  const VecF inverse = set(most > kLeastSplit ? 32767.0f / most : 0.0f);
  memset(to, 0, 2 * kLowBytes);
  for (int64_t d = 0; d < n; d += kLanes) {
    const VecF v = max(min(round_small(at(d) * inverse), set(32767.0f)), set(-32767.0f));
    const VecI x = to_int(v) + 32768;
    store_integers(to + d, x >> 8);
    store_integers(to + kLowBytes + d, x & 0xff);
  }
  return most / 32767.0f + reduce_sum(nan);
}

// s[r, j] = q[r] . k[j] over q's factor, for kRows rows of split_query and the n keys.
template <int kRows, class Fetch>
GEMMA2_INLINE void dot_keys(const float* q, const KeyRows<int8_t>& k, int64_t n, int64_t head_dim,
                            float* s) {
  constexpr int kKeys = kLanes / kRows;
  const int64_t whole = head_dim / kBytes * kBytes;
  const VecU8 middle = VecU8{} + 128;
  for (int64_t j = 0; j < n; j += kKeys) {
    VecF sum[kLanes];  // of integers, (kRows, kKeys)
    const auto dot = [&](const auto& row_of) __attribute__((always_inline)) {
      GEMMA2_UNROLL
      for (int i = 0; i < kKeys; ++i) {
        const int8_t* row = row_of(i);
        const int8_t* later = row + Fetch::kKeysInIntegers * k.stride;
        VecI high[kRows], low[kRows], offset{};
        GEMMA2_UNROLL
        for (int r = 0; r < kRows; ++r) high[r] = low[r] = VecI{};
        const auto step = [&](int64_t d, const VecI8& key) __attribute__((always_inline)) {
          Fetch::line(later + d);
          offset = dot_quads(offset, middle, key);
          GEMMA2_UNROLL
          for (int r = 0; r < kRows; ++r) {
            const uint8_t* bytes = (const uint8_t*)(q + r * kQueryStride) + d;
            VecU8 upper, lower;
            memcpy(&upper, bytes, sizeof upper);
            memcpy(&lower, bytes + kLowBytes, sizeof lower);
            high[r] = dot_quads(high[r], upper, key);
            low[r] = dot_quads(low[r], lower, key);
          }
        };
        for (int64_t d = 0; d < whole; d += kBytes) step(d, load_bytes_of_row(row, d, d + kBytes));
        if (whole < head_dim) step(whole, load_bytes_n(row + whole, head_dim - whole));
        GEMMA2_UNROLL
        for (int r = 0; r < kRows; ++r)
          sum[r * kKeys + i] = (VecF)((((VecU)high[r] - (VecU)offset) << 8) + (VecU)low[r]);
      }
    };
    if (j + kKeys <= n && k.in_line(j, kKeys)) {
      const int8_t* first = k.row(j);
      dot([&](int i) { return first + i * k.stride; });
    } else {
      dot([&](int i) { return k.row(min64(j + i, n - 1)); });
    }
    const auto add = [](VecF a, VecF b)
                         __attribute__((always_inline)) { return (VecF)((VecU)a + (VecU)b); };
    store_dots<kRows>(to_floats((VecI)reduce_each(sum, add)), s, j, n);
  }
}

// A row's weights of a block times their values' factors, as factor * (256 high + low).
struct SplitWeights {
  alignas(64) uint8_t high[kKeyBlock], low[kKeyBlock];
  float factor;
};

// False where they are not such numbers: one is negative, not finite, or all are very small.
GEMMA2_INLINE bool split_weights(const float* w, SplitWeights& to) {
  VecF most = zero(), least = zero(), nan = zero();
  for (int64_t j = 0; j < kKeyBlock; j += kLanes) {
    const VecF v = load(w + j);
    most = max(most, v);
    least = min(least, v);
    nan += v * zero();
  }
  const float largest = reduce_max(most);
  if (!(reduce_sum(least + nan) == 0)) return false;
  if (largest < kLeastSplit && largest != 0) return false;
  const VecF inverse = set(largest == 0 ? 0.0f : 65535.0f / largest);
  for (int64_t j = 0; j < kKeyBlock; j += kLanes) {
    const VecI x = to_int(min(round_small(load(w + j) * inverse), set(65535.0f)));
    store_integers(to.high + j, x >> 8);
    store_integers(to.low + j, x & 0xff);
  }
  to.factor = largest / 65535.0f;
  return true;
}

// Where join_rows leaves dimension d.
GEMMA2_INLINE int64_t joined_place(int64_t d) {
  return d / kBytes * kBytes + d / 4 % 4 * kLanes + d % kBytes / 16 * 4 + d % 4;
}
// A row of o in the order of its dimensions.
GEMMA2_INLINE void sort_joined(float* o, int64_t head_dim) {
  for (int64_t d = 0; d < head_dim; d += kBytes) {
    float sorted[kBytes];
    for (int64_t i = 0; i < kBytes; i += 4) memcpy(sorted + i, o + joined_place(d + i), 16);
    memcpy(o + d, sorted, sizeof sorted);
  }
}

// Stands for keys that a group of four lacks.
alignas(64) constexpr int8_t kNoBytes[256] = {};

// o[r] += sum over the n keys of w[r][first + j] v[j]; o's elements lie as join_rows leaves them.
template <int kRows, class Fetch>
GEMMA2_INLINE void add_values(const SplitWeights* w, const KeyRows<int8_t>& v, int64_t first,
                              int64_t n, int64_t head_dim, float* o, int64_t o_stride) {
  // The next block is fetched meanwhile, four lines at a time: of one row, or of several short
  // ones.
  const int64_t in_row = head_dim <= 64 ? 1 : head_dim <= 128 ? 2 : 4;
  int64_t line[4];
  for (int i = 0; i < 4; ++i) line[i] = i / in_row * v.stride + i % in_row * kLineBytes;
  const auto add = [&](const auto& row_of) __attribute__((always_inline)) {
    const int8_t* later = v.row(kKeyBlock);
    for (int64_t d = 0; d < head_dim; d += kBytes) {
      VecI high[kRows][4], low[kRows][4];
      GEMMA2_UNROLL
      for (int r = 0; r < kRows; ++r) {
        GEMMA2_UNROLL
        for (int u = 0; u < 4; ++u) high[r][u] = low[r][u] = VecI{};
      }
      for (int64_t j = -(first % 4); j < n; j += 4) {
        GEMMA2_UNROLL
        for (int i = 0; i < 4; ++i) Fetch::line(later + line[i]);
        later += 4 / in_row * v.stride;
        VecI8 rows[4], joined[4];
        GEMMA2_UNROLL
        for (int i = 0; i < 4; ++i) rows[i] = load_bytes_of_row(row_of(j + i), d, head_dim);
        join_rows(rows, joined);
        GEMMA2_UNROLL
        for (int r = 0; r < kRows; ++r) {
          const VecU8 upper = (VecU8)broadcast_bits(w[r].high + first + j);
          const VecU8 lower = (VecU8)broadcast_bits(w[r].low + first + j);
          GEMMA2_UNROLL
          for (int u = 0; u < 4; ++u) {
            high[r][u] = dot_quads(high[r][u], upper, joined[u]);
            low[r][u] = dot_quads(low[r][u], lower, joined[u]);
          }
        }
      }
      GEMMA2_UNROLL
      for (int r = 0; r < kRows; ++r) {
        GEMMA2_UNROLL
        for (int u = 0; u < 4; ++u) {
          float* to = o + r * o_stride + d + u * kLanes;
          store(to, fma(to_floats((high[r][u] << 8) + low[r][u]), set(w[r].factor), load(to)));
        }
      }
    }
  };
  if (first % 4 == 0 && n % 4 == 0 && v.in_line(0, n)) {
    const int8_t* begin = v.row(0);
    add([&](int64_t j) { return begin + j * v.stride; });
  } else {
    add([&](int64_t j) { return j >= 0 && j < n ? v.row(j) : kNoBytes; });
  }
}

// The same in floats, of one row, for weights that are no SplitWeights.
inline void add_values_in_floats(const float* w, const KeyRows<int8_t>& v, int64_t n,
                                 int64_t head_dim, float* o) {
  for (int64_t j = 0; j < n; ++j) {
    for (int64_t d = 0; d < head_dim; ++d) o[joined_place(d)] += w[j] * to_float(v.row(j)[d]);
  }
}

#endif

}  // namespace
}  // namespace GEMMA2_ISA
}  // namespace gemma2
