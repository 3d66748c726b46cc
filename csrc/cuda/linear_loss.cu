// Losses of soft-capped logits s = softcap * tanh(hidden weight^T / softcap), whose products
// another library makes for some words at a time: what linear_cross_entropy and
// linear_distillation share. torch/linear_loss.h has the loss, torch/linear_loss_cuda.cpp the loop
// over the words.
//
// - linear_loss_sums: a block a token; its maximum and sums over the words at hand are added to
//   those before. Each thread keeps a maximum of its own, so that a logit is read once.
// - linear_loss_result: one block, in double.
// - linear_loss_gradient: a warp has 256 words of a token, a lane 8 beside each other. The token's
//   entries (its label, or a teacher's k words) are looked for by all lanes at once.
// - linear_loss_add: adds up products over parts of the words, to be rounded once.
//
// Each sum has one order. Memory bounds all but the second: 4 bytes a logit are read, 2 to 4 of a
// gradient written, and 12 an element in the fourth. exp and tanh are CUDA's own, good to 2 units
// of the last place. The product beside them, 2 * hidden_size operations a logit, takes several
// times as long.
//
// linear_loss_sums_kernel: at most 64 registers, 1024 bytes of shared memory.
// linear_loss_result_kernel: at most 64 registers, 8192 bytes of shared memory.
// linear_loss_gradient_kernel: at most 80 registers, 0 bytes of shared memory.
// linear_loss_add_kernel: at most 40 registers, 0 bytes of shared memory.
#include "kernels.h"
#include "vector.cuh"

namespace gemma2 {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr unsigned kMaxGridY = 65535;

// x = softcap * tanh(x / softcap)
template <int kSize>
GEMMA2_DEVICE void cap(float softcap, float (&x)[kSize]) {
  if (softcap == 0) return;
  const float inverse = 1.0f / softcap;
#pragma unroll
  for (int i = 0; i < kSize; ++i) x[i] = softcap * tanhf(x[i] * inverse);
}

// Soft-capped logits of words [at, at + kSize) of a token; without meaning behind the last word.
template <bool kAligned, int kSize>
GEMMA2_DEVICE void load_logits(const LossLogits& side, int64_t token, int64_t at,
                               float (&x)[kSize]) {
  const float* row = side.data + token * side.words;
#pragma unroll
  for (int part = 0; part < kSize; part += 4) {
    float values[4];
    load_floats<kAligned>(row + at + part, side.words - at - part, values);
#pragma unroll
    for (int i = 0; i < 4; ++i) x[part + i] = values[i];
  }
  cap(side.softcap, x);
}

// Whether all rows allow 16-byte accesses.
bool are_aligned(const LossLogits& student, const LossLogits& teacher) {
  return is_aligned(student.data, student.words * 4) && is_aligned(teacher.data, teacher.words * 4);
}

// ---- sums over the words

GEMMA2_DEVICE float finite(float most) { return most == -INFINITY ? 0.0f : most; }

// The sum of exp(rate * (x - most)), and another one that goes with the maximum likewise.
struct ExpSums {
  float most = -INFINITY, sum = 0.0f, other = 0.0f;

  GEMMA2_DEVICE void raise(float to, float rate, float other_rate) {
    if (most == to) return;
    sum *= expf(rate * (most - to));
    other *= expf(other_rate * (most - to));
    most = to;
  }
  // Of the first n of x.
  GEMMA2_DEVICE void raise(const float (&x)[4], int64_t n, float rate, float other_rate) {
    float to = most;
#pragma unroll
    for (int i = 0; i < 4; ++i) to = i < n ? fmaxf(to, x[i]) : to;
    raise(to, rate, other_rate);
  }
  GEMMA2_DEVICE void add(ExpSums more, float rate, float other_rate) {
    const float to = fmaxf(most, more.most);
    raise(to, rate, other_rate);
    more.raise(to, rate, other_rate);
    sum += more.sum;
    other += more.other;
  }
};

GEMMA2_DEVICE float warp_max(float x) {
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) x = fmaxf(x, shuffle_xor(x, mask));
  return x;
}
// As block_sum.
GEMMA2_DEVICE float block_max(float x, float* scratch) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int warps = blockDim.x / kWarpSize;
  x = warp_max(x);
  if (warps == 1) return x;
  if (lane == 0) scratch[warp] = x;
  __syncthreads();
  return warp_max(lane < warps ? scratch[lane] : -INFINITY);
}
// The block's threads' together. `scratch`: 3 * kWarpSize floats, as block_sum has them.
GEMMA2_DEVICE void add_up_block(ExpSums& s, float rate, float other_rate, float* scratch) {
  s.raise(block_max(s.most, scratch), rate, other_rate);
  s.sum = block_sum(s.sum, scratch + kWarpSize);
  s.other = block_sum(s.other, scratch + 2 * kWarpSize);
}

// A token's sums in p.total, `first` the place of their maximum, which the two others follow.
GEMMA2_DEVICE void add_to_total(const LossSumsParams& p, int64_t token, LossStat most, LossStat sum,
                                LossStat other, ExpSums s, float rate, float other_rate) {
  const auto total = [&](LossStat stat) { return p.total + stat * p.loss.tokens + token; };
  if (!p.first) {
    ExpSums all{*total(most), *total(sum), *total(other)};
    all.add(s, rate, other_rate);
    s = all;
  }
  *total(most) = s.most;
  *total(sum) = s.sum;
  *total(other) = s.other;
}

constexpr int kSumsShared = 8 * kWarpSize * int(sizeof(float));

template <bool kAligned>
__global__ void __launch_bounds__(kThreads, 4) linear_loss_sums_kernel(const LossSumsParams p) {
  // Each sum has its own part, so that another barrier stands between its read and the next write.
  float* scratch = reinterpret_cast<float*>(shared_memory());
  const LossTokens& loss = p.loss;
  const float rate = float(1.0 / loss.temperature);
  for (int64_t token = blockIdx.x; token < loss.tokens; token += gridDim.x) {
    ExpSums student, teacher;  // the former's other one: at temperature 1; the latter's: times s
    float logits = 0.0f, entries = 0.0f;
    for (int64_t at = threadIdx.x * 4; at < p.student.words; at += blockDim.x * 4) {
      const int64_t n = p.student.words - at, n_teacher = p.teacher.words - at;
      float s[4];
      load_logits<kAligned>(p.student, token, at, s);
      student.raise(s, n, rate, 1.0f);
      const float most = finite(student.most);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i >= n) continue;
        student.sum += expf(rate * (s[i] - most));
        if (loss.hard) student.other += expf(s[i] - most);
        logits += s[i];
      }
      if (n_teacher <= 0) continue;
      float t[4];
      load_logits<kAligned>(p.teacher, token, at, t);
      teacher.raise(t, n_teacher, rate, rate);
      const float most_teacher = finite(teacher.most);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i >= n_teacher) continue;
        const float e = expf(rate * (t[i] - most_teacher));
        teacher.sum += e;
        teacher.other += e * s[i];
      }
    }
    for (int64_t e = threadIdx.x; e < loss.entries_per_token; e += blockDim.x) {
      const int64_t entry = token * loss.entries_per_token + e, word = loss.entry_word[entry];
      const int64_t at = word - p.word_begin;
      if (word < 0 || at < 0 || at >= p.student.words) continue;
      float s[1] = {p.student.data[token * p.student.words + at]};
      cap(p.student.softcap, s);
      entries += float(loss.entry_weight[entry]) * s[0];
    }
    add_up_block(student, rate, 1.0f, scratch);
    logits = block_sum(logits, scratch + 3 * kWarpSize);
    entries = block_sum(entries, scratch + 4 * kWarpSize);
    if (p.teacher.words > 0) add_up_block(teacher, rate, rate, scratch + 5 * kWarpSize);
    if (threadIdx.x == 0) {
      add_to_total(p, token, kLossMax, kLossSum, kLossHardSum, student, rate, 1.0f);
      if (p.first || p.teacher.words > 0) {
        add_to_total(p, token, kLossTeacherMax, kLossTeacherSum, kLossTeacherLogits, teacher, rate,
                     rate);
      }
      const auto add = [&](int stat, float x) {
        float* total = p.total + stat * loss.tokens + token;
        *total = p.first ? x : *total + x;
      };
      add(kLossLogits, logits);
      add(kLossEntries, entries);
    }
  }
}

// ---- the losses

constexpr int kResultThreads = 1024;

__global__ void __launch_bounds__(kResultThreads)
    linear_loss_result_kernel(const LossResultParams p) {
  double* sums = reinterpret_cast<double*>(shared_memory());
  const LossTokens& loss = p.loss;
  double sum = 0;
  for (int64_t token = threadIdx.x; token < loss.tokens; token += kResultThreads) {
    const auto total = [&](int stat) { return double(p.total[stat * loss.tokens + token]); };
    const double most = total(kLossMax), most_teacher = total(kLossTeacherMax);
    const double lse = most / loss.temperature + log(total(kLossSum));
    const double hard_lse = loss.hard ? most + log(total(kLossHardSum)) : 0;
    double value = loss.lse_weight[token] * lse + loss.hard_weight[token] * hard_lse +
                   loss.z_loss * lse * lse - loss.uniform * total(kLossLogits) -
                   total(kLossEntries);
    double teacher_lse = 0;
    if (p.teacher) {
      teacher_lse = most_teacher / loss.temperature + log(total(kLossTeacherSum));
      value -= loss.teacher_weight[token] * total(kLossTeacherLogits) / total(kLossTeacherSum);
    }
    sum += value;
    if (loss.by_token) p.out[loss.place[token]] = float(value);
    if (!p.stats) continue;
    p.stats[token] = float(lse);
    p.stats[p.stats_stride + token] = float(hard_lse);
    p.stats[2 * p.stats_stride + token] = float(teacher_lse);
  }
  if (loss.by_token) return;
  sums[threadIdx.x] = sum;
  for (int half = kResultThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0) p.out[0] = float(sums[0] / loss.divisor);
}

// ---- the gradient of the products

constexpr int kLaneWords = 8, kWarpWords = kLaneWords * kWarpSize;

// Adds factor * exp(rate * x - lse) to y.
GEMMA2_DEVICE void add_exp(float factor, float rate, const float (&x)[kLaneWords], float lse,
                           float (&y)[kLaneWords]) {
#pragma unroll
  for (int i = 0; i < kLaneWords; ++i) y[i] += factor * expf(rate * x[i] - lse);
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads)
    linear_loss_gradient_kernel(const LossGradientParams p) {
  const LossTokens& loss = p.loss;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t warp = int64_t(blockIdx.x) * (kThreads / kWarpSize) + threadIdx.x / kWarpSize;
  const int64_t first = warp * kWarpWords, at = first + lane * kLaneWords;
  if (first >= p.student.words) return;
  const float rate = float(1.0 / loss.temperature), softcap = p.student.softcap;
  for (int64_t token = blockIdx.y; token < loss.tokens; token += gridDim.y) {
    const float grad = p.grad[loss.by_token ? loss.place[token] : 0] / float(loss.divisor);
    const float lse = p.stats[token];
    float s[kLaneWords], y[kLaneWords];
    load_logits<kAligned>(p.student, token, at, s);
    const float uniform = grad * float(loss.uniform);
#pragma unroll
    for (int i = 0; i < kLaneWords; ++i) y[i] = -uniform;
    add_exp(grad * rate * (float(loss.lse_weight[token]) + 2.0f * float(loss.z_loss) * lse), rate,
            s, lse, y);
    if (loss.hard) {
      add_exp(grad * float(loss.hard_weight[token]), 1.0f, s, p.stats[p.stats_stride + token], y);
    }
    if (at < p.teacher.words) {
      float t[kLaneWords];
      load_logits<kAligned>(p.teacher, token, at, t);
#pragma unroll
      for (int i = 0; i < kLaneWords; ++i) t[i] = at + i < p.teacher.words ? t[i] : -INFINITY;
      add_exp(-grad * float(loss.teacher_weight[token]), rate, t,
              p.stats[2 * p.stats_stride + token], y);
    }
    for (int64_t begin = 0; begin < loss.entries_per_token; begin += kWarpSize) {
      const int64_t entry = token * loss.entries_per_token + begin + lane;
      const int64_t word = begin + lane < loss.entries_per_token ? loss.entry_word[entry] : -1;
      const int64_t place = word - p.word_begin - first;
      const bool here = word >= 0 && place >= 0 && place < kWarpWords;
      const float weight = here ? grad * float(loss.entry_weight[entry]) : 0.0f;
      const int lane_place = here ? int(place) : 0;
      const uint32_t found = ballot(here);
      if (found == 0) continue;
      for (int source = 0; source < kWarpSize; ++source) {
        if (!(found >> source & 1)) continue;
        const int mine = shuffle(lane_place, source) - lane * kLaneWords;
        const float taken = shuffle(weight, source);
#pragma unroll
        for (int i = 0; i < kLaneWords; ++i) y[i] -= i == mine ? taken : 0.0f;
      }
    }
    if (softcap > 0) {
      const float inverse = 1.0f / softcap;
#pragma unroll
      for (int i = 0; i < kLaneWords; ++i) y[i] *= 1.0f - s[i] * inverse * (s[i] * inverse);
    }
    T* out = static_cast<T*>(p.gradient) + token * p.student.words + at;
    constexpr int kSize = kVectorSize<T>;
#pragma unroll
    for (int part = 0; part < kLaneWords; part += kSize) {
      float values[kSize];
#pragma unroll
      for (int i = 0; i < kSize; ++i) values[i] = y[part + i];
      store_vector<kAligned>(out + part, p.student.words - at - part, pack_vector(values, T{}));
    }
  }
}

// ---- sums of products

template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads) linear_loss_add_kernel(const LossAddParams p) {
  const int64_t at = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * 4, n = p.columns - at;
  if (n <= 0) return;
  for (int64_t row = blockIdx.y; row < p.rows; row += gridDim.y) {
    float* sums = p.sums + row * p.columns + at;
    float x[4], y[4];
    load_floats<kAligned>(p.product + row * p.columns + at, n, x);
    if (!p.first) {
      load_floats<kAligned>(sums, n, y);
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] += y[i];
    }
    if (!p.out) {
      store_vector<kAligned>(sums, n, pack_vector(x, float{}));
      continue;
    }
    T* out = static_cast<T*>(p.out) + p.place[row] * p.columns + at;
    if constexpr (sizeof(T) == 4) {
      store_vector<kAligned>(out, n, pack_vector(x, float{}));
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i < n) out[i] = from_float<T>(x[i]);
      }
    }
  }
}

// Threads of a block of grid.x have kColumns columns; a row after the other in grid.y.
dim3 column_grid(int64_t columns, int64_t columns_of_block, int64_t rows) {
  dim3 grid(unsigned(divide_up(columns, columns_of_block)));
  grid.y = min(row_grid(rows).x, kMaxGridY);
  return grid;
}

}  // namespace
}  // namespace cuda

void launch_linear_loss_sums(const LossSumsParams& p, cudaStream_t stream) {
  using namespace cuda;
  const int threads = row_threads(p.student.words, 4, 4, kThreads);
  launch("linear_loss",
         are_aligned(p.student, p.teacher) ? linear_loss_sums_kernel<true>
                                           : linear_loss_sums_kernel<false>,
         row_grid(p.loss.tokens), threads, kSumsShared, stream, p);
}

void launch_linear_loss_result(const LossResultParams& p, cudaStream_t stream) {
  using namespace cuda;
  launch("linear_loss", linear_loss_result_kernel, dim3(1), kResultThreads,
         kResultThreads * sizeof(double), stream, p);
}

void launch_linear_loss_gradient(const LossGradientParams& p, cudaStream_t stream) {
  using namespace cuda;
  dispatch_dtype("linear_loss", p.dtype, [&](auto t) {
    using T = decltype(t);
    const bool aligned = are_aligned(p.student, p.teacher) &&
                         is_aligned(p.gradient, p.student.words * int64_t(sizeof(T)));
    launch("linear_loss",
           aligned ? linear_loss_gradient_kernel<T, true> : linear_loss_gradient_kernel<T, false>,
           column_grid(p.student.words, kThreads * kLaneWords, p.loss.tokens), kThreads, 0, stream,
           p);
  });
}

void launch_linear_loss_add(const LossAddParams& p, cudaStream_t stream) {
  using namespace cuda;
  dispatch_dtype("linear_loss", p.dtype, [&](auto t) {
    using T = decltype(t);
    const bool aligned = is_aligned(p.product, p.columns * 4) &&
                         is_aligned(p.sums, p.columns * 4) &&
                         (sizeof(T) != 4 || is_aligned(p.out, p.columns * 4));
    launch("linear_loss",
           aligned ? linear_loss_add_kernel<T, true> : linear_loss_add_kernel<T, false>,
           column_grid(p.columns, kThreads * 4, p.rows), kThreads, 0, stream, p);
  });
}

}  // namespace gemma2
