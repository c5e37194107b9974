"""Passes that are recorded without their products: the record of a real pass, or a real pass."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import FAMILIES, family, images_for, lived_in
from random_networks import SIZE, RandomNetwork
from small_networks import NETWORKS
from torch import nn
from torch.nn import functional

import attrfast.trace
from attrfast.errors import ModelError
from attrfast.sketch import ValuesNeededError, sketched
from attrfast.trace import Trace, _record, _Recorder, call_name, is_inplace, state_names, trace

Inputs = tuple[torch.Tensor, ...]


def recorded(model: nn.Module, inputs: Inputs, training: bool = False) -> Trace:
    """The record of a real pass."""
    record = Trace()
    _record(model, inputs, {}, training, _Recorder(state_names(model), record))
    return record


def same(a: Trace, b: Trace) -> None:
    assert len(a.calls) == len(b.calls)
    for mine, theirs in zip(a.calls, b.calls, strict=True):
        assert dataclasses.replace(mine, func=theirs.func) == theirs
    assert (a.shapes, a.itemsizes, a.results, a.roots) == (b.shapes, b.itemsizes, b.results, b.roots)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kinds of passes that are recorded from now on."""
    seen: list[str] = []

    def noted(*args: Any) -> None:
        seen.append(type(args[-1]).__name__)
        _record(*args)

    monkeypatch.setattr(attrfast.trace, "_record", noted)
    return seen


# -- whole passes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", FAMILIES)
def test_no_family_has_to_run(name: str, layout: torch.memory_format, passes: list[str]) -> None:
    model, images = family(name), images_for(name, 2).contiguous(memory_format=layout)
    same(trace(model, (images,)), recorded(model, (images,)))
    assert passes == ["_Sketcher"]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_small_networks_have_the_record_of_a_real_pass(name: str, training: bool) -> None:
    torch.manual_seed(0)
    make, inputs = NETWORKS[name]
    model, given = make(), inputs(2)
    same(trace(model, given, training=training), recorded(model, given, training))


@pytest.mark.parametrize("seed", range(40))
def test_random_networks_have_the_record_of_a_real_pass(seed: int, passes: list[str]) -> None:
    torch.manual_seed(seed)
    model, images = lived_in(RandomNetwork(seed)), torch.randn(2, 3, SIZE, SIZE)
    same(trace(model, (images,)), recorded(model, (images,)))
    assert passes == ["_Sketcher"]


# -- models that look at values -----------------------------------------------------------------------


class Looks(nn.Module):
    """Does something with the features that a convolution makes."""

    def __init__(self, look: Callable[[Looks, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.conv, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)
        self.register_buffer("seen", torch.zeros(4))
        self.scale = nn.Parameter(torch.ones(4))
        self.constant = torch.ones(4, 1, 1)
        self.look = look

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.look(self, self.conv(x)))


def _caught(model: Looks, x: torch.Tensor) -> torch.Tensor:
    try:
        return x.relu() if x.abs().sum().item() > 0 else x
    except Exception:
        return x.tanh()


def _averaged(model: Looks, x: torch.Tensor) -> torch.Tensor:
    model.seen.mul_(0.9).add_(x.mean((0, 2, 3)), alpha=0.1)
    return x * model.seen.view(-1, 1, 1)


def _set_by_the_first_batch(model: Looks, x: torch.Tensor) -> torch.Tensor:
    model.scale.data.copy_(x.std((0, 2, 3)))
    return x / model.scale.view(-1, 1, 1)


def _through_a_view(model: Looks, x: torch.Tensor) -> torch.Tensor:
    model.scale.view(2, 2).mul_(2)
    return x * model.scale.view(-1, 1, 1)


LOOKS: dict[str, Callable[[Looks, torch.Tensor], torch.Tensor]] = {
    "if": lambda model, x: x.relu() if x.abs().sum() > 0 else x.tanh(),
    "float": lambda model, x: x.relu() if float(x.abs().sum()) else x.tanh(),
    "int": lambda model, x: x * int(x.abs().sum().ceil()),
    "item": lambda model, x: x * x.abs().sum().item(),
    "list": lambda model, x: x * sum(x.flatten().tolist()),
    "numpy": lambda model, x: x * float(x.numpy().sum()),
    "mask": lambda model, x: x * x[x > 0].mean(),
    "nonzero": lambda model, x: x * len(x.nonzero()),
    "index": lambda model, x: x[:, x.mean((0, 2, 3)).argsort()],
    "text": lambda model, x: x * len(f"{x.abs().sum()}"),
    "address": lambda model, x: x.relu() if x.data_ptr() else x,
    "caught": _caught,
    "averaged": _averaged,
    "first batch": _set_by_the_first_batch,
    "through a view": _through_a_view,
    "constant": lambda model, x: x + model.constant,
    "out": lambda model, x: torch.tanh(x, out=torch.empty_like(x)),
    "random": lambda model, x: x + torch.rand_like(x),
}


@pytest.mark.parametrize("name", LOOKS)
def test_a_model_that_looks_at_values_runs(name: str, passes: list[str]) -> None:
    model, twin = (Looks(LOOKS[name]).eval() for _ in range(2))
    images = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    before = images.clone()
    record = trace(model, (images,))
    assert passes == ["_Sketcher", "_Recorder"]
    same(record, recorded(twin, (images,)))
    mine, theirs = model.state_dict(), twin.state_dict()
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)  # as one real pass leaves them
    assert torch.equal(images, before)


def test_inputs_are_not_written_to(passes: list[str]) -> None:
    """A sketched ReLU lies in the memory of what it reads."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(torch.relu(x).add_(1))

    images = torch.randn(2, 3, 6, 6)
    before = images.clone()
    same(trace(Model(), (images,)), recorded(Model(), (images,)))
    assert torch.equal(images, before)
    assert passes == ["_Sketcher", "_Recorder"]


def test_a_model_that_fails_says_why() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(5, 2))
    with pytest.raises(ModelError, match=r"\[\(2, 3, 6, 6\)\].*shapes"):
        trace(model, (torch.randn(2, 3, 6, 6),))


def test_statistics_and_the_random_state_stay() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.ReLU())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    trace(model, (torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0)),), training=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training


# -- single calls ---------------------------------------------------------------------------------------


def _laid(x: torch.Tensor, draw: random.Random) -> torch.Tensor:
    """x as it may lie: contiguous, channels-last, as a part of something larger, or permuted."""
    how = draw.choice(["contiguous", "last", "part", "permuted"])
    if how == "last" and x.dim() in (4, 5):
        return x.contiguous(
            memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d
        )
    if how == "part":
        return torch.cat([x, x], -1)[..., : x.shape[-1]]
    return x.transpose(0, 1).contiguous().transpose(0, 1) if how == "permuted" else x.contiguous()


def _convolution(draw: random.Random) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    spatial, transposed = draw.choice([1, 2, 2, 2, 3]), draw.random() < 0.3
    groups = draw.choice([1, 1, 2, 4])
    into, out = groups * draw.randint(1, 3), groups * draw.randint(1, 3)
    kernel = [draw.randint(1, 3) for _ in range(spatial)]
    shape = [into, out // groups] if transposed else [out, into // groups]
    dtype = draw.choice([torch.float32, torch.float64])
    x = torch.randn(draw.randint(0, 2), into, *(draw.randint(1, 7) for _ in range(spatial)), dtype=dtype)
    weight = torch.randn(*shape, *kernel, dtype=dtype)
    options: dict[str, Any] = {
        "stride": draw.choice([1, 2, tuple(draw.randint(1, 3) for _ in range(spatial))]),
        "padding": draw.choice([0, 1, [draw.randint(0, 2) for _ in range(spatial)]]),
        "dilation": draw.choice([1, 1, 2]),
        "groups": groups,
    }
    if draw.random() < 0.5:
        options["bias"] = torch.randn(out + (draw.random() < 0.1), dtype=dtype)
    if transposed and draw.random() < 0.3:
        options["output_padding"] = 1
    name = f"conv{'_transpose' if transposed else ''}{spatial}d"
    wrong = draw.random() < 0.05
    return getattr(torch, name), (_laid(x[:, wrong:], draw), _laid(weight, draw)), options


def _other(draw: random.Random) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    x = torch.randn(draw.randint(1, 3), draw.randint(1, 4), draw.randint(2, 6), draw.randint(2, 6))
    x, kind = _laid(x, draw), draw.choice(["linear", "norm", "activation", "pooling"])
    if kind == "linear":
        weight = torch.randn(3, x.shape[-1] + (draw.random() < 0.1))
        return functional.linear, (x, weight), {"bias": draw.choice([None, torch.randn(3)])}
    if kind == "norm":
        channels = x.shape[1] + (draw.random() < 0.1)
        return functional.batch_norm, (x, torch.zeros(channels), torch.ones(channels)), {}
    if kind == "activation":
        choices = [functional.relu, torch.tanh, functional.hardtanh, functional.silu, torch.relu_]
        return draw.choice(choices), (x,), {}
    pool = draw.choice([functional.max_pool2d, functional.avg_pool2d])
    size = draw.randint(1, 3)
    return pool, (x, size, draw.choice([None, 1, 2])), {"padding": 0, "ceil_mode": draw.random() < 0.5}


@pytest.mark.parametrize("make", [_convolution, _other])
@pytest.mark.parametrize("seed", range(300))
def test_a_sketched_call_makes_what_the_call_makes(
    make: Callable[[random.Random], Any], seed: int
) -> None:
    torch.manual_seed(seed)
    func, args, kwargs = make(random.Random(seed))
    given = args, kwargs, is_inplace(func, kwargs)
    try:
        right = func(*args, **kwargs)
    except (RuntimeError, ValueError, IndexError) as error:
        with pytest.raises(type(error)):
            sketched(func, call_name(func), *given)
        return
    found = sketched(func, call_name(func), *given)
    assert (found.shape, found.dtype, found.device) == (right.shape, right.dtype, right.device)
    assert found.stride() == right.stride()
    assert (found is args[0]) == (right is args[0])


def test_products_are_left_out() -> None:
    """Where they would have to run, they would make what isn't zero."""
    x, weight = torch.ones(2, 3, 5, 5), torch.ones(4, 3, 3, 3)
    assert not sketched(torch.conv2d, "conv2d", (x, weight), {}, False).any()
    assert not sketched(torch.conv_transpose2d, "conv_transpose2d", (x, weight[:3]), {}, False).any()
    assert not sketched(functional.linear, "linear", (x, torch.ones(2, 5)), {}, False).any()


def test_an_unknown_call_is_not_sketched() -> None:
    with pytest.raises(ValuesNeededError, match="nonzero"):
        sketched(torch.nonzero, "nonzero", (torch.ones(3),), {}, False)


def test_a_batch_norm_of_a_transposed_map_lies_as_torch_lays_it() -> None:
    x = torch.randn(2, 7, 5).transpose(1, 2)
    args = x, torch.zeros(5), torch.ones(5)
    right = functional.batch_norm(*args)
    assert right.stride() != x.stride()
    assert sketched(functional.batch_norm, "batch_norm", args, {}, False).stride() == right.stride()
