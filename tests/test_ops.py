"""Every op's numbers: those of `attrfast.reference` in float64, whatever the shape, strides and processor."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import BOUNDS, DTYPES, LAYOUTS, MUTATES, OPS, SHARED, Call, calls, make_call, whole
from op_checks import ISAS, GuardedMemory, assert_close, exact, same_bits, unchanged, using

from attrfast import ops
from attrfast.errors import InputError

Tensor = torch.Tensor
pytestmark = pytest.mark.skipif(not ISAS, reason="the native module is not built")


@pytest.fixture
def threads() -> Iterator[None]:
    """The number of threads may be changed."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("op", OPS)
def test_an_op_agrees_with_its_definition_and_writes_nothing_else(op: str, isa: str) -> None:
    @given(calls(op))
    @settings(max_examples=150, deadline=None)
    def check(call: Call) -> None:
        want, terms = exact(call)
        with unchanged(call), using(isa):
            got = call.run()
        for result, expected, size in zip(got, want, terms, strict=True):
            assert_close(result, expected, size)

    check()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("op", OPS)
def test_an_op_agrees_with_its_definition_for_every_pair_of_layouts(op: str, isa: str) -> None:
    written = MUTATES.get(op)
    everything = sorted(LAYOUTS | SHARED)
    pairs = itertools.product(
        sorted(LAYOUTS) if written == "z" else everything,
        everything if written in (None, "z") else sorted(LAYOUTS),
    )
    # Each pair with and without guidance; the other choices change from one to the next.
    for turn, (layouts, guided) in enumerate(itertools.product(pairs, (False, True))):
        call = make_call(
            op,
            (2, 5, 11, 13),
            DTYPES[turn // 2 % 4],
            layouts=layouts,
            bounds=BOUNDS[turn // 2 % 5],
            scale=turn % 3 > 0,
            shift=turn % 5 > 0,
            residual=turn % 7 > 0,
            guided=guided,
            attribute=turn // 4 % 3,
            absolute=guided,
            count=turn % 2 == 0,
            coarse=op == "affine_relu_max_pool",
            seed=turn,
        )
        want, terms = exact(call)
        with unchanged(call), using(isa):
            got = call.run()
        for result, expected, size in zip(got, want, terms, strict=True):
            assert_close(result, expected, size)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("op", OPS)
def test_kernels_fill_their_results_and_nothing_beside_them(op: str, isa: str) -> None:
    @given(calls(op))
    @settings(max_examples=100, deadline=None)
    def check(call: Call) -> None:
        backend = ops.backend_for(torch.device("cpu"))
        memory = GuardedMemory()
        with using(isa):
            want = call.copied().run()
            with memory:
                got = call.copied().with_numbers().run(getattr(backend, op))
        memory.check()
        assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))

    check()


@pytest.mark.parametrize("op", sorted(MUTATES))
def test_an_in_place_form_gives_the_bits_of_the_other(op: str) -> None:
    @given(calls(op))
    @settings(max_examples=100, deadline=None)
    def check(call: Call) -> None:
        want = Call(call.base, call.args).run()
        assert all(same_bits(a, b) for a, b in zip(call.run(), want, strict=True))

    check()


@pytest.mark.parametrize("layout", sorted(SHARED))
@pytest.mark.parametrize("op", sorted(MUTATES))
def test_an_in_place_form_refuses_elements_that_share_memory(op: str, layout: str) -> None:
    with pytest.raises(InputError, match="share memory"):
        make_call(op, layouts=(layout,)).run()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_the_bits_do_not_depend_on_threads(
    op: str, dtype: torch.dtype, layout: str, isa: str, threads: None
) -> None:
    call = make_call(op, (3, 7, 53, 47), dtype, layouts=(layout,))
    results = []
    with using(isa):
        for count in (*range(1, 9), 1):
            torch.set_num_threads(count)
            assert torch.get_num_threads() == count
            results.append([x.clone() for x in call.copied().run()])
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("op", OPS)
def test_the_bits_do_not_depend_on_where_arguments_begin(op: str, layout: str, isa: str) -> None:
    call = make_call(op, (2, 5, 23, 29), layouts=(layout,))
    with using(isa):
        want = [x.clone() for x in call.copied().run()]
        for offset in range(1, 17):
            moved = {}
            for turn, (name, x) in enumerate(call.tensors.items()):
                start = offset * (turn + 1)
                row = torch.empty(whole(x).numel() + start, dtype=x.dtype)
                moved[name] = row.as_strided(x.shape, x.stride(), start).copy_(x)
            got = call.with_args(**moved).run()
            assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))


def test_calls_from_several_python_threads_do_not_meet() -> None:
    cases = [make_call(op, (2, 9, 31, 33), seed=seed) for op in OPS for seed in range(4)]
    want = [[x.clone() for x in call.copied().run()] for call in cases]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda call: call.copied().run(), cases))
    for results, expected in zip(got, want, strict=True):
        assert all(same_bits(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sums_over_a_large_map_are_as_exact_as_over_a_small_one(
    dtype: torch.dtype, layout: str, isa: str
) -> None:
    # Terms of one sign add their errors up; equal ones most of all, because they are rounded alike.
    call = make_call("attribution", (1, 3, 700, 701), dtype, absolute=True)
    for name, equal in (("x", (1.1, 1.7)), ("g", (0.37, 0.9))):
        for channel, value in enumerate(equal):
            call.args[name][:, channel] = value
    call = call.with_args(**{name: LAYOUTS[layout](x) for name, x in call.tensors.items()})
    (want,), (terms,) = exact(call)
    with using(isa):
        (got,) = call.run()
    assert_close(got, want, terms)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_more_elements_than_32_bits_can_count(layout: str) -> None:
    if psutil.virtual_memory().available < 12 << 30:
        pytest.skip("needs 12 GiB of free memory")
    count = 2**31 + 8
    if layout == "contiguous":
        x = torch.zeros(1, 1, count, dtype=torch.bfloat16)
    else:
        x = torch.zeros(1, count // 2, 2, dtype=torch.bfloat16).transpose(1, 2)
    x[..., -3:] = 2  # beyond what an int reaches, counted from the first element
    assert torch.equal(ops.attribution(x, x), torch.full(x.shape[:2], 12.0))
    assert torch.equal(ops.count_nonzero(x), torch.full(x.shape[:2], 3.0))
    if layout == "contiguous":  # the other one takes the same loop over rows, and seconds more
        ops.affine_relu_(x, None, None, None, 0.0, 1.0)
        assert x[..., -3:].eq(1).all()
        assert x[..., -8:-3].eq(0).all()


@st.composite
def segments(draw: st.DrawFn) -> tuple[list[Tensor], str]:
    """Segments of one vector, and a norm."""
    dtype = draw(st.sampled_from(DTYPES))
    kind = draw(st.sampled_from(["l2", "mean", "max"]))
    lengths = draw(st.lists(st.sampled_from([0, 1, 2, 3, 17, 100]), max_size=5))
    info = torch.finfo(dtype)
    # Squares of the first and the last neither overflow nor vanish on the way.
    sizes = st.sampled_from([info.smallest_normal * 64, 0.0, 1.0, info.max / 64])
    random = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    parts = [
        (torch.randn(length, generator=random).clamp(-4, 4).double() * draw(sizes)).to(dtype)
        for length in lengths
    ]
    return [torch.empty(0, dtype=dtype), *parts], kind


@pytest.mark.parametrize("isa", ISAS)
def test_each_segment_is_divided_by_its_own_norm(isa: str) -> None:
    norms = {"l2": lambda u: u.norm(), "mean": lambda u: u.abs().mean(), "max": lambda u: u.abs().max()}

    @given(segments())
    @settings(max_examples=100, deadline=None)
    def check(case: tuple[list[Tensor], str]) -> None:
        parts, kind = case
        theta = torch.cat(parts)
        before = theta.clone()
        lengths = [len(part) for part in parts]
        with using(isa):
            got = ops.segment_normalize(theta, torch.tensor([0, *lengths]).cumsum(0), kind)
        assert same_bits(theta, before)
        assert got.dtype == theta.dtype
        for part, result in zip(parts, got.split(lengths), strict=True):
            want = part.double()
            if want.any():
                want = want / want.abs().max()  # or float64 itself would overflow
                want = want / norms[kind](want)
            assert_close(result, want, 4 * want.abs())

    check()


@pytest.mark.parametrize("kind", ["l2", "mean"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_norm_of_a_long_narrow_segment_is_not_taken_in_the_narrow_type(
    dtype: torch.dtype, kind: str
) -> None:
    count = 1 << 18  # more than float16 can count
    got = ops.segment_normalize(torch.full((count,), 3.0, dtype=dtype), torch.tensor([0, count]), kind)
    assert got.eq(1.0 if kind == "mean" else count**-0.5).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", ["l2", "mean", "max"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bits_of_a_normalisation_do_not_depend_on_threads(
    dtype: torch.dtype, kind: str, isa: str, threads: None
) -> None:
    theta = torch.randn(4000, generator=torch.Generator().manual_seed(0)).to(dtype)
    offsets = torch.tensor([0, 1, 1, 700, 701, 2500, 3990, 4000])
    results = []
    with using(isa):
        for count in range(1, 9):
            torch.set_num_threads(count)
            results.append(ops.segment_normalize(theta, offsets, kind))
    assert all(same_bits(results[0], other) for other in results[1:])
