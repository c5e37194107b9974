"""Our layer and neuron gradients are Captum's, number by number."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import family, images_for, lived_in
from small_networks import CLASSES, Plain, Reused, SeveralInputsAndOutputs
from torch import nn

from attrfast import InputError
from attrfast.errors import NoGradientError
from attrfast.integrations.captum import LayerGradientXActivation, NeuronGradient

attr = pytest.importorskip("captum.attr", reason="needs captum")


def network() -> nn.Module:
    torch.manual_seed(0)
    return lived_in(Plain()).double()


def images(samples: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(samples, 3, 16, 16, generator=generator).double()


def assert_close(found: Any, expected: Any) -> None:
    if isinstance(expected, (tuple, list)):
        assert type(found) is type(expected)
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other)
    else:
        assert not found.requires_grad
        torch.testing.assert_close(found, expected.detach(), rtol=1e-10, atol=1e-12)


TARGETS = [
    2,
    torch.tensor(3),
    torch.tensor([1]),
    torch.tensor([0, 3, 1, 2]),
    [4, 0, 0, 1],
    (2,),
    [(0,), (3,), (1,), (2,)],
]


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_targets_of_every_kind(target: Any) -> None:
    model = network()
    layer = model.features[4]
    expected = attr.LayerGradientXActivation(model, layer).attribute(images(), target)
    assert_close(LayerGradientXActivation(model, layer).attribute(images(), target), expected)


@pytest.mark.parametrize("at_input", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("multiply", [False, True])
def test_every_layer_in_one_pass(at_input: bool, training: bool, multiply: bool) -> None:
    """Layers that are overwritten by the ReLU after them, layers within layers, the last one too."""
    model = network().train(training)
    layers = [m for m in model.modules() if m is not model]
    theirs = attr.LayerGradientXActivation(model, layers, multiply_by_inputs=multiply)
    expected = theirs.attribute(images(), 1, attribute_to_layer_input=at_input)
    ours = LayerGradientXActivation(model, layers, multiply_by_inputs=multiply)
    assert_close(ours.attribute(images(), 1, attribute_to_layer_input=at_input), expected)


def test_residual_network_with_relus_that_are_called_three_times() -> None:
    model = family("resnet50").double()
    layers = [model.relu, model.layer1, model.layer2[0].relu, model.layer2[0].conv3, model.layer4]
    x, target = images_for("resnet50", 2).double(), torch.tensor([1, 4])
    expected = attr.LayerGradientXActivation(model, layers).attribute(x, target)
    assert_close(LayerGradientXActivation(model, layers).attribute(x, target), expected)


def test_one_value_a_filter_is_the_sum_of_its_map() -> None:
    model = network()
    layers = [model.features[0], model.features[5], model.classifier[1]]
    maps = attr.LayerGradientXActivation(model, layers).attribute(images(), 2)
    found = LayerGradientXActivation(model, layers, per_filter=True).attribute(images(), 2)
    assert_close(found, [m.flatten(2).sum(2) if m.dim() > 2 else m for m in maps])


def test_several_inputs_a_function_and_further_arguments() -> None:
    torch.manual_seed(0)
    model = lived_in(SeveralInputsAndOutputs()).double()

    def forward(a: torch.Tensor, b: torch.Tensor, scale: float, head: str) -> torch.Tensor:
        first, second = model(a, b)
        return scale * {"first": first, "second": second}[head]

    inputs, more = (images(), images().flip(0)), (0.5, "first")
    layers = [model.left, model.mix]
    expected = attr.LayerGradientXActivation(forward, layers).attribute(inputs, 1, more)
    assert_close(LayerGradientXActivation(forward, layers).attribute(inputs, 1, more), expected)
    with pytest.raises(NoGradientError, match="does not depend on layer 1"):
        LayerGradientXActivation(forward, layers).attribute(inputs, 1, (0.5, "second"))


def test_outputs_that_are_maps() -> None:
    model = network()
    layers = [model.features[0], model.features[7]]
    forward = model.features[:9]
    for target in ((1, 2, 3), [(0, 1, 2), (1, 0, 0), (0, 3, 3), (1, 2, 1)]):
        expected = attr.LayerGradientXActivation(forward, layers).attribute(images(), target)
        assert_close(LayerGradientXActivation(forward, layers).attribute(images(), target), expected)


def some_of_a_map(t: torch.Tensor) -> torch.Tensor:
    return t[:, 1].square().sum((1, 2))


@pytest.mark.parametrize(
    ("layer", "selector", "at_input"),
    [
        ("features.7", (3, 2, 2), False),
        ("features.7", (3, 2, 2), True),
        ("features.7", (slice(0, 2), 1, 1), False),
        ("features.5", some_of_a_map, False),  # overwritten by the ReLU after it
        ("classifier.1", 5, False),
        ("classifier.1", (5,), True),
    ],
)
def test_neurons(layer: str, selector: Any, at_input: bool) -> None:
    model = network()
    place = model.get_submodule(layer)
    options = {"attribute_to_neuron_input": at_input}
    x = images().requires_grad_()
    expected = attr.NeuronGradient(model, place).attribute(x, selector, **options)
    assert_close(NeuronGradient(model, place).attribute(images(), selector, **options), expected)


def test_neurons_of_several_layers() -> None:
    torch.manual_seed(0)
    model = lived_in(Reused()).double()
    layers, selectors = [model.stem, model.side], [(0, 3, 3), (2, 1, 1)]
    expected = [
        attr.NeuronGradient(model, layer).attribute(images().requires_grad_(), selector)
        for layer, selector in zip(layers, selectors, strict=True)
    ]
    assert_close(NeuronGradient(model, layers).attribute(images(), selectors), expected)
    with pytest.raises(InputError, match="as many selectors"):
        NeuronGradient(model, layers).attribute(images(), (0, 3, 3))


def test_the_model_is_left_alone() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    x = images()
    LayerGradientXActivation(model, list(model.features)).attribute(x, 0)
    NeuronGradient(model, model.features[0]).attribute(x, (0, 0, 0))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not x.requires_grad
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("target", "named"),
    [(CLASSES, "does not fit"), ([0, 1], "2 targets for 4"), (None, "one number a sample")],
)
def test_targets_without_meaning(target: Any, named: str) -> None:
    model = network()
    with pytest.raises(InputError, match=named):
        LayerGradientXActivation(model, model.features[0]).attribute(images(), target)


def test_layers_that_are_not_called_are_named() -> None:
    model = network()
    layers = [model.features[0], nn.Conv2d(1, 1, 1)]
    for call in (
        lambda: LayerGradientXActivation(model, layers).attribute(images(), 0),
        lambda: NeuronGradient(model, layers).attribute(images(), [(0, 0, 0), (0, 0, 0)]),
    ):
        with pytest.raises(InputError, match=r"layer 1 \(Conv2d\) was not called"):
            call()
    with pytest.raises(InputError, match="must be a module"):
        LayerGradientXActivation(model, ["features.0"])  # type: ignore[list-item]
