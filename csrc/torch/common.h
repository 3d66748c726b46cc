// What every binding needs: checks with one form of message, dtypes, row views, threads.
//
// Errors are std::invalid_argument; GEMMA2_BOX makes ValueError of them, with the text as it is.
#pragma once
#include <sys/mman.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdlib>
#include <optional>
#include <stdexcept>
#include <string>

#include "../calls.h"
#include "../params.h"
#include "../shares.h"
#include "value_error.h"

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

template <auto boxed>
void boxed_with_value_errors(StableIValue* stack, uint64_t num_args, uint64_t num_outputs) {
  try {
    boxed(stack, num_args, num_outputs);
  } catch (const std::invalid_argument& error) {
    throw_value_error(error.what());
  }
}

// TORCH_BOX, whose std::invalid_argument is ValueError up to torch 2.14 only: 2.15 lets nothing but
// pybind11's exceptions keep their type, and makes RuntimeError of others.
#define GEMMA2_BOX(func) (&gemma2::boxed_with_value_errors<&TORCH_BOX(func)>)

// kOrFloat64: of the ops that have kernels in float64, for checks of their gradients.
enum class Dtypes { kCommon, kOrFloat64 };

inline DType dtype_of(const char* op, const char* name, const Tensor& t,
                      Dtypes dtypes = Dtypes::kCommon) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::Double:
      if (dtypes == Dtypes::kOrFloat64) return DType::kFloat64;
      [[fallthrough]];
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

// Weights may have another dtype than what they multiply, but for float64.
inline DType weight_dtype_of(const char* op, const char* name, const Tensor& weight,
                             const Tensor& x) {
  const DType dtype = dtype_of(op, name, weight, Dtypes::kOrFloat64);
  if ((dtype == DType::kFloat64) != (x.scalar_type() == ScalarType::Double))
    check_same_dtype(op, name, weight, "x", x);
  return dtype;
}

inline std::string device_name(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  return (t.is_cuda() ? "cuda:" : "another device, index ") + std::to_string(t.get_device_index());
}

inline void check_device(const char* op, const char* name, const Tensor& t, const char* other_name,
                         const Tensor& other) {
  if (t.is_cpu() != other.is_cpu() || t.get_device_index() != other.get_device_index()) {
    fail(op, std::string(name) + " must be on " + other_name + "'s device " + device_name(other) +
                 ", got " + device_name(t));
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

// Blocks below 32 MiB stay with the process when they are freed, up to 64 MiB of them. The C
// library does so by itself once a block of that size has been freed; before that, results of some
// MiB go back each time and are faulted in again page by page, ten times what a norm of them takes.
inline void keep_freed_blocks() {
#ifdef __GLIBC__
  static const bool once = [] {
    void* volatile block = malloc((32 << 20) - (64 << 10));  // never touched
    free(block);
    return true;
  }();
  (void)once;
#endif
}

// From this size on the C library maps every allocation anew, to be faulted in page by page: a
// tenth of a GeGLU's time or more. Huge pages take a five hundredth of the faults.
constexpr int64_t kHugePagesFrom = 32 << 20;

inline void prepare_memory(const Tensor& out) {
  constexpr int64_t kKeepFrom = 128 << 10;  // the C library's first threshold
  const int64_t bytes = out.numel() * int64_t(out.element_size());
  if (bytes < kKeepFrom || !out.is_cpu()) return;
  keep_freed_blocks();
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = 4096;
  if (bytes < kHugePagesFrom) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(out.data_ptr()) + kPage - 1) / kPage * kPage;
  // No error where the system has none.
  madvise(reinterpret_cast<void*>(begin), bytes - kPage, MADV_HUGEPAGE);
#endif
}

// A gradient of another tensor, or a tensor beside it: same device, shape and dtype, any strides.
inline void check_like(const char* op, const char* name, const Tensor& t, const char* like_name,
                       const Tensor& like) {
  check_device(op, name, t, like_name, like);
  check_same_shape(op, name, t, like_name, like);
  check_same_dtype(op, name, t, like_name, like);
}

// An `_out` op's result: right shape and dtype, contiguous.
inline void check_out(const char* op, const char* name, const Tensor& out, const char* like_name,
                      const Tensor& like) {
  check_like(op, name, out, like_name, like);
  if (!out.is_contiguous()) fail(op, std::string(name) + " must be contiguous");
  prepare_memory(out);
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

// A (batch, seqlen, heads, head_dim) tensor whose last dimension is contiguous, or a (batch,
// capacity, heads) one.
inline HeadsView heads_view(const Tensor& t) {
  return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

inline bool is_int8(const Tensor& t) { return t.scalar_type() == ScalarType::Char; }

// Whether k_cache, (batch, capacity, num_kv_heads, head_dim), and v_cache are int8, with k_scales
// and v_scales beside them, which are checked.
inline bool check_scales(const char* op, const Tensor& k_cache, const Tensor& v_cache,
                         const std::optional<Tensor>& k_scales,
                         const std::optional<Tensor>& v_scales) {
  const bool scaled = is_int8(k_cache);
  if (k_scales.has_value() != scaled || v_scales.has_value() != scaled) {
    fail(op, std::string("k_scales and v_scales must be given with caches of int8, and only with "
                         "them, got ") +
                 (k_scales ? "k_scales" : "no k_scales") + ", " +
                 (v_scales ? "v_scales" : "no v_scales") + " and a k_cache of " +
                 torch::headeronly::toString(k_cache.scalar_type()));
  }
  if (!scaled) return false;
  check_like(op, "v_cache", v_cache, "k_cache", k_cache);
  const auto check = [&](const char* name, const Tensor& t) {
    check_device(op, name, t, "k_cache", k_cache);
    if (t.scalar_type() != ScalarType::Float) {
      fail(op, std::string(name) + " must be float32, got " +
                   torch::headeronly::toString(t.scalar_type()));
    }
    bool fits = t.dim() == 3;
    for (int64_t i = 0; fits && i < 3; ++i) fits = t.size(i) == k_cache.size(i);
    if (!fits) {
      fail(op, std::string(name) + " must have shape (batch, capacity, num_kv_heads) = (" +
                   std::to_string(k_cache.size(0)) + ", " + std::to_string(k_cache.size(1)) + ", " +
                   std::to_string(k_cache.size(2)) + "), got " + to_string(t));
    }
  };
  check("k_scales", *k_scales);
  check("v_scales", *v_scales);
  return true;
}

// How many threads share out `runs` runs.
inline int64_t sharing_threads(int64_t runs) {
  return std::min<int64_t>(torch::stable::get_num_threads(), runs);
}

// f(thread, begin, end) over [0, units), `run` units at a time, thread < threads.
template <class F>
void parallel_runs(int64_t units, int64_t run, int64_t threads, const F& f) {
  const int64_t runs = (units + run - 1) / run;
  if (threads <= 1) {
    if (units > 0) f(0, 0, units);
    return;
  }
  Shares shares(runs, threads);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t r; (r = shares.take(t)) >= 0;) f(t, r * run, std::min(units, (r + 1) * run));
    }
  });
}

// The same with thread < sharing_threads(runs).
template <class F>
void parallel_runs(int64_t units, int64_t run, const F& f) {
  parallel_runs(units, run, sharing_threads((units + run - 1) / run), f);
}

// f(thread, begin, end) over [0, units), thread < sharing_threads(units), in runs that carry at
// least ~64 KiB of work each; by one thread where there is less than four times that, since to wake
// another takes as long.
template <class F>
void parallel_units_of_threads(int64_t units, int64_t bytes_per_unit, const F& f) {
  constexpr int64_t kRunBytes = 64 << 10, kMostRuns = 1 << 20;
  if (units > 0 && units < 4 * kRunBytes / std::max<int64_t>(1, bytes_per_unit)) {
    return f(0, 0, units);
  }
  int64_t run = std::max<int64_t>(1, kRunBytes / std::max<int64_t>(1, bytes_per_unit));
  run = std::max(run, units / kMostRuns);
  parallel_runs(units, run, f);
}

// The same of f(begin, end).
template <class F>
void parallel_units(int64_t units, int64_t bytes_per_unit, const F& f) {
  parallel_units_of_threads(units, bytes_per_unit,
                            [&](int64_t, int64_t begin, int64_t end) { f(begin, end); });
}

// First in a binding: a thread that records (calls.h) notes this call of it.
template <class... Parameters, class... Args>
void note(void (*binding)(Parameters...), const Args&... args) {
  if (Calls* calls = Calls::of_this_thread()) calls->add([=] { binding(args...); });
}

}  // namespace gemma2
