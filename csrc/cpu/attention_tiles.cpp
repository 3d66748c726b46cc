// Attention of many rows of bfloat16 by AMX's tiles (attention.cpp says what it computes).
#include "attention_many_rows.h"
#include "kernels.h"

namespace gemma2 {
namespace GEMMA2_ISA {

// Units of a work that is no stream, in bfloat16.
void attention_units(const AttentionWork& w, int64_t begin, int64_t end) {
  const Tiles tiles(kTileWords);
  for (int64_t index = begin; index < end; ++index) {
    Unit u;
    if (w.p.k_scales.data) {
      if (make_unit<int8_t>(w, index, u)) tile_unit<BFloat16, int8_t>(w, u);
    } else {
      if (make_unit<BFloat16>(w, index, u)) tile_unit<BFloat16, BFloat16>(w, u);
    }
  }
}

}  // namespace GEMMA2_ISA
}  // namespace gemma2
