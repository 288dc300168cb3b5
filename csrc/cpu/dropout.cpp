// Dropout of an array, whose gradient is the same function.
#include "kernels/dropout.h"

#include "dropout.h"
#include "threads.h"

namespace fastdl::ISA {
FASTDL_CPU_DROPOUT(DECLARE)
namespace {

constexpr int64_t thread_elements = 8192;  // worth a thread of their own

template <class T>
void dropout_of(const DropoutArguments& arguments) {
  using S = Compute<T>;
  constexpr int64_t block = DropoutFactors<S>::block;
  const T* input = static_cast<const T*>(arguments.input);
  T* output = static_cast<T*>(arguments.output);
  int64_t count = arguments.count;
  const DropoutFactors<S> dropout(arguments.p, arguments.seed);
  parallel(max(1, min(arguments.threads, count / thread_elements)), [&](int thread, int team) {
    for_share(ceil_div(count, block), thread, team, [&](int64_t i) {
      alignas(64) S factors[block];
      int64_t first = i * block, n = min(block, count - first);
      dropout.make(first / 4, factors);
      for (int64_t j = 0; j < n; j += lanes<S>)
        store(output + first + j, load(input + first + j, n - j) * load(factors + j), n - j);
    });
  });
}

}  // namespace

void dropout(const DropoutArguments& arguments) {
  with_dtype(arguments.dtype, [&](auto type) { dropout_of<typename decltype(type)::type>(arguments); });
}

}  // namespace fastdl::ISA
