// Dropout of fastdl._C.cuda.
#include "bindings.h"
#include "dropout.h"

namespace fastdl {

void bind_cuda_dropout(py::module_& module) {
  module.def(
      "dropout",
      [](int dtype, Address input, Address output, int64_t count, double p, Address seed, Address context) {
        cuda::dropout(dtype, pointer(input), pointer(output), count, p, pointer(seed), stream(context));
      },
      released(), py::arg("dtype"), py::arg("input"), py::arg("output"), py::arg("count"), py::arg("p"),
      py::arg("seed"), py::arg("context"),
      "output = input * factor, by element 0 with probability p, else 1 / (1 - p)");
}

}  // namespace fastdl
