"""Errors of the ops, and which backend runs them or refuses to."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from op_cases import MUTATES, OPS, make_call
from op_checks import assert_close, exact

from attrfast import _backend, ops
from attrfast.errors import BackendError, InputError

CPU = torch.device("cpu")


def vector(name: str) -> list[tuple[dict[str, Any], str]]:
    """What is wrong with a vector per channel, and what is said of it."""
    return [
        ({name: torch.ones(4)}, rf"{name} has shape \(4,\), expected \(3,\)"),
        ({name: torch.ones(3, 1)}, rf"{name} has shape \(3, 1\), expected \(3,\)"),
        ({name: torch.ones(3).half()}, rf"{name} has dtype torch.float16, expected torch.float32"),
        ({name: torch.ones(3, device="meta")}, rf"{name} is on meta, expected cpu"),
    ]


def like(name: str) -> list[tuple[dict[str, Any], str]]:
    """The same for a tensor that must be like the first."""
    return [
        ({name: torch.ones(2, 3, 5)}, rf"{name} has shape \(2, 3, 5\), expected \(2, 3, 4, 5\)"),
        ({name: torch.ones(2, 3, 4, 5).double()}, rf"{name} has dtype torch.float64, expected torch.fl"),
        ({name: torch.ones(2, 3, 4, 5, device="meta")}, rf"{name} is on meta, expected cpu"),
    ]


def first(name: str) -> list[tuple[dict[str, Any], str]]:
    return [
        ({name: torch.ones(2, 3, 4, 5).int()}, "dtype torch.int32 is none of float32"),
        ({name: torch.ones(3)}, r"shape \(3,\) must be \(N, C\)"),
        ({name: torch.ones(2, 3, 1, 1, 1, 1)}, r"shape \(2, 3, 1, 1, 1, 1\) must be \(N, C\)"),
    ]


LIMITS = [
    ({"lower": 2.0, "upper": 1.0}, "lower 2.0 must not exceed upper 1.0"),
    ({"lower": float("nan")}, "lower nan"),
    ({"upper": float("nan")}, "lower 0.0 must not exceed upper nan"),
]
BRANCH = [
    ({"attribute": 3}, "attribute must be 0, 1 or 2, got 3"),
    ({"attribute": 2, "residual": None}, "attribute=2 .* needs the residual"),
]
POOL = [
    ({"kernel": [3]}, r"kernel must have two entries, got \[3\]"),
    ({"stride": [1, 1, 1]}, r"stride must have two entries, got \[1, 1, 1\]"),
    ({"padding": []}, r"padding must have two entries, got \[\]"),
    ({"kernel": [0, 2]}, r"kernel \[0, 2\] .* must be at least 1"),
    ({"stride": [1, 0]}, r"kernel .* and stride \[1, 0\] must be at least 1"),
    ({"kernel": [16, 16], "padding": [8, 8]}, r"kernel \[16, 16\] .* 255 places"),
    ({"padding": [2, 0]}, r"padding \[2, 0\] must be between 0 and half the kernel \[2, 2\]"),
    ({"padding": [-1, 0]}, r"padding \[-1, 0\] must be"),
    ({"kernel": [7, 2]}, r"size \[4, 5\] with padding \[0, 0\] has no room for a window of \[7, 2\]"),
]
WRONG: dict[str, list[tuple[dict[str, Any], str]]] = {
    "affine_relu": [*first("z"), *like("residual"), *vector("scale"), *vector("shift"), *LIMITS],
    "affine_relu_backward": [*first("a"), *like("g"), *vector("scale"), *LIMITS],
    "affine_add_relu_backward": [
        *(*first("a"), *like("g"), *like("residual"), *vector("scale"), *LIMITS, *BRANCH),
    ],
    "affine_relu_max_pool": [
        *(*first("z"), *vector("scale"), *vector("shift"), *LIMITS, *POOL),
        ({"z": torch.ones(2, 3, 4)}, r"shape \(2, 3, 4\) must be \(N, C, H, W\)"),
        ({"z": torch.ones(2, 3, 0, 5)}, r"size \[0, 5\] with padding \[0, 0\] has no room"),
    ],
    "affine_relu_max_pool_backward": [
        *(*vector("scale"), *LIMITS, *POOL),
        ({"p": torch.ones(2, 3, 2, 2).int()}, "dtype torch.int32 is none of float32"),
        ({"g": torch.ones(2, 3, 2, 3)}, r"g has shape \(2, 3, 2, 3\), expected \(2, 3, 2, 2\)"),
        ({"g": torch.ones(2, 3, 2, 2).half()}, "g has dtype torch.float16, expected torch.float32"),
        ({"size": [4]}, r"size must have two entries, got \[4\]"),
        ({"size": [9, 5]}, r"size \[9, 5\] does not pool to p's \[2, 2\]"),
        ({"code": torch.zeros(2, 3, 2, 3).byte()}, r"code must be uint8 of shape .* \(2, 3, 2, 3\)"),
        ({"code": torch.zeros(2, 3, 2, 2).int()}, "code must be uint8 .* got torch.int32"),
        ({"code": torch.zeros(2, 3, 2, 2, device="meta").byte()}, "code must be uint8 .* on meta"),
    ],
    "attribution": [*first("x"), *like("g")],
    "count_nonzero": first("x"),
}
WRONG |= {op: WRONG[op.rstrip("_")] for op in MUTATES}


@pytest.mark.parametrize(
    ("op", "args", "message"), [(op, args, said) for op in OPS for args, said in WRONG[op]]
)
def test_an_error_names_the_op_and_the_value(op: str, args: dict[str, Any], message: str) -> None:
    call = make_call(op, (2, 3, 4, 5), pool=([2, 2], [2, 2], [0, 0], False))
    call.copied().run()  # right as it stands
    with pytest.raises(InputError, match=f"^{op}: {message}"):
        call.with_args(**args).run()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"kind": "l3"}, "kind must be 'l2', 'mean' or 'max', got 'l3'"),
        ({"theta": torch.ones(2, 2)}, r"theta must be floating and of shape \(U,\), got .* \(2, 2\)"),
        ({"theta": torch.ones(4).int()}, "theta must be floating .* got torch.int32"),
        ({"offsets": torch.tensor([0, 4]).int()}, "offsets must be int64"),
        ({"offsets": torch.tensor([[0, 4]])}, "offsets must be int64 of shape"),
        ({"offsets": torch.tensor([]).long()}, "offsets must be int64 of shape"),
        ({"offsets": torch.tensor([0, 3])}, r"offsets must ascend from 0 to 4, got \[0, 3\]"),
        ({"offsets": torch.tensor([1, 4])}, r"offsets must ascend from 0 to 4, got \[1, 4\]"),
        ({"offsets": torch.tensor([0, 3, 2, 4])}, r"offsets must ascend .* got \[0, 3, 2, 4\]"),
    ],
)
def test_an_error_of_segment_normalize_names_the_value(args: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"^segment_normalize: {message}"):
        ops.segment_normalize(**{"theta": torch.ones(4), "offsets": torch.tensor([0, 4]), **args})


# -- backends -------------------------------------------------------------------------------------------------


@pytest.fixture
def backends() -> Iterator[None]:
    """The backends are looked for anew, and again after the test."""
    for cached in (_backend.find, _backend._preferred):
        cached.cache_clear()
    yield
    for cached in (_backend.find, _backend._preferred):
        cached.cache_clear()


@pytest.mark.parametrize("samples", [0, 2])
@pytest.mark.parametrize("op", OPS)
def test_the_plain_backend_can_be_asked_for(
    op: str, samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATTRFAST_BACKEND", "reference")
    assert ops.backend_for(CPU).name == "reference"
    call = make_call(op, (samples, 3, 4, 5))
    want, terms = exact(call)
    for result, expected, size in zip(call.run(), want, terms, strict=True):
        assert_close(result, expected, size)


@pytest.mark.parametrize("name", ["Reference", " reference "])
def test_case_and_spaces_of_the_variable_do_not_matter(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATTRFAST_BACKEND", name)
    assert ops.backend_for(CPU).name == "reference"


@pytest.mark.parametrize("name", [*_backend.NAMES, "nonsense"])
def test_a_backend_that_was_asked_for_runs_or_fails_loudly(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATTRFAST_BACKEND", name)
    usable = name in _backend.NAMES and _backend.find(name).backend is not None
    if usable:
        assert ops.backend_for(CPU).name == name
    else:
        with pytest.raises(BackendError, match=f"ATTRFAST_BACKEND='?{name}'?"):
            ops.attribution(torch.ones(1, 1), torch.ones(1, 1))


def test_the_cpu_backend_is_refused_on_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    if _backend.find("cpu").backend is None:
        pytest.skip("the native module is not built")
    monkeypatch.setenv("ATTRFAST_BACKEND", "cpu")
    with pytest.raises(BackendError, match="cpu can't be used on a tensor on meta"):
        ops.backend_for(torch.device("meta"))


def test_without_the_native_module_the_plain_backend_runs_and_says_so(
    backends: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "attrfast.native", None)
    monkeypatch.delenv("ATTRFAST_BACKEND", raising=False)
    with caplog.at_level("WARNING", "attrfast"):
        assert ops.backend_for(CPU).name == "reference"
        assert ops.backend_for(CPU).name == "reference"
    assert [record.message for record in caplog.records if "not built" in record.message]
    assert len(caplog.records) == 1  # said once
    monkeypatch.setenv("ATTRFAST_BACKEND", "cpu")
    with pytest.raises(BackendError, match="cpu can't be used: the native module is not built"):
        ops.backend_for(CPU)
