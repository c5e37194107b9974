"""The ops as PyTorch sees them: schemas, fake results, autograd, compilation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_cases import LAYOUTS, MUTATES, OPS, Call, make_call
from op_checks import assert_close, exact
from torch._subclasses.fake_tensor import FakeTensorMode

from attrfast import _backend, ops
from attrfast.errors import InputError

Tensor = torch.Tensor
DIFFERENTIABLE = {"affine_relu": ("z", "residual"), "affine_relu_max_pool": ("z",)}
CPU = torch.device("cpu")


def overload(op: str) -> Any:
    return getattr(torch.ops.attrfast, op).default


def samples(op: str) -> dict[str, Call]:
    """Calls that differ in strides, dtypes and which arguments there are."""
    shape = (2, 3, 4, 5)
    return {
        "contiguous": make_call(op, shape),
        "channels last": make_call(op, shape, torch.bfloat16, layouts=("channels last",), guided=True),
        "reversed": make_call(
            op, shape, torch.float64, layouts=("reversed", "contiguous"), bounds=(None, 6.0), attribute=2
        ),
        "little": make_call(
            op, (1, 1, 1, 2), scale=False, shift=False, residual=False, attribute=0, count=False,
            pool=([1, 1], [1, 1], [0, 0], True),
        ),
    }  # fmt: skip


# -- what the dispatcher relies on ----------------------------------------------------------------------------


@pytest.mark.parametrize("sample", ["contiguous", "channels last", "reversed", "little"])
@pytest.mark.parametrize("op", OPS)
def test_an_op_passes_pytorch_s_own_check(op: str, sample: str) -> None:
    call = samples(op)[sample]
    for name in DIFFERENTIABLE.get(op, ()):
        if sample != "reversed" and call.args[name] is not None:
            call.args[name].requires_grad_()
    torch.library.opcheck(overload(op), (), call.args)


@pytest.mark.parametrize("kind", ["l2", "mean", "max"])
def test_segment_normalize_passes_pytorch_s_own_check(kind: str) -> None:
    offsets = torch.tensor([0, 2, 2, 5])
    for theta in (torch.randn(5), torch.randn(10, dtype=torch.float64)[::2]):
        torch.library.opcheck(overload("segment_normalize"), (theta, offsets, kind))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize(
    ("op", "dims"), [(op, dims) for op in OPS for dims in ((2,) if "pool" in op else range(4))]
)
def test_results_lie_as_the_fake_says(
    op: str, dims: int, layout: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Compiled code reads results by the strides of the fake.
    if _backend.find(backend).backend is None:
        pytest.skip("the native module is not built")
    monkeypatch.setenv("ATTRFAST_BACKEND", backend)
    call = make_call(op, (2, 3, 4, 5, 6)[: 2 + dims], layouts=(layout,), bounds=(None, None))
    with FakeTensorMode() as mode:
        fake = call.with_args(**{name: mode.from_tensor(x) for name, x in call.tensors.items()})
        expected = [(x.shape, x.stride(), x.dtype, x.device) for x in fake.run(overload(op))]
    results = call.run()
    assert [(x.shape, x.stride(), x.dtype, x.device) for x in results] == expected
    # As the first argument lies where that is one of the two layouts, and contiguous where it is not.
    usual = LAYOUTS["channels last" if layout == "channels last" else "contiguous"]
    for x in results[op in MUTATES :]:
        assert x.stride() == (usual(x) if x.dim() == 2 + dims else x.contiguous()).stride()


@pytest.mark.parametrize("op", OPS)
def test_results_are_on_the_argument_s_device_whatever_the_default(op: str) -> None:
    call = make_call(op)
    want, terms = exact(call)
    backend = ops.backend_for(CPU)  # itself: below the dispatcher the default device is another matter
    with torch.device("meta"):
        got = call.with_numbers().run(getattr(backend, op))
    for result, expected, size in zip(got, want, terms, strict=True):
        assert_close(result, expected, size)


@pytest.mark.parametrize("op", OPS)
def test_a_lazily_negated_view_is_read_as_negated(op: str) -> None:
    call = make_call(op)
    if op in MUTATES:  # PyTorch can't hand such a view to an op that writes into it
        name = next(name for name in call.tensors if name != MUTATES[op])
    else:
        name = next(name for name in ("x", "z", "g") if name in call.args)
    call = call.with_args(**{name: torch._neg_view(call.args[name])})
    assert call.args[name].is_neg()
    solid = call.with_args(**{name: call.args[name].resolve_neg()}).copied()
    want, terms = exact(solid)
    for result, expected, size in zip(call.run(), want, terms, strict=True):
        assert_close(result, expected, size)


# -- autograd and compilation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "every other element"])
@pytest.mark.parametrize("bounds", [(0.0, None), (-1.0, 1.0), (None, None)], ids=str)
@pytest.mark.parametrize("op", sorted(DIFFERENTIABLE))
def test_gradients_are_those_of_finite_differences(
    op: str, bounds: tuple[float | None, float | None], layout: str
) -> None:
    call = make_call(op, (2, 3, 4, 3), torch.float64, layouts=(layout,), bounds=bounds)
    names = DIFFERENTIABLE[op]
    tensors = [call.args[name].requires_grad_() for name in names]

    def function(*given: Tensor) -> Tensor:
        return call.with_args(**dict(zip(names, given, strict=True))).run()[0]

    assert torch.autograd.gradcheck(function, tensors)


@pytest.mark.parametrize("name", ["z", "residual"])
def test_each_argument_can_be_differentiated_alone(name: str) -> None:
    call = make_call("affine_relu")
    call.args[name].requires_grad_()
    (got,) = torch.autograd.grad(call.run()[0].sum(), call.args[name])
    scale = call.args["scale"].view(1, -1, 1, 1) if name == "z" else 1
    want = (call.run()[0] > 0) * scale
    torch.testing.assert_close(got, want.expand_as(got).to(got.dtype), rtol=0, atol=0)


@pytest.mark.parametrize("op", sorted(DIFFERENTIABLE))
@pytest.mark.parametrize("name", ["scale", "shift"])
def test_scale_and_shift_have_no_gradient_and_say_so(op: str, name: str) -> None:
    call = make_call(op)
    call.args[name].requires_grad_()
    with pytest.raises(InputError, match=f"{op} has no gradient for {name}"):
        call.run()


@pytest.mark.parametrize("op", sorted(MUTATES))
def test_an_in_place_form_refuses_what_autograd_follows(op: str) -> None:
    call = make_call(op)
    leaf = call.first.requires_grad_()
    with pytest.raises(InputError, match=f"{op} has no gradient"):
        call.with_args(**{next(iter(call.args)): leaf * 1}).run()
    before = leaf._version
    with torch.no_grad():
        call.run()
    assert (leaf._version > before) == (call.args[MUTATES[op]] is leaf)


@pytest.mark.parametrize("op", [op for op in OPS if op not in DIFFERENTIABLE and op not in MUTATES])
def test_an_op_without_a_gradient_fails_in_backward(op: str) -> None:
    call = make_call(op)
    call.first.requires_grad_()
    with pytest.raises(RuntimeError, match=f"backward through attrfast.{op}"):
        call.run()[0].sum().backward()


def network(z: Tensor, residual: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    y, n = ops.affine_relu(z, scale, None, residual, 0.0, 6.0, count=True)
    p, *_ = ops.affine_relu_max_pool(y, scale, scale, [2, 2], [2, 2], [0, 0])
    return p, n, ops.attribution(y.detach(), residual)


def in_place(z: Tensor, residual: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    a, h, g = z + 1, residual * 2, residual * 3
    n = ops.affine_relu_(a, scale, count=True)
    s = ops.affine_relu_backward_(a, h, scale)
    return a, n, h, g, s, *ops.affine_add_relu_backward_(a, g, residual, scale, attribute=2)


@pytest.mark.parametrize(
    ("compiler", "layout"),
    [
        ("aot_eager", "contiguous"),
        ("aot_eager", "channels last"),
        ("aot_eager", "reversed"),
        ("inductor", "reversed"),
    ],
)
def test_compiled_code_gives_the_same_results(compiler: str, layout: str) -> None:
    torch.manual_seed(0)
    z, residual = (LAYOUTS[layout](torch.randn(2, 3, 4, 6)) for _ in range(2))
    scale = torch.randn(3)
    z.requires_grad_()
    results = []
    for function in (network, torch.compile(network, fullgraph=True, backend=compiler)):
        p, n, s = function(z, residual, scale)
        (gz,) = torch.autograd.grad(p.square().sum(), z)
        results.append([p, n, s, gz])
    if compiler == "aot_eager":  # the other one would have to build C++ for what is not ours in it
        z = z.detach()
        results[0] += in_place(z, residual, scale)
        results[1] += torch.compile(in_place, fullgraph=True, backend=compiler)(z, residual, scale)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
