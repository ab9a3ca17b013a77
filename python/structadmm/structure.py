"""What can be pruned together and how much of it: coupled filters, and rates for a target of weights or multiply-adds.

Filters that a network adds up (the layers that write into one residual stream, a convolution and the depthwise one
behind it) can only be cut together. `coupled_layers` finds them, `ADMM(..., coupled=)` prunes them as one group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .analysis import Analysis
from .errors import PlanError
from .groups import DEFAULT_BLOCK, STRUCTURES
from .masks import weight_of
from .plan import Plan, Rule, Spec
from .trace import trace

# Bisection steps of a target: rates to a ten-thousandth.
_STEPS = 14


def coupled_layers(model: nn.Module, example: Tensor | Sequence[Tensor]) -> list[tuple[str, ...]]:
    """Sets of layers whose filters go together one by one, in the order of the network; single layers are left out.

    Left out too are layers whose filters can't go at all, such as those that make the network's output or feed a
    LayerNorm. Raises TraceError where the model can't be traced.
    """
    analysis = Analysis(trace(model, example, "coupled_layers"))
    fixed = {int(n) for ids, _ in analysis.locks for n in analysis.label[ids]}
    sets: dict[bytes, list[str]] = {}
    for node, layer in analysis.layers.items():
        labels = analysis.label[layer.outs.ids]
        if not fixed & set(labels.tolist()):
            sets.setdefault(labels.tobytes(), []).append(str(node.target))
    return [tuple(names) for names in sets.values() if len(names) > 1]


def plan_for(
    model: nn.Module,
    example: Tensor | tuple[Any, ...],
    structure: str = "column",
    *,
    weights: float | None = None,
    macs: float | None = None,
    block: int = DEFAULT_BLOCK,
    max_rate: float = 0.95,
    skip: Sequence[str] = (),
) -> Plan:
    """A plan with a rate for every layer that keeps the share `weights` of all weights, or `macs` of multiply-adds.

    One threshold for the whole network on the norm of a group, relative to the root mean square of its layer's: layers
    whose groups differ most lose most, at most max_rate. What is counted is what Plan.resolve counts: masks, not what
    compact makes of them (with filters it removes more). skip: name patterns left alone, beside the first convolution
    and the classifier.

    Raises PlanError: not one target, one outside (0, 1), one that can't be met with max_rate.
    """
    who = "plan_for"
    if (weights is None) == (macs is None):
        raise PlanError(f"{who}: got {'no target' if weights is None else 'two targets'}, wanted weights or macs")
    target, key = (weights, "weights_removed") if weights is not None else (macs, "macs_removed")
    assert target is not None
    if not 0 < target < 1:
        raise PlanError(f"{who}: {key.removesuffix('_removed')} got {target}, wanted a share in (0, 1)")
    if not 0 < max_rate < 1:
        raise PlanError(f"{who}: max_rate got {max_rate}, wanted a share in (0, 1)")
    if structure not in STRUCTURES:
        raise PlanError(f"{who}: structure got {structure!r}, wanted one of {', '.join(STRUCTURES)}")
    left_alone = tuple(Rule(pattern, skip="skipped on request") for pattern in skip)
    base = Plan((*left_alone, Rule("*", (Spec(structure, 0.5, block),)))).resolve(model, example)
    norms: dict[str, Tensor] = {}
    for layer in base:
        w = weight_of(model, layer.name, who).detach().float()
        norm = ops.group_sumsq(w, structure, layer.conv_groups, block).double().sqrt()
        live = norm[norm > 0]
        norms[layer.name] = norm / live.square().mean().sqrt() if live.numel() else norm

    def plan_at(threshold: float) -> Plan | None:
        rules = list(left_alone)
        for name, norm in norms.items():
            rate = min(float((norm <= threshold).double().mean()), max_rate, 1 - 1 / norm.numel())
            if rate > 0:
                rules.append(Rule(name, (Spec(structure, rate, block),)))
        if len(rules) == len(left_alone):
            return None
        # The first convolution and the classifier are named by no rule, and so left alone.
        return Plan(tuple(rules))

    def removed(plan: Plan | None) -> float:
        return 0.0 if plan is None else float(plan.resolve(model, example).totals()[key] or 0.0)

    values = torch.cat(list(norms.values())).unique()
    low, high = -1, len(values) - 1
    most = plan_at(float(values[high]))
    if most is None or removed(most) < 1 - target:
        raise PlanError(
            f"{who}: {key.removesuffix('_removed')} got {target}, wanted at least {1 - removed(most):.4g}, "
            f"which is left at max_rate {max_rate}"
        )
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
