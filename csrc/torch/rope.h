// What attention_append_cache shares with rope_append_cache.
#pragma once
#include <optional>

#include "common.h"

namespace gemma2 {

// 1 / theta ** (arange(0, head_dim, 2) / head_dim) on like's device, for as long as the process
// lives.
const float* inv_freq(int64_t head_dim, double theta, const Tensor& like);

// Tokens on their way into a cache; the scales are those of one of int8.
struct Append {
  const Tensor &q, &k, &v, &k_cache, &v_cache;
  double theta;
  const std::optional<Tensor>&k_scales, &v_scales;
};
void check_append(const char* op, const Append& tokens);

// The tokens of a row stand at the last seqlen positions below its key_lengths, (batch,) int64 on
// q's device; of them below 0 is padding. Checked before.
void append_tokens(const char* op, const Append& tokens, const int64_t* key_lengths, Tensor& q_out);

}  // namespace gemma2
