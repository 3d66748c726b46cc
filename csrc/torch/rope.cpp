// Bindings of rope, its backward and rope_append_cache.
#include "rope.h"

#include <array>
#include <map>
#include <mutex>
#include <tuple>
#include <utility>
#include <vector>

#include "../cpu/float64.h"
#include "../cpu/isa.h"
#include "cuda.h"

namespace gemma2 {
namespace {

// 1 / theta ** (arange(0, head_dim, 2) / head_dim), each step in float32. The power is torch's own:
// its last bit differs from the C library's now and then, and at position 8000 that shows.
Tensor compute_inv_freq(int64_t head_dim, double theta) {
  const int64_t half = head_dim / 2;
  const Tensor base = torch::stable::full({half}, theta, ScalarType::Float, std::nullopt,
                                          torch::headeronly::DeviceType::CPU);
  const Tensor exponent = torch::stable::new_empty(base, {half});
  float* e = exponent.mutable_data_ptr<float>();
  for (int64_t i = 0; i < half; ++i) e[i] = float(2 * i) / float(head_dim);
  std::array<StableIValue, 2> stack{torch::stable::detail::from(base),
                                    torch::stable::detail::from(exponent)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::pow", "Tensor_Tensor", stack.data(), TORCH_ABI_VERSION));
  const Tensor table = torch::stable::detail::to<Tensor>(stack[0]);
  float* values = table.mutable_data_ptr<float>();
  for (int64_t i = 0; i < half; ++i) values[i] = 1.0f / values[i];
  return table;
}

}  // namespace

const float* inv_freq(int64_t head_dim, double theta, const Tensor& like) {
  static std::mutex mutex;
  static auto* tables = new std::map<std::tuple<int64_t, double, std::string>, Tensor>;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_tuple(head_dim, theta, device_name(like));
  auto found = tables->find(key);
  if (found == tables->end()) {
    const Tensor table = compute_inv_freq(head_dim, theta);
    found = tables->emplace(key, torch::stable::to(table, like.device())).first;
  }
  return found->second.const_data_ptr<float>();
}

namespace {

std::string shape(std::initializer_list<int64_t> sizes) {
  std::string s = "(";
  for (int64_t size : sizes) s += (s.size() > 1 ? ", " : "") + std::to_string(size);
  return s + ")";
}

// What all of them check.
void check_rotation(const char* op, const Tensor& q, const Tensor& k, double theta, Dtypes dtypes) {
  dtype_of(op, "q", q, dtypes);
  check_device(op, "k", k, "q", q);
  check_same_dtype(op, "k", k, "q", q);
  if (q.dim() != 4) {
    fail(op, "q must have shape (batch, seqlen, num_heads, head_dim), got " + to_string(q));
  }
  const int64_t batch = q.size(0), seqlen = q.size(1), head_dim = q.size(3);
  if (k.dim() != 4 || k.size(0) != batch || k.size(1) != seqlen || k.size(3) != head_dim) {
    fail(op, "k must have shape (batch, seqlen, num_kv_heads, head_dim) = (" +
                 std::to_string(batch) + ", " + std::to_string(seqlen) + ", *, " +
                 std::to_string(head_dim) + "), got " + to_string(k));
  }
  if (head_dim % 2) fail(op, "head_dim must be even, got " + std::to_string(head_dim));
  if (!(theta > 0) || theta > 1e38) {
    fail(op, "theta must be positive and finite, got " + std::to_string(theta));
  }
}

// Of q checked before. Returns them as int64, contiguous along seqlen.
Tensor check_positions(const char* op, const Tensor& positions, const Tensor& q) {
  const int64_t batch = q.size(0), seqlen = q.size(1);
  check_device(op, "positions", positions, "q", q);
  if (positions.scalar_type() != ScalarType::Long && positions.scalar_type() != ScalarType::Int) {
    fail(op, std::string("positions must be int64 or int32, got ") +
                 torch::headeronly::toString(positions.scalar_type()));
  }
  const bool shared = positions.dim() == 1 && positions.size(0) == seqlen;
  if (!shared &&
      (positions.dim() != 2 || positions.size(0) != batch || positions.size(1) != seqlen)) {
    fail(op, "positions must have shape (seqlen,) = (" + std::to_string(seqlen) +
                 ",) or (batch, seqlen) = " + shape({batch, seqlen}) + ", got " +
                 to_string(positions));
  }
  const Tensor wide = positions.scalar_type() == ScalarType::Long
                          ? positions
                          : torch::stable::to(positions, ScalarType::Long);
  return last_dim_contiguous(wide);
}

Tensor check_inputs(const char* op, const Tensor& q, const Tensor& k, const Tensor& positions,
                    double theta, Dtypes dtypes) {
  check_rotation(op, q, k, theta, dtypes);
  return check_positions(op, positions, q);
}

// The part of the parameters that all share; positions come beside it.
RopeParams make_params(const Tensor& q, const Tensor& k, double theta, const Tensor& q_out) {
  RopeParams p{};
  p.q = heads_view(q);
  p.k = heads_view(k);
  p.q_out = heads_view(q_out);
  p.inv_freq = inv_freq(q.size(3), theta, q);
  p.batch = q.size(0);
  p.seqlen = q.size(1);
  p.num_heads = q.size(2);
  p.num_kv_heads = k.size(2);
  p.head_dim = q.size(3);
  p.dtype = dtype_of("rope", "q", q, Dtypes::kOrFloat64);
  return p;
}

void set_positions(RopeParams& p, const Tensor& positions) {
  p.positions = positions.const_data_ptr<int64_t>();
  p.positions_batch_stride = positions.dim() == 2 ? positions.stride(0) : 0;
}

void run(const RopeParams& p, [[maybe_unused]] const Tensor& like) {
#ifdef GEMMA2_WITH_CUDA
  if (!like.is_cpu()) return run_on_cuda(like, launch_rope, p);
#endif
  if (p.dtype == DType::kFloat64) return float64::rope(p);
  const int64_t elements = (p.num_heads + p.num_kv_heads) * p.head_dim;
  const CpuKernels& kernels = cpu_kernels();
  parallel_units(p.batch * p.seqlen, elements * 8,
                 [&](int64_t begin, int64_t end) { kernels.rope_tokens(p, begin, end); });
}

void rotate(const Tensor& q, const Tensor& k, const Tensor& wide_positions, double theta,
            bool inverse, Tensor& q_out, Tensor& k_out) {
  if (q.numel() + k.numel() == 0) return;

  const Tensor q_rows = last_dim_contiguous(q), k_rows = last_dim_contiguous(k);
  RopeParams p = make_params(q_rows, k_rows, theta, q_out);
  set_positions(p, wide_positions);
  p.k_out = heads_view(k_out);
  p.inverse = inverse;
  run(p, q);
}

void rope_out(const Tensor& q, const Tensor& k, const Tensor& positions, double theta, Tensor q_out,
              Tensor k_out) {
  const char* op = "rope";
  const Tensor wide_positions = check_inputs(op, q, k, positions, theta, Dtypes::kOrFloat64);
  check_out(op, "q_out", q_out, "q", q);
  check_out(op, "k_out", k_out, "k", k);
  rotate(q, k, wide_positions, theta, false, q_out, k_out);
}

// Rotates the gradients of q_out and k_out by the negative angle.
void rope_backward_out(const Tensor& grad_q_out, const Tensor& grad_k_out, const Tensor& positions,
                       double theta, Tensor grad_q, Tensor grad_k) {
  const char* op = "rope_backward";
  const Tensor wide_positions =
      check_inputs(op, grad_q_out, grad_k_out, positions, theta, Dtypes::kOrFloat64);
  check_out(op, "grad_q", grad_q, "grad_q_out", grad_q_out);
  check_out(op, "grad_k", grad_k, "grad_k_out", grad_k_out);
  rotate(grad_q_out, grad_k_out, wide_positions, theta, true, grad_q, grad_k);
}

std::tuple<Tensor, Tensor> rope(const Tensor& q, const Tensor& k, const Tensor& positions,
                                double theta) {
  Tensor q_out = torch::stable::new_empty(q, q.sizes());
  Tensor k_out = torch::stable::new_empty(k, k.sizes());
  rope_out(q, k, positions, theta, q_out, k_out);
  return {q_out, k_out};
}

void check_cache(const char* op, const char* name, const Tensor& cache, const Tensor& k) {
  check_device(op, name, cache, "k", k);
  if (!is_int8(cache)) check_same_dtype(op, name, cache, "k", k);
  if (cache.dim() != 4 || cache.size(0) != k.size(0) || cache.size(2) != k.size(2) ||
      cache.size(3) != k.size(3)) {
    fail(op, std::string(name) + " must have shape (batch, capacity, num_kv_heads, head_dim) = (" +
                 std::to_string(k.size(0)) + ", *, " + std::to_string(k.size(2)) + ", " +
                 std::to_string(k.size(3)) + "), got " + to_string(cache));
  }
  if (cache.size(3) > 1 && cache.stride(3) != 1) {
    fail(op, std::string(name) + " must be contiguous in its last dimension, got stride " +
                 std::to_string(cache.stride(3)));
  }
}

// Every token of a row needs a slot of its own: positions rise and span at most capacity. Of
// positions on a GPU this is the caller's to see to: reading them would wait for the GPU.
void check_slots(const char* op, const RopeParams& p) {
  const int64_t rows = p.positions_batch_stride ? p.batch : 1;
  for (int64_t b = 0; b < rows; ++b) {
    const int64_t* positions = p.positions + b * p.positions_batch_stride;
    int64_t first = -1, last = -1;
    for (int64_t i = 0; i < p.seqlen; ++i) {
      if (positions[i] < 0) continue;
      if (first < 0) first = positions[i];
      if (positions[i] <= last || positions[i] - first >= p.capacity) {
        fail(op, "positions of row " + std::to_string(b) +
                     " must increase and span at most capacity = " + std::to_string(p.capacity) +
                     " slots, got " + std::to_string(positions[i]) + " after " +
                     std::to_string(positions[i] <= last ? last : first));
      }
      last = positions[i];
    }
  }
}

// Tokens of which positions, or key_lengths, are still to be set. The tensors are held by the
// caller.
RopeParams append_params(const Append& tokens, const Tensor (&rows)[3], const Tensor& q_out) {
  RopeParams p = make_params(rows[0], rows[1], tokens.theta, q_out);
  p.v = heads_view(rows[2]);
  p.k_cache = heads_view(tokens.k_cache);
  p.v_cache = heads_view(tokens.v_cache);
  p.capacity = tokens.k_cache.size(1);
  if (tokens.k_scales) {
    p.k_scales = heads_view(*tokens.k_scales), p.v_scales = heads_view(*tokens.v_scales);
  }
  return p;
}

void rope_append_cache_out(const Tensor& q, const Tensor& k, const Tensor& v,
                           const Tensor& positions, Tensor k_cache, Tensor v_cache, double theta,
                           std::optional<Tensor> k_scales, std::optional<Tensor> v_scales,
                           Tensor q_out) {
  note(rope_append_cache_out, q, k, v, positions, k_cache, v_cache, theta, k_scales, v_scales,
       q_out);
  const char* op = "rope_append_cache";
  const Append tokens{q, k, v, k_cache, v_cache, theta, k_scales, v_scales};
  check_append(op, tokens);
  const Tensor wide_positions = check_positions(op, positions, q);
  check_out(op, "q_out", q_out, "q", q);
  if (q.numel() + k.numel() == 0) return;

  const Tensor rows[] = {last_dim_contiguous(q), last_dim_contiguous(k), last_dim_contiguous(v)};
  RopeParams p = append_params(tokens, rows, q_out);
  set_positions(p, wide_positions);
  if (positions.is_cpu()) check_slots(op, p);
  run(p, q);
}

Tensor rope_append_cache(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& positions,
                         Tensor k_cache, Tensor v_cache, double theta,
                         std::optional<Tensor> k_scales, std::optional<Tensor> v_scales) {
  Tensor q_out = torch::stable::new_empty(q, q.sizes());
  rope_append_cache_out(q, k, v, positions, k_cache, v_cache, theta, k_scales, v_scales, q_out);
  return q_out;
}

template <class Library>
void implement(Library& m) {
  m.impl("rope", GEMMA2_BOX(&rope));
  m.impl("rope_out", GEMMA2_BOX(&rope_out));
  m.impl("rope_backward_out", GEMMA2_BOX(&rope_backward_out));
  m.impl("rope_append_cache", GEMMA2_BOX(&rope_append_cache));
  m.impl("rope_append_cache_out", GEMMA2_BOX(&rope_append_cache_out));
}

}  // namespace

void check_append(const char* op, const Append& t) {
  check_rotation(op, t.q, t.k, t.theta, Dtypes::kCommon);
  check_device(op, "v", t.v, "k", t.k);
  check_same_dtype(op, "v", t.v, "k", t.k);
  check_same_shape(op, "v", t.v, "k", t.k);
  check_cache(op, "k_cache", t.k_cache, t.k);
  check_cache(op, "v_cache", t.v_cache, t.k);
  const bool scaled = check_scales(op, t.k_cache, t.v_cache, t.k_scales, t.v_scales);
  check_same_shape(op, "v_cache", t.v_cache, "k_cache", t.k_cache);
  if (scaled && t.q.size(3) > 256) {
    fail(op, "head_dim must be at most 256 with an int8 cache, got " + std::to_string(t.q.size(3)));
  }
  if (t.q.numel() + t.k.numel() > 0 && t.k_cache.size(1) == 0) {
    fail(op, "k_cache must have at least one slot, got " + to_string(t.k_cache));
  }
}

void append_tokens(const char* op, const Append& tokens, const int64_t* key_lengths,
                   Tensor& q_out) {
  check_out(op, "q_out", q_out, "q", tokens.q);
  const Tensor rows[] = {last_dim_contiguous(tokens.q), last_dim_contiguous(tokens.k),
                         last_dim_contiguous(tokens.v)};
  RopeParams p = append_params(tokens, rows, q_out);
  if (!tokens.q.is_cpu()) {
    p.key_lengths = key_lengths;
    return run(p, tokens.q);
  }
  std::vector<int64_t> positions(p.batch * p.seqlen);
  for (int64_t i = 0; i < p.batch * p.seqlen; ++i)
    positions[i] = key_lengths[i / p.seqlen] - p.seqlen + i % p.seqlen;
  p.positions = positions.data(), p.positions_batch_stride = p.seqlen;
  run(p, tokens.q);
}

}  // namespace gemma2

GEMMA2_REGISTER(gemma2::implement)
