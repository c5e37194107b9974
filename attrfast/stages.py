"""Groups the calls of a recorded pass into stages: convolution, batch norm, addition, ReLU, max-pool.

Some begin with a concatenation instead, which batch norm and ReLU follow. A stage is a chain in which every
value but the last has one reader, so that it can run in place as one op. Must not know about units or
attribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from attrfast.trace import Call, Param, Ref, Trace, argument

_FRESH_POOLS = ("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d")
_PLAIN_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
_JOINING = ("cat", "concat", "concatenate")
# What makes new memory, unless it is told to write into its input.
_MAKES_NEW = frozenset(
    """
    conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d linear batch_norm group_norm
    layer_norm relu relu6 leaky_relu elu gelu silu hardswish hardsigmoid sigmoid tanh softmax prelu add sub mul
    div cat concat concatenate stack clone mean sum max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d
    avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
    """.split()
)
INF = float("inf")


@dataclass
class Stage:
    """Calls that run as one op.

    Attributes:
        roles: call index -> "cat", "conv", "norm", "add", "relu" or "pool", in order.
        sources: the values that it reads first: one, or those that it joins.
        residual: the value that its addition takes besides, or None.
        output: the value that it makes.
        upper: ceiling of its ReLU (inf for an ordinary one); read where there is a ReLU.
        owned: whether the memory that it works on is its own, so that it may be overwritten.
    """

    roles: dict[int, str]
    sources: tuple[int, ...]
    output: int
    residual: int | None = None
    upper: float = INF
    owned: bool = False

    @property
    def first(self) -> int:
        """Index of its first call."""
        return next(iter(self.roles))

    def has(self, role: str) -> bool:
        return role in self.roles.values()

    @property
    def last(self) -> int:
        """Index of its last call, where it runs."""
        return next(reversed(self.roles))


@dataclass
class Uses:
    """Who reads what in a trace.

    Attributes:
        readers: value -> calls that take it, in order.
        makers: value -> the call that made it.
        results: values that the model returns.
        overwritten: values whose memory a call changes.
    """

    readers: dict[int, list[Call]] = field(default_factory=dict)
    makers: dict[int, Call] = field(default_factory=dict)
    results: frozenset[int] = frozenset()
    overwritten: dict[int, Call] = field(default_factory=dict)

    def only_reader(self, value: int) -> Call | None:
        readers = self.readers.get(value, [])
        return readers[0] if len(readers) == 1 and value not in self.results else None


def uses_of(record: Trace) -> Uses:
    uses = Uses(results=frozenset(record.results))
    for call in record.calls:
        for value in dict.fromkeys(call.inputs):
            uses.readers.setdefault(value, []).append(call)
        for value in call.outputs:
            uses.makers.setdefault(value, call)
        if call.overwrites is not None:
            uses.overwritten[call.overwrites] = call
    return uses


def relu_ceiling(name: str, call_argument: Any) -> float | None:
    """Upper bound of a call that is a ReLU (inf) or a ReLU with a ceiling (ReLU6: 6); None otherwise.

    Args:
        name: of the torch function.
        call_argument: (position, keyword, default) -> value of an argument of the call.
    """
    if name == "relu":
        return INF
    if name == "relu6":
        return 6.0
    if name == "hardtanh":
        low, high = call_argument(1, "min_val", -1.0), call_argument(2, "max_val", 1.0)
    elif name in ("clamp", "clip"):
        low, high = call_argument(1, "min", None), call_argument(2, "max", None)
    elif name == "clamp_min":
        low, high = call_argument(1, "min", None), None
    elif name == "threshold":
        low, high = call_argument(1, "threshold", None), None
        if call_argument(2, "value", None) != 0:
            return None
    else:
        return None
    if not isinstance(low, (int, float)) or low != 0 or not isinstance(high, (int, float, type(None))):
        return None
    return INF if high is None else float(high)


def find_stages(record: Trace, uses: Uses, *, joins: bool) -> list[Stage]:
    """The stages of a pass; every call is in one at most.

    Args:
        joins: whether some begin with a concatenation.
    """
    taken: set[int] = set()
    stages = []
    changed = _last_changes(record) if joins else {}
    for call in record.calls:
        if call.index in taken or len(call.outputs) != 1:
            continue
        if call.name in _JOINING:
            stage = _joined(call, record, uses, changed) if joins else None
        else:
            stage = _head(call, record, uses)
        if stage is None:
            continue
        if not stage.has("cat"):
            _extend(stage, record, uses, taken)
        if _worthwhile(stage):
            taken.update(stage.roles)
            stages.append(stage)
    return stages


def _worthwhile(stage: Stage) -> bool:
    # A lone addition or the like is no stage: only what a kernel does better is.
    return stage.has("conv") or stage.has("norm") or stage.has("relu") or stage.has("pool")


def _joined(call: Call, record: Trace, uses: Uses, changed: dict[int, int]) -> Stage | None:
    """A concatenation of channels, the batch norm that alone reads it, and the ReLU that alone reads that.

    Its parts are read once more on the way back, so nothing may write to them in the meantime.

    Args:
        changed: as of `_last_changes`.
    """
    parts, dim = argument(call, 0, "tensors"), argument(call, 1, "dim", 0)
    if not isinstance(parts, (list, tuple)) or not all(isinstance(part, Ref) for part in parts):
        return None
    sources = tuple(part.value for part in parts)
    out = call.outputs[0]
    dims = len(record.shapes[out])
    if len(set(sources)) < len(sources) or set(sources) != set(call.inputs) or not 2 <= dims <= 5:
        return None
    if dim not in (1, 1 - dims) or any(changed.get(v, -1) > call.index for v in sources):
        return None
    norm = uses.only_reader(out)
    if norm is None or not _is_norm(norm) or len(norm.outputs) != 1 or norm.overwrites is not None:
        return None
    relu = uses.only_reader(norm.outputs[0])
    upper = None if relu is None or len(relu.outputs) != 1 else call_ceiling(relu)
    if relu is None or upper is None:
        return None
    after = uses.only_reader(relu.outputs[0])
    if after is not None and _is_pool(after, record):
        return None  # which is better off in a stage with what comes before it
    roles = {call.index: "cat", norm.index: "norm", relu.index: "relu"}
    return Stage(roles, sources, relu.outputs[0], upper=upper, owned=True)


def _last_changes(record: Trace) -> dict[int, int]:
    """Value -> the last call that writes to memory that may be its own."""
    memory = list(range(len(record.shapes)))  # value -> the first that it may share its memory with

    def first(value: int) -> int:
        while memory[value] != value:
            memory[value] = memory[memory[value]]
            value = memory[value]
        return value

    last: dict[int, int] = {}
    for call in record.calls:
        if call.overwrites is not None or call.name not in _MAKES_NEW:
            for value in (*call.inputs, *call.outputs):
                memory[first(value)] = first(call.inputs[0]) if call.inputs else first(value)
    for call in record.calls:
        if call.overwrites is not None:
            last[first(call.overwrites)] = call.index
    return {value: last[first(value)] for value in range(len(memory)) if first(value) in last}


def _head(call: Call, record: Trace, uses: Uses) -> Stage | None:
    source = argument(call, 0, "input")
    if not isinstance(source, Ref):
        return None
    value, out = source.value, call.outputs[0]
    shape = record.shapes[value]
    if call.name in _PLAIN_CONVOLUTIONS:
        weight = argument(call, 1, "weight")
        padding = argument(call, 4, "padding", 0)
        if isinstance(weight, Param) and len(shape) == int(call.name[-2]) + 2 and padding != "same":
            return Stage({call.index: "conv"}, (value,), out, owned=True)
        return None
    if not 2 <= len(shape) <= 5:
        return None
    if _is_norm(call):
        return Stage({call.index: "norm"}, (value,), out, owned=_spare(value, uses))
    upper = call_ceiling(call)
    if upper is not None:
        return Stage({call.index: "relu"}, (value,), out, upper=upper, owned=_spare(value, uses))
    if _is_pool(call, record):
        return Stage({call.index: "pool"}, (value,), out)
    return None


def _spare(value: int, uses: Uses) -> bool:
    """Whether nobody else needs a value's memory: a fresh tensor that its maker's backward ignores."""
    maker = uses.makers.get(value)
    return maker is not None and maker.name in _JOINING and (uses.only_reader(value) is not None)


def _extend(stage: Stage, record: Trace, uses: Uses, taken: set[int]) -> None:
    while not stage.has("pool"):
        call = uses.only_reader(stage.output)
        if call is None or call.index in taken or call.index in stage.roles or len(call.outputs) != 1:
            return
        role = _role(stage, call, record, uses)
        if role is None:
            return
        stage.roles[call.index] = role
        stage.output = call.outputs[0]


def _role(stage: Stage, call: Call, record: Trace, uses: Uses) -> str | None:
    """What `call` would be in the stage, or None where it can't join."""
    first = argument(call, 0, "input")
    after_relu = stage.has("relu")
    if _is_pool(call, record) and not stage.has("add") and not _only_linear(stage):
        return "pool"
    if after_relu or stage.has("pool"):
        return None
    if _is_norm(call) and not stage.has("norm") and not stage.has("add"):
        return "norm" if isinstance(first, Ref) and first.value == stage.output else None
    upper = call_ceiling(call)
    if upper is not None:
        stage.upper = upper
        return "relu"
    if call.name == "add" and not stage.has("add"):
        other = _other_addend(call, stage.output, record)
        if other is not None and call.overwrites != other:
            stage.residual = other
            return "add"
    return None


def _only_linear(stage: Stage) -> bool:
    """A pool after a bare convolution would keep what the convolution alone need not."""
    return not stage.has("relu")


def _is_norm(call: Call) -> bool:
    if call.name != "batch_norm":
        return False
    training = argument(call, 5, "training", False)
    mean, var = argument(call, 1, "running_mean"), argument(call, 2, "running_var")
    return not training and isinstance(mean, Param) and isinstance(var, Param)


def call_ceiling(call: Call) -> float | None:
    """`relu_ceiling` of a recorded call."""
    if len(call.inputs) != 1:
        return None
    return relu_ceiling(call.name, lambda i, key, default: argument(call, i, key, default))


def _is_pool(call: Call, record: Trace) -> bool:
    if call.name != "max_pool2d" or len(call.outputs) != 1:
        return False
    source = argument(call, 0, "input")
    if not isinstance(source, Ref) or len(record.shapes[source.value]) != 4:
        return False
    kernel, _, padding, dilation, _ = pool_geometry(call.args, call.kwargs)
    room = has_room(record.shapes[source.value], kernel, padding)
    return room and kernel[0] * kernel[1] <= 255 and dilation == [1, 1]


def has_room(shape: Sequence[int], kernel: Sequence[int], padding: Sequence[int]) -> bool:
    """Whether a window fits into a map (N, C, H, W). With `ceil_mode`, PyTorch pools where none does, too."""
    return all(n + 2 * p >= k for n, k, p in zip(shape[2:], kernel, padding, strict=True))


def pool_geometry(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[int], list[int], list[int], list[int], bool]:
    """(kernel, stride, padding, dilation, ceil_mode) of a `max_pool2d` call."""
    names = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode")
    given = dict(zip(names, args, strict=False)) | kwargs

    def two(value: Any) -> list[int]:
        values = [int(v) for v in value] if isinstance(value, (tuple, list)) else [int(value)]
        return values * 2 if len(values) == 1 else values

    kernel = two(given["kernel_size"])
    stride = given.get("stride")
    return (
        kernel,
        kernel if stride is None or stride == () or stride == [] else two(stride),
        two(given.get("padding", 0)),
        two(given.get("dilation", 1)),
        bool(given.get("ceil_mode", False)),
    )


def _other_addend(call: Call, value: int, record: Trace) -> int | None:
    if len(call.args) != 2 or call.kwargs:
        return None
    left, right = call.args
    if not isinstance(left, Ref) or not isinstance(right, Ref) or left == right:
        return None
    other = right.value if left.value == value else left.value
    same = record.shapes[other] == record.shapes[value]
    return other if same and record.itemsizes[other] == record.itemsizes[value] else None


def has_fresh_gradient(value: int, record: Trace, uses: Uses, stages: dict[int, Stage]) -> bool:
    """Whether the gradient that autograd brings for a value is a tensor that nobody else holds.

    Args:
        stages: call index -> the stage that the call is part of.
    """
    if value in uses.results:
        return False
    readers = uses.readers.get(value, [])
    if len(readers) > 1:
        # autograd adds them up in a tensor of its own, if every one of them brings a gradient
        return all(_brings_gradient(call, stages) for call in readers)
    if not readers:
        return False
    (call,) = readers
    stage = stages.get(call.index)
    if stage is not None:
        if stage.residual != value or stage.has("relu"):
            return True
        return has_fresh_gradient(stage.output, record, uses, stages)
    if call.name == "linear" or call.name in _FRESH_POOLS or call.name in _ADAPTIVE_POOLS:
        return True
    if call.name in ("flatten", "view", "reshape", "dropout", "cat", "concat") and call.outputs:
        return has_fresh_gradient(call.outputs[0], record, uses, stages)
    return False


_ADAPTIVE_POOLS = ("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d")


def _brings_gradient(call: Call, stages: dict[int, Stage]) -> bool:
    known = ("linear", "cat", "concat", "add", "flatten", *_FRESH_POOLS, *_ADAPTIVE_POOLS)
    return call.index in stages or call.name in known
