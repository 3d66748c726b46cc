// A unit of attention's work: which rows and keys it has, and where its result goes.
#pragma once
#include "attention-inl.h"

namespace gemma2 {
namespace GEMMA2_ISA {
namespace {

// One unit's share of the problem.
struct Unit : Sequence {
  int64_t split;
  int64_t row_begin, rows;     // rows of the group, position * group + head
  int64_t key_begin, key_end;  // keys that some row sees, of this split
  const void *k, *v;           // of the sequence and (first) key head

  GEMMA2_INLINE int64_t query(int64_t r) const { return Sequence::query(row_begin + r); }
  GEMMA2_INLINE int64_t head(int64_t r) const { return Sequence::head(row_begin + r); }
};

// The same for one of a unit's key heads. (Not k and v.)
GEMMA2_INLINE Unit head_of(Unit u, int64_t h) {
  u.kv_head += h;
  return u;
}

// Returns false where the unit has no rows, as the blocks past the end of a short sequence.
template <class K>
bool make_unit(const AttentionWork& w, int64_t index, Unit& u) {
  const AttentionParams& p = w.p;
  u.split = index % w.splits, index /= w.splits;
  const int64_t head_units = p.num_kv_heads / w.unit_heads;
  const int64_t kv_head = index % head_units * w.unit_heads;
  index /= head_units;
  (Sequence&)u = make_sequence(p, index % p.batch, kv_head);
  const int64_t block = w.row_blocks - 1 - index / p.batch;  // those that see most keys come first
  u.row_begin = block * w.block_rows;
  u.rows = min64(w.block_rows, u.seqlen_q * u.group - u.row_begin);
  if (u.rows <= 0) return false;

  const int64_t batch = p.block_table ? 0 : u.batch;  // all sequences' pages lie together
  u.k = (const K*)p.k.data + batch * p.k.batch_stride + u.k_offset * p.k.seqlen_stride +
        u.kv_head * p.k.head_stride;
  u.v = (const K*)p.v.data + batch * p.v.batch_stride + u.k_offset * p.v.seqlen_stride +
        u.kv_head * p.v.head_stride;
  u.key_begin = first_key(p, u, u.query(0));
  u.key_end = end_key(p, u, u.query(u.rows - 1));
  if (w.splits > 1) {
    const int64_t begin = (u.key_begin / w.split_keys + u.split) * w.split_keys;
    u.key_begin = min64(u.key_end, max64(u.key_begin, begin));
    u.key_end = max64(u.key_begin, min64(u.key_end, begin + w.split_keys));
  }
  return true;
}

// Rows from `key` on of a view whose rows for the unit's sequence and head begin at `base`.
template <class K>
GEMMA2_INLINE KeyRows<K> key_rows(const AttentionParams& p, const Sequence& u, const void* base,
                                  const HeadsView& view, int64_t key) {
  const auto* rows = (const K*)base;
  if (p.block_table) {
    return {rows,
            view.seqlen_stride,
            key,
            u.length,
            p.block_table + u.batch * p.block_table_stride,
            view.batch_stride,
            p.page_shift};
  }
  if (!p.capacity) return {rows, view.seqlen_stride, key, INT64_MAX};
  return {rows, view.seqlen_stride, key % p.capacity, p.capacity};
}

// The factors of n int8 rows from `key` on.
GEMMA2_INLINE void load_factors(const AttentionParams& p, const Unit& u, const HeadsView& scales,
                                int64_t key, int64_t n, float* to) {
  const float* base =
      (const float*)scales.data + u.batch * scales.batch_stride + u.kv_head * scales.head_stride;
  const KeyRows<float> rows = key_rows<float>(p, u, base, scales, key);
  if (rows.stride == 1 && rows.in_line(0, n)) {
    memcpy(to, rows.row(0), n * 4);
  } else {
    for (int64_t j = 0; j < n; ++j) to[j] = *rows.row(j);
  }
}

// Rows of T from `key` on; int8 ones are written to `room` (kKeyBlock, head_dim), n of them.
template <class T>
GEMMA2_INLINE KeyRows<T> rows_as(T, const AttentionParams& p, const Unit& u, const void* base,
                                 const HeadsView& view, const HeadsView&, int64_t key, int64_t,
                                 T*) {
  return key_rows<T>(p, u, base, view, key);
}
template <class T>
GEMMA2_INLINE KeyRows<T> rows_as(int8_t, const AttentionParams& p, const Unit& u, const void* base,
                                 const HeadsView& view, const HeadsView& scales, int64_t key,
                                 int64_t n, T* room) {
  float factors[kKeyBlock];
  load_factors(p, u, scales, key, n, factors);
  widen_rows(key_rows<int8_t>(p, u, base, view, key), factors, n, p.head_dim, room);
  return {room, p.head_dim, 0, INT64_MAX};
}

template <class T>
GEMMA2_INLINE const T* query_row(const AttentionParams& p, const Unit& u, int64_t r) {
  return (const T*)p.q.data + u.batch * p.q.batch_stride +
         (u.q_offset + u.query(r)) * p.q.seqlen_stride + u.head(r) * p.q.head_stride;
}

// Divides a row of output by its sum and stores it, with the logarithm of the sum: largest is in
// units of ln 2. A row without keys has sum 0: it gives 0 and -inf.
template <class T>
void finish_row(const AttentionParams& p, const Unit& u, int64_t r, const float* o, float largest,
                float sum) {
  const int64_t i = u.q_offset + u.query(r);
  T* out = (T*)p.out.data + u.batch * p.out.batch_stride + i * p.out.seqlen_stride +
           u.head(r) * p.out.head_stride;
  const VecF factor = set(sum == 0 ? 0.0f : 1.0f / sum);
  for (int64_t d = 0; d < p.head_dim; d += kLanes) {
    const VecF y = load(o + d) * factor;
    if (d + kLanes <= p.head_dim)
      store(out + d, y);
    else
      store_n(out + d, y, p.head_dim - d);
  }
  if (p.lse) {
    const float ln_2 = 0x1.62e43p-1f;
    p.lse[u.batch * p.lse_batch_stride + u.head(r) * p.lse_head_stride + i] =
        sum == 0 ? -INFINITY : largest * ln_2 + logf(sum);
  }
}

// The unit's result: to out, or to its split's part.
template <class T>
void finish_unit(const AttentionWork& w, const Unit& u, const float* o, int64_t o_stride,
                 const float* largest, const float* sum) {
  const int64_t head_dim = w.p.head_dim;
  const int64_t part = (u.batch * w.p.num_kv_heads + u.kv_head) * w.splits + u.split;
  for (int64_t r = 0; r < u.rows; ++r) {
    if (w.splits == 1) {
      finish_row<T>(w.p, u, r, o + r * o_stride, largest[r], sum[r]);
    } else {
      float* to = w.partial + (part * w.block_rows + r) * (head_dim + 2);
      memcpy(to, o + r * o_stride, head_dim * 4);
      to[head_dim] = largest[r];
      to[head_dim + 1] = sum[r];
    }
  }
}

}  // namespace
}  // namespace GEMMA2_ISA
}  // namespace gemma2
