// Binding of linear_cross_entropy: with e = label_smoothing and V words, the loss of a token is
// lse - (1 - e) s[target] - e/V sum s + z_loss lse^2.
#include <cmath>

#include "cuda.h"
#include "linear_loss.h"

namespace gemma2 {
namespace {

LossProblem cross_entropy(const Tensor& hidden, const Tensor& weight, const Tensor& target,
                          std::optional<double> softcap, int64_t ignore_index,
                          const std::string& reduction, double label_smoothing, double z_loss) {
  const char* op = "linear_cross_entropy";
  LossProblem problem;
  problem.op = op;
  problem.student = loss_side(op, "hidden", hidden, "weight", weight, "softcap", softcap);
  problem.dtype = dtype_of(op, "hidden", hidden, Dtypes::kOrFloat64);
  problem.reduction = loss_reduction(op, reduction);
  if (!(label_smoothing >= 0 && label_smoothing <= 1))
    fail(op, "label_smoothing must be in [0, 1], got " + std::to_string(label_smoothing));
  if (!(z_loss >= 0 && std::isfinite(z_loss)))
    fail(op, "z_loss must be at least 0 and finite, got " + std::to_string(z_loss));
  const std::vector<int64_t> targets = loss_integers(op, "target", target, hidden);
  const int64_t vocab_size = problem.student.vocab_size;
  problem.tokens = targets.size();
  for (int64_t t = 0; t < problem.tokens; ++t) {
    if (targets[t] == ignore_index) continue;
    if (targets[t] < 0 || targets[t] >= vocab_size) {
      fail(op, "target must be in [0, vocab_size = " + std::to_string(vocab_size) +
                   ") or ignore_index = " + std::to_string(ignore_index) + ", got " +
                   std::to_string(targets[t]) + " at token " + std::to_string(t));
    }
    problem.counted.push_back(t);
    problem.entry_word.push_back(targets[t]);
  }
  const size_t n = problem.counted.size();
  problem.lse_weight.assign(n, 1);
  problem.hard_weight.assign(n, 0);
  problem.teacher_weight.assign(n, 0);
  problem.entries_per_token = 1;
  problem.entry_weight.assign(n, 1 - label_smoothing);
  problem.uniform = label_smoothing / double(vocab_size);
  problem.z_loss = z_loss;
  keep_counted(problem);
  return problem;
}

void linear_cross_entropy_out(const Tensor& hidden, const Tensor& weight, const Tensor& target,
                              std::optional<double> softcap, int64_t ignore_index,
                              std::string reduction, double label_smoothing, double z_loss,
                              Tensor out) {
  const LossProblem problem = cross_entropy(hidden, weight, target, softcap, ignore_index,
                                            reduction, label_smoothing, z_loss);
  check_loss_out(problem, hidden, out);
  loss_forward(problem, out);
}

Tensor linear_cross_entropy(const Tensor& hidden, const Tensor& weight, const Tensor& target,
                            std::optional<double> softcap, int64_t ignore_index,
                            std::string reduction, double label_smoothing, double z_loss) {
  const LossProblem problem = cross_entropy(hidden, weight, target, softcap, ignore_index,
                                            reduction, label_smoothing, z_loss);
  const Tensor out = new_loss_out(problem, hidden);
  loss_forward(problem, out);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_forward(
    const Tensor& hidden, const Tensor& weight, const Tensor& target, std::optional<double> softcap,
    int64_t ignore_index, std::string reduction, double label_smoothing, double z_loss) {
  const LossProblem problem = cross_entropy(hidden, weight, target, softcap, ignore_index,
                                            reduction, label_smoothing, z_loss);
  return loss_forward_and_save(problem, hidden);
}

void linear_cross_entropy_backward_out(const Tensor& grad, const Tensor& hidden,
                                       const Tensor& weight, const Tensor& target,
                                       const Tensor& stats, const Tensor& kept,
                                       std::optional<double> softcap, int64_t ignore_index,
                                       std::string reduction, double label_smoothing, double z_loss,
                                       std::optional<Tensor> grad_hidden,
                                       std::optional<Tensor> grad_weight) {
  loss_backward(cross_entropy(hidden, weight, target, softcap, ignore_index, reduction,
                              label_smoothing, z_loss),
                grad, stats, kept, hidden, weight, grad_hidden, grad_weight);
}

template <class Library>
void implement(Library& m) {
  m.impl("linear_cross_entropy", GEMMA2_BOX(&linear_cross_entropy));
  m.impl("linear_cross_entropy_out", GEMMA2_BOX(&linear_cross_entropy_out));
  m.impl("linear_cross_entropy_forward", GEMMA2_BOX(&linear_cross_entropy_forward));
  m.impl("linear_cross_entropy_backward_out", GEMMA2_BOX(&linear_cross_entropy_backward_out));
}

}  // namespace
}  // namespace gemma2

GEMMA2_REGISTER(gemma2::implement)
