"""What is built from the sources works where the sources are not."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow
# The CUDA sources are compiled by the installation that these tests run in; once is enough.
ENVIRONMENT = {**os.environ, "ATTRFAST_CUDA": "0"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an sdist and the wheel that was made from it, in pip's isolated environment."""
    folder = tmp_path_factory.mktemp("dist")
    run([sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)], env=ENVIRONMENT)
    return folder


def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


def wheel_from(built: Path, folder: Path, **environment: str) -> Path:
    """Another wheel from the sdist, as pip builds it under these environment variables."""
    (sdist,) = built.glob("*.tar.gz")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder)]
    run([*command, str(sdist)], env={**ENVIRONMENT, **environment})
    (wheel,) = folder.glob("*.whl")
    return wheel


def run_installed(wheel: Path, folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Runs code against the wheel alone: without `site`, an editable install is not seen."""
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    run([*install, str(wheel)])
    path = os.pathsep.join((str(folder), sysconfig.get_paths()["purelib"]))
    env = {**os.environ, "PYTHONPATH": path}
    return run([sys.executable, "-S", "-P", "-c", code], cwd=folder, env=env)


SCORES = """
import torch, attrfast, attrfast.env, attrfast.kernels
from attrfast import models
torch.manual_seed(0)
batch = torch.randn(2, 1, 28, 28), torch.tensor([0, 1])
scores = attrfast.attribute(models.vgg_small(), [batch], progress=False)
print(attrfast.__file__)
print(attrfast.ops.backend_for(torch.device("cpu")).name, round(float(scores["features.0"].norm()), 3))
print(attrfast.env.report())
"""


def test_the_sdist_holds_the_sources(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for path in (
        "setup.py",
        "csrc/bindings.cpp",
        "csrc/cpu/kernels.inl",
        "kernels/__init__.py",
        "LICENSE",
    ):
        assert path in names


def test_the_wheel_works_outside_the_checkout(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert any(name.startswith("attrfast/_native") and name.endswith(".so") for name in names)
    assert "attrfast/kernels/__init__.py" in names
    assert "attrfast/py.typed" in names
    where, backend, *_ = run_installed(wheel, tmp_path, SCORES).stdout.splitlines()
    assert where.startswith(str(tmp_path))
    assert backend == "cpu 1.0"


def test_without_a_compiler_the_package_says_which_backend_it_uses(built: Path, tmp_path: Path) -> None:
    wheel = wheel_from(built, tmp_path, CXX="no-such-compiler")
    done = run_installed(wheel, tmp_path / "to", SCORES)
    assert "\nreference 1.0\n" in done.stdout
    assert "no C++ compiler was found (no-such-compiler)" in done.stdout
    assert done.stderr.count("attrfast runs its plain PyTorch ops on the CPU") == 1


def test_the_native_module_can_be_left_out(built: Path, tmp_path: Path) -> None:
    wheel = wheel_from(built, tmp_path, ATTRFAST_NATIVE="0")
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]
    done = run_installed(wheel, tmp_path / "to", SCORES)
    assert "not built: ATTRFAST_NATIVE=0" in done.stdout
    assert "\nreference 1.0\n" in done.stdout


def test_an_impossible_choice_about_cuda_is_an_error(built: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="ATTRFAST_CUDA must be 0, 1 or auto, got 'maybe'"):
        wheel_from(built, tmp_path, ATTRFAST_CUDA="maybe")
