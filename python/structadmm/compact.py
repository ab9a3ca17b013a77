"""From a network with zeros to a smaller one that computes the same: channels cut out, columns compacted, verified.

`compact` traces, analyses (channels.py), folds constants (paths.py), cuts every layer to the channels that stay, turns
layers whose remaining weights are sparse by columns or block-columns into structadmm.nn layers, and compares the result
with the input.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .analysis import Analysis
from .channels import Bools, Facts, Layer, given
from .errors import CompactError
from .nn import ChannelBias, CompactConv2d, CompactLinear
from .paths import assert_same, check_weights, fold, remarks_text, render, tolerance_for
from .trace import Traced, clone, rebatch, trace

COLUMNS = ("auto", "always", "never")

# Measured on AVX-512, one thread, 3x3 and 1x1 layers of 8 to 128 channels on maps of 4 to 32, batch 1 and 16: at a
# stored density of 0.85 the compacted kernel takes from 0.4 to 1.5 of the dense one's time, at 0.7 from 0.1 to 1.3, so
# at 0.8 it rarely loses. Below 4096 multiply-adds a call is all overhead, and the dense one's is smaller (7 and 11 us).
MAX_DENSITY = 0.8
MIN_WORK = 4096


@dataclass
class LayerReport:
    """One convolution or linear layer before and after. Weights are stored weights; multiply-adds are per sample of the
    example."""

    name: str
    kind: str
    shape_before: tuple[int, ...]
    shape_after: tuple[int, ...] | None
    weights_before: int
    weights_nonzero: int
    weights_after: int
    macs_before: int
    macs_after: int


@dataclass
class CompactReport:
    """What compact did. shape_after None: the layer is gone. notes: layer -> {reason why a filter without effect stays:
    how many}.

    whole: operation left whole -> reason. remarks: anything else to know. max_abs_diff, max_rel_diff: largest
    difference from the input network on a probe batch, and relative to its largest output (None when not verified).
    """

    layers: list[LayerReport]
    notes: dict[str, dict[str, int]] = field(default_factory=dict)
    whole: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    max_abs_diff: float | None = None
    max_rel_diff: float | None = None

    def _sum(self, name: str) -> int:
        return sum(getattr(r, name) for r in self.layers)

    @property
    def weights_before(self) -> int:
        return self._sum("weights_before")

    @property
    def weights_after(self) -> int:
        return self._sum("weights_after")

    @property
    def macs_before(self) -> int:
        return self._sum("macs_before")

    @property
    def macs_after(self) -> int:
        return self._sum("macs_after")

    def to_dict(self) -> dict[str, Any]:
        totals = ("weights_before", "weights_after", "macs_before", "macs_after")
        return asdict(self) | {name: getattr(self, name) for name in totals}

    def __str__(self) -> str:
        def shape(s: tuple[int, ...] | None) -> str:
            return "gone" if s is None else "x".join(map(str, s))

        rows = [
            (
                r.name,
                r.kind,
                shape(r.shape_before),
                shape(r.shape_after),
                f"{r.weights_before:,}",
                f"{r.weights_nonzero:,}",
                f"{r.weights_after:,}",
                f"{r.macs_before:,}",
                f"{r.macs_after:,}",
            )
            for r in self.layers
        ]
        sums = [
            f"{self._sum(n):,}"
            for n in ("weights_before", "weights_nonzero", "weights_after", "macs_before", "macs_after")
        ]
        head = ("layer", "kind", "shape", "compact", "weights", "nonzero", "stored", "multiply-adds", "compact")
        text = render("Compacted", head, rows, ("all", "", "", "", *sums))
        text += remarks_text(self.notes, self.whole, self.remarks)
        if self.max_abs_diff is not None:
            text += f"largest difference from the input network: {self.max_abs_diff:.3g}, "
            text += f"{self.max_rel_diff:.3g} of the largest output\n"
        return text


def compact(
    model: nn.Module,
    example: Tensor | Sequence[Tensor],
    columns: str = "auto",
    verify: bool = True,
    tolerance: float | None = None,
) -> fx.GraphModule:
    """A smaller network that computes what `model` computes in eval mode, zeros used up.

    model: any module that torch.fx traces, with zeros in its weights, however they came. It is left as it is. example:
    a tensor or a tuple of tensors as the model takes them, batch first; the result takes any batch size. columns: what
    becomes of zero columns and block-columns that remain in the smaller layers. "auto": CompactConv2d or CompactLinear
    where
        the stored density is at most 0.8 and there is enough work; "always": wherever a column is zero; "never":
    ordinary layers only. verify: compare with `model` in eval mode on random inputs of the example's shape, at another
    batch size. tolerance: largest difference allowed, times the larger of 1 and the largest output. Default: 1e-4 in
    float32, 1e-10 in float64.

    Returns a torch.fx.GraphModule of ordinary layers and structadmm.nn layers under the model's own attribute paths. It
    trains, copies and pickles; flags (train/eval, requires_grad) are the model's. `result.report` is a CompactReport;
    print it.

    Raises TraceError where the model can't be traced, CompactError for weights that are not finite or a result that
    differs. Warns of hooks, which are not carried over.
    """
    if columns not in COLUMNS:
        raise CompactError(f"compact: columns got {columns!r}, wanted one of {', '.join(COLUMNS)}")
    check_weights(model, "compact")
    traced = trace(model, example, "compact")
    _densify(traced.module)
    for note in traced.notes:
        if "hooks" in note:
            warnings.warn(f"compact: {note}", stacklevel=2)
    report = CompactReport(_layer_rows(traced), remarks=traced.notes)
    analysis = Analysis(traced)
    report.notes, report.whole = analysis.notes(), analysis.whole
    dense = copy.deepcopy(traced.module).to("meta")

    small = traced.module
    fold(analysis, small)
    _cut(analysis)
    _edit_graph(analysis)
    small.graph.eliminate_dead_code()
    small.graph.lint()
    small.delete_all_unused_submodules()
    small.recompile()
    positions = _positions(traced)
    if columns != "never":
        _compact_columns(small, positions, _origins(analysis), columns == "always")
    _fill_rows(report, small, positions)

    if verify:
        batch = traced.inputs[0].shape[0] if traced.inputs[0].dim() else 1
        if traced.batch != batch:  # the probe batch of the trace went through, so another one will
            batch = 5 if batch == 4 else 4
        probe = rebatch(traced.inputs, batch, seed=0)
        limit = tolerance_for(model, tolerance)
        report.max_abs_diff, report.max_rel_diff = assert_same("compact", clone(model), small, probe, limit)
    preserve_report(small, report)
    # For save: what the network takes, and the structure (no values) that it is compared with.
    small.meta["structadmm"] = {
        "inputs": [((None, *t.shape[1:]), t.dtype) for t in traced.inputs],
        "original": _original(model) or dense,
    }
    return small


def _original(model: nn.Module) -> Any:
    """What a network that was compacted before was compacted from."""
    return model.meta.get("structadmm", {}).get("original") if isinstance(model, fx.GraphModule) else None


# torch.fx's name for attributes that copies of a GraphModule keep.
_PRESERVED = "_user_preserved_attributes"


def preserve_report(network: fx.GraphModule, report: Any) -> None:
    """Make `report` the network's, so that copies keep it."""
    network.report = report
    network.meta[_PRESERVED] = {"report": report}


def _densify(module: fx.GraphModule) -> None:
    """Layers compacted before become dense again, to be analysed and compacted anew."""
    for name, m in list(module.named_modules()):
        if hasattr(m, "to_dense") and type(m).__module__ == "structadmm.nn":
            layer = m.to_dense().train(m.training)
            layer.requires_grad_(m.weight.requires_grad)
            _replace(module, name, layer)


def _replace(root: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, layer)


def _positions(traced: Traced) -> dict[str, int]:
    """Convolutions and linear layers of the graph: output positions per sample, at each of which a weight is used
    once."""
    out: dict[str, int] = {}
    for node in traced.module.graph.nodes:
        if node.op == "call_module":
            conv = isinstance(traced.module.get_submodule(node.target), nn.modules.conv._ConvNd)
            if conv or isinstance(traced.module.get_submodule(node.target), nn.Linear):
                shape = traced.shapes[node]
                out[node.target] = out.get(node.target, 0) + math.prod(shape[2:] if conv else shape[1:-1])
    return out


def _layer_rows(traced: Traced) -> list[LayerReport]:
    rows = []
    for name, positions in _positions(traced).items():
        m: Any = traced.module.get_submodule(name)
        w = m.weight.detach()
        nonzero = int(torch.count_nonzero(w))
        rows.append(
            LayerReport(name, type(m).__name__, tuple(w.shape), None, w.numel(), nonzero, 0, w.numel() * positions, 0)
        )
    return rows


def _fill_rows(report: CompactReport, small: fx.GraphModule, positions: dict[str, int]) -> None:
    """Complete the rows of the layers that are still there, and forget the notes on those that are not."""
    for row in report.layers:
        if row.name in positions:
            m: Any = small.get_submodule(row.name)
            row.kind = type(m).__name__
            row.shape_after = tuple((m.dense_weight() if hasattr(m, "to_dense") else m.weight).shape)
            row.weights_after = m.weight.numel()
            row.macs_after = row.weights_after * positions[row.name]
    report.notes = {name: note for name, note in report.notes.items() if name in positions}


def _cut(analysis: Analysis) -> None:
    """Cut the layers to the channels that stay, in place."""
    live = analysis.live_nodes()
    root = analysis.module
    for node, layer in analysis.layers.items():
        if node in live:
            _cut_layer(root.get_submodule(str(node.target)), layer, analysis)
    for node in analysis.norms:
        if node in live:
            m: Any = root.get_submodule(str(node.target))
            keep = _index(analysis.keep(analysis.facts[node].ids).reshape(-1), m)
            m.num_features = len(keep)
            for name in ("weight", "bias", "running_mean", "running_var"):
                _take(m, name, lambda t, keep=keep: t[keep])


def _index(keep: Bools, m: nn.Module) -> Tensor:
    device = next((t.device for t in (*m.parameters(), *m.buffers())), torch.device("cpu"))
    return torch.from_numpy(np.flatnonzero(keep)).to(device)


def _take(m: nn.Module, name: str, take: Any) -> None:
    t = getattr(m, name)
    if t is None:
        return
    new = take(t.detach()).clone()
    if t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous():
        new = new.contiguous(memory_format=torch.channels_last)
    setattr(m, name, nn.Parameter(new, requires_grad=t.requires_grad) if isinstance(t, nn.Parameter) else new)


def _cut_layer(m: Any, layer: Layer, analysis: Analysis) -> None:
    ins, outs = analysis.keep(layer.ins.ids), analysis.keep(layer.outs.ids)
    if ins.all() and outs.all():
        return
    if isinstance(m, nn.Linear):
        rows, cols = _index(outs, m), _index(ins, m)
        _take(m, "weight", lambda w: w[rows][:, cols])
        _take(m, "bias", lambda b: b[rows])
        m.in_features, m.out_features = len(cols), len(rows)
        return
    per_in, per_out = ins.reshape(layer.groups, -1), outs.reshape(layer.groups, -1)
    stay = np.flatnonzero(per_in.any(1) | per_out.any(1))
    width = per_out.shape[1]

    def take(w: Tensor) -> Tensor:
        # Conv groups that stay are of one size by the analysis' repair.
        return torch.cat([w[g * width : (g + 1) * width][_index(per_out[g], m)][:, _index(per_in[g], m)] for g in stay])

    _take(m, "weight", take)
    rows = _index(outs, m)
    _take(m, "bias", lambda b: b[rows])
    m.in_channels, m.out_channels, m.groups = int(ins.sum()), int(outs.sum()), len(stay)


def _axis(facts: Facts) -> int:
    """The one dimension that the channels lie along."""
    return next((d for d, n in enumerate(facts.ids.shape) if n > 1), 1)


def _edit_graph(analysis: Analysis) -> None:
    """Arguments that count channels count those that stay; additions of constants become biases."""
    graph = analysis.module.graph
    for node in list(graph.nodes):
        if node in analysis.elided:
            _elide(analysis, node)
        elif analysis.edits.get(node) == "view":
            _edit_view(analysis, node)
        elif analysis.edits.get(node) == "slice":
            _edit_slice(analysis, node)
        elif analysis.edits.get(node) == "pad":
            _edit_pad(analysis, node)
        elif analysis.edits.get(node) == "split":
            _edit_split(analysis, node)


def _swap(analysis: Analysis, node: fx.Node, target: Any, args: tuple[Any, ...]) -> None:
    """Put another function in the place of `node`."""
    with analysis.module.graph.inserting_before(node):
        new = analysis.module.graph.call_function(target, args)
    tables: tuple[dict[fx.Node, Any], ...] = (analysis.shapes, analysis.facts, analysis.sources, analysis.parts)
    for known in tables:
        if node in known:
            known[new] = known[node]
    node.replace_all_uses_with(new)
    analysis.module.graph.erase_node(node)


def _edit_view(analysis: Analysis, node: fx.Node) -> None:
    if node.target not in ("view", "reshape", torch.reshape):
        return
    args: Any = node.args
    source, facts = args[0], analysis.facts[node]
    shape = analysis.shapes[node]
    if len(shape) == 2 and len(analysis.shapes[source]) > 2:
        _swap(analysis, node, torch.flatten, (source, 1))  # for any batch and map size, however the sizes were computed
        return
    keep = analysis.keep(facts.ids).reshape(-1)
    sizes: Any = node.args[1:] if len(node.args) > 1 else (node.kwargs.get("shape", node.kwargs.get("size")),)
    if keep.all() or len(sizes) == 1 and isinstance(sizes[0], fx.Node):
        return
    sizes = list(sizes[0] if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes)
    d = _axis(facts)
    if sizes[d] != -1:
        sizes[d] = int(keep.sum())
    node.args, node.kwargs = (source, tuple(sizes)), {}


def _edit_slice(analysis: Analysis, node: fx.Node) -> None:
    args: Any = node.args
    source, index = args
    facts = analysis.facts[source]
    d = _axis(facts)
    n = facts.ids.shape[d]
    keep = analysis.keep(facts.ids).reshape(-1)
    if n == 1 or keep.all():
        return
    entries = list(index) if isinstance(index, tuple) else [index]
    if any(e is Ellipsis for e in entries):
        at = next(i for i, e in enumerate(entries) if e is Ellipsis)
        used = sum(e is not None and e is not Ellipsis for e in entries)
        entries[at : at + 1] = [slice(None)] * (facts.ids.ndim - used)
    places = [i for i, e in enumerate(entries) if e is not None]
    if d >= len(places):
        return
    taken = range(n)[entries[places[d]]]
    if len(taken) == n:
        return
    start = int(keep[: taken.start].sum())
    entries[places[d]] = slice(start, start + int(keep[taken.start : taken.stop].sum()))
    node.args = (source, tuple(entries))


def _edit_pad(analysis: Analysis, node: fx.Node) -> None:
    source, positions, _ = analysis.sources[node][0]
    facts = analysis.facts[node]
    d, rank = _axis(facts), facts.ids.ndim
    if node.op == "call_module":
        m: Any = analysis.module.get_submodule(str(node.target))
        pad, fill = list(m.padding), m.value
    else:
        chosen = given(node, "input", "pad", "mode", "value")
        pad, fill = list(chosen["pad"]), chosen.get("value") or 0.0
    keep = analysis.keep(facts.ids).reshape(-1)
    old = positions.reshape(-1) >= 0
    first, last = int(old.argmax()), len(old) - int(old[::-1].argmax())
    at = 2 * (rank - 1 - d)
    pad[at : at + 2] = [int(keep[:first].sum()), int(keep[last:].sum())]
    _swap(analysis, node, F.pad, (source, tuple(pad), "constant", fill))


def _edit_split(analysis: Analysis, node: fx.Node) -> None:
    source, parts = analysis.parts[node]
    facts = analysis.facts[source]
    keep = analysis.keep(facts.ids).reshape(-1)
    if not keep.all():
        _swap(analysis, node, torch.split, (source, [int(keep[p.reshape(-1)].sum()) for p in parts], _axis(facts)))


def _elide(analysis: Analysis, node: fx.Node) -> None:
    """An addition of a constant: nothing, a bias of what made the other operand, or a ChannelBias."""
    which, constant = analysis.elided[node]
    graph, root = analysis.module.graph, analysis.module
    facts = analysis.facts[node]
    constant = constant[analysis.keep(facts.ids).reshape(-1)]
    stays = node.args[1 - which]
    assert isinstance(stays, fx.Node)
    if constant.any():
        maker = root.get_submodule(str(stays.target)) if stays.op == "call_module" else None
        alone = len(stays.users) == 1 and (stays in analysis.layers or stays in analysis.norms)
        place = getattr(maker, "bias", None) if alone or type(maker).__name__ == "ChannelBias" else None
        if place is not None and len(stays.users) == 1:
            with torch.no_grad():
                place.detach().add_(torch.from_numpy(constant).to(place))
        else:
            like = next(t for t in (*root.parameters(), *analysis.traced.inputs) if t.is_floating_point())
            layer = ChannelBias(torch.from_numpy(constant).to(like), _axis(facts)).train(root.training)
            name = f"{node.name}_bias"
            root.add_submodule(name, layer)
            with graph.inserting_before(node):
                new = graph.call_module(name, (stays,))
            stays = new
    node.replace_all_uses_with(stays)
    graph.erase_node(node)


def _origins(analysis: Analysis) -> dict[str, Tensor]:
    """Per layer that was cut: the numbers that its filters had within their conv group."""
    out = {}
    for node, layer in analysis.layers.items():
        n = layer.outs.ids.size
        out[str(node.target)] = torch.from_numpy(np.flatnonzero(analysis.keep(layer.outs.ids)) % (n // layer.groups))
    return out


def _compact_columns(
    small: fx.GraphModule, positions: dict[str, int], origins: dict[str, Tensor], always: bool
) -> None:
    """Layers whose zero columns or block-columns pay become CompactConv2d and CompactLinear."""
    for name, count in positions.items():
        m: Any = small.get_submodule(name)
        if (
            type(m) is nn.Conv2d
            and m.padding_mode == "zeros"
            and (m.groups == 1 or m.weight.shape[1] > 1)  # depthwise has no columns to share
            and not isinstance(m.padding, str)
        ):
            make: Any = CompactConv2d
        elif type(m) is nn.Linear:
            make = CompactLinear
        else:
            continue
        if m.weight.dtype != torch.float32 or (m.weight != 0).all():
            continue
        layer = make.from_dense(m, origin=origins.get(name))
        stored, full = layer.weight.numel(), m.weight.numel()
        work = stored * count
        if stored < full and (always or (stored <= MAX_DENSITY * full and work >= MIN_WORK)):
            layer.train(m.training)
            _replace(small, name, layer)
