"""Cutting a traced network to its layouts: parameters, and the arguments of the graph that count channels."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .layout import Layouts
from .nn import ChannelBias
from .recurrent import Recurrent, pieces
from .tracking import Ints, Layer, axes_of, given, operation

# Attributes by which modules count the channels of their parameters.
_COUNTS = ("num_features", "num_channels", "num_parameters")


@dataclass(frozen=True)
class Kept:
    """Which entries of a tensor are left: `along` dimension `axis`, and then along dimension 1 ([n], or [rows, n] where
    it differs from row to row)."""

    along: Tensor
    dim1: Tensor | None = None
    axis: int = 0

    def take(self, t: Tensor) -> Tensor:
        t = t.index_select(self.axis, self.along.to(t.device))
        if self.dim1 is None:
            return t
        index = self.dim1.to(t.device)
        if index.dim() == 1:
            return t[:, index]
        index = index.reshape(*index.shape, *[1] * (t.dim() - 2)).expand(-1, -1, *t.shape[2:])
        return torch.take_along_dim(t, index, 1)


def cut(layouts: Layouts) -> dict[str, Kept]:
    """Cut the parameters to the channels that stay, in place. Returns what is left of those that were cut, by name."""
    analysis = layouts.analysis
    root = analysis.module
    shears = _Shears()
    m: Any
    for node, layer in analysis.layers.items():
        if node in layouts.of:
            _cut_layer(str(node.target), root.get_submodule(str(node.target)), layer, layouts, shears)
    for node, recurrent in analysis.recurrent.items():
        if node in layouts.of:
            units = layouts.of[node][:, 0] % recurrent.outs.ids.shape[-1]
            m = root.get_submodule(str(node.target))
            _cut_recurrent(str(node.target), m, recurrent, layouts.inputs(recurrent), units, shears)
    for node in (*analysis.norms, *analysis.affine):
        if node in layouts.of:
            m = root.get_submodule(str(node.target))
            order = layouts.of[node].reshape(-1)
            if order.size == analysis.facts[node].ids.size and np.array_equal(order, np.arange(order.size)):
                continue
            if isinstance(m, nn.GroupNorm):
                m.num_groups = order.size // (m.num_channels // m.num_groups)
            for name in _COUNTS:
                if hasattr(m, name):
                    setattr(m, name, len(order))
            for name in ("weight", "bias", "running_mean", "running_var"):
                if getattr(m, name, None) is not None:
                    shears.take(m, f"{node.target}.{name}", Kept(torch.from_numpy(np.ascontiguousarray(order))))
    for node, axis in analysis.tables.items():
        if node in layouts.of and layouts.of[node].size < analysis.facts[node].ids.size:
            path = f"{node.target}.weight" if node.op == "call_module" else str(node.target)
            owner: Any = root.get_submodule(path.rpartition(".")[0])
            left = torch.from_numpy(np.ascontiguousarray(layouts.of[node].reshape(-1)))
            if node.op == "call_module":
                owner.embedding_dim = len(left)
            shears.take(owner, path, Kept(left, axis=axis))
    return shears.kept


class _Shears:
    """Cuts each tensor once, under whichever names and from however many places it is used, so what was tied stays
    tied. kept: what is left of each, by name."""

    def __init__(self) -> None:
        self.kept: dict[str, Kept] = {}
        # A tensor before or after the cut, by its id -> the one after it.
        self._after: dict[int, Tensor] = {}
        self._before: list[Tensor] = []  # alive, so that no other tensor gets the id of one of them

    def take(self, m: nn.Module, path: str, which: Kept) -> None:
        name = path.rpartition(".")[2]
        t = getattr(m, name)
        if t is None:
            return
        if id(t) not in self._after:
            new = which.take(t.detach()).clone()
            if t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous():
                new = new.contiguous(memory_format=torch.channels_last)
            new = nn.Parameter(new, requires_grad=t.requires_grad) if isinstance(t, nn.Parameter) else new
            self._before.append(t)
            self._after[id(t)] = self._after[id(new)] = new
        setattr(m, name, self._after[id(t)])
        self.kept[path] = which


def _cut_layer(name: str, m: Any, layer: Layer, layouts: Layouts, shears: _Shears) -> None:
    ins, outs = layouts.inputs(layer), layouts.of[layer.node].reshape(-1)
    if all(np.array_equal(a, np.arange(n)) for a, n in ((ins, layer.ins.ids.size), (outs, layer.outs.ids.size))):
        return
    rows = Kept(torch.from_numpy(outs))
    cg, og = layer.reads.shape[1], layer.outs.ids.size // layer.groups
    groups = [g for i, g in enumerate(ins // cg) if i == 0 or g != ins[i - 1] // cg]
    # What each filter reads, or in a transposed convolution which filters read each channel.
    transposed = isinstance(m, nn.modules.conv._ConvTransposeNd)
    first, second, size = (ins, outs, og) if transposed else (outs, ins, cg)
    inner = np.ascontiguousarray((second % size).reshape(len(groups), -1))
    inner = np.repeat(inner, len(first) // len(groups), 0) if layer.groups > 1 else inner[0]
    shears.take(m, f"{name}.weight", Kept(torch.from_numpy(np.ascontiguousarray(first)), torch.from_numpy(inner)))
    if m.bias is not None:
        shears.take(m, f"{name}.bias", rows)
    if isinstance(m, nn.Linear):
        m.in_features, m.out_features = len(ins), len(outs)
    else:
        m.in_channels, m.out_channels, m.groups = len(ins), len(outs), len(groups)


def _cut_recurrent(name: str, m: Any, layer: Recurrent, ins: Ints, units: Ints, shears: _Shears) -> None:
    if units.size == layer.outs.ids.size and np.array_equal(ins, np.arange(layer.ins.ids.size)):
        return
    for parameter, rows, columns in pieces(layer, ins, units):
        shears.take(m, f"{name}.{parameter}", Kept(rows, columns))
    m.input_size, m.hidden_size = len(ins), units.shape[1]
    m.flatten_parameters()


def edit_graph(layouts: Layouts, kept: dict[str, Kept]) -> None:
    """Arguments that count channels count those that stay; additions of constants become biases. kept: from `cut`, gets
    biases that layers are given."""
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
            _elide(layouts, node, kept)
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
    # The source may be new, in the place of an addition; its shape is that of the one before.
    before, after = analysis.shapes[analysis.sources[node][0][0]], analysis.shapes[node]
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


def _elide(layouts: Layouts, node: fx.Node, kept: dict[str, Kept]) -> None:
    """An addition of a constant: nothing, a bias of what made the other operand, or a ChannelBias."""
    analysis = layouts.analysis
    which, constant = analysis.elided[node]
    graph, root = analysis.module.graph, analysis.module
    stays = node.args[1 - which]
    assert isinstance(stays, fx.Node)
    constant = constant[layouts.of[node].reshape(-1)] if node in layouts.of else constant
    if constant.any():
        maker: Any = root.get_submodule(str(stays.target)) if stays.op == "call_module" else None
        alone = len(stays.users) == 1 and analysis.alone(stays, "bias")
        makes = stays in analysis.layers or stays in analysis.norms or type(maker).__name__ == "ChannelBias"
        place = getattr(maker, "bias", None) if alone and makes else None
        if place is not None:
            with torch.no_grad():
                place.detach().add_(torch.from_numpy(constant).to(place))
        elif alone and stays in analysis.layers:
            bias = torch.from_numpy(constant).to(maker.weight)
            maker.bias = nn.Parameter(bias, requires_grad=maker.weight.requires_grad)
            # A bias that the forward computed with and that was taken out of its layer is there again, by its name.
            kept[f"{stays.target}.bias"] = Kept(torch.from_numpy(layouts.of[stays].reshape(-1)))
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
