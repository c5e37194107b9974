"""A clock for tests: calls take what a formula says, so that every prediction can be checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn

from attrfast.latency import gauge, sampling
from attrfast.measure import Latency
from attrfast.signatures import CONVOLUTIONS
from attrfast.trace import CallMode, is_silent, tensors_in

Formula = Callable[[str, tuple[Any, ...], Any], float]


def by_blocks(block: int) -> Formula:
    """Convolutions and linear layers by whole blocks of channels; everything else by what it makes."""

    def up(width: int) -> int:
        return math.ceil(width / block) * block

    def seconds(name: str, args: tuple[Any, ...], out: Any) -> float:
        made = next(tensors_in(out), None)
        if made is None:
            return 1e-6
        if name not in CONVOLUTIONS and name != "linear":
            return 1e-6 + 1e-9 * made.numel()
        weight = args[1]
        transposed = "transpose" in name
        reads, makes = weight.shape[:2] if transposed else weight.shape[1::-1]
        places = made.numel() / made.shape[-1 if name == "linear" else 1]
        ragged = 1.3 if reads > 3 and (reads % block or makes % block) else 1.0
        work = weight[0, 0].numel() * places * (reads if reads <= 3 else up(reads)) * up(makes)
        return 1e-6 + ragged * (1e-10 * work + 1e-9 * up(makes))

    return seconds


class FakeClock(CallMode):
    """What the formula says about every call of a pass."""

    def __init__(self, formula: Formula) -> None:
        super().__init__()
        self.formula = formula
        self.seconds: list[float] = []

    def meet(
        self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        out = func(*args, **kwargs)
        if not is_silent(name):
            self.seconds.append(self.formula(name, args, out))
        return out


class FakeTime:
    """Stands in for everything in `attrfast.latency` that reads a clock.

    Attributes:
        formula: seconds of a call.
        passes: how many narrowed copies' passes were timed.
        surprise: real models that lost filters take so many times what their calls take.
        wait: seconds that every call takes longer.
        disturbed: which of `passes` take a wait of a millisecond a call, all they do included.
    """

    def __init__(self, formula: Formula) -> None:
        self.formula, self.passes, self.surprise, self.wait = formula, 0, 1.0, 0.0
        self.disturbed = range(0)

    def _of(self, name: str, args: tuple[Any, ...], out: Any) -> float:
        wait = 1e-3 if self.passes in self.disturbed else self.wait
        return self.formula(name, args, out) + wait

    def of_calls(self, model: nn.Module, args: Any, kwargs: Any, device: torch.device) -> list[float]:
        self.passes += 1
        with torch.no_grad(), FakeClock(self._of) as clock:
            model(*args, **kwargs)
        return clock.seconds

    def of_a_pass(self, model: nn.Module, args: Any, kwargs: Any, device: torch.device) -> float:
        training = model.training
        model.eval()
        with torch.no_grad(), FakeClock(self._of) as clock:
            model(*args, **kwargs)
        model.train(training)
        return sum(clock.seconds)

    def compare(
        self,
        models: Mapping[str, nn.Module],
        args: Any,
        kwargs: Any,
        device: torch.device,
        rounds: int,
    ) -> dict[str, Latency]:
        took = {name: self.of_a_pass(model, args, kwargs, device) for name, model in models.items()}
        sizes = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
        if sizes["pruned"] < sizes["original"]:
            took["pruned"] *= self.surprise
        return {name: Latency((seconds,) * 2, 0) for name, seconds in took.items()}


def install(patch: pytest.MonkeyPatch, formula: Formula) -> FakeTime:
    """Puts a fake time in the place of the real one."""
    fake = FakeTime(formula)
    patch.setattr(sampling, "_PASSES", 1)  # all are the same
    patch.setattr(sampling, "pass_seconds", fake.of_calls)
    patch.setattr(sampling, "whole_pass_seconds", fake.of_a_pass)
    patch.setattr(gauge, "in_turns", fake.compare)
    return fake
