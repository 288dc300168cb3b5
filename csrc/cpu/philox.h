// Random words that depend on a seed and a counter alone, so that a mask can be made again instead of being stored.
#pragma once
#include "simd.h"

namespace fastdl::ISA {

// Philox4x32-10 (Salmon et al., 2011) on vectors of counters
struct Philox {
  using Wide = Vector<uint64_t>;
  using Counters = Vector<uint32_t>;

  // high and low halves of the lanes' products
  INLINE static void multiply(Counters x, uint64_t factor, Counters& high, Counters& low) {
    Wide even = ((Wide)x & 0xffffffff) * factor, odd = ((Wide)x >> 32) * factor;
    high = (Counters)((even >> 32) | (odd & 0xffffffff00000000));
    low = (Counters)((even & 0xffffffff) | (odd << 32));
  }
  INLINE static void rounds(Counters (&c)[4], uint64_t seed) {
    uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
    for (int round = 0; round < 10; round++) {
      Counters high0, low0, high1, low1;
      multiply(c[0], 0xD2511F53, high0, low0);
      multiply(c[2], 0xCD9E8D57, high1, low1);
      c[0] = high1 ^ c[1] ^ key[0];
      c[2] = high0 ^ c[3] ^ key[1];
      c[1] = low1;
      c[3] = low0;
      key[0] += 0x9E3779B9;
      key[1] += 0xBB67AE85;
    }
  }
};

}  // namespace fastdl::ISA
