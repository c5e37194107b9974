"""Records one forward pass as a list of calls over values.

A `TorchFunctionMode` meets every torch function that the model's code calls, whoever calls it: module,
`torch.nn.functional`, tensor method or operator. No hook is set and nothing is written to the model.
Knows nothing about channels, units or importance.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import types
import weakref
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from attrfast.errors import ModelError
from attrfast.sketch import ValuesNeededError, sketched

log = logging.getLogger(__name__)


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
    state: tuple[str, ...] = ()  # the parameters and buffers that it is given, in order


def argument(call: Call, position: int, keyword: str, default: Any = None) -> Any:
    """An argument of a recorded call, by position or keyword."""
    if position < len(call.args):
        return call.args[position]
    return call.kwargs.get(keyword, default)


@dataclass
class Trace:
    """A recorded forward pass.

    Attributes:
        calls: in the order in which they ran.
        shapes: shape of every value.
        itemsizes: bytes of one element of every value.
        results: the values that the model returned.
        roots: values with no recorded origin: the model's inputs, constants, and tensors made where no
            torch function could be seen.
    """

    calls: list[Call] = field(default_factory=list)
    shapes: list[torch.Size] = field(default_factory=list)
    itemsizes: list[int] = field(default_factory=list)
    results: tuple[int, ...] = ()
    roots: set[int] = field(default_factory=set)

    @property
    def samples(self) -> int:
        """How many the recorded inputs held."""
        return next((self.shapes[value][0] for value in sorted(self.roots) if self.shapes[value]), 1)

    def note(self, tensor: torch.Tensor, numbering: Numbering) -> None:
        """Keeps the shape of a value that was just numbered."""
        value = numbering.values.get(tensor)
        if value is not None and value >= len(self.shapes):
            missing = value + 1 - len(self.shapes)
            self.shapes.extend([tensor.shape] * missing)
            self.itemsizes.extend([tensor.element_size()] * missing)


class ValueTable:
    """Gives every live tensor a number; a tensor that is overwritten gets a new one."""

    def __init__(self) -> None:
        self._by_id: dict[int, tuple[weakref.ref[torch.Tensor], int]] = {}

    def get(self, tensor: torch.Tensor) -> int | None:
        entry = self._by_id.get(id(tensor))
        return entry[1] if entry is not None and entry[0]() is tensor else None

    def put(self, tensor: torch.Tensor, value: int) -> None:
        self._by_id[id(tensor)] = (weakref.ref(tensor), value)


@functools.lru_cache(maxsize=1024)  # a pass makes the same few calls again and again
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

    A mode sees a Python function of torch as one call, and is off while that function runs.
    """
    return shown(func) if func is nn.functional.multi_head_attention_forward else None


def shown(func: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of a Python function of torch that is no call for modes, so that they see into it."""
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
    found: list[torch.Tensor] = []
    _collect(tree, found)
    return iter(found)


def _collect(tree: Any, found: list[torch.Tensor]) -> None:
    # Every call of a pass comes through here; recursive generators took three times as long.
    if isinstance(tree, (list, tuple)):
        for item in tree:
            if type(item) in _TENSORS:
                found.append(item)
            elif type(item) not in _LEAVES:
                _collect(item, found)
    elif isinstance(tree, torch.Tensor):
        found.append(tree)
    elif isinstance(tree, dict):
        _collect(list(tree.values()), found)
    elif hasattr(tree, "__dataclass_fields__"):
        _collect(list(vars(tree).values()), found)


_TENSORS = frozenset({torch.Tensor, nn.Parameter})
_LEAVES = frozenset({int, float, bool, str, type(None), torch.dtype, torch.device, torch.Size, slice})


class Numbering:
    """Numbers values in the order in which calls meet them: the same calls give the same numbers.

    Args:
        names: id -> name of the model's parameters and buffers, which are no values.
    """

    def __init__(self, names: dict[int, str]) -> None:
        self.names = names
        self.values = ValueTable()
        self.count = 0
        self.roots: set[int] = set()

    def number(self, tensor: torch.Tensor) -> int:
        value = self.values.get(tensor)
        if value is None:
            value = self.new(tensor)
            self.roots.add(value)
        return value

    def new(self, tensor: torch.Tensor) -> int:
        value = self.count
        self.count += 1
        self.values.put(tensor, value)
        return value

    def is_state(self, tensor: torch.Tensor) -> bool:
        """A parameter or buffer that no call has overwritten."""
        return id(tensor) in self.names and self.values.get(tensor) is None

    def given(self, *trees: Any) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """Numbers of the values, and names of the parameters and buffers, that a call is given, in order."""
        inputs, state = [], []
        names, known = self.names, self.values.get
        for tensor in tensors_in(trees):
            value = known(tensor)
            if value is not None:
                inputs.append(value)
            elif id(tensor) in names:
                state.append(names[id(tensor)])
            else:
                inputs.append(self.number(tensor))
        return tuple(inputs), tuple(state)

    def made(self, out: Any, target: Any) -> list[torch.Tensor]:
        """The tensors that a call made: its results, and what it wrote into."""
        if type(out) is torch.Tensor and target is None:  # mostly
            return [] if id(out) in self.names else [out]
        made = list(tensors_in(out))
        if isinstance(target, torch.Tensor) and not any(t is target for t in made):
            made.append(target)
        return [t for t in made if id(t) not in self.names]


def is_silent(name: str) -> bool:
    """Whether a call reads a tensor's shape or the like, and neither its values nor makes others."""
    if name.startswith("get:"):
        return name not in _GETTERS_THAT_MAKE_TENSORS
    return name in _METADATA


def written_to(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The tensor that a call writes into although it does not return it, or None."""
    target = kwargs.get("out")
    return args[0] if target is None and name in ("setitem", "set:data") else target


class CallMode(TorchFunctionMode):
    """A mode that meets every call by its name, attention's linear calls included."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        kinds: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        inner = opened(func)
        if inner is not None:
            with self:
                return inner(*args, **(kwargs or {}))
        return self.meet(func, call_name(func), args, kwargs or {})

    @abstractmethod
    def meet(
        self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """What the call returns to the model. The mode is off meanwhile."""


class _Recorder(CallMode):
    def __init__(self, names: dict[int, str], trace: Trace) -> None:
        super().__init__()
        self.trace = trace
        self.numbering = Numbering(names)

    def encode(self, tree: Any) -> Any:
        if isinstance(tree, torch.Tensor):
            if self.numbering.is_state(tree):
                return Param(self.numbering.names[id(tree)])
            return Ref(self.numbering.number(tree))
        if isinstance(tree, (list, tuple)) and not isinstance(tree, torch.Size):
            return tuple(self.encode(item) for item in tree)
        if isinstance(tree, dict):
            return {key: self.encode(item) for key, item in tree.items()}
        return tree

    def meet(
        self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if is_silent(name):
            return func(*args, **kwargs)
        numbering, trace = self.numbering, self.trace
        inputs, state = numbering.given(args, kwargs)
        for tensor in tensors_in((args, kwargs)):
            trace.note(tensor, numbering)
        coded_args, coded_kwargs = self.encode(tuple(args)), self.encode(kwargs)
        out = self.run(func, name, args, kwargs)
        target = written_to(name, args, kwargs)
        made = numbering.made(out, target)
        overwritten: int | None = None
        if made and (is_inplace(func, kwargs) or target is not None):
            subject = target if isinstance(target, torch.Tensor) else made[0]
            overwritten = numbering.values.get(subject)
        outputs = tuple(numbering.new(t) for t in made)
        for tensor in made:
            trace.note(tensor, numbering)
        trace.calls.append(
            Call(
                index=len(trace.calls),
                name=name,
                func=func,
                args=coded_args,
                kwargs=coded_kwargs,
                inputs=inputs,
                outputs=outputs,
                overwrites=overwritten,
                state=state,
            )
        )
        return out

    def run(
        self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        return func(*args, **kwargs)


class _Sketcher(_Recorder):
    """Records calls that make their results in shape alone, see `attrfast.sketch`.

    Args:
        names, trace: as of `_Recorder`.
        given: the tensors in the model's inputs.
        state: the model's parameters and buffers.

    Attributes:
        refused: why the record is of no use; the model may catch the error that is raised as well.
    """

    def __init__(
        self,
        names: dict[int, str],
        trace: Trace,
        given: Sequence[torch.Tensor],
        state: Iterable[torch.Tensor],
    ) -> None:
        super().__init__(names, trace)
        self.given = frozenset(map(id, given))
        self.foreign = {_memory(t) for t in (*given, *state)}
        self.refused: str | None = None

    def meet(
        self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if name == "data_ptr":  # through which values may be read that no call shows
            self._refuse(name)
        return super().meet(func, name, args, kwargs)

    def run(
        self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        values, roots = self.numbering.values, self.numbering.roots
        for tensor in tensors_in((args, kwargs)):
            if id(tensor) not in self.given and values.get(tensor) in roots:
                self._refuse(f"{name} reads what no call made")
        in_place = is_inplace(func, kwargs)
        if in_place:
            target = args[0] if args else kwargs.get("input")
            if not isinstance(target, torch.Tensor) or _memory(target) in self.foreign:
                self._refuse(f"{name} writes into what no call made")
        try:
            out = sketched(func, name, args, kwargs, in_place)
        except ValuesNeededError:
            self._refuse(name)
        if next(tensors_in(out), None) is None:
            self._refuse(f"{name} made no tensor")
        return out

    def _refuse(self, why: str) -> NoReturn:
        self.refused = self.refused or why
        raise ValuesNeededError(why)


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


_GETTERS_THAT_MAKE_TENSORS = frozenset(
    f"get:{name}" for name in ("data", "T", "mT", "H", "mH", "real", "imag")
)
_METADATA = frozenset(
    """
    size dim ndimension numel nelement stride is_contiguous element_size get_device is_floating_point
    is_complex len storage_offset data_ptr has_names is_same_size hash is_signed is_inference
    """.split()
)


def state_names(model: nn.Module) -> dict[int, str]:
    """id -> full name of every parameter and buffer (the first name of one that has several)."""
    return _names(_named_state(model))


def _named_state(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _names(named: Iterable[tuple[str, torch.Tensor]]) -> dict[int, str]:
    names: dict[int, str] = {}
    for name, tensor in named:
        names.setdefault(id(tensor), name)
    return names


class State:
    """A model's parameters and buffers, looked up once for all passes.

    Attributes:
        tensors: by their names. Held here, so that their ids stay theirs.
        names: see `state_names`.
        frozen: id of a parameter -> an alias of it that wants no gradient.
    """

    def __init__(self, model: nn.Module) -> None:
        named = _named_state(model)
        self.tensors, self.names = dict(named), _names(named)
        self.frozen = {id(p): p.detach() for p in model.parameters()}


@contextlib.contextmanager
def ordinary_region(device: torch.device) -> Iterator[None]:
    """Whatever region the caller is in: gradients can be recorded, and nothing is autocast unless asked for."""
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
    ):
        yield


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
    """Records the calls of `model(*inputs, **kwargs)` without gradients.

    Convolutions and linear layers are left out where nothing depends on their values, which nothing does in
    most models (`attrfast.sketch`); otherwise the model runs.

    Args:
        model: left as it is (parameters, buffers, flags, random state).
        inputs: positional inputs, on the model's device.
        training: record the pass in training mode (auxiliary heads run only there).

    Raises:
        ModelError: the model's own forward pass raised; its error is the cause.
    """
    given, named = kwargs or {}, _named_state(model)
    names, sketch = _names(named), Trace()
    tensors = list(tensors_in((tuple(inputs), given)))
    sketcher = _Sketcher(names, sketch, tensors, [tensor for _, tensor in named])
    with contextlib.suppress(Exception):  # whatever the model does with values that are not its own
        _record(model, inputs, given, training, sketcher)
        if sketcher.refused is None:
            return sketch
    log.debug("the model runs for its record: %s", sketcher.refused or "a sketch of it fails")
    record = Trace()
    try:
        _record(model, inputs, given, training, _Recorder(names, record))
    except Exception as error:
        raise ModelError(
            f"the model's forward pass failed on an input of shape "
            f"{[tuple(t.shape) for t in tensors_in(tuple(inputs))]}: {error}"
        ) from error
    return record


def _record(
    model: nn.Module, inputs: Sequence[Any], kwargs: dict[str, Any], training: bool, recorder: _Recorder
) -> None:
    with preserved(model), torch.no_grad():
        if any(module.training != training for module in model.modules()):
            model.train(training)
        with recorder:
            out = model(*inputs, **kwargs)
    numbering = recorder.numbering
    recorder.trace.results = tuple(
        value for t in tensors_in(out) if (value := numbering.values.get(t)) is not None
    )
    recorder.trace.roots = numbering.roots
