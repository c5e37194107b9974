"""On a GPU: the numbers of its kernels, and whole passes that never wait for it.

`make gpu` runs this file; without a GPU all of it is skipped.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from families import family, images_for, lived_in
from hypothesis import given, settings
from op_cases import DTYPES, OPS, Call, calls, copy_of, make_call
from op_checks import GuardedMemory, assert_close, exact, same_bits, unchanged
from small_networks import NETWORKS, Plain
from test_ops_values import pairs
from torch import nn

import attrfast
from attrfast import _backend, ops, reference
from attrfast.batches import unpack
from attrfast.channels import discover
from attrfast.criteria import REDUCTIONS, get_criterion
from attrfast.passes import Pass
from attrfast.tiers import Runner

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="no GPU: torch.cuda.is_available() is False"
    ),
]

Tensor = torch.Tensor
GPU = torch.device("cuda:0")
LAID = ["contiguous", "channels last"]
# Around the sizes where the kernels change their path, and as large as layers of real networks.
SHAPES = [
    (3, 37),
    (2, 64, 7, 7),
    (2, 37, 7, 7),
    (5, 3, 31, 33),
    (2, 64, 56, 56),
    (1, 70, 96, 98),
    (1, 1030, 3),
]
POOLS = [
    ([2, 2], [2, 2], [0, 0], False),
    ([3, 3], [2, 2], [1, 1], False),
    ([3, 5], [1, 2], [1, 2], True),
]


@pytest.fixture(params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> Any:
    found = _backend.find(request.param)
    if found.backend is None:
        pytest.skip(found.reason)
    return found.backend


def there(call: Call) -> Call:
    """The call on the GPU, its tensors lying in memory as they did."""
    moved = {name: copy_of(x, GPU) for name, x in call.tensors.items()}
    return call.with_args(**moved).with_numbers()


def check(backend: Any, call: Call) -> list[Tensor]:
    """Right numbers, in memory that was full of NaN and had guards."""
    want, terms = exact(call)
    call, memory = there(call), GuardedMemory()
    with unchanged(call), memory:
        got = call.run(getattr(backend, call.op))
    memory.check()
    for result, expected, size in zip(got, want, terms, strict=True):
        assert_close(result.cpu(), expected, size)
    return got


# -- kernels ------------------------------------------------------------------------------------------------


def test_the_gpus_own_kernels_are_chosen() -> None:
    usable = [name for name in ("cuda", "triton") if _backend.find(name).backend is not None]
    assert usable
    assert ops.backend_for(GPU).name == usable[0]


@pytest.mark.parametrize("op", OPS)
def test_an_op_agrees_with_its_definition_and_writes_nothing_else(op: str, backend: Any) -> None:
    @given(calls(op))
    @settings(max_examples=60, deadline=None)
    def examples(call: Call) -> None:
        check(backend, call)

    examples()


@pytest.mark.parametrize("layout", LAID)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_path_gives_the_numbers_of_the_definition(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, backend: Any
) -> None:
    for op in OPS:
        if "pool" not in op:
            check(backend, make_call(op, shape, dtype, layouts=(layout,), attribute=2))


@pytest.mark.parametrize("layout", LAID)
@pytest.mark.parametrize("pool", POOLS, ids=str)
@pytest.mark.parametrize("shape", [(2, 8, 12, 14), (1, 5, 13, 9), (2, 64, 112, 112)], ids=str)
def test_every_pooling_gives_the_numbers_of_the_definition(
    shape: tuple[int, ...], pool: Any, layout: str, backend: Any
) -> None:
    for dtype in DTYPES:
        for op in ("affine_relu_max_pool", "affine_relu_max_pool_backward"):
            for guided in (False, True):
                call = make_call(
                    op, shape, dtype, layouts=(layout,), pool=pool, guided=guided, coarse=True
                )
                check(backend, call)


@pytest.mark.parametrize("layout", LAID)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values_are_as_by_the_definition(dtype: torch.dtype, layout: str, backend: Any) -> None:
    a, g = pairs(dtype, layout)
    for guided in (False, True):
        args = {"a": a, "g": g, "scale": None, "lower": 0.0, "upper": 6.0, "guided": guided}
        call = Call("affine_relu_backward", {**args, "attribute": True})
        want = call.with_numbers().run(reference.affine_relu_backward)
        got = there(call).run(backend.affine_relu_backward)
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x.cpu(), y, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("op", OPS)
def test_two_runs_give_the_same_bits(op: str, backend: Any) -> None:
    for layout in LAID:
        call = there(make_call(op, (8, 96, 56, 56), layouts=(layout,), pool=POOLS[1]))
        first = [x.clone() for x in call.copied().run(getattr(backend, op))]
        for _ in range(5):
            again = call.copied().run(getattr(backend, op))
            assert all(same_bits(x, y) for x, y in zip(again, first, strict=True))


@pytest.mark.parametrize("op", OPS)
def test_an_op_can_be_captured_in_a_graph(op: str, backend: Any) -> None:
    call = there(make_call(op, (4, 64, 48, 48), pool=POOLS[0]))
    want = [x.clone() for x in call.copied().run(getattr(backend, op))]
    call.copied().run(getattr(backend, op))  # what is chosen by the clock is chosen now
    call = call.copied()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call.run(getattr(backend, op))
    graph.replay()
    torch.cuda.synchronize()
    assert all(same_bits(x, y) for x, y in zip(got, want, strict=True))


def test_launches_go_to_the_callers_stream(backend: Any) -> None:
    x, g = torch.randn(2, 8, 256, 56, 56, device=GPU).unbind()
    want = backend.attribution(x, g)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    late = torch.zeros_like(x)
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # on another stream, the kernel would read zeros
        late.copy_(x)
        got = backend.attribution(late, g)
    side.synchronize()
    assert same_bits(got, want)


def test_more_elements_than_32_bits_can_count(backend: Any) -> None:
    shape = (2, 1, (1 << 30) + 8)
    if torch.cuda.mem_get_info()[0] < 14 << 30:
        pytest.skip("less than 14 GB of GPU memory are free")
    a = torch.ones(shape, dtype=torch.bfloat16, device=GPU)
    g = torch.full(shape, 0.5, dtype=torch.bfloat16, device=GPU)
    a[1, 0, -5:] = 0
    s = backend.affine_relu_backward_(a, g)
    assert s[0].item() == (1 << 29) + 4
    assert s[1].item() == (1 << 29) + 4 - 2.5
    assert g[1, 0, -6:].tolist() == [0.5, 0, 0, 0, 0, 0]


def test_many_taps_in_one_launch_give_what_each_gives_alone() -> None:
    found = _backend.find("cuda")
    if found.backend is None:
        pytest.skip(found.reason)
    shapes = [(2, 5), (3, 64, 4, 4), (2, 37, 6), (0, 3, 5), (2, 3, 0), (1, 2, 60, 40), (1, 1030, 2)]
    given_calls = [
        make_call("attribution", shape, dtype, seed=i)
        for dtype in DTYPES
        for i, shape in enumerate(shapes * 4)
    ]
    taps = [(x.args["x"].to(GPU), x.args["g"].to(GPU)) for x in given_calls]
    for s, call in zip(found.backend.attributions(taps), given_calls, strict=True):
        (want,), (terms,) = exact(call)
        assert_close(s.cpu(), want, terms)


# -- passes -------------------------------------------------------------------------------------------------


def loader_for(images: Tensor, classes: int = 10, batches: int = 2) -> list[tuple[Tensor, Tensor]]:
    labels = torch.arange(len(images)) % classes
    return [(images + i, labels) for i in range(batches)]


@pytest.mark.parametrize(
    "criterion",
    ["taylor", "taylor_guided", "attribution", "taylor_fo", "apoz", "obd", "causal_map"],
)
@pytest.mark.parametrize("name", ["vgg11_bn", "resnet18", "resnet50", "mobilenet_v2", "densenet121"])
def test_scores_are_those_of_the_cpu(name: str, criterion: str) -> None:
    model, images = family(name).double(), images_for(name, 2).double()
    loader = loader_for(images)
    want = attrfast.attribute(model, loader, criterion, progress=False)
    got = attrfast.attribute(copy.deepcopy(model).to(GPU), loader, criterion, progress=False)
    for layer in want:
        size = want[layer].norm().clamp(min=1e-300)  # a layer may be zero
        error = (got[layer].cpu() - want[layer]).norm() / size
        assert float(error) < 1e-9, layer


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_scores_in_float32_are_those_of_the_cpu(layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    model, loader = lived_in(Plain()), loader_for(torch.randn(4, 3, 16, 16), 2)
    want = attrfast.attribute(
        copy.deepcopy(model).double(), [(x.double(), y) for x, y in loader], progress=False
    )
    got = attrfast.attribute(model.to(GPU, memory_format=layout), loader, progress=False)
    for layer in want:
        assert float((got[layer].cpu() - want[layer]).norm() / want[layer].norm()) < 1e-4, layer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["vgg11_bn", "resnet18"])
def test_mixed_precision_is_near(name: str, dtype: torch.dtype) -> None:
    model, loader = family(name).to(GPU), loader_for(images_for(name, 4))
    want = attrfast.attribute(model, loader, progress=False)
    got = attrfast.attribute(model, loader, amp_dtype=dtype, progress=False)
    for layer in want:
        assert float((got[layer] - want[layer]).norm() / want[layer].norm()) < 0.2, layer


def a_pass(model: nn.Module, images: Tensor, criterion: str, fused: bool) -> Pass:
    rule = get_criterion(criterion)
    found = discover(model, (images[:2],))
    how = REDUCTIONS[rule.reduction]
    running = Pass(model, found, [(rule, how)], device=GPU)
    if not fused:
        (run,) = running.runs
        run.runner = Runner(model, found, guided=rule.guided, absolute=how.absolute, fused=False)
    return running


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("criterion", ["taylor", "taylor_guided", "attribution"])
@pytest.mark.parametrize("name", ["vgg11_bn", "resnet18", "mobilenet_v2"])
def test_nothing_in_a_batch_waits_for_the_gpu(name: str, criterion: str, fused: bool) -> None:
    model, images = family(name).to(GPU), images_for(name, 2).to(GPU)
    batch = unpack((images, torch.tensor([1, 2], device=GPU)), GPU)
    running = a_pass(model, images, criterion, fused)
    running.add(batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        running.add(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert bool((running.results()[0][0] >= 0).all())


@pytest.mark.parametrize("fused", [True, False])
def test_a_whole_pass_can_be_captured_in_a_graph(fused: bool) -> None:
    model, images = family("resnet18").to(GPU), images_for("resnet18", 2).to(GPU)
    labels = torch.tensor([1, 2], device=GPU)
    running = a_pass(model, images, "taylor", fused)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            running.add(unpack((images, labels), GPU))
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        running.add(unpack((images, labels), GPU))
    others = [images.flip(0), images * 0.5]
    running.tallies[0].total.zero_()
    for other in others:
        images.copy_(other.clone())
        graph.replay()
    eager = a_pass(model, images, "taylor", fused)
    for other in others:
        eager.add(unpack((other, labels), GPU))
    torch.testing.assert_close(running.tallies[0].total, eager.tallies[0].total, rtol=1e-4, atol=1e-7)


def test_a_pass_takes_less_memory_than_training() -> None:
    model, images = family("resnet18").to(GPU), images_for("resnet18", 64).to(GPU)
    labels = torch.zeros(64, dtype=torch.int64, device=GPU)

    def peak(run: Any) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before

    def train() -> None:
        nn.functional.cross_entropy(model(images), labels).backward()

    ours = peak(lambda: attrfast.attribute(model, [(images, labels)], progress=False))
    assert ours < 0.6 * peak(train)


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_small_networks_are_pruned_on_the_gpu_as_on_the_cpu(name: str) -> None:
    make, inputs = NETWORKS[name]
    torch.manual_seed(0)
    model, args = lived_in(make()).double(), tuple(x.double() for x in inputs(4))
    loader = [(args if len(args) > 1 else args[0], torch.tensor([0, 1, 0, 1]))]
    options: dict[str, Any] = {"keep_ratio": 0.8, "finetune": 0, "progress": False}
    here = attrfast.prune(model, loader, **options)
    result = attrfast.prune(copy.deepcopy(model).to(GPU), loader, **options)
    assert {k: v.tolist() for k, v in result.gates.items()} == {
        k: v.tolist() for k, v in here.gates.items()
    }
    for x, y in zip(result.model.state_dict().values(), here.model.state_dict().values(), strict=True):
        assert torch.equal(x.cpu(), y)


def test_bad_input_is_told_before_the_gpu_fails_on_it() -> None:
    torch.manual_seed(0)
    model, images = lived_in(Plain()).to(GPU), torch.randn(2, 3, 16, 16)
    with pytest.raises(attrfast.InputError, match=r"label 99 is outside"):
        attrfast.attribute(model, [(images, torch.tensor([0, 99]))], progress=False)
    with pytest.raises(attrfast.NumericalError, match="not finite"):
        attrfast.attribute(model, [(images * torch.nan, torch.tensor([0, 1]))], progress=False)


def test_a_model_pruned_here_loads_here_and_on_the_cpu_and_is_measured(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, images = lived_in(Plain()).to(GPU), torch.randn(4, 3, 16, 16)
    data = [(images, torch.tensor([0, 1, 2, 3]))]
    result = attrfast.prune(model, data, keep_ratio=0.6, finetune=0, progress=False)
    result.save(tmp_path)
    want = result.model.eval()(images.to(GPU))
    here = attrfast.load(tmp_path, lambda: Plain().to(GPU))
    assert all(t.device == GPU for t in (*here.parameters(), *here.buffers()))
    assert torch.equal(here(images.to(GPU)), want)
    torch.testing.assert_close(attrfast.load(tmp_path, Plain)(images), want.cpu(), rtol=1e-3, atol=1e-3)
    measured = result.measure(images, (4, 64), rounds=3)
    assert measured.device == torch.cuda.get_device_name(GPU)
    assert all(min(row.pruned.memory, row.original.memory) > 0 for row in measured.rows)
