// Whole kernels against float64: the tensor-core matmuls and the batch statistics.
#include <cmath>
#include <vector>

#include "batch_norm.cuh"
#include "matmul.cuh"
#include "reference.h"

namespace zoo {
namespace {

template <class Output, int M, int N, int K, int offset = 0, int pitch = PITCH>
double matmul_case() {
  Array<bfloat16> a{size_t(M) * K, offset}, w{size_t(N) * K, offset};
  Array<float> bias{N};
  Array<Output> c{size_t(M) * N};
  for (int i = 0; i < M * K; ++i) a[i] = bfloat16(uniform());
  for (int i = 0; i < N * K; ++i) w[i] = bfloat16(uniform());
  for (int n = 0; n < N; ++n) bias[n] = uniform();
  matmul<Output, pitch>(a.data, w.data, bias.data, c.data, M, N, K);
  double worst = 0;
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) {
      const Sum sum = dot(&a[size_t(m) * K], &w[size_t(n) * K], bias[n], K);
      worst = worse(worst, sum.error<Output>(float(c[size_t(m) * N + n]), std::fmax(sum.value, 0)));
    }
  }
  return worst;
}

template <int N, int C, int HW>
double batch_statistics_case() {
  Array<float> x{size_t(N) * C * HW}, mean{C}, rstd{C};
  for (int i = 0; i < N * C * HW; ++i) x[i] = 3 + uniform();
  launch(batch_statistics_kernel, Shape(dim3(C), dim3(256), 0, nullptr), x.data, mean.data, rstd.data, N, C, HW, 1e-5f);
  double worst = 0;
  for (int c = 0; c < C; ++c) {
    double sum = 0, squares = 0;
    auto at = [&](int i) { return double(x[(size_t(i / HW) * C + c) * HW + i % HW]); };
    for (int i = 0; i < N * HW; ++i) sum += at(i);
    sum /= N * HW;
    for (int i = 0; i < N * HW; ++i) squares += (at(i) - sum) * (at(i) - sum);
    const double expected = 1 / std::sqrt(squares / (N * HW) + 1e-5);
    worst = worse(worst, std::fabs(mean[c] - sum) / 1e-5);
    worst = worse(worst, std::fabs(rstd[c] - expected) / (1e-5 * expected));
  }
  return worst;
}

}  // namespace

extern const std::vector<Case> kernel_cases = {
    {"matmul 64x64x32", matmul_case<float, 64, 64, 32>},
    {"matmul 1x1x1", matmul_case<bfloat16, 1, 1, 1>},
    {"matmul 65x63x33", matmul_case<float, 65, 63, 33>},
    {"matmul 65x63x96", matmul_case<float, 65, 63, 96>},
    {"matmul 100x70x200", matmul_case<bfloat16, 100, 70, 200>},
    {"matmul 7x130x40", matmul_case<float, 7, 130, 40>},
    {"matmul 129x1x24", matmul_case<bfloat16, 129, 1, 24>},
    {"matmul misaligned", matmul_case<float, 40, 50, 64, 1>},
    {"matmul conflicts", matmul_case<float, 64, 64, 32, 0, BK>},
    {"batch statistics 4x3x49", batch_statistics_case<4, 3, 49>},
    {"batch statistics 2x5x1", batch_statistics_case<2, 5, 1>},
    {"batch statistics 3x2x500", batch_statistics_case<3, 2, 500>},
};

}  // namespace zoo
