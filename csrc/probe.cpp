#include "probe.h"

#include <atomic>
#include <chrono>
#include <stdexcept>
#include <thread>
#include <vector>

#include "cpu/isa.h"
#include "shares.h"

namespace gemma2 {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// Runs f(thread) on every thread, all at once, and returns the time from the common start.
template <class F>
double run_together(int threads, const F& f) {
  if (threads < 1) throw std::invalid_argument("gemma2_ext: threads must be at least 1");
  std::atomic<int> ready{0};
  std::atomic<bool> go{false};
  const auto body = [&](int t) {
    ready.fetch_add(1);
    while (!go.load(std::memory_order_acquire)) std::this_thread::yield();
    f(t);
  };
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t) others.emplace_back(body, t);
  while (ready.load() < threads - 1) std::this_thread::yield();
  const Clock::time_point start = Clock::now();
  go.store(true, std::memory_order_release);
  f(0);
  for (std::thread& thread : others) thread.join();
  return seconds_since(start);
}

}  // namespace

double probe_memory(uintptr_t a, uintptr_t b, uintptr_t out, int64_t bytes, int threads,
                    bool fetch) {
  const CpuKernels& kernels = cpu_kernels();
  const int64_t units = bytes / kProbeRun;
  if (bytes <= 0 || bytes % kProbeRun) {
    throw std::invalid_argument("gemma2_ext: bytes must be a multiple of " +
                                std::to_string(kProbeRun) + ", got " + std::to_string(bytes));
  }
  Shares shares(units, threads < 1 ? 0 : threads);
  return run_together(threads, [&](int t) {
    uint32_t sink = 0;
    ProbeParams p{};
    p.a = (const void*)a, p.b = (const void*)b, p.out = (void*)out;
    p.fetch = fetch;
    p.sink = &sink;
    for (int64_t unit; (unit = shares.take(t)) >= 0;) kernels.probe_memory(p, unit, unit + 1);
  });
}

double probe_multiply(const std::string& dtype, int threads, double seconds) {
  if (dtype != "float32" && dtype != "bfloat16" && dtype != "int8") {
    throw std::invalid_argument("gemma2_ext: dtype must be float32, bfloat16 or int8, got \"" +
                                dtype + "\"");
  }
  const CpuKernels& kernels = cpu_kernels();
  std::vector<double> rates(threads < 1 ? 0 : threads);
  run_together(threads, [&](int t) {
    uint32_t sink = 0;
    int64_t operations = 0;
    ProbeParams p{};
    p.sink = &sink, p.factor = 0x1p-8f, p.operations = &operations;
    p.dtype = dtype == "float32" ? DType::kFloat32 : DType::kBFloat16;
    p.int8 = dtype == "int8";
    const Clock::time_point start = Clock::now();
    do {
      kernels.probe_multiply(p, 0, 1);
    } while (seconds_since(start) < seconds);
    rates[t] = operations / seconds_since(start);
  });
  double total = 0;
  for (double rate : rates) total += rate;
  return total;
}

}  // namespace gemma2
