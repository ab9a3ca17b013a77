"""What the benchmarks call ours, in one place: structadmm.optimize on a compacted network."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import structadmm as sa
from structadmm.nn import CompactConv2d

HAS_OPTIMIZE = hasattr(sa, "optimize")


def compacted(conv: nn.Conv2d, block: int | str = "auto") -> nn.Module:
    """The convolution on the weights that are left; with blocks of so many filters."""
    return CompactConv2d.from_dense(conv, block=block)


def ours(net: nn.Module, x: Tensor, dtype: str = "f32", kernels_only: bool = False) -> Callable[[Tensor], Tensor]:
    """`net` (compacted or dense, eval mode) as structadmm runs it: f32 NCHW in and out, dtype inside.

    kernels_only: no vendor kernel, even where it was measured faster. Raises NotImplementedError where this build can't.
    """
    if not HAS_OPTIMIZE:
        if dtype != "f32":
            raise NotImplementedError("this build runs compacted layers in f32 only")
        return net
    more: dict[str, Any] = {}
    if kernels_only and "vendor" in inspect.signature(sa.optimize).parameters:
        more["vendor"] = False
    return sa.optimize(net, x, dtype=torch.bfloat16 if dtype == "bf16" else None, **more)
