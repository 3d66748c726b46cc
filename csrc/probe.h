// The machine's own limits, measured with threads of their own: see cpu/probe.cpp.
#pragma once
#include <cstdint>
#include <string>

namespace gemma2 {

// Seconds for one pass over `bytes` at each address that is not 0; out is written. Threads share
// the bytes out as the kernels do.
double probe_memory(uintptr_t a, uintptr_t b, uintptr_t out, int64_t bytes, int threads,
                    bool fetch);
// Additions and multiplications a second over about `seconds`; dtype "float32", "bfloat16" or
// "int8".
double probe_multiply(const std::string& dtype, int threads, double seconds);

}  // namespace gemma2
