"""Functional calls with the parameters of one module become calls of a torch.nn module in its place.

Networks are full of subclasses that a tracer goes into: a normalisation with an activation behind it, a convolution
that pads by the size of its input. What is left of them in a graph is `F.batch_norm(x, norm.running_mean, ...)`, frozen
in one mode; as a plain module under the same path, with the same parameters, it trains and is understood.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

_CONVS: dict[Any, type[nn.Module]] = {F.conv1d: nn.Conv1d, F.conv2d: nn.Conv2d, F.conv3d: nn.Conv3d}
_CONV_ARGUMENTS = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}


def _norm(owner: Any, a: dict[str, Any]) -> nn.Module | None:
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    cls = next((k for k in kinds if isinstance(owner, k)), None)
    if cls is None or a["running_mean"] is None:
        return None
    affine = a["weight"] is not None
    return cls(owner.num_features, a["eps"], owner.momentum, affine, True)


def _layer_norm(owner: Any, a: dict[str, Any]) -> nn.Module | None:
    shape = a["normalized_shape"]
    if not isinstance(owner, nn.LayerNorm) or not all(isinstance(s, int) for s in shape):
        return None
    return nn.LayerNorm(tuple(shape), a["eps"], a["weight"] is not None, a["bias"] is not None)


def _group_norm(owner: Any, a: dict[str, Any]) -> nn.Module | None:
    if not isinstance(owner, nn.GroupNorm):
        return None
    return nn.GroupNorm(a["num_groups"], owner.num_channels, a["eps"], a["weight"] is not None)


def _linear(owner: Any, a: dict[str, Any]) -> nn.Module | None:
    if not isinstance(owner, nn.Linear):
        return None
    return nn.Linear(owner.in_features, owner.out_features, a["bias"] is not None)


def _conv(owner: Any, a: dict[str, Any]) -> nn.Module | None:
    cls = _CONVS[a["function"]]
    fields = [a[name] for name in ("stride", "padding", "dilation", "groups")]
    numbers = all(isinstance(v, (int, str)) or all(isinstance(i, int) for i in v) for v in fields)
    if not isinstance(owner, cls) or not numbers:
        return None
    weight: Any = owner.weight
    make: Any = cls
    stride, padding, dilation, groups = fields
    channels = weight.shape[1] * groups, weight.shape[0]
    return make(*channels, tuple(weight.shape[2:]), stride, padding, dilation, groups, a["bias"] is not None)


_RULES: dict[Any, tuple[Callable[[Any, dict[str, Any]], nn.Module | None], tuple[str, ...]]] = {
    F.batch_norm: (_norm, ("running_mean", "running_var", "weight", "bias")),
    F.layer_norm: (_layer_norm, ("weight", "bias")),
    F.group_norm: (_group_norm, ("weight", "bias")),
    F.linear: (_linear, ("weight", "bias")),
    **dict.fromkeys(_CONVS, (_conv, ("weight", "bias"))),
}


def _arguments(node: fx.Node) -> dict[str, Any] | None:
    """Arguments of a functional call by name, the defaults too."""
    if node.target in _CONVS or node.target is F.linear:
        defaults = _CONV_ARGUMENTS if node.target in _CONVS else {"bias": None}
        names = ("input", "weight", *defaults)
        return {**defaults, **dict(zip(names, node.args, strict=False)), **node.kwargs, "function": node.target}
    try:
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    bound.apply_defaults()
    return dict(bound.arguments)


def modules_for_functions(root: nn.Module, *graphs: fx.Graph) -> None:
    """Rewrite graphs of one network in place; its modules are replaced where a function took their parameters."""
    made: dict[str, nn.Module] = {}
    for graph in graphs:
        for node in list(graph.nodes):
            if node.op == "call_function" and node.target in _RULES:
                _replace(root, graph, node, made)
        if made:
            _drop_counters(graph, made)
    _move_children(root, graphs, made)


def _replace(root: nn.Module, graph: fx.Graph, node: fx.Node, made: dict[str, nn.Module]) -> None:
    rule, names = _RULES[node.target]
    arguments = _arguments(node)
    if arguments is None or not isinstance(arguments["input"], fx.Node):
        return
    own = {n: arguments.get(n) for n in names if arguments.get(n) is not None}
    if not own or any(not isinstance(v, fx.Node) or v.op != "get_attr" for v in own.values()):
        return
    paths = {n: str(v.target).rpartition(".") for n, v in own.items() if isinstance(v, fx.Node)}
    owners = {p[0] for p in paths.values()}
    if len(owners) != 1 or any(p[2] != n for n, p in paths.items()) or "" in owners:
        return
    path = owners.pop()
    owner = root.get_submodule(path)
    if path not in made:
        with torch.device("meta"):
            plain = rule(owner, arguments)
        if plain is None:
            return
        for name, value in (*owner._parameters.items(), *owner._buffers.items()):
            if hasattr(plain, name) and value is not None:
                setattr(plain, name, value)
        if any(t.is_meta and not getattr(owner, n).is_meta for n, t in plain.state_dict(keep_vars=True).items()):
            return
        for name, child in owner.named_children():
            plain.add_module(name, child)
        plain.training = owner.training
        parent, _, last = path.rpartition(".")
        setattr(root.get_submodule(parent), last, plain)
        made[path] = plain
    with graph.inserting_before(node):
        new = graph.call_module(path, (arguments["input"],))
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    for v in own.values():
        if isinstance(v, fx.Node) and not v.users:
            graph.erase_node(v)


def _move_children(root: nn.Module, graphs: tuple[fx.Graph, ...], made: dict[str, nn.Module]) -> None:
    """Layers inside what is now a layer, such as the activation of a normalisation, go beside it."""
    for path, plain in made.items():
        for name, child in list(plain.named_children()):
            parent, _, last = path.rpartition(".")
            owner, new = root.get_submodule(parent), f"{last}_{name}"
            while hasattr(owner, new):
                new += "_"
            delattr(plain, name)
            owner.add_module(new, child)
            old, prefix = f"{path}.{name}", f"{parent}.{new}" if parent else new
            for graph in graphs:
                for node in graph.nodes:
                    target = str(node.target)
                    if node.op in ("call_module", "get_attr") and (target == old or target.startswith(old + ".")):
                        node.target = prefix + target[len(old) :]


def _drop_counters(graph: fx.Graph, made: dict[str, nn.Module]) -> None:
    """The module counts its batches by itself."""
    for node in list(graph.nodes):
        if node.op == "get_attr" and str(node.target).endswith(".num_batches_tracked"):
            users = list(node.users)
            if str(node.target).rpartition(".")[0] in made and all(not u.users for u in users):
                for user in users:
                    graph.erase_node(user)
                graph.erase_node(node)
