"""The fast tier: runs a recorded sequence of calls again, stage by stage, with the taps inside.

A stage is one autograd function over one op that works in place. Calls of the model are checked against
the record one by one; a model that makes others is not run this way (`PlanMismatchError`). No hook is set and
nothing is written to the model.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from attrfast import joined, ops, turning
from attrfast.buffers import Buffers
from attrfast.convolution import Geometry, each, left_behind, library_pointwise, size_made
from attrfast.following import Follower, PlanMismatchError
from attrfast.graph import Plan
from attrfast.layouts import channels_lie_together, empty_laid, is_dense, strides_laid
from attrfast.map_statistics import Counted
from attrfast.matrix import Columns, ScoreMatrix
from attrfast.reference import compute_dtype
from attrfast.shared_gradient import SharedGradient, shared
from attrfast.signatures import batch_norm_arguments, bound_arguments
from attrfast.stage_runs import (
    JoinFunction,
    StageFunction,
    StageRun,
    own_kernel,
    pieces_of,
    pieces_of_joined,
    run_forward,
    whole_convolution,
    whole_join,
)
from attrfast.stages import Stage, has_room, pool_geometry
from attrfast.taps import Tap, folded_batch_norm
from attrfast.trace import Call, CallMode, State, is_silent

Tensor = torch.Tensor


# Of torch 2.8 and newer. Before, a checkpoint inside a stage ends in its own error.
_hooks_of_saved_tensors = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


class PlanMode(CallMode):
    """Runs a forward pass by a plan.

    Args:
        state: of the model, in eval mode.
        plan: of a pass that made the same calls.
        columns: value -> columns of its channels, for every value that a tap of the plan names.
        matrix: what the taps add to, during the backward pass.
        anchor: what they hang on.
        guided: the guided rule at every ReLU.
        folded: batch norms by the ids of their statistics, folded on an earlier batch.
        lowered: weights in the dtype of autocast, by id, from an earlier batch.
        buffers: memory for large tensors, on a CPU.

    Raises:
        PlanMismatchError: within the pass, when the model makes another call than the recorded one.
    """

    def __init__(
        self,
        state: State,
        plan: Plan,
        columns: dict[int, Columns],
        matrix: ScoreMatrix,
        anchor: Tensor,
        folded: dict[int, tuple[Tensor, Tensor]],
        lowered: dict[tuple[int, torch.dtype], Tensor],
        *,
        guided: bool,
        buffers: Buffers | None = None,
    ) -> None:
        super().__init__()
        self.buffers = buffers
        self.plan, self.columns, self.matrix, self.anchor = plan, columns, matrix, anchor
        self.folded, self.lowered, self.guided = folded, lowered, guided
        self.frozen = state.frozen
        self.follower = Follower(state.names, plan.calls)
        self.numbering = self.follower.numbering
        self.running: dict[int, StageRun] = {}  # stages under way, by the value they have reached
        self.counted: Counted | None = None  # for the call that comes next
        self.turned: set[int] = set()  # values that lie channels-last where the model would not
        self.heads: dict[
            int, StageRun
        ] = {}  # what waits for the convolution that reads it, by its value
        self.shared: dict[int, tuple[Tensor, SharedGradient]] = {}  # values that stages join

    def meet(
        self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if is_silent(name):
            return func(*args, **kwargs)
        if _hooks_of_saved_tensors is not None and _hooks_of_saved_tensors(True) is not None:
            # A checkpoint runs its part of the model again, call by call, and expects the same tensors.
            raise PlanMismatchError(f"{name} runs in a checkpoint, or where saved tensors are hooked")
        call = self.follower.meet(name, args, kwargs)
        stage = self.plan.stages.get(call.index)
        if stage is not None:
            role = stage.roles[call.index]
            out = self._advance(stage, role, call.index, func, name, call.inputs, args, kwargs)
        elif call.state or call.index in self.plan.tapped:
            out = func(
                *(self._read(call.index, a) for a in args),
                **{key: self._read(call.index, value) for key, value in kwargs.items()},
            )
        else:
            out = func(*args, **kwargs)
        made = self.follower.leave(call, out, args, kwargs)
        if stage is None and not self.turned.isdisjoint(call.inputs):
            out, made = self._passed_on(call, out, made)
        if stage is None and len(made) == 1 and call.outputs[0] in self.plan.through:
            value = call.outputs[0]
            if out is not made[0] or not out.is_floating_point():
                raise PlanMismatchError(
                    f"call {call.index}, {name}, made something that can't be tapped"
                )
            out = self._tap(out, value, self.plan.through[value])
            self.numbering.values.put(out, value)
        return out

    def count_next(self, counted: Counted) -> bool:
        """Whether the next call is a ReLU whose stage counts what it leaves, and tells `counted` of it."""
        index = self.follower.index
        stage = self.plan.stages.get(index)
        if stage is None or stage.roles[index] != "relu":
            return False
        self.counted = counted
        return True

    def held(self, x: Tensor) -> Tensor:
        """What x will hold: inside a stage that has yet to run, its memory is right in shape alone."""
        value = self.numbering.values.get(x)
        run = None if value is None else self.running.get(value) or self.heads.get(value)
        if run is None:
            return x
        assert run.z is not None
        if run.own is not None:
            return run.own(run.scale, run.shift, None, run.lower, run.upper)
        parts = [run.z]
        if run.parts is not None:
            parts = list(run.parts)
            run.parts = iter(parts)
        wide = compute_dtype(run.z.dtype)
        scale, shift = (None if t is None else t.to(wide) for t in (run.scale, run.shift))
        relu = ops.backend_for(run.z.device).affine_relu
        # A stage that goes on after its ReLU has a pooling, and so no addition.
        made = [relu(part, scale, shift, None, run.lower, run.upper)[0] for part in parts]
        return made[0] if len(made) == 1 else torch.cat(made)

    # -- values that lie another way -------------------------------------------------------------------

    def _turn(self, run: StageRun, value: int | None, x: Tensor, weight: Tensor) -> Tensor:
        """The input of a convolution, channels-last where that is faster and nobody sees it."""
        run.turned = value in self.turned
        if (
            run.turned
            or run.stage.output not in self.plan.free
            or not turning.pays(x)
            or not weight.is_contiguous()
        ):
            return x
        run.turned = True
        return turning.turned(x)

    def _passed_on(self, call: Call, out: Any, made: list[Tensor]) -> tuple[Any, list[Tensor]]:
        """What a call outside stages has made of values that lie another way than the model would lay them."""
        if len(made) == 1 and made[0].dim() == 4 and channels_lie_together(made[0]):
            (value,) = call.outputs
            left = self._left_turned(made[0], value)
            if left is not made[0]:
                self.numbering.values.put(left, value)
                return left, [left]
        return out, made

    def _left_turned(self, x: Tensor, value: int) -> Tensor:
        """A value that lies another way: as it is, where nobody sees it, or laid as the model would lay it."""
        if value not in self.plan.free:
            return x.contiguous()
        self.turned.add(value)
        return x

    # -- calls outside stages ------------------------------------------------------------------------

    def _tap(self, x: Tensor, value: int, sign: float) -> Tensor:
        """Measures the flow through x, whose channels are those of `value`."""
        dim = self.plan.channels[value][0]
        out = Tap.apply(x, self.anchor, self.matrix, self.columns[value], dim, sign)
        assert isinstance(out, torch.Tensor)
        return out

    def _into(self, index: int, x: Tensor) -> Tensor:
        """x as one call reads it: with the tap on that use, if there is one."""
        if index not in self.plan.tapped:
            return x
        value = self.numbering.values.get(x)
        tap = self.plan.into.get((index, value)) if value is not None else None
        return x if tap is None else self._tap(x, tap[1], tap[0])

    def _read(self, index: int, tree: Any) -> Any:
        """Arguments of a call outside stages, as it reads them."""
        if isinstance(tree, torch.Tensor):
            return self.frozen.get(id(tree)) if id(tree) in self.frozen else self._into(index, tree)
        if type(tree) in (list, tuple):
            return type(tree)(self._read(index, item) for item in tree)
        return tree

    # -- calls inside stages --------------------------------------------------------------------------

    def _advance(
        self,
        stage: Stage,
        role: str,
        index: int,
        func: Callable[..., Any],
        name: str,
        inputs: tuple[int, ...],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        """Notes one call of a stage; the last one runs it.

        Until then the model holds the memory that the stage will work on: right in shape, not yet in
        value. Nobody reads it, or the stage would not be one.
        """
        first = index == stage.first
        if first:
            run = StageRun(stage, self.guided, stage.output in self.plan.fresh)
            run.matrix = self.matrix
        else:
            key = next((v for v in inputs if v in self.running), None)
            if key is None or self.running[key].stage is not stage:
                raise PlanMismatchError(f"call {index}, {name}, does not go on with its stage")
            run = self.running.pop(key)
        if role == "conv":
            self._convolve(run, index, func, name, args, kwargs)
        elif role == "cat":
            self._join(run, index, func, args, kwargs)
        elif role == "norm":
            x, mean, var, weight, bias, training, eps = batch_norm_arguments(args, kwargs)
            if training:
                raise PlanMismatchError(f"call {index} normalises by the batch")
            if first:
                self._start(run, index, x)
            run.scale, run.shift = self._fold(mean, var, weight, bias, eps)
        elif role == "relu":
            if first:
                self._start(run, index, args[0] if args else kwargs["input"])
            run.lower, run.upper = 0.0, stage.upper
            run.counted, self.counted = self.counted, None
        elif role == "pool":
            if first:
                self._start(run, index, args[0] if args else kwargs["input"])
            kernel, stride, padding, _, ceil_mode = pool_geometry(args, kwargs)
            assert run.z is not None
            if not has_room(run.z.shape, kernel, padding):
                raise PlanMismatchError(f"call {index} pools with a window larger than its input")
            run.pool = kernel, stride, padding, ceil_mode
        else:
            other = args[1] if self.numbering.values.get(args[0]) != stage.residual else args[0]
            run.residual = self._into(index, other)
        if index == stage.last:
            return self._finish(run)
        assert run.z is not None
        self.running[self.plan.calls[index].outputs[0]] = run
        return run.z

    def _convolve(
        self,
        run: StageRun,
        index: int,
        func: Callable[..., Any],
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        x, weight, bias, stride, padding, dilation, groups = bound_arguments(name, args, kwargs)
        spatial = int(name[-2])
        weight = self.frozen.get(id(weight), weight)
        bias = self.frozen.get(id(bias), bias)
        value = self.numbering.values.get(x)
        head = None if value is None else self.heads.pop(value, None)
        if head is None:
            x = self._turn(run, value, self._into(index, x), weight)
        else:
            run.turned = value in self.turned
        weight = self._lowered(weight)
        geometry = Geometry(
            each(stride, spatial),
            [0] * spatial if isinstance(padding, str) else each(padding, spatial),
            each(dilation, spatial),
            int(groups),
        )
        run.weight, run.geometry, run.memory = weight, geometry, self.buffers
        own = None
        sample = x if head is None else empty_laid(x, True, (1, *x.shape[1:]))
        wide = compute_dtype(x.dtype)
        if not isinstance(padding, str) and (bias is None or bias.dtype in (x.dtype, wide)):
            own = own_kernel(sample, weight, geometry)
        shift = None if own is None or bias is None else bias.to(wide)
        alone = own is not None and not run.stage.has("pool")
        in_parts = self.buffers is not None and x.dim() == spatial + 2 and index != run.stage.last
        if head is not None and not alone and not in_parts:
            x, head = self._launch(head), None
        if head is not None:
            strides = strides_laid(True, x.shape)
            head.own = None  # which knows of the head, in a circle that would outlive the batch
        else:
            strides = x.stride() if is_dense(x) else strides_laid(False, x.shape)
        run.x_like, run.head = (x.shape, strides, x.dtype), head
        if head is not None or (in_parts and not alone):
            run.buffers = self.buffers
        run.x = x if head is None else None
        shape = self.plan.shapes[self.plan.calls[index].outputs[0]]
        if alone:
            assert own is not None
            made = size_made(x.shape[2:], weight.shape[2:], geometry.padding, geometry.stride)
            shape = torch.Size((len(x), weight.shape[0], *made))
            given = shape, weight, shift, geometry.padding, self.buffers
            run.own = whole_convolution(own, self._pieces(x, head, run, len(x)), *given)
            run.z = x.new_empty_strided(shape, (0,) * len(shape))
            return

        def convolve(part: Tensor) -> Tensor:
            with torch.no_grad():
                if own is not None:
                    return own(part, weight, geometry.padding, shift=shift, buffers=self.buffers)
                if left_behind(part, weight, geometry):
                    return library_pointwise(part, weight, bias)
                z: Tensor = func(part, weight, bias, stride, padding, dilation, groups)
                return z

        step = len(x)
        if in_parts:
            step = run.samples_at_once(math.prod(shape[1:]) * x.element_size(), len(x))
        pieces = self._pieces(x, head, run, step)()
        first = next(pieces)
        z = convolve(first)
        if len(first) < len(x):
            run.parts = itertools.chain([z], map(convolve, pieces))
            z = z.new_empty(()).expand(len(x), *z.shape[1:])
        run.weight = weight.to(z.dtype)
        run.z = z

    def _pieces(
        self, x: Tensor, head: StageRun | None, run: StageRun, step: int
    ) -> Callable[[], Iterator[Tensor]]:
        """Gives what a convolution reads, at most `step` samples at a time."""
        if head is None:
            return pieces_of(x, step)
        assert head.joins is not None
        return pieces_of_joined(head, max(1, min(step, run.joined_at_once(head.joins))), True)

    def _lowered(self, weight: Tensor) -> Tensor:
        """A weight in the dtype of autocast, which would make it anew in every call."""
        kind = weight.device.type
        if not torch.is_autocast_enabled(kind) or weight.dtype != torch.float32:
            return weight
        dtype = torch.get_autocast_dtype(kind)
        found = self.lowered.get((id(weight), dtype))
        if found is None:
            found = self.lowered[id(weight), dtype] = weight.to(dtype)
        return found

    def _join(
        self,
        run: StageRun,
        index: int,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        """Begins a stage that joins maps; where no kernel reads them one by one, with the joined map."""
        parts, *rest = args or (kwargs["tensors"],)
        run.turned = any(value in self.turned for value in run.stage.sources)
        tapped = index in self.plan.tapped
        given = [self._into(index, part) for part in parts] if tapped else list(parts)
        if not joined.suits(given):
            run.x = func(given, *rest, **{k: v for k, v in kwargs.items() if k != "tensors"})
            run.z = run.x.data
            return
        for i, (value, part) in enumerate(zip(run.stage.sources, given, strict=True)):
            if not part.requires_grad:
                run.gradients.append(None)
                continue
            if part is not parts[i]:  # behind a tap
                given[i], gradient = shared(part)
            else:
                if value not in self.shared:
                    self.shared[value] = shared(part)
                given[i], gradient = self.shared[value]
            run.gradients.append(gradient)
        run.joins, run.memory = joined.Parts(given), self.buffers
        run.own = whole_join(run)
        shape = run.joins.shape
        run.z = given[0].new_empty_strided(shape, (0,) * len(shape))

    def _start(self, run: StageRun, index: int, x: Tensor) -> None:
        """Begins a stage that has no convolution."""
        run.turned = self.numbering.values.get(x) in self.turned
        run.x = self._into(index, x)
        run.z = x.data

    def _fold(
        self, mean: Tensor, var: Tensor, weight: Any, bias: Any, eps: float
    ) -> tuple[Tensor, Tensor]:
        found = self.folded.get(id(mean))
        if found is None:
            weight, bias = self.frozen.get(id(weight), weight), self.frozen.get(id(bias), bias)
            found = self.folded[id(mean)] = folded_batch_norm(mean, var, weight, bias, eps)
        return found

    def _finish(self, run: StageRun) -> Tensor:
        value, residual = run.stage.output, run.residual
        assert run.z is not None
        if run.scale is not None and run.shift is not None:
            wide = compute_dtype(run.z.dtype)
            run.scale, run.shift = run.scale.to(wide), run.shift.to(wide)
        if residual is not None and (residual.dtype != run.z.dtype or residual.shape != run.z.shape):
            raise PlanMismatchError(f"an addition of {residual.dtype} to {run.z.dtype}")
        if value in self.plan.through:
            run.through = self.columns[value], self.plan.through[value]
        if value in self.plan.branch:
            run.branch = self.columns[value], self.plan.branch[value]
        alone = run.joins is not None and run.joins.last and run.counted is None
        if alone and value in self.plan.heads and (not run.turned or value in self.plan.free):
            self.heads[value] = run
            if run.turned:
                self.turned.add(value)
            return run.z
        return self._launch(run)

    def _launch(self, run: StageRun) -> Tensor:
        x, residual, head = run.x, run.residual, run.head or run
        assert run.z is not None
        positions = run.z.shape[2:].numel()
        parts = () if head.joins is None else head.joins.tensors
        inputs = [t for t in (x, residual, *parts) if t is not None]
        taps = run.through, run.branch, head.through
        if not any(t.requires_grad for t in inputs) and all(tap is None for tap in taps):
            with torch.no_grad():
                out, _ = run_forward(run, residual)
        elif parts:
            out = JoinFunction.apply(self.anchor, run, *parts)
        else:
            assert x is not None
            out = StageFunction.apply(x, residual, self.anchor, run)
        assert isinstance(out, torch.Tensor)
        if run.counted is not None:
            run.counted(torch.cat(run.counts), positions)
        run.counts.clear()
        return self._left_turned(out, run.stage.output) if run.turned else out
