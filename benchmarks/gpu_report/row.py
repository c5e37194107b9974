"""One line of the report: what one kernel became on one target. Must not know any compiler."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

# Of one multiprocessor: registers, warps, programs, bytes of shared memory. From NVIDIA's CUDA
# programming guide, table "technical specifications per compute capability".
MULTIPROCESSORS = {"sm_80": (65536, 64, 32, 164 << 10), "sm_90": (65536, 64, 32, 228 << 10)}


@dataclass(frozen=True)
class Row:
    """
    Attributes:
        backend, kernel, case: whose, its name, and the call that it was compiled for.
        target: `sm_80`, `gfx942`, ...
        warps: in a program (a block).
        registers: of a thread.
        spills: loads and stores of spilled registers in the code (for AMD: spilled registers).
        stack: bytes of a thread's stack.
        shared: bytes of shared memory of a program.
        load, store: bytes of the widest global load and store.
        wide: share of the bytes of all global loads and stores in the code that move 16 at a time.
        aligned: whether the case is laid out so that all of them could.
        moved: bytes asked of memory over the bytes that must move; None where it was not counted.
        occupancy: share of a multiprocessor's warps that registers and shared memory leave room for.
    """

    backend: str
    kernel: str
    case: str
    target: str
    warps: int
    registers: int
    spills: int
    stack: int
    shared: int
    load: int
    store: int
    wide: float
    aligned: bool
    moved: float | None
    occupancy: float | None

    def faults(self) -> list[str]:
        """What must not be."""
        out = []
        if self.spills:
            out.append(f"{self.spills} spills")
        if self.stack:
            out.append(f"a stack of {self.stack} bytes")
        if self.aligned and self.load < 16:
            out.append(f"loads of {self.load} bytes where 16 are possible")
        if self.aligned and self.wide < 0.7:
            out.append(f"only {self.wide:.0%} of the bytes move 16 at a time")
        return out


def occupancy(target: str, registers: int, shared: int, warps: int) -> float | None:
    """Theoretical occupancy; registers are dealt out 256 a warp, shared memory with 1 KiB of overhead."""
    limits = MULTIPROCESSORS.get(target)
    if limits is None:
        return None
    file, most_warps, most_programs, memory = limits
    a_warp = -(-max(registers, 1) * 32 // 256) * 256
    programs = min(most_programs, most_warps // warps, file // (a_warp * warps))
    programs = min(programs, memory // (shared + 1024))
    return programs * warps / most_warps


def table(rows: Iterable[Row]) -> str:
    """Markdown."""
    head = (
        "backend", "kernel", "call", "target", "warps", "registers", "spills", "stack", "shared",
        "load", "store", "16 at a time", "bytes / floor", "occupancy",
    )  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        aligned = "" if row.aligned else " (unaligned)"
        cells = (
            row.backend, f"`{row.kernel}`", row.case + aligned, row.target, row.warps, row.registers,
            row.spills, row.stack, row.shared, row.load, row.store, f"{row.wide:.0%}",
            "" if row.moved is None else f"{row.moved:.3f}",
            "" if row.occupancy is None else f"{row.occupancy:.0%}",
        )  # fmt: skip
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines)
