// Softmax of fastdl._C.cuda.
#include "bindings.h"
#include "softmax.h"

namespace fastdl {

void bind_cuda_softmax(py::module_& module) {
  module.def(
      "softmax",
      [](int dtype, int64_t outer, int64_t size, int64_t inner, Address input, Address output, bool log,
         Address context) {
        cuda::softmax(dtype, outer, size, inner, pointer(input), pointer(output), log, stream(context));
      },
      released(), py::arg("dtype"), py::arg("outer"), py::arg("size"), py::arg("inner"), py::arg("input"),
      py::arg("output"), py::arg("log"), py::arg("context"),
      "output = softmax of input[outer, size, inner] over its middle, or its logarithm");

  module.def(
      "softmax_backward",
      [](int dtype, int64_t outer, int64_t size, int64_t inner, Address grad_output, Address output, Address grad_input,
         bool log, Address context) {
        cuda::softmax_backward(dtype, outer, size, inner, pointer(grad_output), pointer(output), pointer(grad_input),
                               log, stream(context));
      },
      released(), py::arg("dtype"), py::arg("outer"), py::arg("size"), py::arg("inner"), py::arg("grad_output"),
      py::arg("output"), py::arg("grad_input"), py::arg("log"), py::arg("context"),
      "the gradient of input, from the output");
}

}  // namespace fastdl
