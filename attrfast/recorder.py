"""Scores filters while the user's own loop runs: their forward pass, their loss, their backward pass.

A mode puts an identity before every reader, whose backward reduces activation times gradient (where a ReLU's
output is read by that reader alone, the backward of the ReLU does, which reads both anyway). The weights'
gradients flow as ever, and every number of the loop is the same to the last bit. Nothing is set on the model:
where its forward pass begins and ends is seen by hooks that PyTorch keeps outside of modules.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import weakref
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from attrfast.batches import resolve_device
from attrfast.channels import discover
from attrfast.criteria import Reduction
from attrfast.engine import check_options
from attrfast.errors import InputError, ModelError, NumericalError
from attrfast.matrix import Columns, ScoreMatrix
from attrfast.passes import Tally
from attrfast.recording import Flow, Link, MeasuringReLU, Reader, Readers, RecordedPass
from attrfast.rows import rows
from attrfast.scores import Scores, normalized
from attrfast.signatures import CONVOLUTIONS, channel_dim
from attrfast.taps import Tap
from attrfast.trace import CallMode, is_inplace, shown, tensors_in
from attrfast.units import Units, reader_weights

# A mode is off while a Python function of torch's runs, and these run parts of checkpointed models.
_backward, _grad = shown(torch.autograd.backward), shown(torch.autograd.grad)


class ScoreRecorder:
    """A context in which a loop of the user's is scored as it runs.

        with attrfast.ScoreRecorder(model) as recorder:
            for images, labels in loader:
                optimiser.zero_grad()
                loss_fn(model(images), labels).backward()
                optimiser.step()
        scores = recorder.scores()

    Every forward pass with gradients that a backward pass runs through is scored by the loss that is
    differentiated there, as `attribute` scores by `taylor`; it counts once its graph is gone, or at the end.
    Forward passes without gradients, and those that no backward pass follows, leave no trace. Two backward
    passes through one forward pass add up, as the gradients of the weights do. A layer that training
    normalises by the batch is scored as it is then.

    Args:
        model: whose own forward pass (`model(...)`) is scored: the module itself, not the wrapper of
            torch.compile, and the module inside of DataParallel's.
        criterion: `"taylor"` or `"taylor_fo"`, or a `Criterion` of the kind: one that a loss stands for.
        reduction, normalize: as of `attribute`.
        loss: whether the loss is the `"mean"` over the samples of a forward pass, as torch's are, or their
            `"sum"`. From a mean, each sample's gradient comes divided by their number, which is undone.
        divided_by: what the loss is divided by besides, as in gradient accumulation.
        grad_scaler: the `torch.amp.GradScaler` of the loop, whose scale is undone too. Forward passes whose
            gradients overflow are left out, as its optimiser leaves out the step, and counted in `skipped`.
        units: the model's units, if they are known from an earlier call. Otherwise a copy of the model
            finds them in the first forward pass.

    Attributes:
        samples: how many have been counted.
        skipped: how many forward passes were left out for gradients that overflowed under a scaler.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Any = "taylor",
        *,
        reduction: str | None = None,
        normalize: str | None = "l2",
        loss: str = "mean",
        divided_by: float = 1.0,
        grad_scaler: torch.amp.GradScaler | None = None,
        units: Units | None = None,
    ) -> None:
        rule, how = check_options(
            criterion, normalize=normalize, reduction=reduction, max_batches=None, microbatch=None
        )
        if not rule.uses_loss or rule.guided:
            raise InputError(
                f"the criterion {rule.name!r} is not measured by the gradients of a training loss, which "
                f"is all that runs here; choose 'taylor' or 'taylor_fo', or call attribute(...)"
            )
        if loss not in ("mean", "sum"):
            raise InputError(f"loss must be 'mean' or 'sum' (over a batch's samples), got {loss!r}")
        if not (isinstance(divided_by, (int, float)) and 0 < divided_by < math.inf):
            raise InputError(f"divided_by must be a positive number, got {divided_by!r}")
        if hasattr(model, "_orig_mod"):
            raise InputError(
                "calls of compiled code can't be seen; give the model before torch.compile, and run it"
            )
        self.device = resolve_device(model, None)
        self.model, self.criterion, self.normalize = model, rule, normalize
        self.mean, self.divided_by, self.scaler = loss == "mean", divided_by, grad_scaler
        self.samples = self.skipped = 0
        self._reduction: Reduction = how
        self._units: Units | None = None
        self._tally = Tally(rule, how, 0, self.device)
        self._state = Readers({}, [])
        self._pass: RecordedPass | None = None  # under way
        self._latest: RecordedPass | None = None  # or over, as long as no other has begun
        self._live: weakref.WeakSet[RecordedPass] = weakref.WeakSet()
        self._open: list[tuple[weakref.ref[RecordedPass], Flow]] = []  # with gradients, not counted yet
        self._context: contextlib.ExitStack | None = None
        self._looking = False
        if units is not None:
            self._know(units)

    def __enter__(self) -> ScoreRecorder:
        if self._context is not None:
            raise InputError("this recorder is in use already; make another, or leave its block first")
        self._context = contextlib.ExitStack()
        self._context.callback(register_module_forward_pre_hook(self._begin).remove)
        self._context.callback(register_module_forward_hook(self._end, with_kwargs=True).remove)
        self._context.enter_context(_RecorderMode(self))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        context, self._context = self._context, None
        self._pass = self._latest = None
        assert context is not None
        context.close()
        self._count(everything=True)

    def scores(self) -> Scores:
        """What has been counted so far, as `attribute` gives it.

        Raises:
            InputError: no backward pass has run through a forward pass of the model.
            NumericalError: a gradient was not finite.
        """
        self._count(everything=self._context is None)
        if self._units is None or self.samples == 0:
            raise InputError(
                "nothing was recorded: within the block, call the model itself (not a part of it or a "
                "wrapper's copy) with gradients on, and backward() of a loss that depends on it"
            )
        raw = self._reduction.finish(self._tally.total, self.samples).cpu().to(torch.float64)
        if not bool(torch.isfinite(raw).all()):
            raise NumericalError(
                "a gradient in the recorded loop was not finite; check its loss, or give grad_scaler if "
                "it uses one"
            )
        wide = any(p.dtype == torch.float64 for p in self.model.parameters())
        return Scores(
            units=self._units,
            importance=normalized(raw, self._units, self.normalize).to(
                torch.float64 if wide else torch.float32
            ),
            raw=raw,
            samples=self.samples,
            criterion=self.criterion.name,
            reduction=self._reduction.name,
            normalize=self.normalize,
        )

    # -- forward passes --------------------------------------------------------------------------------

    def _begin(self, module: nn.Module, args: Any) -> None:
        if module is not self.model or self._looking:
            return
        self._pass = self._latest = None
        self._count()
        if torch.is_grad_enabled():
            self._state = self._state.checked()
            self._pass = self._latest = RecordedPass(self, self._scale(), blind=self._units is None)
            self._live.add(self._pass)

    def _end(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if module is not self.model or self._looking or self._pass is None:
            return
        current, self._pass = self._pass, None
        first = next(tensors_in((args, kwargs)), None)
        if first is None or first.dim() == 0:
            return
        current.samples = len(first)
        if self._units is None:
            self._look(args, kwargs, len(first))

    def _look(self, args: Any, kwargs: dict[str, Any], samples: int) -> None:
        """Finds the units on a copy, since a pass of the model's own would change what it has saved."""
        self._looking = True
        try:
            few = min(2, samples)
            args, kwargs = (rows(tree, samples, 0, few) for tree in (args, kwargs))
            twin = copy.deepcopy(self.model)
            self._know(discover(twin, args, kwargs).units)
        finally:
            self._looking = False

    def _know(self, units: Units) -> None:
        self._units = units
        self._tally = Tally(self.criterion, self._reduction, len(units), self.device)
        weights = reader_weights(self.model, units)
        columns = {
            w: Columns(units.inputs[name], len(units), self.device) for w, name in weights.items()
        }
        self._state = Readers.of(self.model, columns)

    def _scale(self) -> float:
        return self.divided_by / (1.0 if self.scaler is None else self.scaler.get_scale())

    def tapped(self, x: torch.Tensor, weight: Any, dim: int) -> torch.Tensor:
        """x, as a reader takes it in: measured on the way back, if it is one and recorded."""
        if self._looking or not torch.is_grad_enabled():
            return x
        current = self._pass
        if current is None:
            current = self._runs_again()
        if current is None or not isinstance(weight, nn.Parameter):
            return x
        if not current.blind and id(weight) not in self._state.columns:
            return x
        link = getattr(x.grad_fn, "link", None)
        reader = Reader(id(weight), link if isinstance(link, Link) else None)
        out = Tap.apply(x, current.anchor, current, reader, dim, 1.0)
        assert isinstance(out, torch.Tensor)
        return out

    def clamped(self, x: torch.Tensor, call: Callable[..., Any], inplace: bool) -> Any:
        """A ReLU: what `call(x)` makes, by a function that can measure on the way back."""
        current = None if self._looking or not torch.is_grad_enabled() else self._pass
        if current is None or type(x) is not torch.Tensor or not x.requires_grad:
            return call(x)
        if inplace and x._is_view():  # PyTorch has rules of its own for these
            return call(x)
        return MeasuringReLU.apply(x, call, inplace, Link(current))

    def _runs_again(self) -> RecordedPass | None:
        """The forward pass that a checkpoint runs a part of once more, during the backward pass."""
        if torch._C._current_autograd_node() is None:
            return None
        live = list(self._live)
        if len(live) > 1:
            raise ModelError(
                "a checkpointed model is recorded one forward pass at a time: call backward() before the "
                "next forward pass, and keep no losses with their graphs (loss.item() keeps the number)"
            )
        return live[0] if live else None

    # -- backward passes ---------------------------------------------------------------------------------

    def flow_of(self, current: RecordedPass) -> Flow | None:
        """Where a forward pass's gradients go; None after the block."""
        if self._context is None:
            return None
        if self._units is None or current.samples is None:
            raise ModelError(
                "a backward pass ran before its forward pass was over; call backward() after model(...)"
            )
        flow = Flow(
            ScoreMatrix(
                len(self._units),
                current.samples,
                device=self.device,
                absolute=self._reduction.absolute,
            ),
            current.scale * (current.samples if self.mean else 1),
        )
        self._open.append((weakref.ref(current), flow))
        return flow

    def columns(self, weight: int) -> Columns | None:
        """Where the channels go that the reader with this weight (its id) takes in."""
        return self._state.columns.get(weight)

    def _count(self, everything: bool = False) -> None:
        """Counts the forward passes that no backward pass can reach any more."""
        waiting = []
        for alive, flow in self._open:
            if alive() is not None and not everything:
                waiting.append((alive, flow))
                continue
            values = flow.take()
            if self.scaler is not None and not bool(torch.isfinite(values).all()):
                self.skipped += 1
                continue
            self._tally.add(self._reduction.each(values), None, 0)
            self.samples += len(values)
        self._open = waiting


class _RecorderMode(CallMode):
    """Runs every call as it is, with taps before readers; on in what a checkpoint runs again, too."""

    def __init__(self, recorder: ScoreRecorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(
        self,
        func: Callable[..., Any],
        kinds: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        # Optimisers read the attributes of every parameter again and again.
        if getattr(func, "__name__", "") == "__get__":
            return func(*args, **(kwargs or {}))
        return super().__torch_function__(func, kinds, args, kwargs)

    def meet(
        self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if name in CONVOLUTIONS or name == "linear":
            return self._reader(func, name, args, kwargs)
        if name == "relu" and args and isinstance(args[0], torch.Tensor):
            call = functools.partial(_call_on, func, args[1:], kwargs)
            return self.recorder.clamped(args[0], call, is_inplace(func, kwargs) or True in args[1:])
        again = _AGAIN.get(func)
        if again is not None:
            with self:
                return again(*args, **kwargs)
        return func(*args, **kwargs)

    def _reader(
        self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        x = args[0] if args else kwargs.get("input")
        weight = args[1] if len(args) > 1 else kwargs.get("weight")
        if not isinstance(x, torch.Tensor):
            return func(*args, **kwargs)
        dim = channel_dim(name, x)
        tapped = self.recorder.tapped(x, weight, dim)
        if args:
            return func(tapped, *args[1:], **kwargs)
        return func(**{**kwargs, "input": tapped})


def _call_on(
    func: Callable[..., Any], rest: tuple[Any, ...], kwargs: dict[str, Any], x: torch.Tensor
) -> Any:
    return func(x, *rest, **kwargs)


def _tensor_backward(
    tensor: torch.Tensor,
    gradient: torch.Tensor | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: Any = None,
) -> None:
    _backward(tensor, gradient, retain_graph, create_graph, inputs=inputs)


_AGAIN: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.Tensor.backward: _tensor_backward,
    torch.autograd.backward: _backward,
    torch.autograd.grad: _grad,
}
