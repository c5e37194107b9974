"""A latency as a user asks for it: a share of the original's, or a time."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from attrfast.errors import InputError

_UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6}
_TEXT = re.compile(r"\s*(\d+\.?\d*|\.\d+)\s*(x|×|s|ms|us|µs)\s*")


@dataclass(frozen=True)
class Limit:
    """At most this latency.

    Attributes:
        value: a share of the original's, or seconds.
        relative: whether it is a share.
    """

    value: float
    relative: bool

    def seconds(self, original: float) -> float:
        """The limit in seconds, for an original that takes so many."""
        return self.value * original if self.relative else self.value


def parse_limit(asked: str | float) -> Limit:
    """Reads `"0.5x"`, `0.5` (both half of the original's latency), `"12ms"`, `"0.012s"` or `"800us"`.

    Raises:
        InputError: it is none of these; a number above 1 without a unit could be anything.
    """
    if isinstance(asked, str) and (found := _TEXT.fullmatch(asked)):
        value, unit = float(found[1]), found[2]
        limit = Limit(value * _UNITS.get(unit, 1.0), unit not in _UNITS)
    elif isinstance(asked, (int, float)) and not isinstance(asked, bool):
        limit = Limit(float(asked), True)
    else:
        limit = Limit(math.nan, True)
    if not limit.value > 0 or (limit.relative and limit.value > 1):
        raise InputError(
            f"max_latency must be a share of the original's latency in (0, 1], such as 0.5 or '0.5x', or a "
            f"time with its unit, such as '12ms' or '0.012s', got {asked!r}"
        )
    return limit
