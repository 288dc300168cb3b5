// The table of this instruction set's build.
#include "families.h"

#define STRING_OF(x) #x
#define STRING(x) STRING_OF(x)

namespace fastdl::ISA {
extern const Kernels kernels = {STRING(ISA),
                                linear,
                                activation_forward,
                                activation_backward,
                                conv_1x1,
                                conv_1x1_weight_gradient,
                                depthwise,
                                depthwise_weight_gradient,
                                channel_gradient,
                                batch_norm,
                                batch_norm_statistics,
                                batch_norm_backward,
                                pooling,
                                fractional_pooling,
                                fractional_pooling_backward,
                                recurrence,
                                recurrence_workspace,
                                recurrence_backward,
                                recurrence_backward_workspace,
                                recurrent_cell,
                                recurrent_cell_backward};
}
