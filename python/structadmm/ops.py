"""The ops: `torch.ops.structadmm.*` with Python signatures, and the fake implementations that torch.compile traces."""

from __future__ import annotations

import torch

from . import _load as _load

_ops = torch.ops.structadmm


def isa() -> str:
    """The instruction set that the CPU kernels use: scalar, avx2 or avx512. STRUCTADMM_ISA forces one."""
    return str(_ops.isa())
