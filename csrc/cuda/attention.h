// How attention is divided among blocks on CUDA: tile sizes, and the plan made of shapes and
// device.
#pragma once
#include <stdint.h>

#include "../params.h"

namespace gemma2 {
namespace cuda {

constexpr int kAttentionPlainRows = 4;    // rows a block, a warp each
constexpr int kAttentionDecodeRows = 16;  // of mma's operand
constexpr int kAttentionDecodeWarps = 4;
constexpr int kAttentionCluster = 8;                              // blocks at most
constexpr int kAttentionDecodeStep = 16 * kAttentionDecodeWarps;  // keys of all warps at once
constexpr int kAttentionCombineThreads = 512;                     // at least head_dim

// The output of few rows leaves through the memory that tiles came by: float32, with 8 more columns
// that keep rows off the powers of two, and two numbers a row.
constexpr int64_t attention_output_bytes(int rows, int head_dim) {
  return int64_t(rows) * (head_dim + 8 + 2) * 4;
}

// What the kernels keep behind the tiles until then: the keys that each row sees, and the Unit.
constexpr int kAttentionUnitBytes = 160;
constexpr int64_t attention_state_bytes(int rows) {
  return int64_t(rows) * 8 + kAttentionUnitBytes;
}

// Of the kernel for many rows: 16 m_tiles rows a warp, Q, and a ring of K and V tiles.
struct AttentionTile {
  int head_dim, warps, m_tiles, keys, stages;

  constexpr int rows() const { return warps * m_tiles * 16; }
  constexpr int64_t tile_bytes() const { return int64_t(rows() + stages * keys) * head_dim * 2; }
  constexpr int64_t shared_bytes() const { return tile_bytes() + attention_state_bytes(rows()); }
};

// They fit 99 KiB (sm_86, 89, 120) but for the large one, which serves sm_80 (163 KiB): two blocks
// of the small one do not fit there, and one alone leaves half the registers idle.
constexpr AttentionTile kAttentionTile64{64, 4, 2, 64, 3};
constexpr AttentionTile kAttentionTile128{128, 4, 2, 32, 6};
constexpr AttentionTile kAttentionTile256{256, 4, 1, 64, 2};
constexpr AttentionTile kAttentionTile256Large{256, 8, 1, 32, 6};

constexpr int attention_decode_stages(int head_dim) { return head_dim > 128 ? 3 : 4; }
constexpr int attention_decode_stage_bytes(int head_dim) { return 16 * head_dim * 2; }
constexpr int64_t attention_decode_tile_bytes(int head_dim) {
  return int64_t(kAttentionDecodeWarps) * attention_decode_stages(head_dim) *
         attention_decode_stage_bytes(head_dim);
}
constexpr int64_t attention_decode_bytes(int head_dim) {
  return attention_decode_tile_bytes(head_dim) + attention_state_bytes(0);
}
// Where it appends a token: cosines and sines, and the token's rows of k and v.
constexpr int64_t attention_append_bytes(int head_dim) {
  return head_dim / 2 * 8 + 2 * head_dim * 2;
}
static_assert(attention_decode_bytes(256) + attention_append_bytes(256) <= 99 << 10, "");
// Of a cache of int8, each stage with the factors of its rows.
constexpr int kAttentionInt8Stages = 5;
constexpr int attention_int8_stage_bytes(int head_dim) { return 16 * (head_dim + 4); }
constexpr int64_t attention_int8_tile_bytes(int head_dim) {
  return int64_t(kAttentionDecodeWarps) * kAttentionInt8Stages *
         attention_int8_stage_bytes(head_dim);
}
constexpr int kAttentionInt8KeptBytes = 20;  // a thread
constexpr int64_t attention_int8_bytes(int head_dim) {
  return attention_int8_tile_bytes(head_dim) + attention_state_bytes(0) +
         kAttentionDecodeWarps * 32 * kAttentionInt8KeptBytes;
}

// Of Hopper's own kernel (227 KiB): Q and a ring of K and V tiles, and 9 barriers at most.
constexpr int kAttentionWgmmaRows = 128, kAttentionWgmmaThreads = 384;
struct AttentionWgmma {
  int head_dim, keys, stages;

  constexpr int64_t tile_bytes() const {
    return int64_t(kAttentionWgmmaRows + stages * keys) * head_dim * 2;
  }
  constexpr int64_t shared_bytes() const {
    return tile_bytes() + attention_state_bytes(kAttentionWgmmaRows) + 8 * (1 + 2 * stages);
  }
};
constexpr AttentionWgmma kAttentionWgmma128{128, 128, 4};
constexpr AttentionWgmma kAttentionWgmma256{256, 80, 4};
static_assert(kAttentionWgmma128.shared_bytes() <= 227 << 10, "");
static_assert(kAttentionWgmma256.shared_bytes() <= 227 << 10, "");
template <int kHeadDim, int kKeys, int kStages>
constexpr int64_t kAttentionWgmmaTileBytes = AttentionWgmma{kHeadDim, kKeys, kStages}.tile_bytes();

// As the kernels want them, checked.
template <int kHeadDim, int kWarps, int kMTiles, int kKeys, int kStages>
constexpr int64_t kAttentionTileBytes =
    AttentionTile{kHeadDim, kWarps, kMTiles, kKeys, kStages}.tile_bytes();
constexpr bool attention_decode_output_fits(int head_dim) {
  const int64_t bytes = attention_output_bytes(kAttentionDecodeWarps * 16, head_dim);
  return bytes <= attention_decode_tile_bytes(head_dim) &&
         bytes <= attention_int8_tile_bytes(head_dim);
}
static_assert(attention_decode_output_fits(64) && attention_decode_output_fits(128) &&
                  attention_decode_output_fits(256),
              "");
enum class AttentionKernel : int32_t { kPlain, kTile, kDecode, kWgmma };

struct AttentionPlan {
  AttentionKernel kernel;
  AttentionTile tile;  // kTile
  int head_dim;        // that the kernel is compiled for
  int64_t shared_bytes;
  int threads;
  int k_stride, v_stride;  // seqlen_stride of both
  int capacity;            // of a ring; INT_MAX: none
  int64_t block_rows;
  int64_t row_blocks;    // for each key head (of the longest sequence)
  int64_t splits;        // of a row block's keys
  int cluster;           // splits, where their blocks are a cluster that adds them up; else 1
  int64_t split_step;    // keys that a split is a multiple of
  int64_t partial_size;  // floats at AttentionParams.partial, 0 where splits is 1: (row_blocks,
                         // batch, num_kv_heads, splits, block_rows, head_dim + 2), output before
                         // normalization, maximum, sum
};

}  // namespace cuda
}  // namespace gemma2
