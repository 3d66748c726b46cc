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

// The first row in [0, rows) for which above(its keys) holds, as it does for all later ones.
template <class T, class F>
GEMMA2_DEVICE int first_row(const AttentionParams& p, const Unit<T>& u, const F& above) {
  int low = 0, high = u.rows;
  while (low < high) {
    const int middle = low + (high - low) / 2;
    if (above(u.row_keys(p, middle))) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
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
