"""What a pruning run works towards, and how far a size is from it. Must not know how filters go."""

from __future__ import annotations

import math
from dataclasses import dataclass

from attrfast.cost import Cost
from attrfast.errors import InputError
from attrfast.latency.limit import parse_limit


@dataclass(frozen=True)
class Size:
    """How large a model is.

    Attributes:
        filters: of all convolutions that are scored.
        cost: multiply-adds and parameters.
        latency: seconds of a pass, measured or predicted; 0 where nobody asks.
    """

    filters: int
    cost: Cost
    latency: float = 0.0


@dataclass(frozen=True)
class Asked:
    """The targets as the user gave them; None where nothing was asked.

    Attributes:
        keep_ratio: share of the filters, in (0, 1].
        max_macs, max_params: share of the original's in (0, 1], or a count (a whole number above 1).
        max_latency: a share of the original's or a time, see `attrfast.latency.parse_limit`.
        max_accuracy_drop: share of top-1, in [0, 1].
        needed: whether something must be asked.

    Raises:
        InputError: a value lies outside, or nothing was asked at all where something must be.
    """

    keep_ratio: float | None
    max_macs: float | None
    max_params: float | None
    max_latency: str | float | None
    max_accuracy_drop: float | None
    needed: bool = True

    @property
    def nothing(self) -> bool:
        """Whether nothing was asked."""
        sizes = (self.keep_ratio, self.max_macs, self.max_params, self.max_latency)
        return all(target is None for target in (*sizes, self.max_accuracy_drop))

    def __post_init__(self) -> None:
        if self.needed and self.nothing:
            raise InputError(
                "prune needs a target: keep_ratio, max_macs, max_params, max_latency or "
                "max_accuracy_drop (for instance max_macs=0.5 for half of the multiply-adds)"
            )
        if self.keep_ratio is not None and not _is_share(self.keep_ratio):
            raise InputError(f"keep_ratio must lie in (0, 1], got {self.keep_ratio!r}")
        for name, value in (("max_macs", self.max_macs), ("max_params", self.max_params)):
            if value is not None and not (_is_share(value) or _is_count(value)):
                raise InputError(
                    f"{name} must be a share of the original in (0, 1], or a count as a whole number "
                    f"above 1, got {value!r}"
                )
        if self.max_latency is not None:
            parse_limit(self.max_latency)
        drop = self.max_accuracy_drop
        if drop is not None and not (_is_number(drop) and 0 <= drop <= 1):
            raise InputError(
                f"max_accuracy_drop must be a share of top-1 between 0 and 1 (0.01 is one point), got "
                f"{drop!r}"
            )

    def of(self, whole: Size) -> Targets:
        """The same as counts, for a model of this size."""
        return Targets(
            whole=whole,
            filters=_limit(self.keep_ratio, whole.filters),
            macs=_limit(self.max_macs, whole.cost.macs),
            params=_limit(self.max_params, whole.cost.params),
            latency=None
            if self.max_latency is None
            else parse_limit(self.max_latency).seconds(whole.latency),
            drop=self.max_accuracy_drop,
        )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_share(value: float) -> bool:
    return _is_number(value) and 0 < value <= 1


def _is_count(value: float) -> bool:
    return _is_number(value) and isinstance(value, int) and value > 1


def _limit(asked: float | None, whole: int) -> int | None:
    if asked is None:
        return None
    return math.floor(asked * whole) if _is_share(asked) else int(asked)


@dataclass(frozen=True)
class Targets:
    """Targets as counts; None where nothing was asked.

    Attributes:
        whole: the original's size.
        filters, macs, params: at most so many are left.
        latency: at most so many seconds are left.
        drop: top-1 may fall by at most this share.
    """

    whole: Size
    filters: int | None
    macs: int | None
    params: int | None
    latency: float | None
    drop: float | None

    def _limits(self, now: Size) -> list[tuple[str, str, float, float, float]]:
        """What was asked: argument, what it counts, limit, count now, count of the original."""
        rows = (
            ("keep_ratio", "filters", self.filters, now.filters, self.whole.filters),
            ("max_macs", "multiply-adds", self.macs, now.cost.macs, self.whole.cost.macs),
            ("max_params", "parameters", self.params, now.cost.params, self.whole.cost.params),
            ("max_latency", "latency", self.latency, now.latency, self.whole.latency),
        )
        return [(a, what, limit, n, w) for a, what, limit, n, w in rows if limit is not None]

    @property
    def sizes(self) -> tuple[str, ...]:
        """The arguments that limit a size."""
        return tuple(argument for argument, *_ in self._limits(self.whole))

    def reached(self, now: Size) -> bool:
        """Whether every size that was asked for holds (never, if none was)."""
        limits = self._limits(now)
        return bool(limits) and all(count <= limit for _, _, limit, count, _ in limits)

    def progress(self, now: Size) -> float:
        """How much of the way is done, in [0, 1], by the size that is furthest from its limit."""
        ways = [
            (whole - count) / (whole - limit)
            for _, _, limit, count, whole in self._limits(now)
            if limit < whole
        ]
        return min([1.0, *ways]) if ways else 0.0

    def missed(self, now: Size) -> str:
        """How far a size is from the limits that it does not keep, in words."""
        verbs = {"latency": "is"}
        return " and ".join(
            f"{count / whole:.1%} of the {what} {verbs.get(what, 'are')} left where {argument} asks for "
            f"{limit / whole:.1%}"
            for argument, what, limit, count, whole in self._limits(now)
            if count > limit
        )
