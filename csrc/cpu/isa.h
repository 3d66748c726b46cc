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
// Whether this processor's own prefetcher follows a single stream so well that fetching lines of it
// far ahead by instruction makes it slower.
bool follows_streams();

}  // namespace gemma2
