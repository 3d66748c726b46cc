// Bindings of rms_norm and its backward.
#include "../cpu/float64.h"
#include "../cpu/isa.h"
#include "cuda.h"

namespace gemma2 {
namespace {

void check_inputs(const char* op, const Tensor& x, const Tensor& weight, double eps) {
  if (x.dim() < 1) fail(op, "x must have shape (..., hidden_size), got a scalar");
  check_device(op, "weight", weight, "x", x);
  const int64_t hidden_size = x.size(x.dim() - 1);
  if (weight.dim() != 1 || weight.size(0) != hidden_size) {
    fail(op, "weight must have shape (hidden_size,) = (" + std::to_string(hidden_size) +
                 ",), got " + to_string(weight));
  }
  if (!(eps >= 0)) fail(op, "eps must be at least 0, got " + std::to_string(eps));
}

void rms_norm_out(const Tensor& x, const Tensor& weight, double eps, Tensor out) {
  note(rms_norm_out, x, weight, eps, out);
  const char* op = "rms_norm";
  const DType dtype = dtype_of(op, "x", x, Dtypes::kOrFloat64);
  const DType weight_dtype = weight_dtype_of(op, "weight", weight, x);
  check_inputs(op, x, weight, eps);
  check_out(op, "out", out, "x", x);
  if (x.numel() == 0) return;

  const Rows rows = as_rows(x);
  const Tensor w = last_dim_contiguous(weight);
  const RmsNormParams p{
      rows.tensor.data_ptr(), rows.stride, w.data_ptr(), out.data_ptr(), rows.rows,
      rows.columns,           eps,         dtype,        weight_dtype};
#ifdef GEMMA2_WITH_CUDA
  if (!x.is_cpu()) return run_on_cuda(x, launch_rms_norm, p);
#endif
  if (dtype == DType::kFloat64) return float64::rms_norm(p);
  const CpuKernels& kernels = cpu_kernels();
  parallel_units(p.rows, p.hidden_size * 4,
                 [&](int64_t begin, int64_t end) { kernels.rms_norm_rows(p, begin, end); });
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  Tensor out = torch::stable::new_empty(x, x.sizes());
  rms_norm_out(x, weight, eps, out);
  return out;
}

void rms_norm_backward_out(const Tensor& grad_out, const Tensor& x, const Tensor& weight,
                           double eps, Tensor grad_x, Tensor grad_weight) {
  const char* op = "rms_norm_backward";
  const DType dtype = dtype_of(op, "x", x, Dtypes::kOrFloat64);
  const DType weight_dtype = weight_dtype_of(op, "weight", weight, x);
  check_inputs(op, x, weight, eps);
  check_like(op, "grad_out", grad_out, "x", x);
  check_out(op, "grad_x", grad_x, "x", x);
  check_out(op, "grad_weight", grad_weight, "weight", weight);

  const Rows rows = as_rows(x), grad_rows = as_rows(grad_out);
  const Tensor w = last_dim_contiguous(weight);
  const int64_t blocks = norm_blocks(rows.rows);
  const Tensor partial = torch::stable::new_empty(x, {blocks * rows.columns}, ScalarType::Float);
  const RmsNormBackwardParams p{grad_rows.tensor.data_ptr(),
                                grad_rows.stride,
                                rows.tensor.data_ptr(),
                                rows.stride,
                                w.data_ptr(),
                                grad_x.data_ptr(),
                                grad_weight.data_ptr(),
                                static_cast<float*>(partial.data_ptr()),
                                rows.rows,
                                rows.columns,
                                eps,
                                dtype,
                                weight_dtype,
                                nullptr,
                                0};
#ifdef GEMMA2_WITH_CUDA
  if (!x.is_cpu()) return run_on_cuda(x, launch_rms_norm_backward, p);
#endif
  if (dtype == DType::kFloat64) return float64::rms_norm_backward(p);
  const CpuKernels& kernels = cpu_kernels();
  parallel_units(
      blocks, p.hidden_size * norm_block_rows(p.rows) * 8,
      [&](int64_t begin, int64_t end) { kernels.rms_norm_backward_blocks(p, begin, end); });
  parallel_units(
      (p.hidden_size + kNormColumns - 1) / kNormColumns, kNormColumns * blocks * 4,
      [&](int64_t begin, int64_t end) { kernels.rms_norm_backward_columns(p, begin, end); });
}

template <class Library>
void implement(Library& m) {
  m.impl("rms_norm", GEMMA2_BOX(&rms_norm));
  m.impl("rms_norm_out", GEMMA2_BOX(&rms_norm_out));
  m.impl("rms_norm_backward_out", GEMMA2_BOX(&rms_norm_backward_out));
}

}  // namespace
}  // namespace gemma2

GEMMA2_REGISTER(gemma2::implement)
