"""Ordinary training, configured or by the user's own function: recovers accuracy after a cut.

With the hooks of a criterion in it, the same training finds out what to cut next.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional
from tqdm import tqdm

from attrfast import random_state
from attrfast.batches import Batch, check_labels, main_output, unpack
from attrfast.checkpoint import fingerprint
from attrfast.criteria import Phase
from attrfast.distributed import Group
from attrfast.errors import AttrfastError, InputError, NumericalError
from attrfast.lockstep import Lockstep
from attrfast.objective import Loss, LossFunction
from attrfast.seeding import seeded, set_epoch

Parameters = Iterable[nn.Parameter]


@dataclass(frozen=True)
class FineTune:
    """How to fine-tune after a cut. Augmentation is the loader's.

    Attributes:
        epochs: passes over the loader.
        optimizer: `"sgd"`, `"adam"`, `"adamw"`, or a callable from parameters to an optimizer.
        lr: learning rate at the start; for `"onecycle"` the highest.
        momentum: of SGD (Nesterov).
        weight_decay: of the named optimizers.
        schedule: `"cosine"` (to 0), `"constant"`, `"onecycle"`, or a callable
            `(optimizer, steps) -> scheduler`, stepped after every batch.
        label_smoothing: of the cross-entropy.
        max_grad_norm: gradients are clipped to this norm; None: not clipped.
        amp_dtype: `torch.bfloat16` or `torch.float16` trains under autocast.
        aux_weight: weight of the loss of auxiliary heads (outputs whose field name begins with "aux",
            as in GoogLeNet and Inception).
    """

    epochs: int = 1
    optimizer: str | Callable[[Parameters], torch.optim.Optimizer] = "sgd"
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: str | Callable[[torch.optim.Optimizer, int], Any] = "cosine"
    label_smoothing: float = 0.0
    max_grad_norm: float | None = None
    amp_dtype: torch.dtype | None = None
    aux_weight: float = field(default=0.3)

    def __post_init__(self) -> None:
        if not isinstance(self.epochs, int) or self.epochs < 0:
            raise InputError(f"epochs must be a whole number of at least 0, got {self.epochs!r}")
        if not self.lr > 0:
            raise InputError(f"lr must be above 0, got {self.lr!r}")
        if isinstance(self.optimizer, str) and self.optimizer not in ("sgd", "adam", "adamw"):
            raise InputError(
                f"optimizer must be 'sgd', 'adam', 'adamw' or a callable, got {self.optimizer!r}"
            )
        if isinstance(self.schedule, str) and self.schedule not in (
            "cosine",
            "constant",
            "onecycle",
        ):
            raise InputError(
                f"schedule must be 'cosine', 'constant', 'onecycle' or a callable, got {self.schedule!r}"
            )


class Keeper(Protocol):
    """Keeps a fine-tuning between its epochs, so that another process can go on with it."""

    def load(self) -> Mapping[str, Any] | None:
        """What `save` was given last, in an earlier process."""

    def save(self, state: Mapping[str, Any]) -> None:
        """Keeps the state after an epoch; it may share memory with the model."""


FineTuneLike = int | FineTune | Callable[[nn.Module, int], None]


def as_finetune(finetune: FineTuneLike) -> FineTune | Callable[[nn.Module, int], None]:
    """Epochs, a configuration or a callable, told apart.

    Raises:
        InputError: it is none of the three.
    """
    if isinstance(finetune, bool):
        raise InputError(f"finetune must be epochs, a FineTune or a callable, got {finetune!r}")
    if isinstance(finetune, int):
        return FineTune(epochs=finetune)
    if isinstance(finetune, FineTune) or callable(finetune):
        return finetune
    raise InputError(
        f"finetune must be a number of epochs, an attrfast.FineTune or a callable (model, step), got "
        f"{type(finetune).__name__}"
    )


def fine_tune(
    model: nn.Module,
    loader: Iterable[Any],
    how: FineTune | Callable[[nn.Module, int], None],
    *,
    step: int,
    loss_fn: LossFunction | None = None,
    device: torch.device,
    seed: int = 0,
    phase: Phase | None = None,
    bar: str | None = None,
    group: Group | None = None,
    keeper: Keeper | None = None,
) -> None:
    """Trains a model in place, and puts its training flags back.

    The processes of a `group` train together, each on its own loader, and end with the same bits.

    `phase` hooks into the built-in training, and is not called by the user's callable. With `bar`, the
    built-in training shows a bar of this name when standard error is a terminal. With `keeper`, the built-in
    training goes on from the epoch that it kept, and keeps every epoch but the last; a `phase` has a state that
    is not kept.

    The built-in training draws from a random state of its own, so that the same seed gives the same
    result, and the global state stays as it was. The user's callable draws from the global one.

    Raises:
        AttrfastError: the user's callable raised; its error is the cause.
        NumericalError: the loss is not finite.
        DistributedError: another process failed or is gone, or ended with other weights.
    """
    group = group or Group()
    flags = [(module, module.training) for module in model.modules()]
    try:
        if isinstance(how, FineTune):
            with seeded(seed, [loader], device):
                _train(model, loader, how, loss_fn, device, phase or Phase(), bar, group, seed, keeper)
        else:
            try:
                with group.unannounced():  # which may exchange things of its own
                    how(model, step)
            except AttrfastError:
                raise
            except Exception as error:
                raise AttrfastError(
                    f"your finetune callable raised {type(error).__name__} at step {step}: {error}"
                ) from error
    finally:
        for module, flag in flags:
            module.training = flag
    if not group.alone:
        group.require_same(
            "fine-tuning",
            fingerprint(model, {}),
            f"it has other weights after fine-tuning in step {step}; a finetune callable of your own must "
            f"end with the same in all processes, for instance by DistributedDataParallel",
        )


def _train(
    model: nn.Module,
    loader: Iterable[Any],
    how: FineTune,
    loss_fn: LossFunction | None,
    device: torch.device,
    phase: Phase,
    bar: str | None,
    group: Group,
    seed: int,
    keeper: Keeper | None,
) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if how.epochs == 0 or not parameters:
        return
    optimizer = _optimizer(how, parameters)
    if phase.parameters:
        optimizer.add_param_group({"params": [*phase.parameters], "weight_decay": 0.0})
    loss = Loss(loss_fn) if loss_fn is not None else None
    # Processes whose loaders differ in length end together, and so do their schedules.
    lengths = group.meet("fine-tuning", len(loader) if isinstance(loader, Sized) else None)
    batches = None if None in lengths else max(lengths)
    scheduler = _scheduler(how, optimizer, batches)
    scaler = torch.amp.GradScaler(device.type, enabled=how.amp_dtype == torch.float16)
    lost, last = torch.zeros((), dtype=torch.bool, device=device), torch.zeros(())
    training = _Training(model, optimizer, scheduler, scaler, loader, device)
    held = None if keeper is None else keeper.load()
    first = 0 if held is None else training.restore(held, how.epochs)
    model.train()
    steps = Lockstep(model, group)
    for epoch in range(first, how.epochs):
        set_epoch(loader, seed, epoch)
        own = _usable(model, _watched(loader, bar, epoch, how.epochs, batches), device)
        while True:
            optimizer.zero_grad(set_to_none=True)
            with steps.own_part():
                batch = next(own, None)
                if batch is None:
                    _check_finite(lost, last, epoch, how)
                else:
                    with torch.autocast(
                        device.type, dtype=how.amp_dtype, enabled=how.amp_dtype is not None
                    ):
                        with phase.around_forward():
                            value = steps.forward(functools.partial(_loss, model, batch, how, loss))
                        penalty = phase.penalty()
                        if penalty is not None:
                            value = value + penalty
                    last = value.detach()
                    lost = lost | ~torch.isfinite(last)
                    if device.type == "cpu":  # a GPU is asked once an epoch
                        _check_finite(lost, last, epoch, how)
            weight = steps.weight(0 if batch is None else batch.samples)
            if weight is None:
                break
            with steps.common_part():
                share = steps.forward(None) if batch is None else value * weight
                torch.autograd.backward(scaler.scale(share))
                if how.max_grad_norm is not None:
                    scaler.unscale_(optimizer)
                    nn.utils.clip_grad_norm_(parameters, how.max_grad_norm)
                phase.after_backward()
                lr = optimizer.param_groups[0]["lr"]
                scaler.step(optimizer)
                scaler.update()
                phase.after_step(lr)
                if scheduler is not None and batches is not None:
                    scheduler.step()
        phase.after_epoch()
        if scheduler is not None and batches is None:
            scheduler.step()
        if keeper is not None and epoch + 1 < how.epochs:
            keeper.save(training.state(epoch + 1))
    steps.finish()
    optimizer.zero_grad(set_to_none=True)


@dataclass(frozen=True)
class _Training:
    """All that decides how a training goes on."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any
    scaler: torch.amp.GradScaler
    loader: Iterable[Any]
    device: torch.device

    def state(self, epoch: int) -> dict[str, Any]:
        """After so many epochs."""
        return {
            "epoch": epoch,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": random_state.now([self.loader], self.device),
        }

    def restore(self, state: Mapping[str, Any], epochs: int) -> int:
        """Goes to where `state` was taken; returns after how many epochs that was.

        Raises:
            InputError: the state is of another training.
        """
        try:
            if not state["epoch"] < epochs:
                raise ValueError(f"epoch {state['epoch']} of {epochs}")
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.scheduler is not None:
                self.scheduler.load_state_dict(state["scheduler"])
            self.scaler.load_state_dict(state["scaler"])
        except Exception as error:  # of whatever optimiser the user gave
            raise InputError(
                f"the fine-tuning that was cut off can't go on: {error}; call with resume=False to start "
                f"again"
            ) from error
        random_state.restore(state["random"], [self.loader], self.device)
        return int(state["epoch"])


def _usable(model: nn.Module, loader: Iterable[Any], device: torch.device) -> Iterator[Batch]:
    """The batches that can be trained on: a batch norm has no statistics of one sample."""
    normalised = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    for raw in loader:
        batch = unpack(raw, device)
        if batch.samples > 1 or not normalised:
            yield batch


def _watched(
    loader: Iterable[Any], bar: str | None, epoch: int, epochs: int, batches: int | None
) -> Iterable[Any]:
    """The loader behind a bar that tells the time left of all epochs."""
    done, total = (0, None) if batches is None else (epoch * batches, epochs * batches)
    shown: Iterable[Any] = tqdm(
        loader, desc=bar, initial=done, total=total, leave=False, disable=True if bar is None else None
    )
    return shown


def _check_finite(lost: torch.Tensor, last: torch.Tensor, epoch: int, how: FineTune) -> None:
    if bool(lost):
        raise NumericalError(
            f"the loss became {float(last)} in epoch {epoch + 1} of fine-tuning; lower lr ({how.lr}), or "
            f"set max_grad_norm"
        )


def _loss(model: nn.Module, batch: Batch, how: FineTune, loss: Loss | None) -> torch.Tensor:
    """Mean over the batch's samples."""
    output = batch.feed(model)
    if loss is not None:
        return loss(output, batch.raw, batch.labels, batch.samples) / batch.samples
    logits = main_output(output)
    check_labels(batch, logits)
    labels = batch.labels.long()
    value = functional.cross_entropy(logits, labels, label_smoothing=how.label_smoothing)
    for name in getattr(output, "_fields", ()):
        aux = getattr(output, name)
        if name.startswith("aux") and isinstance(aux, torch.Tensor):
            value = value + how.aux_weight * functional.cross_entropy(
                aux, labels, label_smoothing=how.label_smoothing
            )
    return value


def _optimizer(how: FineTune, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    if callable(how.optimizer):
        return how.optimizer(parameters)
    if how.optimizer == "sgd":
        return torch.optim.SGD(
            parameters,
            lr=how.lr,
            momentum=how.momentum,
            weight_decay=how.weight_decay,
            nesterov=how.momentum > 0,
        )
    kind = torch.optim.Adam if how.optimizer == "adam" else torch.optim.AdamW
    return kind(parameters, lr=how.lr, weight_decay=how.weight_decay)


def _scheduler(how: FineTune, optimizer: torch.optim.Optimizer, batches: int | None) -> Any:
    """Stepped every batch where the number of batches is known, else every epoch."""
    steps = max(1, how.epochs * (batches or 1))
    if callable(how.schedule):
        return how.schedule(optimizer, steps)
    if how.schedule == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    if how.schedule == "onecycle":
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=how.lr, total_steps=steps + 1)
    return None
