// fastdl._C.cuda.
#include "bindings.h"

namespace fastdl {

void bind_cuda(py::module_& module) {
  bind_cuda_attention(module);
  bind_cuda_batch_norm(module);
  bind_cuda_conv(module);
  bind_cuda_cross_entropy(module);
  bind_cuda_embedding(module);
  bind_cuda_dropout(module);
  bind_cuda_layer_norm(module);
  bind_cuda_linear(module);
  bind_cuda_pooling(module);
  bind_cuda_rnn(module);
  bind_cuda_softmax(module);

  module.def("targets", &cuda::targets, "architectures with machine code in this build");
  module.def("version", &cuda::version, "of the CUDA toolkit that built this");
  module.def("device_count", &cuda::device_count, "0 where there is no driver");
}

}  // namespace fastdl
