"""The package's functions: torch.nn.functional's names and signatures, plus keyword-only options."""

from fastdl.functional.activation import elu, gelu, leaky_relu, relu, sigmoid, silu, tanh
from fastdl.functional.batch_norm import batch_norm
from fastdl.functional.conv import conv1d, conv2d
from fastdl.functional.linear import linear
from fastdl.functional.pooling import adaptive_avg_pool2d, avg_pool2d, fractional_max_pool2d, max_pool2d

__all__ = [
    "adaptive_avg_pool2d",
    "avg_pool2d",
    "batch_norm",
    "conv1d",
    "conv2d",
    "elu",
    "fractional_max_pool2d",
    "gelu",
    "leaky_relu",
    "linear",
    "max_pool2d",
    "relu",
    "sigmoid",
    "silu",
    "tanh",
]
