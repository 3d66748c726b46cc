// Bindings of linear, its backward, and logits.
//
// In float64, which checks of gradients use, products are torch's.
#include "../cpu/linear.h"

#include <torch/csrc/stable/stableivalue_conversions.h>

#include <array>
#include <cmath>
#include <utility>

#include "../cpu/isa.h"
#include "cuda.h"
#include "gemm.h"
#include "mm.h"

namespace gemma2 {
namespace {

// Whether torch's GEMM makes the gradients, of sums of `depth` products. With AVX512_BF16 it is
// hardly faster than linear_many_rows, but faster than `gemm`, which gradients would take. (oneDNN
// may read one number past a row of an odd depth and multiply it with zero: a NaN there would
// show.) Without products of bfloat16 pairs torch widens bfloat16 to float32 at a quarter of this
// project's speed or less, as float16. For float32 its GEMM is slower too, but for the narrowest
// products (docs/notes.md).
bool torch_serves_gradients(DType dtype, int64_t depth) {
  if (dtype == DType::kFloat64) return true;
  return dtype == DType::kBFloat16 && depth % 2 == 0 && cpu_isa() == "avx512_bf16";
}

#ifdef GEMMA2_WITH_CUDA
// Few rows of 16 bits by this project's kernel, which streams the weights; all else by cuBLAS.
void linear_on_cuda(const char* op, const Tensor& x, const Tensor& weight, const Tensor& out,
                    const LinearParams& p) {
  if (p.dtype == DType::kFloat64) fail(op, "float64 is for the CPU only");
  if (p.dtype != DType::kFloat32 && p.rows <= kLinearCudaRows)
    return run_on_cuda(x, launch_linear, p);
  torch_mm_out(as_matrix(x, p.rows), torch::stable::transpose(weight, 0, 1), out, p.rows);
  if (p.softcap == 0) return;
  run_on_cuda(x, launch_soft_cap,
              SoftCapParams{static_cast<float*>(out.data_ptr()), out.numel(), p.softcap});
}
#endif

void few_rows(LinearParams p, const Tensor& x) {
  const CpuKernels& kernels = cpu_kernels();
  const Tensor packed = scratch_floats(x, p.rows * round_up(p.in_features, kLinearPackMultiple));
  p.packed_x = packed.data_ptr();
  p.zen4 = is_zen4();
  kernels.linear_pack_rows(p, 0, 1);
  const int64_t units = round_up(p.out_features, kLinearFewColumns) / kLinearFewColumns;
  // Several rows carry more work a byte.
  const int64_t unit_bytes = kLinearFewColumns * p.in_features * element_size(p.dtype);
  parallel_units(units, unit_bytes * (p.rows + 3) / 4,
                 [&](int64_t begin, int64_t end) { kernels.linear_few_rows(p, begin, end); });
}

void many_rows(LinearParams p, const Tensor& x) {
  const CpuKernels& kernels = cpu_kernels();
  // Each thread has a range of its own, as large as the others', of whole lines of out where that
  // leaves none without.
  const int64_t even = divide_up(p.out_features, int64_t(torch::stable::get_num_threads()));
  const int64_t tile = std::max(kLinearColumnTile, gemm_tile_rows());
  const int64_t lines = round_up(even, 64 / element_size(p.out_dtype));
  p.range_columns = lines - even <= even / 8 ? lines : round_up(even, tile);
  p.range_units = divide_up(p.range_columns, kLinearManyColumns);
  p.unit_columns = round_up(divide_up(p.range_columns, p.range_units), tile);
  const int64_t units = divide_up(p.out_features, p.range_columns) * p.range_units;
  const bool large = kLinearRowBlock * p.in_features * element_size(p.dtype) > kLinearBlockBytes;
  const int64_t most_rows = large ? kLinearRowBlock / 2 : kLinearRowBlock;
  const int64_t block_rows = divide_up(p.rows, divide_up(p.rows, most_rows));
  const Tensor packed = scratch_floats(
      x, round_up(block_rows, kLinearPackMultiple) * round_up(p.in_features, kLinearPackMultiple));
  const Tensor scratch = scratch_floats(x, sharing_threads(units) * kLinearScratch);
  p.packed_x = packed.data_ptr();

  const LinearParams all = p;
  for (int64_t first = 0; first < all.rows; first += block_rows) {
    p.x = offset(all.x, first * p.x_stride, p.dtype);
    p.out = offset(all.out, first * p.out_stride, p.out_dtype);
    p.rows = std::min(block_rows, all.rows - first);
    // Panels have 8 rows or more.
    parallel_units(divide_up(p.rows, 8), 8 * p.in_features * 4,
                   [&](int64_t begin, int64_t end) { kernels.linear_pack_panels(p, begin, end); });
    parallel_runs(units, 1, [&](int64_t thread, int64_t begin, int64_t end) {
      LinearParams mine = p;
      mine.scratch = floats(scratch) + thread * kLinearScratch;
      kernels.linear_many_rows(mine, begin, end);
    });
  }
}

// Whether out is so much taller than wide that the weight is packed in less time than x, which
// many_rows packs (measured: docs/notes.md).
bool is_tall(const LinearParams& p) {
  return p.softcap == 0 && p.rows >= p.out_features * (p.dtype == DType::kBFloat16 ? 16 : 4);
}

// Sums go in the same order.
void tall(const LinearParams& p, const Tensor& x) {
  GemmParams product{};
  product.a = p.x;
  product.a_row = p.x_stride;
  product.b = p.weight;
  product.b_row = p.weight_stride;
  product.a_k = product.b_k = 1;
  product.out = p.out;
  product.out_stride = p.out_stride;
  product.rows = p.rows;
  product.columns = p.out_features;
  product.depth = p.in_features;
  product.a_dtype = product.b_dtype = product.product = p.dtype;
  product.out_dtype = p.out_dtype;
  gemm(product, x);
}

void linear_then_geglu(const Tensor& x, const Tensor& weight, const Tensor& out, int64_t rows);

// softcap 0: none; geglu: `out` is of the two halves of weight. `name` is the input's name in the
// op's schema.
void run(const char* op, const char* name, const Tensor& x, const Tensor& weight, double softcap,
         Tensor out, ScalarType out_type, bool geglu = false) {
  const DType dtype = dtype_of(op, name, x, Dtypes::kOrFloat64);
  if (x.dim() < 1)
    fail(op, std::string(name) + " must have shape (..., in_features), got a scalar");
  const int64_t in_features = x.size(x.dim() - 1);
  if (weight.dim() != 2 || weight.size(1) != in_features) {
    fail(op, "weight must have shape (out_features, in_features) = (*, " +
                 std::to_string(in_features) + "), got " + to_string(weight));
  }
  check_same_dtype(op, "weight", weight, name, x);
  check_device(op, "weight", weight, name, x);
  check_device(op, "out", out, name, x);
  if (geglu && weight.size(0) % 2)
    fail(op, "weight must have an even number of rows, got " + to_string(weight));
  const int64_t out_features = weight.size(0) / (geglu ? 2 : 1);
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
  prepare_memory(out);
  if (out.numel() == 0) return;
  if (in_features == 0) {
    torch::stable::zero_(out);
    return;
  }

  const int64_t rows = out.numel() / out_features;
  if (geglu && (x.is_cpu() || dtype == DType::kFloat32 || rows > kLinearCudaRows))
    return linear_then_geglu(x, weight, out, rows);
  if (x.is_cpu() && dtype == DType::kFloat64) {
    torch_mm_out(as_matrix(x, rows), torch::stable::transpose(weight, 0, 1), out, rows);
    double* y = static_cast<double*>(out.data_ptr());
    for (int64_t i = 0; softcap > 0 && i < rows * out_features; ++i)
      y[i] = softcap * std::tanh(y[i] / softcap);
    return;
  }
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
  p.geglu = geglu;
#ifdef GEMMA2_WITH_CUDA
  if (!x.is_cpu()) return linear_on_cuda(op, x, weight, out, p);
#endif
  if (p.out_features == 1 && p.rows > 1) {
    // One row of weight for many of x is one row of x for many of weight, to the bit.
    std::swap(p.x, p.weight);
    std::swap(p.x_stride, p.weight_stride);
    std::swap(p.rows, p.out_features);
    p.out_stride = p.out_features;
  }
  if (p.rows <= kLinearFewRows) {
    few_rows(p, x);
  } else if (is_tall(p)) {
    tall(p, x);
  } else {
    many_rows(p, x);
  }
}

Tensor new_out(const Tensor& x, const Tensor& weight, ScalarType type) {
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  if (!shape.empty() && weight.dim() > 0) shape.back() = weight.size(0);
  return torch::stable::new_empty(x, {shape.data(), shape.size()}, type);
}

void linear_out(const Tensor& x, const Tensor& weight, Tensor out) {
  note(linear_out, x, weight, out);
  run("linear", "x", x, weight, 0, out, x.scalar_type());
}

Tensor linear(const Tensor& x, const Tensor& weight) {
  Tensor out = new_out(x, weight, x.scalar_type());
  linear_out(x, weight, out);
  return out;
}

// grad_x = grad_out weight, grad_weight = grad_out^T x; each where it is given. grad_out has x's
// dtype or float32.
void linear_backward_out(const Tensor& grad_out, const Tensor& x, const Tensor& weight,
                         std::optional<Tensor> grad_x, std::optional<Tensor> grad_weight) {
  const char* op = "linear_backward";
  const DType dtype = dtype_of(op, "x", x, Dtypes::kOrFloat64);
  const int64_t last = x.dim() - 1;
  if (last < 0 || weight.dim() != 2 || weight.size(1) != x.size(last)) {
    fail(op, "x (..., in_features) and weight (out_features, in_features) must fit, got " +
                 to_string(x) + " and " + to_string(weight));
  }
  bool right = grad_out.dim() == x.dim() && grad_out.size(last) == weight.size(0);
  for (int64_t i = 0; right && i < last; ++i) right = grad_out.size(i) == x.size(i);
  if (!right) {
    fail(op, "grad_out must have shape (*x.shape[:-1], out_features), got " + to_string(grad_out) +
                 " for x of shape " + to_string(x) + " and weight of shape " + to_string(weight));
  }
  check_same_dtype(op, "weight", weight, "x", x);
  if (dtype == DType::kFloat64 || grad_out.scalar_type() != ScalarType::Float)
    check_same_dtype(op, "grad_out", grad_out, "x", x);
  check_device(op, "weight", weight, "x", x);
  check_device(op, "grad_out", grad_out, "x", x);
  if (grad_x) check_out(op, "grad_x", *grad_x, "x", x);
  if (grad_weight) check_out(op, "grad_weight", *grad_weight, "weight", weight);

  const int64_t in_features = weight.size(1), out_features = weight.size(0);
  const int64_t rows = in_features > 0 ? x.numel() / in_features : 0;
  if (rows == 0 || out_features == 0 || in_features == 0) {
    if (grad_x) torch::stable::zero_(*grad_x);
    if (grad_weight) torch::stable::zero_(*grad_weight);
    return;
  }
  if (!x.is_cpu() ||
      (grad_out.scalar_type() == x.scalar_type() && torch_serves_gradients(dtype, out_features))) {
    Tensor grad = as_matrix(grad_out, rows);
    if (grad.scalar_type() != x.scalar_type()) grad = torch::stable::to(grad, x.scalar_type());
    if (grad_x) torch_mm_out(grad, weight, *grad_x, rows);
    if (grad_weight) {
      torch_mm_out(torch::stable::transpose(grad, 0, 1), as_matrix(x, rows), *grad_weight,
                   out_features);
    }
    return;
  }
  const Rows grad_rows = as_rows(grad_out), x_rows = as_rows(x), weight_rows = as_rows(weight);
  GemmParams p{};
  p.a = grad_rows.tensor.data_ptr();
  p.a_dtype = dtype_of(op, "grad_out", grad_out);
  p.b_row = 1;
  p.b_dtype = p.out_dtype = p.product = dtype;
  p.columns = p.out_stride = in_features;
  if (grad_x) {
    p.rows = rows;
    p.depth = out_features;
    p.a_row = grad_rows.stride;
    p.a_k = 1;
    p.b = weight_rows.tensor.data_ptr();
    p.b_k = weight_rows.stride;
    p.out = grad_x->data_ptr();
    gemm(p, x);
  }
  if (grad_weight) {
    p.rows = out_features;
    p.depth = rows;
    p.a_row = 1;
    p.a_k = grad_rows.stride;
    p.b = x_rows.tensor.data_ptr();
    p.b_k = x_rows.stride;
    p.out = grad_weight->data_ptr();
    gemm(p, x);
  }
}

void geglu_of_halves(Tensor products, const Tensor& out) {
  const int64_t last = products.dim() - 1, columns = products.size(last) / 2;
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(torch::stable::narrow(products, last, 0, columns)),
                                    from(torch::stable::narrow(products, last, columns, columns)),
                                    from(out)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("gemma2_ext::geglu_out", "", stack.data(), TORCH_ABI_VERSION));
}

void linear_then_geglu(const Tensor& x, const Tensor& weight, const Tensor& out, int64_t rows) {
  const int64_t slice = rows_of_slice(rows);
  if (!x.is_cpu() || slice == rows) return geglu_of_halves(linear(x, weight), out);
  Tensor all_x = as_matrix(x, rows), all_out = as_matrix(out, rows);
  Tensor products = torch::stable::new_empty(x, {slice, weight.size(0)});
  for (int64_t first = 0; first < rows; first += slice) {
    const int64_t count = std::min(slice, rows - first);
    const Tensor part = torch::stable::narrow(products, 0, 0, count);
    linear_out(torch::stable::narrow(all_x, 0, first, count), weight, part);
    geglu_of_halves(part, torch::stable::narrow(all_out, 0, first, count));
  }
}

void linear_geglu_out(const Tensor& x, const Tensor& weight, Tensor out) {
  run("linear_geglu", "x", x, weight, 0, out, x.scalar_type(), true);
}

Tensor linear_geglu(const Tensor& x, const Tensor& weight) {
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  if (!shape.empty() && weight.dim() > 0) shape.back() = weight.size(0) / 2;
  Tensor out = torch::stable::new_empty(x, {shape.data(), shape.size()});
  linear_geglu_out(x, weight, out);
  return out;
}

ScalarType logits_type(const Tensor& hidden) {
  return hidden.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

void logits_out(const Tensor& hidden, const Tensor& weight, std::optional<double> softcap,
                Tensor out) {
  if (softcap && !(*softcap > 0 && std::isfinite(*softcap))) {
    fail("logits", "softcap must be positive and finite, or None, got " + std::to_string(*softcap));
  }
  run("logits", "hidden", hidden, weight, softcap.value_or(0), out, logits_type(hidden));
}

Tensor logits(const Tensor& hidden, const Tensor& weight, std::optional<double> softcap) {
  Tensor out = new_out(hidden, weight, logits_type(hidden));
  logits_out(hidden, weight, softcap, out);
  return out;
}

template <class Library>
void implement(Library& m) {
  m.impl("linear", GEMMA2_BOX(&linear));
  m.impl("linear_out", GEMMA2_BOX(&linear_out));
  m.impl("linear_backward_out", GEMMA2_BOX(&linear_backward_out));
  m.impl("linear_geglu", GEMMA2_BOX(&linear_geglu));
  m.impl("linear_geglu_out", GEMMA2_BOX(&linear_geglu_out));
  m.impl("logits", GEMMA2_BOX(&logits));
  m.impl("logits_out", GEMMA2_BOX(&logits_out));
}

}  // namespace
}  // namespace gemma2

GEMMA2_REGISTER(gemma2::implement)
