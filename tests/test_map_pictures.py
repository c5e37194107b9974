"""Pictures of attribution show what a plain computation with hooks finds, and leave the model alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from families import lived_in
from small_networks import CLASSES, Plain
from torch import nn
from torch.nn import functional

import attrfast
from attrfast import pictures
from attrfast.errors import InputError

matplotlib = pytest.importorskip("matplotlib")


def made() -> Any:
    torch.manual_seed(0)
    return lived_in(Plain())


def image() -> torch.Tensor:
    return torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(1))


def scored(model: nn.Module) -> attrfast.Scores:
    x = torch.stack([image(), -image()])
    return attrfast.attribute(model, [(x, torch.tensor([0, 1]))], "attribution", progress=False)


def maps_by_hook(model: Any, label: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Outputs of the ReLUs among the convolutions, and the gradients of a logit there, each (C, H, W)."""
    model, kept = copy.deepcopy(model).eval(), []
    for module in model.features:
        if isinstance(module, nn.ReLU):
            module.inplace = False
            module.register_forward_hook(lambda _, __, out: kept.append(out))
    grads = torch.autograd.grad(model(image()[None])[0, label], kept)
    return [a[0].detach() for a in kept], [g[0] for g in grads]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Every array that is shown as an image, in order."""
    from matplotlib.axes import Axes

    shown: list[torch.Tensor] = []
    show = Axes.imshow

    def kept(self: Any, array: Any, *args: Any, **options: Any) -> Any:
        shown.append(torch.as_tensor(array))
        return show(self, array, *args, **options)

    monkeypatch.setattr(Axes, "imshow", kept)
    return shown


@pytest.mark.parametrize(("layer", "index"), [(None, 2), ("features.4", 1)])
def test_attribution_map_shows_grad_cam(
    tmp_path: Path, drawn: list[torch.Tensor], layer: str | None, index: int
) -> None:
    model = made()
    pictures.attribution_map(model, image(), 3, tmp_path / "map.png", layer=layer)
    maps, grads = maps_by_hook(model, 3)
    alpha = grads[index].mean((1, 2))
    cam = sum(w * a for w, a in zip(alpha, maps[index], strict=True)).clamp(min=0)
    expected = functional.interpolate(cam[None, None], (16, 16), mode="bilinear")[0, 0]
    assert float(expected.max()) > 0
    torch.testing.assert_close(drawn[-1], expected / expected.max(), rtol=1e-4, atol=1e-5)
    assert (tmp_path / "map.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_attribution_map_takes_the_predicted_class(tmp_path: Path) -> None:
    model = made()
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        pictures.attribution_map(model, image()[None], None, tmp_path / "map.svg")
    predicted = int(model(image()[None]).argmax())
    assert f"what speaks for class {predicted}" in (tmp_path / "map.svg").read_text()


def test_filter_maps_shows_the_highest_and_the_lowest(tmp_path: Path, drawn: list[torch.Tensor]) -> None:
    model = made()
    scores = scored(model)
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        pictures.filter_maps(model, scores, "features.4", image(), tmp_path / "f.svg", count=3)
    maps, _ = maps_by_hook(model, 0)
    order = sorted(range(16), key=lambda i: -float(scores["features.4"][i]))
    chosen = [*order[:3], *order[::-1][:3]]
    assert len(drawn) == 1 + 6
    for got, index in zip(drawn[1:], chosen, strict=True):
        torch.testing.assert_close(got, maps[1][index], rtol=1e-4, atol=1e-5)
    text = (tmp_path / "f.svg").read_text()
    for index in chosen:
        assert f"{index}: {float(scores['features.4'][index]):.3g}" in text


def test_a_layer_with_few_filters_is_shown_once(tmp_path: Path, drawn: list[torch.Tensor]) -> None:
    model = made()
    pictures.filter_maps(model, scored(model), "features.0", image(), tmp_path / "f.png", count=50)
    assert len(drawn) == 1 + 8


def test_score_distributions_show_every_unit_before_and_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.axes import Axes

    dots: list[list[float]] = []
    scatter = Axes.scatter

    def kept(self: Any, x: Any, y: Any, **options: Any) -> Any:
        dots.append(list(x))
        return scatter(self, x, y, **options)

    monkeypatch.setattr(Axes, "scatter", kept)
    model = made()
    with torch.no_grad():
        model.features[1].weight[:2] = 0.0
        model.features[1].bias[:2] = -1.0  # two filters never respond
    scores = scored(model)
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        pictures.score_distributions(scores, tmp_path / "s.svg")
    text = (tmp_path / "s.svg").read_text()
    for expected in ("attribution, as measured", "L2-normalised", "2 at 0", *scores):
        assert expected in text
    assert [v for row in dots[:3] for v in row] == [v for v in scores.raw.tolist() if v]
    assert [v for row in dots[3:] for v in row] == scores.importance.tolist()


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = made().train()
    scores = scored(model)
    before = {name: t.detach().clone() for name, t in model.state_dict().items()}
    versions = {name: t._version for name, t in model.state_dict(keep_vars=True).items()}
    state = torch.get_rng_state()
    with torch.inference_mode():
        pictures.attribution_map(model, image(), 0, tmp_path / "a.png")
    with torch.no_grad():
        pictures.filter_maps(model, scores, "features.0", image(), tmp_path / "b.png")
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert {n: t._version for n, t in model.state_dict(keep_vars=True).items()} == versions
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(module.training and not module._forward_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    model, path = made(), tmp_path / "picture.png"
    scores = scored(model)
    other = lived_in(Plain(width=6))
    sequence = nn.Sequential(
        nn.Conv2d(3, 4, 1),
        nn.Flatten(2),
        nn.Conv1d(4, 4, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(1016, 5),
    )
    cases: list[tuple[str, Any]] = [
        ("image must be one tensor", lambda: pictures.attribution_map(model, image()[0], 0, path)),
        (
            "image must be one tensor",
            lambda: pictures.attribution_map(model, torch.randn(2, 3, 16, 16), 0, path),
        ),
        (f"label {CLASSES}", lambda: pictures.attribution_map(model, image(), CLASSES, path)),
        (
            "no scored convolution",
            lambda: pictures.attribution_map(model, image(), 0, path, layer="classifier.1"),
        ),
        ("no scored convolution", lambda: pictures.filter_maps(model, scores, "x", image(), path)),
        ("count", lambda: pictures.filter_maps(model, scores, "features.0", image(), path, count=0)),
        ("not of this model", lambda: pictures.filter_maps(other, scores, "features.0", image(), path)),
        ("two dimensions", lambda: pictures.attribution_map(sequence, image(), 0, path)),
    ]
    for message, draw in cases:
        with pytest.raises(InputError, match=message):
            draw()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    with pytest.raises(InputError, match="nothing to draw"):
        pictures.score_distributions(scored(model), path)
    assert not path.exists()
