// Rows of any element type as 16-byte vectors of floats, and sums over a block.
#pragma once
#include "launch.cuh"

namespace gemma2 {
namespace cuda {

template <class T>
constexpr int kVectorSize = 16 / int(sizeof(T));

// Whether 16-byte accesses are possible to all rows that start at p, `stride` elements apart.
inline bool is_aligned(const void* p, int64_t stride_bytes) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && stride_bytes % 16 == 0;
}

// Threads for a block a row of `columns` elements: `held` vectors a thread while that is possible.
inline int row_threads(int64_t columns, int vector_size, int held, int most) {
  const int64_t warps = divide_up(divide_up(columns, held * vector_size), kWarpSize);
  const int64_t threads = (warps < 1 ? 1 : warps) * kWarpSize;
  return int(threads < most ? threads : most);
}
// Whether there are rows enough to fill the device several times: then fewer threads a row, with
// more vectors each, have more on the way and meet fewer barriers. With few rows only latency
// counts.
inline bool are_many_rows(int64_t rows) { return rows >= 8 * device_properties().multiprocessors; }
// Blocks for so many rows; a kernel goes on in steps of the grid.
inline dim3 row_grid(int64_t rows) {
  const int64_t most = device_properties().max_blocks;
  return dim3(unsigned(rows < most ? rows : most));
}

GEMMA2_DEVICE void unpack(const Vector16& v, float (&x)[4], float) {
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] = bits_to_float(v.words[i]);
}
template <class T>
GEMMA2_DEVICE void unpack(uint32_t word, float& low, float& high, T) {
  low = to_float(T{uint16_t(word & 0xffff)});
  high = to_float(T{uint16_t(word >> 16)});
}
template <class T>
GEMMA2_DEVICE void unpack(const Vector16& v, float (&x)[8], T) {
#pragma unroll
  for (int i = 0; i < 4; ++i) unpack(v.words[i], x[2 * i], x[2 * i + 1], T{});
}

GEMMA2_DEVICE Vector16 pack_vector(const float (&x)[4], float) {
  Vector16 v;
#pragma unroll
  for (int i = 0; i < 4; ++i) v.words[i] = float_to_bits(x[i]);
  return v;
}
template <class T>
GEMMA2_DEVICE Vector16 pack_vector(const float (&x)[8], T) {
  Vector16 v;
#pragma unroll
  for (int i = 0; i < 4; ++i) v.words[i] = pack<T>(x[2 * i], x[2 * i + 1]);
  return v;
}

// The first n elements at p, then zeros; one access where kAligned and n reaches.
template <bool kAligned, class T>
GEMMA2_DEVICE Vector16 load_vector(const T* p, int64_t n) {
  if (kAligned && n >= kVectorSize<T>) return load_16(p);
  Vector16 v{};
#pragma unroll
  for (int i = 0; i < kVectorSize<T>; ++i) {
    if (i >= n) continue;
    if constexpr (sizeof(T) == 4) {
      v.words[i] = float_to_bits(p[i]);
    } else {
      v.words[i / 2] |= uint32_t(p[i].bits) << (16 * (i % 2));
    }
  }
  return v;
}
// Of a row whose columns are a multiple of a vector where kAligned.
template <bool kAligned, class T>
GEMMA2_DEVICE Vector16 load_whole(const T* p, int64_t n) {
  if constexpr (!kAligned) return load_vector<false>(p, n);
  return n > 0 ? load_16(p) : Vector16{};
}
template <bool kAligned, class T>
GEMMA2_DEVICE void load_floats(const T* p, int64_t n, float (&x)[kVectorSize<T>]) {
  unpack(load_vector<kAligned>(p, n), x, T{});
}

// Stores the first n elements of v.
template <bool kAligned, class T>
GEMMA2_DEVICE void store_vector(T* p, int64_t n, const Vector16& v) {
  if (kAligned && n >= kVectorSize<T>) return store_16(p, v);
#pragma unroll
  for (int i = 0; i < kVectorSize<T>; ++i) {
    if (i >= n) continue;
    if constexpr (sizeof(T) == 4) {
      p[i] = bits_to_float(v.words[i]);
    } else {
      p[i] = T{uint16_t(v.words[i / 2] >> (16 * (i % 2)))};
    }
  }
}

// n floats from element `at` on, then zeros, of an array whose dtype is known at run time.
template <bool kAligned, int kSize>
GEMMA2_DEVICE void load_floats_as(const void* array, DType dtype, int64_t at, int64_t n,
                                  float (&x)[kSize]) {
  if (dtype == DType::kFloat32) {
    const float* p = static_cast<const float*>(array) + at;
#pragma unroll
    for (int part = 0; part < kSize; part += 4) {
      float values[4];
      load_floats<kAligned>(p + part, n - part, values);
#pragma unroll
      for (int i = 0; i < 4; ++i) x[part + i] = values[i];
    }
    return;
  }
  const uint16_t* p = static_cast<const uint16_t*>(array) + at;
  const bool bfloat16 = dtype == DType::kBFloat16;
  if constexpr (kSize == 8) {
    const Vector16 v = load_vector<kAligned>(reinterpret_cast<const BFloat16*>(p), n);
    if (bfloat16) {
      unpack(v, x, BFloat16{});
    } else {
      unpack(v, x, Half{});
    }
  } else {  // half a vector, beside float32 elements
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const uint16_t bits = i < n ? p[i] : uint16_t(0);
      x[i] = bfloat16 ? to_float(BFloat16{bits}) : to_float(Half{bits});
    }
  }
}

GEMMA2_DEVICE float warp_sum(float x) {
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

// The sum over the block, in every thread and in the same order whatever the schedule. `scratch`:
// kWarpSize floats of shared memory, not used by another sum until the next barrier.
GEMMA2_DEVICE float block_sum(float x, float* scratch) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int warps = blockDim.x / kWarpSize;
  x = warp_sum(x);
  if (warps == 1) return x;
  if (lane == 0) scratch[warp] = x;
  __syncthreads();
  return warp_sum(lane < warps ? scratch[lane] : 0.0f);
}

}  // namespace cuda
}  // namespace gemma2
