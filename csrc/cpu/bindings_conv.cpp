// Convolutions of fastdl._C.cpu, on tensors in NCHW.
#include "bindings.h"

namespace fastdl {
namespace {

void check_sizes(const char* name, std::initializer_list<std::pair<const char*, int64_t>> sizes) {
  for (auto [argument, size] : sizes)
    if (size < 1) refuse(name, argument, size, "1 or more");
}

void conv_1x1(int dtype, uintptr_t input, uintptr_t weight, int64_t weight_row_stride, int64_t weight_column_stride,
              uintptr_t bias, uintptr_t output, uintptr_t preactivation, int64_t images, int64_t channels,
              int64_t out_channels, int64_t pixels, int kind, double parameter, int64_t context) {
  const char* name = "conv_1x1";
  check_dtype(name, dtype);
  check_kind(name, kind);
  check_sizes(name, {{"images", images}, {"channels", channels}, {"out_channels", out_channels}, {"pixels", pixels}});
  if (weight_row_stride != 1 && weight_column_stride != 1)
    refuse(name, "weight_row_stride", weight_row_stride, "1, or the other stride to be 1");
  check_address(name, "input", input);
  check_address(name, "weight", weight);
  check_address(name, "output", output);
  kernels().conv_1x1({dtype,
                      pointer(input),
                      pointer(weight),
                      weight_row_stride,
                      weight_column_stride,
                      pointer(bias),
                      pointer<void>(output),
                      pointer<void>(preactivation),
                      images,
                      channels,
                      out_channels,
                      pixels,
                      {kind, parameter},
                      threads_of(name, context)});
}

void conv_1x1_weight_gradient(int dtype, uintptr_t grad_output, uintptr_t input, uintptr_t grad_weight, int64_t images,
                              int64_t channels, int64_t out_channels, int64_t pixels, int64_t context) {
  const char* name = "conv_1x1_weight_gradient";
  check_dtype(name, dtype);
  check_sizes(name, {{"images", images}, {"channels", channels}, {"out_channels", out_channels}, {"pixels", pixels}});
  check_address(name, "grad_output", grad_output);
  check_address(name, "input", input);
  check_address(name, "grad_weight", grad_weight);
  kernels().conv_1x1_weight_gradient({dtype, pointer(grad_output), pointer(input), pointer<void>(grad_weight), images,
                                      channels, out_channels, pixels, threads_of(name, context)});
}

using Pair = std::pair<int64_t, int64_t>;  // of height and width

DepthwiseArguments depthwise_arguments(const char* name, int dtype, uintptr_t input, uintptr_t weight, uintptr_t bias,
                                       uintptr_t output, uintptr_t preactivation, int64_t images, int64_t channels,
                                       Pair size, Pair out_size, Pair kernel, Pair stride, Pair padding, Pair dilation,
                                       Pair upsample, bool flip, int kind, double parameter, int64_t context) {
  check_dtype(name, dtype);
  check_kind(name, kind);
  check_sizes(name, {{"images", images},
                     {"channels", channels},
                     {"height", size.first},
                     {"width", size.second},
                     {"out_height", out_size.first},
                     {"out_width", out_size.second},
                     {"kernel_height", kernel.first},
                     {"kernel_width", kernel.second},
                     {"stride_h", stride.first},
                     {"stride_w", stride.second},
                     {"dilation_h", dilation.first},
                     {"dilation_w", dilation.second},
                     {"upsample_h", upsample.first},
                     {"upsample_w", upsample.second}});
  check_address(name, "input", input);
  check_address(name, "weight", weight);
  check_address(name, "output", output);
  return {dtype,
          pointer(input),
          pointer(weight),
          pointer(bias),
          pointer<void>(output),
          pointer<void>(preactivation),
          images,
          channels,
          size.first,
          size.second,
          out_size.first,
          out_size.second,
          kernel.first,
          kernel.second,
          stride.first,
          stride.second,
          padding.first,
          padding.second,
          dilation.first,
          dilation.second,
          upsample.first,
          upsample.second,
          flip,
          {kind, parameter},
          threads_of(name, context)};
}

void channel_gradient(int dtype, uintptr_t grad_output, uintptr_t saved, uintptr_t grad_input, uintptr_t grad_bias,
                      int64_t images, int64_t channels, int64_t pixels, int kind, double parameter, int64_t context) {
  const char* name = "channel_gradient";
  check_dtype(name, dtype);
  check_kind(name, kind);
  check_sizes(name, {{"images", images}, {"channels", channels}, {"pixels", pixels}});
  check_address(name, "grad_output", grad_output);
  if (kind != none) check_address(name, "saved", saved);
  kernels().channel_gradient({dtype,
                              pointer(grad_output),
                              pointer(saved),
                              pointer<void>(grad_input),
                              pointer<void>(grad_bias),
                              images,
                              channels,
                              pixels,
                              {kind, parameter},
                              threads_of(name, context)});
}

}  // namespace

void bind_conv(py::module_& module) {
  module.def("conv_1x1", &conv_1x1, py::arg("dtype"), py::arg("input"), py::arg("weight"), py::arg("weight_row_stride"),
             py::arg("weight_column_stride"), py::arg("bias"), py::arg("output"), py::arg("preactivation"),
             py::arg("images"), py::arg("channels"), py::arg("out_channels"), py::arg("pixels"), py::arg("kind"),
             py::arg("parameter"), py::arg("context"), released(),
             "output[images, out_channels, pixels] = activation(weight[out_channels, channels] @\n"
             "input[images, channels, pixels] + bias[out_channels]); the activation's argument at preactivation unless "
             "0.");
  module.def("conv_1x1_weight_gradient", &conv_1x1_weight_gradient, py::arg("dtype"), py::arg("grad_output"),
             py::arg("input"), py::arg("grad_weight"), py::arg("images"), py::arg("channels"), py::arg("out_channels"),
             py::arg("pixels"), py::arg("context"), released(),
             "grad_weight[out_channels, channels] = grad_output[images, out_channels, pixels] @ input^T, summed over "
             "images.");
  module.def(
      "depthwise",
      [](int dtype, uintptr_t input, uintptr_t weight, uintptr_t bias, uintptr_t output, uintptr_t preactivation,
         int64_t images, int64_t channels, Pair size, Pair out_size, Pair kernel, Pair stride, Pair padding,
         Pair dilation, Pair upsample, bool flip, int kind, double parameter, int64_t context) {
        kernels().depthwise(depthwise_arguments("depthwise", dtype, input, weight, bias, output, preactivation, images,
                                                channels, size, out_size, kernel, stride, padding, dilation, upsample,
                                                flip, kind, parameter, context));
      },
      py::arg("dtype"), py::arg("input"), py::arg("weight"), py::arg("bias"), py::arg("output"),
      py::arg("preactivation"), py::arg("images"), py::arg("channels"), py::arg("size"), py::arg("out_size"),
      py::arg("kernel"), py::arg("stride"), py::arg("padding"), py::arg("dilation"), py::arg("upsample"),
      py::arg("flip"), py::arg("kind"), py::arg("parameter"), py::arg("context"), released(),
      "A depthwise convolution, NCHW, of the input with upsample - 1 zeros between neighbours; with flip, stride 1 "
      "and\n"
      "upsample for stride, of the output's gradient, it is the input's. Padding may be negative.");
  module.def(
      "depthwise_weight_gradient",
      [](int dtype, uintptr_t grad_output, uintptr_t input, uintptr_t grad_weight, int64_t images, int64_t channels,
         Pair size, Pair out_size, Pair kernel, Pair stride, Pair padding, Pair dilation, int64_t context) {
        kernels().depthwise_weight_gradient(depthwise_arguments(
            "depthwise_weight_gradient", dtype, input, grad_output, 0, grad_weight, 0, images, channels, size, out_size,
            kernel, stride, padding, dilation, {1, 1}, false, none, 0, context));
      },
      py::arg("dtype"), py::arg("grad_output"), py::arg("input"), py::arg("grad_weight"), py::arg("images"),
      py::arg("channels"), py::arg("size"), py::arg("out_size"), py::arg("kernel"), py::arg("stride"),
      py::arg("padding"), py::arg("dilation"), py::arg("context"), released(),
      "The gradient of a depthwise convolution's weight, [channels, kernel].");
  module.def("channel_gradient", &channel_gradient, py::arg("dtype"), py::arg("grad_output"), py::arg("saved"),
             py::arg("grad_input"), py::arg("grad_bias"), py::arg("images"), py::arg("channels"), py::arg("pixels"),
             py::arg("kind"), py::arg("parameter"), py::arg("context"), released(),
             "grad_input[images, channels, pixels] = grad_output * activation'(saved) and grad_bias[channels], its\n"
             "sums before rounding; each unless 0.");
}

}  // namespace fastdl
