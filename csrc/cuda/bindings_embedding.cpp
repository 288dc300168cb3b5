// Embedding of fastdl._C.cuda.
#include "bindings.h"
#include "embedding.h"

namespace fastdl {
namespace {

const int64_t* integers(Address address) { return static_cast<const int64_t*>(pointer(address)); }

}  // namespace

void bind_cuda_embedding(py::module_& module) {
  module.def(
      "embedding",
      [](int dtype, Address weight, Address indices, Address output, int64_t count, int64_t rows, int64_t columns,
         Address context) {
        cuda::embedding(dtype, pointer(weight), integers(indices), pointer(output), count, rows, columns,
                        stream(context));
      },
      released(), py::arg("dtype"), py::arg("weight"), py::arg("indices"), py::arg("output"), py::arg("count"),
      py::arg("rows"), py::arg("columns"), py::arg("context"), "output[i] = weight[indices[i]]");

  module.def(
      "embedding_backward",
      [](int dtype, Address grad_output, Address index, Address order, Address scale, Address grad_weight,
         int64_t count, int64_t rows, int64_t columns, int64_t padding_idx, Address workspace, Address context) {
        cuda::embedding_backward(dtype, pointer(grad_output), integers(index), integers(order), pointer(scale),
                                 pointer(grad_weight), count, rows, columns, padding_idx, pointer(workspace),
                                 stream(context));
      },
      released(), py::arg("dtype"), py::arg("grad_output"), py::arg("index"), py::arg("order"), py::arg("scale"),
      py::arg("grad_weight"), py::arg("count"), py::arg("rows"), py::arg("columns"), py::arg("padding_idx"),
      py::arg("workspace"), py::arg("context"),
      "grad_weight[rows, columns], zeros before: the sums of the rows of grad_output[count, columns] by their sorted "
      "indices; order: their places");

  module.def("embedding_workspace", &cuda::embedding_workspace, py::arg("dtype"), py::arg("count"), py::arg("columns"),
             "bytes of workspace for embedding_backward");
}

}  // namespace fastdl
