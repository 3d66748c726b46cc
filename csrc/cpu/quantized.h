// The layout of packed weights, that kernels and bindings agree on; python/gemma2_ext/quantize.py
// describes it. Constants only: nothing here is compiled with wide instructions.
#pragma once
#include <stdint.h>

namespace gemma2 {

// Rows of weight in a block; the last block of a matrix may have fewer.
constexpr int64_t kQuantRows = 16;
// Blocks in a unit of work of linear.
constexpr int64_t kQuantUnitBlocks = 4;
// Columns are padded to a multiple of this; x is scaled by as many together.
constexpr int64_t kQuantDepth = 32;
// Columns that share a scale.
constexpr int64_t kInt8Group = 32, kInt4Group = 16;
// Bytes of kQuantDepth columns of one row.
constexpr int64_t kInt8RowBytes = 32, kInt4RowBytes = 16;
constexpr int64_t kInt8ScaleBytes = 2, kInt4ScaleBytes = 2;
// int4: bytes of a row's own factor, in front of a block's other scales.
constexpr int64_t kInt4FactorBytes = 2;
// Rows of x that a block of weights serves in one pass.
constexpr int64_t kQuantChunk = 64;
// With AVX-512's int8 products up to this many rows meet a block at once; with AMX more than these
// are tiles.
constexpr int64_t kQuantFewRows = 8;
// Bytes of LinearParams::packed_x for kQuantDepth columns of one row, at most.
constexpr int64_t kQuantPackedBytes = 80;

}  // namespace gemma2
