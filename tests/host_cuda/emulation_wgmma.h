// Hopper's own instructions on a CPU: what csrc/cuda/wgmma.cuh declares, beside emulation.h.
//
// A product is computed where it is started, where it is waited for, or at either, by schedule: so
// registers that are read or memory that is written too early show. Bulk copies land as late as
// some thread can go on without them, or at once. A product that reads, or a bulk copy that meets,
// what a thread wrote without a fence behind it is refused (writes by store_8, store_16, cp_async);
// so is a product behind a wait without a fence of registers between them. Numbers of registers
// have no effect and are not checked.
#pragma once
#include "../../csrc/cuda/ptx.cuh"

struct CUtensorMap {
  const unsigned char* data;
  int rank;
  int64_t sizes[5], strides[5];  // elements of 16 bits, bytes
  int box[5];
};

namespace gemma2 {
namespace cuda {
namespace emulation {

void init_phases(uint64_t* barrier, int arrivals);
void arrive(uint64_t* barrier, int bytes);
bool is_complete(uint64_t* barrier, int parity);
void fence_phases();
void fence_writes();
void wait_for_phase(uint64_t* barrier, int parity);
void start_box(void* shared, const CUtensorMap& map, const int* at, int rank, uint64_t* barrier);

// A warp's share of a product.
struct Product {
  void (*compute)(const Product&);
  float* d[kWarpSize];           // of each lane
  const uint32_t* a[kWarpSize];  // of each lane, where a is in registers
  uint64_t a_matrix, b_matrix;
  bool add;
  int warp;  // of the warpgroup
};
// A lane's part; of the first lane's the rest counts.
void start_product(void (*compute)(const Product&), float* d, const uint32_t* a, uint64_t a_matrix,
                   uint64_t b_matrix, bool add);
void fence_registers();
void commit_products();
void wait_for_products(int groups);

// The place in shared memory of a row's 16-bit element, where rows of 128 bytes are permuted.
const void* element_of_matrix(uint64_t matrix, int row, int column);

template <class T>
float value(uint64_t matrix, int row, int column) {
  T element;
  memcpy(&element, element_of_matrix(matrix, row, column), 2);
  return to_float(element);
}

template <class T, int kColumns, bool kRegisters>
void compute_product(const Product& p) {
  static float a[16][16], b[16][kColumns];
  for (int r = 0; r < 16; ++r) {
    for (int k = 0; k < 16; ++k) {
      if (!kRegisters) {
        a[r][k] = value<T>(p.a_matrix, 16 * p.warp + r, k);
      } else {
        const uint32_t word = p.a[r % 8 * 4 + k % 8 / 2][r / 8 + k / 8 * 2];
        a[r][k] = to_float(T{uint16_t(word >> k % 2 * 16)});
      }
    }
  }
  for (int n = 0; n < kColumns; ++n) {
    for (int k = 0; k < 16; ++k)
      b[k][n] = kRegisters ? value<T>(p.b_matrix, k, n) : value<T>(p.b_matrix, n, k);
  }
  for (int l = 0; l < kWarpSize; ++l) {
    for (int i = 0; i < kColumns / 2; ++i) {
      const int row = l / 4 + i % 4 / 2 * 8, column = i / 4 * 8 + l % 4 * 2 + i % 2;
      float sum = 0;
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      p.d[l][i] = p.add ? p.d[l][i] + sum : sum;
    }
  }
}

}  // namespace emulation

// ---- mbarriers

inline void mbarrier_init(uint64_t* barrier, int arrivals) {
  emulation::init_phases(barrier, arrivals);
}
inline void mbarrier_arrive(uint64_t* barrier) { emulation::arrive(barrier, 0); }
inline void mbarrier_arrive_and_expect(uint64_t* barrier, int bytes) {
  emulation::arrive(barrier, bytes);
}
inline void mbarrier_wait(uint64_t* barrier, int parity, const char* file = __builtin_FILE(),
                          int line = __builtin_LINE()) {
  if (emulation::reach(file, line)) emulation::wait_for_phase(barrier, parity);
}
inline bool mbarrier_test(uint64_t* barrier, int parity) {
  return emulation::is_complete(barrier, parity);
}
inline void fence_mbarrier_init(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  if (emulation::reach(file, line)) emulation::fence_phases();
}
inline void fence_shared_for_wgmma(const char* file = __builtin_FILE(),
                                   int line = __builtin_LINE()) {
  if (emulation::reach(file, line)) emulation::fence_writes();
}
inline void copy_box(void* shared, const CUtensorMap* map, int x, int y, int z, int w,
                     uint64_t* barrier) {
  const int at[4]{x, y, z, w};
  emulation::start_box(shared, *map, at, 4, barrier);
}
inline void copy_box(void* shared, const CUtensorMap* map, int x, int y, int z, int w, int v,
                     uint64_t* barrier) {
  const int at[5]{x, y, z, w, v};
  emulation::start_box(shared, *map, at, 5, barrier);
}

template <int kRegisters>
void give_registers() {}
template <int kRegisters>
void take_registers() {}

// ---- wgmma

inline void wgmma_fence(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  if (emulation::reach(file, line)) emulation::fence_registers();
}
inline void wgmma_commit() { emulation::commit_products(); }
template <int kGroups>
void wgmma_wait(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  if (emulation::reach(file, line)) emulation::wait_for_products(kGroups);
}
template <int kTiles>
void keep_in_order(float (&)[kTiles][4]) {}

// The place in shared memory, and from one panel to the next.
inline uint64_t wgmma_matrix(const void* shared, int panel_bytes) {
  const auto at = static_cast<const unsigned char*>(shared) - shared_memory();
  return uint64_t(panel_bytes) << 32 | uint64_t(at);
}
inline uint64_t wgmma_matrix_anew(uint64_t matrix) { return matrix; }
inline uint64_t wgmma_matrix_behind(uint64_t matrix, int bytes) { return matrix + uint32_t(bytes); }
template <class T, int kColumns>
void wgmma_shared(float (&d)[kColumns / 8][4], uint64_t a, uint64_t b, bool add) {
  emulation::start_product(emulation::compute_product<T, kColumns, false>, d[0], nullptr, a, b,
                           add);
}
template <class T, int kColumns>
void wgmma_first(float (&d)[kColumns / 8][4], uint64_t a, uint64_t b) {
  wgmma_shared<T, kColumns>(d, a, b, false);
}
template <class T, int kColumns>
void wgmma_registers(float (&d)[kColumns / 8][4], const uint32_t (&a)[4], uint64_t b) {
  emulation::start_product(emulation::compute_product<T, kColumns, true>, d[0], a, 0, b, true);
}

}  // namespace cuda
}  // namespace gemma2
