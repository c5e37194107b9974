"""The backend of last resort: the definitions in `attrfast.reference`, on any device."""

from __future__ import annotations

from typing import Any

import torch

from attrfast import reference

Tensor = torch.Tensor


class ReferenceBackend:
    """The ops by their definitions; the in-place forms copy the result back."""

    name = "reference"
    has_winograd = False
    has_pointwise = False
    has_depthwise = False
    has_joined = False
    affine_relu_backward = staticmethod(reference.affine_relu_backward)
    affine_add_relu_backward = staticmethod(reference.affine_add_relu_backward)
    affine_relu_max_pool = staticmethod(reference.affine_relu_max_pool)
    affine_relu_max_pool_backward = staticmethod(reference.affine_relu_max_pool_backward)
    attribution = staticmethod(reference.attribution)
    count_nonzero = staticmethod(reference.count_nonzero)
    segment_normalize = staticmethod(reference.segment_normalize)

    def check_device(self, kind: str) -> None:
        """Every device can be worked on."""

    def affine_relu(self, z: Tensor, *args: Any, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, n = reference.affine_relu(z, *args)
        return (y if out is None else out.copy_(y)), n

    def affine_relu_(self, z: Tensor, *args: Any) -> Tensor:
        y, n = reference.affine_relu(z, *args)
        z.copy_(y)
        return n

    def affine_relu_backward_(self, a: Tensor, g: Tensor, *args: Any) -> Tensor:
        gz, s = reference.affine_relu_backward(a, g, *args)
        g.copy_(gz)
        return s

    def affine_add_relu_backward_(self, a: Tensor, g: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        g1, gz, s = reference.affine_add_relu_backward(a, g, *args)
        g.copy_(g1)
        return gz, s
