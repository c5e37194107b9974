"""attrfast's CPU kernels, each beside what it replaces in PyTorch and beside a copy of the same bytes.

A copy moves as many bytes as the kernel must at least: every input read once, every output written once.
In-place kernels work on the same memory again and again, which changes none of their cost. Ops that make
new tensors get new pages from the operating system in every call, as with glibc every tensor above 32 MB
does: what they cost then is largely that.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks import fresh, machine, timing
from benchmarks.networks import FORMATS
from benchmarks.quiet import Clock

SHAPE = (16, 64, 112, 112)
OURS, COPY = "attrfast", "copy of the same bytes"
RELU_BACKWARD = "ReLU backward with attribution, in place"
THRESHOLD, THRESHOLD_THEN_SUM = "threshold_backward", "threshold_backward, (a*g).sum"
INF = float("inf")

_M_MMAP_THRESHOLD = -3  # of malloc.h

aten = torch.ops.aten


@dataclass(frozen=True)
class Case:
    """One kernel and what it is compared with.

    Attributes:
        op: what it does.
        bytes: that it must move at least.
        ours: one launch.
        peers: the same by PyTorch's eager ops, or a part of it, by name.
        definition: the same by the function that defines the op, of `attrfast.reference`, and its arguments.
    """

    op: str
    bytes: int
    ours: Callable[[], object]
    peers: dict[str, Callable[[], object]]
    definition: tuple[Callable[..., object], tuple[Any, ...]]


def cases(
    layout: str,
    shape: tuple[int, int, int, int] = SHAPE,
    *,
    backend: Any = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> list[Case]:
    """The kernels on tensors of one shape and memory format.

    Args:
        backend: whose kernels; None takes those that attrfast would choose.
    """
    from attrfast import ops, reference

    backend = backend or ops.backend_for(torch.device(device))
    torch.manual_seed(0)

    def new(*size: int) -> torch.Tensor:
        return torch.randn(size, device=device).to(dtype, memory_format=FORMATS[layout])

    def vector(value: float) -> torch.Tensor:
        return torch.full((channels,), value, device=device)

    channels = shape[1]
    z, residual = new(*shape), new(*shape)
    a, g = new(*shape).relu_(), new(*shape)
    # In place again and again: below one, so that values neither grow nor vanish.
    scale, shift = vector(0.5), vector(0.1)
    mean, var = vector(0.0), vector(4.0)
    whole = z.nbytes
    given = torch.empty_like(g)

    def norm() -> torch.Tensor:
        return nn.functional.batch_norm(z, mean, var, None, shift, False, 0.0, 0.0)

    def multiply(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x * y).sum((2, 3))

    affine = Case(
        "BN and ReLU, in place",
        2 * whole,
        lambda: backend.affine_relu_(z, scale, shift, None, 0.0, INF),
        {"batch_norm, relu_": lambda: norm().relu_(), "relu_ alone": z.clone().relu_},
        (reference.affine_relu, (z, scale, shift, None, 0.0, INF)),
    )
    addition = Case(
        "BN, addition and ReLU, in place",
        3 * whole,
        lambda: backend.affine_relu_(z, scale, shift, residual, 0.0, INF),
        {"batch_norm, add_, relu_": lambda: norm().add_(residual).relu_()},
        (reference.affine_relu, (z, scale, shift, residual, 0.0, INF)),
    )
    affine_new = Case(
        "BN and ReLU, into new memory",
        2 * whole,
        lambda: backend.affine_relu(z, scale, shift, None, 0.0, INF),
        {"batch_norm, relu_": lambda: norm().relu_()},
        affine.definition,
    )
    backward = Case(
        RELU_BACKWARD,
        3 * whole,
        lambda: backend.affine_relu_backward_(a, g, None, 0.0, INF, False, True),
        {
            THRESHOLD: lambda: aten.threshold_backward(g, a, 0),
            "threshold_backward into given memory": lambda: aten.threshold_backward.grad_input(
                g, a, 0, grad_input=given
            ),
            THRESHOLD_THEN_SUM: lambda: (aten.threshold_backward(g, a, 0), multiply(a, g)),
        },
        (reference.affine_relu_backward, (a, g, None, 0.0, INF, False, True)),
    )
    backward_new = Case(
        "the same into new memory",
        3 * whole,
        lambda: backend.affine_relu_backward(a, g, None, 0.0, INF, False, True),
        {THRESHOLD_THEN_SUM: lambda: (aten.threshold_backward(g, a, 0), multiply(a, g))},
        backward.definition,
    )
    branches = Case(
        "backward of BN, addition and ReLU, with attribution",
        4 * whole,
        lambda: backend.affine_add_relu_backward_(a, g, None, scale, 0.0, INF, False, 1),
        {
            "threshold_backward, (a*g).sum, mul": lambda: (
                aten.threshold_backward(g, a, 0) * scale[:, None, None],
                multiply(a, g),
            )
        },
        (reference.affine_add_relu_backward, (a, g, None, scale, 0.0, INF, False, 1)),
    )
    branches_new = Case(
        "the same branches into new memory",
        5 * whole,
        lambda: backend.affine_add_relu_backward(a, g, None, scale, 0.0, INF, False, 1),
        branches.peers,
        branches.definition,
    )
    count = Case(
        "positions that are not zero",
        whole,
        lambda: backend.count_nonzero(a),
        {"(a != 0).sum": lambda: (a != 0).sum((2, 3)), "count_nonzero": lambda: a.count_nonzero((2, 3))},
        (reference.count_nonzero, (a,)),
    )
    alone = Case(
        "attribution alone",
        2 * whole,
        lambda: backend.attribution(z, g, False),
        {
            "(x*g).sum": lambda: multiply(z, g),
            "einsum": lambda: torch.einsum("nchw,nchw->nc", z, g),
        },
        (reference.attribution, (z, g, False)),
    )
    found = [affine, affine_new, addition, backward, backward_new, branches, branches_new, alone, count]
    if layout == "contiguous":  # it has none
        found.append(_normalize(backend, channels, device, dtype))
    if layout == "channels_last" and dtype == torch.float32 and backend.has_winograd:
        found.append(_winograd(backend, z, scale, shift))
    for title, k, s, pad in (("2×2", 2, 2, 0), ("3×3 step 2", 3, 2, 1)):
        found += _pools(backend, title, [k, k], [s, s], [pad, pad], z, a, new, norm, scale, shift)
    return found


def _normalize(backend: Any, channels: int, device: str, dtype: torch.dtype) -> Case:
    """Scores of a hundred layers, each divided by its norm."""
    from attrfast import reference

    theta = torch.rand(100 * channels, device=device, dtype=dtype)
    offsets = channels * torch.arange(101, device=device)
    layers = torch.arange(100, device=device).repeat_interleave(channels)

    def eager() -> torch.Tensor:
        squares = theta.new_zeros(100).index_add_(0, layers, theta.square())
        return theta / squares.sqrt_()[layers]

    return Case(
        "scores divided by their layers' norms",
        2 * theta.nbytes,
        lambda: backend.segment_normalize(theta, offsets, "l2"),
        {
            "index_add_, divided": eager,
            "norm, layer by layer": lambda: torch.cat(
                [one / one.norm() for one in theta.split(channels)]
            ),
        },
        (reference.segment_normalize, (theta, offsets, "l2")),
    )


def _winograd(backend: Any, z: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> Case:
    """A 3x3 convolution with the batch norm and the ReLU after it."""
    channels = z.shape[1]
    weight = torch.randn(channels, channels, 3, 3, device=z.device) / (9 * channels) ** 0.5
    out = torch.empty_like(z)
    scratch = torch.empty(backend.winograd_floats(z, channels, [1, 1]), device=z.device)

    def eager(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        made = nn.functional.conv2d(x, w, padding=1)
        return made.mul_(scale[:, None, None]).add_(shift[:, None, None]).relu_()

    return Case(
        "3×3 convolution, BN and ReLU",
        2 * z.nbytes + weight.nbytes,
        lambda: backend.winograd(z, weight, [1, 1], False, scale, shift, None, 0.0, INF, out, scratch),
        {
            "conv2d, batch_norm, relu_": lambda: eager(z, weight),
            "conv2d alone": lambda: nn.functional.conv2d(z, weight, padding=1),
        },
        (eager, (z, weight)),
    )


def _pools(
    backend: Any,
    title: str,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    z: torch.Tensor,
    a: torch.Tensor,
    new: Callable[..., torch.Tensor],
    norm: Callable[[], torch.Tensor],
    scale: torch.Tensor,
    shift: torch.Tensor,
) -> list[Case]:
    """BN, ReLU and max-pooling as one, forward and backward."""
    from attrfast import reference

    args = (kernel, stride, padding)
    p, code, _ = backend.affine_relu_max_pool(z, scale, shift, *args, False, 0.0, INF)
    g = new(*p.shape)
    _, indices = aten.max_pool2d_with_indices(a, *args)
    size = list(z.shape[2:])

    def eager() -> object:
        whole = aten.max_pool2d_with_indices_backward(g, a, *args, [1, 1], False, indices)
        return aten.threshold_backward(whole, a, 0), (p * g).sum((2, 3))

    return [
        Case(
            f"BN, ReLU and max-pool {title}",
            z.nbytes + p.nbytes + code.nbytes,
            lambda: backend.affine_relu_max_pool(z, scale, shift, *args, False, 0.0, INF),
            {
                "batch_norm, relu_, max_pool2d": lambda: aten.max_pool2d_with_indices(
                    norm().relu_(), *args
                )
            },
            (reference.affine_relu_max_pool, (z, scale, shift, *args, False, 0.0, INF)),
        ),
        Case(
            f"backward of ReLU and max-pool {title}, with attribution",
            z.nbytes + 2 * p.nbytes + code.nbytes,
            lambda: backend.affine_relu_max_pool_backward(
                p, code, g, None, size, *args, 0.0, INF, False, True
            ),
            {"max_pool2d backward, threshold_backward, (p*g).sum": eager},
            (
                reference.affine_relu_max_pool_backward,
                (p, code, g, None, size, *args, 0.0, INF, False, True),
            ),
        ),
    ]


def copy_of(count: int, device: str = "cpu") -> Callable[[], object]:
    """Copies half of `count` bytes: half read, half written."""
    source = torch.zeros(count // 8, device=device)
    target = torch.empty_like(source).fill_(1.0)
    return lambda: target.copy_(source)


def measure_alone(**options: Any) -> dict[str, Any]:
    """`measure` in a fresh process in which every new tensor gets new pages."""
    return dict(fresh.call(_with_new_pages, **options))


def _with_new_pages(**options: Any) -> dict[str, Any]:
    # Otherwise the allocator does so for some calls and not for others, by what was freed before.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 20)
    return measure(**options)


@torch.no_grad()
def measure(
    *,
    rounds: int,
    patience: float,
    shape: tuple[int, int, int, int] = SHAPE,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Seconds of every kernel, its peers and the copy, in both memory formats."""
    torch.set_num_threads(machine.THREADS)
    about = machine.facts()
    clock = Clock(patience)
    rows = []
    for layout in FORMATS:
        say(f"kernels, {layout}")
        for case in cases(layout, shape):
            runs = {OURS: case.ours, COPY: copy_of(case.bytes), **case.peers}
            times = _time(runs, rounds, clock)
            rows.append(
                {
                    "op": case.op,
                    "format": layout,
                    "bytes": case.bytes,
                    "seconds": {name: found.median for name, found in times.items()},
                    "ratios": {
                        name: timing.ratio(times[OURS], times[name])[0] for name in (COPY, *case.peers)
                    },
                    "disturbed": times[OURS].disturbed,
                }
            )
    return {
        "machine": about,
        "shape": list(shape),
        "rounds": rounds,
        "disturbed": [f"{row['op']} ({row['format']})" for row in rows if row["disturbed"]],
        "cases": rows,
        "targets": _targets(rows),
    }


def _time(runs: timing.Runs, rounds: int, clock: Clock) -> dict[str, timing.Times]:
    """Like `timing.interleaved`, but a round as a whole is repeated when others disturb it."""
    times = {name: timing.Times() for name in runs}
    latest: dict[str, float] = {}

    def once() -> None:
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            latest[name] = time.perf_counter() - start

    once()
    for _ in range(rounds):
        _, others = clock.time(once, lambda: None)
        for name, taken in latest.items():
            times[name].add(taken, others)
    return times


def _targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of the fused ReLU backward: attrfast's time must not be above `limit` times the peer's."""
    out = []
    for row in rows:
        if row["op"] != RELU_BACKWARD:
            continue
        for against, limit in ((THRESHOLD, 0.6), (THRESHOLD_THEN_SUM, 0.25)):
            found = row["ratios"][against]
            verdict = "held" if found <= limit else "missed"
            verdict = "disturbed" if row["disturbed"] else verdict
            out.append(
                {
                    "quantity": f"time, {row['format']}",
                    "against": against,
                    "limit": limit,
                    "ratio": found,
                    "verdict": verdict,
                }
            )
    return out
