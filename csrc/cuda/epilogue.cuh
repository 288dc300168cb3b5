// What becomes of a tile's sums: the end of every matmul, whatever its main loop.
#pragma once
#include "activation.cuh"

namespace fastdl::cuda {

// Calls function<activation>() for an activation that only the running kernel knows.
template <class Function>
__device__ __forceinline__ void with_activation(Activation kind, const Function& function) {
  switch (kind) {
    case Activation::none:
      return function.template operator()<Activation::none>();
    case Activation::relu:
      return function.template operator()<Activation::relu>();
    case Activation::leaky_relu:
      return function.template operator()<Activation::leaky_relu>();
    case Activation::elu:
      return function.template operator()<Activation::elu>();
    case Activation::sigmoid:
      return function.template operator()<Activation::sigmoid>();
    case Activation::tanh:
      return function.template operator()<Activation::tanh>();
    case Activation::gelu:
      return function.template operator()<Activation::gelu>();
    case Activation::gelu_tanh:
      return function.template operator()<Activation::gelu_tanh>();
    case Activation::silu:
      return function.template operator()<Activation::silu>();
  }
}

template <class C, int count>
struct Values {
  C element[count];
};

// Not inlined: nine activations are more code than a main loop, and one copy serves every kernel. Call it where few
// registers are live, so with sums that wait in shared memory, not in registers.
template <class T, int count>
[[gnu::noinline]] __device__ Values<Compute<T>, count> activate_values(Values<Compute<T>, count> values,
                                                                       Activation kind, Compute<T> parameter) {
  with_activation(kind, [&]<Activation activation>() {
#pragma unroll
    for (int i = 0; i < count; ++i) values.element[i] = activate<activation, T>(values.element[i], parameter);
  });
  return values;
}

// The sums of a product's tile on their way to memory; a kernel's argument. In the finished product, z = sum + bias is
// rounded to preactivation and activation(z) to output. Where the depth is split, each split's sums go to partial, and
// finish_kernel does the rest.
template <class T>
struct Epilogue {
  const T* bias;        // [columns] or null
  T* output;            // [rows, columns]
  T* preactivation;     // [rows, columns] or null
  Compute<T>* partial;  // [splits, rows, columns], or null: the product is finished here
  int64_t rows, columns;
  Compute<T> parameter;
  Activation kind;
  bool vectors;  // whether all of these allow 16 bytes at a time: see use_vectors

  // Host: to be called when all else is set.
  void use_vectors() {
    constexpr int64_t width = 16 / sizeof(T);
    vectors = columns % width == 0 && aligned(16, bias, output, preactivation, partial);
  }

  // values += bias, for the columns from `column` on: a multiple of count, which divides 16 bytes or is divided by
  // them.
  template <int count>
  __device__ __forceinline__ void add_bias(int64_t column, Compute<T> (&values)[count]) const {
    constexpr int width = count * sizeof(T) < 16 ? count : int(16 / sizeof(T));
    if (!bias) return;
    if (vectors) {
#pragma unroll
      for (int i = 0; i < count; i += width) {
        if (column + i >= columns) break;
        const Vector<T, width> shift = load<width>(bias + column + i);
#pragma unroll
        for (int j = 0; j < width; ++j) values[i + j] += widen(shift.element[j]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < count; ++i) {
        if (column + i < columns) values[i] += widen(bias[column + i]);
      }
    }
  }

  // values = activation(values).
  template <int count>
  __device__ __forceinline__ void activate_in_place(Compute<T> (&values)[count]) const {
    if (kind == Activation::none) return;
    Values<Compute<T>, count> result;
#pragma unroll
    for (int i = 0; i < count; ++i) result.element[i] = values[i];
    result = activate_values<T, count>(result, kind, parameter);
#pragma unroll
    for (int i = 0; i < count; ++i) values[i] = result.element[i];
  }

  // Rounds and stores the values that are inside, by 16 bytes or one by one.
  template <class Stored, int count>
  __device__ __forceinline__ void put(Stored* matrix, int64_t row, int64_t column,
                                      const Compute<T> (&values)[count]) const {
    constexpr int width = count * sizeof(Stored) < 16 ? count : int(16 / sizeof(Stored));
    Stored* address = matrix + row * columns + column;
#pragma unroll
    for (int i = 0; i < count; i += width) {
      Compute<T> part[width];
#pragma unroll
      for (int j = 0; j < width; ++j) part[j] = values[i + j];
      if (vectors) {
        if (column + i < columns) store(address + i, part);
      } else {
#pragma unroll
        for (int j = 0; j < width; ++j) {
          const Compute<T> one[1] = {part[j]};
          if (column + i + j < columns) store(address + i + j, one);
        }
      }
    }
  }

  // Ends the sums of `count` neighbouring columns; what is outside of the product is left out. column: a multiple of
  // count.
  template <int count>
  __device__ __forceinline__ void operator()(int64_t row, int64_t column, Compute<T> (&values)[count],
                                             int split = 0) const {
    if (row >= rows || column >= columns) return;
    if (partial) {
      put(partial + split * rows * columns, row, column, values);
      return;
    }
    add_bias(column, values);
    if (preactivation) put(preactivation, row, column, values);
    activate_in_place(values);
    put(output, row, column, values);
  }
};

}  // namespace fastdl::cuda
