"""The Triton backend: its numbers, in the interpreter, and when it can't be used."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from attrfast import _backend, ops
from attrfast.errors import BackendError

pytest.importorskip("triton")
HERE = Path(__file__).parent
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the kernels")


@pytest.mark.slow
def test_the_kernels_pass_the_numerical_tests_in_the_interpreter() -> None:
    # A process of its own: kernels are for the interpreter, or not, from their import on.
    suite = [str(HERE / "triton_suite.py"), "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *suite],
        env={**os.environ, "TRITON_INTERPRET": "1", "ATTRFAST_BACKEND": "triton"},
        cwd=HERE.parent,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@NO_GPU
def test_without_a_gpu_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    found = _backend.find("triton")
    assert found.backend is None
    assert "no GPU was found" in found.reason
    monkeypatch.setenv("ATTRFAST_BACKEND", "triton")
    with pytest.raises(
        BackendError, match=r"ATTRFAST_BACKEND=triton can't be used: no GPU .*TRITON_INTERPRET=1"
    ):
        ops.backend_for(torch.device("cpu"))


def test_tensors_of_the_cpu_are_refused_outside_the_interpreter() -> None:
    from attrfast.kernels.backend import TritonBackend

    with pytest.raises(BackendError, match=r"can't be used on a tensor on cpu: .* TRITON_INTERPRET=1"):
        TritonBackend().check_device("cpu")
    TritonBackend().check_device("cuda")
