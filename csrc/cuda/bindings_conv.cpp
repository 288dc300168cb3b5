// The convolution of fastdl._C.cuda. A tensor is a tuple of its address, sizes and strides.
#include <array>
#include <tuple>

#include "bindings.h"

namespace fastdl {
namespace {

using Pair = std::array<int64_t, 2>;
using Sizes = std::array<int64_t, 4>;
using Tensor = std::tuple<Address, Sizes, Sizes>;

cuda::Strided strided(const Tensor& tensor) {
  const auto& [address, sizes, strides] = tensor;
  return {pointer(address), sizes, strides};
}

}  // namespace

void bind_cuda_conv(py::module_& module) {
  module.def(
      "conv",
      [](int dtype, const Tensor& input, const Tensor& weight, Address bias, const Tensor& output,
         Address preactivation, Pair stride, Pair padding, Pair dilation, int64_t groups, int kind, double parameter,
         bool allow_tf32, Address workspace, Address context) {
        cuda::conv(dtype, strided(input), strided(weight), pointer(bias), strided(output), pointer(preactivation),
                   {stride, padding, dilation, groups}, kind, parameter, allow_tf32, pointer(workspace),
                   fastdl::stream(context));
      },
      released(), py::arg("dtype"), py::arg("input"), py::arg("weight"), py::arg("bias"), py::arg("output"),
      py::arg("preactivation"), py::arg("stride"), py::arg("padding"), py::arg("dilation"), py::arg("groups"),
      py::arg("kind"), py::arg("parameter"), py::arg("allow_tf32"), py::arg("workspace"), py::arg("context"),
      "preactivation = conv2d(input, weight) + bias; output = activation(preactivation), of the same strides");

  module.def(
      "conv_workspace",
      [](int dtype, const Tensor& input, const Tensor& weight, const Tensor& output, Pair stride, Pair padding,
         Pair dilation, int64_t groups, bool allow_tf32) {
        return cuda::conv_workspace(dtype, strided(input), strided(weight), strided(output),
                                    {stride, padding, dilation, groups}, allow_tf32);
      },
      py::arg("dtype"), py::arg("input"), py::arg("weight"), py::arg("output"), py::arg("stride"), py::arg("padding"),
      py::arg("dilation"), py::arg("groups"), py::arg("allow_tf32"), "bytes of workspace that conv needs");

  module.def(
      "conv_backward",
      [](int dtype, const Tensor& grad_output, const Tensor& input, const Tensor& weight, const Tensor& grad_input,
         const Tensor& grad_weight, Address grad_bias, Pair stride, Pair padding, Pair dilation, int64_t groups,
         bool allow_tf32, Address workspace, Address context) {
        cuda::conv_backward(dtype, strided(grad_output), strided(input), strided(weight), strided(grad_input),
                            strided(grad_weight), pointer(grad_bias), {stride, padding, dilation, groups}, allow_tf32,
                            pointer(workspace), fastdl::stream(context));
      },
      released(), py::arg("dtype"), py::arg("grad_output"), py::arg("input"), py::arg("weight"), py::arg("grad_input"),
      py::arg("grad_weight"), py::arg("grad_bias"), py::arg("stride"), py::arg("padding"), py::arg("dilation"),
      py::arg("groups"), py::arg("allow_tf32"), py::arg("workspace"), py::arg("context"),
      "the gradients of conv2d(input, weight) + bias; those with address 0 are left out");

  module.def(
      "conv_backward_workspace",
      [](int dtype, const Tensor& grad_output, const Tensor& input, const Tensor& weight, const Tensor& grad_input,
         const Tensor& grad_weight, Address grad_bias, Pair stride, Pair padding, Pair dilation, int64_t groups,
         bool allow_tf32) {
        return cuda::conv_backward_workspace(dtype, strided(grad_output), strided(input), strided(weight),
                                             strided(grad_input), strided(grad_weight), pointer(grad_bias),
                                             {stride, padding, dilation, groups}, allow_tf32);
      },
      py::arg("dtype"), py::arg("grad_output"), py::arg("input"), py::arg("weight"), py::arg("grad_input"),
      py::arg("grad_weight"), py::arg("grad_bias"), py::arg("stride"), py::arg("padding"), py::arg("dilation"),
      py::arg("groups"), py::arg("allow_tf32"), "bytes of workspace that conv_backward needs");
}

}  // namespace fastdl
