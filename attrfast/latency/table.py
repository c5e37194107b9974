"""What was measured of layers on one device, as a file that later runs read.

A file holds one setting: device, threads, torch, dtype and layout. It is written beside its place and moved
there. What can't be read, or was changed, is told and left aside: it is measured again.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import platformdirs

from attrfast.errors import InputError
from attrfast.files import replace_file
from attrfast.latency.law import Sample

FORMAT, VERSION = "attrfast latency table", 1

Layers = dict[str, list[Sample]]


class Table:
    """Samples of layers, by their key.

    Args:
        folder: where the files are; None: the user's folder for caches.
        setting: what the times depend on besides the layer.
    """

    def __init__(self, folder: str | Path | None, setting: Mapping[str, str]) -> None:
        self.setting = dict(setting)
        digest = hashlib.sha256(json.dumps(self.setting, sort_keys=True).encode()).hexdigest()
        self.path = (
            Path(folder or platformdirs.user_cache_dir("attrfast")) / f"latency-{digest[:12]}.json"
        )
        self.layers: Layers = {}

    def read(self) -> None:
        """Takes up what the file holds, if there is one."""
        if not self.path.exists():
            return
        try:
            self.layers = _checked(json.loads(self.path.read_text()), self.setting)
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            warnings.warn(
                f"the latency table {self.path} can't be used ({error}); the layers are timed again",
                stacklevel=2,
            )

    def add(self, layers: Layers) -> None:
        """Keeps new samples, in place of older ones of the same layers.

        Raises:
            InputError: the file can't be written.
        """
        self.layers |= layers
        body = {
            "format": FORMAT,
            "version": VERSION,
            "setting": self.setting,
            "layers": {
                key: [[s.inputs, s.outputs, s.median, s.low, s.high] for s in rows]
                for key, rows in self.layers.items()
            },
        }
        text = json.dumps({**body, "checksum": _checksum(body)}) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self.path, lambda path: path.write_text(text))
        except OSError as error:
            raise InputError(
                f"the latency table can't be written: {error}; give another folder as latency_cache"
            ) from error


def _checksum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _checked(raw: Any, setting: Mapping[str, str]) -> Layers:
    if not isinstance(raw, dict) or raw.get("format") != FORMAT or raw.get("version") != VERSION:
        raise ValueError(f"it is no {FORMAT} of version {VERSION}")
    if raw.pop("checksum", None) != _checksum(raw):
        raise ValueError("it was changed or damaged")
    if raw["setting"] != setting:
        raise ValueError("it belongs to another device or version")
    return {str(key): [_sample(row) for row in rows] for key, rows in raw["layers"].items()}


def _sample(row: Any) -> Sample:
    inputs, outputs, *times = row
    sample = Sample(int(inputs), int(outputs), *(float(value) for value in times))
    if not all(0 < value < math.inf for value in (sample.median, sample.low, sample.high)):
        raise ValueError(f"{row} are no times")
    return sample
