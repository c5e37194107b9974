"""Every bad input gets an AttrfastError that names the value and the remedy; the model stays whole."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from families import lived_in
from small_networks import CLASSES, Plain
from torch import nn

import attrfast
from attrfast import AttrfastError, BackendError, InputError, ModelError, NumericalError, TargetError


def network() -> nn.Module:
    torch.manual_seed(0)
    return lived_in(Plain()).train()


def data(samples: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.randn(samples, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return images, torch.arange(samples) % CLASSES


@pytest.fixture
def model() -> Iterator[nn.Module]:
    """A model that must not have changed when the test is over."""
    made = network()
    before = copy.deepcopy(made.state_dict())
    yield made
    assert all(torch.equal(before[k], v) for k, v in made.state_dict().items())
    assert made.training
    assert all(p.grad is None and p.requires_grad for p in made.parameters())


def refused(
    kind: type[AttrfastError], pattern: str, model: nn.Module, loader: Any, **options: Any
) -> None:
    """Both entry points refuse, with the same kind of error."""
    scoring = {k: v for k, v in options.items() if k in ("criterion", "loss_fn", "device", "normalize")}
    with pytest.raises(kind, match=pattern):
        attrfast.attribute(model, loader, progress=False, **scoring)
    with pytest.raises(kind, match=pattern):
        attrfast.prune(model, loader, keep_ratio=0.5, finetune=0, progress=False, **options)


# -- loaders and batches -------------------------------------------------------------------------------


def test_an_empty_loader(model: nn.Module) -> None:
    refused(InputError, "gave no batch.*non-empty", model, [])


def test_something_that_is_no_loader(model: nn.Module) -> None:
    refused(InputError, r"iterable of \(input, label\) batches, got int", model, 3)


@pytest.mark.parametrize(
    ("batch", "named"),
    [
        (data()[0], r"tensor of shape \(4, 3, 16, 16\)"),
        ((data()[0],), "tuple of length 1"),
        ({"pixels": 1, "label": 2}, r"dict with keys \['pixels', 'label'\]"),
        ("text", "a str"),
        (("text", 1), "a str"),
        ((data()[0][:0], data()[1][:0]), r"no samples.*\(0, 3, 16, 16\)"),
    ],
    ids=["a tensor", "one thing", "a dict", "text", "text as input", "no samples"],
)
def test_a_batch_that_is_no_pair(model: nn.Module, batch: Any, named: str) -> None:
    refused(InputError, named, model, [batch])


@pytest.mark.parametrize("label", [CLASSES, 99, -1])
def test_a_label_outside_the_outputs(model: nn.Module, label: int) -> None:
    images, labels = data()
    labels[2] = label
    refused(InputError, f"label {label} is outside the model's 5 outputs", model, [(images, labels)])


@pytest.mark.parametrize(
    ("labels", "named"),
    [
        (torch.zeros(4, 5), r"\(4, 5\)"),
        (torch.zeros(3, dtype=torch.int64), r"\(3,\)"),
        (torch.zeros(4), "float32"),
        ([0, 1, 2, 3], "a list"),
    ],
)
def test_labels_of_another_form(model: nn.Module, labels: Any, named: str) -> None:
    refused(InputError, named, model, [(data()[0], labels)])


def test_images_that_the_model_cannot_take(model: nn.Module) -> None:
    refused(
        ModelError,
        r"forward pass failed.*\(2, 1, 16, 16\)",
        model,
        [(torch.zeros(4, 1, 16, 16), data()[1])],
    )


# -- numbers that are not finite ---------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_images_that_are_not_finite(model: nn.Module, bad: float) -> None:
    images, labels = data()
    images[1, 0, 3, 3] = bad
    with pytest.raises(NumericalError, match="first appears in the input"):
        attrfast.attribute(model, [(images, labels)], progress=False)


def test_a_weight_that_is_not_finite_is_named() -> None:
    model = network()
    with torch.no_grad():
        model.features[4].weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(NumericalError, match=r"the parameter features\.4\.weight"):
        attrfast.attribute(model, [data()], progress=False)


def test_the_layer_at_which_an_activation_overflows_is_named() -> None:
    model = network()
    with torch.no_grad():
        model.features[4].weight.fill_(1e38)
    with pytest.raises(NumericalError, match=r"first appears in features\.4 \(conv2d\)"):
        attrfast.attribute(model, [data()], progress=False)


def test_a_gradient_that_is_not_finite_names_the_layer(model: nn.Module) -> None:
    """The loss is zero, where the square root has an infinite slope."""

    def loss_fn(output: torch.Tensor, batch: Any) -> torch.Tensor:
        return (output - output.detach()).abs().sum(1).sqrt()

    with pytest.raises(NumericalError, match=r"gradient at the filters of features\.7 is not finite"):
        attrfast.attribute(model, [data()], loss_fn=loss_fn, progress=False)


def test_a_loss_that_is_not_finite(model: nn.Module) -> None:
    refused(
        NumericalError,
        "objective of 'taylor' is nan",
        model,
        [data()],
        criterion="taylor",
        loss_fn=lambda out, batch: out.sum(1) * float("nan"),
    )


def test_a_loss_that_explodes_in_fine_tuning(model: nn.Module) -> None:
    with pytest.raises(NumericalError, match=r"in epoch \d+ of fine-tuning; lower lr \(1e\+20\)"):
        attrfast.prune(
            model,
            [data()] * 4,
            keep_ratio=0.5,
            finetune=attrfast.FineTune(epochs=3, lr=1e20),
            progress=False,
        )


# -- models -----------------------------------------------------------------------------------------------


def test_no_convolution() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, CLASSES))
    refused(ModelError, "no convolution", model, [data()])


def test_nothing_that_can_be_pruned() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Softmax(1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES)
    )
    with pytest.raises(ModelError, match=r"no layer of the model can be pruned: 0: .*softmax"):
        attrfast.prune(model, [data()], keep_ratio=0.5, progress=False)


def test_everything_ignored(model: nn.Module) -> None:
    with pytest.raises(ModelError, match="`ignore` names all"):
        attrfast.prune(model, [data()], keep_ratio=0.5, ignore=["features"], progress=False)


def test_an_ignored_name_that_does_not_exist(model: nn.Module) -> None:
    with pytest.raises(InputError, match=r"'feature\.4'.*did you mean 'features\.4'"):
        attrfast.prune(model, [data()], keep_ratio=0.5, ignore=["feature.4"], progress=False)


@pytest.mark.parametrize("cut", [lambda x: x.detach(), lambda x: x.data])
def test_a_model_without_gradients(cut: Any) -> None:
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = network()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return cut(self.body(x))

    refused(ModelError, "no gradient.*detach", Cut(), [data()])


def test_a_model_that_runs_without_gradients() -> None:
    class NoGrad(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = network()

        @torch.no_grad()
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(x)

    refused(ModelError, "no gradient.*no_grad", NoGrad(), [data()])


def test_something_that_is_no_model() -> None:
    refused(InputError, r"torch\.nn\.Module, got str", "resnet18", [data()])  # type: ignore[arg-type]


def test_an_output_that_does_not_classify() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    refused(InputError, r"\(4, 2, 12, 12\).*loss_fn", model, [data()], criterion="attribution")


# -- options ----------------------------------------------------------------------------------------------


def test_an_unknown_criterion_suggests_the_nearest(model: nn.Module) -> None:
    refused(InputError, "'tailor'; did you mean 'taylor'", model, [data()], criterion="tailor")


def test_an_unknown_normalisation(model: nn.Module) -> None:
    refused(InputError, "normalize must be one of .*'l3'", model, [data()], normalize="l3")


@pytest.mark.parametrize("ratio", [0, -0.5, 1.5, float("nan"), "half", True])
@pytest.mark.parametrize("name", ["keep_ratio", "max_macs", "max_params"])
def test_ratios_outside_their_range(model: nn.Module, name: str, ratio: Any) -> None:
    with pytest.raises(InputError, match=f"{name} must .*{re.escape(repr(ratio))}"):
        attrfast.prune(model, [data()], **{name: ratio}, progress=False)


def test_no_target_at_all(model: nn.Module) -> None:
    with pytest.raises(InputError, match="needs a target: keep_ratio"):
        attrfast.prune(model, [data()], progress=False)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"keep_ratio": 0.01}, r"7\.5% of the filters are left where keep_ratio asks for 0\.0%"),
        ({"max_macs": 1e-6}, r"of the multiply-adds are left"),
        ({"max_params": 2}, r"of the parameters are left"),
        ({"keep_ratio": 0.3, "min_filters": 6}, r"lower min_filters \(6\)"),
        ({"keep_ratio": 0.3, "round_to": 8}, r"round_to \(8\)"),
    ],
)
def test_a_target_out_of_reach_says_how_close_it_gets(
    model: nn.Module, options: dict[str, Any], named: str
) -> None:
    with pytest.raises(TargetError, match=named):
        attrfast.prune(model, [data()], finetune=0, progress=False, **options)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"filters_per_step": 0}, "filters_per_step.*0"),
        ({"filters_per_step": 2.5}, r"filters_per_step.*2\.5"),
        ({"min_filters": 0}, "min_filters.*0"),
        ({"round_to": -8}, "round_to.*-8"),
        ({"max_batches": 0}, "max_batches.*0"),
        ({"microbatch": -1}, "microbatch.*-1"),
        ({"reduction": "median"}, "reduction 'median'; known: abs_sample"),
        ({"finetune": "long"}, "finetune.*str"),
        ({"finetune": -1}, "epochs.*-1"),
        ({"max_accuracy_drop": 3}, "max_accuracy_drop.*3"),
        ({"resume": True}, "resume=True needs output_dir"),
    ],
)
def test_options_outside_their_range(model: nn.Module, options: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        attrfast.prune(model, [data()], progress=False, **{"keep_ratio": 0.5, **options})


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"lr": 0}, "lr.*0"),
        ({"optimizer": "lion"}, "optimizer.*'lion'"),
        ({"schedule": "steps"}, "schedule.*'steps'"),
        ({"epochs": 1.5}, r"epochs.*1\.5"),
    ],
)
def test_options_of_fine_tuning(options: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        attrfast.FineTune(**options)


# -- devices ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_where_there_is_none(model: nn.Module) -> None:
    refused(BackendError, "'cuda' was asked for.*device='cpu'", model, [data()], device="cuda")


def test_a_device_that_is_none(model: nn.Module) -> None:
    refused(InputError, "'toaster' is no device", model, [data()], device="toaster")


def test_a_model_without_values() -> None:
    refused(InputError, "meta device", Plain().to("meta"), [data()])


def test_a_model_on_two_devices() -> None:
    model = Plain()
    model.classifier.to("meta")
    refused(InputError, r"spread over \['cpu', 'meta'\]", model, [data()])


def test_data_on_another_accelerator(model: nn.Module) -> None:
    images, labels = data()
    refused(InputError, "the data is on meta and the model on cpu", model, [(images.to("meta"), labels)])


# -- functions of the user ----------------------------------------------------------------------------------


def test_an_error_of_the_users_loss_stays_visible(model: nn.Module) -> None:
    def loss_fn(output: torch.Tensor, batch: Any) -> torch.Tensor:
        raise KeyError("masks")

    with pytest.raises(AttrfastError, match="your loss_fn raised KeyError: 'masks'") as caught:
        attrfast.attribute(model, [data()], loss_fn=loss_fn, progress=False)
    assert isinstance(caught.value.__cause__, KeyError)


def test_an_error_of_the_users_fine_tuning_stays_visible(model: nn.Module) -> None:
    def tune(_: nn.Module, step: int) -> None:
        raise OSError("disk on fire")

    with pytest.raises(AttrfastError, match="OSError at step 1: disk on fire") as caught:
        attrfast.prune(model, [data()], keep_ratio=0.5, finetune=tune, progress=False)
    assert isinstance(caught.value.__cause__, OSError)


def test_an_error_of_the_users_callback_stays_visible(model: nn.Module) -> None:
    def callback(*_: Any) -> None:
        raise ZeroDivisionError("by zero")

    with pytest.raises(AttrfastError, match="ZeroDivisionError at step 1: by zero"):
        attrfast.prune(model, [data()], keep_ratio=0.5, finetune=0, callback=callback, progress=False)


def test_an_error_of_the_users_criterion_stays_visible(model: nn.Module) -> None:
    class Broken(attrfast.Criterion):
        name = "broken"

        def objective(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            raise LookupError("no such class")

    with pytest.raises(AttrfastError, match="LookupError: no such class") as caught:
        attrfast.attribute(model, [data()], criterion=Broken(), progress=False)
    assert isinstance(caught.value.__cause__, LookupError)


def test_an_error_of_the_loader_is_raised_as_it_is(model: nn.Module) -> None:
    def loader() -> Iterator[Any]:
        yield data()
        raise FileNotFoundError("shard 2")

    with pytest.raises(FileNotFoundError, match="shard 2"):
        attrfast.attribute(model, loader(), progress=False)


@pytest.mark.parametrize(
    "value",
    [torch.zeros(3), torch.zeros(()), 1.5, None],
    ids=["3 values", "no gradient", "a float", "None"],
)
def test_a_loss_of_another_form(model: nn.Module, value: Any) -> None:
    with pytest.raises(AttrfastError):
        attrfast.attribute(model, [data()], loss_fn=lambda out, batch: value, progress=False)


def test_errors_are_also_the_built_in_errors_one_expects() -> None:
    assert issubclass(InputError, ValueError)
    assert issubclass(TargetError, ValueError)
    assert issubclass(NumericalError, ArithmeticError)
    assert issubclass(ModelError, RuntimeError)
    assert issubclass(BackendError, RuntimeError)
