"""What every family's launchers share: a device's limits, and a launch that can be run or compiled for a GPU."""

import functools
from dataclasses import dataclass

import torch
from triton.compiler import ASTSource
from triton.runtime.jit import mangle_type


@dataclass(frozen=True)
class Device:
    """What the choice of block sizes reads of a device; capability is 0 for AMD."""

    capability: int
    multiprocessors: int
    shared_memory: int  # bytes that one program may use


A100 = Device(80, 108, 163 * 1024)
H100 = Device(90, 132, 227 * 1024)
B200 = Device(100, 148, 227 * 1024)
MI300 = Device(0, 304, 64 * 1024)
# Tensors on the CPU mean Triton's interpreter: an H100's code path, with so few multiprocessors that each program of
# a small test runs several tiles, as it does in a large problem.
INTERPRETER = Device(90, 4, 227 * 1024)


@functools.lru_cache
def device_limits(device):
    """The limits of a torch.device, asked for once."""
    if device.type != "cuda":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    capability = 0 if torch.version.hip else properties.major * 10 + properties.minor
    shared_memory = getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
    return Device(capability, properties.multi_processor_count, shared_memory)


@dataclass(frozen=True)
class Plan:
    """What a launch's machine code must reach; the machine-code test compiles it and looks. Nothing may spill."""

    programs: int = 1  # that a multiprocessor holds at once, by their registers, threads and shared memory
    matrix_instruction: str = ""  # how the name of one begins that must be there
    limits_registers: bool = True  # whether ptxas is told how many registers the programs leave a thread
    access_bytes: int = 0  # a thread: of the widest load and of the widest store, at least


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel: its grid, its arguments and compile-time constants by name, its warps and stages."""

    kernel: object
    grid: tuple
    arguments: dict
    constants: dict
    device: Device
    warps: int
    stages: int = 1
    plan: Plan = Plan()

    def run(self):
        """Runs it; returns the compiled kernel, or None in the interpreter."""
        return self.kernel[self.grid](**self.arguments, **self.constants, **self.options())

    def options(self):
        """The compiler's. Told the registers that the planned programs leave, ptxas takes them; else it would rather
        spill a little to let one more program in."""
        options = {"num_warps": self.warps, "num_stages": self.stages}
        if self.device.capability and self.plan.limits_registers:
            options["maxnreg"] = min(255, 65536 // (self.plan.programs * self.warps * 32) // 8 * 8)
        return options

    def source(self):
        """The source that triton.compile takes, specialised as Triton's launcher would: None and 1 are constants."""
        signature, constants, attributes = {}, {}, {}
        for position, name in enumerate(self.kernel.arg_names):
            value = self.constants[name] if name in self.constants else self.arguments[name]
            specialises = not self.kernel.params[position].do_not_specialize
            if name in self.constants or value is None or (isinstance(value, int) and value == 1 and specialises):
                signature[name], constants[name] = "constexpr", value
                continue
            signature[name] = mangle_type(value)
            if not specialises:
                continue
            address = value if isinstance(value, int) else value.data_ptr() if torch.is_tensor(value) else 1
            if address % 16 == 0:
                attributes[(position,)] = [["tt.divisibility", 16]]
        return ASTSource(self.kernel, signature, constants, attributes)
