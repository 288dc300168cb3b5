#pragma once
#include "common.h"

namespace fastdl {

// output = input * factor: 0 where dropped, which element e is if word e % 4 of the random words of the counter (e / 4,
// its high 32 bits, 0, 1) is below p * 2^32; else 1 / (1 - p). output may be input.
struct DropoutArguments {
  int dtype;
  const void* input;  // [count]
  void* output;       // [count]
  int64_t count;
  double p;
  uint64_t seed;
  int threads;
};

#define FASTDL_CPU_DROPOUT(KERNEL) KERNEL(void, dropout, (const DropoutArguments&))

}  // namespace fastdl
