// The embedding functions of fastdl._C.cpu.
#include "bindings.h"

namespace fastdl {
namespace {

void check_index(int64_t bad, uintptr_t indices, int64_t rows) {
  if (bad < 0) return;
  throw std::out_of_range("embedding: index " + std::to_string(bad) + " of input is " +
                          std::to_string(pointer<const int64_t>(indices)[bad]) + ", allowed: 0 to " +
                          std::to_string(rows - 1));
}

void embedding(uintptr_t weight, uintptr_t indices, uintptr_t output, int64_t count, int64_t rows, int64_t row_bytes,
               int64_t context) {
  const char* name = "embedding";
  check_size(name, "count", count);
  check_size(name, "rows", rows);
  check_size(name, "row_bytes", row_bytes);
  check_address(name, "indices", indices);
  check_address(name, "output", output);
  int64_t bad = kernels().embedding({pointer(weight), pointer<const int64_t>(indices), pointer<void>(output), count,
                                     rows, row_bytes, threads_of(name, context)});
  check_index(bad, indices, rows);
}

void embedding_backward(int dtype, uintptr_t grad_output, uintptr_t indices, uintptr_t grad_weight, uintptr_t workspace,
                        int64_t count, int64_t rows, int64_t columns, int64_t padding_idx, bool scale_grad_by_freq,
                        int64_t context) {
  const char* name = "embedding_backward";
  check_dtype(name, dtype);
  check_size(name, "count", count);
  check_size(name, "rows", rows);
  check_size(name, "columns", columns);
  check_address(name, "grad_output", grad_output);
  check_address(name, "indices", indices);
  check_address(name, "grad_weight", grad_weight);
  check_address(name, "workspace", workspace);
  int64_t bad = kernels().embedding_backward({dtype, pointer(grad_output), pointer<const int64_t>(indices),
                                              pointer<void>(grad_weight), pointer<int64_t>(workspace), count, rows,
                                              columns, padding_idx, scale_grad_by_freq, threads_of(name, context)});
  check_index(bad, indices, rows);
}

}  // namespace

void bind_embedding(py::module_& module) {
  module.def("embedding", &embedding, py::arg("weight"), py::arg("indices"), py::arg("output"), py::arg("count"),
             py::arg("rows"), py::arg("row_bytes"), py::arg("context"), released(),
             "output[i] = weight[indices[i]], rows of row_bytes");
  module.def("embedding_backward", &embedding_backward, py::arg("dtype"), py::arg("grad_output"), py::arg("indices"),
             py::arg("grad_weight"), py::arg("workspace"), py::arg("count"), py::arg("rows"), py::arg("columns"),
             py::arg("padding_idx"), py::arg("scale_grad_by_freq"), py::arg("context"), released(),
             "grad_weight[rows, columns]: the sums of the rows of grad_output[count, columns] that have an index;\n"
             "workspace: rows + 1 + count integers of 64 bits");
}

}  // namespace fastdl
