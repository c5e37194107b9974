"""Residual branches: where they are in a model's modules, and how one is taken out for real.

A module computes `branch + shortcut` if its own forward pass, as torch.fx records it with its children
as single steps, adds two values of which one needs steps that the other does not. Names of classes play
no part. Must not know why a branch goes.
"""

from __future__ import annotations

import copy
import logging
import operator
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from attrfast.errors import ModelError
from attrfast.trace import Param, Trace, argument

log = logging.getLogger(__name__)

_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
_WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear)
_AFFINE = (*_WEIGHTED, nn.modules.batchnorm._BatchNorm)


@dataclass(frozen=True)
class ResidualBranch:
    """A branch of a module that adds it to a shortcut.

    Attributes:
        owner: name of the module whose forward pass adds.
        last: name of the layer whose output the branch adds; zero there is zero everywhere in the branch.
        modules: names of the modules with parameters that only the branch needs.
    """

    owner: str
    last: str
    modules: tuple[str, ...]


class _OwnForward(fx.Tracer):
    """Records a module's own forward pass; its children are steps."""

    def is_leaf_module(self, m: nn.Module, qualified: str) -> bool:
        return True


@dataclass(frozen=True)
class _Addition:
    node: fx.Node
    branch: fx.Node  # the operand that may go
    shortcut: fx.Node
    steps: frozenset[fx.Node]  # what only the branch needs


def find_branches(model: nn.Module, record: Trace) -> tuple[ResidualBranch, ...]:
    """The residual branches of a model that can be taken out, outermost first.

    Args:
        model: any module. Additions in its own forward pass are left out: they can't be changed without
            changing its class. So are modules that torch.fx can't record, or that carry hooks.
        record: a pass of the model. A branch is left out if its last layer was not called exactly once.
    """
    modules = dict(model.named_modules())
    places = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    uses = Counter(
        weight.name
        for call in record.calls
        for position in (1, 3)  # of a convolution's or linear layer's weight, and of a batch norm's
        if isinstance(weight := argument(call, position, "weight"), Param)
    )
    found = []
    for name, module in modules.items():
        if name == "" or not any(True for _ in module.children()) or places[id(module)] > 1:
            continue
        for addition in _additions(module):
            branch = _branch(name, module, addition)
            if branch is None:
                continue
            owned = [f"{n}.{k}" for n in branch.modules for k, _ in _own(modules[n])]
            shared = any(places[id(modules[n])] > 1 for n in branch.modules) or _tied(model, owned)
            if uses[f"{branch.last}.weight"] == 1 and not shared:
                found.append(branch)
    return tuple(found)


def _own(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(module.named_parameters(recurse=False))


def _tied(model: nn.Module, names: list[str]) -> bool:
    """Whether a parameter of these names has another name as well."""
    every = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    state = dict(model.named_parameters(remove_duplicate=False))
    return any(every[id(state[name])] > 1 for name in names)


def _hooked(module: nn.Module) -> bool:
    """Whether something runs around the module's forward pass."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name, None) for name in hooks)


def _is_sequence(module: nn.Module) -> bool:
    return type(module).forward is nn.Sequential.forward and not _hooked(module)


def _graph(module: nn.Module) -> fx.Graph | None:
    if _hooked(module):
        return None
    try:
        return _OwnForward().trace(module)
    except Exception as error:  # control flow that depends on values, arguments of unknown number, ...
        log.debug("no residual branches are looked for in a %s: %s", type(module).__name__, error)
        return None


def _additions(module: nn.Module) -> Iterator[_Addition]:
    graph = _graph(module)
    for node in graph.nodes if graph is not None else ():
        addition = _addition(node, module)
        if addition is not None:
            yield addition


def _addition(node: fx.Node, module: nn.Module) -> _Addition | None:
    if node.target not in _ADDITIONS or len(node.args) != 2 or node.kwargs:
        return None
    a, b = node.args
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return None
    above_a, above_b = _above(a), _above(b)
    sides = ((a, b, above_a - above_b), (b, a, above_b - above_a))
    counts = [_convolutions(steps, module) for *_, steps in sides]
    if counts[0] == counts[1]:  # neither side is the shortcut
        return None
    branch, shortcut, steps = sides[counts[1] > counts[0]]
    # All that the branch starts from, the shortcut starts from as well; nothing else uses what it makes.
    if any(step.op in ("placeholder", "output") for step in steps):
        return None
    if any(user not in steps and user is not node for step in steps for user in step.users):
        return None
    return _Addition(node, branch, shortcut, frozenset(steps))


def _above(node: fx.Node) -> set[fx.Node]:
    """A node and all that it is computed from."""
    seen: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        one = waiting.pop()
        if one not in seen:
            seen.add(one)
            waiting.extend(one.all_input_nodes)
    return seen


def _convolutions(steps: set[fx.Node], module: nn.Module) -> int:
    children = (module.get_submodule(str(s.target)) for s in steps if s.op == "call_module")
    return sum(isinstance(m, _WEIGHTED) for child in children for m in child.modules())


def _branch(owner: str, module: nn.Module, addition: _Addition) -> ResidualBranch | None:
    last = _last(module, addition.branch)
    if last is None:
        return None
    names = sorted({str(s.target) for s in addition.steps if s.op == "call_module"})
    inside = [
        f"{owner}.{name}.{inner}".rstrip(".")
        for name in names
        for inner, part in module.get_submodule(name).named_modules()
        if _own(part)
    ]
    return ResidualBranch(owner, f"{owner}.{last}", tuple(inside))


def _last(module: nn.Module, node: fx.Node) -> str | None:
    """Name of the layer that makes a node's value, past whatever makes zeros of zeros."""
    while True:
        if node.op == "call_module":
            name = str(node.target)
            child = module.get_submodule(name)
            while (inside := list(child.named_children())) and _is_sequence(child):
                key, child = inside[-1]
                name = f"{name}.{key}"
            if isinstance(child, _AFFINE) and not _hooked(child) and child.weight is not None:
                return name
        if len(node.all_input_nodes) != 1 or not _keeps_zeros(module, node):
            return None
        (node,) = node.all_input_nodes


def _keeps_zeros(module: nn.Module, node: fx.Node) -> bool:
    """Whether a step of one input and no parameters makes zeros of zeros."""
    (source,) = node.all_input_nodes
    step: Callable[..., Any]
    if node.op == "call_module":
        child = module.get_submodule(str(node.target))
        if any(True for _ in child.parameters()):
            return False
        step = copy.deepcopy(child).cpu()
    elif node.op == "call_method":
        step = getattr(torch.Tensor, str(node.target))
    elif callable(node.target):
        step = node.target
    else:
        return False
    for shape in ((2, 4, 8, 8), (2, 4, 8), (2, 4, 8, 8, 8), (2, 4)):
        arguments = _with(torch.zeros(shape), source, (node.args, node.kwargs))
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                out = step(*arguments[0], **arguments[1])
        except Exception:  # the step takes another number of dimensions
            continue
        return isinstance(out, torch.Tensor) and not bool(out.any())
    return False


def _with(value: torch.Tensor, source: fx.Node, arguments: Any) -> Any:
    """Arguments of a step, with a tensor in the place of the step that they come from."""
    return fx.node.map_arg(arguments, lambda node: value if node is source else node)


def take_out(model: nn.Module, branch: ResidualBranch) -> None:
    """Replaces a branch's owner by a module that computes its shortcut alone, in place.

    What is left keeps its names, parameters and flags.

    Raises:
        ModelError: the owner has no such branch.
    """
    module = dict(model.named_modules()).get(branch.owner)
    graph = _graph(module) if module is not None else None
    for node in graph.nodes if graph is not None else ():
        assert module is not None
        addition = _addition(node, module)
        if addition is None or _branch(branch.owner, module, addition) != branch:
            continue
        assert graph is not None
        _swap(node, addition)
        for step in reversed(list(graph.nodes)):
            if step in addition.steps and not step.users:
                graph.erase_node(step)
        smaller = fx.GraphModule(module, graph, type(module).__name__)
        smaller.delete_all_unused_submodules()
        smaller.train(module.training)
        _keep_flags(module, smaller)
        parent, _, key = branch.owner.rpartition(".")
        setattr(model.get_submodule(parent), key, smaller)
        return
    raise ModelError(f"{branch.owner} has no residual branch that ends in {branch.last}")


def _swap(node: fx.Node, addition: _Addition) -> None:
    """The shortcut takes the place of the sum, as a tensor of its own: what follows may work in place."""
    with node.graph.inserting_after(node):
        copy = node.graph.call_method("clone", (addition.shortcut,))
    node.replace_all_uses_with(copy)
    node.graph.erase_node(node)


def _keep_flags(module: nn.Module, smaller: nn.Module) -> None:
    before: dict[str, Any] = {name: part.training for name, part in module.named_modules()}
    for name, part in smaller.named_modules():
        part.training = before.get(name, module.training)
