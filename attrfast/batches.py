"""What a batch, a label, an output and a device are. Must not know what is done with them."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from attrfast.errors import BackendError, InputError
from attrfast.rows import chosen, rows
from attrfast.trace import tensors_in

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """One batch on the model's device.

    Attributes:
        raw: the batch as the loader gave it, moved to the device; what `loss_fn(output, batch)` gets.
        args, kwargs: what the model is called with.
        labels: (N,) or whatever stands second in the batch; None where there is nothing.
        samples: N.
        extremes: the smallest and the largest label, where they could be read without waiting for a GPU.
    """

    raw: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    labels: Any
    samples: int
    extremes: tuple[int, int] | None

    def feed(self, model: nn.Module) -> Any:
        return model(*self.args, **self.kwargs)

    def split(self, size: int) -> Iterator[Batch]:
        """The batch in parts of at most `size` samples."""
        if size >= self.samples:
            yield self
            return
        for start in range(0, self.samples, size):
            stop = min(start + size, self.samples)
            raw, args, kwargs, labels = (
                rows(tree, self.samples, start, stop)
                for tree in (self.raw, self.args, self.kwargs, self.labels)
            )
            yield Batch(raw, args, kwargs, labels, stop - start, self.extremes)

    def portable(self) -> Any:
        """The batch as the loader gave it, in memory of its own on the CPU: to be sent to a process."""
        return _mapped(self.raw, lambda tensor: tensor.detach().cpu().clone())

    def of_classes(self, classes: Sequence[int]) -> Batch | None:
        """The samples with one of these labels, or None where there are none.

        Raises:
            InputError: the batch has no labels (samples,) of whole numbers.
        """
        labels = self.labels
        if not isinstance(labels, torch.Tensor) or labels.shape != (self.samples,):
            raise InputError(
                f"classes={list(classes)} needs one label a sample, a tensor of shape ({self.samples},), "
                f"got {_kind(labels)}; leave classes out for data without labels"
            )
        _check_whole(labels)
        wanted = torch.isin(labels, torch.tensor(list(classes), device=labels.device))
        index = torch.nonzero(wanted).flatten()
        if not len(index):
            return None
        raw, args, kwargs, labels = (
            chosen(tree, self.samples, index) for tree in (self.raw, self.args, self.kwargs, self.labels)
        )
        return Batch(raw, args, kwargs, labels, len(index), self.extremes)


def unpack(batch: Any, device: torch.device) -> Batch:
    """Reads a loader's batch: `(input, label)` or `(input, label, ...)`, or a mapping with `"labels"`.

    The input is a tensor, a tuple or list of tensors (positional inputs), or a mapping (keyword inputs). Of a
    mapping that holds its labels, as Hugging Face's data collators make, the rest are keyword inputs.

    Raises:
        InputError: the batch is none of these, is empty, or lies on another accelerator.
    """
    if isinstance(batch, Mapping) and "labels" in batch:
        raw = _moved(dict(batch), device)
        inputs = {key: value for key, value in raw.items() if key != "labels"}
        return _read(raw, inputs, raw["labels"], batch["labels"])
    if isinstance(batch, Mapping) or not isinstance(batch, Sequence) or isinstance(batch, str):
        raise InputError(
            f"a batch must be a pair (input, label), got {_kind(batch)}; wrap the loader so that it "
            f"yields (input, label), where the input may be a dict of the model's keyword inputs, or a "
            f"dict of them all in which the label is called 'labels'"
        )
    if len(batch) < 2:
        raise InputError(
            f"a batch must be a pair (input, label), got a {type(batch).__name__} of length {len(batch)}"
        )
    raw = _moved(batch, device)
    return _read(raw, raw[0], raw[1], batch[1])


def _read(raw: Any, inputs: Any, labels: Any, given_labels: Any) -> Batch:
    """A batch of these inputs and labels, on the device; the labels as they were given tell their extremes."""
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(inputs, Mapping):
        kwargs = dict(inputs)
    elif isinstance(inputs, (tuple, list)):
        args = tuple(inputs)
    else:
        args = (inputs,)
    first = next(tensors_in((args, kwargs)), None)
    if first is None or first.dim() == 0:
        raise InputError(
            f"the input of a batch must hold tensors of shape (samples, ...), got {_kind(inputs)}"
        )
    if first.shape[0] == 0:
        raise InputError(f"a batch holds no samples: its input has shape {tuple(first.shape)}")
    return Batch(raw, args, kwargs, labels, first.shape[0], _extremes(given_labels))


def _kind(item: Any) -> str:
    if isinstance(item, torch.Tensor):
        return f"a tensor of shape {tuple(item.shape)}"
    if isinstance(item, Mapping):
        return f"a {type(item).__name__} with keys {list(item)[:5]}"
    return f"a {type(item).__name__}"


def _moved(tree: Any, device: torch.device) -> Any:
    def move(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_inference():
            tensor = tensor.clone()  # outside inference mode, a clone may be kept for the backward pass
        if tensor.device == device:
            return tensor
        if tensor.device.type != "cpu":
            raise InputError(
                f"the data is on {tensor.device} and the model on {device}; move one of them, or let the "
                f"loader yield CPU tensors"
            )
        return tensor.to(device, non_blocking=True)

    return _mapped(tree, move)


def _mapped(tree: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same containers with other tensors."""
    if isinstance(tree, torch.Tensor):
        return change(tree)
    if isinstance(tree, Mapping):
        changed = {key: _mapped(value, change) for key, value in tree.items()}
        return changed if type(tree) is dict else _rebuilt(tree, changed)
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(_mapped(item, change) for item in tree))
    if isinstance(tree, (list, tuple)):
        return type(tree)(_mapped(item, change) for item in tree)
    return tree


def _rebuilt(tree: Mapping[Any, Any], changed: dict[Any, Any]) -> Any:
    try:
        return type(tree)(changed)  # type: ignore[call-arg]
    except TypeError:
        return changed


def main_output(output: Any) -> torch.Tensor:
    """The logits: the output itself, the first of several, or `logits` or `out` of an output object.

    Raises:
        InputError: no tensor is found there.
    """
    found = output
    if isinstance(found, Mapping):
        found = next((found[key] for key in ("logits", "out") if key in found), None)
    elif isinstance(getattr(found, "logits", None), torch.Tensor):
        found = found.logits
    elif isinstance(found, (tuple, list)) and found:
        found = found[0]
    if not isinstance(found, torch.Tensor):
        raise InputError(
            f"no logits found in the model's output ({_kind(output)}): it must be a tensor, begin with "
            f"one, or hold 'logits' or 'out'; otherwise give loss_fn(output, batch)"
        )
    return found


def _extremes(labels: Any) -> tuple[int, int] | None:
    if not isinstance(labels, torch.Tensor) or labels.device.type != "cpu":
        return None
    if labels.dtype not in _WHOLE or labels.numel() == 0:
        return None
    least, most = labels.aminmax()
    return int(least), int(most)


_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_labels(batch: Batch, logits: torch.Tensor) -> None:
    """Logits must be (N, K), and labels (N,) integers that name one of the K outputs.

    Raises:
        InputError: they are not; a label outside is named.
    """
    labels = batch.labels
    if logits.dim() != 2 or not logits.is_floating_point():
        raise InputError(
            f"the model's output has shape {tuple(logits.shape)} and dtype {logits.dtype}, not (samples, "
            f"classes); give loss_fn(output, batch), and a criterion that uses it"
        )
    samples, outputs = logits.shape
    if not isinstance(labels, torch.Tensor):
        raise InputError(f"labels must be an int64 tensor (samples,), got {_kind(labels)}")
    if labels.dim() != 1 or labels.shape[0] != samples:
        raise InputError(
            f"labels must have shape ({samples},), one class a sample, got {tuple(labels.shape)}; for "
            f"other targets give loss_fn(output, batch)"
        )
    _check_whole(labels)
    for label in batch.extremes or ():
        if not 0 <= label < outputs:
            raise InputError(
                f"label {label} is outside the model's {outputs} outputs (0 to {outputs - 1}); "
                f"check the labels, or the width of the last layer"
            )


def _check_whole(labels: torch.Tensor) -> None:
    if labels.dtype not in _WHOLE:
        raise InputError(f"labels must be whole numbers (int64), got {labels.dtype}")


def preferred_device(asked: str | None) -> str:
    """The device that was asked for, or else the one that a command runs on."""
    return asked or ("cuda" if torch.cuda.is_available() else "cpu")


def resolve_device(model: nn.Module, device: str | torch.device | None) -> torch.device:
    """The device to work on: the one asked for, or where the model is.

    Raises:
        InputError: the device has no meaning, or the model is spread over several devices.
        BackendError: the device does not exist here.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if device is None:
        found = {t.device for t in (*model.parameters(), *model.buffers())}
        if len(found) > 1:
            raise InputError(
                f"the model is spread over {sorted(map(str, found))}; move it to one device, "
                f"model.to(device)"
            )
        chosen = found.pop() if found else torch.device("cpu")
    else:
        try:
            chosen = torch.device(device)
        except (RuntimeError, TypeError) as error:
            raise InputError(f"device {device!r} is no device: {error}") from error
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise BackendError(
                f"device {str(device or chosen)!r} was asked for, and torch finds no CUDA GPU here; use "
                f"device='cpu', or install a CUDA build of torch and its driver"
            )
        if chosen.index is None:
            chosen = torch.device("cuda", torch.cuda.current_device())
    if chosen.type == "meta":
        raise InputError("the model is on the meta device, without values; load its weights first")
    return chosen


def check_iterable(loader: Any) -> None:
    """Refuses what can't be iterated over.

    Raises:
        InputError: the loader is no iterable.
    """
    if not isinstance(loader, Iterable) and not hasattr(loader, "__getitem__"):
        raise InputError(
            f"the loader must be an iterable of (input, label) batches, got {type(loader).__name__}"
        )


def reiterable(loader: Iterable[Any]) -> Iterable[Any]:
    """A loader that can be read several times: a one-shot iterator is kept in memory, with a warning.

    Raises:
        InputError: it cannot be iterated over.
    """
    check_iterable(loader)
    iterator = iter(loader)
    if iterator is not loader:
        return loader
    batches = list(iterator)
    warnings.warn(
        f"the loader is a generator, which can be read only once: its {len(batches)} batches are kept "
        f"in memory; pass a DataLoader to avoid this",
        stacklevel=3,
    )
    return batches
