// Losses of soft-capped logits s = softcap * tanh(hidden weight^T / softcap), which never stand
// whole: what linear_cross_entropy and linear_distillation share (LinearLossParams has the
// formula).
//
// A unit is kLossWords words and all tokens (a block of them, where there are many). Its logits are
// one product, [word][token], so that a vector holds one word of kLanes tokens and no sum runs
// across lanes. The forward leaves each unit's maximum and sums per token, and linear_loss_merge
// adds them up in the units' order; the backward makes the logits again (or reads those that the
// forward kept), turns them into the gradient of the products, and multiplies that by hidden: the
// unit's rows of the weight's gradient, complete. The gradient of hidden is the caller's product.
// Arithmetic bounds this: 2 * hidden_size operations a logit against two exponentials and a tanh.
#include "linear_loss.h"

#include "kernels.h"
#include "linear-inl.h"

namespace gemma2 {
namespace GEMMA2_ISA {
namespace {

constexpr int kTileVectors = kLossTokens / kLanes;

// A unit's logits of one side: [word][token], p.stride apart.
struct Logits {
  float* data;
  int64_t words;
  bool finished;  // soft-capped before, and kept
};

// Of the words [word, word + words), as many as the side has.
GEMMA2_INLINE Logits make_logits(const LinearLossParams& p, const LossSide& side, int64_t word,
                                 int64_t words, bool kept_before, float* scratch, float* logits) {
  words = min_of(words, side.vocab_size - word);
  if (words <= 0) return {logits, 0, false};
  const bool keep = word < p.kept_words;
  if (keep) logits = side.kept + word * p.stride;
  if (keep && kept_before) return {logits, words, true};
  GemmParams g{};
  dispatch_dtype(side.dtype, [&](auto t) {
    g.a = (const decltype(t)*)side.weight + word * side.weight_stride;
  });
  g.a_row = side.weight_stride;
  g.a_k = 1;
  g.packed_b = const_cast<void*>(side.packed_hidden);
  g.out = logits;
  g.out_stride = p.stride;
  g.rows = g.unit_rows = words;
  g.columns = divide_up(p.tokens, kLanes) * kLanes;
  g.depth = side.hidden_size;
  g.a_dtype = g.product = side.dtype;
  g.out_dtype = DType::kFloat32;
  g.scratch = scratch;
  gemm_rows(g, 0, 1);
  return {logits, words, false};
}

// Soft-caps columns [t, t + n * kLanes) in place.
GEMMA2_INLINE void cap_tile(const LinearLossParams& p, double softcap, Logits logits, int64_t t,
                            int n) {
  if (logits.finished || softcap == 0) return;
  const VecF cap = set(float(softcap)), inverse = set(float(1 / softcap));
  for (int64_t w = 0; w < logits.words; ++w) {
    float* at = logits.data + w * p.stride + t;
    for (int i = 0; i < n; ++i) store(at + i * kLanes, cap * tanh(load(at + i * kLanes) * inverse));
  }
}

GEMMA2_INLINE void max_tile(const LinearLossParams& p, Logits logits, int64_t t, int n,
                            VecF* most) {
  for (int i = 0; i < n; ++i) most[i] = set(-__builtin_inff());
  for (int64_t w = 0; w < logits.words; ++w) {
    const float* at = logits.data + w * p.stride + t;
    for (int i = 0; i < n; ++i) most[i] = max(most[i], load(at + i * kLanes));
  }
}

// The statistics of a unit's columns [t, t + n * kLanes).
void sum_tile(const LinearLossParams& p, Logits s, Logits teacher, int64_t t, int n, float* stats) {
  const VecF inverse_tau = set(float(1 / p.temperature));
  VecF most[kTileVectors], sum[kTileVectors] = {}, other[kTileVectors] = {};
  const auto put = [&](LossStat stat, const VecF* values) {
    for (int i = 0; i < n; ++i) store(stats + stat * p.stride + t + i * kLanes, values[i]);
  };
  cap_tile(p, p.student.softcap, s, t, n);
  max_tile(p, s, t, n, most);
  for (int64_t w = 0; w < s.words; ++w) {
    const float* at = s.data + w * p.stride + t;
    for (int i = 0; i < n; ++i) sum[i] += exp((load(at + i * kLanes) - most[i]) * inverse_tau);
  }
  put(kLossMax, most);
  put(kLossSum, sum);
  if (p.hard) {
    for (int64_t w = 0; w < s.words; ++w) {
      const float* at = s.data + w * p.stride + t;
      for (int i = 0; i < n; ++i) other[i] += exp(load(at + i * kLanes) - most[i]);
    }
    put(kLossHardSum, other);
  }
  if (p.uniform) {
    for (int i = 0; i < n; ++i) other[i] = zero();
    for (int64_t w = 0; w < s.words; ++w) {
      const float* at = s.data + w * p.stride + t;
      for (int i = 0; i < n; ++i) other[i] += load(at + i * kLanes);
    }
    put(kLossLogits, other);
  }
  if (p.teacher.vocab_size == 0) return;
  cap_tile(p, p.teacher.softcap, teacher, t, n);
  max_tile(p, teacher, t, n, most);
  for (int i = 0; i < n; ++i) sum[i] = other[i] = zero();
  for (int64_t w = 0; w < teacher.words; ++w) {
    const int64_t at = w * p.stride + t;
    for (int i = 0; i < n; ++i) {
      const VecF e = exp((load(teacher.data + at + i * kLanes) - most[i]) * inverse_tau);
      sum[i] += e;
      other[i] = fma(e, load(s.data + at + i * kLanes), other[i]);
    }
  }
  put(kLossTeacherMax, most);
  put(kLossTeacherSum, sum);
  put(kLossTeacherLogits, other);
}

// The gradient of the student's products, columns [t, t + n * kLanes).
void gradient_tile(const LinearLossParams& p, Logits s, Logits teacher, int64_t t, int n,
                   float* gradient) {
  const VecF inverse_tau = set(float(1 / p.temperature)), one = set(1.0f);
  const double cap = p.student.softcap;
  const VecF inverse_cap = set(cap == 0 ? 0.0f : float(1 / cap));
  cap_tile(p, cap, s, t, n);
  cap_tile(p, p.teacher.softcap, teacher, t, n);
  for (int64_t w = 0; w < s.words; ++w) {
    const int64_t at = w * p.stride + t;
    for (int i = 0; i < n; ++i) {
      const int64_t j = t + i * kLanes;
      const VecF x = load(s.data + at + i * kLanes);
      VecF y = load(p.scale + j) * exp(fma(x, inverse_tau, -load(p.lse + j)));
      if (p.hard) y = fma(load(p.hard_scale + j), exp(x - load(p.hard_lse + j)), y);
      if (p.uniform) y -= load(p.uniform_scale + j);
      if (w < teacher.words) {
        const VecF x_teacher = load(teacher.data + at + i * kLanes);
        y -= load(p.teacher_scale + j) * exp(fma(x_teacher, inverse_tau, -load(p.teacher_lse + j)));
      }
      const VecF r = x * inverse_cap;
      store(gradient + at + i * kLanes, y * fma(-r, r, one));
    }
  }
}

// Calls f(t, n) for tiles of n vectors of tokens.
template <class F>
GEMMA2_INLINE void each_tile(const LinearLossParams& p, F f) {
  for (int64_t t = 0; t < p.stride; t += kLossTokens)
    f(t, int(min_of(kLossTokens, p.stride - t) / kLanes));
}

// Calls f(entry, logit's place in the unit, token) for the unit's entries.
template <class F>
GEMMA2_INLINE void each_entry(const LinearLossParams& p, int64_t word, F f) {
  if (p.entries_per_token == 0) return;
  const int64_t unit = word / kLossWords;
  for (int64_t e = p.entry_begin[unit]; e < p.entry_begin[unit + 1]; ++e) {
    const int64_t entry = p.entries[e], token = entry / p.entries_per_token;
    f(entry, (p.entry_word[entry] - word) * p.stride + token, token);
  }
}

// Room for the logits of both sides behind what the products need.
GEMMA2_INLINE float* logits_scratch(const LinearLossParams& p, int side) {
  return p.scratch + gemm_scratch(p.student.hidden_size) + side * kLossWords * p.stride;
}

// kLanes tokens of one statistic that is relative to a maximum, added up over the units.
GEMMA2_INLINE void merge_sums(const LinearLossParams& p, int64_t units, int64_t t,
                              LossStat max_stat, LossStat stat, VecF most, VecF inverse_tau) {
  float* total = p.total + t;
  VecF sum =
      load(total + stat * p.stride) * exp((load(total + max_stat * p.stride) - most) * inverse_tau);
  for (int64_t u = 0; u < units; ++u) {
    const float* part = p.partial + u * kLossStats * p.stride + t;
    sum = fma(load(part + stat * p.stride),
              exp((load(part + max_stat * p.stride) - most) * inverse_tau), sum);
  }
  store(total + stat * p.stride, sum);
}

GEMMA2_INLINE VecF merge_max(const LinearLossParams& p, int64_t units, int64_t t, LossStat stat) {
  VecF most = load(p.total + stat * p.stride + t);
  for (int64_t u = 0; u < units; ++u)
    most = max(most, load(p.partial + (u * kLossStats + stat) * p.stride + t));
  return most;
}

}  // namespace

// A unit's statistics, and the logits at its entries.
void linear_loss_words(const LinearLossParams& p, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t word = p.word_begin + unit * kLossWords;
    const int64_t words = min_of(kLossWords, p.word_end - word);
    const Logits s = make_logits(p, p.student, word, words, false, p.scratch, logits_scratch(p, 0));
    const Logits teacher =
        make_logits(p, p.teacher, word, words, false, p.scratch, logits_scratch(p, 1));
    float* stats = p.partial + unit * kLossStats * p.stride;
    each_tile(p, [&](int64_t t, int n) { sum_tile(p, s, teacher, t, n, stats); });
    each_entry(p, word,
               [&](int64_t entry, int64_t at, int64_t) { p.entry_logit[entry] = s.data[at]; });
  }
}

// A unit is kLossTokens tokens: adds the partial statistics of words [word_begin, word_end).
void linear_loss_merge(const LinearLossParams& p, int64_t begin, int64_t end) {
  const int64_t units = divide_up(p.word_end - p.word_begin, kLossWords);
  const VecF one = set(1.0f), inverse_tau = set(float(1 / p.temperature));
  const int64_t last = min_of(end * kLossTokens, p.stride);
  for (int64_t t = begin * kLossTokens; t < last; t += kLanes) {
    const VecF most = merge_max(p, units, t, kLossMax);
    merge_sums(p, units, t, kLossMax, kLossSum, most, inverse_tau);
    if (p.hard) merge_sums(p, units, t, kLossMax, kLossHardSum, most, one);
    if (p.uniform) {
      VecF sum = load(p.total + kLossLogits * p.stride + t);
      for (int64_t u = 0; u < units; ++u)
        sum += load(p.partial + (u * kLossStats + kLossLogits) * p.stride + t);
      store(p.total + kLossLogits * p.stride + t, sum);
    }
    store(p.total + kLossMax * p.stride + t, most);
    if (p.teacher.vocab_size == 0) continue;
    const VecF teacher_most = merge_max(p, units, t, kLossTeacherMax);
    merge_sums(p, units, t, kLossTeacherMax, kLossTeacherSum, teacher_most, inverse_tau);
    merge_sums(p, units, t, kLossTeacherMax, kLossTeacherLogits, teacher_most, inverse_tau);
    store(p.total + kLossTeacherMax * p.stride + t, teacher_most);
  }
}

// A unit's rows of the gradient of the products, and of the weight's gradient.
void linear_loss_gradient(const LinearLossParams& p, int64_t begin, int64_t end) {
  const double cap = p.student.softcap;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t word = p.word_begin + unit * kLossWords;
    const int64_t words = min_of(kLossWords, p.word_end - word);
    const Logits s = make_logits(p, p.student, word, words, true, p.scratch, logits_scratch(p, 0));
    const Logits teacher =
        make_logits(p, p.teacher, word, words, true, p.scratch, logits_scratch(p, 1));
    float* gradient = p.gradient + unit * kLossWords * p.stride;
    each_tile(p, [&](int64_t t, int n) { gradient_tile(p, s, teacher, t, n, gradient); });
    each_entry(p, word, [&](int64_t entry, int64_t at, int64_t token) {
      const float r = cap == 0 ? 0.0f : s.data[at] * float(1 / cap);
      gradient[at] -= float(p.entry_weight[entry]) * p.entry_scale[token] * (1.0f - r * r);
    });
    if (!p.grad_weight.out) continue;
    GemmParams g = p.grad_weight;
    g.a = gradient;
    g.a_row = p.stride;
    g.a_k = 1;
    g.a_dtype = DType::kFloat32;
    g.rows = g.unit_rows = words;
    dispatch_dtype(g.out_dtype, [&](auto t) {
      g.out = (decltype(t)*)g.out + (word - p.grad_weight_begin) * g.out_stride;
    });
    g.scratch = p.scratch;
    gemm_rows(g, 0, 1);
  }
}

}  // namespace GEMMA2_ISA
}  // namespace gemma2
