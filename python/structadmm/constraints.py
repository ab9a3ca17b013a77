"""Constraints on one layer's weight, and the exact or alternating projection on them.

A constraint keeps at most k groups of one structure. Several constraints on one weight (a mixture, such as filters and
columns) hold at the same time. Both are sets of masks, so projecting is choosing the mask that keeps most of ||V||^2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import torch
from torch import Tensor

from . import ops
from .groups import DEFAULT_BLOCK, expand_keep, nonempty

# Alternation stops by itself (see mixture_keeps); the cap only guards against rounding of the group norms.
_MAX_SWEEPS = 50


@dataclass(frozen=True)
class Constraint:
    """At most `keep` groups of `structure` are nonzero; `rate` is the share of groups to remove that it came from."""

    structure: str
    rate: float
    block: int = DEFAULT_BLOCK
    keep: int = 0

    def __str__(self) -> str:
        return self.structure + (f"({self.block})" if self.structure == "block_column" else "")


def _all(masks: Sequence[Tensor | None]) -> Tensor | None:
    """Intersection; None stands for everything."""
    found: Tensor | None = None
    for m in masks:
        if m is not None:
            found = m if found is None else found & m
    return found


def keeps_mask(
    keeps: Sequence[Tensor], constraints: Sequence[Constraint], shape: Sequence[int], conv_groups: int = 1
) -> Tensor:
    """Bool mask of W's shape: the weights that every constraint keeps."""
    pairs = zip(keeps, constraints, strict=True)
    mask = _all([expand_keep(k, c.structure, shape, conv_groups, c.block) for k, c in pairs])
    assert mask is not None
    return mask


def mixture_keeps(
    w: Tensor,
    u: Tensor | None,
    constraints: Sequence[Constraint],
    conv_groups: int = 1,
    mask: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Which groups to keep, for each of several constraints at once: one bool [n_groups] tensor per constraint.

    Maximise F(keep_1, ..., keep_m), the part of ||W + U||^2 inside the intersection of the kept groups (and of mask),
    by choosing one keep at a time: with the others fixed, F is a sum over the groups of one structure, so the exact
    maximum is its top k. Hence F never falls. A keep is replaced only if that raises F, and there are finitely many, so
    the alternation ends, at a point that no change of a single structure improves. The first sweep is what projecting
    on one structure after the other gives, so the result is never worse than that; each order of the structures is
    tried and the best kept, so this holds for all of them. It need not be the joint optimum, which is a hard problem
    (choosing rows and columns of a matrix with the largest sum contains maximum balanced biclique).
    """
    best: tuple[float, tuple[Tensor, ...]] | None = None
    for order in permutations(range(len(constraints))):
        keeps: list[Tensor | None] = [None] * len(constraints)
        masks: list[Tensor | None] = [None] * len(constraints)
        kept = 0.0
        for _ in range(_MAX_SWEEPS):
            changed = False
            for i in order:
                c = constraints[i]
                others = _all([mask, *(m for j, m in enumerate(masks) if j != i)])
                scores = ops.group_sumsq(w, c.structure, conv_groups, c.block, u=u, mask=others)
                new, old = ops.topk_keep(scores, c.keep), keeps[i]
                kept = float(scores[new].double().sum())
                if old is None or kept > float(scores[old].double().sum()):
                    keeps[i], masks[i] = new, expand_keep(new, c.structure, w.shape, conv_groups, c.block)
                    changed = True
            if not changed:
                break
        if best is None or kept > best[0]:
            best = (kept, tuple(k for k in keeps if k is not None))
    assert best is not None
    return best[1]


def project_update_(
    w: Tensor,
    z: Tensor,
    u: Tensor,
    constraints: Sequence[Constraint],
    conv_groups: int = 1,
    mask: Tensor | None = None,
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Z' = Proj(W + U), U' = W + U - Z' in place on z and u; returns a keep per constraint, and the sums of the op."""
    if len(constraints) == 1:
        c = constraints[0]
        keep, sums = ops.project_update_(w, z, u, c.structure, c.keep, conv_groups, c.block, mask)
        return (keep,), sums
    keeps = mixture_keeps(w, u, constraints, conv_groups, mask)
    on = _all([mask, keeps_mask(keeps, constraints, w.shape, conv_groups)])
    assert on is not None
    return keeps, ops.masked_update_(w, z, u, on)


def coupled_masks(
    ws: Sequence[Tensor],
    us: Sequence[Tensor] | None,
    constraint: Constraint,
    conv_groups: Sequence[int],
    masks: Sequence[Tensor | None],
) -> list[Tensor]:
    """Bool masks of several weights whose filters go together: the exact projection on "the same k filters of all are
    nonzero", which keeps the k whose sums over all weights are the largest."""
    scores: Tensor | None = None
    for i, w in enumerate(ws):
        own = ops.group_sumsq(w, "filter", conv_groups[i], u=None if us is None else us[i], mask=masks[i])
        scores = own if scores is None else scores + own.to(scores.device)
    assert scores is not None
    keep = ops.topk_keep(scores, constraint.keep)
    out = []
    for w, groups, mask in zip(ws, conv_groups, masks, strict=True):
        on = _all([mask, expand_keep(keep.to(w.device), "filter", w.shape, groups)])
        assert on is not None
        out.append(on)
    return out


def project_mask(
    w: Tensor, constraints: Sequence[Constraint], conv_groups: int = 1, mask: Tensor | None = None
) -> Tensor:
    """Bool mask of W's shape: the support of the projection of W itself, within mask."""
    if len(constraints) == 1:
        c = constraints[0]
        scores = ops.group_sumsq(w, c.structure, conv_groups, c.block, mask=mask)
        keeps: tuple[Tensor, ...] = (ops.topk_keep(scores, c.keep),)
    else:
        keeps = mixture_keeps(w, None, constraints, conv_groups, mask)
    on = _all([mask, keeps_mask(keeps, constraints, w.shape, conv_groups)])
    assert on is not None
    return on


def holds(mask: Tensor, constraints: Sequence[Constraint], conv_groups: int = 1) -> bool:
    """Whether every weight tensor with these zeros meets all constraints."""
    return all(int(nonempty(mask, c.structure, conv_groups, c.block).sum()) <= c.keep for c in constraints)


def density(constraints: Sequence[Constraint], shape: Sequence[int], conv_groups: int = 1) -> float:
    """The largest share of the weights that a mask of these constraints can keep.

    What is kept, for one structure of equal groups, and for filters with columns or channels in one conv group, where
    the shares multiply. Otherwise the bound is met by masks that keep large blocks rather than the short last one, and
    the columns of those conv groups or blocks in which the filters are kept: where the largest norms tend to be.
    """
    filters, columns = shape[0], math.prod(shape[1:])
    rows = next((c.keep for c in constraints if c.structure == "filter"), filters)
    most = rows * columns
    for c in constraints:
        if c.structure == "element":
            most = min(most, c.keep)
        elif c.structure != "filter":
            most = min(most, _most(c, rows, shape, conv_groups))
    return most / (filters * columns)


def _most(c: Constraint, rows: int, shape: Sequence[int], conv_groups: int) -> int:
    """Most weights in c.keep groups and `rows` filters: both fill the same blocks of filters, large ones first."""
    filters, columns = shape[0] // conv_groups, math.prod(shape[1:])
    size = c.block if c.structure == "block_column" else filters
    blocks = [min(size, filters - i) for i in range(0, filters, size)] * conv_groups
    left = c.keep * (columns // shape[1] if c.structure == "channel" else 1)
    most = 0
    for block in sorted(blocks, reverse=True):
        most += min(rows, block) * min(left, columns)
        rows, left = rows - min(rows, block), left - min(left, columns)
    return most


def fits(w: Tensor, u: Tensor) -> Tensor:
    """Bool scalar: every group norm of W + U fits in f32: no NaN, no infinity, nothing so large that its square is."""
    total = torch.linalg.vector_norm(w, dtype=torch.float32) + torch.linalg.vector_norm(u)
    return total < 1e19  # (1e19)^2 < 3.4e38, the largest f32
