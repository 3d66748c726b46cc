// Bindings of argmax, of logits, of a draw by them, and of what ends a decoding step.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "../cpu/isa.h"
#include "../draw.h"
#include "cuda.h"

namespace gemma2 {
namespace {

// Checked, of x (rows, columns) and out (rows,).
ArgmaxParams argmax_params(const char* op, const char* name, const Tensor& x, const Tensor& out,
                           const Rows& rows) {
  check_device(op, "out", out, name, x);
  if (out.scalar_type() != ScalarType::Long || out.dim() != 1 || out.size(0) != x.size(0) ||
      !out.is_contiguous())
    fail(op, "out must be contiguous int64 of shape (rows,), got " + to_string(out));
  ArgmaxParams p{};
  p.x = static_cast<const float*>(rows.tensor.data_ptr()), p.x_stride = rows.stride;
  p.rows = x.size(0), p.columns = x.size(1);
  p.out = static_cast<int64_t*>(out.data_ptr());
  return p;
}

void check_rows(const char* op, const char* name, const Tensor& x) {
  if (dtype_of(op, name, x) != DType::kFloat32 || x.dim() != 2 || x.size(1) == 0) {
    fail(op,
         std::string(name) + " must be float32 of shape (rows, columns >= 1), got " + to_string(x));
  }
}

// Of equals the first; NaN is the largest.
void argmax_out(const Tensor& x, Tensor out) {
  const char* op = "argmax";
  check_rows(op, "x", x);
  const Rows rows = as_rows(x);
  ArgmaxParams p = argmax_params(op, "x", x, out, rows);
#ifdef GEMMA2_WITH_CUDA
  if (!x.is_cpu()) return run_on_cuda(x, launch_argmax, p);
#endif
  const int64_t runs = (p.columns + kArgmaxRun - 1) / kArgmaxRun;
  std::vector<float> maxima(p.rows * runs);
  p.maxima = maxima.data();
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
    p.out[row] = column;
  }
}

// What is left of a row, the largest draw_score of it wins.
int64_t draw_row(const DrawParams& p, int64_t row) {
  const float* x = p.logits + row * p.logits_stride;
  const auto before = [&](int64_t a, int64_t b) {
    if (std::isnan(x[a]) != std::isnan(x[b])) return std::isnan(x[a]);
    return x[a] > x[b] || (!(x[a] < x[b]) && a < b);
  };
  std::vector<int64_t> left(p.columns);
  std::iota(left.begin(), left.end(), 0);
  const int64_t first = *std::min_element(left.begin(), left.end(), before);
  if (!std::isfinite(x[first])) return first;
  if (p.top_k > 0 && p.top_k < p.columns) {
    std::nth_element(left.begin(), left.begin() + p.top_k, left.end(), before);
    left.resize(p.top_k);
  }
  const auto weight = [&](int64_t column) {
    return std::exp((double(x[column]) - x[first]) * p.inverse_temperature);
  };
  if (p.top_p < 1) {
    std::sort(left.begin(), left.end(), before);
    double sum = 0, above = 0;
    for (int64_t column : left) sum += weight(column);
    size_t count = 0;
    while (count == 0 || (count < left.size() && above < p.top_p * sum))
      above += weight(left[count++]);
    left.resize(count);
  }
  int64_t best = first;
  float largest = -INFINITY;
  for (int64_t column : left) {
    if (weight(column) < p.min_p) continue;
    const float score = draw_score(x[column], p.inverse_temperature, p.keys[2 * row],
                                   p.keys[2 * row + 1], uint32_t(column));
    if (score > largest || (score == largest && column < best)) best = column, largest = score;
  }
  return best;
}

// The place of the largest draw_score: a token is drawn with the probability of softmax(logits /
// temperature), the same one for the same keys. Of what is left by top_k (0: all), then by top_p
// and by min_p; of equal logits the first ones.
void draw_out(const Tensor& logits, const Tensor& keys, double temperature, int64_t top_k,
              double top_p, double min_p, Tensor out) {
  const char* op = "draw";
  check_rows(op, "logits", logits);
  check_device(op, "keys", keys, "logits", logits);
  if (keys.scalar_type() != ScalarType::Int || keys.dim() != 2 || keys.size(0) != logits.size(0) ||
      keys.size(1) != 2 || !keys.is_contiguous())
    fail(op, "keys must be contiguous int32 of shape (rows, 2), got " + to_string(keys));
  const float inverse_temperature = float(1 / temperature);
  if (!(temperature > 0) || !std::isfinite(inverse_temperature)) {
    fail(op, "temperature must be above 0, and its inverse finite in float32, got " +
                 std::to_string(temperature));
  }
  if (top_k < 0 || !(top_p > 0 && top_p <= 1) || !(min_p >= 0 && min_p <= 1)) {
    fail(op, "top_k must be at least 0, top_p in (0, 1], min_p in [0, 1], got " +
                 std::to_string(top_k) + ", " + std::to_string(top_p) + ", " +
                 std::to_string(min_p));
  }
  const Rows rows = as_rows(logits);
  const ArgmaxParams a = argmax_params(op, "logits", logits, out, rows);
  const DrawParams p{
      a.x,   a.x_stride,   a.rows,       a.columns, static_cast<const int32_t*>(keys.data_ptr()),
      top_k, float(top_p), float(min_p), a.out,     inverse_temperature};
#ifdef GEMMA2_WITH_CUDA
  if (!logits.is_cpu()) return run_on_cuda(logits, launch_draw, p);
#endif
  parallel_units(p.rows, p.columns * 32, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) p.out[row] = draw_row(p, row);
  });
}

void check_vector(const char* op, const char* name, const Tensor& t, ScalarType type,
                  const Tensor& drawn) {
  check_device(op, name, t, "drawn", drawn);
  if (t.scalar_type() != type || t.dim() != 1 || !t.is_contiguous()) {
    fail(op, std::string(name) + " must be contiguous " + torch::headeronly::toString(type) +
                 " of one dimension, got " + torch::headeronly::toString(t.scalar_type()) + " " +
                 to_string(t));
  }
}

// A row that runs gets what was drawn, any other `pad`; it runs on unless that is a stop, and it
// has a key more.
void advance_out(const Tensor& drawn, const Tensor& stops, int64_t pad, Tensor tokens,
                 Tensor running, Tensor key_lengths) {
  const char* op = "advance";
  check_vector(op, "drawn", drawn, ScalarType::Long, drawn);
  check_vector(op, "stops", stops, ScalarType::Long, drawn);
  check_vector(op, "tokens", tokens, ScalarType::Long, drawn);
  check_vector(op, "running", running, ScalarType::Bool, drawn);
  check_vector(op, "key_lengths", key_lengths, ScalarType::Long, drawn);
  check_same_shape(op, "tokens", tokens, "drawn", drawn);
  check_same_shape(op, "running", running, "drawn", drawn);
  check_same_shape(op, "key_lengths", key_lengths, "drawn", drawn);
  AdvanceParams p{};
  p.drawn = static_cast<const int64_t*>(drawn.data_ptr());
  p.stops = static_cast<const int64_t*>(stops.data_ptr());
  p.tokens = static_cast<int64_t*>(tokens.data_ptr());
  p.running = static_cast<bool*>(running.data_ptr());
  p.key_lengths = static_cast<int64_t*>(key_lengths.data_ptr());
  p.rows = drawn.size(0), p.stop_count = stops.size(0), p.pad = pad;
#ifdef GEMMA2_WITH_CUDA
  if (!drawn.is_cpu()) return run_on_cuda(drawn, launch_advance, p);
#endif
  for (int64_t row = 0; row < p.rows; ++row) {
    p.tokens[row] = p.running[row] ? p.drawn[row] : pad;
    const bool stop = std::count(p.stops, p.stops + p.stop_count, p.tokens[row]) > 0;
    p.running[row] = p.running[row] && !stop;
    ++p.key_lengths[row];
  }
}

template <class Library>
void implement(Library& m) {
  m.impl("argmax_out", TORCH_BOX(&argmax_out));
  m.impl("draw_out", TORCH_BOX(&draw_out));
  m.impl("advance_out", TORCH_BOX(&advance_out));
}

}  // namespace
}  // namespace gemma2

GEMMA2_REGISTER(gemma2::implement)
