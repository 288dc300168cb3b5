// The table of functions that every instruction set's build fills; bindings.cpp chooses one table at import. A family's
// header says what its functions take and, in FASTDL_CPU_<FAMILY>(KERNEL), each one's result, name and arguments.
#pragma once
#include "kernels/activation.h"
#include "kernels/attention.h"
#include "kernels/batch_norm.h"
#include "kernels/conv.h"
#include "kernels/cross_entropy.h"
#include "kernels/dropout.h"
#include "kernels/embedding.h"
#include "kernels/layer_norm.h"
#include "kernels/linear.h"
#include "kernels/pooling.h"
#include "kernels/rnn.h"
#include "kernels/softmax.h"

#define FASTDL_CPU_KERNELS(KERNEL) \
  FASTDL_CPU_ACTIVATION(KERNEL)    \
  FASTDL_CPU_ATTENTION(KERNEL)     \
  FASTDL_CPU_BATCH_NORM(KERNEL)    \
  FASTDL_CPU_CONV(KERNEL)          \
  FASTDL_CPU_CROSS_ENTROPY(KERNEL) \
  FASTDL_CPU_EMBEDDING(KERNEL)     \
  FASTDL_CPU_DROPOUT(KERNEL)       \
  FASTDL_CPU_LAYER_NORM(KERNEL)    \
  FASTDL_CPU_LINEAR(KERNEL)        \
  FASTDL_CPU_POOLING(KERNEL)       \
  FASTDL_CPU_RNN(KERNEL)           \
  FASTDL_CPU_SOFTMAX(KERNEL)

namespace fastdl {

struct Kernels {
  const char* name;
#define MEMBER(result, name, arguments) result(*name) arguments;
  FASTDL_CPU_KERNELS(MEMBER)
#undef MEMBER
};

namespace portable {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512bf16 {
extern const Kernels kernels;
}
namespace amx {
extern const Kernels kernels;
}

}  // namespace fastdl
