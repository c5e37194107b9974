"""Compiles the GPU's kernels for the CPU, once for each state of the sources."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
NAME = "attrfast_cuda_on_cpu"
FLAGS = ("-O1", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-w")


def _compiler() -> str | None:
    return next(
        (c for c in (os.environ.get("CXX", ""), "g++", "clang++") if c and shutil.which(c)), None
    )


def available() -> bool:
    """Whether there are a compiler and pybind11 to build with."""
    return _compiler() is not None and importlib.util.find_spec("pybind11") is not None


def load() -> ModuleType:
    """The module, built if it is not there yet."""
    import pybind11

    kernels = sorted((ROOT / "csrc/cuda").glob("*.cu"))
    sources = [HERE / "module.cpp", HERE / "fibers.cpp", *kernels]
    read = [p for p in [*(ROOT / "csrc").rglob("*"), *HERE.glob("*")] if p.is_file()]
    state = hashlib.sha256(repr((sys.version, FLAGS)).encode())
    for path in sorted(p for p in read if p.suffix in (".cu", ".cuh", ".h", ".cpp")):
        state.update(path.read_bytes())
    folder = ROOT / "build" / "cuda_on_cpu" / state.hexdigest()[:16]
    target = folder / f"{NAME}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        own = folder / str(os.getpid())  # several processes may build at once
        own.mkdir(exist_ok=True)
        includes = [f"-I{p}" for p in (HERE, pybind11.get_include(), sysconfig.get_paths()["include"])]
        objects = []
        for source in sources:
            objects.append(str(own / f"{source.name}.o"))
            command = [_compiler(), *FLAGS, *includes, "-x", "c++", "-c", str(source), "-o", objects[-1]]
            subprocess.run([str(part) for part in command], check=True)
        subprocess.run([str(_compiler()), "-shared", *objects, "-o", str(own / target.name)], check=True)
        os.replace(own / target.name, target)
        shutil.rmtree(own)
    spec = importlib.util.spec_from_file_location(NAME, target)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
