"""Which values of a pass may lie channels-last in memory, though the model lays them contiguously.

The kernels for convolutions work channels-last, and nobody sees how a value lies that is read by nothing but
convolutions, element-wise functions and poolings. Must not know what is done with them.
"""

from __future__ import annotations

import torch

from attrfast._backend import backend_for
from attrfast.stages import Stage, Uses
from attrfast.trace import Call, Trace

# What gives the same values for either layout, in new memory or in that of its input.
_BLIND = frozenset(
    """
    conv2d conv_transpose2d batch_norm relu relu6 hardtanh leaky_relu elu selu celu gelu silu mish sigmoid
    hardsigmoid hardswish softplus tanh clamp clamp_min clamp_max threshold prelu add sub mul div neg exp
    sqrt rsqrt pow abs square clone cat concat concatenate flatten mean amax dropout dropout2d
    max_pool2d avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d interpolate pad
    """.split()
)
# What returns its input, or a part of it, where there is nothing to do.
_MAY_RETURN_ITS_INPUT = frozenset("dropout dropout2d pad interpolate".split())


def free_to_turn(record: Trace, uses: Uses, stages: dict[int, Stage]) -> frozenset[int]:
    """Values with four dimensions of which nobody sees how they lie.

    Args:
        uses: of the record.
        stages: call index -> its stage.
    """
    free = {
        value
        for value, readers in uses.readers.items()
        if len(record.shapes[value]) == 4
        and value not in uses.results
        and all(call.index in stages or call.name in _BLIND for call in readers)
    }
    while True:  # a value that shares its memory with one that is seen is seen as well
        seen = {v for v in free if any(o not in free for c in uses.readers[v] for o in _shared(c, v))}
        if not seen:
            return frozenset(free)
        free -= seen


def _shared(call: Call, value: int) -> tuple[int, ...]:
    """What a call makes that may lie in the memory of `value`."""
    if call.overwrites == value or (call.name in _MAY_RETURN_ITS_INPUT and value in call.inputs[:1]):
        return call.outputs
    return ()


def pays(x: torch.Tensor) -> bool:
    """Whether convolutions of x are faster channels-last than as it lies."""
    return (
        x.dim() == 4
        and x.dtype == torch.float32
        and x.is_contiguous()
        and x.shape[2:].numel() > 1
        and backend_for(x.device).has_winograd
        and not torch.is_autocast_enabled(x.device.type)
    )


def turned(x: torch.Tensor) -> torch.Tensor:
    """x channels-last, for PyTorch too, which takes maps of one channel as contiguous while it can."""
    if x.shape[1] == 1:
        *_, rows, columns = x.shape
        return x.as_strided(x.shape, (rows * columns, 1, columns, 1))
    return x.contiguous(memory_format=torch.channels_last)
