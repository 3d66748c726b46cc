// Bindings of attention, attention_varlen and attention_cache: checks, and how the work is divided.
//
// Lengths, starts and cu_seqlens stay where they are: on a GPU their values are not checked, which
// would make every call wait for it; the kernels clamp them to what exists.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <tuple>
#include <vector>

#include "../cpu/isa.h"
#include "cuda.h"

namespace gemma2 {
namespace {

constexpr int64_t kStreamSplitKeys = 256;  // keys of a unit with few rows, and with a block of rows
constexpr int64_t kTileSplitKeys = 1024;
constexpr int64_t kWorkPerThread = 1 << 18;  // multiplications that are worth a thread

std::string row_of(const char* name, int64_t b) {
  return std::string(name) + "[" + std::to_string(b) + "]";
}

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
// apart.
Tensor readable(const Tensor& t) {
  if (t.is_cpu()) return last_dim_contiguous(t);
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

void check_lse(const char* op, const Tensor& lse, const std::vector<int64_t>& shape,
               const Tensor& q) {
  check_device(op, "lse", lse, "q", q);
  bool same = lse.dim() == int64_t(shape.size());
  std::string text;
  for (size_t i = 0; i < shape.size(); ++i) {
    same = same && lse.size(i) == shape[i];
    text += (i ? ", " : "") + std::to_string(shape[i]);
  }
  if (!same || lse.scalar_type() != ScalarType::Float || !lse.is_contiguous()) {
    fail(op, "lse must be contiguous float32 of shape (" + text + "), got " +
                 torch::headeronly::toString(lse.scalar_type()) + " " + to_string(lse));
  }
}

#ifdef GEMMA2_WITH_CUDA
void run_attention_on_cuda(AttentionParams p, const Tensor& like) {
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  const Tensor partial =
      torch::stable::new_empty(like, {attention_partial_size(p)}, ScalarType::Float);
  p.partial = static_cast<float*>(partial.data_ptr());
  run_on_cuda(like, launch_attention, p);
}
#endif

// Divides the work, allocates scratch, runs. max_keys bounds the keys that one row block sees.
void run(const AttentionParams& p, int64_t max_keys, const Tensor& like) {
#ifdef GEMMA2_WITH_CUDA
  if (!like.is_cpu()) return run_attention_on_cuda(p, like);
#endif
  const int64_t group = p.num_heads / p.num_kv_heads, rows = group * p.seqlen_q;
  const bool stream = p.seqlen_q <= kAttentionStreamPositions && rows <= kAttentionStreamRows;
  AttentionWork w{};
  w.p = p;
  w.stream = stream;
  w.block_rows = stream                      ? rows
                 : rows < kAttentionRowBlock ? (rows + 11) / 12 * 12  // whole tiles
                                             : kAttentionRowBlock;
  w.row_blocks = (rows + w.block_rows - 1) / w.block_rows;
  w.splits = 1;
  w.split_keys = max_keys;
  if (w.row_blocks == 1) {
    // Splits lie at multiples of split_keys, of which max_keys keys can touch one more than fill
    // it.
    w.split_keys = stream ? kStreamSplitKeys : kTileSplitKeys;
    w.splits = std::min((max_keys + w.split_keys - 1) / w.split_keys + 1,
                        (p.seqlen_k + w.split_keys - 1) / w.split_keys);
    if (w.splits < 1) w.splits = 1;
  }
  const int64_t heads = p.batch * p.num_kv_heads, units = w.row_blocks * heads * w.splits;
  const int64_t unit_keys = w.splits > 1 ? w.split_keys : max_keys;
  const int64_t work = units * (w.block_rows + 8) * (unit_keys + 1) * p.head_dim;
  int64_t workers = torch::stable::get_num_threads();
  if (workers > units) workers = units;
  if (workers > 1 + work / kWorkPerThread) workers = 1 + work / kWorkPerThread;

  const int64_t padded_dim = attention_padded_dim(p.head_dim);
  int64_t scratch = w.block_rows * (kAttentionQueryStride + kAttentionScoreStride + padded_dim);
  if (!stream) scratch += kAttentionKeyBlock * (p.head_dim + padded_dim);
  scratch = (scratch + 31) / 32 * 32;
  int64_t partial = w.splits > 1 ? heads * w.splits * w.block_rows * (p.head_dim + 2) : 0;
  const Tensor memory =
      torch::stable::new_empty(like, {workers * scratch + partial}, ScalarType::Float);
  float* data = static_cast<float*>(memory.data_ptr());
  w.partial = data + workers * scratch;

  // Each worker takes the next unit when it is done with one: units differ in the keys they see.
  const CpuKernels& kernels = cpu_kernels();
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      AttentionWork mine = w;
      mine.scratch = data + worker * scratch;
      for (int64_t unit; (unit = next.fetch_add(1, std::memory_order_relaxed)) < units;)
        kernels.attention_units(mine, unit, unit + 1);
    }
  });
  if (w.splits > 1) {
    parallel_units(heads, w.splits * w.block_rows * p.head_dim * 4,
                   [&](int64_t begin, int64_t end) { kernels.attention_combine(w, begin, end); });
  }
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

void attention_out(const Tensor& q, const Tensor& k, const Tensor& v,
                   std::optional<Tensor> key_lengths, std::optional<Tensor> key_starts,
                   double scale, std::optional<double> softcap, std::optional<int64_t> window,
                   bool causal, Tensor out, std::optional<Tensor> lse) {
  const char* op = "attention";
  AttentionParams p{};
  p.dtype = dtype_of(op, "q", q);
  check_batched(op, "k", "seqlen_k", q, k);
  check_keys(op, "k", k, "v", v, q);
  p.batch = q.size(0), p.seqlen_q = q.size(1), p.num_heads = q.size(2), p.head_dim = q.size(3);
  p.seqlen_k = k.size(1), p.num_kv_heads = k.size(2);
  check_common(op, p, scale, softcap, window, causal);
  if (key_lengths) check_integers(op, "key_lengths", *key_lengths, p.batch, "batch", q);
  if (key_starts) check_integers(op, "key_starts", *key_starts, p.batch, "batch", q);
  std::vector<int64_t> lengths, starts;
  std::optional<Tensor> device_lengths, device_starts;
  if (q.is_cpu()) {
    if (key_lengths) lengths = to_vector(*key_lengths), p.key_lengths = lengths.data();
    if (key_starts) starts = to_vector(*key_starts), p.key_starts = starts.data();
  } else {
    if (key_lengths) p.key_lengths = on_device<int64_t>(*key_lengths, device_lengths);
    if (key_starts) p.key_starts = on_device<int64_t>(*key_starts, device_starts);
  }
  for (int64_t b = 0; q.is_cpu() && b < p.batch; ++b) {
    const int64_t length = key_lengths ? lengths[b] : p.seqlen_k;
    if (length < 0 || length > p.seqlen_k) {
      fail(op, row_of("key_lengths", b) + " must be from 0 to seqlen_k = " +
                   std::to_string(p.seqlen_k) + ", got " + std::to_string(length));
    }
    if (key_starts && (starts[b] < 0 || starts[b] > length)) {
      fail(op, row_of("key_starts", b) + " must be from 0 to " +
                   (key_lengths ? row_of("key_lengths", b) : "seqlen_k") + " = " +
                   std::to_string(length) + ", got " + std::to_string(starts[b]));
    }
  }
  check_out(op, "out", out, "q", q);
  if (lse) check_lse(op, *lse, {p.batch, p.num_heads, p.seqlen_q}, q);
  if (out.numel() == 0) return;

  const Tensor q_rows = readable(q), k_rows = readable(k), v_rows = readable(v);
  p.q = heads_view(q_rows), p.k = heads_view(k_rows), p.v = heads_view(v_rows);
  p.out = heads_view(out);
  if (lse) {
    p.lse = static_cast<float*>(lse->data_ptr());
    p.lse_batch_stride = p.num_heads * p.seqlen_q, p.lse_head_stride = p.seqlen_q;
  }
  const int64_t seen = p.window ? p.window + p.seqlen_q - 1 : p.seqlen_k;
  run(p, std::min(seen, p.seqlen_k), q);
}

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                     std::optional<Tensor> key_lengths,
                                     std::optional<Tensor> key_starts, double scale,
                                     std::optional<double> softcap, std::optional<int64_t> window,
                                     bool causal, bool return_lse) {
  Tensor out = torch::stable::new_empty(q, q.sizes());
  std::vector<int64_t> shape{0};
  if (return_lse && q.dim() == 4) shape = {q.size(0), q.size(2), q.size(1)};
  Tensor lse = torch::stable::new_empty(q, shape, ScalarType::Float);
  attention_out(q, k, v, key_lengths, key_starts, scale, softcap, window, causal, out,
                return_lse ? std::optional<Tensor>(lse) : std::nullopt);
  return {out, lse};
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

void attention_varlen_out(const Tensor& q, const Tensor& k, const Tensor& v,
                          const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                          int64_t max_seqlen_q, int64_t max_seqlen_k, double scale,
                          std::optional<double> softcap, std::optional<int64_t> window, bool causal,
                          Tensor out, std::optional<Tensor> lse) {
  const char* op = "attention_varlen";
  AttentionParams p{};
  p.dtype = dtype_of(op, "q", q);
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
  std::vector<int64_t> q_ends, k_ends;
  if (q.is_cpu()) {
    q_ends = to_vector(cu_seqlens_q), k_ends = to_vector(cu_seqlens_k);
    check_cu_seqlens(op, "cu_seqlens_q", q_ends, "total_q", total_q, "max_seqlen_q", max_seqlen_q);
    check_cu_seqlens(op, "cu_seqlens_k", k_ends, "total_k", total_k, "max_seqlen_k", max_seqlen_k);
  }
  check_out(op, "out", out, "q", q);
  if (lse) check_lse(op, *lse, {p.num_heads, total_q}, q);
  if (out.numel() == 0) return;

  p.total_q = total_q, p.total_k = total_k;
  const Tensor q_rows = readable(q), k_rows = readable(k), v_rows = readable(v);
  const auto view = [](const Tensor& t) {
    return HeadsView{t.data_ptr(), 0, t.stride(0), t.stride(1)};
  };
  p.q = view(q_rows), p.k = view(k_rows), p.v = view(v_rows), p.out = view(out);
  if (lse) {
    p.lse = static_cast<float*>(lse->data_ptr());
    p.lse_head_stride = total_q;
  }
#ifdef GEMMA2_WITH_CUDA
  if (!q.is_cpu()) {
    if (p.batch == 0) {
      torch::stable::zero_(out);
      if (lse) torch::stable::fill_(*lse, -INFINITY);
      return;
    }
    std::optional<Tensor> held_q, held_k;
    p.cu_seqlens_q = on_device<int32_t>(cu_seqlens_q, held_q);
    p.cu_seqlens_k = on_device<int32_t>(cu_seqlens_k, held_k);
    p.seqlen_q = std::clamp(max_seqlen_q, int64_t(1), total_q);
    p.seqlen_k = std::clamp(max_seqlen_k, int64_t(0), total_k);
    return run_attention_on_cuda(p, q);
  }
#endif
  // The work is divided by what the sequences are, however large the callers' bounds.
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t seqlen_q = q_ends[b + 1] - q_ends[b], seqlen_k = k_ends[b + 1] - k_ends[b];
    if (seqlen_q > p.seqlen_q) p.seqlen_q = seqlen_q;
    if (seqlen_k > p.seqlen_k) p.seqlen_k = seqlen_k;
  }
  const std::vector<int32_t> q_offsets(q_ends.begin(), q_ends.end());
  const std::vector<int32_t> k_offsets(k_ends.begin(), k_ends.end());
  p.cu_seqlens_q = q_offsets.data(), p.cu_seqlens_k = k_offsets.data();
  // Rows behind the last sequence belong to none.
  for (int64_t i = q_ends[p.batch]; i < total_q; ++i) {
    const int64_t row_bytes = out.numel() / total_q * (p.dtype == DType::kFloat32 ? 4 : 2);
    std::memset(static_cast<char*>(out.data_ptr()) + i * row_bytes, 0, row_bytes);
    for (int64_t h = 0; lse && h < p.num_heads; ++h) p.lse[h * total_q + i] = -INFINITY;
  }
  if (p.seqlen_q == 0) return;
  const int64_t seen = p.window ? p.window + p.seqlen_q - 1 : p.seqlen_k;
  run(p, std::min(seen, p.seqlen_k), q);
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
  Tensor lse = torch::stable::new_empty(q, shape, ScalarType::Float);
  attention_varlen_out(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale,
                       softcap, window, causal, out,
                       return_lse ? std::optional<Tensor>(lse) : std::nullopt);
  return {out, lse};
}

void attention_cache_out(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                         const Tensor& key_lengths, double scale, std::optional<double> softcap,
                         std::optional<int64_t> window, Tensor out) {
  const char* op = "attention_cache";
  AttentionParams p{};
  p.dtype = dtype_of(op, "q", q);
  check_batched(op, "k_cache", "capacity", q, k_cache);
  check_keys(op, "k_cache", k_cache, "v_cache", v_cache, q);
  p.batch = q.size(0), p.seqlen_q = q.size(1), p.num_heads = q.size(2), p.head_dim = q.size(3);
  p.capacity = k_cache.size(1), p.num_kv_heads = k_cache.size(2);
  check_common(op, p, scale, softcap, window, true);
  check_integers(op, "key_lengths", key_lengths, p.batch, "batch", q);
  std::vector<int64_t> lengths;
  std::optional<Tensor> device_lengths;
  if (q.is_cpu()) {
    lengths = to_vector(key_lengths), p.key_lengths = lengths.data();
  } else {
    p.key_lengths = on_device<int64_t>(key_lengths, device_lengths), p.seqlen_k = p.capacity;
  }
  for (int64_t b = 0; q.is_cpu() && b < p.batch; ++b) {
    if (lengths[b] < 0) {
      fail(op, row_of("key_lengths", b) + " must be at least 0, got " + std::to_string(lengths[b]));
    }
    if (lengths[b] > p.capacity && (!window || *window > p.capacity - p.seqlen_q + 1)) {
      fail(op, row_of("key_lengths", b) +
                   " must be at most capacity = " + std::to_string(p.capacity) + " where " +
                   (window ? "window + seqlen_q - 1 = " + std::to_string(*window) + " + " +
                                 std::to_string(p.seqlen_q) + " - 1 exceeds it"
                           : std::string("there is no window")) +
                   " (older keys are overwritten), got " + std::to_string(lengths[b]));
    }
    if (lengths[b] > p.seqlen_k) p.seqlen_k = lengths[b];
  }
  check_out(op, "out", out, "q", q);
  if (out.numel() == 0) return;

  const Tensor q_rows = readable(q), k_rows = readable(k_cache), v_rows = readable(v_cache);
  p.q = heads_view(q_rows), p.k = heads_view(k_rows), p.v = heads_view(v_rows);
  p.out = heads_view(out);
  const int64_t seen = p.window ? p.window + p.seqlen_q - 1 : p.seqlen_k;
  run(p, std::min(seen, p.seqlen_k), q);
}

Tensor attention_cache(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                       const Tensor& key_lengths, double scale, std::optional<double> softcap,
                       std::optional<int64_t> window) {
  Tensor out = torch::stable::new_empty(q, q.sizes());
  attention_cache_out(q, k_cache, v_cache, key_lengths, scale, softcap, window, out);
  return out;
}

template <class Library>
void implement(Library& m) {
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention_out", TORCH_BOX(&attention_out));
  m.impl("attention_varlen", TORCH_BOX(&attention_varlen));
  m.impl("attention_varlen_out", TORCH_BOX(&attention_varlen_out));
  m.impl("attention_cache", TORCH_BOX(&attention_cache));
  m.impl("attention_cache_out", TORCH_BOX(&attention_cache_out));
}

}  // namespace
}  // namespace gemma2

GEMMA2_REGISTER(gemma2::implement)
