"""The package's functions: torch.nn.functional's names and signatures, plus keyword-only options."""

from fastdl.functional.activation import elu, gelu, leaky_relu, relu, sigmoid, silu, tanh
from fastdl.functional.attention import scaled_dot_product_attention, varlen_attention
from fastdl.functional.batch_norm import batch_norm
from fastdl.functional.conv import conv1d, conv2d
from fastdl.functional.cross_entropy import cross_entropy, linear_cross_entropy
from fastdl.functional.dropout import dropout
from fastdl.functional.embedding import embedding
from fastdl.functional.layer_norm import layer_norm, rms_norm
from fastdl.functional.linear import linear
from fastdl.functional.pooling import adaptive_avg_pool2d, avg_pool2d, fractional_max_pool2d, max_pool2d
from fastdl.functional.rnn import gru, gru_cell, lstm, lstm_cell, rnn_relu, rnn_relu_cell, rnn_tanh, rnn_tanh_cell
from fastdl.functional.softmax import log_softmax, softmax

__all__ = [
    "adaptive_avg_pool2d",
    "avg_pool2d",
    "batch_norm",
    "conv1d",
    "conv2d",
    "cross_entropy",
    "dropout",
    "elu",
    "embedding",
    "fractional_max_pool2d",
    "gelu",
    "gru",
    "gru_cell",
    "layer_norm",
    "leaky_relu",
    "linear",
    "linear_cross_entropy",
    "log_softmax",
    "lstm",
    "lstm_cell",
    "max_pool2d",
    "relu",
    "rms_norm",
    "rnn_relu",
    "rnn_relu_cell",
    "rnn_tanh",
    "rnn_tanh_cell",
    "scaled_dot_product_attention",
    "sigmoid",
    "silu",
    "softmax",
    "tanh",
    "varlen_attention",
]
