// Dropout over contiguous arrays of any length.
#include <algorithm>

#include "dropout.cuh"
#include "dropout.h"

namespace fastdl::cuda {
namespace {

constexpr int kThreads = 256;

// A thread takes `items` elements at a time, four or eight that share counters; blocks stride over tiles.
template <class T, int width>
__global__ void __launch_bounds__(kThreads, 4)
    dropout_kernel(const T* input, T* output, int64_t count, Dropout<Compute<T>> dropout) {
  constexpr int items = width > 1 ? width : 4;
  const uint64_t seed = *dropout.seed;
  const int64_t stride = int64_t(gridDim.x) * kThreads * items;
  for (int64_t first = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * items; first < count; first += stride) {
    Compute<T> values[items];
    const bool whole = width > 1 && first + items <= count;
    if (whole) {
      const Vector<T, width> x = load<width>(input + first);
#pragma unroll
      for (int i = 0; i < width; ++i) values[i] = widen(x.element[i]);
    } else {
#pragma unroll
      for (int i = 0; i < items; ++i) values[i] = first + i < count ? widen(input[first + i]) : Compute<T>(0);
    }
    dropout.apply(values, seed, first);
    if constexpr (width > 1) {
      if (whole) store(output + first, values);
    }
    if (whole) continue;
#pragma unroll
    for (int i = 0; i < items; ++i) {
      if (first + i < count) output[first + i] = T(values[i]);
    }
  }
}

}  // namespace

void dropout(int dtype, const void* input, void* output, int64_t count, double p, const void* seed,
             cudaStream_t stream) {
  constexpr const char* name = "dropout";
  require(count >= 0, name, "count", count, "at least 0");
  require(count == 0 || input, name, "input", "0", "an address");
  require(count == 0 || output, name, "output", "0", "an address");
  require(seed, name, "seed", "0", "an address");
  require(p >= 0 && p <= 1, name, "p", p, "0 to 1");
  dispatch_dtype(name, dtype, [&]<class T>() {
    if (count == 0) return;
    auto run = [&]<int width>() {
      const int64_t blocks = std::min(ceil_div<int64_t>(count, kThreads * (width > 1 ? width : 4)), kMaximumBlocks);
      launch(dropout_kernel<T, width>, Shape(dim3(unsigned(blocks)), dim3(kThreads), 0, stream),
             static_cast<const T*>(input), static_cast<T*>(output), count, Dropout<Compute<T>>(seed, p));
    };
    constexpr int full = kFullVector<T>;
    if (full > 1 && aligned(16, input, output)) {
      run.template operator()<full>();
    } else {
      run.template operator()<1>();
    }
  });
}

}  // namespace fastdl::cuda
