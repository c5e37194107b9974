"""Which kernels run: found once, said once, and never replaced silently by others that were not asked for.

Nothing above `attrfast.ops` knows that there is more than one backend.
"""

from __future__ import annotations

import functools
import logging
import os
from dataclasses import dataclass
from typing import Any

import torch

from attrfast.errors import BackendError

log = logging.getLogger("attrfast")

NAMES = ("cpu", "triton", "cuda", "reference")


@dataclass(frozen=True)
class Found:
    """A backend and, where it can't be used, why."""

    name: str
    backend: Any | None
    reason: str = ""


@functools.cache
def find(name: str) -> Found:
    """Looks for one backend of `NAMES`."""
    if name == "reference":
        from attrfast.plain import ReferenceBackend

        return Found(name, ReferenceBackend())
    if name == "cpu":
        try:
            from attrfast.native import CpuBackend
        except ImportError as error:
            return Found(name, None, f"the native module is not built ({error})")
        return Found(name, CpuBackend())
    if name == "triton":
        try:
            from attrfast.kernels.backend import TritonBackend, unusable
        except ImportError as error:
            return Found(name, None, f"Triton can't be imported ({error})")
        reason = unusable()
        return Found(name, None if reason else TritonBackend(), reason)
    from attrfast import cuda

    reason = cuda.unusable()
    return Found(name, None if reason else cuda.CudaBackend(), reason)


def asked() -> str | None:
    """The backend that ATTRFAST_BACKEND names, or None.

    Raises:
        BackendError: it names none, or one that can't be used here.
    """
    name = os.environ.get("ATTRFAST_BACKEND", "").strip().lower() or None
    if name is None:
        return None
    if name not in NAMES:
        raise BackendError(f"ATTRFAST_BACKEND={name!r} is none of {', '.join(NAMES)}")
    found = find(name)
    if found.backend is None:
        raise BackendError(
            f"ATTRFAST_BACKEND={name} can't be used: {found.reason}; unset it, or see "
            f"`python -m attrfast.env`"
        )
    return name


@functools.cache  # every launch asks
def _preferred(kind: str, variable: str | None) -> Any:
    """The backend for a kind of device, with ATTRFAST_BACKEND as it stands."""
    forced = asked()
    if forced is not None:
        backend = find(forced).backend
        assert backend is not None  # or `asked` would have refused it
        backend.check_device(kind)
        return backend
    if kind == "cpu":
        found = find("cpu")
        if found.backend is not None:
            return found.backend
        log.warning("attrfast runs its plain PyTorch ops on the CPU: %s", found.reason)
    if kind == "cuda":
        both = find("cuda"), find("triton")
        for found in both:
            if found.backend is not None:
                return found.backend
        why = "; ".join(f"{found.name}: {found.reason}" for found in both)
        log.warning("attrfast runs its plain PyTorch ops on the GPU: %s", why)
    return find("reference").backend


def backend_for(device: torch.device) -> Any:
    """The backend for tensors on a device: the fastest found, or the one asked for.

    Args:
        device: where the tensors are.

    Raises:
        BackendError: ATTRFAST_BACKEND asks for one that can't be used.
    """
    return _preferred(device.type, os.environ.get("ATTRFAST_BACKEND"))
