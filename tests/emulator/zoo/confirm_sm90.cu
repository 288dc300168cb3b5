// Runs every probe of Hopper's twins, and the linear layer's forward, on a GPU: what passes there and in the emulator
// confirms the twin.
//   nvcc -std=c++20 -gencode=arch=compute_90a,code=sm_90a -I../../../csrc/cuda confirm_sm90.cu && ./a.out
#include <cmath>

#include "hopper_probes.cuh"
#include "linear_sm90.cu"

namespace zoo {
namespace {

// The host's activations, in double.
double activated(int kind, double z, double parameter) {
  switch (Activation(kind)) {
    case Activation::none:
      return z;
    case Activation::relu:
      return std::fmax(z, 0);
    case Activation::leaky_relu:
      return z > 0 ? z : parameter * z;
    case Activation::elu:
      return z > 0 ? z : parameter * std::expm1(z);
    case Activation::sigmoid:
      return 1 / (1 + std::exp(-z));
    case Activation::tanh:
      return std::tanh(z);
    case Activation::gelu:
      return 0.5 * z * (1 + std::erf(z * std::sqrt(0.5)));
    case Activation::gelu_tanh:
      return 0.5 * z * (1 + std::tanh(std::sqrt(2 / std::acos(-1.0)) * (z + 0.044715 * z * z * z)));
    case Activation::silu:
      return z / (1 + std::exp(-z));
  }
  return NAN;
}

// The worst error as a multiple of what rounding to T allows: sums of these operands are exact, multiples of 1/64.
template <class T>
double forward_error(int M, int N, int K, int kind, bool with_bias, bool with_preactivation) {
  const int depth = (K + 7) / 8 * 8 + 8;
  Dev<T> input(size_t(M) * depth), weight(size_t(N) * depth), bias(N), output(size_t(M) * N),
      preactivation(size_t(M) * N);
  for (int m = 0; m < M; ++m)
    for (int k = 0; k < K; ++k) input[size_t(m) * depth + k] = T(float(small<T>(m * 3 + k * 5)) / 8);
  for (int n = 0; n < N; ++n) {
    bias[n] = T(float(n % 5) / 4);
    for (int k = 0; k < K; ++k) weight[size_t(n) * depth + k] = T(float(small<T>(n * 7 + k * 2)) / 8);
  }
  hopper::forward(std::is_same_v<T, bfloat16> ? 1 : 2, input.p, depth, weight.p, depth, with_bias ? bias.p : nullptr,
                  output.p, with_preactivation ? preactivation.p : nullptr, M, N, K, kind, 0.3, nullptr);
  sync_ok();
  double worst = 0;
  auto compare = [&](T got, double expected) {
    const double allowed = std::fabs(expected) * (std::is_same_v<T, bfloat16> ? 0x1.02p-8 : 0x1.02p-11) + 1e-6;
    const double error = std::fabs(double(float(got)) - expected) / allowed;
    if (!(error <= worst)) worst = std::isnan(error) ? INFINITY : error;
  };
  for (int m = M - 1; m >= 0; m -= M > 600 ? 37 : 1) {
    for (int n = N - 1; n >= 0; n -= N > 600 ? 31 : 1) {
      float z = with_bias ? float(bias[n]) : 0;
      for (int k = 0; k < K; ++k) z += float(input[size_t(m) * depth + k]) * float(weight[size_t(n) * depth + k]);
      compare(output[size_t(m) * N + n], activated(kind, z, 0.3));
      if (with_preactivation) compare(preactivation[size_t(m) * N + n], z);
    }
  }
  return worst;
}

template <class T>
double forward_kinds() {
  double worst = 0;
  for (int kind = 0; kind < 9; ++kind)
    worst = std::fmax(worst, forward_error<T>(130, 136, 72, kind, kind % 2, kind > 5));
  return worst;
}

// Shapes that have the one plan or the other; the emulator's GPU has two multiprocessors.
#ifdef FDL_EMULATE
constexpr int kMultiprocessors = 2, kMany = 264, kLong = 1096, kWide = 504, kDeep = 1096;
#else
constexpr int kMultiprocessors = 132, kMany = 4000, kLong = 1096, kWide = 8184, kDeep = 4104;
#endif
static_assert(!hopper::prefers_wide(kMany, 136, kLong, kMultiprocessors));
static_assert(hopper::prefers_wide(kWide, kWide, kDeep, kMultiprocessors));

template <class T>
double forward_long() {  // the ring's laps, in turns
  return std::fmax(forward_error<T>(1, 8, 1, 1, true, false), forward_error<T>(kMany, 136, kLong, 1, true, true));
}

template <class T>
double forward_wide() {
  return std::fmax(forward_error<T>(kWide, kWide, kDeep, 1, true, false),
                   forward_error<T>(kWide, kWide, kDeep, 8, false, true));
}

constexpr Confirm forward_cases[] = {
    {"forward bf16 kinds", forward_kinds<bfloat16>}, {"forward f16 kinds", forward_kinds<float16>},
    {"forward bf16 narrow", forward_long<bfloat16>}, {"forward f16 narrow", forward_long<float16>},
    {"forward bf16 wide", forward_wide<bfloat16>},   {"forward f16 wide", forward_wide<float16>}};

int run_all() {
  int failures = 0;
  auto run = [&](const Confirm& item) {
    double error = INFINITY;
    std::string message;
    try {
      error = item.f();
    } catch (std::exception& exception) {
      message = exception.what();
    }
    failures += !(error <= 1);
    printf("%-28s %s %g %s\n", item.name, error <= 1 ? "ok" : "FAIL", error, message.c_str());
    fflush(stdout);
  };
  for (auto& item : confirm_cases) run(item);
  for (auto& item : forward_cases) run(item);
  printf("%d failed\n", failures);
  return failures != 0;
}

}  // namespace
}  // namespace zoo

int main() { return zoo::run_all(); }
