#include "linear_loss.h"

#include <cmath>
#include <limits>

#include "../cpu/linear_loss.h"
#include "../cpu/linear_loss_float64.h"
#include "cuda.h"
#include "mm.h"

namespace gemma2 {
namespace {

// Tokens whose logits and packed rows stand beside each other.
constexpr int64_t kBlockTokens = 2048;
// Words between two merges of the forward's statistics; at most as many in a chunk of the backward,
// whose gradients take at most kGradientBytes.
constexpr int64_t kChunkWords = 84 * kLossWords;
constexpr int64_t kGradientBytes = 32 << 20;
// Of the logits that a forward keeps for its backward.
constexpr int64_t kKeptBytes = 128 << 20;

struct Block {
  int64_t begin, tokens, stride;
};

std::vector<Block> token_blocks(int64_t tokens) {
  const int64_t blocks = divide_up(tokens, kBlockTokens);
  const int64_t each = blocks ? round_up(divide_up(tokens, blocks), kLossTokenMultiple) : 0;
  std::vector<Block> result;
  for (int64_t begin = 0; begin < tokens; begin += each) {
    const int64_t n = std::min(each, tokens - begin);
    result.push_back({begin, n, round_up(n, kLossTokenMultiple)});
  }
  return result;
}

int64_t sides(const LossProblem& problem) { return problem.teacher.vocab_size > 0 ? 2 : 1; }

int64_t kept_words(const LossProblem& problem) {
  const int64_t stride = round_up(problem.tokens, kLossTokenMultiple);
  const int64_t words = kKeptBytes / 4 / std::max<int64_t>(1, sides(problem) * stride);
  const int64_t vocab_size = problem.student.vocab_size;
  return words >= vocab_size ? vocab_size : words / kLossWords * kLossWords;
}

// A block's entries in the order of their words' units.
struct Entries {
  std::vector<int64_t> order, begin;

  Entries(const LossProblem& problem, const Block& block) {
    const int64_t n = problem.entries_per_token;
    if (n == 0) return;
    const int64_t* word = problem.entry_word.data() + block.begin * n;
    begin.assign(divide_up(problem.student.vocab_size, kLossWords) + 1, 0);
    for (int64_t e = 0; e < block.tokens * n; ++e)
      if (word[e] >= 0) ++begin[word[e] / kLossWords + 1];
    for (size_t u = 1; u < begin.size(); ++u) begin[u] += begin[u - 1];
    order.resize(begin.back());
    std::vector<int64_t> next = begin;
    for (int64_t e = 0; e < block.tokens * n; ++e)
      if (word[e] >= 0) order[next[word[e] / kLossWords]++] = e;
  }
};

// hidden's rows of a block in the layout of a product over its columns (a logit), or over its
// rows (the weight's gradient).
GemmParams hidden_operand(const LossProblemSide& side, DType dtype, const Block& block,
                          bool over_rows) {
  GemmParams g{};
  g.b = offset(side.hidden.data_ptr(), block.begin * side.hidden_stride, dtype);
  g.b_row = over_rows ? 1 : side.hidden_stride;
  g.b_k = over_rows ? side.hidden_stride : 1;
  g.columns = over_rows ? side.hidden_size : block.tokens;
  g.depth = over_rows ? block.tokens : side.hidden_size;
  g.b_dtype = g.product = dtype;
  return g;
}

// Packed rows of hidden for one block of tokens after another.
struct Packed {
  Tensor data;

  Packed(const LossProblemSide& side, const Block& largest, const Tensor& like)
      : data(scratch_floats(
            like, side.vocab_size == 0 ? 0 : packed_floats(largest.tokens, side.hidden_size))) {}
  GemmParams pack(const LossProblemSide& side, DType dtype, const Block& block, bool over_rows) {
    GemmParams g = hidden_operand(side, dtype, block, over_rows);
    g.packed_b = data.data_ptr();
    gemm_pack(g);
    return g;
  }
};

LossSide kernel_side(const LossProblemSide& side, DType dtype, const Packed& packed, float* kept) {
  LossSide s{};
  s.vocab_size = side.vocab_size;
  if (side.vocab_size == 0) return s;
  s.weight = side.weight.data_ptr();
  s.weight_stride = side.weight_stride;
  s.hidden_size = side.hidden_size;
  s.softcap = side.softcap;
  s.dtype = dtype;
  s.packed_hidden = packed.data.data_ptr();
  s.kept = kept;
  return s;
}

// What the forward and the backward of a block have in common.
LinearLossParams kernel_params(const LossProblem& problem, const Block& block,
                               const Packed& student, const Packed& teacher, const Tensor* kept,
                               const Entries& entries) {
  LinearLossParams p{};
  p.kept_words = kept ? kept_words(problem) : 0;
  float* data = kept ? floats(*kept) + sides(problem) * p.kept_words * block.begin : nullptr;
  p.student = kernel_side(problem.student, problem.dtype, student, data);
  p.teacher = kernel_side(problem.teacher, problem.teacher_dtype, teacher,
                          data ? data + p.kept_words * block.stride : nullptr);
  p.tokens = block.tokens;
  p.stride = block.stride;
  p.temperature = problem.temperature;
  p.hard = problem.hard;
  p.uniform = problem.uniform != 0;
  p.entries = entries.order.data();
  p.entry_begin = entries.begin.data();
  p.entries_per_token = problem.entries_per_token;
  p.entry_word = problem.entry_word.data() + block.begin * p.entries_per_token;
  p.entry_weight = problem.entry_weight.data() + block.begin * p.entries_per_token;
  return p;
}

// floats of LinearLossParams::scratch.
int64_t words_scratch(const LossProblem& problem, const Block& largest) {
  return gemm_scratch(problem.student.hidden_size) + sides(problem) * kLossWords * largest.stride;
}

template <class Kernel>
void parallel_words(const LinearLossParams& p, const Tensor& scratch, int64_t each,
                    const Kernel& kernel) {
  parallel_runs(divide_up(p.word_end - p.word_begin, kLossWords), 1,
                [&](int64_t thread, int64_t begin, int64_t end) {
                  LinearLossParams mine = p;
                  mine.scratch = floats(scratch) + thread * each;
                  kernel(mine, begin, end);
                });
}

// Sums of every counted token that its loss is made of.
struct Sums {
  std::vector<double> lse, hard_lse, logits, teacher_lse, teacher_logits, entries;
  explicit Sums(size_t n)
      : lse(n), hard_lse(n), logits(n), teacher_lse(n), teacher_logits(n), entries(n) {}
};

void sum_block(const LossProblem& problem, const Block& block, const Tensor* kept, Packed& student,
               Packed& teacher, Sums& sums) {
  const Tensor& like = problem.student.hidden;
  student.pack(problem.student, problem.dtype, block, false);
  if (sides(problem) == 2) teacher.pack(problem.teacher, problem.teacher_dtype, block, false);
  const Entries entries(problem, block);
  LinearLossParams p = kernel_params(problem, block, student, teacher, kept, entries);
  const int64_t vocab_size = problem.student.vocab_size, per_token = problem.entries_per_token;
  const int64_t units = divide_up(std::min(vocab_size, kChunkWords), kLossWords);
  const Tensor total = scratch_floats(like, kLossStats * p.stride);
  const Tensor partial = scratch_floats(like, units * kLossStats * p.stride);
  const Tensor logits = scratch_floats(like, block.tokens * per_token);
  const int64_t each = words_scratch(problem, block);
  const Tensor scratch = scratch_floats(like, sharing_threads(units) * each);
  p.total = floats(total);
  p.partial = floats(partial);
  p.entry_logit = floats(logits);
  std::fill_n(p.total, kLossStats * p.stride, 0.0f);
  for (const LossStat stat : {kLossMax, kLossTeacherMax})
    std::fill_n(p.total + stat * p.stride, p.stride, -std::numeric_limits<float>::infinity());
  for (p.word_begin = 0; p.word_begin < vocab_size; p.word_begin = p.word_end) {
    p.word_end = std::min(p.word_begin + kChunkWords, vocab_size);
    parallel_words(p, scratch, each, cpu_kernels().linear_loss_words);
    parallel_units(
        divide_up(p.stride, kLossTokens), units * kLossTokens * 8,
        [&](int64_t begin, int64_t end) { cpu_kernels().linear_loss_merge(p, begin, end); });
  }
  const auto stat = [&](LossStat which, int64_t t) {
    return double(p.total[which * p.stride + t]);
  };
  for (int64_t t = 0; t < block.tokens; ++t) {
    const int64_t i = block.begin + t;
    sums.lse[i] = stat(kLossMax, t) / problem.temperature + std::log(stat(kLossSum, t));
    if (problem.hard) sums.hard_lse[i] = stat(kLossMax, t) + std::log(stat(kLossHardSum, t));
    sums.logits[i] = stat(kLossLogits, t);
    if (sides(problem) == 2) {
      sums.teacher_lse[i] =
          stat(kLossTeacherMax, t) / problem.temperature + std::log(stat(kLossTeacherSum, t));
      sums.teacher_logits[i] = stat(kLossTeacherLogits, t) / stat(kLossTeacherSum, t);
    }
    for (int64_t e = t * per_token; e < (t + 1) * per_token; ++e)
      if (p.entry_word[e] >= 0) sums.entries[i] += p.entry_weight[e] * p.entry_logit[e];
  }
}

float64::LossSide float64_side(const LossProblemSide& side) {
  float64::LossSide s{};
  s.vocab_size = side.vocab_size;
  if (side.vocab_size == 0) return s;
  s.hidden = static_cast<const double*>(side.hidden.data_ptr());
  s.weight = static_cast<const double*>(side.weight.data_ptr());
  s.hidden_stride = side.hidden_stride;
  s.weight_stride = side.weight_stride;
  s.hidden_size = side.hidden_size;
  s.softcap = side.softcap;
  return s;
}

float64::LinearLoss float64_params(const LossProblem& problem, std::vector<double>& scratch) {
  scratch.resize(3 * problem.student.vocab_size);
  return {float64_side(problem.student),   float64_side(problem.teacher),
          int64_t(problem.counted.size()), problem.temperature,
          problem.entries_per_token,       problem.entry_word.data(),
          problem.entry_weight.data(),     scratch.data()};
}

void set_zero(Tensor t) { torch::stable::zero_(t); }

double number(const Tensor& t, int64_t i) {
  return t.scalar_type() == ScalarType::Double ? static_cast<const double*>(t.data_ptr())[i]
                                               : static_cast<const float*>(t.data_ptr())[i];
}

void set_number(const Tensor& t, int64_t i, double value) {
  if (t.scalar_type() == ScalarType::Double) {
    static_cast<double*>(t.data_ptr())[i] = value;
  } else {
    static_cast<float*>(t.data_ptr())[i] = float(value);
  }
}

// What multiplies each term of a token's gradient, and the sums that it needs.
struct Scales {
  std::vector<double> lse, hard_lse, teacher_lse, scale, hard_scale, uniform_scale, teacher_scale,
      entry_scale;

  Scales(const LossProblem& problem, const Tensor& grad, const Tensor& stats) {
    const int64_t n = problem.counted.size();
    for (int64_t i = 0; i < n; ++i) {
      const bool none = problem.reduction == LossProblem::kNone;
      double g = number(grad, none ? problem.counted[i] : 0);
      if (problem.reduction == LossProblem::kMean) g /= double(n);
      lse.push_back(number(stats, i));
      hard_lse.push_back(number(stats, problem.tokens + i));
      teacher_lse.push_back(number(stats, 2 * problem.tokens + i));
      scale.push_back(g * (problem.lse_weight[i] + 2 * problem.z_loss * lse[i]) /
                      problem.temperature);
      hard_scale.push_back(g * problem.hard_weight[i]);
      uniform_scale.push_back(g * problem.uniform);
      teacher_scale.push_back(g * problem.teacher_weight[i]);
      entry_scale.push_back(g);
    }
  }
};

// A block's part of a per-token array, padded with zeros.
std::vector<float> block_part(const std::vector<double>& all, const Block& block) {
  std::vector<float> part(block.stride, 0.0f);
  std::copy_n(all.begin() + block.begin, block.tokens, part.begin());
  return part;
}

// The arrays of a block and where its entries are, as the kernels read them.
struct BlockScales {
  std::vector<float> lse, hard_lse, teacher_lse, scale, hard_scale, uniform_scale, teacher_scale,
      entry_scale;
  Entries entries;

  BlockScales(const LossProblem& problem, const Scales& all, const Block& block)
      : lse(block_part(all.lse, block)),
        hard_lse(block_part(all.hard_lse, block)),
        teacher_lse(block_part(all.teacher_lse, block)),
        scale(block_part(all.scale, block)),
        hard_scale(block_part(all.hard_scale, block)),
        uniform_scale(block_part(all.uniform_scale, block)),
        teacher_scale(block_part(all.teacher_scale, block)),
        entry_scale(block_part(all.entry_scale, block)),
        entries(problem, block) {}

  void give(LinearLossParams& p) const {
    p.lse = lse.data();
    p.hard_lse = hard_lse.data();
    p.teacher_lse = teacher_lse.data();
    p.scale = scale.data();
    p.hard_scale = hard_scale.data();
    p.uniform_scale = uniform_scale.data();
    p.teacher_scale = teacher_scale.data();
    p.entry_scale = entry_scale.data();
  }
};

// float32 rows, one behind another, to rows of `out` (its number given by `place`).
template <class Place>
void round_rows(const float* from, int64_t rows, int64_t columns, void* out, DType dtype,
                const Place& place) {
  GemmParams g{};
  g.out_dtype = dtype;
  g.out_stride = g.columns = columns;
  parallel_units(rows, columns * 4, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      GemmParams one = g;
      one.out = offset(out, place(r) * columns, dtype);
      one.scratch = const_cast<float*>(from) + r * columns;
      cpu_kernels().gemm_round_rows(one, 0, 1);
    }
  });
}

void backward_blocks(const LossProblem& problem, const Scales& scales, const Tensor& kept,
                     void* grad_hidden, void* grad_weight) {
  const std::vector<Block> blocks = token_blocks(problem.counted.size());
  const Block& largest = blocks[0];
  const bool one_block = blocks.size() == 1;
  const LossProblemSide& student = problem.student;
  const Tensor& like = student.hidden;
  const int64_t vocab_size = student.vocab_size, hidden_size = student.hidden_size;
  const DType dtype = problem.dtype;

  std::vector<BlockScales> block_scales;
  for (const Block& block : blocks) block_scales.emplace_back(problem, scales, block);
  Packed by_column(student, largest, like), teacher(problem.teacher, largest, like);
  Packed by_row(student, grad_weight ? largest : Block{}, like);

  const int64_t most =
      std::max<int64_t>(1,
                        std::min(kChunkWords, kGradientBytes / 4 / largest.stride) / kLossWords) *
      kLossWords;
  const int64_t chunks = divide_up(vocab_size, most);
  const int64_t chunk = round_up(divide_up(vocab_size, chunks), kLossWords);
  const Tensor gradient =
      scratch_floats(like, std::min(chunk, round_up(vocab_size, kLossWords)) * largest.stride);
  const Tensor hidden_sums =
      scratch_floats(like, grad_hidden ? int64_t(problem.counted.size()) * hidden_size : 0);
  // With more than one block the weight's gradient is summed up in float32, a chunk at a time.
  const bool direct = one_block || dtype == DType::kFloat32;
  const Tensor weight_sums = scratch_floats(like, grad_weight && !direct ? chunk * hidden_size : 0);
  const int64_t each = words_scratch(problem, largest);
  const Tensor scratch = scratch_floats(like, sharing_threads(divide_up(chunk, kLossWords)) * each);

  for (int64_t begin = 0; begin < vocab_size; begin += chunk) {
    const int64_t end = std::min(begin + chunk, vocab_size);
    for (size_t b = 0; b < blocks.size(); ++b) {
      const Block& block = blocks[b];
      if (begin == 0 || !one_block) {
        by_column.pack(student, dtype, block, false);
        if (sides(problem) == 2) teacher.pack(problem.teacher, problem.teacher_dtype, block, false);
        if (grad_weight) by_row.pack(student, dtype, block, true);
      }
      LinearLossParams p =
          kernel_params(problem, block, by_column, teacher, &kept, block_scales[b].entries);
      block_scales[b].give(p);
      p.word_begin = begin;
      p.word_end = end;
      p.gradient = floats(gradient);
      if (grad_weight) {
        p.grad_weight = hidden_operand(student, dtype, block, true);
        p.grad_weight.packed_b = by_row.data.data_ptr();
        p.grad_weight.out = direct ? grad_weight : weight_sums.data_ptr();
        p.grad_weight.out_dtype = direct ? dtype : DType::kFloat32;
        p.grad_weight.out_stride = hidden_size;
        p.grad_weight.add = b > 0;
        p.grad_weight_begin = direct ? 0 : begin;
      }
      parallel_words(p, scratch, each, cpu_kernels().linear_loss_gradient);
      if (!grad_hidden) continue;
      GemmParams g{};
      g.a = p.gradient;
      g.a_row = 1;
      g.a_k = p.stride;
      g.a_dtype = g.out_dtype = DType::kFloat32;
      g.b = offset(student.weight.data_ptr(), begin * student.weight_stride, dtype);
      g.b_row = 1;
      g.b_k = student.weight_stride;
      g.b_dtype = g.product = dtype;
      g.rows = block.tokens;
      g.columns = g.out_stride = hidden_size;
      g.depth = end - begin;
      g.out = floats(hidden_sums) + block.begin * hidden_size;
      g.add = begin > 0;
      gemm(g, like);
    }
    if (grad_weight && !direct) {
      round_rows(floats(weight_sums), end - begin, hidden_size,
                 offset(grad_weight, begin * hidden_size, dtype), dtype,
                 [](int64_t r) { return r; });
    }
  }
  if (grad_hidden) {
    round_rows(floats(hidden_sums), problem.counted.size(), hidden_size, grad_hidden, dtype,
               [&](int64_t r) { return problem.counted[r]; });
  }
}

ScalarType result_type(const LossProblem& problem) {
  return problem.dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
}

std::vector<int64_t> out_shape(const LossProblem& problem, const Tensor& hidden) {
  if (problem.reduction != LossProblem::kNone) return {};
  return {hidden.sizes().begin(), hidden.sizes().end() - 1};
}

// Rows of a tensor (..., columns), wherever it is, as a matrix.
Tensor select_rows(const Tensor& t, int64_t rows, const std::vector<int64_t>& which) {
  using torch::stable::detail::from;
  const int64_t count = which.size();
  const Tensor index = torch::stable::empty({&count, 1}, ScalarType::Long);
  std::copy(which.begin(), which.end(), static_cast<int64_t*>(index.data_ptr()));
  std::array<StableIValue, 3> stack{from(as_matrix(t, rows)), from(int64_t{0}),
                                    from(torch::stable::to(index, t.device()))};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::index_select", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// The result or its gradient.
void check_result(const LossProblem& problem, const Tensor& hidden, const char* name,
                  const Tensor& t) {
  const std::vector<int64_t> shape = out_shape(problem, hidden);
  const auto sizes = t.sizes();
  if (!std::equal(shape.begin(), shape.end(), sizes.begin(), sizes.end())) {
    fail(problem.op, std::string(name) + " must " +
                         (problem.reduction == LossProblem::kNone ? "have hidden's leading shape"
                                                                  : "be a scalar") +
                         ", got " + to_string(t) + " for hidden of shape " + to_string(hidden));
  }
  if (t.scalar_type() != result_type(problem)) {
    fail(problem.op, std::string(name) + " must be " +
                         torch::headeronly::toString(result_type(problem)) + ", got " +
                         torch::headeronly::toString(t.scalar_type()));
  }
  check_device(problem.op, name, t, "hidden", hidden);
}

// stats and kept: null where no backward follows.
void forward(const LossProblem& problem, const Tensor& out, const Tensor* stats,
             const Tensor* kept) {
#ifdef GEMMA2_WITH_CUDA
  if (!out.is_cpu()) return loss_forward_on_cuda(problem, out, stats);
#endif
  const int64_t n = problem.counted.size();
  Sums sums(n);
  std::vector<double> scratch;
  if (problem.dtype == DType::kFloat64) {
    float64::linear_loss(
        float64_params(problem, scratch),
        {sums.lse.data(), sums.hard_lse.data(), sums.logits.data(), sums.teacher_lse.data(),
         sums.teacher_logits.data(), sums.entries.data()});
  } else if (n > 0) {
    const std::vector<Block> blocks = token_blocks(n);
    Packed student(problem.student, blocks[0], problem.student.hidden);
    Packed teacher(problem.teacher, blocks[0], problem.student.hidden);
    for (const Block& block : blocks) sum_block(problem, block, kept, student, teacher, sums);
  }
  const bool none = problem.reduction == LossProblem::kNone;
  if (none) set_zero(out);
  double total = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double lse = sums.lse[i];
    const double loss = problem.lse_weight[i] * lse + problem.hard_weight[i] * sums.hard_lse[i] +
                        problem.z_loss * lse * lse - problem.uniform * sums.logits[i] -
                        problem.teacher_weight[i] * sums.teacher_logits[i] - sums.entries[i];
    total += loss;
    if (none) set_number(out, problem.counted[i], loss);
    if (!stats) continue;
    set_number(*stats, i, lse);
    set_number(*stats, problem.tokens + i, sums.hard_lse[i]);
    set_number(*stats, 2 * problem.tokens + i, sums.teacher_lse[i]);
  }
  if (none) return;
  set_number(out, 0, problem.reduction == LossProblem::kSum ? total : total / double(n));
}

}  // namespace

LossProblemSide loss_side(const char* op, const char* hidden_name, const Tensor& hidden,
                          const char* weight_name, const Tensor& weight, const char* softcap_name,
                          std::optional<double> softcap) {
  dtype_of(op, hidden_name, hidden, Dtypes::kOrFloat64);
  if (hidden.dim() < 1) {
    fail(op, std::string(hidden_name) + " must have shape (..., hidden_size), got a scalar");
  }
  const int64_t hidden_size = hidden.size(hidden.dim() - 1);
  if (weight.dim() != 2 || weight.size(1) != hidden_size || weight.size(0) == 0) {
    fail(op, std::string(weight_name) + " must have shape (vocab_size, hidden_size) = (*, " +
                 std::to_string(hidden_size) + ") with at least one word, got " +
                 to_string(weight));
  }
  check_same_dtype(op, weight_name, weight, hidden_name, hidden);
  check_device(op, weight_name, weight, hidden_name, hidden);
  if (!hidden.is_cpu() && hidden.scalar_type() == ScalarType::Double)
    fail(op, "float64 is for the CPU only");
  if (softcap && !(*softcap > 0 && std::isfinite(*softcap))) {
    fail(op, std::string(softcap_name) + " must be positive and finite, or None, got " +
                 std::to_string(*softcap));
  }
  const Rows rows = as_rows(hidden), weight_rows = as_rows(weight);
  LossProblemSide side;
  side.hidden = rows.tensor;
  side.hidden_stride = rows.stride;
  side.weight = weight_rows.tensor;
  side.weight_stride = weight_rows.stride;
  side.vocab_size = weight.size(0);
  side.hidden_size = hidden_size;
  side.softcap = softcap.value_or(0);
  return side;
}

Tensor on_cpu(const Tensor& t) {
  if (t.is_cpu()) return t;
  return torch::stable::to(t, torch::stable::Device(torch::headeronly::DeviceType::CPU));
}

void keep_counted(LossProblem& problem) {
  const int64_t n = problem.counted.size();
  if (n == problem.tokens) return;
  for (LossProblemSide* side : {&problem.student, &problem.teacher}) {
    if (side->vocab_size == 0) continue;
    const DType dtype = side == &problem.student ? problem.dtype : problem.teacher_dtype;
    const int64_t columns = side->hidden_size;
    if (!side->hidden.is_cpu()) {
      side->hidden = select_rows(side->hidden, problem.tokens, problem.counted);
      side->hidden_stride = columns;
      continue;
    }
    const std::vector<int64_t> shape{n, columns};
    const Tensor rows = torch::stable::new_empty(side->hidden, {shape.data(), 2});
    for (int64_t i = 0; i < n; ++i) {
      const char* from = static_cast<const char*>(
          offset(side->hidden.data_ptr(), problem.counted[i] * side->hidden_stride, dtype));
      std::copy_n(from, columns * element_size(dtype),
                  static_cast<char*>(offset(rows.data_ptr(), i * columns, dtype)));
    }
    side->hidden = rows;
    side->hidden_stride = columns;
  }
}

LossProblem::Reduction loss_reduction(const char* op, const std::string& name) {
  if (name == "mean") return LossProblem::kMean;
  if (name == "sum") return LossProblem::kSum;
  if (name == "none") return LossProblem::kNone;
  fail(op, "reduction must be 'mean', 'sum' or 'none', got '" + name + "'");
}

std::vector<int64_t> loss_integers(const char* op, const char* name, const Tensor& t,
                                   const Tensor& hidden, int64_t last) {
  const int64_t leading = hidden.dim() - 1;
  bool right = t.dim() == leading + (last > 0) && (last == 0 || t.size(leading) == last);
  for (int64_t i = 0; right && i < leading; ++i) right = t.size(i) == hidden.size(i);
  if (!right) {
    fail(op, std::string(name) + " must have hidden's leading shape" +
                 (last ? " and " + std::to_string(last) + " elements a token" : "") + ", got " +
                 to_string(t) + " for hidden of shape " + to_string(hidden));
  }
  check_device(op, name, t, "hidden", hidden);
  const Tensor flat = torch::stable::contiguous(on_cpu(t));
  std::vector<int64_t> result(t.numel());
  const auto copy = [&](auto zero) {
    const auto* from = static_cast<const decltype(zero)*>(flat.data_ptr());
    std::copy_n(from, result.size(), result.begin());
  };
  switch (t.scalar_type()) {
    case ScalarType::Bool:
    case ScalarType::Byte:
      copy(uint8_t{});
      break;
    case ScalarType::Int:
      copy(int32_t{});
      break;
    case ScalarType::Long:
      copy(int64_t{});
      break;
    default:
      fail(op, std::string(name) + " must be of integers, got " +
                   torch::headeronly::toString(t.scalar_type()));
  }
  return result;
}

Tensor new_loss_out(const LossProblem& problem, const Tensor& hidden) {
  const std::vector<int64_t> shape = out_shape(problem, hidden);
  return torch::stable::new_empty(hidden, {shape.data(), shape.size()}, result_type(problem));
}

void check_loss_out(const LossProblem& problem, const Tensor& hidden, const Tensor& out) {
  check_result(problem, hidden, "out", out);
  if (!out.is_contiguous()) fail(problem.op, "out must be contiguous");
}

void loss_forward(const LossProblem& problem, const Tensor& out) {
  forward(problem, out, nullptr, nullptr);
}

// Of what the forward keeps for the backward.
static int64_t kept_size(const LossProblem& problem, const Tensor& hidden) {
  if (!hidden.is_cpu() || problem.dtype == DType::kFloat64) return 0;
  const int64_t stride = round_up(problem.tokens, kLossTokenMultiple);
  return sides(problem) * kept_words(problem) * stride;
}

std::tuple<Tensor, Tensor, Tensor> loss_forward_and_save(const LossProblem& problem,
                                                         const Tensor& hidden) {
  const Tensor out = new_loss_out(problem, hidden);
  const std::vector<int64_t> shape{3, problem.tokens};
  const Tensor stats = torch::stable::new_zeros(hidden, {shape.data(), 2}, result_type(problem));
  const Tensor kept = scratch_floats(hidden, kept_size(problem, hidden));
  forward(problem, out, &stats, &kept);
  return {out, stats, kept};
}

void loss_backward(const LossProblem& problem, const Tensor& grad, const Tensor& stats,
                   const Tensor& kept, const Tensor& hidden, const Tensor& weight,
                   const std::optional<Tensor>& grad_hidden,
                   const std::optional<Tensor>& grad_weight) {
  check_result(problem, hidden, "grad", grad);
  check_device(problem.op, "stats", stats, "hidden", hidden);
  if (stats.dim() != 2 || stats.size(0) != 3 || stats.size(1) != problem.tokens ||
      stats.scalar_type() != result_type(problem) || !stats.is_contiguous())
    fail(problem.op, "stats must be what the forward returned, got " + to_string(stats));
  check_device(problem.op, "kept", kept, "hidden", hidden);
  if (kept.dim() != 1 || kept.numel() != kept_size(problem, hidden) ||
      kept.scalar_type() != ScalarType::Float || !kept.is_contiguous())
    fail(problem.op, "kept must be what the forward returned, got " + to_string(kept));
  if (grad_hidden) check_out(problem.op, "grad_hidden", *grad_hidden, "hidden", hidden);
  if (grad_weight) check_out(problem.op, "grad_weight", *grad_weight, "weight", weight);
  const bool every = int64_t(problem.counted.size()) == problem.tokens;
  const bool wide = problem.dtype == DType::kFloat64, empty = problem.counted.empty();
  if (grad_hidden && (wide || !every || empty)) set_zero(*grad_hidden);
  if (grad_weight && (wide || empty)) set_zero(*grad_weight);
  if (empty) return;
#ifdef GEMMA2_WITH_CUDA
  if (!hidden.is_cpu()) {
    return loss_backward_on_cuda(problem, torch::stable::contiguous(grad), stats, grad_hidden,
                                 grad_weight);
  }
#endif
  const Scales scales(problem, torch::stable::contiguous(grad), stats);
  if (!wide) {
    return backward_blocks(problem, scales, kept, grad_hidden ? grad_hidden->data_ptr() : nullptr,
                           grad_weight ? grad_weight->data_ptr() : nullptr);
  }
  // The counted tokens' rows, one behind another, then to their places.
  const int64_t columns = problem.student.hidden_size;
  std::vector<double> scratch, rows(grad_hidden ? problem.counted.size() * columns : 0);
  float64::linear_loss_backward(
      float64_params(problem, scratch),
      {scales.lse.data(), scales.hard_lse.data(), scales.teacher_lse.data(), scales.scale.data(),
       scales.hard_scale.data(), scales.uniform_scale.data(), scales.teacher_scale.data(),
       scales.entry_scale.data()},
      grad_hidden ? rows.data() : nullptr,
      grad_weight ? static_cast<double*>(grad_weight->data_ptr()) : nullptr);
  for (size_t i = 0; grad_hidden && i < problem.counted.size(); ++i) {
    std::copy_n(rows.begin() + i * columns, columns,
                static_cast<double*>(grad_hidden->data_ptr()) + problem.counted[i] * columns);
  }
}

}  // namespace gemma2
