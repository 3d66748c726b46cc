// attention for many rows on Hopper (sm_90a): 64 rows a consumer warpgroup, two of them, and a
// producer warpgroup that copies K and V tiles. Shapes, units and results as in attention.cuh.
//
// Tiles come in the order K0, K1, V0, K2, V1, ... through a ring. While the tensor cores compute a
// tile's scores and the output of the tile before, the other warpgroup's softmax runs. Copies are
// bulk tensor copies, which one thread starts; of rings and pages, and where the driver has no such
// maps, cp.async by the whole producer. Bound by the tensor cores, then by tanh and exp2: at
// head_dim 128, where a score costs half as many products, tanh is a polynomial.
// attention_wgmma_kernel: at most 168 registers (40 and 232 by warpgroup), 226 KiB of shared
// memory. Source: FlashAttention-3 (arXiv 2407.08608), its tile of 128 x 80 for head_dim 256.
#include <cuda.h>

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

// K and V as bulk tensor copies see them, where `used`.
struct KeyMaps {
  CUtensorMap k, v;
  bool used;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

constexpr int kEndBarrier = 1, kTailBarrier = 2;  // the last one a warpgroup

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

// The same by bulk tensor copies, which one thread starts.
template <class T, int kHeadDim, int kKeys, int kStages>
GEMMA2_DEVICE void produce_by_maps(const AttentionParams& p, const KeyMaps& maps, const Unit<T>& u,
                                   T* q_tile, uint64_t* full_q, T* ring, uint64_t* full,
                                   uint64_t* empty, int blocks) {
  const int thread = threadIdx.x;
  const int slot = int(u.k_offset + u.key_begin), kv_head = int(u.kv_head);
  const int batch = p.cu_seqlens_k ? 0 : int(u.batch);
  const auto copy = [&](int place, const CUtensorMap& map, int block) {
    const int stage = place % kStages;
    mbarrier_wait(empty + stage, (place / kStages & 1) ^ 1);
    mbarrier_arrive_and_expect(full + stage, kKeys * kHeadDim * 2);
    T* const tile = ring + stage * kKeys * kHeadDim;
#pragma unroll
    for (int panel = 0; panel < kHeadDim / 64; ++panel) {
      copy_box(tile + panel * kKeys * 64, &map, panel * 64, slot + block * kKeys, kv_head, batch,
               full + stage);
    }
  };
  if (thread == 0) copy(0, maps.k, 0);
  copy_tile<PanelLayout<kHeadDim, kRows>, kRows, kGroupThreads, 4>(
      q_tile, u.rows, int(p.head_dim), thread, [&](int row) { return query_row(p, u, row); });
  cp_async_commit();
  cp_async_wait<0>();
  fence_shared_for_wgmma();
  mbarrier_arrive(full_q);
  if (thread != 0) return;
  for (int block = 1; block < blocks; ++block) {
    copy(k_place(block), maps.k, block);
    copy(v_place(block - 1, blocks), maps.v, block - 1);
  }
  copy(v_place(blocks - 1, blocks), maps.v, blocks - 1);
}

// Zeros in rows `begin` on of a V tile: a weight of 0 must not meet what stands behind the keys. By
// a warpgroup that has seen the copy land; both may, as they write the same.
template <class T, int kHeadDim, int kKeys>
GEMMA2_DEVICE void clear_tail(T* tile, int begin, int barrier) {
  constexpr int kPanels = kHeadDim / 64;
  const int chunks = (kKeys - begin) * 8;
#pragma unroll 1
  for (int i = threadIdx.x % kGroupThreads; i < chunks * kPanels; i += kGroupThreads) {
    const int panel = i % kPanels, chunk = i / kPanels;
    store_16(tile + panel * kKeys * 64 + begin * 64 + chunk * 8, Vector16{{0, 0, 0, 0}});
  }
  fence_shared_for_wgmma();
  named_barrier_sync(barrier, kGroupThreads);
}

// softmax_tile of dot products that are all seen and at most 1 / inner in size, with a soft-cap:
// tanh(x) = x P(x^2) for |x| <= 1 by a minimax fit. Absolute error 3e-7, as tanh_by_exp's, without
// the unit that exp2 needs.
template <int kTiles>
GEMMA2_DEVICE void softmax_capped_tile(float (&s)[kTiles][4], const ScoreScale& c, QuadRows& rows,
                                       float (&factor)[2]) {
  const float inverse_outer = reciprocal_approx(c.outer);
  const float terms[6]{0.9999968539f * c.outer, -0.3332400377f * c.outer,
                       0.1325352513f * c.outer, -0.0509728597f * c.outer,
                       0.0161141762f * c.outer, -0.0028394638f * c.outer};
  const auto exponent = [&](float dot, float base) {
    const float x = dot * c.inner, x2 = x * x;
    float sum = terms[5];
#pragma unroll
    for (int i = 4; i >= 0; --i) sum = fmaf(sum, x2, terms[i]);
    return fmaf(x, sum, -base);
  };
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float largest = -INFINITY;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) largest = fmaxf(largest, fmaxf(s[n][2 * i], s[n][2 * i + 1]));
    largest = fmaxf(rows.largest[i], exponent(quad_max(largest), 0.0f) * inverse_outer);
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
    attention_wgmma_kernel(const AttentionParams p, const AttentionPlan plan,
                           const __grid_constant__ KeyMaps maps) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr bool kPolynomial = kHeadDim == 128;
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
      mbarrier_init(full + i, maps.used ? 1 : kGroupThreads);
      mbarrier_init(empty + i, kConsumers * 4);  // a lane a warp
    }
    fence_mbarrier_init();
  }
  if (thread < kRows) all_seen[thread] = u.row_keys(p, thread < u.rows ? thread : u.rows - 1);
  __syncthreads();

  if (thread < kGroupThreads) {
    give_registers<40>();
    if (blocks > 0 && maps.used) {
      produce_by_maps<T, kHeadDim, kKeys, kStages>(p, maps, u, q_tile, full_q, ring, full, empty,
                                                   blocks);
    } else if (blocks > 0) {
      produce<T, kHeadDim, kKeys, kStages>(p, plan, u, q_tile, full_q, ring, full, empty, blocks);
    }
    return;
  }
  take_registers<232>();
  const int group = thread / kGroupThreads - 1, group_row = group * 64;
  const int warp_row = group_row + thread % kGroupThreads / kWarpSize * 16;
  const RowKeys* const seen = all_seen + warp_row;
  const RowKeys first_seen = seen[0], last_seen = seen[15];
  const T* const q_rows = q_tile + group_row * 64;

  const ScoreScale scale = score_scale(p);
  const float limit = scale.capped && scale.inner > 0 ? 1.0f / scale.inner : -1.0f;
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
    const bool masked = key < last_seen.first || key + kKeys > first_seen.end;
    if (kPolynomial && !masked && all_within(s, limit)) {
      return softmax_capped_tile(s, scale, softmax, factor);
    }
    scale_scores(s, scale);
    if (masked) {
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
    T* const v_tile = wait_for(v_at);
    const int tail = unit->keys - (blocks - 1) * kKeys;
    if (maps.used && tail < kKeys) {
      clear_tail<T, kHeadDim, kKeys>(v_tile, tail, kTailBarrier + group);
    }
    wgmma_fence();
    start_output<T, kHeadDim, kKeys>(o, weights, v_tile);
    wgmma_wait<0>();
    keep_in_order(o);
  }

  // The tiles' memory takes the output once both warpgroups are through with the tiles.
  named_barrier_sync(kEndBarrier, kConsumers * kGroupThreads);
  float* const outputs = reinterpret_cast<float*>(shared_memory());
  float* const rows = outputs + warp_row * kOutputStride<kHeadDim>;
  float* const largest = outputs + kRows * kOutputStride<kHeadDim> + warp_row;
  float* const sum = largest + kRows;
  spill_output<kHeadDim>(rows, o, lane);
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

using Encode = decltype(&cuTensorMapEncodeTiled);

// The driver's function, by the runtime, so that nothing links to the driver; null where it is
// missing.
Encode find_encode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                             12000, cudaEnableDefault, &found);
#else
  const cudaError_t error =
      cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
  if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) {
    cudaGetLastError();
    return nullptr;
  }
  return reinterpret_cast<Encode>(function);
}

// Boxes of `keys` keys by 64 columns. Returns false where a bulk copy cannot take these strides.
bool encode(CUtensorMap& map, const AttentionParams& p, const HeadsView& view, int keys) {
  static const Encode function = find_encode();
  if (function == nullptr) return false;
  const bool packed = p.cu_seqlens_k != nullptr;
  const cuuint64_t sizes[4]{cuuint64_t(p.head_dim), cuuint64_t(packed ? p.total_k : p.seqlen_k),
                            cuuint64_t(p.num_kv_heads), cuuint64_t(packed ? 1 : p.batch)};
  const int64_t distances[3]{view.seqlen_stride, view.head_stride, view.batch_stride};
  cuuint64_t strides[3];  // bytes; that of a single one is not used, but checked
  for (int i = 0; i < 3; ++i) strides[i] = sizes[i + 1] == 1 ? 16 : cuuint64_t(distances[i]) * 2;
  const cuuint32_t box[4]{64, cuuint32_t(keys), 1, 1}, steps[4]{1, 1, 1, 1};
  const CUtensorMapDataType type = p.dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                               : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  return function(&map, type, 4, const_cast<void*>(view.data), sizes, strides, box, steps,
                  CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                  CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

KeyMaps make_maps(const AttentionParams& p, int keys) {
  KeyMaps maps{};
  maps.used =
      !p.block_table && !p.capacity && encode(maps.k, p, p.k, keys) && encode(maps.v, p, p.v, keys);
  return maps;
}

template <class T>
void launch_16_bit(const AttentionParams& p, const AttentionPlan& plan, dim3 grid,
                   cudaStream_t stream) {
  constexpr AttentionWgmma k128 = kAttentionWgmma128, k256 = kAttentionWgmma256;
  const KeyMaps maps = make_maps(p, plan.head_dim == 128 ? k128.keys : k256.keys);
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
