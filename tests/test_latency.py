"""Rates for a speed-up: the cheapest that a table of seconds allows. Tables are made up here; time is never a test."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import structadmm as sa
from networks import VGG, ResNet, randomise
from structadmm import allocate, decisions
from structadmm.errors import PlanError
from structadmm.structure import filter_sets

latency = importlib.import_module("structadmm.latency")
rates = importlib.import_module("structadmm.rates")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(decisions.VARIABLE, str(tmp_path / "cache"))


def images(n: int = 1, size: int = 12) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(n))


class Chain(nn.Module):
    """Three convolutions of width 8 to prune, between a first one and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.a = nn.Conv2d(8, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 16, 3, padding=1)
        self.c = nn.Conv2d(16, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.a, self.b, self.c):
            x = torch.relu(layer(x))
        return self.head(x.mean((2, 3)))


def chain() -> nn.Module:
    return randomise(Chain(), 0.0, 3).eval()


def table(model: nn.Module, seconds: Callable[[str, float], float], baseline: float | None = None):
    """A table of a pure function of layer and share."""
    names = list(filter_sets(model, images())[1])
    x = [1.0, 0.7, 0.4, 0.2, 0.1, 0.0]
    y = {n: [seconds(n, s) for s in x] for n in names}
    whole = sum(v[0] for v in y.values())
    return latency.LatencyTable(1, "float32", 1, baseline or whole, "segments", None, dict.fromkeys(names, x), y)


SECONDS = {"first": 0.5, "a": 3.0, "b": 2.0, "c": 4.0, "head": 0.25}


def linear(name: str, share: float) -> float:
    return SECONDS.get(name, 1.0) * (0.1 + 0.9 * share)


# Allocation.


def cheapest(costs: list[np.ndarray], expense: Callable[..., float], limit: float) -> float:
    """The least cost of all choices within the limit; infinite where there is none."""
    best = np.inf
    for choice in product(*(range(len(c)) for c in costs)):
        if expense(choice) <= limit:
            best = min(best, sum(c[i] for c, i in zip(costs, choice, strict=True)))
    return best


@pytest.mark.parametrize("seed", range(60))
def test_the_knapsack_is_the_cheapest(seed: int) -> None:
    """Against all choices; what it may leave unused is one step a set."""
    g = np.random.default_rng(seed)
    sizes = g.integers(1, 6, size=g.integers(1, 6))
    costs = [np.r_[0, np.sort(g.random(n - 1))] for n in sizes]
    expenses = [g.random(n) if seed % 3 else np.sort(g.random(n))[::-1] for n in sizes]
    least, most = sum(e.min() for e in expenses), sum(e.max() for e in expenses)
    limit = least + g.random() * (most - least)

    def spent(choice) -> float:
        return sum(e[i] for e, i in zip(expenses, choice, strict=True))

    choice = allocate.knapsack(costs, expenses, limit)
    assert choice is not None and spent(choice) <= limit * (1 + 1e-9)
    cost = sum(c[i] for c, i in zip(costs, choice, strict=True))
    unused = len(sizes) * (limit - least) / allocate.STEPS
    assert cheapest(costs, spent, limit * (1 + 1e-9)) <= cost <= cheapest(costs, spent, limit - unused)
    assert allocate.knapsack(costs, expenses, least - 1e-3) is None
    only = allocate.knapsack(costs, expenses, least)
    assert only == [int(e.argmin()) for e in expenses]


@pytest.mark.parametrize("seed", range(40))
def test_descent_ends_where_no_single_change_is_better(seed: int) -> None:
    """With expenses that are products of neighbours' choices, as widths are. Of two sets, the cheapest of all."""
    g = np.random.default_rng(seed)
    n = 2 if seed % 2 else 4
    costs = [np.r_[0, np.sort(g.random(3))] for _ in range(n)]
    shares = np.array([1, 0.7, 0.4, 0.1])
    work = g.random(n + 1) + 0.1

    def spent(choice) -> float:
        widths = [1.0, *(shares[i] for i in choice), 1.0]
        return float(sum(w * a * b for w, a, b in zip(work, widths, widths[1:], strict=False)))

    limit = spent([3] * n) + g.random() * (spent([0] * n) - spent([3] * n))
    choice = allocate.descend(costs, spent, limit)
    assert choice is not None and spent(choice) <= limit * (1 + 1e-9)
    cost = sum(c[i] for c, i in zip(costs, choice, strict=True))
    for s in range(n):
        for i in range(4):
            other = [*choice[:s], i, *choice[s + 1 :]]
            if costs[s][i] < costs[s][choice[s]]:
                assert spent(other) > limit
    assert cost >= cheapest(costs, spent, limit) - 1e-12
    if n == 2:
        pairs = [(abs(i - choice[0]) <= 2 and abs(j - choice[1]) <= 2) * 1 for i in range(4) for j in range(4)]
        near = min(costs[0][i] + costs[1][j] for (i, j), ok in zip(product(range(4), range(4)), pairs, strict=True)
                   if ok and spent([i, j]) <= limit)  # fmt: skip
        assert cost <= near + 1e-12
    assert allocate.descend(costs, spent, spent([3] * n) * 0.99) is None


# Plans.


def predicted_seconds(model: nn.Module, plan: sa.Plan, seconds: Callable[[str, float], float]) -> float:
    """From the plan's rules alone, for structures whose layers do not shrink with their neighbours."""
    kept = {la.name: la.density for la in plan.resolve(model)}
    return sum(seconds(n, kept.get(n, 1.0)) for n in filter_sets(model, images())[1])


@pytest.mark.parametrize("structure", ["column", "block_column"])
@pytest.mark.parametrize("target", [1.2, 1.5, 1.8])
def test_plans_meet_a_speedup_at_the_least_cost(structure: str, target: float, monkeypatch) -> None:
    """Against all choices of rates, of which there are few here; every channel is still read, so times add up."""
    monkeypatch.setattr(rates, "_KEPT", (1.0, 0.8, 0.7, 0.6, 0.5))
    model = chain()
    made = table(model, linear)
    plan = sa.plan_for(model, images(), structure, speedup=target, table=made, max_rate=0.6)
    limit = sum(SECONDS.values()) / target
    assert predicted_seconds(model, plan, linear) <= limit * (1 + 1e-9)
    assert plan.prediction.speedup >= target * (1 - 1e-9)
    assert plan.prediction.seconds == pytest.approx(predicted_seconds(model, plan, linear))

    shapes = {n: model.get_submodule(n).weight for n in "abc"}

    def squares(w: Tensor) -> Tensor:
        """Falling sums of squares of the groups, by their definition."""
        if structure == "column":
            sums = w.square().sum(0).flatten()
        else:
            sums = torch.cat([b.square().sum(0).flatten() for b in w.split(8)])
        return sums.double().sort(descending=True).values

    costs, expenses = [], []
    for name, w in shapes.items():
        s = squares(w.detach())
        kept = rates._choices(len(s), 0.6, 1)
        costs.append(np.array([1 - float(s[:k].sum() / s.sum()) for k in kept]))
        expenses.append(np.array([linear(name, k / len(s)) for k in kept]))
    fixed = SECONDS["first"] + SECONDS["head"]

    def spent(choice) -> float:
        return fixed + sum(e[i] for e, i in zip(expenses, choice, strict=True))

    room = limit - fixed - sum(e.min() for e in expenses)
    least = cheapest(costs, spent, limit)
    assert least - 1e-6 <= plan.prediction.drop <= cheapest(costs, spent, limit - 3 * room / allocate.STEPS) + 1e-6


@pytest.mark.parametrize(
    ("kind", "structure"), [("B", "column"), ("bottleneck", "column"), ("bottleneck", "channel"), ("chain", "column")]
)
def test_estimated_shares_of_a_plain_network_and_a_residual_one(kind: str, structure: str) -> None:
    """In these four cases they are what compact leaves with columns="always": layers shrink by what reads them. For
    filters, blocks and depthwise networks they are estimates; plan_for says so, and takes the shares from trials."""
    model = chain() if kind == "chain" else randomise(ResNet(kind, width=16), 0.0, 1).eval()
    spec = rates.Spec(structure, 0.5, 4)
    base = sa.Plan((rates.Rule("*", (spec,)),)).resolve(model, images())
    sets = rates._Sets(model, images(), base, spec, 0.95, 1)
    g = np.random.default_rng(0)
    for _ in range(3):
        choice = [int(g.integers(len(k))) for k in sets.kept]
        zeros = rates.clone(model).eval()
        sets.project_(zeros, choice)
        shares = sets.shares(choice)
        for row in sa.compact(zeros, images(), columns="always", verify=False).report.layers:
            assert row.macs_after / row.macs_before == pytest.approx(shares[row.name]), row.name


def test_coupled_layers_get_one_rate_and_neighbours_shrink() -> None:
    model, x = randomise(ResNet("B", width=16), 0.0, 1).eval(), images()

    def seconds(name: str, share: float) -> float:
        return 0.01 + share * (3 if "conv2" in name or "downsample" in name else 1)

    plan = sa.plan_for(model, x, "filter", speedup=3.0, table=table(model, seconds))
    kept = {la.name: la.constraints[0].keep for la in plan.resolve(model)}
    planned = [names for names in sa.coupled_layers(model, x) if kept.keys() & set(names)]
    assert planned, "a stream whose layers are all planned"
    for names in planned:
        assert {kept[n] for n in names} == {kept[names[0]]}
    assert "conv1" not in kept and "layer1.0.conv2" not in kept, "it goes with the first convolution, which stays"
    sa.ADMM(model, plan, coupled=sa.coupled_layers(model, x))  # takes the plan as it is

    rows = {r.name: r for r in plan.prediction.layers}
    inner, outer = rows["layer1.1.conv1"], rows["layer1.1.conv2"]
    a, b = (1 - (r.rate or 0.0) for r in (inner, outer))
    assert outer.share == pytest.approx(a * b), "filters of its own, channels of the layer before"
    last = rows["fc"]
    assert last.rate is None and last.share == pytest.approx(b), "the classifier reads the last stream"
    assert plan.prediction.seconds == pytest.approx(sum(seconds(n, r.share) for n, r in rows.items()))


def test_depthwise_layers_go_with_the_one_before() -> None:
    model, x = randomise(ResNet("mobile"), 0.0, 1).eval(), images()
    names, reads = filter_sets(model, x)
    at = next(i for i, s in enumerate(names) if "layer1.0.body.3" in s)
    assert names[at] == ("layer1.0.body.0", "layer1.0.body.3")
    assert not reads["layer1.0.body.3"][0].size and set(reads["layer1.0.project.0"][0].tolist()) == {at}


@pytest.mark.parametrize("structure", ["filter", "column"])
def test_round_to(structure: str) -> None:
    model, x = randomise(VGG(), 0.0, 1).eval(), images()
    for key in ({"speedup": 1.7, "table": table(model, lambda n, s: 0.1 + s)}, {"macs": 0.6}, {"weights": 0.6}):
        plan = sa.plan_for(model, x, structure, round_to=4, **key)
        for la in plan.resolve(model):
            c = la.constraints[0]
            assert c.keep % 4 == 0 and 0 < c.keep < la.groups(c), la


def test_sensitivities_come_from_evaluate() -> None:
    """Layer a is touchy, b and c do not matter to the score: a stays whole as long as the others can pay."""
    model = chain()
    before = {n: p.clone() for n, p in model.named_parameters()}
    calls = 0

    def evaluate(m: nn.Module) -> float:
        nonlocal calls
        calls += 1
        assert not m.training and not torch.is_grad_enabled()
        gone = {n: float((m.get_submodule(n).weight == 0).float().mean()) for n in "abc"}
        assert sum(v > 0 for v in gone.values()) <= 1, "one layer at a time, the others restored"
        return 0.9 - 0.8 * gone["a"] - 0.01 * gone["c"]

    made = table(model, linear)
    plan = sa.plan_for(model, images(), "column", speedup=2.0, evaluate=evaluate, table=made)
    assert calls == 1 + 3 * 5, "once, and for each layer at four rates and the largest"
    found = {r.name: r for r in plan.prediction.layers}
    assert found["a"].rate == 0 and found["b"].rate > 0.8 and found["c"].rate > 0.5
    assert found["c"].drop == pytest.approx(0.01 * found["c"].rate, abs=1e-5), "interpolated"
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    energy = sa.plan_for(model, images(), "column", speedup=2.0, table=made).prediction
    assert next(r.rate for r in energy.layers if r.name == "a") > 0

    kept = sa.plan_for(model, images(), "column", macs=0.6, evaluate=evaluate).resolve(model, images())
    assert "a" not in {la.name for la in kept} and kept.totals()["macs_removed"] >= 0.4
    with pytest.raises(PlanError, match="evaluate got nan, wanted finite"):
        sa.plan_for(model, images(), "column", macs=0.6, evaluate=lambda m: float("nan"))


def test_targets_that_make_no_sense() -> None:
    model = chain()
    made = table(model, linear)
    for arguments, message in (
        ({"speedup": 2.0, "macs": 0.5}, "got two targets, wanted weights or macs or speedup"),
        ({"speedup": 2.0, "macs": 0.5, "weights": 0.5}, "got three targets"),
        ({"speedup": 1.0}, "speedup got 1.0, wanted a number above 1"),
        ({"speedup": float("inf")}, "speedup got inf"),
        ({"speedup": float("nan")}, "speedup got nan"),
        ({"speedup": 2.0, "structure": "element"}, "structure got 'element' for a speed-up"),
        ({"speedup": 2.0, "trials": -1}, "trials got -1, wanted an integer of at least 0"),
        ({"speedup": 2.0, "round_to": 0}, "round_to got 0, wanted an integer of at least 1"),
        (
            {"speedup": 50.0, "table": made},
            r"speedup got 50.0, wanted at most \d+\.\d+, which is predicted",
        ),
        ({"speedup": 2.0, "table": table(nn.Sequential(nn.Conv2d(3, 4, 3)), linear)}, "table got no times of layer"),
        ({"weights": 0.01, "max_rate": 0.5, "round_to": 2}, "weights got 0.01, wanted at least .* left at max_rate"),
    ):
        with pytest.raises(PlanError, match=message):
            sa.plan_for(model, images(), **{"structure": "column", **arguments})


# Predictions.


def test_the_prediction_prints() -> None:
    model = chain()
    plan = sa.plan_for(model, images(), "column", speedup=2.0, table=table(model, linear))
    text = str(plan)
    assert "not tried" in text
    tried = replace(plan.prediction, trials=(latency.Trial(2.0, 1.5), latency.Trial(2.02, 1.98)))
    shown = str(tried)
    assert "trial 2: predicted 2.02, found 1.98" in shown and "corrected by 2 trials" in shown
    assert "predicted speed-up: 2.0" in text and "asked for: 2" in text
    assert all(name in text for name in ("first", "a", "b", "c", "head")) and "fastest form of torch" not in text
    again = sa.Plan.from_dict(plan.to_dict())
    assert again.rules == plan.rules, "files hold the rules"
    assert plan.prediction.to_dict()["speedup"] == plan.prediction.speedup


def test_what_is_measured_is_printed_beside_it(capsys) -> None:
    model, x = chain(), images(2)
    plan = sa.plan_for(model, x, "column", speedup=2.0, table=table(model, linear))
    sa.ADMM(model, plan).harden_()
    small = sa.compact(model, x, columns="always")
    found = sa.measure_speedup(plan, chain(), small, x, budget=0.05)
    shown = capsys.readouterr().out
    assert "measured speed-up" in shown and f"predicted: {plan.prediction.speedup:.2f}" in shown
    assert found.error == plan.prediction.speedup / found.measured.median - 1
    plain = sa.measure_speedup(sa.Plan(plan.rules), chain(), sa.optimize(small, x, budget=0, report=False), x,
                               budget=0.05, report=False)  # fmt: skip
    assert plain.predicted is None and plain.error is None and "predicted" not in str(plain)


def test_tables_interpolate() -> None:
    t = latency.LatencyTable(1, "float32", 1, 1.0, "", None, {"x": [1.0, 0.5, 0.1]}, {"x": [10.0, 4.0, 2.0]})
    wanted = {2.0: 10.0, 1.0: 10.0, 0.75: 7.0, 0.5: 4.0, 0.3: 3.0, 0.1: 2.0, 0.05: 2.0}
    assert {s: t.at("x", s) for s in wanted} == pytest.approx(wanted)


# The table.


@pytest.mark.parametrize("structure", ["filter", "column"])
def test_tables_are_measured_once(structure: str, monkeypatch) -> None:
    """With a clock that is a function of layer and weights: what is measured adds up, and is taken from the cache."""
    model, x = randomise(ResNet("B", width=16), 0.0, 1).eval(), images()
    measured = tried = 0
    dense_seconds = 0.0

    def clock(networks, inputs, budget):
        nonlocal measured, tried, dense_seconds
        measured, tried = measured + ("1" in networks), tried + ("small" in networks)
        steps = {}
        for name, net in list(networks.items())[1:]:
            net(*inputs)
            steps[name] = {n: 1e-6 * r.weights_after for n, r in layers_of(net).items()} | {"": 0.01}
        whole = {name: 2 * sum(s.values()) for name, s in steps.items()}  # steps are scaled to it
        dense_seconds = whole.get("1", dense_seconds)
        return {next(iter(networks)): dense_seconds} | whole, steps

    def layers_of(net: nn.Module):
        from structadmm import segments
        from structadmm.layers import layer_table

        found = {}
        for s in segments.segments_of(net).values():
            for row in layer_table(s.network(), x):
                found[row.name] = type("Row", (), {"weights_after": row.weights})
        return found

    monkeypatch.setattr(latency, "measure", clock)
    plan = sa.plan_for(model, x, structure, speedup=1.5, budget=0.1)
    dense = sum(m.weight.numel() for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
    assert 1 <= tried == len(plan.prediction.trials) <= latency.TRIALS
    made = sa.plan_for(model, x, structure, speedup=1.5, trials=0).prediction.table
    assert sum(made.at(n, 1.0) for n in made.shares) == pytest.approx(2 * (1e-6 * dense + 0.01))
    assert made.baseline == pytest.approx(2 * (1e-6 * dense + 0.01)) and made.batch == 1
    for shares in made.shares.values():
        assert shares[0] == 1 and list(shares) == sorted(shares, reverse=True)
    name = "layer1.1.conv1"
    assert len(made.shares[name]) >= 4 and made.at(name, 0.1) < 0.5 * made.at(name, 1.0)

    assert sa.plan_for(model, x, structure, speedup=1.3, trials=0).prediction.table == made and measured == 1
    sa.plan_for(model, images(2), structure, speedup=1.3, budget=0.1, trials=0)
    assert measured == 2, "another batch size"
    sa.plan_for(model, x, structure, speedup=1.3, block=4, budget=0.1, trials=0)
    assert measured == 3, "another structure"


@pytest.mark.parametrize("structure", ["filter", "column", "block_column"])
@pytest.mark.parametrize("kind", ["B", "mobile"])
def test_after_a_trial_shares_are_what_compact_leaves(structure: str, kind: str, monkeypatch) -> None:
    """Of the plan returned, pruned and compacted anew; seconds are the multiply-adds left, so they add up too."""
    model, x = randomise(ResNet(kind, width=16), 0.0, 1).eval(), images()
    names = list(filter_sets(model, x)[1])
    shares = [1.0, 0.4, 0.1, 0.05]
    made = latency.LatencyTable(1, "float32", 1, float(len(names)), "segments", None, dict.fromkeys(names, shares),
                                dict.fromkeys(names, shares))  # fmt: skip
    monkeypatch.setattr(rates, "latency_table", lambda *_args, **_more: made)

    class Fake:
        def __init__(self, *_: object) -> None:
            pass

        def __call__(self, with_zeros: nn.Module, at: dict[str, float]):
            left = {r.name: r.macs_after / r.macs_before for r in sa.compact(with_zeros, x, verify=False).report.layers}
            return latency.Found(at, left, sum(left.values()), left)

    monkeypatch.setattr(rates, "Bench", Fake)
    plan = sa.plan_for(model, x, structure, speedup=1.6)
    assert 1 <= len(plan.prediction.trials) <= latency.TRIALS + 1  # the chosen one once more
    coupled = sa.coupled_layers(model, x) if structure == "filter" else ()
    sa.ADMM(model, plan, coupled=coupled).harden_()
    left = {r.name: r.macs_after / r.macs_before for r in sa.compact(model, x, verify=False).report.layers}
    assert {r.name: r.share for r in plan.prediction.layers} == pytest.approx(left)
    assert plan.prediction.seconds == pytest.approx(sum(left.values()))


# Trials, with a clock that is a function of layers and shares.

GRID = [i / 20 for i in range(20, 1, -1)]
WORK = {"a": 3.0, "b": 2.0, "c": 4.0}
UNIFORM = (1.0, 0.4, 0.2, 0.1)


def uniform(truth: Callable[[str, float], float]):
    """The table of networks pruned alike, at few densities; a half of a second is in a layer that nothing changes."""
    shares = {n: UNIFORM for n in WORK} | {"fixed": (1.0,)}
    seconds = {n: [truth(n, s) for s in UNIFORM] for n in WORK} | {"fixed": [0.5]}
    baseline = sum(y[0] for y in seconds.values())
    return latency.LatencyTable(1, "float32", 1, baseline, "segments", None, shares, seconds)


def cost_of(choice: tuple[float, ...]) -> float:
    return sum(w * (1 - s) ** 2 for w, s in zip((1.0, 2.0, 1.5), choice, strict=True))


def total(made, choice: tuple[float, ...]) -> float:
    return sum(made.at(n, s) for n, s in zip(WORK, choice, strict=True)) + made.at("fixed", 1.0)


def approached(made, truth: Callable[[str, float], float], target: float, **more: int):
    """What approach returns, and the choices that it tried; choices are all triples of the grid."""
    asked: list[tuple[float, ...]] = []

    def choose(by):
        at = {n: [by.at(n, s) for s in GRID] for n in WORK}
        t = [sum(at[n][i] for n, i in zip(WORK, c, strict=True)) + 0.5 for c in product(range(len(GRID)), repeat=3)]
        all_ = list(product(GRID, repeat=3))
        enough = [i for i, v in enumerate(t) if v <= made.baseline / target]
        i = min(enough, key=lambda i: cost_of(all_[i])) if enough else len(all_) - 1
        return all_[i], t[i], cost_of(all_[i])

    def attempt(choice):
        asked.append(choice)
        steps = {n: truth(n, s) for n, s in zip(WORK, choice, strict=True)} | {"fixed": 0.4, "": 0.1}
        at = dict(zip(WORK, choice, strict=True)) | {"fixed": 1.0}
        return latency.Found(at, steps, sum(steps.values()), at)

    return latency.approach(made, target, choose, attempt, **more), asked


def line(name: str, share: float) -> float:
    return WORK[name] * (0.05 + 0.95 * share)


def step(name: str, share: float) -> float:
    """Layers stay dense above a density of 0.8."""
    return line(name, share if share <= 0.8 else 1.0)


def slower(name: str, share: float) -> float:
    """40 % more than in a uniform network."""
    return line(name, share) * (1.0 if share == 1 else 1.4)


@pytest.mark.parametrize("target", [1.2, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("truth", [line, step, slower])
def test_trials_come_to_the_target(truth: Callable[[str, float], float], target: float) -> None:
    made = uniform(line if truth is slower else truth)
    (choice, after, log, found), asked = approached(made, truth, target)
    seconds = sum(truth(n, s) for n, s in zip(WORK, choice, strict=True)) + 0.5
    assert choice in asked and 1 <= len(asked) == len(log) <= latency.TRIALS
    assert made.baseline / seconds >= target * (1 - latency.CLOSE), "met, as measured"
    assert total(after, choice) == pytest.approx(seconds) == found.seconds, "and predicted"
    assert log[0].predicted == pytest.approx(made.baseline / total(made, asked[0])), "the first by the table as it was"
    for trial, c in zip(log, asked, strict=True):
        wanted = made.baseline / (sum(truth(n, s) for n, s in zip(WORK, c, strict=True)) + 0.5)
        assert trial.found == pytest.approx(wanted)
    if truth is line:
        assert len(log) == 1, "nothing to correct"
    if truth is slower:
        assert log[0].found < 0.85 * log[0].predicted and len(log) > 1


def test_trials_are_bounded_and_fall_short_openly() -> None:
    """Where nothing gets faster the fastest of those tried is returned, with what it does."""
    made = uniform(line)
    for trials in (1, 2, 3):
        (choice, after, log, _), asked = approached(made, lambda n, s: WORK[n] * (0.9 + 0.1 * s), 2.0, trials=trials)
        once_more = len(asked) > 1
        assert len(asked) == len(log) <= trials + once_more and len(set(asked)) == len(asked) - once_more
        assert made.baseline / total(after, choice) == pytest.approx(max(t.found for t in log))
        assert all(t.found < 1.2 for t in log)
    (choice, after, log, found), asked = approached(made, line, 2.0, trials=0)
    assert asked == [] and log == () and found is None and after == made


@pytest.mark.parametrize("seed", range(20))
def test_tables_are_exact_where_they_were_corrected(seed: int) -> None:
    """After trials at random the last one's sum is met, dense seconds stay unless tried, and no time is negative."""
    g = np.random.default_rng(seed)
    made = uniform(line)
    found = []
    for _ in range(int(g.integers(1, 5))):
        at = {n: float(g.choice(GRID)) for n in WORK} | {"fixed": 1.0}
        steps = {n: float(g.random() * 3) for n in WORK} | {"fixed": 0.4, "": float(g.random())}
        found.append(latency.Found(at, steps if seed % 4 else {"": 1.0}, float(1 + 5 * g.random()), at))
    after = latency.corrected(made, found)
    assert sum(after.at(n, s) for n, s in found[-1].shares.items()) == pytest.approx(found[-1].seconds)
    for n, x in after.shares.items():
        assert list(x) == sorted(set(x), reverse=True) and min(after.seconds[n]) >= 0
        if all(f.shares[n] < 1 for f in found):
            assert after.at(n, 1.0) == made.at(n, 1.0)
    assert after.seconds["fixed"] == made.seconds["fixed"]


def test_damaged_tables_are_measured_anew() -> None:
    good = latency.LatencyTable(1, "float32", 1, 1.0, "", None, {"x": [1.0, 0.5]}, {"x": [2.0, 1.0]}).to_dict()
    assert latency._from_cache(good, 1) is not None
    worse = [{"baseline": -1.0}, {"seconds": {"x": [1.0]}}, {"shares": {"x": [0.5, 1.0]}}, {"threads": 2}]
    worse += [{"seconds": {"x": [1.0, "2"]}}, {"more": 1}, {"shares": 3}]
    for bad in (None, {}, *(good | w for w in worse)):
        assert latency._from_cache(bad, 1) is None


def test_the_clock_sees_every_layer() -> None:
    """The real one, on a network in segments and on one that torch runs."""
    model, x = randomise(ResNet("B"), 0.5, 1).eval(), images()
    dense = sa.optimize(model, x, budget=0, report=False)
    torch_net = model.double()
    networks = {"first": dense, "segments": dense, "torch": sa.optimize(torch_net, x.double(), budget=0, report=False)}
    layers = {n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    for name, inputs in (("segments", (x,)), ("torch", (x.double(),))):
        found = latency._steps(networks[name], inputs)
        assert layers <= {n.removeprefix("form.body.") for n in found} and "" in found
        assert all(t > 0 for n, t in found.items() if n)
    seconds, steps = latency.measure({"first": dense, "again": dense}, (x,), 0.02)
    assert set(seconds) == {"first", "again"} and set(steps) == {"again"} and min(seconds.values()) > 0
