// Linear layers: a matrix product with bias and activation applied to each tile while it is in the first-level cache.
#include "kernels/linear.h"

#include "activation.h"
#include "gemm.h"

namespace fastdl::ISA {
FASTDL_CPU_LINEAR(DECLARE)

template <class T, int kind>
static void linear_of(const LinearArguments& arguments) {
  using S = Compute<T>;
  const T* bias = static_cast<const T*>(arguments.bias);
  T *output = static_cast<T*>(arguments.output), *preactivation = static_cast<T*>(arguments.preactivation);
  int64_t n = arguments.n;
  S parameter = static_cast<S>(arguments.activation.parameter);
  auto finish = [=](const Tile<S>& tile) {
    tile.for_each_vector([=](int64_t row, int64_t column, int64_t count, Vector<S> z) __attribute__((always_inline)) {
      if (bias) z += load(bias + column, count);
      if (preactivation) store(preactivation + row * n + column, z, count);
      store(output + row * n + column, activate<kind>(z, parameter), count);
    });
  };
  Operand<T> input{static_cast<const T*>(arguments.input), arguments.input_row_stride, arguments.input_column_stride,
                   arguments.m};
  Operand<T> weight{static_cast<const T*>(arguments.weight), arguments.weight_row_stride,
                    arguments.weight_column_stride, arguments.n};
  gemm<T>(input, weight, arguments.k, arguments.threads, finish);
}

void linear(const LinearArguments& arguments) {
  if (arguments.m == 0 || arguments.n == 0) return;
  with_dtype(arguments.dtype, [&](auto type) {
    with_kind(arguments.activation.kind,
              [&](auto kind) { linear_of<typename decltype(type)::type, decltype(kind)::value>(arguments); });
  });
}

}  // namespace fastdl::ISA
