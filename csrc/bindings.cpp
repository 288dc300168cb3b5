// The module fastdl._C: one submodule for each compiled backend, with the same functions on raw addresses.
#include <pybind11/pybind11.h>

namespace fastdl {
void bind_cpu(pybind11::module_& module);
void bind_cuda(pybind11::module_& module);
}  // namespace fastdl

PYBIND11_MODULE(_C, m) {
  m.doc() = "Kernels of fastdl on raw addresses; sizes and strides in elements.";
#ifdef FASTDL_CPU
  pybind11::module_ cpu = m.def_submodule("cpu", "Kernels for the CPU.");
  fastdl::bind_cpu(cpu);
#endif
#ifdef FASTDL_CUDA
  pybind11::module_ cuda = m.def_submodule("cuda", "Kernels for NVIDIA GPUs.");
  fastdl::bind_cuda(cuda);
#endif
}
