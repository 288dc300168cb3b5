"""Swapping a model's torch layers for this package's, in place and back, and saying what runs where and why."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.nn import Module

from fastdl import dispatch, nn

Model = TypeVar("Model", bound=Module)
Selector = type[Module] | str

# A family adds its layers here, one line each: torch's class and ours.
REPLACEMENTS: dict[type[Module], type[Module]] = {
    torch.nn.Conv1d: nn.Conv1d,
    torch.nn.Conv2d: nn.Conv2d,
    torch.nn.BatchNorm1d: nn.BatchNorm1d,
    torch.nn.BatchNorm2d: nn.BatchNorm2d,
    torch.nn.BatchNorm3d: nn.BatchNorm3d,
    torch.nn.LayerNorm: nn.LayerNorm,
    torch.nn.RMSNorm: nn.RMSNorm,
    torch.nn.Dropout: nn.Dropout,
    torch.nn.Linear: nn.Linear,
    torch.nn.SyncBatchNorm: nn.SyncBatchNorm,
    torch.nn.ReLU: nn.ReLU,
    torch.nn.LeakyReLU: nn.LeakyReLU,
    torch.nn.ELU: nn.ELU,
    torch.nn.Sigmoid: nn.Sigmoid,
    torch.nn.Tanh: nn.Tanh,
    torch.nn.GELU: nn.GELU,
    torch.nn.SiLU: nn.SiLU,
    torch.nn.MaxPool2d: nn.MaxPool2d,
    torch.nn.AvgPool2d: nn.AvgPool2d,
    torch.nn.AdaptiveAvgPool2d: nn.AdaptiveAvgPool2d,
    torch.nn.FractionalMaxPool2d: nn.FractionalMaxPool2d,
    torch.nn.Softmax: nn.Softmax,
    torch.nn.LogSoftmax: nn.LogSoftmax,
    torch.nn.CrossEntropyLoss: nn.CrossEntropyLoss,
    torch.nn.Embedding: nn.Embedding,
    torch.nn.LSTM: nn.LSTM,
    torch.nn.GRU: nn.GRU,
    torch.nn.RNN: nn.RNN,
    torch.nn.LSTMCell: nn.LSTMCell,
    torch.nn.GRUCell: nn.GRUCell,
    torch.nn.RNNCell: nn.RNNCell,
    torch.nn.MultiheadAttention: nn.MultiheadAttention,
    torch.nn.TransformerEncoderLayer: nn.TransformerEncoderLayer,
    torch.nn.TransformerDecoderLayer: nn.TransformerDecoderLayer,
    torch.nn.TransformerEncoder: nn.TransformerEncoder,
}
_MARK = "_fastdl_replaced"  # in the instance: what restore_layers may undo


def replace_layers(
    model: Model,
    *,
    only: Selector | Iterable[Selector] | None = None,
    skip: Selector | Iterable[Selector] | None = None,
) -> Model:
    """Makes a model's torch layers run on this package's kernels, in place, at any depth.

    Only the class of a layer changes: modules, parameters, buffers, hooks, device, dtype, training flag and state_dict
    stay the same objects. A subclass of a torch layer, or a layer whose ``forward`` was replaced on the instance, is
    left alone; :func:`explain` names it.

    Args:
        model: any module.
        only: torch layer classes, or patterns of qualified names (``"encoder.*"``): replace nothing else.
        skip: the same: leave these alone.

    Returns:
        The model itself.

    Raises:
        TypeError: ``model`` is no module, or a selector is neither class nor name.
        ValueError: a class that has no replacement here.
    """
    wanted, unwanted = _matcher("only", only, default=True), _matcher("skip", skip, default=False)
    for name, module in _modules(model):
        if _why_left_alone(module) is None and wanted(name, module) and not unwanted(name, module):
            module.__class__ = REPLACEMENTS[type(module)]
            module.__dict__[_MARK] = True
    return model


def restore_layers(model: Model) -> Model:
    """Undoes :func:`replace_layers`, in place; layers that were built as this package's stay.

    Returns:
        The model itself.
    """
    originals = {ours: theirs for theirs, ours in REPLACEMENTS.items()}
    for _, module in _modules(model):
        # A layer that was given another class since then, such as a parametrized one, waits until it has lost it.
        if _MARK in module.__dict__ and type(module) in originals:
            del module.__dict__[_MARK]
            module.__class__ = originals[type(module)]
    return model


@dataclass(frozen=True)
class Layer:
    """One layer in an :class:`Explanation`: its name, its class, what runs in it, and why; an op a row."""

    name: str
    layer: str
    backend: str
    reason: str
    op: str = ""


class Explanation(list[Layer]):
    """The layers of a model with what runs in each and why; prints as a table."""

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        table = Table("layer", "class", "op", "backend", "reason")
        for row in self:
            table.add_row(row.name, row.layer, row.op, row.backend, row.reason)
        console = Console(width=140)
        with console.capture() as capture:
            console.print(table)
        return capture.get()


def explain(model: Module, *example: Any, **keywords: Any) -> Explanation:
    """Says layer by layer what runs and why.

    Args:
        model: any module, with or without replaced layers.
        example, keywords: inputs for one call of the model, without gradients and in eval mode, that shows which
            backend each layer takes; without them, only what is and what could be replaced is told.

    Raises:
        TypeError: ``model`` is no module.
    """
    modules = list(_modules(model))
    calls = _watch(model, example, keywords) if example or keywords else None
    rows = Explanation()
    ours = set(REPLACEMENTS.values()) | {nn.BNReLU2d, nn.ConvReLU2d, nn.LinearReLU}
    for name, module in modules:
        kind = type(module)
        label = kind.__name__ if kind.__module__.startswith("torch.") else f"{kind.__module__}.{kind.__qualname__}"
        made = [call for call in calls or () if call.layer == name]
        if kind in ours and made:
            for call in dict.fromkeys(made):
                rows.append(Layer(name, label, call.backend, call.reason, call.op))
        elif kind in ours:
            reason = "give an example input to see the backend" if calls is None else "not reached by the example"
            rows.append(Layer(name, label, "fastdl", reason))
        elif isinstance(module, tuple(REPLACEMENTS)):
            rows.append(Layer(name, label, "torch", _why_left_alone(module) or "replace_layers would replace it"))
    return rows


def _watch(model: Module, example: tuple[Any, ...], keywords: dict[str, Any]) -> list[dispatch.Call]:
    previous: list[str | None] = []
    handles = []

    def enter(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            previous.append(dispatch.state.layer)
            dispatch.state.layer = name

        return hook

    def leave(*_: Any) -> None:
        dispatch.state.layer = previous.pop()

    modes = {module: module.training for module in model.modules()}
    try:
        for name, module in _modules(model):
            handles.append(module.register_forward_pre_hook(enter(name)))
            handles.append(module.register_forward_hook(leave, always_call=True))
        model.eval()
        with torch.no_grad(), dispatch.trace() as calls:
            model(*example, **keywords)
    finally:
        dispatch.state.layer = None
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    return calls


def _modules(model: Module) -> Iterable[tuple[str, Module]]:
    if not isinstance(model, Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    yield from model.named_modules()  # a shared module comes once


def _why_left_alone(module: Module) -> str | None:
    """Why replace_layers leaves a module alone, or None if it replaces it."""
    kind = type(module)
    if kind not in REPLACEMENTS:
        base = next((base for base in REPLACEMENTS if isinstance(module, base)), None)
        if base is None:
            return f"fastdl has no {kind.__name__}"
        own = "with its own forward" if kind.forward is not base.forward else "whose class may mean more than the layer"
        return f"left alone: a subclass of torch.nn.{base.__name__} {own}"
    if "forward" in module.__dict__:
        return "left alone: its forward was replaced on the instance"
    return None


def _matcher(
    argument: str, selectors: Selector | Iterable[Selector] | None, default: bool
) -> Callable[[str, Module], bool]:
    if selectors is None:
        return lambda name, module: default
    chosen = list(selectors) if isinstance(selectors, Iterable) and not isinstance(selectors, str) else [selectors]
    for selector in chosen:
        if not isinstance(selector, str | type):
            raise TypeError(f"{argument} must hold layer classes or name patterns; got {selector!r}")
        if isinstance(selector, type) and selector not in REPLACEMENTS:
            known = ", ".join(f"torch.nn.{layer.__name__}" for layer in REPLACEMENTS)
            raise ValueError(f"{argument}: {selector.__name__} has no replacement; allowed: {known}, or name patterns")
    patterns = [s for s in chosen if isinstance(s, str)]
    classes = tuple(s for s in chosen if isinstance(s, type))
    return lambda name, module: type(module) in classes or any(fnmatch.fnmatchcase(name, p) for p in patterns)
