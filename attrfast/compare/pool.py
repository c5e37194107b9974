"""Does jobs one after another in this process, or side by side in others.

Knows nothing of what a job is: it is handed to `work`, which returns nothing and may raise.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from graphlib import TopologicalSorter
from multiprocessing import connection, get_context, parent_process
from multiprocessing.reduction import ForkingPickler
from typing import Any, Protocol

import torch

from attrfast.errors import AttrfastError, InputError

Work = Callable[[Any], None]


@dataclass(frozen=True)
class Done:
    """A job that is over; `error` is None where it went well, `details` a traceback where there is one."""

    job: Any
    error: str | None = None
    details: str = ""


class Pool(Protocol):
    """Runs jobs."""

    def run(self, jobs: Mapping[Any, Set[Any]]) -> Iterator[Done]:
        """Does every job after those that it needs, and yields each as it ends.

        A job whose need failed is not begun and counts as failed.

        Args:
            jobs: job -> the jobs that must have gone well before.
        """
        ...


@contextmanager
def pool(work: Work, workers: int, threads: int | None) -> Iterator[Pool]:
    """A pool that ends its processes on leaving, however it is left.

    Args:
        work: what does a job; with more than one worker it is sent to other processes.
        workers: processes; 1 works in the calling one.
        threads: torch's threads in each; None: as many as torch has now, shared among the workers.

    Raises:
        InputError: `work` can't be sent to other processes.
    """
    before = torch.get_num_threads()
    each = threads or max(1, before // workers)
    if workers == 1:
        torch.set_num_threads(each)
        try:
            yield _Here(work)
        finally:
            torch.set_num_threads(before)
        return
    others = _Others(work, workers, each)
    try:
        yield others
    finally:
        others.close()


class _Here:
    """The calling process."""

    def __init__(self, work: Work) -> None:
        self._work = work

    def run(self, jobs: Mapping[Any, Set[Any]]) -> Iterator[Done]:
        agenda = _Agenda(jobs)
        while agenda:
            yield from agenda.hopeless()
            job = agenda.next()
            if job is not None:
                done = _done(self._work, job)
                agenda.over(done)
                yield done


class _Agenda:
    """Jobs in an order in which each comes after those that it needs."""

    def __init__(self, jobs: Mapping[Any, Set[Any]]) -> None:
        self._needs, self._failed = jobs, set[Any]()
        # A need that is no job of this run went well before.
        inside = {job: needs & jobs.keys() for job, needs in jobs.items()}
        self._sorter: TopologicalSorter[Hashable] = TopologicalSorter(inside)
        self._sorter.prepare()
        self._ready: deque[Any] = deque()

    def __bool__(self) -> bool:
        return bool(self._ready) or self._sorter.is_active()

    def next(self) -> Any:
        """A job that can be begun, or None where all of them wait for others."""
        self._ready.extend(self._sorter.get_ready())
        return self._ready.popleft() if self._ready else None

    def hopeless(self) -> Iterator[Done]:
        """Jobs whose need failed."""
        self._ready.extend(self._sorter.get_ready())
        for job in list(self._ready):
            lost = next((need for need in self._needs[job] if need in self._failed), None)
            if lost is not None:
                self._ready.remove(job)
                done = Done(job, f"not begun, because it needs what failed: {lost}")
                self.over(done)
                yield done

    def over(self, done: Done) -> None:
        if done.error is not None:
            self._failed.add(done.job)
        self._sorter.done(done.job)


def _done(work: Work, job: Any) -> Done:
    try:
        work(job)
    except Exception as error:
        kind = "" if isinstance(error, AttrfastError) else f"{type(error).__name__}: "
        return Done(job, f"{kind}{error}", traceback.format_exc())
    return Done(job)


class _Process:
    """One other process, and the job that it has."""

    def __init__(self, work: Work, threads: int) -> None:
        context = get_context("spawn")  # a fork would copy threads' locks, and fails with CUDA
        self.line, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, work, threads), name="attrfast")
        self.process.start()
        theirs.close()
        self.job: Any = None

    def begin(self, job: Any) -> None:
        self.job = job
        self.line.send(job)

    def end(self) -> Done | None:
        """How the job went; None where the process did not live to tell."""
        try:
            done: Done = self.line.recv()
        except (EOFError, OSError):
            return None
        self.job = None
        return done

    def stop(self) -> None:
        self.line.close()
        self.process.terminate()
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


class _Others:
    """Processes that live as long as there are jobs; one that dies is replaced."""

    def __init__(self, work: Work, workers: int, threads: int) -> None:
        try:
            ForkingPickler.dumps(work)
        except Exception as error:
            raise InputError(
                f"with more than one worker, networks, data and criteria are sent to other processes, "
                f"and something among them can't be: {error}; use functions and classes of a module "
                f"(no lambdas), or workers=1"
            ) from error
        self._work, self._workers, self._threads = work, workers, threads
        self._processes: list[_Process] = []

    def run(self, jobs: Mapping[Any, Set[Any]]) -> Iterator[Done]:
        agenda = _Agenda(jobs)
        while agenda:
            yield from agenda.hopeless()
            self._hand_out(agenda)
            busy = {process.line: process for process in self._processes if process.job is not None}
            for line in connection.wait(list(busy)) if busy else []:
                done = self._ended(busy[line])  # type: ignore[index]
                agenda.over(done)
                yield done

    def _hand_out(self, agenda: _Agenda) -> None:
        while True:
            free = next((p for p in self._processes if p.job is None), None)
            if free is None and len(self._processes) >= self._workers:
                return
            job = agenda.next()
            if job is None:
                return
            if free is None:
                free = _Process(self._work, self._threads)
                self._processes.append(free)
            free.begin(job)

    def _ended(self, process: _Process) -> Done:
        done = process.end()
        if done is not None:
            return done
        self._processes.remove(process)
        process.process.join(5)
        code = process.process.exitcode
        process.stop()
        how = f"exit status {code}"
        if code is not None and code < 0:
            how = signal.Signals(-code).name
        return Done(
            process.job,
            f"its process ended with {how} before it was done"
            + (" (memory may have run out; use fewer workers)" if how == "SIGKILL" else ""),
        )

    def close(self) -> None:
        for process in self._processes:
            process.stop()
        self._processes.clear()


def _end_with_parent() -> None:
    """Ends this process when the first one has died without a word, in the middle of a job too."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _serve(line: Any, work: Work, threads: int) -> None:
    """The main loop of another process: jobs come in, and how they went goes out."""
    # Ctrl-C reaches all processes of a terminal; the first one ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # gives back what it holds
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    while True:
        try:
            job = line.recv()
        except (EOFError, OSError):
            return
        line.send(_done(work, job))
