// How a launcher starts its kernel, what it may know of the device, and dispatch on dtypes.
#pragma once
#include <stdexcept>
#include <string>

#include "../params.h"
#include "ptx.cuh"

namespace gemma2 {
namespace cuda {

// Of the current device.
struct DeviceProperties {
  int multiprocessors;
  int shared_bytes;  // that a block can ask for: 99 KiB on sm_86, 89 and 120, 163 on 80, 227 on 90
  int compute_capability;  // 10 * major + minor
  int max_blocks;          // of a grid's x
};

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

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
    p.compute_capability = 10 * major + minor;
  }
  return p;
}

// kernel<<<grid, threads, shared_bytes, stream>>>(args...), with its error as an exception.
template <class... Params, class... Args>
void launch(const char* op, void (*kernel)(Params...), dim3 grid, int threads, int64_t shared_bytes,
            cudaStream_t stream, const Args&... args) {
  constexpr int64_t kWithoutAsking = 48 << 10;
  if (shared_bytes > kWithoutAsking) {
    check(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   int(shared_bytes)));
  }
  kernel<<<grid, threads, shared_bytes, stream>>>(args...);
  check(op, cudaGetLastError());
}

#else

inline const DeviceProperties& device_properties() {
  static DeviceProperties properties;
  properties.multiprocessors = emulation::settings().multiprocessors;
  properties.shared_bytes = emulation::settings().shared_bytes;
  properties.compute_capability = emulation::settings().compute_capability;
  properties.max_blocks = emulation::settings().max_blocks;
  return properties;
}

template <class... Params, class... Args>
void launch(const char* op, void (*kernel)(Params...), dim3 grid, int threads, int64_t shared_bytes,
            cudaStream_t, const Args&... args) {
  emulation::launch(op, grid, threads, shared_bytes, [&] { kernel(args...); });
}

#endif

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
