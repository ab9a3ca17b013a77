"""The layers of a network as a table: shapes, structure, kept groups, weights, multiply-adds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class LayerRow:
    """One convolution or linear layer.

    shape: [O, C/groups, *kernel] of the layer as it is, as if it were dense; dense_shape: in the original network (the
    layer's own where that is not known). structure: dense, column or block_column, the latter with its number of
    `blocks`. kept, of: groups that are kept and that there are: filters of a dense layer, else columns, in each of the
    blocks that are left, of the original layer.
    weights: stored, without bias. macs: multiply-adds for one sample.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dense_shape: tuple[int, ...]
    structure: str
    blocks: int | None
    kept: int
    of: int
    weights: int
    macs: int

    @property
    def dense_weights(self) -> int:
        return math.prod(self.dense_shape)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"dense_weights": self.dense_weights}


def is_weighted(module: nn.Module) -> bool:
    """A convolution or linear layer, dense or compacted: what the table counts."""
    return isinstance(module, (*_CONVS, nn.Linear)) or hasattr(module, "block_taps")


def _shape(module: Any) -> tuple[int, ...]:
    if hasattr(module, "out_features"):
        return (module.out_features, module.in_features)
    return (module.out_channels, module.in_channels // module.groups, *module.kernel_size)


def layer_table(
    network: nn.Module, example: Tensor | Sequence[Any], original: nn.Module | None = None
) -> list[LayerRow]:
    """One row for each convolution and linear layer that runs, in the order of their first call.

    example: a tensor or a tuple, batch first; it is run once in eval mode to see the layers' output sizes.
    original: the dense network, in which layers have the same names.
    """
    example = (example,) if isinstance(example, Tensor) else tuple(example)
    batch = max(1, next((a.shape[0] for a in example if isinstance(a, Tensor) and a.dim()), 1))
    positions: dict[nn.Module, int] = {}

    def note(module: nn.Module, _: Any, y: Tensor) -> None:
        # Every output value of one filter is a place where each of the layer's weights is used once.
        filters = _shape(module)[0]
        positions[module] = positions.get(module, 0) + y.numel() // (filters * batch)

    names = {module: name for name, module in network.named_modules() if is_weighted(module)}
    handles = [module.register_forward_hook(note) for module in names]
    modes = {module: module.training for module in network.modules()}
    try:
        with torch.no_grad():
            network.eval()(*example)
    finally:
        for module, mode in modes.items():
            module.training = mode
        for handle in handles:
            handle.remove()
    dense = {n: _shape(m) for n, m in original.named_modules() if is_weighted(m)} if original is not None else {}
    return [_row(names[m], m, dense.get(names[m]), n) for m, n in positions.items()]


def _row(name: str, module: Any, dense_shape: tuple[int, ...] | None, positions: int) -> LayerRow:
    shape = _shape(module)
    was = dense_shape or shape
    structure, blocks, kept, of = "dense", None, shape[0], was[0]
    if hasattr(module, "block_taps"):
        n = module.block_filters.numel()
        structure, blocks = ("column", None) if n == getattr(module, "groups", 1) else ("block_column", n)
        kept, of = int(module.block_taps[-1]), n * math.prod(was[1:])
    weights = module.weight.numel()
    return LayerRow(name, type(module).__name__, shape, was, structure, blocks, kept, of, weights, weights * positions)
