// Gradients of attention. With z = scale q k^T, s = softcap tanh(z / softcap), p = exp(s - lse) and
// term = sum(grad_out * out) - grad_lse of each row:
//   grad_v = p^T grad_out,  ds = p * (grad_out v^T - term) * (1 - tanh^2),
//   grad_q = scale ds k,    grad_k = scale ds^T q.
//
// Rows, units and masks as in attention.cuh. A block has 64 rows and goes over the keys that they
// see (grad_q), or 64 keys and goes over the rows that see them, of all heads of a group (grad_k or
// grad_v): nothing is added up between blocks, so results repeat exactly. Three products for grad_q
// and grad_k, two for grad_v, where five in all would do with sums between blocks; the tensor cores
// bound it. Float32: a warp a row or a key. Source: FlashAttention-2 (arXiv 2307.08691).
// attention_backward_terms_kernel: at most 64 registers, no shared memory.
// attention_backward_rows_kernel: at most 255 registers, 98 KiB of shared memory.
// attention_backward_keys_kernel: at most 255 registers, 98 KiB of shared memory.
// attention_backward_plain_rows_kernel: at most 128 registers, no shared memory.
// attention_backward_plain_keys_kernel: at most 128 registers, no shared memory.
#include "attention_backward.cuh"
#include "kernels.h"
#include "launch.cuh"

namespace gemma2 {
namespace cuda {

// attention_backward_wgmma.cu.
bool attention_backward_wgmma_takes(const AttentionBackwardParams& b);
void launch_attention_backward_wgmma(const AttentionBackwardParams& b, cudaStream_t stream);

namespace {

constexpr int kWarps = 4, kThreads = kWarps * kWarpSize;
constexpr int kMine = 16 * kWarps;  // rows or keys of a block
// Keys or rows that they meet at a time; what fits beside a gradient of 128 registers.
template <int kHeadDim>
constexpr int kOthersOf = kHeadDim > 128 ? 16 : 32;

// p and ds / scale of one product of a query and a key.
struct Weight {
  float p, ds;
};
GEMMA2_DEVICE Weight weigh(float dot, float grad_p, const RowState& row, int key,
                           const ScoreScale& c) {
  float z = dot * c.inner, slope = 1.0f;
  if (c.capped) {
    z = tanh_by_exp(2.0f * kLog2E * z);
    slope = 1.0f - z * z;
  }
  if (key < row.seen.first || key >= row.seen.end) return {0.0f, 0.0f};
  float exponent = z * c.outer - row.log2_sum;
  if (!c.capped) exponent = fminf(exponent, 0.0f);  // huge scores are not as exact as that
  const float p = exp2_approx(exponent);
  return {p, p * (grad_p - row.term) * slope};
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    attention_backward_terms_kernel(const AttentionBackwardParams b, const AttentionPlan plan) {
  const AttentionParams& p = b.forward;
  Unit<T> u;
  if (!make_unit(p, plan, blockIdx.x, u)) return;
  const int lane = threadIdx.x % kWarpSize;
  for (int r = threadIdx.x / kWarpSize; r < u.rows; r += kWarps) {
    const T *out = row_of(p.out, u, r), *grad = row_of(b.grad_out, u, r);
    float sum = 0;
    if constexpr (sizeof(T) == 2) {
      for (int d = lane * 8; d < p.head_dim; d += kWarpSize * 8) {
        const Vector16 x = load_16(out + d), y = load_16(grad + d);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          sum += to_float(T{uint16_t(x.words[j] & 0xffff)}) *
                 to_float(T{uint16_t(y.words[j] & 0xffff)});
          sum += to_float(T{uint16_t(x.words[j] >> 16)}) * to_float(T{uint16_t(y.words[j] >> 16)});
        }
      }
    } else {
      for (int d = lane; d < p.head_dim; d += kWarpSize) sum += out[d] * grad[d];
    }
    sum = warp_sum(sum);
    const int64_t at = row_index(p, u, r);
    if (lane == 0) b.row_terms[at] = sum - b.grad_lse[at];
  }
}

// The block's gradient: grad_q of its rows, or grad_k or grad_v of its keys (from key_begin on, of
// the unit's).
template <class T, int kHeadDim, bool kOfKeys>
GEMMA2_DEVICE void gradient_block(const AttentionBackwardParams& b, const AttentionPlan& plan,
                                  const Unit<T>& u, bool of_v, int key_begin) {
  using Layout = RowLayout<kHeadDim>;
  constexpr int kOthers = kOthersOf<kHeadDim>;
  constexpr int kUnroll = 4;  // addresses of more copies would not fit beside the gradient
  const AttentionParams& p = b.forward;
  const int thread = threadIdx.x, warp = thread / kWarpSize, lane = thread % kWarpSize;
  const int head_dim = int(p.head_dim);
  // q and grad_out, or k and v, of the block; the others' k and v, or q and grad_out.
  T* const mine_a = reinterpret_cast<T*>(shared_memory());
  T* const mine_b = mine_a + kMine * kHeadDim;
  T* const others_a = mine_b + kMine * kHeadDim;
  T* const others_b = others_a + kOthers * kHeadDim;
  RowState* const states = reinterpret_cast<RowState*>(others_b + kOthers * kHeadDim);

  const int mine = kOfKeys ? u.keys - key_begin : u.rows;
  int begin = 0, end = u.keys;
  if (kOfKeys) {
    const int last = key_begin + kMine < u.keys ? key_begin + kMine : u.keys;
    rows_of_keys(p, u, key_begin, last, begin, end);
  } else {
    for (int r = thread; r < kMine; r += kThreads)
      states[r] = row_state(b, u, r < u.rows ? r : u.rows - 1);
  }
  const auto copy_rows = [&](T* a_tile, T* b_tile, auto count, int first, int rows) {
    copy_tile<Layout, count.value, kThreads, kUnroll>(
        a_tile, rows, head_dim, thread, [&](int row) { return row_of(p.q, u, first + row); });
    copy_tile<Layout, count.value, kThreads, kUnroll>(b_tile, rows, head_dim, thread, [&](int row) {
      return row_of(b.grad_out, u, first + row);
    });
  };
  const auto copy_keys = [&](T* a_tile, T* b_tile, auto count, int first, int keys) {
    copy_tile<Layout, count.value, kThreads, kUnroll>(a_tile, keys, head_dim, thread, [&](int key) {
      return key_row(plan, u, u.k, plan.k_stride, first + key);
    });
    copy_tile<Layout, count.value, kThreads, kUnroll>(b_tile, keys, head_dim, thread, [&](int key) {
      return key_row(plan, u, u.v, plan.v_stride, first + key);
    });
  };
  if constexpr (kOfKeys) {
    copy_keys(mine_a, mine_b, Count<kMine>{}, key_begin, mine);
  } else {
    copy_rows(mine_a, mine_b, Count<kMine>{}, 0, mine);
  }

  const ScoreScale scale = score_scale(p);
  const auto operand = [&](const T* tile) {
    return [=](int step, uint32_t (&a)[1][4]) {
      ldmatrix_x4(a[0], tile + Layout::offset(16 * warp + lane % 16, 2 * step + lane / 16));
    };
  };
  float gradient[1][kHeadDim / 8][4] = {};
  for (int first = begin; first < end; first += kOthers) {
    __syncthreads();  // all are through with the others before
    if constexpr (kOfKeys) {
      copy_rows(others_a, others_b, Count<kOthers>{}, first, end - first);
      if (thread < kOthers)
        states[thread] = row_state(b, u, first + thread < end ? first + thread : end - 1);
    } else {
      copy_keys(others_a, others_b, Count<kOthers>{}, first, end - first);
    }
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();

    float s[1][kOthers / 8][4] = {}, grad_p[1][kOthers / 8][4] = {};
    multiply_keys<T, kHeadDim, 1, kOthers / 8>(s, others_a, operand(mine_a));
    if (!of_v) multiply_keys<T, kHeadDim, 1, kOthers / 8>(grad_p, others_b, operand(mine_b));
#pragma unroll
    for (int n = 0; n < kOthers / 8; ++n) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int my = 16 * warp + lane / 4 + j / 2 * 8, other = 8 * n + lane % 4 * 2 + j % 2;
        const RowState& state = states[kOfKeys ? other : my];
        // Rows behind the last are as the last one, but count for nothing.
        const bool exists = !kOfKeys || first + other < end;
        const int key = kOfKeys ? key_begin + my : first + other;
        const Weight weight = weigh(s[0][n][j], grad_p[0][n][j], state, key, scale);
        s[0][n][j] = exists ? (of_v ? weight.p : weight.ds) : 0.0f;
      }
    }
    uint32_t weights[1][kOthers / 16][4];
    pack_weights<T>(weights[0], s[0]);
    multiply_values<T, kHeadDim>(gradient, weights, of_v ? others_b : others_a);
  }
  if (begin >= end) {  // no copy outlives its block
    cp_async_commit();
    cp_async_wait<0>();
  }

  const float factor = of_v ? 1.0f : float(p.scale);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int my = 16 * warp + lane / 4 + 8 * i;
    if (my >= mine) continue;
    const HeadsView& view = kOfKeys ? of_v ? b.grad_v : b.grad_k : b.grad_q;
    T* to = static_cast<T*>(view.data) + u.batch * view.batch_stride;
    if constexpr (kOfKeys) {
      to += (u.k_offset + u.key_begin + key_begin + my) * view.seqlen_stride +
            u.kv_head * view.head_stride;
    } else {
      to += (u.q_offset + u.query(my)) * view.seqlen_stride + u.head(my) * view.head_stride;
    }
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int d = 8 * n + lane % 4 * 2 + j;
        if (d < head_dim) to[d] = from_float<T>(gradient[0][n][2 * i + j] * factor);
      }
    }
  }
}

template <class T, int kHeadDim>
__global__ void __launch_bounds__(kThreads)
    attention_backward_rows_kernel(const AttentionBackwardParams b, const AttentionPlan plan) {
  Unit<T> u;
  if (!make_unit(b.forward, plan, blockIdx.x, u)) return;
  gradient_block<T, kHeadDim, false>(b, plan, u, false, 0);
}

// Block 2 i + 1 has grad_v of the keys whose grad_k block 2 i has.
template <class T, int kHeadDim>
__global__ void __launch_bounds__(kThreads)
    attention_backward_keys_kernel(const AttentionBackwardParams b, const AttentionPlan plan,
                                   int64_t sequences) {
  const int64_t index = blockIdx.x / 2, key_begin = index / sequences * kMine;
  Unit<T> u;
  if (!make_unit(b.forward, plan, unsigned(index % sequences), u) || key_begin >= u.keys) return;
  gradient_block<T, kHeadDim, true>(b, plan, u, blockIdx.x % 2 == 1, int(key_begin));
}

// ---- float32

// A lane's share of a row: element lane + 32 i.
GEMMA2_DEVICE void load_row(float (&x)[kLaneDims], const float* row, int64_t head_dim) {
#pragma unroll
  for (int j = 0; j < kLaneDims; ++j) {
    const int d = threadIdx.x % kWarpSize + j * kWarpSize;
    x[j] = d < head_dim ? row[d] : 0.0f;
  }
}
GEMMA2_DEVICE void store_row(float* row, const float (&x)[kLaneDims], int64_t head_dim,
                             float factor) {
#pragma unroll
  for (int j = 0; j < kLaneDims; ++j) {
    const int d = threadIdx.x % kWarpSize + j * kWarpSize;
    if (d < head_dim) row[d] = x[j] * factor;
  }
}
GEMMA2_DEVICE float dot(const float (&x)[kLaneDims], const float (&y)[kLaneDims]) {
  float sum = 0;
#pragma unroll
  for (int j = 0; j < kLaneDims; ++j) sum += x[j] * y[j];
  return warp_sum(sum);
}
GEMMA2_DEVICE void add(float (&sum)[kLaneDims], const float (&x)[kLaneDims], float factor) {
#pragma unroll
  for (int j = 0; j < kLaneDims; ++j) sum[j] += x[j] * factor;
}

GEMMA2_DEVICE Weight weigh_plain(const AttentionParams& p, float product, float grad_p,
                                 const RowState& row) {
  float score = product * float(p.scale), slope = 1.0f;
  if (p.softcap > 0) {
    const float z = tanhf(score / float(p.softcap));
    score = float(p.softcap) * z, slope = 1.0f - z * z;
  }
  // At most 1, which huge scores are not exact enough for.
  const float weight = exp2f(fminf(score * kLog2E - row.log2_sum, 0.0f));
  return {weight, weight * (grad_p - row.term) * slope};
}

__global__ void __launch_bounds__(kThreads)
    attention_backward_plain_rows_kernel(const AttentionBackwardParams b,
                                         const AttentionPlan plan) {
  const AttentionParams& p = b.forward;
  Unit<float> u;
  if (!make_unit(p, plan, blockIdx.x, u)) return;
  for (int r = threadIdx.x / kWarpSize; r < u.rows; r += kWarps) {
    const RowState state = row_state(b, u, r);
    float q[kLaneDims], grad[kLaneDims], k[kLaneDims], v[kLaneDims], grad_q[kLaneDims] = {};
    load_row(q, row_of(p.q, u, r), p.head_dim);
    load_row(grad, row_of(b.grad_out, u, r), p.head_dim);
    for (int key = state.seen.first; key < state.seen.end; ++key) {
      load_row(k, key_row(plan, u, u.k, plan.k_stride, key), p.head_dim);
      load_row(v, key_row(plan, u, u.v, plan.v_stride, key), p.head_dim);
      add(grad_q, k, weigh_plain(p, dot(q, k), dot(grad, v), state).ds);
    }
    float* to = static_cast<float*>(b.grad_q.data) + u.batch * b.grad_q.batch_stride +
                (u.q_offset + u.query(r)) * b.grad_q.seqlen_stride +
                u.head(r) * b.grad_q.head_stride;
    store_row(to, grad_q, p.head_dim, float(p.scale));
  }
}

__global__ void __launch_bounds__(kThreads)
    attention_backward_plain_keys_kernel(const AttentionBackwardParams b, const AttentionPlan plan,
                                         int64_t sequences) {
  const AttentionParams& p = b.forward;
  Unit<float> u;
  if (!make_unit(p, plan, unsigned(blockIdx.x % sequences), u)) return;
  const int first = int(blockIdx.x / sequences) * kMine;
  for (int key = first + threadIdx.x / kWarpSize; key < first + kMine && key < u.keys;
       key += kWarps) {
    float q[kLaneDims], grad[kLaneDims], k[kLaneDims], v[kLaneDims];
    float grad_k[kLaneDims] = {}, grad_v[kLaneDims] = {};
    load_row(k, key_row(plan, u, u.k, plan.k_stride, key), p.head_dim);
    load_row(v, key_row(plan, u, u.v, plan.v_stride, key), p.head_dim);
    int begin, end;
    rows_of_keys(p, u, key, key + 1, begin, end);
    for (int r = begin; r < end; ++r) {
      load_row(q, row_of(p.q, u, r), p.head_dim);
      load_row(grad, row_of(b.grad_out, u, r), p.head_dim);
      const Weight weight = weigh_plain(p, dot(q, k), dot(grad, v), row_state(b, u, r));
      add(grad_k, q, weight.ds);
      add(grad_v, grad, weight.p);
    }
    const auto to = [&](const HeadsView& view) {
      return static_cast<float*>(view.data) + u.batch * view.batch_stride +
             (u.k_offset + u.key_begin + key) * view.seqlen_stride + u.kv_head * view.head_stride;
    };
    store_row(to(b.grad_k), grad_k, p.head_dim, float(p.scale));
    store_row(to(b.grad_v), grad_v, p.head_dim, 1.0f);
  }
}

// ---- launches

template <class T, int kHeadDim>
void launch_gradients(const AttentionBackwardParams& b, const AttentionPlan& rows,
                      const AttentionPlan& keys, int64_t row_units, int64_t key_units,
                      int64_t sequences, cudaStream_t stream) {
  constexpr int64_t kShared =
      int64_t(2) * (kMine + kOthersOf<kHeadDim>)*kHeadDim * sizeof(T) + kMine * sizeof(RowState);
  static_assert(kShared <= 99 << 10, "");
  const char* op = "attention_backward";
  launch(op, attention_backward_rows_kernel<T, kHeadDim>, dim3(unsigned(row_units)), kThreads,
         kShared, stream, b, rows);
  if (key_units == 0) return;
  launch(op, attention_backward_keys_kernel<T, kHeadDim>, dim3(unsigned(2 * key_units)), kThreads,
         kShared, stream, b, keys, sequences);
}

}  // namespace
}  // namespace cuda

void launch_attention_backward(const AttentionBackwardParams& b, cudaStream_t stream) {
  using namespace cuda;
  const char* op = "attention_backward";
  const AttentionParams& p = b.forward;
  const int64_t group_rows = p.num_heads / p.num_kv_heads * p.seqlen_q;
  const int64_t sequences = p.batch * p.num_kv_heads;
  const AttentionPlan rows = plan_backward(p, kMine), keys = plan_backward(p, 0);
  const int64_t row_units = rows.row_blocks * sequences;
  const int64_t key_units = divide_up(p.seqlen_k, kMine) * sequences;
  if (row_units == 0) return;
  if (row_units > INT_MAX || 2 * key_units > INT_MAX || group_rows > INT_MAX - kMine) {
    throw std::invalid_argument("gemma2_ext::attention_backward: too many rows for CUDA: " +
                                std::to_string(group_rows * sequences));
  }
  const dim3 grid(unsigned(row_units), 1, 1);
  dispatch_dtype(op, p.dtype, [&](auto t) {
    using T = decltype(t);
    launch(op, attention_backward_terms_kernel<T>, grid, kThreads, 0, stream, b, rows);
    if constexpr (sizeof(T) == 4) {
      launch(op, attention_backward_plain_rows_kernel, grid, kThreads, 0, stream, b, rows);
      if (key_units == 0) return;
      launch(op, attention_backward_plain_keys_kernel, dim3(unsigned(key_units)), kThreads, 0,
             stream, b, keys, sequences);
    } else {
      if (has_wgmma(device_properties()) && attention_backward_wgmma_takes(b))
        return launch_attention_backward_wgmma(b, stream);
      const auto launch_dim = [&](auto head_dim) {
        launch_gradients<T, head_dim.value>(b, rows, keys, row_units, key_units, sequences, stream);
      };
      if (p.head_dim <= 64) return launch_dim(Count<64>{});
      if (p.head_dim <= 128) return launch_dim(Count<128>{});
      launch_dim(Count<256>{});
    }
  });
}

}  // namespace gemma2
