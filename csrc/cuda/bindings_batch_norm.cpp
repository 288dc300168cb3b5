// Batch normalisation of fastdl._C.cuda.
#include "batch_norm.h"
#include "bindings.h"

namespace fastdl {

void bind_cuda_batch_norm(py::module_& module) {
  module.def(
      "batch_norm",
      [](int dtype, int64_t outer, int64_t channels, int64_t inner, Address input, Address weight, Address bias,
         Address residual, Address output, Address mean, Address rstd, Address variance, double eps, int kind,
         double parameter, Address workspace, Address context) {
        cuda::batch_norm(dtype, outer, channels, inner, pointer(input), pointer(weight), pointer(bias),
                         pointer(residual), pointer(output), pointer(mean), pointer(rstd), pointer(variance), eps, kind,
                         parameter, pointer(workspace), stream(context));
      },
      released(), py::arg("dtype"), py::arg("outer"), py::arg("channels"), py::arg("inner"), py::arg("input"),
      py::arg("weight"), py::arg("bias"), py::arg("residual"), py::arg("output"), py::arg("mean"), py::arg("rstd"),
      py::arg("variance"), py::arg("eps"), py::arg("kind"), py::arg("parameter"), py::arg("workspace"),
      py::arg("context"),
      "output = activation((input - mean) * rstd * weight + bias + residual), all [outer, channels, inner]; mean, rstd "
      "= 1 / sqrt(biased variance + eps) and unbiased variance of the input, [channels]");

  module.def(
      "batch_norm_inference",
      [](int dtype, int64_t outer, int64_t channels, int64_t inner, Address input, Address weight, Address bias,
         Address residual, Address mean, Address variance, Address output, double eps, int kind, double parameter,
         Address context) {
        cuda::batch_norm_inference(dtype, outer, channels, inner, pointer(input), pointer(weight), pointer(bias),
                                   pointer(residual), pointer(mean), pointer(variance), pointer(output), eps, kind,
                                   parameter, stream(context));
      },
      released(), py::arg("dtype"), py::arg("outer"), py::arg("channels"), py::arg("inner"), py::arg("input"),
      py::arg("weight"), py::arg("bias"), py::arg("residual"), py::arg("mean"), py::arg("variance"), py::arg("output"),
      py::arg("eps"), py::arg("kind"), py::arg("parameter"), py::arg("context"),
      "batch_norm with given mean and variance");

  module.def(
      "batch_norm_backward",
      [](int dtype, int64_t outer, int64_t channels, int64_t inner, Address grad_output, Address input, Address weight,
         Address bias, Address residual, Address output, Address mean, Address rstd, Address grad_input,
         Address grad_weight, Address grad_bias, Address grad_residual, bool training, int kind, double parameter,
         Address workspace, Address context) {
        cuda::batch_norm_backward(dtype, outer, channels, inner, pointer(grad_output), pointer(input), pointer(weight),
                                  pointer(bias), pointer(residual), pointer(output), pointer(mean), pointer(rstd),
                                  pointer(grad_input), pointer(grad_weight), pointer(grad_bias), pointer(grad_residual),
                                  training, kind, parameter, pointer(workspace), stream(context));
      },
      released(), py::arg("dtype"), py::arg("outer"), py::arg("channels"), py::arg("inner"), py::arg("grad_output"),
      py::arg("input"), py::arg("weight"), py::arg("bias"), py::arg("residual"), py::arg("output"), py::arg("mean"),
      py::arg("rstd"), py::arg("grad_input"), py::arg("grad_weight"), py::arg("grad_bias"), py::arg("grad_residual"),
      py::arg("training"), py::arg("kind"), py::arg("parameter"), py::arg("workspace"), py::arg("context"),
      "the gradients of batch_norm (training) or batch_norm_inference; 0 for those not needed");

  module.def(
      "batch_norm_statistics",
      [](int dtype, int64_t outer, int64_t channels, int64_t inner, Address input, Address mean, Address squares,
         Address workspace, Address context) {
        cuda::batch_norm_statistics(dtype, outer, channels, inner, pointer(input), pointer(mean), pointer(squares),
                                    pointer(workspace), stream(context));
      },
      released(), py::arg("dtype"), py::arg("outer"), py::arg("channels"), py::arg("inner"), py::arg("input"),
      py::arg("mean"), py::arg("squares"), py::arg("workspace"), py::arg("context"),
      "mean and sum of squared differences from it, [channels]");

  module.def(
      "batch_norm_apply",
      [](int dtype, int64_t outer, int64_t channels, int64_t inner, Address grad_preactivation, Address input,
         Address weight, Address mean, Address rstd, Address mean_gradient, Address mean_product, Address grad_input,
         Address context) {
        cuda::batch_norm_apply(dtype, outer, channels, inner, pointer(grad_preactivation), pointer(input),
                               pointer(weight), pointer(mean), pointer(rstd), pointer(mean_gradient),
                               pointer(mean_product), pointer(grad_input), stream(context));
      },
      released(), py::arg("dtype"), py::arg("outer"), py::arg("channels"), py::arg("inner"),
      py::arg("grad_preactivation"), py::arg("input"), py::arg("weight"), py::arg("mean"), py::arg("rstd"),
      py::arg("mean_gradient"), py::arg("mean_product"), py::arg("grad_input"), py::arg("context"),
      "grad_input = rstd * weight * (grad_preactivation - mean_gradient - (input - mean) * rstd * mean_product)");

  module.def("batch_norm_workspace", &cuda::batch_norm_workspace, py::arg("dtype"), py::arg("outer"),
             py::arg("channels"), py::arg("inner"),
             "bytes of workspace for batch_norm, batch_norm_backward and batch_norm_statistics");

  module.def(
      "batch_norm_plan",
      [](int full, int64_t outer, int64_t channels, int64_t inner, int operands) {
        const auto plan = cuda::batch_norm_plan(full, outer, channels, inner, operands);
        py::dict result;
        result["width"] = plan.width;
        result["lanes"] = plan.lanes;
        result["columns"] = plan.columns;
        result["column_stride"] = plan.column_stride;
        result["items"] = plan.items;
        result["row_items"] = plan.row_items;
        result["spread"] = plan.spread;
        result["block_columns"] = plan.block_columns;
        result["whole"] = plan.whole;
        return result;
      },
      py::arg("full"), py::arg("outer"), py::arg("channels"), py::arg("inner"), py::arg("operands"),
      "how the kernels go over an array, with vectors of up to `full` elements");

  module.def(
      "partition",
      [](int64_t column_blocks, int64_t items, int64_t step, int64_t most_blocks) {
        const auto result = cuda::partition(column_blocks, items, step, most_blocks);
        return py::make_tuple(result.parts, result.part);
      },
      py::arg("column_blocks"), py::arg("items"), py::arg("step"), py::arg("most_blocks"),
      "(parts, items of each) of a reduction");
}

}  // namespace fastdl
