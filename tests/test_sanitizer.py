"""Whether the sanitizers that `make sanitize` builds with are awake: what is wrong on purpose must be found."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from op_checks import ISAS

pytestmark = pytest.mark.skipif(
    os.environ.get("ATTRFAST_SANITIZE") != "1", reason="for the native module of `make sanitize`"
)
CALL = """
import torch
from attrfast import _native
_native.use_isa({isa!r})
x, s = torch.ones({x}), torch.zeros({s})
_native.attribution(0, 0, 2, 3, 64, x.data_ptr() + {off}, x.data_ptr(), s.data_ptr(), False, 1)
print("ran to its end")
"""


@pytest.mark.parametrize(
    ("isa", "x", "s", "off", "finding"),
    [
        (ISAS[0], 384, 6, 0, None),
        (ISAS[0], 380, 6, 0, "heap-buffer-overflow"),
        (ISAS[0], 384, 5, 0, "heap-buffer-overflow"),
        ("baseline", 400, 6, 1, "x is not aligned"),  # refused before it is read
    ],
)
def test_a_wrong_call_of_the_native_module_is_found(
    isa: str, x: int, s: int, off: int, finding: str | None
) -> None:
    code = CALL.format(isa=isa, x=x, s=s, off=off)
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    if finding is None:
        assert done.stdout == "ran to its end\n", done.stderr
    else:
        assert done.returncode != 0
        assert finding in done.stderr
