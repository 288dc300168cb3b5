// Batch normalisation of fastdl._C.cpu.
#include "bindings.h"

namespace fastdl {
namespace {

BatchNormShape checked_shape(const char* name, int64_t outer, int64_t channels, int64_t inner) {
  if (outer < 1) refuse(name, "outer", outer, "1 or more");
  if (channels < 1) refuse(name, "channels", channels, "1 or more");
  if (inner < 1) refuse(name, "inner", inner, "1 or more");
  return {outer, channels, inner};
}

void batch_norm(int dtype, int64_t outer, int64_t channels, int64_t inner, uintptr_t input, uintptr_t weight,
                uintptr_t bias, uintptr_t residual, uintptr_t output, uintptr_t mean, uintptr_t rstd,
                uintptr_t variance, double eps, int kind, double parameter, int64_t context) {
  const char* name = "batch_norm";
  check_dtype(name, dtype);
  check_kind(name, kind);
  BatchNormShape shape = checked_shape(name, outer, channels, inner);
  check_address(name, "input", input);
  check_address(name, "output", output);
  check_address(name, "mean", mean);
  check_address(name, "rstd", rstd);
  check_address(name, "variance", variance);
  kernels().batch_norm({dtype,
                        pointer(input),
                        pointer(weight),
                        pointer(bias),
                        pointer(residual),
                        nullptr,
                        nullptr,
                        pointer<void>(output),
                        pointer<void>(mean),
                        pointer<void>(rstd),
                        pointer<void>(variance),
                        shape,
                        eps,
                        {kind, parameter},
                        threads_of(name, context)});
}

void batch_norm_inference(int dtype, int64_t outer, int64_t channels, int64_t inner, uintptr_t input, uintptr_t weight,
                          uintptr_t bias, uintptr_t residual, uintptr_t mean, uintptr_t variance, uintptr_t output,
                          double eps, int kind, double parameter, int64_t context) {
  const char* name = "batch_norm_inference";
  check_dtype(name, dtype);
  check_kind(name, kind);
  BatchNormShape shape = checked_shape(name, outer, channels, inner);
  check_address(name, "input", input);
  check_address(name, "output", output);
  check_address(name, "mean", mean);
  check_address(name, "variance", variance);
  kernels().batch_norm({dtype,
                        pointer(input),
                        pointer(weight),
                        pointer(bias),
                        pointer(residual),
                        pointer(mean),
                        pointer(variance),
                        pointer<void>(output),
                        nullptr,
                        nullptr,
                        nullptr,
                        shape,
                        eps,
                        {kind, parameter},
                        threads_of(name, context)});
}

void batch_norm_statistics(int dtype, int64_t outer, int64_t channels, int64_t inner, uintptr_t input, uintptr_t mean,
                           uintptr_t squares, int64_t context) {
  const char* name = "batch_norm_statistics";
  check_dtype(name, dtype);
  BatchNormShape shape = checked_shape(name, outer, channels, inner);
  check_address(name, "input", input);
  check_address(name, "mean", mean);
  check_address(name, "squares", squares);
  kernels().batch_norm_statistics(
      {dtype, pointer(input), pointer<void>(mean), pointer<void>(squares), shape, threads_of(name, context)});
}

void batch_norm_backward(int dtype, int64_t outer, int64_t channels, int64_t inner, uintptr_t grad_output,
                         uintptr_t input, uintptr_t weight, uintptr_t bias, uintptr_t residual, uintptr_t output,
                         uintptr_t mean, uintptr_t rstd, uintptr_t grad_input, uintptr_t grad_weight,
                         uintptr_t grad_bias, uintptr_t grad_residual, bool training, int kind, double parameter,
                         int64_t context) {
  const char* name = "batch_norm_backward";
  check_dtype(name, dtype);
  check_kind(name, kind);
  BatchNormShape shape = checked_shape(name, outer, channels, inner);
  check_address(name, "grad_output", grad_output);
  check_address(name, "input", input);
  check_address(name, "mean", mean);
  check_address(name, "rstd", rstd);
  kernels().batch_norm_backward({dtype,
                                 pointer(grad_output),
                                 pointer(input),
                                 pointer(weight),
                                 pointer(bias),
                                 pointer(residual),
                                 pointer(output),
                                 pointer(mean),
                                 pointer(rstd),
                                 nullptr,
                                 nullptr,
                                 pointer<void>(grad_input),
                                 pointer<void>(grad_weight),
                                 pointer<void>(grad_bias),
                                 pointer<void>(grad_residual),
                                 shape,
                                 training,
                                 {kind, parameter},
                                 threads_of(name, context)});
}

void batch_norm_apply(int dtype, int64_t outer, int64_t channels, int64_t inner, uintptr_t grad_output, uintptr_t input,
                      uintptr_t weight, uintptr_t mean, uintptr_t rstd, uintptr_t mean_gradient, uintptr_t mean_product,
                      uintptr_t grad_input, int64_t context) {
  const char* name = "batch_norm_apply";
  check_dtype(name, dtype);
  BatchNormShape shape = checked_shape(name, outer, channels, inner);
  check_address(name, "grad_output", grad_output);
  check_address(name, "input", input);
  check_address(name, "mean", mean);
  check_address(name, "rstd", rstd);
  check_address(name, "mean_gradient", mean_gradient);
  check_address(name, "mean_product", mean_product);
  check_address(name, "grad_input", grad_input);
  kernels().batch_norm_backward({dtype,
                                 pointer(grad_output),
                                 pointer(input),
                                 pointer(weight),
                                 nullptr,
                                 nullptr,
                                 nullptr,
                                 pointer(mean),
                                 pointer(rstd),
                                 pointer(mean_gradient),
                                 pointer(mean_product),
                                 pointer<void>(grad_input),
                                 nullptr,
                                 nullptr,
                                 nullptr,
                                 shape,
                                 true,
                                 {none, 0},
                                 threads_of(name, context)});
}

}  // namespace

void bind_batch_norm(py::module_& module) {
  module.def(
      "batch_norm", &batch_norm, py::arg("dtype"), py::arg("outer"), py::arg("channels"), py::arg("inner"),
      py::arg("input"), py::arg("weight"), py::arg("bias"), py::arg("residual"), py::arg("output"), py::arg("mean"),
      py::arg("rstd"), py::arg("variance"), py::arg("eps"), py::arg("kind"), py::arg("parameter"), py::arg("context"),
      released(),
      "output = activation((input - mean) * rstd * weight + bias + residual) with input's own statistics, which\n"
      "are kept; variance is the unbiased one. weight, bias and residual may be 0.");
  module.def("batch_norm_inference", &batch_norm_inference, py::arg("dtype"), py::arg("outer"), py::arg("channels"),
             py::arg("inner"), py::arg("input"), py::arg("weight"), py::arg("bias"), py::arg("residual"),
             py::arg("mean"), py::arg("variance"), py::arg("output"), py::arg("eps"), py::arg("kind"),
             py::arg("parameter"), py::arg("context"), released(), "The same with given mean and variance.");
  module.def("batch_norm_statistics", &batch_norm_statistics, py::arg("dtype"), py::arg("outer"), py::arg("channels"),
             py::arg("inner"), py::arg("input"), py::arg("mean"), py::arg("squares"), py::arg("context"), released(),
             "Mean and sum of squared differences from it, by channel.");
  module.def("batch_norm_backward", &batch_norm_backward, py::arg("dtype"), py::arg("outer"), py::arg("channels"),
             py::arg("inner"), py::arg("grad_output"), py::arg("input"), py::arg("weight"), py::arg("bias"),
             py::arg("residual"), py::arg("output"), py::arg("mean"), py::arg("rstd"), py::arg("grad_input"),
             py::arg("grad_weight"), py::arg("grad_bias"), py::arg("grad_residual"), py::arg("training"),
             py::arg("kind"), py::arg("parameter"), py::arg("context"), released(),
             "The gradients whose address is not 0; the activation's from output unless 0, else computed again.");
  module.def("batch_norm_apply", &batch_norm_apply, py::arg("dtype"), py::arg("outer"), py::arg("channels"),
             py::arg("inner"), py::arg("grad_output"), py::arg("input"), py::arg("weight"), py::arg("mean"),
             py::arg("rstd"), py::arg("mean_gradient"), py::arg("mean_product"), py::arg("grad_input"),
             py::arg("context"), released(),
             "grad_input = rstd * weight * (grad_output - mean_gradient - (input - mean) * rstd * mean_product).");
}

}  // namespace fastdl
