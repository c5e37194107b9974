"""Training steps that all processes of a group take together, by DistributedDataParallel.

The gradient of a step is that of the mean over the samples of all processes, however many each has; one whose
batches have run out takes part with none. Must not know of losses or optimizers.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from attrfast.distributed import Group
from attrfast.errors import DistributedError

_WHERE = "fine-tuning"
# Whether a forward pass copies the first process's buffers; newer versions of torch have another name for it.
_NEW = "forward_sync_buffers"
_BUFFERS = _NEW if _NEW in inspect.signature(DistributedDataParallel).parameters else "broadcast_buffers"
_OPTIONS: dict[str, Any] = {"find_unused_parameters": True, _BUFFERS: False}


class Lockstep:
    """The steps of one training.

    For each: within `own_part` a process runs the model on its batch; `weight` then meets the others; within
    `common_part` all go backward and change the weights.

    Args:
        model: on its device, with a parameter to train; the same in all processes.
        group: which may be of one process; the model then trains by itself.

    Attributes:
        model: what runs forward in place of the model.
    """

    def __init__(self, model: nn.Module, group: Group) -> None:
        self._bare, self._group, self._seen = model, group, 0
        self.model: nn.Module = model
        if not group.alone:
            with group.unannounced(_WHERE):
                # Forward passes exchange nothing, and parameters that no sample uses are not waited for.
                self.model = DistributedDataParallel(_WithoutData(model), **_OPTIONS)

    @contextlib.contextmanager
    def own_part(self) -> Iterator[None]:
        """What a process does by itself; if it fails here, the others stop with its reason."""
        try:
            yield
        except Exception:
            if not self._group.alone:
                with contextlib.suppress(DistributedError):
                    self._met(0, failed=True)
            raise

    def weight(self, samples: int) -> float | None:
        """What this process's mean over so many samples is multiplied by; None where nobody has any left.

        Raises:
            DistributedError: another process failed.
        """
        if self._group.alone:
            return 1.0 if samples else None
        total, failed = self._met(samples)
        if failed:
            self._group.meet(_WHERE)
        self._seen += samples
        # Gradients are averaged over processes, so that a weight of one is a process's fair share.
        return samples * self._group.size / total if total else None

    def common_part(self) -> contextlib.AbstractContextManager[None]:
        """From the backward pass to the new weights."""
        return self._group.unannounced(_WHERE)

    def without_data(self) -> torch.Tensor:
        """The zero, 0-d, that a process without a batch goes backward from."""
        zero: torch.Tensor = self.model()
        return zero

    def finish(self) -> None:
        """Gives all processes the same buffers, once training is over.

        Floating ones (the running statistics of batch norms) become the mean over processes, each weighted by
        the samples that it trained on; others (counts) become those of the process with most samples.
        """
        if self._group.alone:
            return
        seen = self._group.meet(_WHERE, self._seen)
        buffers = list(self._bare.buffers())
        means = [b for b in buffers if b.is_floating_point()]
        if sum(seen) and means:
            share = self._seen / sum(seen)
            rows = [b.detach().flatten().double().cpu() for b in means]
            # A process that trained on nothing has no say, whatever stands in its buffers.
            mine = (
                torch.cat(rows) * share
                if share
                else torch.zeros(sum(map(len, rows)), dtype=torch.float64)
            )
            parts = torch.split(self._group.add_up(_WHERE, mine), [len(row) for row in rows])
            for buffer, part in zip(means, parts, strict=True):
                buffer.copy_(part.view(buffer.shape))
        counts = [b for b in buffers if not b.is_floating_point()]
        theirs = self._group.from_rank(_WHERE, seen.index(max(seen)), [b.cpu() for b in counts])
        for buffer, value in zip(counts, theirs, strict=True):
            buffer.copy_(value)

    def _met(self, samples: int, failed: bool = False) -> tuple[int, int]:
        """The samples of a step in all processes, and how many of these have failed."""
        total, failures = self._group.add_up(_WHERE, torch.tensor([samples, int(failed)])).tolist()
        return total, failures


class _WithoutData(nn.Module):
    """A model that can also run on nothing: all gradients are then zero, and no buffer changes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        # DistributedDataParallel complains where it is to expect unused parameters and finds none.
        self.unused = nn.Parameter(torch.zeros((), device=next(model.parameters()).device))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return self.model(*args, **kwargs)
        firsts = [p.flatten()[:1].float() for p in self.model.parameters() if p.requires_grad]
        return 0 * torch.cat(firsts).sum()
