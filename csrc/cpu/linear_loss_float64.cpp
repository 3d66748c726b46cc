#include "linear_loss_float64.h"

#include <math.h>

namespace gemma2 {
namespace float64 {
namespace {

// The soft-capped logits of one token over the student's words; those that the side lacks are -inf.
void make_logits(const LossSide& side, int64_t token, int64_t words, double* s) {
  const double* hidden = side.hidden + token * side.hidden_stride;
  for (int64_t w = 0; w < words; ++w) {
    const double* weight = side.weight + w * side.weight_stride;
    double sum = w < side.vocab_size ? 0 : -INFINITY;
    for (int64_t i = 0; w < side.vocab_size && i < side.hidden_size; ++i)
      sum += hidden[i] * weight[i];
    s[w] = side.softcap > 0 && w < side.vocab_size ? side.softcap * tanh(sum / side.softcap) : sum;
  }
}

double log_sum_exp(const double* s, int64_t words, double temperature) {
  double most = -INFINITY, sum = 0;
  for (int64_t w = 0; w < words; ++w) most = fmax(most, s[w] / temperature);
  for (int64_t w = 0; w < words; ++w) sum += exp(s[w] / temperature - most);
  return most + log(sum);
}

}  // namespace

void linear_loss(const LinearLoss& p, const LossSums& sums) {
  const int64_t words = p.student.vocab_size;
  double *s = p.scratch, *teacher = s + words;
  for (int64_t t = 0; t < p.tokens; ++t) {
    make_logits(p.student, t, words, s);
    sums.lse[t] = log_sum_exp(s, words, p.temperature);
    sums.hard_lse[t] = log_sum_exp(s, words, 1);
    sums.logits[t] = sums.teacher_lse[t] = sums.teacher_logits[t] = sums.entries[t] = 0;
    for (int64_t w = 0; w < words; ++w) sums.logits[t] += s[w];
    if (p.teacher.vocab_size > 0) {
      make_logits(p.teacher, t, words, teacher);
      sums.teacher_lse[t] = log_sum_exp(teacher, words, p.temperature);
      for (int64_t w = 0; w < words; ++w)
        sums.teacher_logits[t] += exp(teacher[w] / p.temperature - sums.teacher_lse[t]) * s[w];
    }
    for (int64_t e = t * p.entries_per_token; e < (t + 1) * p.entries_per_token; ++e)
      if (p.entry_word[e] >= 0) sums.entries[t] += p.entry_weight[e] * s[p.entry_word[e]];
  }
}

void linear_loss_backward(const LinearLoss& p, const LossScales& scales, double* grad_hidden,
                          double* grad_weight) {
  const int64_t words = p.student.vocab_size, hidden_size = p.student.hidden_size;
  double *s = p.scratch, *teacher = s + words, *gradient = teacher + words;
  for (int64_t t = 0; t < p.tokens; ++t) {
    make_logits(p.student, t, words, s);
    for (int64_t w = 0; w < words; ++w)
      gradient[w] = scales.scale[t] * exp(s[w] / p.temperature - scales.lse[t]) +
                    scales.hard_scale[t] * exp(s[w] - scales.hard_lse[t]) - scales.uniform_scale[t];
    if (p.teacher.vocab_size > 0) {
      make_logits(p.teacher, t, words, teacher);
      for (int64_t w = 0; w < words; ++w)
        gradient[w] -=
            scales.teacher_scale[t] * exp(teacher[w] / p.temperature - scales.teacher_lse[t]);
    }
    for (int64_t e = t * p.entries_per_token; e < (t + 1) * p.entries_per_token; ++e)
      if (p.entry_word[e] >= 0)
        gradient[p.entry_word[e]] -= p.entry_weight[e] * scales.entry_scale[t];
    const double* hidden = p.student.hidden + t * p.student.hidden_stride;
    for (int64_t w = 0; w < words; ++w) {
      const double r = p.student.softcap > 0 ? s[w] / p.student.softcap : 0;
      const double g = gradient[w] * (1 - r * r);
      const double* weight = p.student.weight + w * p.student.weight_stride;
      for (int64_t i = 0; i < hidden_size; ++i) {
        if (grad_hidden) grad_hidden[t * hidden_size + i] += g * weight[i];
        if (grad_weight) grad_weight[w * hidden_size + i] += g * hidden[i];
      }
    }
  }
}

}  // namespace float64
}  // namespace gemma2
