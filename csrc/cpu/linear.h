// Sizes that linear's kernels and their binding agree on. Constants only: nothing here is compiled
// with wide instructions.
#pragma once
#include <stdint.h>

#include "gemm.h"

namespace gemma2 {

// Up to this many rows linear_few_rows streams the weights; above, linear_many_rows is a blocked
// GEMM.
constexpr int64_t kLinearFewRows = 16;
// Rows of weight a multiple of this apart lie in one set of a first-level cache.
#if defined(__aarch64__)
constexpr int64_t kLinearWayBytes = 16 << 10;
#else
constexpr int64_t kLinearWayBytes = 4 << 10;
#endif
// On CUDA up to this many rows' kernels stream the weights; above, cuBLAS serves.
constexpr int64_t kLinearCudaRows = 16;
// Columns of out (rows of weight) in one unit of linear_few_rows, and at most of linear_many_rows.
constexpr int64_t kLinearFewColumns = 24;
constexpr int64_t kLinearManyColumns = kGemmRows;
// Rows of weight in a register tile, or in two.
constexpr int64_t kLinearColumnTile = 12;
// linear_many_rows takes at most this many rows at once, so that its scratch is bounded; of an x
// whose block would be larger than kLinearBlockBytes, half as many.
constexpr int64_t kLinearRowBlock = 1024;
constexpr int64_t kLinearBlockBytes = 4 << 20;
// packed_x is a multiple of this many rows and columns, of 4 bytes each.
constexpr int64_t kLinearPackMultiple = 32;
// floats of LinearParams::scratch: unpacked weights and sums.
constexpr int64_t kLinearScratch =
    kLinearManyColumns * kGemmDepthStride + kLinearRowBlock * kLinearManyColumns;

}  // namespace gemma2
