"""fastdl: the layers of deep learning by hand-written Triton, CUDA C++ and C++ kernels.

Importing it touches no GPU, compiles nothing and changes no global.
"""

import torch as _torch  # first: its OpenMP runtime is the one that the compiled kernels then share

from fastdl import functional, nn
from fastdl._version import __version__
from fastdl.activations import Activation
from fastdl.dispatch import Call, Selection, UnsupportedError, trace, use_backend
from fastdl.information import info
from fastdl.nn.batch_norm import fold_batch_norm
from fastdl.proof import prove_at_first_call
from fastdl.replace import explain, replace_layers, restore_layers

del _torch

__all__ = [
    "Activation",
    "Call",
    "Selection",
    "UnsupportedError",
    "__version__",
    "explain",
    "fold_batch_norm",
    "functional",
    "info",
    "nn",
    "prove_at_first_call",
    "replace_layers",
    "restore_layers",
    "trace",
    "use_backend",
]
