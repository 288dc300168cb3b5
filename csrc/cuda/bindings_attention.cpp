// Attention of fastdl._C.cuda.
#include <array>

#include "attention.h"
#include "bindings.h"

namespace fastdl {
namespace {

using Place = std::array<int64_t, 4>;  // address, then the strides of batch, row and head

template <class Pointer>
cuda::Heads<Pointer> heads_of(const Place& place) {
  return {reinterpret_cast<Pointer>(place[0]), place[1], place[2], place[3]};
}

}  // namespace

void bind_cuda_attention(py::module_& module) {
  // Local to the module: another build of the same kernels may be loaded, too.
  py::class_<cuda::AttentionShape>(module, "AttentionShape", py::module_local(), "The sizes of a batch of heads.")
      .def(py::init([](int64_t batch, int64_t heads, int64_t group, int64_t queries, int64_t keys, int64_t size,
                       int64_t value_size, Address query_offsets, Address key_offsets, int64_t longest_queries,
                       int64_t longest_keys) {
             return cuda::AttentionShape{batch,
                                         heads,
                                         group,
                                         queries,
                                         keys,
                                         size,
                                         value_size,
                                         static_cast<const int64_t*>(pointer(query_offsets)),
                                         static_cast<const int64_t*>(pointer(key_offsets)),
                                         longest_queries,
                                         longest_keys};
           }),
           py::arg("batch"), py::arg("heads"), py::arg("group"), py::arg("queries"), py::arg("keys"), py::arg("size"),
           py::arg("value_size"), py::arg("query_offsets"), py::arg("key_offsets"), py::arg("longest_queries"),
           py::arg("longest_keys"));
  py::class_<cuda::AttentionScores>(module, "AttentionScores", py::module_local(),
                                    "How scores are made of queries and keys.")
      .def(py::init([](double scale, int64_t left, int64_t right, bool bottom_right, int mask_kind, Address mask,
                       const std::array<int64_t, 4>& mask_strides, Address slopes, int64_t slopes_batch_stride,
                       double dropout, Address seed) {
             return cuda::AttentionScores{scale,           left,
                                          right,           bottom_right,
                                          mask_kind,       pointer(mask),
                                          mask_strides[0], mask_strides[1],
                                          mask_strides[2], mask_strides[3],
                                          pointer(slopes), slopes_batch_stride,
                                          dropout,         static_cast<const int64_t*>(pointer(seed))};
           }),
           py::arg("scale"), py::arg("left"), py::arg("right"), py::arg("bottom_right"), py::arg("mask_kind"),
           py::arg("mask"), py::arg("mask_strides"), py::arg("slopes"), py::arg("slopes_batch_stride"),
           py::arg("dropout"), py::arg("seed"));

  module.def(
      "attention",
      [](int dtype, const cuda::AttentionShape& shape, const cuda::AttentionScores& scores, const Place& query,
         const Place& key, const Place& value, const Place& output, Address logsumexp, bool allow_tf32,
         Address context) {
        cuda::attention({dtype, shape, scores, heads_of<const void*>(query), heads_of<const void*>(key),
                         heads_of<const void*>(value), heads_of<void*>(output), pointer(logsumexp), allow_tf32,
                         stream(context)});
      },
      released(), py::arg("dtype"), py::arg("shape"), py::arg("scores"), py::arg("query"), py::arg("key"),
      py::arg("value"), py::arg("output"), py::arg("logsumexp"), py::arg("allow_tf32"), py::arg("context"),
      "output = dropout(softmax(scores)) value; a tensor is its address and the strides of batch, row and head.");

  module.def(
      "attention_backward",
      [](int dtype, const cuda::AttentionShape& shape, const cuda::AttentionScores& scores, const Place& grad_output,
         const Place& query, const Place& key, const Place& value, const Place& output, Address logsumexp,
         Address grad_logsumexp, const Place& grad_query, const Place& grad_key, const Place& grad_value,
         Address grad_mask, bool allow_tf32, Address workspace, Address context) {
        cuda::attention_backward(
            {dtype, shape, scores, heads_of<const void*>(grad_output), heads_of<const void*>(query),
             heads_of<const void*>(key), heads_of<const void*>(value), heads_of<const void*>(output),
             pointer(logsumexp), pointer(grad_logsumexp), heads_of<void*>(grad_query), heads_of<void*>(grad_key),
             heads_of<void*>(grad_value), pointer(grad_mask), allow_tf32, pointer(workspace), stream(context)});
      },
      released(), py::arg("dtype"), py::arg("shape"), py::arg("scores"), py::arg("grad_output"), py::arg("query"),
      py::arg("key"), py::arg("value"), py::arg("output"), py::arg("logsumexp"), py::arg("grad_logsumexp"),
      py::arg("grad_query"), py::arg("grad_key"), py::arg("grad_value"), py::arg("grad_mask"), py::arg("allow_tf32"),
      py::arg("workspace"), py::arg("context"),
      "The gradients of attention; one whose address is 0 is not made. grad_mask is [batch, heads, queries, keys].");

  module.def("attention_backward_workspace", &cuda::attention_backward_workspace, py::arg("dtype"), py::arg("shape"),
             "bytes of workspace for attention_backward");
}

}  // namespace fastdl
