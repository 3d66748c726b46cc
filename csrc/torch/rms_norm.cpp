// Binding of rms_norm.
#include "../cpu/isa.h"
#include "cuda.h"

namespace gemma2 {
namespace {

void rms_norm_out(const Tensor& x, const Tensor& weight, double eps, Tensor out) {
  const char* op = "rms_norm";
  const DType dtype = dtype_of(op, "x", x), weight_dtype = dtype_of(op, "weight", weight);
  if (x.dim() < 1) fail(op, "x must have shape (..., hidden_size), got a scalar");
  const int64_t hidden_size = x.size(x.dim() - 1);
  if (weight.dim() != 1 || weight.size(0) != hidden_size) {
    fail(op, "weight must have shape (hidden_size,) = (" + std::to_string(hidden_size) +
                 ",), got " + to_string(weight));
  }
  if (!(eps >= 0)) fail(op, "eps must be at least 0, got " + std::to_string(eps));
  check_device(op, "weight", weight, "x", x);
  check_out(op, "out", out, "x", x);
  if (x.numel() == 0) return;

  const Rows rows = as_rows(x);
  const Tensor w = last_dim_contiguous(weight);
  const RmsNormParams p{rows.tensor.data_ptr(),
                        rows.stride,
                        w.data_ptr(),
                        out.data_ptr(),
                        rows.rows,
                        hidden_size,
                        float(eps),
                        dtype,
                        weight_dtype};
#ifdef GEMMA2_WITH_CUDA
  if (!x.is_cpu()) return run_on_cuda(x, launch_rms_norm, p);
#endif
  const CpuKernels& kernels = cpu_kernels();
  parallel_units(p.rows, p.hidden_size * 4,
                 [&](int64_t begin, int64_t end) { kernels.rms_norm_rows(p, begin, end); });
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  Tensor out = torch::stable::new_empty(x, x.sizes());
  rms_norm_out(x, weight, eps, out);
  return out;
}

template <class Library>
void implement(Library& m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rms_norm_out", TORCH_BOX(&rms_norm_out));
}

}  // namespace
}  // namespace gemma2

GEMMA2_REGISTER(gemma2::implement)
