"""Imports libraries that only some helpers need."""

from __future__ import annotations

import importlib
from types import ModuleType

from attrfast.errors import BackendError


def require(module: str, *, of: str, what: str = "this data set", extra: str = "data") -> ModuleType:
    """Imports `module`, which belongs to the installable package `of`.

    Args:
        what: what needs it, in words.
        extra: of attrfast, which brings it.

    Raises:
        BackendError: it is not installed; the message names the extra that brings it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise BackendError(
            f'{what} needs {of}, which could not be imported ({error}); pip install "attrfast[{extra}]"'
        ) from error
