// int8 as 16-bit floats, exactly, by an exponent put above the bits in place of conversions.
#pragma once
#include "ptx.cuh"

namespace gemma2 {
namespace cuda {

// Columns (0, 2) and (1, 3) of a word of four int8, as T two at a time. BFloat16 has no room for 8
// bits below an exponent: 128 + (the last 7 bits) less 128 or, of negative numbers, 256. Half: 1024
// + (q + 128).
GEMMA2_DEVICE void widen(uint32_t word, uint32_t (&q)[2], BFloat16) {
  constexpr uint32_t kExponent = 0x43004300u, kMinusOne = 0xbf80bf80u;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t part = word >> (8 * i);
    const uint32_t magnitude = and_or(part, 0x007f007fu, kExponent);
    q[i] = multiply_add_2<BFloat16>(and_or(part, 0x00800080u, kExponent), kMinusOne, magnitude);
  }
}
GEMMA2_DEVICE void widen(uint32_t word, uint32_t (&q)[2], Half) {
  constexpr uint32_t kOne = 0x3c003c00u, kBias = 0xe480e480u;  // 1, -1152
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t biased = (word >> (8 * i) & 0x00ff00ffu) ^ 0x64806480u;
    q[i] = multiply_add_2<Half>(biased, kOne, kBias);
  }
}

}  // namespace cuda
}  // namespace gemma2
