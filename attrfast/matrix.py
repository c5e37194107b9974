"""The score matrix S of one batch: N samples, U units.

Must not know where the flows that are added to it were measured.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from attrfast import ops
from attrfast.errors import ModelError


class RowsError(ModelError):
    """A reader's batch has another size than the input's: its rows can't be told apart by sample."""


# Flows of tensors up to this size wait for each other where a backend measures many in one launch: a GPU
# reads them in less time than a launch takes.
SMALL = 1 << 18  # bytes
WAITING = 1 << 23  # bytes that may be kept waiting


class Columns:
    """Where the channels of a tensor go in the score matrix.

    Args:
        row: (C,) int64, the unit of each channel, -1 for none.
        units: U.
    """

    def __init__(self, row: torch.Tensor, units: int, device: torch.device) -> None:
        row = torch.where(row < 0, units, row)
        self.index = row.to(device)
        start = int(row[0]) if len(row) else 0
        ascending = torch.equal(row, torch.arange(start, start + len(row)))
        self.run = slice(start, start + len(row)) if ascending else None


class ScoreMatrix:
    """S of one batch: what every tap adds to.

    Args:
        units: U.
        samples: N.
        absolute: reduce abs(x * g) instead of x * g (`reduction="abs_element"`).
    """

    def __init__(
        self, units: int, samples: int, *, device: torch.device, absolute: bool = False
    ) -> None:
        dtype = torch.float32 if device.type == "mps" else torch.float64
        # One column more than there are units: where the channels of no unit go.
        self._sums = torch.zeros(samples, units + 1, dtype=dtype, device=device)
        self._backend = ops.backend_for(device)
        self._together = getattr(self._backend, "attributions", None)
        self._waiting: list[_Flow] = []
        self._bytes = 0
        self.absolute = absolute

    @property
    def values(self) -> torch.Tensor:
        """(N, U), with all that was added."""
        self._measure()
        return self._sums[:, :-1]

    def take(self) -> torch.Tensor:
        """(N, U), with all that was added; what is added from now on is a new S."""
        values = self.values
        self._sums = torch.zeros_like(self._sums)
        return values

    def add(
        self, columns: Columns, x: torch.Tensor, g: torch.Tensor, dim: int, sign: float = 1.0
    ) -> None:
        """Adds the flow of x, whose dimension `dim` holds channels, and its gradient g."""
        if g.dtype != x.dtype:
            g = g.to(x.dtype)
        x, g = _by_channel(x, g, dim)
        if self._together is None or x.nbytes > SMALL:
            self.add_sums(columns, self._backend.attribution(x, g, self.absolute), sign)
            return
        self._waiting.append(_Flow(columns, x, g, sign))
        self._bytes += x.nbytes
        if self._bytes > WAITING:
            self._measure()

    def waits_for(self, g: torch.Tensor) -> bool:
        """Whether the memory of g must not be written, because a flow in it is still to be measured."""
        memory = g.untyped_storage().data_ptr()
        return any(flow.g.untyped_storage().data_ptr() == memory for flow in self._waiting)

    def _measure(self) -> None:
        """Measures what waits."""
        if not self._waiting:
            return
        assert self._together is not None
        flows, self._waiting, self._bytes = self._waiting, [], 0
        sums = self._together([(flow.x, flow.g) for flow in flows], self.absolute)
        for flow, found in zip(flows, sums, strict=True):
            self.add_sums(flow.columns, found, flow.sign)

    def add_sums(self, columns: Columns, sums: torch.Tensor, sign: float = 1.0) -> None:
        """Adds sums over positions (N, C)."""
        rows = self._sums.shape[0]
        if sums.shape[0] != rows:
            if rows != 1:
                raise RowsError(
                    f"a layer sees a batch of {sums.shape[0]} where the model was given {rows} samples"
                )
            sums = sums.sum(0, keepdim=True)
        if columns.run is not None:
            self._sums[:, columns.run].add_(sums, alpha=sign)
        else:
            self._sums.index_add_(1, columns.index, sums.to(self._sums.dtype), alpha=sign)


class _Flow(NamedTuple):
    """A tensor and its gradient, (N, C, positions...), and where their products go."""

    columns: Columns
    x: torch.Tensor
    g: torch.Tensor
    sign: float


def _by_channel(x: torch.Tensor, g: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of shape (N, C, positions...) of tensors that hold channels in dimension `dim`."""
    if dim == 0:  # an unbatched call
        x, g, dim = x.unsqueeze(0), g.unsqueeze(0), 1
    if dim != 1:
        x, g = x.movedim(dim, 1), g.movedim(dim, 1)
    return (x, g) if x.dim() <= 5 else (x.flatten(4), g.flatten(4))
