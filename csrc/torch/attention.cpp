// Bindings of attention, attention_varlen, their backwards, attention_cache, attention_append_cache
// and attention_paged: checks, and how the work is divided.
//
// Lengths, starts and cu_seqlens stay where they are: on a GPU their values are not checked, which
// would make every call wait for it; the kernels clamp them to what exists.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <tuple>
#include <vector>

#include "../cpu/float64.h"
#include "../cpu/isa.h"
#include "cuda.h"
#include "rope.h"

namespace gemma2 {
namespace {

constexpr int64_t kStreamSplitKeys = 256;  // keys of a unit with few rows, and with a block of rows
constexpr int64_t kTileSplitKeys = 1024;
constexpr int64_t kWorkPerThread = 1 << 18;  // multiplications that are worth a thread

std::string row_of(const char* name, int64_t b) {
  return std::string(name) + "[" + std::to_string(b) + "]";
}

// An op's arguments, checked. p points into the vectors and the tensors.
struct Problem {
  AttentionParams p{};
  std::vector<int64_t> lengths, starts;
  std::vector<int32_t> q_ends, k_ends;
  std::optional<Tensor> on_device[2];  // the same on a GPU
  Tensor q, k, v;                      // as kernels can read them
  std::vector<int64_t> lse_shape;      // (batch, num_heads, seqlen_q) or (num_heads, total_q)
};

// Fills in what all forms share. The tensors are held by the caller.
void check_common(const char* op, AttentionParams& p, double scale, std::optional<double> softcap,
                  std::optional<int64_t> window, bool causal) {
  if (p.head_dim < 8 || p.head_dim > 256 || p.head_dim % 8) {
    fail(op, "head_dim must be a multiple of 8 from 8 to 256, got " + std::to_string(p.head_dim));
  }
  if (p.num_kv_heads < 1 || p.num_heads < 1 || p.num_heads % p.num_kv_heads) {
    fail(op, "num_heads must be a positive multiple of num_kv_heads = " +
                 std::to_string(p.num_kv_heads) + ", got " + std::to_string(p.num_heads));
  }
  if (!std::isfinite(scale)) fail(op, "scale must be finite, got " + std::to_string(scale));
  if (softcap && !(*softcap > 0 && std::isfinite(*softcap))) {
    fail(op, "softcap must be positive and finite, got " + std::to_string(*softcap));
  }
  if (window && *window < 1) {
    fail(op, "window must be at least 1, got " + std::to_string(*window));
  }
  if (window && !causal) fail(op, "window needs causal=True, got causal=False");
  p.scale = scale;
  p.softcap = softcap.value_or(0.0);
  // No window reaches further than any sequence does; below the clamp no position overflows.
  p.window = window ? std::min(*window, int64_t(1) << 48) : 0;
  p.causal = causal;
}

void check_integers(const char* op, const char* name, const Tensor& t, int64_t length,
                    const char* length_name, const Tensor& q) {
  check_device(op, name, t, "q", q);
  const ScalarType type = t.scalar_type();
  if (type != ScalarType::Int && type != ScalarType::Long) {
    fail(op,
         std::string(name) + " must be int32 or int64, got " + torch::headeronly::toString(type));
  }
  if (t.dim() != 1 || t.size(0) != length) {
    fail(op, std::string(name) + " must have shape (" + length_name + ",) = (" +
                 std::to_string(length) + ",), got " + to_string(t));
  }
}

// Integers on the CPU of int32 or int64, any strides.
std::vector<int64_t> to_vector(const Tensor& t) {
  std::vector<int64_t> values(t.size(0));
  for (int64_t i = 0; i < t.size(0); ++i) {
    const int64_t at = i * t.stride(0);
    values[i] = t.scalar_type() == ScalarType::Int ? static_cast<const int32_t*>(t.data_ptr())[at]
                                                   : static_cast<const int64_t*>(t.data_ptr())[at];
  }
  return values;
}

// The same on a GPU as contiguous integers of type T, which `held` keeps.
template <class T>
const T* on_device(const Tensor& t, std::optional<Tensor>& held) {
  const ScalarType type = sizeof(T) == 4 ? ScalarType::Int : ScalarType::Long;
  held = torch::stable::contiguous(t.scalar_type() == type ? t : torch::stable::to(t, type));
  return static_cast<const T*>(held->data_ptr());
}

// The tensor itself where kernels can read it, else a copy: the last dimension is contiguous, and
// on a GPU each row of 16-bit elements is aligned to 16 bytes and rows are less than 2^31 elements
// apart. (What rows of int8 have to be is attention_reads_int8's to say.)
Tensor readable(const Tensor& t) {
  if (t.is_cpu() || is_int8(t)) return last_dim_contiguous(t);
  const int64_t last = t.dim() - 1;
  bool reads = t.size(last) <= 1 || t.stride(last) == 1;
  for (int64_t i = 0; i < last; ++i) {
    if (t.size(i) <= 1) continue;
    const bool aligned = t.scalar_type() == ScalarType::Float || t.stride(i) % 8 == 0;
    reads = reads && aligned && (i != last - 2 || t.stride(i) <= INT32_MAX);
  }
  if (t.scalar_type() != ScalarType::Float && reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 != 0)
    reads = false;
  if (reads) return t;
  Tensor copy = torch::stable::new_empty(t, t.sizes());
  torch::stable::copy_(copy, t);
  return copy;
}

void check_lse(const char* op, const char* name, const Tensor& lse, const Problem& problem) {
  check_device(op, name, lse, "q", problem.q);
  const std::vector<int64_t>& shape = problem.lse_shape;
  const bool wide = problem.p.dtype == DType::kFloat64;
  bool same = lse.dim() == int64_t(shape.size());
  std::string text;
  for (size_t i = 0; i < shape.size(); ++i) {
    same = same && lse.size(i) == shape[i];
    text += (i ? ", " : "") + std::to_string(shape[i]);
  }
  same = same && lse.scalar_type() == (wide ? ScalarType::Double : ScalarType::Float);
  if (!same || !lse.is_contiguous()) {
    fail(op, std::string(name) + " must be contiguous " + (wide ? "float64" : "float32") +
                 " of shape (" + text + "), got " + torch::headeronly::toString(lse.scalar_type()) +
                 " " + to_string(lse));
  }
}

int64_t size_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

ScalarType lse_type(const Tensor& q) {
  return q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

int64_t max_keys(const AttentionParams& p) {
  return p.window ? std::min(p.window + p.seqlen_q - 1, p.seqlen_k) : p.seqlen_k;
}

// Threads for that many units and multiplications in all.
int64_t count_workers(int64_t units, int64_t work) {
  const int64_t threads = torch::stable::get_num_threads();
  return std::min({threads, units, 1 + work / kWorkPerThread});
}

// Calls f(worker, unit) for every unit. A worker takes the next unit when it is done with one,
// since units differ in the keys they see; so units begin in their order.
template <class F>
void take_units(int64_t workers, int64_t units, const F& f) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t unit; (unit = next.fetch_add(1, std::memory_order_relaxed)) < units;)
        f(worker, unit);
    }
  });
}

#ifdef GEMMA2_WITH_CUDA
// An int8 cache as one of like's dtype; p's view of it becomes one of the result.
Tensor widen_cache(const AttentionParams& p, const Tensor& like, HeadsView& cache,
                   HeadsView& scales) {
  const Tensor out =
      torch::stable::new_empty(like, {p.batch, p.num_kv_heads, p.capacity, p.head_dim});
  run_on_cuda(like, launch_widen_cache,
              WidenCacheParams{cache, scales, out.data_ptr(), p.key_lengths, p.batch, p.capacity,
                               p.num_kv_heads, p.head_dim, p.dtype});
  cache = {out.data_ptr(), out.stride(0), out.stride(2), out.stride(1)};
  scales.data = nullptr;
  return out;
}

void run_attention_on_cuda(AttentionParams p, const Tensor& like) {
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  std::optional<Tensor> k, v;
  if (p.k_scales.data && !attention_reads_int8(p)) {
    k = widen_cache(p, like, p.k, p.k_scales);
    v = widen_cache(p, like, p.v, p.v_scales);
  }
  const Tensor partial =
      torch::stable::new_empty(like, {attention_partial_size(p)}, ScalarType::Float);
  p.partial = static_cast<float*>(partial.data_ptr());
  run_on_cuda(like, launch_attention, p);
}
#endif

// Key heads that a unit with so many rows for each takes: several where a key's rows of all heads
// lie side by side, so that they are read as they lie; no more rows than stay in the first cache,
// or where arithmetic bounds the work twice as many; and fewer heads where threads would lack
// units, of which there are `units` for each head.
int64_t heads_of_unit(const AttentionParams& p, int64_t rows, int64_t units) {
  constexpr int64_t kUnitsPerThread = 2;
  const auto side_by_side = [](const HeadsView& t) { return t.head_stride < t.seqlen_stride; };
  if (p.k_scales.data || !side_by_side(p.k) || !side_by_side(p.v)) return 1;
  const int64_t most =
      rows < kAttentionSharedRows ? kAttentionJoinedRows : 2 * kAttentionJoinedRows;
  const int64_t least = kUnitsPerThread * torch::stable::get_num_threads();
  int64_t heads = std::min(p.num_kv_heads, most / std::max<int64_t>(1, rows));
  while (heads > 1 && (p.num_kv_heads % heads || units * (p.num_kv_heads / heads) < least)) --heads;
  return std::max<int64_t>(1, heads);
}

// Divides the work, allocates scratch, runs.
void run(const AttentionParams& p, const Tensor& like) {
#ifdef GEMMA2_WITH_CUDA
  if (!like.is_cpu()) return run_attention_on_cuda(p, like);
#endif
  if (p.dtype == DType::kFloat64) return float64::attention(p);
  const int64_t keys = max_keys(p);  // that one row block sees, at most
  const int64_t group = p.num_heads / p.num_kv_heads, rows = group * p.seqlen_q;
  const bool stream = p.seqlen_q <= kAttentionStreamPositions && rows <= kAttentionStreamRows;
  AttentionWork w{};
  w.p = p;
  w.stream = stream;
  w.zen4 = is_zen4();
  w.block_rows = stream ? attention_stream_rows(rows)
                 : rows < kAttentionRowBlock
                     ? (rows + kAttentionTileRows - 1) / kAttentionTileRows * kAttentionTileRows
                     : kAttentionRowBlock;
  w.row_blocks = (rows + w.block_rows - 1) / w.block_rows;
  w.splits = 1;
  w.split_keys = keys;
  if (w.row_blocks == 1) {
    // Splits lie at multiples of split_keys, of which `keys` keys can touch one more than fill it.
    w.split_keys = stream ? kStreamSplitKeys : kTileSplitKeys;
    w.splits = std::min((keys + w.split_keys - 1) / w.split_keys + 1,
                        (p.seqlen_k + w.split_keys - 1) / w.split_keys);
    if (w.splits < 1) w.splits = 1;
  }
  w.unit_heads = stream ? heads_of_unit(p, w.block_rows, p.batch * w.splits) : 1;
  const int64_t heads = p.batch * p.num_kv_heads;
  const int64_t units = w.row_blocks * heads / w.unit_heads * w.splits;
  const int64_t unit_keys = w.splits > 1 ? w.split_keys : keys;
  const int64_t work = units * w.unit_heads * (w.block_rows + 8) * (unit_keys + 1) * p.head_dim;
  const int64_t workers = count_workers(units, work);

  const int64_t padded_dim = attention_padded_dim(p.head_dim);
  const int64_t unit_rows = w.unit_heads * w.block_rows;
  int64_t scratch = unit_rows * (kAttentionQueryStride + padded_dim) +
                    attention_score_rows(unit_rows) * kAttentionScoreStride;
  if (w.unit_heads > 1) scratch += kAttentionKeyBlock * p.head_dim;
  if (!stream) scratch += kAttentionKeyBlock * 2 * padded_dim;
  if (!stream && p.k_scales.data) scratch += 2 * kAttentionKeyBlock * p.head_dim;
  scratch = (scratch + 31) / 32 * 32;
  int64_t partial = w.splits > 1 ? heads * w.splits * w.block_rows * (p.head_dim + 2) : 0;
  const Tensor memory =
      torch::stable::new_empty(like, {workers * scratch + partial}, ScalarType::Float);
  float* data = static_cast<float*>(memory.data_ptr());
  w.partial = data + workers * scratch;

  std::vector<int64_t> next(workers, -1);
  const CpuKernels& kernels = cpu_kernels();
  const auto run_units = [&](int64_t worker, int64_t begin, int64_t end) {
    AttentionWork mine = w;
    mine.scratch = data + worker * scratch;
    mine.next = &next[worker];
    kernels.attention_units(mine, begin, end);
  };
  if (stream) {
    // They cost the same; a worker's lie next to each other, so that it reads keys as they lie.
    parallel_runs(units, 1, workers, run_units);
  } else {
    take_units(workers, units,
               [&](int64_t worker, int64_t unit) { run_units(worker, unit, unit + 1); });
  }
  if (w.splits > 1) {
    parallel_units(heads, w.splits * w.block_rows * p.head_dim * 4,
                   [&](int64_t begin, int64_t end) { kernels.attention_combine(w, begin, end); });
  }
}

// Views of a (batch, seqlen, heads, head_dim) or (total, heads, head_dim) tensor.
HeadsView view(const Tensor& t) {
  return t.dim() == 4 ? heads_view(t) : HeadsView{t.data_ptr(), 0, t.stride(0), t.stride(1)};
}

void set_inputs(Problem& problem, const Tensor& q, const Tensor& k, const Tensor& v) {
  problem.q = readable(q);
  problem.k = readable(k);
  problem.v = readable(v);
  problem.p.q = view(problem.q), problem.p.k = view(problem.k), problem.p.v = view(problem.v);
}

void set_results(AttentionParams& p, const Tensor& out, const std::optional<Tensor>& lse) {
  p.out = view(out);
  p.lse = lse ? static_cast<float*>(lse->data_ptr()) : nullptr;
}

// The results of the forward, the gradients that come in, and those to compute.
struct BackwardTensors {
  Tensor grad_out, grad_lse, out, lse, grad_q, grad_k, grad_v;
};

#ifdef GEMMA2_WITH_CUDA
// The tensors are as run_backward leaves them.
void run_backward_on_cuda(const Problem& problem, BackwardTensors& t) {
  const torch::stable::accelerator::DeviceGuard guard(problem.q.get_device_index());
  // Keys that no row sees, and rows of no sequence, get zeros.
  torch::stable::zero_(t.grad_k);
  torch::stable::zero_(t.grad_v);
  if (problem.p.cu_seqlens_q) torch::stable::zero_(t.grad_q);
  if (problem.p.batch == 0) return;
  const Tensor terms = torch::stable::new_empty(t.lse, t.lse.sizes(), ScalarType::Float);
  const AttentionBackwardParams p{problem.p,
                                  view(t.grad_out),
                                  static_cast<const float*>(t.grad_lse.data_ptr()),
                                  view(t.grad_q),
                                  view(t.grad_k),
                                  view(t.grad_v),
                                  static_cast<float*>(terms.data_ptr())};
  run_on_cuda(problem.q, launch_attention_backward, p);
}
#endif

void run_backward(const char* op, Problem& problem, BackwardTensors t) {
  AttentionParams& p = problem.p;
  check_like(op, "grad_out", t.grad_out, "q", problem.q);
  check_like(op, "out", t.out, "q", problem.q);
  t.grad_lse = torch::stable::contiguous(t.grad_lse);
  check_lse(op, "lse", t.lse, problem);
  check_lse(op, "grad_lse", t.grad_lse, problem);
  check_out(op, "grad_q", t.grad_q, "q", problem.q);
  check_out(op, "grad_k", t.grad_k, "k", problem.k);
  check_out(op, "grad_v", t.grad_v, "v", problem.v);
  t.grad_out = readable(t.grad_out);
  t.out = readable(t.out);
#ifdef GEMMA2_WITH_CUDA
  if (!problem.q.is_cpu()) {
    set_results(p, t.out, t.lse);
    return run_backward_on_cuda(problem, t);
  }
#endif
  // Keys outside of the valid ones, and rows behind the last sequence, get zeros.
  const auto clear = [size = size_of(p.dtype)](const Tensor& grad, int64_t from) {
    const int64_t bytes = (grad.numel() - from) * size;
    if (bytes > 0) std::memset(static_cast<char*>(grad.data_ptr()) + from * size, 0, bytes);
  };
  clear(t.grad_k, 0), clear(t.grad_v, 0);
  if (p.cu_seqlens_q) clear(t.grad_q, p.cu_seqlens_q[p.batch] * p.num_heads * p.head_dim);
  if (p.batch == 0 || p.seqlen_q == 0) return;
  set_results(p, t.out, t.lse);

  AttentionBackwardWork w{};
  w.p = {p,
         view(t.grad_out),
         static_cast<const float*>(t.grad_lse.data_ptr()),
         view(t.grad_q),
         view(t.grad_k),
         view(t.grad_v),
         nullptr};
  if (p.dtype == DType::kFloat64) return float64::attention_backward(w.p);

  constexpr int64_t kBlock = kAttentionBackwardBlock;
  const int64_t group = p.num_heads / p.num_kv_heads, heads = p.batch * p.num_kv_heads;
  std::vector<int64_t> first_row_block(p.batch + 1);
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t seqlen_q =
        p.cu_seqlens_q ? p.cu_seqlens_q[b + 1] - p.cu_seqlens_q[b] : p.seqlen_q;
    first_row_block[b + 1] = first_row_block[b] + (seqlen_q * group + kBlock - 1) / kBlock;
  }
  const int64_t row_blocks = first_row_block[p.batch] * p.num_kv_heads;
  const int64_t row_units = (p.seqlen_q * group + kBlock - 1) / kBlock * heads;
  const int64_t key_units = (p.seqlen_k + kBlock - 1) / kBlock * heads;
  const int64_t work = p.batch * p.num_heads * p.seqlen_q * max_keys(p) * p.head_dim;
  const int64_t workers = count_workers(key_units, work);

  w.row_room = attention_backward_room(p.seqlen_q * group);
  w.key_room = attention_backward_room(p.seqlen_k);
  const int64_t scratch = attention_backward_scratch(p.head_dim, w.row_room, w.key_room);
  const int64_t sums = row_blocks * w.row_room * attention_padded_dim(p.head_dim);
  const Tensor memory = torch::stable::new_empty(
      problem.q, {workers * scratch + sums + row_blocks * 2 * w.row_room}, ScalarType::Float);
  float* data = static_cast<float*>(memory.data_ptr());
  std::vector<int32_t> turns(row_blocks);
  w.first_row_block = first_row_block.data();
  w.grad_q = data + workers * scratch;
  w.row_terms = w.grad_q + sums;
  w.turns = turns.data();

  const CpuKernels& kernels = cpu_kernels();
  parallel_units(row_units, kBlock * p.head_dim * 4, [&](int64_t begin, int64_t end) {
    kernels.attention_backward_rows(w, begin, end);
  });
  take_units(workers, key_units, [&](int64_t worker, int64_t unit) {
    AttentionBackwardWork mine = w;
    mine.scratch = data + worker * scratch;
    kernels.attention_backward_keys(mine, unit, unit + 1);
  });
}

void check_keys(const char* op, const char* k_name, const Tensor& k, const char* v_name,
                const Tensor& v, const Tensor& q) {
  check_same_dtype(op, k_name, k, "q", q);
  check_same_dtype(op, v_name, v, "q", q);
  check_same_shape(op, v_name, v, k_name, k);
  check_device(op, k_name, k, "q", q);
  check_device(op, v_name, v, "q", q);
}

// (batch, ..., num_kv_heads, head_dim) with q's batch and head_dim.
void check_batched(const char* op, const char* name, const char* seqlen, const Tensor& q,
                   const Tensor& k) {
  if (q.dim() != 4) {
    fail(op, "q must have shape (batch, seqlen_q, num_heads, head_dim), got " + to_string(q));
  }
  if (k.dim() != 4 || k.size(0) != q.size(0) || k.size(3) != q.size(3)) {
    fail(op, std::string(name) + " must have shape (batch, " + seqlen +
                 ", num_kv_heads, head_dim) = (" + std::to_string(q.size(0)) + ", *, *, " +
                 std::to_string(q.size(3)) + "), got " + to_string(k));
  }
}

Problem check_attention(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                        const std::optional<Tensor>& key_lengths,
                        const std::optional<Tensor>& key_starts, double scale,
                        std::optional<double> softcap, std::optional<int64_t> window, bool causal) {
  Problem problem;
  AttentionParams& p = problem.p;
  p.dtype = dtype_of(op, "q", q, Dtypes::kOrFloat64);
  if (p.dtype == DType::kFloat64) check_cpu(op, "q, of float64,", q);
  check_batched(op, "k", "seqlen_k", q, k);
  check_keys(op, "k", k, "v", v, q);
  p.batch = q.size(0), p.seqlen_q = q.size(1), p.num_heads = q.size(2), p.head_dim = q.size(3);
  p.seqlen_k = k.size(1), p.num_kv_heads = k.size(2);
  check_common(op, p, scale, softcap, window, causal);
  if (key_lengths) {
    check_integers(op, "key_lengths", *key_lengths, p.batch, "batch", q);
    if (q.is_cpu()) problem.lengths = to_vector(*key_lengths);
    p.key_lengths = q.is_cpu() ? problem.lengths.data()
                               : on_device<int64_t>(*key_lengths, problem.on_device[0]);
  }
  if (key_starts) {
    check_integers(op, "key_starts", *key_starts, p.batch, "batch", q);
    if (q.is_cpu()) problem.starts = to_vector(*key_starts);
    p.key_starts =
        q.is_cpu() ? problem.starts.data() : on_device<int64_t>(*key_starts, problem.on_device[1]);
  }
  for (int64_t b = 0; q.is_cpu() && b < p.batch; ++b) {
    const int64_t length = key_lengths ? p.key_lengths[b] : p.seqlen_k;
    if (length < 0 || length > p.seqlen_k) {
      fail(op, row_of("key_lengths", b) + " must be from 0 to seqlen_k = " +
                   std::to_string(p.seqlen_k) + ", got " + std::to_string(length));
    }
    if (key_starts && (p.key_starts[b] < 0 || p.key_starts[b] > length)) {
      fail(op, row_of("key_starts", b) + " must be from 0 to " +
                   (key_lengths ? row_of("key_lengths", b) : "seqlen_k") + " = " +
                   std::to_string(length) + ", got " + std::to_string(p.key_starts[b]));
    }
  }
  set_inputs(problem, q, k, v);
  problem.lse_shape = {p.batch, p.num_heads, p.seqlen_q};
  p.lse_batch_stride = p.num_heads * p.seqlen_q, p.lse_head_stride = p.seqlen_q;
  return problem;
}

void attention_out(const Tensor& q, const Tensor& k, const Tensor& v,
                   std::optional<Tensor> key_lengths, std::optional<Tensor> key_starts,
                   double scale, std::optional<double> softcap, std::optional<int64_t> window,
                   bool causal, Tensor out, std::optional<Tensor> lse) {
  const char* op = "attention";
  Problem problem =
      check_attention(op, q, k, v, key_lengths, key_starts, scale, softcap, window, causal);
  check_out(op, "out", out, "q", q);
  if (lse) check_lse(op, "lse", *lse, problem);
  if (out.numel() == 0) return;
  set_results(problem.p, out, lse);
  run(problem.p, q);
}

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                     std::optional<Tensor> key_lengths,
                                     std::optional<Tensor> key_starts, double scale,
                                     std::optional<double> softcap, std::optional<int64_t> window,
                                     bool causal, bool return_lse) {
  Tensor out = torch::stable::new_empty(q, q.sizes());
  std::vector<int64_t> shape{0};
  if (return_lse && q.dim() == 4) shape = {q.size(0), q.size(2), q.size(1)};
  Tensor lse = torch::stable::new_empty(q, shape, lse_type(q));
  attention_out(q, k, v, key_lengths, key_starts, scale, softcap, window, causal, out,
                return_lse ? std::optional<Tensor>(lse) : std::nullopt);
  return {out, lse};
}

void attention_backward_out(const Tensor& grad_out, const Tensor& grad_lse, const Tensor& q,
                            const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
                            std::optional<Tensor> key_lengths, std::optional<Tensor> key_starts,
                            double scale, std::optional<double> softcap,
                            std::optional<int64_t> window, bool causal, Tensor grad_q,
                            Tensor grad_k, Tensor grad_v) {
  const char* op = "attention_backward";
  Problem problem =
      check_attention(op, q, k, v, key_lengths, key_starts, scale, softcap, window, causal);
  run_backward(op, problem, {grad_out, grad_lse, out, lse, grad_q, grad_k, grad_v});
}

void check_cu_seqlens(const char* op, const char* name, const std::vector<int64_t>& ends,
                      const char* total_name, int64_t total, const char* max_name, int64_t max) {
  if (ends[0] != 0) fail(op, row_of(name, 0) + " must be 0, got " + std::to_string(ends[0]));
  for (size_t b = 1; b < ends.size(); ++b) {
    const int64_t seqlen = ends[b] - ends[b - 1];
    if (seqlen < 0 || ends[b] > total) {
      fail(op, row_of(name, b) + " must be from " + row_of(name, b - 1) + " = " +
                   std::to_string(ends[b - 1]) + " to " + total_name + " = " +
                   std::to_string(total) + ", got " + std::to_string(ends[b]));
    }
    if (seqlen > max) {
      fail(op, std::string(max_name) + " must be at least the longest sequence, " +
                   std::to_string(seqlen) + " by " + name + ", got " + std::to_string(max));
    }
  }
}

void check_total(const char* op, const char* name, int64_t total) {
  if (total > INT32_MAX)
    fail(op, std::string(name) + " must be below 2^31, got " + std::to_string(total));
}

Problem check_attention_varlen(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                               const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                               int64_t max_seqlen_q, int64_t max_seqlen_k, double scale,
                               std::optional<double> softcap, std::optional<int64_t> window,
                               bool causal) {
  Problem problem;
  AttentionParams& p = problem.p;
  p.dtype = dtype_of(op, "q", q, Dtypes::kOrFloat64);
  if (p.dtype == DType::kFloat64) check_cpu(op, "q, of float64,", q);
  if (q.dim() != 3)
    fail(op, "q must have shape (total_q, num_heads, head_dim), got " + to_string(q));
  if (k.dim() != 3 || k.size(2) != q.size(2)) {
    fail(op, "k must have shape (total_k, num_kv_heads, head_dim) = (*, *, " +
                 std::to_string(q.size(2)) + "), got " + to_string(k));
  }
  check_keys(op, "k", k, "v", v, q);
  const int64_t total_q = q.size(0), total_k = k.size(0);
  p.num_heads = q.size(1), p.head_dim = q.size(2), p.num_kv_heads = k.size(1);
  check_common(op, p, scale, softcap, window, causal);
  if (cu_seqlens_q.dim() != 1 || cu_seqlens_q.size(0) < 1) {
    fail(op, "cu_seqlens_q must have shape (batch + 1,), got " + to_string(cu_seqlens_q));
  }
  p.batch = cu_seqlens_q.size(0) - 1;
  check_integers(op, "cu_seqlens_q", cu_seqlens_q, p.batch + 1, "batch + 1", q);
  check_integers(op, "cu_seqlens_k", cu_seqlens_k, p.batch + 1, "batch + 1", q);
  check_total(op, "total_q", total_q);
  check_total(op, "total_k", total_k);
  set_inputs(problem, q, k, v);
  problem.lse_shape = {p.num_heads, total_q};
  p.lse_head_stride = total_q;
  p.total_q = total_q, p.total_k = total_k;
  if (!q.is_cpu()) {
    p.cu_seqlens_q = on_device<int32_t>(cu_seqlens_q, problem.on_device[0]);
    p.cu_seqlens_k = on_device<int32_t>(cu_seqlens_k, problem.on_device[1]);
    p.seqlen_q = std::min(std::max(max_seqlen_q, int64_t(1)), total_q);
    p.seqlen_k = std::min(std::max(max_seqlen_k, int64_t(0)), total_k);
    return problem;
  }
  const std::vector<int64_t> q_ends = to_vector(cu_seqlens_q), k_ends = to_vector(cu_seqlens_k);
  check_cu_seqlens(op, "cu_seqlens_q", q_ends, "total_q", total_q, "max_seqlen_q", max_seqlen_q);
  check_cu_seqlens(op, "cu_seqlens_k", k_ends, "total_k", total_k, "max_seqlen_k", max_seqlen_k);

  // The work is divided by what the sequences are, however large the callers' bounds.
  for (int64_t b = 0; b < p.batch; ++b) {
    p.seqlen_q = std::max(p.seqlen_q, q_ends[b + 1] - q_ends[b]);
    p.seqlen_k = std::max(p.seqlen_k, k_ends[b + 1] - k_ends[b]);
  }
  problem.q_ends.assign(q_ends.begin(), q_ends.end());
  problem.k_ends.assign(k_ends.begin(), k_ends.end());
  p.cu_seqlens_q = problem.q_ends.data(), p.cu_seqlens_k = problem.k_ends.data();
  return problem;
}

void attention_varlen_out(const Tensor& q, const Tensor& k, const Tensor& v,
                          const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                          int64_t max_seqlen_q, int64_t max_seqlen_k, double scale,
                          std::optional<double> softcap, std::optional<int64_t> window, bool causal,
                          Tensor out, std::optional<Tensor> lse) {
  const char* op = "attention_varlen";
  Problem problem = check_attention_varlen(op, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
                                           max_seqlen_k, scale, softcap, window, causal);
  check_out(op, "out", out, "q", q);
  if (lse) check_lse(op, "lse", *lse, problem);
  if (out.numel() == 0) return;
  const AttentionParams& p = problem.p;
  set_results(problem.p, out, lse);
#ifdef GEMMA2_WITH_CUDA
  if (!q.is_cpu()) {
    if (p.batch > 0) return run_attention_on_cuda(p, q);
    torch::stable::zero_(out);
    if (lse) torch::stable::fill_(*lse, -INFINITY);
    return;
  }
#endif
  // Rows behind the last sequence belong to none.
  const int64_t total_q = q.size(0), row_bytes = p.num_heads * p.head_dim * size_of(p.dtype);
  for (int64_t i = p.cu_seqlens_q[p.batch]; i < total_q; ++i) {
    std::memset(static_cast<char*>(out.data_ptr()) + i * row_bytes, 0, row_bytes);
    for (int64_t h = 0; lse && h < p.num_heads; ++h) {
      if (p.dtype == DType::kFloat64)
        static_cast<double*>(lse->data_ptr())[h * total_q + i] = -INFINITY;
      else
        p.lse[h * total_q + i] = -INFINITY;
    }
  }
  if (p.seqlen_q > 0) run(p, q);
}

std::tuple<Tensor, Tensor> attention_varlen(const Tensor& q, const Tensor& k, const Tensor& v,
                                            const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                            int64_t max_seqlen_q, int64_t max_seqlen_k,
                                            double scale, std::optional<double> softcap,
                                            std::optional<int64_t> window, bool causal,
                                            bool return_lse) {
  Tensor out = torch::stable::new_empty(q, q.sizes());
  std::vector<int64_t> shape{0};
  if (return_lse && q.dim() == 3) shape = {q.size(1), q.size(0)};
  Tensor lse = torch::stable::new_empty(q, shape, lse_type(q));
  attention_varlen_out(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale,
                       softcap, window, causal, out,
                       return_lse ? std::optional<Tensor>(lse) : std::nullopt);
  return {out, lse};
}

void attention_varlen_backward_out(const Tensor& grad_out, const Tensor& grad_lse, const Tensor& q,
                                   const Tensor& k, const Tensor& v, const Tensor& out,
                                   const Tensor& lse, const Tensor& cu_seqlens_q,
                                   const Tensor& cu_seqlens_k, int64_t max_seqlen_q,
                                   int64_t max_seqlen_k, double scale,
                                   std::optional<double> softcap, std::optional<int64_t> window,
                                   bool causal, Tensor grad_q, Tensor grad_k, Tensor grad_v) {
  const char* op = "attention_varlen_backward";
  Problem problem = check_attention_varlen(op, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
                                           max_seqlen_k, scale, softcap, window, causal);
  run_backward(op, problem, {grad_out, grad_lse, out, lse, grad_q, grad_k, grad_v});
}

// Of attention over a cache, checked; p points into the others and the tensors.
struct CacheProblem {
  AttentionParams p{};
  std::vector<int64_t> lengths;
  std::optional<Tensor> device_lengths;  // the same on a GPU
  Tensor q, k, v;                        // as kernels can read them
};

// All but the views of tensors.
CacheProblem check_cache(const char* op, const Tensor& q, const Tensor& k_cache,
                         const Tensor& v_cache, const Tensor& key_lengths,
                         const std::optional<Tensor>& k_scales,
                         const std::optional<Tensor>& v_scales, double scale,
                         std::optional<double> softcap, std::optional<int64_t> window,
                         const Tensor& out) {
  CacheProblem problem;
  AttentionParams& p = problem.p;
  p.dtype = dtype_of(op, "q", q);
  check_batched(op, "k_cache", "capacity", q, k_cache);
  if (check_scales(op, k_cache, v_cache, k_scales, v_scales)) {
    check_device(op, "k_cache", k_cache, "q", q);
    p.k_scales = heads_view(*k_scales), p.v_scales = heads_view(*v_scales);
  } else {
    check_keys(op, "k_cache", k_cache, "v_cache", v_cache, q);
  }
  p.batch = q.size(0), p.seqlen_q = q.size(1), p.num_heads = q.size(2), p.head_dim = q.size(3);
  p.capacity = k_cache.size(1), p.num_kv_heads = k_cache.size(2);
  check_common(op, p, scale, softcap, window, true);
  check_integers(op, "key_lengths", key_lengths, p.batch, "batch", q);
  if (!q.is_cpu()) {
    p.key_lengths = on_device<int64_t>(key_lengths, problem.device_lengths);
    p.seqlen_k = p.capacity;
  } else {
    problem.lengths = to_vector(key_lengths), p.key_lengths = problem.lengths.data();
  }
  for (size_t b = 0; b < problem.lengths.size(); ++b) {
    const int64_t length = problem.lengths[b];
    if (length < 0) {
      fail(op, row_of("key_lengths", b) + " must be at least 0, got " + std::to_string(length));
    }
    if (length > p.capacity && (!window || *window > p.capacity - p.seqlen_q + 1)) {
      fail(op, row_of("key_lengths", b) +
                   " must be at most capacity = " + std::to_string(p.capacity) + " where " +
                   (window ? "window + seqlen_q - 1 = " + std::to_string(*window) + " + " +
                                 std::to_string(p.seqlen_q) + " - 1 exceeds it"
                           : std::string("there is no window")) +
                   " (older keys are overwritten), got " + std::to_string(length));
    }
    if (length > p.seqlen_k) p.seqlen_k = length;
  }
  check_out(op, "out", out, "q", q);
  p.out = heads_view(out);
  return problem;
}

void set_inputs(CacheProblem& problem, const Tensor& q, const Tensor& k_cache,
                const Tensor& v_cache) {
  problem.q = readable(q), problem.k = readable(k_cache), problem.v = readable(v_cache);
  AttentionParams& p = problem.p;
  p.q = heads_view(problem.q), p.k = heads_view(problem.k), p.v = heads_view(problem.v);
}

void attention_cache_out(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                         const Tensor& key_lengths, std::optional<Tensor> k_scales,
                         std::optional<Tensor> v_scales, double scale,
                         std::optional<double> softcap, std::optional<int64_t> window, Tensor out) {
  note(attention_cache_out, q, k_cache, v_cache, key_lengths, k_scales, v_scales, scale, softcap,
       window, out);
  CacheProblem problem = check_cache("attention_cache", q, k_cache, v_cache, key_lengths, k_scales,
                                     v_scales, scale, softcap, window, out);
  if (out.numel() == 0) return;
  set_inputs(problem, q, k_cache, v_cache);
  run(problem.p, q);
}

Tensor attention_cache(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                       const Tensor& key_lengths, std::optional<Tensor> k_scales,
                       std::optional<Tensor> v_scales, double scale, std::optional<double> softcap,
                       std::optional<int64_t> window) {
  Tensor out = torch::stable::new_empty(q, q.sizes());
  attention_cache_out(q, k_cache, v_cache, key_lengths, k_scales, v_scales, scale, softcap, window,
                      out);
  return out;
}

void attention_append_cache_out(const Tensor& q, const Tensor& k, const Tensor& v, Tensor k_cache,
                                Tensor v_cache, const Tensor& key_lengths,
                                std::optional<Tensor> k_scales, std::optional<Tensor> v_scales,
                                double theta, double scale, std::optional<double> softcap,
                                std::optional<int64_t> window, Tensor rotated, Tensor out) {
  const char* op = "attention_append_cache";
  const Append tokens{q, k, v, k_cache, v_cache, theta, k_scales, v_scales};
  check_append(op, tokens);
  CacheProblem problem = check_cache(op, q, k_cache, v_cache, key_lengths, k_scales, v_scales,
                                     scale, softcap, window, out);
  AttentionParams& p = problem.p;
  check_out(op, "rotated", rotated, "q", q);
  if (p.seqlen_q > p.capacity) {
    fail(op, "seqlen must be at most capacity = " + std::to_string(p.capacity) + ", got " +
                 std::to_string(p.seqlen_q));
  }
  if (out.numel() == 0) return;
#ifdef GEMMA2_WITH_CUDA
  if (!q.is_cpu() && attention_appends(p)) {
    set_inputs(problem, q, k_cache, v_cache);
    // Where a kernel cannot read a cache as it is, this is a copy, which nothing may go into.
    if (problem.k.data_ptr() == k_cache.data_ptr() && problem.v.data_ptr() == v_cache.data_ptr()) {
      const Tensor k_rows = last_dim_contiguous(k), v_rows = last_dim_contiguous(v);
      p.new_k = heads_view(k_rows), p.new_v = heads_view(v_rows);
      p.inv_freq = inv_freq(p.head_dim, theta, q);
      return run(p, q);
    }
  }
#endif
  append_tokens(op, tokens, p.key_lengths, rotated);
  set_inputs(problem, rotated, k_cache, v_cache);
  run(p, q);
}

Tensor attention_append_cache(const Tensor& q, const Tensor& k, const Tensor& v, Tensor k_cache,
                              Tensor v_cache, const Tensor& key_lengths,
                              std::optional<Tensor> k_scales, std::optional<Tensor> v_scales,
                              double theta, double scale, std::optional<double> softcap,
                              std::optional<int64_t> window) {
  const Tensor rotated = torch::stable::new_empty(q, q.sizes());
  Tensor out = torch::stable::new_empty(q, q.sizes());
  attention_append_cache_out(q, k, v, k_cache, v_cache, key_lengths, k_scales, v_scales, theta,
                             scale, softcap, window, rotated, out);
  return out;
}

void attention_paged_out(const Tensor& q, const Tensor& k_pages, const Tensor& v_pages,
                         const Tensor& block_table, const Tensor& key_lengths, double scale,
                         std::optional<double> softcap, std::optional<int64_t> window, Tensor out) {
  const char* op = "attention_paged";
  AttentionParams p{};
  p.dtype = dtype_of(op, "q", q);
  if (q.dim() != 4) {
    fail(op, "q must have shape (batch, seqlen_q, num_heads, head_dim), got " + to_string(q));
  }
  if (k_pages.dim() != 4 || k_pages.size(3) != q.size(3)) {
    fail(op, "k_pages must have shape (pages, page_size, num_kv_heads, head_dim) = (*, *, *, " +
                 std::to_string(q.size(3)) + "), got " + to_string(k_pages));
  }
  check_keys(op, "k_pages", k_pages, "v_pages", v_pages, q);
  const int64_t pages = k_pages.size(0), page_size = k_pages.size(1);
  if (page_size < 1 || page_size > 1 << 20 || (page_size & (page_size - 1))) {
    fail(op, "page_size must be a power of two up to 2^20, got " + std::to_string(page_size));
  }
  p.batch = q.size(0), p.seqlen_q = q.size(1), p.num_heads = q.size(2), p.head_dim = q.size(3);
  p.num_kv_heads = k_pages.size(2);
  check_common(op, p, scale, softcap, window, true);
  check_device(op, "block_table", block_table, "q", q);
  if (block_table.scalar_type() != ScalarType::Int) {
    fail(op, std::string("block_table must be int32, got ") +
                 torch::headeronly::toString(block_table.scalar_type()));
  }
  if (block_table.dim() != 2 || block_table.size(0) != p.batch) {
    fail(op, "block_table must have shape (batch, pages of a row) = (" + std::to_string(p.batch) +
                 ", *), got " + to_string(block_table));
  }
  check_integers(op, "key_lengths", key_lengths, p.batch, "batch", q);
  check_out(op, "out", out, "q", q);
  const int64_t room = block_table.size(1) * page_size;
  p.out = heads_view(out);

  const Tensor table = torch::stable::contiguous(block_table);
  p.block_table = static_cast<const int32_t*>(table.data_ptr());
  p.block_table_stride = table.size(1);
  while (int64_t(1) << p.page_shift < page_size) ++p.page_shift;
  std::vector<int64_t> lengths;
  std::optional<Tensor> device_lengths;
  if (q.is_cpu()) {
    lengths = to_vector(key_lengths), p.key_lengths = lengths.data();
  } else {
    check_total(op, "the keys that block_table has room for", room);
    p.key_lengths = on_device<int64_t>(key_lengths, device_lengths), p.seqlen_k = room;
  }
  for (int64_t b = 0; q.is_cpu() && b < p.batch; ++b) {
    if (lengths[b] < 0 || lengths[b] > room) {
      fail(op, row_of("key_lengths", b) + " must be from 0 to pages of a row * page_size = " +
                   std::to_string(room) + ", got " + std::to_string(lengths[b]));
    }
    // The first query's window begins there; no entry before it is needed.
    const int64_t begin =
        p.window ? std::max(lengths[b] - p.seqlen_q - p.window + 1, int64_t(0)) : 0;
    for (int64_t i = begin >> p.page_shift; i << p.page_shift < lengths[b]; ++i) {
      const int64_t page = p.block_table[b * p.block_table_stride + i];
      if (page < 0 || page >= pages) {
        fail(op, "block_table[" + std::to_string(b) + ", " + std::to_string(i) +
                     "] must be from 0 to pages - 1 = " + std::to_string(pages - 1) + ", got " +
                     std::to_string(page));
      }
    }
    p.seqlen_k = std::max(p.seqlen_k, lengths[b]);
  }
  if (out.numel() == 0) return;
  const Tensor q_rows = readable(q), k_rows = readable(k_pages), v_rows = readable(v_pages);
  p.q = heads_view(q_rows), p.k = heads_view(k_rows), p.v = heads_view(v_rows);
  run(p, q);
}

Tensor attention_paged(const Tensor& q, const Tensor& k_pages, const Tensor& v_pages,
                       const Tensor& block_table, const Tensor& key_lengths, double scale,
                       std::optional<double> softcap, std::optional<int64_t> window) {
  Tensor out = torch::stable::new_empty(q, q.sizes());
  attention_paged_out(q, k_pages, v_pages, block_table, key_lengths, scale, softcap, window, out);
  return out;
}

template <class Library>
void implement(Library& m) {
  m.impl("attention", GEMMA2_BOX(&attention));
  m.impl("attention_out", GEMMA2_BOX(&attention_out));
  m.impl("attention_backward_out", GEMMA2_BOX(&attention_backward_out));
  m.impl("attention_varlen_backward_out", GEMMA2_BOX(&attention_varlen_backward_out));
  m.impl("attention_varlen", GEMMA2_BOX(&attention_varlen));
  m.impl("attention_varlen_out", GEMMA2_BOX(&attention_varlen_out));
  m.impl("attention_cache", GEMMA2_BOX(&attention_cache));
  m.impl("attention_cache_out", GEMMA2_BOX(&attention_cache_out));
  m.impl("attention_append_cache", GEMMA2_BOX(&attention_append_cache));
  m.impl("attention_append_cache_out", GEMMA2_BOX(&attention_append_cache_out));
  m.impl("attention_paged", GEMMA2_BOX(&attention_paged));
  m.impl("attention_paged_out", GEMMA2_BOX(&attention_paged_out));
}

}  // namespace
}  // namespace gemma2

GEMMA2_REGISTER(gemma2::implement)
