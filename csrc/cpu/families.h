// The functions of one instruction set's build, one declaration for each entry of Kernels.
#pragma once
#include "simd.h"

namespace fastdl::ISA {
void linear(const LinearArguments&);
void activation_forward(const ForwardArguments&);
void activation_backward(const BackwardArguments&);
}  // namespace fastdl::ISA
