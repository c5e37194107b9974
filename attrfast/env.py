"""What attrfast runs on: versions, the backends that were found, and why one is missing.

`python -m attrfast.env` prints it.
"""

from __future__ import annotations

import json
import platform
from importlib import metadata
from pathlib import Path

import torch

from attrfast._backend import NAMES, asked, find
from attrfast.errors import BackendError

_PACKAGES = (
    "attrfast",
    "torch",
    "torchvision",
    "triton",
    "torch-pruning",
    "networkx",
    "scikit-learn",
)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _build_record() -> dict[str, str]:
    """What setup.py noted when it built, or did not build, the native module."""
    try:
        record = json.loads((Path(__file__).parent / "_build.json").read_text())
    except (OSError, ValueError):
        return {}
    return {str(key): str(value) for key, value in record.items()}


def _backend_line(name: str, record: dict[str, str]) -> str:
    found = find(name)
    if found.backend is None:
        reason = found.reason
        if name == "cpu" and record.get("native", "built") != "built":
            reason = record["native"]
        return f"missing: {reason}"
    if name == "cpu":
        from attrfast import _native

        runs = ", ".join(_native.available_isas())
        return f"found: {_native.isa()} in use (this processor runs {runs})"
    if name == "triton":
        from attrfast.kernels.launch import interpreted

        return "found: " + ("in Triton's interpreter, on the CPU" if interpreted() else "on the GPU")
    if name == "cuda":
        return "found: on the GPU"
    return "found: plain PyTorch, on any device"


def facts() -> dict[str, str]:
    """What is found, by name."""
    record = _build_record()
    lines = [("python", platform.python_version()), ("platform", platform.platform())]
    lines += [(package, _version(package)) for package in _PACKAGES]
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU found"
    lines += [("threads", str(torch.get_num_threads())), ("CUDA", cuda)]
    lines += [("compiler", record.get("compiler") or "unknown")]
    lines += [("CUDA sources", record.get("cuda", "unknown"))]
    lines += [(f"backend {name}", _backend_line(name, record)) for name in NAMES]
    try:
        forced = asked()
        lines.append(("ATTRFAST_BACKEND", forced or "not set: the fastest is used"))
    except BackendError as error:
        lines.append(("ATTRFAST_BACKEND", str(error)))
    return dict(lines)


def report() -> str:
    """The facts, as lines of text."""
    return "\n".join(f"{name:<18} {value}" for name, value in facts().items())


if __name__ == "__main__":
    print(report())
