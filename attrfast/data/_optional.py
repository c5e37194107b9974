"""Imports libraries that only the data helpers need."""

from __future__ import annotations

import importlib
from types import ModuleType

from attrfast.errors import BackendError


def require(module: str, *, of: str) -> ModuleType:
    """Imports `module`, which belongs to the installable package `of`.

    Raises:
        BackendError: it is not installed; the message names the extra that brings it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise BackendError(
            f"this data set needs {of}, which could not be imported ({error}); "
            f'pip install "attrfast[data]"'
        ) from error
