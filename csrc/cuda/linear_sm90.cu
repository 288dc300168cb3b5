// The linear layer's forward on Hopper: which plan, tensor maps, launch.
#include <algorithm>
#include <array>
#include <climits>
#include <cstring>

#include "kernels.h"
#include "matmul_sm90.cuh"
#include "matmul_sm90.h"

namespace fastdl::cuda::hopper {
namespace {

struct Device {
  int multiprocessors, capability;  // capability: 90 for 9.0
};

// The current device.
#ifdef FDL_EMULATE
Device device() { return {2, 90}; }  // so few that small tests give each block several tiles
#else
Device device() {
  thread_local int known = -1;
  thread_local Device properties;
  int current = 0;
  check(cudaGetDevice(&current), "cudaGetDevice");
  if (current != known) {
    auto get = [&](cudaDeviceAttr attribute) {
      int value = 0;
      check(cudaDeviceGetAttribute(&value, attribute, current), "cudaDeviceGetAttribute");
      return value;
    };
    properties = {get(cudaDevAttrMultiProcessorCount),
                  get(cudaDevAttrComputeCapabilityMajor) * 10 + get(cudaDevAttrComputeCapabilityMinor)};
    known = current;
  }
  return properties;
}
#endif

// Rows' distance; a single row may come with any.
int64_t pitch(int64_t rows, int64_t columns, int64_t stride) {
  return rows > 1 ? stride : ceil_div<int64_t>(columns, 8) * 8;
}

// The map of a row-major matrix. Layers call with the same addresses again and again, so each thread keeps the last
// few: a look-up costs less than the driver's encoding.
template <class T>
const CUtensorMap& matrix_map(const void* base, int64_t rows, int64_t columns, int64_t stride, int box_rows,
                              int box_columns) {
  struct Entry {
    std::array<int64_t, 6> key{};
    CUtensorMap map;
  };
  thread_local std::array<Entry, 256> entries;
  const std::array<int64_t, 6> key = {reinterpret_cast<int64_t>(base), rows, columns, stride, box_rows, box_columns};
  uint64_t hash = 0;
  for (const int64_t part : key) hash = (hash ^ uint64_t(part)) * 0x9e3779b97f4a7c15;
  Entry& entry = entries[hash >> 56];
  if (entry.key != key) {
    entry.map = tensor_map<T, 2>(static_cast<const T*>(base), {uint64_t(columns), uint64_t(rows)}, {uint64_t(stride)},
                                 {uint32_t(box_columns), uint32_t(box_rows)});
    entry.key = key;
  }
  return entry.map;
}

template <class T, class Plan>
void run(const T* input, int64_t input_row_stride, const T* weight, int64_t weight_row_stride,
         const Epilogue<T>& epilogue, int64_t K, int multiprocessors, cudaStream_t stream) {
  const int64_t M = epilogue.rows, N = epilogue.columns;
  const CUtensorMap input_map = matrix_map<T>(input, M, K, pitch(M, K, input_row_stride), Plan::kRows, Plan::kDepth);
  const CUtensorMap weight_map =
      matrix_map<T>(weight, N, K, pitch(N, K, weight_row_stride), Plan::kColumns / Plan::kCluster, Plan::kDepth);
  const CUtensorMap output_map = matrix_map<T>(epilogue.output, M, N, N, Plan::kBox, Plan::kBox);
  const CUtensorMap preactivation_map =
      epilogue.preactivation ? matrix_map<T>(epilogue.preactivation, M, N, N, Plan::kBox, Plan::kBox) : output_map;
  const int64_t tiles = ceil_div<int64_t>(M, Plan::kRows * Plan::kCluster) * ceil_div<int64_t>(N, Plan::kColumns);
  const int64_t clusters = std::clamp<int64_t>(multiprocessors / Plan::kCluster, 1, tiles);
  Shape shape(dim3(unsigned(clusters * Plan::kCluster)), dim3(Plan::kThreads), sizeof(Shared<T, Plan>), stream);
  static_assert(sizeof(Shared<T, Plan>) <= Plan::kSharedBytes);
  shape.cluster = dim3(Plan::kCluster);
  dispatch_activation("linear", int(epilogue.kind), [&]<Activation kind>() {
    launch(matmul_kernel<T, kind, Plan>, shape, input_map, weight_map, output_map, preactivation_map, epilogue, int(K));
  });
}

}  // namespace

bool supports(int dtype, const void* input, int64_t input_row_stride, int64_t input_column_stride, const void* weight,
              int64_t weight_row_stride, int64_t weight_column_stride, const void* output, const void* preactivation,
              int64_t M, int64_t N, int64_t K) {
  constexpr int64_t most = INT_MAX - 1024;  // coordinates are ints, and tiles stick out
  auto extent = [](int64_t size) { return size > 0 && size <= most; };
  auto matrix = [](int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride) {
    row_stride = pitch(rows, columns, row_stride);
    return (column_stride == 1 || columns == 1) && row_stride >= columns && row_stride % 8 == 0 &&
           row_stride < int64_t(1) << 39;
  };
  return (dtype == 1 || dtype == 2) && extent(M) && extent(N) && extent(K) && N % 8 == 0 &&
         matrix(M, K, input_row_stride, input_column_stride) && matrix(N, K, weight_row_stride, weight_column_stride) &&
         aligned(16, input, weight, output, preactivation);
}

void forward(int dtype, const void* input, int64_t input_row_stride, const void* weight, int64_t weight_row_stride,
             const void* bias, void* output, void* preactivation, int64_t M, int64_t N, int64_t K, int kind,
             double parameter, cudaStream_t stream) {
  constexpr const char* name = "linear";
  require(kind >= 0 && kind <= 8, name, "kind", kind, "0 to 8");
  const bool supported =
      supports(dtype, input, input_row_stride, 1, weight, weight_row_stride, 1, output, preactivation, M, N, K);
  require(supported, name, "path", 1, "0 for these operands");
  const Device current = device();
  if (current.capability != 90) {
    throw std::runtime_error("linear: path 1 needs compute capability 9.0, this GPU has " +
                             std::to_string(current.capability / 10) + "." + std::to_string(current.capability % 10));
  }
  const auto serve = [&]<class T>() {
    Epilogue<T> epilogue{};
    epilogue.bias = static_cast<const T*>(bias);
    epilogue.output = static_cast<T*>(output);
    epilogue.preactivation = static_cast<T*>(preactivation);
    epilogue.rows = M;
    epilogue.columns = N;
    epilogue.parameter = float(parameter);
    epilogue.kind = Activation(kind);
    epilogue.use_vectors();
    auto* x = static_cast<const T*>(input);
    auto* w = static_cast<const T*>(weight);
    if (prefers_wide(M, N, K, current.multiprocessors)) {
      run<T, Wide>(x, input_row_stride, w, weight_row_stride, epilogue, K, current.multiprocessors, stream);
    } else {
      run<T, Narrow>(x, input_row_stride, w, weight_row_stride, epilogue, K, current.multiprocessors, stream);
    }
  };
  if (dtype == 1) {
    serve.template operator()<bfloat16>();
  } else {
    serve.template operator()<float16>();
  }
}

}  // namespace fastdl::cuda::hopper
