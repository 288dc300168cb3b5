// The pooling functions of fastdl._C.cpu.
#include <array>

#include "bindings.h"

namespace fastdl {
namespace {

using Pair = std::array<int64_t, 2>;

// The arguments that all directions share, checked; the mode, the addresses and the average's are the caller's.
PoolingArguments arguments(const char* name, int dtype, std::array<int64_t, 4> shape, Pair output, Pair kernel,
                           Pair stride, Pair padding, Pair dilation, bool channels_last, int64_t context) {
  check_dtype(name, dtype);
  for (int64_t size : shape) check_size(name, "shape", size);
  for (int64_t size : output) check_size(name, "output_size", size);
  for (int64_t size : kernel) check_size(name, "kernel_size", size);
  for (int i = 0; i < 2; i++) {
    if (stride[i] < 1) refuse(name, "stride", stride[i], "1 or more");
    if (dilation[i] < 1) refuse(name, "dilation", dilation[i], "1 or more");
    if (padding[i] < 0 || padding[i] > kernel[i] / 2)
      refuse(name, "padding", padding[i], "0 to half of the kernel's size");
  }
  PoolingArguments a{};
  a.dtype = dtype;
  a.batch = shape[0];
  a.channels = shape[1];
  a.rows = {shape[2], output[0], kernel[0], stride[0], padding[0], dilation[0]};
  a.columns = {shape[3], output[1], kernel[1], stride[1], padding[1], dilation[1]};
  a.channels_last = channels_last;
  a.threads = threads_of(name, context);
  return a;
}

void run(const char* name, const PoolingArguments& a) {
  const bool backward = a.mode == max_backward || a.mode == average_backward;
  const int64_t planes = a.batch * a.channels;
  if (planes * (backward ? a.rows.input * a.columns.input : a.rows.output * a.columns.output) == 0) return;
  check_address(name, backward ? "grad_input" : "output", reinterpret_cast<uintptr_t>(a.target));
  if (planes * (backward ? a.rows.output * a.columns.output : a.rows.input * a.columns.input) > 0)
    check_address(name, backward ? "grad_output" : "input", reinterpret_cast<uintptr_t>(a.source));
  kernels().pooling(a);
}

void check_codes(const char* name, uintptr_t indices, int64_t index_bytes, Pair kernel) {
  if (index_bytes != 0 && index_bytes != 1 && index_bytes != 8) refuse(name, "index_bytes", index_bytes, "0, 1 or 8");
  if (index_bytes == 1 && kernel[0] * kernel[1] > 256)
    refuse(name, "index_bytes", index_bytes, "8 for a window of more than 256 elements");
  if (index_bytes != 0) check_address(name, "indices", indices);
}

void max_pool2d(int dtype, uintptr_t input, uintptr_t output, uintptr_t indices, int64_t index_bytes,
                std::array<int64_t, 4> shape, Pair output_size, Pair kernel_size, Pair stride, Pair padding,
                Pair dilation, bool channels_last, int64_t context) {
  const char* name = "max_pool2d";
  auto a = arguments(name, dtype, shape, output_size, kernel_size, stride, padding, dilation, channels_last, context);
  check_codes(name, indices, index_bytes, kernel_size);
  a.mode = max_forward;
  a.source = pointer(input);
  a.target = pointer<void>(output);
  a.target_codes = pointer<void>(indices);
  a.code_bytes = index_bytes;
  run(name, a);
}

void max_pool2d_backward(int dtype, uintptr_t grad_output, uintptr_t indices, int64_t index_bytes, uintptr_t grad_input,
                         std::array<int64_t, 4> shape, Pair output_size, Pair kernel_size, Pair stride, Pair padding,
                         Pair dilation, bool channels_last, int64_t context) {
  const char* name = "max_pool2d_backward";
  auto a = arguments(name, dtype, shape, output_size, kernel_size, stride, padding, dilation, channels_last, context);
  check_codes(name, indices, index_bytes, kernel_size);
  if (index_bytes == 0) refuse(name, "index_bytes", index_bytes, "1 or 8");
  a.mode = max_backward;
  a.source = pointer(grad_output);
  a.source_codes = pointer(indices);
  a.target = pointer<void>(grad_input);
  a.code_bytes = index_bytes;
  run(name, a);
}

void average(const char* name, PoolingMode mode, int dtype, uintptr_t source, uintptr_t target,
             std::array<int64_t, 4> shape, Pair output_size, Pair kernel_size, Pair stride, Pair padding,
             bool count_include_pad, double divisor, bool channels_last, int64_t context) {
  auto a = arguments(name, dtype, shape, output_size, kernel_size, stride, padding, {1, 1}, channels_last, context);
  a.mode = mode;
  a.source = pointer(source);
  a.target = pointer<void>(target);
  a.count_include_pad = count_include_pad;
  a.divisor = divisor;
  run(name, a);
}

FractionalArguments fractional(const char* name, int dtype, int64_t planes, Pair input_size, Pair output_size,
                               int64_t context) {
  check_dtype(name, dtype);
  check_size(name, "planes", planes);
  for (int64_t size : input_size) check_size(name, "input_size", size);
  for (int64_t size : output_size) check_size(name, "output_size", size);
  FractionalArguments a{};
  a.dtype = dtype;
  a.planes = planes;
  a.height = input_size[0];
  a.width = input_size[1];
  a.output_height = output_size[0];
  a.output_width = output_size[1];
  a.threads = threads_of(name, context);
  return a;
}

void fractional_max_pool2d(int dtype, uintptr_t input, uintptr_t row_starts, uintptr_t column_starts, uintptr_t output,
                           uintptr_t indices, int64_t planes, Pair input_size, Pair output_size, Pair kernel_size,
                           int64_t context) {
  const char* name = "fractional_max_pool2d";
  auto a = fractional(name, dtype, planes, input_size, output_size, context);
  for (int64_t size : kernel_size)
    if (size < 1) refuse(name, "kernel_size", size, "1 or more");
  if (planes * output_size[0] * output_size[1] == 0) return;
  for (auto [argument, address] :
       {std::pair("input", input), std::pair("row_starts", row_starts), std::pair("column_starts", column_starts),
        std::pair("output", output), std::pair("indices", indices)})
    check_address(name, argument, address);
  a.input = pointer(input);
  a.row_starts = pointer<const int32_t>(row_starts);
  a.column_starts = pointer<const int32_t>(column_starts);
  a.output = pointer<void>(output);
  a.indices = pointer<int64_t>(indices);
  a.kernel_height = kernel_size[0];
  a.kernel_width = kernel_size[1];
  kernels().fractional_pooling(a);
}

void fractional_max_pool2d_backward(int dtype, uintptr_t grad_output, uintptr_t indices, uintptr_t grad_input,
                                    int64_t planes, Pair input_size, Pair output_size, int64_t context) {
  const char* name = "fractional_max_pool2d_backward";
  auto a = fractional(name, dtype, planes, input_size, output_size, context);
  if (planes * input_size[0] * input_size[1] == 0) return;
  if (output_size[0] * output_size[1] > 0) {
    check_address(name, "grad_output", grad_output);
    check_address(name, "indices", indices);
  }
  check_address(name, "grad_input", grad_input);
  a.input = pointer(grad_output);
  a.output = pointer<void>(grad_input);
  a.indices = pointer<int64_t>(indices);
  kernels().fractional_pooling_backward(a);
}

}  // namespace

void bind_pooling(py::module_& module) {
  module.def("max_pool2d", &max_pool2d, py::arg("dtype"), py::arg("input"), py::arg("output"), py::arg("indices"),
             py::arg("index_bytes"), py::arg("shape"), py::arg("output_size"), py::arg("kernel_size"),
             py::arg("stride"), py::arg("padding"), py::arg("dilation"), py::arg("channels_last"), py::arg("context"),
             released(),
             "Maxima of windows of input[shape]; indices: none (index_bytes 0), the place in the window (1) or in the\n"
             "plane (8). shape: (N, C, H, W), in memory with the channels last or not.");
  module.def("max_pool2d_backward", &max_pool2d_backward, py::arg("dtype"), py::arg("grad_output"), py::arg("indices"),
             py::arg("index_bytes"), py::arg("grad_input"), py::arg("shape"), py::arg("output_size"),
             py::arg("kernel_size"), py::arg("stride"), py::arg("padding"), py::arg("dilation"),
             py::arg("channels_last"), py::arg("context"), released(),
             "grad_input[shape]: the sum of the gradients of the windows whose maximum an element is.");
  for (auto [name, mode] :
       {std::pair("avg_pool2d", average_forward), std::pair("avg_pool2d_backward", average_backward)})
    module.def(
        name,
        [name = name, mode = mode](int dtype, uintptr_t source, uintptr_t target, std::array<int64_t, 4> shape,
                                   Pair output_size, Pair kernel_size, Pair stride, Pair padding,
                                   bool count_include_pad, double divisor, bool channels_last, int64_t context) {
          average(name, mode, dtype, source, target, shape, output_size, kernel_size, stride, padding,
                  count_include_pad, divisor, channels_last, context);
        },
        py::arg("dtype"), py::arg("source"), py::arg("target"), py::arg("shape"), py::arg("output_size"),
        py::arg("kernel_size"), py::arg("stride"), py::arg("padding"), py::arg("count_include_pad"), py::arg("divisor"),
        py::arg("channels_last"), py::arg("context"), released(),
        "Averages of windows, and the gradient; kernel_size (0, 0) is adaptive. divisor: of every window, or 0: its\n"
        "size. shape: the input's (N, C, H, W), in memory with the channels last or not.");
  module.def("fractional_max_pool2d", &fractional_max_pool2d, py::arg("dtype"), py::arg("input"), py::arg("row_starts"),
             py::arg("column_starts"), py::arg("output"), py::arg("indices"), py::arg("planes"), py::arg("input_size"),
             py::arg("output_size"), py::arg("kernel_size"), py::arg("context"), released(),
             "Maxima of the windows that start at row_starts[planes, height], column_starts[planes, width] (int32).");
  module.def("fractional_max_pool2d_backward", &fractional_max_pool2d_backward, py::arg("dtype"),
             py::arg("grad_output"), py::arg("indices"), py::arg("grad_input"), py::arg("planes"),
             py::arg("input_size"), py::arg("output_size"), py::arg("context"), released(),
             "grad_input[planes, input_size]: the sum of the gradients of the windows whose maximum an element is.");
}

}  // namespace fastdl
