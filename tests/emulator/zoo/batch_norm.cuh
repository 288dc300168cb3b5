// Batch statistics: x[N,C,HW] -> mean[C], rstd[C]. A block for each channel; Welford, merged by warp shuffles.
#pragma once
#include "common.cuh"
#include "zoo.h"

namespace zoo {

using namespace fastdl::cuda;

struct Welford {
  float mean, m2, count;
};

__device__ __forceinline__ Welford merge(Welford a, Welford b) {
  const float count = a.count + b.count;
  if (count == 0.f) return a;
  const float delta = b.mean - a.mean;
  return {a.mean + delta * (b.count / count), a.m2 + b.m2 + delta * delta * (a.count * b.count / count), count};
}

__device__ __forceinline__ Welford warp_merge(Welford value) {
#pragma unroll
  for (int offset = 16; offset; offset /= 2) {
    const Welford other{__shfl_xor_sync(0xffffffffu, value.mean, offset),
                        __shfl_xor_sync(0xffffffffu, value.m2, offset),
                        __shfl_xor_sync(0xffffffffu, value.count, offset)};
    value = merge(value, other);
  }
  return value;
}

__global__ void __launch_bounds__(256)
    batch_statistics_kernel(const float* x, float* mean, float* rstd, int N, int C, int HW, float eps) {
  FDL_SHARED(Welford, part, [8]);
  const int c = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Welford value{0.f, 0.f, 0.f};
  for (int i = threadIdx.x; i < N * HW; i += blockDim.x) {
    const float element = x[(size_t(i / HW) * C + c) * HW + i % HW];
    value.count += 1.f;
    const float delta = element - value.mean;
    value.mean += delta / value.count;
    value.m2 += delta * (element - value.mean);
  }
  value = warp_merge(value);
  if (lane == 0) part[warp] = value;
  if (!BUG("no barrier between warps")) __syncthreads();
  if (warp > 0) return;
  value = lane < 8 || (lane == 8 && BUG("a warp too many")) ? part[lane] : Welford{0.f, 0.f, 0.f};
  value = warp_merge(value);
  if (lane == 0) {
    mean[c] = value.mean;
    rstd[c] = rsqrtf(value.m2 / value.count + eps);
  }
}

}  // namespace zoo
