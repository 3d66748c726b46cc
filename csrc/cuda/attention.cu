// attention: the plan, the plain kernel, instantiations and launches.
#include "attention.cuh"

#include <stdlib.h>
#include <string.h>

#include "kernels.h"
#include "launch.cuh"

namespace gemma2 {
namespace cuda {

// attention_wgmma.cu, which cannot be emulated.
void launch_attention_wgmma(const AttentionParams& p, const AttentionPlan& plan, unsigned blocks,
                            cudaStream_t stream);

namespace {

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

constexpr int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

int padded_head_dim(int64_t head_dim) { return head_dim <= 64 ? 64 : head_dim <= 128 ? 128 : 256; }

// Blocks that share a multiprocessor: each has about 255 registers a thread and 1 KiB of the
// system's in shared memory.
int64_t resident_blocks(int64_t shared_bytes, int threads, const DeviceProperties& device) {
  constexpr int64_t kReserved = 1 << 10, kRegisters = 64 << 10;
  const int64_t by_memory = (device.shared_bytes + kReserved) / (shared_bytes + kReserved);
  return max64(1, min64(by_memory, kRegisters / (threads * 256)));
}

AttentionTile choose_tile(int head_dim, const DeviceProperties& device) {
  if (head_dim == 64) return kAttentionTile64;
  if (head_dim == 128) return kAttentionTile128;
  constexpr AttentionTile kSmall = kAttentionTile256, kLarge = kAttentionTile256Large;
  const bool two = resident_blocks(kSmall.shared_bytes(), kSmall.warps * kWarpSize, device) > 1;
  return two || kLarge.shared_bytes() > device.shared_bytes ? kSmall : kLarge;
}

// Hopper's own kernel has not run on hardware yet: it has to be asked for.
bool wants_wgmma(int head_dim, const DeviceProperties& device) {
  static const bool asked = [] {
    const char* value = getenv("GEMMA2_EXT_ATTENTION_WGMMA");
    return value != nullptr && strcmp(value, "1") == 0;
  }();
  return asked && device.compute_capability == 90 && head_dim >= 128;
}

// Of shapes and the device alone, never of lengths, which only the device knows.
AttentionPlan plan_attention(const AttentionParams& p, const DeviceProperties& device) {
  const int64_t rows = p.num_heads / p.num_kv_heads * p.seqlen_q;
  const int head_dim = padded_head_dim(p.head_dim);
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
    plan.shared_bytes = attention_decode_bytes(head_dim);
    plan.block_rows = kAttentionDecodeRows;
    plan.split_step = kAttentionDecodeStep;
    resident = resident_blocks(plan.shared_bytes, plan.threads, device);
  } else if (wants_wgmma(head_dim, device)) {
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
    resident = resident_blocks(plan.shared_bytes, plan.threads, device);
  }
  plan.row_blocks = divide_up(rows, plan.block_rows);
  // Where the blocks do not fill the device once, their keys are divided. A shorter split than this
  // would have more to do with starting and adding up than with its keys.
  constexpr int64_t kStepsPerSplit = 4;
  int64_t keys = p.window ? min64(p.window + p.seqlen_q - 1, p.seqlen_k) : p.seqlen_k;
  if (p.capacity) keys = min64(keys, p.capacity);
  const int64_t blocks = plan.row_blocks * p.batch * p.num_kv_heads;
  const int64_t fill = device.multiprocessors * resident / max64(1, blocks);
  plan.splits = max64(1, min64(fill, divide_up(keys, kStepsPerSplit * plan.split_step)));
  if (plan.splits > 1) {
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

template <class T, int kHeadDim>
void launch_decode(const AttentionParams& p, const AttentionPlan& plan, dim3 grid,
                   cudaStream_t stream) {
  launch("attention", attention_decode_kernel<T, kHeadDim, attention_decode_stages(kHeadDim)>, grid,
         plan.threads, plan.shared_bytes, stream, p, plan);
}

template <class T>
void launch_16_bit(const AttentionParams& p, const AttentionPlan& plan, dim3 grid,
                   cudaStream_t stream) {
  const int head_dim = plan.head_dim;
#ifdef __CUDACC__
  if (plan.kernel == AttentionKernel::kWgmma)
    return launch_attention_wgmma(p, plan, grid.x, stream);
#endif
  if (plan.kernel == AttentionKernel::kDecode) {
    if (head_dim == 64) return launch_decode<T, 64>(p, plan, grid, stream);
    if (head_dim == 128) return launch_decode<T, 128>(p, plan, grid, stream);
    return launch_decode<T, 256>(p, plan, grid, stream);
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

int64_t attention_partial_size(const AttentionParams& p) {
  return cuda::plan_attention(p, cuda::device_properties()).partial_size;
}

void launch_attention(const AttentionParams& p, cudaStream_t stream) {
  using namespace cuda;
  const char* op = "attention";
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
  }
  if (plan.splits == 1) return;
  dispatch_dtype(op, p.dtype, [&](auto t) {
    launch(op, attention_combine_kernel<decltype(t)>, dim3(unsigned(units)),
           kAttentionCombineThreads, 0, stream, p, plan);
  });
}

}  // namespace gemma2
