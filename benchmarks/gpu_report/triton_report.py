"""What Triton makes of the kernels for GPUs that need not be here."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from attrfast.kernels import launch
from benchmarks.gpu_report.row import Row, occupancy
from benchmarks.gpu_report.triton_cases import Case, cases

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
NAMES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.uint8: "u8",
    torch.int64: "i64",
}
# Alone they are the same for every call, or read what no layout aligns.
SMALL = {"partials_kernel", "segment_normalize_kernel"}


def rows() -> Iterator[Row]:
    """Compiles the kernels of every case, each distinct variant once."""
    moved = counted_bytes()
    seen: set[Any] = set()
    for case in cases():
        for config in launch.CONFIGS:
            for one in launches(case, config):
                for target in targets(case, config):
                    variant = one.kernel.fn.__name__, *map(str, signature(one)), one.threads, target
                    if variant not in seen:
                        seen.add(variant)
                        yield compiled_row(one, case, target, moved.get(case.name))


def targets(case: Case, config: launch.Config) -> list[str]:
    """What a case is compiled for: where all combinations would take an hour, those that differ most."""
    main = case.dtype in (torch.float32, torch.bfloat16)
    if not (case.usual or main):
        return []
    if config != launch.DEFAULT:
        return ["sm_90"] if case.usual else []
    return ["sm_80", "sm_90", "gfx942"] if case.usual and main else ["sm_80", "sm_90"]


def launches(case: Case, config: launch.Config = launch.DEFAULT) -> list[launch.Launch]:
    """What a call would start with a configuration."""
    default, launch.DEFAULT = launch.DEFAULT, config
    try:
        with launch.recorded() as made:
            case.run("meta")
    finally:
        launch.DEFAULT = default
    return made


def signature(one: launch.Launch) -> tuple[dict[str, str], dict[str, Any], dict[Any, Any]]:
    """Types, constants and alignments of a launch, as Triton's own launcher would find them for tensors
    that begin at multiples of 16 bytes."""
    types, constants, attributes = {}, dict(one.constants), {}
    for place, (name, value) in enumerate(zip(one.kernel.arg_names, one.args, strict=False)):
        if value is None:
            constants[name] = None
        elif isinstance(value, torch.Tensor):
            types[name] = "*" + NAMES[value.dtype]
            attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            types[name] = "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
    types |= dict.fromkeys(constants, "constexpr")
    return {name: types[name] for name in one.kernel.arg_names}, constants, attributes


def compiled(one: launch.Launch, target: str) -> Any:
    types, constants, attributes = signature(one)
    source = ASTSource(one.kernel, types, constants, attributes)
    options = {"num_warps": warps(one, target), "enable_fp_fusion": False}
    return triton.compile(source, target=TARGETS[target], options=options)


def warps(one: launch.Launch, target: str) -> int:
    return one.threads // TARGETS[target].warp_size


def compiled_row(one: launch.Launch, case: Case, target: str, moved: float | None) -> Row:
    kernel = compiled(one, target)
    read = read_nvidia if target.startswith("sm_") else read_amd
    found = read(kernel)
    shared = int(kernel.metadata.shared)
    name = one.kernel.fn.__name__
    return Row(
        backend="triton",
        kernel=name,
        case=f"{case.name}, {one.threads} threads" if name not in SMALL else str(case.dtype)[6:],
        target=target,
        warps=warps(one, target),
        shared=shared,
        aligned=case.aligned and name not in SMALL,
        moved=None if name in SMALL else moved,
        occupancy=occupancy(target, found["registers"], shared, warps(one, target)),
        **found,
    )


def read_nvidia(kernel: Any) -> dict[str, Any]:
    """Figures of a cubin, from its header and its machine code."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(kernel.asm["cubin"])
        usage = _output(knobs.nvidia.cuobjdump.path, "-res-usage", str(path))
        code = _output(knobs.nvidia.nvdisasm.path, "-c", str(path))
    resources = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    # LDG.E.128 loads 16 bytes, LDG.E.U16 two, LDG.E four; a predicate or modifiers may stand around.
    loads = [_width(m) for m in re.findall(r"\bLDG((?:\.\w+)*)", code)]
    stores = [_width(m) for m in re.findall(r"\bSTG((?:\.\w+)*)", code)]
    return {
        "registers": int(resources["REG"]),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "stack": int(resources["STACK"]) + int(resources["LOCAL"]),
        **_widths(loads, stores),
    }


def _width(modifiers: str) -> int:
    for word in modifiers.split("."):
        if word in ("128", "64"):
            return int(word) // 8
        if word in ("U8", "S8"):
            return 1
        if word in ("U16", "S16"):
            return 2
    return 4


def read_amd(kernel: Any) -> dict[str, Any]:
    """Figures of the assembly, from its metadata and its instructions."""
    text = kernel.asm["amdgcn"]
    number = {
        name: int(re.search(rf"\.{name}:\s+(\d+)", text)[1])  # type: ignore[index]
        for name in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
    }
    sizes = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "short": 2}
    sizes |= {"ubyte": 1, "byte": 1, "sbyte": 1, "sshort": 2, "short_d16": 2, "short_d16_hi": 2}

    def widths(what: str) -> list[int]:
        found = re.findall(rf"\b(?:global|buffer|flat)_{what}_([a-z0-9_]+)", text)
        return [sizes.get(word, sizes.get(word.split("_")[0], 4)) for word in found]

    return {
        "registers": number["vgpr_count"],
        # Scalar registers are spilled to lanes of vector registers: no memory is touched.
        "spills": number["vgpr_spill_count"],
        "stack": number["private_segment_fixed_size"],
        **_widths(widths("load"), widths("store")),
    }


def _widths(loads: list[int], stores: list[int]) -> dict[str, Any]:
    all_of_them = loads + stores
    wide = sum(w for w in all_of_them if w == 16) / max(1, sum(all_of_them))
    return {"load": max(loads, default=0), "store": max(stores, default=0), "wide": wide}


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def counted_bytes() -> dict[str, float]:
    """Call -> bytes asked for over the floor, from a process that runs the interpreter."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_report.triton_bytes"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        check=True,
        capture_output=True,
        text=True,
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found
