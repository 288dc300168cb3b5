// What the bindings of every family share: checks of arguments, and the chosen table of kernels. Each family's
// functions are bound in a file of its own, bindings_NAME.cpp, by bind_NAME.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "kernels.h"

namespace fastdl {

namespace py = pybind11;
using released = py::call_guard<py::gil_scoped_release>;

const Kernels& kernels();  // of the instruction set in use

void bind_attention(py::module_& module);
void bind_conv(py::module_& module);
void bind_batch_norm(py::module_& module);
void bind_cross_entropy(py::module_& module);
void bind_embedding(py::module_& module);
void bind_dropout(py::module_& module);
void bind_layer_norm(py::module_& module);
void bind_linear(py::module_& module);
void bind_pooling(py::module_& module);
void bind_rnn(py::module_& module);
void bind_softmax(py::module_& module);

[[noreturn]] inline void refuse(const char* function, const char* argument, int64_t value, const char* expected) {
  throw std::invalid_argument(std::string(function) + ": " + argument + " is " + std::to_string(value) + ", expected " +
                              expected);
}
inline void check_dtype(const char* function, int dtype) {
  if (dtype < 0 || dtype >= dtype_count)
    refuse(function, "dtype", dtype, "0 (float32), 1 (bfloat16), 2 (float16) or 3 (float64)");
}
inline void check_kind(const char* function, int kind) {
  if (kind < 0 || kind >= kind_count) refuse(function, "kind", kind, "an activation from 0 to 8");
}
inline void check_size(const char* function, const char* argument, int64_t size) {
  if (size < 0) refuse(function, argument, size, "0 or more");
}
inline void check_address(const char* function, const char* argument, uintptr_t address) {
  if (address == 0) refuse(function, argument, 0, "an address");
}
inline void check_probability(const char* function, double p) {
  if (!(p >= 0 && p <= 1))
    throw std::invalid_argument(std::string(function) + ": the probability is " + std::to_string(p) +
                                ", expected 0 to 1");
}
inline int threads_of(const char* function, int64_t context) {
  if (context < 1 || context > 65536) refuse(function, "context", context, "a number of threads");
  return static_cast<int>(context);
}
template <class T = const void>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace fastdl
