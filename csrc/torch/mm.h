// torch's own product of matrices.
#pragma once
#include <torch/csrc/stable/stableivalue_conversions.h>

#include <array>

#include "common.h"

namespace gemma2 {

// As a matrix (rows, t.size(-1)).
inline Tensor as_matrix(const Tensor& t, int64_t rows) {
  const std::array<int64_t, 2> shape{rows, t.size(t.dim() - 1)};
  return torch::stable::reshape(t, {shape.data(), 2});
}

// out = a b, out contiguous. On CUDA out may be float32 where a and b are 16-bit.
inline void torch_mm_out(const Tensor& a, const Tensor& b, const Tensor& out, int64_t rows) {
  using torch::stable::detail::from;
  const auto call = [](const char* overload, auto stack) {
    TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("aten::mm", overload, stack.data(), TORCH_ABI_VERSION));
    torch::stable::detail::to<Tensor>(stack[0]);  // takes the returned handle, to release it
  };
  const Tensor c = as_matrix(out, rows);
  if (out.scalar_type() == a.scalar_type()) {
    call("out", std::array<StableIValue, 3>{from(a), from(b), from(c)});
  } else {
    call("dtype_out",
         std::array<StableIValue, 4>{from(a), from(b), from(out.scalar_type()), from(c)});
  }
}

}  // namespace gemma2
