// out = softmax(softcap * tanh(scale * q k^T / softcap) + mask) v, with grouped query heads, causal
// and window masks, padding, variable lengths, ring and paged caches; shapes as in AttentionParams.
// Units of work: see attention.cuh. Source: FlashAttention-2 (arXiv 2307.08691), Flash-Decoding.
//
// Many rows: bound by the tensor cores and by reading shared memory. Up to 16: by memory. Float32:
// a warp a row. The splits of a row are added up in their order, so that results repeat exactly: by
// a launch of its own, or up to 8 by a cluster of blocks, each of which reads what the others have
// in shared memory.
// attention_tile_kernel: at most 255 registers, 161 KiB of shared memory (99 on most devices).
// attention_decode_kernel: at most 255 registers, 99 KiB of shared memory.
// attention_combine_kernel: at most 128 registers, 17 KiB of shared memory.
// attention_plain_kernel: at most 128 registers, no shared memory.
#include "attention_decode.cuh"
#include "kernels.h"
#include "launch.cuh"

namespace gemma2 {
namespace cuda {

// attention_wgmma.cu.
void launch_attention_wgmma(const AttentionParams& p, const AttentionPlan& plan, unsigned blocks,
                            cudaStream_t stream);

namespace {

// ---- many rows

// kWarps warps with kMTiles * 16 rows each. K and V tiles of kKeys keys alternate in a ring of
// kStages: tile t is K of the keys' block t / 2 where t is even, V where it is odd.
template <class T, int kHeadDim, int kWarps, int kMTiles, int kKeys, int kStages>
__global__ void __launch_bounds__(kWarps* kWarpSize)
    attention_tile_kernel(const AttentionParams p, const AttentionPlan plan) {
  constexpr int kRows = kWarps * kMTiles * 16, kThreads = kWarps * kWarpSize;
  constexpr int kTileSize = kKeys * kHeadDim, kKeyTiles = kKeys / 8;
  using Layout = RowLayout<kHeadDim>;
  constexpr int64_t kTileBytes = kAttentionTileBytes<kHeadDim, kWarps, kMTiles, kKeys, kStages>;
  clear_rows_of_no_sequence<T>(p);
  Unit<T> u;
  if (!make_unit(p, plan, blockIdx.x, u)) return;

  T* const q_tile = reinterpret_cast<T*>(shared_memory());
  T* const ring = q_tile + kRows * kHeadDim;
  const int thread = threadIdx.x, warp = thread / kWarpSize, lane = thread % kWarpSize;
  const int tiles = (u.keys + kKeys - 1) / kKeys * 2;

  const auto start_copy = [&](int tile, auto of_v, int stage) {
    if (tile < tiles) {
      copy_keys<Layout, kKeys, kThreads, of_v.value>(ring + stage * kTileSize, p, plan, u,
                                                     tile / 2 * kKeys, thread);
    }
    cp_async_commit();  // a group each, of no copies at the end, so that the waits count alike
  };
  copy_tile<Layout, kRows, kThreads>(q_tile, u.rows, int(p.head_dim), thread,
                                     [&](int row) { return query_row(p, u, row); });
  start_first_copies<kStages - 1>(start_copy);

  // Returns tile t, which is of V or not, once it has landed. The barrier also says that all warps
  // are through with tile t - 1, whose stage takes the next copy.
  int stage = 0;
  const auto next_tile = [&](int t, auto of_v) {
    cp_async_wait<kStages - 2>();
    __syncthreads();
    start_copy(t + kStages - 1, Flag<(of_v.value + kStages - 1) % 2>{},
               stage == 0 ? kStages - 1 : stage - 1);
    const T* tile = ring + stage * kTileSize;
    stage = stage == kStages - 1 ? 0 : stage + 1;
    return tile;
  };

  // The keys that the warp's rows see; rows behind the last are as the last one, a warp without
  // rows is idle.
  const int warp_row = warp * kMTiles * 16;
  Unit<T>* const unit = reinterpret_cast<Unit<T>*>(shared_memory() + kTileBytes);
  if (thread == 0) *unit = u;  // where it leaves the registers to the loop
  RowKeys* const seen = reinterpret_cast<RowKeys*>(unit + 1) + warp_row;
  for (int r = lane; r < kMTiles * 16; r += kWarpSize)
    seen[r] = u.row_keys(p, warp_row + r < u.rows ? warp_row + r : u.rows - 1);
  __syncwarp();
  const bool rows_left = warp_row < u.rows;
  const RowKeys first_seen = seen[0], last_seen = seen[kMTiles * 16 - 1];

  const ScoreScale scale = score_scale(p);
  float o[kMTiles][kHeadDim / 8][4];
  QuadRows softmax[kMTiles];
#pragma unroll
  for (int m = 0; m < kMTiles; ++m) {
    softmax[m].clear();
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) o[m][n][0] = o[m][n][1] = o[m][n][2] = o[m][n][3] = 0;
  }

  for (int t = 0; t < tiles; t += 2) {
    const int key = t / 2 * kKeys;
    // Some row of the warp sees some key of the block; not all rows see all keys.
    const bool busy = rows_left && key < last_seen.end && key + kKeys > first_seen.first;
    const bool masked = key < last_seen.first || key + kKeys > first_seen.end;

    const T* k_tile = next_tile(t, Flag<false>{});
    uint32_t weights[kMTiles][kKeyTiles / 2][4];
    if (busy) {
      float s[kMTiles][kKeyTiles][4] = {};
      multiply_keys<T, kHeadDim, kMTiles, kKeyTiles>(
          s, k_tile, [&](int step, uint32_t (&a)[kMTiles][4]) {
#pragma unroll
            for (int m = 0; m < kMTiles; ++m) {
              const int row = warp_row + 16 * m + lane % 16;
              ldmatrix_x4(a[m], q_tile + RowLayout<kHeadDim>::offset(row, 2 * step + lane / 16));
            }
          });
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) {
        scale_scores(s[m], scale);
        if (masked) {
          const RowKeys keys[2]{seen[16 * m + lane / 4], seen[16 * m + lane / 4 + 8]};
          mask_scores(s[m], keys, key);
        }
        float factor[2];
        softmax_tile(s[m], scale, softmax[m], factor);
        scale_output(o[m], factor);
        pack_weights<T>(weights[m], s[m]);
      }
    }
    const T* v_tile = next_tile(t + 1, Flag<true>{});
    if (busy) multiply_values<T, kHeadDim>(o, weights, v_tile);
  }

  if (tiles == 0) {  // nothing has said that q_tile and `unit` are there
    cp_async_wait<0>();
    __syncthreads();
  }
  if (!rows_left) return;
  store_rows<T, kHeadDim, Layout>(p, plan, *unit, warp_row, q_tile + warp_row * kHeadDim, o,
                                  softmax, scale.outer);
}

// ---- few rows

// Row r of all splits, each of which a block of the cluster has in its shared memory: all of it on
// the way at once. Added up in their order, and stored.
template <int kHeadDim, class T, class Keys>
GEMMA2_DEVICE void add_cluster(const AttentionParams& p, const AttentionPlan& plan,
                               const Unit<T, Keys>& u, int r, const float* outputs,
                               const float* all_largest, const float* all_sums) {
  constexpr int kParts = kHeadDim / kWarpSize;
  const int lane = read_lane();
  float values[kAttentionCluster][kParts] = {};
  const float* const row = outputs + r * kOutputStride<kHeadDim> + lane;
#pragma unroll
  for (int s = 0; s < kAttentionCluster; ++s) {
    if (s < plan.cluster) load_of_block(values[s], row, s);
  }
  float largest[1] = {}, sum[1] = {};  // of the lane's split; 0: no key
  if (lane < plan.cluster) {
    load_of_block(largest, all_largest + r, lane);
    load_of_block(sum, all_sums + r, lane);
  }
  RowResult result{{}, warp_max(sum[0] == 0 ? -INFINITY : largest[0]), 0.0f};
  const float base = result.largest == -INFINITY ? 0.0f : result.largest;
  const float weight = sum[0] == 0 ? 0.0f : exp2f(largest[0] - base);
#pragma unroll
  for (int s = 0; s < kAttentionCluster; ++s) {
    const float of_split = shuffle(weight, s);
    result.sum += shuffle(weight * sum[0], s);
#pragma unroll
    for (int j = 0; j < kParts; ++j) {
      const float more = fmaf(of_split, values[s][j], result.o[j]);  // so every value has come
      if (of_split != 0) result.o[j] = more;
    }
  }
  store_out(p, u, r, result);
}

// Up to 16 rows. Of each run of kAttentionDecodeStep keys warp w has 16 to itself, with a ring of
// K and V tiles that no other warp reads: but for a token to append no barrier of the block is met
// before the end, where the warps' results are added up; then those of the splits by their cluster.
template <class Tiles>
__global__ void __launch_bounds__(kAttentionDecodeWarps* kWarpSize)
    attention_decode_kernel(const AttentionParams p, const AttentionPlan plan) {
  using T = typename Tiles::Element;
  using Keys = typename Tiles::Keys;
  constexpr int kWarps = kAttentionDecodeWarps, kKeys = kDecodeKeys;
  constexpr int kHeadDim = Tiles::kHeadDim, kStages = Tiles::kStages;
  constexpr int kRingBytes = kStages * Tiles::kStageBytes;
  allow_next_kernel();
  Unit<T, Keys> u;
  const bool busy = make_unit(p, plan, blockIdx.x, u);

  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  unsigned char* const ring = shared_memory() + warp * kRingBytes;
  Unit<T, Keys>* const unit =
      reinterpret_cast<Unit<T, Keys>*>(shared_memory() + kWarps * kRingBytes);
  const int first_key = warp * kKeys;
  // The row's last token, which is not in the cache yet: the unit's last key, of one of its warps.
  using Token = NewToken<T, kHeadDim>;
  Token* const token =
      reinterpret_cast<Token*>(shared_memory() + kWarps * kRingBytes + kAttentionUnitBytes);
  const auto appends = [&] { return Tiles::kAppends && p.inv_freq; };
  const auto has_token = [&](const Unit<T, Keys>& u) {
    return u.stored < u.keys && u.stored / kKeys % kWarps == warp;
  };
  if (appends() && busy && u.keys > 0 && u.key_begin + u.keys == u.length) u.stored = u.keys - 1;
  const int tiles = busy && u.keys > first_key
                        ? (u.keys - first_key + kWarps * kKeys - 1) / (kWarps * kKeys) * 2
                        : 0;
  // Tile t is K of the warp's run t / 2 of keys where t is even, V where it is odd. Short code: in
  // a decoding step each kernel runs once a layer, and what the instruction cache loses it waits
  // for.
  const auto start_copy = [&](int tile, int stage) {
    if (tile < tiles) {
      const int key = first_key + tile / 2 * (kWarps * kKeys);
      Tiles::start_copy(ring + stage * Tiles::kStageBytes, p, plan, u, tile % 2, key, lane);
    }
    cp_async_commit();  // of nothing at the end, so that the waits count alike
  };
  // The first tiles are on their way early where no kernel in front may write to them: the last
  // seqlen_q keys of a cache are new. (Factors of int8 would come through the first-level cache,
  // which may hold a sector of theirs and a new one's.)
  constexpr int kLastOfFirst = (kStages - 2) / 2 * (kWarps * kKeys) + kKeys - 1;
  const int last_key = min(first_key + kLastOfFirst, busy ? u.keys - 1 : 0);
  const bool early = appends() || (sizeof(Keys) > 1 && busy && p.key_lengths &&
                                   u.key_begin + last_key < u.length - u.seqlen_q);
  if (!early) wait_for_previous_kernels();
#pragma unroll 1
  for (int tile = 0; tile < kStages - 1; ++tile) start_copy(tile, tile);
  Angle angle{};
  if (appends() && busy) angle = token->make_angle(p, u.length - 1);
  wait_for_previous_kernels();
  clear_rows_of_no_sequence<T>(p);
  if (!busy) return;

  if (threadIdx.x == 0) *unit = u;  // where it leaves the registers to the loop
  // Q as mma's operand a, for the whole head; zero in rows and columns that do not exist.
  uint32_t q[kHeadDim / 16][4] = {};
  if (!appends()) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int r = lane / 4 + 8 * i;
      if (r < u.rows) Tiles::load_query(q, i, query_row(p, u, r), int(p.head_dim), lane);
    }
  } else if constexpr (Tiles::kAppends) {
    // Through the stage of the first warp's ring that no copy is on its way to yet.
    T* const q_tile = reinterpret_cast<T*>(shared_memory() + (kStages - 1) * Tiles::kStageBytes);
    token->rotate(p, plan, u, angle, q_tile);
    __syncthreads();
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
      ldmatrix_x4(q[step], q_tile + RowLayout<kHeadDim>::offset(lane % 16, 2 * step + lane / 16));
    }
    __syncthreads();  // the stage takes its copy
  }
  int stage = 0;
  const auto next_tile = [&](int t) {
    cp_async_wait<kStages - 2>();
    __syncwarp();
    start_copy(t + kStages - 1, stage == 0 ? kStages - 1 : stage - 1);
    unsigned char* tile = ring + stage * Tiles::kStageBytes;
    stage = stage == kStages - 1 ? 0 : stage + 1;
    if constexpr (Tiles::kAppends) {
      if (t >= tiles - 2 && appends() && has_token(*unit))
        token->put(tile, t % 2, unit->stored % kKeys, lane);
    }
    return static_cast<const unsigned char*>(tile);
  };

  RowKeys seen[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) seen[i] = u.row_keys(p, min(lane / 4 + 8 * i, u.rows - 1));

  const ScoreScale scale = score_scale(p);
  Tiles::begin(seen);
  float o[1][kHeadDim / 8][4] = {};
  QuadRows softmax;
  softmax.clear();
#pragma unroll 1
  for (int t = 0; t < tiles; t += 2) {
    const unsigned char* k_tile = next_tile(t);
    float s[1][2][4] = {}, factor[2];
    Tiles::multiply_keys(s, k_tile, q, lane);
    scale_scores(s[0], scale);
    Tiles::mask(s, seen, first_key + t / 2 * (kWarps * kKeys));
    softmax_tile(s[0], scale, softmax, factor);
    Tiles::add_values(o, s, factor, lane, [&] { return next_tile(t + 1); });
  }

  __syncthreads();  // the rings' memory takes the warps' outputs
  constexpr int kWarpOutput = 16 * kOutputStride<kHeadDim>;
  float* const outputs = reinterpret_cast<float*>(shared_memory());
  float* const all_largest = outputs + kWarps * kWarpOutput;  // (warps, 16)
  float* const all_sums = all_largest + kWarps * 16;
  const int own_lane = read_lane();
  Tiles::spill(outputs + warp * kWarpOutput, o, unit->rows, own_lane);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float row_sum = quad_sum(softmax.sum[i]);
    if (own_lane % 4 == 0) {
      all_largest[warp * 16 + 8 * i + own_lane / 4] = softmax.largest[i] * scale.outer;
      all_sums[warp * 16 + 8 * i + own_lane / 4] = row_sum;
    }
  }
  __syncthreads();
  for (int r = warp; r < unit->rows; r += kWarps) {
    RowResult result{{}, -INFINITY, 0.0f};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float* output = outputs + w * kWarpOutput + r * kOutputStride<kHeadDim>;
      add_result(result, all_largest[w * 16 + r], all_sums[w * 16 + r], [&](int j) {
        return j < kHeadDim / kWarpSize ? output[own_lane + j * kWarpSize] : 0.0f;
      });
    }
    mend_row<Tiles::kAppends ? kHeadDim : 0>(p, plan, *unit, r, result,
                                             appends() ? token->angles : nullptr);
    if (plan.cluster == 1) {
      store_row(p, plan, *unit, r, result);
      continue;
    }
    // Where the first warp's were, which this warp alone reads; mend_row's ballot came behind that.
#pragma unroll
    for (int j = 0; j < kHeadDim / kWarpSize; ++j)
      outputs[r * kOutputStride<kHeadDim> + own_lane + j * kWarpSize] = result.o[j];
    if (own_lane == 0) all_largest[r] = result.largest, all_sums[r] = result.sum;
  }
  if (plan.cluster == 1) return;
  cluster_barrier();
  for (int r = int(unit->split) * kWarps + warp; r < unit->rows; r += plan.cluster * kWarps)
    add_cluster<kHeadDim>(p, plan, *unit, r, outputs, all_largest, all_sums);
  cluster_barrier_after_reads();  // no block ends before the others have read what it has
}

// A block a row: sum over the splits of 2^(largest - largest of all) times their results. A warp
// has every kCombineWarps-th split, several on the way together; the warps' sums are added in
// order.
template <class T>
__global__ void __launch_bounds__(kAttentionCombineThreads)
    attention_combine_kernel(const AttentionParams p, const AttentionPlan plan) {
  constexpr int kWarps = kAttentionCombineThreads / kWarpSize, kAtOnce = 4;
  allow_next_kernel();
  AttentionPlan whole = plan;
  whole.splits = 1;
  Unit<T> u;
  const int r = blockIdx.y;
  const bool busy = make_unit(p, whole, blockIdx.x, u) && r < u.rows;
  wait_for_previous_kernels();
  if (!busy) return;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int splits = int(plan.splits), head_dim = int(p.head_dim);
  const float* const parts = partial_row(p, plan, u, 0, r);
  const int64_t stride = plan.block_rows * (p.head_dim + 2);

  float values[kAtOnce][kLaneDims], own[kAtOnce][2];  // of kAtOnce splits from `first` on
  const auto load = [&](int first) {
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int s = first + i * kWarps;
      const float* part = parts + (s < splits ? s : 0) * stride;
#pragma unroll
      for (int j = 0; j < kLaneDims; ++j) {
        const int d = lane + j * kWarpSize;
        values[i][j] = d < head_dim ? part[d] : 0.0f;
      }
      own[i][0] = part[head_dim];
      own[i][1] = s < splits ? part[head_dim + 1] : 0.0f;  // 0: no key
    }
  };
  load(warp);  // on the way while the largest is looked for
  float largest = -INFINITY;
  for (int s = lane; s < splits; s += kWarpSize) {
    const float* part = parts + s * stride + head_dim;
    if (part[1] != 0) largest = fmaxf(largest, part[0]);
  }
  largest = warp_max(largest);
  const float base = largest == -INFINITY ? 0.0f : largest;
  float o[kLaneDims] = {}, sum = 0;
  for (int first = warp; first < splits; first += kAtOnce * kWarps) {
    if (first != warp) load(first);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (own[i][1] == 0) continue;
      const float weight = exp2f(own[i][0] - base);
      sum += weight * own[i][1];
#pragma unroll
      for (int j = 0; j < kLaneDims; ++j) o[j] += weight * values[i][j];
    }
  }
  // scratch[warp]: head_dim sums of outputs, and that of the weights.
  float* const scratch = reinterpret_cast<float*>(shared_memory());
  float* const mine = scratch + warp * (head_dim + 1);
#pragma unroll
  for (int j = 0; j < kLaneDims; ++j) {
    const int d = lane + j * kWarpSize;
    if (d < head_dim) mine[d] = o[j];
  }
  if (lane == 0) mine[head_dim] = sum;
  __syncthreads();

  if (int(threadIdx.x) >= head_dim) return;
  float total = 0;
  sum = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    total += scratch[w * (head_dim + 1) + threadIdx.x];
    sum += scratch[w * (head_dim + 1) + head_dim];
  }
  const int64_t i = u.q_offset + u.query(r), head = u.head(r);
  T* out = static_cast<T*>(p.out.data) + u.batch * p.out.batch_stride + i * p.out.seqlen_stride +
           head * p.out.head_stride;
  out[threadIdx.x] = from_float<T>(sum == 0 ? 0.0f : total * (1.0f / sum));
  if (p.lse && threadIdx.x == 0) {
    p.lse[u.batch * p.lse_batch_stride + head * p.lse_head_stride + i] =
        sum == 0 ? -INFINITY : largest * kLn2 + logf(sum);
  }
}

// ---- float32

constexpr int kPlainThreads = kAttentionPlainRows * kWarpSize;

// A warp a row, in float32.
__global__ void __launch_bounds__(kPlainThreads, 4)
    attention_plain_kernel(const AttentionParams p, const AttentionPlan plan) {
  clear_rows_of_no_sequence<float>(p);
  Unit<float> u;
  if (!make_unit(p, plan, blockIdx.x, u)) return;
  const int r = threadIdx.x / kWarpSize;
  if (r >= u.rows) return;
  RowResult result;
  plain_row(p, plan, u, r, result);
  store_row(p, plan, u, r, result);
}

// ---- how the work is divided

constexpr int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

int padded_head_dim(int64_t head_dim) { return head_dim <= 64 ? 64 : head_dim <= 128 ? 128 : 256; }

constexpr int kRegisters = 256;  // a thread, about, in the kernels with tiles

AttentionTile choose_tile(int head_dim, const DeviceProperties& device) {
  if (head_dim == 64) return kAttentionTile64;
  if (head_dim == 128) return kAttentionTile128;
  constexpr AttentionTile kSmall = kAttentionTile256, kLarge = kAttentionTile256Large;
  const bool two =
      resident_blocks(kSmall.shared_bytes(), kSmall.warps * kWarpSize, kRegisters, device) > 1;
  return two || kLarge.shared_bytes() > device.shared_bytes ? kSmall : kLarge;
}

// Below two blocks of rows of Hopper's own kernel the smaller tiles fill the device better.
bool wants_wgmma(int64_t rows, int head_dim, const DeviceProperties& device) {
  return has_wgmma(device) && head_dim >= 128 && rows >= 2 * kAttentionWgmmaRows;
}

// Of one key head, and of the longest sequence.
int64_t group_rows(const AttentionParams& p) { return p.num_heads / p.num_kv_heads * p.seqlen_q; }

// Of shapes and the device alone, never of lengths, which only the device knows.
AttentionPlan plan_attention(const AttentionParams& p, const DeviceProperties& device) {
  const int64_t rows = group_rows(p);
  int head_dim = padded_head_dim(p.head_dim);
  if (p.k_scales.data && head_dim < 128) head_dim = 128;
  AttentionPlan plan{};
  plan.k_stride = int(p.k.seqlen_stride), plan.v_stride = int(p.v.seqlen_stride);
  plan.capacity = p.capacity ? int(p.capacity) : INT_MAX;
  plan.head_dim = head_dim;
  int64_t resident = 4;
  if (p.dtype == DType::kFloat32) {
    plan.kernel = AttentionKernel::kPlain;
    plan.threads = kPlainThreads;
    plan.block_rows = kAttentionPlainRows;
    plan.split_step = kWarpSize;
  } else if (rows <= kAttentionDecodeRows) {
    plan.kernel = AttentionKernel::kDecode;
    plan.threads = kAttentionDecodeWarps * kWarpSize;
    plan.shared_bytes =
        p.k_scales.data ? attention_int8_bytes(head_dim) : attention_decode_bytes(head_dim);
    if (p.inv_freq) plan.shared_bytes += attention_append_bytes(head_dim);
    plan.block_rows = kAttentionDecodeRows;
    plan.split_step = kAttentionDecodeStep;
    resident = resident_blocks(plan.shared_bytes, plan.threads, kRegisters, device);
  } else if (wants_wgmma(rows, head_dim, device)) {
    const AttentionWgmma tile = head_dim == 128 ? kAttentionWgmma128 : kAttentionWgmma256;
    plan.kernel = AttentionKernel::kWgmma;
    plan.threads = kAttentionWgmmaThreads;
    plan.shared_bytes = tile.shared_bytes();
    plan.block_rows = kAttentionWgmmaRows;
    plan.split_step = tile.keys;
    resident = 1;
  } else {
    plan.kernel = AttentionKernel::kTile;
    plan.tile = choose_tile(head_dim, device);
    plan.threads = plan.tile.warps * kWarpSize;
    plan.shared_bytes = plan.tile.shared_bytes();
    plan.block_rows = plan.tile.rows();
    plan.split_step = plan.tile.keys;
    resident = resident_blocks(plan.shared_bytes, plan.threads, kRegisters, device);
  }
  plan.row_blocks = divide_up(rows, plan.block_rows);
  // Where the blocks do not fill the device once, their keys are divided. Of many rows a shorter
  // split than this would have more to do with starting and adding up than with its keys.
  const int64_t steps_per_split = plan.kernel == AttentionKernel::kDecode ? 1 : 4;
  int64_t keys = p.window ? min64(p.window + p.seqlen_q - 1, p.seqlen_k) : p.seqlen_k;
  if (p.capacity) keys = min64(keys, p.capacity);
  const int64_t blocks = plan.row_blocks * p.batch * p.num_kv_heads;
  const int64_t fill = device.multiprocessors * resident / max64(1, blocks);
  plan.splits = max64(1, min64(fill, divide_up(keys, steps_per_split * plan.split_step)));
  // A cluster adds up its blocks' splits itself, in place of a second launch. Of few keys that is
  // worth blocks that are left idle.
  constexpr int64_t kFewKeys = 1024;
  plan.cluster = 1;
  if (plan.kernel == AttentionKernel::kDecode && device.clusters) {
    if (keys <= kFewKeys) plan.splits = min64(plan.splits, kAttentionCluster);
    if (plan.splits <= kAttentionCluster) plan.cluster = int(plan.splits);
  }
  if (plan.splits > plan.cluster) {
    plan.partial_size = blocks * plan.splits * plan.block_rows * (p.head_dim + 2);
  }
  return plan;
}

// ---- launches

template <class T, int kHeadDim, int kWarps, int kMTiles, int kKeys, int kStages>
void launch_tile(const AttentionParams& p, const AttentionPlan& plan, dim3 grid,
                 cudaStream_t stream) {
  launch("attention", attention_tile_kernel<T, kHeadDim, kWarps, kMTiles, kKeys, kStages>, grid,
         plan.threads, plan.shared_bytes, stream, p, plan);
}

template <class Tiles>
void launch_decode(const AttentionParams& p, const AttentionPlan& plan, dim3 grid,
                   cudaStream_t stream) {
  if (plan.cluster > 1) {
    return launch_clusters("attention", attention_decode_kernel<Tiles>, plan.cluster, grid,
                           plan.threads, plan.shared_bytes, stream, p, plan);
  }
  launch_early("attention", attention_decode_kernel<Tiles>, grid, plan.threads, plan.shared_bytes,
               stream, p, plan);
}

template <class T>
void launch_16_bit(const AttentionParams& p, const AttentionPlan& plan, dim3 grid,
                   cudaStream_t stream) {
  const int head_dim = plan.head_dim;
  if (plan.kernel == AttentionKernel::kWgmma)
    return launch_attention_wgmma(p, plan, grid.x, stream);
  if (plan.kernel == AttentionKernel::kDecode) {
    if (p.k_scales.data) {
      if (head_dim == 128) return launch_decode<Int8DecodeTiles<T, 128>>(p, plan, grid, stream);
      return launch_decode<Int8DecodeTiles<T, 256>>(p, plan, grid, stream);
    }
    if (head_dim == 64) return launch_decode<DecodeTiles<T, 64>>(p, plan, grid, stream);
    if (head_dim == 128) return launch_decode<DecodeTiles<T, 128>>(p, plan, grid, stream);
    return launch_decode<DecodeTiles<T, 256>>(p, plan, grid, stream);
  }
#define GEMMA2_LAUNCH_TILE(t) \
  return launch_tile<T, t.head_dim, t.warps, t.m_tiles, t.keys, t.stages>(p, plan, grid, stream)
  if (head_dim == 64) GEMMA2_LAUNCH_TILE(kAttentionTile64);
  if (head_dim == 128) GEMMA2_LAUNCH_TILE(kAttentionTile128);
  if (plan.tile.warps == kAttentionTile256.warps) GEMMA2_LAUNCH_TILE(kAttentionTile256);
  GEMMA2_LAUNCH_TILE(kAttentionTile256Large);
#undef GEMMA2_LAUNCH_TILE
}

}  // namespace
}  // namespace cuda

bool attention_appends(const AttentionParams& p) {
  return p.dtype != DType::kFloat32 && !p.k_scales.data && !p.block_table && p.seqlen_q == 1 &&
         cuda::group_rows(p) <= cuda::kAttentionDecodeRows &&
         p.head_dim == cuda::padded_head_dim(p.head_dim);
}

bool attention_reads_int8(const AttentionParams& p) {
  bool reads = p.dtype != DType::kFloat32 && cuda::group_rows(p) <= cuda::kAttentionDecodeRows &&
               p.head_dim % 16 == 0;
  for (const HeadsView* t : {&p.k, &p.v}) {
    reads = reads && cuda::is_aligned(t->data, t->batch_stride) &&
            cuda::is_aligned(t->data, t->seqlen_stride) &&
            cuda::is_aligned(t->data, t->head_stride) && t->seqlen_stride <= INT_MAX;
  }
  return reads;
}

int64_t attention_partial_size(const AttentionParams& p) {
  return cuda::plan_attention(p, cuda::device_properties()).partial_size;
}

void launch_attention(const AttentionParams& p, cudaStream_t stream) {
  using namespace cuda;
  const char* op = "attention";
  if (p.k_scales.data && !attention_reads_int8(p))
    throw std::invalid_argument("gemma2_ext::attention: this cache of int8 has to be widened");
  if (p.inv_freq && !attention_appends(p))
    throw std::invalid_argument("gemma2_ext::attention: this token has to be appended first");
  const AttentionPlan plan = plan_attention(p, device_properties());
  const int64_t units = plan.row_blocks * p.batch * p.num_kv_heads;
  if (units == 0) return;
  if (units * plan.splits > INT_MAX || plan.row_blocks * plan.block_rows > INT_MAX) {
    throw std::invalid_argument("gemma2_ext::attention: too many rows for CUDA: " +
                                std::to_string(units * plan.block_rows));
  }
  const dim3 grid(unsigned(units * plan.splits));
  switch (p.dtype) {
    case DType::kFloat32:
      launch(op, attention_plain_kernel, grid, plan.threads, 0, stream, p, plan);
      break;
    case DType::kBFloat16:
      launch_16_bit<BFloat16>(p, plan, grid, stream);
      break;
    case DType::kFloat16:
      launch_16_bit<Half>(p, plan, grid, stream);
      break;
    case DType::kFloat64:
      throw std::invalid_argument("gemma2_ext::attention: no float64 on CUDA");
  }
  if (plan.splits == plan.cluster) return;
  const int64_t combined = min64(group_rows(p), plan.block_rows);
  dispatch_dtype(op, p.dtype, [&](auto t) {
    launch_early(op, attention_combine_kernel<decltype(t)>,
                 dim3(unsigned(units), unsigned(combined)), kAttentionCombineThreads,
                 kAttentionCombineThreads / kWarpSize * (p.head_dim + 1) * int64_t(sizeof(float)),
                 stream, p, plan);
  });
}

}  // namespace gemma2
