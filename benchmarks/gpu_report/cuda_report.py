"""What nvcc makes of the CUDA kernels, and what they ask of memory.

Registers, spills and the widest accesses are read from the machine code. Bytes are counted while the
kernels run on the CPU (tests/cuda_on_cpu/), access by access: each kernel holds both a path for whole
slots of 16 bytes and one for the rest, and only a run tells how often each is taken.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from attrfast.cuda import CudaBackend
from benchmarks.gpu_report.row import Row, occupancy

ROOT = Path(__file__).resolve().parent.parent.parent
TARGETS = ("sm_80", "sm_90")
WARPS = 8  # of a block: kThreads of csrc/cuda/plan.h
TYPES = {
    torch.float32: "float",
    torch.float64: "double",
    torch.bfloat16: "BFloat16",
    torch.float16: "Half",
}
POOLINGS = {
    "FixedWindow<2, 2, 0>": ([2, 2], [2, 2], [0, 0]),
    "FixedWindow<3, 2, 1>": ([3, 3], [2, 2], [1, 1]),
    "AnyWindow": ([3, 3], [1, 1], [1, 1]),
}

Tensor = torch.Tensor


@dataclass(frozen=True)
class Run:
    """What one kernel asked for in one call.

    Attributes:
        call: in words.
        shared: bytes of shared memory of a block.
        wide: share of the bytes that moved 16 at a time, per-channel vectors left out.
        moved: bytes asked of memory over bytes that must move.
        aligned: whether all of the call's tensors could move so.
    """

    call: str
    shared: int
    wide: float
    moved: float
    aligned: bool


class CudaRow(Row):
    def faults(self) -> list[str]:
        # Sums are stored one by one, tensors by slots.
        writes = re.search("AffineReluOp|BackwardOp|pool_", self.kernel)
        narrow = self.aligned and writes and self.store < 16
        return super().faults() + ([f"stores of {self.store} bytes at most"] if narrow else [])


def reason() -> str:
    """Why there can be no rows, or nothing."""
    missing = [tool for tool in ("cuobjdump", "nvdisasm") if _tool(tool) is None]
    if shutil.which("nvcc") is None:
        missing.insert(0, "nvcc")
    return f"not found: {', '.join(missing)}" if missing else ""


def rows(targets: Iterable[str] = TARGETS, count_bytes: bool = True) -> Iterator[Row]:
    """Compiles every kernel, one source at a time."""
    runs = counted() if count_bytes else {}
    for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
        for target in targets:
            for kernel, found in compiled(source, target).items():
                run = runs.get(kernel)
                shared = run.shared if run else 0
                yield CudaRow(
                    backend="cuda",
                    kernel=kernel,
                    case=run.call if run else "",
                    target=target,
                    warps=WARPS,
                    registers=found["registers"],
                    spills=found["spills"],
                    stack=found["stack"],
                    shared=shared,
                    load=found["load"],
                    store=found["store"],
                    wide=run.wide if run else found["wide"],
                    aligned=run.aligned if run else False,
                    moved=run.moved if run else None,
                    occupancy=occupancy(target, found["registers"], shared, WARPS),
                )


# -- the machine code -----------------------------------------------------------------------------------------


def compiled(source: Path, target: str) -> dict[str, dict[str, Any]]:
    """Kernel -> its figures."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = str(Path(folder) / "kernels.cubin")
        flags = ("-std=c++17", "-O3", f"-arch={target}", "-cubin")
        _output("nvcc", *flags, str(source), "-o", cubin)
        usage = _output(_tool("cuobjdump"), "-res-usage", cubin)
        code = _output(_tool("nvdisasm"), "-c", cubin)
    bodies = dict(re.findall(r"^\.text\.(\S+):\n(.*?)(?=^//-----|\Z)", code, re.DOTALL | re.MULTILINE))
    found = {}
    for name, resources in re.findall(r"Function (\S+):\n\s*(.*)", usage):
        number = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", resources)}
        body = bodies[name]
        loads = [_width(m) for m in re.findall(r"\bLDG((?:\.\w+)*)", body)]
        stores = [_width(m) for m in re.findall(r"\bSTG((?:\.\w+)*)", body)]
        together = loads + stores
        found[_short(name)] = {
            "registers": number["REG"],
            "spills": len(re.findall(r"\b(?:LDL|STL)\b", body)),
            "stack": number["STACK"] + number["LOCAL"],
            "load": max(loads, default=0),
            "store": max(stores, default=0),
            "wide": sum(w for w in together if w == 16) / max(1, sum(together)),
        }
    return found


def _width(modifiers: str) -> int:
    """Bytes of an access: LDG.E.128 loads 16, LDG.E.U16 two, LDG.E four."""
    sizes = {"128": 16, "64": 8, "U8": 1, "S8": 1, "U16": 2, "S16": 2}
    return next((sizes[word] for word in modifiers.split(".") if word in sizes), 4)


def _short(symbol: str) -> str:
    """A kernel's name with its template arguments, as the sources write them."""
    name = _output("c++filt", symbol).strip().removeprefix("void ")
    depth, end = 0, len(name)
    for i, char in enumerate(name):
        depth += (char == "<") - (char == ">")
        if char == "(" and depth == 0 and not name.startswith("(int)", i):
            end = i
            break
    return re.sub(r"\(int\)|attrfast::cuda::", "", name[:end]).replace("> >", ">>")


def _tool(name: str) -> str | None:
    """One of CUDA's binary tools: from the PATH, or the copy that Triton brings."""
    found = shutil.which(name)
    if found is None:
        try:
            from triton import knobs

            found = getattr(knobs.nvidia, name).path
        except (ImportError, AttributeError, RuntimeError):
            return None
    return found


def _output(*command: str | None) -> str:
    return subprocess.run(
        [str(word) for word in command], check=True, capture_output=True, text=True
    ).stdout


# -- the bytes ------------------------------------------------------------------------------------------------


def counted() -> dict[str, Run]:
    """Kernel -> a call of it, run on the CPU."""
    sys.path.insert(0, str(ROOT / "tests"))
    from cuda_on_cpu import build

    module = build.load()
    out: dict[str, Run] = {}
    for dtype in TYPES:
        _count_elementwise(module, dtype, out)
        _count_poolings(module, dtype, out)
    pairs = [(x, x.clone()) for x in (_laid((4, 64, 8, 8), d, last) for d in TYPES for last in (0, 1))]
    _count(module, "many_taps_kernel", "attributions", {"taps": pairs}, "8 of 4x64x8x8", out)
    return out


def _count_elementwise(module: Any, dtype: torch.dtype, out: dict[str, Run]) -> None:
    lanes = 16 // dtype.itemsize
    for path, shape, last in (
        ("rows_kernel<{op}>", (2, 4, 56, 56), False),
        ("packed_kernel<{op}>", (2, 64, 14, 14), False),
        (f"columns_kernel<{{op}}, {lanes}>", (2, 64, 28, 28), True),
        ("columns_kernel<{op}, 1>", (2, 37, 28, 28), True),
    ):
        a, g = _laid(shape, dtype, last), _laid(shape, dtype, last)
        vector = torch.ones(shape[1], dtype=torch.promote_types(dtype, torch.float32))
        for op, method, args in (
            ("AffineReluOp<{t}, false>", "affine_relu", {"z": a, "scale": vector, "shift": vector}),
            (
                *("AffineReluOp<{t}, true>", "affine_relu"),
                {"z": a, "scale": vector, "shift": vector, "count": True},
            ),
            ("BackwardOp<{t}>", "affine_relu_backward", {"a": a, "g": g, "scale": vector}),
            ("AttributionOp<{t}, false>", "attribution", {"x": a, "g": g}),
            ("AttributionOp<{t}, true>", "count_nonzero", {"x": a}),
        ):
            kernel = path.format(op=op.format(t=TYPES[dtype]))
            _count(module, kernel, method, args, _words(shape, last), out, aligned=shape[1] != 37)


def _count_poolings(module: Any, dtype: torch.dtype, out: dict[str, Run]) -> None:
    backend = CudaBackend(module, lambda x: (0, 0))
    t, lanes = TYPES[dtype], 16 // dtype.itemsize
    for window, (kernel, stride, padding) in POOLINGS.items():
        geometry = {"kernel": kernel, "stride": stride, "padding": padding}
        for form, shape, last in (
            (f"staged_kernel<{t}, {window}", (1, 4, 112, 112), False),
            (f"direct_kernel<{t}, {lanes}, {window}", (1, 64, 56, 56), True),
            (f"direct_kernel<{t}, 1, {window}", (1, 37, 28, 28), True),
        ):
            if ", 1," in form and window != "AnyWindow":
                continue
            z = _laid(shape, dtype, last)
            vector = torch.ones(shape[1], dtype=torch.promote_types(dtype, torch.float32))
            args = {"z": z, "scale": vector, "shift": vector, **geometry}
            words = f"{_words(shape, last)}, {kernel[0]}x{kernel[1]} stride {stride[0]}"
            aligned = shape[1] != 37
            _allow_all(module)
            p, code, _ = backend.affine_relu_max_pool(**args)
            for count, name in ((False, "false"), (True, "true")):
                counting = {**args, "count": count}
                symbol = f"pool_{form}, {name}>"
                _count(module, symbol, "affine_relu_max_pool", counting, words, out, aligned)
            args = {"p": p, "code": code, "g": p.clone(), "scale": vector, "size": shape[2:], **geometry}
            name = f"pool_backward_{form}>"
            _count(module, name, "affine_relu_max_pool_backward", args, words, out, aligned)


def _count(
    module: Any,
    kernel: str,
    method: str,
    args: dict[str, Any],
    words: str,
    out: dict[str, Run],
    aligned: bool = True,
) -> None:
    """Runs a call; its first launch is the kernel's, a second one adds up pieces of sums."""
    _allow_all(module)
    for name in ("scale", "shift"):
        if name in args:
            module.count_as_vector(args[name].data_ptr(), args[name].nbytes)
    module.launches()
    results = getattr(CudaBackend(module, lambda x: (0, 0)), method)(**args)
    (shared, moved, wide, vectors), *_ = module.launches()
    floor = _bytes(args) + _bytes(results)
    words += ", counting" if args.get("count") else ""
    out[kernel] = Run(f"{method} {words}", shared, wide / (moved - vectors), moved / floor, aligned)


def _allow_all(module: Any) -> None:
    module.forget()
    module.allow(0, 2**63 - 1, True)
    module.seed(0)


def _bytes(x: Any) -> int:
    if isinstance(x, dict):
        x = list(x.values())
    if isinstance(x, list | tuple):
        return sum(map(_bytes, x))
    return x.nbytes if isinstance(x, Tensor) else 0


def _laid(shape: tuple[int, ...], dtype: torch.dtype, last: bool | int) -> Tensor:
    form = torch.channels_last if last else torch.contiguous_format
    return torch.ones(shape, dtype=dtype).contiguous(memory_format=form)


def _words(shape: tuple[int, ...], last: bool) -> str:
    return "x".join(map(str, shape)) + (" channels-last" if last else "")


if __name__ == "__main__":
    from benchmarks.gpu_report.row import table

    made = list(rows())
    print(table(made))
    bad = [f"{row.kernel} on {row.target}: {fault}" for row in made for fault in row.faults()]
    sys.exit("\n".join(bad) if bad else 0)
