"""How long a network will take once it is pruned: a table of seconds per layer, and what it predicts.

The table is measured with the kernels that will run. The whole network is pruned at several densities, every layer
alike, compacted and put into segments of the compiled runtime; the runtime's own clock then tells what share of the
time each layer takes where it stands, among its neighbours, with the caches that they leave. Whole networks take turns
with the baseline in one run, and their steps are scaled to that, so at each of these densities the table adds up to
what was measured; between them it is interpolated. What is no layer (pooling, additions, the way in and out) is spread
over the layers that pruning changes, by their dense times.

A plan is not a uniform network: what stands beside a layer, and steps such as the density from which on layers stay
dense, make its time another one. So a plan is tried, what was found corrects the table, and the rates are chosen anew
(`approach`).
"""

from __future__ import annotations

import hashlib
import json
import sys
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from time import perf_counter
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, fx, nn

from . import _core
from .artefact import is_optimized
from .compact import compact
from .decisions import Decisions
from .engine import Engine
from .layers import is_weighted
from .optimize import in_segments, machine, optimize, set_threads
from .paths import render
from .plan import Plan
from .segments import Segment
from .timing import Spread, Timings, interleave
from .trace import as_inputs

C = TypeVar("C")

# Shares of the groups kept at which whole networks are measured, in the order in which a budget affords them.
DENSITIES = (1.0, 0.1, 0.4, 0.2, 0.65, 0.05, 0.3, 0.8)
_FEWEST = 4
_LAPS = 5  # of the runtime's clock, each the least of three runs


@dataclass(frozen=True)
class LatencyTable:
    """Seconds of the layers of one network at shares of their multiply-adds, as measured within whole networks.

    shares, seconds: layer -> points, shares falling from 1. The seconds of all layers add up to a whole network's.
    baseline: seconds of the dense network as optimize runs it, by `choice`; torch: of its fastest form of torch.
    """

    batch: int
    dtype: str
    threads: int
    baseline: float
    choice: str
    torch: float | None
    shares: Mapping[str, Sequence[float]]
    seconds: Mapping[str, Sequence[float]]

    def at(self, layer: str, share: float) -> float:
        """Seconds of a layer at a share of its multiply-adds: between points linear, beyond the last as there."""
        x, y = self.shares[layer], self.seconds[layer]
        if share <= x[-1]:
            return y[-1]
        i = bisect_left(x, -share, key=lambda v: -v)  # the first share that is not larger
        if i == 0:
            return y[0]
        part = (share - x[i]) / (x[i - 1] - x[i])
        return y[i] + part * (y[i - 1] - y[i])

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Trial:
    """A choice of rates that was tried: the speed-up predicted before, and the one found, both of the whole network."""

    predicted: float
    found: float


@dataclass(frozen=True)
class LayerPrediction:
    """One layer of a plan: the share of groups that goes (None: left alone), the share of its dense multiply-adds that
    stays (as compact left it in the trial; without one an estimate, see plan_for), seconds dense and pruned, and the
    drop that its set is thought to cost (at the first layer of a set)."""

    name: str
    rate: float | None
    share: float
    before: float
    after: float
    drop: float | None


@dataclass(frozen=True)
class Prediction:
    """What a plan for a speed-up is expected to do; prints as a table.

    target: the speed-up asked for. seconds: of the pruned network. trials: of plans on the way, the last of which need
    not be this one's; this plan is one of those tried, if any was. drop: the summed drop, in units of `evaluate` where
    that was asked (`evaluated`), or else the summed share of the layers' energy that goes. table: what it was made
    from, with the seconds of the dense network.
    """

    target: float
    seconds: float
    drop: float
    evaluated: bool
    layers: tuple[LayerPrediction, ...]
    table: LatencyTable = field(repr=False)
    trials: tuple[Trial, ...] = ()

    @property
    def speedup(self) -> float:
        """Predicted time of the baseline over that of the pruned network."""
        return self.table.baseline / self.seconds

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"speedup": self.speedup}

    def __str__(self) -> str:
        rows = [
            (
                r.name,
                "" if r.rate is None else f"{r.rate:.1%}",
                f"{r.share:.1%}",
                f"{1e3 * r.before:.3f}",
                f"{1e3 * r.after:.3f}",
                "" if r.drop is None else f"{r.drop:.3g}",
            )
            for r in self.layers
        ]
        t = self.table
        head = ("layer", "rate", "multiply-adds", "dense, ms", "pruned, ms", "drop" if self.evaluated else "energy")
        total = ("all", "", "", f"{1e3 * sum(r.before for r in self.layers):.3f}", f"{1e3 * self.seconds:.3f}",
                 f"{self.drop:.3g}")  # fmt: skip
        title = f"Predicted for batch {t.batch}, {t.dtype}, {t.threads} threads"
        text = render(title, head, rows, total)
        text += f"predicted speed-up: {self.speedup:.2f} (asked for: {self.target:g}), from {1e3 * t.baseline:.3f} "
        text += f"ms dense ({t.choice}) to {1e3 * self.seconds:.3f} ms\n"
        for i, trial in enumerate(self.trials):
            text += f"trial {i + 1}: predicted {trial.predicted:.2f}, found {trial.found:.2f}\n"
        text += f"table corrected by {len(self.trials)} trials\n" if self.trials else "not tried\n"
        if t.torch is not None:
            text += f"over the fastest form of torch ({1e3 * t.torch:.3f} ms): {t.torch / self.seconds:.2f}\n"
        return text


@dataclass(frozen=True)
class LatencyPlan(Plan):
    """A plan for a speed-up, with what it is expected to do. Files (to_dict) hold the rules alone."""

    prediction: Prediction | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        text = super().__str__()
        return text if self.prediction is None else f"{text}\n{self.prediction}"


@dataclass(frozen=True)
class Speedup:
    """A speed-up as measured: time of the dense network over that of the small one, both from optimize, in turns.

    predicted: what the plan said, None for a plan that said nothing. dense, small: seconds.
    """

    measured: Spread
    predicted: float | None
    dense: Spread
    small: Spread
    choices: tuple[str, str]

    @property
    def error(self) -> float | None:
        """How far the prediction is off, as a share of what was measured; above 0 where it promised too much."""
        return None if self.predicted is None else self.predicted / self.measured.median - 1

    def __str__(self) -> str:
        rows = [
            (name, choice, *(f"{1e3 * v:.3f}" for v in (t.median, t.q1, t.q3)))
            for name, choice, t in zip(("dense", "small"), self.choices, (self.dense, self.small), strict=True)
        ]
        text = render("Dense against pruned, in turns", ("network", "runs as", "ms", "q1", "q3"), rows)
        m = self.measured
        text += f"measured speed-up: {m.median:.2f} [{m.q1:.2f}, {m.q3:.2f}]"
        if self.predicted is not None:
            text += f", predicted: {self.predicted:.2f} ({self.error:+.1%})"
        return text + "\n"


def measure_speedup(
    plan: Plan,
    dense: nn.Module,
    small: nn.Module,
    example: Tensor | tuple[Any, ...],
    *,
    dtype: torch.dtype | None = None,
    threads: int | None = None,
    budget: float = 10.0,
    report: bool = True,
) -> Speedup:
    """How much faster `small` (compacted) runs than `dense` at the batch size of `example`, against what `plan` said.

    Both go through optimize, unless they come from it, and take turns. dtype, threads: as the plan was made for where
    it says so. budget: seconds for each of the two optimizations and for the comparison. report: print the result.
    Raises OptimizeError and TraceError as optimize does.
    """
    said = plan.prediction if isinstance(plan, LatencyPlan) else None
    if said is not None:
        dtype = dtype or getattr(torch, said.table.dtype)
        threads = threads or said.table.threads
    inputs = as_inputs(dense, example, "measure_speedup")
    with set_threads(threads):
        fast = {}
        for name, net in (("dense", dense), ("small", small)):
            done = isinstance(net, fx.GraphModule) and is_optimized(net)
            fast[name] = net if done else optimize(net, example, dtype, budget=budget, report=False)
        times = _whole(fast, inputs, budget)
    choices = [getattr(getattr(f, "report", None), "choice", "") for f in fast.values()]
    result = Speedup(
        times.ratio("dense", "small"),
        None if said is None else said.speedup,
        times["dense"],
        times["small"],
        (choices[0], choices[1]),
    )
    if report:
        print(str(result), end="")
    return result


# Trials.

TRIALS = 3
# Of a speed-up: that near to the target is met, and to the prediction is right. Medians of short runs repeat so well.
CLOSE = 0.03


@dataclass(frozen=True)
class Found:
    """What a trial found: layer -> share of its multiply-adds (as the table counts it), layer -> seconds of its steps
    (the rest as ""), seconds of the whole network, and layer -> share as compact left it."""

    shares: Mapping[str, float]
    steps: Mapping[str, float]
    seconds: float
    left: Mapping[str, float]


def corrected(base: LatencyTable, found: Sequence[Found]) -> LatencyTable:
    """The table with what trials found: at a trial's shares it adds up to the trial's seconds, the last one's exactly.

    Every layer's seconds are multiplied by what was found over what the table said: linear between the shares tried, 1
    at share 1 unless that was tried, and below the least share tried as there. Layers that no density changes stay as
    they are.
    """
    points: dict[str, dict[float, float]] = {n: {} for n in base.shares}
    for f in found:
        for n, t in _settled(base, f).items():
            points[n][f.shares[n]] = t
    shares, seconds = {}, {}
    for n, tried in points.items():
        said = {s: base.at(n, s) for s in tried}
        ratio = {1.0: 1.0} | {s: t / said[s] if said[s] > 0 else 1.0 for s, t in tried.items()}
        at = sorted(ratio)
        x = sorted({*base.shares[n], *tried}, reverse=True)
        scale = np.interp(x, at, [ratio[s] for s in at])
        shares[n] = x
        seconds[n] = [tried.get(s, base.at(n, s) * float(r)) for s, r in zip(x, scale, strict=True)]
    return replace(base, shares=shares, seconds=seconds)


def _settled(base: LatencyTable, f: Found) -> dict[str, float]:
    """Seconds of the layers that pruning changes, so that with the others they add up to the trial's."""
    own = {n: f.steps.get(n, 0.0) for n, x in base.shares.items() if len(x) > 1}
    fixed = sum(base.at(n, 1.0) for n, x in base.shares.items() if len(x) == 1)
    room = max(f.seconds - fixed, 0.0)
    if not any(own.values()):  # nothing to tell layers apart by: as the table said
        own = {n: base.at(n, f.shares[n]) for n in own}
    else:
        scale = f.seconds / sum(f.steps.values())
        own = {n: t * scale for n, t in own.items()}
        rest, total = room - sum(own.values()), sum(base.at(n, 1.0) for n in own)
        own = {n: max(t + rest * base.at(n, 1.0) / total, 0.0) for n, t in own.items()}
    total = sum(own.values())
    return {n: t * room / total if total > 0 else room / len(own) for n, t in own.items()}


def approach(
    table: LatencyTable,
    target: float,
    choose: Callable[[LatencyTable], tuple[C, float, float]],
    attempt: Callable[[C], Found],
    trials: int = TRIALS,
) -> tuple[C, LatencyTable, tuple[Trial, ...], Found | None]:
    """Choose by the table, try, correct the table, and choose anew: at most `trials` times, until a trial finds what
    was predicted and the target met, both within CLOSE.

    choose: the table -> (a choice, its seconds, its cost), the fastest choice where none meets the target. attempt:
    measures a choice. Returns of those tried the one of least cost that meets the target within CLOSE, or else the
    fastest (where there were several it is tried once more, beyond `trials`); the table corrected by all trials and
    exact for that one; the trials; what its last one found. With no trials, what `choose` says.
    """
    now = table
    tried: list[tuple[C, float, Found]] = []
    log: list[Trial] = []
    for _ in range(trials):
        choice, seconds, cost = choose(now)
        if any(c == choice for c, _, _ in tried):  # it would find the same
            break
        found = attempt(choice)
        tried.append((choice, cost, found))
        log.append(Trial(table.baseline / seconds, table.baseline / found.seconds))
        now = corrected(table, [f for _, _, f in tried])
        right = abs(log[-1].predicted / log[-1].found - 1) <= CLOSE
        if right and abs(log[-1].found / target - 1) <= CLOSE:
            break
    if not tried:
        return choose(table)[0], table, (), None
    enough = [t for t in tried if table.baseline / t[2].seconds >= target * (1 - CLOSE)]
    best = min(enough, key=lambda t: t[1]) if enough else min(tried, key=lambda t: t[2].seconds)
    others = [f for _, _, f in tried if f is not best[2]]
    found = best[2]
    if others:  # chosen among several for what it found, it found more than its due: once more, for itself
        found = attempt(best[0])
        log.append(Trial(table.baseline / best[2].seconds, table.baseline / found.seconds))
    return best[0], corrected(table, [*others, found]), tuple(log), found


class Bench:
    """Tries pruned networks against the dense one, in turns: the dense one as optimize has it, the small ones in
    segments, which optimize leaves only for what is faster."""

    def __init__(self, model: nn.Module, example: Tensor | tuple[Any, ...], table: LatencyTable, budget: float) -> None:
        self.example, self.table, self.budget = example, table, budget
        self.inputs = as_inputs(model, example, "plan_for")
        self.dtype = getattr(torch, table.dtype)
        with set_threads(table.threads):
            self.dense = optimize(model, example, self.dtype, budget=budget, report=False)

    def __call__(self, with_zeros: nn.Module, shares: Mapping[str, float]) -> Found:
        """What a network with zeros, compacted, takes; shares: layer -> share as the table counts it."""
        with set_threads(self.table.threads):
            small = compact(with_zeros, self.example, verify=False)
            networks = {"dense": self.dense, "small": in_segments(small, self.example, self.dtype)}
            seconds, steps = measure(networks, self.inputs, self.budget)
        report: Any = small.report
        left = {r.name: r.macs_after / r.macs_before for r in report.layers}
        return Found(shares, steps["small"], self.table.baseline * seconds["small"] / seconds["dense"], left)


# The table.


def latency_table(
    model: nn.Module,
    example: Tensor | tuple[Any, ...],
    prune: Callable[[float], nn.Module],
    shares: Callable[[float], Mapping[str, float]],
    lowest: float,
    kind: str,
    *,
    dtype: torch.dtype | None = None,
    threads: int | None = None,
    budget: float = 60.0,
    progress: bool = True,
) -> LatencyTable:
    """The table of a network that is pruned in one way, from the cache of this machine if it was measured before.

    prune: the model with this share of its groups kept in every layer to prune, as zeros in a copy; shares: layer ->
    the share of its multiply-adds that this leaves. lowest: the smallest share of groups to measure. kind: says how
    `prune` prunes, for the cache. budget: seconds to measure for, about; a few densities are measured in any case.
    progress: tell on a terminal how far it is.
    """
    inputs = as_inputs(model, example, "plan_for")
    densities = [d for d in DENSITIES if d > lowest] + [lowest]
    with set_threads(threads) as used:
        decisions = Decisions(machine(used))
        key = _key(model, inputs, f"{kind}, down to {lowest:.4f}, {dtype}")
        known = _from_cache(decisions.get("latency", key), used)
        if known is not None:
            return known
        with _progress(progress) as say:
            began = perf_counter()
            say("the dense network")
            dense = optimize(model, example, dtype, budget=budget / 4, report=False)
            networks: dict[str, fx.GraphModule] = {"dense": dense}
            at: dict[str, Mapping[str, float]] = {}
            for i, d in enumerate(densities):
                if i >= _FEWEST and perf_counter() - began > 0.6 * budget:
                    break
                say(f"network {i + 1} of {len(densities)}, {d:.0%} kept")
                small = model if d == 1 else compact(prune(d), example, verify=False)
                networks[f"{d:g}"], at[f"{d:g}"] = in_segments(small, example, dtype), shares(d)
            say("times")
            seconds, steps = measure(networks, inputs, max(budget - (perf_counter() - began), 0.2 * budget))
        report: Any = dense.report
        table = _assemble(seconds, steps, at, LatencyTable(
            inputs[0].shape[0] if inputs[0].dim() else 1, report.dtype, used, seconds["dense"], report.choice,
            None if report.speed_up is None else seconds["dense"] * report.speed_up, {}, {},
        ))  # fmt: skip
        decisions.put("latency", key, table.to_dict())
        decisions.save()
    return table


def _assemble(
    seconds: Mapping[str, float],
    steps: Mapping[str, Mapping[str, float]],
    at: Mapping[str, Mapping[str, float]],
    empty: LatencyTable,
) -> LatencyTable:
    """Steps scaled to the whole networks' seconds, what is no layer spread over the layers that pruning changes."""
    dense = max(at, key=float)
    scaled = {d: {n: t * seconds[d] / sum(steps[d].values()) for n, t in steps[d].items()} for d in at}
    names = list(at[dense])
    # Layers that no density changes keep their dense time; what neighbours spare them counts as the neighbours'.
    fixed = [n for n in names if len({share[n] for share in at.values()}) == 1]
    weight = {n: scaled[dense].get(n, 0.0) for n in names if n not in fixed}
    total = sum(weight.values()) or 1.0
    points: dict[str, dict[float, list[float]]] = {n: {} for n in names}
    for d, share in at.items():
        own = {n: scaled[dense if n in fixed else d].get(n, 0.0) for n in names}
        rest = seconds[d] - sum(own.values())
        for n in names:
            points[n].setdefault(share[n], []).append(own[n] + rest * weight.get(n, 0.0) / total)
    shares = {n: sorted(p, reverse=True) for n, p in points.items()}
    # Densities that are the same to a layer of few groups: the mean.
    values = {n: [max(sum(points[n][s]) / len(points[n][s]), 0.0) for s in shares[n]] for n in names}
    return LatencyTable(**{**empty.__dict__, "shares": shares, "seconds": values})


def measure(
    networks: Mapping[str, fx.GraphModule], inputs: Sequence[Tensor], budget: float
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """(seconds of whole networks, the first one's median times the others' median ratios to it; network -> seconds of
    its layers by path and of the rest as "", all but the first network's, which need not add up to the whole)."""
    times = _whole(networks, inputs, budget * 0.7)
    first = next(iter(networks))
    seconds = {name: times[first].median / times.ratio(first, name).median for name in networks}
    steps: dict[str, dict[str, float]] = {}
    began = perf_counter()
    before = _core.get_num_threads()
    _core.set_num_threads(torch.get_num_threads())
    try:
        for lap in range(_LAPS):
            if lap and perf_counter() - began > budget * 0.3:
                break
            for name, network in list(networks.items())[1:]:
                found = _steps(network, inputs)
                least = steps.setdefault(name, found)
                steps[name] = {k: min(least.get(k, t), t) for k, t in found.items()}
    finally:
        _core.set_num_threads(before)
    return seconds, steps


def _whole(networks: Mapping[str, Callable[..., Any]], inputs: Sequence[Tensor], budget: float) -> Timings:
    rounds = 11
    each = budget / len(networks)
    with torch.inference_mode():
        calls = {name: (lambda f=f: f(*inputs)) for name, f in networks.items()}
        return interleave(calls, warmup=0.15 * each, repeats=rounds, min_time=0.7 * each / rounds, limit=budget)


def _steps(network: fx.GraphModule, inputs: Sequence[Tensor]) -> dict[str, float]:
    """Seconds of the layers of one run by path, and of all else under ""; within segments by the runtime's clock."""
    found: dict[str, float] = defaultdict(float)
    taken: dict[str, tuple[Any, float]] = {}
    started: dict[str, float] = {}
    hooks = []

    def before(name: str) -> Callable[..., None]:
        def hook(_m: nn.Module, _args: Any) -> None:
            started[name] = perf_counter()

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(m: nn.Module, args: Any, _y: Any) -> None:
            took = perf_counter() - started[name]
            if isinstance(m, Segment):
                taken[name] = (args, took)
            else:
                found[name] += took

        return hook

    parts = {n: m for n, m in network.named_modules() if isinstance(m, Segment) or is_weighted(m)}
    with torch.inference_mode():
        network(*inputs)
        try:
            for name, m in parts.items():
                hooks += [m.register_forward_pre_hook(before(name)), m.register_forward_hook(after(name))]
            start = perf_counter()
            network(*inputs)
            whole = perf_counter() - start
        finally:
            for h in hooks:
                h.remove()
    outside = whole - sum(found.values()) - sum(t for _, t in taken.values())
    for name, (args, _) in taken.items():
        segment: Any = parts[name]
        engine = Engine(segment.program.numpy().tobytes(), segment.dtype)
        layers = {str(n.target) for n in segment.network().graph.nodes if n.op == "call_module"}
        for step in engine.profile(*(a.detach().float().numpy() for a in args), repeats=3):
            found[step["node"] if step["node"] in layers else ""] += step["seconds"]
    found[""] += max(outside, 0.0)
    return dict(found)


def _key(model: nn.Module, inputs: Sequence[Tensor], how: str) -> str:
    text = json.dumps([repr(model), how, [(list(t.shape), str(t.dtype)) for t in inputs]])
    return hashlib.sha256(text.encode()).hexdigest()


def _from_cache(entry: Any, threads: int) -> LatencyTable | None:
    """The table of an earlier call, if it makes sense."""
    try:
        table = LatencyTable(**entry)
        assert table.threads == threads and table.baseline > 0 and set(table.shares) == set(table.seconds)
        for name, x in table.shares.items():
            y = table.seconds[name]
            assert len(x) == len(y) > 0 and all(a > b for a, b in zip(x, x[1:], strict=False))
            assert all(isinstance(v, float) and v >= 0 for v in y)
    except (AssertionError, AttributeError, TypeError, ValueError):
        return None
    return table


@contextmanager
def _progress(wanted: bool) -> Any:
    """Writes one line again and again: a bar's thread would disturb the timing."""
    live = wanted and sys.stderr.isatty()
    began = perf_counter()

    def say(what: str) -> None:
        if live:
            print(
                f"\r\033[Klatency table: {what} ({perf_counter() - began:.0f} s)", end="", file=sys.stderr, flush=True
            )

    try:
        yield say
    finally:
        if live:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
