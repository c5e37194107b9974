"""Follows channels through a recorded forward pass.

Every filter gets a label; labels flow through the calls of a trace, are united where an operation
combines two channels element by element, and are *frozen* where removing a channel would change more
than itself. Operations that only move data are run on the labels themselves, so any combination of
views, permutations, slices and pads is followed without a rule of its own.

torch-pruning's own dependency graph is not used to find units: it reads autograd node names of an
eval-mode pass, and so misses auxiliary heads and functional calls and cannot follow a channel shuffle.
Its layer pruners do the cutting (`attrfast.surgery`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from attrfast.labels import NONE, Channels, Labels
from attrfast.signatures import CONVOLUTIONS
from attrfast.trace import Call, Param, Ref, Trace, argument

_POINTWISE = frozenset(
    """
    relu relu6 leaky_relu rrelu elu selu celu gelu silu mish softplus softsign softshrink hardshrink
    tanhshrink threshold hardswish hardsigmoid hardtanh sigmoid logsigmoid tanh abs neg negative exp expm1
    log log1p log2 sqrt rsqrt square pow sin cos erf reciprocal sign round floor ceil clamp clip clamp_min
    clamp_max nan_to_num dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout
    feature_dropout contiguous clone detach to type float double half bfloat16 cuda cpu type_as
    requires_grad positive add sub subtract rsub mul multiply div divide true_divide maximum minimum where
    lerp addcmul addcdiv fmax fmin atan2 masked_fill zeros_like ones_like rand_like randn_like empty_like
    full_like bernoulli set:data get:data alias lt le gt ge eq ne logical_and logical_or logical_not
    isnan isfinite
    """.split()
)
_MOVES = frozenset(
    """
    view reshape flatten unflatten permute transpose swapaxes swapdims movedim moveaxis squeeze unsqueeze
    expand expand_as repeat tile getitem narrow select chunk split tensor_split unbind flip roll stack
    pixel_shuffle pixel_unshuffle channel_shuffle t get:T get:mT adjoint index_select broadcast_to view_as
    reshape_as unsafe_chunk unsafe_split ravel hsplit vsplit dsplit repeat_interleave
    """.split()
)
_RESHAPES = frozenset({"view", "reshape", "flatten", "unflatten", "view_as", "reshape_as", "ravel"})
_REDUCTIONS = frozenset(
    """
    mean sum amax amin max min std var norm logsumexp prod argmax argmin median all any softmax
    log_softmax softmin normalize cumsum cumprod vector_norm std_mean var_mean nanmean aminmax
    """.split()
)
_UNIT_MODULES = (nn.modules.conv._ConvNd, nn.Linear)
_CHANNEL_MODULES = (nn.modules.batchnorm._NormBase, nn.PReLU)


class Analysis:
    """Labels of all channels of a model, after the traces that were given to `run`.

    Attributes:
        outputs, inputs: module (or bare parameter) -> label of each of its output or input channels.
        scored: the convolutions, in the order of their first call.
        depthwise: those whose outputs are their inputs' channels.
    """

    def __init__(self, model: nn.Module) -> None:
        self.labels = Labels()
        self.outputs: dict[str, tuple[int, ...]] = {}
        self.inputs: dict[str, tuple[int, ...]] = {}
        self.scored: dict[str, None] = {}  # convolutions, in the order of their first call
        self.depthwise: set[str] = set()
        self.owners = _owners(model)
        self.modules = dict(model.named_modules())
        self.state_shapes = {
            name: t.shape for name, t in [*model.named_parameters(), *model.named_buffers()]
        }
        self.channels: dict[int, Channels] = {}
        self.grids: dict[int, torch.Tensor] = {}

    # -- one trace ---------------------------------------------------------------------------------

    def run(self, record: Trace) -> None:
        self.channels, self.grids = {}, {}
        self.shapes = record.shapes
        for call in record.calls:
            known = any(v in self.channels or v in self.grids for v in call.inputs)
            if known or call.name in CONVOLUTIONS or call.name == "linear":
                self._call(call)
        for value in record.results:
            self._freeze_value(value, "it is an output of the model")

    def unseen(self) -> bool:
        """Whether a layer with weights was not called, as heads that run in training mode alone."""
        return any(
            isinstance(module, _UNIT_MODULES) and name not in self.outputs
            for name, module in self.modules.items()
        )

    def _freeze_value(self, value: int, why: str) -> None:
        if value in self.channels:
            self.labels.freeze(self.channels[value].labels, why)

    def _freeze_inputs(self, call: Call, why: str) -> None:
        for value in call.inputs:
            self._freeze_value(value, why)

    def _call(self, call: Call) -> None:
        name = call.name
        if name in CONVOLUTIONS:
            self._convolution(call)
        elif name == "linear":
            self._linear(call)
        elif name in ("batch_norm", "instance_norm"):
            self._norm(call)
        elif name == "prelu":
            self._prelu(call)
        elif name in ("layer_norm", "rms_norm"):
            self._layer_norm(call)
        elif name in ("cat", "concat", "concatenate"):
            self._cat(call)
        elif name == "pad":
            self._pad(call)
        elif "pool" in name and "unpool" not in name:
            self._spatial(call, int(name[name.index("pool") + 4]) if name[-1] == "d" else 2)
        elif name in (
            "interpolate",
            "upsample",
            "grid_sample",
            "upsample_nearest",
            "upsample_bilinear",
        ):
            self._spatial(call, self._ndim(call.inputs[0]) - 2)
        elif name in _MOVES:
            self._move(call)
        elif name in _REDUCTIONS and not (name in ("max", "min") and len(call.inputs) > 1):
            self._reduce(call)
        elif name in _POINTWISE or name in ("max", "min"):
            self._pointwise(call)
        else:
            self._opaque(call)

    def _ndim(self, value: int) -> int:
        return len(self.shapes[value])

    def _set(self, call: Call, channels: Channels | None) -> None:
        for value in call.outputs:
            if channels is not None and (
                self._ndim(value) > channels.dim
                and self.shapes[value][channels.dim] == len(channels.labels)
            ):
                self.channels[value] = channels

    def _opaque(self, call: Call) -> None:
        self._freeze_inputs(call, f"{call.name} reads it, and attrfast does not know its meaning")
        for value in call.outputs:
            for source in call.inputs:
                if source in self.channels and self.shapes[value] == self.shapes[source]:
                    self.channels[value] = self.channels[source]
                    break

    # -- layers with weights -----------------------------------------------------------------------

    def _reader(self, call: Call, kinds: tuple[type, ...]) -> tuple[str | None, nn.Module | None]:
        """Name of the module (or bare parameter) whose weight this call uses, and the module itself."""
        weight = argument(call, 1, "weight")
        if not isinstance(weight, Param):
            return None, None
        owner = self.owners.get(weight.name)
        module = self.modules.get(owner) if owner is not None else None
        if owner is None or not isinstance(module, kinds):
            return weight.name, None
        assert isinstance(module, nn.Module)
        return owner, module

    def _read(self, name: str, labels: Sequence[int], why: str) -> None:
        if name in self.inputs:
            self.labels.unite_each(self.inputs[name], labels, why)
        else:
            self.inputs[name] = tuple(labels)

    def _produce(self, name: str, channels: int) -> tuple[int, ...]:
        if name not in self.outputs:
            self.outputs[name] = self.labels.new(name, channels)
        return self.outputs[name]

    def _source(self, call: Call, dim: int) -> tuple[int, ...] | None:
        """Labels of the call's first input along `dim`, or None where no filter made it."""
        ref = argument(call, 0, "input")
        channels = self.channels.get(ref.value) if isinstance(ref, Ref) else None
        if channels is None:
            return None
        if channels.dim != dim:
            self.labels.freeze(channels.labels, f"{call.name} reads it along another dimension")
            return None
        return channels.labels

    def _convolution(self, call: Call) -> None:
        spatial = int(call.name[-2])
        ref = argument(call, 0, "input")
        assert isinstance(ref, Ref)
        dim = self._ndim(ref.value) - spatial - 1
        sources = self._source(call, dim)
        name, module = self._reader(call, (nn.modules.conv._ConvNd,))
        if name is None:
            self._freeze_inputs(
                call, f"a {call.name} reads it whose weight is computed, not a parameter"
            )
            return
        if module is None:
            if sources is not None:
                self._read(name, sources, "")
            self._freeze_inputs(call, f"a {call.name} with the bare parameter {name} reads it")
            return
        assert isinstance(module, nn.modules.conv._ConvNd)
        width, groups, out = module.in_channels, module.groups, module.out_channels
        filters = self._produce(name, out)
        self.scored.setdefault(name)
        why = f"{name} is called on inputs from different places"
        if groups == width and groups > 1:
            self.depthwise.add(name)
            if sources is None:
                self.labels.freeze(filters, f"the depthwise {name} reads an input of the model")
            else:
                each = out // width
                for i, source in enumerate(sources):
                    for j in range(each):
                        self.labels.unite(source, filters[i * each + j], why)
        else:
            if sources is not None:
                self._read(name, sources, why)
                self._tie_groups(sources, groups)
            elif name in self.inputs:
                self.labels.freeze(self.inputs[name], why)
            self._tie_groups(filters, groups)
        for value in call.outputs:
            self.channels[value] = Channels(dim, filters)

    def _tie_groups(self, labels: Sequence[int], groups: int) -> None:
        """A grouped convolution stays rectangular only if every group loses the same places."""
        if groups > 1:
            size = len(labels) // groups
            for i, label in enumerate(labels):
                self.labels.unite(labels[i % size], label, "its group reads an input of the model")

    def _linear(self, call: Call) -> None:
        ref = argument(call, 0, "input")
        assert isinstance(ref, Ref)
        dim = self._ndim(ref.value) - 1
        sources = self._source(call, dim)
        name, module = self._reader(call, (nn.Linear,))
        if name is None or module is None:
            if name is not None and sources is not None:
                self._read(name, sources, "")
            self._freeze_inputs(call, f"a linear call with the weight {name or '(computed)'} reads it")
            return
        assert isinstance(module, nn.Linear)
        if sources is not None:
            self._read(name, sources, f"{name} is called on inputs from different places")
        elif name in self.inputs:
            self.labels.freeze(self.inputs[name], f"{name} is called on inputs from different places")
        rows = self._produce(name, module.out_features)
        if dim >= 3:  # applied at every position of a map, it is a 1x1 convolution in another spelling
            self.scored.setdefault(name)
        for value in call.outputs:
            self.channels[value] = Channels(dim, rows)

    def _norm(self, call: Call) -> None:
        sources = self._source(call, 1)
        if sources is None:
            self._opaque(call)
            return
        state = [a for a in (*call.args, *call.kwargs.values()) if isinstance(a, Param)]
        self._per_channel(call, state, sources)
        self._set(call, Channels(1, sources))

    def _prelu(self, call: Call) -> None:
        ref, weight = argument(call, 0, "input"), argument(call, 1, "weight")
        channels = self.channels.get(ref.value) if isinstance(ref, Ref) else None
        if channels is None or channels.dim != 1:
            self._opaque(call)
            return
        module = (
            self.modules.get(self.owners.get(weight.name, "")) if isinstance(weight, Param) else None
        )
        if not isinstance(module, nn.PReLU) or module.num_parameters > 1:
            state = [weight] if isinstance(weight, Param) else []
            if not state:
                self._freeze_inputs(call, "a prelu reads it whose weight is computed")
            self._per_channel(call, state, channels.labels)
        self._set(call, channels)

    def _per_channel(self, call: Call, state: Sequence[Param], labels: Sequence[int]) -> None:
        owners = {self.owners.get(p.name) for p in state}
        if not owners:
            return
        name = owners.pop()
        module = self.modules.get(name) if name is not None else None
        if owners or name is None or not isinstance(module, _CHANNEL_MODULES):
            where = ", ".join(p.name for p in state)
            self.labels.freeze(labels, f"a {call.name} uses the bare parameters {where} on it")
            return
        if name in self.outputs:
            why = f"{name} is called on inputs from different places"
            self.labels.unite_each(self.outputs[name], labels, why)
        else:
            self.outputs[name] = tuple(labels)

    def _layer_norm(self, call: Call) -> None:
        ref = argument(call, 0, "input")
        channels = self.channels.get(ref.value) if isinstance(ref, Ref) else None
        if channels is None:
            self._opaque(call)
            return
        shape = argument(call, 1, "normalized_shape")
        first = self._ndim(ref.value) - (len(shape) if isinstance(shape, (tuple, list)) else 1)
        if channels.dim >= first:
            self.labels.freeze(
                channels.labels,
                f"{call.name} mixes it with the other channels, so it cannot go alone",
            )
        self._set(call, channels)

    # -- operations without weights ----------------------------------------------------------------

    def _pointwise(self, call: Call) -> None:
        """Element by element: channels that meet are united, whatever is done to them."""
        if not call.outputs:
            return
        if call.inputs[0] in self.grids and len(call.inputs) == 1:
            self.grids[call.outputs[0]] = self.grids[call.inputs[0]]
            return
        out = call.outputs[0]
        rank = self._ndim(out)
        merged: dict[int, tuple[int, ...]] = {}
        for value in call.inputs:
            channels = self.channels.get(value)
            if channels is None:
                continue
            dim = channels.dim + rank - self._ndim(value)
            if dim < 0 or dim >= rank:
                self._opaque(call)
                return
            if len(channels.labels) != self.shapes[out][dim]:
                self.labels.freeze(channels.labels, f"{call.name} spreads it over other channels")
                continue
            if dim in merged:
                why = f"{call.name} combines it with an input of the model"
                self.labels.unite_each(merged[dim], channels.labels, why)
            else:
                merged[dim] = channels.labels
        if len(merged) > 1:
            self._freeze_inputs(call, f"{call.name} combines different dimensions")
            return
        if not merged:
            return
        dim, labels = next(iter(merged.items()))
        self._check_unlabelled_operands(call, dim, rank, labels)
        for value in call.outputs:
            if self._ndim(value) == rank:
                self.channels[value] = Channels(dim, labels)

    def _check_unlabelled_operands(self, call: Call, dim: int, rank: int, labels: Sequence[int]) -> None:
        """An operand with one entry a channel that no filter made would have to shrink as well."""
        operands: list[tuple[str, torch.Size]] = []
        for item in _leaves((call.args, call.kwargs)):
            if isinstance(item, Ref) and item.value not in self.channels:
                operands.append(("a tensor that no filter made", self.shapes[item.value]))
            elif isinstance(item, Param):
                operands.append((f"the bare parameter {item.name}", self.state_shapes[item.name]))
        for what, shape in operands:
            own = dim - (rank - len(shape))
            if len(labels) > 1 and own >= 0 and shape[own] == len(labels):
                self.labels.freeze(labels, f"{call.name} combines it with {what}")

    def _spatial(self, call: Call, dims: int) -> None:
        value = call.inputs[0]
        channels = self.channels.get(value)
        if channels is None or channels.dim >= self._ndim(value) - dims:
            self._opaque(call)
            return
        self._set(call, channels)

    def _reduce(self, call: Call) -> None:
        value = call.inputs[0]
        channels = self.channels.get(value)
        if channels is None:
            return
        rank = self._ndim(value)
        raw = argument(call, 1, "dim", _MISSING)
        if call.name in ("norm", "normalize", "vector_norm"):
            raw = argument(call, 2, "dim", 1 if call.name == "normalize" else _MISSING)
        if raw is _MISSING or raw is None:
            self._opaque(call)
            return
        dims = {int(d) % rank for d in (raw if isinstance(raw, (tuple, list)) else (raw,))}
        if channels.dim in dims:
            self._opaque(call)
            return
        if not call.outputs:
            return
        dropped = rank - self._ndim(call.outputs[0])
        shift = sum(d < channels.dim for d in dims) if dropped else 0
        self._set(call, Channels(channels.dim - shift, channels.labels))

    def _cat(self, call: Call) -> None:
        parts = argument(call, 0, "tensors")
        raw = argument(call, 1, "dim", call.kwargs.get("axis", 0))
        out = call.outputs[0]
        along = int(raw) % self._ndim(out)
        known = {self.channels[v].dim for v in call.inputs if v in self.channels}
        if len(known) != 1 or not all(isinstance(p, Ref) for p in parts):
            self._freeze_inputs(call, "cat joins it with something that no filter made")
            if len(known) != 1:
                return
        dim = known.pop()
        columns: list[Sequence[int]] = []
        for part in parts:
            if isinstance(part, Ref):
                size = self.shapes[part.value]
                if len(size) != self._ndim(out):
                    continue
                labels = self.channels.get(part.value)
                columns.append(labels.labels if labels else (NONE,) * size[dim])
            else:
                columns.append((NONE,) * self.state_shapes[part.name][dim])
        if along == dim:
            merged = tuple(label for column in columns for label in column)
        else:
            merged = tuple(columns[0])
            for column in columns[1:]:
                self.labels.unite_each(merged, column, "cat joins it with something that no filter made")
        self._set(call, Channels(dim, merged))

    def _pad(self, call: Call) -> None:
        value = call.inputs[0]
        channels = self.channels.get(value)
        if channels is None:
            return
        widths = argument(call, 1, "pad")
        place = 2 * (self._ndim(value) - 1 - channels.dim)
        before, after = (tuple(widths) + (0,) * (place + 2))[place : place + 2]
        if before < 0 or after < 0:
            self._opaque(call)
            return
        labels = (NONE,) * before + channels.labels + (NONE,) * after
        self._set(call, Channels(channels.dim, labels))

    def _move(self, call: Call) -> None:
        """Runs the operation on the labels, and again with some of them gone.

        The second run shows whether removal commutes with the operation: whether it gives, on the
        channels that are left, what the first run gave there.
        """
        whole = self._run_on_labels(call, frozenset())
        if whole is None or len(whole) != len(call.outputs):
            self._opaque(call)
            return
        found = [_channel_dim(t) for t in whole]
        roots = sorted(
            {
                self.labels.root(label)
                for v in call.inputs
                if v in self.channels
                for label in self.channels[v].labels
                if label != NONE
            }
        )
        ok = all(f is not None for f in found)
        if ok and len(roots) > 1:
            for gone in ({roots[0]}, {roots[-1]}, set(roots[1::3]) or {roots[0]}, set(roots[::2])):
                if not self._commutes(call, whole, found, frozenset(gone)):
                    ok = False
                    break
        if not ok:
            self._freeze_inputs(call, f"{call.name} rearranges it in a way that depends on the width")
        for value, tensor, place in zip(call.outputs, whole, found, strict=True):
            if tensor.shape != self.shapes[value]:
                continue
            if place is None:
                grid = _compact(tensor)
                self.grids[value] = grid
                self.labels.freeze(
                    set(grid.flatten().tolist()), f"{call.name} spreads it over two dimensions"
                )
            elif any(label != NONE for label in place[1]):
                self.channels[value] = Channels(*place)

    def _run_on_labels(self, call: Call, gone: frozenset[int]) -> list[torch.Tensor] | None:
        def fill(item: Any) -> Any:
            if isinstance(item, Ref):
                shape = self.shapes[item.value]
                if item.value in self.grids:
                    return self.grids[item.value].expand(shape).contiguous()
                channels = self.channels.get(item.value)
                if channels is None:
                    return torch.full(shape, NONE, dtype=torch.int64)
                ids = [self.labels.root(x) if x != NONE else x for x in channels.labels]
                row = torch.tensor([x for x in ids if x not in gone], dtype=torch.int64)
                view = [1] * len(shape)
                view[channels.dim] = len(row)
                target = list(shape)
                target[channels.dim] = len(row)
                return row.view(view).expand(target).contiguous()
            if isinstance(item, tuple):
                return tuple(fill(x) for x in item)
            if isinstance(item, dict):
                return {key: fill(x) for key, x in item.items()}
            return item

        if any(isinstance(item, Param) for item in _leaves((call.args, call.kwargs))):
            return None
        try:
            out = call.func(*fill(call.args), **fill(call.kwargs))
        except Exception:  # the operation refuses the smaller tensor
            return None
        return list(out) if isinstance(out, (tuple, list)) else [out]

    def _commutes(
        self,
        call: Call,
        whole: list[torch.Tensor],
        found: Sequence[tuple[int, tuple[int, ...]] | None],
        gone: frozenset[int],
    ) -> bool:
        expected = []
        for tensor, place in zip(whole, found, strict=True):
            assert place is not None
            dim, labels = place
            keep = [i for i, label in enumerate(labels) if label not in gone]
            expected.append(tensor.index_select(dim, torch.tensor(keep, dtype=torch.int64)))
        got = self._run_on_labels(call, gone)
        if (
            got is not None
            and len(got) == len(expected)
            and all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        ):
            return True
        if call.name not in _RESHAPES or len(expected) != 1:
            return False
        # The sizes may have been computed from the tensor's own shape, as in x.view(b, c): with the
        # narrower tensor they come out narrower. Surgery is verified, and spares what fails.
        source = self._run_on_labels(_identity_of(call), gone)
        return (
            source is not None
            and source[0].numel() == expected[0].numel()
            and torch.equal(source[0].reshape(expected[0].shape), expected[0])
        )


_MISSING: Any = object()


def _identity_of(call: Call) -> Call:
    return Call(call.index, "clone", torch.clone, call.args[:1], {}, call.inputs[:1], call.outputs)


def _leaves(tree: Any) -> Iterable[Any]:
    if isinstance(tree, dict):
        for item in tree.values():
            yield from _leaves(item)
    elif isinstance(tree, tuple):
        for item in tree:
            yield from _leaves(item)
    else:
        yield tree


def _varying(tensor: torch.Tensor) -> list[int]:
    """Dimensions along which a label tensor is not constant."""
    return [
        d
        for d in range(tensor.dim())
        if tensor.shape[d] > 1 and not bool((tensor == tensor.narrow(d, 0, 1)).all())
    ]


def _compact(tensor: torch.Tensor) -> torch.Tensor:
    """A label tensor with size 1 in every dimension along which it is constant."""
    varying = _varying(tensor)
    for d in range(tensor.dim()):
        if d not in varying:
            tensor = tensor.narrow(d, 0, 1)
    return tensor.clone()


def _channel_dim(tensor: torch.Tensor) -> tuple[int, tuple[int, ...]] | None:
    """The one dimension along which a label tensor varies, with its labels; None where there are two."""
    if tensor.numel() == 0:
        return None
    varying = _varying(tensor)
    if len(varying) > 1:
        return None
    if not varying:
        value = int(tensor.flatten()[0])
        return (
            (1 if tensor.dim() > 1 and tensor.shape[1] == 1 else 0, (value,)) if value == NONE else None
        )
    dim = varying[0]
    row = tensor
    for d in reversed(range(tensor.dim())):
        if d != dim:
            row = row.select(d, 0)
    return dim, tuple(int(x) for x in row)


def _owners(model: nn.Module) -> dict[str, str]:
    """Full parameter or buffer name -> name of the module that holds it.

    A parameter that two modules share has no single owner and is left out: cutting it would change both.
    """
    owners: dict[str, str] = {}
    first: dict[int, str] = {}
    shared: set[str] = set()
    for name, module in model.named_modules():
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None:
                continue
            full = f"{name}.{key}" if name else key
            if id(tensor) in first:
                shared.add(first[id(tensor)])
            else:
                first[id(tensor)] = full
                owners[full] = name
    return {full: name for full, name in owners.items() if full not in shared}
