// The functions of one instruction set's build, one declaration for each entry of Kernels.
#pragma once
#include "simd.h"

namespace fastdl::ISA {
void linear(const LinearArguments&);
void activation_forward(const ForwardArguments&);
void activation_backward(const BackwardArguments&);
void conv_1x1(const Conv1x1Arguments&);
void conv_1x1_weight_gradient(const Conv1x1GradientArguments&);
void depthwise(const DepthwiseArguments&);
void depthwise_weight_gradient(const DepthwiseArguments&);
void channel_gradient(const ChannelGradientArguments&);
void batch_norm(const BatchNormArguments&);
void batch_norm_statistics(const BatchNormStatisticsArguments&);
void batch_norm_backward(const BatchNormBackwardArguments&);
void pooling(const PoolingArguments&);
void fractional_pooling(const FractionalArguments&);
void fractional_pooling_backward(const FractionalArguments&);
void recurrence(const RecurrenceArguments&);
int64_t recurrence_workspace(int dtype, int mode, const Sequence&, bool projection);
void recurrence_backward(const RecurrenceBackwardArguments&);
int64_t recurrence_backward_workspace(int dtype, int mode, const Sequence&, bool projection);
void recurrent_cell(const CellArguments&);
void recurrent_cell_backward(const CellBackwardArguments&);
}  // namespace fastdl::ISA
