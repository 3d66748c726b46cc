// The CUDA kernels' entry points: launch_<op>(parameters, stream) starts the work on the current
// device and returns at once. A launch that CUDA refuses is a std::runtime_error.
#pragma once
#include "../params.h"

typedef struct CUstream_st* cudaStream_t;  // as in CUDA's own headers

namespace gemma2 {

#define GEMMA2_CUDA_KERNELS(X)                \
  X(rms_norm, RmsNormParams)                  \
  X(add_rms_norm, AddRmsNormParams)           \
  X(rms_norm_backward, RmsNormBackwardParams) \
  X(geglu_backward, GegluBackwardParams)      \
  X(geglu, GegluParams)                       \
  X(rope, RopeParams)                         \
  X(linear, LinearParams)                     \
  X(soft_cap, SoftCapParams)                  \
  X(linear_int8, LinearParams)                \
  X(linear_int4, LinearParams)                \
  X(dequantize_int8, DequantizeParams)        \
  X(dequantize_int4, DequantizeParams)        \
  X(embedding_int8, EmbeddingParams)          \
  X(embedding_int4, EmbeddingParams)          \
  X(argmax, ArgmaxParams)                     \
  X(draw, DrawParams)                         \
  X(advance, AdvanceParams)                   \
  X(linear_loss_sums, LossSumsParams)         \
  X(linear_loss_result, LossResultParams)     \
  X(linear_loss_gradient, LossGradientParams) \
  X(linear_loss_add, LossAddParams)           \
  X(widen_cache, WidenCacheParams)            \
  X(attention, AttentionParams)               \
  X(attention_backward, AttentionBackwardParams)

#define GEMMA2_DECLARE(op, Params) void launch_##op(const Params& p, cudaStream_t stream);
GEMMA2_CUDA_KERNELS(GEMMA2_DECLARE)
#undef GEMMA2_DECLARE

// Whether what this thread launches may start before the kernels in front of it have ended (from
// sm_90 on): then weights (of norms too), inv_freq, positions, key_lengths, key_starts, cu_seqlens,
// block tables, and keys and values before a row's last seqlen_q are read early, so no kernel that
// may still be running may write them. All else is read and written in the order of the launches.
inline thread_local bool early_launches = false;

// Floats that launch_attention wants at p.partial on the current device, 0 for none; of p's shapes
// alone, so it is the same for every call in a captured graph.
int64_t attention_partial_size(const AttentionParams& p);

// Whether launch_attention can take p.new_k and p.new_v: one query a row, up to 16 query heads for
// a key head, 16 bits, head_dim 64, 128 or 256.
bool attention_appends(const AttentionParams& p);

// Whether launch_attention takes p's cache of int8 as it is: up to 16 rows, whole vectors. Else it
// is to be widened first.
bool attention_reads_int8(const AttentionParams& p);

}  // namespace gemma2
