// Bindings of geglu and its backward.
#include "../cpu/float64.h"
#include "../cpu/isa.h"
#include "cuda.h"

namespace gemma2 {
namespace {

void check_inputs(const char* op, const Tensor& gate, const Tensor& up) {
  if (gate.dim() < 1) fail(op, "gate must have shape (..., intermediate_size), got a scalar");
  check_like(op, "up", up, "gate", gate);
}

// f(begin, end) over the runs of all rows. An element costs an exponential and a division: as much
// time as 16 bytes of memory.
template <class F>
void parallel_runs(int64_t rows, int64_t columns, const F& f) {
  const int64_t runs = (columns + kGegluColumns - 1) / kGegluColumns;
  parallel_units(rows * runs, std::min(columns, kGegluColumns) * 16, f);
}

void geglu_out(const Tensor& gate, const Tensor& up, Tensor out) {
  note(geglu_out, gate, up, out);
  const char* op = "geglu";
  const DType dtype = dtype_of(op, "gate", gate, Dtypes::kOrFloat64);
  check_inputs(op, gate, up);
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
  if (dtype == DType::kFloat64) return float64::geglu(p);
  const CpuKernels& kernels = cpu_kernels();
  parallel_runs(p.rows, p.columns,
                [&](int64_t begin, int64_t end) { kernels.geglu_runs(p, begin, end); });
}

Tensor geglu(const Tensor& gate, const Tensor& up) {
  Tensor out = torch::stable::new_empty(gate, gate.sizes());
  geglu_out(gate, up, out);
  return out;
}

void geglu_backward_out(const Tensor& grad_out, const Tensor& gate, const Tensor& up,
                        Tensor grad_gate, Tensor grad_up) {
  const char* op = "geglu_backward";
  const DType dtype = dtype_of(op, "gate", gate, Dtypes::kOrFloat64);
  check_inputs(op, gate, up);
  check_like(op, "grad_out", grad_out, "gate", gate);
  check_out(op, "grad_gate", grad_gate, "gate", gate);
  check_out(op, "grad_up", grad_up, "gate", gate);
  if (gate.numel() == 0) return;

  const Rows grad_rows = as_rows(grad_out), gate_rows = as_rows(gate), up_rows = as_rows(up);
  const GegluBackwardParams p{grad_rows.tensor.data_ptr(),
                              grad_rows.stride,
                              gate_rows.tensor.data_ptr(),
                              gate_rows.stride,
                              up_rows.tensor.data_ptr(),
                              up_rows.stride,
                              grad_gate.data_ptr(),
                              grad_up.data_ptr(),
                              gate_rows.rows,
                              gate_rows.columns,
                              dtype};
#ifdef GEMMA2_WITH_CUDA
  if (!gate.is_cpu()) return run_on_cuda(gate, launch_geglu_backward, p);
#endif
  if (dtype == DType::kFloat64) return float64::geglu_backward(p);
  const CpuKernels& kernels = cpu_kernels();
  parallel_runs(p.rows, p.columns,
                [&](int64_t begin, int64_t end) { kernels.geglu_backward_runs(p, begin, end); });
}

template <class Library>
void implement(Library& m) {
  m.impl("geglu", GEMMA2_BOX(&geglu));
  m.impl("geglu_out", GEMMA2_BOX(&geglu_out));
  m.impl("geglu_backward_out", GEMMA2_BOX(&geglu_backward_out));
}

}  // namespace
}  // namespace gemma2

GEMMA2_REGISTER(gemma2::implement)
