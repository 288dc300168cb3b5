"""What every call of a native kernel needs: dtype codes, the stream or thread count, addresses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdl import dispatch

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
FLOATING = tuple(DTYPE_CODES)
# Outputs of this size get huge pages: a page fault for each 4 KiB costs more than the kernel itself.
_HUGE_PAGES_FROM = 4 << 20


def kernels(backend: str) -> Any:
    """The module of native kernels of a backend."""
    return dispatch.cuda_kernels() if backend == "cuda" else dispatch.native().cpu


def context(tensor: Tensor) -> int:
    """The last argument of a native call: the current stream for a GPU, else the number of threads."""
    if tensor.is_cuda:
        return int(torch.cuda.current_stream(tensor.device).cuda_stream)
    return torch.get_num_threads()


def address(tensor: Tensor | None) -> int:
    """The address of a tensor's first element; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def empty(shape: tuple[int, ...] | torch.Size, like: Tensor) -> Tensor:
    """An uninitialised contiguous tensor of ``like``'s dtype and device."""
    return huge_pages(torch.empty(shape, dtype=like.dtype, device=like.device))


def empty_like(tensor: Tensor, memory_format: torch.memory_format) -> Tensor:
    """An uninitialised tensor of the same shape, dtype and device, in this memory format."""
    return huge_pages(torch.empty_like(tensor, memory_format=memory_format))


def allow_tf32(tensor: Tensor, family: str) -> bool:
    """Whether torch's switch for "conv" or "rnn" on the tensor's device allows TF32; a CPU's is for tests."""
    library: Any = torch.backends.cudnn if tensor.is_cuda else torch.backends.mkldnn
    return bool(getattr(library, family).fp32_precision == "tf32")


def matmul_allows_tf32() -> bool:
    """Whether torch's switch for matrix products allows TF32."""
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


def workspace(bytes_: int, like: Tensor) -> Tensor | None:
    """Uninitialised memory for a kernel on ``like``'s device, or None for 0 bytes."""
    return torch.empty(bytes_, dtype=torch.uint8, device=like.device) if bytes_ else None


def huge_pages(fresh: Tensor) -> Tensor:
    """A dense tensor that nothing has been written to, in huge pages if it is large."""
    bytes_ = fresh.numel() * fresh.element_size()
    if bytes_ >= _HUGE_PAGES_FROM and fresh.device.type == "cpu" and (native := dispatch.native()) is not None:
        native.cpu.advise_huge_pages(fresh.data_ptr(), bytes_)
    return fresh
