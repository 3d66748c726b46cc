// What AMX's tiles can do (probe.cpp): products whose factors never leave the registers.
#include "kernels.h"
#include "tiles.h"

namespace gemma2 {
namespace GEMMA2_ISA {

// A unit is kProbeSteps rounds of products of bfloat16 pairs, or of int8.
void probe_multiply(const ProbeParams& p, int64_t begin, int64_t end) {
  const Tiles tiles(kTileWords);  // all zeros
  for (int64_t unit = begin; unit < end; ++unit) {
    for (int64_t step = 0; step < kProbeSteps; ++step) {
      if (p.int8) {
        Tiles::multiply_bytes<0, 4, 6>(), Tiles::multiply_bytes<1, 4, 7>();
        Tiles::multiply_bytes<2, 5, 6>(), Tiles::multiply_bytes<3, 5, 7>();
      } else {
        Tiles::multiply_pairs<0, 4, 6>(), Tiles::multiply_pairs<1, 4, 7>();
        Tiles::multiply_pairs<2, 5, 6>(), Tiles::multiply_pairs<3, 5, 7>();
      }
    }
    *p.operations += 4 * kProbeSteps * kTileFloats * kTileWords * 2 * (p.int8 ? 4 : 2);
  }
}

}  // namespace GEMMA2_ISA
}  // namespace gemma2
