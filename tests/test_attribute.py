"""What `attribute` does with models, loaders and options, and what it leaves alone."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from definition import importance, layer_error, logit_of_label, score_matrix
from families import lived_in
from small_networks import CLASSES, Plain, Reused, SeveralInputsAndOutputs
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import attrfast
from attrfast.criteria.reductions import REDUCTIONS

SAMPLES = 12
# Splitting a batch changes the order of sums and the convolutions' blocking, no more.
SPLIT_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return lived_in(Plain()).to(dtype)


def data(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(SAMPLES, 3, 16, 16, generator=generator, dtype=torch.float64).to(dtype)
    return images, torch.arange(SAMPLES) % CLASSES


def score(model: nn.Module, loader: Any, **options: Any) -> attrfast.Scores:
    return attrfast.attribute(model, loader, progress=False, **options)


# -- the model comes back as it was ------------------------------------------------------------------


def snapshot(model: nn.Module) -> dict[str, Any]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "values": {name: t.detach().clone() for name, t in tensors.items()},
        "identity": {name: (id(t), t._version) for name, t in tensors.items()},
        "grads": {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()},
        "flags": [(p.requires_grad) for p in model.parameters()],
        "training": [m.training for m in model.modules()],
        "hooks": [
            (
                list(m._forward_hooks),
                list(m._forward_pre_hooks),
                list(m._backward_hooks),
                list(m._backward_pre_hooks),
                [list(p._backward_hooks or ()) for p in m.parameters()],
            )
            for m in model.modules()
        ],
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "rng": torch.get_rng_state(),
    }


def assert_equal_trees(a: Any, b: Any) -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal_trees(a[key], b[key])
    else:
        assert a == b


@pytest.mark.parametrize("criterion", attrfast.criterion_names())
@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_bit_identical_afterwards(criterion: str, training: bool) -> None:
    model = network().train(training)
    model.features[0].eval()
    model.features.append(nn.Dropout(0.5))  # would draw random numbers in training mode
    for i, p in enumerate(model.parameters()):
        p.requires_grad_(i % 3 > 0)
        if i % 2:
            p.grad = torch.full_like(p, 0.5)
    model.features[1].register_forward_hook(lambda *_: None)
    before = snapshot(model)
    # Some score by training alone, or by batch norms, which a layer here lacks: that too changes nothing.
    refused = criterion in ("bn_scale", "sss", "variational")
    with pytest.raises(attrfast.AttrfastError) if refused else contextlib.nullcontext():
        score(model, [data()], criterion=criterion)
    assert_equal_trees(before, snapshot(model))


def test_a_failing_pass_leaves_the_model_as_it_was() -> None:
    model = network().train()
    before = snapshot(model)
    images, labels = data()
    with pytest.raises(attrfast.NumericalError):
        score(model, [(images, labels), (images * float("nan"), labels)])
    assert_equal_trees(before, snapshot(model))


# -- loaders ----------------------------------------------------------------------------------------------


class _Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from zip(*data(), strict=True)


def test_every_kind_of_loader_gives_the_same_scores() -> None:
    model = network()
    images, labels = data()
    pairs = [(images[i : i + 4], labels[i : i + 4]) for i in (0, 4, 8)]
    expected = score(model, pairs)
    loaders = {
        "tuple": tuple(pairs),
        "generator": (pair for pair in pairs),
        "lists in pairs": [list(pair) for pair in pairs],
        "more than pairs": [(*pair, "a note") for pair in pairs],
        "DataLoader": DataLoader(TensorDataset(images, labels), batch_size=4),
        "IterableDataset": DataLoader(_Stream(), batch_size=4),
        "keyword inputs": [({"x": x}, y) for x, y in pairs],
        "int32 labels": [(x, y.int()) for x, y in pairs],
    }
    for name, loader in loaders.items():
        got = score(model, loader)
        assert torch.equal(got.importance, expected.importance), name
        assert got.samples == SAMPLES


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_split_batches_give_the_same_scores(dtype: torch.dtype, form: torch.memory_format) -> None:
    model = network(dtype).to(memory_format=form)
    images, labels = data(dtype)
    images = images.to(memory_format=form)
    whole = score(model, [(images, labels)])
    for options, loader in (
        ({"microbatch": 1}, [(images, labels)]),
        ({"microbatch": 5}, [(images, labels)]),
        ({}, [(images[:1], labels[:1]), (images[1:8], labels[1:8]), (images[8:], labels[8:])]),
    ):
        got = score(model, loader, **options)
        assert got.samples == SAMPLES
        assert layer_error(got.importance, whole.importance, whole.units) <= SPLIT_TOLERANCE[dtype]


def test_max_batches_reads_no_more() -> None:
    model = network()
    images, labels = data()
    read = []

    def loader() -> Iterator[Any]:
        for i in range(4):
            read.append(i)
            yield images[3 * i : 3 * i + 3], labels[3 * i : 3 * i + 3]

    got = score(model, loader(), max_batches=2)
    assert got.samples == 6
    assert read == [0, 1]
    assert torch.equal(
        got.importance, score(model, [(images[:3], labels[:3]), (images[3:6], labels[3:6])]).importance
    )


def test_a_samples_row_does_not_depend_on_its_neighbours() -> None:
    """J is a sum: scores of a batch are the mean of those of its parts, whatever their sizes."""
    model = network()
    images, labels = data()
    parts = [score(model, [(images[a:b], labels[a:b])], normalize=None) for a, b in ((0, 2), (2, 12))]
    whole = score(model, [(images, labels)], normalize=None)
    mixed = (2 * parts[0].raw + 10 * parts[1].raw) / 12
    torch.testing.assert_close(whole.raw, mixed, rtol=1e-12, atol=1e-15)


# -- options ------------------------------------------------------------------------------------------------

PLAIN_REDUCTIONS = {
    "abs_sample": lambda s: s.abs().mean(0),
    "sq_sample": lambda s: s.square().mean(0),
    "signed_batch": lambda s: s.sum(0).abs(),
}


@pytest.mark.parametrize("reduction", PLAIN_REDUCTIONS)
def test_reductions_of_the_score_matrix(reduction: str) -> None:
    model = network()
    images, labels = data()
    got = score(
        model,
        [(images[:5], labels[:5]), (images[5:], labels[5:])],
        criterion="attribution",
        reduction=reduction,
        normalize=None,
    )
    matrix = score_matrix(model, (images,), labels, got.units, logit_of_label)
    torch.testing.assert_close(got.raw, PLAIN_REDUCTIONS[reduction](matrix), rtol=1e-10, atol=1e-14)
    assert got.reduction == reduction


def test_signed_batch_is_the_product_of_weights_and_their_gradients() -> None:
    """abs(<W, dJ/dW> + b dJ/db) of a convolution that a ReLU follows, as in widely copied scripts."""
    model = network()
    images, labels = data()
    got = score(model, [(images, labels)], reduction="signed_batch", normalize=None)
    conv = model.features[7]
    assert isinstance(conv, nn.Conv2d)
    functional.cross_entropy(model(images), labels, reduction="sum").backward()
    assert conv.bias is not None
    free = ((conv.weight * conv.weight.grad).flatten(1).sum(1) + conv.bias * conv.bias.grad).abs()
    torch.testing.assert_close(got["features.7"], free, rtol=1e-10, atol=1e-14, check_dtype=False)


@pytest.mark.parametrize(
    ("reader", "producer"), [("features.4", "features.0"), ("features.7", "features.4")]
)
def test_abs_element_sums_absolute_products_at_the_readers(reader: str, producer: str) -> None:
    model = network()
    images, labels = data()
    got = score(model, [(images, labels)], reduction="abs_element", normalize=None)
    read: list[torch.Tensor] = []
    twin = copy.deepcopy(model)

    def keep(_: nn.Module, args: Any) -> Any:
        read.append(args[0].detach().clone().requires_grad_())
        return (read[0],)

    twin.get_submodule(reader).register_forward_pre_hook(keep)
    functional.cross_entropy(twin(images), labels, reduction="sum").backward()
    (x,) = read
    assert x.grad is not None
    expected = (x * x.grad).abs().sum((2, 3)).mean(0).detach()
    torch.testing.assert_close(got[producer], expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(
    ("normalize", "size"),
    [
        ("l2", lambda t: t.square().sum().sqrt()),
        ("mean", lambda t: t.abs().mean()),
        ("max", lambda t: t.abs().max()),
    ],
)
def test_each_layer_is_divided_by_its_own_size(normalize: str, size: Any) -> None:
    got = score(network(), [data()], normalize=normalize)
    for layer in got.units.layers:
        torch.testing.assert_close(
            size(got.importance[list(layer.units)]), torch.tensor(1.0, dtype=torch.float64)
        )
    raw = score(network(), [data()], normalize=None)
    assert torch.equal(raw.raw, got.raw)
    assert torch.equal(raw.importance, raw.raw)


def test_a_layer_that_is_zero_everywhere_stays_zero() -> None:
    model = network()
    with torch.no_grad():
        model.features[4].weight.zero_()  # nothing of features.0 gets through
    got = score(model, [data()])
    assert torch.equal(got["features.0"], torch.zeros(8, dtype=torch.float64))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_autocast_gives_the_scores_to_its_own_precision(dtype: torch.dtype, bound: float) -> None:
    """The bounds are 2^-8 and 2^-11 times the depth of the network, roughly."""
    model, (images, labels) = network(torch.float32), data(torch.float32)
    expected = score(model, [(images, labels)], criterion="attribution")
    got = score(model, [(images, labels)], criterion="attribution", amp_dtype=dtype)
    assert got.importance.dtype == torch.float32
    assert layer_error(got.importance, expected.importance, expected.units) <= bound
    assert not torch.equal(got.importance, expected.importance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_a_narrow_dtype_is_scored(dtype: torch.dtype) -> None:
    wide = network(torch.float32)
    images, labels = data(torch.float32)
    expected = score(wide, [(images, labels)], criterion="attribution")
    got = score(copy.deepcopy(wide).to(dtype), [(images.to(dtype), labels)], criterion="attribution")
    assert got.importance.dtype == torch.float32
    assert layer_error(got.importance, expected.importance, expected.units) <= 0.2


def test_targets_of_attribution() -> None:
    model = network()
    images, labels = data()
    predicted = model(images).argmax(1)
    by_label = score(model, [(images, predicted)], criterion="attribution")
    by_prediction = score(
        model, [(images, labels)], criterion=attrfast.criteria.Attribution("predicted")
    )
    by_callable = score(
        model,
        [(images, labels)],
        criterion=attrfast.criteria.Attribution(lambda logits, _: logits.max(1).values),
    )
    torch.testing.assert_close(by_label.importance, by_prediction.importance, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(by_label.importance, by_callable.importance, rtol=1e-12, atol=1e-15)


def _per_sample(output: Any, batch: Any) -> torch.Tensor:
    return functional.cross_entropy(output, batch[1], reduction="none")


@pytest.mark.parametrize(
    "loss_fn",
    [
        _per_sample,
        lambda output, batch: _per_sample(output, batch).sum(),
        lambda output, batch: _per_sample(output, batch).mean(),
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(reduction="sum"),
    ],
    ids=["one value a sample", "sum", "mean", "a module's mean", "a module's sum"],
)
def test_a_loss_of_ones_own_may_be_given_per_sample_summed_or_averaged(loss_fn: Any) -> None:
    model = network()
    images, labels = data()
    loader = [(images[:7], labels[:7]), (images[7:], labels[7:])]
    expected = score(model, loader, criterion="taylor", normalize=None)
    got = score(model, loader, criterion="taylor", normalize=None, loss_fn=loss_fn)
    torch.testing.assert_close(got.raw, expected.raw, rtol=1e-10, atol=1e-14)


def test_a_model_that_does_not_classify_is_scored_with_its_loss() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 1, 3, padding=1)
    ).double()
    images = torch.randn(4, 1, 8, 8, dtype=torch.float64)

    def loss_fn(output: torch.Tensor, batch: Any) -> torch.Tensor:
        return (output - batch[1]).square().mean((1, 2, 3))

    got = score(model, [(images, images.square())], loss_fn=loss_fn)
    assert list(got) == ["0"]
    assert float(got["0"].norm()) == pytest.approx(1)


def test_several_inputs_go_in_as_a_tuple() -> None:
    torch.manual_seed(0)
    model = SeveralInputsAndOutputs().double()
    a, b = torch.randn(2, 4, 3, 12, 12, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3])
    pair = score(model, [((a, b), labels)])
    named = score(model, [({"a": a, "b": b}, labels)])
    assert torch.equal(pair.importance, named.importance)


def test_a_registered_criterion_is_known_by_name() -> None:
    @attrfast.register_criterion("test_margin")
    class Margin(attrfast.Criterion):
        def objective(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            top = logits.topk(2, dim=1).values
            return top[:, 0] - top[:, 1]

    model, (images, labels) = network(), data()
    got = score(model, [(images, labels)], criterion="test_margin")

    def objective(logits: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        top = logits.topk(2, dim=1).values
        return (top[:, 0] - top[:, 1]).sum()

    matrix = score_matrix(model, (images,), labels, got.units, objective)
    expected = importance(matrix, got.units, lambda s: s.abs().mean(0))
    assert layer_error(got.importance, expected, got.units) <= 1e-10
    assert got.criterion == "test_margin"
    with pytest.raises(attrfast.InputError, match="taken"):
        attrfast.register_criterion("taylor")(Margin)


@pytest.mark.parametrize(("criterion", "power"), [("l1", 1), ("l2", 2)])
def test_weight_norms_cover_all_filters_of_a_unit(criterion: str, power: int) -> None:
    torch.manual_seed(0)
    model = Reused().double()
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    got = score(model, [(images, torch.tensor([0, 1]))], criterion=criterion, normalize=None)
    both = torch.cat([model.stem.weight.flatten(1), model.body.weight.flatten(1)], 1)
    expected = both.detach().abs().pow(power).sum(1).pow(1 / power)
    torch.testing.assert_close(got["stem"], expected)
    torch.testing.assert_close(got["body"], expected)
    assert got.samples == 0


def test_random_depends_on_the_seed_alone() -> None:
    model = network()
    a, b, c = (score(model, [data()], criterion="random", seed=s).importance for s in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_scores_read_like_a_mapping() -> None:
    model = network(torch.float32)
    got = score(model, [data(torch.float32)])
    assert list(got) == ["features.0", "features.4", "features.7"]
    assert {name: tuple(got[name].shape) for name in got} == {
        "features.0": (8,),
        "features.4": (16,),
        "features.7": (16,),
    }
    assert got["features.0"].dtype == torch.float32
    assert score(network(), [data()])["features.0"].dtype == torch.float64
    with pytest.raises(KeyError, match="classifier"):
        got["classifier.1"]
    assert set(REDUCTIONS) >= {got.reduction}


# -- surroundings ------------------------------------------------------------------------------------


@pytest.mark.parametrize("region", [torch.no_grad, torch.inference_mode])
def test_scoring_inside_a_region_without_gradients_works(region: Any) -> None:
    model = network()
    expected = score(model, [data()])
    with region():
        got = score(model, [data()])
    assert torch.equal(got.importance, expected.importance)


def test_scoring_inside_an_autocast_region_is_not_autocast() -> None:
    model = network(torch.float32)
    expected = score(model, [data(torch.float32)])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = score(model, [data(torch.float32)])
    assert torch.equal(got.importance, expected.importance)


def test_a_compiled_model_is_scored_as_the_model_in_it() -> None:
    model = network()
    got = score(torch.compile(model, backend="eager"), [data()])
    assert torch.equal(got.importance, score(model, [data()]).importance)


def test_two_runs_give_the_same_bits() -> None:
    model = network(torch.float32)
    runs = [score(model, [data(torch.float32)]).importance for _ in range(2)]
    assert torch.equal(*runs)
