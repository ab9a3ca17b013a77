"""The units of pruning: how the weights of a layer are numbered into groups.

A weight W is [O, Cg, *kernel] (a convolution of any dimension; a linear layer has no kernel dimensions) with G conv
groups, Og = O/G filters in each, N = Cg * prod(kernel), and j the flat logical index of (c, *kernel).

| structure    | a group is                                   | how many       | number                   |
|--------------|----------------------------------------------|----------------|--------------------------|
| filter       | W[o]                                         | O              | o                        |
| channel      | one input channel of a conv group            | G*Cg           | g*Cg + c                 |
| column       | one (c, *kernel) position of a conv group    | G*N            | g*N + j                  |
| block_column | such a position within B consecutive filters | G*ceil(Og/B)*N | (g*ceil(Og/B) + b)*N + j |
| element      | one weight                                   | O*N            | flat index               |

Blocks never cross conv groups; the last block of a conv group may be shorter. Numbers follow the logical index,
whatever the memory layout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

STRUCTURES = ("filter", "channel", "column", "block_column", "element")

# Eight filters fill the register block of the AVX kernels, so a block of them shares one tap list at no cost in speed.
DEFAULT_BLOCK = 8


def _view(
    structure: str, shape: Sequence[int], conv_groups: int, block: int, who: str
) -> tuple[int, int, int, int, int]:
    """(G, Og, Cg, prod(kernel), blocks per conv group) of a checked request."""
    if structure not in STRUCTURES:
        raise ValueError(f"{who}: structure got {structure!r}, wanted one of {', '.join(STRUCTURES)}")
    if len(shape) < 2 or any(s < 1 for s in shape):
        raise ValueError(f"{who}: shape got {tuple(shape)}, wanted [O, C/groups, *kernel] with positive sizes")
    if conv_groups < 1 or shape[0] % conv_groups:
        raise ValueError(f"{who}: conv_groups got {conv_groups}, wanted a divisor of the {shape[0]} filters")
    if block < 1:
        raise ValueError(f"{who}: block got {block}, wanted at least 1")
    og = shape[0] // conv_groups
    return conv_groups, og, shape[1], math.prod(shape[2:]), -(-og // block)


def n_groups(structure: str, shape: Sequence[int], conv_groups: int = 1, block: int = DEFAULT_BLOCK) -> int:
    """How many groups of this structure a weight of this shape has. Raises ValueError."""
    g, og, c, taps, nb = _view(structure, shape, conv_groups, block, "n_groups")
    return {
        "filter": g * og,
        "channel": g * c,
        "column": g * c * taps,
        "block_column": g * nb * c * taps,
        "element": g * og * c * taps,
    }[structure]


def group_ids(
    structure: str,
    shape: Sequence[int],
    conv_groups: int = 1,
    block: int = DEFAULT_BLOCK,
    device: torch.device | None = None,
) -> Tensor:
    """int64 of W's shape: the number of the group that each weight is in. The table above, spelt out; slow."""
    _, og, c, taps, nb = _view(structure, shape, conv_groups, block, "group_ids")
    n = c * taps
    o = torch.arange(shape[0], device=device)[:, None]
    j = torch.arange(n, device=device)[None, :]
    g = o // og
    if structure == "filter":
        ids = o + 0 * j
    elif structure == "channel":
        ids = g * c + j // taps
    elif structure == "column":
        ids = g * n + j
    elif structure == "block_column":
        ids = (g * nb + (o % og) // block) * n + j
    else:
        ids = o * n + j
    return ids.view(*shape)


def group_sizes(structure: str, shape: Sequence[int], conv_groups: int = 1, block: int = DEFAULT_BLOCK) -> Tensor:
    """int64 [n_groups]: weights in each group (all equal, but for the last block of a conv group)."""
    g, og, c, taps, nb = _view(structure, shape, conv_groups, block, "group_sizes")
    n = n_groups(structure, shape, conv_groups, block)
    if structure == "block_column":
        rows = torch.full((nb,), block, dtype=torch.int64)
        rows[-1] = og - (nb - 1) * block
        return rows[None, :, None].expand(g, nb, c * taps).reshape(-1)
    size = {"filter": c * taps, "channel": og * taps, "column": og, "element": 1}[structure]
    return torch.full((n,), size, dtype=torch.int64)


def expand_keep(
    keep: Tensor, structure: str, shape: Sequence[int], conv_groups: int = 1, block: int = DEFAULT_BLOCK
) -> Tensor:
    """Bool mask of W's shape, contiguous: a weight is kept if its group is (keep: bool [n_groups])."""
    g, og, c, taps, nb = _view(structure, shape, conv_groups, block, "expand_keep")
    n = n_groups(structure, shape, conv_groups, block)
    if keep.dtype != torch.bool or tuple(keep.shape) != (n,):
        raise ValueError(f"expand_keep: keep got {keep.dtype} {tuple(keep.shape)}, wanted torch.bool ({n},)")
    if structure == "block_column":
        rows = keep.view(g, nb, 1, c * taps).expand(g, nb, block, c * taps).reshape(g, nb * block, c * taps)
        return rows[:, :og].reshape(*shape).clone()
    parts = {
        "filter": (g, og, 1, 1),
        "channel": (g, 1, c, 1),
        "column": (g, 1, c, taps),
        "element": (g, og, c, taps),
    }[structure]
    return keep.view(parts).expand(g, og, c, taps).reshape(*shape).clone()


def nonempty(mask: Tensor, structure: str, conv_groups: int = 1, block: int = DEFAULT_BLOCK) -> Tensor:
    """Bool [n_groups]: the groups in which a bool mask of W's shape keeps any weight. The inverse of expand_keep."""
    g, og, c, taps, nb = _view(structure, mask.shape, conv_groups, block, "nonempty")
    m = mask.reshape(g, og, c, taps)
    if structure == "filter":
        return m.flatten(2).any(2).reshape(-1)
    if structure == "channel":
        return m.any(3).any(1).reshape(-1)
    if structure == "column":
        return m.any(1).reshape(-1)
    if structure == "block_column":
        rows = m.new_zeros(g, nb * block, c * taps)
        rows[:, :og] = m.reshape(g, og, c * taps)
        return rows.view(g, nb, block, c * taps).any(2).reshape(-1)
    return m.reshape(-1).clone()
