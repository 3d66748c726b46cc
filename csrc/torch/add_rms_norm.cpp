// Binding of add_rms_norm.
#include <tuple>

#include "../cpu/isa.h"
#include "cuda.h"

namespace gemma2 {
namespace {

void check_weight(const char* op, const char* name, const Tensor& weight, const Tensor& x) {
  const int64_t hidden_size = x.size(x.dim() - 1);
  check_device(op, name, weight, "x", x);
  if (weight.dim() != 1 || weight.size(0) != hidden_size) {
    fail(op, std::string(name) + " must have shape (hidden_size,) = (" +
                 std::to_string(hidden_size) + ",), got " + to_string(weight));
  }
}

void add_rms_norm_out(const Tensor& x, const Tensor& residual, const Tensor& post_weight,
                      const Tensor& pre_weight, double eps, Tensor residual_out, Tensor out) {
  const char* op = "add_rms_norm";
  const DType dtype = dtype_of(op, "x", x);
  const DType weight_dtype = dtype_of(op, "post_weight", post_weight);
  if (x.dim() < 1) fail(op, "x must have shape (..., hidden_size), got a scalar");
  check_device(op, "residual", residual, "x", x);
  check_same_shape(op, "residual", residual, "x", x);
  check_same_dtype(op, "residual", residual, "x", x);
  const int64_t hidden_size = x.size(x.dim() - 1);
  check_weight(op, "post_weight", post_weight, x);
  check_weight(op, "pre_weight", pre_weight, x);
  check_same_dtype(op, "pre_weight", pre_weight, "post_weight", post_weight);
  if (!(eps >= 0)) fail(op, "eps must be at least 0, got " + std::to_string(eps));
  check_out(op, "residual_out", residual_out, "x", x);
  check_out(op, "out", out, "x", x);
  if (x.numel() == 0) return;

  const Rows x_rows = as_rows(x), residual_rows = as_rows(residual);
  const Tensor post = last_dim_contiguous(post_weight), pre = last_dim_contiguous(pre_weight);
  const AddRmsNormParams p{x_rows.tensor.data_ptr(),
                           x_rows.stride,
                           residual_rows.tensor.data_ptr(),
                           residual_rows.stride,
                           post.data_ptr(),
                           pre.data_ptr(),
                           residual_out.data_ptr(),
                           out.data_ptr(),
                           x_rows.rows,
                           hidden_size,
                           float(eps),
                           dtype,
                           weight_dtype};
#ifdef GEMMA2_WITH_CUDA
  if (!x.is_cpu()) return run_on_cuda(x, launch_add_rms_norm, p);
#endif
  const CpuKernels& kernels = cpu_kernels();
  parallel_units(p.rows, p.hidden_size * 8,
                 [&](int64_t begin, int64_t end) { kernels.add_rms_norm_rows(p, begin, end); });
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual,
                                        const Tensor& post_weight, const Tensor& pre_weight,
                                        double eps) {
  Tensor residual_out = torch::stable::new_empty(x, x.sizes());
  Tensor out = torch::stable::new_empty(x, x.sizes());
  add_rms_norm_out(x, residual, post_weight, pre_weight, eps, residual_out, out);
  return {residual_out, out};
}

template <class Library>
void implement(Library& m) {
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
  m.impl("add_rms_norm_out", TORCH_BOX(&add_rms_norm_out));
}

}  // namespace
}  // namespace gemma2

GEMMA2_REGISTER(gemma2::implement)
