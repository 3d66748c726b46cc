// The Python module _C: facts about the build and the choice of instruction set. Ops are torch ops,
// never functions here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#ifdef __GLIBC__
#include <malloc.h>
#endif

#include <algorithm>

#include "calls.h"
#include "cpu/isa.h"
#include "probe.h"
#ifdef GEMMA2_WITH_CUDA
#include "cuda/kernels.h"
#endif

namespace {

// All calls in turn, without the interpreter's lock; Ctrl-C is heard every few dozen.
void run(const gemma2::Calls& calls) {
  constexpr size_t kAtOnce = 32;
  for (size_t begin = 0; begin < calls.size(); begin += kAtOnce) {
    if (PyErr_CheckSignals()) throw pybind11::error_already_set();
    const pybind11::gil_scoped_release released;
    for (size_t i = begin; i < std::min(begin + kAtOnce, calls.size()); ++i) calls.run(i);
  }
}

// As a loop in Python each comparison would wait for memory alone.
bool hold(const pybind11::tuple& dicts, const pybind11::tuple& keys,
          const pybind11::tuple& values) {
  if (keys.size() != dicts.size() || values.size() != dicts.size())
    throw pybind11::value_error("hold: dicts, keys and values must be as many");
  for (size_t i = 0; i < dicts.size(); ++i) {
    const pybind11::handle dict = PyTuple_GET_ITEM(dicts.ptr(), i);
    PyObject* value = PyDict_GetItemWithError(dict.ptr(), PyTuple_GET_ITEM(keys.ptr(), i));
    if (!value && PyErr_Occurred()) throw pybind11::error_already_set();
    if (value != PyTuple_GET_ITEM(values.ptr(), i)) return false;
  }
  return true;
}

// No block is mapped on its own, as those of 32 MiB and more would be whatever the threshold: they
// went back when they were freed.
bool keep_freed_memory() {
#ifdef __GLIBC__
  return mallopt(M_TRIM_THRESHOLD, -1) && mallopt(M_MMAP_MAX, 0);
#else
  return false;
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  gemma2::cpu_isa();  // an unknown GEMMA2_EXT_CPU_ISA is an error of the import
  m.def("cpu_isa", &gemma2::cpu_isa, "The instruction set that the CPU kernels use.");
  m.def("is_zen4", &gemma2::is_zen4,
        "Whether few rows are read from memory as suits an AMD Zen 4.");
  m.def("set_zen4", &gemma2::set_zen4, pybind11::arg("zen4"),
        "Reads them so on another processor, or not on this one: results stay, times do not.");
  m.def("set_cpu_isa", &gemma2::set_cpu_isa, pybind11::arg("name"),
        "Chooses the CPU kernels' instruction set; ValueError where this machine lacks it.");
  m.def("supported_cpu_isas", &gemma2::supported_cpu_isas,
        "The instruction sets that were compiled and that this machine has, lowest first.");
  // Memory comes as addresses, so that this file needs no torch; `gemma2_ext.bench` calls these.
  m.def("probe_memory", &gemma2::probe_memory, pybind11::arg("a"), pybind11::arg("b"),
        pybind11::arg("out"), pybind11::arg("bytes"), pybind11::arg("threads"),
        pybind11::arg("fetch") = false, pybind11::call_guard<pybind11::gil_scoped_release>(),
        "Seconds to read `bytes` at a (and b, where not 0) and write as many at out (not 0), with "
        "what comes next fetched by instruction or by the processor alone.");
  m.def("probe_multiply", &gemma2::probe_multiply, pybind11::arg("dtype"), pybind11::arg("threads"),
        pybind11::arg("seconds"), pybind11::call_guard<pybind11::gil_scoped_release>(),
        "Operations a second of multiply-adds in registers; dtype: float32, bfloat16 or int8 (0 "
        "where there is no such instruction).");
  m.def("keep_freed_memory", &keep_freed_memory,
        "Has this process keep the memory that it frees, for the next tensors; false where the C "
        "library has no such setting.");
  m.def("hold", &hold, pybind11::arg("dicts"), pybind11::arg("keys"), pybind11::arg("values"),
        "Whether each dict holds this very value under its key.");
  pybind11::class_<gemma2::Calls>(m, "Calls",
                                  "Calls of `_out` ops on the CPU, to be made again as they were.")
      .def(pybind11::init<>())
      .def("record", &gemma2::Calls::record, "This thread's calls are added, until `stop`.")
      .def_static("stop", &gemma2::Calls::stop)
      .def("__len__", &gemma2::Calls::size)
      .def("run", &run, "Makes them in turn, without torch's dispatcher; errors are the ops'.");
#ifdef GEMMA2_WITH_CUDA
  m.def(
      "set_early_launches", [](bool on) { gemma2::early_launches = on; }, pybind11::arg("on"),
      "Whether CUDA kernels that this thread launches may start before those in front of them have "
      "ended, and read weights before that. Off at first; the caller sees to it that no kernel "
      "that "
      "may still run writes weights, key_lengths or inv_freq.");
#endif
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
