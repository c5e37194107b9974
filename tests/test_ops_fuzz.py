"""Whatever is given to a public op or to a native launch: it is right or it is refused, and that is all."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from op_cases import MUTATES, OPS, Call, copy_of, make_call, whole

from attrfast import ops, reference
from attrfast.errors import AttrfastError, InputError

native = pytest.importorskip("attrfast._native", reason="the native module is not built")

Tensor = torch.Tensor


# -- arguments of the public ops ------------------------------------------------------------------------------


def misaligned(x: Tensor) -> Tensor:
    """The same values in memory that begins between two elements."""
    raw = bytearray(x.numel() * x.element_size() + 1)
    out = torch.frombuffer(raw, dtype=x.dtype, offset=1, count=x.numel()).view(x.shape)
    return out.copy_(x)


def lying_over(x: Tensor) -> Tensor:
    """Of x's shape and dtype, with elements that share memory without a stride of zero."""
    strides = [1] * x.dim()
    return torch.zeros(sum(x.shape) + 1, dtype=x.dtype).as_strided(x.shape, strides)


# What becomes of a tensor, right or wrong. Where the tensor does not allow it, it stays as it is.
CHANGED: dict[str, Callable[[Tensor], Any]] = {
    "as it is": lambda x: x,
    "a row less": lambda x: x[1:],
    "empty": lambda x: x[:0],
    "a dimension more": lambda x: x[None],
    "a dimension less": lambda x: x.sum(0).to(x.dtype),
    "a number in a tensor": lambda x: x.sum().to(x.dtype),
    "double": Tensor.double,
    "half": Tensor.half,
    "whole numbers": Tensor.long,
    "bytes": lambda x: x.abs().byte(),
    "truth values": Tensor.bool,
    "complex": lambda x: x.float() + 1j,
    "eight bits": lambda x: x.float().to(torch.float8_e4m3fn),
    "meta": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
    "sparse rows": lambda x: x.flatten(1).to_sparse_csr(),
    "nested": lambda x: torch.nested.nested_tensor(list(x)),
    "of another library": lambda x: x.float().to_mkldnn(),
    "negated": torch._neg_view,
    "all zero, lazily": lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype),
    "one value for all": lambda x: x.flatten()[:1].expand(x.numel()).view(x.shape),
    "misaligned": misaligned,
    "lying over itself": lying_over,
    "every other": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "transposed": lambda x: x.transpose(0, -1),
    "a parameter": lambda x: torch.nn.Parameter(x.clone()),
    "an array": Tensor.numpy,
    "a list": Tensor.tolist,
}
OTHER_VALUES = {"negated", "all zero, lazily", "one value for all", "lying over itself"}
NO_TENSORS = [None, 0, 1.5, "x", b"", [], {}, object(), torch.float32, np.float64(1), 2**70, -(2**70)]
NUMBERS = [None, True, 0, 1, 2, -1, 3, 255, 256, 2**31, 2**63 - 1, 2**70, 0.5, -0.0, math.nan, math.inf]
NUMBERS += [-math.inf, 1e4, "1", [1], torch.tensor(1.0), torch.ones(2), np.int64(1), object()]
PAIRS = [[1, 1], [2, 3], (2, 2), [0, 1], [-1, 1], [1], [], [1, 1, 1], [255, 1], [256, 1], [2**31, 1]]
PAIRS += [
    [2**62, 2**62],
    [2**70, 1],
    [1.5, 1],
    ["1", "1"],
    None,
    2,
    "22",
    [None, 1],
    torch.tensor([2, 2]),
]


@st.composite
def strange(draw: st.DrawFn, op: str) -> Call:
    """A call with one to three arguments exchanged, of which some fit as well."""
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    shape = (2, 3, 4, 5) if "pool" in op or draw(st.booleans()) else (2, 3)
    layout = draw(st.sampled_from(["contiguous", "channels last", "later samples"]))
    call = make_call(
        op, shape, dtype, layouts=(layout,), attribute=draw(st.integers(0, 2)), coarse=True,
        pool=([2, 3], [2, 1], [1, 1], draw(st.booleans())), seed=draw(st.integers(0, 99)),
    )  # fmt: skip
    args = dict(call.args)
    for name in draw(st.lists(st.sampled_from(sorted(args)), min_size=1, max_size=3, unique=True)):
        args[name] = draw(st.sampled_from([None]) if args[name] is None else _instead(name, call))
    return Call(op, args)


def _instead(name: str, call: Call) -> st.SearchStrategy[Any]:
    value = call.args[name]
    if isinstance(value, Tensor):
        others = [x for other, x in call.tensors.items() if other != name and x.shape == value.shape]
        parts = [whole(x)[: value.numel()].view(value.shape) for x in others if x.dtype == value.dtype]
        # Places of maxima that no pooling gives have no definition.
        kinds = CHANGED.keys() - (OTHER_VALUES if name == "code" else set())
        changed = st.sampled_from(sorted(kinds)).map(lambda kind: _change(value, kind))
        return st.one_of(changed, changed, st.sampled_from([*NO_TENSORS, value, *others, *parts]))
    if isinstance(value, list):
        return st.sampled_from([value, *PAIRS])
    return st.sampled_from([value, *NUMBERS])


def _change(x: Tensor, kind: str) -> Any:
    try:
        return CHANGED[kind](x)
    except (RuntimeError, TypeError, IndexError):
        return x


def as_bytes(x: Tensor) -> Tensor:
    """All of the memory that x is a view of."""
    return whole(x.detach()).resolve_neg().view(torch.uint8)


def solid(x: Any) -> bool:
    """Whether there is memory to look at."""
    return isinstance(x, Tensor) and x.device.type == "cpu" and x.layout == torch.strided and not (
        x.is_nested or x._is_zerotensor()
    )  # fmt: skip


def defined(call: Call) -> list[Tensor]:
    """By the definition, of copies that share nothing."""
    args = {}
    for name, x in call.args.items():
        if isinstance(x, Tensor) and x.dim() and x.layout == torch.strided:
            x = (
                x.resolve_neg() if not x._is_zerotensor() else torch.zeros(x.shape, dtype=x.dtype)
            ).clone()
        if name in ("lower", "upper") and x is not None:
            x = float(x)
        elif name in ("count", "ceil_mode", "guided", "absolute"):
            x = bool(x)
        elif name in ("kernel", "stride", "padding", "size"):
            x = [int(n) for n in x]
        args[name] = x
    out = getattr(reference, call.base)(**Call(call.op, args).with_numbers().args)
    return list(out) if isinstance(out, tuple) else [out]


@pytest.mark.parametrize("op", OPS)
def test_an_op_is_right_or_refuses_and_changes_nothing_else(op: str) -> None:
    @given(strange(op))
    @settings(max_examples=150, deadline=None)
    def check(call: Call) -> None:
        before = {name: (x, as_bytes(x).clone()) for name, x in call.args.items() if solid(x)}
        written = call.args.get(MUTATES.get(op, ""))
        meta = any(isinstance(x, Tensor) and x.is_meta for x in call.args.values())
        copies = call.with_args(**{name: copy_of(x) for name, (x, _) in before.items()})
        try:
            got = call.run()
        except AttrfastError:
            written = None
        else:
            for result, want in zip(got, defined(copies), strict=True):
                assert result.shape == want.shape
                if not meta:
                    loose = {"rtol": 2e-2, "atol": 1e-2} if want.element_size() == 2 else {}
                    torch.testing.assert_close(result, want, equal_nan=True, **loose)
        for x, memory in before.values():
            if (
                not solid(written)
                or x.untyped_storage().data_ptr() != written.untyped_storage().data_ptr()
            ):
                assert torch.equal(as_bytes(x), memory)

    check()


@pytest.mark.parametrize("where", ["itself", "one element further"])
@pytest.mark.parametrize("op", sorted(MUTATES))
def test_what_an_in_place_form_writes_may_be_read_by_it(op: str, where: str) -> None:
    call = make_call(op, (2, 3, 4, 5))
    name = MUTATES[op]
    row = torch.randn(121)
    args = {name: row[:120].view(2, 3, 4, 5)}
    for other, x in call.tensors.items():
        if other != name:
            begin = 0 if where == "itself" else 1
            args[other] = row[begin : begin + x.numel()].view(x.shape)
    call = call.with_args(**args)
    want = defined(call)
    for result, expected in zip(call.run(), want, strict=True):
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((), "missing a required argument: 'x'"),
        ((torch.ones(2, 3),), "missing a required argument: 'g'"),
        ((torch.ones(2, 3), torch.ones(2, 3), False, 1), "too many positional arguments"),
        ((torch.ones(2, 3), None), "g must be a tensor, got None"),
        ((torch.ones(2, 3), [1.0]), r"g must be a tensor, got list \[1.0\]"),
        ((torch.ones(2, 3), torch.ones(2, 3), "yes"), "absolute must be True or False, got str 'yes'"),
        (
            (torch.ones(2, 3), torch.ones(2, 3).to_sparse()),
            "g must be a dense tensor, got torch.sparse_coo",
        ),
    ],
)
def test_what_the_dispatcher_refuses_is_said_in_words(args: tuple[Any, ...], said: str) -> None:
    with pytest.raises(InputError, match=f"^attribution: {said}"):
        ops.attribution(*args)


def test_a_failure_that_is_no_argument_s_fault_is_passed_on() -> None:
    x = torch.zeros(1, 1, 1).expand(1, 1, 1 << 50)  # more than there is memory for
    with pytest.raises(RuntimeError) as found:
        ops.affine_relu(x)
    assert not isinstance(found.value, AttrfastError)


# -- native launches: numbers that stand for memory -----------------------------------------------------------

WRONG = [
    -1,
    -(2**31),
    2**31,
    2**47 + 1,
    2**62,
    2**63 - 1,
    2**64 - 8,
    2**64,
    2**200,
    1.5,
    "1",
    None,
    (1, 2),
]
SMALL = st.integers(0, 4)
MOST_ROOMS = 160
# Numbers that tell of the weight, addresses behind them, and how many of these are written.
CONVOLUTIONS = {
    "winograd": (4, 5, 2),
    "pointwise": (2, 6, 2),
    "pointwise_backward": (2, 5, 4),
    "depthwise": (3, 6, 2),
    "depthwise_backward": (3, 4, 3),
}


class Memory:
    """Rooms of 4 KiB for the tensors of a launch, and more behind them that must not change."""

    ROOM = 4096

    def __init__(self, rooms: int) -> None:
        self.bytes = torch.arange(self.ROOM * (rooms + 2), dtype=torch.int64).to(torch.uint8)
        self.start = self.bytes.data_ptr() + -self.bytes.data_ptr() % 64
        self.begin = self.start - self.bytes.data_ptr()
        self.before = self.bytes.clone()

    def room(self, turn: int) -> int:
        return self.start + turn * self.ROOM

    def changed(self) -> list[int]:
        """The rooms that were written into."""
        return sorted(
            {(int(i) - self.begin) // self.ROOM for i in (self.bytes != self.before).nonzero()}
        )


# Name, arguments before the addresses, names of the addresses, arguments after them; which are written.
def launches(draw: st.DrawFn) -> tuple[str, list[Any], list[str], list[Any], set[str]]:
    shape = [draw(st.integers(0, 3)), draw(st.integers(0, 1)), draw(SMALL), draw(SMALL)]
    bounds = [draw(st.sampled_from([-math.inf, 0.0])), draw(st.sampled_from([6.0, math.inf]))]
    pool = [(4, 5), (2, 2), (2, 2), (2, 2), (0, 0)]
    flag = draw(st.booleans())
    threads = draw(st.integers(1, 3))
    return draw(
        st.sampled_from(
            [
                ("affine_relu", [*shape, draw(SMALL)], ["z", "scale", "shift", "residual", "y", "count"],
                 [*bounds, threads], {"y", "count"}),
                ("affine_relu_backward", [*shape, draw(SMALL)],
                 ["a", "g", "scale", "residual", "g1", "gz", "s"],
                 [*bounds, flag, draw(st.integers(0, 2)), threads], {"g1", "gz", "s"}),
                ("attribution", [*shape, draw(SMALL)], ["x", "g", "s"], [flag, threads], {"s"}),
                ("affine_relu_max_pool", [*shape, *pool], ["z", "scale", "shift", "p", "code", "count"],
                 [*bounds, threads], {"p", "code", "count"}),
                ("affine_relu_max_pool_backward", [*shape, *pool], ["p", "code", "g", "scale", "gz"],
                 [*bounds, flag, threads], {"gz"}),
                ("winograd", [shape[2], (3, 4), 1 + shape[3], shape[2], (1, 1)], ["x", "weight"],
                 [9, 36, 1, flag, 0, 0, 0, 4, 5, *bounds, threads], {"y"}),
                ("pointwise", [*shape[:1], shape[2], draw(SMALL), 1 + shape[3], shape[2]], ["x", "weight"],
                 [5, 1, 0, 0, 0, 0, 4, 5, *bounds, threads], {"y"}),
                ("pointwise_backward", [*shape[:1], shape[2], draw(SMALL), 1 + shape[3], shape[2]],
                 ["a", "g", "residual", "weight"],
                 [1, 5, 0, 0, 0, 0, 0, *bounds, flag, draw(st.integers(0, 2)), threads], {"gx"}),
                ("depthwise", [shape[0], shape[2], 1 + shape[3], (4, 5), (4, 5), 3, 1, (1, 1), flag],
                 ["x", "weight"], [9, 3, 1, 0, 0, 0, 0, 4, 5, *bounds, threads], {"y"}),
                ("depthwise_backward", [shape[0], shape[2], 1 + shape[3], (2, 3), (4, 5), 3, 2, (1, 1)],
                 ["a", "g", "weight"], [9, 3, 1, 0, 0, 0, 0, *bounds, flag, threads], {"gx"}),
            ]
        )
    )  # fmt: skip


@st.composite
def numbers(draw: st.DrawFn) -> tuple[str, list[Any], set[int]]:
    """A launch over rooms of memory, told by their turn as ("room", i); some of its numbers are exchanged."""
    name, first, addresses, last, written = launches(draw)
    args: list[Any] = [*first, *(("room", turn) for turn in range(len(addresses))), *last]
    rooms = {turn for turn, address in enumerate(addresses) if address in written}
    if name in CONVOLUTIONS:  # their results and their scratch stand behind other numbers
        told, count, written = CONVOLUTIONS[name]
        before = len(addresses)
        behind = len(first) + before + told
        args[behind : behind + count] = [("room", before + turn) for turn in range(count)]
        # The last one, for scratch, is large.
        rooms = {before + count - 1 - turn for turn in range(1, written)}
        rooms |= set(range(before + count - 1, MOST_ROOMS))
    for place in draw(st.lists(st.integers(0, len(args) - 1), max_size=3, unique=True)):
        value = args[place]
        if isinstance(value, tuple) and value[0] == "room":
            # Never an address of other memory: whether that is there, nobody can tell.
            args[place] = draw(
                st.sampled_from([0, -1, 2**64, 1.5, "1", None, ("odd", 0), ("top", 0), value])
            )
        elif isinstance(value, tuple):
            pair = list(value)
            pair[draw(st.integers(0, 1))] = draw(st.sampled_from([*WRONG, 0, 1, 3]))
            args[place] = draw(st.sampled_from([tuple(pair), -1, (1,), ()]))
        elif value not in (0, None) or place < len(first):
            args[place] = draw(st.sampled_from([*WRONG, math.nan]))
    # Without positions a launch still writes a sum for every channel, and there is no memory for so many.
    sizes = [value for value in args[: len(first)] if isinstance(value, int)]
    assume(name in CONVOLUTIONS or 0 not in sizes or max(sizes) < 2**31)
    return name, args, rooms


@st.composite
def parts(draw: st.DrawFn) -> tuple[str, list[Any], set[int]]:
    """The same of a launch over the parts of a joined map."""
    channels = draw(st.lists(SMALL, max_size=4))
    count, rooms = len(channels), [("room", turn) for turn in range(10)]
    shape = [draw(st.integers(0, 3)), draw(st.integers(0, 1)), draw(SMALL), sum(channels), draw(SMALL)]
    bounds = [draw(st.sampled_from([-math.inf, 0.0])), draw(st.sampled_from([6.0, math.inf]))]
    lists: list[list[Any]] = [rooms[:count], list(channels)]
    name = draw(st.sampled_from(["joined", "joined_backward"]))
    if name == "joined":
        args = [*shape, *lists, rooms[8], rooms[9], rooms[4], *bounds, draw(st.integers(1, 3))]
        written = {4}
    else:
        into = [draw(st.sampled_from([room, 0])) for room in rooms[4 : 4 + count]]
        lists += [into, draw(st.lists(st.booleans(), min_size=count, max_size=count))]
        last = [*bounds, draw(st.booleans()), draw(st.integers(1, 3))]
        args = [*shape, *lists[:2], ("room", 10), rooms[8], rooms[9], *lists[2:], ("room", 11), *last]
        written = {4, 5, 6, 7, 11}
    wrong_room = st.sampled_from([-1, 2**64, 1.5, "1", None, ("odd", 0), ("top", 0)])
    for _ in range(draw(st.integers(0, 2))):
        place = draw(st.integers(0, len(args) - 1))
        value = args[place]
        if isinstance(value, list) and value:
            at = draw(st.integers(0, len(value) - 1))
            told = isinstance(value[at], tuple)
            exchanged = [draw(wrong_room) if told else draw(st.sampled_from(WRONG)) if i == at else x
                         for i, x in enumerate(value)]  # fmt: skip
            args[place] = draw(st.sampled_from([exchanged, value[1:], [*value, value[0]], None]))
        elif isinstance(value, tuple):
            args[place] = draw(wrong_room)
        elif not isinstance(value, list):
            args[place] = draw(st.sampled_from([*WRONG, math.nan]))
    assume(not any(isinstance(x, int) and x >= 2**31 for x in args[2:5]) or 0 not in args[2:5])
    return name, args, written


@given(parts())
@settings(max_examples=1500, deadline=None)
def test_a_native_launch_over_parts_is_right_or_refuses(case: tuple[str, list[Any], set[int]]) -> None:
    name, args, rooms = case
    memory = Memory(14)
    told = {"room": memory.room, "odd": lambda _: memory.start + 1, "top": lambda _: 2**64 - 1}

    def real(x: Any) -> Any:
        if isinstance(x, list):
            return [real(item) for item in x]
        return told[x[0]](x[1]) if isinstance(x, tuple) and isinstance(x[0], str) else x

    try:
        getattr(native, name)(*map(real, args))
    except (ValueError, TypeError):
        assert memory.changed() == []
    else:
        assert set(memory.changed()) <= rooms


@given(numbers())
@settings(max_examples=1500, deadline=None)
def test_a_native_launch_is_right_or_refuses(case: tuple[str, list[Any], set[int]]) -> None:
    name, args, rooms = case
    memory = Memory(MOST_ROOMS if name in CONVOLUTIONS else 10)
    told = {"room": memory.room, "odd": lambda _: memory.start + 1, "top": lambda _: 2**64 - 1}
    args = [
        told[x[0]](x[1]) if isinstance(x, tuple) and x and isinstance(x[0], str) and x[0] in told else x
        for x in args
    ]
    try:
        getattr(native, name)(*args)
    except (ValueError, TypeError):
        assert memory.changed() == []
    else:
        assert set(memory.changed()) <= rooms


@pytest.mark.parametrize(
    ("name", "args", "said"),
    [
        ("attribution", (4, 0, 1, 1, 1, 0, 0, 0, False, 1), "dtype is 4, expected 0 to 3"),
        ("attribution", (0, 2, 1, 1, 1, 0, 0, 0, False, 1), "layout is 2, expected 0 to 1"),
        ("attribution", (0, 0, -1, 1, 1, 0, 0, 0, False, 1), "is -1, expected 0 to"),
        ("attribution", (0, 0, 2**40, 2**40, 1, 0, 0, 0, False, 1), "has too many elements"),
        ("attribution", (0, 0, 1, 1, 1, 0, 0, 0, False, 1), "x is null"),
        ("attribution", (0, 0, 1, 1, 1, 65, 0, 0, False, 1), "x is not aligned to its elements"),
        ("attribution", (0, 0, 1, 1, 9, 2**64 - 8, 0, 64, False, 1), "x reaches beyond the last address"),
        ("attribution", (0, 0, 1, 1, 9, 64, 0, 68, False, 1), "s overlaps x"),
        ("attribution", (0, 0, 1, 1, 1, 64, 0, 128, False, 0), "threads must be at least 1"),
        ("affine_relu", (0, 0, 1, 1, 1, 64, 0, 0, 0, 64, 0, 1.0, 0.0, 1), "lower must not exceed upper"),
        ("affine_relu_backward", (0, 0, 1, 1, 1, 64, 128, 0, 0, 0, 192, 256, 0.0, 1.0, False, 2, 1),
         "residual is null"),
        ("segment_normalize", (0, 64, 128, 1, 1, 256, 3, 1), "kind is 3, expected 0 to 2"),
        ("winograd_floats", (1, (1, 1), 1, 1, (0, 0), 1), "no room for a window"),
        ("winograd_floats", (1, (3, 3), 0, 1, (0, 0), 1), "channels_in is 0"),
        ("depthwise_floats", (1, 1, (3, 3), (3, 3), 4, 1, (1, 1), False, 1), "kernel must be 3, 5 or 7"),
        ("depthwise_floats", (1, 1, (3, 3), (3, 3), 3, 3, (1, 1), False, 1), "stride is 3, expected 1 to 2"),
        ("depthwise_floats", (1, 1, (3, 3), (3, 3), 3, 1, (3, 1), False, 1), "padding is 3, expected 0 to 2"),
        ("depthwise_floats", (1, 1, (3, 3), (2, 3), 3, 1, (1, 1), False, 1), "no such convolution"),
        ("depthwise_floats", (1, 1, (1, 3), (1, 3), 3, 1, (0, 1), False, 1), "no room for a window"),
        ("depthwise_floats", (1, 1, (2, 2), (5, 3), 3, 2, (1, 1), True, 1), "no such convolution"),
        ("depthwise", (1, 1, 1, (1, 1), (1, 1), 3, 1, (1, 1), False, 64, 128, 9, 3, 1, 0, 0, 0, 0, 192, 256,
         0.0, 1.0, 1), "dtype is 1, expected that of float32 or bfloat16"),
        ("depthwise_backward", (0, 1, 1, (1, 1), (1, 1), 3, 1, (1, 1), 64, 128, 192, 9, 3, 1, 0, 256, 128,
         384, 0.0, 1.0, False, 1), "s overlaps g"),
        ("pointwise_floats", (0, 1, 1, 0, 1, False, 1), "channels_in is 0"),
        ("pointwise_floats", (3, 1, 1, 1, 1, True, 1), "dtype is 3, expected that of float32 or bfloat16"),
        ("pointwise_floats", (2, 2**40, 2**40, 1, 1, True, 1), "x has too many elements"),
        ("pointwise_backward", (0, 1, 1, 1, 1, 64, 128, 0, 192, 1, 1, 0, 0, 256, 320, 384, 0.0, 1.0, False, 2,
         1), "residual is null"),
        ("pointwise", (0, 1, 1, 1, 1, 64, 128, 1, -1, 0, 0, 0, 0, 192, 256, 0.0, 1.0, 1),
         "a stride of the weight is -1"),
        ("pointwise", (0, 1, 1, 1, 1, 64, 128, 1, 1, 0, 0, 0, 0, 128, 256, 0.0, 1.0, 1),
         "y overlaps weight"),
        ("joined", (0, 0, 1, 3, 1, [64, 128], [1, 1], 192, 256, 320, 0.0, 1.0, 1),
         "the parts have 2 channels, expected 3"),
        ("joined", (0, 0, 1, 2, 1, [64, 128], [1, 2], 192, 256, 320, 0.0, 1.0, 1),
         "channels of a part is 2, expected 0 to 1"),
        ("joined", (0, 0, 1, 2, 1, [64], [1, 1], 192, 256, 320, 0.0, 1.0, 1),
         "every part needs its number of channels"),
        ("joined", (0, 0, 1, 2, 1, [64, 128], [1, 1], 192, 256, 128, 0.0, 1.0, 1), "y overlaps x"),
        ("joined_backward", (0, 0, 1, 2, 1, [64, 128], [1, 1], 192, 256, 320, [384], [False, False], 0, 0.0,
         1.0, False, 1), "every part needs an address for its gradient"),
        ("joined_backward", (0, 0, 1, 2, 1, [64, 128], [1, 1], 192, 256, 320, [384, 128], [False, False], 0,
         0.0, 1.0, False, 1), "gx overlaps x"),
    ],
)  # fmt: skip
def test_a_native_launch_names_what_is_wrong(name: str, args: tuple[Any, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        getattr(native, name)(*args)


@pytest.mark.parametrize("offsets", [[1, 4], [0, 3], [0, 5, 4], [0, -1, 4], [0, 2**62, 4]])
def test_native_offsets_that_do_not_ascend_are_refused(offsets: list[int]) -> None:
    theta, out, bounds = torch.ones(4), torch.zeros(4), torch.tensor(offsets)
    pointers = theta.data_ptr(), bounds.data_ptr(), len(offsets) - 1, 4, out.data_ptr()
    with pytest.raises(ValueError, match="must ascend from 0"):
        native.segment_normalize(0, *pointers, 0, 1)
    assert not out.any()


def test_what_a_native_launch_can_t_check_is_told() -> None:
    for name in ("affine_relu", "attribution", "affine_relu_max_pool", "winograd", "segment_normalize"):
        assert "can't tell from a number" in getattr(native, name).__doc__
