"""Stages at work: each is one autograd function over kernels that work in place, with the attribution reduced
on the way back.

Must not know how a model is followed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from attrfast import depthwise, joined, ops, pointwise, winograd
from attrfast.buffers import Buffers, empty_channels_last
from attrfast.convolution import Geometry, input_gradient
from attrfast.following import PlanMismatchError
from attrfast.layouts import channels_lie_together, is_dense, laid, strides_laid
from attrfast.map_statistics import Counted
from attrfast.matrix import Columns, ScoreMatrix
from attrfast.shared_gradient import SharedGradient
from attrfast.stages import INF, Stage

Tensor = torch.Tensor

# On a CPU, large tensors of a stage are made so many bytes at a time: what a convolution writes is still in
# the cache when the kernel after it reads it.
PART = 4 << 20


class StageRun:
    """One stage of one batch, collected call by call until it runs.

    Attributes:
        x: what the stage reads first.
        joins: what the stage joins, where it reads no x.
        gradients: of each of these, what all stages that join it share; None where none is needed.
        head: a stage that joins, whose output this one alone reads: made a few samples at a time, not kept.
        z: the memory that it works on: the convolution's output, or x itself.
        own: makes the stage's output in one launch, given what `affine_relu` takes after z.
        turned: whether it works channels-last where the model would lay things contiguously.
        through, branch: where the flow through its output, and that through its own branch of the addition, is
            added, with its sign; None where it is not measured.
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
        self.joins: joined.Parts | None = None
        self.gradients: list[SharedGradient | None] = []
        self.parts: Iterator[Tensor] | None = None
        self.buffers: Buffers | None = None
        self.x_like: tuple[torch.Size, tuple[int, ...], torch.dtype] | None = None
        self.size: list[int] = []
        self.counted: Counted | None = None  # who wants to know what its ReLU leaves
        self.counts: list[Tensor] = []  # of each part, (N, C)
        self.own: Callable[..., Tensor] | None = None
        self.memory: Buffers | None = None
        self.head: StageRun | None = None
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

    def joined_at_once(self, parts: joined.Parts) -> int:
        """How many samples of the map that its head joins this stage takes at once, forward or back."""
        size = parts.shape[1:].numel() * parts.tensors[0].element_size()
        return max(1, self.samples_at_once(size, parts.samples))

    def whole(self, part: Tensor, samples: int) -> Tensor:
        """Memory for all samples, laid out like one part."""
        assert self.buffers is not None
        shape = samples, *part.shape[1:]
        strides = strides_laid(channels_lie_together(part), shape)
        return self.buffers.empty(shape, strides, part.dtype)

    def folds(self, g: Tensor) -> bool:
        """Whether the weight takes the batch norm's scale on the way back.

        Where the gradient has two ways to go, or no kernel runs over it, multiplying it would take a pass
        and memory of its own. A weight that is no larger is multiplied for less.
        """
        if self.weight is None or self.scale is None or self.pool is not None:
            return False
        apart = self.stage.residual is not None or not self.clamps
        return apart and self.branch is None and self.weight.numel() <= g.numel()


class StageFunction(torch.autograd.Function):
    """A stage: forward in place, backward with the attribution reduced on the way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, anchor: Tensor, run: StageRun) -> Tensor:
        out, code = run_forward(run, residual)
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
        run: StageRun = ctx.run
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


class JoinFunction(torch.autograd.Function):
    """A stage that joins maps, or one with such a head: it keeps the parts, and not what is made of them."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, run: StageRun, *parts: Tensor) -> Tensor:
        out, code = run_forward(run, None)
        kept = run.head is not None and (run.reduces or run.through is not None)
        ctx.save_for_backward(out if kept else None, code, *parts)
        ctx.run = run
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        run: StageRun = ctx.run
        (g,) = grads
        a, code, *parts = ctx.saved_tensors
        join = run.head or run
        assert run.matrix is not None
        into: list[Tensor | None] = []
        adds: list[bool] = []
        for part, gradient, needed in zip(parts, join.gradients, ctx.needs_input_grad[2:], strict=True):
            memory, holds = None, False
            if needed and gradient is not None:
                memory, holds = gradient.memory(functools.partial(joined.empty_like, part, join.memory))
            into.append(memory)
            adds.append(holds)
        to_parts = join.through is not None or any(memory is not None for memory in into)
        through = run.through if run.head is not None else None
        if through is not None and not (run.reduces and to_parts):
            run.matrix.add(through[0], a, g, 1, through[1])
            through = None
        if to_parts:
            saved, maps = (a, code, None), joined.Parts(parts)
            flows, joint = _joined_gradients(run, saved, maps, g, through is not None, into, adds)
            for place, s in ((through, flows), (join.through, joint)):
                if place is not None:
                    run.matrix.add_sums(place[0], s, place[1])
        return None, None, *(None if h else m for m, h in zip(into, adds, strict=True))


def _joined_gradients(
    run: StageRun,
    saved: tuple[Tensor | None, ...],
    parts: joined.Parts,
    g: Tensor,
    attribute: bool,
    into: list[Tensor | None],
    adds: list[bool],
) -> tuple[Tensor, Tensor]:
    """Fills gradients of parts, or adds to them; the flow through the stage's output, and the joined map's.

    Args:
        saved, attribute: as of `_gradients`, which is asked where the stage has a head.
        into, adds: see `attrfast.joined.gradient`.
    """
    join = run.head or run
    assert join.scale is not None
    assert join.shift is not None
    rules = join.lower, join.upper, join.guided, join.through is not None
    step = max(1, len(g)) if run.head is None else run.joined_at_once(parts)
    flows, joint = [], []
    for start in range(0, max(1, len(g)), step):
        here = slice(start, start + step)
        gy = g[here]
        if run.head is not None:
            mine = tuple(None if x is None else x[here] for x in saved)
            made, _, s = _gradients(run, mine, gy, attribute, True, False, _passing(run, len(gy)))
            assert made is not None
            gy = made
            flows.append(s)
        given = gy, join.scale, join.shift, *rules, into, adds
        joint.append(joined.gradient(parts, *given, first=start))
    return (torch.cat(flows) if attribute else g), torch.cat(joint)


def _passing(run: StageRun, samples: int) -> Tensor:
    """Memory for the gradient of so many samples of the map that a head joins, until the next such."""
    assert run.buffers is not None
    assert run.x_like is not None
    shape, _, dtype = run.x_like
    shape = torch.Size((samples, *shape[1:]))
    return run.buffers.piece(shape, strides_laid(True, shape), dtype)


def _gradients(
    run: StageRun,
    saved: tuple[Tensor | None, ...],
    g: Tensor,
    attribute: bool,
    to_x: bool,
    to_residual: bool,
    out: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Gradients for x and for the residual where they are wanted, and the flow (N, C).

    Args:
        out: dense memory for the gradient for x, where the stage has a convolution; None makes new memory.
    """
    scale, folded = run.scale, None
    if to_x and run.folds(g):
        scale, folded = None, run.scale
    if not to_x or run.geometry is None:
        gz, g1, s = _backward(run, scale, saved, g, attribute)
        return (gz if to_x else None), (g1 if to_residual else None), s
    in_one = _in_one_launch(run, saved, g, attribute, to_residual, out)
    if in_one is not None:
        return in_one
    assert run.x_like is not None
    shape, strides, dtype = run.x_like
    step = run.samples_at_once(math.prod(shape[1:]) * g.element_size(), len(g))
    if step == len(g):
        gz, g1, s = _backward(run, scale, saved, g, attribute)
        gx = _input_gradient(run, gz, folded, out).to(dtype)
        return gx, (g1 if to_residual else None), s
    assert run.buffers is not None
    gx = run.buffers.empty(shape, strides, dtype) if out is None else out
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
    run: StageRun,
    saved: tuple[Tensor | None, ...],
    g: Tensor,
    attribute: bool,
    to_residual: bool,
    out: Tensor | None,
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
        gx, s = depthwise.gradient(*given, *bounds, attribute, out=out, buffers=run.memory)
        return gx, None, s
    if not pointwise.suits(grad, run.weight, run.geometry, transposed=True):
        return None
    g1 = None
    if to_residual:
        fresh = grad is not g or _may_overwrite(run, g)
        g1 = grad if fresh else empty_channels_last(run.memory, g.shape, g.dtype)
    rules = run.lower, run.upper, run.guided, 2 if run.branch is not None else int(attribute)
    gx, s = pointwise.gradient(
        a, grad, run.weight, residual, run.scale, *rules, g1=g1, out=out, buffers=run.memory
    )
    return gx, g1, s


def _may_overwrite(run: StageRun, g: Tensor) -> bool:
    """Whether nobody else reads a gradient that autograd has handed over."""
    assert run.matrix is not None
    return run.fresh and is_dense(g) and not run.matrix.waits_for(g)


def run_forward(run: StageRun, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
    z, parts = run.z, run.parts
    assert z is not None
    run.z = run.x = run.residual = run.parts = None
    (run.head or run).joins = None
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
    run: StageRun, z: Tensor, residual: Tensor | None, out: Tensor | None
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
    run: StageRun,
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


def own_kernel(
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


def whole_convolution(
    convolve: Callable[..., Tensor],
    pieces: Callable[[], Iterator[Tensor]],
    shape: Sequence[int],
    weight: Tensor,
    bias: Tensor | None,
    padding: list[int],
    buffers: Buffers | None,
) -> Callable[..., Tensor]:
    """What makes a stage's output from its convolution's input, when it is asked for.

    Args:
        pieces: gives the input, so many samples at a time.
        shape: of the output.
        bias: in the compute dtype.
    """

    def make(
        scale: Tensor | None, shift: Tensor | None, residual: Tensor | None, lower: float, upper: float
    ) -> Tensor:
        if bias is not None:
            first = bias if scale is None else bias * scale
            shift = first if shift is None else first + shift
        out = empty_channels_last(buffers, shape, weight.dtype)
        start = 0
        for x in pieces():
            here = slice(start, start + len(x))
            start += len(x)
            with torch.no_grad():
                convolve(
                    x,
                    weight,
                    padding,
                    scale=scale,
                    shift=shift,
                    residual=None if residual is None else residual[here],
                    lower=lower,
                    upper=upper,
                    out=out[here],
                    buffers=buffers,
                )
        return out

    return make


def pieces_of(x: Tensor, step: int) -> Callable[[], Iterator[Tensor]]:
    """Gives x, so many samples at a time, as it is now."""
    version = x._version

    def give() -> Iterator[Tensor]:
        for piece in (x,) if step >= len(x) else torch.split(x, step):
            if x._version != version:
                raise PlanMismatchError(
                    "the input of a convolution is written to before its output is read"
                )
            yield piece

    return give


def pieces_of_joined(join: StageRun, step: int, passing: bool) -> Callable[[], Iterator[Tensor]]:
    """Gives what a stage makes of the maps that it joins, so many samples at a time.

    Args:
        passing: whether each piece is done with before the next one comes.
    """
    parts = join.joins
    assert parts is not None
    versions = [part._version for part in parts.tensors]

    def give() -> Iterator[Tensor]:
        assert join.scale is not None
        assert join.shift is not None
        rules = join.scale, join.shift, join.lower, join.upper
        for start in range(0, max(1, parts.samples), step):
            if [part._version for part in parts.tensors] != versions:
                raise PlanMismatchError(
                    "maps that are joined are written to before the joined map is read"
                )
            with torch.no_grad():
                made = joined.forward(
                    parts, *rules, first=start, samples=step, passing=passing, buffers=join.memory
                )
            yield made

    return give


def whole_join(join: StageRun) -> Callable[..., Tensor]:
    """What makes the output of a stage that joins maps, when it is asked for."""
    parts = join.joins
    assert parts is not None
    pieces = pieces_of_joined(join, max(1, parts.samples), False)

    def make(scale: Tensor | None, *_: object) -> Tensor:
        if scale is None:  # asked for before the batch norm
            return torch.cat(parts.tensors, 1).detach()
        (made,) = pieces()
        return made

    return make


def _input_gradient(
    run: StageRun, gz: Tensor, scale: Tensor | None, out: Tensor | None = None
) -> Tensor:
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
        convolve = own_kernel(g, weight, run.geometry, torch.Size(shape[2:]))
        if convolve is not None:
            padding = run.geometry.padding
            return convolve(g, weight, padding, transposed=True, out=out, buffers=run.memory)
    gx = input_gradient(gz, weight, torch.Size((len(gz), *shape[1:])), strides, run.geometry)
    return gx if out is None else out.copy_(gx)
