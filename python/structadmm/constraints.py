"""Constraints on one layer's weight, and the exact or alternating projection on them.

A constraint keeps at most k groups of one structure. Several constraints on one weight (a mixture, such as filters and
columns) hold at the same time. Both are sets of masks, so projecting is choosing the mask that keeps most of ||V||^2.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
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


class Coupled(tuple[str, ...]):
    """Names of layers whose filters go together.

    classes: layer -> int64 [filters] the class of each filter: classes go as a whole, in all layers that have filters
    of them. cells: int64 [classes] the cell of each class: of all cells the same share is kept, which keeps conv
    groups, and heads, of one size, and takes from every layer what its rate says.
    """

    classes: dict[str, Tensor]
    cells: Tensor

    def __new__(cls, names: Iterable[str], classes: dict[str, Tensor], cells: Tensor) -> Coupled:
        self = super().__new__(cls, names)
        self.classes, self.cells = classes, cells
        return self

    @property
    def plain(self) -> bool:
        """Whether filter i of all layers is class i, and any may be kept."""
        same = torch.arange(len(self.cells))
        return not self.cells.any() and all(torch.equal(c, same) for c in self.classes.values())


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
    coupled: Coupled | None = None,
) -> list[Tensor]:
    """Bool masks of several weights whose filters go together: the exact projection on "the same k filters of all are
    nonzero", which keeps the k whose sums over all weights are the largest.

    coupled: the set, of filters that do not simply go by their numbers; then `constraint` is that of the first weight,
    and of every cell the same share of classes is kept, rounded down, but one at least.
    """
    own = [
        ops.group_sumsq(w, "filter", groups, u=None if us is None else us[i], mask=masks[i])
        for i, (w, groups) in enumerate(zip(ws, conv_groups, strict=True))
    ]
    device = own[0].device
    if coupled is None:
        scores = own[0]
        for more in own[1:]:
            scores = scores + more.to(device)
        keep = ops.topk_keep(scores, constraint.keep)
        keeps = [keep] * len(ws)
    else:
        at = [coupled.classes[name].to(device) for name in coupled]
        total = torch.zeros(len(coupled.cells), dtype=torch.float64, device=device)
        for c, s in zip(at, own, strict=True):
            total.index_add_(0, c, s.to(device).double())
        keep = _largest_of_cells(total, coupled.cells.to(device), constraint.keep / ws[0].shape[0])
        keeps = [keep[c] for c in at]
    out = []
    for w, groups, mask, on in zip(ws, conv_groups, masks, keeps, strict=True):
        found = _all([mask, expand_keep(on.to(w.device), "filter", w.shape, groups)])
        assert found is not None
        out.append(found)
    return out


def _largest_of_cells(scores: Tensor, cells: Tensor, share: float) -> Tensor:
    """Bool [n]: in every cell the largest `share` of it, rounded down, at least one; of equal scores the first."""
    order = torch.argsort(scores, descending=True, stable=True)
    order = order[torch.argsort(cells[order], stable=True)]
    sizes = torch.bincount(cells)
    rank = torch.arange(len(cells), device=cells.device) - (sizes.cumsum(0) - sizes)[cells[order]]
    most = (sizes.double() * share + 1e-6).floor().clamp(min=1)
    keep = torch.zeros(len(cells), dtype=torch.bool, device=cells.device)
    keep[order] = rank < most[cells[order]]
    return keep


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
