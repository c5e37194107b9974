"""Computes one start or one cell, in whichever process it is called, and files it."""

from __future__ import annotations

import copy
import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from attrfast import gate_text
from attrfast.batches import resolve_device
from attrfast.checkpoint import fingerprint
from attrfast.compare.files import Folder
from attrfast.compare.footing import Footing, Pruned
from attrfast.compare.loaders import Opened, measure, open_loaders
from attrfast.compare.records import Cell, CellKey, Start, StartKey
from attrfast.compare.scratch import train_from_scratch
from attrfast.compare.settings import Settings
from attrfast.errors import AttrfastError, InputError
from attrfast.finetune import FineTune, fine_tune
from attrfast.pruner import prune
from attrfast.seeding import seeded


@dataclass
class Work:
    """What a process needs to compute any start and any cell of a comparison.

    Attributes:
        resume: a start that is there is kept, if it is of these settings.
    """

    settings: Settings
    folder: Folder
    resume: bool

    def __call__(self, key: StartKey | CellKey) -> None:
        """Computes and files what `key` names.

        Raises:
            AttrfastError: it can't be computed, or what is there belongs to other settings.
        """
        if isinstance(key, StartKey):
            self._start(key)
        else:
            self._cell(key)

    def _start(self, key: StartKey) -> None:
        data, model = open_loaders(self.settings.data, key.seed), self._untrained(key)
        device = resolve_device(model, self.settings.device)
        mark = fingerprint(model, {"train": self.settings.train, "data": data.described()})
        found = self.folder.start(key) if self.resume else None
        if found is not None and found.mark != mark:
            raise InputError(
                f"{self.folder.start_path(key)} belongs to another network, other data or another "
                f"training; choose another folder, or call with resume=False to start again"
            )
        if found is not None and self.folder.weights(key) is not None:
            return
        model.to(device)
        train = self.settings.train
        fine_tune(model, data.train, train, step=0, device=device, seed=key.seed)
        model.eval()
        measured = measure(model, data.test, device, data.classes)
        start = Start(key, mark, fingerprint(model, {"mark": mark}), measured)
        self.folder.save_start(start, model.state_dict())

    def _untrained(self, key: StartKey, *, random: bool = False) -> nn.Module:
        """The network with its first weights: those of `pretrained` where there are some, unless `random`."""
        with seeded(key.seed, [], torch.device("cpu")):
            model = self.settings.networks[key.network]()
            load = self.settings.pretrained.get(key.network)
            if load is not None and not random:
                load(model)
        return model

    def _cell(self, key: CellKey) -> None:
        begun = time.perf_counter()
        start, weights = self.folder.start(key.start), self.folder.weights(key.start)
        if start is None or weights is None:
            raise AttrfastError(f"the start of {key} is gone from {self.folder.root}; compare again")
        data = open_loaders(self.settings.data, key.seed)
        model = self._untrained(key.start, random=True)
        model.load_state_dict(weights)
        device = resolve_device(model, self.settings.device)
        footing = self._footing(key, data, device)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            pruned = self._pruned(key, model.to(device), footing)
        self.folder.save_cell(
            Cell(
                key=key,
                mark=cell_mark(self.settings, key, start),
                before=start.measured,
                after=measure(pruned.model, data.test, device, data.classes),
                history=pruned.history,
                gates=None if pruned.gates is None else gate_text.to_text(pruned.gates),
                epochs=pruned.epochs,
                stopped=pruned.stopped,
                warnings=tuple(dict.fromkeys(str(w.message) for w in caught)),
                seconds=time.perf_counter() - begun,
            )
        )

    def _footing(self, key: CellKey, data: Opened, device: torch.device) -> Footing:
        return Footing(
            train=data.train,
            val=data.val,
            budget=key.budget,
            finetune=self.settings.finetune,
            final_finetune=self.settings.final_finetune,
            filters_per_step=self.settings.filters_per_step,
            max_batches=self.settings.max_batches,
            device=device,
            seed=key.seed,
        )

    def _pruned(self, key: CellKey, model: nn.Module, footing: Footing) -> Pruned:
        method = self.settings.methods[key.method]
        if method.criterion is not None:
            result = prune(
                model,
                footing.train,
                # A criterion may keep something from run to run.
                copy.deepcopy(method.criterion),
                max_macs=footing.budget,
                filters_per_step=footing.filters_per_step,
                val_loader=footing.val,
                finetune=footing.finetune,
                final_finetune=footing.final_finetune,
                max_batches=footing.max_batches,
                stop=None,  # as much as Torch-Pruning's pruners read
                device=footing.device,
                seed=footing.seed,
                progress=False,
                distributed=False,
            )
            if result.interrupted:
                raise KeyboardInterrupt  # a part of a run is no figure
            epochs = footing.epochs(len(result.history) - 1, method.criterion)
            return Pruned(result.model, tuple(result.history), result.gates, epochs, result.stopped)
        if method.peer is not None:
            from attrfast.compare.peers import prune_by_peer

            return prune_by_peer(model, footing, method.peer)
        donor = self._donor(key)
        assert isinstance(self.settings.train, FineTune)
        assert donor.epochs is not None
        return train_from_scratch(
            self._untrained(key.start, random=True).to(footing.device),
            footing,
            gates={n: gate_text.from_text(bits) for n, bits in (donor.gates or {}).items()},
            history=donor.history,
            epochs=donor.epochs,
            train=self.settings.train,
        )

    def _donor(self, key: CellKey) -> Cell:
        (needed,) = self.settings.needs(key)
        donor = self.folder.cell(needed)
        if donor is None:
            raise AttrfastError(f"{needed} is gone from {self.folder.root}; compare again")
        return donor


def cell_mark(settings: Settings, key: CellKey, start: Start) -> str:
    """A hash of all that a cell depends on: the trained weights, the method and how it is run."""
    chosen = settings.methods[key.method]
    donor = chosen.architecture_of
    running: dict[str, Any] = {
        "start": start.digest,
        "method": [chosen.criterion, chosen.peer, donor and settings.methods[donor].criterion],
        "train": settings.train if donor else None,
        "budget": key.budget,
        "seed": key.seed,
        "finetune": [settings.finetune, settings.final_finetune],
        "limits": [settings.filters_per_step, settings.max_batches],
    }
    return fingerprint(nn.Module(), running)
