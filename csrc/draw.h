// Random numbers of a draw: a hash of its keys and a token.
#pragma once
#include <math.h>
#include <stdint.h>

#ifdef __CUDACC__
#define GEMMA2_ANYWHERE __host__ __device__ inline
#else
#define GEMMA2_ANYWHERE static inline
#endif

namespace gemma2 {

// Exponentially distributed, of mean 1: the time after which a token arrives. tests/draws.py has
// the same. Source: the finalizer of MurmurHash3, with the second key inside.
GEMMA2_ANYWHERE float arrival(uint32_t first, uint32_t second, uint32_t token) {
  uint32_t x = (token + first) * 0x9e3779b9u;
  x = ((x ^ x >> 16) + second) * 0x85ebca6bu;
  x = (x ^ x >> 13) * 0xc2b2ae35u;
  x ^= x >> 16;
  // |x + 1/2| / 2^31 is uniform in (0, 1], and as fine near 0, where the first arrive, as x is.
  return -log1pf(fabsf(float(int32_t(x)) + 0.5f) * -0x1p-31f);
}

// The token whose score is the largest is that of which exp(logit / temperature) / arrival is.
GEMMA2_ANYWHERE float draw_score(float logit, float inverse_temperature, uint32_t first,
                                 uint32_t second, uint32_t token) {
  return logit * inverse_temperature - logf(arrival(first, second, token));
}

}  // namespace gemma2
