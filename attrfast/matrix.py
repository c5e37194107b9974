"""The score matrix S of one batch: N samples, U units.

Must not know where the flows that are added to it were measured.
"""

from __future__ import annotations

import torch

from attrfast import ops
from attrfast.errors import ModelError


class RowsError(ModelError):
    """A reader's batch has another size than the input's: its rows can't be told apart by sample."""


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
        self.absolute = absolute

    @property
    def values(self) -> torch.Tensor:
        """(N, U)."""
        return self._sums[:, :-1]

    def add(
        self, columns: Columns, x: torch.Tensor, g: torch.Tensor, dim: int, sign: float = 1.0
    ) -> None:
        """Adds the flow of x, whose dimension `dim` holds channels, and its gradient g."""
        if g.dtype != x.dtype:
            g = g.to(x.dtype)
        x, g = _by_channel(x, g, dim)
        self.add_sums(columns, self._backend.attribution(x, g, self.absolute), sign)

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


def _by_channel(x: torch.Tensor, g: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of shape (N, C, positions...) of tensors that hold channels in dimension `dim`."""
    if dim == 0:  # an unbatched call
        x, g, dim = x.unsqueeze(0), g.unsqueeze(0), 1
    if dim != 1:
        x, g = x.movedim(dim, 1), g.movedim(dim, 1)
    return (x, g) if x.dim() <= 5 else (x.flatten(4), g.flatten(4))
