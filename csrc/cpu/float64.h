// The differentiable ops in float64, forward and backward: for checks of gradients. Plain loops on
// one thread, the same on every machine; each function is the whole op.
#pragma once
#include "../params.h"

namespace gemma2 {
namespace float64 {

void rms_norm(const RmsNormParams& p);
void rms_norm_backward(const RmsNormBackwardParams& p);
void add_rms_norm(const AddRmsNormParams& p);
void add_rms_norm_backward(const AddRmsNormBackwardParams& p);
void geglu(const GegluParams& p);
void geglu_backward(const GegluBackwardParams& p);
void rope(const RopeParams& p);
void attention(const AttentionParams& p);
void attention_backward(const AttentionBackwardParams& p);

}  // namespace float64
}  // namespace gemma2
