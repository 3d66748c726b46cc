// Bindings of add_rms_norm and its backward.
#include <tuple>

#include "../cpu/float64.h"
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

// What the forward and the backward both check; `residual` is the sum in the backward.
void check_inputs(const char* op, const Tensor& x, const char* residual_name,
                  const Tensor& residual, const Tensor& post_weight, const Tensor& pre_weight,
                  double eps) {
  if (x.dim() < 1) fail(op, "x must have shape (..., hidden_size), got a scalar");
  check_like(op, residual_name, residual, "x", x);
  check_weight(op, "post_weight", post_weight, x);
  check_weight(op, "pre_weight", pre_weight, x);
  check_same_dtype(op, "pre_weight", pre_weight, "post_weight", post_weight);
  if (!(eps >= 0)) fail(op, "eps must be at least 0, got " + std::to_string(eps));
}

void add_rms_norm_out(const Tensor& x, const Tensor& residual, const Tensor& post_weight,
                      const Tensor& pre_weight, double eps, Tensor residual_out, Tensor out) {
  note(add_rms_norm_out, x, residual, post_weight, pre_weight, eps, residual_out, out);
  const char* op = "add_rms_norm";
  const DType dtype = dtype_of(op, "x", x, Dtypes::kOrFloat64);
  const DType weight_dtype = weight_dtype_of(op, "post_weight", post_weight, x);
  check_inputs(op, x, "residual", residual, post_weight, pre_weight, eps);
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
                           x_rows.columns,
                           eps,
                           dtype,
                           weight_dtype};
#ifdef GEMMA2_WITH_CUDA
  if (!x.is_cpu()) return run_on_cuda(x, launch_add_rms_norm, p);
#endif
  if (dtype == DType::kFloat64) return float64::add_rms_norm(p);
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

#ifdef GEMMA2_WITH_CUDA
// The backward of one norm after the other; grad_residual comes into the second one rounded.
void backward_on_cuda(const Tensor& like, const AddRmsNormBackwardParams& p) {
  RmsNormBackwardParams pre{};
  pre.grad_out = p.grad_out;
  pre.grad_out_stride = p.grad_out_stride;
  pre.x = p.residual_out;
  pre.x_stride = p.residual_out_stride;
  pre.weight = p.pre_weight;
  pre.grad_x = p.grad_residual;
  pre.grad_weight = p.grad_pre_weight;
  pre.partial = p.partial;
  pre.rows = p.rows;
  pre.hidden_size = p.hidden_size;
  pre.eps = p.eps;
  pre.dtype = p.dtype;
  pre.weight_dtype = p.weight_dtype;
  pre.added = p.grad_residual_out;
  pre.added_stride = p.grad_residual_out_stride;
  run_on_cuda(like, launch_rms_norm_backward, pre);
  RmsNormBackwardParams post = pre;
  post.grad_out = p.grad_residual;
  post.grad_out_stride = p.hidden_size;
  post.x = p.x;
  post.x_stride = p.x_stride;
  post.weight = p.post_weight;
  post.grad_x = p.grad_x;
  post.grad_weight = p.grad_post_weight;
  post.added = nullptr;
  run_on_cuda(like, launch_rms_norm_backward, post);
}
#endif

void add_rms_norm_backward_out(const Tensor& grad_residual_out, const Tensor& grad_out,
                               const Tensor& x, const Tensor& residual_out,
                               const Tensor& post_weight, const Tensor& pre_weight, double eps,
                               Tensor grad_x, Tensor grad_residual, Tensor grad_post_weight,
                               Tensor grad_pre_weight) {
  const char* op = "add_rms_norm_backward";
  const DType dtype = dtype_of(op, "x", x, Dtypes::kOrFloat64);
  const DType weight_dtype = weight_dtype_of(op, "post_weight", post_weight, x);
  check_inputs(op, x, "residual_out", residual_out, post_weight, pre_weight, eps);
  check_like(op, "grad_residual_out", grad_residual_out, "x", x);
  check_like(op, "grad_out", grad_out, "x", x);
  check_out(op, "grad_x", grad_x, "x", x);
  check_out(op, "grad_residual", grad_residual, "x", x);
  check_out(op, "grad_post_weight", grad_post_weight, "post_weight", post_weight);
  check_out(op, "grad_pre_weight", grad_pre_weight, "pre_weight", pre_weight);

  const Rows residual_grads = as_rows(grad_residual_out), grads = as_rows(grad_out),
             x_rows = as_rows(x), sums = as_rows(residual_out);
  const Tensor post = last_dim_contiguous(post_weight), pre = last_dim_contiguous(pre_weight);
  const int64_t blocks = norm_blocks(x_rows.rows);
  const int64_t partial_size = blocks * 2 * x_rows.columns;
  const int64_t of_thread = x.is_cpu() ? kNormGroup * x_rows.columns : 0;
  const Tensor partial = torch::stable::new_empty(
      x, {partial_size + sharing_threads(blocks) * of_thread}, ScalarType::Float);
  float* const first = static_cast<float*>(partial.data_ptr());
  const AddRmsNormBackwardParams p{residual_grads.tensor.data_ptr(),
                                   residual_grads.stride,
                                   grads.tensor.data_ptr(),
                                   grads.stride,
                                   x_rows.tensor.data_ptr(),
                                   x_rows.stride,
                                   sums.tensor.data_ptr(),
                                   sums.stride,
                                   post.data_ptr(),
                                   pre.data_ptr(),
                                   grad_x.data_ptr(),
                                   grad_residual.data_ptr(),
                                   grad_post_weight.data_ptr(),
                                   grad_pre_weight.data_ptr(),
                                   first,
                                   first + partial_size,
                                   x_rows.rows,
                                   x_rows.columns,
                                   eps,
                                   dtype,
                                   weight_dtype};
#ifdef GEMMA2_WITH_CUDA
  if (!x.is_cpu()) return backward_on_cuda(x, p);
#endif
  if (dtype == DType::kFloat64) return float64::add_rms_norm_backward(p);
  const CpuKernels& kernels = cpu_kernels();
  parallel_units_of_threads(blocks, p.hidden_size * norm_block_rows(p.rows) * 16,
                            [&](int64_t thread, int64_t begin, int64_t end) {
                              AddRmsNormBackwardParams mine = p;
                              mine.scratch = p.scratch + thread * of_thread;
                              kernels.add_rms_norm_backward_blocks(mine, begin, end);
                            });
  parallel_units(
      (p.hidden_size + kNormColumns - 1) / kNormColumns, kNormColumns * blocks * 8,
      [&](int64_t begin, int64_t end) { kernels.add_rms_norm_backward_columns(p, begin, end); });
}

template <class Library>
void implement(Library& m) {
  m.impl("add_rms_norm", GEMMA2_BOX(&add_rms_norm));
  m.impl("add_rms_norm_out", GEMMA2_BOX(&add_rms_norm_out));
  m.impl("add_rms_norm_backward_out", GEMMA2_BOX(&add_rms_norm_backward_out));
}

}  // namespace
}  // namespace gemma2

GEMMA2_REGISTER(gemma2::implement)
