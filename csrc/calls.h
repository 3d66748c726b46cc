// Calls of ops, made once by torch's dispatcher and then again without it.
#pragma once
#include <cstddef>
#include <functional>
#include <utility>
#include <vector>

namespace gemma2 {

// A list of calls with their arguments, tensors held. Made again they check them as before.
class Calls {
 public:
  // From now to `stop` this thread's calls of the ops whose bindings note them are added.
  void record() { recording = this; }
  static void stop() { recording = nullptr; }
  static Calls* of_this_thread() { return recording; }

  void add(std::function<void()> call) { calls_.push_back(std::move(call)); }
  size_t size() const { return calls_.size(); }
  // Call i; what it throws is what the op threw.
  void run(size_t i) const { calls_[i](); }

 private:
  static inline thread_local Calls* recording = nullptr;
  std::vector<std::function<void()>> calls_;
};

}  // namespace gemma2
