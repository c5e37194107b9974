"""Values read from files, checked one by one: what is of another type or out of range is refused by name.

Reading runs nothing and builds nothing but plain values. Must not know what the values mean.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from attrfast.errors import InputError


def parsed(text: str | bytes) -> Any:
    """What JSON says; InputError where it is none, or nested too deep to be read."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"it is no JSON: {error}") from error


def sealed(body: Mapping[str, Any]) -> str:
    """A tree as JSON; its last entry is the checksum of the others, and null stands for NaN and infinity."""
    held = _finite(body)
    return json.dumps({**held, "checksum": _checksum(held)}, indent=1, allow_nan=False) + "\n"


def _finite(item: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for a figure that there is not."""
    if isinstance(item, float) and not math.isfinite(item):
        return None
    if isinstance(item, dict):
        return {key: _finite(value) for key, value in item.items()}
    if isinstance(item, list):
        return [_finite(value) for value in item]
    return item


def unsealed(text: str | bytes, kind: str, version: int, needed: Sequence[str]) -> dict[str, Any]:
    """What `sealed` wrote, of this format and version, with these entries.

    Raises:
        InputError: it is something else, of another version, or was changed.
    """
    raw = mapping(parsed(text), "it")
    if raw.get("format") != kind:
        raise InputError(f"its format is {quoted(raw.get('format'))}, not {kind!r}")
    told = raw.get("version")
    if told != version or not isinstance(told, int) or isinstance(told, bool):
        raise InputError(
            f"it is of version {quoted(told)}, and this attrfast reads version {version}; use the attrfast "
            f"that wrote it"
        )
    seal = raw.pop("checksum", None)
    if seal != _checksum(raw):
        raise InputError("its checksum does not fit what it says: it was changed or damaged")
    if absent := sorted(set(needed) - raw.keys()):
        raise InputError(f"it has no {absent[0]!r}")
    return raw


def _checksum(body: Mapping[str, Any]) -> str:
    try:
        told = json.dumps(body, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(told.encode()).hexdigest()
    except (ValueError, RecursionError) as error:
        raise InputError(f"it is no JSON that can be written again: {error}") from error


def mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{where} must be an object, got {short(value)}")
    return value


def sequence(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise InputError(f"{where} must be a list, got {short(value)}")
    return value


def text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{where} must be text, got {short(value)}")
    return value


def count(value: Any, where: str, least: int = 1) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError(f"{where} must be a whole number of at least {least}, got {short(value)}")
    return value


def number(value: Any, where: str, low: float = -math.inf, high: float = math.inf) -> float:
    """A finite number in [low, high]."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (good and -math.inf < value < math.inf and low <= value <= high):
        limits = "" if low == -math.inf and high == math.inf else f" from {low:g} to {high:g}"
        raise InputError(f"{where} must be a number{limits}, got {short(value)}")
    return float(value)


def bits(value: Any, where: str) -> str:
    """Gates as text, see `attrfast.gate_text`."""
    told = text(value, where)
    if not told or set(told) - {"0", "1"}:
        raise InputError(f"{where} must be made of 0 and 1, one for each filter, got {told[:40]!r}")
    return told


def file_name(value: Any, where: str) -> str:
    """The name of a file in a folder: no path, and nothing that leads elsewhere."""
    name = text(value, where)
    if not name or name in (".", "..") or set(name) & set("/\\:\0"):
        raise InputError(f"{where} must be the name of a file in the folder, got {name[:40]!r}")
    return name


def short(value: Any) -> str:
    """A value of a file in a message."""
    return f"{type(value).__name__} {quoted(value)}"


def quoted(value: Any) -> str:
    """The same without its type."""
    try:
        told = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, a tree too deep
        told = "'...'"
    return told if len(told) <= 42 else f"{told[:42]}..."
