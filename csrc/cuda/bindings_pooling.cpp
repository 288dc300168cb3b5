// Max pooling of fastdl._C.cuda.
#include <array>

#include "bindings.h"

namespace fastdl {
namespace {

using Pair = std::array<int, 2>;

cuda::MaxWindows windows(Pair kernel, Pair stride, Pair padding, Pair dilation) {
  return {{kernel[0], kernel[1]}, {stride[0], stride[1]}, {padding[0], padding[1]}, {dilation[0], dilation[1]}};
}

}  // namespace

void bind_cuda_pooling(py::module_& module) {
  module.def(
      "max_pool2d",
      [](int dtype, Address input, Address output, Address indices, int index_bytes, std::array<int64_t, 4> shape,
         std::array<int64_t, 2> output_size, Pair kernel_size, Pair stride, Pair padding, Pair dilation,
         bool channels_last, Address context) {
        cuda::max_pool2d(dtype, pointer(input), pointer(output), pointer(indices), index_bytes, shape[0], shape[1],
                         shape[2], shape[3], output_size[0], output_size[1],
                         windows(kernel_size, stride, padding, dilation), channels_last, stream(context));
      },
      released(), py::arg("dtype"), py::arg("input"), py::arg("output"), py::arg("indices"), py::arg("index_bytes"),
      py::arg("shape"), py::arg("output_size"), py::arg("kernel_size"), py::arg("stride"), py::arg("padding"),
      py::arg("dilation"), py::arg("channels_last"), py::arg("context"),
      "maxima of windows of input[shape]; indices: none (index_bytes 0), the place in the window (1) or in the plane "
      "(8); shape: (N, C, H, W), in memory with the channels last or not");

  module.def(
      "max_pool2d_backward",
      [](int dtype, Address grad_output, Address indices, int index_bytes, Address grad_input,
         std::array<int64_t, 4> shape, std::array<int64_t, 2> output_size, Pair kernel_size, Pair stride, Pair padding,
         Pair dilation, bool channels_last, Address context) {
        cuda::max_pool2d_backward(dtype, pointer(grad_output), pointer(indices), index_bytes, pointer(grad_input),
                                  shape[0], shape[1], shape[2], shape[3], output_size[0], output_size[1],
                                  windows(kernel_size, stride, padding, dilation), channels_last, stream(context));
      },
      released(), py::arg("dtype"), py::arg("grad_output"), py::arg("indices"), py::arg("index_bytes"),
      py::arg("grad_input"), py::arg("shape"), py::arg("output_size"), py::arg("kernel_size"), py::arg("stride"),
      py::arg("padding"), py::arg("dilation"), py::arg("channels_last"), py::arg("context"),
      "grad_input[shape]: the sums of the gradients of the windows whose maximum an element is");
}

}  // namespace fastdl
