// What test_simd.py measures: the functions of csrc/cpu/simd.h and pairs.h over arrays. Compiled by
// the test, once per instruction set.
#include "cpu/pairs.h"

using namespace gemma2;
using namespace gemma2::GEMMA2_ISA;

namespace {

// The last vector through load_n and store_n, as kernels do.
template <class T, class U, class F>
void map(const T* x, U* y, int64_t n, F f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(y + i, f(load(x + i)));
  if (i < n) store_n(y + i, f(load_n(x + i, n - i)), n - i);
}

// As pairs in the order of T.
template <class T, class From, class To>
void copy_pairs(const From* x, To* y, int64_t n) {
  walk_pairs<From>(
      n, [&](int64_t i, auto count) { store_pair<true>(y + i, load_pair<T>(x + i, count), count); },
      x);
}

}  // namespace

extern "C" {

int probe_lanes() { return kLanes; }
void probe_exp(const float* x, float* y, int64_t n) {
  map(x, y, n, [](VecF v) { return exp(v); });
}
void probe_tanh(const float* x, float* y, int64_t n) {
  map(x, y, n, [](VecF v) { return tanh(v); });
}
void probe_sin(const float* x, float* y, int64_t n) {
  map(x, y, n, [](VecF v) {
    VecF s, c;
    sincos(v, &s, &c);
    return s;
  });
}
void probe_cos(const float* x, float* y, int64_t n) {
  map(x, y, n, [](VecF v) {
    VecF s, c;
    sincos(v, &s, &c);
    return c;
  });
}
void probe_round_small(const float* x, float* y, int64_t n) {
  map(x, y, n, [](VecF v) { return round_small(v); });
}
void probe_load_bfloat16(const BFloat16* x, float* y, int64_t n) {
  map(x, y, n, [](VecF v) { return v; });
}
void probe_load_half(const Half* x, float* y, int64_t n) {
  map(x, y, n, [](VecF v) { return v; });
}
void probe_store_bfloat16(const float* x, BFloat16* y, int64_t n) {
  map(x, y, n, [](VecF v) { return v; });
}
void probe_store_half(const float* x, Half* y, int64_t n) {
  map(x, y, n, [](VecF v) { return v; });
}
void probe_round_to_bfloat16(const float* x, float* y, int64_t n) {
  map(x, y, n, [](VecF v) { return round_to<BFloat16>(v); });
}
void probe_round_to_half(const float* x, float* y, int64_t n) {
  map(x, y, n, [](VecF v) { return round_to<Half>(v); });
}
void probe_one_by_one_bfloat16(const float* x, BFloat16* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = from_float<BFloat16>(x[i]);
}
void probe_one_by_one_half(const float* x, Half* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = from_float<Half>(x[i]);
}
void probe_pairs_of_bfloat16(const BFloat16* x, BFloat16* y, int64_t n) {
  copy_pairs<BFloat16>(x, y, n);
}
void probe_pairs_of_half(const Half* x, Half* y, int64_t n) { copy_pairs<Half>(x, y, n); }
void probe_pairs_to_float(const BFloat16* x, float* y, int64_t n) { copy_pairs<BFloat16>(x, y, n); }
void probe_pairs_from_float(const float* x, BFloat16* y, int64_t n) {
  copy_pairs<BFloat16>(x, y, n);
}
void probe_pairs_rounded(const float* x, BFloat16* y, int64_t n) {
  walk_pairs<float>(n, [&](int64_t i, auto count) {
    store_rounded_pair(y + i, round_pair<true>(load_pair<BFloat16>(x + i, count)), count);
  });
}
// Sums and maxima of rows of probe_lanes() elements.
void probe_reduce(const float* x, float* sums, float* maxima, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r) {
    sums[r] = reduce_sum(load(x + r * kLanes));
    maxima[r] = reduce_max(load(x + r * kLanes));
  }
}

}  // extern "C"
