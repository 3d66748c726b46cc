// The CUDA side of a binding: an op's function is registered for both devices, does the same checks
// for both, and hands its parameters to a launcher where the tensors are on a GPU.
#pragma once
#include "common.h"

#ifdef GEMMA2_WITH_CUDA
#include <torch/csrc/stable/accelerator.h>

#include "../cuda/kernels.h"
#endif

namespace gemma2 {

#ifdef GEMMA2_WITH_CUDA

// Calls launch(parameters, stream) on like's device and torch's current stream of it.
template <class Params>
void run_on_cuda(const Tensor& like, void (*launch)(const Params&, cudaStream_t), const Params& p) {
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
  launch(p, static_cast<cudaStream_t>(stream));
}

// implement(library) registers for both devices.
#define GEMMA2_REGISTER(implement)                                \
  STABLE_TORCH_LIBRARY_IMPL(gemma2_ext, CPU, m) { implement(m); } \
  STABLE_TORCH_LIBRARY_IMPL(gemma2_ext, CUDA, m) { implement(m); }

#else

#define GEMMA2_REGISTER(implement) \
  STABLE_TORCH_LIBRARY_IMPL(gemma2_ext, CPU, m) { implement(m); }

#endif

}  // namespace gemma2
