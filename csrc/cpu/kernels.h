// The CPU kernels' entry points: one table per instruction set, all with the same members.
//
// A kernel handles units [begin, end) of its op; what a unit is stands in the kernel's file. Units
// are independent and each is computed the same way however they are shared out, so results do not
// depend on the number of threads.
#pragma once
#include <cstdint>

#include "../params.h"
#include "attention.h"

namespace gemma2 {

#define GEMMA2_CPU_KERNELS(X)                                \
  X(attention_units, AttentionWork)                          \
  X(attention_combine, AttentionWork)                        \
  X(rms_norm_rows, RmsNormParams)                            \
  X(linear_pack_rows, LinearParams)                          \
  X(linear_few_rows, LinearParams)                           \
  X(linear_pack_panels, LinearParams)                        \
  X(linear_many_rows, LinearParams)                          \
  X(add_rms_norm_rows, AddRmsNormParams)                     \
  X(geglu_runs, GegluParams)                                 \
  X(rope_tokens, RopeParams)                                 \
  X(rms_norm_backward_blocks, RmsNormBackwardParams)         \
  X(rms_norm_backward_columns, RmsNormBackwardParams)        \
  X(add_rms_norm_backward_blocks, AddRmsNormBackwardParams)  \
  X(add_rms_norm_backward_columns, AddRmsNormBackwardParams) \
  X(geglu_backward_runs, GegluBackwardParams)                \
  X(gemm_pack_panels, GemmParams)                            \
  X(gemm_rows, GemmParams)                                   \
  X(gemm_round_rows, GemmParams)                             \
  X(linear_loss_words, LinearLossParams)                     \
  X(linear_loss_merge, LinearLossParams)                     \
  X(linear_loss_gradient, LinearLossParams)                  \
  X(linear_int8_pack, LinearParams)                          \
  X(linear_int8_units, LinearParams)                         \
  X(linear_int4_pack, LinearParams)                          \
  X(linear_int4_units, LinearParams)                         \
  X(quantize_int8_blocks, QuantizeParams)                    \
  X(quantize_int4_blocks, QuantizeParams)                    \
  X(embed_int8_rows, EmbeddingParams)                        \
  X(embed_int4_rows, EmbeddingParams)                        \
  X(argmax_runs, ArgmaxParams)                               \
  X(draw_sums, DrawWork)                                     \
  X(draw_races, DrawWork)                                    \
  X(draw_finds, DrawWork)                                    \
  X(probe_memory, ProbeParams)                               \
  X(probe_multiply, ProbeParams)                             \
  X(attention_backward_rows, AttentionBackwardWork)          \
  X(attention_backward_keys, AttentionBackwardWork)

struct CpuKernels {
#define GEMMA2_MEMBER(name, Params) void (*name)(const Params&, int64_t begin, int64_t end);
  GEMMA2_CPU_KERNELS(GEMMA2_MEMBER)
#undef GEMMA2_MEMBER
};

#define GEMMA2_DECLARE(name, Params) void name(const Params& p, int64_t begin, int64_t end);
#define GEMMA2_DECLARE_ISA(isa)      \
  namespace isa {                    \
  GEMMA2_CPU_KERNELS(GEMMA2_DECLARE) \
  extern const CpuKernels kKernels;  \
  }
GEMMA2_DECLARE_ISA(scalar)
GEMMA2_DECLARE_ISA(neon_bf16)
GEMMA2_DECLARE_ISA(avx2)
GEMMA2_DECLARE_ISA(avx512)
GEMMA2_DECLARE_ISA(avx512_bf16)
// Some of them, and no table:
GEMMA2_DECLARE_ISA(neon_dot)
GEMMA2_DECLARE_ISA(avx2_vnni)
GEMMA2_DECLARE_ISA(avx512_vnni)
GEMMA2_DECLARE_ISA(avx512_amx)
#undef GEMMA2_DECLARE_ISA
#undef GEMMA2_DECLARE

}  // namespace gemma2
