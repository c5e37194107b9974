"""Labels of filters, kept as disjoint sets: united where filters must go together, frozen where they can't.

Must not know what an operation does to channels.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

NONE = -1  # the label of a channel that no filter made


@dataclass(frozen=True)
class Channels:
    """Which dimension of a value holds channels, and the label of each (-1: made by no filter)."""

    dim: int
    labels: tuple[int, ...]


class Labels:
    """Disjoint sets of filter labels, with the reason why a set is frozen."""

    def __init__(self) -> None:
        self.parent: list[int] = []
        self.reasons: dict[int, str] = {}
        self.producers: list[tuple[str, int]] = []

    def new(self, module: str, channels: int) -> tuple[int, ...]:
        start = len(self.parent)
        self.parent.extend(range(start, start + channels))
        self.producers.extend((module, index) for index in range(channels))
        return tuple(range(start, start + channels))

    def root(self, label: int) -> int:
        while self.parent[label] != label:
            self.parent[label] = self.parent[self.parent[label]]
            label = self.parent[label]
        return label

    def unite(self, a: int, b: int, why: str) -> None:
        if a == NONE or b == NONE:
            self.freeze((max(a, b),), why)
            return
        a, b = self.root(a), self.root(b)
        if a == b:
            return
        a, b = min(a, b), max(a, b)
        self.parent[b] = a
        reason = self.reasons.pop(b, None)
        if reason is not None:
            self.reasons.setdefault(a, reason)

    def freeze(self, labels: Iterable[int], why: str) -> None:
        for label in labels:
            if label != NONE:
                self.reasons.setdefault(self.root(label), why)
