"""How much memory one call takes at its peak, over what is there before it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from attrfast.trace import tensors_in


def peak(run: Callable[[], object], device: torch.device, present: Iterable[torch.Tensor]) -> int:
    """Bytes that a call needs at once.

    Args:
        run: the call.
        device: a CUDA device: the peak of torch's allocator there, operators' workspaces included.
            Elsewhere torch keeps no such record: the tensors that are alive at once are counted, and
            what operators need for themselves is not.
        present: tensors that the call uses and that exist already, such as weights and inputs.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = int(torch.cuda.memory_allocated(device))
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device)) - before
    alive = _Alive(present)
    with alive:
        run()
    return alive.most


class _Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the memory behind tensors that operators return, for as long as it is alive."""

    def __init__(self, present: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self._seen = weakref.WeakSet(tensor.untyped_storage() for tensor in present)

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tensors_in(out):
            storage = tensor.untyped_storage()
            if storage not in self._seen:
                self._seen.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        self.most = max(self.most, self.now)
        return out

    def _freed(self, size: int) -> None:
        self.now -= size
