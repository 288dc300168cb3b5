// Layer and RMS normalisation of fastdl._C.cpu.
#include "bindings.h"

namespace fastdl {
namespace {

void check_rows(const char* name, int64_t rows, int64_t columns) {
  if (rows < 1) refuse(name, "rows", rows, "1 or more");
  if (columns < 1) refuse(name, "columns", columns, "1 or more");
}

void layer_norm(int dtype, bool wide, int64_t rows, int64_t columns, uintptr_t input, uintptr_t residual,
                uintptr_t weight, uintptr_t bias, uintptr_t output, uintptr_t sum, uintptr_t mean, uintptr_t rstd,
                double eps, double dropout, uint64_t seed, int64_t context) {
  const char* name = "layer_norm";
  check_dtype(name, dtype);
  check_rows(name, rows, columns);
  check_address(name, "input", input);
  check_address(name, "output", output);
  check_address(name, "rstd", rstd);
  check_probability(name, dropout);
  kernels().layer_norm({dtype, wide, rows, columns, pointer(input), pointer(residual), pointer(weight), pointer(bias),
                        pointer<void>(output), pointer<void>(sum), pointer<void>(mean), pointer<void>(rstd), eps,
                        dropout, seed, threads_of(name, context)});
}

void layer_norm_backward(int dtype, bool wide, int64_t rows, int64_t columns, uintptr_t grad_output, uintptr_t grad_sum,
                         uintptr_t h, uintptr_t weight, uintptr_t mean, uintptr_t rstd, uintptr_t grad_input,
                         uintptr_t grad_residual, uintptr_t grad_weight, uintptr_t grad_bias, double dropout,
                         uint64_t seed, int64_t context) {
  const char* name = "layer_norm_backward";
  check_dtype(name, dtype);
  check_rows(name, rows, columns);
  check_address(name, "grad_output", grad_output);
  check_address(name, "h", h);
  check_address(name, "rstd", rstd);
  check_probability(name, dropout);
  kernels().layer_norm_backward({dtype, wide, rows, columns, pointer(grad_output), pointer(grad_sum), pointer(h),
                                 pointer(weight), pointer(mean), pointer(rstd), pointer<void>(grad_input),
                                 pointer<void>(grad_residual), pointer<void>(grad_weight), pointer<void>(grad_bias),
                                 dropout, seed, threads_of(name, context)});
}

}  // namespace

void bind_layer_norm(py::module_& module) {
  module.def("layer_norm", &layer_norm, py::arg("dtype"), py::arg("wide"), py::arg("rows"), py::arg("columns"),
             py::arg("input"), py::arg("residual"), py::arg("weight"), py::arg("bias"), py::arg("output"),
             py::arg("sum"), py::arg("mean"), py::arg("rstd"), py::arg("eps"), py::arg("dropout"), py::arg("seed"),
             py::arg("context"), released(),
             "sum = residual + dropout(input), output = (sum - mean) * rstd * weight + bias by row. mean is 0 for RMS\n"
             "normalisation; residual, weight, bias and sum may be 0.");
  module.def("layer_norm_backward", &layer_norm_backward, py::arg("dtype"), py::arg("wide"), py::arg("rows"),
             py::arg("columns"), py::arg("grad_output"), py::arg("grad_sum"), py::arg("h"), py::arg("weight"),
             py::arg("mean"), py::arg("rstd"), py::arg("grad_input"), py::arg("grad_residual"), py::arg("grad_weight"),
             py::arg("grad_bias"), py::arg("dropout"), py::arg("seed"), py::arg("context"), released(),
             "The gradients whose address is not 0.");
}

}  // namespace fastdl
