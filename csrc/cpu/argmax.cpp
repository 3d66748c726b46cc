// The maxima of runs of a row, by which its argmax is found.
//
// A unit is a run of kArgmaxRun elements. NaN is larger than any number, as torch has it.
#include "kernels.h"
#include "simd.h"

namespace gemma2 {
namespace GEMMA2_ISA {

void argmax_runs(const ArgmaxParams& p, int64_t begin, int64_t end) {
  const int64_t runs = (p.columns + kArgmaxRun - 1) / kArgmaxRun;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t first = unit % runs * kArgmaxRun;
    const int64_t n = p.columns - first < kArgmaxRun ? p.columns - first : kArgmaxRun;
    const float* x = p.x + unit / runs * p.x_stride + first;
    VecF largest = set(-__builtin_inff()), nan = zero();
    for (int64_t i = 0; i < n; i += kLanes) {
      const VecF v = i + kLanes <= n ? load(x + i) : load_n(x + i, n - i, -__builtin_inff());
      largest = max(v, largest);
      nan = v == v ? nan : v;
    }
    p.maxima[unit] = reduce_max(largest) + reduce_sum(nan);
  }
}

}  // namespace GEMMA2_ISA
}  // namespace gemma2
