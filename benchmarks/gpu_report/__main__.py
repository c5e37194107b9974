"""The command `python -m benchmarks.gpu_report`: compiles, reads, writes `benchmarks/results/`.

Exit status 1 where a kernel spills, needs a stack, or moves less than 16 bytes at a time where it could.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import os
import sys
from pathlib import Path

from benchmarks.gpu_report.row import Row, table

MODULES = ("triton_report", "cuda_report")
RESULTS = Path(__file__).parent.parent / "results"

INTRODUCTION = """\
# What compilers make of the GPU kernels

Written by `make gpu-report`; no GPU was used and no time was measured. Every kernel was compiled for the
named targets, and the figures were read from the machine code (for gfx942, from the assembly).

- *spills*, *stack*: must be 0. *registers*: of a thread. *shared*: bytes of a program.
- *load*, *store*: bytes of the widest global load and store of one thread. *16 at a time*: share of the
  bytes of all loads and stores in the code that move 16 bytes each; the rest are scales, sums and, where
  there is pooling, codes of one byte. Calls marked *(unaligned)* have rows that begin anywhere, windows
  that overlap, or read a few numbers only; they are not held to it.
- *bytes / floor*: bytes asked for, counted load by load in Triton's interpreter, over those that must
  move (each input once, each result once). It is above 1 where scales are read for each row, where
  partial sums go through memory, and where windows overlap: the cache serves what is asked for again.
- *occupancy*: share of a multiprocessor's warps that registers and shared memory leave room for.
"""


def main() -> int:
    if os.environ.get("TRITON_INTERPRET"):
        sys.exit("unset TRITON_INTERPRET: the interpreter compiles nothing")
    rows: list[Row] = []
    for name in MODULES:
        if importlib.util.find_spec(f"benchmarks.gpu_report.{name}") is None:
            continue
        for row in importlib.import_module(f"benchmarks.gpu_report.{name}").rows():
            rows.append(row)
            for fault in row.faults():
                print(f"{row.backend} {row.kernel}, {row.case}, {row.target}: {fault}", flush=True)
    RESULTS.mkdir(exist_ok=True)
    values = [{**dataclasses.asdict(row), "faults": row.faults()} for row in rows]
    lines = ",\n".join(json.dumps(value) for value in values)
    (RESULTS / "gpu_report.json").write_text(f"[\n{lines}\n]\n")
    (RESULTS / "gpu_report.md").write_text(f"{INTRODUCTION}\n{summary(rows)}\n\n{table(rows)}\n")
    print(summary(rows))
    return 1 if any(row.faults() for row in rows) else 0


def summary(rows: list[Row]) -> str:
    kernels = {(row.backend, row.kernel) for row in rows}
    faults = sum(bool(row.faults()) for row in rows)
    most = max((row.registers for row in rows if row.target.startswith("sm_")), default=0)
    return (
        f"{len(rows)} variants of {len(kernels)} kernels for {len({row.target for row in rows})} targets: "
        f"{faults} with faults; at most {most} registers a thread on NVIDIA's targets."
    )


if __name__ == "__main__":
    sys.exit(main())
