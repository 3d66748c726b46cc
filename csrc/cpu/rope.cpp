// Half-split rotation: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin), angle = position * inv_freq,
// of q and k (batch, seqlen, heads, head_dim); with a cache, k and v go into slot
// position % capacity of it.
//
// A unit is a token: unit u is token u % seqlen of row u / seqlen. Its cosines and sines are
// computed once, kColumns at a time, for all of its heads; the backward is the rotation by the
// negative angle. Angle, cosine and sine in float32, one rounding at the end, to int8 with a factor
// for each head's row where the cache is of that. Memory bounds it. Source: transformers,
// apply_rotary_pos_emb.
#include <math.h>

#include "kernels.h"
#include "pairs.h"

namespace gemma2 {
namespace GEMMA2_ISA {
namespace {

constexpr int64_t kColumns = 128;  // of a half; one chunk for head_dim up to 256

GEMMA2_INLINE int64_t offset(const HeadsView& t, int64_t batch, int64_t token, int64_t head) {
  return batch * t.batch_stride + token * t.seqlen_stride + head * t.head_stride;
}

// n columns of both halves of one head; those of `ahead` are fetched. Cosines and sines are in the
// order of pairs of T.
template <class T, class Out>
GEMMA2_INLINE void rotate(const T* x, const T* ahead, Out* out, const float* cosines,
                          const float* sines, int64_t half, int64_t n) {
  walk_pairs<T>(
      n,
      [&](int64_t i, auto count) {
        const VecPair<T> x1 = load_pair<T>(x + i, count), x2 = load_pair<T>(x + half + i, count);
        const VecPair<T> c{load(cosines + i), load(cosines + i + kLanes)};
        const VecPair<T> s{load(sines + i), load(sines + i + kLanes)};
        store_pair<false>(out + i, x1 * c - x2 * s, count);  // see rounded_bits
        store_pair<false>(out + half + i, x2 * c + x1 * s, count);
      },
      ahead, ahead + half);
}

// Writes a row of floats as int8 times the returned factor: the largest magnitude over 127. A row
// that is not finite gets a NaN as factor.
GEMMA2_INLINE float quantize_row(const float* x, int64_t n, int8_t* out) {
  VecF largest = zero(), difference = zero();
  for (int64_t i = 0; i < n; i += kLanes) {
    const VecF v = i + kLanes <= n ? load(x + i) : load_n(x + i, n - i);
    largest = max(largest, abs(v));
    difference += v - v;
  }
  const float most = reduce_max(largest);
  const bool finite = reduce_sum(difference) == 0.0f;
  if (!finite || most < 0x1p-100f) {  // the inverse of less would overflow
    for (int64_t i = 0; i < n; ++i) out[i] = 0;
    return finite ? 0.0f : NAN;
  }
  const VecF inverse = set(127.0f / most);
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t count = n - i < kLanes ? n - i : kLanes;
    const VecI q =
        to_int(round_small((count == kLanes ? load(x + i) : load_n(x + i, count)) * inverse));
    for (int64_t j = 0; j < count; ++j) out[i + j] = int8_t(q[j]);
  }
  return most / 127.0f;
}

GEMMA2_INLINE float* scale_at(const HeadsView& scales, int64_t batch, int64_t slot, int64_t head) {
  return (float*)scales.data + offset(scales, batch, slot, head);
}

GEMMA2_INLINE void angle(VecF inv_freq, int64_t position, bool inverse, float* cosines,
                         float* sines) {
  VecF s, c;
  sincos(set(float(position)) * inv_freq, &s, &c);
  store(cosines, c);
  store(sines, inverse ? -s : s);
}

template <class T>
void rope_token(const RopeParams& p, int64_t b, int64_t token) {
  const int64_t position = p.positions[b * p.positions_batch_stride + token];
  const bool cached = p.capacity > 0, padding = cached && position < 0;
  const int64_t head_bytes = p.head_dim * int64_t(sizeof(T)), half = p.head_dim / 2;
  if (padding) {
    for (int64_t h = 0; h < p.num_heads; ++h) {
      memcpy((T*)p.q_out.data + offset(p.q_out, b, token, h),
             (const T*)p.q.data + offset(p.q, b, token, h), head_bytes);
    }
    return;
  }
  const HeadsView& k_out = cached ? p.k_cache : p.k_out;
  const int64_t slot = cached ? position % p.capacity : token;
  const int64_t ahead = token + 1 < p.seqlen ? 1 : 0;
  for (int64_t begin = 0; begin < half; begin += kColumns) {
    const int64_t n = half - begin < kColumns ? half - begin : kColumns;
    float cosines[kColumns], sines[kColumns];
    walk_pairs<float>(n, [&](int64_t i, auto count) {
      const VecPair<T> f = load_pair<T>(p.inv_freq + begin + i, count);
      angle(f.first, position, p.inverse, cosines + i, sines + i);
      angle(f.second, position, p.inverse, cosines + i + kLanes, sines + i + kLanes);
    });
    for (int64_t h = 0; h < p.num_heads; ++h) {
      const T* x = (const T*)p.q.data + offset(p.q, b, token, h) + begin;
      T* out = (T*)p.q_out.data + offset(p.q_out, b, token, h) + begin;
      rotate(x, x + ahead * p.q.seqlen_stride, out, cosines, sines, half, n);
    }
    for (int64_t h = 0; h < p.num_kv_heads; ++h) {
      const T* x = (const T*)p.k.data + offset(p.k, b, token, h) + begin;
      const T* next = x + ahead * p.k.seqlen_stride;
      if (p.k_scales.data) {  // head_dim is at most two times kColumns: this is all of it
        float row[2 * kColumns];
        rotate(x, next, row, cosines, sines, half, n);
        *scale_at(p.k_scales, b, slot, h) =
            quantize_row(row, p.head_dim, (int8_t*)p.k_cache.data + offset(p.k_cache, b, slot, h));
        continue;
      }
      rotate(x, next, (T*)k_out.data + offset(k_out, b, slot, h) + begin, cosines, sines, half, n);
    }
  }
  if (!cached) return;
  for (int64_t h = 0; h < p.num_kv_heads; ++h) {
    if (p.v_scales.data) {
      float row[2 * kColumns];
      const T* v = (const T*)p.v.data + offset(p.v, b, token, h);
      for (int64_t i = 0; i < p.head_dim; ++i) row[i] = to_float(v[i]);
      *scale_at(p.v_scales, b, slot, h) =
          quantize_row(row, p.head_dim, (int8_t*)p.v_cache.data + offset(p.v_cache, b, slot, h));
      continue;
    }
    memcpy((T*)p.v_cache.data + offset(p.v_cache, b, slot, h),
           (const T*)p.v.data + offset(p.v, b, token, h), head_bytes);
  }
}

}  // namespace

void rope_tokens(const RopeParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto t) {
    for (int64_t u = begin; u < end; ++u) rope_token<decltype(t)>(p, u / p.seqlen, u % p.seqlen);
  });
}

}  // namespace GEMMA2_ISA
}  // namespace gemma2
