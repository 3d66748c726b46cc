// attention for many rows on Hopper (sm_90a): 64 rows a consumer warpgroup, two of them, and a
// producer warpgroup that copies K and V tiles. Shapes, units and results as in attention.cuh.
//
// Tiles come in the order K0, K1, V0, K2, V1, ... through a ring. While the tensor cores compute a
// tile's scores and the output of the tile before, this tile's soft-cap and softmax run on the
// other warpgroup's or this one's earlier scores. Copies are cp.async, not bulk tensor copies: they
// take any stride, rings and pages, and cost the producer about a twentieth of the issue slots.
// Not run on hardware; chosen only where GEMMA2_EXT_ATTENTION_WGMMA=1 (see attention.cu).
// attention_wgmma_kernel: at most 168 registers (40 and 232 by warpgroup), 226 KiB of shared
// memory. Source: FlashAttention-3 (arXiv 2407.08608), its tile of 128 x 80 for head_dim 256.
#include "attention.cuh"
#include "kernels.h"
#include "launch.cuh"
#include "wgmma.cuh"

namespace gemma2 {
namespace cuda {
namespace {

constexpr int kGroupThreads = 4 * kWarpSize;  // a warpgroup
constexpr int kConsumers = 2, kThreads = (1 + kConsumers) * kGroupThreads;
constexpr int kRows = kAttentionWgmmaRows;
static_assert(kRows == kConsumers * 64, "");

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Panels of 64 columns: kRows rows of 128 bytes each, their chunks permuted as wgmma_matrix says.
template <int kHeadDim, int kRows>
struct PanelLayout {
  static constexpr int kChunks = kHeadDim / 8, kPanel = kRows * 64;
  GEMMA2_DEVICE static int offset(int row, int chunk) {
    return chunk / 8 * kPanel + row * 64 + (chunk % 8 ^ row % 8) * 8;
  }
};

// Where a tile stands in the ring's order, of `blocks` blocks of keys.
GEMMA2_DEVICE int k_place(int block) { return block == 0 ? 0 : 2 * block - 1; }
GEMMA2_DEVICE int v_place(int block, int blocks) {
  return block + 1 < blocks ? 2 * block + 2 : 2 * block + 1;
}

template <class T, int kHeadDim, int kKeys, int kStages>
GEMMA2_DEVICE void produce(const AttentionParams& p, const AttentionPlan& plan, const Unit<T>& u,
                           T* q_tile, uint64_t* full_q, T* ring, uint64_t* full, uint64_t* empty,
                           int blocks) {
  const int thread = threadIdx.x;
  constexpr int kUnroll = 4;  // as few registers as a producer has
  copy_tile<PanelLayout<kHeadDim, kRows>, kRows, kGroupThreads, kUnroll>(
      q_tile, u.rows, int(p.head_dim), thread, [&](int row) { return query_row(p, u, row); });
  cp_async_commit();
  // The barrier of the tile whose copies are to be waited for next.
  uint64_t* pending = full_q;
  const auto announce = [&] {
    fence_shared_for_wgmma();
    mbarrier_arrive(pending);
  };
  const auto copy = [&](int place, auto of_v, int block) {
    const int stage = place % kStages;
    mbarrier_wait(empty + stage, (place / kStages & 1) ^ 1);
    copy_keys<PanelLayout<kHeadDim, kKeys>, kKeys, kGroupThreads, of_v.value, kUnroll>(
        ring + stage * kKeys * kHeadDim, p, plan, u, block * kKeys, thread);
    cp_async_commit();
    cp_async_wait<1>();
    announce();
    pending = full + stage;
  };
  copy(0, Flag<false>{}, 0);
  for (int block = 1; block < blocks; ++block) {
    copy(k_place(block), Flag<false>{}, block);
    copy(v_place(block - 1, blocks), Flag<true>{}, block - 1);
  }
  copy(v_place(blocks - 1, blocks), Flag<true>{}, blocks - 1);
  cp_async_wait<0>();
  announce();
}

// s = q k^T of the warpgroup's 64 rows.
template <class T, int kHeadDim, int kKeys>
GEMMA2_DEVICE void start_scores(float (&s)[kKeys / 8][4], const T* q_rows, const T* k_tile) {
#pragma unroll
  for (int step = 0; step < kHeadDim / 16; ++step) {
    const int panel = step / 4, column = step % 4 * 16;
    wgmma_shared<T, kKeys>(s, wgmma_matrix(q_rows + panel * kRows * 64 + column, 16),
                           wgmma_matrix(k_tile + panel * kKeys * 64 + column, 16), step > 0);
  }
  wgmma_commit();
}

// o += weights v.
template <class T, int kHeadDim, int kKeys>
GEMMA2_DEVICE void start_output(float (&o)[kHeadDim / 8][4],
                                const uint32_t (&weights)[kKeys / 16][4], const T* v_tile) {
#pragma unroll
  for (int step = 0; step < kKeys / 16; ++step) {
    wgmma_registers<T, kHeadDim>(o, weights[step],
                                 wgmma_matrix(v_tile + step * 16 * 64, kKeys * 128));
  }
  wgmma_commit();
}

#endif

template <class T, int kHeadDim, int kKeys, int kStages>
__global__ void __launch_bounds__(kThreads, 1)
    attention_wgmma_kernel(const AttentionParams p, const AttentionPlan plan) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr int kTileSize = kKeys * kHeadDim;
  constexpr int64_t kTileBytes = kAttentionWgmmaTileBytes<kHeadDim, kKeys, kStages>;
  clear_rows_of_no_sequence<T>(p);
  Unit<T> u;
  if (!make_unit(p, plan, blockIdx.x, u)) return;

  T* const q_tile = reinterpret_cast<T*>(shared_memory());
  T* const ring = q_tile + kRows * kHeadDim;
  Unit<T>* const unit = reinterpret_cast<Unit<T>*>(shared_memory() + kTileBytes);
  RowKeys* const all_seen = reinterpret_cast<RowKeys*>(unit + 1);
  uint64_t* const full_q = reinterpret_cast<uint64_t*>(all_seen + kRows);
  uint64_t* const full = full_q + 1;
  uint64_t* const empty = full + kStages;
  const int thread = threadIdx.x, lane = thread % kWarpSize;
  const int blocks = (u.keys + kKeys - 1) / kKeys;
  if (thread == 0) {
    *unit = u;  // where it leaves the registers to the loop
    mbarrier_init(full_q, kGroupThreads);
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(full + i, kGroupThreads);
      mbarrier_init(empty + i, kConsumers * 4);  // a lane a warp
    }
  }
  if (thread < kRows) all_seen[thread] = u.row_keys(p, thread < u.rows ? thread : u.rows - 1);
  __syncthreads();

  if (thread < kGroupThreads) {
    give_registers<40>();
    if (blocks > 0) {
      produce<T, kHeadDim, kKeys, kStages>(p, plan, u, q_tile, full_q, ring, full, empty, blocks);
    }
    return;
  }
  take_registers<232>();
  const int group_row = (thread / kGroupThreads - 1) * 64;
  const int warp_row = group_row + thread % kGroupThreads / kWarpSize * 16;
  const RowKeys* const seen = all_seen + warp_row;
  const RowKeys first_seen = seen[0], last_seen = seen[15];
  const T* const q_rows = q_tile + group_row * 64;

  const ScoreScale scale = score_scale(p);
  float o[kHeadDim / 8][4], s[kKeys / 8][4], factor[2];
  uint32_t weights[kKeys / 16][4];
  QuadRows softmax;
  softmax.clear();
#pragma unroll
  for (int n = 0; n < kHeadDim / 8; ++n) o[n][0] = o[n][1] = o[n][2] = o[n][3] = 0;

  // Returns the tile at this place of the ring's order once it has landed.
  const auto wait_for = [&](int place) {
    mbarrier_wait(full + place % kStages, place / kStages & 1);
    return ring + place % kStages * kTileSize;
  };
  const auto release = [&](int place) {
    __syncwarp();
    if (lane == 0) mbarrier_arrive(empty + place % kStages);
  };
  const auto weigh = [&](int block) {
    const int key = block * kKeys;
    scale_scores(s, scale);
    if (key < last_seen.first || key + kKeys > first_seen.end) {
      const RowKeys keys[2]{seen[lane / 4], seen[lane / 4 + 8]};
      mask_scores(s, keys, key);
    }
    softmax_tile(s, scale, softmax, factor);
  };

  if (blocks > 0) {
    mbarrier_wait(full_q, 0);
    const T* k_tile = wait_for(0);
    wgmma_fence();
    start_scores<T, kHeadDim, kKeys>(s, q_rows, k_tile);
    wgmma_wait<0>();
    keep_in_order(s);
    release(0);
    weigh(0);
    pack_weights<T>(weights, s);
    for (int block = 1; block < blocks; ++block) {
      const int k_at = k_place(block), v_at = v_place(block - 1, blocks);
      k_tile = wait_for(k_at);
      wgmma_fence();
      start_scores<T, kHeadDim, kKeys>(s, q_rows, k_tile);
      start_output<T, kHeadDim, kKeys>(o, weights, wait_for(v_at));
      wgmma_wait<1>();
      keep_in_order(s);
      release(k_at);
      weigh(block);
      wgmma_wait<0>();
      keep_in_order(o);
      release(v_at);
      scale_output(o, factor);
      pack_weights<T>(weights, s);
    }
    const int v_at = v_place(blocks - 1, blocks);
    const T* v_tile = wait_for(v_at);
    wgmma_fence();
    start_output<T, kHeadDim, kKeys>(o, weights, v_tile);
    wgmma_wait<0>();
    keep_in_order(o);
  }

  // The tiles' memory takes the output once both warpgroups are through with the tiles.
  named_barrier_sync(1, kConsumers * kGroupThreads);
  float* const outputs = reinterpret_cast<float*>(shared_memory());
  float* const rows = outputs + warp_row * kOutputStride<kHeadDim>;
  float* const largest = outputs + kRows * kOutputStride<kHeadDim> + warp_row;
  float* const sum = largest + kRows;
  spill_output<kHeadDim>(rows, o);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float row_sum = quad_sum(softmax.sum[i]);
    if (lane % 4 == 0) {
      largest[8 * i + lane / 4] = softmax.largest[i] * scale.outer;
      sum[8 * i + lane / 4] = row_sum;
    }
  }
  __syncwarp();
  for (int r = 0; r < 16 && warp_row + r < unit->rows; ++r) {
    RowResult result{{}, largest[r], sum[r]};
#pragma unroll
    for (int j = 0; j < kHeadDim / kWarpSize; ++j)
      result.o[j] = rows[r * kOutputStride<kHeadDim> + lane + j * kWarpSize];
    finish_row(p, plan, *unit, warp_row + r, result);
  }
#endif
}

template <class T>
void launch_16_bit(const AttentionParams& p, const AttentionPlan& plan, dim3 grid,
                   cudaStream_t stream) {
  constexpr AttentionWgmma k128 = kAttentionWgmma128, k256 = kAttentionWgmma256;
  if (plan.head_dim == 128) {
    launch("attention", attention_wgmma_kernel<T, 128, k128.keys, k128.stages>, grid, kThreads,
           plan.shared_bytes, stream, p, plan);
  } else {
    launch("attention", attention_wgmma_kernel<T, 256, k256.keys, k256.stages>, grid, kThreads,
           plan.shared_bytes, stream, p, plan);
  }
}

}  // namespace

void launch_attention_wgmma(const AttentionParams& p, const AttentionPlan& plan, unsigned blocks,
                            cudaStream_t stream) {
  if (p.dtype == DType::kBFloat16) return launch_16_bit<BFloat16>(p, plan, dim3(blocks), stream);
  launch_16_bit<Half>(p, plan, dim3(blocks), stream);
}

}  // namespace cuda
}  // namespace gemma2
