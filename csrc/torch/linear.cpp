// Binding of linear and logits.
#include "../cpu/linear.h"

#include <torch/csrc/stable/stableivalue_conversions.h>

#include <array>
#include <cmath>

#include "../cpu/isa.h"
#include "common.h"

namespace gemma2 {
namespace {

constexpr int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

// From how many rows on torch's GEMM serves a linear. With AVX512_BF16 oneDNN reaches 85 % of the
// bf16 dot's peak at 512 rows, but reads weights at less than half of memory's speed at one row.
// Without it torch widens bf16 to float32 at a quarter of this project's speed or less, and for
// float32 and float16 this project's GEMM is at least as fast.
constexpr int64_t kTorchRowsBf16Dot = 32;
constexpr int64_t kTorchNever = INT64_MAX;

int64_t torch_rows(DType dtype) {
  return dtype == DType::kBFloat16 && cpu_isa() == "avx512_bf16" ? kTorchRowsBf16Dot : kTorchNever;
}

void torch_mm_out(const Tensor& x, const Tensor& weight, Tensor out, int64_t rows) {
  const std::array<int64_t, 2> x_shape{rows, weight.size(1)}, out_shape{rows, weight.size(0)};
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(torch::stable::reshape(x, {x_shape.data(), 2})),
                                    from(torch::stable::transpose(weight, 0, 1)),
                                    from(torch::stable::view(out, {out_shape.data(), 2}))};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // takes the returned handle, to release it
}

Tensor scratch_floats(const Tensor& x, int64_t count) {
  return torch::stable::new_empty(x, {&count, 1}, ScalarType::Float);
}

void few_rows(LinearParams p, const Tensor& x, int64_t element_size) {
  const CpuKernels& kernels = cpu_kernels();
  const Tensor packed = scratch_floats(x, p.rows * round_up(p.in_features, kLinearPackMultiple));
  p.packed_x = packed.data_ptr();
  kernels.linear_pack_rows(p, 0, 1);
  const int64_t units = round_up(p.out_features, kLinearFewColumns) / kLinearFewColumns;
  parallel_units(units, kLinearFewColumns * p.in_features * element_size,
                 [&](int64_t begin, int64_t end) { kernels.linear_few_rows(p, begin, end); });
}

void many_rows(LinearParams p, const Tensor& x, int64_t element_size) {
  const CpuKernels& kernels = cpu_kernels();
  const int64_t units = round_up(p.out_features, kLinearManyColumns) / kLinearManyColumns;
  const int64_t blocks = round_up(p.rows, kLinearRowBlock) / kLinearRowBlock;
  const int64_t block_rows = round_up(p.rows, blocks) / blocks;
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), units);
  const Tensor packed = scratch_floats(
      x, round_up(block_rows, kLinearPackMultiple) * round_up(p.in_features, kLinearPackMultiple));
  const Tensor scratch = scratch_floats(x, threads * kLinearScratch);
  p.packed_x = packed.data_ptr();

  const LinearParams all = p;
  for (int64_t first = 0; first < all.rows; first += block_rows) {
    p.x = (const char*)all.x + first * p.x_stride * element_size;
    p.out = (char*)all.out + first * p.out_stride * (p.out_dtype == DType::kFloat32 ? 4 : 2);
    p.rows = std::min(block_rows, all.rows - first);
    // Panels have 8 rows or more.
    parallel_units(round_up(p.rows, 8) / 8, 8 * p.in_features * 4,
                   [&](int64_t begin, int64_t end) { kernels.linear_pack_panels(p, begin, end); });
    // Shared out by thread, not by unit: each thread has its own scratch.
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        LinearParams mine = p;
        mine.scratch = (float*)scratch.data_ptr() + t * kLinearScratch;
        kernels.linear_many_rows(mine, units * t / threads, units * (t + 1) / threads);
      }
    });
  }
}

// softcap 0: none. `name` is the input's name in the op's schema.
void run(const char* op, const char* name, const Tensor& x, const Tensor& weight, double softcap,
         Tensor out, ScalarType out_type) {
  const DType dtype = dtype_of(op, name, x);
  if (x.dim() < 1)
    fail(op, std::string(name) + " must have shape (..., in_features), got a scalar");
  const int64_t in_features = x.size(x.dim() - 1);
  if (weight.dim() != 2 || weight.size(1) != in_features) {
    fail(op, "weight must have shape (out_features, in_features) = (*, " +
                 std::to_string(in_features) + "), got " + to_string(weight));
  }
  check_same_dtype(op, "weight", weight, name, x);
  check_cpu(op, "weight", weight);
  check_cpu(op, "out", out);
  const int64_t out_features = weight.size(0);
  bool right = out.dim() == x.dim() && out.size(x.dim() - 1) == out_features;
  for (int64_t i = 0; right && i + 1 < x.dim(); ++i) right = out.size(i) == x.size(i);
  if (!right) {
    fail(op, std::string("out must have shape (*") + name + ".shape[:-1], out_features) = (..., " +
                 std::to_string(out_features) + ") for " + name + " of shape " + to_string(x) +
                 ", got " + to_string(out));
  }
  if (out.scalar_type() != out_type) {
    fail(op, std::string("out must be ") + torch::headeronly::toString(out_type) + ", got " +
                 torch::headeronly::toString(out.scalar_type()));
  }
  if (!out.is_contiguous()) fail(op, "out must be contiguous");
  use_huge_pages(out);
  if (out.numel() == 0) return;
  if (in_features == 0) {
    torch::stable::zero_(out);
    return;
  }

  const int64_t rows = out.numel() / out_features;
  const int64_t element_size = dtype == DType::kFloat32 ? 4 : 2;
  if (softcap == 0 && out_type == x.scalar_type() && rows >= torch_rows(dtype))
    return torch_mm_out(x, weight, out, rows);
  const Rows x_rows = as_rows(x), weight_rows = as_rows(weight);
  LinearParams p{};
  p.x = x_rows.tensor.data_ptr();
  p.x_stride = x_rows.stride;
  p.weight = weight_rows.tensor.data_ptr();
  p.weight_stride = weight_rows.stride;
  p.out = out.data_ptr();
  p.out_stride = out_features;
  p.rows = rows;
  p.in_features = in_features;
  p.out_features = out_features;
  p.softcap = float(softcap);
  p.dtype = dtype;
  p.out_dtype = dtype_of(op, "out", out);
  if (rows <= kLinearFewRows) {
    few_rows(p, x, element_size);
  } else {
    many_rows(p, x, element_size);
  }
}

Tensor new_out(const Tensor& x, const Tensor& weight, ScalarType type) {
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  if (!shape.empty() && weight.dim() > 0) shape.back() = weight.size(0);
  return torch::stable::new_empty(x, {shape.data(), shape.size()}, type);
}

void linear_out(const Tensor& x, const Tensor& weight, Tensor out) {
  run("linear", "x", x, weight, 0, out, x.scalar_type());
}

Tensor linear(const Tensor& x, const Tensor& weight) {
  Tensor out = new_out(x, weight, x.scalar_type());
  linear_out(x, weight, out);
  return out;
}

void logits_out(const Tensor& hidden, const Tensor& weight, std::optional<double> softcap,
                Tensor out) {
  if (softcap && !(*softcap > 0 && std::isfinite(*softcap))) {
    fail("logits", "softcap must be positive and finite, or None, got " + std::to_string(*softcap));
  }
  run("logits", "hidden", hidden, weight, softcap.value_or(0), out, ScalarType::Float);
}

Tensor logits(const Tensor& hidden, const Tensor& weight, std::optional<double> softcap) {
  Tensor out = new_out(hidden, weight, ScalarType::Float);
  logits_out(hidden, weight, softcap, out);
  return out;
}

}  // namespace
}  // namespace gemma2

STABLE_TORCH_LIBRARY_IMPL(gemma2_ext, CPU, m) {
  m.impl("linear", TORCH_BOX(&gemma2::linear));
  m.impl("linear_out", TORCH_BOX(&gemma2::linear_out));
  m.impl("logits", TORCH_BOX(&gemma2::logits));
  m.impl("logits_out", TORCH_BOX(&gemma2::logits_out));
}
