"""What a model's modules are, in plain values, and how a fresh model gets another's widths.

Only numbers and short texts are described; setting widths changes a few named integers of layers that
surgery can cut. Must not know where a description comes from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from attrfast.errors import InputError

Widths = Mapping[str, int]
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Form:
    """One module.

    Attributes:
        kind: name of its class.
        widths: what surgery may change, such as `out_channels`; empty for other modules.
        settings: its other arguments that decide what it computes, such as `stride`.
    """

    kind: str
    widths: dict[str, int]
    settings: dict[str, Any]


def _convolution(module: nn.Module, widths: Widths) -> Shapes:
    ins, outs, groups = widths["in_channels"], widths["out_channels"], widths["groups"]
    first, second = (ins, outs) if module.transposed else (outs, ins)
    kernel: tuple[int, ...] = module.kernel_size  # type: ignore[assignment]
    if ins % groups or outs % groups:
        raise InputError(f"a convolution from {ins} to {outs} channels can't have {groups} groups")
    return {"weight": (first, second // groups, *kernel), "bias": (outs,)}


def _linear(module: nn.Module, widths: Widths) -> Shapes:
    return {
        "weight": (widths["out_features"], widths["in_features"]),
        "bias": (widths["out_features"],),
    }


def _norm(module: nn.Module, widths: Widths) -> Shapes:
    one = (widths["num_features"],)
    return {"weight": one, "bias": one, "running_mean": one, "running_var": one}


def _prelu(module: nn.Module, widths: Widths) -> Shapes:
    return {"weight": (widths["num_parameters"],)}


# What `attrfast.surgery` cuts: kind -> its widths, the output's last, and the shapes that they give.
_LAYERS: dict[type[nn.Module], tuple[tuple[str, ...], Callable[[nn.Module, Widths], Shapes]]] = {
    nn.modules.conv._ConvNd: (("in_channels", "groups", "out_channels"), _convolution),
    nn.Linear: (("in_features", "out_features"), _linear),
    nn.modules.batchnorm._NormBase: (("num_features",), _norm),
    nn.PReLU: (("num_parameters",), _prelu),
}

_REMEDY = "build the model that was pruned"

# Settings that matter in training alone: a model may be loaded with others.
_TRAINING_ONLY = frozenset({"inplace", "momentum", "p"})


def _layer(module: nn.Module) -> tuple[tuple[str, ...], Callable[[nn.Module, Widths], Shapes]]:
    for kind, layer in _LAYERS.items():
        if isinstance(module, kind):
            return layer
    return (), lambda module, widths: {}


def describe(model: nn.Module) -> dict[str, Form]:
    """Every module of a model by its (first) name; the model itself is `""`."""
    return {name: _form(module) for name, module in model.named_modules()}


def _form(module: nn.Module) -> Form:
    names, _ = _layer(module)
    # __constants__ is where torch's modules list the arguments that they were made with.
    listed = sorted(set(getattr(module, "__constants__", ())) - set(names) - _TRAINING_ONLY)
    settings = {name: _plain(getattr(module, name, None)) for name in listed}
    return Form(
        type(module).__name__,
        {name: int(getattr(module, name)) for name in names},
        {name: value for name, value in settings.items() if value is not None},
    )


def _plain(value: Any) -> Any:
    """A number, a text or a list of them, as JSON would give it back; None for anything else."""
    if isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, (tuple, list)):
        items = [_plain(item) for item in value]
        return None if None in items else items
    return None


def outputs(form: Form) -> int | None:
    """How many channels or features a layer makes; None for a module without widths."""
    return next(reversed(form.widths.values()), None)


def require_fit(model: nn.Module, forms: Mapping[str, Form]) -> None:
    """Refuses a model that the described one can't have been pruned from.

    Raises:
        InputError: a module is missing, is too much, is of another kind, has other settings, or is
            narrower than described.
    """
    found = describe(model)
    same_names("modules", found, forms)
    for name, form in forms.items():
        mine, where = found[name], f"{name or 'the model itself'} is"
        if mine.kind != form.kind:
            raise InputError(f"{where} a {mine.kind}, and a {form.kind} in the recipe; {_REMEDY}")
        if mine.widths.keys() != form.widths.keys():
            raise InputError(
                f"{where} a {mine.kind} with the widths {sorted(mine.widths)}, and the recipe gives "
                f"{sorted(form.widths)}; {_REMEDY}"
            )
        for key, width in form.widths.items():
            if not 1 <= width <= mine.widths[key]:
                raise InputError(
                    f"{where} a {mine.kind} with {key}={mine.widths[key]}, and {key}={width} in the "
                    f"recipe, which pruning can't have made of it; {_REMEDY}"
                )
        # Settings that only one of two versions of torch lists are no difference.
        for key in sorted(form.settings.keys() & mine.settings.keys()):
            if form.settings[key] != mine.settings[key]:
                raise InputError(
                    f"{where} a {mine.kind} with {key}={mine.settings[key]}, and {key}="
                    f"{form.settings[key]} in the recipe; {_REMEDY}"
                )


def same_names(what: str, mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Refuses two sets of names that differ.

    Raises:
        InputError: names the first that is missing, or too much.
    """
    for name in theirs:
        if name not in mine:
            raise InputError(f"the saved model has {name!r} among its {what}, yours has not; {_REMEDY}")
    for name in mine:
        if name not in theirs:
            raise InputError(f"your model has {name!r} among its {what}, the saved has not; {_REMEDY}")


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name; a tensor that has several names comes with each."""
    return {name: tensor for name, _, _, tensor in _places(model)}


def owners(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """For each name of `tensors`, the module that holds it, and its name there."""
    return {name: (module, leaf) for name, module, leaf, _ in _places(model)}


def _places(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, torch.Tensor]]:
    for prefix, module in model.named_modules(remove_duplicate=False):
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and leaf not in module._non_persistent_buffers_set:
                yield (f"{prefix}.{leaf}" if prefix else leaf), module, leaf, tensor


def shapes(model: nn.Module, forms: Mapping[str, Form]) -> Shapes:
    """What the shapes of `tensors` would be with the widths of `forms`, which must fit the model."""
    first = {id(module): name for name, module in model.named_modules()}
    found: Shapes = {}
    for name, module, leaf, tensor in _places(model):
        _, rule = _layer(module)
        implied = rule(module, forms[first[id(module)]].widths)
        found[name] = implied.get(leaf, tuple(tensor.shape))
    return found


def set_widths(model: nn.Module, forms: Mapping[str, Form]) -> None:
    """Sets the widths of `forms`, which must fit the model; its tensors stay as they are."""
    for name, module in model.named_modules():
        for key in _layer(module)[0]:
            setattr(module, key, forms[name].widths[key])
