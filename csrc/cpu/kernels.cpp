// The table of this instruction set's build.
#include "families.h"

#define STRING_OF(x) #x
#define STRING(x) STRING_OF(x)
#define ENTRY(result, name, arguments) , name

namespace fastdl::ISA {
extern const Kernels kernels = {STRING(ISA) FASTDL_CPU_KERNELS(ENTRY)};
}
