// Dropout's factors for elements in the order of memory, which other families fuse.
#pragma once
#include "philox.cuh"

namespace fastdl::cuda {

// A kernel's argument.
template <class C>
struct Dropout {
  const uint64_t* seed;  // on the device; null: nothing is dropped
  uint32_t threshold;
  C kept;

  Dropout(const void* seed, double p)
      : seed(static_cast<const uint64_t*>(seed)), threshold(dropout_threshold(p)), kept(C(dropout_kept(p))) {}

  // Multiplies elements [first, first + count) by their factors; first is a multiple of 4 unless count is 1.
  template <int count>
  __device__ __forceinline__ void apply(C (&values)[count], uint64_t seed, int64_t first) const {
    static_assert(count == 1 || count % 4 == 0, "four elements share a counter");
#pragma unroll
    for (int i = 0; i < count; i += 4) {
      const int64_t group = (first + i) / 4;
      uint32_t words[4] = {uint32_t(group), uint32_t(group >> 32), 0, 1};
      philox(words, seed);
      if constexpr (count == 1) {
        const int place = int(first % 4);
        const uint32_t word = place == 0 ? words[0] : place == 1 ? words[1] : place == 2 ? words[2] : words[3];
        values[0] *= word >= threshold ? kept : C(0);
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j) values[i + j] *= words[j] >= threshold ? kept : C(0);
      }
    }
  }
};

}  // namespace fastdl::cuda
