// Every op's schema, once. An op and its `_out` form compute the same; the public Python functions
// allocate and call
// `_out`, so that running out of memory is torch's own error, and the plain form serves
// torch.compile and autograd.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(gemma2_ext, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps=1e-6) -> Tensor");
  m.def("rms_norm_out(Tensor x, Tensor weight, float eps, Tensor(a!) out) -> ()");
  m.def("linear(Tensor x, Tensor weight) -> Tensor");
  m.def("linear_out(Tensor x, Tensor weight, Tensor(a!) out) -> ()");
  m.def("logits(Tensor hidden, Tensor weight, float? softcap=None) -> Tensor");
  m.def("logits_out(Tensor hidden, Tensor weight, float? softcap, Tensor(a!) out) -> ()");
}
