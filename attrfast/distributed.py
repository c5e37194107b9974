"""The processes that work together: torch.distributed's default group, and how they stay together.

Every process does its part and then meets the others. One that fails comes to the meeting as well and says
why, so that all stop with its reason; one that does not come is noticed by the group's timeout, or at once
where its connections close. Must not know what is measured, cut or trained.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from torch import distributed as dist

from attrfast.errors import DistributedError, InputError

_T = TypeVar("_T")

COMMAND_TIMEOUT = timedelta(minutes=30)  # how long a command's process waits for the others
_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun tells a process


@dataclass(frozen=True)
class _Note:
    """What a process brings to a meeting: where it stands, what it tells, why it failed if it did."""

    where: str
    told: Any = None
    error: str | None = None


class Group:
    """Processes that run the same code on shards of the data; of one process, all is as without it.

    Args:
        rank, size: of this process, and how many there are.
        device: where the backend wants its tensors.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        device: torch.device = torch.device("cpu"),  # noqa: B008
    ) -> None:
        self.rank, self.size, self.device = rank, size, device
        self._parted = False  # the others know that this process stops, or can't be told

    @property
    def alone(self) -> bool:
        return self.size == 1

    @property
    def first(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0

    def meet(self, where: str, told: Any = None) -> list[Any]:
        """What every process tells, by rank. Small things alone, for they are pickled.

        Raises:
            DistributedError: a process failed, died, did not come in time, or stands elsewhere.
        """
        if self.alone:
            return [told]
        notes = self._gathered(_Note(where, told))
        for rank, note in enumerate(notes):
            if note.error is not None:
                self._parted = True
                raise DistributedError(
                    f"rank {rank} of {self.size} failed, and rank {self.rank} stopped at {where!r} with "
                    f"it: {note.error}"
                )
        if len({note.where for note in notes}) > 1:
            self._parted = True
            places = ", ".join(f"rank {rank} at {note.where!r}" for rank, note in enumerate(notes))
            raise DistributedError(
                f"the processes are at different places: {places}; all must make the same calls of "
                f"attrfast with the same arguments (distributed=False makes a call that is one's own)"
            )
        return [note.told for note in notes]

    def add_up(self, where: str, sums: torch.Tensor) -> torch.Tensor:
        """The sum over processes of one tensor, float64 or int64, on the CPU: the same bits in all."""
        if self.alone:
            return sums
        moved = sums.to(self.device, copy=True)
        with self.in_touch(where):
            dist.all_reduce(moved)
        return moved.cpu()

    def from_rank(self, where: str, rank: int, item: _T | None) -> _T:
        """What the process of that rank has; tensors in it must be on the CPU."""
        self.meet(where)
        box = [item if self.rank == rank else None]
        if not self.alone:
            with self.in_touch(where):
                dist.broadcast_object_list(box, src=rank)
        return cast(_T, box[0])

    def from_first(self, where: str, work: Callable[[], _T]) -> _T:
        """What the first process makes, while the others wait."""
        return self.from_rank(where, 0, work() if self.first else None)

    def shared(self, where: str, items: Iterator[_T]) -> Iterator[_T]:
        """The same items in all processes, each from the first process that has one left."""
        while True:
            mine = next(items, None)
            owners = [rank for rank, has in enumerate(self.meet(where, mine is not None)) if has]
            if not owners:
                return
            yield self.from_rank(where, owners[0], mine)

    def require_same(self, where: str, mark: str, otherwise: str) -> None:
        """Compares a text that must be the same in all processes.

        Raises:
            DistributedError: it is not; `otherwise` says what that means and what to do.
        """
        marks = self.meet(where, mark)
        odd = next((rank for rank, other in enumerate(marks) if other != marks[0]), None)
        if odd is not None:
            raise DistributedError(f"rank {odd} differs from rank 0: {otherwise}")

    def fail(self, error: Exception) -> None:
        """Tells the others at their next meeting that this process stops, unless they know it."""
        if not self.alone and not self._parted:
            self._parted = True
            with contextlib.suppress(DistributedError):
                self._gathered(_Note("", error=f"{type(error).__name__}: {error}"))

    @contextlib.contextmanager
    def unannounced(self) -> Iterator[None]:
        """A part in which processes exchange something else, so that one which fails can't say so.

        The others notice it when it ends, or by the group's timeout.
        """
        try:
            yield
        except Exception:
            self._parted = True
            raise

    def _gathered(self, note: _Note) -> list[_Note]:
        notes: list[Any] = [None] * self.size
        with self.in_touch(note.where):
            dist.all_gather_object(notes, note)
        return notes

    @contextlib.contextmanager
    def in_touch(self, where: str) -> Iterator[None]:
        """A part in which a backend exchanges something.

        Raises:
            DistributedError: it can't.
        """
        try:
            yield
        except RuntimeError as error:  # what all backends raise
            self._parted = True
            raise DistributedError(
                f"rank {self.rank} of {self.size} lost the others at {where!r} ({str(error).strip()}): a "
                f"process died, or did not come within the group's timeout. See what the others say; if one "
                f"only needs longer, raise init_process_group(timeout=...)"
            ) from error


_current: ContextVar[Group | None] = ContextVar("_current", default=None)


@contextlib.contextmanager
def together(wanted: bool = True) -> Iterator[Group]:
    """A call that the processes of the default group make together, where there is one and it is wanted.

    A call inside another belongs to it. Nobody leaves the outermost before all have come to its end.

    Raises:
        DistributedError: another process failed, died, did not come in time, or makes another call.
    """
    outer = _current.get()
    if wanted and outer is not None:
        yield outer
        return
    group = _default() if wanted else Group()
    token = _current.set(group)
    try:
        yield group
        group.meet("the end")
    except Exception as error:
        group.fail(error)
        raise
    finally:
        _current.reset(token)


def _default() -> Group:
    if not (dist.is_available() and dist.is_initialized()):
        return Group()
    on_gpu = str(dist.get_backend()) == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    return Group(dist.get_rank(), dist.get_world_size(), device)


def restarted() -> bool:
    """Whether torchrun started this process in place of one that failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


@contextlib.contextmanager
def launched(device: torch.device) -> Iterator[Group]:
    """A command that the processes which torchrun started carry out together; without it, one process does.

    Args:
        device: where work is done: NCCL on a GPU (that of the process's local rank), else gloo.

    Raises:
        InputError: torchrun started more processes than there are GPUs.
        DistributedError: the processes can't connect.
    """
    if not all(name in os.environ for name in _LAUNCHED) or dist.is_initialized():
        with together() as group:
            yield group
        return
    if device.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise InputError(
                f"there are {torch.cuda.device_count()} GPUs and more processes on this machine; lower "
                f"--nproc-per-node, or give --device cpu"
            )
        torch.cuda.set_device(local)
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=COMMAND_TIMEOUT))  # type: ignore[attr-defined]
        if os.environ.get("LOCAL_WORLD_SIZE") == str(size):
            # torchrun keeps its store when it starts processes again, with the addresses of those that died
            # (pytorch/pytorch issue 135712). It counts the starts of one machine's processes alike.
            again = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
            store = dist.PrefixStore(f"start {again}", store)  # type: ignore[attr-defined]
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=size, timeout=COMMAND_TIMEOUT
        )
    except RuntimeError as error:
        raise DistributedError(
            f"the {os.environ['WORLD_SIZE']} processes can't connect ({error}); look whether all of them "
            f"run, and which network they use (GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME names another)"
        ) from error
    try:
        with together() as group:
            yield group
    finally:
        dist.destroy_process_group()
