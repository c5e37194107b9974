"""Jobs in other processes, and how those end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil

_MAIN = """
import os, sys, time
from attrfast.compare.pool import pool

def work(job):
    print(os.getpid(), flush=True)
    time.sleep(600)

if __name__ == "__main__":
    with pool(work, 2, 1) as others:
        list(others.run({"one": set(), "two": set()}))
"""


def test_workers_end_with_a_first_process_that_is_killed(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(_MAIN)
    first = subprocess.Popen([sys.executable, program], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout is not None
        workers = [psutil.Process(int(first.stdout.readline())) for _ in range(2)]
        first.kill()
        first.wait()
        _, alive = psutil.wait_procs(workers, timeout=60)
        assert not alive
    finally:
        first.kill()
