"""The numerical tests of the ops over the Triton backend, in Triton's interpreter.

Run by `test_triton.py` in a process of its own, because TRITON_INTERPRET must be set before kernels are
imported. The tests are those of the CPU's kernels, unchanged but for the number of their examples; what
follows them is what only Triton kernels have.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import hypothesis
import numpy as np
import op_checks
import pytest
import torch
import triton
import triton.language as tl
import true_rounding
from op_cases import DTYPES, OPS, Call, make_call
from small_networks import Plain, Reused
from triton.runtime import interpreter

FEWER = 30

_settings = hypothesis.settings
hypothesis.settings = lambda max_examples, deadline: _settings(
    max_examples=-(-max_examples // FEWER), deadline=None, database=None, derandomize=True
)
op_checks.ISAS = ["triton"]
op_checks.using = lambda _: nullcontext()
# ruff: noqa: E402, F401
from test_ops import (
    test_an_in_place_form_gives_the_bits_of_the_other,
    test_an_op_agrees_with_its_definition_and_writes_nothing_else,
    test_each_segment_is_divided_by_its_own_norm,
    test_kernels_fill_their_results_and_nothing_beside_them,
)
from test_ops_pooling import (
    test_a_guided_gradient_is_summed_before_its_sign_counts,
    test_pooling_and_its_gradient_are_pytorch_s,
)
from test_ops_registration import test_results_lie_as_the_fake_says as lie_as_the_fake_says
from test_ops_values import (
    test_every_16_bit_pattern_is_read_and_written_back_unchanged,
    test_no_gradient_passes_a_clamped_element,
    test_rounding_to_16_bits_is_pytorch_s,
    test_special_values_are_pooled_as_by_pytorch,
    test_special_values_go_backward_as_by_the_definition,
    test_special_values_go_forward_as_by_the_definition,
)

hypothesis.settings = _settings

import attrfast
from attrfast import _backend, ops, reference
from attrfast.errors import BackendError
from attrfast.kernels import launch, tiles

Tensor = torch.Tensor
CPU = torch.device("cpu")
LAID = ["contiguous", "channels last"]


# Infinities and NaN are among the arguments; NumPy warns of what comes of them.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture
def isa() -> str:
    return "triton"


def test_this_process_runs_triton() -> None:
    assert launch.interpreted()
    assert ops.backend_for(CPU).name == "triton"


@pytest.mark.parametrize("layout", [*LAID, "every other element"])
@pytest.mark.parametrize("op", OPS)
def test_results_lie_as_the_fake_says(op: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for dims in (2,) if "pool" in op else range(4):
        lie_as_the_fake_says(op, dims, layout, "triton", monkeypatch)


# -- tiles --------------------------------------------------------------------------------------------------

# Where a row is more than one line or piece, ends in the middle of one, or fills one exactly; channels
# that leave part of a tile empty; windows that tile the input and windows that do not.
LARGE = [(2, 3, 4096), (2, 3, 4097), (1, 2, 9, 1031), (3, 70, 16, 17), (1, 300, 3), (2, 1, 95, 96)]
POOLS = [
    ([2, 2], [2, 2], [0, 0], False),
    ([3, 3], [2, 2], [1, 1], False),
    ([3, 2], [3, 2], [0, 0], True),
    ([4, 4], [1, 1], [2, 2], False),
]


def check(call: Call) -> list[Tensor]:
    want, terms = op_checks.exact(call)
    with op_checks.unchanged(call):
        got = call.run()
    for result, expected, size in zip(got, want, terms, strict=True):
        op_checks.assert_close(result, expected, size)
    return got


@pytest.mark.parametrize("layout", LAID)
@pytest.mark.parametrize("shape", LARGE, ids=str)
@pytest.mark.parametrize("op", [op for op in OPS if "pool" not in op and not op.endswith("_")])
def test_rows_of_several_lines(op: str, shape: tuple[int, ...], layout: str) -> None:
    check(make_call(op, shape, layouts=(layout,), bounds=(-0.3, 0.7), guided=True, attribute=2))


@pytest.mark.parametrize("layout", LAID)
@pytest.mark.parametrize("pool", POOLS, ids=str)
@pytest.mark.parametrize("shape", [(1, 2, 96, 92), (2, 9, 6, 14)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_windows_that_tile_the_input_and_others(
    shape: tuple[int, ...], dtype: torch.dtype, pool: Any, layout: str
) -> None:
    for op in ("affine_relu_max_pool", "affine_relu_max_pool_backward"):
        check(make_call(op, shape, dtype, layouts=(layout,), pool=pool, coarse=True, guided=True))


@pytest.mark.parametrize("layout", LAID)
@pytest.mark.parametrize("place", [0, 2, 8, 255])
def test_kernels_write_to_no_place_outside_the_input(layout: str, place: int) -> None:
    # Codes that no pooling gives: windows at the borders reach into the padding.
    call = make_call(
        "affine_relu_max_pool_backward", (2, 3, 7, 9), layouts=(layout,), bounds=(None, None),
        pool=([3, 3], [2, 2], [1, 1], False), scale=False, coarse=True,
    )  # fmt: skip
    call = call.with_args(code=torch.full_like(call.args["code"], place)).with_numbers()
    backend = ops.backend_for(CPU)
    memory = op_checks.GuardedMemory()
    with memory:
        gz, s = call.run(backend.affine_relu_max_pool_backward)
    memory.check()
    first, last = slice(1, None), slice(-1)
    kept = {0: (first, first), 2: (first, last), 8: (last, last), 255: (slice(0), slice(0))}[place]
    assert gz.sum() == call.args["g"][:, :, *kept].sum()
    assert torch.equal(s, reference.attribution(call.args["p"], call.args["g"]))


@pytest.mark.parametrize("layout", LAID)
@pytest.mark.parametrize("op", OPS)
def test_every_configuration_gives_the_same_bits(
    op: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What lets the choice be made by the clock.
    for shape in ((2, 3, 50, 90), (2, 40, 7, 9)):
        call = make_call(op, shape, layouts=(layout,), pool=([2, 2], [2, 2], [0, 0], False))
        results = []
        for elements in (512, 2048, 4096, 8192):
            monkeypatch.setattr(launch, "DEFAULT", launch.Config(elements, 128))
            results.append([x.clone() for x in call.copied().run()])
        for other in results[1:]:
            assert all(op_checks.same_bits(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_are_taken_in_the_order_that_is_told(dtype: torch.dtype) -> None:
    x = torch.randn(1, 3, 4096, generator=torch.Generator().manual_seed(0)).to(dtype)
    want = (x.to(reference.compute_dtype(dtype)) ** 2)[0]
    while want.shape[1] > 1:
        want = want[:, ::2] + want[:, 1::2]
    assert op_checks.same_bits(ops.attribution(x, x), want.T)


@pytest.mark.parametrize("layout", LAID)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_sums_over_a_large_map_are_as_exact_as_over_a_small_one(dtype: torch.dtype, layout: str) -> None:
    # All terms have one sign: where errors add up most.
    check(make_call("attribution", (1, 2, 210, 211), dtype, layouts=(layout,), absolute=True))


@triton.jit
def where_a_tile_begins(
    out_ptr, rows, units, UNIT: tl.constexpr, LINES: tl.constexpr, WIDTH: tl.constexpr,
    SPLIT: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    base, _offset, inside, _row, line, _is_line, _first = tiles.line_tile(
        rows, units, 1, UNIT, LINES, WIDTH, SPLIT, FLAT
    )
    tl.store(out_ptr, base)
    tl.store(out_ptr + 1, tl.sum(inside.to(tl.int64)))
    tl.store(out_ptr + 2, tl.max(line))


@pytest.mark.parametrize(
    ("rows", "positions"), [(3 << 20, 4096), (3 << 22, 1000), (3 << 26, 64), (5, (1 << 30) + 1032)]
)
def test_more_elements_than_32_bits_can_count(
    rows: int, positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The last program's place, without the memory for all of them.
    cut = tiles.cut_lines(rows, positions)
    constants = cut.constants(4096)
    last = cut.programs(4096) - 1
    handle = interpreter.TensorHandle(np.array([last], np.int32), tl.int32)
    builder = interpreter.interpreter_builder
    monkeypatch.setattr(builder, "create_get_program_id", lambda axis: handle)
    out = torch.zeros(3, dtype=torch.int64)
    del constants["ROW_UNIT"]
    where_a_tile_begins[(1,)](out, rows, positions // cut.unit, **constants)
    base, count, line = out.tolist()
    assert base > 1 << 31
    assert base + count == rows * positions
    assert line >= rows * cut.pieces - 1


@pytest.mark.parametrize("positions", [1, 2, 3, 49, 64, 4096, 4097, 1 << 20])
@pytest.mark.parametrize("elements", [2048, 4096])
def test_the_cut_covers_every_element_once(positions: int, elements: int) -> None:
    cut = tiles.cut_lines(6, positions)
    assert cut.width * cut.pieces >= positions
    assert cut.width & (cut.width - 1) == 0
    for channels in (1, 3, 64, 1000):
        columns = tiles.cut_columns(2, positions, channels)
        walk = columns.steps * columns.height
        assert (columns.pieces - 1) * walk < positions <= columns.pieces * walk
        assert columns.blocks(elements) * columns.width(elements) >= channels


# -- normalisation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["l2", "mean", "max"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_segment_longer_than_a_block(dtype: torch.dtype, kind: str) -> None:
    theta = torch.randn(4600, generator=torch.Generator().manual_seed(0)).to(dtype)
    offsets = torch.tensor([0, 1024, 1024, 4500, 4600])
    got = ops.segment_normalize(theta, offsets, kind)
    want = reference.segment_normalize(theta.double(), offsets, kind)
    op_checks.assert_close(got, want, 4 * want.abs())


@pytest.mark.parametrize("kind", ["l2", "mean", "max"])
def test_a_segment_with_nan_or_infinity_is_as_defined(kind: str) -> None:
    theta = torch.tensor([1.0, torch.nan, 2.0, torch.inf, 1.0, torch.nan, 3.0, -4.0])
    offsets = torch.tensor([0, 3, 5, 6, 8])
    got = ops.segment_normalize(theta, offsets, kind)
    want = reference.segment_normalize(theta, offsets, kind)
    torch.testing.assert_close(got, want, equal_nan=True)


# -- choosing and refusing ------------------------------------------------------------------------------------


def test_the_fastest_configuration_is_chosen() -> None:
    ran: list[launch.Config] = []

    def clock(call: Any) -> float:
        call()
        return {launch.CONFIGS[-1]: 1.0}.get(ran[-1], 2.0)

    assert launch.fastest(ran.append, clock) == launch.CONFIGS[-1]
    assert ran == list(launch.CONFIGS)
    assert launch.fastest(ran.append, lambda call: 1.0) == launch.DEFAULT


def test_without_a_gpu_nothing_is_measured() -> None:
    assert launch.tuned("key", CPU, lambda config: pytest.fail("measured")) == launch.DEFAULT


def test_tensors_of_other_devices_are_refused() -> None:
    with pytest.raises(BackendError, match="can't be used on a tensor on cuda: TRITON_INTERPRET=1"):
        ops.backend_for(torch.device("cuda"))


# -- a whole pass -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", [Plain, Reused])
@pytest.mark.parametrize("criterion", ["taylor", "taylor_guided"])
def test_a_whole_pass_gives_the_scores_of_the_cpu_s_kernels(
    criterion: str, network: type[torch.nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    if _backend.find("cpu").backend is None:
        pytest.skip("the native module is not built")
    torch.manual_seed(0)
    model = network().eval()
    images, labels = torch.randn(2, 3, 8, 8), torch.tensor([1, 2])
    scores = {}
    for backend in ("cpu", "triton"):
        monkeypatch.setenv("ATTRFAST_BACKEND", backend)
        scores[backend] = attrfast.attribute(model, [(images, labels)], criterion=criterion)
    for name in scores["cpu"]:
        torch.testing.assert_close(scores["triton"][name], scores["cpu"][name], rtol=2e-5, atol=1e-7)
