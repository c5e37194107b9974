"""Facts about the machine and the versions, which stand beside every figure."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path

import torch

THREADS = 2


def facts() -> dict[str, str | int]:
    """Processor, threads, versions and the instruction set that attrfast's kernels use."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "instruction_set": _instruction_set(),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "captum", "torch-pruning", "attrfast")},
        "commit": _commit(),
        "day": time.strftime("%Y-%m-%d"),
        "load_before": f"{os.getloadavg()[0]:.2f}",
    }


def has_bf16() -> bool:
    """Whether the processor itself multiplies bfloat16 numbers, as far as torch (2.9 and newer) knows."""
    known = getattr(torch.cpu, "get_capabilities", dict)()
    return any(there for name, there in known.items() if name.endswith("bf16"))


def one_line(about: dict[str, str | int]) -> str:
    """The facts that a reader of a table needs."""
    return (
        f"{about['processor']} ({about['cores']} cores), {about['threads']} threads, "
        f"{about['instruction_set']} kernels, torch {about['torch']}, captum {about['captum']}, "
        f"torch-pruning {about['torch-pruning']}, attrfast at {about['commit']}, {about['day']}, "
        f"load average {about['load_before']} at the start"
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _instruction_set() -> str:
    from attrfast import ops

    if ops.backend_for(torch.device("cpu")).name != "cpu":
        return "no native"
    from attrfast import _native

    return str(_native.isa())


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """The commit that was measured; `-dirty` where the code measured had changed since."""
    try:
        commit = _git("rev-parse", "--short", "HEAD").stdout.strip()
        return commit + ("-dirty" if _git("diff", "HEAD", "--", "attrfast", "csrc").stdout else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown commit"


def _git(*arguments: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[1]
    return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)
