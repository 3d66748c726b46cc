#pragma once

namespace gemma2 {

// A pybind11::value_error, for files that cannot include pybind11.
[[noreturn]] void throw_value_error(const char* message);

}  // namespace gemma2
