"""Pictures of what attribution sees in one image: class maps and filters' maps.

The model runs on the image, and comes back bit-identical.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from attrfast.batches import main_output, resolve_device, unpack
from attrfast.canvas import MUTED, Path, figure_for
from attrfast.channels import discover
from attrfast.criteria.causal_map import grad_cam
from attrfast.errors import InputError, ModelError
from attrfast.feature_maps import Captured, FeatureMaps, Place, by_channel
from attrfast.scores import Scores
from attrfast.trace import Param, argument, preserved
from attrfast.units import Units

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

HEAT = "inferno"


def attribution_map(
    model: nn.Module,
    image: torch.Tensor,
    label: int | None,
    path: Path,
    *,
    layer: str | None = None,
) -> None:
    """Draws an image, and over it what in it speaks for a class: the Grad-CAM map of a layer.

    Args:
        model: a classifier.
        image: (C, H, W) or (1, C, H, W), as the model takes it; drawn from its least value to its largest.
        label: the class; None: the predicted one.
        path: file to write; its ending (.png, .svg, .pdf) gives the format.
        layer: name of a convolution, whose layer's channels are read where they are handed on; None: all
            channels of the last map.

    Raises:
        InputError: the image, the label or the layer is not usable.
        ModelError: the class does not depend on the layer.
        BackendError: matplotlib is not installed.

    Source: Selvaraju et al. 2017, Grad-CAM, eq. 1 and 2.
    """
    with _seen(model, image) as seen:
        logits = main_output(seen.captured.output)
        if logits.dim() != 2:
            raise InputError(
                f"the model's output has shape {tuple(logits.shape)}, not (samples, classes); an "
                f"attribution map explains one class"
            )
        classes = logits.shape[1]
        chosen = int(logits.argmax(1)) if label is None else int(label)
        if not 0 <= chosen < classes:
            raise InputError(
                f"label {label} is outside the model's {classes} outputs (0 to {classes - 1})"
            )
        place = seen.last() if layer is None else seen.place_of(layer)
        x = seen.captured.maps[place]
        (g,) = torch.autograd.grad(logits[0, chosen], x, allow_unused=True)
        if g is None:
            raise ModelError(
                f"the logit of class {chosen} does not depend on the maps of {layer}; choose another layer"
            )
        maps, grads = (seen.two_dimensional(t.detach(), place) for t in (x, g))
        if layer is not None:
            members = seen.units.layer_of[place.units.clamp(min=0)]
            own = (place.units >= 0) & (members == seen.units.layer_of[seen.units.filters[layer]][0])
            maps, grads = maps[own], grads[own]
        size = maps.shape[1:]
        cam = grad_cam(maps.flatten(1)[None], grads.flatten(1)[None]).view(1, 1, *size)
        share = float(logits[0].detach().double().softmax(0)[chosen])
    picture = shown_image(image)
    heat = functional.interpolate(cam.float().cpu(), picture.shape[:2], mode="bilinear")[0, 0]
    most = float(heat.max())
    heat = heat / most if most > 0 else heat
    with figure_for(path, 7.6, 4.2) as figure:
        left, right = figure.subplots(1, 2)
        _image(left, picture)
        left.set_title("image")
        grey = picture.mean(2, keepdim=True).expand(-1, -1, 3)
        _image(right, 0.25 + 0.75 * grey)
        # Where nothing speaks for the class, the image shows through.
        alpha = (0.7 * heat.sqrt()).numpy()
        drawn = right.imshow(heat.numpy(), cmap=HEAT, vmin=0, vmax=1, alpha=alpha)
        right.set_title(f"what speaks for class {chosen}")
        right.set_xlabel(
            f"{layer or 'last map'}, {size[0]} x {size[1]} positions; probability {share:.1%}"
            if most > 0
            else "nothing in this layer speaks for it"
        )
        _bar(figure, right, drawn, "Grad-CAM, relative to its largest value")


@dataclass(frozen=True)
class ExtremeMaps:
    """What a layer's highest and lowest scored filters make of one image.

    Attributes:
        layer: name of the convolution.
        criterion: by which its filters were scored.
        highest, lowest: indices of filters, the most extreme first.
        scores: (filters,) of all its filters.
        maps: filter -> (H, W) of its map as it is handed on, negative values as zero.
    """

    layer: str
    criterion: str
    highest: tuple[int, ...]
    lowest: tuple[int, ...]
    scores: torch.Tensor
    maps: dict[int, torch.Tensor]


def extreme_maps(
    model: nn.Module, scores: Scores, layers: Sequence[str], image: torch.Tensor, *, count: int = 6
) -> list[ExtremeMaps]:
    """What the extreme filters of some layers make of an image, from one pass; see `filter_maps`."""
    if not isinstance(count, int) or count < 1:
        raise InputError(f"count must be a whole number of at least 1, got {count!r}")
    with _seen(model, image) as seen:
        return [_extremes(seen, scores, layer, count) for layer in layers]


def _extremes(seen: _Seen, scores: Scores, layer: str, count: int) -> ExtremeMaps:
    place = seen.place_of(layer)
    units = seen.units.filters[layer]
    if layer not in scores or len(scores[layer]) != len(units):
        raise InputError(
            f"the scores are not of this model: they have {_filters(scores, layer)} for {layer!r}, "
            f"and the model has {len(units)}"
        )
    maps = seen.two_dimensional(seen.captured.maps[place].detach(), place).relu().float().cpu()
    values = scores[layer]
    channel = {int(unit): index for index, unit in reversed(list(enumerate(place.units)))}
    order = [i for i in values.argsort(descending=True).tolist() if int(units[i]) in channel]
    count = min(count, max(1, len(order) // 2))
    highest, lowest = order[:count], order[::-1][:count]
    chosen = {i: maps[channel[int(units[i])]] for i in (*highest, *lowest)}
    return ExtremeMaps(layer, scores.criterion, tuple(highest), tuple(lowest), values, chosen)


def filter_maps(
    model: nn.Module,
    scores: Scores,
    layer: str,
    image: torch.Tensor,
    path: Path,
    *,
    count: int = 6,
) -> None:
    """Draws an image and what a layer's highest and lowest scored filters make of it.

    The maps are those that are handed on (in most networks after the ReLU), negative values drawn as zero,
    all on one scale.

    Args:
        model: the model that was scored.
        scores: what `attribute` gave for it.
        layer: name of one of its convolutions.
        image: (C, H, W) or (1, C, H, W), as the model takes it.
        path: file to write; its ending (.png, .svg, .pdf) gives the format.
        count: how many of the highest, and of the lowest.

    Raises:
        InputError: the image, the layer or the count is not usable, or the scores are another model's.
        BackendError: matplotlib is not installed.
    """
    (seen,) = extreme_maps(model, scores, [layer], image, count=count)
    draw_maps(seen, image, path)


def draw_maps(seen: ExtremeMaps, image: torch.Tensor, path: Path) -> None:
    """Draws what `extreme_maps` gave for a layer, beside the image (C, H, W)."""
    rows = [("highest", seen.highest), ("lowest", seen.lowest)]
    picture = shown_image(image)
    most = max(float(seen_map.max()) for seen_map in seen.maps.values())
    count = len(seen.highest)
    with figure_for(path, 3.6 + 1.35 * count, 3.9) as figure:
        grid = figure.add_gridspec(2, count + 1, width_ratios=[2.1] + [1.0] * count)
        axes = figure.add_subplot(grid[:, 0])
        _image(axes, picture)
        axes.set_title("image")
        small = []
        for line, (name, row) in enumerate(rows):
            for column, index in enumerate(row, start=1):
                axes = figure.add_subplot(grid[line, column])
                drawn = axes.imshow(seen.maps[index].numpy(), cmap=HEAT, vmin=0, vmax=most or 1.0)
                _bare(axes)
                axes.set_xlabel(f"{index}: {float(seen.scores[index]):.3g}", fontsize=8)
                if column == 1:
                    axes.set_title(" ")  # makes room; the text itself must not widen the column
                    heading = axes.annotate(
                        f"{name} {seen.criterion}, {seen.layer}",
                        (0, 1),
                        xycoords="axes fraction",
                        xytext=(0, 6),
                        textcoords="offset points",
                        fontweight="bold",
                    )
                    heading.set_in_layout(False)
                small.append(axes)
        _bar(figure, small, drawn, "activation")


def _filters(scores: Scores, layer: str) -> str:
    return f"{len(scores[layer])} filters" if layer in scores else "no filter"


@dataclass(frozen=True)
class _Seen:
    """What the model made of one image."""

    units: Units
    captured: Captured

    def last(self) -> Place:
        """The last map that has positions, if there is one."""
        places = list(self.captured.maps)
        wide = [p for p in places if self.captured.maps[p].numel() > len(p.units)]
        if not places:
            raise InputError("no layer of the model reads another's maps, so there is nothing to draw")
        return (wide or places)[-1]

    def place_of(self, layer: str) -> Place:
        """Where the filters of a convolution are first handed on."""
        if layer not in self.units.filters:
            raise InputError(
                f"{layer!r} is no scored convolution; known: {', '.join(self.units.filters)}"
            )
        weight = Param(f"{layer}.weight")
        calls = self.captured.recording.record.calls
        first = next((c.index for c in calls if argument(c, 1, "weight") == weight), len(calls))
        members = self.units.filters[layer]
        for place in self.captured.maps:
            if place.call >= first and bool(torch.isin(members, place.units).any()):
                return place
        raise InputError(
            f"nothing reads the maps of {layer!r} in this pass, so there is nothing to draw"
        )

    def two_dimensional(self, x: torch.Tensor, place: Place) -> torch.Tensor:
        """(C, H, W)."""
        maps = by_channel(x, place.dim, 1)
        if maps.dim() != 4:
            raise InputError(
                f"pictures show maps of two dimensions, and these have shape {tuple(maps.shape[2:])}"
            )
        return maps[0]


@contextmanager
def _seen(model: nn.Module, image: torch.Tensor) -> Iterator[_Seen]:
    """Runs the model on one image, with gradients."""
    device = resolve_device(model, None)
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper hides every call
    single = isinstance(image, torch.Tensor) and image.dim() in (3, 4)
    if not single or (image.dim() == 4 and len(image) != 1):
        what = f"shape {tuple(image.shape)}" if isinstance(image, torch.Tensor) else type(image).__name__
        raise InputError(f"image must be one tensor (C, H, W) or (1, C, H, W), got {what}")
    image = image.reshape(1, *image.shape[-3:])
    batch = unpack((image, torch.zeros(1, dtype=torch.int64)), device)
    with (
        preserved(model),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
    ):
        model.eval()
        found = discover(model, batch.args)
        captured = FeatureMaps(model, found).capture(batch, lambda part: part.feed(model))
        yield _Seen(found.units, captured)


def shown_image(image: torch.Tensor) -> torch.Tensor:
    """(H, W, 3) from 0 to 1: colours, or grey where there are other than three channels."""
    values = image.detach().reshape(image.shape[-3:]).float().cpu()
    low, high = values.aminmax()
    values = (values - low) / (high - low) if high > low else torch.zeros_like(values)
    if len(values) != 3:
        values = values.mean(0, keepdim=True).expand(3, -1, -1)
    return values.movedim(0, 2)


def _bare(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def _image(axes: Axes, picture: torch.Tensor) -> None:
    axes.imshow(picture.numpy())
    _bare(axes)
    axes.xaxis.label.set_color(MUTED)


def _bar(figure: Figure, beside: Axes | list[Axes], drawn: AxesImage, label: str) -> None:
    bar = figure.colorbar(drawn, ax=beside, fraction=0.05, pad=0.03, label=label)
    bar.outline.set_visible(False)
