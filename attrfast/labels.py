"""Labels of filters, kept as disjoint sets: united where filters must go together, frozen where they can't.

Must not know what an operation does to channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
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
        self._makers: list[tuple[str, int]] = []

    def new(self, module: str, channels: int) -> tuple[int, ...]:
        start = len(self.parent)
        self.parent.extend(range(start, start + channels))
        self._makers.append((module, channels))
        return tuple(range(start, start + channels))

    def makers(self) -> Iterator[tuple[str, int]]:
        """Of every label the module that makes the channel, and which of its channels it is."""
        for module, channels in self._makers:
            yield from ((module, index) for index in range(channels))

    def root(self, label: int) -> int:
        parent = self.parent
        while (above := parent[label]) != label:
            parent[label] = label = parent[above]
        return label

    def roots(self) -> list[int]:
        """The root of every label. A parent is never larger than its child."""
        found: list[int] = []
        for label, above in enumerate(self.parent):
            found.append(label if above == label else found[above])
        return found

    def unite(self, a: int, b: int, why: str) -> None:
        if a == NONE or b == NONE:
            self.freeze((max(a, b),), why)
            return
        a, b = self.root(a), self.root(b)
        if a == b:
            return
        if a > b:
            a, b = b, a
        self.parent[b] = a
        reason = self.reasons.pop(b, None)
        if reason is not None:
            self.reasons.setdefault(a, reason)

    def unite_each(self, first: Sequence[int], second: Sequence[int], why: str) -> None:
        """Unites two rows of labels, one by one."""
        for a, b in zip(first, second, strict=True):
            if a != b:
                self.unite(a, b, why)

    def freeze(self, labels: Iterable[int], why: str) -> None:
        for label in labels:
            if label != NONE:
                self.reasons.setdefault(self.root(label), why)
