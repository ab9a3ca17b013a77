"""Unused paths: filters that nothing reads, channels that nothing fills; removed as zeros in a model of the same class.

`fold` is the step that purify and compact share: it writes what the analysis found into the weights, without changing
shapes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .analysis import Analysis
from .copies import clone, own
from .errors import CompactError
from .recurrent import RECURRENT, matrices
from .recurrent import fold as fold_recurrent
from .symbolic import mode
from .trace import as_inputs, rebatch, tensors_in, trace
from .tracking import Layer, filters


@dataclass
class LayerZeros:
    """One layer before and after: filters (of a recurrent layer: hidden units) that are not zero, input channels that
    are read, weights that are not zero."""

    name: str
    filters: int
    filters_before: int
    filters_after: int
    channels: int
    channels_before: int
    channels_after: int
    weights: int
    weights_before: int
    weights_after: int


@dataclass
class ZerosReport:
    """What remove_unused_paths or purify took away.

    layers: one row per convolution, linear and recurrent layer. notes: layer -> {reason why a filter without effect
    stays: how many}. whole: operation left whole -> reason. max_abs_diff: largest difference of the outputs on a probe
    batch.
    """

    layers: list[LayerZeros]
    notes: dict[str, dict[str, int]] = field(default_factory=dict)
    whole: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    max_abs_diff: float | None = None

    @property
    def weights_before(self) -> int:
        return sum(r.weights_before for r in self.layers)

    @property
    def weights_after(self) -> int:
        return sum(r.weights_after for r in self.layers)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"weights_before": self.weights_before, "weights_after": self.weights_after}

    def __str__(self) -> str:
        rows = [
            (
                r.name,
                f"{r.filters_before} -> {r.filters_after} / {r.filters}",
                f"{r.channels_before} -> {r.channels_after} / {r.channels}",
                f"{r.weights_before:,} -> {r.weights_after:,}",
            )
            for r in self.layers
        ]
        total = ("all", "", "", f"{self.weights_before:,} -> {self.weights_after:,}")
        text = render("Nonzero", ("layer", "filters", "channels read", "weights"), rows, total)
        return text + remarks_text(self.notes, self.whole, self.remarks)


def render(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], total: Sequence[str] | None = None) -> str:
    """A table as text; the first column to the left, numbers to the right."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for i, name in enumerate(head):
        table.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    if total is not None:
        table.add_section()
        table.add_row(*total)
    console = Console(width=200, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def remarks_text(notes: Mapping[str, Mapping[str, int]], whole: Mapping[str, str], remarks: Sequence[str]) -> str:
    lines = [
        f"{name}: {n} filter{'s' * (n > 1)} without effect kept: {why}"
        for name, per in notes.items()
        for why, n in per.items()
    ]
    lines += [f"{name} left whole: {why}" for name, why in whole.items()] + list(remarks)
    return "".join(line + "\n" for line in lines)


def check_weights(model: nn.Module, who: str) -> None:
    """Raises CompactError when a parameter or buffer is not finite or has no values (meta), naming it."""
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        if t.is_meta:
            raise CompactError(f"{who}: {name} got device meta, wanted values to look at")
        if t.is_floating_point() and not torch.isfinite(t).all():
            raise CompactError(f"{who}: {name} got NaN or infinite values, wanted finite ones")


def compare(a: nn.Module, b: nn.Module, inputs: Sequence[Tensor]) -> tuple[float, float]:
    """Largest absolute difference of the outputs in eval mode, and the same relative to the largest output."""
    outs = []
    for model in (a, b):
        with mode(model, False), torch.no_grad():
            outs.append(tensors_in(model(*(t.clone() for t in inputs))))
    if len(outs[0]) != len(outs[1]):
        raise CompactError(f"compact: output got {len(outs[1])} tensors, wanted {len(outs[0])}")
    worst, scale = 0.0, 0.0
    for x, y in zip(*outs, strict=True):
        if x.shape != y.shape:
            raise CompactError(f"compact: output got shape {tuple(y.shape)}, wanted {tuple(x.shape)}")
        if x.numel():
            difference = (x.double() - y.double()).abs().max().item()
            worst = difference if not difference <= worst else worst  # NaN is the worst of all
            scale = max(scale, x.double().abs().max().item())
    return worst, worst / scale if scale else worst


def tolerance_for(model: nn.Module, tolerance: float | None) -> float:
    """1e-4 in float32, 1e-10 in float64, 2e-2 in half precision: some hundred times the rounding of one forward
    pass."""
    if tolerance is not None:
        return tolerance
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return {torch.float64: 1e-10, torch.float32: 1e-4}.get(dtype, 2e-2)


def assert_same(
    who: str, a: nn.Module, b: nn.Module, inputs: Sequence[Tensor], tolerance: float
) -> tuple[float, float]:
    """Compare and raise CompactError where the largest difference exceeds `tolerance` times the largest output (at
    least 1)."""
    absolute, relative = compare(a, b, inputs)
    scale = absolute / relative if relative else 1.0
    if not absolute <= tolerance * max(1.0, scale):
        raise CompactError(
            f"{who}: {type(a).__name__} got outputs that differ by {absolute:.3g} (outputs up to {scale:.3g}), "
            f"wanted at most {tolerance:g} times the larger of 1 and the outputs"
        )
    return absolute, relative


def fold(analysis: Analysis, root: nn.Module) -> None:
    """Write the findings into the modules of `root` in place, shapes unchanged: the function in eval mode stays the
    same.

    Filters without effect and weights on removed channels become zero; constants that they carried go into the layer's
    bias, the running mean of the BatchNorm behind it, or a new bias.
    """
    for node, layer in analysis.layers.items():
        m: Any = root.get_submodule(str(node.target))
        with torch.no_grad():
            if node in analysis.users(node, "weight"):  # not a dead call of a layer that lives
                _fold_weight(analysis, m, layer)
            if node is analysis.users(node, "bias")[0] or layer.shift == "norm":
                _fold_shift(analysis, root, m, layer)
    for node, recurrent in analysis.recurrent.items():
        ins, units = (analysis.removed[facts.ids] for facts in (recurrent.ins, recurrent.outs))
        fold_recurrent(root.get_submodule(str(node.target)), recurrent, ins, units, analysis.need[node])
    for node in (*analysis.norms, *analysis.affine):
        m = root.get_submodule(str(node.target))
        for name in ("weight", "bias"):
            if (p := getattr(m, name, None)) is not None:
                p.detach()[_on(analysis.idle(node, name), p)] = 0


def _fold_weight(analysis: Analysis, m: Any, layer: Layer) -> None:
    """Weights that no use of them reads by become zero; those on channels that another one stands for move to it."""
    n_filters, cg = layer.reads.shape
    in_gone = np.repeat(analysis.removed[layer.ins.ids].reshape(layer.groups, cg), n_filters // layer.groups, 0)
    rows = analysis.reading(layer)
    weight = filters(m, layer.groups)  # [groups, O/groups, Cg, *K], a view
    ones = [1] * (weight.dim() - 3)
    reading = _on(rows, weight).reshape(layer.groups, -1)
    # Once, whoever uses the weight; where it is used again they are zero by then.
    for gone, carrier in layer.merges.items():
        if analysis.removed[layer.ins.ids[gone]]:
            ratio = layer.ins.value[gone] / layer.ins.value[carrier]
            g = gone // cg
            moved = weight[g, :, gone % cg].double() * ratio * reading[g].reshape(-1, *ones)
            weight[g, :, carrier % cg] += moved.to(weight.dtype)
    mask = ~in_gone & (rows & ~analysis.removed[layer.outs.ids])[:, None]
    weight.mul_(_on(mask, weight).reshape(*weight.shape[:3], *ones))


def _fold_shift(analysis: Analysis, root: nn.Module, m: Any, layer: Layer) -> None:
    """What removed constants add to the filters goes into the bias, which all its uses see alike, or in its place."""
    node, idle = layer.node, analysis.idle(layer.node, "bias")
    delta = np.zeros(len(layer.bias))
    for n in (node,) if layer.shift == "norm" else analysis.users(node, "bias"):
        if n in analysis.layers:
            needed = analysis.need[n].reshape(-1)
            delta[needed] = analysis.shift_of(analysis.layers[n])[needed]
    delta[idle] = 0.0
    if m.bias is not None:
        bias = m.bias.detach()
        bias.copy_(bias.double() + _on(delta, bias))
        bias[_on(idle, bias)] = 0
    elif delta.any():
        if layer.shift == "norm":
            behind: Any = root.get_submodule(str(next(iter(node.users)).target))
            mean = behind.running_mean
            mean.copy_(mean.double() - _on(delta, mean))
        else:
            assert layer.shift == "new"
            weight = m.weight
            m.bias = nn.Parameter(_on(delta, weight).to(weight.dtype), requires_grad=weight.requires_grad)


def _on(a: np.ndarray[Any, Any], like: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(a)).to(like.device)


def zeros_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Per convolution, linear and recurrent layer: filters (hidden units of all layers and directions), those not zero,
    channels, channels read, weights, nonzero weights."""
    out: dict[str, tuple[int, ...]] = {}
    for name, m in model.named_modules():
        w = getattr(m, "weight", None)
        if isinstance(m, (nn.modules.conv._ConvNd, nn.Linear)) and isinstance(w, Tensor):
            nonzero = filters(m, getattr(m, "groups", 1)) != 0
            reads = nonzero.flatten(3).any(3) if nonzero.dim() > 3 else nonzero
            flat, channels = reads.flatten(0, 1), reads.any(1)
            out[name] = (
                flat.shape[0],
                int(flat.any(1).sum()),
                channels.numel(),
                int(channels.sum()),
                w.numel(),
                int(nonzero.sum()),
            )
        elif isinstance(m, RECURRENT) and not m.proj_size:
            nonzeros = [p.detach() != 0 for p in matrices(m)]  # weight_ih and weight_hh by turns
            units = [p.unflatten(0, (-1, m.hidden_size)).any(2).any(0) for p in nonzeros]
            read = torch.stack([p.any(0) for p in nonzeros[::2][: 2 if m.bidirectional else 1]]).any(0)
            out[name] = (
                sum(u.numel() for u in units[::2]),
                sum(int((a | b).sum()) for a, b in zip(units[::2], units[1::2], strict=True)),
                read.numel(),
                int(read.sum()),
                sum(p.numel() for p in nonzeros),
                sum(int(p.sum()) for p in nonzeros),
            )
    return out


def zeros_report(before: dict[str, tuple[int, ...]], after: dict[str, tuple[int, ...]]) -> ZerosReport:
    return ZerosReport(
        [
            LayerZeros(name, b[0], b[1], a[1], b[2], b[3], a[3], b[4], b[5], a[5])
            for name, b in before.items()
            if (a := after.get(name)) is not None
        ]
    )


def report_of(model: nn.Module) -> Any:
    """The report that remove_unused_paths or purify left on the model that it returned; None on any other model."""
    return getattr(model, "_structadmm_report", None)


def homes(model: nn.Module, analysis: Analysis) -> dict[str, str]:
    """Layers of the graph -> modules of `model` that have their weights. The graph may have layers that the model has
    not, in the place of functions of weights. analysis: of `model`, traced with its memory shared."""
    there = {name for name, _ in model.named_modules(remove_duplicate=False)}
    held: dict[int, str] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        held.setdefault(p.data_ptr(), name.rpartition(".")[0])
    found = {}
    for node in (*analysis.layers, *analysis.recurrent):
        path = str(node.target)
        weight: Any = analysis.module.get_submodule(path)._parameters.get("weight")
        found[path] = path if path in there or weight is None else held.get(weight.data_ptr(), path)
    return found


def remove_paths(model: nn.Module, example: Tensor | Sequence[Tensor], who: str) -> nn.Module:
    """A copy of `model` in which paths without effect are zero; see remove_unused_paths."""
    out = clone(model)
    before = zeros_of(out)
    traced = trace(out, example, who, share=True)
    analysis = Analysis(traced, create_bias=False, elide=False)
    # The graph may have layers that the model has not, of the same parameters.
    memory = [(p, p.data) for p in traced.module.parameters()]
    own(traced.module)
    fold(analysis, traced.module)
    kept = dict((*out.named_parameters(remove_duplicate=False), *out.named_buffers()))
    with torch.no_grad():
        for p, held in memory:
            held.copy_(p)
        for name, t in (*traced.module.named_parameters(), *traced.module.named_buffers()):
            if name in kept:
                kept[name].copy_(t)
    report = zeros_report(before, zeros_of(out))
    report.notes, report.whole, report.remarks = analysis.notes(), analysis.whole, traced.notes
    out._structadmm_report = report  # type: ignore[assignment]
    return out


def remove_unused_paths(
    model: nn.Module, example: Tensor | Sequence[Tensor], tolerance: float | None = None
) -> nn.Module:
    """A deep copy of `model` in which every path that has no effect on the output is zero; the same function in eval
    mode.

    A channel that no consumer reads makes its filter zero; a filter that is zero frees the channels that read it, its
    constant (bias, BatchNorm, activation) folded into the consumer's bias where that is exact, border included. On a
    residual stream a filter goes only if every consumer ignores the channel, a channel only if every producer leaves it
    constant. No bias is created (compact does that), no shape changes. `report_of(result)` tells what went and why the
    rest stayed.

    example: a tensor or a tuple of tensors as the model takes them. Raises TraceError where the model can't be traced,
    CompactError for weights that are not finite or where the outputs on a probe batch differ by more than `tolerance`
    (default as for compact).
    """
    who = "remove_unused_paths"
    check_weights(model, who)
    out = remove_paths(model, example, who)
    inputs = as_inputs(model, example, who)
    probe = rebatch(inputs, inputs[0].shape[0] if inputs[0].dim() else 1, seed=0)
    report_of(out).max_abs_diff, _ = assert_same(who, clone(model), out, probe, tolerance_for(model, tolerance))
    return out
