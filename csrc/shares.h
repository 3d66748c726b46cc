// Work in runs, shared out among threads.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

namespace gemma2 {

// Every thread has an equal share of the runs, next to each other. It takes them from the front,
// one after another as they lie in memory, and then helps the others from the back of theirs: on a
// machine that others use too, all would otherwise wait for the slowest.
class Shares {
 public:
  // At most 2^32 - 1 runs.
  Shares(int64_t runs, int64_t threads) : shares_(threads) {
    for (int64_t t = 0; t < threads; ++t)
      shares_[t].range = uint64_t(runs * t / threads) << 32 | uint64_t(runs * (t + 1) / threads);
  }

  // The run that `thread` does next, or -1 where none is left.
  int64_t take(int64_t thread) {
    const int64_t threads = int64_t(shares_.size());
    for (int64_t i = 0; i < threads; ++i) {
      const int64_t run = take(shares_[(thread + i) % threads], i == 0);
      if (run >= 0) return run;
    }
    return -1;
  }

 private:
  struct alignas(64) Share {
    std::atomic<uint64_t> range{0};  // [front, back), in one word
  };

  static int64_t take(Share& share, bool from_front) {
    uint64_t range = share.range.load(std::memory_order_relaxed);
    for (;;) {
      const uint64_t front = range >> 32, back = range & 0xffffffff;
      if (front >= back) return -1;
      const uint64_t rest = from_front ? (front + 1) << 32 | back : front << 32 | (back - 1);
      if (share.range.compare_exchange_weak(range, rest, std::memory_order_relaxed))
        return int64_t(from_front ? front : back - 1);
    }
  }

  std::vector<Share> shares_;
};

}  // namespace gemma2
