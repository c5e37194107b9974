"""Training steps that all processes of a group take together, by DistributedDataParallel.

The gradient of a step is that of the mean over the samples of all processes, however many each has; one whose
batches have run out takes part with none. Must not know of losses or optimizers.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
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

    For each: within `own_part` a process computes the loss of its batch, by `forward`; `weight` then meets the
    others; within `common_part` all go backward and change the weights.

    Args:
        model: on its device, with a parameter to train; the same in all processes.
        group: which may be of one process; the model then trains by itself.
    """

    def __init__(self, model: nn.Module, group: Group) -> None:
        self._model, self._group, self._seen = model, group, 0
        self._parallel: nn.Module | None = None
        if not group.alone:
            with self.common_part():
                # Forward passes exchange nothing, and parameters that no sample uses are not waited for.
                self._parallel = DistributedDataParallel(_Losses(model), **_OPTIONS)

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

    def forward(self, loss: Callable[[], torch.Tensor] | None) -> torch.Tensor:
        """What `loss` computes by the model, 0-d; of no loss, for want of a batch, a zero to go back from."""
        if self._parallel is None:
            assert loss is not None  # alone, steps end with the batches
            return loss()
        value: torch.Tensor = self._parallel(loss)
        return value

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

    @contextlib.contextmanager
    def common_part(self) -> Iterator[None]:
        """From the backward pass to the new weights."""
        with contextlib.ExitStack() as stack:
            if not self._group.alone:
                stack.enter_context(self._group.unannounced())
                stack.enter_context(self._group.in_touch(_WHERE))
            yield

    def finish(self) -> None:
        """Gives all processes the same buffers, once training is over.

        Floating ones (the running statistics of batch norms) become the mean over processes, each weighted by
        the samples that it trained on; others (counts) become those of the process with most samples.
        """
        if self._group.alone:
            return
        seen = self._group.meet(_WHERE, self._seen)
        buffers = list(self._model.buffers())
        means = [b for b in buffers if b.is_floating_point()]
        if sum(seen) and means:
            share = self._seen / sum(seen)
            mine = torch.cat([b.detach().flatten().double().cpu() for b in means])
            # A process that trained on nothing has no say, whatever stands in its buffers.
            mine = mine * share if share else torch.zeros_like(mine)
            parts = torch.split(self._group.add_up(_WHERE, mine), [b.numel() for b in means])
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


class _Losses(nn.Module):
    """The losses that a model gives, and one of nothing: all gradients are then zero, and no buffer changes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        # DistributedDataParallel complains where it is to expect unused parameters and finds none.
        self.unused = nn.Parameter(torch.zeros((), device=next(model.parameters()).device))

    def forward(self, loss: Callable[[], torch.Tensor] | None) -> torch.Tensor:
        if loss is not None:
            return loss()
        firsts = [p.flatten()[:1].float() for p in self.model.parameters() if p.requires_grad]
        return 0 * torch.cat(firsts).sum()
