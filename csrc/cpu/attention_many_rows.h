// Attention of many rows: blocks of keys and values are packed and meet a block of rows in register
// tiles, or AMX's.
#pragma once
#include "attention_unit.h"

namespace gemma2 {
namespace GEMMA2_ISA {
namespace {

template <class T, class K>
void tile_unit(const AttentionWork& w, const Unit& u) {
  using Word = typename Packed<T>::Word;
  constexpr int kStep = kPerWord<Word>;
  const AttentionParams& p = w.p;
  const int64_t head_dim = p.head_dim, words = head_dim / kStep;
  const int64_t depth = round_up(words, kDepthStep);
  const int64_t o_stride = attention_padded_dim(head_dim);
  float* q = w.scratch;
  float* s = q + w.block_rows * kQueryStride;
  float* o = s + w.block_rows * kScoreStride;
  float* k_packed = o + w.block_rows * o_stride;
  float* v_packed = k_packed + kKeyBlock * o_stride;
  T* k_room = (T*)(v_packed + kKeyBlock * o_stride);  // of int8 keys and values
  T* v_room = k_room + kKeyBlock * head_dim;

  const ScoreScale scale = score_scale(p);
  const int64_t rows = round_up(u.rows, kTileRows);
  float largest[kRowBlock], sum[kRowBlock], factors[kRowBlock];
  int64_t first[kRowBlock], end[kRowBlock];  // keys that a row sees
  const T* q_rows[kRowBlock];
  for (int64_t r = 0; r < rows; ++r) {
    const bool inside = r < u.rows;
    q_rows[r] = inside ? query_row<T>(p, u, r) : nullptr;
    largest[r] = -INFINITY;
    sum[r] = 0.0f;
    // Rows that fill up the last tile see what its last row sees.
    first[r] = inside ? first_key(p, u, u.query(r)) : first[r - 1];
    end[r] = inside ? end_key(p, u, u.query(r)) : end[r - 1];
  }
  // Rows ahead are fetched, and the first block of keys and values.
  constexpr int64_t kRowsAhead = 4;
  const KeyRows<K> first_keys = key_rows<K>(p, u, u.k, p.k, u.key_begin);
  const KeyRows<K> first_values = key_rows<K>(p, u, u.v, p.v, u.key_begin);
  const int64_t first_block = min64(kKeyBlock, u.key_end - u.key_begin);
  const auto fetch_row = [&](const auto* row) {
    for (int64_t d = 0; d < head_dim; d += kLineBytes / int64_t(sizeof *row)) prefetch(row + d);
  };
  for (int64_t r = 0; r < max64(rows, first_block); ++r) {
    if (r + kRowsAhead < u.rows) fetch_row(q_rows[r + kRowsAhead]);
    if (r < first_block) fetch_row(first_keys.row(r)), fetch_row(first_values.row(r));
    if (r >= rows) continue;
    const T* row = q_rows[r];
    for (int64_t d = 0; d < depth; d += kLanes)
      store(q + r * kQueryStride + d, row ? load_words(Word{}, row, d, words) : zero());
    for (int64_t d = 0; d < o_stride; d += kLanes) store(o + r * o_stride + d, zero());
  }

  // The next block is fetched while the products of this one's scores are made.
  const int64_t pairs = kKeyBlock * head_dim * int64_t(sizeof(K)) / (2 * kLineBytes);  // of keys
  const int64_t steps =
      kKeyBlock / kTileCols * (round_up(rows, kRowsAtOnce) / kRowsAtOnce) * (depth / kDepthStep);
  const int64_t period = max64(1, steps / (2 * pairs)),
                each_step = round_up(2 * pairs, steps) / steps;
  for (int64_t j = u.key_begin; j < u.key_end; j += kKeyBlock) {
    const int64_t n = min64(kKeyBlock, u.key_end - j);
    const int64_t next = min64(j + kKeyBlock, u.key_end - 1);
    BlockFetcher fetcher{make_fetcher(key_rows<K>(p, u, u.k, p.k, next), 0, head_dim),
                         make_fetcher(key_rows<K>(p, u, u.v, p.v, next), 0, head_dim), period,
                         pairs};
    const KeyRows<T> k = rows_as<T>(K{}, p, u, u.k, p.k, p.k_scales, j, n, k_room);
    const KeyRows<T> v = rows_as<T>(K{}, p, u, u.v, p.v, p.v_scales, j, n, v_room);
    // Some row does not see all of the block. Then a value that is not finite must not pass through
    // the product, where a weight of 0 does not hide it.
    const bool edge = first[rows - 1] > j || end[0] < j + n;
    uint64_t apart = 0;
    if (edge) {
      for (int64_t i = 0; i < n; ++i) apart |= uint64_t(not_finite(v.row(i), head_dim)) << i;
    }
    pack_keys<Word>(k, n, words, depth, k_packed);
    pack_values<Word>(v, n, round_up(n, kDepthStep * kStep), head_dim, apart, v_packed);

    // Keys of the block that row r sees begin at from(r) and end at to(r).
    const auto from = [&](int64_t r) { return min64(n, max64(0, first[r] - j)); };
    const auto to = [&](int64_t r) { return min64(n, max64(0, end[r] - j)); };
    for (int64_t c = 0; c < n; c += kTileCols) {
      for (int64_t r = 0; r < rows; r += kRowsAtOnce) {
        const int64_t count = min64(kRowsAtOnce, rows - r);
        if (from(r) >= c + kTileCols || to(r + count - 1) <= c) continue;
        multiply_rows<kQueryStride, kTileCols, false>(
            count, (const Word*)q + r * kQueryStride, k_packed + c * depth, depth,
            s + r * kScoreStride + c, kScoreStride, fetcher, each_step);
      }
    }
    const auto softmax = [&](auto count, int64_t r) {
      softmax_rows<decltype(count)::value, Word>(
          s + r * kScoreStride, kKeyBlock, [&](int i) { return from(r + i); },
          [&](int i) { return to(r + i); }, scale, largest + r, sum + r, factors + r);
    };
    static_assert(kTileRows % 2 == 0, "");
    int64_t r = 0;
    for (; r + kLanes <= rows; r += kLanes) softmax(Count<kLanes>{}, r);
    for (; r < rows; r += 2) softmax(Count<2>{}, r);
    for (r = 0; r < rows; ++r) {
      if (factors[r] != 1.0f) scale_row(o + r * o_stride, o_stride, factors[r]);
    }
    for (int64_t d = 0; d < head_dim; d += kTileCols) {
      for (int64_t r = 0; r < rows; r += kRowsAtOnce) {
        const int64_t count = min64(kRowsAtOnce, rows - r);
        // (A row's weights are 0 from what it sees to both ends of the block.)
        const int64_t begin = from(r) / kStep / kDepthStep * kDepthStep;
        const int64_t stop = round_up(to(r + count - 1), kStep * kDepthStep) / kStep;
        if (begin >= stop) continue;
        NoFetcher none;
        multiply_rows<kScoreStride, kTileCols, true>(
            count, (const Word*)s + r * kScoreStride + begin,
            v_packed + d * (kKeyBlock / kStep) + begin * kTileCols, stop - begin,
            o + r * o_stride + d, o_stride, none, 0);
      }
    }
    for (int64_t i = 0; apart >> i; ++i) {
      if (!(apart >> i & 1)) continue;
      for (int64_t r = 0; r < u.rows; ++r) {
        if (i < from(r) || i >= to(r)) continue;
        const float* row = s + r * kScoreStride;
        const float weight = kStep == 1 ? row[i] : to_float(((const BFloat16*)row)[i]);
        const VecF factor = set(weight);
        for (int64_t d = 0; d < head_dim; d += kLanes) {
          float* to_add = o + r * o_stride + d;
          store(to_add, fma(factor, load_words(0.0f, v.row(i), d, head_dim), load(to_add)));
        }
      }
    }
  }
  finish_unit<T>(w, u, o, o_stride, largest, sum);
}

}  // namespace
}  // namespace GEMMA2_ISA
}  // namespace gemma2
