// What each kernel is given: pointers with shapes beside them, strides in elements. No torch here;
// CPU and CUDA kernels share these structs.
#pragma once
#include <cstdint>

namespace gemma2 {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16, kFloat64 };

// out[r] = x[r] * rsqrt(mean(x[r]^2) + eps) * (1 + weight)
struct RmsNormParams {
  const void* x;  // (rows, hidden_size), last dimension contiguous
  int64_t x_stride;
  const void* weight;  // (hidden_size,) contiguous
  void* out;           // (rows, hidden_size) contiguous
  int64_t rows;
  int64_t hidden_size;
  float eps;
  DType dtype;  // of x and out
  DType weight_dtype;
};

// residual_out = residual + norm(x; post_weight); out = norm(residual_out; pre_weight)
struct AddRmsNormParams {
  const void* x;  // (rows, hidden_size), last dimension contiguous
  int64_t x_stride;
  const void* residual;  // like x
  int64_t residual_stride;
  const void* post_weight;  // (hidden_size,) contiguous
  const void* pre_weight;
  void* residual_out;  // (rows, hidden_size) contiguous
  void* out;
  int64_t rows;
  int64_t hidden_size;
  float eps;
  DType dtype;  // of x, residual, residual_out and out
  DType weight_dtype;
};

// out = gelu_tanh(gate) * up; the work is shared out in runs of kGegluColumns columns of a row.
constexpr int64_t kGegluColumns = 1024;
struct GegluParams {
  const void* gate;  // (rows, columns), last dimension contiguous
  int64_t gate_stride;
  const void* up;  // like gate
  int64_t up_stride;
  void* out;  // (rows, columns) contiguous
  int64_t rows;
  int64_t columns;
  DType dtype;
};

// One tensor of shape (batch, seqlen, heads, head_dim) with any strides but 1 in the last
// dimension.
struct HeadsView {
  void* data;
  int64_t batch_stride;
  int64_t seqlen_stride;
  int64_t head_stride;
};

// Half-split rotation of q and k by position * inv_freq; optionally the rotated k and v go into a
// cache, where position p has slot p % capacity.
struct RopeParams {
  HeadsView q, k;              // (batch, seqlen, heads, head_dim)
  HeadsView q_out, k_out;      // k_out: where k_cache is null
  HeadsView v;                 // with a cache only
  HeadsView k_cache, v_cache;  // (batch, capacity, num_kv_heads, head_dim), seqlen_stride a slot
  int64_t capacity;            // 0: no cache
  const int64_t* positions;  // (batch, seqlen), seqlen contiguous. With a cache, below 0: padding,
                             // which is neither rotated nor written to the cache
  int64_t positions_batch_stride;  // 0: the same positions for every row of the batch
  const float* inv_freq;           // (head_dim / 2,)
  int64_t batch, seqlen, num_heads, num_kv_heads, head_dim;
  DType dtype;
};

// softmax(softcap * tanh(scale * q k^T / softcap) + mask) v, with query heads in groups over the
// key heads.
struct AttentionParams {
  HeadsView q, out;  // (batch, seqlen_q, num_heads, head_dim)
  HeadsView k, v;    // (batch, seqlen_k or capacity, num_kv_heads, head_dim)
  float* lse;  // (batch, num_heads, seqlen_q), seqlen_q contiguous, natural logarithm; may be null
  int64_t lse_batch_stride, lse_head_stride;
  const int64_t* key_lengths;  // (batch,): valid keys end here; null: seqlen_k
  const int64_t* key_starts;   // (batch,): valid keys begin here; null: 0
  // Variable length: sequence b is rows cu_seqlens[b] to cu_seqlens[b + 1] of q, or of k and v
  // (batch_stride 0, and lse is (num_heads, total_q)). Null otherwise; seqlen_q and seqlen_k are
  // the longest sequences'.
  const int32_t* cu_seqlens_q;
  const int32_t* cu_seqlens_k;
  int64_t batch, seqlen_q, seqlen_k, num_heads, num_kv_heads, head_dim;
  int64_t capacity;  // > 0: a ring; key j stands in slot j % capacity, and only the last capacity
                     // keys exist
  float scale;
  float softcap;   // 0: none
  int64_t window;  // 0: none
  bool causal;
  DType dtype;
};

// out[r, n] = sum_k x[r, k] * weight[n, k]; with softcap > 0: softcap * tanh(out / softcap)
struct LinearParams {
  const void* x;  // (rows, in_features), last dimension contiguous
  int64_t x_stride;
  const void* weight;  // (out_features, in_features), last dimension contiguous
  int64_t weight_stride;
  void* out;  // (rows, out_features), last dimension contiguous
  int64_t out_stride;
  int64_t rows, in_features, out_features;
  float softcap;  // 0: none
  DType dtype;    // of x and weight
  DType out_dtype;
  void* packed_x;  // CPU: x in the kernel's own layout, shared by all threads
  float* scratch;  // CPU: of one thread
};

// out[i, j] = sum_k a[i, k] * b[j, k], or that added to out.
struct GemmParams {
  const void* a;  // (rows, depth), one of its strides 1
  int64_t a_row, a_k;
  const void* b;  // (columns, depth), one of its strides 1
  int64_t b_row, b_k;
  void* out;  // (rows, columns), last dimension contiguous
  int64_t out_stride;
  int64_t rows, columns, depth;
  int64_t unit_rows;  // rows of out in one unit, at most kGemmRows
  DType a_dtype, b_dtype, out_dtype;
  DType product;   // kBFloat16: factors may be rounded to it; else they are float32
  bool add;        // to out, which is float32 then
  void* packed_b;  // b in the kernel's own layout, shared by all threads
  float* scratch;  // of one thread
};

// One side of a loss over a linear layer: s = softcap * tanh(hidden weight^T / softcap).
struct LossSide {
  const void* weight;  // (vocab_size, hidden_size), last dimension contiguous
  int64_t weight_stride;
  int64_t vocab_size;  // 0: there is no such side
  int64_t hidden_size;
  double softcap;             // 0: none
  DType dtype;                // of weight and hidden
  const void* packed_hidden;  // CPU: all tokens, by gemm_pack_panels
  float*
      kept;  // (kept_words, stride): soft-capped logits of the first words that the forward keeps
};

// With p = softmax(s / tau) of the student, q of the teacher, h = softmax(s), token by token:
// the gradient of s is scale p + hard_scale h - uniform - teacher_scale q, less entry_weight *
// entry_scale at the words of the token's entries. A per-token array has `stride` floats.
struct LinearLossParams {
  LossSide student, teacher;
  int64_t tokens, stride;  // of hidden; of everything with a token dimension
  int64_t kept_words;
  double temperature;  // tau
  bool hard, uniform;
  int64_t word_begin, word_end;  // the words that units are counted in
  const int64_t* entries;        // token * entries_per_token + i, ordered by their words' units
  const int64_t* entry_begin;    // where those of each unit of the whole vocabulary begin; the end
  int64_t entries_per_token;
  const int64_t* entry_word;                  // (tokens, entries_per_token)
  const double* entry_weight;                 // likewise
  float* entry_logit;                         // likewise: s of the entry's word, from the forward
  float* partial;                             // forward: (units, kLossStats, stride)
  float* total;                               // forward: (kLossStats, stride)
  const float *lse, *hard_lse, *teacher_lse;  // backward: log of the sums of exp(s / tau), ...
  const float *scale, *hard_scale, *uniform_scale, *teacher_scale, *entry_scale;
  float* gradient;         // backward: (word_end - word_begin, stride), of the student's products
  GemmParams grad_weight;  // backward: but for a; out null where it is not asked for
  int64_t grad_weight_begin;  // the word that row 0 of its out stands for
  float* scratch;             // of one thread
};

}  // namespace gemma2
