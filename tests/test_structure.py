"""Coupled filters, pruned as one group, can always be removed; rates meet a target."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import structadmm as sa
from networks import ResNet, randomise
from structadmm.constraints import Constraint, coupled_masks
from structadmm.errors import PlanError

torch.set_num_threads(1)  # tiny networks


def images(n: int) -> Tensor:
    return torch.randn(n, 3, 12, 12, generator=torch.Generator().manual_seed(n))


def test_layers_of_a_residual_stream_are_coupled() -> None:
    sets = sa.coupled_layers(ResNet("B"), images(2))
    assert sets == [
        ("conv1", "layer1.0.conv2"),
        ("layer1.1.conv2", "layer1.1.downsample.0", "layer1.2.conv2"),
    ]
    mobile = sa.coupled_layers(ResNet("mobile"), images(2))
    assert ("layer1.0.body.0", "layer1.0.body.3") in mobile, "a depthwise convolution with the one before it"


def test_the_projection_is_the_nearest_point() -> None:
    """Against every choice of filters."""
    from itertools import combinations

    g = torch.Generator().manual_seed(0)
    ws = [torch.randn(5, n, generator=g) for n in (3, 7)]
    us = [torch.randn(w.shape, generator=g) for w in ws]
    masks = coupled_masks(ws, us, Constraint("filter", 0.6, keep=2), [1, 1], [None, None])

    def kept(rows: list[int]) -> float:
        return sum(float((w + u)[rows].square().sum()) for w, u in zip(ws, us, strict=True))

    best = max(combinations(range(5), 2), key=lambda rows: kept(list(rows)))
    assert all(m.any(1).nonzero().flatten().tolist() == list(best) for m in masks)


def test_what_is_pruned_together_is_removed() -> None:
    torch.manual_seed(0)
    model = randomise(ResNet("B"), 0.0, 1)
    sets = sa.coupled_layers(model, images(2))
    plan = sa.Plan.from_dict({"rule": [{"match": "conv1", "structure": "filter", "rate": 0.5},
                                       {"match": "*", "structure": "filter", "rate": 0.5}]})  # fmt: skip
    admm = sa.ADMM(model, plan, rho=0.1, coupled=sets)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(images(8)), torch.arange(8)).backward()
        admm.add_penalty_grad_()
        optimizer.step()
        report = admm.step()
    assert set(report.layers) == {la.name for la in admm.plan}
    for names in sets:
        rows = [admm.z(n).flatten(1).any(1) for n in names]
        assert all(torch.equal(r, rows[0]) and int(r.sum()) == len(r) // 2 for r in rows)
    masks = admm.harden_()
    assert list(masks) == [la.name for la in admm.plan]
    with torch.no_grad():
        for m in model.modules():  # what BatchNorm is left with of an empty filter
            if isinstance(m, torch.nn.BatchNorm2d):
                m.running_mean.zero_()
                m.bias.zero_()
    small = sa.compact(model, images(2), columns="never")
    halves = {n: m.out_channels for n, m in small.named_modules() if isinstance(m, torch.nn.Conv2d)}
    assert halves["conv1"] == 4 and all(v == 8 for n, v in halves.items() if n.startswith(("layer1.1", "layer1.2")))


class Net(nn.Module):
    def __init__(self, function: Any, **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.function(self, x)
        return out


def grouped(m: Any, x: Tensor) -> Tensor:
    return m.last(F.relu(m.b(F.relu(m.a(x)))).mean((2, 3)))


def attention(m: Any, x: Tensor) -> Tensor:
    x = m.a(x.flatten(2).transpose(1, 2))
    q, k, v = m.qkv(x).view(x.shape[0], -1, 3, 4, 6).permute(2, 0, 3, 1, 4).unbind(0)
    return m.last(F.relu(m.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))).mean(1)


def gated(m: Any, x: Tensor) -> Tensor:
    return m.last(F.glu(m.a(x.mean((2, 3)))))


def shuffled(m: Any, x: Tensor) -> Tensor:
    y = torch.cat((F.relu(m.a(x)), F.relu(m.b(x))), 1)
    return m.last(F.relu(m.depthwise(F.channel_shuffle(y, 2))).mean((2, 3)))


# What plain filters would not leave: conv groups and heads of one size, rows of q and k that are multiplied, halves of
# a gate, channels of a concatenation that one layer filters.
NETWORKS = {
    "grouped": lambda: Net(grouped, a=nn.Conv2d(3, 16, 3), b=nn.Conv2d(16, 24, 3, groups=4), last=nn.Linear(24, 3)),
    "attention": lambda: Net(
        attention, a=nn.Linear(3, 10), qkv=nn.Linear(10, 72), o=nn.Linear(24, 8), last=nn.Linear(8, 3)
    ),
    "gated": lambda: Net(gated, a=nn.Linear(3, 24), last=nn.Linear(12, 3)),
    "shuffled": lambda: Net(
        shuffled, a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(3, 8, 3), depthwise=nn.Conv2d(16, 16, 3, groups=16),
        last=nn.Linear(16, 3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("rate", [0.5, 0.3])
@pytest.mark.parametrize("name", NETWORKS)
def test_filters_that_are_pruned_are_removed_whatever_ties_them(name: str, rate: float) -> None:
    torch.manual_seed(0)
    model = NETWORKS[name]().eval()
    with torch.no_grad():  # constants, which could keep a filter
        for n, p in model.named_parameters():
            if n.endswith("bias"):
                p.zero_()
    x = torch.randn(2, 3, 8, 8)
    sets = sa.coupled_layers(model, x)
    layers = [n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and n != "last"]
    plan = sa.Plan.from_dict({"rule": [{"match": n, "structure": "filter", "rate": rate} for n in layers]})
    wanted = {layer.name: layer.constraints[0].keep for layer in plan.resolve(model)}

    def left(coupled: Any) -> tuple[dict[str, tuple[int, int]], bool]:
        """Filters that are not zero, and those that compact leaves; whether some stay that do nothing."""
        pruned = copy.deepcopy(model)
        admm = sa.ADMM(pruned, plan, rho=0.1, coupled=coupled)
        admm.step()
        admm.harden_()
        small = sa.compact(pruned, x, columns="never")
        out = {}
        for n in layers:
            filled = int(pruned.get_submodule(n).weight.flatten(1).any(1).sum())
            assert filled == int(admm.z(n).flatten(1).any(1).sum()) <= wanted[n]
            out[n] = (filled, small.get_submodule(n).weight.shape[0])
        return out, bool(small.report.notes)

    together, idle = left(sets)
    assert not idle and all(filled == kept for filled, kept in together.values()), "what is pruned is removed, no more"
    if rate == 0.5:
        assert {n: kept for n, (_, kept) in together.items()} == wanted
        assert left(()) != (together, False), "the network shows nothing"


def test_filters_of_conv_groups_meet_a_target() -> None:
    model = NETWORKS["grouped"]().eval()
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        for layer in (model.a, model.b):
            layer.bias.zero_()  # type: ignore[union-attr, operator]
    plan = sa.plan_for(model, x, "filter", weights=0.5)
    sa.ADMM(model, plan, coupled=sa.coupled_layers(model, x)).harden_()
    report = sa.compact(model, x, columns="never").report
    assert 0.35 < report.weights_after / report.weights_before <= 0.5


def test_coupled_layers_are_planned_alike() -> None:
    model = ResNet("B")
    rules = [{"match": "layer1.1.conv2", "structure": "filter", "rate": 0.25}]
    rules += [{"match": m, "structure": "filter", "rate": 0.5} for m in ("conv1", "*")]
    plan = sa.Plan.from_dict({"rule": rules})
    sets = sa.coupled_layers(model, images(2))
    with pytest.raises(PlanError, match=r"layer1\.1\.downsample\.0' got 8 filters kept, wanted one constraint"):
        sa.ADMM(model, plan, coupled=sets)
    with pytest.raises(PlanError, match="columns kept, wanted one constraint on filters"):
        sa.ADMM(model, sa.Plan.uniform(model, "column", 0.5), coupled=sets[1:])
    with pytest.raises(PlanError, match="coupled layer 'conv1' got no constraint, wanted the one of 'layer1"):
        sa.ADMM(model, sa.Plan.uniform(model, "filter", 0.5), coupled=sets)


@pytest.mark.parametrize("structure", ["column", "block_column"])
@pytest.mark.parametrize(("key", "share"), [("weights", 0.3), ("macs", 0.5)])
def test_rates_meet_a_target(structure: str, key: str, share: float) -> None:
    model = randomise(ResNet("B", width=16), 0.0, 1)
    with torch.no_grad():  # a layer whose groups differ much, which should lose most
        w = model.layer1[1].conv1.weight
        w.mul_(torch.logspace(-2, 0, w.shape[0])[:, None, None, None] * torch.logspace(-2, 0, 16)[None, :, None, None])
    plan = sa.plan_for(model, images(1), structure, **{key: share})
    resolved = plan.resolve(model, images(1))
    kept = 1 - resolved.totals()[f"{key}_removed"]
    assert kept <= share and kept > share - 0.05  # a group of the largest layer is some per cent
    rates = {la.name: 1 - la.density for la in resolved}
    assert rates["layer1.1.conv1"] == max(rates.values()) <= 0.95 + 1e-6
    assert "conv1" not in rates and "fc" not in rates


@pytest.mark.parametrize("evaluated", [False, True])
@pytest.mark.parametrize("key", ["weights", "macs"])
def test_what_is_left_of_filters_meets_a_target(key: str, evaluated: bool) -> None:
    """Input channels that go with the filters before them count; coupled layers have one rate."""
    model = randomise(ResNet("B", width=16), 0.0, 1)
    with torch.no_grad():  # constants, which could keep a filter
        for m in model.modules():
            if isinstance(m, torch.nn.BatchNorm2d):
                m.running_mean.zero_()
                m.bias.zero_()
    evaluate = (lambda m: -float((m.layer1[1].conv1.weight == 0).sum())) if evaluated else None
    plan = sa.plan_for(model, images(1), "filter", **{key: 0.5}, evaluate=evaluate)
    sa.ADMM(model, plan, coupled=sa.coupled_layers(model, images(1))).harden_()
    report = sa.compact(model, images(1), columns="never").report
    left = getattr(report, f"{key}_after") / getattr(report, f"{key}_before")
    assert 0.45 < left <= 0.5
    for layer in plan.resolve(model):
        assert model.get_submodule(layer.name).weight.flatten(1).any(1).sum() == layer.constraints[0].keep
        row = next(r for r in report.layers if r.name == layer.name)
        assert row.shape_after[0] == layer.constraints[0].keep, "what is pruned is removed"


def test_plans_of_models_in_double_precision() -> None:
    model = randomise(ResNet("B"), 0.0, 1)
    plans = []
    for m in (model, copy.deepcopy(model).double()):
        x = images(1).to(next(m.parameters()))
        plans.append(sa.plan_for(m, x, "filter", weights=0.5, evaluate=lambda net: -float((net.fc.weight == 0).sum())))
    assert plans[0] == plans[1]


def test_targets_out_of_reach_are_refused() -> None:
    model = ResNet("B")
    for arguments, message in (
        ({}, "got no target, wanted weights or macs"),
        ({"weights": 0.5, "macs": 0.5}, "got two targets"),
        ({"weights": 1.5}, r"weights got 1.5, wanted a share in \(0, 1\)"),
        ({"weights": 0.01, "max_rate": 0.5}, "weights got 0.01, wanted at least .* left at max_rate 0.5"),
    ):
        with pytest.raises(PlanError, match=message):
            sa.plan_for(model, images(1), **arguments)
