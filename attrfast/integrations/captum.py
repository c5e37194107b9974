"""Captum's layer and neuron gradients, with its signatures and its numbers, for many layers in one pass.

Weights take no part in the backward pass, convolutions and batch norms keep nothing for it, and a layer's
tensor is copied only where the model is about to overwrite it. Where a layer begins and ends is seen by hooks
that PyTorch keeps outside of modules; nothing is set on the model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from attrfast import ops
from attrfast.errors import InputError, NoGradientError
from attrfast.matrix import ScoreMatrix
from attrfast.taps import TapMode
from attrfast.trace import is_inplace, tensors_in, written_to

Target = int | tuple[int, ...] | torch.Tensor | list[int] | list[tuple[int, ...]] | None
Selector = int | tuple[int | slice, ...] | Callable[[Any], torch.Tensor]


class _OfLayers:
    """What the methods share.

    Args:
        forward_func: the model, or a function that calls it.
        layer: a module, or a list of them.
    """

    def __init__(self, forward_func: Callable[..., Any], layer: nn.Module | Sequence[nn.Module]) -> None:
        self.forward_func, self.layer = forward_func, layer
        self.single = isinstance(layer, nn.Module)
        self.layers = [layer] if isinstance(layer, nn.Module) else list(layer)
        for one in self.layers:
            if not isinstance(one, nn.Module):
                raise InputError(f"layer must be a module or a list of modules, got {one!r}")

    @contextlib.contextmanager
    def _watched(
        self, see: Callable[[nn.Module, Any], Any], at_input: bool, mode: TapMode
    ) -> Iterator[None]:
        """While the model runs, `see(layer, its output or inputs)` gives what stands in their place."""
        chosen = set(self.layers)

        def before(module: nn.Module, args: Any) -> Any:
            return see(module, args) if module in chosen else None

        def after(module: nn.Module, args: Any, output: Any) -> Any:
            return see(module, output) if module in chosen else None

        handle = (
            register_module_forward_pre_hook(before) if at_input else register_module_forward_hook(after)
        )
        try:
            with torch.enable_grad(), mode:
                yield
        finally:
            handle.remove()

    def _mode(self, anchor: torch.Tensor, kept: _Kept) -> _CopyOnWrite:
        model = self.forward_func
        if not isinstance(model, nn.Module):
            model = nn.ModuleList(self.layers)
        return _CopyOnWrite(model, anchor, kept)

    def _name(self, layer: nn.Module) -> str:
        return f"layer {self.layers.index(layer)} ({type(layer).__name__})"


class LayerGradientXActivation(_OfLayers):
    """`captum.attr.LayerGradientXActivation`: activation times gradient at one layer or at many.

        method = LayerGradientXActivation(model, [model.layer3, model.layer4], per_filter=True)
        third, fourth = method.attribute(images, target=labels)    # (N, C) each

    Args:
        forward_func: the model, or a function that calls it.
        layer: a module, or a list of them. Of a module that is called several times in a forward pass,
            the last call counts, as in Captum.
        multiply_by_inputs: False gives the gradients alone.
        per_filter: sum over positions, (N, C) of each (N, C, ...), without maps being made or kept.
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: nn.Module | Sequence[nn.Module],
        *,
        multiply_by_inputs: bool = True,
        per_filter: bool = False,
    ) -> None:
        super().__init__(forward_func, layer)
        if per_filter and not multiply_by_inputs:
            raise InputError(
                "per_filter sums activation times gradient; leave multiply_by_inputs as it is"
            )
        self.multiplies_by_inputs, self.per_filter = multiply_by_inputs, per_filter

    def attribute(
        self,
        inputs: torch.Tensor | tuple[torch.Tensor, ...],
        target: Target = None,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
    ) -> Any:
        """One forward and one backward pass for all layers.

        Args:
            inputs: (N, ...), or a tuple of them.
            target: the output that is differentiated, as in Captum: a number or tuple for all samples, a
                tensor or list with one for each, or None where the output is one number a sample.
            additional_forward_args: further arguments of `forward_func`, one or a tuple.
            attribute_to_layer_input: at what the layers read instead of what they make.

        Returns:
            A tensor (N, ...) as the layer's, detached; a tuple of them where the layer has several; for a
            list of layers, a list of these.

        Raises:
            InputError: the target does not fit the output, or a layer was not called.
            NoGradientError: the output does not depend on a layer.
        """
        first = next(tensors_in(inputs))
        anchor = torch.zeros((), device=first.device, requires_grad=True)
        kept = _Kept()
        found: dict[nn.Module, tuple[bool, list[_Measure]]] = {}

        def see(layer: nn.Module, tensors: Any) -> Any:
            several = not isinstance(tensors, torch.Tensor)
            made = [tensors] if not several else list(tensors)
            measures = []
            for i, tensor in enumerate(made):
                if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                    measure = _Measure(self.multiplies_by_inputs, self.per_filter)
                    made[i] = _Seen.apply(tensor, anchor, measure)
                    kept.hold(made[i], measure)
                    measures.append(measure)
            found[layer] = len(measures) > 1, measures
            return tuple(made) if several else made[0]

        arguments = _arguments(inputs, additional_forward_args)
        with self._watched(see, attribute_to_layer_input, self._mode(anchor, kept)):
            total = _selected(self.forward_func(*arguments), target)
        if total.requires_grad:
            torch.autograd.grad(total, anchor, allow_unused=True)
        return self._results(found)

    def _results(self, found: dict[nn.Module, tuple[bool, list[_Measure]]]) -> Any:
        results = []
        for layer in self.layers:
            if layer not in found:
                raise InputError(f"{self._name(layer)} was not called in the forward pass")
            several, measures = found[layer]
            values = [measure.result for measure in measures if measure.result is not None]
            if len(values) != len(measures) or not values:
                raise NoGradientError(
                    f"the chosen output does not depend on {self._name(layer)}; leave it out"
                )
            results.append(tuple(values) if several else values[0])
        return results[0] if self.single else results


class NeuronGradient(_OfLayers):
    """`captum.attr.NeuronGradient`: how the inputs change one neuron, in one layer or in many.

    Args:
        forward_func: the model, or a function that calls it.
        layer: a module, or a list of them.
    """

    def attribute(
        self,
        inputs: torch.Tensor | tuple[torch.Tensor, ...],
        neuron_selector: Selector | Sequence[Selector],
        additional_forward_args: Any = None,
        attribute_to_neuron_input: bool = False,
    ) -> Any:
        """One forward pass, and a backward pass for each layer.

        Args:
            inputs: (N, ...), or a tuple of them.
            neuron_selector: as in Captum: an index or a tuple of indices and slices behind the batch's
                dimension, or a function of the layer's tensor. For several layers, a list with one each.
            additional_forward_args, attribute_to_neuron_input: as of `LayerGradientXActivation`.

        Returns:
            The inputs' gradients, of their shapes: a tensor, or a tuple for a tuple of inputs; for a list of
            layers, a list of these.

        Raises:
            InputError: there are not as many selectors as layers, or a layer was not called.
            NoGradientError: a neuron does not depend on the inputs.
        """
        leaves = tuple(x.detach().requires_grad_(x.is_floating_point()) for x in _tuple(inputs))
        chosen = list(neuron_selector) if isinstance(neuron_selector, list) else [neuron_selector]
        if len(chosen) != len(self.layers):
            raise InputError(
                f"{len(self.layers)} layers need as many selectors, in a list, got {len(chosen)}"
            )
        selectors = dict(zip(self.layers, chosen, strict=True))
        totals: dict[nn.Module, torch.Tensor] = {}

        def see(layer: nn.Module, tensors: Any) -> None:
            # Now, because the model may overwrite the tensor next.
            totals[layer] = _neuron(tensors, selectors[layer])

        anchor = torch.zeros((), device=leaves[0].device)
        arguments = _arguments(leaves, additional_forward_args)
        with self._watched(see, attribute_to_neuron_input, self._mode(anchor, _Kept())):
            self.forward_func(*arguments)
        results = []
        for layer in self.layers:
            if layer not in totals:
                raise InputError(f"{self._name(layer)} was not called in the forward pass")
            if not totals[layer].requires_grad:
                raise NoGradientError(f"the neuron of {self._name(layer)} does not depend on the inputs")
            grads = torch.autograd.grad(totals[layer], leaves, retain_graph=True)
            results.append(grads if isinstance(inputs, tuple) else grads[0])
        return results[0] if self.single else results


def _arguments(inputs: Any, additional: Any) -> tuple[Any, ...]:
    return _tuple(inputs) if additional is None else (*_tuple(inputs), *_tuple(additional))


def _tuple(item: Any) -> tuple[Any, ...]:
    return item if isinstance(item, tuple) else (item,)


def _neuron(tensors: Any, selector: Any) -> torch.Tensor:
    if callable(selector):
        # It may keep what it is given for its backward pass, and the model overwrite that.
        several = isinstance(tensors, tuple)
        picked: torch.Tensor = selector(
            tuple(t.clone() for t in tensors) if several else tensors.clone()
        )
        return picked.sum()
    if isinstance(tensors, tuple):
        (tensors,) = tensors
    return tensors[(slice(None), *_tuple(selector))].sum()  # type: ignore[no-any-return]


def _selected(output: Any, target: Target) -> torch.Tensor:
    """The sum over samples of the output that is chosen for each."""
    if not isinstance(output, torch.Tensor):
        raise InputError(
            f"forward_func returned a {type(output).__name__}; give a function that returns the logits"
        )
    if isinstance(target, torch.Tensor):
        target = target.tolist()  # a number, or a list of them
    if isinstance(target, list) and len(target) == 1 and len(output) != 1:
        target = target[0]
    try:
        if target is None:
            picked = output
        elif isinstance(target, list):
            if len(target) != len(output):
                raise IndexError(f"{len(target)} targets for {len(output)} samples")
            indices = [(n, *_tuple(t)) for n, t in enumerate(target)]
            picked = output[tuple(torch.tensor(indices, device=output.device).unbind(1))]
        else:
            picked = output[(slice(None), *_tuple(target))]
    except IndexError as error:
        raise InputError(
            f"target {target!r} does not fit an output of shape {tuple(output.shape)}: {error}"
        ) from error
    if picked.numel() not in (1, len(output)):
        raise InputError(
            f"target {target!r} leaves {tuple(picked.shape)} of an output of shape "
            f"{tuple(output.shape)}; choose one number a sample"
        )
    return picked.sum()


class _Measure:
    """What one layer's tensor is until the backward pass, and what comes of it.

    Attributes:
        x: the tensor as the layer made it.
        result: (N, C), or of x's shape; None until the gradient came.
    """

    def __init__(self, multiply: bool, per_filter: bool) -> None:
        self.multiply, self.per_filter = multiply, per_filter
        self.x: torch.Tensor | None = None
        self.result: torch.Tensor | None = None

    def take(self, g: torch.Tensor) -> None:
        x, self.x = self.x, None
        assert x is not None
        g = g.detach()
        if self.per_filter:
            x, g = (t if t.dim() <= 5 else t.flatten(4) for t in (x, g))
            self.result = ops.backend_for(x.device).attribution(x, g, False)
        else:
            self.result = x * g if self.multiply else g


class _Seen(torch.autograd.Function):
    """Identity that hands the gradient to a measure; its output may be overwritten."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, anchor: torch.Tensor, measure: _Measure) -> torch.Tensor:
        ctx.measure = measure
        return x.data

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.measure.take(grads[0])
        return (grads[0] if ctx.needs_input_grad[0] else None), None, None


class _Kept:
    """The tensors that measures hold, by the memory that they lie in."""

    def __init__(self) -> None:
        self._measures: dict[int, list[_Measure]] = {}

    def hold(self, tensor: torch.Tensor, measure: _Measure) -> None:
        measure.x = tensor.detach()
        self._measures.setdefault(tensor.untyped_storage().data_ptr(), []).append(measure)

    def before_write(self, tensor: torch.Tensor) -> None:
        for measure in self._measures.pop(tensor.untyped_storage().data_ptr(), ()):
            if measure.x is not None:
                measure.x = measure.x.clone()


class _CopyOnWrite(TapMode):
    """Runs a forward pass without weight gradients; copies what is kept before it is overwritten."""

    def __init__(self, model: nn.Module, anchor: torch.Tensor, kept: _Kept) -> None:
        nowhere = ScoreMatrix(0, 0, device=anchor.device)
        super().__init__(model, {}, nowhere, anchor, guided=False)
        self.kept = kept

    def meet(
        self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        target = written_to(name, args, kwargs)
        if is_inplace(func, kwargs):
            target = args[0] if args else kwargs.get("input")
        for tensor in tensors_in(target):
            self.kept.before_write(tensor)
        return super().meet(func, name, args, kwargs)
