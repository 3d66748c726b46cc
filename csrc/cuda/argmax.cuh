// What argmax and draws have in common: an order of a row's elements, and how a cluster of blocks
// goes over a row.
#pragma once
#include "vector.cuh"

namespace gemma2 {
namespace cuda {

constexpr int kRowThreads = 1024, kRowWarps = kRowThreads / kWarpSize;

// Blocks that share a row of so many.
inline int row_blocks(const char* op, int64_t rows, int64_t columns) {
  const int blocks = device_properties().clusters ? 8 : 1;
  if (columns > UINT32_MAX || rows * blocks > device_properties().max_blocks)
    throw std::invalid_argument(std::string("gemma2_ext::") + op + ": too many elements for CUDA");
  return blocks;
}

// A number that rises with x and, of equal x, falls with its place. -0 equals 0; NaN is above all.
GEMMA2_DEVICE uint64_t key_of(float x, uint32_t column) {
  const uint32_t bits = float_to_bits(x + 0.0f);
  const uint32_t order = x != x ? 0xffffffffu : bits >> 31 ? ~bits : bits | 0x80000000u;
  return uint64_t(order) << 32 | uint32_t(~column);
}
GEMMA2_DEVICE uint32_t column_of(uint64_t key) { return uint32_t(~key); }

GEMMA2_DEVICE uint64_t larger(uint64_t a, uint64_t b) { return a < b ? b : a; }
GEMMA2_DEVICE uint64_t warp_largest(uint64_t key) {
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) key = larger(key, shuffle_xor(key, mask));
  return key;
}

// The halves of a number, as what another block's thread can read.
GEMMA2_DEVICE float high_half(uint64_t x) { return bits_to_float(uint32_t(x >> 32)); }
GEMMA2_DEVICE float low_half(uint64_t x) { return bits_to_float(uint32_t(x)); }
GEMMA2_DEVICE uint64_t whole(float high, float low) {
  return uint64_t(float_to_bits(high)) << 32 | float_to_bits(low);
}

// f(element, column) for this thread's elements of a row that `blocks` blocks share, kAtOnce
// vectors on their way at a time.
template <bool kAligned, int kAtOnce, class F>
GEMMA2_DEVICE void for_each_of_row(const float* x, int64_t columns, int rank, int blocks,
                                   const F& f) {
  constexpr int kSize = kVectorSize<float>;
  constexpr int kStep = kRowThreads * kSize;
  const int64_t share = (columns + blocks * kSize - 1) / (blocks * kSize) * kSize;
  const int64_t end = min(columns, (rank + 1) * share);
  for (int64_t first = rank * share + threadIdx.x * kSize; first < end; first += kAtOnce * kStep) {
    float values[kAtOnce][kSize];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int64_t at = first + i * kStep;
      if (at < end) load_floats<kAligned>(x + at, end - at, values[i]);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        const int64_t at = first + i * kStep + j;
        if (at < end) f(values[i][j], uint32_t(at));
      }
    }
  }
}

}  // namespace cuda
}  // namespace gemma2
