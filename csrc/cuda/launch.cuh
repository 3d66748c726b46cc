// How a launcher starts its kernel, what it may know of the device, and dispatch on dtypes.
#pragma once
#include <stdexcept>
#include <string>

#include "kernels.h"
#include "ptx.cuh"

namespace gemma2 {
namespace cuda {

// Of the current device.
struct DeviceProperties {
  int multiprocessors;
  int shared_bytes;  // that a block can ask for: 99 KiB on sm_86, 89 and 120, 163 on 80, 227 on 90
  int compute_capability;  // 10 * major + minor, of the code that runs there: see code_version
  int max_blocks;          // of a grid's x
  bool clusters;           // of up to 8 blocks with much shared memory
};

// Whether wgmma's kernels run there: all such chips have as much shared memory.
inline bool has_wgmma(const DeviceProperties& device) {
  return device.compute_capability == 90 && device.shared_bytes >= 227 << 10;
}

// What the code that runs on a device of this compute capability was compiled for. PTX of 80 runs
// on all later ones; there it has no clusters, no early launches and no wgmma: the functions and
// kernels that would use them are empty in it. versions: nvcc's, 10 times of what is compiled for,
// rising; those from 1000 on and the last have PTX.
template <int kCount>
constexpr int code_version(const int (&versions)[kCount], int capability) {
  int best = 80;  // the least that there is
  for (int i = 0; i < kCount; ++i) {
    const int version = versions[i] / 10;
    const bool runs = version <= capability &&
                      (version / 10 == capability / 10 || version >= 100 || i == kCount - 1);
    if (runs && version > best) best = version;
  }
  return best;
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Blocks that share a multiprocessor; a block takes 1 KiB of shared memory beside its own, and
// kernels are compiled for `registers` a thread at most.
inline int64_t resident_blocks(int64_t shared_bytes, int threads, int registers,
                               const DeviceProperties& device) {
  constexpr int64_t kReserved = 1 << 10, kRegisters = 64 << 10;
  const int64_t by_memory = (device.shared_bytes + kReserved) / (shared_bytes + kReserved);
  const int64_t by_registers = kRegisters / (threads * registers);
  const int64_t blocks = by_memory < by_registers ? by_memory : by_registers;
  return blocks < 1 ? 1 : blocks;
}

#ifdef __CUDACC__

inline void check(const char* op, cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // so that the next call does not report it again
  throw std::runtime_error(std::string("gemma2_ext::") + op +
                           ": CUDA: " + cudaGetErrorString(error));
}

inline const DeviceProperties& device_properties() {
  constexpr int kMaxDevices = 64;
  static DeviceProperties known[kMaxDevices];  // filled in twice at worst, with the same values
  int device = 0;
  check("device", cudaGetDevice(&device));
  if (device >= kMaxDevices) throw std::runtime_error("gemma2_ext: more than 64 CUDA devices");
  DeviceProperties& p = known[device];
  if (p.compute_capability == 0) {
    int major = 0, minor = 0;
    check("device",
          cudaDeviceGetAttribute(&p.multiprocessors, cudaDevAttrMultiProcessorCount, device));
    check("device",
          cudaDeviceGetAttribute(&p.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    check("device", cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
    check("device", cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    check("device", cudaDeviceGetAttribute(&p.max_blocks, cudaDevAttrMaxGridDimX, device));
    int clusters = 0;
    check("device", cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, device));
    constexpr int kVersions[] = {__CUDA_ARCH_LIST__};
    const int version = code_version(kVersions, 10 * major + minor);
    // Smaller chips have fewer multiprocessors in what a cluster has to fit into.
    p.clusters = clusters && version >= 90 && (major == 9 || major == 10);
    p.compute_capability = version;
  }
  return p;
}

template <class... Params>
void allow_shared_memory(const char* op, void (*kernel)(Params...), int64_t bytes) {
  constexpr int64_t kWithoutAsking = 48 << 10;
  if (bytes <= kWithoutAsking) return;
  check(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)));
}

// kernel<<<grid, threads, shared_bytes, stream>>>(args...), with its error as an exception.
template <class... Params, class... Args>
void launch(const char* op, void (*kernel)(Params...), dim3 grid, int threads, int64_t shared_bytes,
            cudaStream_t stream, const Args&... args) {
  allow_shared_memory(op, kernel, shared_bytes);
  kernel<<<grid, threads, shared_bytes, stream>>>(args...);
  check(op, cudaGetLastError());
}

inline bool starts_early();

// The same for a kernel in which every thread calls allow_next_kernel, and
// wait_for_previous_kernels before it touches anything but what kernels.h says is read early: where
// early_launches says so, it starts when every block of the kernel in front has called the former.
// Its launch, and its first weights' way, are then hidden behind that one.
//
// launch_clusters: in clusters of so many blocks along x, where the device has them.
template <class... Params, class... Args>
void launch_clusters(const char* op, void (*kernel)(Params...), int blocks_of_cluster, dim3 grid,
                     int threads, int64_t shared_bytes, cudaStream_t stream, const Args&... args) {
  allow_shared_memory(op, kernel, shared_bytes);
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  if (starts_early()) {
    cudaLaunchAttribute& early = attributes[config.numAttrs++];
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
  }
  if (blocks_of_cluster > 1) {
    cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = unsigned(blocks_of_cluster);
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  }
  check(op, cudaLaunchKernelEx(&config, kernel, args...));
}
template <class... Params, class... Args>
void launch_early(const char* op, void (*kernel)(Params...), dim3 grid, int threads,
                  int64_t shared_bytes, cudaStream_t stream, const Args&... args) {
  if (!starts_early()) return launch(op, kernel, grid, threads, shared_bytes, stream, args...);
  launch_clusters(op, kernel, 1, grid, threads, shared_bytes, stream, args...);
}

#else

inline const DeviceProperties& device_properties() {
  static DeviceProperties properties;
  properties.multiprocessors = emulation::settings().multiprocessors;
  properties.shared_bytes = emulation::settings().shared_bytes;
  properties.compute_capability = emulation::settings().compute_capability;
  properties.max_blocks = emulation::settings().max_blocks;
  const int capability = emulation::settings().compute_capability;
  properties.clusters = capability >= 90 && capability < 110;
  return properties;
}

template <class... Params, class... Args>
void launch(const char* op, void (*kernel)(Params...), dim3 grid, int threads, int64_t shared_bytes,
            cudaStream_t, const Args&... args) {
  emulation::launch(op, 1, grid, threads, shared_bytes, [&] { kernel(args...); });
}
template <class... Params, class... Args>
void launch_clusters(const char* op, void (*kernel)(Params...), int blocks_of_cluster, dim3 grid,
                     int threads, int64_t shared_bytes, cudaStream_t, const Args&... args) {
  emulation::launch(op, blocks_of_cluster, grid, threads, shared_bytes, [&] { kernel(args...); });
}
template <class... Params, class... Args>
void launch_early(const char* op, void (*kernel)(Params...), dim3 grid, int threads,
                  int64_t shared_bytes, cudaStream_t, const Args&... args) {
  emulation::launch(op, 1, grid, threads, shared_bytes, [&] { kernel(args...); });
}

#endif

// Whether launch_early does more than launch.
inline bool starts_early() {
  return early_launches && device_properties().compute_capability >= 90;
}

// f(value of the storage type) for a dtype.
template <class F>
void dispatch_dtype(const char* op, DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float{});
    case DType::kBFloat16:
      return f(BFloat16{});
    case DType::kFloat16:
      return f(Half{});
    default:
      throw std::invalid_argument(std::string("gemma2_ext::") + op +
                                  ": no CUDA kernel for dtype number " +
                                  std::to_string(int(dtype)));
  }
}

}  // namespace cuda
}  // namespace gemma2
