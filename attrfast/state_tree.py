"""The state of an optimiser or of random generators as plain values and tensors, which files can hold.

What is neither (a function, an object of some class) is refused, so nothing has to be unpickled to read it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from attrfast import schema
from attrfast.errors import InputError

Tensors = dict[str, torch.Tensor]


def packed(tree: Any, prefix: str, tensors: Tensors) -> Any:
    """A tree as JSON can hold it; its tensors go into `tensors`, under names that begin with `prefix`.

    Args:
        tree: dictionaries, lists, tuples, tensors, NumPy arrays, numbers, texts, None.

    Raises:
        TypeError: it holds something else.
    """
    if isinstance(tree, np.ndarray):
        return {"array": packed(torch.from_numpy(tree), prefix, tensors)["tensor"]}
    if isinstance(tree, torch.Tensor):
        name = f"{prefix}.{len(tensors)}"
        tensors[name] = tree
        return {"tensor": name}
    if isinstance(tree, float) and not math.isfinite(tree):
        return {"float": repr(float(tree))}
    if tree is None or type(tree) in (bool, int, float, str):
        return tree
    if type(tree) in (list, tuple):
        items = [packed(item, prefix, tensors) for item in tree]
        return items if type(tree) is list else {"tuple": items}
    if isinstance(tree, Mapping):  # whose keys may be numbers, as an optimiser's are
        return {"dict": [[packed(x, prefix, tensors) for x in pair] for pair in tree.items()]}
    raise TypeError(f"a {type(tree).__name__} can't be kept in a file of plain values")


def unpacked(packing: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The tree that `packed` was given.

    Raises:
        InputError: it is no such thing.
    """
    if isinstance(packing, list):
        return [unpacked(item, tensors) for item in packing]
    if not isinstance(packing, dict):
        return packing
    if len(packing) != 1:
        raise InputError(f"a state must have one kind, got {schema.short(sorted(packing))}")
    ((kind, value),) = packing.items()
    if kind in ("tensor", "array"):
        name = schema.text(value, "a tensor's name")
        if name not in tensors:
            raise InputError(f"there is no tensor {name!r}")
        return tensors[name] if kind == "tensor" else tensors[name].numpy()
    if kind == "float" and value in ("nan", "inf", "-inf"):
        return float(value)
    if kind == "tuple":
        return tuple(unpacked(schema.sequence(value, "a tuple"), tensors))
    if kind == "dict":
        pairs = [
            unpacked(schema.sequence(pair, "a pair"), tensors) for pair in schema.sequence(value, kind)
        ]
        if all(len(pair) == 2 and isinstance(pair[0], (str, int)) for pair in pairs):
            return dict(pairs)
    raise InputError(f"a state can't be of the kind {kind!r} with {schema.short(value)}")
