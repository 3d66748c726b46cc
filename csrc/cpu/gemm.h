// Sizes that the GEMM's kernels and their bindings agree on. Constants only: nothing here is
// compiled with wide instructions.
#pragma once
#include <stdint.h>

namespace gemma2 {

// At most this many rows of out in one unit of gemm_rows.
constexpr int64_t kGemmRows = 96;
// This many factors of a row of the broadcast operand are unpacked at a time, with a distance
// between rows that does not put them all into one set of the first-level cache.
constexpr int64_t kGemmDepth = 256;
constexpr int64_t kGemmDepthStride = kGemmDepth + 16;
// packed_b is a multiple of this many columns and elements of depth, of 4 bytes each.
constexpr int64_t kGemmPackMultiple = 32;
// floats of GemmParams::scratch where out is float32, and where it is narrower.
constexpr int64_t kGemmScratch = kGemmRows * kGemmDepthStride;
constexpr int64_t gemm_scratch(int64_t columns) {
  return kGemmScratch + kGemmRows * (columns + kGemmPackMultiple);
}

}  // namespace gemma2
