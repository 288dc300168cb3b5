// Activation functions and their gradients, for every kernel that ends or begins with one.
#pragma once
#include <cmath>

#include "common.cuh"

namespace fastdl::cuda {

enum class Activation : int { none, relu, leaky_relu, elu, sigmoid, tanh, gelu, gelu_tanh, silu };

// Calls function<activation>() for an activation code.
template <class Function>
void dispatch_activation(const char* name, int kind, const Function& function) {
  switch (Activation(kind)) {
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
  require(false, name, "kind", kind, "0 to 8");
}

// Arithmetic for values stored as T. The hardware's exponential and reciprocal are more exact than 16 bits can show.
template <class T>
struct Math {
  static __device__ __forceinline__ Compute<T> exp(Compute<T> x) {
    if constexpr (sizeof(T) == 2)
      return __expf(x);
    else
      return std::exp(x);
  }
  static __device__ __forceinline__ Compute<T> divide(Compute<T> a, Compute<T> b) {
    if constexpr (sizeof(T) == 2)
      return __fdividef(a, b);  // 0 where |b| >= 2^126
    else
      return a / b;
  }
  static __device__ __forceinline__ Compute<T> sigmoid(Compute<T> x) { return divide(1, 1 + exp(-x)); }
};

// The inner function of gelu's tanh approximation.
template <class C>
__device__ __forceinline__ C gelu_tanh_of(C x) {
  return std::tanh(C(0.79788456080286535588) * (x + C(0.044715) * x * x * x));  // sqrt(2 / pi)
}

// The activation of x. T: how the result is stored; parameter: negative_slope of leaky_relu, alpha of elu.
template <Activation kind, class T, class C = Compute<T>>
__device__ __forceinline__ C activate(C x, [[maybe_unused]] C parameter) {
  if constexpr (kind == Activation::none)
    return x;
  else if constexpr (kind == Activation::relu)
    return x <= 0 ? C(0) : x;  // lets NaN through
  else if constexpr (kind == Activation::leaky_relu)
    return x > 0 ? x : parameter * x;
  else if constexpr (kind == Activation::elu)
    return x > 0 ? x : parameter * std::expm1(x);
  else if constexpr (kind == Activation::sigmoid)
    return Math<T>::sigmoid(x);
  else if constexpr (kind == Activation::tanh)
    return std::tanh(x);
  else if constexpr (kind == Activation::gelu)
    return C(0.5) * x * (1 + std::erf(x * C(0.70710678118654752440)));
  else if constexpr (kind == Activation::gelu_tanh)
    return C(0.5) * x * (1 + gelu_tanh_of(x));
  else
    return Math<T>::divide(x, 1 + Math<T>::exp(-x));
}

// gradient * derivative. saved: the activation's output y; for gelu and silu its input x; unused for none.
template <Activation kind, class T, class C = Compute<T>>
__device__ __forceinline__ C activate_backward(C gradient, [[maybe_unused]] C saved, [[maybe_unused]] C parameter) {
  if constexpr (kind == Activation::none) {
    return gradient;
  } else if constexpr (kind == Activation::relu) {
    return saved <= 0 ? C(0) : gradient;
  } else if constexpr (kind == Activation::leaky_relu) {
    return saved > 0 ? gradient : gradient * parameter;
  } else if constexpr (kind == Activation::elu) {
    return saved <= 0 ? gradient * (saved + parameter) : gradient;
  } else if constexpr (kind == Activation::sigmoid) {
    return gradient * saved * (1 - saved);
  } else if constexpr (kind == Activation::tanh) {
    return gradient * (1 - saved * saved);
  } else if constexpr (kind == Activation::gelu) {
    const C distribution = C(0.5) * (1 + std::erf(saved * C(0.70710678118654752440)));    // sqrt(1 / 2)
    const C density = C(0.39894228040143267794) * Math<T>::exp(C(-0.5) * saved * saved);  // 1 / sqrt(2 pi)
    return gradient * (distribution + saved * density);
  } else if constexpr (kind == Activation::gelu_tanh) {
    const C t = gelu_tanh_of(saved);
    const C t_slope = 1 - t * t;
    const C inner_slope = C(0.79788456080286535588) * (1 + C(3 * 0.044715) * saved * saved);
    const C tail = t_slope == 0 ? C(0) : saved * t_slope * inner_slope;  // 0 * infinity for large x
    return gradient * (C(0.5) * (1 + t + tail));
  } else {
    const C sigmoid = Math<T>::sigmoid(saved);
    return gradient * sigmoid * (1 + saved * (1 - sigmoid));
  }
}

}  // namespace fastdl::cuda
