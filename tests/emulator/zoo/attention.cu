// The library's attention, as plant.py has prepared it, against its formula in double precision.
#include "zoo.h"
// BUG comes first
#include <vector>

#include "planted_attention.cu"
#include "planted_attention_backward.cu"
#include "reference.h"

namespace zoo {
namespace {

using namespace fastdl::cuda;

// Two heads that share one of keys, causal.
template <class T>
struct Attending {
  static constexpr int kHeads = 2;
  // What roundings to T and sums in single precision allow.
  static constexpr double kAllowed = sizeof(T) == 2 ? 1. / 32 : 1e-4, kScale = 0.7;
  const int queries, keys, size;
  Array<T> query, key, value, output, grad_output, grad_query, grad_key, grad_value;
  Array<float> logsumexp;
  std::vector<double> dq, dk, dv;

  Attending(int queries, int keys, int size)
      : queries(queries),
        keys(keys),
        size(size),
        query(size_t(kHeads) * queries * size),
        key(size_t(keys) * size),
        value(size_t(keys) * size),
        output(size_t(kHeads) * queries * size),
        grad_output(size_t(kHeads) * queries * size),
        grad_query(size_t(kHeads) * queries * size),
        grad_key(size_t(keys) * size),
        grad_value(size_t(keys) * size),
        logsumexp(size_t(kHeads) * queries) {
    for (auto* array : {&query, &key, &value, &grad_output}) {
      for (int i = 0; i < (array == &key || array == &value ? keys : kHeads * queries) * size; ++i) {
        (*array)[i] = T(uniform() * (array == &key ? 1 + 3.f * i / (keys * size) : 1));  // scores that rise
      }
    }
  }

  int dtype() const { return sizeof(T) == 2 ? 1 : 0; }
  AttentionShape shape() const {
    return {1, kHeads, kHeads, queries, keys, size, size, nullptr, nullptr, queries, keys};
  }
  AttentionScores scores() const { return {kScale, -1, 0, false, 0, {}, 0, 0, 0, 0, {}, 0, 0, nullptr}; }
  Heads<const void*> of_query(Array<T>& array) const { return {array.data, 0, size, int64_t(queries) * size}; }
  Heads<const void*> of_key(Array<T>& array) const { return {array.data, 0, size, 0}; }
  Heads<void*> to(const Heads<const void*>& heads) const {
    return {const_cast<void*>(heads.data), heads.batch_stride, heads.row_stride, heads.head_stride};
  }

  // The error of the output; also fills the gradients' sums.
  double forward() {
    attention({dtype(), shape(), scores(), of_query(query), of_key(key), of_key(value), to(of_query(output)),
               logsumexp.data, false, nullptr});
    double worst = 0;
    dq.assign(size_t(kHeads) * queries * size, 0);
    dk.assign(size_t(keys) * size, 0);
    dv = dk;
    for (int row = 0; row < kHeads * queries; ++row) {
      const int seen = std::min(keys, row % queries + 1);
      std::vector<double> p(seen), dp(seen), o(size, 0);
      double total = 0, delta = 0;
      for (int j = 0; j < seen; ++j) {
        p[j] = std::exp(kScale * dot(&query[row * size], &key[j * size], 0, size).value);
        dp[j] = dot(&grad_output[row * size], &value[j * size], 0, size).value;
        total += p[j];
      }
      for (int j = 0; j < seen; ++j) {
        p[j] /= total;
        delta += p[j] * dp[j];
        for (int d = 0; d < size; ++d) o[d] += p[j] * float(value[j * size + d]);
      }
      for (int d = 0; d < size; ++d) {
        worst = worse(worst, std::fabs(float(output[row * size + d]) - o[d]) / kAllowed);
      }
      worst = worse(worst, std::fabs(logsumexp[row] - std::log(total)) / 1e-4);
      for (int j = 0; j < seen; ++j) {
        const double ds = p[j] * (dp[j] - delta) * kScale;
        for (int d = 0; d < size; ++d) {
          dq[row * size + d] += ds * float(key[j * size + d]);
          dk[j * size + d] += ds * float(query[row * size + d]);
          dv[j * size + d] += p[j] * float(grad_output[row * size + d]);
        }
      }
    }
    return worst;
  }

  double backward() {
    double worst = forward();
    Array<char> workspace(attention_backward_workspace(dtype(), shape()));
    attention_backward({dtype(), shape(), scores(), of_query(grad_output), of_query(query), of_key(key), of_key(value),
                        of_query(output), logsumexp.data, nullptr, to(of_query(grad_query)), to(of_key(grad_key)),
                        to(of_key(grad_value)), nullptr, false, workspace.data, nullptr});
    auto compare = [&](Array<T>& got, const std::vector<double>& exact) {
      for (size_t i = 0; i < exact.size(); ++i) {
        worst = worse(worst, std::fabs(float(got[i]) - exact[i]) / (kAllowed * (1 + std::fabs(exact[i]))));
      }
    };
    compare(grad_query, dq);
    compare(grad_key, dk);
    compare(grad_value, dv);
    return worst;
  }
};

}  // namespace

extern const std::vector<Case> attention_cases = {
    {"attention bf16", [] { return Attending<bfloat16>(110, 150, 40).forward(); }},
    {"attention float32", [] { return Attending<float>(70, 150, 20).forward(); }},
    {"attention gradient bf16", [] { return Attending<bfloat16>(70, 150, 40).backward(); }},
    {"attention gradient float32", [] { return Attending<float>(70, 90, 20).backward(); }},
};

}  // namespace zoo
