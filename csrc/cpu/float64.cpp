// The differentiable ops in float64, as their formulas read: see the file of each op.
#include "float64.h"

#include <math.h>

#include <algorithm>
#include <vector>

namespace gemma2 {
namespace float64 {
namespace {

const double* row(const void* data, int64_t r, int64_t stride) {
  return static_cast<const double*>(data) + r * stride;
}
double* row(void* data, int64_t r, int64_t stride) {
  return static_cast<double*>(data) + r * stride;
}

double rms_scale(const double* x, int64_t n, double eps) {
  double squares = 0;
  for (int64_t i = 0; i < n; ++i) squares += x[i] * x[i];
  return 1 / sqrt(squares / double(n) + eps);
}

// grad_x, and grad_weight with this row's part added.
void norm_backward_row(const double* grad_out, const double* x, const double* weight,
                       double* grad_x, double* grad_weight, int64_t n, double eps) {
  const double s = rms_scale(x, n, eps);
  double products = 0;
  for (int64_t i = 0; i < n; ++i) products += grad_out[i] * (1 + weight[i]) * x[i];
  for (int64_t i = 0; i < n; ++i) {
    grad_weight[i] += grad_out[i] * x[i] * s;
    grad_x[i] = s * (grad_out[i] * (1 + weight[i]) - x[i] * s * s * products / double(n));
  }
}

void fill_zero(void* data, int64_t n) {
  for (int64_t i = 0; i < n; ++i) static_cast<double*>(data)[i] = 0;
}

constexpr double kSqrt2OverPi = 0.79788456080286535588;

double half_tanh_plus_half(double g) {
  return 0.5 * (1 + tanh(kSqrt2OverPi * (g + 0.044715 * g * g * g)));
}

double* head(const HeadsView& t, int64_t batch, int64_t token, int64_t head) {
  return static_cast<double*>(t.data) + batch * t.batch_stride + token * t.seqlen_stride +
         head * t.head_stride;
}

double dot(const double* a, const double* b, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

// a += factor * b
void add(double* a, double factor, const double* b, int64_t n) {
  for (int64_t i = 0; i < n; ++i) a[i] += factor * b[i];
}

// A query row and the keys [first, end) that it sees, in rows of q and of k.
struct Query {
  int64_t batch, row, head, kv_head, first, end;
  int64_t lse;  // its place in lse
};

// f(query) for each query row of each sequence.
template <class F>
void for_each_query(const AttentionParams& p, const F& f) {
  for (int64_t b = 0; b < p.batch; ++b) {
    int64_t q_offset = 0, k_offset = 0, seqlen_q = p.seqlen_q, length = p.seqlen_k, start = 0;
    if (p.cu_seqlens_q) {
      q_offset = p.cu_seqlens_q[b], seqlen_q = p.cu_seqlens_q[b + 1] - q_offset;
      k_offset = p.cu_seqlens_k[b], length = p.cu_seqlens_k[b + 1] - k_offset;
    }
    if (p.key_lengths) length = p.key_lengths[b];
    if (p.key_starts) start = p.key_starts[b];
    for (int64_t i = 0; i < seqlen_q; ++i) {
      const int64_t position = length - seqlen_q + i;
      const int64_t first = p.window ? std::max(start, position - p.window + 1) : start;
      const int64_t end = std::max(first, p.causal ? std::min(length, position + 1) : length);
      for (int64_t h = 0; h < p.num_heads; ++h) {
        f(Query{b, q_offset + i, h, h / (p.num_heads / p.num_kv_heads), k_offset + first,
                k_offset + end, b * p.lse_batch_stride + h * p.lse_head_stride + q_offset + i});
      }
    }
  }
}

// The capped score of a dot product, and the slope of the cap there.
double score(const AttentionParams& p, double product, double* slope) {
  const double x = p.scale * product;
  const double t = p.softcap > 0 ? tanh(x / p.softcap) : 0;
  *slope = 1 - t * t;
  return p.softcap > 0 ? p.softcap * t : x;
}

}  // namespace

void rms_norm(const RmsNormParams& p) {
  const double* weight = static_cast<const double*>(p.weight);
  const int64_t n = p.hidden_size;
  for (int64_t r = 0; r < p.rows; ++r) {
    const double* x = row(p.x, r, p.x_stride);
    const double s = rms_scale(x, n, p.eps);
    for (int64_t i = 0; i < n; ++i) row(p.out, r, n)[i] = x[i] * s * (1 + weight[i]);
  }
}

void rms_norm_backward(const RmsNormBackwardParams& p) {
  const int64_t n = p.hidden_size;
  fill_zero(p.grad_weight, n);
  for (int64_t r = 0; r < p.rows; ++r) {
    norm_backward_row(row(p.grad_out, r, p.grad_out_stride), row(p.x, r, p.x_stride),
                      row(p.weight, 0, 0), row(p.grad_x, r, n), row(p.grad_weight, 0, 0), n, p.eps);
  }
}

void add_rms_norm(const AddRmsNormParams& p) {
  const double* post = static_cast<const double*>(p.post_weight);
  const double* pre = static_cast<const double*>(p.pre_weight);
  const int64_t n = p.hidden_size;
  for (int64_t r = 0; r < p.rows; ++r) {
    const double* x = row(p.x, r, p.x_stride);
    const double* residual = row(p.residual, r, p.residual_stride);
    double* sum = row(p.residual_out, r, n);
    double* out = row(p.out, r, n);
    const double s = rms_scale(x, n, p.eps);
    for (int64_t i = 0; i < n; ++i) sum[i] = residual[i] + x[i] * s * (1 + post[i]);
    const double sum_scale = rms_scale(sum, n, p.eps);
    for (int64_t i = 0; i < n; ++i) out[i] = sum[i] * sum_scale * (1 + pre[i]);
  }
}

void add_rms_norm_backward(const AddRmsNormBackwardParams& p) {
  const int64_t n = p.hidden_size;
  fill_zero(p.grad_post_weight, n);
  fill_zero(p.grad_pre_weight, n);
  for (int64_t r = 0; r < p.rows; ++r) {
    double* grad_r = row(p.grad_residual, r, n);
    norm_backward_row(row(p.grad_out, r, p.grad_out_stride),
                      row(p.residual_out, r, p.residual_out_stride), row(p.pre_weight, 0, 0),
                      grad_r, row(p.grad_pre_weight, 0, 0), n, p.eps);
    const double* direct = row(p.grad_residual_out, r, p.grad_residual_out_stride);
    for (int64_t i = 0; i < n; ++i) grad_r[i] += direct[i];
    norm_backward_row(grad_r, row(p.x, r, p.x_stride), row(p.post_weight, 0, 0),
                      row(p.grad_x, r, n), row(p.grad_post_weight, 0, 0), n, p.eps);
  }
}

void geglu(const GegluParams& p) {
  for (int64_t r = 0; r < p.rows; ++r) {
    const double* gate = row(p.gate, r, p.gate_stride);
    const double* up = row(p.up, r, p.up_stride);
    for (int64_t i = 0; i < p.columns; ++i)
      row(p.out, r, p.columns)[i] = gate[i] * half_tanh_plus_half(gate[i]) * up[i];
  }
}

void geglu_backward(const GegluBackwardParams& p) {
  for (int64_t r = 0; r < p.rows; ++r) {
    const double* grad_out = row(p.grad_out, r, p.grad_out_stride);
    const double* gate = row(p.gate, r, p.gate_stride);
    const double* up = row(p.up, r, p.up_stride);
    for (int64_t i = 0; i < p.columns; ++i) {
      const double g = gate[i], q = half_tanh_plus_half(g);
      const double slope = 2 * kSqrt2OverPi * (1 + 3 * 0.044715 * g * g);  // of 2z
      row(p.grad_up, r, p.columns)[i] = grad_out[i] * g * q;
      row(p.grad_gate, r, p.columns)[i] = grad_out[i] * up[i] * (q + g * q * (1 - q) * slope);
    }
  }
}

void rope(const RopeParams& p) {
  const int64_t half = p.head_dim / 2;
  const auto rotate = [half](const double* x, double* out, int64_t i, double c, double s) {
    const double x1 = x[i], x2 = x[half + i];
    out[i] = x1 * c - x2 * s;
    out[half + i] = x2 * c + x1 * s;
  };
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t token = 0; token < p.seqlen; ++token) {
      const int64_t position = p.positions[b * p.positions_batch_stride + token];
      for (int64_t i = 0; i < half; ++i) {
        const float angle = float(position) * p.inv_freq[i];  // rounded as in every dtype
        const double c = cos(double(angle)), s = sin(double(p.inverse ? -angle : angle));
        for (int64_t h = 0; h < p.num_heads; ++h)
          rotate(head(p.q, b, token, h), head(p.q_out, b, token, h), i, c, s);
        for (int64_t h = 0; h < p.num_kv_heads; ++h)
          rotate(head(p.k, b, token, h), head(p.k_out, b, token, h), i, c, s);
      }
    }
  }
}

void attention(const AttentionParams& p) {
  const int64_t n = p.head_dim;
  for_each_query(p, [&](const Query& query) {
    const double* q = head(p.q, query.batch, query.row, query.head);
    double* out = head(p.out, query.batch, query.row, query.head);
    std::vector<double> weights;
    double largest = -INFINITY, sum = 0, slope;
    for (int64_t j = query.first; j < query.end; ++j) {
      weights.push_back(score(p, dot(q, head(p.k, query.batch, j, query.kv_head), n), &slope));
      largest = std::max(largest, weights.back());
    }
    for (double& weight : weights) sum += weight = exp(weight - largest);
    fill_zero(out, n);
    for (int64_t j = query.first; j < query.end; ++j)
      add(out, weights[j - query.first] / sum, head(p.v, query.batch, j, query.kv_head), n);
    if (p.lse) reinterpret_cast<double*>(p.lse)[query.lse] = largest + log(sum);
  });
}

void attention_backward(const AttentionBackwardParams& p) {
  const AttentionParams& f = p.forward;
  const int64_t n = f.head_dim;
  for_each_query(f, [&](const Query& query) {
    const double* q = head(f.q, query.batch, query.row, query.head);
    const double* grad_out = head(p.grad_out, query.batch, query.row, query.head);
    double* grad_q = head(p.grad_q, query.batch, query.row, query.head);
    fill_zero(grad_q, n);
    const double delta = dot(grad_out, head(f.out, query.batch, query.row, query.head), n) -
                         reinterpret_cast<const double*>(p.grad_lse)[query.lse];
    const double lse = reinterpret_cast<const double*>(f.lse)[query.lse];
    for (int64_t j = query.first; j < query.end; ++j) {
      const double* k = head(f.k, query.batch, j, query.kv_head);
      double slope;
      const double weight = exp(score(f, dot(q, k, n), &slope) - lse);
      const double product = dot(grad_out, head(f.v, query.batch, j, query.kv_head), n);
      const double grad_score = weight * (product - delta) * slope * f.scale;
      add(grad_q, grad_score, k, n);
      add(head(p.grad_k, query.batch, j, query.kv_head), grad_score, q, n);
      add(head(p.grad_v, query.batch, j, query.kv_head), weight, grad_out, n);
    }
  });
}

}  // namespace float64
}  // namespace gemma2
