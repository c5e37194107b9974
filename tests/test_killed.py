"""Runs that are killed at any moment end in the same model once they are resumed, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("workload", ["built in", "own"])
def test_fifty_kills_leave_no_trace_in_the_model(workload: str) -> None:
    script = Path(__file__).with_name("killed_runs.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), workload, "0"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["killed"] == 50
    assert told["finished"] > 5
    assert told["differ"] == []
