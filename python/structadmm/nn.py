"""Compacted layers: a convolution and a linear layer that store, and compute with, only the weights that are left.

A layer keeps `weight` (1-D) and three int32 tables that say where its values belong:

- `taps` [total taps]: kept columns, j = flat index of (channel within the conv group, *kernel position), ascending
  within a block;
- `block_filters` [blocks]: how many consecutive filters each block has; no block crosses a conv group;
- `block_taps` [blocks + 1]: where each block's taps begin.

Block b's weights are [block_filters[b], its taps] row-major, blocks one after the other. Column sparsity (Zhang et al.,
StructADMM, TNNLS 2022) is one block per conv group; block-column sparsity is blocks of a few filters; a pruned filter
is one in a block without taps, which emits its bias.

In float32 on the CPU, and on CUDA, a forward without gradients runs the kernel on a packed copy of the weight, made at
the first call and again when the weight has changed (seen by its version counter: writes through `.data` go unseen
until `train()`, `eval()` or `repack()`). With gradients, and in other dtypes, it scatters to the dense weight and calls
torch, so the layer trains like any other, its zeros held.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import ops, reference

__all__ = ["ChannelBias", "CompactConv2d", "CompactLinear"]

# Speed by filters in a block, relative to blocks of 32 and more (measured: bench/conv_compact.py).
_EFFICIENCY = {
    "avx512": {32: 1.0, 16: 0.9, 8: 0.9, 4: 0.75},
    "avx2": {32: 1.0, 16: 1.0, 8: 0.95, 4: 0.85},
    "scalar": {32: 1.0, 16: 1.0, 8: 0.95, 4: 0.95},
}
_EFFICIENCY["avx512_bf16"] = _EFFICIENCY["amx_bf16"] = _EFFICIENCY["avx512"]  # these layers are float32
_BLOCKS = (16, 8, 4)

# Bound once: to look an op up costs as much as a small layer.
_conv2d_packed = torch.ops.structadmm.conv2d_packed.default
_linear_packed = torch.ops.structadmm.linear_packed.default


def _pair(op: str, name: str, value: int | Sequence[int], least: int) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or any(not isinstance(v, int) or v < least for v in pair):
        raise ValueError(f"{op}: {name} got {value!r}, wanted one or two integers of at least {least}")
    return pair


def check_tables(op: str, columns: int, filters: int, groups: int, taps: Tensor, sizes: Tensor, offsets: Tensor) -> int:
    """The number of weights that the tables describe. Raises ValueError where they are not well formed."""
    for name, t in (("taps", taps), ("block_filters", sizes), ("block_taps", offsets)):
        if t.dtype != torch.int32 or t.dim() != 1:
            raise ValueError(f"{op}: {name} got {t.dtype} {list(t.shape)}, wanted a vector of int32")
    if offsets.numel() != sizes.numel() + 1:
        raise ValueError(f"{op}: block_taps got {offsets.numel()} offsets, wanted {sizes.numel() + 1}")
    if taps.is_meta:
        return 0
    taps, sizes, offsets = taps.long().cpu(), sizes.long().cpu(), offsets.long().cpu()
    ends = sizes.cumsum(0)
    if not sizes.numel() or bool((sizes < 1).any()) or int(ends[-1]) != filters:
        raise ValueError(
            f"{op}: block_filters got {sizes.tolist()[:8]}..., wanted positive sizes that add up to {filters}"
        )
    per_group = filters // groups
    if bool(((ends - sizes) // per_group != (ends - 1) // per_group).any()):
        raise ValueError(f"{op}: block_filters got a block across conv groups, wanted blocks of the {per_group} in one")
    counts = offsets.diff()
    if int(offsets[0]) != 0 or bool((counts < 0).any()) or int(offsets[-1]) != taps.numel():
        raise ValueError(f"{op}: block_taps got {offsets.tolist()[:8]}..., wanted offsets from 0 up to {taps.numel()}")
    if taps.numel():
        if int(taps.min()) < 0 or int(taps.max()) >= columns:
            raise ValueError(f"{op}: taps got {int(taps.min())} to {int(taps.max())}, wanted 0 to {columns - 1}")
        first = torch.zeros(taps.numel() + 1, dtype=torch.bool)
        first[offsets] = True
        if bool(((taps.diff() <= 0) & ~first[1:-1]).any()):
            raise ValueError(f"{op}: taps got a block out of order, wanted taps that ascend within a block")
    return int((sizes * counts).sum())


def _split(
    weight: Tensor, groups: int, size: int, origin: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """weight, taps, block_filters, block_taps of W [O, N] in blocks of `size` filters that do not cross conv groups.

    origin [O]: filter numbers to count the blocks by in place of 0, 1, ... within the conv group.
    """
    per_group = weight.shape[0] // groups
    filters = torch.arange(weight.shape[0])
    place = filters % per_group if origin is None else origin
    block = filters // per_group * (int(place.max()) // size + 1) + place // size
    rows = list(weight.split(block.unique_consecutive(return_counts=True)[1].tolist()))
    kept = [(w != 0).any(0).nonzero().flatten() for w in rows]
    device = weight.device
    return (
        torch.cat([w[:, k].reshape(-1) for w, k in zip(rows, kept, strict=True)]),
        torch.cat(kept).int(),
        torch.tensor([w.shape[0] for w in rows], dtype=torch.int32, device=device),
        torch.tensor([0, *(k.numel() for k in kept)], device=device).cumsum(0).int(),
    )


def _cost(sizes: Tensor, offsets: Tensor, efficiency: dict[int, float]) -> float:
    """Estimated time of a table: multiply-adds over the measured efficiency of its blocks' sizes."""
    cost = 0.0
    for filters, taps in zip(sizes.tolist(), offsets.diff().tolist(), strict=True):
        fits = 32 if filters >= 32 else 16 if filters > 8 else 8 if filters > 4 else 4
        width = filters if filters >= 16 else fits  # narrower blocks are padded to a panel
        cost += taps * width / efficiency[fits]
    return cost


def _choose(
    op: str, weight: Tensor, groups: int, block: int | str, origin: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    per_group = weight.shape[0] // groups
    if block != "auto":
        if not isinstance(block, int) or block < 1:
            raise ValueError(f'{op}: block got {block!r}, wanted "auto" or a positive number of filters')
        return _split(weight, groups, block)
    efficiency = _EFFICIENCY[ops.isa()]
    candidates = [_split(weight, groups, size) for size in (per_group, *(b for b in _BLOCKS if b < per_group))]
    if origin is not None:
        candidates += [_split(weight, groups, size, origin) for size in _BLOCKS]
    return min(candidates, key=lambda t: _cost(t[2], t[3], efficiency))


class _Compact(nn.Module):
    """What the two layers share: the tables, the packed copy, loading."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    taps: Tensor
    block_filters: Tensor
    block_taps: Tensor
    _groups: int
    _filters: int
    _shape: tuple[int, ...]  # of the dense weight

    def _init_tables(
        self,
        tables: tuple[Tensor | None, Tensor | None, Tensor | None],
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        columns = math.prod(self._shape[1:])
        if all(t is None for t in tables):
            groups = self._groups
            tables = (
                torch.arange(columns, dtype=torch.int32, device=device).repeat(groups),
                torch.full((groups,), self._filters // groups, dtype=torch.int32, device=device),
                torch.arange(0, groups * columns + 1, columns, dtype=torch.int32, device=device),
            )
        taps, sizes, offsets = tables
        if taps is None or sizes is None or offsets is None:
            raise ValueError(f"{type(self).__name__}: taps, block_filters, block_taps got some, wanted all or none")
        count = check_tables(type(self).__name__, columns, self._filters, self._groups, taps, sizes, offsets)
        if taps.is_meta:
            count = math.prod(self._shape)
        self.weight = nn.Parameter(torch.empty(count, device=device, dtype=dtype))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(self._filters, device=device, dtype=dtype)) if bias else None
        )
        self.register_buffer("taps", taps.to(device))
        self.register_buffer("block_filters", sizes.to(device))
        self.register_buffer("block_taps", offsets.to(device))
        self._packed: tuple[Any, ...] | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform in +-1/sqrt(fan in), as torch does, the fan in being that of the dense layer."""
        bound = 1 / math.sqrt(max(1, math.prod(self._shape[1:])))
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def dense_weight(self) -> Tensor:
        """The weight as the dense layer has it, zeros included; differentiable in `weight`."""
        return reference.scatter_taps(self.weight, self.taps, self.block_filters, self.block_taps, self._shape)

    def repack(self) -> None:
        """Forget the packed copy; for weights written in ways that torch does not see, such as `.data`."""
        self._packed = None

    def train(self, mode: bool = True) -> Any:
        self._packed = None
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._packed = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """A state of the same dense shape loads whatever its sparsity: the tables come with the weight."""
        self._packed = None
        names = ("weight", "taps", "block_filters", "block_taps")
        if all(isinstance(state_dict.get(prefix + n), Tensor) for n in names):
            weight, *tables = (state_dict[prefix + n] for n in names)
            op = f"{type(self).__name__} ({prefix.rstrip('.') or 'state_dict'})"
            n = check_tables(op, math.prod(self._shape[1:]), self._filters, self._groups, *tables)
            if list(weight.shape) != [n]:
                raise ValueError(f"{op}: weight got {list(weight.shape)}, wanted [{n}] as its tables say")
            if self.weight.shape != weight.shape:
                self.weight = nn.Parameter(self.weight.new_empty(n), requires_grad=self.weight.requires_grad)
            for name, t in zip(names[1:], tables, strict=True):
                if getattr(self, name).shape != t.shape:
                    setattr(self, name, getattr(self, name).new_empty(t.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _kept(self, x: Tensor) -> Tensor | None:
        """The packed weight if a kernel on it serves x now, else None. Every microsecond here is one of every call."""
        parameters = self._parameters
        w, b = parameters["weight"], parameters["bias"]
        kept = self._packed
        if kept is None or kept[0] is not w or kept[1] is not b:
            if w is None or w.is_inference() or (b is not None and b.is_inference()):
                return None  # no version counter
            if w.dtype is not torch.float32 or w.device.type not in ("cpu", "cuda"):
                return None
            kept = None
        if torch.is_grad_enabled() and (x.requires_grad or w.requires_grad or (b is not None and b.requires_grad)):
            return None
        if x.dtype is not torch.float32 or x.device != w.device:
            return None
        key = (w._version, w.data_ptr(), 0 if b is None else b._version)
        if kept is None or kept[2] != key:
            kept = self._packed = (w, b, key, self._pack())
        return kept[3]

    def _pack(self) -> Tensor:
        raise NotImplementedError

    def _by_kernel(self, x: Tensor) -> bool:
        """Whether the op that packs at every call serves x: where tensors are traced, and on CUDA."""
        w, b = self.weight, self.bias
        if torch.is_grad_enabled() and (x.requires_grad or w.requires_grad or (b is not None and b.requires_grad)):
            return False
        return x.dtype == w.dtype == torch.float32 and x.device == w.device and x.device.type in ("cpu", "cuda")


class CompactConv2d(_Compact):
    """nn.Conv2d (zero padding) on the weights that are left; see the module for how they are stored.

    Attributes as nn.Conv2d has them. x: [batch, in_channels, height, width], any strides; the output is contiguous.
    Without tables every column is kept. Raises ValueError where an argument or table is not well formed.
    """

    padding_mode = "zeros"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        taps: Tensor | None = None,
        block_filters: Tensor | None = None,
        block_taps: Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        op = "CompactConv2d"
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels)):
            if groups < 1 or value < 1 or value % groups:
                raise ValueError(f"{op}: {name} got {value}, wanted a positive multiple of groups {groups}")
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = _pair(op, "kernel_size", kernel_size, 1)
        self.stride = _pair(op, "stride", stride, 1)
        self.dilation = _pair(op, "dilation", dilation, 1)
        if isinstance(padding, str):
            around = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
            if padding == "same" and (self.stride != (1, 1) or any(a % 2 for a in around)):
                raise ValueError(f'{op}: padding got "same", wanted stride 1 and an even dilation * (kernel_size - 1)')
            if padding not in ("same", "valid"):
                raise ValueError(f'{op}: padding got {padding!r}, wanted integers, "same" or "valid"')
            padding = [a // 2 for a in around] if padding == "same" else 0
        self.padding = _pair(op, "padding", padding, 0)
        self._sizes = (out_channels, *self.kernel_size, *self.stride, *self.padding, *self.dilation)
        self._groups, self._filters = groups, out_channels
        self._shape = (out_channels, in_channels // groups, *self.kernel_size)
        self._init_tables((taps, block_filters, block_taps), bias, device, dtype)

    @classmethod
    def from_dense(
        cls,
        conv: nn.Conv2d,
        weight: Tensor | None = None,
        block: int | str = "auto",
        origin: Tensor | None = None,
    ) -> CompactConv2d:
        """The compacted form of a convolution whose weight (or `weight` in its place) has zeros.

        A column is kept in a block of filters if it has a nonzero (or NaN) weight there. block: filters in a block;
        "auto" takes the whole conv group or 16, 8 or 4, whichever is estimated to run fastest on this CPU. origin [O]:
        the filters' numbers, within their conv group, in the layer that they were cut from; "auto" then also tries
        blocks that begin where that layer's blocks did.
        """
        if conv.padding_mode != "zeros":
            raise ValueError(f"CompactConv2d.from_dense: padding_mode got {conv.padding_mode!r}, wanted 'zeros'")
        dense = conv.weight if weight is None else weight
        if dense.shape != conv.weight.shape:
            raise ValueError(
                f"CompactConv2d.from_dense: weight got {list(dense.shape)}, wanted {list(conv.weight.shape)}"
            )
        dense = dense.detach()
        values, *tables = _choose("CompactConv2d.from_dense", dense.reshape(len(dense), -1), conv.groups, block, origin)
        new = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
            conv.bias is not None,
            taps=tables[0],
            block_filters=tables[1],
            block_taps=tables[2],
            device=dense.device,
            dtype=dense.dtype,
        )
        return _take(new, values, conv)

    def to_dense(self) -> nn.Conv2d:
        """The same layer as an nn.Conv2d, its zeros stored."""
        conv = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.bias is not None,
            device=self.weight.device,
            dtype=self.weight.dtype,
        )
        return _give(self, conv)

    def forward(self, x: Tensor) -> Tensor:
        if type(x) is Tensor and not torch.compiler.is_compiling():
            packed = self._kept(x)
            if packed is not None:
                try:
                    return _conv2d_packed(x, packed, *self._sizes)
                except RuntimeError as e:
                    raise ops.as_value_error(e) from None
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            wanted = self.in_channels if x.dim() == 4 else "4: batch, channels, height, width"
            raise ValueError(f"conv2d_compact: x {_had(x, 4, 1, 'channels')}, wanted {wanted}")
        run = ops.conv2d_compact if self._by_kernel(x) else reference.conv2d_compact
        return run(
            x,
            self.weight,
            self.bias,
            self.taps,
            self.block_filters,
            self.block_taps,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
        )

    def _pack(self) -> Tensor:
        b = None if self.bias is None else self.bias.detach()
        return ops.conv2d_pack(
            self.weight.detach(),
            b,
            self.taps,
            self.block_filters,
            self.block_taps,
            self.in_channels,
            self.kernel_size,
            self.groups,
        )

    def extra_repr(self) -> str:
        s = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        if self.padding != (0, 0):
            s += f", padding={self.padding}"
        if self.dilation != (1, 1):
            s += f", dilation={self.dilation}"
        if self.groups != 1:
            s += f", groups={self.groups}"
        return s + _repr(self)


class CompactLinear(_Compact):
    """nn.Linear on the weights that are left; see the module for how they are stored (columns are input features).

    x: [..., in_features]. Without tables every column is kept. Raises ValueError where an argument or table is not well
    formed.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        taps: Tensor | None = None,
        block_filters: Tensor | None = None,
        block_taps: Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("in_features", in_features), ("out_features", out_features)):
            if value < 1:
                raise ValueError(f"CompactLinear: {name} got {value}, wanted at least 1")
        self.in_features, self.out_features = in_features, out_features
        self._groups, self._filters, self._shape = 1, out_features, (out_features, in_features)
        self._init_tables((taps, block_filters, block_taps), bias, device, dtype)

    @classmethod
    def from_dense(
        cls,
        linear: nn.Linear,
        weight: Tensor | None = None,
        block: int | str = "auto",
        origin: Tensor | None = None,
    ) -> CompactLinear:
        """The compacted form of a linear layer whose weight (or `weight` in its place) has zeros; see CompactConv2d."""
        dense = linear.weight if weight is None else weight
        if dense.shape != linear.weight.shape:
            raise ValueError(
                f"CompactLinear.from_dense: weight got {list(dense.shape)}, wanted {list(linear.weight.shape)}"
            )
        dense = dense.detach()
        values, *tables = _choose("CompactLinear.from_dense", dense, 1, block, origin)
        new = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            taps=tables[0],
            block_filters=tables[1],
            block_taps=tables[2],
            device=dense.device,
            dtype=dense.dtype,
        )
        return _take(new, values, linear)

    def to_dense(self) -> nn.Linear:
        """The same layer as an nn.Linear, its zeros stored."""
        linear = nn.Linear(
            self.in_features,
            self.out_features,
            self.bias is not None,
            device=self.weight.device,
            dtype=self.weight.dtype,
        )
        return _give(self, linear)

    def forward(self, x: Tensor) -> Tensor:
        if type(x) is Tensor and not torch.compiler.is_compiling():
            packed = self._kept(x)
            if packed is not None:
                try:
                    return _linear_packed(x, packed, self.out_features)
                except RuntimeError as e:
                    raise ops.as_value_error(e) from None
        if x.dim() < 1 or x.shape[-1] != self.in_features:
            raise ValueError(f"linear_compact: x {_had(x, x.dim(), -1, 'features')}, wanted {self.in_features}")
        run = ops.linear_compact if self._by_kernel(x) else reference.linear_compact
        return run(x, self.weight, self.bias, self.taps, self.block_filters, self.block_taps, self.out_features)

    def _pack(self) -> Tensor:
        b = None if self.bias is None else self.bias.detach()
        return ops.linear_pack(
            self.weight.detach(), b, self.taps, self.block_filters, self.block_taps, self.in_features
        )

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}" + _repr(self)


class ChannelBias(nn.Module):
    """x plus a constant per channel of dimension `dim`: what is left of an addition whose other operand was constant.

    bias: [channels]. x: any rank above `dim`, x.shape[dim] == channels.
    """

    def __init__(self, bias: Tensor, dim: int = 1) -> None:
        super().__init__()
        self.bias = nn.Parameter(bias)
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias.reshape([-1 if d == self.dim else 1 for d in range(x.dim())])

    def extra_repr(self) -> str:
        return f"{self.bias.numel()}, dim={self.dim}"


class DropPath(nn.Module):
    """Stochastic depth (Huang et al., arXiv 1603.09382): in training a branch is dropped with probability p.

    x: any shape, batch first. per_sample: decided for every sample by itself, otherwise for the batch. rescale: what
    stays is divided by 1 - p, so its mean is that of evaluation, in which the layer hands its input on. It draws the
    random numbers that torchvision's and timm's layers draw.
    """

    def __init__(self, p: float = 0.5, per_sample: bool = True, rescale: bool = True) -> None:
        super().__init__()
        if not 0 <= p <= 1:
            raise ValueError(f"DropPath: p got {p!r}, wanted a number in [0, 1]")
        self.p, self.per_sample, self.rescale = p, per_sample, rescale

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        size = [x.shape[0] if self.per_sample else 1] + [1] * (x.dim() - 1)
        stays = torch.empty(size, dtype=x.dtype, device=x.device).bernoulli_(1 - self.p)
        if self.rescale and self.p < 1:
            stays.div_(1 - self.p)
        return x * stays

    def extra_repr(self) -> str:
        return f"p={self.p}, per_sample={self.per_sample}, rescale={self.rescale}"


def _had(x: Tensor, dims: int, dim: int, what: str) -> str:
    return f"has {x.shape[dim]} {what}" if x.dim() == dims >= 1 else f"got {x.dim()} dimensions"


def _repr(layer: _Compact) -> str:
    full = math.prod(layer._shape)
    blocks = layer.block_filters.numel()
    stored = layer.weight.numel()
    return f", bias={layer.bias is not None}, blocks={blocks}, weights={stored} of {full} ({stored / full:.1%})"


def _take(new: Any, values: Tensor, dense: nn.Conv2d | nn.Linear) -> Any:
    with torch.no_grad():
        new.weight.copy_(values)
        if dense.bias is not None:
            new.bias.copy_(dense.bias)
    new.weight.requires_grad_(dense.weight.requires_grad)
    if dense.bias is not None:
        new.bias.requires_grad_(dense.bias.requires_grad)
    return new.train(dense.training)


def _give(layer: _Compact, dense: Any) -> Any:
    with torch.no_grad():
        dense.weight.copy_(layer.dense_weight())
        if layer.bias is not None:
            dense.bias.copy_(layer.bias)
    dense.weight.requires_grad_(layer.weight.requires_grad)
    if layer.bias is not None:
        dense.bias.requires_grad_(layer.bias.requires_grad)
    return dense.train(layer.training)
