// The losses over a linear layer in float64, as their formulas read: plain loops, for checks of
// gradients.
#pragma once
#include <stdint.h>

namespace gemma2 {
namespace float64 {

struct LossSide {
  const double* hidden;  // (tokens, hidden_size)
  const double* weight;  // (vocab_size, hidden_size)
  int64_t hidden_stride, weight_stride, vocab_size, hidden_size;
  double softcap;  // 0: none
};

// LinearLossParams (csrc/params.h) has the formula; arrays have an element a token.
struct LinearLoss {
  LossSide student, teacher;
  int64_t tokens;
  double temperature;
  int64_t entries_per_token;
  const int64_t* entry_word;  // (tokens, entries_per_token); below 0: no entry
  const double* entry_weight;
  double* scratch;  // (3, vocab_size)
};

// The statistics of a token that its loss is made of.
struct LossSums {
  double* lse;             // log sum exp(s / tau)
  double* hard_lse;        // log sum exp(s)
  double* logits;          // sum s
  double* teacher_lse;     // log sum exp(t / tau)
  double* teacher_logits;  // the teacher's mean of s
  double* entries;         // sum of the entries' weights times s
};
void linear_loss(const LinearLoss& p, const LossSums& sums);

struct LossScales {
  const double *lse, *hard_lse, *teacher_lse;
  const double *scale, *hard_scale, *uniform_scale, *teacher_scale, *entry_scale;
};
// Adds to the gradients, contiguous; null: not asked for.
void linear_loss_backward(const LinearLoss& p, const LossScales& scales, double* grad_hidden,
                          double* grad_weight);

}  // namespace float64
}  // namespace gemma2
