// Kernels that the emulator is tested with. Each can be run with one bug planted in it, by name; nvcc sees none of
// them.
#pragma once
#include <cstdint>

namespace zoo {

constexpr uint64_t hash(const char* text) {
  uint64_t value = 14695981039346656037ull;
  for (; *text; ++text) value = (value ^ uint64_t(uint8_t(*text))) * 1099511628211ull;
  return value;
}

#ifdef FDL_EMULATE
inline uint64_t planted = 0;  // the hash of the bug's name
#define BUG(name) (zoo::planted == std::integral_constant<uint64_t, zoo::hash(name)>::value)
#else
#define BUG(name) false
#endif

struct Case {
  const char* name;
  double (*run)();  // the worst error as a multiple of what is allowed
};

}  // namespace zoo
