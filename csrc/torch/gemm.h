// Runs the GEMM of csrc/cpu/gemm.cpp over torch's threads, in blocks that bound its memory.
#pragma once
#include "../cpu/gemm.h"
#include "../cpu/isa.h"
#include "common.h"

namespace gemma2 {

constexpr int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }
constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Many rows go through a kernel in even slices of at most 512, so that what is made of them for it
// stays in the processor's caches: the rows of a slice.
constexpr int64_t rows_of_slice(int64_t rows) { return divide_up(rows, divide_up(rows, 512)); }

inline int64_t element_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

inline const void* offset(const void* data, int64_t elements, DType dtype) {
  return static_cast<const char*>(data) + elements * element_size(dtype);
}
inline void* offset(void* data, int64_t elements, DType dtype) {
  return static_cast<char*>(data) + elements * element_size(dtype);
}

inline Tensor scratch_floats(const Tensor& like, int64_t count) {
  return torch::stable::new_empty(like, {&count, 1}, ScalarType::Float);
}
inline float* floats(const Tensor& t) { return static_cast<float*>(t.data_ptr()); }

inline int64_t packed_floats(int64_t columns, int64_t depth) {
  return round_up(columns, kGemmPackMultiple) * round_up(depth, kGemmPackMultiple);
}

inline void gemm_pack(const GemmParams& p) {
  // Panels have 8 columns or more.
  parallel_units(divide_up(p.columns, 8), 8 * p.depth * 4, [&](int64_t begin, int64_t end) {
    cpu_kernels().gemm_pack_panels(p, begin, end);
  });
}

// Rows of a register tile: 6, 12 with AVX-512, 32 with AMX.
inline int64_t gemm_tile_rows() {
  const std::string isa = cpu_isa();
  if (isa == "avx512_amx") return 32;
  return isa.rfind("avx512", 0) == 0 ? 12 : 6;
}

// Rows of a unit such that the threads finish together. Every unit reads all of the other factor,
// which speaks for long ones; whole register tiles for multiples of their rows.
inline int64_t gemm_unit_rows(int64_t rows) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t tile = gemm_tile_rows();
  int64_t best = kGemmRows, best_cost = INT64_MAX;
  for (int64_t unit = kGemmRows; unit >= 2 * tile; unit -= tile) {
    const int64_t turns = divide_up(divide_up(rows, unit), threads);
    const int64_t cost = turns * (unit + 6);
    if (cost < best_cost) {
      best_cost = cost;
      best = unit;
    }
  }
  return best;
}

// The product of all rows with what gemm_pack has packed.
inline void gemm_multiply(GemmParams p, const Tensor& like) {
  p.unit_rows = gemm_unit_rows(p.rows);
  const int64_t units = divide_up(p.rows, p.unit_rows);
  const int64_t each = p.out_dtype == DType::kFloat32 ? kGemmScratch : gemm_scratch(p.columns);
  const Tensor scratch = scratch_floats(like, sharing_threads(units) * each);
  parallel_runs(units, 1, [&](int64_t thread, int64_t begin, int64_t end) {
    GemmParams mine = p;
    mine.scratch = floats(scratch) + thread * each;
    cpu_kernels().gemm_rows(mine, begin, end);
  });
}

// out = a b^T, or added to it. Packs at most kColumns columns and kDepth elements of depth of b at
// once; `like` is a tensor of the device that scratch comes from.
inline void gemm(GemmParams p, const Tensor& like) {
  constexpr int64_t kRows = 4032, kColumns = 1280, kDepth = 4096;
  static_assert(kDepth % (2 * kGemmDepth) == 0);
  const bool whole = p.depth <= kDepth || p.out_dtype == DType::kFloat32;
  const int64_t columns = round_up(divide_up(p.columns, divide_up(p.columns, kColumns)), 32);
  const int64_t rows = whole ? p.rows : std::min(p.rows, kRows);
  const Tensor packed = scratch_floats(like, packed_floats(columns, std::min(p.depth, kDepth)));
  p.packed_b = packed.data_ptr();
  // Sums of more than one block of depth, where out is too narrow for them.
  const Tensor sums = scratch_floats(like, whole ? 0 : rows * columns);
  for (int64_t row = 0; row < p.rows; row += rows) {
    for (int64_t column = 0; column < p.columns; column += columns) {
      GemmParams part = p;
      part.rows = std::min(rows, p.rows - row);
      part.columns = std::min(columns, p.columns - column);
      part.out = offset(p.out, row * p.out_stride + column, p.out_dtype);
      GemmParams product = part;
      if (!whole) {
        product.out = sums.data_ptr();
        product.out_stride = part.columns;
        product.out_dtype = DType::kFloat32;
      }
      for (int64_t k = 0; k < p.depth; k += kDepth) {
        product.depth = std::min(kDepth, p.depth - k);
        product.a = offset(p.a, row * p.a_row + k * p.a_k, p.a_dtype);
        product.b = offset(p.b, column * p.b_row + k * p.b_k, p.b_dtype);
        product.add = k > 0 || p.add;
        gemm_pack(product);
        gemm_multiply(product, like);
      }
      if (!whole) {
        part.scratch = floats(sums);
        parallel_units(part.rows, part.columns * 4, [&](int64_t begin, int64_t end) {
          cpu_kernels().gemm_round_rows(part, begin, end);
        });
      }
    }
  }
}

}  // namespace gemma2
