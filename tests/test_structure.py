"""Coupled filters, pruned as one group, can always be removed; rates meet a target."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

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
