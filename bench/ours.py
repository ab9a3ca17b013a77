"""What the benchmarks call ours, in one place: structadmm.optimize on a compacted network."""

from __future__ import annotations

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


def ours(net: nn.Module, x: Tensor, dtype: str = "f32", measured: bool = True) -> Callable[[Tensor], Tensor]:
    """`net` (compacted or dense, eval mode) as structadmm runs it: f32 NCHW in and out, dtype inside.

    measured: as a user has it, with what was measured to be faster left to torch; without, our kernels alone. Raises
    NotImplementedError where this build can't.
    """
    if not HAS_OPTIMIZE:
        if dtype != "f32":
            raise NotImplementedError("this build runs compacted layers in f32 only")
        return net
    net = nn.Sequential(net).eval() if isinstance(net, CompactConv2d | nn.Conv2d) else net
    inside = torch.bfloat16 if dtype == "bf16" else None
    return sa.optimize(net, x, dtype=inside, report=False, **({} if measured else {"budget": 0.0}))


def decided(net: Any) -> dict[str, Any]:
    """What optimize decided: the candidate taken and the layers by what runs them. Empty for other networks."""
    report = getattr(net, "report", None)
    if not hasattr(report, "choice"):
        return {}
    layers = {r.name: " ".join(filter(None, (r.runs_on, r.family))) for r in report.layers}
    return {"choice": report.choice, "layers": layers, "left_to_torch": dict(report.left)}
