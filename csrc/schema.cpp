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
      "SymInt max_seqlen_q, SymInt max_seqlen_k, *, float scale, float? softcap=None, "
      "int? window=None, bool causal=True, bool return_lse=False) -> (Tensor, Tensor)");
  m.def(
      "attention_varlen_out(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, "
      "Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, *, float scale, "
      "float? softcap, int? window, bool causal, Tensor(a!) out, Tensor(b!)? lse) -> ()");
  m.def(
      "attention_cache(Tensor q, Tensor k_cache, Tensor v_cache, Tensor key_lengths, "
      "Tensor? k_scales=None, Tensor? v_scales=None, *, "
      "float scale, float? softcap=None, int? window=None) -> Tensor");
  m.def(
      "attention_cache_out(Tensor q, Tensor k_cache, Tensor v_cache, Tensor key_lengths, "
      "Tensor? k_scales, Tensor? v_scales, *, float scale, float? softcap, int? window, Tensor(a!) "
      "out) -> ()");
  m.def(
      "attention_append_cache(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, "
      "Tensor(b!) v_cache, Tensor key_lengths, Tensor(c!)? k_scales=None, "
      "Tensor(d!)? v_scales=None, *, float theta=10000.0, float scale, float? softcap=None, "
      "int? window=None) -> Tensor");
  m.def(
      "attention_append_cache_out(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, "
      "Tensor(b!) v_cache, Tensor key_lengths, Tensor(c!)? k_scales, Tensor(d!)? v_scales, *, "
      "float theta, float scale, float? softcap, int? window, Tensor(e!) rotated, "
      "Tensor(f!) out) -> ()");
  m.def(
      "attention_paged(Tensor q, Tensor k_pages, Tensor v_pages, Tensor block_table, "
      "Tensor key_lengths, *, float scale, float? softcap=None, int? window=None) -> Tensor");
  m.def(
      "attention_paged_out(Tensor q, Tensor k_pages, Tensor v_pages, Tensor block_table, "
      "Tensor key_lengths, *, float scale, float? softcap, int? window, Tensor(a!) out) -> ()");
  m.def("rms_norm(Tensor x, Tensor weight, float eps=1e-6) -> Tensor");
  m.def("rms_norm_out(Tensor x, Tensor weight, float eps, Tensor(a!) out) -> ()");
  m.def("linear(Tensor x, Tensor weight) -> Tensor");
  m.def("linear_out(Tensor x, Tensor weight, Tensor(a!) out) -> ()");
  m.def(
      "linear_backward_out(Tensor grad_out, Tensor x, Tensor weight, Tensor(a!)? grad_x, "
      "Tensor(b!)? grad_weight) -> ()");
  m.def("argmax_out(Tensor x, Tensor(a!) out) -> ()");
  m.def(
      "draw_out(Tensor logits, Tensor keys, float temperature, int top_k, float top_p, "
      "float min_p, Tensor(a!) out) -> ()");
  m.def(
      "advance_out(Tensor drawn, Tensor stops, int pad, Tensor(a!) tokens, Tensor(b!) running, "
      "Tensor(c!) key_lengths) -> ()");
  m.def("linear_geglu(Tensor x, Tensor weight) -> Tensor");
  m.def("linear_geglu_out(Tensor x, Tensor weight, Tensor(a!) out) -> ()");
  m.def("logits(Tensor hidden, Tensor weight, float? softcap=None) -> Tensor");
  m.def("logits_out(Tensor hidden, Tensor weight, float? softcap, Tensor(a!) out) -> ()");
  m.def("linear_int8(Tensor x, Tensor data, Tensor scales) -> Tensor");
  m.def("linear_int8_out(Tensor x, Tensor data, Tensor scales, Tensor(a!) out) -> ()");
  m.def("logits_int8(Tensor hidden, Tensor data, Tensor scales, float? softcap=None) -> Tensor");
  m.def(
      "logits_int8_out(Tensor hidden, Tensor data, Tensor scales, float? softcap, "
      "Tensor(a!) out) -> ()");
  m.def("quantize_int8_out(Tensor weight, Tensor(a!) data, Tensor(b!) scales) -> ()");
  m.def(
      "embedding_int8_out(Tensor ids, Tensor data, Tensor scales, float scale, Tensor(a!) out) "
      "-> ()");
  m.def("linear_int4(Tensor x, Tensor data, Tensor scales) -> Tensor");
  m.def("linear_int4_out(Tensor x, Tensor data, Tensor scales, Tensor(a!) out) -> ()");
  m.def("logits_int4(Tensor hidden, Tensor data, Tensor scales, float? softcap=None) -> Tensor");
  m.def(
      "logits_int4_out(Tensor hidden, Tensor data, Tensor scales, float? softcap, "
      "Tensor(a!) out) -> ()");
  m.def("quantize_int4_out(Tensor weight, Tensor(a!) data, Tensor(b!) scales) -> ()");
  m.def(
      "embedding_int4_out(Tensor ids, Tensor data, Tensor scales, float scale, Tensor(a!) out) "
      "-> ()");
  m.def(
      "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor target, *, float? softcap=None, "
      "int ignore_index=-100, str reduction='mean', float label_smoothing=0.0, float z_loss=0.0) "
      "-> Tensor");
  m.def(
      "linear_cross_entropy_out(Tensor hidden, Tensor weight, Tensor target, *, float? softcap, "
      "int ignore_index, str reduction, float label_smoothing, float z_loss, Tensor(a!) out) "
      "-> ()");
  // The result, and what the backward needs of the forward.
  m.def(
      "linear_cross_entropy_forward(Tensor hidden, Tensor weight, Tensor target, float? softcap, "
      "int ignore_index, str reduction, float label_smoothing, float z_loss) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "linear_cross_entropy_backward_out(Tensor grad, Tensor hidden, Tensor weight, "
      "Tensor target, Tensor stats, Tensor kept, float? softcap, int ignore_index, "
      "str reduction, float label_smoothing, float z_loss, Tensor(a!)? grad_hidden, "
      "Tensor(b!)? grad_weight) -> ()");
  m.def(
      "linear_distillation(Tensor hidden, Tensor weight, Tensor teacher_hidden, "
      "Tensor teacher_weight, Tensor? mask=None, Tensor? target=None, *, float? softcap=None, "
      "float? teacher_softcap=None, float temperature=1.0, float hard_weight=0.0, "
      "int ignore_index=-100, str reduction='mean') -> Tensor");
  m.def(
      "linear_distillation_out(Tensor hidden, Tensor weight, Tensor teacher_hidden, "
      "Tensor teacher_weight, Tensor? mask, Tensor? target, *, float? softcap, "
      "float? teacher_softcap, float temperature, float hard_weight, int ignore_index, "
      "str reduction, Tensor(a!) out) -> ()");
  m.def(
      "linear_distillation_forward(Tensor hidden, Tensor weight, Tensor teacher_hidden, "
      "Tensor teacher_weight, Tensor? mask, Tensor? target, float? softcap, "
      "float? teacher_softcap, float temperature, float hard_weight, int ignore_index, "
      "str reduction) -> (Tensor, Tensor, Tensor)");
  m.def(
      "linear_distillation_backward_out(Tensor grad, Tensor hidden, Tensor weight, "
      "Tensor teacher_hidden, Tensor teacher_weight, Tensor? mask, Tensor? target, Tensor stats, "
      "Tensor kept, float? softcap, float? teacher_softcap, float temperature, "
      "float hard_weight, int ignore_index, str reduction, Tensor(a!)? grad_hidden, "
      "Tensor(b!)? grad_weight) -> ()");
  m.def(
      "linear_distillation_topk(Tensor hidden, Tensor weight, Tensor teacher_indices, "
      "Tensor teacher_log_probs, Tensor? mask=None, Tensor? target=None, *, "
      "float? softcap=None, float temperature=1.0, bool renormalize=True, "
      "float hard_weight=0.0, int ignore_index=-100, str reduction='mean') -> Tensor");
  m.def(
      "linear_distillation_topk_out(Tensor hidden, Tensor weight, Tensor teacher_indices, "
      "Tensor teacher_log_probs, Tensor? mask, Tensor? target, *, float? softcap, "
      "float temperature, bool renormalize, float hard_weight, int ignore_index, "
      "str reduction, Tensor(a!) out) -> ()");
  m.def(
      "linear_distillation_topk_forward(Tensor hidden, Tensor weight, Tensor teacher_indices, "
      "Tensor teacher_log_probs, Tensor? mask, Tensor? target, float? softcap, "
      "float temperature, bool renormalize, float hard_weight, int ignore_index, "
      "str reduction) -> (Tensor, Tensor, Tensor)");
  m.def(
      "linear_distillation_topk_backward_out(Tensor grad, Tensor hidden, Tensor weight, "
      "Tensor teacher_indices, Tensor teacher_log_probs, Tensor? mask, Tensor? target, "
      "Tensor stats, Tensor kept, float? softcap, float temperature, bool renormalize, "
      "float hard_weight, int ignore_index, str reduction, Tensor(a!)? grad_hidden, "
      "Tensor(b!)? grad_weight) -> ()");
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
      "Tensor(b!) v_cache, float theta=10000.0, Tensor(c!)? k_scales=None, "
      "Tensor(d!)? v_scales=None) -> Tensor");
  m.def(
      "rope_append_cache_out(Tensor q, Tensor k, Tensor v, Tensor positions, Tensor(a!) k_cache, "
      "Tensor(b!) v_cache, float theta, Tensor(c!)? k_scales, Tensor(d!)? v_scales, "
      "Tensor(e!) q_out) -> ()");

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
      "Tensor out, Tensor lse, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, "
      "SymInt max_seqlen_k, float scale, float? softcap, int? window, bool causal) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "attention_varlen_backward_out(Tensor grad_out, Tensor grad_lse, Tensor q, Tensor k, "
      "Tensor v, Tensor out, Tensor lse, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
      "SymInt max_seqlen_q, SymInt max_seqlen_k, float scale, float? softcap, int? window, "
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
