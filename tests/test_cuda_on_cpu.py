"""The CUDA kernels, run on the CPU: their numbers, their memory accesses, and their independence of the
order in which threads run.

The tests of the CPU kernels, on another backend; tests/cuda_on_cpu/ supplies what a GPU has.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from cuda_on_cpu import build
from cuda_on_cpu.backend import EmulatedBackend
from families import lived_in
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import BOUNDS, DTYPES, LAYOUTS, MUTATES, OPS, Call, calls, make_call, whole
from op_checks import GuardedMemory, assert_close, exact, same_bits, unchanged
from small_networks import Gated, Plain
from test_ops_values import pairs, special

import attrfast
from attrfast import ops, reference
from attrfast.cuda import CudaBackend

pytestmark = pytest.mark.skipif(not build.available(), reason="there is no C++ compiler, or no pybind11")

Tensor = torch.Tensor
LAID = ["contiguous", "channels last"]
SEEDS = (0, 1, 2, 3, 5)  # orders in which threads run: ascending, descending and shuffled; fair and not
ANY = (None, None)


class AlignedMemory(GuardedMemory):
    GUARD = 64


@pytest.fixture(scope="module")
def machine() -> ModuleType:
    return build.load()


@pytest.fixture
def gpu(machine: ModuleType) -> Iterator[EmulatedBackend]:
    machine.seed(2)
    machine.block_limit(3)
    yield EmulatedBackend(machine)
    machine.forget()


def run(gpu: EmulatedBackend, call: Call) -> list[Tensor]:
    return call.with_numbers().run(getattr(gpu, call.op))


def check(gpu: EmulatedBackend, call: Call, aligned: bool = True) -> list[Tensor]:
    """Right numbers, in memory that was full of NaN and had guards."""
    want, terms = exact(call)
    memory = AlignedMemory() if aligned else GuardedMemory()
    call = call.copied()
    with unchanged(call), memory:
        got = run(gpu, call)
    memory.check()
    for result, expected, size in zip(got, want, terms, strict=True):
        assert_close(result, expected, size)
    return got


# -- numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS)
def test_an_op_agrees_with_its_definition_and_touches_nothing_else(
    op: str, gpu: EmulatedBackend
) -> None:
    @given(calls(op), st.sampled_from(SEEDS), st.integers(1, 4), st.booleans())
    @settings(max_examples=200, deadline=None)
    def examples(call: Call, seed: int, blocks: int, aligned: bool) -> None:
        gpu.module.seed(seed)
        gpu.module.block_limit(blocks)
        check(gpu, call, aligned)

    examples()


# Sizes for each path of csrc/cuda/plan.h; the comments name the first layout's path, then the other's.
SHAPES = [
    (3, 37),  # one position a row
    (2, 64, 7, 7),  # many rows a block; slots of channels
    (2, 37, 7, 7),  # an odd number of channels: no slots
    (5, 3, 31, 33),  # two rows' length: one row a block
    (1, 3, 70, 71),  # one row in pieces, in two stages
    (1, 8, 60, 61),  # channels-last in pieces
    (1, 1040, 3),  # channels-last in several chunks
    (1, 259, 5),  # the same without slots
]


@pytest.mark.parametrize("layout", LAID)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_path_gives_the_numbers_of_the_definition(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, gpu: EmulatedBackend
) -> None:
    for op in OPS:
        if "pool" not in op:
            check(gpu, make_call(op, shape, dtype, layouts=(layout,), attribute=1 + (op[-1] == "_")))


POOLS = {
    "2x2 stride 2": ([2, 2], [2, 2], [0, 0], False),
    "2x2 stride 2, rounded up": ([2, 2], [2, 2], [0, 0], True),
    "3x3 stride 2 padding 1": ([3, 3], [2, 2], [1, 1], False),
    "overlapping": ([3, 5], [1, 2], [1, 2], False),
    "with gaps": ([1, 2], [3, 4], [0, 1], False),
}
POOL_SHAPES = [
    (2, 8, 12, 14),  # several planes a block
    (1, 5, 13, 9),
    (1, 4, 150, 131),  # a plane in bands
    (1, 2, 5, 9001),  # a row of windows has no room in shared memory
    (1, 32, 31, 33),  # channels-last in pieces
]


@pytest.mark.parametrize("layout", LAID)
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("shape", POOL_SHAPES, ids=str)
def test_every_pooling_gives_the_numbers_of_the_definition(
    shape: tuple[int, ...], pool: str, layout: str, gpu: EmulatedBackend
) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        options: dict[str, Any] = {"layouts": (layout,), "pool": POOLS[pool], "coarse": True}
        check(gpu, make_call("affine_relu_max_pool", shape, dtype, bounds=(0.0, 1.0), **options))
        for guided in (False, True):
            call = make_call("affine_relu_max_pool_backward", shape, dtype, guided=guided, **options)
            check(gpu, call)


@pytest.mark.parametrize("place", [0, 2, 8, 255])
@pytest.mark.parametrize("layout", LAID)
def test_places_outside_the_input_get_nothing(layout: str, place: int, gpu: EmulatedBackend) -> None:
    geometry = ([3, 3], [2, 2], [1, 1], False)
    call = make_call(
        "affine_relu_max_pool_backward", (2, 3, 7, 9), layouts=(layout,), pool=geometry, bounds=ANY,
        scale=False, coarse=True,
    )  # fmt: skip
    call = call.with_args(code=torch.full_like(call.args["code"], place))
    rows = {0: slice(1, None), 2: slice(1, None), 8: slice(-1), 255: slice(0)}[place]
    columns = {0: slice(1, None), 2: slice(-1), 8: slice(-1), 255: slice(0)}[place]
    gz, _ = run(gpu, call)
    assert gz.sum() == call.args["g"][:, :, rows, columns].sum()


@pytest.mark.parametrize("layout", LAID)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sums_over_a_large_map_are_as_exact_as_over_a_small_one(
    dtype: torch.dtype, layout: str, gpu: EmulatedBackend
) -> None:
    # All terms have one sign: where errors add up most.
    check(gpu, make_call("attribution", (1, 2, 700, 701), dtype, layouts=(layout,), absolute=True))


@pytest.mark.parametrize("layout", LAID)
@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values_are_treated_as_by_the_definition(
    dtype: torch.dtype, bounds: tuple[float | None, float | None], layout: str, gpu: EmulatedBackend
) -> None:
    a, g = pairs(dtype, layout)
    limits = {"lower": bounds[0], "upper": bounds[1]}
    vector = g[0, :, 0].to(reference.compute_dtype(dtype))
    cases = []
    # One at a time: where several are huge, it matters whether the processor rounds in between.
    for scale, shift, residual in ((vector, None, None), (None, vector, None), (None, None, g)):
        args = {"z": a, "scale": scale, "shift": shift, "residual": residual}
        cases.append(Call("affine_relu", args | limits | {"count": True}))
    for guided in (False, True):
        for what in (0, 1, 2):
            args = {"a": a, "g": g, "scale": None, **limits, "guided": guided, "attribute": what}
            cases.append(Call("affine_add_relu_backward", args | {"residual": g}))
    cases.append(Call("count_nonzero", {"x": a}))
    cases += [Call("attribution", {"x": a, "g": g, "absolute": absolute}) for absolute in (False, True)]
    for call in cases:
        want = call.with_numbers().run(getattr(reference, call.op))
        for got, expected in zip(run(gpu, call), want, strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("pool", ["2x2 stride 2", "3x3 stride 2 padding 1", "overlapping"])
@pytest.mark.parametrize("layout", LAID)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values_are_pooled_as_by_the_definition(
    dtype: torch.dtype, layout: str, pool: str, gpu: EmulatedBackend
) -> None:
    values = special(dtype)
    chosen = torch.randint(len(values), (2, 8, 10, 11), generator=torch.Generator().manual_seed(0))
    call = make_call("affine_relu_max_pool", pool=POOLS[pool], scale=False, shift=False)
    call = call.with_args(z=LAYOUTS[layout](values[chosen])).with_numbers()
    want = reference.affine_relu_max_pool(**call.args)
    for got, expected in zip(run(gpu, call), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


# -- the same bits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAID)
@pytest.mark.parametrize("op", OPS)
def test_the_bits_do_not_depend_on_the_order_of_threads_or_the_number_of_blocks(
    op: str, layout: str, gpu: EmulatedBackend
) -> None:
    call = make_call(op, (2, 4, 70, 71), layouts=(layout,))
    results = []
    for seed in SEEDS:
        for blocks in (1, 1000):
            gpu.module.seed(seed)
            gpu.module.block_limit(blocks)
            results.append(run(gpu, call.copied()))
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("layout", LAID)
@pytest.mark.parametrize("op", OPS)
def test_the_bits_do_not_depend_on_where_arguments_begin(
    op: str, layout: str, gpu: EmulatedBackend
) -> None:
    call = make_call(op, (2, 8, 23, 29), layouts=(layout,))
    want = run(gpu, call.copied())
    for offset in (1, 2, 4, 7, 16):
        moved = {}
        for turn, (name, x) in enumerate(call.tensors.items()):
            start = offset * (turn + 1)
            row = torch.empty(whole(x).numel() + start, dtype=x.dtype)
            moved[name] = row.as_strided(x.shape, x.stride(), start).copy_(x)
        got = run(gpu, call.with_args(**moved))
        assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("op", sorted(MUTATES))
def test_an_in_place_form_gives_the_bits_of_the_other(op: str, gpu: EmulatedBackend) -> None:
    for layout in LAID:
        for dtype in DTYPES:
            call = make_call(op, (2, 8, 9, 11), dtype, layouts=(layout,), guided=True)
            want = run(gpu, Call(call.base, call.args))
            assert all(same_bits(a, b) for a, b in zip(run(gpu, call), want, strict=True))


# -- many taps, and normalisation ---------------------------------------------------------------------------


@pytest.mark.parametrize("absolute", [False, True])
def test_many_taps_in_one_launch_give_what_each_gives_alone(
    absolute: bool, gpu: EmulatedBackend
) -> None:
    shapes = [(2, 5), (3, 64, 4, 4), (2, 37, 6), (0, 3, 5), (2, 3, 0), (1, 2, 60, 40), (1, 1030, 2)]
    taps, wants = [], []
    for i, shape in enumerate(shapes * 3):  # more than one launch holds
        for dtype in DTYPES:
            layout = LAID[i % 2] if len(shape) > 2 else "contiguous"
            call = make_call("attribution", shape, dtype, layouts=(layout,), absolute=absolute, seed=i)
            taps.append((call.args["x"], call.args["g"]))
            wants.append(exact(call))
    for seed in SEEDS:
        gpu.module.seed(seed)
        with AlignedMemory() as memory:
            got = gpu.attributions(taps=taps, absolute=absolute)
        memory.check()
        for s, ((want,), (terms,)) in zip(got, wants, strict=True):
            assert_close(s, want, terms)
    assert gpu.attributions(taps=[]) == []


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_each_segment_is_divided_by_its_own_norm(machine: ModuleType, data: st.DataObject) -> None:
    gpu = EmulatedBackend(machine)
    machine.seed(data.draw(st.sampled_from(SEEDS)))
    dtype = data.draw(st.sampled_from(DTYPES))
    kind = data.draw(st.sampled_from(["l2", "mean", "max"]))
    lengths = data.draw(st.lists(st.sampled_from([0, 1, 2, 17, 100, 700]), max_size=5))
    info = torch.finfo(dtype)
    sizes = st.sampled_from([info.smallest_normal * 64, 0.0, 1.0, info.max / 64])
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 30)))
    segments = [
        (torch.randn(length, generator=random).clamp(-4, 4).double() * data.draw(sizes)).to(dtype)
        for length in lengths
    ]
    theta = torch.cat([torch.empty(0, dtype=dtype), *segments])
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    with AlignedMemory() as memory:
        got = gpu.segment_normalize(theta=theta, offsets=offsets, kind=kind)
    memory.check()
    want = reference.segment_normalize(theta.double(), offsets, kind)
    assert_close(got, want, 2 * want.abs())


@pytest.mark.parametrize("kind", ["l2", "mean", "max"])
def test_a_segment_with_nan_is_nan_and_no_other(kind: str, gpu: EmulatedBackend) -> None:
    theta = torch.tensor([1.0, torch.nan, -2.0, 3.0, 4.0, 0.0, -0.0])
    got = gpu.segment_normalize(theta=theta, offsets=torch.tensor([0, 3, 5, 7]), kind=kind)
    assert got[:3].isnan().all()
    assert got[3:5].isfinite().all()
    assert same_bits(got[5:], theta[5:])


@pytest.mark.parametrize("network", [Plain, Gated])
def test_a_whole_pass_gives_the_scores_of_the_cpu_s_kernels(
    network: type[torch.nn.Module], machine: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = lived_in(network()).double()
    loader = [(torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.tensor([1, 2]))]
    want = attrfast.attribute(model, loader, progress=False)
    machine.forget()
    machine.allow(0, (1 << 63) - 1, True)  # memory is watched in the ops' own tests
    backend = CudaBackend(machine, lambda x: (0, 0))
    monkeypatch.setattr(ops, "backend_for", lambda device: backend)
    got = attrfast.attribute(model, loader, progress=False)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-10, atol=1e-12)


# -- errors -------------------------------------------------------------------------------------------------


def test_a_failing_launch_names_the_op_and_its_sizes(machine: ModuleType) -> None:
    backend = CudaBackend(machine, lambda x: (1, 0))
    x = torch.zeros(2, 3, 5, 7, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"attribution of bfloat16 \(2, 3, 35\): no such device"):
        backend.attribution(x, x)


def test_memory_that_no_tensor_of_the_call_owns_is_not_touched(machine: ModuleType) -> None:
    machine.forget()
    x, s = torch.zeros(2, 3, 5, 7), torch.zeros(2, 3)
    machine.allow(x.data_ptr(), x.nbytes - 4, False)  # as if the last element were another's
    machine.allow(s.data_ptr(), s.nbytes, True)
    with pytest.raises(RuntimeError, match=r"a read of .* bytes outside the tensors of the call"):
        CudaBackend(machine, lambda x: (0, 0)).attribution(x, x)


# -- does the emulated GPU catch faults? --------------------------------------------------------------------

NO_FAULT, NO_BARRIER, NO_SECOND_BARRIER, PAST_THE_END, LONELY_BARRIER, MISALIGNED = range(6)


def faulty(machine: ModuleType, fault: int, seed: int) -> bool:
    """Whether the sums of a kernel with a fault are right."""
    machine.seed(seed)
    machine.forget()
    x = torch.arange(3 * 300.0).view(3, 300) + 1
    s = torch.full((3,), torch.nan)
    machine.allow(x.data_ptr(), x.nbytes, False)
    machine.allow(s.data_ptr(), s.nbytes, True)
    machine.faulty(x.data_ptr(), s.data_ptr(), 3, 300, fault)
    return torch.equal(s, x.sum(1))


def test_the_same_kernel_without_a_fault_is_right(machine: ModuleType) -> None:
    assert all(faulty(machine, NO_FAULT, seed) for seed in SEEDS)


@pytest.mark.parametrize("fault", [NO_BARRIER, NO_SECOND_BARRIER])
def test_a_missing_barrier_shows(fault: int, machine: ModuleType) -> None:
    assert not all(faulty(machine, fault, seed) for seed in SEEDS)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (PAST_THE_END, "a read of 4 bytes outside"),
        (LONELY_BARRIER, "wait at a barrier or a shuffle that others never reach"),
        (MISALIGNED, "misaligned"),
    ],
)
def test_a_wrong_access_or_barrier_is_an_error(
    fault: int, message: str, seed: int, machine: ModuleType
) -> None:
    with pytest.raises(RuntimeError, match=message):
        faulty(machine, fault, seed)
