"""Activation functions: the device functions that every family fuses, and elementwise kernels of their own.

The functions and what their gradients read ("saved") are torch's: the output for relu, leaky_relu, elu, sigmoid and
tanh, the pre-activation for gelu and silu. `parameter` is leaky_relu's negative_slope (>= 0) or elu's alpha (>= 0);
it is a constant of the model, so it is compiled in, exact in every dtype.
"""

import torch
import triton
import triton.language as tl

from .common import Launch, Plan, device_limits

NONE = tl.constexpr(0)
RELU = tl.constexpr(1)
LEAKY_RELU = tl.constexpr(2)
ELU = tl.constexpr(3)
SIGMOID = tl.constexpr(4)
TANH = tl.constexpr(5)
GELU = tl.constexpr(6)
GELU_TANH = tl.constexpr(7)
SILU = tl.constexpr(8)

SQRT_HALF = tl.constexpr(0.7071067811865476)
INVERSE_SQRT_TWO_PI = tl.constexpr(0.3989422804014327)
# Constants stand right of the tensor they scale: the interpreter cannot have them on its left.
# gelu's tanh form is z * sigmoid(GELU_SCALE * (z + GELU_CUBIC * z^3)), as (1 + tanh(u)) / 2 = sigmoid(2 u).
GELU_SCALE = tl.constexpr(1.5957691216057308)
GELU_CUBIC = tl.constexpr(0.044715)

WARPS = 4
# Two 16-byte accesses a thread: enough bytes in flight to fill the memory's latency, with small tensors still spread.
BYTES_PER_PROGRAM = WARPS * 32 * 16 * 2
# 32 warps a multiprocessor: 32 KiB in flight, more than the memory's latency times its rate asks of each one.
PROGRAMS = 8


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x))."""
    return 1 / (1 + tl.exp(-x))  # exp overflows to inf below -88, and 1 / inf is the right 0


@triton.jit
def expm1(x):
    """exp(x) - 1, without its cancellation near 0: there Taylor's series, to the last bit of x's dtype."""
    TERMS: tl.constexpr = 19 if x.dtype == tl.float64 else 11
    series = x * (1.0 / TERMS) + 1
    for step in tl.static_range(TERMS - 2):
        series = series * (x * (1.0 / (TERMS - 1 - step))) + 1
    return tl.where(tl.abs(x) < 1, x * series, tl.exp(x) - 1)


@triton.jit
def tanh(x):
    """tanh by expm1 of a negative number: accurate near 0, and right at any size."""
    decay = expm1(-2 * tl.abs(x))
    magnitude = -decay / (2 + decay)
    return tl.where(x < 0, -magnitude, magnitude)


@triton.jit
def apply_activation(z, kind: tl.constexpr, parameter: tl.constexpr):
    """The activation of z, a float32 or float64 tensor, in its own precision."""
    if kind == RELU:
        y = tl.where(z <= 0, 0.0, z)  # keeps NaN
    elif kind == LEAKY_RELU:
        y = tl.where(z > 0, z, z * parameter)
    elif kind == ELU:
        y = tl.where(z > 0, z, expm1(z) * parameter)
    elif kind == SIGMOID:
        y = sigmoid(z)
    elif kind == TANH:
        y = tanh(z)
    elif kind == GELU:
        y = z * 0.5 * (1 + tl.erf(z * SQRT_HALF))
    elif kind == GELU_TANH:
        y = z * sigmoid((z + z * z * z * GELU_CUBIC) * GELU_SCALE)
    elif kind == SILU:
        y = z * sigmoid(z)
    else:
        tl.static_assert(kind == NONE, "unknown kind of activation")
        y = z
    return y


@triton.jit
def activation_gradient(grad, saved, kind: tl.constexpr, parameter: tl.constexpr):
    """grad times the activation's derivative, from what the forward saved; float32 or float64, both of one shape."""
    if kind == RELU:
        result = tl.where(saved <= 0, 0.0, grad)
    elif kind == LEAKY_RELU:
        result = tl.where(saved > 0, grad, grad * parameter)
    elif kind == ELU:
        result = tl.where(saved <= 0, grad * (saved + parameter), grad)
    elif kind == SIGMOID:
        result = grad * saved * (1 - saved)
    elif kind == TANH:
        result = grad * ((1 - saved) * (1 + saved))  # 1 - saved^2 would cancel near 1
    elif kind == GELU:
        density = tl.exp(saved * saved * -0.5) * INVERSE_SQRT_TWO_PI
        result = grad * (0.5 * (1 + tl.erf(saved * SQRT_HALF)) + saved * density)
    elif kind == GELU_TANH:
        square = tl.minimum(saved * saved, 1e4)  # the gate's slope is 0 there; 0 * inf would be NaN
        argument = (saved + saved * square * GELU_CUBIC) * GELU_SCALE
        decay = tl.exp(-tl.abs(argument))
        gate_slope = decay / ((1 + decay) * (1 + decay))  # gate * (1 - gate) would cancel near 1
        result = grad * (sigmoid(argument) + saved * gate_slope * ((square * (3 * GELU_CUBIC) + 1) * GELU_SCALE))
    elif kind == SILU:
        gate = sigmoid(saved)
        result = grad * (gate * (1 + saved * (1 - gate)))
    else:
        tl.static_assert(kind == NONE, "unknown kind of activation")
        result = grad
    return result


@triton.jit
def activation_block(input, saved, output, offsets, mask, KIND: tl.constexpr, PARAMETER: tl.constexpr):
    """One program's part of activation_kernel, masked or, with mask None, whole."""
    COMPUTE: tl.constexpr = tl.float64 if input.dtype.element_ty == tl.float64 else tl.float32
    value = tl.load(input + offsets, mask=mask).to(COMPUTE)
    if saved is None:
        result = apply_activation(value, KIND, PARAMETER)
    else:
        result = activation_gradient(value, tl.load(saved + offsets, mask=mask).to(COMPUTE), KIND, PARAMETER)
    tl.store(output + offsets, result.to(output.dtype.element_ty), mask=mask)


@triton.jit
def activation_kernel(input, saved, output, count, KIND: tl.constexpr, PARAMETER: tl.constexpr, BLOCK: tl.constexpr):
    """output = act(input), or input * act'(saved) where saved is given; all contiguous, of count elements.

    Launches a 1D grid where each program takes BLOCK elements. Only the last program masks: a mask that is not known
    to be constant over 16 bytes would split every access.
    """
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = start + tl.arange(0, BLOCK)
    if start + BLOCK <= count:
        activation_block(input, saved, output, offsets, None, KIND, PARAMETER)
    else:
        activation_block(input, saved, output, offsets, offsets < count, KIND, PARAMETER)


def compiled_parameter(kind, parameter):
    """The parameter where kind has one, else 0.0, so that kinds without one compile once."""
    return float(parameter) if kind in (LEAKY_RELU.value, ELU.value) else 0.0


def activation(input, output, kind, parameter):
    """output = act(input), elementwise, for contiguous tensors of one shape and dtype; output may be input."""
    if input.numel() > 0:
        activation_launch(input, None, output, kind, parameter, device_limits(input.device)).run()


def activation_backward(grad_output, saved, grad_input, kind, parameter):
    """grad_input = grad_output * act'(saved), for contiguous tensors of one shape; grad_input may be grad_output."""
    if saved.numel() > 0:
        activation_launch(grad_output, saved, grad_input, kind, parameter, device_limits(saved.device)).run()


def activation_launch(input, saved, output, kind, parameter, device):
    """The launch of activation or, with saved, of activation_backward, not yet run; of at least one element."""
    count, block = input.numel(), BYTES_PER_PROGRAM // input.element_size()
    arguments = {"input": input, "saved": saved, "output": output, "count": count}
    constants = {"KIND": kind, "PARAMETER": compiled_parameter(kind, parameter), "BLOCK": block}
    plan = Plan(PROGRAMS, access_bytes=16)
    return Launch(activation_kernel, (triton.cdiv(count, block),), arguments, constants, device, WARPS, plan=plan)


def compile_targets(device, every=True):
    """By name, the launches to compile for a device, to look at their machine code: all kinds in bfloat16, and with
    every the longest in each dtype."""
    names = ("relu", "leaky_relu", "elu", "sigmoid", "tanh", "gelu", "gelu_tanh", "silu")
    launches = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        values = torch.empty(2**20, dtype=dtype, device="meta")
        for kind, name in enumerate(names, start=1):
            if dtype == torch.bfloat16 or (every and name in ("tanh", "gelu")):
                for direction, saved in (("forward", None), ("backward", values)):
                    launches[f"{direction} {dtype} {name}"] = activation_launch(
                        values, saved, values, kind, 0.5, device
                    )
    return {name.replace("torch.", ""): launch for name, launch in launches.items()}
