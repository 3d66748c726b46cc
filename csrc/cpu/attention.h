// How attention is divided into units of work on the CPU; shared by the binding, which plans and
// allocates, and the kernels. Nothing here depends on the number of threads or the instruction set.
#pragma once
#include <cstdint>

#include "../params.h"

namespace gemma2 {

// A block of query rows meets one block of keys at a time. Q, O and the packed blocks of K and V
// (192 * 256 * 8 + 64 * 256 * 8 bytes at most) stay in a second-level cache of 512 KiB to 1 MiB.
constexpr int64_t kAttentionRowBlock = 192;  // a multiple of every kTileRows
constexpr int64_t kAttentionKeyBlock = 64;
// Room for rows comes in multiples of every kTileRows.
constexpr int64_t kAttentionTileRows = 48;
// Up to here keys are read where they lie, once for all rows, and a row's result does not depend on
// the rows beside it: blocks and splits of keys lie at multiples of their size, whatever is seen of
// them. So checking a draft gives what decoding token by token does.
constexpr int64_t kAttentionStreamPositions = 16;
constexpr int64_t kAttentionStreamRows = 128;
// From so many rows on, which fill up a step, arithmetic bounds the work.
constexpr int64_t kAttentionSharedRows = 8, kAttentionRowStep = 4;
constexpr int64_t attention_stream_rows(int64_t rows) {
  if (rows <= kAttentionSharedRows - kAttentionRowStep / 2) return rows;
  return (rows + kAttentionRowStep - 1) / kAttentionRowStep * kAttentionRowStep;
}
// Rows of several key heads, fewer than kAttentionSharedRows each: they stay in the first cache.
constexpr int64_t kAttentionJoinedRows = 32;
// Fewer rows, of one key head, meet the keys of so many blocks, a span, before they meet the
// values.
constexpr int64_t kAttentionSpanBlocks = 4;
// Rows of scores in scratch, of so many rows: a span's of up to four rows, or a block's of all.
constexpr int64_t attention_score_rows(int64_t rows) {
  return rows > 4 * kAttentionSpanBlocks ? rows : 4 * kAttentionSpanBlocks;
}
// Distances between rows in scratch, in floats: constants, so that they fold into addresses, and
// off the powers of two, so that rows do not compete for the same cache sets.
constexpr int64_t kAttentionQueryStride = 256 + 16;
constexpr int64_t kAttentionScoreStride = kAttentionKeyBlock + 16;

// Whole vectors of floats, and of bytes.
constexpr int64_t attention_padded_dim(int64_t head_dim) { return (head_dim + 63) / 64 * 64; }

// A row is one position of one query head; the rows of a group (the query heads of one key head)
// are numbered position * group + head, so that a block of rows shares every key it reads.
struct AttentionWork {
  AttentionParams p;
  bool stream;         // few rows: keys are read where they lie
  bool zen4;           // as isa.h says
  int64_t block_rows;  // rows a block, for one key head
  int64_t unit_heads;  // key heads of a unit, a divisor of num_kv_heads; > 1 only in streams
  int64_t row_blocks;  // blocks for each key head (of the longest sequence)
  int64_t splits;      // > 1 only with one row block: its keys are divided, results combined
  int64_t split_keys;
  float* scratch;  // this worker's
  int64_t* next;   // this worker's: the unit behind its last one, whose first keys it has fetched
  float* partial;  // splits > 1: (batch, num_kv_heads, splits, rows, head_dim + 2): output before
                   // normalization, maximum, sum
};

// The backward: blocks of query rows meet blocks of keys of the same size, a multiple of every
// kTileRows and kTileCols.
constexpr int64_t kAttentionBackwardBlock = 96;
constexpr int64_t kAttentionBackwardStride = kAttentionBackwardBlock + 16;

// Room in a block of sequences of so many rows or keys, those of the last tile included.
constexpr int64_t attention_backward_room(int64_t longest) {
  const int64_t room = longest + 32;
  return room < kAttentionBackwardBlock ? room : kAttentionBackwardBlock;
}
// In floats, of one worker with room for so many rows and keys: keys and values in panels, keys and
// their two gradients; query rows and their grad_out (in both forms), scores and products (in both
// forms); and these the other way round.
constexpr int64_t attention_backward_scratch(int64_t head_dim, int64_t rows, int64_t keys) {
  return keys * (2 * attention_padded_dim(head_dim) + 3 * kAttentionQueryStride +
                 kAttentionBackwardStride) +
         rows * (3 * kAttentionQueryStride + 3 * kAttentionBackwardStride);
}

struct AttentionBackwardWork {
  AttentionBackwardParams p;
  const int64_t* first_row_block;  // (batch + 1,): blocks of query rows of the sequences before
  int64_t row_room, key_room;      // of a block
  float* scratch;                  // this worker's
  // Of each block of rows, (row blocks, num_kv_heads, ...):
  float* row_terms;  // (2, row_room): delta, lse in units of ln 2
  float* grad_q;     // (row_room, padded_dim): sums
  int32_t* turns;    // blocks of keys that are in the sums; 0 at first
};

}  // namespace gemma2
