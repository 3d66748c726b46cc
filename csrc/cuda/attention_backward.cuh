// What the kernels of attention's backward share: where rows are, and which rows see a key.
#pragma once
#include "attention.cuh"

namespace gemma2 {
namespace cuda {

template <class T>
GEMMA2_DEVICE const T* row_of(const HeadsView& view, const Unit<T>& u, int r) {
  return static_cast<const T*>(view.data) + u.batch * view.batch_stride +
         (u.q_offset + u.query(r)) * view.seqlen_stride + u.head(r) * view.head_stride;
}

// Where lse, grad_lse and the terms have row r.
template <class T>
GEMMA2_DEVICE int64_t row_index(const AttentionParams& p, const Unit<T>& u, int r) {
  return u.batch * p.lse_batch_stride + u.head(r) * p.lse_head_stride + u.q_offset + u.query(r);
}

// What the softmax of a row needs: its keys, log2 of its denominator, and its term.
struct RowState {
  RowKeys seen;
  float log2_sum, term;
};

template <class T>
GEMMA2_DEVICE RowState row_state(const AttentionBackwardParams& b, const Unit<T>& u, int r) {
  const int64_t at = row_index(b.forward, u, r);
  return {u.row_keys(b.forward, r), b.forward.lse[at] * kLog2E, b.row_terms[at]};
}

// The rows [begin, end) that see some of the unit's keys from `first` to `last`; the unit has all
// rows of its group.
template <class T>
GEMMA2_DEVICE void rows_of_keys(const AttentionParams& p, const Unit<T>& u, int first, int last,
                                int& begin, int& end) {
  const int64_t shift = u.length - u.seqlen_q, queries = u.rows / u.group;
  int64_t from = 0, to = queries;  // query i sees keys up to shift + i, with a window from there
  if (p.causal) from = clamp(u.key_begin + first - shift, 0, queries);
  if (p.window) to = clamp(u.key_begin + last - shift + p.window - 1, from, queries);
  begin = int(from) * u.group, end = int(to < from ? from : to) * u.group;
}

// As units of all rows of a group: for blocks of keys.
inline AttentionPlan plan_backward(const AttentionParams& p, int64_t block_rows) {
  const int64_t group_rows = p.num_heads / p.num_kv_heads * p.seqlen_q;
  AttentionPlan plan{};
  plan.k_stride = int(p.k.seqlen_stride), plan.v_stride = int(p.v.seqlen_stride);
  plan.capacity = INT_MAX;
  plan.splits = 1;
  plan.block_rows = block_rows == 0 ? group_rows : block_rows;
  plan.row_blocks = block_rows == 0 ? 1 : (group_rows + block_rows - 1) / block_rows;
  return plan;
}

}  // namespace cuda
}  // namespace gemma2
