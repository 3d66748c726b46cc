// Plain C functions around the launchers: emulated_<op>(parameters) gives the error's text, or
// null.
#include <exception>
#include <string>

#include "../../csrc/cuda/kernels.h"

#define GEMMA2_ENTRY(op, Params)                          \
  extern "C" const char* emulated_##op(const Params* p) { \
    static std::string error;                             \
    try {                                                 \
      launch_##op(*p, nullptr);                           \
      return nullptr;                                     \
    } catch (const std::exception& e) {                   \
      error = e.what();                                   \
      return error.c_str();                               \
    }                                                     \
  }

namespace gemma2 {
GEMMA2_CUDA_KERNELS(GEMMA2_ENTRY)
}

extern "C" int64_t emulated_attention_partial_size(const gemma2::AttentionParams* p) {
  return gemma2::attention_partial_size(*p);
}

extern "C" void emulated_early_launches(bool on) { gemma2::early_launches = on; }
