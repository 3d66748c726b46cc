// The table of kernels of one instruction set; compiled once per instruction set.
#include "kernels.h"

namespace gemma2 {
namespace GEMMA2_ISA {

#define GEMMA2_ENTRY(name, Params) name,
const CpuKernels kKernels = {GEMMA2_CPU_KERNELS(GEMMA2_ENTRY)};
#undef GEMMA2_ENTRY

}  // namespace GEMMA2_ISA
}  // namespace gemma2
