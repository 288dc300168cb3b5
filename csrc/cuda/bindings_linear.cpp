// The linear layer and the activations of fastdl._C.cuda.
#include "bindings.h"
#include "matmul_sm90.h"
#include "tiles.h"

namespace fastdl {

void bind_cuda_linear(py::module_& module) {
  module.def(
      "activation",
      [](int dtype, Address input, Address output, int64_t count, int kind, double parameter, Address context) {
        cuda::activation(dtype, pointer(input), pointer(output), count, kind, parameter, stream(context));
      },
      released(), py::arg("dtype"), py::arg("input"), py::arg("output"), py::arg("count"), py::arg("kind"),
      py::arg("parameter"), py::arg("context"), "output = activation(input), both [count]");

  module.def(
      "activation_backward",
      [](int dtype, Address grad_output, Address saved, Address grad_input, int64_t count, int kind, double parameter,
         Address context) {
        cuda::activation_backward(dtype, pointer(grad_output), pointer(saved), pointer(grad_input), count, kind,
                                  parameter, stream(context));
      },
      released(), py::arg("dtype"), py::arg("grad_output"), py::arg("saved"), py::arg("grad_input"), py::arg("count"),
      py::arg("kind"), py::arg("parameter"), py::arg("context"),
      "grad_input = grad_output * activation'(saved), all [count]");

  module.def(
      "bias_activation",
      [](int dtype, Address input, Address bias, Address output, Address preactivation, int64_t rows, int64_t columns,
         int kind, double parameter, Address context) {
        cuda::bias_activation(dtype, pointer(input), pointer(bias), pointer(output), pointer(preactivation), rows,
                              columns, kind, parameter, stream(context));
      },
      released(), py::arg("dtype"), py::arg("input"), py::arg("bias"), py::arg("output"), py::arg("preactivation"),
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
      released(), py::arg("dtype"), py::arg("grad_output"), py::arg("saved"), py::arg("grad_preactivation"),
      py::arg("grad_bias"), py::arg("rows"), py::arg("columns"), py::arg("kind"), py::arg("parameter"),
      py::arg("workspace"), py::arg("context"),
      "grad_preactivation = grad_output * activation'(saved), all [rows, columns]; grad_bias = its column sums");

  module.def("bias_activation_backward_workspace", &cuda::bias_activation_backward_workspace, py::arg("rows"),
             py::arg("columns"), "bytes of workspace that bias_activation_backward needs");

  module.def(
      "linear",
      [](int dtype, Address input, int64_t input_row_stride, int64_t input_column_stride, Address weight,
         int64_t weight_row_stride, int64_t weight_column_stride, Address bias, Address output, Address preactivation,
         int64_t M, int64_t N, int64_t K, int kind, double parameter, bool allow_tf32, int path, Address context) {
        cuda::linear(dtype, pointer(input), input_row_stride, input_column_stride, pointer(weight), weight_row_stride,
                     weight_column_stride, pointer(bias), pointer(output), pointer(preactivation), M, N, K, kind,
                     parameter, allow_tf32, path, stream(context));
      },
      released(), py::arg("dtype"), py::arg("input"), py::arg("input_row_stride"), py::arg("input_column_stride"),
      py::arg("weight"), py::arg("weight_row_stride"), py::arg("weight_column_stride"), py::arg("bias"),
      py::arg("output"), py::arg("preactivation"), py::arg("M"), py::arg("N"), py::arg("K"), py::arg("kind"),
      py::arg("parameter"), py::arg("allow_tf32"), py::arg("path"), py::arg("context"),
      "preactivation[M, N] = input[M, K] @ weight[N, K]^T + bias[N]; output = activation(preactivation)");

  module.def(
      "linear_input_gradient",
      [](int dtype, Address grad_output, int64_t grad_row_stride, int64_t grad_column_stride, Address saved,
         Address weight, int64_t weight_row_stride, int64_t weight_column_stride, Address grad_input, int64_t M,
         int64_t N, int64_t K, int kind, double parameter, bool allow_tf32, Address workspace, Address context) {
        cuda::linear_input_gradient(dtype, pointer(grad_output), grad_row_stride, grad_column_stride, pointer(saved),
                                    pointer(weight), weight_row_stride, weight_column_stride, pointer(grad_input), M, N,
                                    K, kind, parameter, allow_tf32, pointer(workspace), stream(context));
      },
      released(), py::arg("dtype"), py::arg("grad_output"), py::arg("grad_row_stride"), py::arg("grad_column_stride"),
      py::arg("saved"), py::arg("weight"), py::arg("weight_row_stride"), py::arg("weight_column_stride"),
      py::arg("grad_input"), py::arg("M"), py::arg("N"), py::arg("K"), py::arg("kind"), py::arg("parameter"),
      py::arg("allow_tf32"), py::arg("workspace"), py::arg("context"),
      "grad_input[M, K] = (grad_output * activation'(saved))[M, N] @ weight[N, K]");

  module.def(
      "linear_weight_gradient",
      [](int dtype, Address grad_output, int64_t grad_row_stride, int64_t grad_column_stride, Address saved,
         Address input, int64_t input_row_stride, int64_t input_column_stride, Address grad_weight, Address grad_bias,
         int64_t M, int64_t N, int64_t K, int kind, double parameter, bool allow_tf32, bool deterministic,
         Address workspace, Address context) {
        cuda::linear_weight_gradient(dtype, pointer(grad_output), grad_row_stride, grad_column_stride, pointer(saved),
                                     pointer(input), input_row_stride, input_column_stride, pointer(grad_weight),
                                     pointer(grad_bias), M, N, K, kind, parameter, allow_tf32, deterministic,
                                     pointer(workspace), stream(context));
      },
      released(), py::arg("dtype"), py::arg("grad_output"), py::arg("grad_row_stride"), py::arg("grad_column_stride"),
      py::arg("saved"), py::arg("input"), py::arg("input_row_stride"), py::arg("input_column_stride"),
      py::arg("grad_weight"), py::arg("grad_bias"), py::arg("M"), py::arg("N"), py::arg("K"), py::arg("kind"),
      py::arg("parameter"), py::arg("allow_tf32"), py::arg("deterministic"), py::arg("workspace"), py::arg("context"),
      "dz = grad_output * activation'(saved), [M, N]; grad_weight[N, K] = dz^T @ input[M, K]; grad_bias[N] = its "
      "column sums");

  module.def("linear_workspace", &cuda::linear_workspace, py::arg("product"), py::arg("dtype"), py::arg("M"),
             py::arg("N"), py::arg("K"), py::arg("multiprocessors"), py::arg("deterministic"),
             "bytes of workspace for linear (product 0), its input's gradient (1), its weight's (2); multiprocessors: "
             "of the device, 0 for the current one's");
  module.attr("fused_gradient_elements") = cuda::fused_gradient_elements;

  module.def(
      "choose_plan",
      [](int arithmetic, int64_t rows, int64_t columns, int64_t depth, bool flexible, bool gradient, bool may_split,
         int multiprocessors, int shared_bytes, int64_t batch) {
        const auto plan = cuda::choose_plan(cuda::Arithmetic(arithmetic), rows, columns, depth, flexible, gradient,
                                            may_split, {multiprocessors, shared_bytes}, batch);
        const auto& tile = cuda::kTiles[int(plan.tile)];
        return py::make_tuple(tile.rows, tile.columns, plan.splits, plan.split_depth);
      },
      py::arg("arithmetic"), py::arg("rows"), py::arg("columns"), py::arg("depth"), py::arg("flexible"),
      py::arg("gradient"), py::arg("may_split"), py::arg("multiprocessors"), py::arg("shared_bytes"),
      py::arg("batch") = 1,
      "(tile rows, tile columns, splits, depth of a split) for a product; arithmetic: 0 half, 1 tf32, 2 float32, 3 "
      "float64");

  module.def(
      "hopper_supports",
      [](int dtype, Address input, int64_t input_row_stride, int64_t input_column_stride, Address weight,
         int64_t weight_row_stride, int64_t weight_column_stride, Address output, Address preactivation, int64_t M,
         int64_t N, int64_t K) {
        return cuda::hopper::supports(dtype, pointer(input), input_row_stride, input_column_stride, pointer(weight),
                                      weight_row_stride, weight_column_stride, pointer(output), pointer(preactivation),
                                      M, N, K);
      },
      py::arg("dtype"), py::arg("input"), py::arg("input_row_stride"), py::arg("input_column_stride"),
      py::arg("weight"), py::arg("weight_row_stride"), py::arg("weight_column_stride"), py::arg("output"),
      py::arg("preactivation"), py::arg("M"), py::arg("N"), py::arg("K"),
      "whether linear takes path 1 for these operands, on a GPU of compute capability 9.0");
}

}  // namespace fastdl
