// What Hopper's attention kernels have in common: tiles in shared memory, and how bulk tensor
// copies bring them.
#pragma once
#include "attention.cuh"
#include "tensor_map.cuh"
#include "wgmma.cuh"

namespace gemma2 {
namespace cuda {

constexpr int kGroupThreads = 4 * kWarpSize;  // a warpgroup
constexpr int kConsumers = 2;                 // warpgroups, beside a producer

// Boxes of `keys` keys, or slots of a ring, of one head by 64 columns.
inline bool map_keys(CUtensorMap& map, const AttentionParams& p, const HeadsView& view, int keys) {
  const bool packed = p.cu_seqlens_k != nullptr;
  const int64_t slots = packed ? p.total_k : p.capacity ? p.capacity : p.seqlen_k;
  return make_tensor_map(map, p.dtype, view.data,
                         {4,
                          {p.head_dim, slots, p.num_kv_heads, packed ? 1 : p.batch},
                          {1, view.seqlen_stride, view.head_stride, view.batch_stride},
                          {64, keys, 1, 1}});
}

// Boxes of `rows` rows of q, or of what is laid out as q, by 64 columns. The rows of a unit are
// those of all heads of a group, the heads of a query behind each other; a box has whole queries.
inline bool map_rows(CUtensorMap& map, const AttentionParams& p, const HeadsView& view, int rows) {
  const bool packed = p.cu_seqlens_q != nullptr;
  const int64_t group = p.num_heads / p.num_kv_heads;
  if (rows % group) return false;
  return make_tensor_map(
      map, p.dtype, view.data,
      {5,
       {p.head_dim, group, packed ? p.total_q : p.seqlen_q, p.num_kv_heads, packed ? 1 : p.batch},
       {1, view.head_stride, view.seqlen_stride, group * view.head_stride, view.batch_stride},
       {64, int(group), int(rows / group), 1, 1}});
}

#if defined(GEMMA2_HOPPER)

// Panels of 64 columns: kRows rows of 128 bytes each, their chunks permuted as wgmma_matrix says.
template <int kHeadDim, int kRows>
struct PanelLayout {
  static constexpr int kChunks = kHeadDim / 8, kPanel = kRows * 64;
  GEMMA2_DEVICE static int offset(int row, int chunk) {
    return chunk / 8 * kPanel + row * 64 + (chunk % 8 ^ row % 8) * 8;
  }
  // Of float32, half as many rows.
  GEMMA2_DEVICE static int float_offset(int row, int column) {
    return column / 64 * (kPanel / 2) + row * 64 + column % 64;
  }
};

// Start the copy of a tile from a slot (of the sequence) or a row (of the unit) on; its bytes count
// for `full`. What follows the unit's keys or rows in memory comes along, behind the tensor zeros.
template <int kHeadDim, int kKeys, class T>
GEMMA2_DEVICE void copy_keys_by_map(T* tile, const CUtensorMap& map, const AttentionParams& p,
                                    const Unit<T>& u, int slot, uint64_t* full) {
  const int at = int(u.k_offset) + slot;
#pragma unroll
  for (int panel = 0; panel < kHeadDim / 64; ++panel) {
    copy_box(tile + panel * kKeys * 64, &map, panel * 64, at, int(u.kv_head),
             p.cu_seqlens_k ? 0 : int(u.batch), full);
  }
}
template <int kHeadDim, int kRows, class T>
GEMMA2_DEVICE void copy_rows_by_map(T* tile, const CUtensorMap& map, const AttentionParams& p,
                                    const Unit<T>& u, int row, uint64_t* full) {
  const int at = int(u.q_offset) + u.query(row);
#pragma unroll
  for (int panel = 0; panel < kHeadDim / 64; ++panel) {
    copy_box(tile + panel * kRows * 64, &map, panel * 64, 0, at, int(u.kv_head),
             p.cu_seqlens_q ? 0 : int(u.batch), full);
  }
}

// Zeros in rows `begin` on of a tile: a weight of 0 must not meet what stands behind the keys or
// rows. By a warpgroup that has seen the copy land; both may, as they write the same. `barrier` is
// the warpgroup's.
template <int kHeadDim, int kRows, class T>
GEMMA2_DEVICE void clear_tail(T* tile, int begin, int barrier) {
  constexpr int kPanels = kHeadDim / 64;
  const int chunks = (kRows - begin) * 8;
#pragma unroll 1
  for (int i = threadIdx.x % kGroupThreads; i < chunks * kPanels; i += kGroupThreads) {
    const int panel = i % kPanels, chunk = i / kPanels;
    store_16(tile + panel * kRows * 64 + begin * 64 + chunk * 8, Vector16{{0, 0, 0, 0}});
  }
  fence_shared_for_wgmma();
  named_barrier_sync(barrier, kGroupThreads);
}

#endif

}  // namespace cuda
}  // namespace gemma2
