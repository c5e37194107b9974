"""What `prune` gives back."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn

from attrfast import saving
from attrfast.errors import InputError
from attrfast.history import Step
from attrfast.measure import Measurement, in_words, measure
from attrfast.plain_text import as_text


@dataclass
class PruneResult:
    """A smaller model, and how it came about.

    Attributes:
        model: the pruned model.
        history: one row a step.
        gates: convolution -> (filters of the original,) bool, true for those that are left.
        criterion: name of the criterion.
        stopped: why the loop ended, in words.
        original: the model that `prune` was given, itself and not a copy (that under the wrapper of
            torch.compile); None where it was pruned in place. It is kept for `measure`: set it to None
            to free its memory.
        interrupted: whether Ctrl-C ended the loop, so that the model is larger than was asked for.
    """

    model: nn.Module
    history: list[Step]
    gates: dict[str, torch.Tensor]
    criterion: str
    stopped: str
    original: nn.Module | None = None
    interrupted: bool = False

    def summary(self) -> str:
        """A table of the history, one line a step."""
        table = Table(title=f"{self.criterion}: {self.stopped}", title_justify="left")
        for name in ("step", "filters", "φ", "top-1", "loss", "MACs", "pruned", "params", "pruned"):
            table.add_column(name, justify="right")
        timed = self.history[0].latency is not None
        for name in ("latency", "predicted", "of it") if timed else ():
            table.add_column(name, justify="right")
        table.add_column("score/cut/tune", justify="right")
        for row in self.history:
            table.add_row(
                str(row.step),
                str(row.filters),
                f"{row.phi:.3f}",
                "-" if row.top1 != row.top1 else f"{100 * row.top1:.2f}%",
                f"{row.loss:.4f}",
                _short(row.macs),
                f"{row.macs_pruned_percent:.1f}%",
                _short(row.params),
                f"{row.params_pruned_percent:.1f}%",
                *(_latency(row) if timed else ()),
                f"{row.seconds_scoring:.1f}/{row.seconds_cutting:.1f}/{row.seconds_tuning:.1f} s",
            )
        return as_text(table, width=132)

    def save(self, path: str | Path) -> Path:
        """Writes the pruned model: weights as safetensors, and a recipe to build the layers around them.

        `attrfast.load(path, model_fn)` reads them again, anywhere. Saving into the same folder again
        replaces what is there; `model` may have been trained on or moved since.

        Args:
            path: a folder, made if need be. It gets `weights.safetensors` (parameters and persistent
                buffers, contiguous, in their dtypes) and `recipe.json` (kinds and widths of all modules,
                gates, history, versions, checksums).

        Returns:
            The folder.

        Raises:
            ModelError: the model holds what a file of tensors can't hold.
            InputError: the folder can't be written, or `gates` and `model` don't belong together.
        """
        return saving.save(
            path,
            self.model,
            criterion=self.criterion,
            stopped=self.stopped,
            history=[dataclasses.asdict(row) for row in self.history],
            gates=self.gates,
        )

    def measure(
        self,
        example: Any,
        batch_sizes: Sequence[int] = (1, 32),
        *,
        rounds: int = 20,
        original: nn.Module | None = None,
        device: str | torch.device | None = None,
    ) -> Measurement:
        """Times the original and the pruned model side by side on this machine.

        Fewer multiply-adds are not always faster. Both run in eval mode without gradients, in turns, and
        are left as they are.

        Args:
            example: an input as a batch of the loader has it: a tensor (samples, ...), a tuple of them,
                or a mapping of keyword inputs. Its samples are repeated up to each batch size.
            batch_sizes: samples a pass.
            rounds: how often each is timed; passes that take less than 2 ms are repeated within a round.
            original: the model before pruning; None: the one that `prune` was given. Needed after
                `inplace=True`.
            device: measure there; None: where the pruned model is. A model that lies elsewhere is copied.

        Returns:
            Measurement: print its `summary()`, or take the figures from its `rows` or `to_dict()`.

        Raises:
            InputError: there is no original, or an argument is not usable.
            ModelError: a forward pass fails.
            BackendError: the device does not exist here.
        """
        before = self.original if original is None else original
        if before is None:
            raise InputError(
                "the original is not known, since it was pruned in place; give original=, a model as it "
                "was before pruning (its weights don't matter)"
            )
        return measure(
            before, self.model, example, batch_sizes=batch_sizes, rounds=rounds, device=device
        )

    def save_history(self, path: str | Path) -> None:
        """Writes the history as JSON: a list of rows."""
        rows = [dataclasses.asdict(row) for row in self.history]
        Path(path).write_text(json.dumps(rows, indent=1) + "\n")

    def __repr__(self) -> str:
        last = self.history[-1]
        return (
            f"PruneResult({self.criterion}, {len(self.history) - 1} steps, φ={last.phi:.3f}, MACs "
            f"-{last.macs_pruned_percent:.1f}%, params -{last.params_pruned_percent:.1f}%)"
        )


def _latency(row: Step) -> tuple[str, str, str]:
    if row.latency is None or row.latency_predicted is None or row.latency_share is None:
        return "-", "-", "-"
    return in_words(row.latency), in_words(row.latency_predicted), f"{row.latency_share:.1%}"


def _short(count: int) -> str:
    value: float = count
    for unit in ("", "k", "M", "G"):
        if value < 1000:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}T"
