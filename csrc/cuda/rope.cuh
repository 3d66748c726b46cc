// The rotation of a pair, for rope and for attention over keys that it appends.
#pragma once
#include "ptx.cuh"

namespace gemma2 {
namespace cuda {

// With the same roundings in every kernel.
GEMMA2_DEVICE void rotate_by(float c, float s, float x1, float x2, float& y1, float& y2) {
  y1 = fmaf(x1, c, -(x2 * s));
  y2 = fmaf(x2, c, x1 * s);
}

}  // namespace cuda
}  // namespace gemma2
