// The Hopper matmul of the library, as plant.py has prepared it, against float64; and the probes of Hopper's twins.
#include "zoo.h"
// BUG comes first
#include "hopper_probes.cuh"
#include "planted_matmul_sm90.cuh"
#include "reference.h"

namespace zoo {
namespace {

using fastdl::cuda::Activation;
using fastdl::cuda::hopper::Narrow;
using fastdl::cuda::hopper::Wide;

// Rows of the arrays are padded with NaN: TMA must clip at M, N and K, and not touch the padding of what it writes.
template <class Plan, class T, Activation kind, int M, int N, int K, bool with_preactivation = false>
double hopper_case() {
  constexpr int depth = (K + 7) / 8 * 8, width = (N + 7) / 8 * 8;
  Array<T> input{size_t(M) * depth}, weight{size_t(N) * depth}, bias{N}, output{size_t(M) * width},
      preactivation{size_t(M) * width};
  for (int m = 0; m < M; ++m)
    for (int k = 0; k < K; ++k) input[size_t(m) * depth + k] = T(uniform());
  for (int n = 0; n < N; ++n) {
    bias[n] = T(uniform());
    for (int k = 0; k < K; ++k) weight[size_t(n) * depth + k] = T(uniform());
  }
  Epilogue<T> epilogue{};
  epilogue.bias = bias.data;
  epilogue.output = output.data;
  epilogue.preactivation = with_preactivation ? preactivation.data : nullptr;
  epilogue.rows = M;
  epilogue.columns = N;
  epilogue.kind = kind;
  epilogue.use_vectors();
  auto map = [](T* base, int rows, int columns, int stride, uint32_t box_rows, bool swizzled = true) {
    return sm90::tensor_map<T, 2>(base, {uint64_t(columns), uint64_t(rows)}, {uint64_t(stride)}, {64, box_rows},
                                  swizzled);
  };
  const int rows = Plan::kRows * Plan::kCluster;
  const int clusters =
      std::min(2 / Plan::kCluster, (M + rows - 1) / rows * ((N + Plan::kColumns - 1) / Plan::kColumns));
  Shape shape(dim3(unsigned(clusters * Plan::kCluster)), dim3(Plan::kThreads),
              sizeof(fastdl::cuda::hopper::Shared<T, Plan>), nullptr);
  shape.cluster = dim3(Plan::kCluster);
  launch(fastdl::cuda::hopper::matmul_kernel<T, kind, Plan>, shape,
         map(input.data, M, K, depth, Plan::kRows, !BUG("map not swizzled")),
         map(weight.data, N, K, depth, Plan::kColumns / Plan::kCluster), map(output.data, M, N, width, Plan::kBox),
         map(preactivation.data, M, N, width, Plan::kBox), epilogue, K);
  double worst = 0;
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < width; ++n) {
      const float y = float(output[size_t(m) * width + n]), z = float(preactivation[size_t(m) * width + n]);
      if (n < N) {
        const Sum sum = dot(&input[size_t(m) * depth], &weight[size_t(n) * depth], float(bias[n]), K);
        worst = worse(worst, sum.error<T>(y, kind == Activation::relu ? std::fmax(sum.value, 0) : sum.value));
        if (with_preactivation) worst = worse(worst, sum.error<T>(z, sum.value));
      } else if (!std::isnan(y) || !std::isnan(z)) {
        return INFINITY;
      }
    }
  }
  return worst;
}

constexpr Activation none = Activation::none, relu = Activation::relu;

}  // namespace

extern const std::vector<Case> hopper_cases = [] {
  std::vector<Case> cases = {
      {"hopper narrow 1x1x1", hopper_case<Narrow, bfloat16, relu, 1, 1, 1>},
      {"hopper narrow 130x129x65", hopper_case<Narrow, bfloat16, relu, 130, 129, 65>},
      {"hopper narrow tiles", hopper_case<Narrow, bfloat16, relu, 300, 300, 200>},
      {"hopper narrow long", hopper_case<Narrow, float16, none, 140, 264, 1096, true>},
      {"hopper wide 1x8x1", hopper_case<Wide, bfloat16, relu, 1, 8, 1>},
      {"hopper wide 257x40x31", hopper_case<Wide, bfloat16, relu, 257, 40, 31>},
      {"hopper wide tiles", hopper_case<Wide, bfloat16, relu, 300, 264, 328>},
      {"hopper wide preactivation", hopper_case<Wide, float16, none, 200, 300, 640, true>},
  };
  for (auto& probe : confirm_cases) cases.push_back({probe.name, probe.f});
  return cases;
}();

}  // namespace zoo
