"""Pruned models are ordinary modules: they can be exported, compiled, copied, wrapped and pruned again."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from families import lived_in
from small_networks import CLASSES, NETWORKS
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import attrfast
from attrfast.models.resnet import ResNet

# Plain layers, residual stages, depthwise and grouped convolutions, gates, concatenations, transposes.
CHOSEN = ("resnet", "plain", "grouped", "gated", "up and down", "several inputs and outputs")


@pytest.fixture(scope="module", params=CHOSEN)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """A model that `prune` made, in eval mode, and its inputs for two samples."""
    torch.manual_seed(0)
    if request.param == "resnet":
        model: nn.Module = lived_in(ResNet(1, num_classes=CLASSES))
        inputs: tuple[torch.Tensor, ...] = (torch.randn(2, 3, 16, 16),)
    else:
        make, example = NETWORKS[request.param]
        model, inputs = lived_in(make()), example(2)
    return shrunk(model, inputs), inputs


def shrunk(model: nn.Module, inputs: tuple[torch.Tensor, ...], share: float = 0.7) -> nn.Module:
    batch = (inputs if len(inputs) > 1 else inputs[0], torch.arange(2) % CLASSES)
    result = attrfast.prune(
        model, [batch], keep_ratio=share, filters_per_step=10**6, finetune=0, progress=False
    )
    assert result.history[-1].phi <= share
    return result.model.eval()


def run(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    with torch.no_grad():
        out = model(*inputs)
    return list(out) if isinstance(out, tuple) else [out]


Case = tuple[nn.Module, tuple[torch.Tensor, ...]]


def assert_close(got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    """To float32 rounding, relative to the outputs' size: other kernels add in another order."""
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))


def more(inputs: tuple[torch.Tensor, ...], samples: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(7)
    return tuple(torch.randn(samples, *x.shape[1:], generator=generator) for x in inputs)


def test_torch_export_with_any_batch_size(case: Case) -> None:
    model, inputs = case
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(model, inputs, dynamic_shapes=tuple({0: batch} for _ in inputs))
    for samples in (1, 2, 5):
        other = more(inputs, samples)
        assert_close(run(exported.module(), other), run(model, other))


@pytest.mark.filterwarnings("ignore:# The axis name")
def test_onnx_with_any_batch_size(case: Case, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="needs the extra attrfast[onnx]")
    runtime = pytest.importorskip("onnxruntime", reason="needs the extra attrfast[onnx]")
    model, inputs = case
    file = tmp_path / "model.onnx"
    names = [f"input{i}" for i in range(len(inputs))]
    batch = torch.export.Dim("batch", min=1, max=64)
    torch.onnx.export(
        model,
        inputs,
        file,
        input_names=names,
        dynamic_shapes=tuple({0: batch} for _ in inputs),
        dynamo=True,
        verbose=False,
    )
    session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for samples in (1, 2, 5):
        other = more(inputs, samples)
        feed = dict(zip(names, (x.numpy() for x in other), strict=True))
        assert_close([torch.from_numpy(y) for y in session.run(None, feed)], run(model, other))


def test_torch_compile_without_a_break(case: Case) -> None:
    model, inputs = case
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_close(run(compiled, inputs), run(model, inputs))


def test_copies_are_equal_and_apart(case: Case) -> None:
    model, inputs = case
    want = run(model, inputs)
    copied = copy.deepcopy(model)
    assert all(torch.equal(a, b) for a, b in zip(run(copied, inputs), want, strict=True))
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert all(torch.equal(a, b) for a, b in zip(run(model, inputs), want, strict=True))


def test_state_dict_goes_round(case: Case, tmp_path: Path) -> None:
    model, inputs = case
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert all(torch.equal(a, b) for a, b in zip(run(other, inputs), run(model, inputs), strict=True))


@pytest.fixture(scope="module")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One process by itself."""
    file = tmp_path_factory.mktemp("gloo") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_distributed_training_takes_the_same_step(case: Case) -> None:
    model, inputs = case
    alone, inside = copy.deepcopy(model).train(), copy.deepcopy(model).train()
    wrapped = DistributedDataParallel(inside)
    for module, trained in ((alone, alone), (wrapped, inside)):
        torch.manual_seed(0)  # dropout
        out = module(*inputs)
        loss = sum(y.square().mean() for y in (out if isinstance(out, tuple) else (out,)))
        loss.backward()
        torch.optim.SGD(trained.parameters(), lr=0.1).step()
    before = dict(model.named_parameters())
    assert any(not torch.equal(p, before[name]) for name, p in inside.named_parameters())
    for a, b in zip(alone.parameters(), inside.parameters(), strict=True):
        torch.testing.assert_close(b, a)


def test_a_pruned_model_is_pruned_again(case: Case) -> None:
    model, inputs = case
    again = shrunk(model, inputs, 0.8)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (model, again)]
    assert sizes[1] < sizes[0]
    assert all(a.shape == b.shape for a, b in zip(run(again, inputs), run(model, inputs), strict=True))
