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

}  // namespace gemma2
