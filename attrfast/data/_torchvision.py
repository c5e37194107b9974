"""Opens torchvision's image sets, with errors that say what to do."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from attrfast.errors import InputError


def opened(
    dataset: Callable[..., Any], root: str | os.PathLike[str], *, download: bool, **options: Any
) -> Any:
    """`dataset(root, download=download, **options)`.

    Raises:
        InputError: the files are not there, damaged, or could not be downloaded.
    """
    name = getattr(dataset, "__name__", str(dataset))
    try:
        return dataset(root, download=download, **options)
    except OSError as error:
        raise InputError(f"{name} could not be fetched into or read from {root}: {error}") from error
    except RuntimeError as error:
        remedy = "remove the folder and try again" if download else "pass download=True to fetch it"
        raise InputError(f"{name} is not complete in {root} ({error}); {remedy}") from error
