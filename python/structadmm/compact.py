"""From a network with zeros to a smaller one that computes the same: channels cut out, columns compacted, verified.

`compact` traces, analyses (analysis.py), finds the order of what stays (layout.py), folds constants (paths.py), cuts
every layer to it (rewrite.py), turns layers whose remaining weights are sparse by columns or block-columns into
structadmm.nn layers, and compares the result with the input.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from .analysis import Analysis
from .carry import tensors_of
from .copies import clone, hollow, own
from .errors import CompactError, TraceError
from .layout import Layouts, settle
from .nn import CompactConv2d, CompactLinear
from .paths import assert_same, check_weights, fold, remarks_text, render, tolerance_for
from .recurrent import RECURRENT, matrices
from .rewrite import Kept, cut, edit_graph
from .symbolic import first_line
from .trace import Shape, Traced, as_inputs, rebatch, trace
from .tracking import attribute

COLUMNS = ("auto", "always", "never")

# Measured on AVX-512, one thread, 3x3 and 1x1 layers of 8 to 128 channels on maps of 4 to 32, batch 1 and 16: at a
# stored density of 0.85 the compacted kernel takes from 0.4 to 1.5 of the dense one's time, at 0.7 from 0.1 to 1.3, so
# at 0.8 it rarely loses. Below 4096 multiply-adds a call is all overhead, and the dense one's is smaller (7 and 11 us).
MAX_DENSITY = 0.8
MIN_WORK = 4096


@dataclass
class LayerReport:
    """One convolution, linear or recurrent layer before and after. Weights are stored weights; multiply-adds are per
    sample of the example. The shape is that of the weight, of a recurrent layer that of the first weight_ih."""

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
    data_abs_diff, data_rel_diff: the same on the data given to `verify`.
    """

    layers: list[LayerReport]
    notes: dict[str, dict[str, int]] = field(default_factory=dict)
    whole: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    max_abs_diff: float | None = None
    max_rel_diff: float | None = None
    data_abs_diff: float | None = None
    data_rel_diff: float | None = None

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
        differences = (("", self.max_abs_diff, self.max_rel_diff), (" on data", self.data_abs_diff, self.data_rel_diff))
        for where, absolute, relative in differences:
            if absolute is not None:
                text += f"largest difference from the input network{where}: {absolute:.3g}, "
                text += f"{relative:.3g} of the largest output\n"
        return text


def compact(
    model: nn.Module,
    example: Tensor | Sequence[Tensor],
    columns: str = "auto",
    verify: bool | Tensor | Sequence[Tensor] = True,
    tolerance: float | None = None,
    round_to: int = 1,
) -> fx.GraphModule:
    """A smaller network that computes what `model` computes in eval mode, zeros used up.

    model: any module that torch.fx or torch.export follows, with zeros in its weights, however they came. It is left as
    it is. example: a tensor or a tuple of tensors as the model takes them, batch first; the result takes any batch
    size. columns: what becomes of zero columns and block-columns that remain in the smaller layers. "auto":
    CompactConv2d or CompactLinear where the stored density is at most 0.8 and there is enough work; "always": wherever
    a column is zero; "never": ordinary layers only. verify: compare with `model` in eval mode on random inputs of the
    example's shape, at another batch size; a tensor or a tuple of tensors as the model takes them: on this data too.
    tolerance: largest difference allowed, times the larger of 1 and the largest output. Default: 1e-4 in float32, 1e-10
    in float64. round_to: layers keep a multiple of so many filters, or all; the additional ones are zero: dense kernels
    are slow at odd widths.

    Returns a torch.fx.GraphModule of ordinary layers and structadmm.nn layers under the model's own attribute paths. It
    trains, copies and pickles; flags (train/eval, requires_grad) are the model's. `result.report` is a CompactReport;
    print it. Attention modules of torch are taken apart where their arguments allow: `attn.in_proj_weight` is then
    `attn.in_proj.weight`. Optimizer state follows with carry_state.

    Raises TraceError where the model can't be traced, CompactError for weights that are not finite or a result that
    differs. Warns of hooks, which are not carried over.
    """
    if type(round_to) is not int or round_to < 1:
        raise CompactError(f"compact: round_to got {round_to!r}, wanted an integer of at least 1")
    if columns not in COLUMNS:
        raise CompactError(f"compact: columns got {columns!r}, wanted one of {', '.join(COLUMNS)}")
    check_weights(model, "compact")
    data = None if isinstance(verify, bool) else as_inputs(model, verify, "compact", "verify")
    traced = trace(model, example, "compact", unpacked=True, share=True)
    if data is not None and len(data) != len(traced.inputs):
        raise TraceError(f"compact: verify got {len(data)} tensors, wanted {len(traced.inputs)} as example")
    _densify(traced.module)
    for note in traced.notes:
        if "hooks" in note:
            warnings.warn(f"compact: {note}", stacklevel=2)
    report = CompactReport(_layer_rows(traced), remarks=traced.notes)
    analysis = Analysis(traced)
    layouts = settle(analysis, round_to)
    report.notes, report.whole = analysis.notes(), analysis.whole
    dense = hollow(traced.module)

    small = traced.module
    before = {name: t.detach() for name, t in small.named_parameters(remove_duplicate=False)}  # the model's memory
    before |= {name: t.clone() for name, t in small.named_buffers()}
    own(small)
    fold(analysis, small)
    kept = cut(layouts)
    edit_graph(layouts, kept)
    small.graph.eliminate_dead_code()
    small.graph.lint()
    small.delete_all_unused_submodules()
    _drop_unread(small)
    small.recompile()
    folded = _folded(before, small, kept)
    positions = _positions(traced)
    if columns != "never":
        _compact_columns(small, positions, _origins(layouts), columns == "always")
    _fill_rows(report, small, positions)

    if verify is not False:
        batch = traced.inputs[0].shape[0] if traced.inputs[0].dim() else 1
        if traced.batch != batch:  # the probe batch of the trace went through, so another one will
            batch = 5 if batch == 4 else 4
        probe = rebatch(traced.inputs, batch, seed=0)
        limit = tolerance_for(model, tolerance)
        report.max_abs_diff, report.max_rel_diff = assert_same("compact", clone(model), small, probe, limit)
        if data is not None:
            try:
                found = assert_same("compact", clone(model), small, data, limit)
            except CompactError:
                raise
            except Exception as error:
                shapes = ", ".join(str(tuple(t.shape)) for t in data)
                known = ", ".join(str(tuple(t.shape)) for t in traced.inputs)
                raise CompactError(
                    f"compact: verify got shapes {shapes} ({type(error).__name__}: {first_line(error)}), "
                    f"wanted what both networks take, such as the example's {known}"
                ) from error
            report.data_abs_diff, report.data_rel_diff = found
    preserve_report(small, report)
    # For save: what the network takes, and the structure (no values) that it is compared with.
    small.meta["structadmm"] = {
        "inputs": [((None, *t.shape[1:]), t.dtype) for t in traced.inputs],
        "original": _original(model) or dense,
        "kept": kept,  # for carry_state
        "folded": folded,
    }
    return small


def _folded(before: Mapping[str, Tensor], small: nn.Module, kept: dict[str, Kept]) -> dict[str, Tensor]:
    """What compact added to the values that stay, by name: constants in biases and means, merged channels' weights."""
    out = {}
    for name, now in tensors_of(small):
        if name in before and now.is_floating_point():
            was = kept[name].take(before[name]) if name in kept else before[name]
            if was.shape == now.shape and not torch.equal(was, now):
                out[name] = now.detach() - was
    return out


def _drop_unread(small: fx.GraphModule) -> None:
    """Parameters and buffers outside layers that the graph reads no more, because they became biases."""
    called = [str(n.target) for n in small.graph.nodes if n.op == "call_module"]
    read = {str(n.target) for n in small.graph.nodes if n.op == "get_attr"}
    for path, m in list(small.named_modules()):
        if not any(path == c or path.startswith(f"{c}.") for c in called):
            for name in [*m._parameters, *m._buffers]:
                if f"{path}.{name}".lstrip(".") not in read:
                    delattr(m, name)


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
    """Convolutions, linear and recurrent layers of the graph: output positions per sample, at each of which a weight is
    used once."""
    out: dict[str, int] = {}
    for node in traced.module.graph.nodes:
        if node.op == "call_module":
            m = traced.module.get_submodule(node.target)
            conv = isinstance(m, nn.modules.conv._ConvNd)
            if isinstance(m, RECURRENT):
                shape = traced.shapes[node][0]
                if isinstance(shape, Shape):
                    out[node.target] = out.get(node.target, 0) + shape[int(m.batch_first and len(shape) == 3)]
            elif conv or isinstance(m, nn.Linear):
                shape = traced.shapes[node]
                out[node.target] = out.get(node.target, 0) + math.prod(shape[2:] if conv else shape[1:-1])
    return out


def _layer_rows(traced: Traced) -> list[LayerReport]:
    rows = []
    for name, positions in _positions(traced).items():
        m = traced.module.get_submodule(name)
        weights = _weights(m)
        n, nonzero = sum(w.numel() for w in weights), sum(int(torch.count_nonzero(w)) for w in weights)
        rows.append(LayerReport(name, type(m).__name__, tuple(weights[0].shape), None, n, nonzero, 0, n * positions, 0))
    return rows


def _weights(m: Any) -> list[Tensor]:
    return matrices(m) if isinstance(m, RECURRENT) else [m.weight]


def _fill_rows(report: CompactReport, small: fx.GraphModule, positions: dict[str, int]) -> None:
    """Complete the rows of the layers that are still there, and forget the notes on those that are not."""
    for row in report.layers:
        if row.name in positions:
            m: Any = small.get_submodule(row.name)
            row.kind = type(m).__name__
            weights = _weights(m)
            row.shape_after = tuple((m.dense_weight() if hasattr(m, "to_dense") else weights[0]).shape)
            row.weights_after = sum(w.numel() for w in weights)
            row.macs_after = row.weights_after * positions[row.name]
    report.notes = {name: note for name, note in report.notes.items() if name in positions}


def _origins(layouts: Layouts) -> dict[str, Tensor]:
    """Per layer that was cut: the numbers that its filters had within their conv group."""
    out = {}
    for node, layer in layouts.analysis.layers.items():
        if node in layouts.of:
            n = layer.outs.ids.size // layer.groups
            out[str(node.target)] = torch.from_numpy(layouts.of[node].reshape(-1) % n)
    return out


def _compact_columns(
    small: fx.GraphModule, positions: dict[str, int], origins: dict[str, Tensor], always: bool
) -> None:
    """Layers whose zero columns or block-columns pay become CompactConv2d and CompactLinear, if nothing else uses their
    parameters."""
    homes: Counter[int] = Counter(id(p) for _, p in small.named_parameters(remove_duplicate=False))
    homes.update(id(attribute(small, str(n.target))) for n in small.graph.nodes if n.op == "get_attr")
    for name, count in positions.items():
        m: Any = small.get_submodule(name)
        if any(homes[id(p)] > 1 for p in m.parameters()):
            continue
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
