"""A pruned model as a folder: `weights.safetensors` and `recipe.json`.

Loading builds the unpruned model by the user's own function, gives it the recipe's widths and puts the
weights in. Nothing is unpickled or run, no input is needed, and all is checked before anything is set.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from attrfast.architecture import (
    describe,
    owners,
    require_fit,
    same_names,
    set_widths,
    shapes,
    tensors,
)
from attrfast.errors import InputError, ModelError
from attrfast.files import copied, replace_files
from attrfast.recipe import Recipe

RECIPE, WEIGHTS = "recipe.json", "weights.safetensors"


def save(
    folder: str | Path,
    model: nn.Module,
    *,
    criterion: str,
    stopped: str,
    history: list[dict[str, Any]],
    gates: Mapping[str, torch.Tensor],
) -> Path:
    """Writes a pruned model, see `PruneResult.save`."""
    folder = Path(folder)
    model = _unwrapped(model)
    state = tensors(model)
    shared = _shared(state)
    _require_describable(model, state)
    try:
        held = copied({name: t for name, t in state.items() if name not in shared})
        data = safetensors.torch.save(held)
    except (KeyError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        raise ModelError(f"the model's tensors can't be written as safetensors: {error}") from error
    recipe = Recipe(
        criterion=criterion,
        stopped=stopped,
        history=history,
        gates=dict(gates),
        modules=describe(model),
        shared=shared,
        weights=(len(data), hashlib.sha256(data).hexdigest()),
        versions={"attrfast": metadata.version("attrfast"), "torch": str(torch.__version__)},
    )
    text = recipe.to_json()
    Recipe.from_json(text)  # what can't be read is not written
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_files(
            {
                folder / WEIGHTS: lambda part: part.write_bytes(data),
                folder / RECIPE: lambda part: part.write_text(text),
            }
        )
    except OSError as error:
        raise InputError(
            f"the model can't be saved in {folder}: {error}; give another folder"
        ) from error
    return folder


def load(path: str | Path, model_fn: Callable[[], nn.Module] | nn.Module) -> nn.Module:
    """The pruned model that `PruneResult.save` wrote.

    No input, no data and no forward pass are needed, and no code from the folder is run.

    Args:
        path: the folder.
        model_fn: a callable without arguments that builds the unpruned architecture (its weights don't
            matter), or such a model, which is left as it is. The model that `prune` was given serves as
            well, and so does one that lies further back, if it was pruned before.

    Returns:
        The model in eval mode, on the device where `model_fn` builds it, in the saved dtypes. Hooks,
        `requires_grad` and buffers that are not persistent are those of the built model.

    Raises:
        InputError: a file is missing, truncated or changed, or was saved from another architecture. The
            message names the module or tensor, and nothing is half loaded.
    """
    folder = Path(path)
    recipe = read_recipe(folder)
    weights = _read_weights(folder / WEIGHTS, recipe)
    model = _built(model_fn)
    try:
        place = _Placement(model, recipe, weights)
    except InputError as error:
        raise InputError(f"{folder} does not fit the model: {error}") from error
    place.carry_out()
    return model.eval()


def read_recipe(path: str | Path) -> Recipe:
    """How a saved model came about: its criterion, history and gates, without loading it.

    Args:
        path: the folder that `PruneResult.save` wrote.

    Raises:
        InputError: there is no recipe, or it is damaged.
    """
    file = Path(path) / RECIPE
    try:
        return Recipe.from_json(_read(file).decode())
    except (InputError, UnicodeDecodeError) as error:
        raise InputError(f"{file} can't be used: {error}") from error


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise InputError(f"{error}; give a folder that result.save(...) wrote") from error


def _read_weights(file: Path, recipe: Recipe) -> dict[str, torch.Tensor]:
    data = _read(file)
    size, digest = recipe.weights
    if len(data) != size:
        raise InputError(f"{file} has {len(data)} bytes where {size} were saved: copy it once more")
    if hashlib.sha256(data).hexdigest() != digest:
        raise InputError(f"{file} is not what was saved (its checksum differs): copy it once more")
    try:
        found: dict[str, torch.Tensor] = safetensors.torch.load(data)
    except (KeyError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        raise InputError(f"{file} holds no weights: {error}") from error
    return found


def _built(model_fn: Callable[[], nn.Module] | nn.Module) -> nn.Module:
    if isinstance(model_fn, nn.Module):
        try:
            return copy.deepcopy(_unwrapped(model_fn))
        except Exception as error:
            raise InputError(
                f"the model can't be copied ({error}); give a function that builds it"
            ) from error
    if not callable(model_fn):
        raise InputError(
            f"model_fn must be a function that builds the model, or the model, got {model_fn!r}"
        )
    try:
        made = model_fn()
    except Exception as error:
        raise InputError(f"model_fn() raised {type(error).__name__}: {error}") from error
    if not isinstance(made, nn.Module):
        raise InputError(f"model_fn() must return a torch.nn.Module, got a {type(made).__name__}")
    return _unwrapped(made)


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model under torch.compile's wrapper."""
    inside: nn.Module = getattr(model, "_orig_mod", model)
    return inside


def _shared(state: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Further names of tensors -> their first."""
    first: dict[int, str] = {}
    return {
        name: first[id(tensor)]
        for name, tensor in state.items()
        if first.setdefault(id(tensor), name) != name
    }


def _require_describable(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    for name, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise ModelError(
                f"{name or 'the model'} keeps extra state ({type(module).__name__}.get_extra_state), "
                f"which a file of tensors can't hold; keep it in a buffer"
            )
    for name, shape in shapes(model, describe(model)).items():
        if tuple(state[name].shape) != shape:
            raise ModelError(
                f"{name} has the shape {tuple(state[name].shape)}, and its module's attributes say "
                f"{shape}, so the model could not be built again; correct the attributes"
            )


class _Placement:
    """Where in a fresh model the weights go. Making one checks everything and changes nothing.

    Raises:
        InputError: the model is of another architecture.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, weights: Mapping[str, torch.Tensor]) -> None:
        require_fit(model, recipe.modules)
        self._model, self._recipe, self._weights = model, recipe, weights
        self._state, self._owners = tensors(model), owners(model)
        if twice := sorted(weights.keys() & recipe.shared.keys()):
            raise InputError(
                f"{twice[0]} is among the weights, and said to be {recipe.shared[twice[0]]}"
            )
        source = {name: name for name in weights} | recipe.shared
        same_names("tensors", self._state, source)
        for name, shape in shapes(model, recipe.modules).items():
            _require_same(name, self._state[name], weights.get(source[name]), shape)
        self._groups: dict[str, list[str]] = {}
        for name in self._state:
            self._groups.setdefault(source[name], []).append(name)
        self._require_ties(source)

    def _require_ties(self, source: Mapping[str, str]) -> None:
        for names in self._groups.values():
            for name in names[1:]:
                if self._state[name] is not self._state[names[0]]:
                    raise InputError(
                        f"{names[0]} and {name} were one tensor, and are two in your model; tie them "
                        f"before loading"
                    )
        by_owner: dict[tuple[int, str], str] = {}
        for name, (module, leaf) in self._owners.items():
            other = by_owner.setdefault((id(module), leaf), name)
            if source[other] != source[name]:
                raise InputError(
                    f"{other} and {name} were two tensors, and belong to one module in your model"
                )

    def carry_out(self) -> None:
        """Sets widths and tensors; what could fail was checked, or comes before the first of them."""
        ready = {n: w.to(self._state[n].device, copy=True) for n, w in self._weights.items()}
        set_widths(self._model, self._recipe.modules)
        holders: dict[int, int] = {}
        for tensor in self._state.values():
            holders[id(tensor)] = holders.get(id(tensor), 0) + 1
        for source, names in self._groups.items():
            old, new = self._state[source], ready[source]
            if holders[id(old)] == len(names):
                old.data = new
                continue
            # Surgery cut one of two layers that shared a tensor, so that each has its own since.
            own = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
            for name in names:
                module, leaf = self._owners[name]
                setattr(module, leaf, own)


def _require_same(
    name: str, mine: torch.Tensor, saved: torch.Tensor | None, shape: tuple[int, ...]
) -> None:
    if saved is None:
        raise InputError(f"the weights hold nothing under the name that stands for {name}")
    if mine.is_meta or nn.parameter.is_lazy(mine):
        raise InputError(f"{name} has no memory yet; build the model on a real device, layer by layer")
    if tuple(saved.shape) != shape:
        raise InputError(f"{name} was saved with the shape {tuple(saved.shape)}, and must be {shape}")
    if (saved.is_floating_point(), saved.is_complex()) != (mine.is_floating_point(), mine.is_complex()):
        raise InputError(f"{name} was saved as {saved.dtype}, and is {mine.dtype} in your model")
