"""Ways to spend one importance pass, each a small function `(model, batches)`.

All work on a model in eval mode whose parameters require gradients, as a user has it. What they need to
set up, they set up within the call. Those that score return one importance a filter, by convolution.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any
from unittest import mock

import torch
from torch import nn

from benchmarks import floor
from benchmarks.networks import Batches

Stream = Iterable[tuple[torch.Tensor, torch.Tensor]]  # batches that need not all be there at once
Scores = dict[str, torch.Tensor]


def inference(model: nn.Module, batches: Batches) -> None:
    """The forward pass alone: scores nothing."""
    with torch.no_grad():
        for images, _ in batches:
            model(images)


def bare(model: nn.Module, batches: Batches) -> None:
    """Forward and backward with weight gradients, as in training: scores nothing."""
    for images, labels in batches:
        model.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()


def hooks(model: nn.Module, batches: Stream, layers: int | None = None) -> Scores:
    """The common script: a forward hook keeps what each convolution makes, a tensor hook multiplies.

    Importance: mean over samples of abs(sum over positions of activation x gradient).

    Args:
        layers: so many convolutions, the first ones; None: all.
    """
    scores: Scores = {}
    kept: dict[str, torch.Tensor] = {}

    def keep(name: str, _module: nn.Module, _args: object, out: torch.Tensor) -> None:
        kept[name] = out.detach()
        out.register_hook(functools.partial(multiply, name))

    def multiply(name: str, grad: torch.Tensor) -> None:
        flow = (kept[name] * grad).sum((2, 3)).abs().mean(0)
        scores[name] = scores[name] + flow if name in scores else flow

    handles = [
        module.register_forward_hook(functools.partial(keep, name))
        for name, module in _convolutions(model, layers).items()
    ]
    try:
        for images, labels in batches:
            kept.clear()
            model.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
    finally:
        for handle in handles:
            handle.remove()
    return scores


def captum(model: nn.Module, batches: Stream, layers: int | None = None) -> Scores:
    """Captum's LayerGradientXActivation over all convolutions in one call a batch, then reduced.

    Args:
        layers: so many convolutions, the first ones; None: all.
    """
    from captum.attr import LayerGradientXActivation

    watched = _convolutions(model, layers)
    method = LayerGradientXActivation(model, list(watched.values()))
    scores: Scores = {}
    for images, labels in batches:
        maps = method.attribute(images, target=labels)
        for name, flow in zip(watched, maps, strict=True):
            score = flow.detach().sum((2, 3)).abs().mean(0)
            scores[name] = scores[name] + score if name in scores else score
    return scores


def torch_pruning(model: nn.Module, batches: Batches) -> Scores:
    """Torch-Pruning's GroupTaylorImportance: gradients of all batches added up, then every group scored.

    Building the dependency graph is part of it, as finding the units is part of attrfast's pass.
    """
    import torch_pruning as tp

    heads = [module for module in model.modules() if isinstance(module, nn.Linear)]
    graph = tp.DependencyGraph().build_dependency(model, batches[0][0][:2])
    model.zero_grad()
    for images, labels in batches:
        nn.functional.cross_entropy(model(images), labels).backward()
    importance = tp.importance.GroupTaylorImportance()
    names = {id(module): name for name, module in model.named_modules()}
    return {
        names[id(group[0].dep.target.module)]: importance(group)
        for group in graph.get_all_groups(ignored_layers=heads, root_module_types=[nn.Conv2d])
    }


def signed_batch(model: nn.Module, batches: Batches) -> Scores:
    """The score that a training step gives for nothing: abs(<W, dJ/dW> + b dJ/db) of each convolution.

    An honest peer for speed, but another measure: samples cancel before the absolute value is taken.
    """
    scores: Scores = {}
    for images, labels in batches:
        model.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        for name, conv in _convolutions(model).items():
            assert conv.weight.grad is not None
            flow = (conv.weight.detach() * conv.weight.grad).sum((1, 2, 3))
            if conv.bias is not None and conv.bias.grad is not None:
                flow += conv.bias.detach() * conv.bias.grad
            scores[name] = scores[name] + flow if name in scores else flow
    return {name: flow.abs() for name, flow in scores.items()}


def attrfast(model: nn.Module, batches: Stream, **options: Any) -> Scores:
    """attrfast as a user calls it: recording the model and planning are part of the call.

    Args:
        options: of `attrfast.attribute`.
    """
    from attrfast import attribute

    scores = attribute(model, batches, "attribution", progress=False, **options)
    return {name: scores[name] for name in scores}


def call_tier(model: nn.Module, batches: Batches, **options: Any) -> Scores:
    """attrfast without its fused stages: what runs where a model can't be planned."""
    from attrfast import passes, tiers

    plain = functools.partial(tiers.Runner, fused=False)
    with mock.patch.object(passes, "Runner", plain):
        return attrfast(model, batches, **options)


def _convolutions(model: nn.Module, count: int | None = None) -> dict[str, nn.Conv2d]:
    """The first `count` of them, or all."""
    found = ((name, m) for name, m in model.named_modules() if isinstance(m, nn.Conv2d))
    return dict(itertools.islice(found, count))


# In the order in which they run within a round, and stand in tables.
CONTENDERS: dict[str, Callable[..., object]] = {
    "inference": inference,
    "bare": bare,
    "hooks": hooks,
    "captum": captum,
    "torch_pruning": torch_pruning,
    "signed_batch": signed_batch,
    "attrfast (call tier)": call_tier,
    "attrfast": attrfast,
}
NAMES = ("floor", *CONTENDERS)


def prepare(
    name: str, model: nn.Module, batches: Batches, amp_dtype: torch.dtype | None = None
) -> Callable[[], object]:
    """One pass of a contender, ready to be timed.

    Args:
        amp_dtype: forward passes run under autocast in this dtype.
    """
    if name.startswith("attrfast"):
        return functools.partial(CONTENDERS[name], model, batches, amp_dtype=amp_dtype)
    place = batches[0][0].device.type

    def mixed() -> torch.autocast:
        return torch.autocast(place, dtype=amp_dtype, enabled=amp_dtype is not None)

    if name == "floor":
        with mixed():
            return floor.prepare(model, batches)

    def run() -> object:
        with mixed():
            return CONTENDERS[name](model, batches)

    return run
