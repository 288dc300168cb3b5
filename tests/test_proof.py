"""Proven, or proves itself: what records and first calls let auto take, and how a wrong kernel is caught."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from suite import backends
from torch import Tensor

import fastdl
from fastdl import accuracy, dispatch, proof
from fastdl.ops.activation import ACTIVATION
from fastdl.ops.linear import LINEAR, LINEAR_BACKWARD

pytestmark = pytest.mark.parametrize("backend", backends("cpu"))


@pytest.fixture(autouse=True)
def blank(monkeypatch, tmp_path):
    """No records, no verdicts: a machine that fastdl has never seen; its CPU is treated as a GPU would be."""
    monkeypatch.setattr(proof, "SPEED_ON_RECORD_ONLY", frozenset())
    monkeypatch.setenv("FASTDL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(proof, "_verdicts", None)
    monkeypatch.setattr(proof, "records", dict)
    monkeypatch.setattr(proof, "tuned", dict)
    dispatch.forget_selections()
    yield
    fastdl.prove_at_first_call(True)


@pytest.fixture
def count(monkeypatch):
    """Counts the calls of the kernel and of the reference: a proof runs the reference twice, in float64 too."""
    calls = {"kernel": 0, "reference": 0}

    def counted(name, function):
        def run(*arguments):
            calls[name] += 1
            return function(*arguments)

        return run

    monkeypatch.setitem(LINEAR.implementations, "cpu", counted("kernel", LINEAR.implementations["cpu"]))
    monkeypatch.setattr(LINEAR, "reference", counted("reference", LINEAR.reference))
    return calls


def plant(monkeypatch, kernel, op=LINEAR) -> None:
    monkeypatch.setitem(op.implementations, "cpu", kernel)
    dispatch.forget_selections()


def record(monkeypatch, source="records", **changes) -> None:
    """Makes one record of the linear kernel on this machine's code path the only one."""
    path = proof.code_path("cpu", torch.device("cpu"))
    entry = {
        "op": "linear",
        "backend": "cpu",
        "dtype": "float32",
        "code_path": path,
        "passed": True,
        "source": "run.json",
    }
    index = proof._index({"records": [{**entry, **changes}]})
    monkeypatch.setattr(proof, source, lambda: index)
    dispatch.forget_selections()


def forget_process() -> None:
    """What a new process starts with: nothing in memory, the file as it is."""
    proof._verdicts = None
    dispatch.forget_selections()


def operands(rows: int = 16, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(rows, 24, dtype=dtype), torch.randn(40, 24, dtype=dtype), torch.randn(40, dtype=dtype)


def traced(*arguments: Tensor, **keywords) -> tuple[Tensor, dispatch.Call]:
    with fastdl.trace() as calls:
        output = fastdl.functional.linear(*arguments, **keywords)
    assert len(calls) == 1
    return output, calls[0]


def transposed(input: Tensor, weight: Tensor, bias: Tensor | None, *_: object) -> Tensor:
    """A kernel that is wrong as kernels are: rows and columns of its output are mixed up."""
    right = F.linear(input, weight, bias)
    return right.t().reshape(right.shape).contiguous()


# ------------------------------------------------------------------------------------------------------------ records


def test_a_record_is_trusted_without_a_comparison(backend, monkeypatch, count):
    record(monkeypatch)
    output, call = traced(*operands())
    assert call.backend == "cpu" and "by run.json" in call.reason and "proven on" in call.reason
    assert count == {"kernel": 1, "reference": 0} and not proof.verdicts()
    assert output.shape == (16, 40)


def test_a_record_that_failed_is_not_taken(backend, monkeypatch, count):
    record(monkeypatch, passed=False)
    _, call = traced(*operands())
    assert call.backend == "torch" and "not trusted" in call.reason and "failed in run.json" in call.reason
    assert count["kernel"] == 0


@pytest.mark.parametrize(
    "other", [{"op": "activation"}, {"backend": "cuda"}, {"dtype": "bfloat16"}, {"code_path": "sm_90"}], ids=str
)
def test_a_record_speaks_for_its_op_backend_dtype_and_code_path_only(backend, monkeypatch, count, other):
    record(monkeypatch, **other)
    _, call = traced(*operands())
    assert "proving itself" in call.reason and count["kernel"] == 1 and count["reference"] == 2


def test_a_class_that_was_slower_than_torch_is_left_to_torch_and_other_classes_are_taken(backend, monkeypatch):
    speed = {"inference": {"plain": [[16, 24, 40, 0.5], [4096, 24, 40, 1.8]]}}
    record(monkeypatch, speed=speed)
    small, weight, bias = operands(20)
    _, call = traced(small, weight, bias)
    assert call.backend == "torch" and "slower than torch for this class: 0.50x of torch at 16x24x40" in call.reason
    _, call = traced(torch.randn(3000, 24), weight, bias)
    assert call.backend == "cpu" and "1.80x of torch at 4096x24x40" in call.reason
    # Nothing was measured with an activation, or with gradients: nothing is known against them.
    assert traced(small, weight, bias, activation="relu")[1].backend == "cpu"
    assert traced(small, weight.requires_grad_(), bias)[1].backend == "cpu"


def test_training_and_inference_have_their_own_speeds(backend, monkeypatch):
    record(monkeypatch, speed={"inference": {"plain": [[16, 24, 40, 2.0]]}, "training": {"plain": [[16, 24, 40, 0.6]]}})
    x, weight, bias = operands()
    assert traced(x, weight, bias)[1].backend == "cpu"
    assert traced(x, weight.requires_grad_(), bias)[1].backend == "torch"
    with torch.no_grad():
        assert traced(x, weight, bias)[1].backend == "cpu"


@pytest.mark.parametrize(("ratio", "taken"), [(0.95, "torch"), (0.99, "cpu"), (1.0, "cpu")])
def test_a_ratio_within_the_noise_is_no_loss(backend, monkeypatch, ratio, taken):
    record(monkeypatch, speed={"inference": {"plain": [[16, 24, 40, ratio]]}})
    assert traced(*operands())[1].backend == taken


def test_what_was_tuned_on_this_machine_replaces_what_was_shipped(backend, monkeypatch):
    record(monkeypatch, speed={"inference": {"plain": [[16, 24, 40, 1.5], [512, 24, 40, 1.5]]}})
    record(monkeypatch, source="tuned", speed={"inference": {"plain": [[16, 24, 40, 0.7]]}})
    assert traced(*operands(16))[1].backend == "torch"
    assert traced(*operands(512))[1].backend == "cpu"


def test_the_shipped_records_are_complete_and_name_known_ops_and_backends(backend, monkeypatch):
    monkeypatch.undo()  # the real ones
    for (op, kernel, dtype, path), entry in proof.records().items():
        assert op in dispatch.OPS and kernel in dispatch.BACKENDS and isinstance(getattr(torch, dtype), torch.dtype)
        assert path and isinstance(entry["passed"], bool) and entry["source"]
        for points in entry.get("speed", {}).values():
            assert all(ratio > 0 for measured in points.values() for *_, ratio in measured)


# --------------------------------------------------------------------------------------------------------- first call


def test_without_a_record_the_first_call_is_compared_and_the_next_is_not(backend, count):
    arguments = operands()
    output, call = traced(*arguments)
    assert call.backend == "cpu" and "proving itself" in call.reason
    assert count == {"kernel": 1, "reference": 2}
    again, call = traced(*arguments)
    assert call.backend == "cpu" and "proved itself on this device" in call.reason
    assert count == {"kernel": 2, "reference": 2}
    assert torch.equal(again, output)
    # Another shape is the same code path, another dtype is not.
    traced(*operands(64))
    assert count == {"kernel": 3, "reference": 2}
    traced(*operands(dtype=torch.bfloat16))
    assert count == {"kernel": 4, "reference": 4}


def test_the_verdict_is_kept_on_disk_for_the_next_process(backend, count, tmp_path):
    traced(*operands())
    (key,) = proof.verdicts()
    assert proof.verdicts() == {key: "passed"}
    for part in ("linear", "cpu", "float32", fastdl.__version__, torch.__version__):
        assert part in key.split(), part
    assert any(key in file.read_text() for file in (tmp_path / "cache").iterdir())
    forget_process()
    _, call = traced(*operands())
    assert "proved itself on this device" in call.reason and count == {"kernel": 2, "reference": 2}


SECOND_PROCESS = """
import torch, fastdl
from fastdl import proof
proof.records = dict
proof.tuned = dict
proof.SPEED_ON_RECORD_ONLY = frozenset()
with fastdl.trace() as calls:
    fastdl.functional.linear(torch.randn(16, 24), torch.randn(40, 24))
print(calls[0])
"""


def test_a_cpu_kernel_without_a_speed_on_record_is_not_taken(backend, monkeypatch):
    monkeypatch.setattr(proof, "SPEED_ON_RECORD_ONLY", frozenset({"cpu"}))
    assert "fastdl tune" in traced(*operands())[1].reason  # nor put to the proof
    record(monkeypatch)
    assert "fastdl tune" in traced(*operands())[1].reason
    record(monkeypatch, speed={"inference": {"plain": [[16, 24, 40, 1.3]]}})
    assert traced(*operands())[1].backend == "cpu"


def test_a_second_real_process_does_not_compare_again(backend):
    folder = os.path.dirname(os.path.dirname(fastdl.__file__))
    environment = {**os.environ, "PYTHONPATH": folder}

    def run() -> str:
        command = [sys.executable, "-c", SECOND_PROCESS]
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout

    assert "proving itself" in run()
    assert "-> cpu: proved itself on this device" in run()


def test_a_verdict_of_another_version_or_processor_does_not_count(backend, monkeypatch, count):
    traced(*operands())
    monkeypatch.setattr(proof, "__version__", "9.9.9")
    forget_process()
    assert "proving itself" in traced(*operands())[1].reason
    monkeypatch.setattr(proof, "processor", lambda: "Another CPU")
    forget_process()
    assert "proving itself" in traced(*operands())[1].reason
    assert len(proof.verdicts()) == 3


def test_backward_proves_itself_as_an_op_of_its_own(backend):
    x, weight, bias = (tensor.requires_grad_() for tensor in operands())
    fastdl.functional.linear(x, weight, bias, activation="relu").sum().backward()
    assert sorted(key.split()[0] for key in proof.verdicts()) == ["linear", "linear_backward"]
    assert set(proof.verdicts().values()) == {"passed"}


def test_a_named_backend_is_not_proven_and_not_compared(backend, monkeypatch, count):
    with fastdl.use_backend("cpu"):
        _, call = traced(*operands())
    assert call.reason == "named by use_backend" and count == {"kernel": 1, "reference": 0} and not proof.verdicts()


def test_prove_at_first_call_off_takes_torch_until_there_is_a_record(backend, monkeypatch, count):
    fastdl.prove_at_first_call(False)
    _, call = traced(*operands())
    assert call.backend == "torch" and "the proof at first call is off" in call.reason
    assert count["kernel"] == 0 and not proof.verdicts()
    record(monkeypatch)
    assert traced(*operands())[1].backend == "cpu"
    monkeypatch.setattr(proof, "records", dict)
    fastdl.prove_at_first_call(True)
    assert "proving itself" in traced(*operands())[1].reason
    assert len(proof.verdicts()) == 1


# ------------------------------------------------------------------------------------------------------- wrong kernels


def test_a_wrong_kernel_is_caught_torch_serves_and_everyone_is_told(backend, monkeypatch):
    plant(monkeypatch, transposed)
    x, weight, bias = operands()
    expected = F.linear(x, weight, bias)
    with pytest.warns(UserWarning, match="is wrong on this device and will not be used") as caught:
        output, _ = traced(x, weight, bias)
    assert torch.equal(output, expected)
    assert len(caught) == 1
    message = str(caught[0].message)
    code_path = proof.code_path("cpu", torch.device("cpu"))
    for part in ("cpu kernel of linear", "report", "error is", "float32", code_path, "(16, 24)", "(40, 24)"):
        assert part in message, part
    assert fastdl.__version__ in message and torch.__version__ in message
    # From then on torch serves, silently.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output, call = traced(x, weight, bias)
        other, _ = traced(*operands(7))
    assert torch.equal(output, expected) and other.shape == (7, 40)
    assert call.backend == "torch" and "not trusted" in call.reason and "its error is" in call.reason
    # explain and info tell it as well.
    layer = fastdl.nn.Linear(24, 40)
    (row,) = fastdl.explain(layer, x)
    assert row.backend == "torch" and "its error is" in row.reason
    assert "its error is" in str(fastdl.info())
    (verdict,) = fastdl.info()["verdicts of this machine"].values()
    assert "its error is" in verdict
    # The next process knows it too, and does not run the kernel again.
    forget_process()
    assert traced(x, weight, bias)[1].backend == "torch"


def test_a_wrong_kernel_is_caught_in_training_with_right_gradients(backend, monkeypatch):
    wrong = LINEAR_BACKWARD.implementations["cpu"]
    plant(monkeypatch, lambda *arguments: [grad * 1.001 for grad in wrong(*arguments)], LINEAR_BACKWARD)
    x, weight, bias = (tensor.requires_grad_() for tensor in operands())
    with pytest.warns(UserWarning, match="cpu kernel of linear_backward is wrong") as caught:
        fastdl.functional.linear(x, weight, bias).sin().sum().backward()
    assert len(caught) == 1
    expected = torch.autograd.grad(F.linear(x, weight, bias).sin().sum(), (x, weight, bias))
    for leaf, gradient in zip((x, weight, bias), expected, strict=True):
        torch.testing.assert_close(leaf.grad, gradient)
    assert sorted(outcome == "passed" for outcome in proof.verdicts().values()) == [False, True]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda y: y + 1e-4 * y.norm() / y.numel() ** 0.5,
        lambda y: y.index_fill(0, torch.tensor([y.shape[0] - 1]), 0),
        lambda y: y.index_fill(1, torch.tensor([3]), float("nan")),
        lambda y: y.index_fill(1, torch.tensor([3]), float("inf")),
        lambda y: y[:-1],
        lambda y: torch.zeros_like(y),
        lambda y: None,
    ],
    ids=["slightly off", "last row missing", "a NaN column", "an infinite column", "short", "zero", "nothing"],
)
def test_every_kind_of_wrong_result_is_caught(backend, monkeypatch, wrong):
    plant(monkeypatch, lambda x, w, b, *_: wrong(F.linear(x, w, b)))
    x, weight, bias = operands()
    with pytest.warns(UserWarning, match="is wrong on this device"):
        output, _ = traced(x, weight, bias)
    assert torch.equal(output, F.linear(x, weight, bias))
    assert traced(x, weight, bias)[1].backend == "torch"


def test_a_kernel_within_the_bound_is_not_called_wrong(backend, monkeypatch):
    def rounded_otherwise(x: Tensor, w: Tensor, b: Tensor, *_: object) -> Tensor:
        return F.linear(x, w, b) * (1 + torch.finfo(torch.float32).eps)

    plant(monkeypatch, rounded_otherwise)
    arguments = operands()
    exact = F.linear(*[tensor.double() for tensor in arguments])
    torch_error = accuracy.error(F.linear(*arguments), exact)
    output, _ = traced(*arguments)
    assert torch.equal(output, rounded_otherwise(*arguments))
    assert accuracy.error(output, exact) <= accuracy.bound(torch_error, torch.float32)
    assert list(proof.verdicts().values()) == ["passed"]


def test_a_kernel_that_raises_is_caught(backend, monkeypatch):
    def broken(*_: object) -> Tensor:
        raise RuntimeError("illegal instruction")

    plant(monkeypatch, broken)
    x, weight, bias = operands()
    with pytest.warns(UserWarning, match="it raised RuntimeError: illegal instruction"):
        output, _ = traced(x, weight, bias)
    assert torch.equal(output, F.linear(x, weight, bias))
    output, call = traced(x, weight, bias)
    assert call.backend == "torch" and "it raised RuntimeError: illegal instruction" in call.reason


def test_a_wrong_kernel_does_not_condemn_the_others(backend, monkeypatch):
    plant(monkeypatch, transposed)
    with pytest.warns(UserWarning, match="linear is wrong"):
        traced(*operands())
    with fastdl.trace() as calls:
        fastdl.functional.gelu(torch.randn(64))
        fastdl.functional.gelu(torch.randn(64))
    assert [call.backend for call in calls] == ["cpu", "cpu"] and "proved itself" in calls[1].reason


def test_what_is_wrong_for_the_user_is_an_error_and_no_verdict(backend):
    x, weight, _ = operands()
    with pytest.raises(RuntimeError, match="input has shape"):
        fastdl.functional.linear(x[:, 1:], weight)
    assert not proof.verdicts()


# ------------------------------------------------------------------------------------------- what proves nothing at all


@pytest.mark.parametrize(
    "inputs",
    [
        lambda x: torch.full_like(x, float("nan")),
        lambda x: x.index_fill(0, torch.tensor([2]), float("nan")),
        lambda x: x.index_fill(0, torch.tensor([2]), float("inf")),
        torch.zeros_like,
        lambda x: x[:0],
    ],
    ids=["all NaN", "a NaN row", "an infinite row", "zeros", "empty"],
)
def test_inputs_that_hide_errors_prove_nothing(backend, monkeypatch, inputs):
    right = LINEAR.implementations["cpu"]
    plant(monkeypatch, lambda x, w, b, *_: transposed(x, w, b))
    x, weight, _ = operands()
    special = inputs(x)
    for _ in range(2):  # nothing is proven, and nothing refuted: each call is right, and the next asks again
        output, call = traced(special, weight)
        assert torch.equal(output.nan_to_num(), F.linear(special, weight).nan_to_num())
        assert "proving itself" in call.reason
    assert not proof.verdicts()
    with pytest.warns(UserWarning, match="is wrong on this device"):
        traced(x, weight)
    assert len(proof.verdicts()) == 1
    # Nor does it condemn a right kernel.
    proof.cache_directory().joinpath(next(proof.cache_directory().iterdir()).name).unlink()
    plant(monkeypatch, right)
    forget_process()
    traced(special, weight)
    assert not proof.verdicts()
    traced(x, weight)
    assert list(proof.verdicts().values()) == ["passed"]


def test_out_of_memory_is_no_verdict(backend, monkeypatch):
    right = LINEAR.implementations["cpu"]

    def hungry(x: Tensor, *arguments: object) -> Tensor:
        if x.shape[0] > 100:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return right(x, *arguments)

    plant(monkeypatch, hungry)
    x, weight, bias = operands(200)
    output, _ = traced(x, weight, bias)
    assert torch.equal(output, F.linear(x, weight, bias)) and not proof.verdicts()
    traced(*operands())
    assert list(proof.verdicts().values()) == ["passed"]


# -------------------------------------------------------------------------------------------------------- compilation


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_nothing_is_proven_while_torch_compile_traces_but_at_the_first_run(backend, monkeypatch, training):
    compiling = []
    first_call = proof.first_call

    def watched(*arguments):
        compiling.append(torch.compiler.is_compiling() or not isinstance(arguments[2][0], Tensor))
        assert type(arguments[2][0]) in (Tensor, torch.nn.Parameter), "a fake tensor cannot prove anything"
        return first_call(*arguments)

    monkeypatch.setattr(proof, "first_call", watched)
    traced_graphs = []

    def look(graph, inputs):
        traced_graphs.append((len(compiling), graph))
        return graph.forward

    x, weight, bias = operands()
    weight.requires_grad_(training)
    compiled = torch.compile(lambda x, w, b: fastdl.functional.linear(x, w, b), backend=aot(look), fullgraph=True)
    output = compiled(x, weight, bias)
    assert traced_graphs and all(proofs == 0 for proofs, _ in traced_graphs)  # none before a graph was complete
    assert any("fastdl.linear" in str(node.target) for _, graph in traced_graphs for node in graph.graph.nodes)
    if training:
        output.sum().backward()
    assert compiling and not any(compiling)
    torch.testing.assert_close(output, F.linear(x, weight, bias))
    ops = {key.split()[0] for key in proof.verdicts()}
    assert ops == ({"linear", "linear_backward"} if training else {"linear"})
    torch._dynamo.reset()


def aot(compiler):
    """A torch.compile backend that traces forward and backward as inductor would, and compiles nothing."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    return aot_autograd(fw_compiler=lambda graph, inputs: make_boxed_func(compiler(graph, inputs)))


def test_a_wrong_kernel_is_caught_inside_a_compiled_function(backend, monkeypatch):
    plant(monkeypatch, transposed)
    x, weight, bias = operands()
    compiled = torch.compile(lambda x, w, b: fastdl.functional.linear(x, w, b), backend="aot_eager", fullgraph=True)
    with pytest.warns(UserWarning, match="is wrong on this device"):
        output = compiled(x, weight, bias)
    assert torch.equal(output, F.linear(x, weight, bias))
    assert torch.equal(compiled(x, weight, bias), F.linear(x, weight, bias))
    torch._dynamo.reset()


# ---------------------------------------------------------------------------------------------------------- the files


def test_without_a_writable_cache_the_verdicts_hold_for_the_process(backend, monkeypatch, tmp_path, count):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTDL_CACHE", str(tmp_path / "file" / "below"))
    forget_process()
    traced(*operands())
    fastdl.functional.gelu(torch.randn(64))  # a second verdict must not drop the first
    assert len(proof.verdicts()) == 2
    assert "proved itself" in traced(*operands())[1].reason
    assert count == {"kernel": 2, "reference": 2}


def test_without_a_home_the_verdicts_hold_for_the_process(backend, monkeypatch):
    def homeless() -> None:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("FASTDL_CACHE")
    monkeypatch.setattr(proof.Path, "home", homeless)
    forget_process()
    traced(*operands())
    assert "proved itself" in traced(*operands())[1].reason
    assert "passed" in str(fastdl.info())


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"null", b"[1, 2]", b"7", b'{"a": {"b": 1}}\n{"x', b"\xff\xfe\x00", b"\0" * 100, b'["key", 3]\n'],
    ids=["empty", "cut", "null", "list", "number", "nested", "no text", "zeros", "wrong value"],
)
def test_a_corrupt_verdict_file_is_survived_and_written_on(backend, content, count):
    traced(*operands())
    (file,) = proof.cache_directory().iterdir()
    file.write_bytes(content)
    forget_process()
    assert "proving itself" in traced(*operands())[1].reason
    forget_process()
    assert "proved itself" in traced(*operands())[1].reason
    assert count == {"kernel": 3, "reference": 4}
    assert all(isinstance(outcome, str) for outcome in proof.verdicts().values())
    assert "passed" in str(fastdl.info())


@pytest.mark.parametrize("content", ["", "{", "null", "[]", '{"records": [{}]}', '{"records": 3}', "{}"])
def test_a_corrupt_tuning_file_is_survived(backend, monkeypatch, content):
    monkeypatch.undo()
    path = proof.tuning_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    proof.tuned.cache_clear()
    try:
        assert proof.tuned() == {}
    finally:
        path.unlink()
        proof.tuned.cache_clear()


def _write_verdicts(folder: str, process: int, barrier) -> None:
    os.environ["FASTDL_CACHE"] = folder
    barrier.wait()
    for index in range(40):
        proof._remember(f"process {process} verdict {index}", "passed")


def test_verdicts_of_two_processes_at_once_do_not_overwrite_each_other(backend, tmp_path):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    folder = str(tmp_path / "shared")
    writers = [context.Process(target=_write_verdicts, args=(folder, process, barrier)) for process in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    os.environ["FASTDL_CACHE"] = folder
    forget_process()
    assert sorted(proof.verdicts()) == sorted(f"process {p} verdict {i}" for p in range(2) for i in range(40))
    assert len(list((tmp_path / "shared").iterdir())) == 1  # no leavings


def test_a_verdict_of_another_process_is_kept_by_the_next_one_here(backend):
    traced(*operands())
    ours = set(proof.verdicts())
    path = next(proof.cache_directory().iterdir())
    before = path.read_text()
    forget_process()
    proof._remember("another process", "passed")
    assert before.strip() in path.read_text()
    forget_process()
    assert set(proof.verdicts()) == {*ours, "another process"}


def test_the_verdicts_are_readable_json(backend):
    traced(*operands())
    fastdl.functional.gelu(torch.randn(64))
    (file,) = proof.cache_directory().iterdir()
    lines = [json.loads(line) for line in file.read_text().splitlines() if line]
    assert [outcome for _, outcome in lines] == ["passed", "passed"]
    assert {key.split()[0] for key, _ in lines} == {LINEAR.name, ACTIVATION.name}
