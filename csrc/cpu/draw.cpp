// Draws from a row of logits, by runs of kArgmaxRun elements whose maxima are known: sums of
// weights, races, and the places of the largest. A unit is a run.
//
// An element's weight is exp((x - largest) / temperature). It beats a score only if its arrival
// (see draw.h) is below weight * exp(-score), and arrivals are no less than the uniform number that
// they are made of. So only the few elements that this leaves are looked at with logarithms.
#include "../draw.h"

#include "kernels.h"
#include "simd.h"

namespace gemma2 {
namespace GEMMA2_ISA {
namespace {

// f(values, their places) for the vectors of a run; -inf behind the row's end.
template <class F>
GEMMA2_INLINE void for_each(const DrawWork& w, int64_t run, F f) {
  const int64_t first = run * kArgmaxRun, rest = w.p.columns - first;
  const int64_t n = rest < kArgmaxRun ? rest : kArgmaxRun;
  VecI places;
  for (int i = 0; i < kLanes; ++i) places[i] = int32_t(first) + i;
  for (int64_t i = 0; i < n; i += kLanes, places += kLanes) {
    const float* x = w.x + first + i;
    f(i + kLanes <= n ? load(x) : load_n(x, n - i, -__builtin_inff()), places);
  }
}

GEMMA2_INLINE bool any(VecI mask) { return reduce_max((VecF)((VecU)mask & 0x3f800000u)) > 0; }

// Lanes in front of an element in falling order, of equals the first ones.
GEMMA2_INLINE VecI before(VecF x, VecI places, const DrawElement& e) {
  return (x > set(e.value)) | ((x == set(e.value)) & (places < VecI{} + int32_t(e.place)));
}

}  // namespace

void draw_sums(const DrawWork& w, int64_t begin, int64_t end) {
  constexpr float kNothing = -40;  // of 2^31 such weights float32's sum of one and them is one
  for (int64_t unit = begin; unit < end; ++unit) {
    VecF sum = zero();
    const float scale = w.p.inverse_temperature;
    if ((w.maxima[unit] - w.largest) * scale > kNothing && w.maxima[unit] >= w.bound.value) {
      for_each(w, unit, [&](VecF x, VecI places) __attribute__((always_inline)) {
        const VecF weight = exp((x - set(w.largest)) * set(scale));
        sum += (VecF)((VecI)weight & before(x, places, w.bound));
      });
    }
    w.sums[unit] = reduce_sum(sum);
  }
}

void draw_races(const DrawWork& w, int64_t begin, int64_t end) {
  constexpr float kMost = 22.25f;  // of -log(arrival)
  const uint32_t first = w.keys[0], second = w.keys[1];
  const float scale = w.p.inverse_temperature;
  for (int64_t unit = begin; unit < end; ++unit) {
    DrawElement winner = w.winner;
    if (w.maxima[unit] >= w.least && w.maxima[unit] >= w.bound.value &&
        !((w.maxima[unit] - w.largest) * scale + kMost < winner.value)) {
      // Above what `exp` of both numbers may be off.
      float limit = __builtin_expf(-winner.value) * 1.001f;
      for_each(w, unit, [&](VecF x, VecI places) __attribute__((always_inline)) {
        const VecF weight = exp((x - set(w.largest)) * set(scale));
        // As `arrival` has it.
        VecU bits = ((VecU)places + first) * 0x9e3779b9u;
        bits = ((bits ^ bits >> 16) + second) * 0x85ebca6bu;
        bits = (bits ^ bits >> 13) * 0xc2b2ae35u;
        bits ^= bits >> 16;
        const VecF uniform =
            abs(__builtin_convertvector((VecI)bits, VecF) + set(0.5f)) * set(0x1p-31f);
        VecI may = (uniform <= weight * set(limit)) & (x >= set(w.least));
        may &= before(x, places, w.bound);
        if (!any(may)) return;
        for (int i = 0; i < kLanes; ++i) {
          if (!may[i]) continue;
          const uint32_t place = uint32_t(places[i]);
          const float score = draw_score(x[i] - w.largest, scale, first, second, place);
          if (score > winner.value || (score == winner.value && int64_t(place) < winner.place)) {
            winner = {score, int64_t(place)};
            limit = __builtin_expf(-score) * 1.001f;
          }
        }
      });
    }
    w.winners[unit] = winner;
  }
}

// Of the unit-th run in `runs`: how many elements are at least w.least, and where.
void draw_finds(const DrawWork& w, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit) {
    int32_t* const to = w.found + unit * kArgmaxRun;
    int64_t count = 0;
    for_each(w, w.runs[unit], [&](VecF x, VecI places) __attribute__((always_inline)) {
      const VecI is = x >= set(w.least);
      if (!any(is)) return;
      for (int i = 0; i < kLanes; ++i) {
        if (is[i] && places[i] < w.p.columns) to[count++] = places[i];
      }
    });
    w.counts[unit] = count;
  }
}

}  // namespace GEMMA2_ISA
}  // namespace gemma2
