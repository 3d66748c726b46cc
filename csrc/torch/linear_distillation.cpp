// Bindings of linear_distillation and linear_distillation_topk. With tau = temperature, the
// teacher's distribution q over the student's words and a = hard_weight (0 for a token without a
// label), the loss of a token is
//   (1 - a) (sum q lse - sum over v of q_v s_v / tau) + a (hard_lse - s[target])
// lse = log sum exp(s / tau), hard_lse = log sum exp(s).
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>

#include "cuda.h"
#include "linear_loss.h"

namespace gemma2 {
namespace {

// What both forms share of their arguments.
struct Options {
  std::optional<Tensor> mask, target;
  std::optional<double> softcap;
  double temperature, hard_weight;
  int64_t ignore_index;
  std::string reduction;
};

// The student, which tokens count, and their labels (-1: none), which come first among a token's
// `extra` + 1 entries where hard_weight > 0.
struct Student {
  LossProblem problem;
  std::vector<double> soft;  // 1 - a of each counted token
  std::vector<int64_t> label;
};

Student make_student(const char* op, const Tensor& hidden, const Tensor& weight,
                     const Options& options) {
  Student student;
  LossProblem& problem = student.problem;
  problem.op = op;
  problem.student = loss_side(op, "hidden", hidden, "weight", weight, "softcap", options.softcap);
  problem.dtype = dtype_of(op, "hidden", hidden, Dtypes::kOrFloat64);
  problem.reduction = loss_reduction(op, options.reduction);
  problem.temperature = options.temperature;
  if (!(options.temperature > 0 && std::isfinite(options.temperature))) {
    fail(op, "temperature must be positive and finite, got " + std::to_string(options.temperature));
  }
  if (!(options.hard_weight >= 0 && options.hard_weight <= 1))
    fail(op, "hard_weight must be in [0, 1], got " + std::to_string(options.hard_weight));
  if (options.hard_weight > 0 && !options.target)
    fail(op, "hard_weight = " + std::to_string(options.hard_weight) + " needs target");
  problem.tokens = 1;
  for (int64_t i = 0; i + 1 < hidden.dim(); ++i) problem.tokens *= hidden.size(i);
  std::vector<int64_t> mask(problem.tokens, 1), target(problem.tokens, options.ignore_index);
  if (options.mask) mask = loss_integers(op, "mask", *options.mask, hidden);
  if (options.target) target = loss_integers(op, "target", *options.target, hidden);
  const int64_t vocab_size = problem.student.vocab_size;
  for (int64_t t = 0; t < problem.tokens; ++t) {
    if (!mask[t]) continue;
    const bool labelled = target[t] != options.ignore_index;
    if (labelled && (target[t] < 0 || target[t] >= vocab_size)) {
      fail(op, "target must be in [0, vocab_size = " + std::to_string(vocab_size) +
                   ") or ignore_index = " + std::to_string(options.ignore_index) + ", got " +
                   std::to_string(target[t]) + " at token " + std::to_string(t));
    }
    const double a = labelled ? options.hard_weight : 0;
    problem.counted.push_back(t);
    student.label.push_back(a > 0 ? target[t] : -1);
    student.soft.push_back(1 - a);
    problem.hard |= a > 0 && options.temperature != 1;
  }
  const size_t n = problem.counted.size();
  problem.hard_weight.assign(n, 0);
  problem.teacher_weight.assign(n, 0);
  for (size_t i = 0; i < n; ++i) {
    const double a = 1 - student.soft[i];
    problem.lse_weight.push_back(student.soft[i] + (options.temperature == 1 ? a : 0));
    if (options.temperature != 1) problem.hard_weight[i] = a;
  }
  return student;
}

// ---- a teacher's hidden states and weight

LossProblem distillation(const Tensor& hidden, const Tensor& weight, const Tensor& teacher_hidden,
                         const Tensor& teacher_weight, const Options& options,
                         std::optional<double> teacher_softcap) {
  const char* op = "linear_distillation";
  Student student = make_student(op, hidden, weight, options);
  LossProblem& problem = student.problem;
  problem.teacher = loss_side(op, "teacher_hidden", teacher_hidden, "teacher_weight",
                              teacher_weight, "teacher_softcap", teacher_softcap);
  check_device(op, "teacher_hidden", teacher_hidden, "hidden", hidden);
  bool right = teacher_hidden.dim() == hidden.dim();
  for (int64_t i = 0; right && i + 1 < hidden.dim(); ++i)
    right = teacher_hidden.size(i) == hidden.size(i);
  if (!right) {
    fail(op, "teacher_hidden must have hidden's leading shape, got " + to_string(teacher_hidden) +
                 " for hidden of shape " + to_string(hidden));
  }
  problem.teacher_dtype = dtype_of(op, "teacher_hidden", teacher_hidden, Dtypes::kOrFloat64);
  if ((problem.dtype == DType::kFloat64) != (problem.teacher_dtype == DType::kFloat64))
    check_same_dtype(op, "teacher_hidden", teacher_hidden, "hidden", hidden);
  for (size_t i = 0; i < student.soft.size(); ++i)
    problem.teacher_weight[i] = student.soft[i] / options.temperature;
  if (options.hard_weight > 0) {
    problem.entries_per_token = 1;
    problem.entry_word = student.label;
    for (double soft : student.soft) problem.entry_weight.push_back(1 - soft);
  }
  keep_counted(problem);
  return std::move(problem);
}

void linear_distillation_out(const Tensor& hidden, const Tensor& weight,
                             const Tensor& teacher_hidden, const Tensor& teacher_weight,
                             std::optional<Tensor> mask, std::optional<Tensor> target,
                             std::optional<double> softcap, std::optional<double> teacher_softcap,
                             double temperature, double hard_weight, int64_t ignore_index,
                             std::string reduction, Tensor out) {
  const LossProblem problem = distillation(
      hidden, weight, teacher_hidden, teacher_weight,
      {mask, target, softcap, temperature, hard_weight, ignore_index, reduction}, teacher_softcap);
  check_loss_out(problem, hidden, out);
  loss_forward(problem, out);
}

Tensor linear_distillation(const Tensor& hidden, const Tensor& weight, const Tensor& teacher_hidden,
                           const Tensor& teacher_weight, std::optional<Tensor> mask,
                           std::optional<Tensor> target, std::optional<double> softcap,
                           std::optional<double> teacher_softcap, double temperature,
                           double hard_weight, int64_t ignore_index, std::string reduction) {
  const LossProblem problem = distillation(
      hidden, weight, teacher_hidden, teacher_weight,
      {mask, target, softcap, temperature, hard_weight, ignore_index, reduction}, teacher_softcap);
  const Tensor out = new_loss_out(problem, hidden);
  loss_forward(problem, out);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> linear_distillation_forward(
    const Tensor& hidden, const Tensor& weight, const Tensor& teacher_hidden,
    const Tensor& teacher_weight, std::optional<Tensor> mask, std::optional<Tensor> target,
    std::optional<double> softcap, std::optional<double> teacher_softcap, double temperature,
    double hard_weight, int64_t ignore_index, std::string reduction) {
  return loss_forward_and_save(
      distillation(hidden, weight, teacher_hidden, teacher_weight,
                   {mask, target, softcap, temperature, hard_weight, ignore_index, reduction},
                   teacher_softcap),
      hidden);
}

void linear_distillation_backward_out(const Tensor& grad, const Tensor& hidden,
                                      const Tensor& weight, const Tensor& teacher_hidden,
                                      const Tensor& teacher_weight, std::optional<Tensor> mask,
                                      std::optional<Tensor> target, const Tensor& stats,
                                      const Tensor& kept, std::optional<double> softcap,
                                      std::optional<double> teacher_softcap, double temperature,
                                      double hard_weight, int64_t ignore_index,
                                      std::string reduction, std::optional<Tensor> grad_hidden,
                                      std::optional<Tensor> grad_weight) {
  loss_backward(
      distillation(hidden, weight, teacher_hidden, teacher_weight,
                   {mask, target, softcap, temperature, hard_weight, ignore_index, reduction},
                   teacher_softcap),
      grad, stats, kept, hidden, weight, grad_hidden, grad_weight);
}

// ---- a teacher's stored log-probabilities

std::vector<double> log_probabilities(const char* op, const Tensor& t) {
  const Tensor flat = torch::stable::contiguous(on_cpu(t));
  std::vector<double> result(t.numel());
  const auto copy = [&](auto zero) {
    const auto* from = static_cast<const decltype(zero)*>(flat.data_ptr());
    for (size_t i = 0; i < result.size(); ++i) result[i] = double(from[i]);
  };
  switch (t.scalar_type()) {
    case ScalarType::Double:
      copy(double{});
      break;
    case ScalarType::BFloat16:
      copy(torch::headeronly::BFloat16{});
      break;
    case ScalarType::Half:
      copy(torch::headeronly::Half{});
      break;
    default:
      dtype_of(op, "teacher_log_probs", t);
      copy(float{});
  }
  return result;
}

LossProblem distillation_topk(const Tensor& hidden, const Tensor& weight,
                              const Tensor& teacher_indices, const Tensor& teacher_log_probs,
                              const Options& options, bool renormalize) {
  const char* op = "linear_distillation_topk";
  Student student = make_student(op, hidden, weight, options);
  LossProblem& problem = student.problem;
  if (!renormalize && options.temperature != 1) {
    fail(op, "renormalize = False needs temperature = 1, got " +
                 std::to_string(options.temperature) +
                 ": what the teacher gives the other words at that temperature is not known");
  }
  if (teacher_indices.dim() < 1 || teacher_indices.size(teacher_indices.dim() - 1) == 0)
    fail(op, "teacher_indices must have shape (..., k), k at least 1, got " +
                 to_string(teacher_indices));
  const int64_t k = teacher_indices.size(teacher_indices.dim() - 1);
  const std::vector<int64_t> indices =
      loss_integers(op, "teacher_indices", teacher_indices, hidden, k);
  check_same_shape(op, "teacher_log_probs", teacher_log_probs, "teacher_indices", teacher_indices);
  check_device(op, "teacher_log_probs", teacher_log_probs, "hidden", hidden);
  const std::vector<double> logs = log_probabilities(op, teacher_log_probs);

  const bool hard = options.hard_weight > 0;
  const int64_t n = problem.counted.size(), vocab_size = problem.student.vocab_size;
  problem.entries_per_token = k + hard;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t token = problem.counted[i];
    const std::string where = " at token " + std::to_string(token);
    const size_t first = problem.entry_weight.size();
    double most = -INFINITY, sum = 0;
    for (int64_t j = token * k; j < (token + 1) * k; ++j) most = std::fmax(most, logs[j]);
    for (int64_t j = token * k; j < (token + 1) * k; ++j) {
      // Rounding may lead a little above 0.
      if (!(logs[j] <= 0.01)) {
        fail(op, "teacher_log_probs must be logarithms of probabilities, got " +
                     std::to_string(logs[j]) + where);
      }
      const bool absent = logs[j] == -INFINITY;
      if (!absent && (indices[j] < 0 || indices[j] >= vocab_size)) {
        fail(op, "teacher_indices must be in [0, vocab_size = " + std::to_string(vocab_size) +
                     ") where teacher_log_probs is above -inf, got " + std::to_string(indices[j]) +
                     where);
      }
      const double q =
          absent ? 0 : std::exp(renormalize ? (logs[j] - most) / options.temperature : logs[j]);
      problem.entry_word.push_back(absent ? -1 : indices[j]);
      problem.entry_weight.push_back(q);
      sum += q;
    }
    if (sum == 0) fail(op, "teacher_log_probs must hold a probability above 0, got none" + where);
    const double scale = student.soft[i] / (renormalize ? sum : 1) / options.temperature;
    for (size_t e = first; e < problem.entry_weight.size(); ++e) problem.entry_weight[e] *= scale;
    if (!renormalize) problem.lse_weight[i] += student.soft[i] * (sum - 1);
    if (hard) {
      problem.entry_word.push_back(student.label[i]);
      problem.entry_weight.push_back(1 - student.soft[i]);
    }
  }
  keep_counted(problem);
  return std::move(problem);
}

void linear_distillation_topk_out(const Tensor& hidden, const Tensor& weight,
                                  const Tensor& teacher_indices, const Tensor& teacher_log_probs,
                                  std::optional<Tensor> mask, std::optional<Tensor> target,
                                  std::optional<double> softcap, double temperature,
                                  bool renormalize, double hard_weight, int64_t ignore_index,
                                  std::string reduction, Tensor out) {
  const LossProblem problem = distillation_topk(
      hidden, weight, teacher_indices, teacher_log_probs,
      {mask, target, softcap, temperature, hard_weight, ignore_index, reduction}, renormalize);
  check_loss_out(problem, hidden, out);
  loss_forward(problem, out);
}

Tensor linear_distillation_topk(const Tensor& hidden, const Tensor& weight,
                                const Tensor& teacher_indices, const Tensor& teacher_log_probs,
                                std::optional<Tensor> mask, std::optional<Tensor> target,
                                std::optional<double> softcap, double temperature, bool renormalize,
                                double hard_weight, int64_t ignore_index, std::string reduction) {
  const LossProblem problem = distillation_topk(
      hidden, weight, teacher_indices, teacher_log_probs,
      {mask, target, softcap, temperature, hard_weight, ignore_index, reduction}, renormalize);
  const Tensor out = new_loss_out(problem, hidden);
  loss_forward(problem, out);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> linear_distillation_topk_forward(
    const Tensor& hidden, const Tensor& weight, const Tensor& teacher_indices,
    const Tensor& teacher_log_probs, std::optional<Tensor> mask, std::optional<Tensor> target,
    std::optional<double> softcap, double temperature, bool renormalize, double hard_weight,
    int64_t ignore_index, std::string reduction) {
  return loss_forward_and_save(
      distillation_topk(hidden, weight, teacher_indices, teacher_log_probs,
                        {mask, target, softcap, temperature, hard_weight, ignore_index, reduction},
                        renormalize),
      hidden);
}

void linear_distillation_topk_backward_out(
    const Tensor& grad, const Tensor& hidden, const Tensor& weight, const Tensor& teacher_indices,
    const Tensor& teacher_log_probs, std::optional<Tensor> mask, std::optional<Tensor> target,
    const Tensor& stats, const Tensor& kept, std::optional<double> softcap, double temperature,
    bool renormalize, double hard_weight, int64_t ignore_index, std::string reduction,
    std::optional<Tensor> grad_hidden, std::optional<Tensor> grad_weight) {
  loss_backward(
      distillation_topk(hidden, weight, teacher_indices, teacher_log_probs,
                        {mask, target, softcap, temperature, hard_weight, ignore_index, reduction},
                        renormalize),
      grad, stats, kept, hidden, weight, grad_hidden, grad_weight);
}

template <class Library>
void implement(Library& m) {
  m.impl("linear_distillation", GEMMA2_BOX(&linear_distillation));
  m.impl("linear_distillation_out", GEMMA2_BOX(&linear_distillation_out));
  m.impl("linear_distillation_forward", GEMMA2_BOX(&linear_distillation_forward));
  m.impl("linear_distillation_backward_out", GEMMA2_BOX(&linear_distillation_backward_out));
  m.impl("linear_distillation_topk", GEMMA2_BOX(&linear_distillation_topk));
  m.impl("linear_distillation_topk_out", GEMMA2_BOX(&linear_distillation_topk_out));
  m.impl("linear_distillation_topk_forward", GEMMA2_BOX(&linear_distillation_topk_forward));
  m.impl("linear_distillation_topk_backward_out",
         GEMMA2_BOX(&linear_distillation_topk_backward_out));
}

}  // namespace
}  // namespace gemma2

GEMMA2_REGISTER(gemma2::implement)
