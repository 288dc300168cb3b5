// Python's view of the CUDA kernels: addresses and the stream are ints, 0 means absent. Compiled by the host compiler.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "kernels.h"

namespace py = pybind11;
using Address = std::uintptr_t;

namespace {

void* pointer(Address address) { return reinterpret_cast<void*>(address); }
cudaStream_t stream(Address context) { return reinterpret_cast<cudaStream_t>(context); }

}  // namespace

namespace fastdl {

void bind_cuda(py::module_& module) {
  using release = py::call_guard<py::gil_scoped_release>;

  module.def(
      "activation",
      [](int dtype, Address input, Address output, int64_t count, int kind, double parameter, Address context) {
        cuda::activation(dtype, pointer(input), pointer(output), count, kind, parameter, stream(context));
      },
      release(), py::arg("dtype"), py::arg("input"), py::arg("output"), py::arg("count"), py::arg("kind"),
      py::arg("parameter"), py::arg("context"), "output = activation(input), both [count]");

  module.def(
      "activation_backward",
      [](int dtype, Address grad_output, Address saved, Address grad_input, int64_t count, int kind, double parameter,
         Address context) {
        cuda::activation_backward(dtype, pointer(grad_output), pointer(saved), pointer(grad_input), count, kind,
                                  parameter, stream(context));
      },
      release(), py::arg("dtype"), py::arg("grad_output"), py::arg("saved"), py::arg("grad_input"), py::arg("count"),
      py::arg("kind"), py::arg("parameter"), py::arg("context"),
      "grad_input = grad_output * activation'(saved), all [count]");

  module.def(
      "bias_activation",
      [](int dtype, Address input, Address bias, Address output, Address preactivation, int64_t rows, int64_t columns,
         int kind, double parameter, Address context) {
        cuda::bias_activation(dtype, pointer(input), pointer(bias), pointer(output), pointer(preactivation), rows,
                              columns, kind, parameter, stream(context));
      },
      release(), py::arg("dtype"), py::arg("input"), py::arg("bias"), py::arg("output"), py::arg("preactivation"),
      py::arg("rows"), py::arg("columns"), py::arg("kind"), py::arg("parameter"), py::arg("context"),
      "preactivation = input + bias; output = activation(preactivation); all [rows, columns], bias [columns]");

  module.def(
      "bias_activation_backward",
      [](int dtype, Address grad_output, Address saved, Address grad_preactivation, Address grad_bias, int64_t rows,
         int64_t columns, int kind, double parameter, Address workspace, Address context) {
        cuda::bias_activation_backward(dtype, pointer(grad_output), pointer(saved), pointer(grad_preactivation),
                                       pointer(grad_bias), rows, columns, kind, parameter, pointer(workspace),
                                       stream(context));
      },
      release(), py::arg("dtype"), py::arg("grad_output"), py::arg("saved"), py::arg("grad_preactivation"),
      py::arg("grad_bias"), py::arg("rows"), py::arg("columns"), py::arg("kind"), py::arg("parameter"),
      py::arg("workspace"), py::arg("context"),
      "grad_preactivation = grad_output * activation'(saved), all [rows, columns]; grad_bias = its column sums");

  module.def("bias_activation_backward_workspace", &cuda::bias_activation_backward_workspace, py::arg("rows"),
             py::arg("columns"), "bytes of workspace that bias_activation_backward needs");

  module.def("targets", &cuda::targets, "architectures with machine code in this build");
  module.def("version", &cuda::version, "of the CUDA toolkit that built this");
  module.def("device_count", &cuda::device_count, "0 where there is no driver");
}

}  // namespace fastdl
