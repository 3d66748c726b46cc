// Binding of add_rms_norm_linear: one kernel for a captured decoding step's row on a GPU, the two
// ops it consists of elsewhere.
#include <tuple>

#include "cuda.h"
#include "parts.h"

namespace gemma2 {
namespace {

#ifdef GEMMA2_WITH_CUDA
// Whether the kernel can serve, and did. What does not fit is left to the two ops, whose errors say
// why.
bool launch_as_one(const Tensor& x, const Tensor& residual, const Tensor& post_weight,
                   const Tensor& pre_weight, const Tensor& weight, double eps, bool geglu,
                   const Tensor& residual_out, const Tensor& out) {
  if (x.is_cpu() || x.dim() < 1 || weight.dim() != 2) return false;
  const int64_t size = x.size(x.dim() - 1), rows = weight.size(0);
  const int64_t out_features = geglu ? rows / 2 : rows;
  if (size == 0 || rows == 0 || x.numel() != size || weight.size(1) != size ||
      weight.stride(1) != 1 || (geglu && rows % 2) || !(eps >= 0)) {
    return false;
  }
  const auto like_x = [&](const Tensor& t, int64_t numel) {
    return t.scalar_type() == x.scalar_type() && t.device() == x.device() && t.numel() == numel &&
           t.is_contiguous();
  };
  const auto same_shape = [&](const Tensor& t, int64_t last) {
    if (t.dim() != x.dim() || !like_x(t, last)) return false;
    return t.size(t.dim() - 1) == last;
  };
  const auto is_vector = [&](const Tensor& t) { return t.dim() == 1 && like_x(t, size); };
  if (!same_shape(x, size) || !same_shape(residual, size) || !same_shape(residual_out, size) ||
      !same_shape(out, out_features) || !is_vector(post_weight) || !is_vector(pre_weight) ||
      weight.scalar_type() != x.scalar_type() || weight.device() != x.device()) {
    return false;
  }
  AddRmsNormLinearParams p{};
  p.norm.x = x.data_ptr();
  p.norm.residual = residual.data_ptr();
  p.norm.x_stride = p.norm.residual_stride = size;
  p.norm.post_weight = post_weight.data_ptr();
  p.norm.pre_weight = pre_weight.data_ptr();
  p.norm.residual_out = residual_out.data_ptr();
  p.norm.rows = 1;
  p.norm.hidden_size = size;
  p.norm.eps = eps;
  p.norm.dtype = p.norm.weight_dtype = dtype_of("add_rms_norm_linear", "x", x, Dtypes::kOrFloat64);
  p.linear.weight = weight.data_ptr();
  p.linear.weight_stride = weight.stride(0);
  p.linear.out = out.data_ptr();
  p.linear.out_stride = out_features;
  p.linear.rows = 1;
  p.linear.in_features = size;
  p.linear.out_features = out_features;
  p.linear.dtype = p.linear.out_dtype = p.norm.dtype;
  p.linear.geglu = geglu;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  if (!add_rms_norm_linear_fits(p)) return false;
  run_on_cuda(x, launch_add_rms_norm_linear, p);
  return true;
}
#endif

void add_rms_norm_linear_out(const Tensor& x, const Tensor& residual, const Tensor& post_weight,
                             const Tensor& pre_weight, const Tensor& weight, double eps, bool geglu,
                             Tensor residual_out, Tensor out) {
#ifdef GEMMA2_WITH_CUDA
  if (launch_as_one(x, residual, post_weight, pre_weight, weight, eps, geglu, residual_out, out))
    return;
#endif
  const Tensor hidden = torch::stable::new_empty(x, x.sizes());
  add_rms_norm_out(x, residual, post_weight, pre_weight, eps, residual_out, hidden);
  if (geglu) {
    linear_geglu_out(hidden, weight, out);
  } else {
    linear_out(hidden, weight, out);
  }
}

std::tuple<Tensor, Tensor> add_rms_norm_linear(const Tensor& x, const Tensor& residual,
                                               const Tensor& post_weight, const Tensor& pre_weight,
                                               const Tensor& weight, double eps, bool geglu) {
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  if (!shape.empty() && weight.dim() > 0) shape.back() = weight.size(0) / (geglu ? 2 : 1);
  Tensor residual_out = torch::stable::new_empty(x, x.sizes());
  Tensor out = torch::stable::new_empty(x, {shape.data(), shape.size()});
  add_rms_norm_linear_out(x, residual, post_weight, pre_weight, weight, eps, geglu, residual_out,
                          out);
  return {residual_out, out};
}

template <class Library>
void implement(Library& m) {
  m.impl("add_rms_norm_linear", TORCH_BOX(&add_rms_norm_linear));
  m.impl("add_rms_norm_linear_out", TORCH_BOX(&add_rms_norm_linear_out));
}

}  // namespace
}  // namespace gemma2

GEMMA2_REGISTER(gemma2::implement)
