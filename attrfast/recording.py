"""What a recorded forward pass leaves in its graph: taps, ReLUs that measure, and the flow they add up to.

Must not know when passes begin and end, nor what is made of their flow.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from attrfast import ops
from attrfast.errors import ModelError
from attrfast.matrix import Columns, ScoreMatrix

# Bytes of a tensor that a ReLU measures for its reader: what caches hold is read twice as fast as arranged for.
FUSED_FROM = 32 << 20


class Flow:
    """S of one forward pass, and what it is multiplied by.

    Attributes:
        late: measures that have been left to ReLUs whose backward has not run yet.
    """

    def __init__(self, matrix: ScoreMatrix, scale: float) -> None:
        self._matrix, self.scale = matrix, scale
        self.late: dict[Link, _Late] = {}

    def take(self) -> torch.Tensor:
        """(N, U), with all that was added."""
        for late in self.late.values():
            self.add(late)
        self.late = {}
        return self._matrix.take() * self.scale

    def add(self, late: _Late) -> None:
        self._matrix.add(late.columns, late.x, late.g, late.dim)

    def add_sums(self, columns: Columns, sums: torch.Tensor) -> None:
        self._matrix.add_sums(columns, sums)

    def may_wait(self, x: torch.Tensor, g: torch.Tensor, dim: int) -> bool:
        """Whether a ReLU's kernel could measure this, and would save more than it takes to arrange."""
        dense = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
        return (
            not self._matrix.absolute
            and dim == 1
            and x.dim() == 4
            and dense
            and (x.stride(), x.dtype) == (g.stride(), g.dtype)
            and x.nbytes > FUSED_FROM
        )


class _Late(NamedTuple):
    columns: Columns
    x: torch.Tensor
    g: torch.Tensor
    dim: int


class Reader(NamedTuple):
    """A call that takes channels in.

    Attributes:
        weight: id of its weight.
        link: to the ReLU whose output it reads, if it reads that itself.
    """

    weight: int
    link: Link | None


class Home(Protocol):
    """Who a recorded pass belongs to."""

    device: torch.device

    def flow_of(self, current: RecordedPass) -> Flow | None:
        """Where a forward pass's gradients go; None where they are not wanted any more."""

    def columns(self, weight: int) -> Columns | None:
        """Where the channels go that the reader with this weight (its id) takes in."""


class RecordedPass:
    """One forward pass, as its taps hold it: it lives as long as its graph.

    Attributes:
        samples: known when it is over.
        scale: of the loss, undone.
        blind: whether the readers were not known yet when it ran, so that every layer has a tap.
    """

    def __init__(self, home: Home, scale: float, *, blind: bool) -> None:
        self.home, self.scale, self.blind = home, scale, blind
        self.samples: int | None = None
        self.anchor = torch.zeros((), device=home.device, requires_grad=True)
        self.flow: Flow | None = None

    def add(self, reader: Reader, x: torch.Tensor, g: torch.Tensor, dim: int, sign: float) -> None:
        """A tap's measure; stands where other passes have their score matrix."""
        if self.flow is None:
            self.flow = self.home.flow_of(self)
        columns = self.home.columns(reader.weight)
        if self.flow is None or columns is None:
            return
        late, link = _Late(columns, x.detach(), g.detach(), dim), reader.link
        if link is not None and link not in self.flow.late and self.flow.may_wait(x, g, dim):
            self.flow.late[link] = late
        else:
            self.flow.add(late)


class Link:
    """Between a ReLU and the reader of its output. It keeps no pass alive, since what waits is kept by it."""

    def __init__(self, current: RecordedPass) -> None:
        self._pass = weakref.ref(current)

    def backward(self, a: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        """The ReLU's, by PyTorch's rule: g where a > 0; with what its reader left to it.

        The reader is the only one that reads a just where its gradient is what arrives here: as long as it is
        held, autograd adds others' to it in memory of their own.
        """
        current = self._pass()
        flow = None if current is None else current.flow
        late = None if flow is None else flow.late.pop(self, None)
        if flow is not None and late is not None:
            alone = late.g.data_ptr() == g.data_ptr() and late.g.stride() == g.stride()
            if alone and not torch.is_grad_enabled():
                backend = ops.backend_for(a.device)
                gz, sums = backend.affine_relu_backward(a, g, None, 0.0, math.inf, False, True)
                flow.add_sums(late.columns, sums)
                return gz if gz.stride() == g.stride() else torch.empty_like(g).copy_(gz)
            flow.add(late)
        back: torch.Tensor = torch.ops.aten.threshold_backward(g, a, 0)
        return back


class MeasuringReLU(torch.autograd.Function):
    """The model's own call of a ReLU, whose backward can measure."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, call: Callable[..., Any], inplace: bool, link: Link
    ) -> torch.Tensor:
        out: torch.Tensor = call(x)
        if inplace:
            ctx.mark_dirty(x)
        ctx.save_for_backward(out)
        ctx.link = link
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (a,) = ctx.saved_tensors
        return ctx.link.backward(a, grads[0]), None, None, None


class Readers:
    """The weights of a model's readers, by identity.

    Attributes:
        columns: id of a weight -> where the channels go that it reads.
    """

    def __init__(
        self, columns: dict[int, Columns], places: list[tuple[nn.Module, str, nn.Parameter, Columns]]
    ) -> None:
        self.columns, self._places = columns, places

    @staticmethod
    def of(model: nn.Module, columns: dict[str, Columns]) -> Readers:
        places = []
        for name, found in columns.items():
            owner, _, leaf = name.rpartition(".")
            module = model.get_submodule(owner)
            places.append((module, leaf, getattr(module, leaf), found))
        return Readers({id(weight): found for _, _, weight, found in places}, places)

    def checked(self) -> Readers:
        """The same where no weight was put in the place of another.

        Raises:
            ModelError: one of another shape was, as by pruning.
        """
        if all(getattr(module, leaf) is weight for module, leaf, weight, _ in self._places):
            return self
        fresh = []
        for module, leaf, weight, found in self._places:
            now = getattr(module, leaf)
            if now.shape != weight.shape:
                raise ModelError(
                    f"a {type(module).__name__}'s {leaf} has become {tuple(now.shape)}, and was "
                    f"{tuple(weight.shape)} before: record a pruned model by a new ScoreRecorder"
                )
            fresh.append((module, leaf, now, found))
        return Readers({id(weight): found for _, _, weight, found in fresh}, fresh)
