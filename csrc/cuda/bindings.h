// What the bindings of every family share: addresses and the stream are ints, 0 means absent. Each family's functions
// are bound in a file of its own, bindings_NAME.cpp, by bind_cuda_NAME. Compiled by the host compiler.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "kernels.h"

namespace fastdl {

namespace py = pybind11;
using Address = std::uintptr_t;
using released = py::call_guard<py::gil_scoped_release>;

inline void* pointer(Address address) { return reinterpret_cast<void*>(address); }
inline cudaStream_t stream(Address context) { return reinterpret_cast<cudaStream_t>(context); }

void bind_cuda_attention(py::module_& module);
void bind_cuda_batch_norm(py::module_& module);
void bind_cuda_conv(py::module_& module);
void bind_cuda_cross_entropy(py::module_& module);
void bind_cuda_embedding(py::module_& module);
void bind_cuda_dropout(py::module_& module);
void bind_cuda_layer_norm(py::module_& module);
void bind_cuda_linear(py::module_& module);
void bind_cuda_pooling(py::module_& module);
void bind_cuda_rnn(py::module_& module);
void bind_cuda_softmax(py::module_& module);

}  // namespace fastdl
