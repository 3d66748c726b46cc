// Kernels that test the emulation itself: products of matrices, and mistakes that it must find.
#include <exception>
#include <string>

#include "../../csrc/cuda/launch.cuh"
#include "../../csrc/cuda/tensor_map.cuh"
#include "../../csrc/cuda/wgmma.cuh"

namespace gemma2 {
namespace cuda {
namespace {

// What runs where, of the builds "80;90a;100;120", "80" and "90a".
constexpr int kAll[]{800, 900, 1000, 1200}, kOld[]{800}, kHopper[]{900};
static_assert(code_version(kAll, 80) == 80 && code_version(kAll, 89) == 80, "");
static_assert(code_version(kAll, 90) == 90 && code_version(kAll, 103) == 100, "");
static_assert(code_version(kAll, 110) == 100 && code_version(kAll, 121) == 120, "");
static_assert(code_version(kOld, 90) == 80 && code_version(kOld, 120) == 80, "");
static_assert(code_version(kHopper, 90) == 90 && code_version(kOld, 86) == 80, "");

// out (16, 8) = a (16, 16) b^T, b (8, 16), through shared memory, ldmatrix and mma.
template <class T>
__global__ void product_kernel(const T* a, const T* b, float* out, bool transposed) {
  T* shared = reinterpret_cast<T*>(shared_memory());
  const int lane = threadIdx.x;
  T* b_shared = shared + 16 * 16;
  for (int i = lane; i < 16 * 16 / 8; i += kWarpSize) cp_async<16>(shared + 8 * i, a + 8 * i, true);
  for (int i = lane; i < 16 * 8 / 8; i += kWarpSize)
    cp_async<16>(b_shared + 8 * i, b + 8 * i, true);
  cp_async_commit();
  cp_async_wait<0>();
  __syncwarp();
  uint32_t fa[4], fb[2];
  ldmatrix_x4(fa, shared + lane % 16 * 16 + lane / 16 * 8);
  if (transposed) {  // b is (16, 8)
    ldmatrix_x2_trans(fb, b_shared + lane % 16 * 8);
  } else {
    ldmatrix_x2(fb, b_shared + lane % 8 * 16 + lane / 8 % 2 * 8);
  }
  float d[4] = {};
  mma_m16n8k16<T>(d, fa, fb[0], fb[1]);
  for (int i = 0; i < 4; ++i) out[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
}

// Two warps. out[i] = what the other warp wrote, with a mistake by number.
__global__ void mistake_kernel(int mistake, const float* in, float* out) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const int thread = threadIdx.x, other = 63 - thread;
  if (mistake == 1) shared[64 + thread] = 0;         // behind the end
  if (mistake == 2 && thread == 0) __syncthreads();  // not all threads
  if (mistake == 3 && thread < 32) thread % 2 ? (void)shuffle(1, 0) : (void)ballot(true);
  if (mistake == 4 && thread < 16) shuffle_xor(1, 1);     // not all lanes
  if (mistake == 5) store_16(out + 1, Vector16{});        // not aligned
  if (mistake == 6) load_16(in + 64);                     // outside of the tensor
  if (mistake == 7) cp_async<16>(shared + 64, in, true);  // outside of shared memory
  cp_async<4>(shared + thread, in + thread, true);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  out[thread] = shared[other];
  if (mistake == 10) cp_async<4>(shared + thread, in + thread, true);  // not waited for
}

// Blocks of two warps in clusters. out[block][i] = what the next block of the cluster wrote, with a
// mistake by number.
__global__ void cluster_kernel(int mistake, int blocks, float* out) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const int thread = threadIdx.x, rank = int(blockIdx.x) % blocks;
  shared[thread] = 100 * float(blockIdx.x) + thread;
  if (mistake == 1 && rank == 0) return;
  cluster_barrier();
  const float* there = mistake == 3 ? out : shared + 63 - thread;
  float x[1];
  load_of_block(x, there, mistake == 2 ? blocks : (rank + 1) % blocks);
  if (mistake != 4) cluster_barrier();
  out[64 * blockIdx.x + thread] = x[0];
}

// A warpgroup: out (2, 64, 64) = a b^T and a b, both (64, 64) and brought by bulk copies, a of the
// second product in registers; with a mistake by number.
__global__ void wgmma_kernel(int mistake, const CUtensorMap a_map, const CUtensorMap b_map,
                             const BFloat16* a, float* out) {
  unsigned char* const shared = shared_memory();
  const int thread = threadIdx.x, lane = thread % kWarpSize;
  uint64_t* const full = reinterpret_cast<uint64_t*>(shared + 16384);
  if (mistake == 1) mbarrier_arrive(full);
  if (thread == 0) {
    mbarrier_init(full, 1);
    fence_mbarrier_init();
  }
  __syncthreads();
  if (thread == 0) {
    mbarrier_arrive_and_expect(full, 16384);
    if (mistake == 2) mbarrier_arrive(full), mbarrier_arrive(full);
    if (mistake == 9) store_16(shared, Vector16{});
    copy_box(shared + (mistake == 3 ? 64 : 0), &a_map, 0, 0, 0, 0, full);
    copy_box(shared + (mistake == 4 ? 16384 : 8192), &b_map, 0, 0, 0, 0, full);
  }
  if (mistake != 6) mbarrier_wait(full, 0);
  if (mistake == 7) store_16(shared + 16 * thread, load_16(shared + 16 * thread));
  if (mistake == 8) {
    cp_async<16>(shared + 16 * thread, a + 8 * thread, true);
    cp_async_commit();
    cp_async_wait<0>();
  }
  if (mistake == 6 || mistake == 4) return;
  float d[2][8][4] = {};
  const uint64_t a_matrix = wgmma_matrix(shared, 16), b_matrix = wgmma_matrix(shared + 8192, 16);
  if (mistake != 10) wgmma_fence();
  for (int step = 0; step < 4; ++step) {
    wgmma_shared<BFloat16, 64>(d[0], wgmma_matrix_behind(a_matrix, step * 32),
                               wgmma_matrix_behind(b_matrix, step * 32), step > 0);
  }
  wgmma_commit();
  uint32_t rows[4][4];
  const int row = thread / kWarpSize * 16 + lane / 4;
  for (int step = 0; step < 4; ++step) {
    for (int i = 0; i < 4; ++i) {
      const int column = step * 16 + i / 2 * 8 + lane % 4 * 2;
      rows[step][i] = load_4(a + (row + i % 2 * 8) * 64 + column);
    }
    wgmma_registers<BFloat16, 64>(d[1], rows[step], wgmma_matrix_behind(b_matrix, step * 2048));
  }
  wgmma_commit();
  if (mistake != 5) wgmma_wait<0>();
  for (int which = 0; which < 2; ++which) {
    for (int i = 0; i < 32; ++i) {
      const int column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      out[which * 4096 + (row + i % 4 / 2 * 8) * 64 + column] = d[which][i / 4][i % 4];
    }
  }
}

template <class F>
const char* caught(const F& f) {
  static std::string error;
  try {
    f();
    return nullptr;
  } catch (const std::exception& e) {
    error = e.what();
    return error.c_str();
  }
}

}  // namespace

extern "C" const char* probe_product(int dtype, const void* a, const void* b, float* out,
                                     bool transposed) {
  return caught([&] {
    dispatch_dtype("probe", DType(dtype), [&](auto t) {
      using T = decltype(t);
      if constexpr (sizeof(T) == 2) {
        launch("probe", product_kernel<T>, 1, kWarpSize, 1024, nullptr, static_cast<const T*>(a),
               static_cast<const T*>(b), out, transposed);
      }
    });
  });
}

extern "C" const char* probe_mistake(int mistake, const float* in, float* out) {
  return caught([&] {
    const int64_t bytes = mistake == 8 ? 100 << 10 : 256;
    launch("probe", mistake_kernel, 1, mistake == 9 ? 48 : 64, bytes, nullptr, mistake, in, out);
  });
}

extern "C" const char* probe_cluster(int mistake, int blocks, int grid, float* out) {
  return caught([&] {
    launch_clusters("probe", cluster_kernel, blocks, dim3(unsigned(grid)), 64, 256, nullptr,
                    mistake, blocks, out);
  });
}

// The rows of a and b from `rows` on are zeros to bulk copies.
extern "C" const char* probe_wgmma(int mistake, const void* a, const void* b, int rows,
                                   float* out) {
  return caught([&] {
    CUtensorMap maps[2];
    const TensorBox box{4, {64, rows, 1, 1}, {1, 64, 0, 0}, {64, 64, 1, 1}};
    for (int i = 0; i < 2; ++i) {
      if (!make_tensor_map(maps[i], DType::kBFloat16, i == 0 ? a : b, box))
        emulation::fail("no such map");
    }
    launch("probe", wgmma_kernel, 1, 128, 16384 + 8, nullptr, mistake, maps[0], maps[1],
           static_cast<const BFloat16*>(a), out);
  });
}

}  // namespace cuda
}  // namespace gemma2
