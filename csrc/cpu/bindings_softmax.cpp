// The softmax functions of fastdl._C.cpu.
#include "bindings.h"

namespace fastdl {
namespace {

SoftmaxShape checked_shape(const char* name, int dtype, int64_t outer, int64_t size, int64_t inner) {
  check_dtype(name, dtype);
  if (outer < 1) refuse(name, "outer", outer, "1 or more");
  if (size < 1) refuse(name, "size", size, "1 or more");
  if (inner < 1) refuse(name, "inner", inner, "1 or more");
  return {outer, size, inner};
}

void softmax(int dtype, int64_t outer, int64_t size, int64_t inner, uintptr_t input, uintptr_t output, bool log,
             int64_t context) {
  const char* name = "softmax";
  SoftmaxShape shape = checked_shape(name, dtype, outer, size, inner);
  check_address(name, "input", input);
  check_address(name, "output", output);
  kernels().softmax({dtype, shape, pointer(input), pointer<void>(output), log, threads_of(name, context)});
}

void softmax_backward(int dtype, int64_t outer, int64_t size, int64_t inner, uintptr_t grad_output, uintptr_t output,
                      uintptr_t grad_input, bool log, int64_t context) {
  const char* name = "softmax_backward";
  SoftmaxShape shape = checked_shape(name, dtype, outer, size, inner);
  check_address(name, "grad_output", grad_output);
  check_address(name, "output", output);
  check_address(name, "grad_input", grad_input);
  kernels().softmax_backward(
      {dtype, shape, pointer(grad_output), pointer(output), pointer<void>(grad_input), log, threads_of(name, context)});
}

}  // namespace

void bind_softmax(py::module_& module) {
  module.def("softmax", &softmax, py::arg("dtype"), py::arg("outer"), py::arg("size"), py::arg("inner"),
             py::arg("input"), py::arg("output"), py::arg("log"), py::arg("context"), released(),
             "output = softmax of input[outer, size, inner] over its middle, or its logarithm");
  module.def("softmax_backward", &softmax_backward, py::arg("dtype"), py::arg("outer"), py::arg("size"),
             py::arg("inner"), py::arg("grad_output"), py::arg("output"), py::arg("grad_input"), py::arg("log"),
             py::arg("context"), released(), "the gradient of input, from the output");
}

}  // namespace fastdl
