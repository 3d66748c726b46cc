// CUDA on a CPU, for tests: what csrc/cuda/ptx.cuh declares, and the language that kernels use.
//
// Every thread of a block is a fiber; blocks run one after another, those of a cluster side by
// side. A fiber runs until it meets a
// barrier or a warp function that others have not reached, and a schedule (see Settings) says who
// goes on: a missing barrier shows as a result that depends on the schedule. Shared memory is NaN
// when a block begins and has guard zones around it. cp.async lands at its wait, at once, or at
// either, by schedule. 16-byte accesses are checked for alignment and for the memory they may
// touch. Barriers and waits can be left out by their place in the source, to see a test fail
// without them.
//
// The fragment layouts follow the PTX manual; they have not been compared with hardware.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <functional>
#include <string>

// ---- the language

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define GEMMA2_DEVICE inline

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
typedef struct CUstream_st* cudaStream_t;

template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline void __threadfence() {}
template <class T>
T atomicAdd(T* p, T x) {
  const T before = *p;
  *p = before + x;
  return before;
}

namespace gemma2 {
namespace cuda {
namespace emulation {

struct Settings {
  int schedule = 0;  // the order of threads and of copies: see Scheduler
  int multiprocessors = 4;
  int shared_bytes = 99 << 10;  // the least of all devices: sm_86, 89, 120
  int compute_capability = 90;
  int max_blocks = 0x7fffffff;  // of a grid's x; few, to see kernels go on in steps of the grid
  std::string left_out;         // "file:line" of a barrier or wait that is to have no effect
};
Settings& settings();

[[noreturn]] void fail(const std::string& message);

// blocks_of_cluster: along x, that run side by side.
void launch(const char* op, int blocks_of_cluster, dim3 grid, int threads, int64_t shared_bytes,
            const std::function<void()>& body);

unsigned char* shared_memory();
// The same place of shared memory in block `rank` of the cluster.
const void* shared_of_block(const void* shared, int rank);
int lane();

// False where the barrier or wait at this place is to be left out.
bool reach(const char* file, int line);
void sync_threads(const char* file, int line);
void sync_cluster(const char* file, int line);
void named_barrier(int id, int threads, bool wait);
// Called by all lanes; the last to come computes for all.
void collective(const char* name, void (*compute)(void* const* lanes), void* mine);
void start_copy(void* shared, const void* global, int bytes, bool valid);
void commit_copies();
void wait_for_copies(int groups);
// This thread wrote there; if to shared memory, it is to fence that before wgmma or bulk copies
// come.
void note_write(const void* p, int bytes);
// `bytes` at p are aligned and, where the test has named the memory that may be touched, in it.
void check_access(const void* p, int bytes);

template <class Lane>
void collective(const char* name, void (*compute)(Lane* const* lanes), Lane* mine) {
  collective(name, reinterpret_cast<void (*)(void* const*)>(compute), mine);
}

}  // namespace emulation
}  // namespace cuda
}  // namespace gemma2

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  gemma2::cuda::emulation::sync_threads(file, line);
}
inline void __syncwarp(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  if (!gemma2::cuda::emulation::reach(file, line)) return;
  char nothing;
  gemma2::cuda::emulation::collective<char>("__syncwarp", [](char* const*) {}, &nothing);
}

namespace gemma2 {
namespace cuda {

// ---- memory

inline unsigned char* shared_memory() { return emulation::shared_memory(); }

inline uint32_t load_4(const void* p) {
  emulation::check_access(p, 4);
  uint32_t word;
  memcpy(&word, p, 4);
  return word;
}
inline Vector16 load_16(const void* p) {
  emulation::check_access(p, 16);
  Vector16 v;
  memcpy(&v, p, 16);
  return v;
}
inline Vector16 load_16_once(const void* p) { return load_16(p); }
inline Vector8 load_8(const void* p) {
  emulation::check_access(p, 8);
  Vector8 v;
  memcpy(&v, p, 8);
  return v;
}
inline uint32_t load_4_once(const void* p) {
  emulation::check_access(p, 4);
  uint32_t v;
  memcpy(&v, p, 4);
  return v;
}
inline void store_16(void* p, const Vector16& v) {
  emulation::check_access(p, 16);
  memcpy(p, &v, 16);
  emulation::note_write(p, 16);
}
inline void store_8(void* p, const Vector8& v) {
  emulation::check_access(p, 8);
  memcpy(p, &v, 8);
  emulation::note_write(p, 8);
}

template <int kBytes>
void cp_async(void* shared, const void* global, bool valid) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "");
  emulation::start_copy(shared, global, kBytes, valid);
}
inline void cp_async_beside(void* shared, const void* global, bool valid) {
  emulation::start_copy(shared, global, 16, valid);
}
inline void cp_async_commit() { emulation::commit_copies(); }
template <int kGroups>
void cp_async_wait(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  if (emulation::reach(file, line)) emulation::wait_for_copies(kGroups);
}

// ---- a kernel that starts before those in front of it have ended: here none does

inline void allow_next_kernel() {}
inline void wait_for_previous_kernels() {}

// ---- lanes of a warp

inline int read_lane() { return emulation::lane(); }
template <class T>
T shuffle(T value, int source) {
  struct Lane {
    T value, result;
    int source;
  } mine{value, value, source};
  emulation::collective<Lane>(
      "shuffle",
      [](Lane* const* lanes) {
        for (int l = 0; l < kWarpSize; ++l)
          lanes[l]->result = lanes[lanes[l]->source % kWarpSize]->value;
      },
      &mine);
  return mine.result;
}
template <class T>
T shuffle_xor(T value, int mask) {
  return shuffle(value, emulation::lane() ^ mask);
}
inline uint32_t ballot(bool predicate) {
  struct Lane {
    bool predicate;
    uint32_t result;
  } mine{predicate, 0};
  emulation::collective<Lane>(
      "ballot",
      [](Lane* const* lanes) {
        uint32_t bits = 0;
        for (int l = 0; l < kWarpSize; ++l) bits |= uint32_t(lanes[l]->predicate) << l;
        for (int l = 0; l < kWarpSize; ++l) lanes[l]->result = bits;
      },
      &mine);
  return mine.result;
}

// ---- a cluster of blocks

inline void cluster_barrier(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulation::sync_cluster(file, line);
}
inline void cluster_barrier_after_reads(const char* file = __builtin_FILE(),
                                        int line = __builtin_LINE()) {
  emulation::sync_cluster(file, line);
}
template <int kCount>
void load_of_block(float (&x)[kCount], const float* shared, int rank) {
  for (int i = 0; i < kCount; ++i) {
    const void* there = emulation::shared_of_block(shared + kWarpSize * i, rank);
    x[i] = *static_cast<const float*>(there);
  }
}

// ---- a part of a block

inline void named_barrier_sync(int id, int threads, const char* file = __builtin_FILE(),
                               int line = __builtin_LINE()) {
  if (emulation::reach(file, line)) emulation::named_barrier(id, threads, true);
}
inline void named_barrier_arrive(int id, int threads, const char* file = __builtin_FILE(),
                                 int line = __builtin_LINE()) {
  if (emulation::reach(file, line)) emulation::named_barrier(id, threads, false);
}

// ---- conversions

inline float bits_to_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t float_to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return bits_to_float(uint32_t(x.bits) << 16); }
inline float to_float(Half x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  // Moved to float's fields the exponent is off by 127 - 15; a product mends it.
  float y = bits_to_float(magnitude << 13) * 0x1p112f;
  if (magnitude >= 0x7c00) y = bits_to_float(magnitude << 13 | 0x7f800000);  // inf, nan
  return bits_to_float(float_to_bits(y) | sign);
}

template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline BFloat16 from_float<BFloat16>(float x) {
  const uint32_t bits = float_to_bits(x);
  if (x != x) return {0x7fff};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline Half from_float<Half>(float x) {
  const uint16_t sign = float_to_bits(x) >> 16 & 0x8000;
  const float magnitude = fabsf(x);
  if (x != x) return {0x7fff};
  if (magnitude >= 65520.0f) return {uint16_t(sign | 0x7c00)};
  if (magnitude < 0x1p-14f) {  // subnormal: in units of 2^-24, to the nearest even
    return {uint16_t(sign | uint16_t(nearbyintf(magnitude * 0x1p24f)))};
  }
  const uint32_t bits = float_to_bits(magnitude);
  const uint32_t rounded = bits + 0xfff + (bits >> 13 & 1);
  return {uint16_t(sign | ((rounded >> 13) - (112 << 10)))};
}

template <class T>
uint32_t pack(float low, float high) {
  return from_float<T>(low).bits | uint32_t(from_float<T>(high).bits) << 16;
}

// ---- arithmetic

inline uint32_t and_or(uint32_t x, uint32_t mask, uint32_t bits) { return (x & mask) | bits; }

inline uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = uint64_t(high) << 32 | low;
  uint32_t word = 0;
  for (int i = 0; i < 4; ++i)
    word |= uint32_t(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return word;
}

template <class T>
uint32_t multiply_add_2(uint32_t a, uint32_t b, uint32_t c) {
  const auto element = [=](int shift) {
    const auto of = [=](uint32_t word) { return to_float(T{uint16_t(word >> shift)}); };
    return of(a) * of(b) + of(c);  // rounded twice, which only a sum that float cannot hold shows
  };
  return pack<T>(element(0), element(16));
}

inline float flush(float x) { return fabsf(x) < 0x1p-126f ? 0.0f : x; }
inline float exp2_approx(float x) { return flush(exp2f(flush(x))); }
inline float log2_approx(float x) { return log2f(flush(x)); }
inline float reciprocal_approx(float x) { return 1.0f / x; }
// With an error as large as the instruction may have: rounded to 11 bits.
inline float tanh_approx(float x) {
  const uint32_t bits = float_to_bits(tanhf(x));
  return bits_to_float((bits + 0xfff) & ~uint32_t(0x1fff));
}

// ---- tensor cores

namespace emulation {

template <int kMatrices, bool kTransposed>
void load_matrices(uint32_t* d, const void* shared) {
  struct Lane {
    uint32_t* d;
    const void* row;
  } mine{d, shared};
  if (lane() < 8 * kMatrices) check_access(shared, 16);
  collective<Lane>(
      "ldmatrix",
      [](Lane* const* lanes) {
        for (int m = 0; m < kMatrices; ++m) {
          uint16_t rows[8][8];
          for (int r = 0; r < 8; ++r) memcpy(rows[r], lanes[8 * m + r]->row, 16);
          for (int l = 0; l < kWarpSize; ++l) {
            const int major = l / 4, minor = l % 4 * 2;
            const uint32_t first = kTransposed ? rows[minor][major] : rows[major][minor];
            const uint32_t second = kTransposed ? rows[minor + 1][major] : rows[major][minor + 1];
            lanes[l]->d[m] = first | second << 16;
          }
        }
      },
      &mine);
}

}  // namespace emulation

inline void ldmatrix_x4(uint32_t (&d)[4], const void* p) {
  emulation::load_matrices<4, false>(d, p);
}
inline void ldmatrix_x4_trans(uint32_t (&d)[4], const void* p) {
  emulation::load_matrices<4, true>(d, p);
}
inline void ldmatrix_x2(uint32_t (&d)[2], const void* p) {
  emulation::load_matrices<2, false>(d, p);
}
inline void ldmatrix_x2_trans(uint32_t (&d)[2], const void* p) {
  emulation::load_matrices<2, true>(d, p);
}

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Lane {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
  } mine{d, a, {b0, b1}};
  emulation::collective<Lane>(
      "mma",
      [](Lane* const* lanes) {
        float a[16][16], b[16][8];
        const auto half = [](uint32_t word, int i) {
          return to_float(T{uint16_t(word >> 16 * i)});
        };
        for (int l = 0; l < kWarpSize; ++l) {
          const int g = l / 4, t = l % 4;
          for (int i = 0; i < 2; ++i) {
            for (int j = 0; j < 4; ++j)
              a[g + 8 * (j % 2)][2 * t + 8 * (j / 2) + i] = half(lanes[l]->a[j], i);
            for (int j = 0; j < 2; ++j) b[2 * t + 8 * j + i][g] = half(lanes[l]->b[j], i);
          }
        }
        for (int l = 0; l < kWarpSize; ++l) {
          for (int i = 0; i < 4; ++i) {
            const int row = l / 4 + 8 * (i / 2), column = l % 4 * 2 + i % 2;
            float sum = 0;
            for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
            lanes[l]->d[i] += sum;
          }
        }
      },
      &mine);
}

}  // namespace cuda
}  // namespace gemma2
