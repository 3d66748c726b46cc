// What every binding needs: checks with one form of message, dtypes, row views, threads.
//
// Errors are std::invalid_argument, which torch turns into ValueError with the text as it is.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "../params.h"

namespace gemma2 {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

[[noreturn]] inline void fail(const char* op, const std::string& message) {
  throw std::invalid_argument(std::string("gemma2_ext::") + op + ": " + message);
}

inline std::string to_string(const Tensor& t) {
  std::string s = "(";
  for (int64_t i = 0; i < t.dim(); ++i) s += (i ? ", " : "") + std::to_string(t.size(i));
  return s + (t.dim() == 1 ? ",)" : ")");
}

inline DType dtype_of(const char* op, const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      fail(op, std::string(name) + " must be float32, bfloat16 or float16, got " +
                   torch::headeronly::toString(t.scalar_type()));
  }
}

inline void check_same_dtype(const char* op, const char* name, const Tensor& t,
                             const char* other_name, const Tensor& other) {
  if (t.scalar_type() != other.scalar_type()) {
    fail(op, std::string(name) + " must have " + other_name + "'s dtype " +
                 torch::headeronly::toString(other.scalar_type()) + ", got " +
                 torch::headeronly::toString(t.scalar_type()));
  }
}

inline void check_cpu(const char* op, const char* name, const Tensor& t) {
  if (!t.is_cpu()) fail(op, std::string(name) + " must be on the CPU like the other tensors");
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t i = 0; i < a.dim(); ++i) {
    if (a.size(i) != b.size(i)) return false;
  }
  return true;
}

inline void check_same_shape(const char* op, const char* name, const Tensor& t,
                             const char* other_name, const Tensor& other) {
  if (!same_shape(t, other)) {
    fail(op, std::string(name) + " must have " + other_name + "'s shape " + to_string(other) +
                 ", got " + to_string(t));
  }
}

// An `_out` op's result: right shape and dtype, contiguous.
inline void check_out(const char* op, const char* name, const Tensor& out, const char* like_name,
                      const Tensor& like) {
  check_cpu(op, name, out);
  check_same_shape(op, name, out, like_name, like);
  check_same_dtype(op, name, out, like_name, like);
  if (!out.is_contiguous()) fail(op, std::string(name) + " must be contiguous");
}

// A tensor (..., columns) as rows with one distance between them. The tensor itself where its
// strides allow it, as they do for a slice of the last dimension; else a contiguous copy.
struct Rows {
  Tensor tensor;
  int64_t rows;
  int64_t columns;
  int64_t stride;
};

inline Rows as_rows(const Tensor& t) {
  const int64_t dim = t.dim(), columns = t.size(dim - 1);
  int64_t rows = 1, stride = 0;
  bool collapsible = columns <= 1 || t.stride(dim - 1) == 1;
  for (int64_t i = dim - 2; i >= 0; --i) {
    if (t.size(i) != 1) {
      if (rows == 1) {
        stride = t.stride(i);
      } else if (t.stride(i) != stride * rows) {
        collapsible = false;
      }
    }
    rows *= t.size(i);
  }
  if (collapsible) return {t, rows, columns, stride};
  return {torch::stable::contiguous(t), rows, columns, columns};
}

// The tensor itself where its last dimension is contiguous, else a copy.
inline Tensor last_dim_contiguous(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.size(last) <= 1 || t.stride(last) == 1 ? t : torch::stable::contiguous(t);
}

// A (batch, seqlen, heads, head_dim) tensor whose last dimension is contiguous.
inline HeadsView heads_view(const Tensor& t) {
  return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

// f(begin, end) over [0, units), shared out in runs that carry at least ~64 KiB of work each.
template <class F>
void parallel_units(int64_t units, int64_t bytes_per_unit, const F& f) {
  constexpr int64_t kGrainBytes = 64 << 10;
  const int64_t grain =
      bytes_per_unit >= kGrainBytes ? 1 : kGrainBytes / (bytes_per_unit > 0 ? bytes_per_unit : 1);
  torch::stable::parallel_for(0, units, grain, f);
}

}  // namespace gemma2
