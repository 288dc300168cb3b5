// Dropout's random words: they depend on a seed and a counter alone, so that a mask can be made again instead of being
// stored, and every backend drops the same elements.
#pragma once
#include "common.cuh"

namespace fastdl::cuda {

// Words below it are dropped.
inline uint32_t dropout_threshold(double p) {
  const double scaled = p * 0x1p32;
  return scaled < 0x1p32 - 1 ? uint32_t(scaled) : UINT32_MAX;
}

// What is kept is multiplied by this.
inline double dropout_kept(double p) { return p < 1 ? 1 / (1 - p) : 0; }

// Philox4x32-10 (Salmon et al., 2011): replaces a counter by its four random words.
__device__ __forceinline__ void philox(uint32_t (&words)[4], uint64_t seed) {
  uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = uint64_t(words[0]) * 0xD2511F53u, second = uint64_t(words[2]) * 0xCD9E8D57u;
    words[0] = uint32_t(second >> 32) ^ words[1] ^ key0;
    words[1] = uint32_t(second);
    words[2] = uint32_t(first >> 32) ^ words[3] ^ key1;
    words[3] = uint32_t(first);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

}  // namespace fastdl::cuda
