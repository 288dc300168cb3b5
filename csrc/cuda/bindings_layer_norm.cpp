// Layer and RMS normalisation of fastdl._C.cuda.
#include "bindings.h"
#include "layer_norm.h"

namespace fastdl {

void bind_cuda_layer_norm(py::module_& module) {
  module.def(
      "layer_norm",
      [](int dtype, bool wide, int64_t rows, int64_t columns, Address input, Address residual, Address weight,
         Address bias, Address output, Address sum, Address mean, Address rstd, double eps, double dropout,
         Address seed, Address context) {
        cuda::layer_norm(dtype, wide, rows, columns, pointer(input), pointer(residual), pointer(weight), pointer(bias),
                         pointer(output), pointer(sum), pointer(mean), pointer(rstd), eps, dropout, pointer(seed),
                         stream(context));
      },
      released(), py::arg("dtype"), py::arg("wide"), py::arg("rows"), py::arg("columns"), py::arg("input"),
      py::arg("residual"), py::arg("weight"), py::arg("bias"), py::arg("output"), py::arg("sum"), py::arg("mean"),
      py::arg("rstd"), py::arg("eps"), py::arg("dropout"), py::arg("seed"), py::arg("context"),
      "sum = residual + dropout(input), output = (sum - mean) * rstd * weight + bias by row; mean is 0 for RMS "
      "normalisation, and sum where it is not wanted");

  module.def(
      "layer_norm_backward",
      [](int dtype, bool wide, int64_t rows, int64_t columns, Address grad_output, Address grad_sum, Address h,
         Address weight, Address mean, Address rstd, Address grad_input, Address grad_residual, Address grad_weight,
         Address grad_bias, double dropout, Address seed, Address workspace, Address context) {
        cuda::layer_norm_backward(dtype, wide, rows, columns, pointer(grad_output), pointer(grad_sum), pointer(h),
                                  pointer(weight), pointer(mean), pointer(rstd), pointer(grad_input),
                                  pointer(grad_residual), pointer(grad_weight), pointer(grad_bias), dropout,
                                  pointer(seed), pointer(workspace), stream(context));
      },
      released(), py::arg("dtype"), py::arg("wide"), py::arg("rows"), py::arg("columns"), py::arg("grad_output"),
      py::arg("grad_sum"), py::arg("h"), py::arg("weight"), py::arg("mean"), py::arg("rstd"), py::arg("grad_input"),
      py::arg("grad_residual"), py::arg("grad_weight"), py::arg("grad_bias"), py::arg("dropout"), py::arg("seed"),
      py::arg("workspace"), py::arg("context"), "the gradients whose address is not 0");

  module.def("layer_norm_backward_workspace", &cuda::layer_norm_backward_workspace, py::arg("dtype"), py::arg("rows"),
             py::arg("columns"), "bytes of workspace for the gradients of weight and bias");

  module.def(
      "layer_norm_plan",
      [](int full, int64_t columns, int most_kept) {
        const auto plan = cuda::layer_norm_plan(full, columns, most_kept);
        py::dict result;
        result["width"] = plan.width;
        result["kept"] = plan.kept;
        result["threads"] = plan.threads;
        result["block_rows"] = plan.block_rows;
        return result;
      },
      py::arg("full"), py::arg("columns"), py::arg("most_kept"),
      "how the kernels go over rows, with vectors of up to `full` elements");
}

}  // namespace fastdl
