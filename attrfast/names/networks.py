"""Networks by name: attrfast's own, torchvision's, timm's, and functions in files of the user's."""

from __future__ import annotations

import difflib
import functools
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attrfast import models
from attrfast.data._optional import require
from attrfast.data.loaders import Splits
from attrfast.errors import InputError

FORMS = "a name of attrfast.models, torchvision:NAME, timm:NAME or FILE.py:FUNCTION"
_ALSO = {"vgg16_bn_small": "vgg16_bn"}  # VGG-16 with batch norm, for small images

Build = Callable[[], nn.Module]


def network(name: str, splits: Splits) -> Build:
    """The function that builds a network for a data set.

    Args:
        name: one of `attrfast.models`, also as `attrfast:NAME`, with `:WIDTH` to multiply its widths
            (`resnet20:0.5`); `torchvision:NAME` or `timm:NAME`, also with `:pretrained`; or
            `FILE.py:FUNCTION`, a function of the user's own that returns the network. Its file is
            imported, which runs it. The function is called without arguments, but for `num_classes`
            and `in_channels` where it has parameters of these names.
        splits: for the number of classes and of channels.

    Returns:
        A function that another process can be given too.

    Raises:
        InputError: there is no such network, or it does not take these images.
        BackendError: the library that has it is not installed.
    """
    file, colon, function = name.rpartition(":")
    if (colon and file.endswith(".py")) or name.endswith(".py"):
        return _from_file(file or name, function if colon else "", splits)
    name = name.removeprefix("attrfast:")
    kind, _, rest = name.partition(":")
    if kind == "torchvision":
        return _torchvision(rest.partition(":")[0], splits)
    if kind == "timm":
        return _timm(rest, splits)
    kind = _ALSO.get(kind, kind)
    if kind not in models.__all__:
        near = difflib.get_close_matches(kind, models.__all__, n=1, cutoff=0.0)
        raise InputError(
            f"unknown network {name!r}; did you mean {near[0]!r}? Known: {', '.join(models.__all__)}, "
            f"torchvision:NAME, timm:NAME and FILE.py:FUNCTION"
        )
    options: dict[str, Any] = {"num_classes": splits.num_classes, "in_channels": splits.image_shape[0]}
    if rest:
        try:
            options["width"] = float(rest)
        except ValueError:
            raise InputError(f"{name!r}: {rest!r} is no width; use for instance {kind}:0.5") from None
    return functools.partial(getattr(models, kind), **options)


def _torchvision(kind: str, splits: Splits) -> Build:
    library = require("torchvision.models", of="torchvision")
    _require_known("torchvision", kind, library.list_models(module=library))
    if splits.image_shape[0] != 3:
        raise InputError(
            f"torchvision:{kind} takes images of 3 channels, and these have {splits.image_shape[0]}; "
            f"use one of attrfast's own networks: {', '.join(models.__all__)}"
        )
    return functools.partial(library.get_model, kind, weights=None, num_classes=splits.num_classes)


def _timm(rest: str, splits: Splits) -> Build:
    kind, _, ending = rest.partition(":")
    if ending not in ("", "pretrained"):
        raise InputError(f"'timm:{rest}': {ending!r} is not known; use timm:{kind}:pretrained")
    library = require("timm", of="timm", what="this network", extra="timm")
    _require_known("timm", kind, library.list_models())
    # timm adapts the first layer and the last, and the pretrained weights with them.
    return functools.partial(
        library.create_model,
        kind,
        pretrained=bool(ending),
        num_classes=splits.num_classes,
        in_chans=splits.image_shape[0],
    )


def _require_known(library: str, kind: str, known: Iterable[str]) -> None:
    known = list(known)
    if kind not in known:
        near = difflib.get_close_matches(kind, known, n=1, cutoff=0.0)
        raise InputError(f"{library} has no network {kind!r}; did you mean {near[0]!r}?")


def _from_file(file: str, function: str, splits: Splits) -> Build:
    if not function:
        raise InputError(f"{file!r} names no function; use {file}:FUNCTION")
    offered = {"num_classes": splits.num_classes, "in_channels": splits.image_shape[0]}
    return functools.partial(build_from_file, str(Path(file).resolve()), function, offered)


def build_from_file(file: str, function: str, offered: dict[str, Any]) -> nn.Module:
    """Imports a file and calls one of its functions. This runs the file's code.

    Args:
        file: path of a Python file; its own folder can be imported from.
        function: name of a callable in it.
        offered: arguments that it gets if it has parameters of their names.

    Raises:
        InputError: the file or the function is not there or fails, or gives no module.
    """
    called = f"{file}:{function}"
    if not Path(file).is_file():
        raise InputError(f"there is no file {file}; give FILE.py:FUNCTION")
    module = _imported(file)
    build = getattr(module, function, None)
    if not callable(build):
        known = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        near = difflib.get_close_matches(function, known, n=1, cutoff=0.0)
        raise InputError(
            f"{file} has no function {function!r}" + (f"; did you mean {near[0]!r}?" if near else "")
        )
    try:
        parameters = inspect.signature(build).parameters
        made = build(**{key: value for key, value in offered.items() if key in parameters})
    except Exception as error:
        raise InputError(f"{called} raised {type(error).__name__}: {error}") from error
    if not isinstance(made, nn.Module):
        raise InputError(f"{called} must return a torch.nn.Module, and gave a {type(made).__name__}")
    return made


def _imported(file: str) -> Any:
    """The file as a module, imported once in a process under a name of its own."""
    name = "attrfast_file_" + "".join(c if c.isalnum() else "_" for c in file)
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None  # a path that ends in .py has a loader
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(Path(file).parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise InputError(f"{file} can't be imported: {type(error).__name__}: {error}") from error
    finally:
        sys.path.pop(0)
    return module


def pretrained(name: str) -> Callable[[nn.Module], None] | None:
    """What loads ImageNet's weights, for `torchvision:NAME:pretrained`; None for any other name.

    Raises:
        InputError: the name ends in something else.
    """
    kind, _, rest = name.partition(":")
    base, _, ending = rest.partition(":")
    if kind != "torchvision" or not ending:
        return None
    if ending != "pretrained":
        raise InputError(f"{name!r}: {ending!r} is not known; use torchvision:{base}:pretrained")
    return functools.partial(load_imagenet, kind=base)


def load_imagenet(model: nn.Module, kind: str) -> None:
    """Loads torchvision's ImageNet weights, all but those of the last layer.

    torchvision keeps them in its cache, and fetches them when they are not there.

    Raises:
        InputError: they could not be fetched or read.
    """
    library = require("torchvision.models", of="torchvision")
    try:
        known = library.get_model_weights(kind)
        # The first ones, which published results of the time start from; later ones score higher.
        weights = getattr(known, "IMAGENET1K_V1", known.DEFAULT)
        state = weights.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"torchvision's weights of {kind} could not be fetched or read: {error}; put them into its "
            f"cache ({torch.hub.get_dir()}/checkpoints), or leave out `:pretrained`"
        ) from error
    mine = model.state_dict()
    fits = {key: value for key, value in state.items() if mine[key].shape == value.shape}
    missing = sorted(key for key in mine if key not in fits)
    if len({key.rpartition(".")[0] for key in missing}) > 2:  # a last layer, and an auxiliary one
        raise InputError(f"torchvision's weights of {kind} do not fit the network: {missing[:5]}")
    model.load_state_dict(fits, strict=False)
