// fastdl._C.cpu: chooses the instruction set, checks arguments, releases the interpreter lock.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#endif

namespace py = pybind11;

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

const Kernels& kernels() { return *chosen.load(std::memory_order_relaxed); }

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

[[noreturn]] void refuse(const char* function, const char* argument, int64_t value, const char* expected) {
  throw std::invalid_argument(std::string(function) + ": " + argument + " is " + std::to_string(value) + ", expected " +
                              expected);
}
void check_dtype(const char* function, int dtype) {
  if (dtype < 0 || dtype >= dtype_count)
    refuse(function, "dtype", dtype, "0 (float32), 1 (bfloat16), 2 (float16) or 3 (float64)");
}
void check_kind(const char* function, int kind) {
  if (kind < 0 || kind >= kind_count) refuse(function, "kind", kind, "an activation from 0 to 8");
}
void check_size(const char* function, const char* argument, int64_t size) {
  if (size < 0) refuse(function, argument, size, "0 or more");
}
void check_address(const char* function, const char* argument, uintptr_t address) {
  if (address == 0) refuse(function, argument, 0, "an address");
}
int threads_of(const char* function, int64_t context) {
  if (context < 1 || context > 65536) refuse(function, "context", context, "a number of threads");
  return static_cast<int>(context);
}
template <class T = const void>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void bias_activation(int dtype, uintptr_t input, uintptr_t bias, uintptr_t output, uintptr_t preactivation,
                     int64_t rows, int64_t columns, int kind, double parameter, int64_t context) {
  const char* name = "bias_activation";
  check_dtype(name, dtype);
  check_kind(name, kind);
  check_size(name, "rows", rows);
  check_size(name, "columns", columns);
  int threads = threads_of(name, context);
  if (rows == 0 || columns == 0) return;
  check_address(name, "input", input);
  check_address(name, "output", output);
  kernels().activation_forward({dtype,
                                pointer(input),
                                pointer(bias),
                                pointer<void>(output),
                                pointer<void>(preactivation),
                                rows,
                                columns,
                                {kind, parameter},
                                threads});
}

void bias_activation_backward(int dtype, uintptr_t grad_output, uintptr_t saved, uintptr_t grad_preactivation,
                              uintptr_t grad_bias, int64_t rows, int64_t columns, int kind, double parameter,
                              uintptr_t /*workspace*/, int64_t context) {
  const char* name = "bias_activation_backward";
  check_dtype(name, dtype);
  check_kind(name, kind);
  check_size(name, "rows", rows);
  check_size(name, "columns", columns);
  int threads = threads_of(name, context);
  if (columns == 0) return;
  if (rows > 0) {
    check_address(name, "grad_output", grad_output);
    if (kind != none) check_address(name, "saved", saved);
  }
  kernels().activation_backward({dtype,
                                 pointer(grad_output),
                                 pointer(saved),
                                 pointer<void>(grad_preactivation),
                                 pointer<void>(grad_bias),
                                 rows,
                                 columns,
                                 {kind, parameter},
                                 threads});
}

void check_strides(const char* name, const char* argument, int64_t row_stride, int64_t column_stride) {
  if (row_stride != 1 && column_stride != 1) refuse(name, argument, row_stride, "1, or the other stride to be 1");
}

void linear(int dtype, uintptr_t input, int64_t input_row_stride, int64_t input_column_stride, uintptr_t weight,
            int64_t weight_row_stride, int64_t weight_column_stride, uintptr_t bias, uintptr_t output,
            uintptr_t preactivation, int64_t m, int64_t n, int64_t k, int kind, double parameter, int64_t context) {
  const char* name = "linear";
  check_dtype(name, dtype);
  check_kind(name, kind);
  check_size(name, "M", m);
  check_size(name, "N", n);
  check_size(name, "K", k);
  check_strides(name, "input_row_stride", input_row_stride, input_column_stride);
  check_strides(name, "weight_row_stride", weight_row_stride, weight_column_stride);
  int threads = threads_of(name, context);
  if (m == 0 || n == 0) return;
  check_address(name, "output", output);
  if (k > 0) {
    check_address(name, "input", input);
    check_address(name, "weight", weight);
  }
  kernels().linear({dtype,
                    pointer(input),
                    input_row_stride,
                    input_column_stride,
                    pointer(weight),
                    weight_row_stride,
                    weight_column_stride,
                    pointer(bias),
                    pointer<void>(output),
                    pointer<void>(preactivation),
                    m,
                    n,
                    k,
                    {kind, parameter},
                    threads});
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

void bind_cpu(py::module_& module) {
  chosen = available().front();
  auto released = py::call_guard<py::gil_scoped_release>();

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
  module.def("advise_huge_pages", &advise_huge_pages, py::arg("pointer"), py::arg("bytes"), released,
             "Ask the system for huge pages in a large fresh tensor.");
  module.def(
      "activation",
      [](int dtype, uintptr_t input, uintptr_t output, int64_t count, int kind, double parameter, int64_t context) {
        check_size("activation", "count", count);
        bias_activation(dtype, input, 0, output, 0, 1, count, kind, parameter, context);
      },
      py::arg("dtype"), py::arg("input"), py::arg("output"), py::arg("count"), py::arg("kind"), py::arg("parameter"),
      py::arg("context"), released, "output[count] = activation(input[count]); output may be input.");
  module.def(
      "activation_backward",
      [](int dtype, uintptr_t grad_output, uintptr_t saved, uintptr_t grad_input, int64_t count, int kind,
         double parameter, int64_t context) {
        check_size("activation_backward", "count", count);
        if (count > 0) check_address("activation_backward", "grad_input", grad_input);
        bias_activation_backward(dtype, grad_output, saved, grad_input, 0, 1, count, kind, parameter, 0, context);
      },
      py::arg("dtype"), py::arg("grad_output"), py::arg("saved"), py::arg("grad_input"), py::arg("count"),
      py::arg("kind"), py::arg("parameter"), py::arg("context"), released,
      "grad_input[count] = grad_output * activation'(saved); grad_input may be grad_output.");
  module.def("bias_activation", &bias_activation, py::arg("dtype"), py::arg("input"), py::arg("bias"),
             py::arg("output"), py::arg("preactivation"), py::arg("rows"), py::arg("columns"), py::arg("kind"),
             py::arg("parameter"), py::arg("context"), released,
             "output[rows, columns] = activation(input + bias[columns]); the sum at preactivation unless 0.");
  module.def("bias_activation_backward", &bias_activation_backward, py::arg("dtype"), py::arg("grad_output"),
             py::arg("saved"), py::arg("grad_preactivation"), py::arg("grad_bias"), py::arg("rows"), py::arg("columns"),
             py::arg("kind"), py::arg("parameter"), py::arg("workspace"), py::arg("context"), released,
             "grad_preactivation[rows, columns] = grad_output * activation'(saved) and grad_bias[columns], its column\n"
             "sums before rounding; each unless 0.");
  module.def(
      "bias_activation_backward_workspace", [](int64_t, int64_t) { return 0; }, py::arg("rows"), py::arg("columns"),
      "Bytes of workspace that bias_activation_backward needs: none here.");
  module.def("linear", &linear, py::arg("dtype"), py::arg("input"), py::arg("input_row_stride"),
             py::arg("input_column_stride"), py::arg("weight"), py::arg("weight_row_stride"),
             py::arg("weight_column_stride"), py::arg("bias"), py::arg("output"), py::arg("preactivation"),
             py::arg("M"), py::arg("N"), py::arg("K"), py::arg("kind"), py::arg("parameter"), py::arg("context"),
             released,
             "output[M, N] = activation(input[M, K] @ weight[N, K]^T + bias[N]); the argument of the activation at\n"
             "preactivation unless 0. Strides in elements; each operand has one that is 1.");
}

}  // namespace fastdl
