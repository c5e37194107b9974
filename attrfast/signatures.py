"""Arguments of the torch functions that are met by name, put in order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

CONVOLUTIONS = frozenset(f"conv{t}{d}d" for t in ("", "_transpose") for d in (1, 2, 3))

_SIGNATURES: dict[str, tuple[tuple[str, Any], ...]] = {
    "linear": (("bias", None),),
    **{
        f"conv{d}d": (
            ("bias", None),
            ("stride", 1),
            ("padding", 0),
            ("dilation", 1),
            ("groups", 1),
        )
        for d in (1, 2, 3)
    },
    **{
        f"conv_transpose{d}d": (
            ("bias", None),
            ("stride", 1),
            ("padding", 0),
            ("output_padding", 0),
            ("groups", 1),
            ("dilation", 1),
        )
        for d in (1, 2, 3)
    },
}


def channel_dim(name: str, x: torch.Tensor) -> int:
    """Which dimension holds the channels of what a convolution or linear call takes in or gives out."""
    positions = 0 if name == "linear" else int(name[-2])
    return x.dim() - positions - 1


def bound_arguments(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """All arguments of a convolution or linear call by position: input, weight, bias, ..."""
    names = (("input", None), ("weight", None), *_SIGNATURES[name])
    rest = names[len(args) :]
    return [*args, *(kwargs.get(key, default) for key, default in rest)]


def batch_norm_arguments(
    args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[Any, Any, Any, Any, Any, bool, float]:
    """(input, mean, var, weight, bias, training, eps) of a `torch.nn.functional.batch_norm` call."""
    names = (
        "input",
        "running_mean",
        "running_var",
        "weight",
        "bias",
        "training",
        "momentum",
        "eps",
    )
    defaults = {"weight": None, "bias": None, "training": False, "momentum": 0.1, "eps": 1e-5}
    given = defaults | dict(zip(names, args, strict=False)) | kwargs
    return (
        given["input"],
        given["running_mean"],
        given["running_var"],
        given["weight"],
        given["bias"],
        bool(given["training"]),
        float(given["eps"]),
    )
