"""Network purification: drop the small groups that early-stopped ADMM leaves alive, as far as accuracy allows.

After Zhang et al. (StructADMM) and "Tiny but Accurate" (P-RM, arXiv 1905.00136): filters, channels and columns of small
importance (threshold sigma) and channels that are nearly empty (eta) become zero, and with them every path without
effect. The criteria do not change when a layer with BatchNorm behind it is rescaled:

- the importance of a group is the norm of its weights, each times |gamma| / sqrt(var + eps) of the BatchNorm behind its
  filter and sqrt(gamma^2 + beta^2) of the BatchNorms that feed its channel;
- it is taken relative to the root mean square over the nonzero groups of the layer;
- the occupancy of a channel is its number of nonzero weights relative to the mean of the layer's nonzero channels.

A recurrent layer loses hidden units, by the norm of all that writes into them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx, nn

from .analysis import Analysis
from .copies import clone
from .errors import CompactError
from .groups import DEFAULT_BLOCK, expand_keep, group_ids, n_groups
from .paths import ZerosReport, check_weights, homes, remove_paths, report_of, zeros_of, zeros_report
from .trace import trace
from .tracking import given

Floats = npt.NDArray[np.float64]

STRUCTURES = ("filter", "channel", "column", "block_column")


@dataclass
class Trial:
    """One cut that was tried: thresholds sigma and eta times `scale`; weights that it makes zero; what evaluate
    said."""

    scale: float
    weights: int
    score: float | None
    kept: bool


@dataclass
class PurifyReport(ZerosReport):
    """What purify took away, the cuts it tried, and per layer how many groups of each structure it dropped.

    scale: the thresholds are sigma and eta times this. baseline, score: evaluate before and after (None without
    evaluate).
    """

    scale: float = 0.0
    baseline: float | None = None
    score: float | None = None
    dropped: dict[str, dict[str, int]] = field(default_factory=dict)
    trials: list[Trial] = field(default_factory=list)

    def __str__(self) -> str:
        text = super().__str__()
        for name, per in self.dropped.items():
            text += f"{name}: dropped " + ", ".join(f"{n} {s}{'s' * (n > 1)}" for s, n in per.items()) + "\n"
        if self.score is not None:
            text += f"score {self.baseline:g} -> {self.score:g} at thresholds times {self.scale:.3g}, "
            text += f"{len(self.trials)} cuts tried\n"
        return text

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | super().to_dict()


@dataclass
class _Groups:
    """The groups of one structure of one layer: `at` [n] is the scale of the thresholds from which each goes.

    structure: one of STRUCTURES, or "unit": [cells * H] the hidden units of a recurrent layer.
    """

    name: str
    structure: str
    at: Floats


def purify(
    model: nn.Module,
    example: Tensor | Sequence[Tensor],
    evaluate: Callable[[nn.Module], float] | None = None,
    max_drop: float = 0.0,
    *,
    sigma: float = 0.1,
    eta: float = 0.1,
    structures: Sequence[str] = STRUCTURES[:3],
    block: int = DEFAULT_BLOCK,
    skip: Sequence[str] = (),
    trials: int = 12,
) -> nn.Module:
    """A copy of `model` (same class) with more zeros: small groups dropped, then every path without effect removed.

    model: any model with zeros in it, masked or not; left as it is. example: tensors as the model takes them. evaluate:
    accuracy on held-out data of a model in eval mode, larger is better. With it, sigma and eta are scaled together by
    the
        largest factor found by bisection (at most `trials` evaluations) for which evaluate stays within max_drop, in
        its own units, of its value for `model`. Without it they are used as they are.
    sigma: filters, channels, columns and block-columns go whose importance is at most sigma times the layer's root mean
    square; with the filters the hidden units of recurrent layers whose states begin at 0. eta: channels go whose number
    of nonzero weights is at most eta times the layer's mean. structures: which of filter, channel, column, block_column
    (of `block` filters) may be dropped. skip: name patterns (fnmatch) of layers left alone.

    A dropped filter with BatchNorm behind it goes on emitting its mean, the BatchNorm's beta, which remove_unused_paths
    and compact fold into what reads it. The largest group of a layer always stays. `report_of(result)` is a
    PurifyReport.

    Raises TraceError as trace does; CompactError for arguments out of range, weights or an evaluation that are not
    finite.
    """
    who = "purify"
    for name, value in (("sigma", sigma), ("eta", eta)):
        if not 0 <= value < math.inf:
            raise CompactError(f"{who}: {name} got {value}, wanted a finite number of at least 0")
    if not max_drop >= 0:
        raise CompactError(f"{who}: max_drop got {max_drop}, wanted at least 0")
    unknown = [s for s in structures if s not in STRUCTURES]
    if unknown:
        raise CompactError(f"{who}: structures got {unknown[0]!r}, wanted some of {', '.join(STRUCTURES)}")
    for name, count, least in (("trials", trials, 1), ("block", block, 1)):
        if type(count) is not int or count < least:
            raise CompactError(f"{who}: {name} got {count!r}, wanted an integer of at least {least}")
    if evaluate is not None and not callable(evaluate):
        raise CompactError(f"{who}: evaluate got {type(evaluate).__name__}, wanted a function of a model")
    check_weights(model, who)
    before = zeros_of(clone(model))
    analysis = Analysis(trace(model, example, who, share=True), create_bias=False, elide=False)
    home = homes(model, analysis)
    for pattern in skip:
        if not any(fnmatch(n, pattern) for n in home.values()):
            raise CompactError(f"{who}: skip got {pattern!r}, which matches no layer, wanted a pattern of layer names")
    groups = _candidates(analysis, home, sigma, eta, structures, block, skip)

    tried: list[Trial] = []
    baseline = None
    if evaluate is None:
        scale = 1.0
        chosen = _cut(model, groups, analysis, block, scale)
    else:
        baseline = _score(evaluate, clone(model))
        scale, chosen, tried = _search(model, groups, analysis, block, evaluate, baseline - max_drop, trials)

    out = remove_paths(chosen, example, who)
    paths = report_of(out)
    report = PurifyReport(
        zeros_report(before, zeros_of(out)).layers,
        paths.notes,
        paths.whole,
        paths.remarks,
        scale=scale,
        baseline=baseline,
        trials=tried,
    )
    report.score = (
        max((t for t in tried if t.kept), key=lambda t: t.scale).score if any(t.kept for t in tried) else baseline
    )
    report.dropped = _dropped(groups, scale)
    out._structadmm_report = report  # type: ignore[assignment]
    return out


def _dropped(groups: list[_Groups], scale: float) -> dict[str, dict[str, int]]:
    """Per layer how many groups of each structure go; columns of a channel that goes are not counted again."""
    out: dict[str, dict[str, int]] = {}
    channels = {g.name: g.at <= scale for g in groups if g.structure == "channel"}
    for g in groups:
        gone = g.at <= scale
        if g.structure == "column" and g.name in channels:
            gone = gone.reshape(channels[g.name].size, -1) & ~channels[g.name][:, None]
        if gone.any():
            out.setdefault(g.name, {})[g.structure] = int(gone.sum())
    return out


def _score(evaluate: Callable[[nn.Module], float], candidate: nn.Module) -> float:
    found = evaluate(candidate.eval())
    try:
        score = float(found)
    except (TypeError, ValueError, RuntimeError):
        raise CompactError(
            f"purify: evaluate got {type(found).__name__}, wanted a function that returns a number"
        ) from None
    if not math.isfinite(score):
        raise CompactError(f"purify: evaluate got {score}, wanted a function that returns a finite number")
    return score


def _search(
    model: nn.Module,
    groups: list[_Groups],
    analysis: Analysis,
    block: int,
    evaluate: Callable[[nn.Module], float],
    floor: float,
    trials: int,
) -> tuple[float, nn.Module, list[Trial]]:
    """Bisection over the scales at which another group goes, to the largest whose cut scores at least `floor`."""
    scales = np.unique(np.concatenate([g.at[np.isfinite(g.at)] for g in groups] or [np.zeros(0)]))
    nonzero = _nonzeros(clone(model))
    best, best_scale = clone(model), 0.0
    tried: list[Trial] = []
    low, high = -1, len(scales)
    while high - low > 1 and len(tried) < trials:
        middle = (low + high) // 2
        candidate = _cut(model, groups, analysis, block, float(scales[middle]))
        weights = nonzero - _nonzeros(candidate)
        score = _score(evaluate, clone(candidate))
        kept = score >= floor
        tried.append(Trial(float(scales[middle]), weights, score, kept))
        if kept:
            low, best, best_scale = middle, candidate, float(scales[middle])
        else:
            high = middle
    return best_scale, best, tried


def _nonzeros(model: nn.Module) -> int:
    return sum(row[5] for row in zeros_of(model).values())


def _candidates(
    analysis: Analysis,
    home: dict[str, str],
    sigma: float,
    eta: float,
    structures: Sequence[str],
    block: int,
    skip: Sequence[str],
) -> list[_Groups]:
    out: list[_Groups] = []
    final = _feeds_output(analysis)
    shared: dict[tuple[fx.Node, str], _Groups] = {}
    for node, layer in analysis.layers.items():
        users = analysis.users(node, "weight")
        if any(fnmatch(home.get(str(n.target), ""), pattern) for n in users for pattern in skip):
            continue
        if node not in users or not analysis.layers.keys() >= set(users):  # a dead call; what is an embedding too
            continue
        name = home[str(users[0].target)]
        m: Any = analysis.module.get_submodule(str(users[0].target))
        w = m.weight.detach().double().cpu()
        shape, groups = w.shape, layer.groups
        read = _size(analysis, layer.source) if layer.direct else np.ones(layer.ins.ids.size)
        per_group = (groups, -1, shape[1], math.prod(shape[2:]))
        felt = w.reshape(per_group) * torch.from_numpy(_row_scale(analysis, node)).reshape(groups, -1, 1, 1)
        square = ((felt * torch.from_numpy(read).reshape(groups, 1, -1, 1)) ** 2).reshape(-1)
        for structure in structures:
            if (structure == "filter" and not final.isdisjoint(users)) or (structure == "column" and per_group[3] == 1):
                continue  # outputs of the network; columns that are the channels
            ids = group_ids(structure, shape, groups, block).reshape(-1)
            n = n_groups(structure, shape, groups, block)
            at = _relative(torch.zeros(n, dtype=torch.float64).index_add_(0, ids, square).sqrt().numpy(), sigma)
            if structure == "channel":
                filled = torch.bincount(ids[w.reshape(-1) != 0], minlength=n).double().numpy()
                occupancy = filled / max(filled.sum() / max(np.count_nonzero(filled), 1), 1.0)
                at = np.minimum(at, np.where(np.isfinite(at), _over(occupancy, eta), np.inf))
            if (users[0], structure) in shared:  # goes where it is small for all uses of the weight
                known = shared[users[0], structure]
                known.at = np.maximum(known.at, at)
            else:
                out.append(_Groups(name, structure, at))
                shared[users[0], structure] = out[-1]
    for node, recurrent in analysis.recurrent.items():
        name = str(node.target)
        given_states = given(node, "input", "hx").get("hx") is not None  # a unit without weights hands them on
        if "filter" not in structures or given_states or node in final or any(fnmatch(name, p) for p in skip):
            continue
        m = analysis.module.get_submodule(name)
        norms = [_unit_rows(m, cell.suffix).square().sum((0, 2)).sqrt().numpy() for cell in recurrent.cells]
        out.append(_Groups(name, "unit", np.concatenate([_relative(norm, sigma) for norm in norms])))
    return out


def _unit_rows(m: Any, suffix: str) -> Tensor:
    """[gates, H, all that writes into the unit] of one layer and direction, biases included, in float64."""
    kinds = ("weight_ih", "weight_hh", *(("bias_ih", "bias_hh") if m.bias else ()))
    found = [getattr(m, f"{kind}_{suffix}").detach().double().cpu() for kind in kinds]
    rows = torch.cat([t.reshape(len(t), -1) for t in found], 1)
    return rows.unflatten(0, (-1, m.hidden_size))


def _over(value: Floats, threshold: float) -> Floats:
    return value / threshold if threshold > 0 else np.full(value.shape, np.inf)


def _relative(norm: Floats, threshold: float) -> Floats:
    """Scales from which groups of these norms go; never for groups that are zero already and for the largest."""
    live = norm > 0
    if not live.any():
        return np.full(norm.shape, np.inf)
    at = _over(norm / math.sqrt((norm[live] ** 2).mean()), threshold)
    at[~live] = np.inf
    at[norm.argmax()] = np.inf
    return at


def _norm_behind(analysis: Analysis, node: fx.Node) -> fx.Node | None:
    """The BatchNorm that alone reads a layer, and reads nothing that has other weights."""
    follower = next(iter(node.users)) if len(node.users) == 1 else None
    if follower is None or follower not in analysis.norms:
        return None
    read = {analysis.norms[n] for n in analysis.users(follower, "running_mean")}
    return follower if read <= set(analysis.users(node, "weight")) else None


def _row_scale(analysis: Analysis, node: fx.Node) -> Floats:
    """[O] what the BatchNorm behind a layer multiplies its filters with; ones without one."""
    n = analysis.layers[node].outs.ids.size
    norm = _norm_behind(analysis, node)
    if norm is None:
        return np.ones(n)
    m: Any = analysis.module.get_submodule(str(norm.target))
    if m.running_var is None:
        return np.ones(n)
    gamma = np.ones(n) if m.weight is None else m.weight.detach().double().cpu().numpy()
    return np.abs(gamma) / np.sqrt(m.running_var.double().cpu().numpy() + m.eps)


def _size(analysis: Analysis, node: fx.Node) -> Floats:
    """[channels] root mean square of a tensor's channels as far as BatchNorms tell it, 1 where they don't."""
    facts = analysis.facts[node]
    if node in analysis.norms:
        m: Any = analysis.module.get_submodule(str(node.target))
        if m.weight is not None:
            g, b = (p.detach().double().cpu().numpy() for p in (m.weight, m.bias))
            return np.sqrt(g**2 + b**2)
        return np.ones(facts.ids.size)
    sources = analysis.sources[node]
    if not sources:
        return np.ones(facts.ids.size)
    square = np.zeros(facts.ids.size)
    for source, positions, _ in sources:
        flat = positions.reshape(-1)
        square += np.where(flat >= 0, _size(analysis, source)[np.maximum(flat, 0)] ** 2, 0.0)
    return np.sqrt(square)


def _feeds_output(analysis: Analysis) -> set[fx.Node]:
    """Layers whose filters are outputs of the network."""
    outputs = [
        analysis.facts[n].ids
        for o in analysis.module.graph.nodes
        if o.op == "output"
        for n in o.all_input_nodes
        if n in analysis.facts
    ]
    labels = set(np.concatenate([analysis.label[i.reshape(-1)] for i in outputs]).tolist()) if outputs else set()
    outs = {n: layer.outs.ids for n, layer in (*analysis.layers.items(), *analysis.recurrent.items())}
    return {n for n, ids in outs.items() if labels & set(analysis.label[ids.reshape(-1)].tolist())}


def _cut(model: nn.Module, chosen: list[_Groups], analysis: Analysis, block: int, scale: float) -> nn.Module:
    """A copy of `model` without the groups that go at `scale`."""
    out = clone(model)
    home = homes(model, analysis)
    nodes = {home[str(node.target)]: node for node in analysis.layers}
    recurrent = {str(node.target): layer for node, layer in analysis.recurrent.items()}
    with torch.no_grad():
        for g in chosen:
            gone = torch.from_numpy(g.at <= scale)
            if gone.any() and g.structure == "unit":
                suffixes = [cell.suffix for cell in recurrent[g.name].cells]
                _drop_units(out.get_submodule(g.name), suffixes, gone.reshape(len(suffixes), -1))
            elif gone.any():
                node = nodes[g.name]
                for user in analysis.users(node, "weight") if g.structure == "filter" else ():
                    if (behind := _norm_behind(analysis, user)) is not None:
                        maker = analysis.module.get_submodule(str(user.target))
                        _leave_mean(maker, out.get_submodule(str(behind.target)), gone)
                weight: Any = out.get_submodule(g.name).weight
                groups = analysis.layers[node].groups
                weight.mul_(expand_keep(~gone.to(weight.device), g.structure, weight.shape, groups, block))
    return out


def _drop_units(m: Any, suffixes: Sequence[str], gone: Tensor) -> None:
    """gone [cells, H]: units that stay at the 0 at which their states begin, since nothing writes into them."""
    for suffix, units in zip(suffixes, gone, strict=True):
        for kind in ("weight_ih", "weight_hh", *(("bias_ih", "bias_hh") if m.bias else ())):
            rows = getattr(m, f"{kind}_{suffix}").detach().unflatten(0, (-1, m.hidden_size))
            rows[:, units.to(rows.device)] = 0


def _leave_mean(m: Any, norm: Any, gone: Tensor) -> None:
    """What is left of filters without weights emits the mean that BatchNorm has seen, so that its output is beta."""
    if norm.running_mean is not None:
        gone = gone.to(norm.running_mean.device)
        norm.running_mean[gone] = 0 if m.bias is None else m.bias.detach()[gone].to(norm.running_mean.dtype)
