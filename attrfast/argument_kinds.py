"""What is wrong with arguments that PyTorch's dispatcher refuses, in words for users.

Must not know any op: it reads a function's annotations.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch


def _is_whole(value: Any) -> bool:
    if isinstance(value, Integral):
        return -(2**63) <= int(value) < 2**63
    return isinstance(value, torch.SymInt)


def _are_whole(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(map(_is_whole, value))


def _is_number(value: Any) -> bool:
    return isinstance(value, Real | torch.SymFloat | torch.SymInt)


# By annotation: in words, and the test.
_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "Tensor": ("a tensor", lambda value: isinstance(value, torch.Tensor)),
    "Tensor | None": (
        "a tensor or None",
        lambda value: value is None or isinstance(value, torch.Tensor),
    ),
    "list[int]": ("a list of integers of 64 bits", _are_whole),
    "float | None": ("a number or None", lambda value: value is None or _is_number(value)),
    "int": ("an integer of 64 bits", _is_whole),
    "bool": ("True or False", lambda value: isinstance(value, bool)),
    "str": ("a string", lambda value: isinstance(value, str)),
}


def unusable_argument(
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    writes: str | None = None,
) -> str | None:
    """The first argument that is not of the kind that the function's annotations say; None if all are.

    Args:
        function: whose annotations are texts out of `_KINDS`.
        args, kwargs: of a call.
        writes: the argument that is written into.
    """
    signature = inspect.signature(function)
    try:
        given = signature.bind(*args, **kwargs).arguments
    except TypeError as error:
        return str(error)
    for name, value in given.items():
        words, fits = _KINDS[signature.parameters[name].annotation]
        if not fits(value):
            return f"{name} must be {words}, got {_shown(value)}"
        if isinstance(value, torch.Tensor) and (value.layout != torch.strided or value.is_nested):
            kind = "nested" if value.is_nested else str(value.layout)
            return f"{name} must be a dense tensor, got {kind}"
        if name == writes and (value.is_neg() or value._is_zerotensor()):
            return f"{name} is a lazy view, which can't be written into; clone it"
    return None


def _shown(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
