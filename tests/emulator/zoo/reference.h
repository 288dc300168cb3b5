// Arrays for the zoo's kernels, and what their results are compared with.
#pragma once
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <random>
#include <type_traits>

namespace zoo {

// An exact-size heap block, NaN-filled, so that ASan sees its ends; `offset` elements off alignment.
template <class T>
struct Array {
  explicit Array(size_t count, size_t offset = 0) {
    const size_t bytes = (count + offset) * sizeof(T);
    if (posix_memalign(&memory, 128, bytes)) abort();
    memset(memory, 0xff, bytes);
    data = static_cast<T*>(memory) + offset;
  }
  ~Array() { free(memory); }
  Array(const Array&) = delete;
  T& operator[](size_t i) { return data[i]; }
  void* memory;
  T* data;
};

inline float uniform() {
  static std::mt19937 generator(7);
  return std::uniform_real_distribution<float>(-1, 1)(generator);
}

inline double worse(double worst, double error) {
  return error <= worst ? worst : std::isnan(error) ? INFINITY : error;
}

struct Sum {
  double value, magnitude;
  // The error of `got` as a multiple of what fp32 accumulation, and rounding to Output, allow.
  template <class Output>
  double error(float got, double expected) const {
    const double rounding = std::is_same_v<Output, float> ? 0 : std::fabs(expected) / 256;
    return std::fabs(got - expected) / (rounding + 1e-6 * magnitude + 1e-30);
  }
};

// bias + a . w
template <class T>
Sum dot(const T* a, const T* w, float bias, int K) {
  Sum sum{bias, std::fabs(bias)};
  for (int k = 0; k < K; ++k) {
    const double product = double(float(a[k])) * double(float(w[k]));
    sum.value += product;
    sum.magnitude += std::fabs(product);
  }
  return sum;
}

}  // namespace zoo
