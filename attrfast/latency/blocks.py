"""Finds which widths a device likes, from what it took at widths of all sorts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from attrfast.latency.law import Law, Sample, alignment

_BLOCKS = (1, 2, 4, 8, 16, 32)
_FEW = 4  # samples, from which no law can be told
_AS_WELL = 1.1  # times the least error, at most
_LIKED = 1.05  # a width is liked if it costs at most so many times what the best do, for its number


def liked_block(samples: Mapping[str, Sequence[Sample]], counts: Mapping[str, int]) -> int:
    """The smallest block of channels such that whole blocks, and those twice as large, cost no extra.

    Every layer gets a smooth law from its widths that are multiples of 16, which all devices like well
    enough. Widths whose largest power of two is smaller are then compared with it, all layers together. Where
    the machine was busy, that may find any block: it has to foretell what was measured at other widths about
    as well as the block that does so best, which is taken otherwise.

    Args:
        samples: of convolutions and linear layers, by key.
        counts: how many calls of a pass have the key.

    Returns:
        The block; 1 where nothing tells (all layers are small).
    """
    liked = _costs_no_extra(samples, counts)
    errors = {
        block: sum(
            counts[key] * Law(rows, block, product=True).error_elsewhere()
            for key, rows in samples.items()
        )
        for block in _BLOCKS
    }
    best = min(_BLOCKS, key=lambda block: errors[block])
    return liked if errors[liked] <= _AS_WELL * errors[best] else best


def _costs_no_extra(samples: Mapping[str, Sequence[Sample]], counts: Mapping[str, int]) -> int:
    took, expected = (dict.fromkeys(_BLOCKS, 0.0) for _ in range(2))
    for key, rows in samples.items():
        aligned = [(s, alignment(s.inputs, s.outputs)) for s in rows]
        good = [s for s, block in aligned if block >= 16]
        if len(good) < _FEW:
            continue
        smooth = Law(good, 1, product=True)
        for s, block in aligned:
            if s.outputs >= 16 and (
                s.inputs == 1 or s.inputs >= 16
            ):  # within one block all cost the same
                took[block] += counts[key] * s.median
                expected[block] += counts[key] * smooth.law(s.inputs, s.outputs)
    ratios = {block: took[block] / expected[block] for block in _BLOCKS if expected[block] > 0}
    liked = 1
    if ratios:
        liked = max(ratios)
        for block in sorted(ratios, reverse=True):
            if ratios[block] > _LIKED * min(ratios.values()):
                break
            liked = block
    return liked
