// Gradients of attention on Hopper (sm_90a), head_dim 65 to 256; formulas as in
// attention_backward.cu. A block is a producer warpgroup, which copies tiles (by bulk tensor
// copies, else by cp.async), and two consumer warpgroups. Rows: 128 rows meet their keys, grad_q in
// registers. Keys: 64 keys (head_dim 256) or 128 (128) meet the rows of all heads of their group;
// at 256 one warpgroup has grad_v and hands p (1 - tanh^2) through shared memory to the other,
// which has grad_k. Seven products for five, nothing added up between blocks: results repeat
// exactly.
//
// Bound by the tensor cores: of 64 x 64 x 256 a product takes 512 clocks, and reading it from
// shared memory as long; p and 1 - tanh^2 take a third of that. Source: FlashAttention-3
// (2407.08608). Registers are 40 and 232 by warpgroup.
// attention_backward_wgmma_rows_kernel: at most 168 registers, 226 KiB of shared memory.
// attention_backward_wgmma_keys_kernel: at most 168 registers, 211 KiB of shared memory.
#include "attention_backward.cuh"
#include "attention_wgmma.cuh"
#include "kernels.h"
#include "launch.cuh"
#include "wgmma_backward.cuh"

namespace gemma2 {
namespace cuda {
namespace {

constexpr int kThreads = (1 + kConsumers) * kGroupThreads;

// Tiles as bulk tensor copies see them, where `used`: a block's own rows or keys, then the others.
struct TileMaps {
  CUtensorMap mine_a, mine_b, a, b;
  bool used;
};

// Tiles of a block's own rows or keys (q and grad_out, or k and v), and of those they meet: `a` (k
// or q) and `b` (v or grad_out), each with its own stages.
template <int kHeadDim, bool kOfKeys>
struct Shape {
  static constexpr int kMine = kOfKeys && kHeadDim == 256 ? 64 : 128;
  static constexpr int kOthers = kHeadDim == 256 || kOfKeys ? 64 : 128;
  static constexpr int kStagesA = 2, kStagesB = !kOfKeys && kHeadDim == 256 ? 1 : 2;
  static constexpr bool kHandsOver = kOfKeys && kHeadDim == 256;
  static constexpr int kMineSize = kMine * kHeadDim, kOthersSize = kOthers * kHeadDim;
  static constexpr int64_t kTileBytes =
      2 * (2 * int64_t(kMineSize) + (kStagesA + kStagesB) * int64_t(kOthersSize));
  static constexpr int64_t kHandedBytes = kHandsOver ? 64 * kOthers * 4 : 0;
  static constexpr int kStates = kOfKeys ? kStagesA * kOthers : kMine;
  static constexpr int kBarriers = 1 + 2 * (kStagesA + kStagesB);
  static constexpr int64_t kSharedBytes =
      kTileBytes + kHandedBytes + kStates * sizeof(RowState) + kAttentionUnitBytes + 8 * kBarriers;
  static_assert(kSharedBytes <= 227 << 10, "");
};

#if defined(GEMMA2_HOPPER)

// d = a b^T: 64 rows of a tile of kARows, all kBRows of the other tile.
template <class T, int kHeadDim, int kARows, int kBRows>
GEMMA2_DEVICE void start_scores(float (&d)[kBRows / 8][4], const T* a, const T* b) {
  // Anew each time: the steps' places would take more registers through the loop than there are.
  const uint64_t a_matrix = wgmma_matrix_anew(wgmma_matrix(a, 16));
  const uint64_t b_matrix = wgmma_matrix(b, 16);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < kHeadDim / 16; ++step) {
    const int panel = step / 4, column = step % 4 * 16;  // of panels of 64 columns, 128 bytes a row
    const uint64_t a_step = wgmma_matrix_behind(a_matrix, panel * kARows * 128 + column * 2);
    const uint64_t b_step = wgmma_matrix_behind(b_matrix, panel * kBRows * 128 + column * 2);
    if (step == 0) {
      wgmma_first<T, kBRows>(d, a_step, b_step);
    } else {
      wgmma_shared<T, kBRows>(d, a_step, b_step, true);
    }
  }
  wgmma_commit();
}

// d += weights b.
template <class T, int kHeadDim, int kBRows>
GEMMA2_DEVICE void start_gradient(float (&d)[kHeadDim / 8][4],
                                  const uint32_t (&weights)[kBRows / 16][4], const T* b) {
  const uint64_t b_matrix = wgmma_matrix(b, kBRows * 128);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < kBRows / 16; ++step)
    wgmma_registers<T, kHeadDim>(d, weights[step], wgmma_matrix_behind(b_matrix, step * 16 * 128));
  wgmma_commit();
}

// Goes over rows or keys with a stride of kStep: one of each kGroupThreads / kChunks.
struct Walk {
  const char* at;
  int head;  // of the group
  int row;
  int group, head_step;
  int step, wrap;  // bytes: each time, and where the head comes to the group's end
};

template <class T, int kHeadDim>
GEMMA2_DEVICE Walk make_walk(const T* data, const HeadsView& view, int group, int first, int begin,
                             int end) {
  constexpr int kChunks = kHeadDim / 8, kStep = kGroupThreads / kChunks;
  const int chunk = threadIdx.x % kChunks, row = first + begin + int(threadIdx.x) / kChunks;
  const int64_t offset = row / group * view.seqlen_stride + row % group * view.head_stride;
  Walk w;
  w.at = reinterpret_cast<const char*>(data + offset + chunk * 8);
  w.head = row % group;
  w.row = end - (row - first);  // that are left
  w.group = group, w.head_step = kStep % group;
  w.step = int((kStep / group * view.seqlen_stride + kStep % group * view.head_stride) * 2);
  w.wrap = int((view.seqlen_stride - group * view.head_stride) * 2);
  return w;
}

// The walk's next kRows rows.
template <int kHeadDim, int kRows, class T>
GEMMA2_DEVICE void copy_next(T* tile, Walk& w, bool inside) {
  constexpr int kChunks = kHeadDim / 8, kStep = kGroupThreads / kChunks;
  const int chunk = threadIdx.x % kChunks, first = threadIdx.x / kChunks;
#pragma unroll 4
  for (int i = 0; i < kRows / kStep; ++i) {
    cp_async<16>(tile + PanelLayout<kHeadDim, kRows>::offset(first + i * kStep, chunk), w.at,
                 inside && w.row > 0);
    w.row -= kStep;
    w.head += w.head_step;
    w.at += w.step;
    if (w.head >= w.group) w.head -= w.group, w.at += w.wrap;
  }
  cp_async_commit();
}

// The consumer warpgroup that this thread is of: through a shuffle the compiler knows it as one for
// all lanes, and so the number of turns.
GEMMA2_DEVICE int consumer_group() { return shuffle(int(threadIdx.x / kGroupThreads), 0) - 1; }

// What a block works on: keys or rows from mine_begin on meet rows or keys in [begin, end).
struct Range {
  int mine_begin, begin, end;
  bool by_maps;  // tiles come by bulk tensor copies, with what stands behind `end`
};

// Zeros where turn i's tile goes beyond the range. By a warpgroup, before its gradient takes it.
template <int kHeadDim, int kOthers, class T>
GEMMA2_DEVICE void clear_behind(T* tile, const Range& range, int i) {
  constexpr int kTailBarrier = 9;  // one a warpgroup
  const int left = range.end - range.begin - i * kOthers;
  if (range.by_maps && left < kOthers) {
    clear_tail<kHeadDim, kOthers>(tile, left, kTailBarrier + consumer_group());
  }
}

// Shared memory of a block.
template <class T, int kHeadDim, bool kOfKeys>
struct Shared {
  using S = Shape<kHeadDim, kOfKeys>;
  GEMMA2_DEVICE static T* mine_a() { return reinterpret_cast<T*>(shared_memory()); }
  GEMMA2_DEVICE static T* mine_b() { return mine_a() + S::kMineSize; }
  GEMMA2_DEVICE static T* a(int i) {
    return mine_a() + 2 * S::kMineSize + i % S::kStagesA * S::kOthersSize;
  }
  GEMMA2_DEVICE static T* b(int i) {
    return a(0) + (S::kStagesA + i % S::kStagesB) * S::kOthersSize;
  }
  GEMMA2_DEVICE static float* handed() {
    return reinterpret_cast<float*>(shared_memory() + S::kTileBytes);
  }
  GEMMA2_DEVICE static RowState* states(int i) {
    return reinterpret_cast<RowState*>(shared_memory() + S::kTileBytes + S::kHandedBytes) +
           (kOfKeys ? i % S::kStagesA * S::kOthers : 0);
  }
  GEMMA2_DEVICE static Unit<T>* unit() {
    return reinterpret_cast<Unit<T>*>(states(0) + S::kStates);
  }
  GEMMA2_DEVICE static uint64_t* full_mine() {
    return reinterpret_cast<uint64_t*>(shared_memory() + S::kTileBytes + S::kHandedBytes +
                                       S::kStates * sizeof(RowState) + kAttentionUnitBytes);
  }
  GEMMA2_DEVICE static uint64_t* full_a(int i) { return full_mine() + 1 + i % S::kStagesA; }
  GEMMA2_DEVICE static uint64_t* empty_a(int i) { return full_a(i) + S::kStagesA; }
  GEMMA2_DEVICE static uint64_t* full_b(int i) {
    return full_mine() + 1 + 2 * S::kStagesA + i % S::kStagesB;
  }
  GEMMA2_DEVICE static uint64_t* empty_b(int i) { return full_b(i) + S::kStagesB; }

  // Wait for the i-th tile, or say that this warp is through with it.
  GEMMA2_DEVICE static T* wait_a(int i) {
    mbarrier_wait(full_a(i), i / S::kStagesA & 1);
    return a(i);
  }
  GEMMA2_DEVICE static T* wait_b(int i) {
    mbarrier_wait(full_b(i), i / S::kStagesB & 1);
    return b(i);
  }
  GEMMA2_DEVICE static void release_a(int i) {
    __syncwarp();
    if (threadIdx.x % kWarpSize == 0) mbarrier_arrive(empty_a(i));
  }
  GEMMA2_DEVICE static void release_b(int i) {
    __syncwarp();
    if (threadIdx.x % kWarpSize == 0) mbarrier_arrive(empty_b(i));
  }
};

// Of row r, where it is one before `end`; else of one that sees no key.
template <class T>
GEMMA2_DEVICE RowState row_state_before(const AttentionBackwardParams& b, const Unit<T>& u, int r,
                                        int end) {
  return r < end ? row_state(b, u, r) : RowState{{INT_MAX, 0}, 0.0f, 0.0f};
}

template <class T, int kHeadDim, bool kOfKeys>
GEMMA2_DEVICE void produce(const AttentionBackwardParams& b, const Unit<T>& u, const Range& range) {
  using S = Shape<kHeadDim, kOfKeys>;
  using M = Shared<T, kHeadDim, kOfKeys>;
  const AttentionParams& p = b.forward;
  const int thread = threadIdx.x;
  const bool inside = thread % (kHeadDim / 8) * 8 < p.head_dim;
  const auto rows = [&](const HeadsView& view, int begin, int end) {
    const T* data = static_cast<const T*>(view.data) + u.batch * view.batch_stride +
                    u.q_offset * view.seqlen_stride + u.kv_head * u.group * view.head_stride;
    return make_walk<T, kHeadDim>(data, view, u.group, u.row_begin, begin, end);
  };
  const auto keys = [&](const T* data, const HeadsView& view, int begin, int end) {
    return make_walk<T, kHeadDim>(data + u.key_begin * view.seqlen_stride, view, 1, 0, begin, end);
  };
  Walk walk_a = kOfKeys ? keys(u.k, p.k, range.mine_begin, u.keys) : rows(p.q, 0, u.rows);
  copy_next<kHeadDim, S::kMine>(M::mine_a(), walk_a, inside);
  Walk walk_b = kOfKeys ? keys(u.v, p.v, range.mine_begin, u.keys) : rows(b.grad_out, 0, u.rows);
  copy_next<kHeadDim, S::kMine>(M::mine_b(), walk_b, inside);
  walk_a = kOfKeys ? rows(p.q, range.begin, range.end) : keys(u.k, p.k, range.begin, range.end);
  walk_b =
      kOfKeys ? rows(b.grad_out, range.begin, range.end) : keys(u.v, p.v, range.begin, range.end);

  // The barrier of the tile whose copies are to be waited for next.
  uint64_t* pending = M::full_mine();
  const auto announce = [&] {
    fence_shared_for_wgmma();
    mbarrier_arrive(pending);
    pending = nullptr;
  };
  const auto wait_for = [&](uint64_t* empty, int parity) {
    if (mbarrier_test(empty, parity)) return;
    if (pending) cp_async_wait<0>(), announce();
    mbarrier_wait(empty, parity);
  };
  const auto close = [&](uint64_t* full) {
    if (pending) cp_async_wait<1>(), announce();
    pending = full;
  };
  int i = 0;
  for (int first = range.begin; first < range.end; first += S::kOthers, ++i) {
    wait_for(M::empty_a(i), (i / S::kStagesA & 1) ^ 1);
    if (kOfKeys && thread < S::kOthers)
      M::states(i)[thread] = row_state_before(b, u, first + thread, range.end);
    copy_next<kHeadDim, S::kOthers>(M::a(i), walk_a, inside);
    close(M::full_a(i));
    wait_for(M::empty_b(i), (i / S::kStagesB & 1) ^ 1);
    copy_next<kHeadDim, S::kOthers>(M::b(i), walk_b, inside);
    close(M::full_b(i));
  }
  cp_async_wait<0>();
  if (pending) announce();
}

// The same by bulk tensor copies: a thread for each of `a` and `b`, and of rows a thread for each
// row's state.
template <class T, int kHeadDim, bool kOfKeys>
GEMMA2_DEVICE void produce_by_maps(const AttentionBackwardParams& b, const TileMaps& maps,
                                   const Unit<T>& u, const Range& range) {
  using S = Shape<kHeadDim, kOfKeys>;
  using M = Shared<T, kHeadDim, kOfKeys>;
  constexpr int kForB = 2 * kWarpSize;  // the thread
  static_assert(!kOfKeys || S::kOthers <= kForB, "");
  const AttentionParams& p = b.forward;
  const int thread = threadIdx.x;
  const auto copy_mine = [&](T* tile, const CUtensorMap& map) {
    if constexpr (kOfKeys) {
      copy_keys_by_map<kHeadDim, S::kMine>(tile, map, p, u, u.slot + range.mine_begin,
                                           M::full_mine());
    } else {
      copy_rows_by_map<kHeadDim, S::kMine>(tile, map, p, u, 0, M::full_mine());
    }
  };
  const auto copy_others = [&](T* tile, const CUtensorMap& map, int first, uint64_t* full) {
    mbarrier_arrive_and_expect(full, S::kOthersSize * 2);
    if constexpr (kOfKeys) {
      copy_rows_by_map<kHeadDim, S::kOthers>(tile, map, p, u, first, full);
    } else {
      copy_keys_by_map<kHeadDim, S::kOthers>(tile, map, p, u, u.slot + first, full);
    }
  };
  if (thread == 0) {
    mbarrier_arrive_and_expect(M::full_mine(), 2 * S::kMineSize * 2);
    copy_mine(M::mine_a(), maps.mine_a);
    copy_mine(M::mine_b(), maps.mine_b);
  }
  if (thread == kForB) {
    int i = 0;
    for (int first = range.begin; first < range.end; first += S::kOthers, ++i) {
      mbarrier_wait(M::empty_b(i), (i / S::kStagesB & 1) ^ 1);
      copy_others(M::b(i), maps.b, first, M::full_b(i));
    }
  }
  if (thread >= (kOfKeys ? S::kOthers : 1)) return;
  int i = 0;
  for (int first = range.begin; first < range.end; first += S::kOthers, ++i) {
    RowState state;
    if (kOfKeys) state = row_state_before(b, u, first + thread, range.end);
    mbarrier_wait(M::empty_a(i), (i / S::kStagesA & 1) ^ 1);
    if (thread == 0) copy_others(M::a(i), maps.a, first, M::full_a(i));
    if (kOfKeys) {
      M::states(i)[thread] = state;
      mbarrier_arrive(M::full_a(i));
    }
  }
}

// Turns z into p (1 - z^2), where emit(n, j, p) is given p. log2_sum(n, j), seen(n, j) and
// key(n, j) are the element's; a row without keys has log2_sum -inf and is masked.
template <bool kMasked, int kTiles, class F, class G, class H>
GEMMA2_DEVICE void weigh_tile(float (&s)[kTiles][4], const ScoreScale& c, const F& log2_sum,
                              const G& visible, const H& emit) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float z = s[n][j];
      float exponent = z * c.outer - log2_sum(n, j);
      // p is at most 1; huge scores are not as exact as that.
      if (!c.capped) exponent = fminf(exponent, 0.0f);
      float p = exp2_approx(exponent);
      if (kMasked && !visible(n, j)) p = 0.0f;
      s[n][j] = c.capped ? p - p * z * z : p;
      if (kMasked && p == 0.0f) s[n][j] = 0.0f;
      emit(n, j, p);
    }
  }
}

// grad_p to ds / scale.
template <bool kMasked>
GEMMA2_DEVICE float score_gradient(float weight, float grad_p, float term) {
  const float ds = weight * (grad_p - term);
  return kMasked && weight == 0.0f ? 0.0f : ds;
}

// Stores 64 rows of a gradient: to(r) is where row r goes.
template <class T, int kHeadDim, class F>
GEMMA2_DEVICE void store_gradient(const float (&d)[kHeadDim / 8][4], float factor, int rows,
                                  int head_dim, const F& to) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x % kGroupThreads / kWarpSize;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int r = 16 * warp + lane / 4 + 8 * i;
    if (r >= rows) continue;
    T* const row = to(r) + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
      if (8 * n < head_dim) {
        *reinterpret_cast<uint32_t*>(row + 8 * n) =
            pack<T>(d[n][2 * i] * factor, d[n][2 * i + 1] * factor);
      }
    }
  }
}

template <int kTiles>
GEMMA2_DEVICE void clear(float (&d)[kTiles][4]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) d[n][0] = d[n][1] = d[n][2] = d[n][3] = 0.0f;
}

GEMMA2_DEVICE int turns_of(const Range& range, int others) {
  return shuffle((range.end - range.begin + others - 1) / others, 0);
}

// 64 rows of grad_q, by a warpgroup. Each turn's product of ds and k runs beside the next turn's
// scores; none is at work where a turn ends, which would make the compiler wait for each.
template <class T, int kHeadDim>
GEMMA2_DEVICE void consume_rows(const AttentionBackwardParams& b, const Range& range) {
  using S = Shape<kHeadDim, false>;
  using M = Shared<T, kHeadDim, false>;
  constexpr int kOthers = S::kOthers;
  const int lane = threadIdx.x % kWarpSize, group_row = consumer_group() * 64;
  const int warp_row = group_row + threadIdx.x % kGroupThreads / kWarpSize * 16;
  const T* const q = M::mine_a() + group_row * 64;
  const T* const grad_out = M::mine_b() + group_row * 64;
  const RowState* const states = M::states(0) + warp_row;
  const RowKeys first_seen = states[0].seen, last_seen = states[15].seen;
  const RowState state[2] = {states[lane / 4], states[lane / 4 + 8]};
  const ScoreScale scale = score_scale(b.forward);
  float grad[kHeadDim / 8][4];
  uint32_t ds[kOthers / 16][4];
  clear(grad);
  const auto turn = [&](auto is_first, int i) {
    constexpr bool kFirst = decltype(is_first)::value;
    float s[kOthers / 8][4], grad_p[kOthers / 8][4];
    T* const k = M::wait_a(i);
    clear_behind<kHeadDim, kOthers>(k, range, i);
    if (!kFirst) start_gradient<T, kHeadDim, kOthers>(grad, ds, M::a(i - 1));
    start_scores<T, kHeadDim, S::kMine, kOthers>(s, q, k);
    if (!kFirst) {
      wgmma_wait<1>();
      keep_in_order(grad);
      M::release_a(i - 1);
    }
    start_scores<T, kHeadDim, S::kMine, kOthers>(grad_p, grad_out, M::wait_b(i));
    wgmma_wait<1>();
    keep_in_order(s);
    scale_small_scores(s, scale);
    const int first = range.begin + i * kOthers;
    const bool masked = first < last_seen.first || first + kOthers > first_seen.end;
    const auto finish = [&](auto flag) {
      constexpr bool kMasked = decltype(flag)::value;
      weigh_tile<kMasked>(
          s, scale, [&](int, int j) { return state[j / 2].log2_sum; },
          [&](int n, int j) {
            const int key = first + 8 * n + lane % 4 * 2 + j % 2;
            return key >= state[j / 2].seen.first && key < state[j / 2].seen.end;
          },
          [](int, int, float) {});
    };
    if (masked) {
      finish(Flag<true>{});
    } else {
      finish(Flag<false>{});
    }
    wgmma_wait<0>();
    keep_in_order(grad_p);
    M::release_b(i);
#pragma unroll
    for (int n = 0; n < kOthers / 8; ++n) {
#pragma unroll
      for (int j = 0; j < 4; ++j)
        s[n][j] = score_gradient<true>(s[n][j], grad_p[n][j], state[j / 2].term);
    }
    pack_weights<T>(ds, s);
  };
  const int turns = turns_of(range, kOthers);
  if (turns > 0) {
    mbarrier_wait(M::full_mine(), 0);
    turn(Flag<true>{}, 0);
    for (int i = 1; i < turns; ++i) turn(Flag<false>{}, i);
    start_gradient<T, kHeadDim, kOthers>(grad, ds, M::a(turns - 1));
    wgmma_wait<0>();
    keep_in_order(grad);
  }
  const Unit<T>& u = *M::unit();
  store_gradient<T, kHeadDim>(
      grad, float(b.forward.scale), u.rows - group_row, int(b.forward.head_dim),
      [&](int r) { return const_cast<T*>(row_of(b.grad_q, u, group_row + r)); });
}

template <class T>
GEMMA2_DEVICE T* key_gradient_row(const HeadsView& view, const Unit<T>& u, int key) {
  return static_cast<T*>(view.data) + u.batch * view.batch_stride +
         (u.k_offset + u.key_begin + key) * view.seqlen_stride + u.kv_head * view.head_stride;
}

// z of 64 keys and kOthers rows to p (1 - z^2), with emit of p.
template <class T, int kHeadDim, int kTiles, class H>
GEMMA2_DEVICE void weigh_keys(float (&s)[kTiles][4], const ScoreScale& scale,
                              const RowState* states, int group_key, int warp_key, const H& emit) {
  const int lane = threadIdx.x % kWarpSize;
  const RowState* const mine = states + lane % 4 * 2;
  const bool masked =
      states[8 * kTiles - 1].seen.first > group_key || states[0].seen.end < group_key + 64;
  const auto log2_sum = [&](int n, int j) { return mine[8 * n + j % 2].log2_sum; };
  const auto visible = [&](int n, int j) {
    const RowKeys seen = mine[8 * n + j % 2].seen;
    const int key = warp_key + lane / 4 + j / 2 * 8;
    return key >= seen.first && key < seen.end;
  };
  scale_small_scores(s, scale);
  if (masked) {
    weigh_tile<true>(s, scale, log2_sum, visible, emit);
  } else {
    weigh_tile<false>(s, scale, log2_sum, visible, emit);
  }
}

template <class T, int kTiles>
GEMMA2_DEVICE void pack_score_gradients(uint32_t (&ds)[kTiles / 2][4], float (&weights)[kTiles][4],
                                        const float (&grad_p)[kTiles][4], const RowState* states) {
  const RowState* const mine = states + threadIdx.x % 4 * 2;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    const float term[2] = {mine[8 * n].term, mine[8 * n + 1].term};
#pragma unroll
    for (int j = 0; j < 4; ++j)
      weights[n][j] = score_gradient<true>(weights[n][j], grad_p[n][j], term[j % 2]);
  }
  pack_weights<T>(ds, weights);
}

// Weights as mma's operand a, one after the other as weigh_tile gives them.
template <class T, int kTiles>
GEMMA2_DEVICE void put_weight(uint32_t (&weights)[kTiles][4], int n, int j, float p) {
  uint32_t& pair = weights[n / 2][n % 2 * 2 + j / 2];
  pair = j % 2 == 0 ? float_to_bits(p) : pack<T>(bits_to_float(pair), p);
}

// grad_k and grad_v of 64 keys, by a warpgroup; turns as in consume_rows.
template <class T, int kHeadDim>
GEMMA2_DEVICE void consume_keys(const AttentionBackwardParams& b, const Range& range) {
  using S = Shape<kHeadDim, true>;
  using M = Shared<T, kHeadDim, true>;
  constexpr int kOthers = S::kOthers;
  const int group_row = consumer_group() * 64;
  const int group_key = range.mine_begin + group_row;
  const int warp_key = group_key + threadIdx.x % kGroupThreads / kWarpSize * 16;
  const T* const k = M::mine_a() + group_row * 64;
  const T* const v = M::mine_b() + group_row * 64;
  const ScoreScale scale = score_scale(b.forward);
  float grad_k[kHeadDim / 8][4], grad_v[kHeadDim / 8][4];
  uint32_t ds[kOthers / 16][4];
  clear(grad_k), clear(grad_v);
  const auto turn = [&](auto is_first, int i) {
    constexpr bool kFirst = decltype(is_first)::value;
    float s[kOthers / 8][4], grad_p[kOthers / 8][4];
    uint32_t weights[kOthers / 16][4];
    T* const q = M::wait_a(i);
    clear_behind<kHeadDim, kOthers>(q, range, i);
    if (!kFirst) start_gradient<T, kHeadDim, kOthers>(grad_k, ds, M::a(i - 1));
    start_scores<T, kHeadDim, S::kMine, kOthers>(s, k, q);
    if (!kFirst) {
      wgmma_wait<1>();
      keep_in_order(grad_k);
      M::release_a(i - 1);
    }
    T* const grad_out = M::wait_b(i);
    clear_behind<kHeadDim, kOthers>(grad_out, range, i);
    start_scores<T, kHeadDim, S::kMine, kOthers>(grad_p, v, grad_out);
    wgmma_wait<1>();
    keep_in_order(s);
    const RowState* const states = M::states(i);
    weigh_keys<T, kHeadDim>(s, scale, states, group_key, warp_key,
                            [&](int n, int j, float p) { put_weight<T>(weights, n, j, p); });
    start_gradient<T, kHeadDim, kOthers>(grad_v, weights, grad_out);
    wgmma_wait<1>();
    keep_in_order(grad_p);
    pack_score_gradients<T>(ds, s, grad_p, states);
    wgmma_wait<0>();
    keep_in_order(grad_v);
    M::release_b(i);
  };
  const int turns = turns_of(range, kOthers);
  if (turns > 0) {
    mbarrier_wait(M::full_mine(), 0);
    turn(Flag<true>{}, 0);
    for (int i = 1; i < turns; ++i) turn(Flag<false>{}, i);
    start_gradient<T, kHeadDim, kOthers>(grad_k, ds, M::a(turns - 1));
    wgmma_wait<0>();
    keep_in_order(grad_k);
  }
  const Unit<T>& u = *M::unit();
  const int left = u.keys - group_key, head_dim = int(b.forward.head_dim);
  store_gradient<T, kHeadDim>(grad_k, float(b.forward.scale), left, head_dim,
                              [&](int r) { return key_gradient_row(b.grad_k, u, group_key + r); });
  store_gradient<T, kHeadDim>(grad_v, 1.0f, left, head_dim,
                              [&](int r) { return key_gradient_row(b.grad_v, u, group_key + r); });
}

// Barriers of warp w of both consumer warpgroups: what is handed over is there, or has been read.
GEMMA2_DEVICE int handed_barrier(int warp) { return 1 + warp; }
GEMMA2_DEVICE int taken_barrier(int warp) { return 5 + warp; }

// grad_v of 64 keys; hands p (1 - tanh^2) over. A turn's softmax runs beside the gradient of the
// turn before: behind both products it would leave the tensor cores idle, as the other warpgroup
// waits for what it hands over.
template <class T, int kHeadDim>
GEMMA2_DEVICE void consume_for_v(const AttentionBackwardParams& b, const Range& range) {
  using S = Shape<kHeadDim, true>;
  using M = Shared<T, kHeadDim, true>;
  constexpr int kOthers = S::kOthers;
  const int thread = threadIdx.x % kGroupThreads, warp = thread / kWarpSize;
  const ScoreScale scale = score_scale(b.forward);
  float grad[kHeadDim / 8][4];
  uint32_t weights[kOthers / 16][4];
  clear(grad);
  const auto grad_out_of = [&](int i) {
    T* const tile = M::wait_b(i);
    clear_behind<kHeadDim, kOthers>(tile, range, i);
    return tile;
  };
  const auto turn = [&](auto is_first, int i) {
    constexpr bool kFirst = decltype(is_first)::value;
    float s[kOthers / 8][4], p_of_turn[kOthers / 8][4];
    start_scores<T, kHeadDim, S::kMine, kOthers>(s, M::mine_a(), M::wait_a(i));
    if (!kFirst) start_gradient<T, kHeadDim, kOthers>(grad, weights, grad_out_of(i - 1));
    wgmma_wait<kFirst ? 0 : 1>();
    keep_in_order(s);
    weigh_keys<T, kHeadDim>(s, scale, M::states(i), range.mine_begin, range.mine_begin + 16 * warp,
                            [&](int n, int j, float p) { p_of_turn[n][j] = p; });
    if (!kFirst) named_barrier_sync(taken_barrier(warp), 2 * kWarpSize);
#pragma unroll
    for (int n = 0; n < kOthers / 8; ++n) {
      store_16(M::handed() + (n * kGroupThreads + thread) * 4,
               {{float_to_bits(s[n][0]), float_to_bits(s[n][1]), float_to_bits(s[n][2]),
                 float_to_bits(s[n][3])}});
    }
    named_barrier_arrive(handed_barrier(warp), 2 * kWarpSize);
    M::release_a(i);
    if (!kFirst) {
      wgmma_wait<0>();
      keep_in_order(grad);
      M::release_b(i - 1);
    }
    // Not before: a product's operands may not be written while others are at work.
    keep_in_order(p_of_turn);
    pack_weights<T>(weights, p_of_turn);
  };
  const int turns = turns_of(range, kOthers);
  if (turns > 0) {
    mbarrier_wait(M::full_mine(), 0);
    turn(Flag<true>{}, 0);
    for (int i = 1; i < turns; ++i) turn(Flag<false>{}, i);
    start_gradient<T, kHeadDim, kOthers>(grad, weights, grad_out_of(turns - 1));
    wgmma_wait<0>();
    keep_in_order(grad);
  }
  const Unit<T>& u = *M::unit();
  store_gradient<T, kHeadDim>(
      grad, 1.0f, u.keys - range.mine_begin, int(b.forward.head_dim),
      [&](int r) { return key_gradient_row(b.grad_v, u, range.mine_begin + r); });
}

// grad_k of 64 keys, with what consume_for_v hands over.
template <class T, int kHeadDim>
GEMMA2_DEVICE void consume_for_k(const AttentionBackwardParams& b, const Range& range) {
  using S = Shape<kHeadDim, true>;
  using M = Shared<T, kHeadDim, true>;
  constexpr int kOthers = S::kOthers;
  const int thread = threadIdx.x % kGroupThreads, warp = thread / kWarpSize;
  const int turns = turns_of(range, kOthers);
  float grad[kHeadDim / 8][4];
  uint32_t ds[kOthers / 16][4];
  clear(grad);
  const auto turn = [&](auto is_first, int i) {
    constexpr bool kFirst = decltype(is_first)::value;
    float grad_p[kOthers / 8][4], weights[kOthers / 8][4];
    if (!kFirst) start_gradient<T, kHeadDim, kOthers>(grad, ds, M::a(i - 1));
    start_scores<T, kHeadDim, S::kMine, kOthers>(grad_p, M::mine_b(), M::wait_b(i));
    if (!kFirst) {
      wgmma_wait<1>();
      keep_in_order(grad);
      M::release_a(i - 1);
    }
    wgmma_wait<0>();
    keep_in_order(grad_p);
    M::release_b(i);
    clear_behind<kHeadDim, kOthers>(M::wait_a(i), range, i);
    named_barrier_sync(handed_barrier(warp), 2 * kWarpSize);
#pragma unroll
    for (int n = 0; n < kOthers / 8; ++n) {
      const Vector16 w = load_16(M::handed() + (n * kGroupThreads + thread) * 4);
#pragma unroll
      for (int j = 0; j < 4; ++j) weights[n][j] = bits_to_float(w.words[j]);
    }
    if (i + 1 < turns) named_barrier_arrive(taken_barrier(warp), 2 * kWarpSize);
    pack_score_gradients<T>(ds, weights, grad_p, M::states(i));
  };
  if (turns > 0) {
    mbarrier_wait(M::full_mine(), 0);
    turn(Flag<true>{}, 0);
    for (int i = 1; i < turns; ++i) turn(Flag<false>{}, i);
    start_gradient<T, kHeadDim, kOthers>(grad, ds, M::a(turns - 1));
    wgmma_wait<0>();
    keep_in_order(grad);
  }
  const Unit<T>& u = *M::unit();
  store_gradient<T, kHeadDim>(
      grad, float(b.forward.scale), u.keys - range.mine_begin, int(b.forward.head_dim),
      [&](int r) { return key_gradient_row(b.grad_k, u, range.mine_begin + r); });
}

// Barriers, and what the consumers need of the unit.
template <class T, int kHeadDim, bool kOfKeys>
GEMMA2_DEVICE void prepare(const AttentionBackwardParams& b, const Unit<T>& u, bool by_maps) {
  using S = Shape<kHeadDim, kOfKeys>;
  using M = Shared<T, kHeadDim, kOfKeys>;
  const int thread = threadIdx.x;
  if (thread == 0) {
    *M::unit() = u;  // where it leaves the registers to the loop
    mbarrier_init(M::full_mine(), by_maps ? 1 : kGroupThreads);
    for (int i = 0; i < S::kStagesA; ++i) {
      mbarrier_init(M::full_a(i), by_maps ? 1 + (kOfKeys ? S::kOthers : 0) : kGroupThreads);
      mbarrier_init(M::empty_a(i), 4 * kConsumers);
    }
    for (int i = 0; i < S::kStagesB; ++i) {
      mbarrier_init(M::full_b(i), by_maps ? 1 : kGroupThreads);
      mbarrier_init(M::empty_b(i), 4 * kConsumers);
    }
    fence_mbarrier_init();
  }
  if (!kOfKeys && thread < S::kMine) {
    M::states(0)[thread] = row_state(b, u, thread < u.rows ? thread : u.rows - 1);
  }
  __syncthreads();
}

template <class T, int kHeadDim, bool kOfKeys>
GEMMA2_DEVICE void produce_either(const AttentionBackwardParams& b, const TileMaps& maps,
                                  const Unit<T>& u, const Range& range) {
  if (range.begin >= range.end) return;
  if (maps.used) return produce_by_maps<T, kHeadDim, kOfKeys>(b, maps, u, range);
  produce<T, kHeadDim, kOfKeys>(b, u, range);
}

#endif

template <class T, int kHeadDim>
__global__ void __launch_bounds__(kThreads, 1)
    attention_backward_wgmma_rows_kernel(const AttentionBackwardParams b, const AttentionPlan plan,
                                         const __grid_constant__ TileMaps maps) {
#if defined(GEMMA2_HOPPER)
  Unit<T> u;
  if (!make_unit(b.forward, plan, blockIdx.x, u)) return;
  const Range range{0, 0, u.keys, maps.used};
  prepare<T, kHeadDim, false>(b, u, maps.used);
  if (threadIdx.x < kGroupThreads) {
    give_registers<40>();
    produce_either<T, kHeadDim, false>(b, maps, u, range);
    return;
  }
  take_registers<232>();
  consume_rows<T, kHeadDim>(b, range);
#endif
}

template <class T, int kHeadDim>
__global__ void __launch_bounds__(kThreads, 1)
    attention_backward_wgmma_keys_kernel(const AttentionBackwardParams b, const AttentionPlan plan,
                                         int64_t sequences, const __grid_constant__ TileMaps maps) {
#if defined(GEMMA2_HOPPER)
  using S = Shape<kHeadDim, true>;
  const AttentionParams& p = b.forward;
  const int64_t key_begin = blockIdx.x / sequences * S::kMine;
  Unit<T> u;
  if (!make_unit(p, plan, unsigned(blockIdx.x % sequences), u) || key_begin >= u.keys) return;
  Range range{int(key_begin), 0, 0, maps.used};
  const int last = range.mine_begin + S::kMine < u.keys ? range.mine_begin + S::kMine : u.keys;
  rows_of_keys(p, u, range.mine_begin, last, range.begin, range.end);
  prepare<T, kHeadDim, true>(b, u, maps.used);
  if (threadIdx.x < kGroupThreads) {
    give_registers<40>();
    produce_either<T, kHeadDim, true>(b, maps, u, range);
    return;
  }
  take_registers<232>();
  if constexpr (!S::kHandsOver) {
    consume_keys<T, kHeadDim>(b, range);
  } else if (threadIdx.x < 2 * kGroupThreads) {
    consume_for_k<T, kHeadDim>(b, range);
  } else {
    consume_for_v<T, kHeadDim>(b, range);
  }
#endif
}

template <int kHeadDim, bool kOfKeys>
TileMaps make_maps(const AttentionBackwardParams& b) {
  using S = Shape<kHeadDim, kOfKeys>;
  const AttentionParams& p = b.forward;
  TileMaps maps{};
  const int rows = kOfKeys ? S::kOthers : S::kMine, keys = kOfKeys ? S::kMine : S::kOthers;
  maps.used = map_rows(kOfKeys ? maps.a : maps.mine_a, p, p.q, rows) &&
              map_rows(kOfKeys ? maps.b : maps.mine_b, p, b.grad_out, rows) &&
              map_keys(kOfKeys ? maps.mine_a : maps.a, p, p.k, keys) &&
              map_keys(kOfKeys ? maps.mine_b : maps.b, p, p.v, keys);
  return maps;
}

template <class T, int kHeadDim>
void launch_head_dim(const AttentionBackwardParams& b, cudaStream_t stream) {
  using Rows = Shape<kHeadDim, false>;
  using Keys = Shape<kHeadDim, true>;
  const char* op = "attention_backward";
  const AttentionParams& p = b.forward;
  const int64_t sequences = p.batch * p.num_kv_heads;
  const AttentionPlan rows = plan_backward(p, Rows::kMine), keys = plan_backward(p, 0);
  const int64_t row_units = rows.row_blocks * sequences;
  const int64_t key_units = divide_up(p.seqlen_k, Keys::kMine) * sequences;
  if (key_units > 0) {
    launch(op, attention_backward_wgmma_keys_kernel<T, kHeadDim>, dim3(unsigned(key_units)),
           kThreads, Keys::kSharedBytes, stream, b, keys, sequences, make_maps<kHeadDim, true>(b));
  }
  launch(op, attention_backward_wgmma_rows_kernel<T, kHeadDim>, dim3(unsigned(row_units)), kThreads,
         Rows::kSharedBytes, stream, b, rows, make_maps<kHeadDim, false>(b));
}

template <class T>
void launch_16_bit(const AttentionBackwardParams& b, cudaStream_t stream) {
  if (b.forward.head_dim <= 128) return launch_head_dim<T, 128>(b, stream);
  launch_head_dim<T, 256>(b, stream);
}

// Steps between rows are ints, and gradients are stored two elements at a time.
bool fits(const HeadsView& view, int64_t group) {
  constexpr int64_t kMost = 1 << 23;
  const int64_t head_stride = view.head_stride < 0 ? -view.head_stride : view.head_stride;
  return view.seqlen_stride >= 0 && view.seqlen_stride < kMost && group * head_stride < kMost;
}
bool pairs(const HeadsView& view) {
  return (view.batch_stride | view.seqlen_stride | view.head_stride) % 2 == 0 &&
         reinterpret_cast<uintptr_t>(view.data) % 4 == 0;
}

}  // namespace

bool attention_backward_wgmma_takes(const AttentionBackwardParams& b) {
  const AttentionParams& p = b.forward;
  const int64_t group = p.num_heads / p.num_kv_heads;
  return p.dtype != DType::kFloat32 && p.head_dim > 64 && fits(p.q, group) &&
         fits(b.grad_out, group) && fits(p.k, 1) && fits(p.v, 1) && pairs(b.grad_q) &&
         pairs(b.grad_k) && pairs(b.grad_v);
}

void launch_attention_backward_wgmma(const AttentionBackwardParams& b, cudaStream_t stream) {
  if (b.forward.dtype == DType::kBFloat16) return launch_16_bit<BFloat16>(b, stream);
  launch_16_bit<Half>(b, stream);
}

}  // namespace cuda
}  // namespace gemma2
