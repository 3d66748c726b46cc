// Kernels that test the emulation itself: products of matrices, and mistakes that it must find.
#include <exception>
#include <string>

#include "../../csrc/cuda/launch.cuh"

namespace gemma2 {
namespace cuda {
namespace {

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

}  // namespace cuda
}  // namespace gemma2
