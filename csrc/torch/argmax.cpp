// Bindings of argmax, of logits, of a draw by them, and of what ends a decoding step.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
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

int64_t runs_of(int64_t columns) { return (columns + kArgmaxRun - 1) / kArgmaxRun; }

template <class F>
void parallel_row_runs(int64_t runs, const F& f) {
  parallel_units(runs, kArgmaxRun * sizeof(float), f);
}

// Of equals the first; NaN is the largest.
int64_t place_of_largest(const float* x, const float* maxima, int64_t runs) {
  int64_t run = 0;
  for (int64_t i = 1; i < runs && !std::isnan(maxima[run]); ++i)
    if (!(maxima[i] <= maxima[run])) run = i;
  const float largest = maxima[run];
  int64_t place = run * kArgmaxRun;
  while (std::isnan(largest) ? !std::isnan(x[place]) : x[place] != largest) ++place;
  return place;
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
  const int64_t runs = runs_of(p.columns);
  std::vector<float> maxima(p.rows * runs);
  p.maxima = maxima.data();
  const CpuKernels& kernels = cpu_kernels();
  parallel_row_runs(p.rows * runs,
                    [&](int64_t begin, int64_t end) { kernels.argmax_runs(p, begin, end); });
  for (int64_t row = 0; row < p.rows; ++row)
    p.out[row] = place_of_largest(p.x + row * p.x_stride, maxima.data() + row * runs, runs);
}

// A bound behind the k-th largest element of a row, in falling order, of equals the first ones
// first.
DrawElement bound_of_largest(DrawWork w, int64_t k, int64_t runs) {
  const int64_t columns = w.p.columns;
  if (k <= runs) {  // no less than k runs have their largest from there on
    std::vector<float> maxima(w.maxima, w.maxima + runs);
    std::nth_element(maxima.begin(), maxima.begin() + (k - 1), maxima.end(), std::greater<>());
    w.least = maxima[k - 1];
  } else {  // by the upper halves of numbers that rise with the elements
    const auto rising = [](float x) {
      uint32_t bits;
      std::memcpy(&bits, &x, sizeof bits);
      return bits >> 31 ? ~bits : bits | 0x80000000u;
    };
    std::vector<uint32_t> counts(1 << 16);
    for (int64_t i = 0; i < columns; ++i) ++counts[rising(w.x[i]) >> 16];
    uint32_t half = 0xffff;
    for (int64_t left = k - counts[half]; left > 0; left -= counts[half]) --half;
    const uint32_t bits = half >> 15 ? half << 16 & 0x7fffffff : ~(half << 16);
    std::memcpy(&w.least, &bits, sizeof bits);
    if (std::isnan(w.least)) w.least = -INFINITY;  // of the half that has -inf it is the last one
  }
  std::vector<int32_t> chosen;
  for (int64_t run = 0; run < runs; ++run)
    if (w.maxima[run] >= w.least) chosen.push_back(int32_t(run));
  const int64_t count = int64_t(chosen.size());
  const std::unique_ptr<int32_t[]> found(new int32_t[count * kArgmaxRun]);
  std::vector<int64_t> counts(count);
  w.runs = chosen.data(), w.found = found.get(), w.counts = counts.data();
  parallel_row_runs(count,
                    [&](int64_t begin, int64_t end) { cpu_kernels().draw_finds(w, begin, end); });
  std::vector<int32_t> places;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t* of_run = found.get() + i * kArgmaxRun;
    places.insert(places.end(), of_run, of_run + counts[i]);
  }
  const auto kth = places.begin() + (k - 1);
  std::nth_element(places.begin(), kth, places.end(), [&](int32_t a, int32_t b) {
    return w.x[a] > w.x[b] || (w.x[a] == w.x[b] && a < b);
  });
  return {w.x[*kth], *kth + 1};
}

// All elements race, and where the winner is none of those that are left, those above it do: see
// csrc/cuda/draw.cu.
int64_t draw_row(const DrawParams& p, int64_t row) {
  const CpuKernels& kernels = cpu_kernels();
  const int64_t runs = runs_of(p.columns);
  std::vector<float> maxima(runs), sums(runs);
  std::vector<DrawElement> winners(runs);
  DrawWork w{};
  w.p = p, w.x = p.logits + row * p.logits_stride, w.keys = p.keys + 2 * row;
  w.maxima = maxima.data(), w.sums = sums.data(), w.winners = winners.data();
  ArgmaxParams a{};
  a.x = w.x, a.rows = 1, a.columns = p.columns, a.maxima = maxima.data();
  parallel_row_runs(runs, [&](int64_t begin, int64_t end) { kernels.argmax_runs(a, begin, end); });
  const int64_t first = place_of_largest(w.x, maxima.data(), runs);
  w.largest = w.x[first];
  if (!std::isfinite(w.largest)) return first;

  const auto sum_before = [&](const DrawElement& bound) {
    DrawWork part = w;
    part.bound = bound;
    parallel_row_runs(runs,
                      [&](int64_t begin, int64_t end) { kernels.draw_sums(part, begin, end); });
    return std::accumulate(sums.begin(), sums.end(), 0.0);
  };
  const bool of_some = p.top_k > 0 && p.top_k < p.columns;
  w.bound = of_some ? bound_of_largest(w, p.top_k, runs) : DrawElement{-INFINITY, INT32_MAX};
  const double wanted = p.top_p < 1 ? p.top_p * sum_before(w.bound) : 0;
  w.least = w.largest + std::log(p.min_p) / p.inverse_temperature;
  const auto key = [&](int i) { return uint32_t(w.keys[i]); };
  w.winner = {draw_score(0, p.inverse_temperature, key(0), key(1), uint32_t(first)), first};
  while (true) {
    parallel_row_runs(runs, [&](int64_t begin, int64_t end) { kernels.draw_races(w, begin, end); });
    DrawElement winner = w.winner;
    for (const DrawElement& e : winners) {
      const bool earlier = e.value == winner.value && e.place < winner.place;
      if (e.value > winner.value || earlier) winner = e;
    }
    if (p.top_p >= 1) return winner.place;
    const DrawElement element{w.x[winner.place], winner.place};
    const double before = sum_before(element);
    if (before == 0 || before < wanted) return winner.place;
    w.bound = element;
  }
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
  if (p.columns > INT32_MAX - kArgmaxRun) fail(op, "a row has fewer than 2^31 - 1024 elements");
  const auto draw = [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) p.out[row] = draw_row(p, row);
  };
  if (p.rows < 4) return draw(0, p.rows);  // its runs are shared out
  parallel_units(p.rows, p.columns * sizeof(float), draw);
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
  m.impl("argmax_out", GEMMA2_BOX(&argmax_out));
  m.impl("draw_out", GEMMA2_BOX(&draw_out));
  m.impl("advance_out", GEMMA2_BOX(&advance_out));
}

}  // namespace
}  // namespace gemma2

GEMMA2_REGISTER(gemma2::implement)
