// Every op's schema, once. An op and its `_out` form compute the same; the public Python functions
// allocate and call
// `_out`, so that running out of memory is torch's own error, and the plain form serves
// torch.compile and autograd.
//
// An op's backward, `<op>_backward`, has these two forms too; the plain one is written in Python,
// allocates there and calls the other.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(gemma2_ext, m) {
  // Tensors stand before the `*`: autograd can be registered for no others.
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor? key_lengths=None, Tensor? key_starts=None, "
      "*, "
      "float scale, float? softcap=None, int? window=None, bool causal=True, "
      "bool return_lse=False) -> (Tensor, Tensor)");
  m.def(
      "attention_out(Tensor q, Tensor k, Tensor v, Tensor? key_lengths, Tensor? key_starts, *, "
      "float scale, float? softcap, int? window, bool causal, Tensor(a!) out, Tensor(b!)? lse) "
      "-> ()");
  m.def(
      "attention_varlen(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
      "int max_seqlen_q, int max_seqlen_k, *, float scale, float? softcap=None, int? window=None, "
      "bool causal=True, bool return_lse=False) -> (Tensor, Tensor)");
  m.def(
      "attention_varlen_out(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, "
      "Tensor cu_seqlens_k, int max_seqlen_q, int max_seqlen_k, *, float scale, float? softcap, "
      "int? window, bool causal, Tensor(a!) out, Tensor(b!)? lse) -> ()");
  m.def(
      "attention_cache(Tensor q, Tensor k_cache, Tensor v_cache, Tensor key_lengths, *, "
      "float scale, float? softcap=None, int? window=None) -> Tensor");
  m.def(
      "attention_cache_out(Tensor q, Tensor k_cache, Tensor v_cache, Tensor key_lengths, *, "
      "float scale, float? softcap, int? window, Tensor(a!) out) -> ()");
  m.def("rms_norm(Tensor x, Tensor weight, float eps=1e-6) -> Tensor");
  m.def("rms_norm_out(Tensor x, Tensor weight, float eps, Tensor(a!) out) -> ()");
  m.def("linear(Tensor x, Tensor weight) -> Tensor");
  m.def("linear_out(Tensor x, Tensor weight, Tensor(a!) out) -> ()");
  m.def("logits(Tensor hidden, Tensor weight, float? softcap=None) -> Tensor");
  m.def("logits_out(Tensor hidden, Tensor weight, float? softcap, Tensor(a!) out) -> ()");
  m.def(
      "add_rms_norm(Tensor x, Tensor residual, Tensor post_weight, Tensor pre_weight, "
      "float eps=1e-6) -> (Tensor, Tensor)");
  m.def(
      "add_rms_norm_out(Tensor x, Tensor residual, Tensor post_weight, Tensor pre_weight, "
      "float eps, Tensor(a!) residual_out, Tensor(b!) out) -> ()");
  m.def("geglu(Tensor gate, Tensor up) -> Tensor");
  m.def("geglu_out(Tensor gate, Tensor up, Tensor(a!) out) -> ()");
  m.def("rope(Tensor q, Tensor k, Tensor positions, float theta=10000.0) -> (Tensor, Tensor)");
  m.def(
      "rope_out(Tensor q, Tensor k, Tensor positions, float theta, Tensor(a!) q_out, "
      "Tensor(b!) k_out) -> ()");
  m.def(
      "rope_append_cache(Tensor q, Tensor k, Tensor v, Tensor positions, Tensor(a!) k_cache, "
      "Tensor(b!) v_cache, float theta=10000.0) -> Tensor");
  m.def(
      "rope_append_cache_out(Tensor q, Tensor k, Tensor v, Tensor positions, Tensor(a!) k_cache, "
      "Tensor(b!) v_cache, float theta, Tensor(c!) q_out) -> ()");

  m.def(
      "rms_norm_backward(Tensor grad_out, Tensor x, Tensor weight, float eps) "
      "-> (Tensor, Tensor)");
  m.def(
      "rms_norm_backward_out(Tensor grad_out, Tensor x, Tensor weight, float eps, "
      "Tensor(a!) grad_x, Tensor(b!) grad_weight) -> ()");
  m.def(
      "add_rms_norm_backward(Tensor grad_residual_out, Tensor grad_out, Tensor x, "
      "Tensor residual_out, Tensor post_weight, Tensor pre_weight, float eps) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "add_rms_norm_backward_out(Tensor grad_residual_out, Tensor grad_out, Tensor x, "
      "Tensor residual_out, Tensor post_weight, Tensor pre_weight, float eps, "
      "Tensor(a!) grad_x, Tensor(b!) grad_residual, Tensor(c!) grad_post_weight, "
      "Tensor(d!) grad_pre_weight) -> ()");
  m.def(
      "attention_backward(Tensor grad_out, Tensor grad_lse, Tensor q, Tensor k, Tensor v, "
      "Tensor out, Tensor lse, Tensor? key_lengths, Tensor? key_starts, float scale, "
      "float? softcap, int? window, bool causal) -> (Tensor, Tensor, Tensor)");
  m.def(
      "attention_backward_out(Tensor grad_out, Tensor grad_lse, Tensor q, Tensor k, Tensor v, "
      "Tensor out, Tensor lse, Tensor? key_lengths, Tensor? key_starts, float scale, "
      "float? softcap, int? window, bool causal, Tensor(a!) grad_q, Tensor(b!) grad_k, "
      "Tensor(c!) grad_v) -> ()");
  m.def(
      "attention_varlen_backward(Tensor grad_out, Tensor grad_lse, Tensor q, Tensor k, Tensor v, "
      "Tensor out, Tensor lse, Tensor cu_seqlens_q, Tensor cu_seqlens_k, int max_seqlen_q, "
      "int max_seqlen_k, float scale, float? softcap, int? window, bool causal) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "attention_varlen_backward_out(Tensor grad_out, Tensor grad_lse, Tensor q, Tensor k, "
      "Tensor v, Tensor out, Tensor lse, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
      "int max_seqlen_q, int max_seqlen_k, float scale, float? softcap, int? window, "
      "bool causal, Tensor(a!) grad_q, Tensor(b!) grad_k, Tensor(c!) grad_v) -> ()");
  m.def("geglu_backward(Tensor grad_out, Tensor gate, Tensor up) -> (Tensor, Tensor)");
  m.def(
      "geglu_backward_out(Tensor grad_out, Tensor gate, Tensor up, Tensor(a!) grad_gate, "
      "Tensor(b!) grad_up) -> ()");
  m.def(
      "rope_backward(Tensor grad_q_out, Tensor grad_k_out, Tensor positions, float theta) "
      "-> (Tensor, Tensor)");
  m.def(
      "rope_backward_out(Tensor grad_q_out, Tensor grad_k_out, Tensor positions, float theta, "
      "Tensor(a!) grad_q, Tensor(b!) grad_k) -> ()");
}
