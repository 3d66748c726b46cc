// What each kernel is given: pointers with shapes beside them, strides in elements. No torch here;
// CPU and CUDA kernels share these structs. eps, scale and softcap are double for the float64
// kernels; the others narrow them to float once.
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
  double eps;
  DType dtype;  // of x and out
  DType weight_dtype;
};

// Rows are shared out in blocks, each of which sums its part of grad_weight; the parts are then
// added in their order, kNormColumns columns at a time. So results do not depend on the number of
// threads.
constexpr int64_t kNormMostBlocks = 128;
constexpr int64_t kNormColumns = 512;
constexpr int kNormGroup = 4;  // most rows that a CPU kernel works on together
static constexpr int64_t norm_block_rows(int64_t rows) {
  const int64_t even = (rows + kNormMostBlocks - 1) / kNormMostBlocks;
  return even < 8 ? 8 : even;
}
static constexpr int64_t norm_blocks(int64_t rows) {
  return (rows + norm_block_rows(rows) - 1) / norm_block_rows(rows);
}

// With s = rsqrt(mean(x^2) + eps) and g = grad_out * (1 + weight), row by row:
// grad_x = s (g - x s^2 mean(g x)); grad_weight = sum over the rows of grad_out x s.
struct RmsNormBackwardParams {
  const void* grad_out;  // (rows, hidden_size), last dimension contiguous
  int64_t grad_out_stride;
  const void* x;  // likewise
  int64_t x_stride;
  const void* weight;  // (hidden_size,) contiguous
  void* grad_x;        // (rows, hidden_size) contiguous
  void* grad_weight;   // (hidden_size,)
  float* partial;      // (blocks, hidden_size): sums of each block of norm_block_rows rows
  int64_t rows;
  int64_t hidden_size;
  double eps;
  DType dtype;  // of x, grad_out and grad_x
  DType weight_dtype;
  // CUDA: (rows, hidden_size) like grad_out, added to grad_x; or null.
  const void* added;
  int64_t added_stride;
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
  double eps;
  DType dtype;  // of x, residual, residual_out and out
  DType weight_dtype;
};

// grad_residual = grad_residual_out + the gradient of norm(residual_out; pre_weight); that is also
// what comes into norm(x; post_weight).
struct AddRmsNormBackwardParams {
  const void* grad_residual_out;  // (rows, hidden_size), last dimension contiguous
  int64_t grad_residual_out_stride;
  const void* grad_out;  // likewise
  int64_t grad_out_stride;
  const void* x;  // likewise
  int64_t x_stride;
  const void* residual_out;  // (rows, hidden_size), the forward's result, last dimension contiguous
  int64_t residual_out_stride;
  const void* post_weight;  // (hidden_size,) contiguous
  const void* pre_weight;
  void* grad_x;  // (rows, hidden_size) contiguous
  void* grad_residual;
  void* grad_post_weight;  // (hidden_size,)
  void* grad_pre_weight;
  float* partial;  // (blocks, 2, hidden_size): sums of each block of norm_block_rows rows, for
                   // post_weight and pre_weight
  float* scratch;  // (kNormGroup, hidden_size), of the thread, on a CPU
  int64_t rows;
  int64_t hidden_size;
  double eps;
  DType dtype;  // of all but the weights and their gradients
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

// grad_up = grad_out * gelu_tanh(gate); grad_gate = grad_out * up * gelu_tanh'(gate)
struct GegluBackwardParams {
  const void* grad_out;  // (rows, columns), last dimension contiguous
  int64_t grad_out_stride;
  const void* gate;  // likewise
  int64_t gate_stride;
  const void* up;  // likewise
  int64_t up_stride;
  void* grad_gate;  // (rows, columns) contiguous
  void* grad_up;
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
  // int8 caches: the factor of each head's row, (batch, capacity, num_kv_heads) floats; else null.
  // head_dim up to 256.
  HeadsView k_scales, v_scales;
  int64_t capacity;          // 0: no cache
  const int64_t* positions;  // (batch, seqlen), seqlen contiguous. With a cache, below 0: padding,
                             // which is neither rotated nor written to the cache
  int64_t positions_batch_stride;  // 0: the same positions for every row of the batch
  // CUDA, where positions is null: (batch,), a row's positions are the last seqlen below it.
  const int64_t* key_lengths;
  const float* inv_freq;  // (head_dim / 2,)
  bool inverse;           // by the negative angle: the backward
  int64_t batch, seqlen, num_heads, num_kv_heads, head_dim;
  DType dtype;
};

// softmax(softcap * tanh(scale * q k^T / softcap) + mask) v, with query heads in groups over the
// key heads.
struct AttentionParams {
  HeadsView q, out;  // (batch, seqlen_q, num_heads, head_dim)
  HeadsView k, v;    // (batch, seqlen_k or capacity, num_kv_heads, head_dim)
  // Where k and v are int8, the factor of each of their rows, (batch, capacity, num_kv_heads)
  // floats; else null.
  HeadsView k_scales, v_scales;
  float* lse;  // (batch, num_heads, seqlen_q), seqlen_q contiguous, natural logarithm; may be null.
               // Of doubles for float64, as the gradients of it
  int64_t lse_batch_stride, lse_head_stride;
  const int64_t* key_lengths;  // (batch,): valid keys end here; null: seqlen_k
  const int64_t* key_starts;   // (batch,): valid keys begin here; null: 0
  // Variable length: sequence b is rows cu_seqlens[b] to cu_seqlens[b + 1] of q, or of k and v
  // (batch_stride 0, and lse is (num_heads, total_q)). Null otherwise; seqlen_q and seqlen_k are
  // the longest sequences'.
  const int32_t* cu_seqlens_q;
  const int32_t* cu_seqlens_k;
  int64_t total_q, total_k;  // CUDA: rows of q and k, to which the kernel clamps cu_seqlens
  int64_t batch, seqlen_q, seqlen_k, num_heads, num_kv_heads, head_dim;
  int64_t capacity;  // > 0: a ring; key j stands in slot j % capacity, and only the last capacity
                     // keys exist
  // Pages of 2^page_shift keys; key j of sequence b is in page block_table[b][j >> page_shift] of k
  // and v, (pages, page size, num_kv_heads, head_dim), batch_stride a page. Null otherwise.
  const int32_t* block_table;
  int64_t block_table_stride;
  int32_t page_shift;
  float* partial;  // CUDA: attention_partial_size(p) floats, results of parts of the keys
  // CUDA, see attention_appends: k and v of each row's last token, (batch, 1, num_kv_heads,
  // head_dim), which the kernel puts into the cache, k and q rotated by position * inv_freq,
  // (head_dim / 2,). Null otherwise.
  HeadsView new_k, new_v;
  const float* inv_freq;
  double scale;
  double softcap;  // 0: none
  int64_t window;  // 0: none
  bool causal;
  DType dtype;
};

// Rows of an int8 cache times their factors, of the slots that hold a key.
struct WidenCacheParams {
  HeadsView cache;   // (batch, capacity, num_kv_heads, head_dim) int8
  HeadsView scales;  // (batch, capacity, num_kv_heads) floats
  void* out;         // (batch, num_kv_heads, capacity, head_dim) contiguous, aligned to 16 bytes
  const int64_t* key_lengths;  // (batch,)
  int64_t batch, capacity, num_kv_heads, head_dim;
  DType dtype;
};

// x = softcap * tanh(x / softcap), in place.
struct SoftCapParams {
  float* x;  // (size,)
  int64_t size;
  float softcap;
};

// CUDA: packed weights (see cuda/linear_quantized.cu) to a matrix.
struct DequantizeParams {
  const void* data;
  const void* scales;
  void* out;  // (out_features, in_features) contiguous
  int64_t out_features, in_features;
  DType dtype;  // of out
};

// The gradients of attention, of no ring. Those of k and v are zeros at first.
struct AttentionBackwardParams {
  AttentionParams forward;  // out and lse are read
  HeadsView grad_out;
  const float* grad_lse;             // like lse
  HeadsView grad_q, grad_k, grad_v;  // like q, k, v
  float* row_terms;                  // CUDA: like lse, scratch
};

// out[r, n] = sum_k x[r, k] * weight[n, k]; with softcap > 0: softcap * tanh(out / softcap)
struct LinearParams {
  const void* x;  // (rows, in_features), last dimension contiguous
  int64_t x_stride;
  const void* weight;  // (out_features, in_features), last dimension contiguous; or packed, as
                       // cpu/quantized.h says
  int64_t weight_stride;
  const void* scales;  // of packed weights
  void* out;           // (rows, out_features), last dimension contiguous
  int64_t out_stride;
  int64_t rows, in_features, out_features;
  float softcap;  // 0: none
  DType dtype;    // of x, and of weight where that is not packed
  DType out_dtype;
  // CPU, many rows: columns of out in one unit, at most kLinearManyColumns, and in range_units
  // units, the last of which has what is left.
  int64_t unit_columns, range_columns, range_units;
  void* packed_x;  // CPU: x in the kernel's own layout, shared by all threads
  float* scratch;  // CPU: of one thread
  bool zen4;       // CPU: as cpu/isa.h says
  // CUDA: weight is (2 * out_features, in_features), and out = gelu_tanh(first half) * second half
  bool geglu;
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

// What the losses over a linear layer sum up over the words, per token. s is a soft-capped logit of
// the student, t one of the teacher, tau the temperature.
enum LossStat : int {
  kLossMax,            // max s
  kLossSum,            // sum exp((s - max) / tau)
  kLossHardSum,        // sum exp(s - max), where hard
  kLossLogits,         // sum s, where uniform
  kLossTeacherMax,     // max t
  kLossTeacherSum,     // sum exp((t - max) / tau)
  kLossTeacherLogits,  // sum exp((t - max) / tau) s
  kLossStats,
};
// CUDA: one more, the sum of weight s[word] over a token's entries.
constexpr int kLossEntries = kLossStats, kLossCudaStats = kLossStats + 1;

// CUDA: the products of one side with some words, before the soft-cap.
struct LossLogits {
  const float* data;  // (tokens, words) contiguous
  int64_t words;      // 0: none
  float softcap;      // 0: none
};

// CUDA: the tokens that count, and their loss, as torch/linear_loss.h has it.
struct LossTokens {
  int64_t tokens, entries_per_token;
  const int64_t* place;        // (tokens,): of a token among those that do not count too
  const int64_t* entry_word;   // (tokens, entries_per_token); below 0: no entry
  const double* entry_weight;  // likewise
  const double *lse_weight, *hard_weight, *teacher_weight;  // (tokens,)
  double temperature, z_loss, uniform;
  bool hard;
  bool by_token;   // the result and its gradient are of every token, counted or not
  double divisor;  // of the sum over the tokens
};

// CUDA: adds words from word_begin on to the sums of every token.
struct LossSumsParams {
  LossLogits student, teacher;
  LossTokens loss;
  int64_t word_begin;
  bool first;    // total holds nothing yet
  float* total;  // (kLossCudaStats, tokens)
};

// CUDA: the losses from the sums over all words.
struct LossResultParams {
  LossTokens loss;
  bool teacher;        // there is one
  const float* total;  // (kLossCudaStats, tokens)
  float* out;
  float* stats;  // (3, stats_stride): lse, hard_lse and teacher_lse; or null
  int64_t stats_stride;
};

// CUDA: the gradient of the student's products with words from word_begin on.
struct LossGradientParams {
  LossLogits student, teacher;
  LossTokens loss;
  int64_t word_begin;
  const float* grad;  // of the result
  const float* stats;
  int64_t stats_stride;
  void* gradient;  // (tokens, student.words) contiguous
  DType dtype;     // of gradient
};

// CUDA: sums += product, both (rows, columns) of float32; then, with out, those rounded to its
// rows.
struct LossAddParams {
  const float* product;
  float* sums;
  bool first;            // sums hold nothing yet
  void* out;             // (*, columns) contiguous; or null
  const int64_t* place;  // (rows,): the row of out
  int64_t rows, columns;
  DType dtype;  // of out
};

// weight (out_features, in_features) to packed data and scales, as cpu/quantized.h says.
struct QuantizeParams {
  const void* weight;  // last dimension contiguous
  int64_t weight_stride;
  void* data;
  void* scales;
  int64_t out_features, in_features;
  DType dtype;  // of weight
};

// Rows `ids` of a packed weight, times `scale`.
struct EmbeddingParams {
  const int64_t* ids;
  const void* data;
  const void* scales;
  void* out;                          // (ids, in_features) contiguous
  int64_t out_features, in_features;  // of the weight
  int64_t count;                      // CUDA: of ids; one that is out of range gives NaN
  float scale;
  DType dtype;  // of out
};

// The largest of each run of kArgmaxRun elements of a row, NaN where one is.
constexpr int64_t kArgmaxRun = 1024;
struct ArgmaxParams {
  const float* x;  // (rows, columns), last dimension contiguous
  int64_t x_stride;
  float* maxima;  // (rows, runs of a row)
  int64_t rows, columns;
  int64_t* out;  // CUDA: (rows,), where the largest is
  // CUDA: of x, or, where there are keys (rows, 2), of draw_score (draw.h) of it.
  const int32_t* keys;
  float inverse_temperature;
};

// The largest draw_score (draw.h) of what is left by top_k (0: all), then by top_p and min_p.
struct DrawParams {
  const float* logits;  // (rows, columns), last dimension contiguous
  int64_t logits_stride;
  int64_t rows, columns;
  const int32_t* keys;  // (rows, 2)
  int64_t top_k;
  float top_p, min_p;
  int64_t* out;  // (rows,)
  float inverse_temperature;
};

// CPU: an element in falling order, where of equal ones the first comes first.
struct DrawElement {
  float value;
  int64_t place;
};
// CPU: what a draw's kernels do with one row, by runs of kArgmaxRun.
struct DrawWork {
  DrawParams p;  // its logits are of all rows
  const float* x;
  const int32_t* keys;   // (2,)
  const float* maxima;   // of the runs
  float largest, least;  // of the row; elements below `least` are left out
  DrawElement bound;     // those that do not come before it, too
  DrawElement winner;    // a score, and where it is, that a race has to beat
  float* sums;           // of each run
  DrawElement* winners;
  const int32_t* runs;  // whose elements are to be found
  int32_t* found;       // kArgmaxRun of each
  int64_t* counts;
};

// CUDA: the end of a decoding step, in place. A row that runs gets what was drawn, any other `pad`;
// it runs on unless that is a stop; and it has a key more.
struct AdvanceParams {
  const int64_t* drawn;  // (rows,)
  const int64_t* stops;  // (stop_count,)
  int64_t* tokens;       // (rows,)
  bool* running;         // (rows,)
  int64_t* key_lengths;  // (rows,)
  int64_t rows, stop_count, pad;
};

// What the machine itself can do, for benchmarks.
constexpr int64_t kProbeRun = 64 << 10;  // bytes of one unit of probe_memory
constexpr int64_t kProbeSteps = 4096;    // of one unit of probe_multiply
struct ProbeParams {
  const void* a;        // read
  const void* b;        // read too; may be null
  void* out;            // written; may be null
  bool fetch;           // the next run, by instruction
  uint32_t* sink;       // of one thread
  float factor;         // of probe_multiply
  DType dtype;          // of probe_multiply: what is multiplied,
  bool int8;            // or int8
  int64_t* operations;  // of one thread: additions and multiplications done
};

}  // namespace gemma2
