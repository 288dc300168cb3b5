"""What the compilers made of the GPU kernels: registers, spills, occupancy, matrix instructions, width of accesses.

Compiles every CUDA kernel by nvcc and every launch that a Triton family declares (``compile_targets``) for GPUs that
need not be there, reads the machine code, and compares it with each kernel's plan and with the tables under
``results/machine_code``. ``python -m fastdl.bench.machine_code`` writes the tables anew, to be reviewed as a diff.

A plan is stated beside the kernel: ``Launch.plan`` in Triton; in CUDA ``__launch_bounds__(threads, blocks)``, which the
compiler obeys by spilling, and the compiler's own PTX for matrix instructions.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent  # a source checkout; an installed package has no csrc
TABLES = Path(__file__).resolve().parent / "results" / "machine_code"
CACHE = ROOT / "build" / "machine_code"
OBJECTS = ROOT / "build" / "objects"
COMMAND = "python -m fastdl.bench.machine_code"
KIBIBYTE = 1024
# What a table may differ by: compilers allocate registers by heuristics. No plan may be missed, however little changes.
REGISTER_JITTER = 8
WIDE_JITTER = 0.1


@dataclass(frozen=True)
class Target:
    """An architecture, what the compilers call it, and what one multiprocessor (compute unit) of it holds.

    NVIDIA: the occupancy calculator's numbers, CUDA C++ Programming Guide, compute capabilities. AMD: the CDNA 3
    instruction set reference; registers a lane of a SIMD, of which a compute unit has four.
    """

    name: str
    triton: tuple[str, int | str, int]
    device: str  # in kernels/common.py
    registers: int
    register_unit: int  # registers are allocated in such steps, a warp on NVIDIA, a lane on AMD
    threads: int
    blocks: int
    shared: int  # bytes
    reserved_shared: int  # bytes that each block takes beside its own

    @property
    def is_nvidia(self) -> bool:
        """Whether nvcc compiles for it."""
        return self.triton[0] == "cuda"

    def occupancy(self, threads: int, registers: int, shared: int) -> int:
        """How many blocks a multiprocessor holds at once."""
        warp = self.triton[2]
        warps = -(-threads // warp)
        # Each of the four parts of a multiprocessor has a quarter of its registers.
        unit = warp * registers if self.is_nvidia else registers
        allocated = max(-(-unit // self.register_unit), 1) * self.register_unit
        by_registers = self.registers // 4 // allocated
        most_warps = self.threads // warp
        return min(
            min(by_registers * 4, most_warps) // warps,
            self.blocks,
            self.shared // max(shared + self.reserved_shared, 1),
        )


NVIDIA = {"registers": 65536, "register_unit": 256, "threads": 2048, "blocks": 32, "reserved_shared": KIBIBYTE}
AMD = {"registers": 4 * 512, "register_unit": 8, "threads": 2048, "blocks": 32, "reserved_shared": 0}
TARGETS = (
    Target("sm_80", ("cuda", 80, 32), "A100", shared=164 * KIBIBYTE, **NVIDIA),
    Target("sm_90a", ("cuda", 90, 32), "H100", shared=228 * KIBIBYTE, **NVIDIA),
    Target("sm_100", ("cuda", 100, 32), "B200", shared=228 * KIBIBYTE, **NVIDIA),
    Target("gfx942", ("hip", "gfx942", 64), "MI300", shared=64 * KIBIBYTE, **AMD),
)


@dataclass
class Code:
    """One kernel's machine code on one target, and its plan."""

    registers: int
    stack: int  # bytes a thread; 0 unless something spills or is indexed at run time
    spills: int  # loads from and stores to it
    shared: int  # bytes a block, dynamic ones included
    threads: int  # a block
    blocks: int  # a multiprocessor holds at once
    matrix: dict[str, int] = field(default_factory=dict)  # matrix instructions, by name
    loads: dict[str, int] = field(default_factory=dict)  # from global memory, by bytes a thread, or tma
    stores: dict[str, int] = field(default_factory=dict)
    planned_blocks: int = 1
    planned_matrix: str = ""
    planned_access: int = 0  # bytes a thread

    @property
    def wide(self) -> float:
        """The share of global loads' instructions that take 16 bytes or more, or a tile."""
        return _wide(self.loads)

    def problems(self) -> list[str]:
        """What breaks the plan, in words."""
        found = []
        if self.stack or self.spills:
            found.append(f"spills: {self.stack} bytes of stack, {self.spills} loads and stores")
        if self.planned_matrix and not any(name.startswith(self.planned_matrix) for name in self.matrix):
            found.append(f"no {self.planned_matrix}, but {', '.join(self.matrix) or 'no matrix instruction'}")
        if self.blocks < self.planned_blocks:
            found.append(
                f"{self.blocks} blocks a multiprocessor, planned {self.planned_blocks}: {self.registers} registers, "
                f"{self.threads} threads, {self.shared} bytes of shared memory"
            )
        if self.planned_access > min(_widest(self.loads), _widest(self.stores)):
            found.append(f"no access of {self.planned_access} bytes: loads {self.loads}, stores {self.stores}")
        return found

    def differences(self, stored: Code) -> list[str]:
        """What differs from the stored row by more than the compilers' jitter, in words."""
        found = []
        if abs(self.registers - stored.registers) > REGISTER_JITTER:
            found.append(f"{self.registers} registers, stored {stored.registers}")
        exact = ("stack", "shared", "threads", "blocks", "planned_blocks", "planned_matrix", "planned_access")
        for name in exact:
            if getattr(self, name) != getattr(stored, name):
                found.append(f"{name} {getattr(self, name)}, stored {getattr(stored, name)}")
        if self.matrix.keys() != stored.matrix.keys():
            found.append(f"matrix instructions {sorted(self.matrix)}, stored {sorted(stored.matrix)}")
        if abs(self.wide - stored.wide) > WIDE_JITTER:
            found.append(f"{self.wide:.0%} of loads are wide, stored {stored.wide:.0%}")
        return found


def _widest(accesses: dict[str, int]) -> float:
    return max((float("inf") if width == "tma" else int(width) for width in accesses), default=0)


def _wide(accesses: dict[str, int]) -> float:
    wide = sum(count for width, count in accesses.items() if width == "tma" or int(width) >= 16)
    return wide / max(sum(accesses.values()), 1)


# ----------------------------------------------------------------------------------------------- reading machine code


def read_sass(sass: str) -> dict[str, dict[str, Any]]:
    """By function, the instructions that ``cuobjdump -sass`` shows, counted as :class:`Code` has them."""
    functions = {}
    for section in re.split(r"^\s*Function : ", sass, flags=re.MULTILINE)[1:]:
        name, _, body = section.partition("\n")
        matrix, loads, stores, spills = Counter[str](), Counter[str](), Counter[str](), 0
        for instruction in re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", body, re.MULTILINE):
            operation, *modifiers = instruction.split(".")
            if operation in ("LDL", "STL"):
                spills += 1
            elif operation.endswith("MMA"):
                matrix[operation] += 1
            elif operation in ("LDG", "LDGSTS", "LD"):
                loads[_width(modifiers)] += 1
            elif operation in ("STG", "ST"):
                stores[_width(modifiers)] += 1
            elif operation in ("UTMALDG", "UBLKCP"):
                loads["tma"] += 1
            elif operation in ("UTMASTG", "UTMAREDG"):
                stores["tma"] += 1
        functions[name.strip()] = _counts(matrix, loads, stores, spills)
    return functions


def read_amd(assembly: str) -> dict[str, Any]:
    """The numbers of a kernel's AMD assembly as :class:`Code` has them."""
    number = {key: int(value) for key, value in re.findall(r"^\s*\.(\w+):\s+(\d+)$", assembly, re.MULTILINE)}
    matrix, loads, stores, spills = Counter[str](), Counter[str](), Counter[str](), 0
    widths = {"dword": "4", "dwordx2": "8", "dwordx3": "12", "dwordx4": "16", "ubyte": "1", "sbyte": "1"}
    for instruction in re.findall(r"^\s+([a-z]\w+)(?:\s|$)", assembly, re.MULTILINE):
        access = re.match(r"(?:global|buffer|flat)_(load|store)_(?:lds_)?(\w+)", instruction)
        if instruction.startswith("scratch_"):
            spills += 1
        elif instruction.startswith("v_mfma"):
            matrix[instruction] += 1
        elif access:
            (loads if access[1] == "load" else stores)[widths.get(access[2], "2")] += 1
    counts = _counts(matrix, loads, stores, spills)
    return {"registers": number["vgpr_count"], "stack": number["private_segment_fixed_size"], **counts}


def _counts(matrix: Counter[str], loads: Counter[str], stores: Counter[str], spills: int) -> dict[str, Any]:
    sort = lambda counter: dict(sorted(counter.items()))  # noqa: E731
    return {"spills": spills, "matrix": sort(matrix), "loads": sort(loads), "stores": sort(stores)}


def _width(modifiers: list[str]) -> str:
    bits = {"256": "32", "128": "16", "64": "8", "U16": "2", "S16": "2", "U8": "1", "S8": "1"}
    return next((bits[modifier] for modifier in modifiers if modifier in bits), "4")


@cache
def cuobjdump() -> Path | None:
    """The disassembler that Triton's wheel brings along."""
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        return None
    path = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return path if path.exists() else None


def read_cubin(path: Path) -> dict[str, dict[str, Any]]:
    """By function, what a cubin's code takes and does: registers, stack, static shared memory, instructions."""
    command = [cuobjdump(), "-res-usage", "-sass", path]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    functions = read_sass(text)
    pattern = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    for name, *numbers in re.findall(pattern, text):
        registers, stack, shared, local = map(int, numbers)
        functions[name] |= {"registers": registers, "stack": stack + local, "shared": shared}
    return functions


# ---------------------------------------------------------------------------------------------------------- compiling


def _cached(key: Iterable[str]) -> Path:
    """Where the answer to a question lies, by its content: the sources, the options, the compiler, this file."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for part in key:
        digest.update(part.encode() + b"\0")
    return CACHE / f"{digest.hexdigest()[:40]}.json"


def _remember(path: Path, answer: Any) -> Any:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump(answer, file)
    os.replace(file.name, path)
    return answer


def triton_codes(target: Target, every: bool) -> dict[str, Code]:
    """By name, the launches that the Triton families declare, compiled here; not in Triton's interpreter."""
    import triton
    from triton.backends.compiler import GPUTarget

    from fastdl import kernels

    device = getattr(importlib.import_module(f"{kernels.__name__}.common"), target.device)
    codes = {}
    for module in pkgutil.iter_modules(kernels.__path__):
        family = importlib.import_module(f"{kernels.__name__}.{module.name}")
        if not hasattr(family, "compile_targets"):
            continue
        for name, launch in family.compile_targets(device, every).items():
            source, options = launch.source(), launch.options()
            path = _cached([triton.__version__, source.hash(), json.dumps(options), target.name])
            if path.exists():
                found = json.loads(path.read_text())
            else:
                try:
                    compiled = triton.compile(source, target=GPUTarget(*target.triton), options=options)
                except Exception as error:
                    raise RuntimeError(f"{module.name} {name} does not compile for {target.name}") from error
                if target.is_nvidia:
                    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                        Path(file.name).write_bytes(compiled.asm["cubin"])
                        (found,) = read_cubin(Path(file.name)).values()
                else:
                    found = read_amd(compiled.asm["amdgcn"])
                found = _remember(path, found | {"shared": compiled.metadata.shared})
            plan = launch.plan
            threads = launch.warps * target.triton[2]
            codes[f"triton {module.name} {name}"] = Code(
                **found,
                threads=threads,
                blocks=target.occupancy(threads, found["registers"], found["shared"]),
                planned_blocks=plan.programs,
                planned_matrix=plan.matrix_instruction,
                planned_access=plan.access_bytes,
            )
    return codes


@cache
def _build_flags() -> tuple[dict[str, str], list[str]]:
    """setup.py's targets and flags of nvcc; it can't be imported, as it builds."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    values = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and node.targets[0].id in ("CUDA_TARGETS", "CUDA_FLAGS")
    }
    return values["CUDA_TARGETS"], values["CUDA_FLAGS"]


def find_nvcc() -> str | None:
    """The nvcc of CUDA_HOME, or the one on the PATH."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=str(Path(home) / "bin")) if home else shutil.which("nvcc")


def cuda_codes(target: Target, source: Path) -> dict[str, Code]:
    """By name, the kernels of one .cu, compiled for a target."""
    targets, flags = _build_flags()
    options = [*flags, "-gencode", targets[target.name]]
    headers = [path for path in sorted(source.parent.glob("*.*")) if path.suffix not in (".cu", ".cpp")]
    path = _cached([_nvcc_version(), *options, source.name, *[file.read_text() for file in (source, *headers)]])
    if path.exists():
        found = json.loads(path.read_text())
    else:
        with tempfile.TemporaryDirectory() as folder:
            ptx, cubin = _built(source, headers, options) or _build(source, options, Path(folder))
            plans = read_ptx(ptx.read_text())
            found = {name: read | plans[name] for name, read in read_cubin(cubin).items() if name in plans}
            for kernel in found.values():
                kernel["shared"] += kernel.pop("dynamic_shared")
        _remember(path, found)
    names = dict(zip(found, _demangle(found), strict=True))
    return {
        f"cuda {source.stem} {names[name]}": Code(
            **read, blocks=target.occupancy(read["threads"], read["registers"], read["shared"])
        )
        for name, read in found.items()
    }


def _built(source: Path, headers: list[Path], options: list[str]) -> tuple[Path, Path] | None:
    """The PTX and the cubin that setup.py left of a build with these options, unless something is newer."""
    stamp = OBJECTS / f"cuda-{source.stem}.stamp"
    if not stamp.exists() or stamp.stat().st_mtime < max(path.stat().st_mtime for path in (source, *headers)):
        return None
    if not set(options) <= set(shlex.split(stamp.read_text())):
        return None
    virtual, _, real = (part.partition("=")[2] for part in options[-1].partition(","))
    folder = stamp.with_suffix("")
    # nvcc's name for a cubin leaves out a real architecture that goes without saying.
    cubins = [folder / f"{source.stem}.{name}.cubin" for name in (f"{virtual}.{real}", virtual)]
    ptx, cubin = folder / f"{source.stem}.{virtual}.ptx", next(filter(Path.exists, cubins), None)
    return (ptx, cubin) if cubin and ptx.exists() else None


def _build(source: Path, options: list[str], folder: Path) -> tuple[Path, Path]:
    """The PTX and the cubin of a build of one target."""
    cubin = folder / f"{source.stem}.cubin"
    command = [str(find_nvcc()), *options, "-cubin", "--keep", "--keep-dir", folder, "-o", cubin, source]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{source.name} does not compile with {' '.join(options)}:\n{done.stderr}")
    return folder / f"{source.stem}.ptx", cubin


def read_ptx(ptx: str) -> dict[str, dict[str, Any]]:
    """By kernel, what its PTX states: __launch_bounds__, dynamic shared memory, and whether it multiplies matrices."""
    plans = {}
    for entry in re.split(r"^(?=\.visible \.entry |\.entry |\.weak \.entry )", ptx, flags=re.MULTILINE)[1:]:
        name = re.search(r"\.entry (\w+)", entry)
        threads = re.search(r"\.maxntid (\d+)(?:, (\d+))?(?:, (\d+))?", entry)
        blocks = re.search(r"\.minnctapersm (\d+)", entry)
        matrix = [
            instruction for ptx, instruction in PTX_MATRIX.items() if re.search(rf"^\s*{ptx}", entry, re.MULTILINE)
        ]
        dynamic = re.search(r"// dynamic shared memory: (\d+) bytes", entry)
        count = 1
        for extent in threads.groups() if threads else ():
            count *= int(extent or 1)
        plans[name[1]] = {
            "threads": count if threads else 1024,
            "planned_blocks": int(blocks[1]) if blocks else 1,
            "planned_matrix": matrix[0] if matrix else "",
            "dynamic_shared": int(dynamic[1]) if dynamic else 0,
        }
    return plans


PTX_MATRIX = {
    r"wgmma\.mma_async": "HGMMA",
    r"tcgen05\.mma": "UTC",
    r"mma\.sync\.\S+\.f64": "DMMA",
    r"mma\.sync": "HMMA",
}


def _demangle(names: Iterable[str]) -> list[str]:
    """Kernels' names with their template arguments, without namespaces and parameters."""
    names = list(names)
    text = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True).stdout if names else ""
    short = []
    for line in text.splitlines():
        line = re.sub(r"\(anonymous namespace\)::|\bfastdl::cuda::|^void ", "", line)
        depth, end = 0, len(line)
        for position, character in enumerate(line):
            if character == "(" and depth == 0:
                end = position
                break
            depth += {"<": 1, ">": -1}.get(character, 0)
        short.append(re.sub(r"\((?:int|bool|unsigned int|long)\)", "", line[:end]))
    return short


@cache
def _nvcc_version() -> str:
    text = subprocess.run([str(find_nvcc()), "--version"], capture_output=True, text=True).stdout
    return text.partition("release ")[2].partition(",")[0]


def why_unavailable() -> str | None:
    """Why nothing can be compiled here, or None."""
    if not (ROOT / "csrc" / "cuda").is_dir():
        return "the kernels' sources are not here: use a source checkout"
    if cuobjdump() is None:
        return "Triton is not installed; it brings the disassembler along"
    if find_nvcc() is None:
        return "there is no nvcc on the PATH, no CUDA_HOME"
    return None


def compile_all(every: bool) -> dict[str, dict[str, Code]]:
    """By target and kernel's name, the machine code; as many compilers at once as there are processors.

    ``every``: all that Triton's launchers can choose on all targets (minutes more), not only the declared sample on
    NVIDIA's.
    """
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = {
            target.name: [
                *(pool.submit(cuda_codes, target, source) for source in sources if target.is_nvidia),
                pool.submit(_triton_process, target, every),
            ]
            for target in TARGETS
            if every or target.is_nvidia
        }
        return {
            name: dict(sorted(item for future in futures for item in future.result().items()))
            for name, futures in found.items()
        }


def _triton_process(target: Target, every: bool) -> dict[str, Code]:
    """:func:`triton_codes` in a process of its own: this one may be interpreting Triton's kernels."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        environment |= {"TRITON_CACHE_DIR": folder}
        command = [sys.executable, "-m", __spec__.name, "--triton", target.name]
        command += ["--every"] if every else []
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise RuntimeError(f"Triton for {target.name} ended with {done.returncode}:\n{done.stderr[-4000:]}")
        return {name: Code(**row) for name, row in json.loads(done.stdout).items()}


# ------------------------------------------------------------------------------------------------------- stored tables


def compilers() -> dict[str, str]:
    """The versions that a table holds for."""
    return {"triton": importlib.metadata.version("triton"), "nvcc": _nvcc_version()}


def load() -> tuple[dict[str, dict[str, str]], dict[str, dict[str, Code]]]:
    """By target, the stored tables' compilers and their rows."""
    tables = {path.stem: json.loads(path.read_text()) for path in sorted(TABLES.glob("*.json"))}
    rows = {name: {kernel: _unpack(row) for kernel, row in table["kernels"].items()} for name, table in tables.items()}
    return {name: table["compilers"] for name, table in tables.items()}, rows


def store(tables: dict[str, dict[str, Code]]) -> None:
    """Writes one file a target, one line a kernel, so that a diff shows what a change did."""
    TABLES.mkdir(parents=True, exist_ok=True)
    for target, codes in tables.items():
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(_pack(code))}" for name, code in codes.items())
        header = json.dumps(compilers())
        (TABLES / f"{target}.json").write_text(f'{{"compilers": {header},\n "kernels": {{\n{lines}\n}}}}\n')


def _pack(code: Code) -> dict[str, Any]:
    """Without what has its default."""
    default = Code(-1, 0, 0, 0, -1, -1)
    return {key: value for key, value in asdict(code).items() if value != getattr(default, key)}


def _unpack(row: dict[str, Any]) -> Code:
    return Code(**{"stack": 0, "spills": 0, "shared": 0} | row)


def problems(tables: dict[str, dict[str, Code]]) -> list[str]:
    """Every missed plan, one line each."""
    return [f"{t}: {name}: {text}" for t, codes in tables.items() for name, c in codes.items() for text in c.problems()]


def differences(tables: dict[str, dict[str, Code]], every: bool) -> Iterator[str]:
    """What is not as stored, one line each; a table of other compilers is not compared."""
    versions, stored = load()
    for target, codes in tables.items():
        if versions.get(target, compilers()) != compilers():
            continue
        rows = stored.get(target, {})
        yield from (f"{target}: {name}: not in the stored table" for name in sorted(codes.keys() - rows.keys()))
        if every:
            yield from (f"{target}: {name}: only in the stored table" for name in sorted(rows.keys() - codes.keys()))
        for name in sorted(codes.keys() & rows.keys()):
            yield from (f"{target}: {name}: {text}" for text in codes[name].differences(rows[name]))


def print_tables(tables: dict[str, dict[str, Code]], console: Console) -> None:
    """One table a target; kernels whose names differ in their last word only and whose code is alike share a line."""
    for target, codes in tables.items():
        table = Table(title=target, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("kernel", overflow="fold")
        for column in ("registers", "spills", "shared", "threads", "blocks", "plan"):
            table.add_column(column, justify="right", no_wrap=True)
        for column in ("matrix instructions", "loads", "stores"):
            table.add_column(column)
        for name, code in codes.items():
            spills = f"{code.stack} B, {code.spills}" if code.stack or code.spills else "0"
            cells = [code.registers, spills, code.shared, code.threads, code.blocks, code.planned_blocks]
            accesses = [_describe(code.matrix), _describe(code.loads), _describe(code.stores)]
            table.add_row(name, *map(str, cells), *accesses, style="red" if code.problems() else "")
        console.print(table)
    missed = problems(tables)
    for line in missed:
        console.print(f"[red]{line}[/]", highlight=False)
    total = sum(map(len, tables.values()))
    console.print(f"{total} kernels, {len(missed)} missed plans", style="red" if missed else "green")


def show(console: Console) -> int:
    """Prints the stored tables; returns 1 where there are none."""
    _, tables = load()
    if not tables:
        console.print(f"no tables here: in a source checkout, run {COMMAND}")
        return 1
    print_tables(tables, console)
    return 0


def _describe(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} x{count}" for name, count in counts.items())


def main() -> int:
    """Compiles everything, tells what changed, stores it; 1 if a plan is missed."""
    parser = argparse.ArgumentParser(prog=COMMAND, description="Writes the tables of the GPU kernels' machine code.")
    parser.add_argument("--check", action="store_true", help="compare only; 1 as well if something changed")
    parser.add_argument("--every", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--triton", metavar="TARGET", choices=[t.name for t in TARGETS], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.triton:
        (target,) = (target for target in TARGETS if target.name == options.triton)
        print(json.dumps({name: asdict(code) for name, code in triton_codes(target, options.every).items()}))
        return 0
    reason = why_unavailable()
    if reason:
        sys.exit(f"fastdl: no machine code can be made here: {reason}")
    tables = compile_all(every=True)
    missed, changed = problems(tables), list(differences(tables, every=True))
    for line in (*changed, *missed):
        print(line)
    print(f"{sum(map(len, tables.values()))} kernels; {len(missed)} missed plans, {len(changed)} changes")
    if not options.check:
        store(tables)
    return 1 if missed or (options.check and changed) else 0


if __name__ == "__main__":
    sys.exit(main())
