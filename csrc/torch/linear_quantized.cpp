// Binding of linear and logits over packed weights, and of quantize.
#include <array>
#include <cmath>

#include "../cpu/isa.h"
#include "../cpu/linear.h"
#include "../cpu/quantized.h"
#include "cuda.h"
#include "gemm.h"

namespace gemma2 {
namespace {

// What differs between the formats.
struct Format {
  ScalarType data_type, scales_type;
  int64_t row_bytes;  // of kQuantDepth columns of a row
  // Elements of a row of scales: some, and so many for kQuantDepth columns.
  int64_t scales_first, scales_each;
  void (*CpuKernels::*pack)(const LinearParams&, int64_t, int64_t);
  void (*CpuKernels::*units)(const LinearParams&, int64_t, int64_t);
  void (*CpuKernels::*quantize)(const QuantizeParams&, int64_t, int64_t);
  void (*CpuKernels::*embed)(const EmbeddingParams&, int64_t, int64_t);
#ifdef GEMMA2_WITH_CUDA
  void (*launch)(const LinearParams&, cudaStream_t);
  void (*launch_dequantize)(const DequantizeParams&, cudaStream_t);
  void (*launch_embedding)(const EmbeddingParams&, cudaStream_t);
#endif
};

#ifdef GEMMA2_WITH_CUDA
#define GEMMA2_LAUNCHERS(format) \
  , &launch_linear_##format, &launch_dequantize_##format, &launch_embedding_##format
#else
#define GEMMA2_LAUNCHERS(format)
#endif

const Format kInt8{ScalarType::Char,
                   ScalarType::BFloat16,
                   kInt8RowBytes,
                   0,
                   kQuantDepth / kInt8Group,
                   &CpuKernels::linear_int8_pack,
                   &CpuKernels::linear_int8_units,
                   &CpuKernels::quantize_int8_blocks,
                   &CpuKernels::embed_int8_rows GEMMA2_LAUNCHERS(int8)};
const Format kInt4{ScalarType::Byte,
                   ScalarType::Char,
                   kInt4RowBytes,
                   kInt4FactorBytes,
                   kQuantDepth / kInt4Group,
                   &CpuKernels::linear_int4_pack,
                   &CpuKernels::linear_int4_units,
                   &CpuKernels::quantize_int4_blocks,
                   &CpuKernels::embed_int4_rows GEMMA2_LAUNCHERS(int4)};

int64_t piece_count(int64_t in_features) { return (in_features + kQuantDepth - 1) / kQuantDepth; }
int64_t block_count(int64_t out_features) { return (out_features + kQuantRows - 1) / kQuantRows; }

// A packed tensor: dtype, shape (rows, columns) and contiguous.
void check_packed(const char* op, const char* name, const Tensor& t, ScalarType type, int64_t rows,
                  int64_t columns, const std::string& why, const char* like_name,
                  const Tensor& like) {
  check_device(op, name, t, like_name, like);
  if (t.scalar_type() != type) {
    fail(op, std::string(name) + " must be " + torch::headeronly::toString(type) + ", got " +
                 torch::headeronly::toString(t.scalar_type()));
  }
  if (t.dim() != 2 || (rows >= 0 && t.size(0) != rows) || t.size(1) != columns) {
    fail(op, std::string(name) + " must have shape (out_features, " + std::to_string(columns) +
                 ") " + why + ", got " + to_string(t));
  }
  if (!t.is_contiguous()) fail(op, std::string(name) + " must be contiguous");
}

void check_weight(const char* op, const Format& format, const Tensor& data, const Tensor& scales,
                  int64_t rows, int64_t in_features, const char* like_name, const Tensor& like) {
  const int64_t pieces = piece_count(in_features);
  const std::string why = "for in_features = " + std::to_string(in_features);
  check_packed(op, "data", data, format.data_type, rows, pieces * format.row_bytes, why, like_name,
               like);
  check_packed(op, "scales", scales, format.scales_type, data.size(0),
               format.scales_first + pieces * format.scales_each,
               why + " and data of shape " + to_string(data), like_name, like);
}

#ifdef GEMMA2_WITH_CUDA
// Few rows of 16 bits by the kernel that reads packed weights; all else over weights that are
// unpacked first, into x's dtype.
void linear_on_cuda(const Format& format, const LinearParams& p, const Tensor& x,
                    const Tensor& out) {
  if (p.dtype != DType::kFloat32 && p.rows <= kLinearCudaRows)
    return run_on_cuda(x, format.launch, p);
  const Tensor weight = torch::stable::new_empty(x, {p.out_features, p.in_features});
  run_on_cuda(x, format.launch_dequantize,
              DequantizeParams{p.weight, p.scales, weight.data_ptr(), p.out_features, p.in_features,
                               p.dtype});
  const bool logits = out.scalar_type() != x.scalar_type() || p.softcap != 0;
  using torch::stable::detail::from;
  if (logits) {
    const std::optional<double> softcap =
        p.softcap == 0 ? std::nullopt : std::optional<double>(p.softcap);
    std::array<StableIValue, 4> stack{from(x), from(weight), from(softcap), from(out)};
    TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("gemma2_ext::logits_out", "", stack.data(), TORCH_ABI_VERSION));
  } else {
    std::array<StableIValue, 3> stack{from(x), from(weight), from(out)};
    TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("gemma2_ext::linear_out", "", stack.data(), TORCH_ABI_VERSION));
  }
}
#endif

void run_on_cpu(const Format& format, LinearParams p, const Tensor& x) {
  const int64_t rows = p.rows, slice = rows_of_slice(rows);
  const int64_t packed_bytes = slice * piece_count(p.in_features) * kQuantPackedBytes;
  const Tensor packed = torch::stable::new_empty(x, {&packed_bytes, 1}, ScalarType::Byte);
  p.packed_x = packed.data_ptr();
  p.zen4 = is_zen4();
  const int64_t unit_rows = kQuantUnitBlocks * kQuantRows;
  const int64_t unit_bytes = unit_rows * piece_count(p.in_features) * format.row_bytes;
  const CpuKernels& kernels = cpu_kernels();
  for (int64_t first = 0; first < rows; first += slice) {
    LinearParams part = p;
    part.rows = std::min(slice, rows - first);
    part.x = offset(p.x, first * p.x_stride, p.dtype);
    part.out = offset(p.out, first * p.out_stride, p.out_dtype);
    parallel_units(part.rows, p.in_features * 8,
                   [&](int64_t begin, int64_t end) { (kernels.*format.pack)(part, begin, end); });
    // Many rows carry more work a byte.
    parallel_units(divide_up(p.out_features, unit_rows), unit_bytes * (1 + part.rows / 16),
                   [&](int64_t begin, int64_t end) { (kernels.*format.units)(part, begin, end); });
  }
}

void run(const char* op, const char* name, const Format& format, const Tensor& x,
         const Tensor& data, const Tensor& scales, double softcap, Tensor out,
         ScalarType out_type) {
  const DType dtype = dtype_of(op, name, x);
  if (x.dim() < 1)
    fail(op, std::string(name) + " must have shape (..., in_features), got a scalar");
  const int64_t in_features = x.size(x.dim() - 1);
  check_weight(op, format, data, scales, -1, in_features, name, x);
  check_device(op, "out", out, name, x);
  const int64_t out_features = data.size(0);
  bool right = out.dim() == x.dim() && out.size(x.dim() - 1) == out_features;
  for (int64_t i = 0; right && i + 1 < x.dim(); ++i) right = out.size(i) == x.size(i);
  if (!right) {
    fail(op, std::string("out must have shape (*") + name + ".shape[:-1], out_features) = (..., " +
                 std::to_string(out_features) + ") for " + name + " of shape " + to_string(x) +
                 ", got " + to_string(out));
  }
  if (out.scalar_type() != out_type) {
    fail(op, std::string("out must be ") + torch::headeronly::toString(out_type) + ", got " +
                 torch::headeronly::toString(out.scalar_type()));
  }
  if (!out.is_contiguous()) fail(op, "out must be contiguous");
  prepare_memory(out);
  if (out.numel() == 0) return;
  if (in_features == 0) {
    torch::stable::zero_(out);
    return;
  }

  const Rows x_rows = as_rows(x);
  LinearParams p{};
  p.x = x_rows.tensor.data_ptr();
  p.x_stride = x_rows.stride;
  p.weight = data.data_ptr();
  p.scales = scales.data_ptr();
  p.out = out.data_ptr();
  p.out_stride = out_features;
  p.rows = x_rows.rows;
  p.in_features = in_features;
  p.out_features = out_features;
  p.softcap = float(softcap);
  p.dtype = dtype;
  p.out_dtype = dtype_of(op, "out", out);
#ifdef GEMMA2_WITH_CUDA
  if (!x.is_cpu()) return linear_on_cuda(format, p, x, out);
#endif
  run_on_cpu(format, p, x);
}

void check_softcap(const char* op, const std::optional<double>& softcap) {
  if (softcap && !(*softcap > 0 && std::isfinite(*softcap))) {
    fail(op, "softcap must be positive and finite, or None, got " + std::to_string(*softcap));
  }
}

Tensor new_out(const Tensor& x, const Tensor& data, ScalarType type) {
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  if (!shape.empty() && data.dim() > 0) shape.back() = data.size(0);
  return torch::stable::new_empty(x, {shape.data(), shape.size()}, type);
}

void linear_int8_out(const Tensor& x, const Tensor& data, const Tensor& scales, Tensor out) {
  note(linear_int8_out, x, data, scales, out);
  run("linear_int8", "x", kInt8, x, data, scales, 0, out, x.scalar_type());
}

Tensor linear_int8(const Tensor& x, const Tensor& data, const Tensor& scales) {
  Tensor out = new_out(x, data, x.scalar_type());
  linear_int8_out(x, data, scales, out);
  return out;
}

void linear_int4_out(const Tensor& x, const Tensor& data, const Tensor& scales, Tensor out) {
  note(linear_int4_out, x, data, scales, out);
  run("linear_int4", "x", kInt4, x, data, scales, 0, out, x.scalar_type());
}

Tensor linear_int4(const Tensor& x, const Tensor& data, const Tensor& scales) {
  Tensor out = new_out(x, data, x.scalar_type());
  linear_int4_out(x, data, scales, out);
  return out;
}

void logits_int8_out(const Tensor& hidden, const Tensor& data, const Tensor& scales,
                     std::optional<double> softcap, Tensor out) {
  check_softcap("logits_int8", softcap);
  run("logits_int8", "hidden", kInt8, hidden, data, scales, softcap.value_or(0), out,
      ScalarType::Float);
}

Tensor logits_int8(const Tensor& hidden, const Tensor& data, const Tensor& scales,
                   std::optional<double> softcap) {
  Tensor out = new_out(hidden, data, ScalarType::Float);
  logits_int8_out(hidden, data, scales, softcap, out);
  return out;
}

void logits_int4_out(const Tensor& hidden, const Tensor& data, const Tensor& scales,
                     std::optional<double> softcap, Tensor out) {
  check_softcap("logits_int4", softcap);
  run("logits_int4", "hidden", kInt4, hidden, data, scales, softcap.value_or(0), out,
      ScalarType::Float);
}

Tensor logits_int4(const Tensor& hidden, const Tensor& data, const Tensor& scales,
                   std::optional<double> softcap) {
  Tensor out = new_out(hidden, data, ScalarType::Float);
  logits_int4_out(hidden, data, scales, softcap, out);
  return out;
}

void quantize_out(const char* op, const Format& format, const Tensor& weight, Tensor data,
                  Tensor scales) {
  QuantizeParams p{};
  p.dtype = dtype_of(op, "weight", weight);
  if (weight.dim() != 2)
    fail(op, "weight must have shape (out_features, in_features), got " + to_string(weight));
  check_cpu(op, "weight", weight);
  p.out_features = weight.size(0);
  p.in_features = weight.size(1);
  check_weight(op, format, data, scales, p.out_features, p.in_features, "weight", weight);
  if (p.out_features == 0) return;
  if (p.in_features == 0) {
    if (scales.numel() > 0) torch::stable::zero_(scales);
    return;
  }
  const Rows rows = as_rows(weight);
  p.weight = rows.tensor.data_ptr();
  p.weight_stride = rows.stride;
  p.data = data.data_ptr();
  p.scales = scales.data_ptr();
  const CpuKernels& kernels = cpu_kernels();
  parallel_units(block_count(p.out_features), kQuantRows * p.in_features * 16,
                 [&](int64_t begin, int64_t end) { (kernels.*format.quantize)(p, begin, end); });
}

void quantize_int8_out(const Tensor& weight, Tensor data, Tensor scales) {
  quantize_out("quantize_int8", kInt8, weight, data, scales);
}

void quantize_int4_out(const Tensor& weight, Tensor data, Tensor scales) {
  quantize_out("quantize_int4", kInt4, weight, data, scales);
}

void embedding_out(const char* op, const Format& format, const Tensor& ids, const Tensor& data,
                   const Tensor& scales, double scale, Tensor out) {
  if (ids.scalar_type() != ScalarType::Long || !ids.is_contiguous()) {
    fail(op, std::string("ids must be contiguous int64, got ") +
                 torch::headeronly::toString(ids.scalar_type()) + " " + to_string(ids));
  }
  check_device(op, "out", out, "ids", ids);
  bool right = out.dim() == ids.dim() + 1 && out.is_contiguous();
  for (int64_t i = 0; right && i < ids.dim(); ++i) right = out.size(i) == ids.size(i);
  if (!right) {
    fail(op, "out must be contiguous of shape (*ids.shape, in_features) for ids of shape " +
                 to_string(ids) + ", got " + to_string(out));
  }
  EmbeddingParams p{};
  p.dtype = dtype_of(op, "out", out);
  p.in_features = out.size(ids.dim());
  check_weight(op, format, data, scales, -1, p.in_features, "ids", ids);
  p.ids = static_cast<const int64_t*>(ids.data_ptr());
  p.out_features = data.size(0);
  // On a GPU they are not looked at, which would make every call wait for it.
  for (int64_t i = 0; ids.is_cpu() && i < ids.numel(); ++i) {
    if (p.ids[i] < 0 || p.ids[i] >= p.out_features) {
      fail(op, "ids must be in [0, out_features = " + std::to_string(p.out_features) + "), got " +
                   std::to_string(p.ids[i]));
    }
  }
  p.data = data.data_ptr();
  p.scales = scales.data_ptr();
  p.out = out.data_ptr();
  p.scale = float(scale);
  p.count = ids.numel();
#ifdef GEMMA2_WITH_CUDA
  if (!ids.is_cpu()) return run_on_cuda(ids, format.launch_embedding, p);
#endif
  const CpuKernels& kernels = cpu_kernels();
  parallel_units(ids.numel(), p.in_features * 16,
                 [&](int64_t begin, int64_t end) { (kernels.*format.embed)(p, begin, end); });
}

void embedding_int8_out(const Tensor& ids, const Tensor& data, const Tensor& scales, double scale,
                        Tensor out) {
  note(embedding_int8_out, ids, data, scales, scale, out);
  embedding_out("embedding_int8", kInt8, ids, data, scales, scale, out);
}

void embedding_int4_out(const Tensor& ids, const Tensor& data, const Tensor& scales, double scale,
                        Tensor out) {
  note(embedding_int4_out, ids, data, scales, scale, out);
  embedding_out("embedding_int4", kInt4, ids, data, scales, scale, out);
}

template <class Library>
void implement(Library& m) {
  m.impl("linear_int8", GEMMA2_BOX(&linear_int8));
  m.impl("linear_int8_out", GEMMA2_BOX(&linear_int8_out));
  m.impl("linear_int4", GEMMA2_BOX(&linear_int4));
  m.impl("linear_int4_out", GEMMA2_BOX(&linear_int4_out));
  m.impl("logits_int8", GEMMA2_BOX(&logits_int8));
  m.impl("logits_int8_out", GEMMA2_BOX(&logits_int8_out));
  m.impl("logits_int4", GEMMA2_BOX(&logits_int4));
  m.impl("logits_int4_out", GEMMA2_BOX(&logits_int4_out));
  m.impl("embedding_int8_out", GEMMA2_BOX(&embedding_int8_out));
  m.impl("embedding_int4_out", GEMMA2_BOX(&embedding_int4_out));
}

}  // namespace
}  // namespace gemma2

GEMMA2_REGISTER(gemma2::implement)

STABLE_TORCH_LIBRARY_IMPL(gemma2_ext, CPU, m) {
  m.impl("quantize_int8_out", GEMMA2_BOX(&gemma2::quantize_int8_out));
  m.impl("quantize_int4_out", GEMMA2_BOX(&gemma2::quantize_int4_out));
}
