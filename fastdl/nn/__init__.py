"""Drop-in modules: subclasses of torch.nn's of the same name, with the same constructor, state_dict and results."""

from fastdl.nn.activation import ELU, GELU, LeakyReLU, ReLU, Sigmoid, SiLU, Tanh
from fastdl.nn.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d, BNReLU2d, SyncBatchNorm
from fastdl.nn.conv import Conv1d, Conv2d, ConvReLU2d
from fastdl.nn.linear import Linear, LinearReLU

__all__ = [
    "ELU",
    "GELU",
    "BNReLU2d",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Conv1d",
    "Conv2d",
    "ConvReLU2d",
    "LeakyReLU",
    "Linear",
    "LinearReLU",
    "ReLU",
    "SiLU",
    "Sigmoid",
    "SyncBatchNorm",
    "Tanh",
]
