#include "value_error.h"

#include <pybind11/pybind11.h>

namespace gemma2 {

void throw_value_error(const char* message) { throw pybind11::value_error(message); }

}  // namespace gemma2
