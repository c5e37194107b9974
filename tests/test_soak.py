"""Many rounds leave no memory behind; `make soak` does more of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).with_name("soak.py")
# What may be left more at the end than after a quarter of the rounds. Each lies far above what was seen, and
# below a few objects a round. PyTorch's convolutions keep code for up to 1,024 shapes, so what the C library
# gave out may grow while new models bring new shapes.
MOST = {"resident": 6 << 20, "blocks": 1500, "objects": 100}
MOST_NATIVE = {"passes": 64 << 10, "recorders": 64 << 10, "prunings": 2 << 20}


@pytest.mark.parametrize(("kind", "rounds"), [("passes", 300), ("recorders", 200), ("prunings", 20)])
def test_memory_stays_flat_over_many_rounds(kind: str, rounds: int) -> None:
    command = [sys.executable, "-W", "ignore", str(SOAK), kind, str(rounds)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    left = {name: rows[-1][name] - rows[1][name] for name in rows[0]}
    assert left.pop("rounds") == rounds - rounds // 4
    most = MOST | {"native": MOST_NATIVE[kind]}
    assert {name: n for name, n in left.items() if n > most[name]} == {}
