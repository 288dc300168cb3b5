// Cross entropy of logits [outer, classes, inner], and its gradients; rows are laid out as softmax's. Forward reads the
// logits once, and again where the loss has terms of every class; backward once, with three numbers of each row.
#include "cross_entropy.h"
#include "softmax.cuh"

namespace fastdl::cuda {
namespace {

// What the losses of all rows share; a kernel's argument.
template <class T>
struct Loss {
  using C = Compute<T>;
  RowsView view;
  const T* logits;
  const int64_t* index;    // [rows] or null
  const T* probabilities;  // like the logits, or null
  const C* weight;         // [classes] or null
  int64_t ignore_index;
  C own, spread;  // parts of the target's own class and, for each class, of label smoothing

  explicit Loss(const CrossEntropyRows& rows)
      : view{rows.outer, rows.classes, rows.inner},
        logits(static_cast<const T*>(rows.logits)),
        index(rows.index ? static_cast<const int64_t*>(rows.target) : nullptr),
        probabilities(rows.index ? nullptr : static_cast<const T*>(rows.target)),
        weight(static_cast<const C*>(rows.weight)),
        ignore_index(rows.ignore_index),
        own(C(1 - rows.label_smoothing)),
        spread(C(rows.label_smoothing / double(rows.classes))) {}

  __device__ __forceinline__ bool is_dense() const { return probabilities || spread > 0; }
  __device__ __forceinline__ C weight_of(int64_t c) const { return weight ? weight[c] : C(1); }
  // What a class's logarithm is weighted by: for an index, without its own class's part.
  __device__ __forceinline__ C share(int64_t at, int64_t c) const {
    const C q = probabilities ? widen(probabilities[at]) * own + spread : spread;
    return q * weight_of(c);
  }
};

// A row's index: a class to read, its weight (NaN if there is no such class), and whether it is ignored.
template <class C>
struct Target {
  int64_t place;
  C weight;
  bool ignored;

  template <class T>
  __device__ __forceinline__ Target(const Loss<T>& loss, int64_t row) {
    const int64_t index = loss.index[row];
    const bool known = index >= 0 && index < loss.view.size;
    place = known ? index : 0;
    ignored = index == loss.ignore_index;
    weight = known ? loss.weight_of(index) : C(NAN);
  }
};

template <Layout layout, int width, class T>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks<T>)
    cross_entropy_kernel(Loss<T> loss_of, Compute<T>* loss,  // [rows]
                         Compute<T>* divisors,               // [rows] or null: parts of the mean's denominator
                         Compute<T>* statistics) {           // [3, rows]
  using C = Compute<T>;
  const int64_t rows = loss_of.view.outer * loss_of.view.inner;
  for (int64_t item = blockIdx.x; item < row_items<layout>(loss_of.view); item += gridDim.x) {
    const RowPart<layout, width> part(loss_of.view, item);
    const auto [largest, sum] = exponentials_of<width>(part, loss_of.logits);
    const C top = largest, logarithm = std::log(sum);
    C value = 0, mass = 0, divisor = 1;
    if (loss_of.is_dense()) {
      for_each_vector<width>(part, loss_of.logits, [&](int64_t at, int64_t c, const Vector<T, width>& x) {
#pragma unroll
        for (int i = 0; i < width; ++i) {
          const C share = loss_of.share(at + i, c + i);
          value += share * (top - widen(x.element[i]));
          mass += share;
        }
      });
      value = sum_of_row<layout>(value);
      mass = sum_of_row<layout>(mass);
      value += mass * logarithm;
    }
    if (!part.is_first) continue;
    if (loss_of.index) {
      const Target<C> target(loss_of, part.number);
      divisor = target.weight;
      value +=
          loss_of.own * divisor * ((top - widen(loss_of.logits[part.base + target.place * part.step])) + logarithm);
      mass += loss_of.own * divisor;
      if (target.ignored) value = mass = divisor = 0;
    }
    loss[part.number] = value;
    if (divisors) divisors[part.number] = divisor;
    statistics[part.number] = top;
    statistics[rows + part.number] = logarithm;
    statistics[2 * rows + part.number] = mass;
  }
}

// loss, denominator = the sums of sums[2, rows], by one block and in float64: few numbers, and always in one order.
template <class C>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks<C>)
    reduce_kernel(const C* sums, C* loss, C* denominator, int64_t rows) {
  double total = 0, divisor = 0;
  for (int64_t row = threadIdx.y * 32 + threadIdx.x; row < rows; row += kRowThreads) {
    total += sums[row];
    divisor += sums[rows + row];
  }
  total = sum_of_row<Layout::block>(total);
  divisor = sum_of_row<Layout::block>(divisor);
  if (threadIdx.x == 0 && threadIdx.y == 0) {
    *loss = C(total);
    *denominator = C(divisor);
  }
}

template <Layout layout, int width, class T>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks<T>)
    cross_entropy_backward_kernel(Loss<T> loss_of, const Compute<T>* grad_loss,  // [rows] if by_row, else [1]
                                  bool by_row, const Compute<T>* denominator,    // [1] or null
                                  const Compute<T>* statistics,                  // [3, rows]
                                  T* grad_logits, T* grad_target) {              // like the logits, or null
  using C = Compute<T>;
  const int64_t rows = loss_of.view.outer * loss_of.view.inner;
  for (int64_t item = blockIdx.x; item < row_items<layout>(loss_of.view); item += gridDim.x) {
    const RowPart<layout, width> part(loss_of.view, item);
    if (!part.inside) continue;  // nothing here is done by several threads together
    const C top = statistics[part.number], logarithm = statistics[rows + part.number];
    C factor = grad_loss[by_row ? part.number : 0];
    if (denominator) factor /= *denominator;
    const C scale = factor * statistics[2 * rows + part.number];
    int64_t place = -1;
    C own = 0;
    bool ignored = false;
    if (loss_of.index) {
      const Target<C> target(loss_of, part.number);
      place = target.place;
      ignored = target.ignored;
      own = factor * loss_of.own * target.weight;
    }
    for_each_vector<width>(part, loss_of.logits, [&](int64_t at, int64_t c, const Vector<T, width>& x) {
      C gradient[width], of_target[width];
#pragma unroll
      for (int i = 0; i < width; ++i) {
        const C value = (widen(x.element[i]) - top) - logarithm;
        gradient[i] = scale * std::exp(value);
        if (loss_of.is_dense()) gradient[i] -= factor * loss_of.share(at + i, c + i);
        if (c + i == place) gradient[i] -= own;
        if (ignored) gradient[i] = 0;
        of_target[i] = grad_target ? -(value * factor * loss_of.own * loss_of.weight_of(c + i)) : C(0);
      }
      if (grad_logits) store(grad_logits + at, gradient);
      if (grad_target) store(grad_target + at, of_target);
    });
  }
}

void require_rows(const char* name, const CrossEntropyRows& rows, const void* statistics) {
  require_view(name, {rows.outer, rows.classes, rows.inner}, "classes");
  require(rows.logits, name, "input", "0", "an address");
  require(rows.target, name, "target", "0", "an address");
  require(statistics, name, "statistics", "0", "an address");
}

}  // namespace

void cross_entropy(const CrossEntropyRows& rows, void* loss, void* denominator, void* statistics, void* sums,
                   cudaStream_t stream) {
  constexpr const char* name = "cross_entropy";
  require_rows(name, rows, statistics);
  require(loss, name, "loss", "0", "an address");
  require(!sums || denominator, name, "denominator", "0", "an address");
  dispatch_dtype(name, rows.dtype, [&]<class T>() {
    using C = Compute<T>;
    const Loss<T> loss_of(rows);
    const int64_t count = rows.outer * rows.inner;
    C *each = static_cast<C*>(sums ? sums : loss), *divisors = sums ? each + count : nullptr;
    with_layout<T>(loss_of.view, aligned(16, rows.logits), [&]<Layout layout, int width>() {
      launch(cross_entropy_kernel<layout, width, T>, row_shape(row_items<layout>(loss_of.view), stream), loss_of, each,
             divisors, static_cast<C*>(statistics));
    });
    if (sums) {
      launch(reduce_kernel<C>, row_shape(1, stream), each, static_cast<C*>(loss), static_cast<C*>(denominator), count);
    }
  });
}

void cross_entropy_backward(const CrossEntropyRows& rows, const void* grad_loss, bool by_row, const void* denominator,
                            const void* statistics, void* grad_logits, void* grad_target, cudaStream_t stream) {
  constexpr const char* name = "cross_entropy_backward";
  require_rows(name, rows, statistics);
  require(grad_loss, name, "grad_loss", "0", "an address");
  dispatch_dtype(name, rows.dtype, [&]<class T>() {
    using C = Compute<T>;
    const Loss<T> loss_of(rows);
    const bool is_aligned = aligned(16, rows.logits, grad_logits, grad_target);
    with_layout<T>(loss_of.view, is_aligned, [&]<Layout layout, int width>() {
      launch(cross_entropy_backward_kernel<layout, width, T>, row_shape(row_items<layout>(loss_of.view), stream),
             loss_of, static_cast<const C*>(grad_loss), by_row, static_cast<const C*>(denominator),
             static_cast<const C*>(statistics), static_cast<T*>(grad_logits), static_cast<T*>(grad_target));
    });
  });
}

}  // namespace fastdl::cuda
