// The Python module _C: facts about the build and the choice of instruction set. Ops are torch ops,
// never functions here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <stdexcept>
#include <string>

#include "cpu/isa.h"

PYBIND11_MODULE(_C, m) {
  gemma2::cpu_isa();  // an unknown GEMMA2_EXT_CPU_ISA is an error of the import
  m.def("cpu_isa", &gemma2::cpu_isa, "The instruction set that the CPU kernels use.");
  m.def("set_cpu_isa", &gemma2::set_cpu_isa, pybind11::arg("name"),
        "Chooses the CPU kernels' instruction set; ValueError where this machine lacks it.");
  m.def("supported_cpu_isas", &gemma2::supported_cpu_isas,
        "The instruction sets that were compiled and that this machine has, lowest first.");
  m.def(
      "probe",
      [](const std::string& name, uintptr_t address, int64_t size) {
        static const std::map<std::string, gemma2::Probe> probes{
            {"float32", gemma2::Probe::kFloat32},
            {"bfloat16", gemma2::Probe::kBFloat16},
            {"int8", gemma2::Probe::kInt8},
            {"read", gemma2::Probe::kRead}};
        const auto found = probes.find(name);
        if (found == probes.end())
          throw std::invalid_argument(
              "gemma2_ext: probe must be one of float32, bfloat16, int8, read, got '" + name + "'");
        double done = 0;
        pybind11::gil_scoped_release release;
        gemma2::cpu_kernels().probe_once(
            {found->second, reinterpret_cast<const void*>(address), size, size, &done}, 0, 1);
        return done;
      },
      pybind11::arg("name"), pybind11::arg("address"), pybind11::arg("size"),
      "One thread's work at full speed, without the GIL: \"float32\", \"bfloat16\" or \"int8\" "
      "multiplications and additions (size: loops; returns how many, 0 where the instruction set "
      "has none), or \"read\" of size bytes at address (returns size).");
  m.def("build_info", [] {
    pybind11::dict info;
    info["built_with_torch"] = GEMMA2_BUILT_WITH_TORCH;
    info["compiler"] = __VERSION__;
#ifdef GEMMA2_WITH_CUDA
    info["cuda"] = true;
#else
    info["cuda"] = false;
#endif
    return info;
  });
}
