"""The fast tier: runs a recorded sequence of calls again, stage by stage, with the taps inside.

A stage is one autograd function over one op that works in place. Calls of the model are checked against
the record one by one; a model that makes others is not run this way (`PlanMismatchError`). No hook is set and
nothing is written to the model.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from attrfast import depthwise, ops, pointwise, turning, winograd
from attrfast.buffers import Buffers, empty_channels_last
from attrfast.convolution import (
    Geometry,
    each,
    input_gradient,
    left_behind,
    library_pointwise,
    size_made,
)
from attrfast.following import Follower, PlanMismatchError
from attrfast.graph import Plan
from attrfast.layouts import channels_lie_together, empty_laid, is_dense, laid
from attrfast.map_statistics import Counted
from attrfast.matrix import Columns, ScoreMatrix
from attrfast.reference import compute_dtype
from attrfast.signatures import batch_norm_arguments, bound_arguments
from attrfast.stages import INF, Stage, has_room, pool_geometry
from attrfast.taps import Tap, folded_batch_norm
from attrfast.trace import Call, CallMode, State, is_silent

Tensor = torch.Tensor


# On a CPU, large tensors of a stage are made so many bytes at a time: what a convolution writes is still in
# the cache when the kernel after it reads it.
PART = 4 << 20

# Of torch 2.8 and newer. Before, a checkpoint inside a stage ends in its own error.
_hooks_of_saved_tensors = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


class _Run:
    """One stage of one batch, collected call by call until it runs.

    Attributes:
        x: what the stage reads first.
        z: the memory that it works on: the convolution's output, or x itself.
        own: makes the stage's output in one launch, given what `affine_relu` takes after z.
        turned: whether it works channels-last where the model would lay things contiguously.
        measure: of the flow through its output (1), or through its own branch of the addition (2).
    """

    def __init__(self, stage: Stage, guided: bool, fresh: bool) -> None:
        self.stage, self.guided, self.fresh = stage, guided, fresh
        self.x: Tensor | None = None
        self.z: Tensor | None = None
        self.weight: Tensor | None = None
        self.geometry: Geometry | None = None
        self.scale: Tensor | None = None
        self.shift: Tensor | None = None
        self.residual: Tensor | None = None
        self.pool: tuple[list[int], list[int], list[int], bool] | None = None
        self.lower, self.upper = -INF, INF
        self.through: tuple[Columns, float] | None = None
        self.branch: tuple[Columns, float] | None = None
        self.matrix: ScoreMatrix | None = None
        self.parts: Iterator[Tensor] | None = None
        self.buffers: Buffers | None = None
        self.x_like: tuple[torch.Size, tuple[int, ...], torch.dtype] | None = None
        self.size: list[int] = []
        self.counted: Counted | None = None  # who wants to know what its ReLU leaves
        self.counts: list[Tensor] = []  # of each part, (N, C)
        self.own: Callable[..., Tensor] | None = None
        self.memory: Buffers | None = None
        self.turned = False

    @property
    def clamps(self) -> bool:
        return self.lower > -INF

    @property
    def reduces(self) -> bool:
        """Whether its backward kernel reads its output anyway, so that it can measure for nothing."""
        return self.clamps or self.pool is not None

    def samples_at_once(self, size: int, samples: int) -> int:
        """How many samples a convolution takes at once, forward or back: all, or as many as `PART` holds.

        A convolution lays its weight out anew in each call, so a large weight is not used in parts.

        Args:
            size: bytes of a sample.
        """
        if self.buffers is None or self.weight is None:
            return samples
        if samples * size <= 2 * PART or self.weight.nbytes > PART // 4:
            return samples
        return min(samples, max(1, PART // max(1, size)))

    def whole(self, part: Tensor, samples: int) -> Tensor:
        """Memory for all samples, laid out like one part."""
        assert self.buffers is not None
        shape = samples, *part.shape[1:]
        last = channels_lie_together(part)
        like = empty_laid(part.new_empty((), device="meta"), last, shape)
        return self.buffers.empty(shape, like.stride(), part.dtype)

    def folds(self, g: Tensor) -> bool:
        """Whether the weight takes the batch norm's scale on the way back.

        Where the gradient has two ways to go, or no kernel runs over it, multiplying it would take a pass
        and memory of its own. A weight that is no larger is multiplied for less.
        """
        if self.weight is None or self.scale is None or self.pool is not None:
            return False
        apart = self.stage.residual is not None or not self.clamps
        return apart and self.branch is None and self.weight.numel() <= g.numel()


class _Fused(torch.autograd.Function):
    """A stage: forward in place, backward with the attribution reduced on the way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, anchor: Tensor, run: _Run) -> Tensor:
        out, code = _forward(run, residual)
        saved: list[Tensor | None] = [None, None, None]
        if run.clamps or run.pool is not None or run.through is not None:
            saved[0] = out
        saved[1] = code
        if run.branch is not None:
            saved[2] = residual
        ctx.save_for_backward(*saved)
        ctx.run = run
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        run: _Run = ctx.run
        (g,) = grads
        saved = ctx.saved_tensors
        to_x, to_residual = ctx.needs_input_grad[:2]
        assert run.matrix is not None
        through = run.through
        if through is not None and not (run.reduces and to_x and run.branch is None):
            run.matrix.add(through[0], saved[0], g, 1, through[1])
            through = None
        if not (to_x or to_residual or run.branch):
            return None, None, None, None
        gx, g1, s = _gradients(run, saved, g, through is not None, to_x, to_residual)
        for place in (through, run.branch):
            if place is not None:
                run.matrix.add_sums(place[0], s, place[1])
        return gx, g1, None, None


def _gradients(
    run: _Run,
    saved: tuple[Tensor | None, ...],
    g: Tensor,
    attribute: bool,
    to_x: bool,
    to_residual: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Gradients for x and for the residual where they are wanted, and the flow (N, C)."""
    scale, folded = run.scale, None
    if to_x and run.folds(g):
        scale, folded = None, run.scale
    if not to_x or run.geometry is None:
        gz, g1, s = _backward(run, scale, saved, g, attribute)
        return (gz if to_x else None), (g1 if to_residual else None), s
    in_one = _in_one_launch(run, saved, g, attribute, to_residual)
    if in_one is not None:
        return in_one
    assert run.x_like is not None
    shape, strides, dtype = run.x_like
    step = run.samples_at_once(math.prod(shape[1:]) * g.element_size(), len(g))
    if step == len(g):
        gz, g1, s = _backward(run, scale, saved, g, attribute)
        return _input_gradient(run, gz, folded).to(dtype), (g1 if to_residual else None), s
    assert run.buffers is not None
    gx = run.buffers.empty(shape, strides, dtype)
    others, sums = [], []
    for start in range(0, len(g), step):
        here = slice(start, start + step)
        mine = tuple(None if x is None else x[here] for x in saved)
        gz, g1, s = _backward(run, scale, mine, g[here], attribute)
        _input_gradient(run, gz, folded, gx[here])
        sums.append(s)
        others.append(g1)
    flow = torch.cat(sums) if attribute or run.branch is not None else g
    if not to_residual:
        return gx, None, flow
    in_place = others[0].data_ptr() == g.data_ptr()
    return gx, (g if in_place else torch.cat(others)), flow


def _in_one_launch(
    run: _Run, saved: tuple[Tensor | None, ...], g: Tensor, attribute: bool, to_residual: bool
) -> tuple[Tensor, Tensor | None, Tensor] | None:
    """What `_gradients` gives, where our own kernel does all of it; None where it does not."""
    assert run.x_like is not None
    assert run.geometry is not None
    assert run.weight is not None
    shape, strides, dtype = run.x_like
    if not run.clamps or run.pool is not None or dtype != g.dtype or len(shape) != 4 or strides[1] != 1:
        return None
    alone = run.geometry.groups == len(run.weight) and not to_residual and run.branch is None
    if run.weight.shape[2:] != (1, 1) and not alone:  # before anything is copied
        return None
    grad = laid(g, True)
    a, _, residual = saved
    assert a is not None
    if alone and depthwise.suits(grad, run.weight, run.geometry, transposed=True):
        (stride, _), padding, *_ = run.geometry
        given = a, grad, run.weight, padding, stride, shape[2:], run.scale
        bounds = run.lower, run.upper, run.guided
        gx, s = depthwise.gradient(*given, *bounds, attribute, buffers=run.memory)
        return gx, None, s
    if not pointwise.suits(grad, run.weight, run.geometry, transposed=True):
        return None
    g1 = None
    if to_residual:
        fresh = grad is not g or _may_overwrite(run, g)
        g1 = grad if fresh else empty_channels_last(run.memory, g.shape)
    rules = run.lower, run.upper, run.guided, 2 if run.branch is not None else int(attribute)
    gx, s = pointwise.gradient(
        a, grad, run.weight, residual, run.scale, *rules, g1=g1, buffers=run.memory
    )
    return gx, g1, s


def _may_overwrite(run: _Run, g: Tensor) -> bool:
    """Whether nobody else reads a gradient that autograd has handed over."""
    assert run.matrix is not None
    return run.fresh and is_dense(g) and not run.matrix.waits_for(g)


def _forward(run: _Run, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
    z, parts = run.z, run.parts
    assert z is not None
    run.z = run.x = run.residual = run.parts = None
    run.size = list(z.shape[2:])
    if run.own is not None:
        own, run.own = run.own, None
        y = own(run.scale, run.shift, residual, run.lower, run.upper)
        if run.counted is not None:
            run.counts.append(ops.backend_for(y.device).count_nonzero(y))
        return y, None
    if parts is None:
        return _forward_part(run, z, residual, None)
    out: Tensor | None = None
    code: Tensor | None = None
    start = 0
    for part in parts:
        here = slice(start, start + len(part))
        start += len(part)
        other = None if residual is None else residual[here]
        target = None
        if run.pool is None:
            if out is None:
                out = run.whole(part, len(z))
            target = out[here]
        made, places = _forward_part(run, part, other, target)
        if run.pool is not None:
            assert places is not None
            if out is None or code is None:
                out, code = run.whole(made, len(z)), run.whole(places, len(z))
            out[here], code[here] = made, places
    assert out is not None
    return out, code


def _forward_part(
    run: _Run, z: Tensor, residual: Tensor | None, out: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """What a stage makes of a convolution's output, in its memory or into `out`; and codes of a pooling."""
    backend = ops.backend_for(z.device)
    count = run.counted is not None
    if run.pool is not None:
        kernel, stride, padding, ceil_mode = run.pool
        p, code, n = backend.affine_relu_max_pool(
            z, run.scale, run.shift, kernel, stride, padding, ceil_mode, run.lower, run.upper, count
        )
        run.counts.append(n)
        return p, code
    plain = run.scale is None and residual is None and not run.clamps
    if plain:
        return z, None
    given = z, run.scale, run.shift, residual, run.lower, run.upper, count
    if out is None and run.stage.owned:
        y, n = z, backend.affine_relu_(*given)
    else:
        y, n = backend.affine_relu(*given, out=out)
    run.counts.append(n)
    return y, None


def _backward(
    run: _Run,
    scale: Tensor | None,
    saved: tuple[Tensor | None, ...],
    g: Tensor,
    attribute: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for the convolution's output and for the residual, and the flow (N, C).

    Args:
        scale: of the batch norm, unless the convolution's weight takes it.
        saved: the output, codes of a pooling, and the residual, as far as they were kept.
    """
    a, code, residual = saved
    backend = ops.backend_for(g.device)
    fresh = _may_overwrite(run, g)
    bounds = run.lower, run.upper, run.guided and run.clamps
    if run.pool is not None:
        kernel, stride, padding, _ = run.pool
        gz, s = backend.affine_relu_max_pool_backward(
            a, code, g, scale, run.size, kernel, stride, padding, *bounds, attribute
        )
        return gz, g, s
    one = scale is None and run.branch is None and run.geometry is not None
    if run.clamps and run.stage.residual is not None and not one:
        what = 2 if run.branch is not None else int(attribute)
        if fresh:
            gz, s = backend.affine_add_relu_backward_(a, g, residual, scale, *bounds, what)
            return gz, g, s
        g1, gz, s = backend.affine_add_relu_backward(a, g, residual, scale, *bounds, what)
        return gz, g1, s
    if run.clamps:
        if fresh:
            return g, g, backend.affine_relu_backward_(a, g, scale, *bounds, attribute)
        gz, s = backend.affine_relu_backward(a, g, scale, *bounds, attribute)
        return gz, gz, s
    if scale is None:
        return g, g, g
    if fresh and run.stage.residual is None:
        backend.affine_relu_(g, scale, None, None, -INF, INF)
        return g, g, g
    gz, _ = backend.affine_relu(g, scale, None, None, -INF, INF)
    return gz, g, g


def _later(convolve: Callable[[Tensor], Tensor], x: Tensor, step: int) -> Iterator[Tensor]:
    """What a convolution makes of the samples after the first `step`, when it is asked for."""
    version = x._version
    for part in torch.split(x[step:], step):
        if x._version != version:
            raise PlanMismatchError("the input of a convolution is written to before its output is read")
        yield convolve(part)


def _own_kernel(
    x: Tensor, weight: Tensor, geometry: Geometry, size: torch.Size | None = None
) -> Callable[..., Tensor] | None:
    """What convolves in a kernel of our own, and does what follows; None leaves it to the library.

    Args:
        size: rows and columns of what the convolution read, if x is a gradient for what it made.
    """
    transposed = size is not None
    if winograd.suits(x, weight, geometry, transposed=transposed):
        return winograd.convolve
    if pointwise.suits(x, weight, geometry, transposed=transposed):
        return pointwise.convolve
    if depthwise.suits(x, weight, geometry, transposed=transposed):
        return functools.partial(depthwise.convolve, stride=geometry.stride[0], size=size)
    return None


def _whole(
    convolve: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: list[int],
    buffers: Buffers | None,
) -> Callable[..., Tensor]:
    """What makes a stage's output from its convolution's input, when it is asked for."""
    version = x._version

    def make(
        scale: Tensor | None, shift: Tensor | None, residual: Tensor | None, lower: float, upper: float
    ) -> Tensor:
        if x._version != version:
            raise PlanMismatchError("the input of a convolution is written to before its output is read")
        if bias is not None:
            first = bias if scale is None else bias * scale
            shift = first if shift is None else first + shift
        with torch.no_grad():
            return convolve(
                x,
                weight,
                padding,
                scale=scale,
                shift=shift,
                residual=residual,
                lower=lower,
                upper=upper,
                buffers=buffers,
            )

    return make


def _input_gradient(run: _Run, gz: Tensor, scale: Tensor | None, out: Tensor | None = None) -> Tensor:
    """The gradient for what a stage's convolution read, into `out` if it is given."""
    assert run.x_like is not None
    assert run.geometry is not None
    assert run.weight is not None
    shape, strides, _ = run.x_like
    weight = run.weight
    if scale is not None:
        weight = (weight * scale.view(-1, *[1] * (weight.dim() - 1))).to(weight.dtype)
    if strides[1] == 1 and (out is None or channels_lie_together(out)):
        # Maps of one position, as a pooling's gradient may be, lie in either layout: a copy costs little.
        g = laid(gz, True) if len(shape) == 4 else gz
        convolve = _own_kernel(g, weight, run.geometry, torch.Size(shape[2:]))
        if convolve is not None:
            padding = run.geometry.padding
            return convolve(g, weight, padding, transposed=True, out=out, buffers=run.memory)
    gx = input_gradient(gz, weight, torch.Size((len(gz), *shape[1:])), strides, run.geometry)
    return gx if out is None else out.copy_(gx)


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
        self.running: dict[int, _Run] = {}  # stages under way, by the value they have reached
        self.counted: Counted | None = None  # for the call that comes next
        self.turned: set[int] = set()  # values that lie channels-last where the model would not

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
        run = self.running.get(value) if value is not None else None
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

    def _turn(self, run: _Run, value: int | None, x: Tensor, weight: Tensor) -> Tensor:
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
        first = index == next(iter(stage.roles))
        if first:
            run = _Run(stage, self.guided, stage.output in self.plan.fresh)
            run.matrix = self.matrix
        else:
            key = next((v for v in inputs if v in self.running), None)
            if key is None or self.running[key].stage is not stage:
                raise PlanMismatchError(f"call {index}, {name}, does not go on with its stage")
            run = self.running.pop(key)
        if role == "conv":
            self._convolve(run, index, func, name, args, kwargs)
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
        run: _Run,
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
        x = self._turn(run, value, self._into(index, x), weight)
        weight = self._lowered(weight)
        geometry = Geometry(
            each(stride, spatial),
            [0] * spatial if isinstance(padding, str) else each(padding, spatial),
            each(dilation, spatial),
            int(groups),
        )
        run.weight, run.geometry, run.memory = weight, geometry, self.buffers
        strides = x.stride() if is_dense(x) else torch.empty(x.shape, device="meta").stride()
        run.x_like = x.shape, strides, x.dtype
        own = None
        if not isinstance(padding, str) and (bias is None or bias.dtype == x.dtype):
            own = _own_kernel(x, weight, geometry)
        if own is not None and "pool" not in run.stage.roles.values():
            run.own = _whole(own, x, weight, bias, geometry.padding, self.buffers)
            made = size_made(x.shape[2:], weight.shape[2:], geometry.padding, geometry.stride)
            shape = x.shape[0], weight.shape[0], *made
            run.x, run.z = x, x.new_empty_strided(shape, (0,) * len(shape))
            return

        def convolve(part: Tensor) -> Tensor:
            with torch.no_grad():
                if own is not None:
                    return own(part, weight, geometry.padding, shift=bias, buffers=self.buffers)
                if left_behind(part, weight, geometry):
                    return library_pointwise(part, weight, bias)
                z: Tensor = func(part, weight, bias, stride, padding, dilation, groups)
                return z

        shape = self.plan.shapes[self.plan.calls[index].outputs[0]]
        step = len(x)
        if self.buffers is not None and x.dim() == spatial + 2 and index != run.stage.last:
            run.buffers = self.buffers
            step = run.samples_at_once(math.prod(shape[1:]) * x.element_size(), len(x))
        z = convolve(x if step == len(x) else x[:step])
        if step < len(x):
            run.parts = itertools.chain([z], _later(convolve, x, step))
            z = z.new_empty(()).expand(len(x), *z.shape[1:])
        run.weight = weight.to(z.dtype)
        run.x, run.z = x, z

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

    def _start(self, run: _Run, index: int, x: Tensor) -> None:
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

    def _finish(self, run: _Run) -> Tensor:
        value, x, residual = run.stage.output, run.x, run.residual
        assert x is not None
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
        positions = run.z.shape[2:].numel()
        needed = x.requires_grad or (residual is not None and residual.requires_grad)
        if needed or run.through is not None or run.branch is not None:
            out = _Fused.apply(x, residual, self.anchor, run)
            assert isinstance(out, torch.Tensor)
        else:
            with torch.no_grad():
                out, _ = _forward(run, residual)
        if run.counted is not None:
            run.counted(torch.cat(run.counts), positions)
        run.counts.clear()
        return self._left_turned(out, value) if run.turned else out
