// The table of this instruction set's build.
#include "kernels.h"

#include "simd.h"

#define STRING_OF(x) #x
#define STRING(x) STRING_OF(x)
#define ENTRY(result, name, arguments) , name

namespace fastdl::ISA {
FASTDL_CPU_KERNELS(DECLARE)
extern const Kernels kernels = {STRING(ISA) FASTDL_CPU_KERNELS(ENTRY)};
}  // namespace fastdl::ISA
