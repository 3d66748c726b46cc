// The losses over a linear layer on CUDA: torch's products for some words at a time, and between
// them the kernels of cuda/linear_loss.cu.
#include "cuda.h"
#include "gemm.h"
#include "linear_loss.h"
#include "mm.h"

#ifdef GEMMA2_WITH_CUDA

namespace gemma2 {
namespace {

// Logits of a side that stand at once, unless so many tokens count that fewer than kLeastWords
// words would be left: products of fewer would not fill a GPU.
constexpr int64_t kChunkLogits = 32 << 20;
constexpr int64_t kLeastWords = 1024;
constexpr int64_t kWordMultiple = 64;  // so that all rows but the last words' allow wide accesses

template <class T>
Tensor to_device(const std::vector<T>& values, const Tensor& like) {
  const int64_t size = values.size();
  const Tensor here = torch::stable::empty(
      {&size, 1}, std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Long);
  std::copy(values.begin(), values.end(), static_cast<T*>(here.data_ptr()));
  return torch::stable::to(here, like.device());
}

// The first rows * columns elements of `room`, as a matrix.
Tensor matrix_in(const Tensor& room, int64_t rows, int64_t columns) {
  Tensor flat = room;
  const std::array<int64_t, 2> shape{rows, columns};
  return torch::stable::reshape(torch::stable::narrow(flat, 0, 0, rows * columns),
                                {shape.data(), 2});
}

Tensor rows_of(const Tensor& t, int64_t begin, int64_t rows) {
  Tensor whole = t;
  return torch::stable::narrow(whole, 0, begin, rows);
}

// A side on the device: its tokens' rows, and room for the products with a chunk of words.
struct Side {
  const LossProblemSide& of;
  int64_t tokens;
  Tensor hidden, room;

  Side(const LossProblemSide& side, int64_t tokens, int64_t chunk)
      : of(side), tokens(tokens), hidden(side.hidden), room(side.hidden) {
    if (side.vocab_size == 0) return;
    hidden = as_matrix(side.hidden, tokens);
    room = scratch_floats(side.hidden, tokens * std::min(chunk, side.vocab_size));
  }
  int64_t words(int64_t begin, int64_t chunk) const {
    return std::clamp<int64_t>(of.vocab_size - begin, 0, chunk);
  }
  Tensor weight(int64_t begin, int64_t words) const { return rows_of(of.weight, begin, words); }
  // The products with as many of the words [begin, begin + chunk) as it has.
  LossLogits multiply(int64_t begin, int64_t chunk) const {
    const int64_t n = words(begin, chunk);
    if (n == 0) return {nullptr, 0, float(of.softcap)};
    torch_mm_out(hidden, torch::stable::transpose(weight(begin, n), 0, 1),
                 matrix_in(room, tokens, n), tokens);
    return {floats(room), n, float(of.softcap)};
  }
};

// What forward and backward share.
struct OnDevice {
  const LossProblem& problem;
  int64_t tokens, chunk;
  Tensor integers, numbers;
  Side student, teacher;

  explicit OnDevice(const LossProblem& p)
      : problem(p),
        tokens(p.counted.size()),
        chunk(chunk_words(p)),
        integers(to_device(joined<int64_t>({&p.counted, &p.entry_word}), p.student.hidden)),
        numbers(to_device(
            joined<double>({&p.lse_weight, &p.hard_weight, &p.teacher_weight, &p.entry_weight}),
            p.student.hidden)),
        student(p.student, tokens, chunk),
        teacher(p.teacher, tokens, chunk) {}

  static int64_t chunk_words(const LossProblem& p) {
    const int64_t vocab_size = p.student.vocab_size;
    const int64_t most =
        std::max<int64_t>(kLeastWords, kChunkLogits / std::max<int64_t>(1, p.counted.size()));
    return std::min(vocab_size,
                    round_up(divide_up(vocab_size, divide_up(vocab_size, most)), kWordMultiple));
  }
  template <class T>
  static std::vector<T> joined(std::initializer_list<const std::vector<T>*> parts) {
    std::vector<T> all;
    for (const std::vector<T>* part : parts) all.insert(all.end(), part->begin(), part->end());
    return all;
  }

  LossTokens loss() const {
    LossTokens l{};
    l.tokens = tokens;
    l.entries_per_token = problem.entries_per_token;
    l.place = static_cast<const int64_t*>(integers.data_ptr());
    l.entry_word = l.place + tokens;
    l.lse_weight = static_cast<const double*>(numbers.data_ptr());
    l.hard_weight = l.lse_weight + tokens;
    l.teacher_weight = l.hard_weight + tokens;
    l.entry_weight = l.teacher_weight + tokens;
    l.temperature = problem.temperature;
    l.z_loss = problem.z_loss;
    l.uniform = problem.uniform;
    l.hard = problem.hard;
    l.by_token = problem.reduction == LossProblem::kNone;
    l.divisor = problem.reduction == LossProblem::kMean ? double(tokens) : 1;
    return l;
  }
  template <class Params>
  void run(void (*launch)(const Params&, cudaStream_t), const Params& p) const {
    run_on_cuda(problem.student.hidden, launch, p);
  }
  // f(begin, words) over the vocabulary.
  template <class F>
  void each_chunk(const F& f) const {
    const int64_t vocab_size = problem.student.vocab_size;
    for (int64_t begin = 0; begin < vocab_size; begin += chunk)
      f(begin, std::min(chunk, vocab_size - begin));
  }
};

}  // namespace

void loss_forward_on_cuda(const LossProblem& problem, const Tensor& out, const Tensor* stats) {
  const OnDevice device(problem);
  const Tensor total = scratch_floats(problem.student.hidden, kLossCudaStats * device.tokens);
  if (device.tokens > 0) {
    device.each_chunk([&](int64_t begin, int64_t words) {
      LossSumsParams p{};
      p.student = device.student.multiply(begin, words);
      p.teacher = device.teacher.multiply(begin, words);
      p.loss = device.loss();
      p.word_begin = begin;
      p.first = begin == 0;
      p.total = floats(total);
      device.run(launch_linear_loss_sums, p);
    });
  }
  if (problem.reduction == LossProblem::kNone) {
    Tensor all = out;
    torch::stable::zero_(all);
  }
  LossResultParams p{};
  p.loss = device.loss();
  p.teacher = problem.teacher.vocab_size > 0;
  p.total = floats(total);
  p.out = floats(out);
  if (stats) p.stats = floats(*stats);
  p.stats_stride = problem.tokens;
  device.run(launch_linear_loss_result, p);
}

void loss_backward_on_cuda(const LossProblem& problem, const Tensor& grad, const Tensor& stats,
                           const std::optional<Tensor>& grad_hidden,
                           const std::optional<Tensor>& grad_weight) {
  const OnDevice device(problem);
  const int64_t tokens = device.tokens, hidden_size = problem.student.hidden_size;
  const Tensor& like = problem.student.hidden;
  const int64_t room = tokens * device.chunk;
  const Tensor gradient_room = torch::stable::new_empty(like, {&room, 1});
  const Tensor product = scratch_floats(like, grad_hidden ? tokens * hidden_size : 0);
  const bool several = device.chunk < problem.student.vocab_size;
  const Tensor sums = scratch_floats(like, grad_hidden && several ? tokens * hidden_size : 0);
  device.each_chunk([&](int64_t begin, int64_t words) {
    LossGradientParams p{};
    p.student = device.student.multiply(begin, words);
    p.teacher = device.teacher.multiply(begin, words);
    p.loss = device.loss();
    p.word_begin = begin;
    p.grad = floats(grad);
    p.stats = floats(stats);
    p.stats_stride = problem.tokens;
    p.gradient = gradient_room.data_ptr();
    p.dtype = problem.dtype;
    device.run(launch_linear_loss_gradient, p);
    const Tensor gradient = matrix_in(gradient_room, tokens, words);
    if (grad_weight) {
      torch_mm_out(torch::stable::transpose(gradient, 0, 1), device.student.hidden,
                   rows_of(*grad_weight, begin, words), words);
    }
    if (!grad_hidden || hidden_size == 0) return;
    torch_mm_out(gradient, device.student.weight(begin, words),
                 matrix_in(product, tokens, hidden_size), tokens);
    LossAddParams add{};
    add.product = floats(product);
    add.sums = floats(sums);
    add.first = begin == 0;
    if (begin + words == problem.student.vocab_size) add.out = grad_hidden->data_ptr();
    add.place = device.loss().place;
    add.rows = tokens;
    add.columns = hidden_size;
    add.dtype = problem.dtype;
    device.run(launch_linear_loss_add, add);
  });
}

}  // namespace gemma2

#endif
