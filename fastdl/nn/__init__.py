"""Drop-in modules: subclasses of torch.nn's of the same name, with the same constructor, state_dict and results."""

from fastdl.nn.activation import ELU, GELU, LeakyReLU, ReLU, Sigmoid, SiLU, Tanh
from fastdl.nn.attention import MultiheadAttention
from fastdl.nn.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d, BNReLU2d, SyncBatchNorm
from fastdl.nn.conv import Conv1d, Conv2d, ConvReLU2d
from fastdl.nn.cross_entropy import CrossEntropyLoss, LinearCrossEntropyLoss
from fastdl.nn.dropout import Dropout
from fastdl.nn.embedding import Embedding
from fastdl.nn.layer_norm import LayerNorm, RMSNorm
from fastdl.nn.linear import Linear, LinearReLU
from fastdl.nn.pooling import AdaptiveAvgPool2d, AvgPool2d, FractionalMaxPool2d, MaxPool2d
from fastdl.nn.rnn import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
from fastdl.nn.softmax import LogSoftmax, Softmax
from fastdl.nn.transformer import (
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)

__all__ = [
    "ELU",
    "GELU",
    "AdaptiveAvgPool2d",
    "AvgPool2d",
    "BNReLU2d",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Conv1d",
    "Conv2d",
    "ConvReLU2d",
    "CrossEntropyLoss",
    "Embedding",
    "Dropout",
    "FractionalMaxPool2d",
    "GRU",
    "GRUCell",
    "LSTM",
    "LSTMCell",
    "LayerNorm",
    "LeakyReLU",
    "Linear",
    "LinearCrossEntropyLoss",
    "LinearReLU",
    "LogSoftmax",
    "MaxPool2d",
    "RMSNorm",
    "MultiheadAttention",
    "RNN",
    "RNNCell",
    "ReLU",
    "SiLU",
    "Sigmoid",
    "Softmax",
    "SyncBatchNorm",
    "Tanh",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]
