"""Counts the bytes that Triton kernels ask of memory, load by load, in the interpreter.

A process of its own, started by `triton_report.py` with TRITON_INTERPRET=1; prints a JSON object of
call -> bytes asked for over bytes that must move.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter

from attrfast.kernels.launch import interpreted
from benchmarks.gpu_report.triton_cases import cases

COUNTED = (torch.float32, torch.bfloat16)  # the others differ from these in size alone


class Counter:
    """Sums up what unmasked elements of loads and stores weigh."""

    def __init__(self) -> None:
        self.bytes = 0
        builder = type(interpreter.interpreter_builder)
        load, store = builder.create_masked_load, builder.create_masked_store

        def counted_load(own: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
            self._add(pointers, mask)
            return load(own, pointers, mask, *rest)

        def counted_store(own: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            self._add(pointers, mask)
            return store(own, pointers, value, mask, *rest)

        builder.create_masked_load = counted_load
        builder.create_masked_store = counted_store

    def _add(self, pointers: Any, mask: Any) -> None:
        element = pointers.dtype.scalar.element_ty.primitive_bitwidth // 8
        self.bytes += int(np.count_nonzero(mask.data)) * element


def main() -> None:
    assert interpreted(), "TRITON_INTERPRET=1 must be set"
    counter = Counter()
    out = {}
    for case in cases(small=True):
        if case.dtype in COUNTED:
            counter.bytes = 0
            case.run("cpu")
            out[case.name] = counter.bytes / case.floor
    print(json.dumps(out))


if __name__ == "__main__":
    main()
