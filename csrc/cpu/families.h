// The functions of one instruction set's build.
#pragma once
#include "simd.h"

namespace fastdl::ISA {
#define DECLARATION(result, name, arguments) result name arguments;
FASTDL_CPU_KERNELS(DECLARATION)
#undef DECLARATION
}  // namespace fastdl::ISA
