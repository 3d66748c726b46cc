// Tensors as Hopper's bulk copies see them: made on the host, given to the kernel as a parameter.
#pragma once
#ifdef __CUDACC__
#include <cuda.h>
#include <cuda_runtime.h>
#else
#include "emulation_wgmma.h"
#endif

#include "../params.h"

namespace gemma2 {
namespace cuda {

// A tensor of 16-bit elements, and the box that a copy takes; the innermost dimension comes first,
// its elements beside each other.
struct TensorBox {
  int rank;
  int64_t sizes[5], strides[5];  // elements; the first stride and those of single ones are not used
  int box[5];
};

#ifdef __CUDACC__

// The driver's function, by the runtime, so that nothing links to the driver; null where it is
// missing.
inline auto find_encode() -> decltype(&cuTensorMapEncodeTiled) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                             12000, cudaEnableDefault, &found);
#else
  const cudaError_t error =
      cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
  if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) {
    cudaGetLastError();
    return nullptr;
  }
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
}

// Returns false where a bulk copy cannot take these strides, or the driver has no such maps.
inline bool make_tensor_map(CUtensorMap& map, DType dtype, const void* data, const TensorBox& t) {
  static const auto function = find_encode();
  if (function == nullptr) return false;
  cuuint64_t sizes[5], strides[5];  // strides: bytes, from the second dimension on
  cuuint32_t box[5], steps[5];
  for (int i = 0; i < t.rank; ++i) {
    sizes[i] = cuuint64_t(t.sizes[i]), box[i] = cuuint32_t(t.box[i]), steps[i] = 1;
    // That of a single one is not used, but checked.
    if (i > 0) strides[i - 1] = t.sizes[i] == 1 ? 16 : cuuint64_t(t.strides[i]) * 2;
  }
  const CUtensorMapDataType type = dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                             : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  return function(&map, type, cuuint32_t(t.rank), const_cast<void*>(data), sizes, strides, box,
                  steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                  CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

#else

// With what cuTensorMapEncodeTiled refuses.
inline bool make_tensor_map(CUtensorMap& map, DType, const void* data, const TensorBox& t) {
  bool takes = reinterpret_cast<uintptr_t>(data) % 16 == 0 && t.box[0] == 64;
  map.data = static_cast<const unsigned char*>(data), map.rank = t.rank;
  for (int i = 0; i < t.rank; ++i) {
    const int64_t stride = i == 0 ? 2 : t.sizes[i] == 1 ? 16 : 2 * t.strides[i];
    takes = takes && t.sizes[i] > 0 && t.sizes[i] <= int64_t(1) << 32 && t.box[i] <= 256;
    takes = takes && (i == 0 || (stride % 16 == 0 && stride >= 0 && stride < int64_t(1) << 40));
    map.sizes[i] = t.sizes[i], map.strides[i] = stride, map.box[i] = t.box[i];
  }
  return takes;
}

#endif

}  // namespace cuda
}  // namespace gemma2
