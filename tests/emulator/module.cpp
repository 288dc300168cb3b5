// The module _emulated: the functions of fastdl._C.cuda, run by the emulator on CPU memory, and the emulator's
// settings.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <map>
#include <string>

#include "cuda_emu.h"
#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

namespace py = pybind11;

namespace fastdl {
void bind_cuda(py::module_& module);
}

namespace {

int choice(const std::string& value, const std::vector<std::string>& names) {
  const auto found = std::find(names.begin(), names.end(), value);
  if (found != names.end()) return int(found - names.begin());
  std::string message = "got " + value + ", expected one of";
  for (auto& name : names) message += " " + name;
  throw std::invalid_argument(message);
}

void configure(const std::string& schedule, const std::string& completion, uint64_t seed, int resident, bool proxy) {
  emu::Config config;
  config.schedule = emu::Schedule(choice(schedule, {"forward", "reverse", "random"}));
  config.async = emu::Async(choice(completion, {"early", "late", "random"}));
  config.seed = seed;
  config.resident = resident;
  config.proxy = proxy;
  emu::config = config;
}

std::map<std::string, uint64_t> statistics() {
  const emu::Stats& stats = emu::stats;
  return {{"blocks", stats.blocks},
          {"switches", stats.switches},
          {"barriers", stats.barriers},
          {"collectives", stats.collectives},
          {"mma", stats.mma},
          {"ldmatrix", stats.ldmatrix},
          {"ldmatrix_conflicts", stats.ldmatrix_conflicts},
          {"cp_async", stats.cp_async},
          {"wgmma", stats.wgmma},
          {"tma_load", stats.tma_load},
          {"tma_store", stats.tma_store}};
}

}  // namespace

PYBIND11_MODULE(_emulated, module) {
  module.doc() = "fastdl's CUDA kernels, emulated: addresses are of CPU memory, the stream is ignored.";
  fastdl::bind_cuda(module);
  module.def(
      "configure", &configure, py::kw_only(), py::arg("schedule") = "forward", py::arg("completion") = "late",
      py::arg("seed") = 1, py::arg("resident") = 1, py::arg("proxy") = true,
      "schedule: which thread runs next, forward, reverse or random. completion: when asynchronous copies and\n"
      "matrix operations complete, early (at issue), late (at the wait) or random. resident: blocks that run at\n"
      "the same time, 0 for all. proxy: under TSan, check fence.proxy.async too.");
  module.def("statistics", &statistics, "counts of what the emulator has done since it was loaded");
}
