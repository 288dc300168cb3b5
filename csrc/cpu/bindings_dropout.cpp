// Dropout of fastdl._C.cpu.
#include "bindings.h"

namespace fastdl {

void bind_dropout(py::module_& module) {
  module.def(
      "dropout",
      [](int dtype, uintptr_t input, uintptr_t output, int64_t count, double p, uint64_t seed, int64_t context) {
        const char* name = "dropout";
        check_dtype(name, dtype);
        check_address(name, "input", input);
        check_address(name, "output", output);
        check_size(name, "count", count);
        check_probability(name, p);
        kernels().dropout({dtype, pointer(input), pointer<void>(output), count, p, seed, threads_of(name, context)});
      },
      py::arg("dtype"), py::arg("input"), py::arg("output"), py::arg("count"), py::arg("p"), py::arg("seed"),
      py::arg("context"), released(), "output = input * factor, by element 0 with probability p, else 1 / (1 - p).");
}

}  // namespace fastdl
