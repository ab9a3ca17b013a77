"""Cutting a traced network to its layouts: parameters, and the arguments of the graph that count channels."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .layout import Layouts
from .nn import ChannelBias
from .tracking import Ints, Layer, axes_of, filters, given, operation

# Attributes by which modules count the channels of their parameters.
_COUNTS = ("num_features", "num_channels", "num_parameters")


def cut(layouts: Layouts) -> None:
    """Cut the parameters to the channels that stay, in place."""
    analysis = layouts.analysis
    root = analysis.module
    for node, layer in analysis.layers.items():
        if node in layouts.of:
            _cut_layer(root.get_submodule(str(node.target)), layer, layouts)
    for node in (*analysis.norms, *analysis.affine):
        if node in layouts.of:
            m: Any = root.get_submodule(str(node.target))
            order = layouts.of[node].reshape(-1)
            if order.size == analysis.facts[node].ids.size and np.array_equal(order, np.arange(order.size)):
                continue
            if isinstance(m, nn.GroupNorm):
                m.num_groups = order.size // (m.num_channels // m.num_groups)
            for name in _COUNTS:
                if hasattr(m, name):
                    setattr(m, name, len(order))
            index = _index(order, m)
            for name in ("weight", "bias", "running_mean", "running_var"):
                if getattr(m, name, None) is not None:
                    _take(m, name, lambda t, index=index: t[index])
    for node, axis in analysis.tables.items():
        if node in layouts.of and layouts.of[node].size < analysis.facts[node].ids.size:
            _cut_table(root, node, axis, layouts.of[node].reshape(-1))


def _cut_table(root: nn.Module, node: fx.Node, axis: int, order: Ints) -> None:
    owner: Any
    if node.op == "call_module":
        owner, name = root.get_submodule(str(node.target)), "weight"
        owner.embedding_dim = len(order)
    else:
        path, _, name = str(node.target).rpartition(".")
        owner = root.get_submodule(path)
    index = torch.from_numpy(order).to(getattr(owner, name).device)
    _take(owner, name, lambda t: t.index_select(axis, index))


def _index(order: Ints, m: nn.Module) -> Tensor:
    device = next((t.device for t in (*m.parameters(), *m.buffers())), torch.device("cpu"))
    return torch.from_numpy(np.ascontiguousarray(order)).to(device)


def _take(m: nn.Module, name: str, take: Any) -> None:
    t = getattr(m, name)
    if t is None:
        return
    new = take(t.detach()).clone()
    if t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous():
        new = new.contiguous(memory_format=torch.channels_last)
    setattr(m, name, nn.Parameter(new, requires_grad=t.requires_grad) if isinstance(t, nn.Parameter) else new)


def _cut_layer(m: Any, layer: Layer, layouts: Layouts) -> None:
    ins, outs = layouts.inputs(layer), layouts.of[layer.node].reshape(-1)
    if all(np.array_equal(a, np.arange(n)) for a, n in ((ins, layer.ins.ids.size), (outs, layer.outs.ids.size))):
        return
    rows = _index(outs, m)
    if isinstance(m, nn.Linear):
        cols = _index(ins, m)
        _take(m, "weight", lambda w: w[rows][:, cols])
        _take(m, "bias", lambda b: b[rows])
        m.in_features, m.out_features = len(ins), len(outs)
        return
    cg, og = layer.reads.shape[1], layer.outs.ids.size // layer.groups
    groups = [int(g) for i, g in enumerate(ins // cg) if i == 0 or g != ins[i - 1] // cg]
    per_in, per_out = ins.reshape(len(groups), -1) % cg, outs.reshape(len(groups), -1) % og
    transposed = isinstance(m, nn.modules.conv._ConvTransposeNd)
    w = filters(m, layer.groups)
    if cg == og == 1:  # depthwise: one by one would be slow
        stacked = w[_index(np.array(groups), m)]
    else:
        parts = [w[g][_index(o, m)][:, _index(i, m)] for g, o, i in zip(groups, per_out, per_in, strict=True)]
        stacked = torch.stack(parts)
    new = (stacked.transpose(1, 2) if transposed else stacked).flatten(0, 1)
    _take(m, "weight", lambda _: new)
    _take(m, "bias", lambda b: b[rows])
    m.in_channels, m.out_channels, m.groups = len(ins), len(outs), len(groups)


def edit_graph(layouts: Layouts) -> None:
    """Arguments that count channels count those that stay; additions of constants become biases."""
    edits = {
        "view": _edit_view,
        "expand": _edit_expand,
        "slice": _edit_slice,
        "pad": _edit_pad,
        "split": _edit_split,
        "attention": _edit_attention,
    }
    for node in list(layouts.analysis.module.graph.nodes):
        kind = layouts.analysis.edits.get(node, "")
        if node in layouts.analysis.elided:
            _elide(layouts, node)
        elif kind in edits and (node in layouts.of or node in layouts.parts):
            edits[kind](layouts, node)


def _swap(layouts: Layouts, node: fx.Node, target: Any, args: tuple[Any, ...]) -> None:
    """Put another function in the place of `node`."""
    analysis = layouts.analysis
    with analysis.module.graph.inserting_before(node):
        new = analysis.module.graph.call_function(target, args)
    tables: tuple[dict[fx.Node, Any], ...] = (
        analysis.shapes,
        analysis.facts,
        analysis.sources,
        analysis.parts,
        layouts.of,
    )
    for known in tables:
        if node in known:
            known[new] = known[node]
    node.replace_all_uses_with(new)
    analysis.module.graph.erase_node(node)


def _edit_view(layouts: Layouts, node: fx.Node) -> None:
    analysis = layouts.analysis
    sizes = analysis.view_sizes(node)
    counts = layouts.args.get(node, {})
    args: Any = node.args
    if sizes is None:
        if counts and analysis._kind(node) in ("unflatten", "Unflatten"):
            source = analysis._source(node)
            shape = [counts.get(d, -1 if d == 0 else n) for d, n in enumerate(analysis.shapes[node])]
            _swap(layouts, node, torch.reshape, (source, tuple(shape)))
        return
    source = analysis._source(node)
    before, after = analysis.shapes[source], analysis.shapes[node]
    if len(after) == 2 and len(before) > 2 and before[0] == after[0] and analysis._varies(node) <= {0}:
        _swap(layouts, node, torch.flatten, (source, 1))  # for any batch and map size, however the sizes were computed
        return
    if not counts and not _computed(layouts, node, sizes, after):
        return
    if len(sizes) != len(after):  # one node that holds all sizes
        whole = sizes[0]
        with analysis.module.graph.inserting_before(node):
            sizes = [
                counts[d] if d in counts else analysis.module.graph.call_function(operator.getitem, (whole, d))
                for d in range(len(after))
            ]
    tracked = axes_of(analysis.facts[node].ids)
    for d in tracked:
        if sizes[d] != -1:
            sizes[d] = layouts.of[node].shape[d]
    node.args, node.kwargs = (args[0] if args else source, tuple(sizes)), {}


def _computed(layouts: Layouts, node: fx.Node, sizes: list[Any], after: Any) -> bool:
    """Whether a size along which channels lie is computed, from a tensor that may have lost others."""
    if len(sizes) != len(after):
        return False
    return any(isinstance(sizes[d], fx.Node) for d in axes_of(layouts.analysis.facts[node].ids))


def _edit_expand(layouts: Layouts, node: fx.Node) -> None:
    args: Any = node.args
    if operation(node) != "expand":
        return
    sizes = args[1:] if len(args) > 1 else (node.kwargs.get("size"),)
    sizes = list(sizes[0] if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes)
    tracked = axes_of(layouts.analysis.facts[node].ids)
    if tracked and len(sizes) == layouts.analysis.facts[node].ids.ndim:
        for d in tracked:
            sizes[d] = -1
        node.args, node.kwargs = (args[0], tuple(sizes)), {}


def _edit_slice(layouts: Layouts, node: fx.Node) -> None:
    if node in layouts.args:
        node.args = (node.args[0], layouts.args[node])


def _edit_pad(layouts: Layouts, node: fx.Node) -> None:
    analysis = layouts.analysis
    source = analysis._source(node)
    facts = analysis.facts[node]
    d, rank = axes_of(facts.ids)[0], facts.ids.ndim
    if node.op == "call_module":
        m: Any = analysis.module.get_submodule(str(node.target))
        pad, fill = list(m.padding), m.value
    else:
        chosen = given(node, "input", "pad", "mode", "value")
        pad, fill = list(chosen["pad"]), chosen.get("value") or 0.0
    at = 2 * (rank - 1 - d)
    pad[at : at + 2] = list(layouts.args[node])
    _swap(layouts, node, F.pad, (source, tuple(pad), "constant", fill))


def _edit_split(layouts: Layouts, node: fx.Node) -> None:
    if node in layouts.args:
        sizes, dim = layouts.args[node]
        layouts.analysis.edits.pop(node)
        _swap(layouts, node, torch.split, (layouts.analysis._source(node), sizes, dim))


def _edit_attention(layouts: Layouts, node: fx.Node) -> None:
    """The scale is that of the heads as they were."""
    chosen = given(node, "query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    if node in layouts.args and chosen.get("scale") is None:
        node.kwargs = {**node.kwargs, "scale": float(layouts.args[node]) ** -0.5}
        node.args = node.args[:6]


def _elide(layouts: Layouts, node: fx.Node) -> None:
    """An addition of a constant: nothing, a bias of what made the other operand, or a ChannelBias."""
    analysis = layouts.analysis
    which, constant = analysis.elided[node]
    graph, root = analysis.module.graph, analysis.module
    stays = node.args[1 - which]
    assert isinstance(stays, fx.Node)
    constant = constant[layouts.of[node].reshape(-1)] if node in layouts.of else constant
    if constant.any():
        maker = root.get_submodule(str(stays.target)) if stays.op == "call_module" else None
        alone = len(stays.users) == 1 and (stays in analysis.layers or stays in analysis.norms)
        place = getattr(maker, "bias", None) if alone or type(maker).__name__ == "ChannelBias" else None
        if place is not None and len(stays.users) == 1:
            with torch.no_grad():
                place.detach().add_(torch.from_numpy(constant).to(place))
        else:
            like = next(t for t in (*root.parameters(), *analysis.traced.inputs) if t.is_floating_point())
            dim = next(iter(axes_of(analysis.facts[node].ids)), 1)
            layer = ChannelBias(torch.from_numpy(constant).to(like), dim).train(root.training)
            name = f"{node.name}_bias"
            root.add_submodule(name, layer)
            with graph.inserting_before(node):
                new = graph.call_module(name, (stays,))
            stays = new
    node.replace_all_uses_with(stays)
    graph.erase_node(node)
