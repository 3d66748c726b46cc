// attention for many rows on Hopper (sm_90a): 64 rows a consumer warpgroup, two of them, and a
// producer warpgroup that copies K and V tiles. Shapes, units and results as in attention.cuh.
//
// Tiles come in the order K0, K1, V0, K2, V1, ... through a ring. While the tensor cores compute a
// tile's scores and the output of the tile before, the other warpgroup's softmax runs. Copies are
// bulk tensor copies, which one thread starts; of pages, and where the driver has no such
// maps, cp.async by the whole producer. Bound by the tensor cores, then by tanh and exp2: most
// tiles' tanh is a polynomial. Each branch of the softmax is to end before the wait for the output
// behind it: of code in one piece the compiler puts that wait before the exponentials.
// attention_wgmma_kernel: at most 168 registers (40 and 232 by warpgroup), 226 KiB of shared
// memory. Source: FlashAttention-3 (arXiv 2407.08608), its tile of 128 x 80 for head_dim 256.
#include "attention_wgmma.cuh"
#include "kernels.h"
#include "launch.cuh"

namespace gemma2 {
namespace cuda {
namespace {

constexpr int kThreads = (1 + kConsumers) * kGroupThreads;
constexpr int kRows = kAttentionWgmmaRows;
static_assert(kRows == kConsumers * 64, "");

// Q, and K and V, as bulk tensor copies see them, where that is possible.
struct TileMaps {
  CUtensorMap q, k, v;
  bool of_q, of_keys;
};

#if defined(GEMMA2_HOPPER)

constexpr int kGroupBarrier = 1;  // one a warpgroup

// Where a tile stands in the ring's order, of `blocks` blocks of keys.
GEMMA2_DEVICE int k_place(int block) { return block == 0 ? 0 : 2 * block - 1; }
GEMMA2_DEVICE int v_place(int block, int blocks) {
  return block + 1 < blocks ? 2 * block + 2 : 2 * block + 1;
}

// A unit's keys as blocks. Those of a ring that go round its end are two runs of slots: the first
// run's last block has `unused` columns behind it, so that each block lies in one run, as bulk
// copies want it.
struct KeyBlocks {
  int count, of_first_run, unused;

  template <class T>
  GEMMA2_DEVICE static KeyBlocks make(const AttentionPlan& plan, const Unit<T>& u, int size,
                                      bool in_runs) {
    const bool round = in_runs && u.keys > plan.capacity - u.slot;
    const int first_run = round ? plan.capacity - u.slot : u.keys;
    const int blocks = (first_run + size - 1) / size;
    return {blocks + (u.keys - first_run + size - 1) / size, blocks, blocks * size - first_run};
  }
  // The block's first key.
  GEMMA2_DEVICE int key(int block, int size) const {
    return block * size - (block < of_first_run ? 0 : unused);
  }
  // The end of the keys that it may have.
  GEMMA2_DEVICE int end(int block, int size) const {
    return block < of_first_run ? of_first_run * size - unused : INT_MAX;
  }
  GEMMA2_DEVICE int slot(int first_slot, int block, int size) const {
    return block < of_first_run ? first_slot + block * size : (block - of_first_run) * size;
  }
};

// The rows of Q by the whole producer.
template <class T, int kHeadDim>
GEMMA2_DEVICE void copy_queries(const AttentionParams& p, const Unit<T>& u, T* q_tile) {
  constexpr int kUnroll = 4;  // as few registers as a producer has
  copy_tile<PanelLayout<kHeadDim, kRows>, kRows, kGroupThreads, kUnroll>(
      q_tile, u.rows, int(p.head_dim), threadIdx.x, [&](int row) { return query_row(p, u, row); });
  cp_async_commit();
}

template <class T, int kHeadDim, int kKeys, int kStages>
GEMMA2_DEVICE void produce(const AttentionParams& p, const AttentionPlan& plan, const Unit<T>& u,
                           T* q_tile, uint64_t* full_q, T* ring, uint64_t* full, uint64_t* empty,
                           int blocks) {
  const int thread = threadIdx.x;
  constexpr int kUnroll = 4;
  copy_queries<T, kHeadDim>(p, u, q_tile);
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

// The same by bulk tensor copies, which one thread starts.
template <class T, int kHeadDim, int kKeys, int kStages>
GEMMA2_DEVICE void produce_by_maps(const AttentionParams& p, const TileMaps& maps, const Unit<T>& u,
                                   T* q_tile, uint64_t* full_q, T* ring, uint64_t* full,
                                   uint64_t* empty, const KeyBlocks& key_blocks) {
  const int thread = threadIdx.x, blocks = key_blocks.count;
  const auto copy = [&](int place, const CUtensorMap& map, int block) {
    const int stage = place % kStages;
    mbarrier_wait(empty + stage, (place / kStages & 1) ^ 1);
    mbarrier_arrive_and_expect(full + stage, kKeys * kHeadDim * 2);
    copy_keys_by_map<kHeadDim, kKeys>(ring + stage * kKeys * kHeadDim, map, p, u,
                                      key_blocks.slot(u.slot, block, kKeys), full + stage);
  };
  if (thread == 0 && maps.of_q) {
    mbarrier_arrive_and_expect(full_q, kRows * kHeadDim * 2);
    copy_rows_by_map<kHeadDim, kRows>(q_tile, maps.q, p, u, 0, full_q);
  }
  if (thread == 0) copy(0, maps.k, 0);
  if (!maps.of_q) {
    copy_queries<T, kHeadDim>(p, u, q_tile);
    cp_async_wait<0>();
    fence_shared_for_wgmma();
    mbarrier_arrive(full_q);
  }
  if (thread != 0) return;
  for (int block = 1; block < blocks; ++block) {
    copy(k_place(block), maps.k, block);
    copy(v_place(block - 1, blocks), maps.v, block - 1);
  }
  copy(v_place(blocks - 1, blocks), maps.v, blocks - 1);
}

constexpr float kMostOfCap = 0.75f;  // of the soft-cap, for the polynomial to hold

// softmax_tile of dot products that are all seen and at most kMostOfCap / inner in size, with a
// soft-cap: tanh(x) = x P(x^2) by a minimax fit. Absolute error 3e-7, as tanh_by_exp's, without
// the unit that exp2 needs.
template <int kTiles>
GEMMA2_DEVICE void softmax_capped_tile(float (&s)[kTiles][4], const ScoreScale& c, QuadRows& rows,
                                       float (&factor)[2]) {
  const float inverse_outer = reciprocal_approx(c.outer);
  const float terms[5]{0.9999971986f * c.outer, -0.3332307637f * c.outer, 0.1322609186f * c.outer,
                       -0.0492804497f * c.outer, 0.0123188356f * c.outer};
  const auto exponent = [&](float dot, float base) {
    const float x = dot * c.inner, x2 = x * x;
    float sum = terms[4];
#pragma unroll
    for (int i = 3; i >= 0; --i) sum = fmaf(sum, x2, terms[i]);
    return fmaf(x, sum, -base);
  };
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float largest = -INFINITY;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) largest = fmaxf(largest, fmaxf(s[n][2 * i], s[n][2 * i + 1]));
    largest = fmaxf(rows.largest[i], exponent(quad_max(largest), 0.0f) * inverse_outer);
    largest = next_base(rows.largest[i], largest, c.outer);
    const float base = largest * c.outer;
    factor[i] = exp2_approx((rows.largest[i] - largest) * c.outer);
    rows.largest[i] = largest;
    float sum = rows.sum[i] * factor[i];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int j = 2 * i; j < 2 * i + 2; ++j) {
        s[n][j] = exp2_approx(exponent(s[n][j], base));
        sum += s[n][j];
      }
    }
    rows.sum[i] = sum;
  }
}

// Whether no dot product of the warp is larger than `limit` in size.
template <int kTiles>
GEMMA2_DEVICE bool all_within(const float (&s)[kTiles][4], float limit) {
  float largest = 0.0f;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int j = 0; j < 4; ++j) largest = fmaxf(largest, fabsf(s[n][j]));
  }
  return !ballot(largest > limit);
}

// s = q k^T of the warpgroup's 64 rows; q and k by their wgmma_matrix.
template <class T, int kHeadDim, int kKeys>
GEMMA2_DEVICE void start_scores(float (&s)[kKeys / 8][4], uint64_t q, uint64_t k) {
#pragma unroll
  for (int step = 0; step < kHeadDim / 16; ++step) {
    const int panel = step / 4, column = step % 4 * 16;  // of panels of 64 columns, 128 bytes a row
    wgmma_shared<T, kKeys>(s, wgmma_matrix_behind(q, panel * kRows * 128 + column * 2),
                           wgmma_matrix_behind(k, panel * kKeys * 128 + column * 2), step > 0);
  }
  wgmma_commit();
}

// o += weights v.
template <class T, int kHeadDim, int kKeys>
GEMMA2_DEVICE void start_output(float (&o)[kHeadDim / 8][4],
                                const uint32_t (&weights)[kKeys / 16][4], uint64_t v) {
#pragma unroll
  for (int step = 0; step < kKeys / 16; ++step)
    wgmma_registers<T, kHeadDim>(o, weights[step], wgmma_matrix_behind(v, step * 16 * 128));
  wgmma_commit();
}

#endif

template <class T, int kHeadDim, int kKeys, int kStages>
__global__ void __launch_bounds__(kThreads, 1)
    attention_wgmma_kernel(const AttentionParams p, const AttentionPlan plan,
                           const __grid_constant__ TileMaps maps) {
#if defined(GEMMA2_HOPPER)
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
  KeyBlocks key_blocks = KeyBlocks::make(plan, u, kKeys, maps.of_keys);
  // Through a shuffle the compiler knows it as one for all lanes.
  const int blocks = key_blocks.count = shuffle(key_blocks.count, 0);
  if (thread == 0) {
    *unit = u;  // where it leaves the registers to the loop
    mbarrier_init(full_q, maps.of_keys && maps.of_q ? 1 : kGroupThreads);
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(full + i, maps.of_keys ? 1 : kGroupThreads);
      mbarrier_init(empty + i, kConsumers * 4);  // a lane a warp
    }
    fence_mbarrier_init();
  }
  __syncthreads();

  if (thread < kGroupThreads) {
    give_registers<40>();
    if (blocks > 0 && maps.of_keys) {
      produce_by_maps<T, kHeadDim, kKeys, kStages>(p, maps, u, q_tile, full_q, ring, full, empty,
                                                   key_blocks);
    } else if (blocks > 0) {
      produce<T, kHeadDim, kKeys, kStages>(p, plan, u, q_tile, full_q, ring, full, empty, blocks);
    }
    return;
  }
  take_registers<232>();
  const int warp = shuffle(thread / kWarpSize - 4, 0);  // of the consumers
  const int group = warp / 4, warp_row = warp * 16;
  RowKeys* const seen = all_seen + warp_row;
  if (lane < 16) {
    const int r = warp_row + lane;
    seen[lane] = u.row_keys(p, r < u.rows ? r : u.rows - 1);
  }
  __syncwarp();
  const RowKeys first_seen = seen[0], last_seen = seen[15];
  const uint64_t q_matrix = wgmma_matrix(q_tile + group * 64 * 64, 16);
  const uint64_t k_matrix = wgmma_matrix(ring, 16), v_matrix = wgmma_matrix(ring, kKeys * 128);

  const ScoreScale scale = score_scale(p);
  const float limit = scale.capped && scale.inner > 0 ? kMostOfCap / scale.inner : -1.0f;
  float output[1][kHeadDim / 8][4], s[kKeys / 8][4], factor[2];
  float (&o)[kHeadDim / 8][4] = output[0];
  uint32_t weights[kKeys / 16][4];
  QuadRows all_softmax[1];
  QuadRows& softmax = all_softmax[0];
  softmax.clear();
#pragma unroll
  for (int n = 0; n < kHeadDim / 8; ++n) o[n][0] = o[n][1] = o[n][2] = o[n][3] = 0;

  // Returns where in the ring the tile at this place of its order is, in bytes, once it has landed.
  const auto wait_for = [&](int place) {
    mbarrier_wait(full + place % kStages, place / kStages & 1);
    return place % kStages * kTileSize * 2;
  };
  const auto release = [&](int place) {
    __syncwarp();
    if (lane == 0) mbarrier_arrive(empty + place % kStages);
  };
  const auto weigh = [&](int block) {
    const int key = key_blocks.key(block, kKeys), end = key_blocks.end(block, kKeys);
    const bool masked = key < last_seen.first || key + kKeys > min(first_seen.end, end);
    if (!masked && all_within(s, limit)) {
      return softmax_capped_tile(s, scale, softmax, factor);
    }
    scale_scores(s, scale);
    if (masked) {
      RowKeys keys[2]{seen[lane / 4], seen[lane / 4 + 8]};
      keys[0].end = min(keys[0].end, end), keys[1].end = min(keys[1].end, end);
      mask_scores(s, keys, key);
    }
    softmax_tile(s, scale, softmax, factor);
  };

  const auto scores_of = [&](int place) {
    const uint64_t k = wgmma_matrix_behind(k_matrix, wait_for(place));
    wgmma_fence();
    start_scores<T, kHeadDim, kKeys>(s, wgmma_matrix_anew(q_matrix), k);
  };
  const auto add_values_of = [&](int place) {
    start_output<T, kHeadDim, kKeys>(o, weights, wgmma_matrix_behind(v_matrix, wait_for(place)));
  };

  if (blocks > 0) {
    mbarrier_wait(full_q, 0);
    scores_of(0);
    wgmma_wait<0>();
    keep_in_order(s);
    release(0);
    weigh(0);
    pack_weights<T>(weights, s);
    for (int block = 1; block < blocks; ++block) {
      const int k_at = k_place(block), v_at = v_place(block - 1, blocks);
      scores_of(k_at);
      add_values_of(v_at);
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
    const int tail = unit->keys - key_blocks.key(blocks - 1, kKeys);
    if (maps.of_keys && tail < kKeys) {
      T* const tile = ring + wait_for(v_at) / 2;
      clear_tail<kHeadDim, kKeys>(tile, tail, kGroupBarrier + group);
    }
    wgmma_fence();
    add_values_of(v_at);
    wgmma_wait<0>();
    keep_in_order(o);
  }

  // Rows of Q take the output, once all warps of the warpgroup are through with them.
  named_barrier_sync(kGroupBarrier + group, kGroupThreads);
  store_rows<T, kHeadDim, PanelLayout<kHeadDim, kRows>>(
      p, plan, *unit, warp_row, q_tile + warp_row * 64, output, all_softmax, scale.outer);
#endif
}

TileMaps make_maps(const AttentionParams& p, int keys) {
  TileMaps maps{};
  maps.of_keys = !p.block_table && map_keys(maps.k, p, p.k, keys) && map_keys(maps.v, p, p.v, keys);
  maps.of_q = maps.of_keys && map_rows(maps.q, p, p.q, kRows);
  return maps;
}

template <class T>
void launch_16_bit(const AttentionParams& p, const AttentionPlan& plan, dim3 grid,
                   cudaStream_t stream) {
  constexpr AttentionWgmma k128 = kAttentionWgmma128, k256 = kAttentionWgmma256;
  const TileMaps maps = make_maps(p, plan.head_dim == 128 ? k128.keys : k256.keys);
  if (plan.head_dim == 128) {
    launch("attention", attention_wgmma_kernel<T, 128, k128.keys, k128.stages>, grid, kThreads,
           plan.shared_bytes, stream, p, plan, maps);
  } else {
    launch("attention", attention_wgmma_kernel<T, 256, k256.keys, k256.stages>, grid, kThreads,
           plan.shared_bytes, stream, p, plan, maps);
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
