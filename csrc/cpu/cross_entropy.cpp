// Cross entropy of logits [outer, classes, inner] and its gradients: each row's maximum, sum of exponentials and loss
// in one go; the gradient in one pass, from three numbers kept for each row.
#include "kernels/cross_entropy.h"

#include "softmax.h"

namespace fastdl::ISA {
FASTDL_CPU_CROSS_ENTROPY(DECLARE)

// What the losses of all rows share.
template <class T>
struct Loss {
  using S = Compute<T>;
  using V = Vector<S>;
  const T* logits;
  const int64_t* index;    // or null
  const T* probabilities;  // or null
  const S* weight;         // or null
  int64_t outer, classes, inner, rows, ignore_index;
  S own, spread;  // parts of the target's own class and, for each class, of label smoothing

  explicit Loss(const CrossEntropyRows& r)
      : logits(static_cast<const T*>(r.logits)),
        index(r.index ? static_cast<const int64_t*>(r.target) : nullptr),
        probabilities(r.index ? nullptr : static_cast<const T*>(r.target)),
        weight(static_cast<const S*>(r.weight)),
        outer(r.outer),
        classes(r.classes),
        inner(r.inner),
        rows(r.outer * r.inner),
        ignore_index(r.ignore_index),
        own(static_cast<S>(1 - r.label_smoothing)),
        spread(static_cast<S>(r.label_smoothing / static_cast<double>(r.classes))) {}
  int64_t first_bad_row() const {
    if (index)
      for (int64_t row = 0; row < rows; row++)
        if (index[row] != ignore_index && (index[row] < 0 || index[row] >= classes)) return row;
    return -1;
  }
  bool ignores(int64_t row) const { return index && index[row] == ignore_index; }
  // whether a loss has terms of every class
  bool is_dense() const { return probabilities || spread > 0; }
  S weight_of(int64_t c) const { return weight ? weight[c] : 1; }
  // What a class's logarithm is weighted by: for an index, without its own class's part. `at`: the offset of the first
  // of n classes of a row, which are from c.
  INLINE V share(int64_t at, int64_t c, int64_t n) const {
    V q = broadcast<V>(spread);
    if (probabilities) q += load(probabilities + at, n) * own;
    return weight ? q * load(weight + c, n) : q;
  }
  // the same of one class for n rows
  INLINE V share_across(int64_t at, int64_t c, int64_t n) const {
    V q = broadcast<V>(spread);
    if (probabilities) q += load(probabilities + at, n) * own;
    return q * weight_of(c);
  }
};

// ---- forward ----
template <class T>
struct Results {
  using S = Compute<T>;
  S *loss, *divisors, *largest, *logarithms, *masses;

  // `dense` and `mass`: a row's sums of shares times differences from the largest logit, and of shares
  void finish(const Loss<T>& loss_of, int64_t row, int64_t at, S top, S logsum, S dense, S mass) const {
    S value = 0, divisor = 1;
    if (loss_of.ignores(row)) {
      divisor = mass = 0;
    } else {
      if (loss_of.is_dense()) value = dense + mass * logsum;
      if (loss_of.index) {
        int64_t c = loss_of.index[row];
        divisor = loss_of.weight_of(c);
        S logit = load(loss_of.logits + at + c * loss_of.inner, 1)[0];
        value += loss_of.own * divisor * ((top - logit) + logsum);
        mass += loss_of.own * divisor;
      }
    }
    loss[row] = value;
    if (divisors) divisors[row] = divisor;
    largest[row] = top;
    logarithms[row] = logsum;
    masses[row] = mass;
  }
};

template <class T>
static int64_t forward_of(const CrossEntropyArguments& arguments) {
  using S = Compute<T>;
  using V = Vector<S>;
  const Loss<T> loss(arguments.rows);
  const int64_t rows = loss.rows, classes = loss.classes, inner = loss.inner;
  if (int64_t bad = loss.first_bad_row(); bad >= 0) return bad;
  S *sums = static_cast<S*>(arguments.sums), *statistics = static_cast<S*>(arguments.statistics);
  const Results<T> results{sums ? sums : static_cast<S*>(arguments.loss), sums ? sums + rows : nullptr, statistics,
                           statistics + rows, statistics + 2 * rows};
  if (inner == 1) {
    for_each_rows(rows, classes, arguments.threads, [&](int64_t first, int64_t end) {
      for (int64_t row = first; row < end; row++) {
        const T* x = loss.logits + row * classes;
        S top = largest_of_row(x, classes), dense = 0, mass = 0;
        S logsum = logarithm_of(sum_of_exponentials(x, classes, top, [](auto...) {}));
        if (loss.is_dense()) {
          V terms[4] = {}, shares[4] = {};
          for_each_four<S>(classes, [&](int64_t c, auto u, auto n) __attribute__((always_inline)) {
            V q = first_lanes(loss.share(row * classes + c, c, n), n, S(0));
            terms[u] += first_lanes(q * (top - load(x + c, n)), n, S(0));
            shares[u] += q;
          });
          dense = sum_of_lanes((terms[0] + terms[1]) + (terms[2] + terms[3]));
          mass = sum_of_lanes((shares[0] + shares[1]) + (shares[2] + shares[3]));
        }
        results.finish(loss, row, row * classes, top, logsum, dense, mass);
      }
    });
  } else {
    for_each_strip(loss.outer, classes, inner, arguments.threads, [&](int64_t o, int64_t first, int64_t count) {
      S largest[strip_rows], exponentials[strip_rows], dense[strip_rows] = {}, mass[strip_rows] = {};
      int64_t start = o * classes * inner + first;
      strip_sums(loss.logits + start, classes, inner, count, largest, exponentials, [](auto...) {});
      if (loss.is_dense())
        for (int64_t c = 0; c < classes; c++)
          for_each_vector<S>(count, [&](int64_t i, auto n) __attribute__((always_inline)) {
            int64_t at = start + c * inner + i;
            V q = loss.share_across(at, c, n);
            store(dense + i, load(dense + i) + q * (load(largest + i) - load(loss.logits + at, n)));
            store(mass + i, load(mass + i) + q);
          });
      for (int64_t i = 0; i < count; i += lanes<S>) store(exponentials + i, logarithm(load(exponentials + i)));
      for (int64_t i = 0; i < count; i++)
        results.finish(loss, o * inner + first + i, start + i, largest[i], exponentials[i], dense[i], mass[i]);
    });
  }
  if (sums) {
    double total = 0, divisor = 0;
    for (int64_t row = 0; row < rows; row++) {
      total += sums[row];
      divisor += sums[rows + row];
    }
    *static_cast<S*>(arguments.loss) = static_cast<S>(total);
    *static_cast<S*>(arguments.denominator) = static_cast<S>(divisor);
  }
  return -1;
}

// ---- backward ----
template <class T>
static int64_t backward_of(const CrossEntropyBackwardArguments& arguments) {
  using S = Compute<T>;
  using V = Vector<S>;
  const Loss<T> loss(arguments.rows);
  const int64_t rows = loss.rows, classes = loss.classes, inner = loss.inner;
  if (int64_t bad = loss.first_bad_row(); bad >= 0) return bad;
  const S *grad_loss = static_cast<const S*>(arguments.grad_loss),
          *denominator = static_cast<const S*>(arguments.denominator),
          *largest = static_cast<const S*>(arguments.statistics), *logarithms = largest + rows,
          *masses = logarithms + rows;
  T *grad_logits = static_cast<T*>(arguments.grad_logits), *grad_target = static_cast<T*>(arguments.grad_target);
  auto factor_of = [=](int64_t row) {
    S factor = grad_loss[arguments.grad_by_row ? row : 0];
    return denominator ? factor / *denominator : factor;
  };
  // of rows whose numbers are vectors, or the same for all lanes; q: shares without own class
  struct Pair {
    V logits, target;
  };
  auto gradients_of = [&](V x, V top, V logsum, V factor, V mass, V q, V w) __attribute__((always_inline)) {
    V logit = (x - top) - logsum, gradient{};
    if (grad_logits) {
      gradient = factor * mass * exp_at_most_89(logit);
      if (loss.is_dense()) gradient -= factor * q;
    }
    return Pair{gradient, logit * factor * w * -loss.own};
  };
  // the gradient of an index's own class, once more
  auto put_own = [&](int64_t row, S factor) {
    int64_t c = loss.index[row], at = row * classes + c;
    S w = loss.weight_of(c);
    V logit = (load(loss.logits + at, 1) - largest[row]) - logarithms[row];
    store(grad_logits + at, factor * (masses[row] * exp_at_most_89(logit) - (loss.own + loss.spread) * w), 1);
  };
  if (inner == 1) {
    for_each_rows(rows, classes, arguments.threads, [&](int64_t first, int64_t end) {
      for (int64_t row = first; row < end; row++) {
        int64_t start = row * classes;
        if (loss.ignores(row)) {
          if (grad_logits) __builtin_memset(grad_logits + start, 0, classes * sizeof(T));
          continue;
        }
        S factor = factor_of(row);
        V factors = broadcast<V>(factor), top = broadcast<V>(largest[row]), logsum = broadcast<V>(logarithms[row]),
          mass = broadcast<V>(masses[row]);
        for_each_vector<S>(classes, [&](int64_t c, auto n) __attribute__((always_inline)) {
          V q = loss.is_dense() ? loss.share(start + c, c, n) : V{};
          V w = grad_target && loss.weight ? load(loss.weight + c, n) : broadcast<V>(S(1));
          auto [gradient, of_target] = gradients_of(load(loss.logits + start + c, n), top, logsum, factors, mass, q, w);
          if (grad_logits) store(grad_logits + start + c, gradient, n);
          if (grad_target) store(grad_target + start + c, of_target, n);
        });
        if (grad_logits && loss.index) put_own(row, factor);
      }
    });
    return -1;
  }
  using I = std::conditional_t<sizeof(S) == 8, int64_t, int32_t>;  // as wide as S: masks of its lanes
  for_each_strip(loss.outer, classes, inner, arguments.threads, [&](int64_t o, int64_t first, int64_t count) {
    S factors[strip_rows] = {}, own[strip_rows] = {};
    I place[strip_rows] = {};  // of a row's own class, or -1 for an ignored row
    int64_t start = o * classes * inner + first, row = o * inner + first;
    for (int64_t i = 0; i < count; i++) {
      factors[i] = factor_of(row + i);
      if (!loss.index) continue;
      place[i] = loss.ignores(row + i) ? -1 : static_cast<I>(loss.index[row + i]);
      if (place[i] >= 0) own[i] = factors[i] * loss.own * loss.weight_of(place[i]);
    }
    for (int64_t c = 0; c < classes; c++)
      for_each_vector<S>(count, [&](int64_t i, auto n) __attribute__((always_inline)) {
        int64_t at = start + c * inner + i;
        V q = loss.is_dense() ? loss.share_across(at, c, n) : V{}, w = broadcast<V>(loss.weight_of(c));
        auto [gradient, of_target] =
            gradients_of(load(loss.logits + at, n), load(largest + row + i, n), load(logarithms + row + i, n),
                         load(factors + i), load(masses + row + i, n), q, w);
        if (loss.index) {
          Vector<I> places;
          __builtin_memcpy(&places, place + i, sizeof places);
          gradient = places == static_cast<I>(c) ? gradient - load(own + i) : gradient;
          gradient = places < 0 ? V{} : gradient;
        }
        if (grad_logits) store(grad_logits + at, gradient, n);
        if (grad_target) store(grad_target + at, of_target, n);
      });
  });
  return -1;
}

int64_t cross_entropy(const CrossEntropyArguments& arguments) {
  int64_t bad = -1;
  with_dtype(arguments.rows.dtype, [&](auto type) { bad = forward_of<typename decltype(type)::type>(arguments); });
  return bad;
}

int64_t cross_entropy_backward(const CrossEntropyBackwardArguments& arguments) {
  int64_t bad = -1;
  with_dtype(arguments.rows.dtype, [&](auto type) { bad = backward_of<typename decltype(type)::type>(arguments); });
  return bad;
}

}  // namespace fastdl::ISA
