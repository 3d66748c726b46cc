// Sizes that the kernels of the losses over a linear layer and their bindings agree on. Constants
// only: nothing here is compiled with wide instructions.
#pragma once
#include <stdint.h>

#include "gemm.h"

namespace gemma2 {

// Words (rows of weight) in one unit.
constexpr int64_t kLossWords = kGemmRows;
// Tokens stand at a distance of a multiple of this many.
constexpr int64_t kLossTokenMultiple = 16;
// Tokens in one unit of linear_loss_merge; this many columns of a unit's logits fit into the
// first-level cache.
constexpr int64_t kLossTokens = 64;

// What a forward pass sums up over the words, per token. s is a soft-capped logit of the student, t
// one of the teacher, tau the temperature.
enum LossStat : int {
  kLossMax,            // max s
  kLossSum,            // sum exp((s - max) / tau)
  kLossHardSum,        // sum exp(s - max), where hard
  kLossLogits,         // sum s, where uniform
  kLossTeacherMax,     // max t
  kLossTeacherSum,     // sum exp((t - max) / tau)
  kLossTeacherLogits,  // sum exp((t - max) / tau) s
  kLossStats,
};

}  // namespace gemma2
