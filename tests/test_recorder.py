"""What `ScoreRecorder` sees of a user's own loop, and that the loop does not notice."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import family, images_for, lived_in
from small_networks import CLASSES, NETWORKS, Plain, Reused
from torch import nn
from torch.nn import functional
from torch.nn.modules import module as hooks
from torch.utils.checkpoint import checkpoint

import attrfast
from attrfast import InputError, ModelError, NumericalError, ScoreRecorder, recording

BATCHES = 2
TOLERANCE = 1e-10  # float64; sums are taken in another order


def network(make: Callable[[], nn.Module] = Plain) -> nn.Module:
    torch.manual_seed(0)
    return lived_in(make()).double()


def loader(samples: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(samples, 3, 16, 16, generator=generator).double(), torch.arange(samples) % CLASSES)
        for _ in range(BATCHES)
    ]


def run(model: nn.Module, data: list[Any], **options: Any) -> None:
    for images, labels in data:
        functional.cross_entropy(model(images), labels, **options).backward()


def assert_same(found: attrfast.Scores, expected: attrfast.Scores) -> None:
    assert list(found) == list(expected)
    torch.testing.assert_close(found.raw, expected.raw, rtol=TOLERANCE, atol=1e-14)
    torch.testing.assert_close(found.importance, expected.importance, rtol=1e-9, atol=1e-12)
    assert found.samples == expected.samples
    assert float(found.raw.max()) > 0


# -- the numbers -------------------------------------------------------------------------------------


@pytest.fixture(params=[recording.FUSED_FROM, 0], ids=["by taps", "by ReLUs"])
def fused_from(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "FUSED_FROM", request.param)


@pytest.mark.usefixtures("fused_from")
@pytest.mark.parametrize("name", NETWORKS)
def test_an_evaluation_loop_gives_what_attribute_gives(name: str) -> None:
    make, inputs = NETWORKS[name]
    model = network(make)
    images = tuple(x.double() for x in inputs(4))
    labels = torch.arange(4) % CLASSES
    expected = attrfast.attribute(model, [(images, labels)], progress=False)
    with ScoreRecorder(model) as recorder:
        output = model(*images)
        output = output[0] if isinstance(output, tuple) else output
        functional.cross_entropy(output, labels).backward()
    assert_same(recorder.scores(), expected)


@pytest.mark.usefixtures("fused_from")
@pytest.mark.parametrize("reduction", ["abs_sample", "sq_sample", "signed_batch", "abs_element"])
@pytest.mark.parametrize("loss", ["mean", "sum"])
def test_reductions_and_losses(reduction: str, loss: str) -> None:
    model, data = network(), loader()
    expected = attrfast.attribute(model, data, reduction=reduction, progress=False)
    with ScoreRecorder(model, reduction=reduction, loss=loss) as recorder:
        run(model, data, reduction=loss)
    assert_same(recorder.scores(), expected)


def test_units_from_an_earlier_call_are_used() -> None:
    model, data = network(), loader()
    expected = attrfast.attribute(model, data, "taylor_fo", progress=False)
    with ScoreRecorder(model, "taylor_fo", units=expected.units) as recorder:
        run(model, data)
    assert_same(recorder.scores(), expected)
    assert recorder.scores().units is expected.units


# -- the loop does not notice ------------------------------------------------------------------------


def trained(make: Callable[[], nn.Module], data: list[Any], recorded: bool) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    model = make().train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with ScoreRecorder(model) if recorded else contextlib.nullcontext() as recorder:
        for images, labels in data:
            optimiser.zero_grad()
            loss = functional.cross_entropy(model(images), labels)
            loss.backward()
            optimiser.step()
    if recorder is not None:
        assert recorder.samples == sum(len(labels) for _, labels in data)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    grads = {f"{n}.grad": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {**state, **grads, "loss": loss.detach(), "random": torch.get_rng_state()}


class WithDropout(Plain):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(functional.dropout(x, 0.2, self.training))


class OfViews(Plain):
    """A ReLU in place of a part of a tensor, and one whose output is passed on in parts."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.features[:2](x)
        x = torch.cat([x[:, :4].relu_(), torch.relu(x[:, 4:])], 1)
        return self.classifier(self.features[3:](x))


@pytest.mark.usefixtures("fused_from")
@pytest.mark.parametrize(
    "make",
    [Plain, Reused, WithDropout, OfViews, functools.partial(family, "densenet121")],
    ids=["plain", "reused", "dropout", "views", "densenet"],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_training_is_the_same_to_the_last_bit(
    make: Callable[[], nn.Module], layout: torch.memory_format
) -> None:
    images = [images_for("densenet121", 4, seed).to(memory_format=layout) for seed in (1, 2)]
    data = [(x, torch.arange(4) % CLASSES) for x in images]

    def laid_out() -> nn.Module:
        return make().to(memory_format=layout)

    plain, recorded = trained(laid_out, data, False), trained(laid_out, data, True)
    assert plain.keys() == recorded.keys()
    assert [name for name in plain if not torch.equal(plain[name], recorded[name])] == []


def test_nothing_is_left_on_the_model_nor_in_pytorch() -> None:
    model = network()
    before = [(sorted(vars(m)), len(m._forward_hooks), m.training) for m in model.modules()]
    count = len(hooks._global_forward_hooks), len(hooks._global_forward_pre_hooks)
    with ScoreRecorder(model):
        run(model, loader())
        within = [(sorted(vars(m)), len(m._forward_hooks), m.training) for m in model.modules()]
        copy.deepcopy(model)(loader()[0][0])  # as for a moving average: no part of the record
    assert within == before
    assert (len(hooks._global_forward_hooks), len(hooks._global_forward_pre_hooks)) == count
    with pytest.raises(RuntimeError, match="user"), ScoreRecorder(model):
        raise RuntimeError("the user's own")
    assert len(hooks._global_forward_hooks) == count[0]


# -- loops of many kinds -------------------------------------------------------------------------------


def test_passes_without_gradients_or_without_backward_leave_no_trace() -> None:
    model, data = network(), loader()
    expected = attrfast.attribute(model, data, progress=False)
    with ScoreRecorder(model) as recorder:
        for images, labels in data:
            with torch.no_grad():
                model(images)
            with torch.inference_mode():
                model(images)
            model(images)  # its graph goes at once
            functional.cross_entropy(model(images), labels).backward()
            model.features(images).sum().backward()  # not the model's own pass
    assert_same(recorder.scores(), expected)
    run(model, data)  # after the block
    assert recorder.scores().samples == expected.samples


@pytest.mark.usefixtures("fused_from")
def test_several_forward_passes_before_one_backward_pass() -> None:
    model, data = network(), loader()
    expected = attrfast.attribute(model, data, progress=False)
    with ScoreRecorder(model, loss="sum") as recorder:
        losses = [functional.cross_entropy(model(x), y, reduction="sum") for x, y in data]
        torch.stack(losses).sum().backward()
    assert_same(recorder.scores(), expected)


@pytest.mark.usefixtures("fused_from")
def test_two_backward_passes_through_one_forward_pass_add_up() -> None:
    model, data = network(), loader()
    expected = attrfast.attribute(model, data, progress=False)
    with ScoreRecorder(model) as recorder:
        for images, labels in data:
            loss = functional.cross_entropy(model(images), labels)
            (0.25 * loss).backward(retain_graph=True)
            torch.autograd.grad(0.75 * loss, list(model.parameters()))
    assert_same(recorder.scores(), expected)


def test_gradient_accumulation() -> None:
    model, data = network(), loader()
    expected = attrfast.attribute(model, data, progress=False)
    with ScoreRecorder(model, divided_by=BATCHES) as recorder:
        for images, labels in data:
            (functional.cross_entropy(model(images), labels) / BATCHES).backward()
    assert_same(recorder.scores(), expected)


def test_a_gradient_scaler_is_undone_and_its_overflows_are_left_out() -> None:
    model, data = network(), loader()
    expected = attrfast.attribute(model, data, progress=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**7)
    with ScoreRecorder(model, grad_scaler=scaler) as recorder:
        for images, labels in data:
            (functional.cross_entropy(model(images), labels) * float("inf")).backward()
            scaler.scale(functional.cross_entropy(model(images), labels)).backward()
    assert_same(recorder.scores(), expected)
    assert recorder.skipped == BATCHES


def test_a_gradient_that_is_not_finite_is_reported() -> None:
    model, data = network(), loader()
    with ScoreRecorder(model) as recorder:
        (functional.cross_entropy(model(data[0][0]), data[0][1]) * float("nan")).backward()
    with pytest.raises(NumericalError, match="not finite"):
        recorder.scores()


def test_autocast() -> None:
    model = network().float()
    data = [(images.float(), labels) for images, labels in loader()]
    expected = attrfast.attribute(model, data, amp_dtype=torch.bfloat16, progress=False)
    with ScoreRecorder(model) as recorder:
        for images, labels in data:
            with torch.autocast("cpu", torch.bfloat16):
                loss = functional.cross_entropy(model(images), labels)
            loss.backward()
    torch.testing.assert_close(recorder.scores().importance, expected.importance, rtol=0.1, atol=0.02)


class Checkpointed(Plain):
    reentrant = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.features[:4](x)
        return self.classifier(checkpoint(self.features[4:], x, use_reentrant=self.reentrant))


@pytest.mark.usefixtures("fused_from")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_are_measured_when_they_run_again(
    reentrant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpointed, "reentrant", reentrant)
    expected = attrfast.attribute(network(), loader(), progress=False)
    model = network(Checkpointed)
    with ScoreRecorder(model) as recorder:
        run(model, loader())
    assert_same(recorder.scores(), expected)
    with ScoreRecorder(model), pytest.raises(ModelError, match="one forward pass at a time"):
        sum(functional.cross_entropy(model(x), y) for x, y in loader()).backward()  # type: ignore[union-attr]


def test_frozen_layers_are_scored_too() -> None:
    model, data = network(), loader()
    expected = attrfast.attribute(model, data, progress=False)
    model.features.requires_grad_(False)
    with ScoreRecorder(model) as recorder:
        run(model, data)
    assert_same(recorder.scores(), expected)
    assert all(p.grad is None for p in model.features.parameters())


class Keywords(Plain):
    def forward(self, *, pixels: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": functional.cross_entropy(super().forward(pixels), labels)}


def test_a_model_that_computes_its_own_loss_from_keywords() -> None:
    expected = attrfast.attribute(network(), loader(), progress=False)
    model = network(Keywords)
    with ScoreRecorder(model) as recorder:
        for images, labels in loader():
            model(pixels=images, labels=labels)["loss"].backward()
    assert_same(recorder.scores(), expected)


# -- what is refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"criterion": "attribution"}, "training loss"),
        ({"criterion": "taylor_guided"}, "training loss"),
        ({"criterion": "l1"}, "training loss"),
        ({"loss": "median"}, "'mean' or 'sum'"),
        ({"divided_by": 0}, "positive"),
        ({"reduction": "mode"}, "reduction"),
        ({"normalize": "l3"}, "normalize"),
    ],
)
def test_options_that_have_no_meaning(options: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        ScoreRecorder(network(), **options)


def test_compiled_models_and_nested_use_are_refused() -> None:
    model = network()
    with pytest.raises(InputError, match=r"before torch\.compile"):
        ScoreRecorder(torch.compile(model))
    recorder = ScoreRecorder(model)
    with recorder, pytest.raises(InputError, match="in use already"):
        recorder.__enter__()
    with pytest.raises(InputError, match="nothing was recorded"):
        recorder.scores()


def test_a_model_that_is_pruned_meanwhile_is_refused() -> None:
    model, data = network(), loader()
    with ScoreRecorder(model) as recorder:
        run(model, data)
        model.features[7].weight = nn.Parameter(model.features[7].weight.detach().clone())
        run(model, data)  # other memory, the same shape
        model.features[7].weight = nn.Parameter(model.features[7].weight.detach()[:3])
        with pytest.raises(ModelError, match="new ScoreRecorder"):
            model(data[0][0])
    assert recorder.scores().samples == 2 * BATCHES * 4


def test_a_relu_measures_what_its_one_reader_takes_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """And leaves it to the reader where others take in its output too."""
    measured = []
    flow = recording.Flow
    add_sums = flow.add_sums

    def seen(self: Any, columns: Any, sums: torch.Tensor) -> None:
        measured.append(tuple(sums.shape))
        add_sums(self, columns, sums)

    monkeypatch.setattr(flow, "add_sums", seen)
    monkeypatch.setattr(recording, "FUSED_FROM", 0)
    for make, expected in ((Plain, [(4, 16)]), (Reused, [])):
        measured.clear()
        model = network(make)
        with ScoreRecorder(model):
            run(model, loader()[:1])
        assert measured == expected
