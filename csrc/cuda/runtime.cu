// What this build holds and what this machine has.
#include "common.cuh"
#include "kernels.h"

namespace fastdl::cuda {

std::vector<std::string> targets() {
#ifdef FDL_EMULATE
  return {"emulated"};
#else
  std::vector<std::string> names;
  for (int architecture : {__CUDA_ARCH_LIST__}) names.push_back("sm_" + std::to_string(architecture / 10));
  return names;
#endif
}

std::string version() {
  return std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
}

int device_count() {
#ifdef FDL_EMULATE
  return 0;
#else
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError();
  return 0;
#endif
}

}  // namespace fastdl::cuda
