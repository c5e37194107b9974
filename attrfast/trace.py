"""Records one forward pass as a list of calls over values.

A `TorchFunctionMode` meets every torch function that the model's code calls, whoever calls it: module,
`torch.nn.functional`, tensor method or operator. No hook is set and nothing is written to the model.
Knows nothing about channels, units or importance.
"""

from __future__ import annotations

import contextlib
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from attrfast.errors import ModelError


CONVOLUTIONS = frozenset(f"conv{t}{d}d" for t in ("", "_transpose") for d in (1, 2, 3))


@dataclass(frozen=True)
class Ref:
    """A tensor that an earlier call made, or an input of the model (value number)."""

    value: int


@dataclass(frozen=True)
class Param:
    """A parameter or buffer of the model, by its full name."""

    name: str


@dataclass
class Call:
    """One torch function call: `func(*args, **kwargs)` with tensors replaced by `Ref` and `Param`."""

    index: int
    name: str
    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    overwrites: int | None = None  # the value whose memory this call changed


@dataclass
class Trace:
    """A recorded forward pass.

    Attributes:
        calls: in the order in which they ran.
        shapes: shape of every value.
        results: the values that the model returned.
        roots: values with no recorded origin: the model's inputs, constants, and tensors made where no
            torch function could be seen.
    """

    calls: list[Call] = field(default_factory=list)
    shapes: list[torch.Size] = field(default_factory=list)
    results: tuple[int, ...] = ()
    roots: set[int] = field(default_factory=set)


class ValueTable:
    """Gives every live tensor a number; a tensor that is overwritten gets a new one."""

    def __init__(self) -> None:
        self._by_id: dict[int, tuple[weakref.ref[torch.Tensor], int]] = {}

    def get(self, tensor: torch.Tensor) -> int | None:
        entry = self._by_id.get(id(tensor))
        return entry[1] if entry is not None and entry[0]() is tensor else None

    def put(self, tensor: torch.Tensor, value: int) -> None:
        self._by_id[id(tensor)] = (weakref.ref(tensor), value)


def call_name(func: Callable[..., Any]) -> str:
    """The plain name of a torch function: `relu` for `relu_`, `add` for `__iadd__`."""
    name = getattr(func, "__name__", type(func).__name__)
    if name == "__get__":
        return "get:" + str(getattr(getattr(func, "__self__", None), "__name__", "?"))
    if name == "__set__":
        return "set:" + str(getattr(getattr(func, "__self__", None), "__name__", "?"))
    name = name.strip("_")
    return _OPERATORS.get(name, name)


_OPERATORS = {
    **{"i" + n: n for n in ("add", "sub", "mul", "div", "truediv", "pow", "floordiv")},
    **{"r" + n: n for n in ("add", "sub", "mul", "div", "truediv", "pow", "floordiv")},
    "truediv": "div",
    "itruediv": "div",
    "rtruediv": "div",
}


def opened(func: Callable[..., Any]) -> Callable[..., Any] | None:
    """For a function that hides linear calls from modes, a copy of it that shows them; None otherwise.

    A mode sees a Python function of torch as one call, and is off while that function runs. The copy has
    the same code and does not ask for modes itself.
    """
    if func is not nn.functional.multi_head_attention_forward:
        return None
    scope = dict(func.__globals__)
    scope["has_torch_function"] = lambda _: False
    copy = types.FunctionType(func.__code__, scope, func.__name__, func.__defaults__)
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy


def is_inplace(func: Callable[..., Any], kwargs: dict[str, Any]) -> bool:
    name = getattr(func, "__name__", "")
    dunder = name.startswith("__") and name.endswith("__")
    return (
        bool(kwargs.get("inplace"))
        or (name.endswith("_") and not dunder)
        or (dunder and name[2:3] == "i" and name not in ("__invert__", "__index__", "__int__"))
    )


def tensors_in(tree: Any) -> Iterator[torch.Tensor]:
    """Every tensor in nested tuples, lists, dicts and output objects (anything with `__dict__`-like items)."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from tensors_in(item)
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from tensors_in(item)
    elif hasattr(tree, "__dataclass_fields__"):
        yield from tensors_in(vars(tree))


class _Recorder(TorchFunctionMode):
    def __init__(self, names: dict[int, str], trace: Trace) -> None:
        super().__init__()
        self.names = names
        self.trace = trace
        self.values = ValueTable()

    def number(self, tensor: torch.Tensor) -> int:
        value = self.values.get(tensor)
        if value is None:
            value = self.new(tensor)
            self.trace.roots.add(value)
        return value

    def new(self, tensor: torch.Tensor) -> int:
        value = len(self.trace.shapes)
        self.trace.shapes.append(tensor.shape)
        self.values.put(tensor, value)
        return value

    def encode(self, tree: Any, seen: list[int]) -> Any:
        if isinstance(tree, torch.Tensor):
            name = self.names.get(id(tree))
            if name is not None and self.values.get(tree) is None:
                return Param(name)
            value = self.number(tree)
            seen.append(value)
            return Ref(value)
        if isinstance(tree, (list, tuple)) and not isinstance(tree, torch.Size):
            return tuple(self.encode(item, seen) for item in tree)
        if isinstance(tree, dict):
            return {key: self.encode(item, seen) for key, item in tree.items()}
        return tree

    def __torch_function__(
        self,
        func: Callable[..., Any],
        kinds: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        inner = opened(func)
        if inner is not None:
            with self:
                return inner(*args, **kwargs)
        name = call_name(func)
        if name.startswith("get:") and name not in _GETTERS_THAT_MAKE_TENSORS:
            return func(*args, **kwargs)
        seen: list[int] = []
        coded_args = self.encode(tuple(args), seen)
        coded_kwargs = self.encode(kwargs, seen)
        out = func(*args, **kwargs)
        overwritten: int | None = None
        target = kwargs.get("out")
        if target is None and name in ("setitem", "set:data"):
            target = args[0]
        made = list(tensors_in(out))
        if isinstance(target, torch.Tensor) and not any(t is target for t in made):
            made.append(target)
        if not made:
            return out
        if is_inplace(func, kwargs) or target is not None:
            subject = target if isinstance(target, torch.Tensor) else made[0]
            overwritten = self.values.get(subject)
        trace = self.trace
        outputs = tuple(self.new(t) for t in made if id(t) not in self.names)
        trace.calls.append(
            Call(
                index=len(trace.calls),
                name=name,
                func=func,
                args=coded_args,
                kwargs=coded_kwargs,
                inputs=tuple(seen),
                outputs=outputs,
                overwrites=overwritten,
            )
        )
        return out


_GETTERS_THAT_MAKE_TENSORS = frozenset(
    f"get:{name}" for name in ("data", "T", "mT", "H", "mH", "real", "imag")
)


def state_names(model: nn.Module) -> dict[int, str]:
    """id -> full name of every parameter and buffer (the first name of one that has several)."""
    names: dict[int, str] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        names.setdefault(id(tensor), name)
    return names


@contextlib.contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Puts training flags, buffers and the global random state back as they were.

    For passes that may change them: eval-mode passes change the flags, train-mode passes the statistics
    of batch norms and the random state as well.
    """
    flags = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    devices = sorted({t.device.index or 0 for t in model.parameters() if t.is_cuda})
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        for module, flag in flags:
            module.training = flag
        with torch.no_grad():
            for buffer, before in buffers:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)


def trace(
    model: nn.Module,
    inputs: Sequence[Any],
    kwargs: dict[str, Any] | None = None,
    *,
    training: bool = False,
) -> Trace:
    """Runs `model(*inputs, **kwargs)` once without gradients and records it.

    Args:
        model: left as it is (parameters, buffers, flags, random state).
        inputs: positional inputs, on the model's device.
        training: record the pass in training mode (auxiliary heads run only there).

    Raises:
        ModelError: the model's own forward pass raised; its error is the cause.
    """
    record = Trace()
    recorder = _Recorder(state_names(model), record)
    with preserved(model), torch.no_grad():
        model.train(training)
        try:
            with recorder:
                out = model(*inputs, **(kwargs or {}))
        except Exception as error:
            raise ModelError(
                f"the model's forward pass failed on an input of shape "
                f"{[tuple(t.shape) for t in tensors_in(tuple(inputs))]}: {error}"
            ) from error
        record.results = tuple(
            value for t in tensors_in(out) if (value := recorder.values.get(t)) is not None
        )
    return record
