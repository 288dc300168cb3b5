// fastdl._C.cpu: chooses the instruction set.
#include "bindings.h"

#include <atomic>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#endif

namespace fastdl {
namespace {

#if defined(__x86_64__) && defined(FASTDL_ISA_AMX)
// The processor's bits, the operating system's, then Linux's permission to use the tile registers.
bool amx_ready() {
#if defined(__linux__)
  constexpr unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24, osxsave = 1u << 27, tile_state = 0x60000;
  constexpr int request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & osxsave)) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & amx_bf16) || !(d & amx_tile)) return false;
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & tile_state) == tile_state && syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}
#endif

// What was compiled and this processor and system can run, best first. __builtin_cpu_supports asks the system too.
std::vector<const Kernels*> find_available() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  bool has_avx512bf16 = has_avx512 && __builtin_cpu_supports("avx512bf16");
#if defined(FASTDL_ISA_AMX)
  if (has_avx512bf16 && amx_ready()) found.push_back(&amx::kernels);
#endif
#if defined(FASTDL_ISA_AVX512BF16)
  if (has_avx512bf16) found.push_back(&avx512bf16::kernels);
#endif
#if defined(FASTDL_ISA_AVX512)
  if (has_avx512) found.push_back(&avx512::kernels);
#endif
#if defined(FASTDL_ISA_AVX2)
  if (has_avx2) found.push_back(&avx2::kernels);
#endif
#endif
  found.push_back(&portable::kernels);
  return found;
}

const std::vector<const Kernels*>& available() {
  static const std::vector<const Kernels*> found = find_available();
  return found;
}

std::atomic<const Kernels*> chosen{nullptr};

void use(const std::string& name) {
  std::string names;
  for (const Kernels* candidate : available()) {
    if (name == candidate->name) {
      chosen = candidate;
      return;
    }
    names += std::string(names.empty() ? "" : ", ") + candidate->name;
  }
  throw std::invalid_argument("use: unknown or unavailable instruction set '" + name + "'; available: " + names);
}

// Fewer page faults in large fresh tensors; only advice, so failure does not matter.
void advise_huge_pages(uintptr_t address, int64_t bytes) {
  check_size("advise_huge_pages", "bytes", bytes);
#if defined(__linux__)
  uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  uintptr_t begin = (address + page - 1) / page * page, end = (address + static_cast<uintptr_t>(bytes)) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)address;
#endif
}

}  // namespace

const Kernels& kernels() { return *chosen.load(std::memory_order_relaxed); }

void bind_cpu(py::module_& module) {
  chosen = available().front();

  module.def("isa", [] { return kernels().name; }, "The instruction set in use.");
  module.def(
      "available",
      [] {
        std::vector<std::string> names;
        for (const Kernels* candidate : available()) names.push_back(candidate->name);
        return names;
      },
      "The instruction sets this machine can run, best first.");
  module.def("use", &use, py::arg("name"), "Choose the instruction set, for tests.");
  module.def("advise_huge_pages", &advise_huge_pages, py::arg("pointer"), py::arg("bytes"), released(),
             "Ask the system for huge pages in a large fresh tensor.");
  bind_attention(module);
  bind_conv(module);
  bind_batch_norm(module);
  bind_cross_entropy(module);
  bind_embedding(module);
  bind_dropout(module);
  bind_layer_norm(module);
  bind_linear(module);
  bind_pooling(module);
  bind_rnn(module);
  bind_softmax(module);
}

}  // namespace fastdl
