// The linear layer and the activations of fastdl._C.cpu.
#include "bindings.h"

namespace fastdl {
namespace {

void bias_activation(int dtype, uintptr_t input, uintptr_t bias, uintptr_t output, uintptr_t preactivation,
                     int64_t rows, int64_t columns, int kind, double parameter, int64_t context) {
  const char* name = "bias_activation";
  check_dtype(name, dtype);
  check_kind(name, kind);
  check_size(name, "rows", rows);
  check_size(name, "columns", columns);
  int threads = threads_of(name, context);
  if (rows == 0 || columns == 0) return;
  check_address(name, "input", input);
  check_address(name, "output", output);
  kernels().activation_forward({dtype,
                                pointer(input),
                                pointer(bias),
                                pointer<void>(output),
                                pointer<void>(preactivation),
                                rows,
                                columns,
                                {kind, parameter},
                                threads});
}

void bias_activation_backward(int dtype, uintptr_t grad_output, uintptr_t saved, uintptr_t grad_preactivation,
                              uintptr_t grad_bias, int64_t rows, int64_t columns, int kind, double parameter,
                              uintptr_t /*workspace*/, int64_t context) {
  const char* name = "bias_activation_backward";
  check_dtype(name, dtype);
  check_kind(name, kind);
  check_size(name, "rows", rows);
  check_size(name, "columns", columns);
  int threads = threads_of(name, context);
  if (columns == 0) return;
  if (rows > 0) {
    check_address(name, "grad_output", grad_output);
    if (kind != none) check_address(name, "saved", saved);
  }
  kernels().activation_backward({dtype,
                                 pointer(grad_output),
                                 pointer(saved),
                                 pointer<void>(grad_preactivation),
                                 pointer<void>(grad_bias),
                                 rows,
                                 columns,
                                 {kind, parameter},
                                 threads});
}

void check_strides(const char* name, const char* argument, int64_t row_stride, int64_t column_stride) {
  if (row_stride != 1 && column_stride != 1) refuse(name, argument, row_stride, "1, or the other stride to be 1");
}

void linear(int dtype, uintptr_t input, int64_t input_row_stride, int64_t input_column_stride, uintptr_t weight,
            int64_t weight_row_stride, int64_t weight_column_stride, uintptr_t bias, uintptr_t output,
            uintptr_t preactivation, int64_t m, int64_t n, int64_t k, int kind, double parameter, int64_t context) {
  const char* name = "linear";
  check_dtype(name, dtype);
  check_kind(name, kind);
  check_size(name, "M", m);
  check_size(name, "N", n);
  check_size(name, "K", k);
  check_strides(name, "input_row_stride", input_row_stride, input_column_stride);
  check_strides(name, "weight_row_stride", weight_row_stride, weight_column_stride);
  int threads = threads_of(name, context);
  if (m == 0 || n == 0) return;
  check_address(name, "output", output);
  if (k > 0) {
    check_address(name, "input", input);
    check_address(name, "weight", weight);
  }
  kernels().linear({dtype,
                    pointer(input),
                    input_row_stride,
                    input_column_stride,
                    pointer(weight),
                    weight_row_stride,
                    weight_column_stride,
                    pointer(bias),
                    pointer<void>(output),
                    pointer<void>(preactivation),
                    m,
                    n,
                    k,
                    {kind, parameter},
                    threads});
}

}  // namespace

void bind_linear(py::module_& module) {
  module.def(
      "activation",
      [](int dtype, uintptr_t input, uintptr_t output, int64_t count, int kind, double parameter, int64_t context) {
        check_size("activation", "count", count);
        bias_activation(dtype, input, 0, output, 0, 1, count, kind, parameter, context);
      },
      py::arg("dtype"), py::arg("input"), py::arg("output"), py::arg("count"), py::arg("kind"), py::arg("parameter"),
      py::arg("context"), released(), "output[count] = activation(input[count]); output may be input.");
  module.def(
      "activation_backward",
      [](int dtype, uintptr_t grad_output, uintptr_t saved, uintptr_t grad_input, int64_t count, int kind,
         double parameter, int64_t context) {
        check_size("activation_backward", "count", count);
        if (count > 0) check_address("activation_backward", "grad_input", grad_input);
        bias_activation_backward(dtype, grad_output, saved, grad_input, 0, 1, count, kind, parameter, 0, context);
      },
      py::arg("dtype"), py::arg("grad_output"), py::arg("saved"), py::arg("grad_input"), py::arg("count"),
      py::arg("kind"), py::arg("parameter"), py::arg("context"), released(),
      "grad_input[count] = grad_output * activation'(saved); grad_input may be grad_output.");
  module.def("bias_activation", &bias_activation, py::arg("dtype"), py::arg("input"), py::arg("bias"),
             py::arg("output"), py::arg("preactivation"), py::arg("rows"), py::arg("columns"), py::arg("kind"),
             py::arg("parameter"), py::arg("context"), released(),
             "output[rows, columns] = activation(input + bias[columns]); the sum at preactivation unless 0.");
  module.def("bias_activation_backward", &bias_activation_backward, py::arg("dtype"), py::arg("grad_output"),
             py::arg("saved"), py::arg("grad_preactivation"), py::arg("grad_bias"), py::arg("rows"), py::arg("columns"),
             py::arg("kind"), py::arg("parameter"), py::arg("workspace"), py::arg("context"), released(),
             "grad_preactivation[rows, columns] = grad_output * activation'(saved) and grad_bias[columns], its column\n"
             "sums before rounding; each unless 0.");
  module.def(
      "bias_activation_backward_workspace", [](int64_t, int64_t) { return 0; }, py::arg("rows"), py::arg("columns"),
      "Bytes of workspace that bias_activation_backward needs: none here.");
  module.def("linear", &linear, py::arg("dtype"), py::arg("input"), py::arg("input_row_stride"),
             py::arg("input_column_stride"), py::arg("weight"), py::arg("weight_row_stride"),
             py::arg("weight_column_stride"), py::arg("bias"), py::arg("output"), py::arg("preactivation"),
             py::arg("M"), py::arg("N"), py::arg("K"), py::arg("kind"), py::arg("parameter"), py::arg("context"),
             released(),
             "output[M, N] = activation(input[M, K] @ weight[N, K]^T + bias[N]); the argument of the activation at\n"
             "preactivation unless 0. Strides in elements; each operand has one that is 1.");
}

}  // namespace fastdl
