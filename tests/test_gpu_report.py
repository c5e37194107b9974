"""The report on the machine code of GPU kernels, on a few of them; the whole is `make gpu-report`."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET"):
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from benchmarks.gpu_report import triton_report
from benchmarks.gpu_report.row import Row, occupancy, table
from benchmarks.gpu_report.triton_cases import Case, cases

GOOD = Row("triton", "k", "call", "sm_90", 8, 64, 0, 0, 128, 16, 16, 0.96, True, 1.004, 0.5)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Compiled here and now, not found from an earlier run.
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def case_named(name: str) -> Case:
    return next(case for case in cases() if case.name == name)


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("affine_relu_backward 64x64x56x56 float32", "backward_lines"),
        ("affine_relu_backward 64x64x56x56 bfloat16 channels-last", "backward_columns"),
        ("max_pool_backward 2x2 64x64x112x112 bfloat16", "pool_backward_pairs"),
    ],
)
def test_a_kernel_does_not_spill_and_moves_16_bytes_at_a_time(name: str, kernel: str) -> None:
    case = case_named(name)
    made = triton_report.launches(case)[0]
    row = triton_report.compiled_row(made, case, "sm_90", None)
    assert row.kernel == kernel
    assert row.faults() == []
    assert (row.spills, row.stack, row.load, row.store) == (0, 0, 16, 16)
    assert row.wide > 0.75
    assert row.registers <= 128


def test_no_sum_contains_a_fused_multiply_add() -> None:
    # Or its last bit would depend on the configuration.
    case = case_named("attribution 64x64x56x56 float32")
    kernel = triton_report.compiled(triton_report.launches(case)[0], "sm_90")
    assert "mul" in kernel.asm["ptx"]
    assert "fma.rn.f32" not in kernel.asm["ptx"]


def test_nothing_is_started_while_launches_are_recorded() -> None:
    made = triton_report.launches(case_named("attribution 64x64x112x112 float32"))
    assert [one.kernel.fn.__name__ for one in made] == ["attribution_lines", "partials_kernel"]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"spills": 3}, "3 spills"),
        ({"stack": 40}, "a stack of 40 bytes"),
        ({"load": 8}, "loads of 8 bytes where 16 are possible"),
        ({"wide": 0.5}, "only 50% of the bytes move 16 at a time"),
        ({"wide": 0.0, "load": 4, "aligned": False}, None),
        ({}, None),
    ],
)
def test_faults_are_named(change: dict[str, Any], fault: str | None) -> None:
    assert dataclasses.replace(GOOD, **change).faults() == ([fault] if fault else [])


def test_occupancy_is_that_of_nvidia_s_calculator() -> None:
    assert occupancy("sm_90", 32, 0, 8) == 1.0
    assert occupancy("sm_90", 64, 0, 8) == 0.5
    assert occupancy("sm_80", 255, 0, 8) == 0.125
    assert occupancy("sm_80", 32, 80 << 10, 8) == 0.25  # two programs' shared memory
    assert occupancy("gfx942", 32, 0, 8) is None


def test_the_table_has_a_cell_for_every_column() -> None:
    lines = table([GOOD, dataclasses.replace(GOOD, moved=None, occupancy=None)]).splitlines()
    assert {line.count("|") for line in lines} == {15}
