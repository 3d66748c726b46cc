// The Python module _C: facts about the build and the choice of instruction set. Ops are torch ops,
// never functions here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/isa.h"

PYBIND11_MODULE(_C, m) {
  gemma2::cpu_isa();  // an unknown GEMMA2_EXT_CPU_ISA is an error of the import
  m.def("cpu_isa", &gemma2::cpu_isa, "The instruction set that the CPU kernels use.");
  m.def("set_cpu_isa", &gemma2::set_cpu_isa, pybind11::arg("name"),
        "Chooses the CPU kernels' instruction set; ValueError where this machine lacks it.");
  m.def("supported_cpu_isas", &gemma2::supported_cpu_isas,
        "The instruction sets that were compiled and that this machine has, lowest first.");
  m.def("build_info", [] {
    pybind11::dict info;
    info["built_with_torch"] = GEMMA2_BUILT_WITH_TORCH;
    info["compiler"] = __VERSION__;
#ifdef GEMMA2_WITH_CUDA
    info["cuda"] = true;
    info["cuda_version"] = GEMMA2_WITH_CUDA;
    info["cuda_architectures"] = GEMMA2_CUDA_ARCHS;
#else
    info["cuda"] = false;
#endif
    return info;
  });
}
