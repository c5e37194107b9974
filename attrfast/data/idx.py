"""Reader of the IDX format, in which the MNIST family of image sets is published.

A file is two zero bytes, a type byte, the number of dimensions, each dimension as a big-endian
32-bit integer, and the values. Source: LeCun, Cortes and Burges, "The MNIST database of handwritten
digits".
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import Final

import torch

from attrfast.errors import InputError

_UNSIGNED_BYTE: Final = 0x08


def read_idx(path: Path) -> torch.Tensor:
    """Reads an IDX file of unsigned bytes, plain or compressed with gzip (told by its content).

    Returns:
        A uint8 tensor of the shape that the file gives.

    Raises:
        InputError: the file cannot be read, or is damaged or of another kind.
    """
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if len(content) < 4 or content[:3] != bytes([0, 0, _UNSIGNED_BYTE]):
        raise InputError(
            f"{path} is not an IDX file of unsigned bytes (it begins with {content[:4].hex(' ')!r})"
        )
    dimensions = content[3]
    start = 4 + 4 * dimensions
    if len(content) < start:
        raise InputError(f"{path} ends within its header; fetch it again")
    shape = struct.unpack(f">{dimensions}I", content[4:start])
    if len(content) - start != math.prod(shape):
        raise InputError(
            f"{path} holds {len(content) - start} values where its header says {math.prod(shape)}; "
            f"fetch it again"
        )
    if math.prod(shape) == 0:
        return torch.empty(shape, dtype=torch.uint8)
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=start).view(shape)
