// Runs the losses over a linear layer over torch's threads, in blocks of tokens and chunks of words
// that bound their memory. The ops say in a LossProblem what they are.
#pragma once
#include <tuple>
#include <vector>

#include "gemm.h"

namespace gemma2 {

struct LossProblemSide {
  Tensor hidden;  // the counted tokens' rows: (counted, hidden_size), last dimension contiguous
  int64_t hidden_stride = 0;
  Tensor weight;  // (vocab_size, hidden_size), last dimension contiguous
  int64_t weight_stride = 0, vocab_size = 0, hidden_size = 0;
  double softcap = 0;  // 0: none
};

// With the student's soft-capped logits s and temperature tau, the loss of a token is
//   lse_weight lse + hard_weight hard_lse + z_loss lse^2 - uniform sum s - teacher_weight E[s]
//   - sum over its entries of weight s[word]
// where lse = log sum exp(s / tau), hard_lse = log sum exp(s), and E is the teacher's mean.
struct LossProblem {
  const char* op;
  DType dtype, teacher_dtype = DType::kFloat32;
  LossProblemSide student, teacher;
  double temperature = 1, z_loss = 0, uniform = 0;
  int64_t tokens = 0;            // counted or not
  std::vector<int64_t> counted;  // those that count, ascending
  bool hard = false;
  std::vector<double> lse_weight, hard_weight, teacher_weight;  // of each counted token
  int64_t entries_per_token = 0;
  std::vector<int64_t> entry_word;   // (counted, entries_per_token); below 0: no entry
  std::vector<double> entry_weight;  // likewise
  enum Reduction { kMean, kSum, kNone } reduction = kMean;
};

// Checks hidden, weight, their softcap and fills in a side, with all tokens' rows.
LossProblemSide loss_side(const char* op, const char* hidden_name, const Tensor& hidden,
                          const char* weight_name, const Tensor& weight, const char* softcap_name,
                          std::optional<double> softcap);
// The tensor itself, or a copy of one on a GPU.
Tensor on_cpu(const Tensor& t);
// Drops the rows of tokens that do not count, so that nothing in them matters and no time is spent.
void keep_counted(LossProblem& problem);

LossProblem::Reduction loss_reduction(const char* op, const std::string& name);
// A tensor of bool or integers of hidden's leading shape (and `last` more elements a token).
std::vector<int64_t> loss_integers(const char* op, const char* name, const Tensor& t,
                                   const Tensor& hidden, int64_t last = 0);

// A result: a scalar, or of hidden's leading shape; float32, or float64 for float64.
Tensor new_loss_out(const LossProblem& problem, const Tensor& hidden);
void check_loss_out(const LossProblem& problem, const Tensor& hidden, const Tensor& out);

void loss_forward(const LossProblem& problem, const Tensor& out);
// Also what the backward needs: stats (3, tokens), the lse, hard_lse and teacher_lse of the counted
// tokens; and kept, soft-capped logits of the first words, as many as fit into 128 MiB: those the
// backward does not make again.
std::tuple<Tensor, Tensor, Tensor> loss_forward_and_save(const LossProblem& problem,
                                                         const Tensor& hidden);
// grad: of the result's shape. The gradients: contiguous, shaped and typed as hidden and weight.
void loss_backward(const LossProblem& problem, const Tensor& grad, const Tensor& stats,
                   const Tensor& kept, const Tensor& hidden, const Tensor& weight,
                   const std::optional<Tensor>& grad_hidden,
                   const std::optional<Tensor>& grad_weight);

#ifdef GEMMA2_WITH_CUDA
// The same on CUDA; nothing is kept. stats: null where no backward follows.
void loss_forward_on_cuda(const LossProblem& problem, const Tensor& out, const Tensor* stats);
// At least one token counts; grad is contiguous.
void loss_backward_on_cuda(const LossProblem& problem, const Tensor& grad, const Tensor& stats,
                           const std::optional<Tensor>& grad_hidden,
                           const std::optional<Tensor>& grad_weight);
#endif

}  // namespace gemma2
