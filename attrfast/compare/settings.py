"""All that decides the outcome of a comparison, checked once. Must not know how a cell is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from attrfast.compare.records import CellKey, StartKey
from attrfast.criteria import Criterion, criterion_names, get_criterion
from attrfast.data import Splits
from attrfast.errors import InputError
from attrfast.finetune import FineTune, FineTuneLike, as_finetune

Network = Callable[[], nn.Module]
Loaders = tuple[Iterable[Any], Iterable[Any], Iterable[Any]]
Data = Splits | Loaders | Callable[[int], Splits | Loaders]
Methods = Sequence[str | Criterion | type[Criterion]] | Mapping[str, str | Criterion | type[Criterion]]

PEERS = ("tp_magnitude", "tp_group_taylor")
SCRATCH = "scratch"


@dataclass(frozen=True)
class Method:
    """How a network is made smaller.

    Attributes:
        name: stands in the tables.
        criterion: what `prune` ranks by; None for a peer or for training from scratch.
        peer: name of one of torch-pruning's own, see `attrfast.compare.peers`.
        architecture_of: for training from scratch: the method whose architecture is taken.
    """

    name: str
    criterion: Criterion | None = None
    peer: str | None = None
    architecture_of: str | None = None


@dataclass(frozen=True)
class Settings:
    """See `attrfast.compare.compare`, which explains every field."""

    networks: dict[str, Network]
    data: Data
    methods: dict[str, Method]
    budgets: tuple[float, ...]
    seeds: tuple[int, ...]
    train: FineTune | Callable[[nn.Module, int], None]
    finetune: FineTune | Callable[[nn.Module, int], None]
    final_finetune: FineTune | Callable[[nn.Module, int], None] | None
    filters_per_step: int | None
    max_batches: int | None
    device: str | torch.device | None
    pretrained: dict[str, Callable[[nn.Module], Any]] = field(default_factory=dict)

    @property
    def starts(self) -> list[StartKey]:
        return [StartKey(network, seed) for network in self.networks for seed in self.seeds]

    @property
    def cells(self) -> list[CellKey]:
        """Networks first, then budgets from large to small, methods and seeds as they were given."""
        return [
            CellKey(network, method, budget, seed)
            for network in self.networks
            for budget in self.budgets
            for method in self.methods
            for seed in self.seeds
        ]

    def needs(self, key: CellKey) -> set[CellKey]:
        """The cells that must be there before this one."""
        donor = self.methods[key.method].architecture_of
        return set() if donor is None else {CellKey(key.network, donor, key.budget, key.seed)}


def settings(
    networks: Mapping[str, Network],
    data: Data,
    *,
    methods: Methods,
    budgets: Sequence[float],
    seeds: Sequence[int],
    train: FineTuneLike,
    finetune: FineTuneLike,
    final_finetune: FineTuneLike | None,
    filters_per_step: int | None,
    max_batches: int | None,
    device: str | torch.device | None,
    pretrained: Mapping[str, Callable[[nn.Module], Any]] | None,
) -> Settings:
    """Checks the arguments of `compare`.

    Raises:
        InputError: one of them can't be used.
    """
    for name, factory in networks.items():
        if isinstance(factory, nn.Module) or not callable(factory):
            raise InputError(
                f"the network {name!r} must be a function that builds it, got "
                f"{type(factory).__name__}; pass for instance functools.partial(resnet18, num_classes=10)"
            )
    for name in pretrained or {}:
        if name not in networks:
            raise InputError(
                f"pretrained names {name!r}, which is none of the networks: {list(networks)}"
            )
    chosen = _methods(methods)
    tuning = as_finetune(finetune)
    final = None if final_finetune is None else as_finetune(final_finetune)
    training = as_finetune(train)
    if any(m.architecture_of for m in chosen.values()):
        for argument, how in (("train", training), ("finetune", tuning), ("final_finetune", final)):
            if how is not None and not isinstance(how, FineTune):
                raise InputError(
                    f"{SCRATCH!r} trains for as many epochs as the others in all, and {argument} is a "
                    f"callable that does not tell how many; give epochs or an attrfast.FineTune"
                )
    for seed in seeds:
        if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
            raise InputError(f"a seed must be a whole number of at least 0, got {seed!r}")
    return Settings(
        networks=dict(_some("networks", networks)),
        data=data,
        methods=chosen,
        budgets=_budgets(budgets),
        seeds=tuple(_distinct("seeds", seeds)),
        train=training,
        finetune=tuning,
        final_finetune=final,
        filters_per_step=filters_per_step,
        max_batches=max_batches,
        device=device,
        pretrained=dict(pretrained or {}),
    )


def _methods(methods: Methods) -> dict[str, Method]:
    if isinstance(methods, str):
        raise InputError(f"methods must be a list of names or criteria, got {methods!r}")
    if isinstance(methods, Mapping):
        named = [(str(name), what) for name, what in methods.items()]
    else:
        named = [(_name_of(what), what) for what in methods]
    _distinct("methods", [name for name, _ in named])
    found = {name: method(what, name) for name, what in _some("methods", named)}
    for one in list(found.values()):
        donor = one.architecture_of
        if donor is not None and donor not in found:
            found[donor] = method(donor)
        if donor is not None and found[donor].criterion is None:
            raise InputError(
                f"{one.name!r} needs the filters that are left of every layer, which {donor!r} does not "
                f"tell; name a criterion: {', '.join(criterion_names())}"
            )
    return found


def method(what: str | Criterion | type[Criterion], name: str | None = None) -> Method:
    """A method from its name or its criterion.

    Args:
        what: a criterion or its name, `"tp_magnitude"`, `"tp_group_taylor"`, `"scratch"` (the
            architecture that `attribution` finds) or `"scratch:METHOD"`.
        name: what it is called; None: what it calls itself.

    Raises:
        InputError: there is no such method.
    """
    called = name or _name_of(what)
    if isinstance(what, str):
        if what in PEERS:
            return Method(called, peer=what)
        kind, _, donor = what.partition(":")
        if kind == SCRATCH:
            return Method(called, architecture_of=donor or "attribution")
    try:
        return Method(called, criterion=get_criterion(what))
    except InputError as error:
        raise InputError(f"{error}; and besides criteria: {', '.join(PEERS)}, {SCRATCH}") from error


def _name_of(what: str | Criterion | type[Criterion]) -> str:
    if isinstance(what, str):
        return what
    return getattr(what, "name", "") or (what if isinstance(what, type) else type(what)).__name__


def _budgets(budgets: Sequence[float]) -> tuple[float, ...]:
    for budget in budgets:
        if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not 0 < budget < 1:
            raise InputError(
                f"a budget must be the share of the multiply-adds that may be left, between 0 and 1, "
                f"got {budget!r}"
            )
    _distinct("budgets", [f"{budget:g}" for budget in budgets])
    return tuple(sorted((float(b) for b in _some("budgets", budgets)), reverse=True))


def _some(name: str, items: Any) -> Any:
    if not items:
        raise InputError(f"{name} is empty; give at least one")
    return items


def _distinct(name: str, items: Sequence[Any]) -> Sequence[Any]:
    for item in _some(name, items):
        if list(items).count(item) > 1:
            raise InputError(
                f"{name} has {item!r} more than once"
                + ("; pass a mapping from names to criteria" if name == "methods" else "")
            )
    return items
