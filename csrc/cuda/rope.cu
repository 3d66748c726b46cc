// Half-split rotation: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin), angle = position * inv_freq,
// of q and k (batch, seqlen, heads, head_dim); with a cache, k and v go into slot
// position % capacity of it, and a position below 0 is padding: neither rotated nor written.
//
// A block a token: its cosines and sines are computed once, into shared memory, for all heads; then
// a thread takes a vector of each half of a head at a time. Angle, cosine and sine in float32, one
// rounding at the end. Memory bounds it: 4 bytes an element of q, k and (with a cache) v in 16
// bits. Source: transformers, apply_rotary_pos_emb.
//
// rope_kernel: at most 64 registers, 4 head_dim bytes of shared memory.
#include "kernels.h"
#include "vector.cuh"

namespace gemma2 {
namespace cuda {
namespace {

constexpr int kMaxThreads = 256;

GEMMA2_DEVICE int64_t offset(const HeadsView& t, int64_t batch, int64_t token, int64_t head) {
  return batch * t.batch_stride + token * t.seqlen_stride + head * t.head_stride;
}

// Vectors of both halves of one head, `n` columns of which exist.
template <class T>
struct Pair {
  T* to;
  int column;
  int n;
  bool rotated;
  Vector16 halves[2];
};

template <class T, bool kAligned>
__global__ void __launch_bounds__(kMaxThreads, 5) rope_kernel(const RopeParams p) {
  constexpr int kSize = kVectorSize<T>;
  float* cosines = reinterpret_cast<float*>(shared_memory());
  const int half = int(p.head_dim / 2), vectors = (half + kSize - 1) / kSize;
  float* sines = cosines + half;
  const bool cached = p.capacity > 0;
  allow_next_kernel();
  // Nothing of a step in front writes positions: the first token's angles are computed early.
  const auto make_angles = [&](int64_t position) {
    for (int j = threadIdx.x; j < half; j += blockDim.x)
      sincosf(float(position) * p.inv_freq[j], sines + j, cosines + j);
  };
  const auto position_of = [&](int64_t unit) {
    return p.positions[unit / p.seqlen * p.positions_batch_stride + unit % p.seqlen];
  };
  const int64_t units = p.batch * p.seqlen;
  int64_t position = blockIdx.x < units ? position_of(blockIdx.x) : 0;
  make_angles(position);
  wait_for_previous_kernels();

  for (int64_t unit = blockIdx.x; unit < units; unit += gridDim.x) {
    const int64_t b = unit / p.seqlen, token = unit % p.seqlen;
    if (unit != blockIdx.x) position = position_of(unit);
    const bool padding = cached && position < 0;
    const int64_t slot = cached ? (padding ? 0 : position % p.capacity) : token;
    const int64_t k_heads = padding ? 0 : p.num_kv_heads, v_heads = cached ? k_heads : 0;
    const int pairs = int(p.num_heads + k_heads + v_heads) * vectors;

    const auto load = [&](int i) {
      Pair<T> pair;
      const T* from;
      int head = i / vectors;
      pair.column = i % vectors * kSize;
      pair.n = half - pair.column;
      pair.rotated = !padding;
      if (head < int(p.num_heads)) {
        from = static_cast<const T*>(p.q.data) + offset(p.q, b, token, head);
        pair.to = static_cast<T*>(p.q_out.data) + offset(p.q_out, b, token, head);
      } else if ((head -= int(p.num_heads)) < int(p.num_kv_heads)) {
        const HeadsView& to = cached ? p.k_cache : p.k_out;
        from = static_cast<const T*>(p.k.data) + offset(p.k, b, token, head);
        pair.to = static_cast<T*>(to.data) + offset(to, b, slot, head);
      } else {
        head -= int(p.num_kv_heads);
        from = static_cast<const T*>(p.v.data) + offset(p.v, b, token, head);
        pair.to = static_cast<T*>(p.v_cache.data) + offset(p.v_cache, b, slot, head);
        pair.rotated = false;
      }
#pragma unroll
      for (int h = 0; h < 2; ++h)
        pair.halves[h] = load_whole<kAligned>(from + h * half + pair.column, pair.n);
      return pair;
    };
    const auto finish = [&](Pair<T>& pair) {
      if (pair.rotated) {
        float x1[kSize], x2[kSize], y1[kSize], y2[kSize];
        unpack(pair.halves[0], x1, T{});
        unpack(pair.halves[1], x2, T{});
#pragma unroll
        for (int j = 0; j < kSize; ++j) {
          const bool there = j < pair.n;
          const float c = there ? cosines[pair.column + j] : 0.0f;
          const float s =
              there ? (p.inverse ? -sines[pair.column + j] : sines[pair.column + j]) : 0.0f;
          y1[j] = x1[j] * c - x2[j] * s;
          y2[j] = x2[j] * c + x1[j] * s;
        }
        pair.halves[0] = pack_vector(y1, T{});
        pair.halves[1] = pack_vector(y2, T{});
      }
#pragma unroll
      for (int h = 0; h < 2; ++h)
        store_vector<kAligned>(pair.to + h * half + pair.column, pair.n, pair.halves[h]);
    };

    // The first pair is on its way while the angles are computed.
    int i = threadIdx.x;
    Pair<T> pair;
    if (i < pairs) pair = load(i);
    if (unit != blockIdx.x) make_angles(position);
    __syncthreads();
    while (i < pairs) {
      finish(pair);
      i += blockDim.x;
      if (i < pairs) pair = load(i);
    }
    __syncthreads();  // the angles are written again for the next token
  }
}

}  // namespace
}  // namespace cuda

void launch_rope(const RopeParams& p, cudaStream_t stream) {
  using namespace cuda;
  dispatch_dtype("rope", p.dtype, [&](auto t) {
    using T = decltype(t);
    bool aligned = p.head_dim / 2 % kVectorSize<T> == 0;
    for (const HeadsView* view : {&p.q, &p.k, &p.v, &p.q_out, &p.k_out, &p.k_cache, &p.v_cache}) {
      aligned = aligned && is_aligned(view->data, view->batch_stride * sizeof(T)) &&
                is_aligned(view->data, view->seqlen_stride * sizeof(T)) &&
                is_aligned(view->data, view->head_stride * sizeof(T));
    }
    const int64_t heads = p.num_heads + p.num_kv_heads * (p.capacity > 0 ? 2 : 1);
    const int64_t pairs = heads * divide_up(p.head_dim / 2, kVectorSize<T>);
    const int64_t threads = divide_up(pairs, kWarpSize) * kWarpSize;
    launch_early("rope", aligned ? rope_kernel<T, true> : rope_kernel<T, false>,
                 row_grid(p.batch * p.seqlen), int(threads < kMaxThreads ? threads : kMaxThreads),
                 p.head_dim * int64_t(sizeof(float)), stream, p);
  });
}

}  // namespace gemma2
