// Dropout's factors for elements in the order of memory, many at a time.
#pragma once
#include "philox.h"

namespace fastdl::ISA {

template <bool high, class V, int... i>
INLINE V interleave(V a, V b, std::integer_sequence<int, i...>) {
  constexpr int n = sizeof...(i);
  return __builtin_shufflevector(a, b, (i / 2 + (i % 2 ? n : 0) + (high ? n / 2 : 0))...);
}
// a[0], b[0], a[1], b[1] and so on, of the vectors' first or second half
template <bool high, class V>
INLINE V interleave(V a, V b) {
  return interleave<high>(a, b, std::make_integer_sequence<int, lanes<Scalar<V>>>());
}

// S: the type of the factors
template <class S>
struct DropoutFactors {
  static constexpr int64_t block = 4 * lanes<uint32_t>;  // what one call makes
  uint64_t seed;
  uint32_t threshold;
  S kept;

  DropoutFactors(double p, uint64_t seed) : seed(seed) {
    double scaled = p * 0x1p32;
    threshold = scaled < 0x1p32 - 1 ? static_cast<uint32_t>(scaled) : UINT32_MAX;
    kept = p < 1 ? static_cast<S>(1 / (1 - p)) : 0;
  }
  // those of `block` elements from 4 * group on
  INLINE void make(int64_t group, S* factors) const {
    using Counters = Philox::Counters;
    using Wide = Philox::Wide;
    constexpr int width = lanes<uint32_t>;
    Counters first = broadcast<Counters>(static_cast<uint32_t>(group));
    Counters c[4] = {first + iota<uint32_t>(), broadcast<Counters>(static_cast<uint32_t>(group >> 32)), {}, {}};
    c[1] -= (Counters)(c[0] < first);  // a carry; true is -1
    c[3] += 1;
    Philox::rounds(c, seed);
    Counters low01 = interleave<false>(c[0], c[1]), high01 = interleave<true>(c[0], c[1]);
    Counters low23 = interleave<false>(c[2], c[3]), high23 = interleave<true>(c[2], c[3]);
    put(factors, (Counters)interleave<false>((Wide)low01, (Wide)low23));
    put(factors + width, (Counters)interleave<true>((Wide)low01, (Wide)low23));
    put(factors + 2 * width, (Counters)interleave<false>((Wide)high01, (Wide)high23));
    put(factors + 3 * width, (Counters)interleave<true>((Wide)high01, (Wide)high23));
  }
  // those of [first, first + count), with room for them in whole blocks; gives where they begin
  INLINE const S* make(int64_t first, int64_t count, S* factors) const {
    for (int64_t i = 0; i < first % 4 + count; i += block) make((first + i) / 4, factors + i);
    return factors + first % 4;
  }

 private:
  INLINE void put(S* factors, Philox::Counters random) const {
    if constexpr (std::is_same_v<S, float>) {
      store(factors, random >= threshold ? broadcast<Floats>(kept) : Floats{});
    } else {
      uint32_t words[lanes<uint32_t>];
      __builtin_memcpy(words, &random, sizeof words);
      for (int i = 0; i < lanes<uint32_t>; i++) factors[i] = words[i] >= threshold ? kept : 0;
    }
  }
};

}  // namespace fastdl::ISA
