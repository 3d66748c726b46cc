// A token of each row of logits, float32, drawn from softmax(logits / temperature) of what top-k,
// top-p and min-p leave. What they leave are the first of a row's elements in falling order, of
// equals the first ones, so nothing has to be sorted:
//
// - All elements race (see draw.h). A winner that is among those that are left has won among them
//   too. If it is not, neither are those below it, and those above it race anew. By top-p that is
//   a matter of the sum of those above it. At 0.95 one race in twenty has to be run anew.
// - The k-th largest element: 256 groups of threads have their largest, and the (k / blocks)-th of
//   those is not above it, for each block has as many elements from there on. Few elements are:
//   each block ranks them all. Where they do not fit, the k-th is found bit by bit.
//
// As for argmax a cluster of blocks shares a row. Sums are added up in an order that depends on the
// device alone. Bound by the ways over the row, each of some 2 us (counted) by eight
// multiprocessors, and by a barrier of the cluster behind each.
//
// draw_kernel: at most 64 registers, 35 KiB of shared memory.
#include "../draw.h"
#include "argmax.cuh"
#include "kernels.h"

namespace gemma2 {
namespace cuda {
namespace {

constexpr int kGroups = kRowThreads / 4;  // of threads, in the search for the k-th largest
constexpr int kMostFound = 2048;          // elements that are ranked

// What each warp has to say in a turn. The low halves are as far behind the high ones as
// load_of_block goes.
struct Partials {
  float high[kRowWarps], low[kRowWarps];
};
static_assert(kRowWarps == kWarpSize, "");

struct Shared {
  Partials partials[2];  // of a turn and the next
  uint64_t groups[kGroups];
  float high[kMostFound], low[kMostFound];  // keys that the block has found
  uint64_t all[kMostFound];                 // and all blocks have
  uint64_t result;
  float found;  // the bits of a count
};
GEMMA2_DEVICE Shared& shared() { return *reinterpret_cast<Shared*>(shared_memory()); }

// The blocks of a row, as this thread sees them; all of their threads call the same functions.
struct Blocks {
  int count, rank, turn;

  GEMMA2_DEVICE void meet() const {
    if (count > 1) {
      cluster_barrier();
    } else {
      __syncthreads();
    }
  }
  template <int kCount>
  GEMMA2_DEVICE void load(float (&x)[kCount], const float* place, int block) const {
    if (count > 1) return load_of_block(x, place, block);
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = place[kWarpSize * i];
  }
  // All threads' numbers by `op`, the same in all of them.
  template <class Op>
  GEMMA2_DEVICE uint64_t combine(uint64_t mine, const Op& op) {
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const auto over_lanes = [&](uint64_t x) {
#pragma unroll
      for (int mask = kWarpSize / 2; mask > 0; mask /= 2) x = op(x, shuffle_xor(x, mask));
      return x;
    };
    Partials& partials = shared().partials[turn];
    turn ^= 1;  // what some still read, no one writes before they have come to the next barrier
    mine = over_lanes(mine);
    if (lane == 0) partials.high[warp] = high_half(mine), partials.low[warp] = low_half(mine);
    meet();
    uint64_t sum = 0;
    for (int block = 0; block < count; ++block) {
      float both[2];
      load(both, partials.high + lane, block);
      sum = block == 0 ? whole(both[0], both[1]) : op(sum, whole(both[0], both[1]));
    }
    return over_lanes(sum);
  }
  GEMMA2_DEVICE uint64_t largest(uint64_t mine) { return combine(mine, larger); }
  GEMMA2_DEVICE uint64_t sum(uint64_t mine) {
    return combine(mine, [](uint64_t a, uint64_t b) { return a + b; });
  }
  GEMMA2_DEVICE float sum_of_floats(float mine) {
    const uint64_t bits = combine(float_to_bits(mine), [](uint64_t a, uint64_t b) {
      return uint64_t(float_to_bits(bits_to_float(uint32_t(a)) + bits_to_float(uint32_t(b))));
    });
    return bits_to_float(uint32_t(bits));
  }
};

template <bool kAligned>
struct Row {
  const float* x;
  int64_t columns;
  Blocks blocks;

  template <class F>
  GEMMA2_DEVICE void for_each(const F& f) const {
    for_each_of_row<kAligned, 2>(x, columns, blocks.rank, blocks.count, f);
  }

  // The key of the k-th largest element, of no more than there are. `mine`: the thread's largest.
  GEMMA2_DEVICE uint64_t kth_largest(int64_t k, uint64_t mine) {
    Shared& s = shared();
    const int thread = threadIdx.x;
    // No more than the k-th: each block has k / blocks elements from there on.
    mine = larger(mine, shuffle_xor(mine, 1));
    mine = larger(mine, shuffle_xor(mine, 2));
    if (thread % 4 == 0) s.groups[thread / 4] = mine;
    if (thread == 0) s.result = 0, s.found = bits_to_float(0);
    __syncthreads();
    const int64_t of_block = (k + blocks.count - 1) / blocks.count;
    if (of_block <= kGroups) {
      int above = 0;
      for (int i = thread % 4; i < kGroups; i += 4) above += s.groups[i] > mine;
      above += shuffle_xor(above, 1);
      above += shuffle_xor(above, 2);
      // Keys differ, but those of groups that have no element: they are 0, as is the result then.
      if (thread % 4 == 0 && above == of_block - 1) s.result = mine;
    }
    __syncthreads();
    const uint64_t bound = ~blocks.largest(~s.result);

    for_each([&](float value, uint32_t column) {
      const uint64_t key = key_of(value, column);
      if (key < bound) return;
      const int at = atomicAdd(reinterpret_cast<int*>(&s.found), 1);
      if (at < kMostFound) s.high[at] = high_half(key), s.low[at] = low_half(key);
    });
    blocks.meet();
    int64_t all = 0;
    for (int block = 0; block < blocks.count; ++block) {
      float found[1];
      blocks.load(found, &s.found, block);
      const int count = int(float_to_bits(found[0]));
      for (int64_t i = thread; i < count && all + i < kMostFound; i += kRowThreads) {
        float high[1], low[1];
        blocks.load(high, s.high + i, block);
        blocks.load(low, s.low + i, block);
        s.all[all + i] = whole(high[0], low[0]);
      }
      all += count;
    }
    __syncthreads();
    if (all > kMostFound) return kth_largest_by_bits(k);
    for (int i = thread; i < all; i += kRowThreads) {
      const uint64_t key = s.all[i];
      int above = 0;
      for (int j = 0; j < all; ++j) above += s.all[j] > key;
      if (above == k - 1) s.result = key;
    }
    __syncthreads();
    return s.result;
  }

  GEMMA2_DEVICE uint64_t kth_largest_by_bits(int64_t k) {
    uint64_t result = 0;
    for (int bit = 63; bit >= 0; --bit) {
      const uint64_t trial = result | uint64_t(1) << bit;
      uint64_t count = 0;
      for_each([&](float value, uint32_t column) { count += key_of(value, column) >= trial; });
      if (blocks.sum(count) >= uint64_t(k)) result = trial;
    }
    return result;
  }
};

template <bool kAligned>
__global__ void __launch_bounds__(kRowThreads) draw_kernel(const DrawParams p, int blocks) {
  allow_next_kernel();
  wait_for_previous_kernels();
  const int64_t at = blockIdx.x / unsigned(blocks);
  const int rank = int(blockIdx.x) % blocks;
  Row<kAligned> row{p.logits + at * p.logits_stride, p.columns, {blocks, rank, 0}};
  const uint32_t first_key = p.keys[2 * at], second_key = p.keys[2 * at + 1];

  uint64_t mine = 0;
  row.for_each([&](float value, uint32_t column) { mine = larger(mine, key_of(value, column)); });
  uint64_t winner = row.blocks.largest(mine);
  const float largest = row.x[column_of(winner)];
  // Else the first that is not finite is drawn, or of a row of -inf the first.
  if (fabsf(largest) < INFINITY) {
    const float scale = p.inverse_temperature * kLog2E;
    const auto weight = [&](float value) { return exp2_approx((value - largest) * scale); };
    const auto mass_above = [&](uint64_t key) {
      float sum = 0.0f;
      row.for_each([&](float value, uint32_t column) {
        if (key_of(value, column) > key) sum += weight(value);
      });
      return row.blocks.sum_of_floats(sum);
    };
    // The least key that is left.
    uint64_t floor = p.top_k > 0 && p.top_k < p.columns ? row.kth_largest(p.top_k, mine) : 0;
    const float wanted = p.top_p < 1.0f ? p.top_p * mass_above(floor == 0 ? 0 : floor - 1) : 0.0f;
    while (true) {
      uint64_t best = 0;
      row.for_each([&](float value, uint32_t column) {
        if (key_of(value, column) < floor || !(weight(value) >= p.min_p)) return;
        const float score =
            draw_score(value - largest, p.inverse_temperature, first_key, second_key, column);
        best = larger(best, key_of(score, column));
      });
      winner = row.blocks.largest(best);
      if (p.top_p >= 1.0f) break;
      const uint32_t column = column_of(winner);
      const uint64_t key = key_of(row.x[column], column);
      const float above = mass_above(key);
      if (above < wanted || above == 0.0f) break;
      floor = key + 1;
    }
  }
  if (blocks > 1) cluster_barrier_after_reads();  // no block ends before it has been read
  if (rank == 0 && threadIdx.x == 0) p.out[at] = int64_t(column_of(winner));
}

}  // namespace
}  // namespace cuda

void launch_draw(const DrawParams& p, cudaStream_t stream) {
  using namespace cuda;
  const char* op = "draw";
  if (p.rows == 0) return;
  // Where logit / temperature is exact enough without the largest logit taken off.
  constexpr float kExact = 1000.0f;
  const bool of_all = p.top_k == 0 && p.top_p == 1.0f && p.min_p == 0.0f;
  if (of_all && p.inverse_temperature <= kExact) {
    ArgmaxParams a{};
    a.x = p.logits, a.x_stride = p.logits_stride, a.rows = p.rows, a.columns = p.columns;
    a.keys = p.keys, a.inverse_temperature = p.inverse_temperature, a.out = p.out;
    return launch_argmax(a, stream);
  }
  const int blocks = row_blocks(op, p.rows, p.columns);
  const bool aligned = is_aligned(p.logits, p.logits_stride * sizeof(float));
  launch_clusters(op, aligned ? draw_kernel<true> : draw_kernel<false>, blocks,
                  dim3(unsigned(p.rows * blocks)), kRowThreads, int64_t(sizeof(Shared)), stream, p,
                  blocks);
}

}  // namespace gemma2
