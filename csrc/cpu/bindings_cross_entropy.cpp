// The cross entropy functions of fastdl._C.cpu.
#include "bindings.h"

namespace fastdl {
namespace {

CrossEntropyRows checked_rows(const char* name, int dtype, int64_t outer, int64_t classes, int64_t inner,
                              uintptr_t input, uintptr_t target, bool index, uintptr_t weight, int64_t ignore_index,
                              double label_smoothing) {
  check_dtype(name, dtype);
  if (outer < 1) refuse(name, "outer", outer, "1 or more");
  if (classes < 1) refuse(name, "classes", classes, "1 or more");
  if (inner < 1) refuse(name, "inner", inner, "1 or more");
  check_address(name, "input", input);
  check_address(name, "target", target);
  return {dtype,           outer, classes,         inner,        pointer(input),
          pointer(target), index, pointer(weight), ignore_index, label_smoothing};
}

void check_target(int64_t bad_row, uintptr_t target, int64_t classes) {
  if (bad_row < 0) return;
  throw std::out_of_range("cross_entropy: target of row " + std::to_string(bad_row) + " is " +
                          std::to_string(pointer<const int64_t>(target)[bad_row]) + ", allowed: 0 to " +
                          std::to_string(classes - 1) + " or ignore_index");
}

void cross_entropy(int dtype, int64_t outer, int64_t classes, int64_t inner, uintptr_t input, uintptr_t target,
                   bool index, uintptr_t weight, uintptr_t loss, uintptr_t denominator, uintptr_t statistics,
                   uintptr_t sums, int64_t ignore_index, double label_smoothing, int64_t context) {
  const char* name = "cross_entropy";
  CrossEntropyRows rows =
      checked_rows(name, dtype, outer, classes, inner, input, target, index, weight, ignore_index, label_smoothing);
  check_address(name, "loss", loss);
  check_address(name, "statistics", statistics);
  if (sums) check_address(name, "denominator", denominator);
  int64_t bad = kernels().cross_entropy({rows, pointer<void>(loss), pointer<void>(denominator),
                                         pointer<void>(statistics), pointer<void>(sums), threads_of(name, context)});
  check_target(bad, target, classes);
}

void cross_entropy_backward(int dtype, int64_t outer, int64_t classes, int64_t inner, uintptr_t input,
                            uintptr_t grad_loss, bool grad_by_row, uintptr_t target, bool index, uintptr_t weight,
                            uintptr_t denominator, uintptr_t statistics, uintptr_t grad_input, uintptr_t grad_target,
                            int64_t ignore_index, double label_smoothing, int64_t context) {
  const char* name = "cross_entropy_backward";
  CrossEntropyRows rows =
      checked_rows(name, dtype, outer, classes, inner, input, target, index, weight, ignore_index, label_smoothing);
  check_address(name, "grad_loss", grad_loss);
  check_address(name, "statistics", statistics);
  int64_t bad = kernels().cross_entropy_backward({rows, pointer(grad_loss), grad_by_row, pointer(denominator),
                                                  pointer(statistics), pointer<void>(grad_input),
                                                  pointer<void>(grad_target), threads_of(name, context)});
  check_target(bad, target, classes);
}

}  // namespace

void bind_cross_entropy(py::module_& module) {
  module.def("cross_entropy", &cross_entropy, py::arg("dtype"), py::arg("outer"), py::arg("classes"), py::arg("inner"),
             py::arg("input"), py::arg("target"), py::arg("index"), py::arg("weight"), py::arg("loss"),
             py::arg("denominator"), py::arg("statistics"), py::arg("sums"), py::arg("ignore_index"),
             py::arg("label_smoothing"), py::arg("context"), released(),
             "the losses of the rows of input[outer, classes, inner] or, with sums[2, rows], their sum and the mean's\n"
             "denominator; statistics[3, rows]: the largest logit, logsumexp less this, the mass");
  module.def("cross_entropy_backward", &cross_entropy_backward, py::arg("dtype"), py::arg("outer"), py::arg("classes"),
             py::arg("inner"), py::arg("input"), py::arg("grad_loss"), py::arg("grad_by_row"), py::arg("target"),
             py::arg("index"), py::arg("weight"), py::arg("denominator"), py::arg("statistics"), py::arg("grad_input"),
             py::arg("grad_target"), py::arg("ignore_index"), py::arg("label_smoothing"), py::arg("context"),
             released(), "the gradients whose address is not 0, of grad_loss / denominator");
}

}  // namespace fastdl
