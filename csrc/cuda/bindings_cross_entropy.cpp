// Cross entropy of fastdl._C.cuda.
#include "bindings.h"
#include "cross_entropy.h"

namespace fastdl {

void bind_cuda_cross_entropy(py::module_& module) {
  module.def(
      "cross_entropy",
      [](int dtype, int64_t outer, int64_t classes, int64_t inner, Address input, Address target, bool index,
         Address weight, Address loss, Address denominator, Address statistics, Address sums, int64_t ignore_index,
         double label_smoothing, Address context) {
        cuda::cross_entropy({dtype, outer, classes, inner, pointer(input), pointer(target), index, pointer(weight),
                             ignore_index, label_smoothing},
                            pointer(loss), pointer(denominator), pointer(statistics), pointer(sums), stream(context));
      },
      released(), py::arg("dtype"), py::arg("outer"), py::arg("classes"), py::arg("inner"), py::arg("input"),
      py::arg("target"), py::arg("index"), py::arg("weight"), py::arg("loss"), py::arg("denominator"),
      py::arg("statistics"), py::arg("sums"), py::arg("ignore_index"), py::arg("label_smoothing"), py::arg("context"),
      "the losses of the rows of input[outer, classes, inner] or, with sums[2, rows], their sum and the mean's "
      "denominator; statistics[3, rows]: the largest logit, logsumexp less this, the mass");

  module.def(
      "cross_entropy_backward",
      [](int dtype, int64_t outer, int64_t classes, int64_t inner, Address input, Address grad_loss, bool grad_by_row,
         Address target, bool index, Address weight, Address denominator, Address statistics, Address grad_input,
         Address grad_target, int64_t ignore_index, double label_smoothing, Address context) {
        cuda::cross_entropy_backward({dtype, outer, classes, inner, pointer(input), pointer(target), index,
                                      pointer(weight), ignore_index, label_smoothing},
                                     pointer(grad_loss), grad_by_row, pointer(denominator), pointer(statistics),
                                     pointer(grad_input), pointer(grad_target), stream(context));
      },
      released(), py::arg("dtype"), py::arg("outer"), py::arg("classes"), py::arg("inner"), py::arg("input"),
      py::arg("grad_loss"), py::arg("grad_by_row"), py::arg("target"), py::arg("index"), py::arg("weight"),
      py::arg("denominator"), py::arg("statistics"), py::arg("grad_input"), py::arg("grad_target"),
      py::arg("ignore_index"), py::arg("label_smoothing"), py::arg("context"),
      "the gradients whose address is not 0, of grad_loss / denominator");
}

}  // namespace fastdl
