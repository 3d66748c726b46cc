// Binding of argmax, of logits on the CPU.
#include <cmath>

#include "../cpu/isa.h"
#include "common.h"

namespace gemma2 {
namespace {

// Of equals the first; NaN is the largest.
void argmax_out(const Tensor& x, Tensor out) {
  const char* op = "argmax";
  check_cpu(op, "x", x);
  if (dtype_of(op, "x", x) != DType::kFloat32 || x.dim() != 2 || x.size(1) == 0)
    fail(op, "x must be float32 of shape (rows, columns >= 1), got " + to_string(x));
  check_device(op, "out", out, "x", x);
  if (out.scalar_type() != ScalarType::Long || out.dim() != 1 || out.size(0) != x.size(0) ||
      !out.is_contiguous())
    fail(op, "out must be contiguous int64 of shape (rows,), got " + to_string(out));
  const Rows rows = as_rows(x);
  const int64_t columns = x.size(1), runs = (columns + kArgmaxRun - 1) / kArgmaxRun;
  std::vector<float> maxima(x.size(0) * runs);
  const ArgmaxParams p{static_cast<const float*>(rows.tensor.data_ptr()), rows.stride,
                       maxima.data(), x.size(0), columns};
  const CpuKernels& kernels = cpu_kernels();
  parallel_units(x.size(0) * runs, kArgmaxRun * sizeof(float),
                 [&](int64_t begin, int64_t end) { kernels.argmax_runs(p, begin, end); });
  for (int64_t row = 0; row < p.rows; ++row) {
    const float* largest = maxima.data() + row * runs;
    int64_t run = 0;
    for (int64_t i = 1; i < runs && !std::isnan(largest[run]); ++i)
      if (!(largest[i] <= largest[run])) run = i;
    const float* elements = p.x + row * p.x_stride;
    int64_t column = run * kArgmaxRun;
    const auto is_it = [&](float v) {
      return std::isnan(largest[run]) ? std::isnan(v) : v == largest[run];
    };
    while (!is_it(elements[column])) ++column;
    static_cast<int64_t*>(out.data_ptr())[row] = column;
  }
}

}  // namespace
}  // namespace gemma2

STABLE_TORCH_LIBRARY_IMPL(gemma2_ext, CPU, m) {
  m.impl("argmax_out", TORCH_BOX(&gemma2::argmax_out));
}
