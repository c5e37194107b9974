"""The CUDA backend on the emulated GPU: the same Python code and kernels, on CPU tensors."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from attrfast.cuda import CudaBackend

Tensor = torch.Tensor


class _Watch(TorchFunctionMode):
    """Allows the kernels every tensor that the call was given or made, and nothing beside them."""

    def __init__(self, module: ModuleType) -> None:
        super().__init__()
        self.module = module

    def allow(self, x: Tensor, writes: bool) -> None:
        if x.numel():
            last = sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
            self.module.allow(x.data_ptr(), (last + 1) * x.element_size(), writes)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.empty:
            self.allow(result, True)
        if func is Tensor.contiguous and result is not args[0]:
            self.allow(result, True)
        return result


class EmulatedBackend:
    """`CudaBackend` on CPU tensors, every access of its kernels watched."""

    name = "cuda on the CPU"

    def __init__(self, module: ModuleType) -> None:
        self.module = module
        self._backend = CudaBackend(module, lambda x: (0, 0))

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._backend, name)
        written = {"affine_relu_": "z"}.get(name, "g") if name.endswith("_") else None

        def call(**args: Any) -> Any:
            self.module.forget()
            with _Watch(self.module) as watch:
                for key, x in args.items():
                    for tensor in _tensors(x):
                        watch.allow(tensor, key == written)
                return method(**args)

        return call


def _tensors(x: Any) -> list[Tensor]:
    if isinstance(x, Tensor):
        return [x]
    return [t for item in x for t in _tensors(item)] if isinstance(x, list | tuple) else []
