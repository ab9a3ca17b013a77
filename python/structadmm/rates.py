"""Rates for a target: weights, multiply-adds, or a speed-up measured on this machine.

Without more to go by, weights and multiply-adds are met by one threshold on relative group norms. With `evaluate`, or
for a speed-up, every set of layers has a choice of rates, each with the drop that it is thought to cost (its
sensitivity) and what it spends (weights, multiply-adds, or seconds of a latency table), and the choices are taken that
cost least in all (allocate.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from . import ops
from .allocate import Floats, descend, knapsack
from .constraints import Constraint, Coupled, coupled_masks, project_mask
from .copies import clone
from .errors import PlanError
from .groups import DEFAULT_BLOCK, STRUCTURES
from .latency import (
    TRIALS,
    Bench,
    Found,
    LatencyPlan,
    LatencyTable,
    LayerPrediction,
    Prediction,
    Trial,
    approach,
    latency_table,
)
from .layers import layer_table
from .masks import weight_of
from .plan import LayerPlan, Plan, ResolvedPlan, Rule, Spec
from .structure import Reads, filter_sets

_WHO = "plan_for"
# Bisection steps of a target: rates to a ten-thousandth.
_STEPS = 14
# Shares of groups that may be kept, beside what max_rate leaves.
_KEPT = (*(i / 20 for i in range(20, 2, -1)), 0.125, 0.1, 0.075, 0.05, 0.035, 0.025, 0.015, 0.01)
# Shares at which `evaluate` is asked; between them drops are interpolated.
_ASKED = (0.75, 0.5, 0.3, 0.15)
# What energy counts beside the drop that `evaluate` saw: it decides between choices that it saw no difference in.
_TIE = 1e-6


def plan_for(
    model: nn.Module,
    example: Tensor | tuple[Any, ...],
    structure: str = "column",
    *,
    weights: float | None = None,
    macs: float | None = None,
    speedup: float | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    block: int = DEFAULT_BLOCK,
    max_rate: float = 0.95,
    skip: Sequence[str] = (),
    round_to: int = 1,
    dtype: torch.dtype | None = None,
    threads: int | None = None,
    budget: float = 60.0,
    table: LatencyTable | None = None,
    trials: int = TRIALS,
    progress: bool = True,
) -> Plan:
    """A plan with a rate for every layer that meets one target.

    weights, macs: keep this share of the weights, or of the multiply-adds, of all convolutions and linear layers. With
    filters this is what compact leaves, input channels that go with them included (an estimate: a filter that stays for
    a constant, or for rows or conv groups of one size, makes it more). With other structures it is what Plan.resolve
    counts: masks, of which compact removes more where they leave channels without a reader. speedup: run so many times
    faster than the dense network at the batch size of `example`, both by optimize: the result is a LatencyPlan, whose
    `prediction` prints; measure_speedup measures what became of it.

    A plan for a speed-up is tried in planning, on a copy pruned one-shot: what is found corrects the latency table, and
    rates are chosen anew, at most `trials` times. The result is the plan of least cost among those tried that came to
    the target less 3 %, or else the fastest of them, which falls short: `prediction.speedup` tells. The shares of
    multiply-adds in the prediction are what compact left in the trial. Those that the table is read at, and without
    trials all, are estimates from the masks: compact may leave more (a filter that stays for a constant, columns and
    blocks that it keeps dense) or less (beside depthwise layers).

    evaluate: accuracy on held-out data of a model in eval mode, larger is better. With it, each layer (or set of
    coupled filters) is projected at a few rates by itself, and the rates are those for which the sum of the drops is
    the least that meets the target. Without it, a speed-up, and all that filters save, is bought with the least sum of
    the energy that goes (sum of squares of the groups that go over the layer's); and weights or macs by other
    structures with one threshold for the whole network on the norm of a group, relative to the root mean square of its
    layer's: layers whose groups differ most lose most.

    block: of block_column. max_rate: the largest rate of a layer. skip: name patterns left alone, beside the first
    convolution and the classifier. round_to: layers keep a multiple of so many groups, or all. Filters that go together
    (coupled_layers) get one rate, and none where one of their layers is left alone or where they can't go at all.
    dtype, threads: as for optimize. budget: seconds to measure for, about. The latency table is kept on this machine,
    so a second call only tries. table: one from elsewhere, such as an earlier plan's `prediction.table`; then nothing
    is measured nor tried. progress: tell
    on a terminal how far the measurement is. The weights are only looked at.

    Raises PlanError: not one target, one out of range, one that by the table can't be met with max_rate (with what
    can be).
    """
    targets = {k: v for k, v in (("weights", weights), ("macs", macs), ("speedup", speedup)) if v is not None}
    if len(targets) != 1:
        got = {0: "no target", 2: "two targets"}.get(len(targets), "three targets")
        raise PlanError(f"{_WHO}: got {got}, wanted weights or macs or speedup")
    ((key, target),) = targets.items()
    if key == "speedup" and not 1 < target < math.inf:
        raise PlanError(f"{_WHO}: speedup got {target}, wanted a number above 1")
    if key != "speedup" and not 0 < target < 1:
        raise PlanError(f"{_WHO}: {key} got {target}, wanted a share in (0, 1)")
    if not 0 < max_rate < 1:
        raise PlanError(f"{_WHO}: max_rate got {max_rate}, wanted a share in (0, 1)")
    if structure not in STRUCTURES:
        raise PlanError(f"{_WHO}: structure got {structure!r}, wanted one of {', '.join(STRUCTURES)}")
    if key == "speedup" and structure == "element":
        raise PlanError(f"{_WHO}: structure got 'element' for a speed-up, wanted one that the kernels are made for")
    if type(round_to) is not int or round_to < 1:
        raise PlanError(f"{_WHO}: round_to got {round_to!r}, wanted an integer of at least 1")
    for name, p in model.named_parameters():
        if p.is_meta:
            raise PlanError(f"{_WHO}: {name} got device meta, wanted values to look at")
    left_alone = tuple(Rule(pattern, skip="skipped on request") for pattern in skip)
    base = Plan((*left_alone, Rule("*", (Spec(structure, 0.5, block),)))).resolve(model, example)
    if key != "speedup" and evaluate is None and round_to == 1 and structure != "filter":
        return _by_threshold(model, example, base, left_alone, Spec(structure, 0.5, block), key, target, max_rate)

    sets = _Sets(model, example, base, Spec(structure, 0.5, block), max_rate, round_to)
    costs = [sets.energy(s) for s in range(len(sets.names))]
    if evaluate is not None:
        costs = sets.drops(model, evaluate, costs)
    if key != "speedup":
        if structure == "filter":
            choice = sets.allocate_left(costs, base, _sizes(model, example, key), key, target)
        else:
            choice = sets.allocate_share(costs, base, key, target)
        return Plan((*left_alone, *sets.rules(choice)))
    if type(trials) is not int or trials < 0:
        raise PlanError(f"{_WHO}: trials got {trials!r}, wanted an integer of at least 0")

    def pruned(choice: Sequence[int]) -> nn.Module:
        with_zeros = clone(model).eval()
        sets.project_(with_zeros, choice)
        return with_zeros

    bench: list[Bench] = []

    def attempt(choice: list[int]) -> Found:
        assert table is not None
        if not bench:
            bench.append(Bench(model, example, table, budget / 8))
        return bench[0](pruned(choice), sets.shares(choice))

    if table is not None:
        trials = 0
    else:
        kind = f"{structure} {block} {round_to} {[n for names in sets.names for n in names]}"
        more: dict[str, Any] = {"dtype": dtype, "threads": threads, "budget": budget, "progress": progress}
        table = latency_table(
            model, example, lambda d: pruned(sets.nearest(d)), lambda d: sets.shares(sets.nearest(d)), 1 - max_rate,
            kind, **more,
        )  # fmt: skip
    missing = [n for n in sets.layers if n not in table.shares]
    if missing:
        raise PlanError(f"{_WHO}: table got no times of layer {missing[0]!r}, wanted those of every layer")
    if (most := table.baseline / sets.seconds(sets.last, table)) < target and sets.cheapest(
        costs, table, target
    ) is None:
        raise PlanError(
            f"{_WHO}: speedup got {target}, wanted at most {math.floor(100 * most) / 100:g}, which is predicted "
            f"at max_rate {max_rate}"
        )

    def choose(by: LatencyTable) -> tuple[list[int], float, float]:
        choice = sets.cheapest(costs, by, target) or sets.last
        return choice, sets.seconds(choice, by), float(sum(c[i] for c, i in zip(costs, choice, strict=True)))

    choice, table, tried, found = approach(table, target, choose, attempt, trials)
    left = {} if found is None else found.left
    prediction = sets.predict(choice, costs, table, target, evaluate is not None, left, tried)
    return LatencyPlan((*left_alone, *sets.rules(choice)), prediction=prediction)


def _by_threshold(
    model: nn.Module,
    example: Any,
    base: ResolvedPlan,
    left_alone: tuple[Rule, ...],
    spec: Spec,
    key: str,
    target: float,
    max_rate: float,
) -> Plan:
    norms: dict[str, Tensor] = {}
    for layer in base:
        w = weight_of(model, layer.name, _WHO).detach().float()
        norm = ops.group_sumsq(w, spec.structure, layer.conv_groups, spec.block).double().sqrt()
        live = norm[norm > 0]
        norms[layer.name] = norm / live.square().mean().sqrt() if live.numel() else norm

    def plan_at(threshold: float) -> Plan | None:
        rules = list(left_alone)
        for name, norm in norms.items():
            rate = min(float((norm <= threshold).double().mean()), max_rate, 1 - 1 / norm.numel())
            if rate > 0:
                rules.append(Rule(name, (Spec(spec.structure, rate, spec.block),)))
        if len(rules) == len(left_alone):
            return None
        # The first convolution and the classifier are named by no rule, and so left alone.
        return Plan(tuple(rules))

    def removed(plan: Plan | None) -> float:
        return 0.0 if plan is None else float(plan.resolve(model, example).totals()[f"{key}_removed"] or 0.0)

    values = torch.cat(list(norms.values())).unique()
    low, high = -1, len(values) - 1
    most = plan_at(float(values[high]))
    if most is None or removed(most) < 1 - target:
        raise _out_of_reach(key, target, 1 - removed(most), max_rate)
    best = most
    for _ in range(max(_STEPS, math.ceil(math.log2(len(values) + 1)))):
        if high - low <= 1:
            break
        middle = (low + high) // 2
        plan = plan_at(float(values[middle]))
        if removed(plan) >= 1 - target:
            assert plan is not None
            high, best = middle, plan
        else:
            low = middle
    return best


def _out_of_reach(key: str, target: float, least: float, max_rate: float) -> PlanError:
    return PlanError(f"{_WHO}: {key} got {target}, wanted at least {least:.4g}, which is left at max_rate {max_rate}")


class _Sets:
    """The sets of layers to prune, their choices (numbers of groups kept, falling), and what shrinks with them.

    names: layers of each set; kept: [choices] of each; order: the groups of each, largest norm first.
    layers: all of the network. A layer does the share `own` of its multiply-adds that its own groups leave, times the
    share of its input channels that filters still fill (`fed`, where filters are pruned), times the share of its
    filters that anything reads (`readers`, where columns or channels are: compact takes away the others).
    """

    def __init__(
        self, model: nn.Module, example: Any, base: ResolvedPlan, spec: Spec, max_rate: float, round_to: int
    ) -> None:
        self.spec, self.base, self.max_rate = spec, base, max_rate
        found, reads = filter_sets(model, example, _WHO)
        self.layers = list(reads)
        planned = {la.name for la in base}
        if spec.structure == "filter":
            self.names: list[tuple[str, ...]] = [names for names in found if planned.issuperset(names)]
        else:
            self.names = [(name,) for name in reads if name in planned]
        if not self.names:
            raise PlanError(f"{_WHO}: model got no layer whose {spec.structure} groups can go, wanted at least one")
        self.of = {name: s for s, names in enumerate(self.names) for name in names}
        self.groups = [len(c.cells) if (c := self.coupled(s)) else self._count(n[0]) for s, n in enumerate(self.names)]
        self.kept = [_choices(n, max_rate, round_to) for n in self.groups]
        self.sums = [[self._sums(model, name, s) for name in names] for s, names in enumerate(self.names)]
        self.order = [self._order(s) for s in range(len(self.names))]
        # layer -> {set: share of the layer's input channels}
        self.fed: dict[str, dict[int, float]] = {name: {} for name in reads}
        # layer -> its readers' sets, and [readers, filters] how many groups a reader keeps at most without reading it.
        self.readers: dict[str, tuple[list[int], npt.NDArray[np.int64]]] = {}
        if spec.structure == "filter":
            for name, (sets, _) in reads.items():
                for f in set(sets.tolist()) - {-1}:
                    if (s := self.of.get(found[f][0])) is not None:
                        self.fed[name][s] = float((sets == f).mean())
        elif spec.structure != "element":
            for f, names in enumerate(found):
                self._unread(f, names, reads)

    def coupled(self, s: int) -> Coupled | None:
        """A set whose filters do not simply go by their numbers."""
        names = self.names[s]
        return names if isinstance(names, Coupled) and not names.plain else None

    def _count(self, name: str) -> int:
        return self.base[name].groups(self.base[name].constraints[0])

    def _sums(self, model: nn.Module, name: str, s: int) -> Floats:
        """[groups], or of filters that go together [classes]."""
        w = weight_of(model, name, _WHO).detach().float()
        own = ops.group_sumsq(w, self.spec.structure, self.base[name].conv_groups, self.spec.block)
        sums: Floats = own.double().cpu().numpy()
        c = self.coupled(s)
        return sums if c is None else np.bincount(c.classes[name].numpy(), sums, len(c.cells)).astype(np.float64)

    def _order(self, s: int) -> npt.NDArray[np.int64]:
        """The groups of a set, those that stay longest first: of every cell the same share."""
        total = np.sum(self.sums[s], axis=0)
        c = self.coupled(s)
        if c is None:
            return np.argsort(-total, kind="stable")
        cells = c.cells.numpy()
        order = np.lexsort((-total, cells))
        sizes = np.bincount(cells)
        rank = np.arange(len(cells)) - (np.cumsum(sizes) - sizes)[cells[order]]
        return order[np.argsort((rank + 1) / sizes[cells[order]], kind="stable")]

    def _unread(self, f: int, names: Sequence[str], reads: dict[str, Reads]) -> None:
        """When the filters of the layers `names`, set f of the network, are read by nothing any more."""
        readers = [r for r, (sets, _) in reads.items() if (sets == f).any()]
        filters = 1 + max((int(at[sets == f].max()) for sets, at in (reads[r] for r in readers)), default=-1)
        if not readers or any(r not in self.of for r in readers):
            return
        unread = np.zeros((len(readers), filters), np.int64)
        for row, r in zip(unread, readers, strict=True):
            la, (sets, at) = self.base[r], reads[r]
            rank = np.empty(self.groups[self.of[r]], np.int64)
            rank[self.order[self.of[r]]] = np.arange(len(rank))
            taps = 1 if self.spec.structure == "channel" else math.prod(la.shape[2:])
            first = rank.reshape(la.conv_groups, -1, la.shape[1], taps).min((1, 3)).reshape(-1)
            row[:] = len(rank)
            np.minimum.at(row, at[sets == f], first[sets == f])
        for name in names:
            self.readers[name] = ([self.of[r] for r in readers], unread)

    def rules(self, choice: Sequence[int]) -> Iterator[Rule]:
        for s, i in enumerate(choice):
            rate = 1 - self.kept[s][i] / self.groups[s]
            if rate > 0:
                for name in self.names[s]:
                    yield Rule(name, (Spec(self.spec.structure, rate, self.spec.block),))

    def nearest(self, share: float) -> list[int]:
        """The choice of every set that keeps closest to this share of its groups."""
        return [
            min(range(len(kept)), key=lambda i: abs(kept[i] / n - share))
            for kept, n in zip(self.kept, self.groups, strict=True)
        ]

    def share(self, name: str, choice: Sequence[int]) -> float:
        """The share of its multiply-adds that a layer is left with: an estimate from the masks (see plan_for)."""
        s = self.of.get(name)
        share = 1.0 if s is None else self.kept[s][choice[s]] / self.groups[s]
        share *= 1 - sum(p * (1 - self.kept[t][choice[t]] / self.groups[t]) for t, p in self.fed[name].items())
        if name in self.readers:
            sets, unread = self.readers[name]
            keeps = np.array([self.kept[t][choice[t]] for t in sets])
            share *= float((unread < keeps[:, None]).any(0).mean())
        return share

    def depends(self, name: str) -> tuple[int, ...]:
        """The sets whose choices the share of a layer depends on."""
        own = [self.of[name]] if name in self.of else []
        readers: list[int] = []
        if name in self.readers:
            sets, unread = self.readers[name]
            always = (unread < np.array([self.kept[t][-1] for t in sets])[:, None]).any(0).all()
            readers = [] if always else sets
        return tuple({*own, *self.fed[name], *readers})

    def shares(self, choice: Sequence[int]) -> dict[str, float]:
        return {name: self.share(name, choice) for name in self.layers}

    # Masks and sensitivities.

    def masks(self, model: nn.Module, s: int, keep: int) -> list[tuple[Tensor, Tensor]]:
        """(weight, mask) of the layers of one set with so many groups kept."""
        layers = [self.base[n] for n in self.names[s]]
        ws = [weight_of(model, la.name, _WHO).detach() for la in layers]
        coupled = self.coupled(s)
        if coupled is not None:  # of the first layer's filters
            keep = max(1, keep * self._count(layers[0].name) // self.groups[s])
        c = Constraint(self.spec.structure, 0.0, self.spec.block, keep)
        read = [w.float() if w.dtype == torch.float64 else w for w in ws]  # as the kernels take them
        if len(ws) == 1 and coupled is None:
            return [(ws[0], project_mask(read[0], (c,), layers[0].conv_groups))]
        on = coupled_masks(read, None, c, [la.conv_groups for la in layers], [None] * len(ws), coupled)
        return list(zip(ws, on, strict=True))

    def project_(self, model: nn.Module, choice: Sequence[int]) -> None:
        """One-shot: the groups of largest norm stay, in place."""
        with torch.no_grad():
            for s, i in enumerate(choice):
                if i:
                    for w, mask in self.masks(model, s, self.kept[s][i]):
                        w.mul_(mask)

    def energy(self, s: int) -> Floats:
        """[choices] share of the layers' sums of squares that goes, added up over the set."""
        cost = np.zeros(len(self.kept[s]))
        for own in self.sums[s]:
            if (total := own.sum()) > 0:
                gone = 1 - own[self.order[s]].cumsum() / total
                cost += np.maximum(gone[np.array(self.kept[s]) - 1], 0.0)
        cost[0] = 0.0  # nothing goes, up to rounding
        return cost

    def drops(self, model: nn.Module, evaluate: Callable[[nn.Module], float], energy: Sequence[Floats]) -> list[Floats]:
        """[choices] per set: how much evaluate falls when this set alone is projected, never less for more."""
        probe = clone(model).eval()

        def score() -> float:
            with torch.no_grad():
                value = float(evaluate(probe))
            if not math.isfinite(value):
                raise PlanError(f"{_WHO}: evaluate got {value}, wanted finite numbers")
            return value

        baseline = score()
        out = []
        for s, kept in enumerate(self.kept):
            n = self.groups[s]
            asked = sorted({i for share in (*_ASKED, kept[-1] / n) if (i := _closest(kept, share * n)) > 0})
            x, y = [1.0], [0.0]
            for i in asked:
                with _restored(probe, self.names[s]):
                    with torch.no_grad():
                        for w, mask in self.masks(probe, s, kept[i]):
                            w.mul_(mask)
                    x.append(kept[i] / n)
                    y.append(max(baseline - score(), y[-1]))
            drop = np.interp(np.array(kept) / n, x[::-1], y[::-1])
            out.append(drop + _TIE * max(1.0, abs(baseline)) * energy[s])
        return out

    # Allocation.

    def allocate_share(self, costs: Sequence[Floats], base: ResolvedPlan, key: str, target: float) -> list[int]:
        """Choices that keep `target` of all weights or multiply-adds."""
        total = base.totals()[key]
        assert total is not None
        size = {la.name: float(la.weights if key == "weights" else la.macs or 0) for la in base}
        fixed = total - sum(size[n] for n in self.of)
        expenses = []
        for s, names in enumerate(self.names):
            mine = []
            for keep in self.kept[s]:
                c = Constraint(self.spec.structure, 0.0, self.spec.block, keep)
                mine.append(sum(size[n] * _density(self.base[n], c) for n in names))
            expenses.append(np.array(mine))
        choice = knapsack(costs, expenses, target * total - fixed)
        if choice is None:
            least = (fixed + sum(e.min() for e in expenses)) / total
            raise _out_of_reach(key, target, least, self.max_rate)
        return choice

    def allocate_left(
        self, costs: Sequence[Floats], base: ResolvedPlan, sizes: Mapping[str, int], key: str, target: float
    ) -> list[int]:
        """Choices with which the layers keep `target` of all weights or multiply-adds once channels went with filters.

        sizes: layer -> weights or multiply-adds."""
        total = base.totals()[key]
        assert total is not None
        fixed = total - sum(sizes.get(n, 0) for n in self.layers)
        left = _Sum(self, lambda name, share: sizes.get(name, 0) * share)
        choice = descend(costs, left, target * total - fixed)
        if choice is None:
            raise _out_of_reach(key, target, (fixed + left(self.last)) / total, self.max_rate)
        return choice

    @property
    def last(self) -> list[int]:
        """As much as may go of every set."""
        return [len(k) - 1 for k in self.kept]

    def seconds(self, choice: Sequence[int], table: LatencyTable) -> float:
        return sum(table.at(n, self.share(n, choice)) for n in self.layers)

    def cheapest(self, costs: Sequence[Floats], table: LatencyTable, target: float) -> list[int] | None:
        """Choices whose predicted time is the baseline's over `target`; None where the table has none."""
        limit = table.baseline / target
        if any(len(self.depends(n)) > 1 for n in self.layers):
            return descend(costs, _Sum(self, table.at), limit)
        # Each layer's time depends on its own choice alone.
        zero = [0] * len(self.kept)
        expenses = []
        for s, kept in enumerate(self.kept):
            rows = [[*zero[:s], i, *zero[s + 1 :]] for i in range(len(kept))]
            mine = [n for n in self.layers if self.depends(n) == (s,)]
            expenses.append(np.array([sum(table.at(n, self.share(n, r)) for n in mine) for r in rows]))
        fixed = sum(table.at(n, 1.0) for n in self.layers if not self.depends(n))
        return knapsack(costs, expenses, limit - fixed)

    def predict(
        self,
        choice: Sequence[int],
        costs: Sequence[Floats],
        table: LatencyTable,
        target: float,
        evaluated: bool,
        left: Mapping[str, float],
        tried: tuple[Trial, ...],
    ) -> Prediction:
        """left: layer -> the share that compact left of it, where that is known."""
        rows = []
        for name in self.layers:
            s, share = self.of.get(name), self.share(name, choice)
            rate = None if s is None else 1 - self.kept[s][choice[s]] / self.groups[s]
            drop = float(costs[s][choice[s]]) if s is not None and name == self.names[s][0] else None
            now, stays = table.at(name, share), left.get(name, share)
            rows.append(LayerPrediction(name, rate, stays, table.at(name, 1.0), now, drop))
        drop = float(sum(c[i] for c, i in zip(costs, choice, strict=True)))
        return Prediction(target, sum(r.after for r in rows), drop, evaluated, tuple(rows), table, tried)


class _Sum:
    """What the layers spend with a choice, value(layer, share) each; kept by the choices that it depends on."""

    def __init__(self, sets: _Sets, value: Callable[[str, float], float]) -> None:
        self.sets, self.value = sets, value
        self.known: dict[tuple[Any, ...], float] = {}
        self.depends = {n: sets.depends(n) for n in sets.layers}

    def __call__(self, choice: Sequence[int]) -> float:
        total = 0.0
        for name, on in self.depends.items():
            key = (name, *(choice[s] for s in on))
            t = self.known.get(key)
            if t is None:
                t = self.known[key] = self.value(name, self.sets.share(name, choice))
            total += t
        return total


def _sizes(model: nn.Module, example: Any, key: str) -> dict[str, int]:
    """Weights or multiply-adds of each convolution and linear layer that runs."""
    return {row.name: getattr(row, key) for row in layer_table(model, example)}


def _density(layer: LayerPlan, c: Constraint) -> float:
    return LayerPlan(layer.name, layer.shape, layer.conv_groups, (c,)).density


def _choices(n: int, max_rate: float, round_to: int) -> list[int]:
    """Numbers of groups that may be kept of n, falling from n."""
    least = max(1, math.ceil(n * (1 - max_rate) - 1e-6))
    found = {n, least if round_to == 1 else -(-least // round_to) * round_to}
    for share in _KEPT:
        found.add(-(-max(1, round(share * n)) // round_to) * round_to)
    return sorted((k for k in found if least <= k <= n), reverse=True)


def _closest(kept: Sequence[int], n: float) -> int:
    """The number of the choice that keeps closest to n groups."""
    return min(range(len(kept)), key=lambda i: abs(kept[i] - n))


@contextmanager
def _restored(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """The weights of these layers are afterwards as they were."""
    before = {name: weight_of(model, name, _WHO).detach().clone() for name in names}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, w in before.items():
                weight_of(model, name, _WHO).copy_(w)
