// The only portability layer that kernels include: nvcc for a GPU or, with -DFDL_EMULATE, a host compiler for the
// tests.
#pragma once
#include <concepts>
#include <cstdint>
#include <map>
#include <mutex>
#include <source_location>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#ifdef FDL_EMULATE
#include "cuda_emu.h"
#ifndef FDL_ARCH
#define FDL_ARCH 900
#endif
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#ifdef __CUDA_ARCH__
#define FDL_ARCH __CUDA_ARCH__
#endif
#endif

// Shared memory, static and dynamic: FDL_SHARED(float, tile, [32][33]). A declaration promises its element's alignment
// and no more: cp.async and ldmatrix need FDL_SHARED_ALIGNED(16, ...). The emulator gives each block an exact,
// NaN-filled copy. Dynamic memory's declaration states a constant, the bytes that every launch gives it at least: the
// PTX keeps it, to tell how many blocks a multiprocessor holds.
#define FDL_SHARED(type, name, dimensions) FDL_SHARED_ALIGNED(alignof(type), type, name, dimensions)
#define FDL_DYN_SHARED(type, name, bytes) FDL_DYN_SHARED_ALIGNED(16, type, name, bytes)
#ifdef FDL_EMULATE
#define FDL_SHARED_ALIGNED(alignment, type, name, dimensions) \
  using name##_type = type dimensions;                        \
  name##_type& name = *::emu::shared_ref<name##_type>(alignment, FDL_SHARED_KEY)
#define FDL_SHARED_KEY            \
  []() -> const void* {           \
    static const char unique = 0; \
    return &unique;               \
  }()
#define FDL_DYN_SHARED_ALIGNED(alignment, type, name, bytes) \
  type* name = static_cast<type*>(::emu::dyn_shared(alignment, bytes))
#else
#define FDL_SHARED_ALIGNED(alignment, type, name, dimensions) \
  __shared__ __align__(alignment)                             \
  type name dimensions
#define FDL_DYN_SHARED_ALIGNED(alignment, type, name, bytes)          \
  extern __shared__ __align__(1024) unsigned char fdl_dynamic_smem[]; \
  asm volatile("// dynamic shared memory: %0 bytes" ::"n"(bytes));    \
  type* name = reinterpret_cast<type*>(fdl_dynamic_smem)
#endif

namespace fastdl::cuda {

using bfloat16 = __nv_bfloat16;
using float16 = __half;

// ---- Host: launches and errors --------------------------------------------------------------------------------------

// Most blocks that a grid-stride kernel is launched with: several waves on any GPU, few enough that start-up stays
// small. The emulator takes a handful, so that small tests go around the loops.
#ifdef FDL_EMULATE
constexpr int64_t kMaximumBlocks = 6;
#else
constexpr int64_t kMaximumBlocks = 8192;
#endif

template <class Integer>
constexpr Integer ceil_div(Integer dividend, Integer divisor) {
  return (dividend + divisor - 1) / divisor;
}

// Throws std::invalid_argument naming the function, the argument and its value.
template <class Value>
inline void require(bool ok, const char* function, const char* argument, const Value& value, const char* expected) {
  if (ok) return;
  std::ostringstream message;
  message << function << ": " << argument << " must be " << expected << ", got " << value;
  throw std::invalid_argument(message.str());
}

struct Shape {  // of a launch
  Shape(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
        std::source_location site = std::source_location::current())
      : grid(grid), block(block), shared_bytes(shared_bytes), stream(stream), site(site) {}
  dim3 grid, block;
  size_t shared_bytes;  // dynamic
  cudaStream_t stream;
  std::source_location site;
  dim3 cluster = dim3(1);
  bool cooperative = false;  // all blocks resident, so that they may wait for each other
};

#ifdef FDL_EMULATE

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const Shape& shape, Arguments... arguments) {
  ::emu::launch(
      shape.grid, shape.block, shape.shared_bytes, [&] { kernel(static_cast<Parameters>(arguments)...); },
      shape.cluster, shape.cooperative);
}

#else

[[noreturn]] inline void fail(cudaError_t status, const std::string& what, std::source_location site) {
  cudaGetLastError();  // not a sticky error: leave none behind for other users of the runtime
  std::ostringstream message;
  message << cudaGetErrorName(status) << " (" << cudaGetErrorString(status) << ") at " << site.file_name() << ":"
          << site.line() << " in " << what;
  throw std::runtime_error(message.str());
}

inline void check(cudaError_t status, const char* call, std::source_location site = std::source_location::current()) {
  if (status != cudaSuccess) fail(status, call, site);
}

// Asks for shared memory beyond the 48 KiB that every kernel may have: once a kernel and device, as it costs a
// microsecond.
inline void allow_shared_memory(const void* kernel, size_t bytes, std::source_location site) {
  static std::mutex mutex;
  static std::map<std::pair<int, const void*>, size_t> allowed;
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice", site);
  const std::lock_guard lock(mutex);
  size_t& most = allowed[{device, kernel}];
  if (bytes <= most) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)), "cudaFuncSetAttribute",
        site);
  most = bytes;
}

// Launches kernel(arguments...) on the shape's stream; throws std::runtime_error with the caller's file and line, the
// shape and the arguments if that fails.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const Shape& shape, Arguments... arguments) {
  if (shape.shared_bytes > 48 * 1024) {
    allow_shared_memory(reinterpret_cast<const void*>(kernel), shape.shared_bytes, shape.site);
  }
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = shape.stream;
  config.attrs = attributes;
  if (shape.cluster.x * shape.cluster.y * shape.cluster.z > 1) {
    auto& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = shape.cluster.x;
    attribute.val.clusterDim.y = shape.cluster.y;
    attribute.val.clusterDim.z = shape.cluster.z;
  }
  if (shape.cooperative) {
    auto& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  }
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  if (status == cudaSuccess) return;
  std::ostringstream what;
  what << "launch of grid (" << shape.grid.x << ", " << shape.grid.y << ", " << shape.grid.z << "), block ("
       << shape.block.x << ", " << shape.block.y << ", " << shape.block.z << "), " << shape.shared_bytes
       << " bytes of shared memory; arguments:";
  auto add = [&](const auto& argument) {
    using Argument = std::remove_cvref_t<decltype(argument)>;
    if constexpr (std::is_pointer_v<Argument>) what << " " << static_cast<const void*>(argument);
    if constexpr (std::is_arithmetic_v<Argument>) what << " " << argument;
  };
  (add(arguments), ...);
  fail(status, what.str(), shape.site);
}

#endif

// Calls function<T>() for a dtype code.
template <class Function>
void dispatch_dtype(const char* name, int dtype, const Function& function) {
  switch (dtype) {
    case 0:
      return function.template operator()<float>();
    case 1:
      return function.template operator()<bfloat16>();
    case 2:
      return function.template operator()<float16>();
    case 3:
      return function.template operator()<double>();
  }
  require(false, name, "dtype", dtype, "0 (float32), 1 (bfloat16), 2 (float16) or 3 (float64)");
}

// ---- Device: values and vectors -------------------------------------------------------------------------------------

// The type in which values stored as T are computed and summed.
template <class T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ double widen(double value) { return value; }
__device__ __forceinline__ float widen(bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float widen(float16 value) { return __half2float(value); }

// count values moved by one memory instruction.
template <class T, int count>
struct alignas(count * sizeof(T)) Vector {
  static_assert(count * sizeof(T) <= 16, "a thread moves at most 16 bytes at once");
  T element[count];
};

// Elements in a 16-byte vector. float64 is served one by one: it is there for exactness, and 8 bytes a thread coalesce.
template <class T>
constexpr int kFullVector = std::is_same_v<T, double> ? 1 : int(16 / sizeof(T));

template <int count, class T>
__device__ __forceinline__ Vector<T, count> load(const T* address) {
  return *reinterpret_cast<const Vector<T, count>*>(address);
}

// Rounds to nearest even.
template <class T, int count>
__device__ __forceinline__ Vector<T, count> round_to(const Compute<T> (&values)[count]) {
  Vector<T, count> vector;
  if constexpr (sizeof(T) == 2 && count % 2 == 0) {  // in pairs: one instruction converts two
#pragma unroll
    for (int i = 0; i < count; i += 2) {
      if constexpr (std::is_same_v<T, bfloat16>) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(values[i], values[i + 1]);
        vector.element[i] = pair.x;
        vector.element[i + 1] = pair.y;
      } else {
        const __half2 pair = __floats2half2_rn(values[i], values[i + 1]);
        vector.element[i] = pair.x;
        vector.element[i + 1] = pair.y;
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < count; ++i) vector.element[i] = T(values[i]);
  }
  return vector;
}

// Rounds and stores.
template <int count, class T>
__device__ __forceinline__ void store(T* address, const Compute<T> (&values)[count]) {
  *reinterpret_cast<Vector<T, count>*>(address) = round_to<T>(values);
}

// Whether every address (null counts as absent) allows vectors of the given number of bytes.
template <class... Pointers>
bool aligned(size_t bytes, const Pointers*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % bytes == 0) && ...);
}

}  // namespace fastdl::cuda
