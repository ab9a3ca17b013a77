"""The training ops in plain torch: the truth that every kernel is tested against, outside the dispatch.

Same names, arguments and results as in `structadmm.ops`. W is f32, bf16 or f16; Z and U are f32 of W's shape; masks are
bool of W's shape. Elementwise arithmetic is f32, one rounding per operation, as in the kernels; sums are f64, so a
kernel's sum may differ by its own rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .groups import DEFAULT_BLOCK, expand_keep, group_ids, n_groups


def group_sumsq(
    w: Tensor,
    structure: str,
    conv_groups: int = 1,
    block: int = DEFAULT_BLOCK,
    u: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """f32 [n_groups]: the sum over each group of (w + u)^2, weights outside the mask left out."""
    n = n_groups(structure, w.shape, conv_groups, block)
    v = w.float() if u is None else w.float() + u
    if mask is not None:
        v = torch.where(mask, v, 0.0)
    ids = group_ids(structure, w.shape, conv_groups, block, w.device)
    sums = torch.zeros(n, dtype=torch.float64, device=w.device)
    return sums.index_add_(0, ids.reshape(-1), v.double().square().reshape(-1)).float()


def topk_keep(scores: Tensor, k: int) -> Tensor:
    """Bool [n], exactly k true: the largest scores, ties to the lower index. NaN and infinite scores: ValueError."""
    n = scores.numel()
    if not 0 <= k <= n:
        raise ValueError(f"topk_keep: k got {k}, wanted 0 to {n}")
    if not bool(torch.isfinite(scores).all()):
        raise ValueError("topk_keep: scores got NaN or infinite values, wanted finite ones")
    keep = torch.zeros(n, dtype=torch.bool, device=scores.device)
    keep[torch.sort(scores, descending=True, stable=True).indices[:k]] = True
    return keep


def project_update_(
    w: Tensor,
    z: Tensor,
    u: Tensor,
    structure: str,
    k: int,
    conv_groups: int = 1,
    block: int = DEFAULT_BLOCK,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Project V = W + U on the k groups of largest norm and update the dual, in place on z and u.

    Z' = V on kept groups and mask, 0 elsewhere; U' = V - Z'. Returns keep, bool [n_groups], and sums, f64 [5]:
    ||W - Z'||^2, ||Z' - Z||^2, ||W||^2, ||Z'||^2, ||U'||^2. The Z and U steps of StructADMM; Boyd et al. (2011), 9.1.
    """
    keep = topk_keep(group_sumsq(w, structure, conv_groups, block, u, mask), k)
    on = expand_keep(keep, structure, w.shape, conv_groups, block)
    return keep, masked_update_(w, z, u, on if mask is None else on & mask)


def masked_update_(w: Tensor, z: Tensor, u: Tensor, mask: Tensor) -> Tensor:
    """project_update_ for a mask already known: Z' = V on the mask, 0 elsewhere; U' = V - Z'. Returns the sums."""
    wf = w.float()
    v = wf + u
    znew = torch.where(mask, v, 0.0)
    unew = v - znew
    sums = torch.stack([t.double().square().sum() for t in (wf - znew, znew - z, wf, znew, unew)])
    z.copy_(znew)
    u.copy_(unew)
    return sums


def add_penalty_grad_(
    grads: Sequence[Tensor], ws: Sequence[Tensor], zs: Sequence[Tensor], us: Sequence[Tensor], rhos: Sequence[float]
) -> None:
    """grads[i] += rhos[i] * (ws[i] - zs[i] + us[i]), the gradient of rho/2 ||W - Z + U||^2, rounded once."""
    for g, w, z, u, rho in zip(grads, ws, zs, us, rhos, strict=True):
        g.copy_(g.float() + rho * (w.float() - z + u))


def scatter_taps(
    weight: Tensor, taps: Tensor, block_filters: Tensor, block_taps: Tensor, shape: Sequence[int]
) -> Tensor:
    """The dense weight [O, Cg, *kernel] of a compacted one (structadmm.nn says how it is stored); differentiable."""
    filters, columns, n = shape[0], math.prod(shape[1:]), weight.numel()
    of_block = torch.repeat_interleave(block_filters.long(), output_size=filters)
    counts = (block_taps[1:] - block_taps[:-1]).long()[of_block]
    row = torch.repeat_interleave(counts, output_size=n)
    within = torch.arange(n, device=weight.device) - (counts.cumsum(0) - counts)[row]
    column = taps.long()[block_taps.long()[of_block[row]] + within]
    dense = weight.new_zeros(filters * columns).index_put((row * columns + column,), weight)
    return dense.reshape(shape)


def conv2d_compact(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    taps: Tensor,
    block_filters: Tensor,
    block_taps: Tensor,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The convolution of a compacted weight: F.conv2d on the dense one."""
    shape = (out_channels, x.shape[1] // groups, *kernel_size)
    dense = scatter_taps(weight, taps, block_filters, block_taps, shape)
    return F.conv2d(x, dense, bias, tuple(stride), tuple(padding), tuple(dilation), groups)


def linear_compact(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    taps: Tensor,
    block_filters: Tensor,
    block_taps: Tensor,
    out_features: int,
) -> Tensor:
    """The linear layer of a compacted weight: F.linear on the dense one."""
    return F.linear(x, scatter_taps(weight, taps, block_filters, block_taps, (out_features, x.shape[-1])), bias)


def epilogue(
    y: Tensor, activation: str = "clamp", low: float = -math.inf, high: float = math.inf, slope: float = 0.0
) -> Tensor:
    """What a step applies to its sums: an activation by its name in csrc/base/epilogue.h."""
    curves = {
        "clamp": lambda: y.clamp(low, high),
        "silu": lambda: F.silu(y),
        "gelu": lambda: F.gelu(y),
        "gelu_tanh": lambda: F.gelu(y, approximate="tanh"),
        "hardswish": lambda: F.hardswish(y),
        "hardsigmoid": lambda: F.hardsigmoid(y),
        "sigmoid": lambda: y.sigmoid(),
        "tanh": lambda: y.tanh(),
        "leaky_relu": lambda: F.leaky_relu(y, slope),
    }
    return curves[activation]()


def conv_step(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, sizes: Sequence[Any], **curve: Any
) -> Tensor:
    """One step of a convolution: epilogue(F.conv2d on the dense weight + residual); sizes as F.conv2d takes them."""
    y = F.conv2d(x, weight, bias, *sizes)
    return epilogue(y if residual is None else y + residual, **curve)
