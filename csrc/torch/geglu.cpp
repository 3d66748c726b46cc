// Binding of geglu.
#include "../cpu/isa.h"
#include "cuda.h"

namespace gemma2 {
namespace {

void geglu_out(const Tensor& gate, const Tensor& up, Tensor out) {
  const char* op = "geglu";
  const DType dtype = dtype_of(op, "gate", gate);
  check_device(op, "up", up, "gate", gate);
  if (gate.dim() < 1) fail(op, "gate must have shape (..., intermediate_size), got a scalar");
  check_same_shape(op, "up", up, "gate", gate);
  check_same_dtype(op, "up", up, "gate", gate);
  check_out(op, "out", out, "gate", gate);
  if (gate.numel() == 0) return;

  const Rows gate_rows = as_rows(gate), up_rows = as_rows(up);
  const GegluParams p{gate_rows.tensor.data_ptr(),
                      gate_rows.stride,
                      up_rows.tensor.data_ptr(),
                      up_rows.stride,
                      out.data_ptr(),
                      gate_rows.rows,
                      gate_rows.columns,
                      dtype};
#ifdef GEMMA2_WITH_CUDA
  if (!gate.is_cpu()) return run_on_cuda(gate, launch_geglu, p);
#endif
  const int64_t runs = (p.columns + kGegluColumns - 1) / kGegluColumns;
  const int64_t columns = p.columns < kGegluColumns ? p.columns : kGegluColumns;
  const CpuKernels& kernels = cpu_kernels();
  // An element costs an exponential and a division: as much time as 16 bytes of memory.
  parallel_units(p.rows * runs, columns * 16,
                 [&](int64_t begin, int64_t end) { kernels.geglu_runs(p, begin, end); });
}

Tensor geglu(const Tensor& gate, const Tensor& up) {
  Tensor out = torch::stable::new_empty(gate, gate.sizes());
  geglu_out(gate, up, out);
  return out;
}

template <class Library>
void implement(Library& m) {
  m.impl("geglu", TORCH_BOX(&geglu));
  m.impl("geglu_out", TORCH_BOX(&geglu_out));
}

}  // namespace
}  // namespace gemma2

GEMMA2_REGISTER(gemma2::implement)
