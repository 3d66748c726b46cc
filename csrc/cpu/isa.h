// Which instruction set the CPU kernels use: the best one that was compiled and that this processor
// has, or a lower one by GEMMA2_EXT_CPU_ISA or set_cpu_isa().
#pragma once
#include <string>
#include <vector>

#include "kernels.h"

namespace gemma2 {

// Names from the lowest up, e.g. "scalar", "avx2", "avx512", or "scalar", "neon_dot".
std::vector<std::string> supported_cpu_isas();
std::string cpu_isa();
// Throws std::invalid_argument where the name is unknown or this processor lacks it.
void set_cpu_isa(const std::string& name);
// The kernels of the instruction set in force.
const CpuKernels& cpu_kernels();
// An AMD Zen 4, which is fed from memory in other ways than a Zen 5: one stream by its own
// prefetcher alone, and what is fetched by instruction into its second-level cache.
bool is_zen4();
// Takes its ways on another processor too, or leaves them: for tests.
void set_zen4(bool zen4);

}  // namespace gemma2
