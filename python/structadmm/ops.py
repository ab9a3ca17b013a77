"""The ops: `torch.ops.structadmm.*` with Python signatures, and the fake implementations that torch.compile traces.

The training ops take the data of a weight, so autograd sees none of them. Group numbers: `structadmm.groups`. The truth
they are tested against: `structadmm.reference`. Bad arguments raise ValueError, `op: argument got ..., wanted ...`.
"""

from __future__ import annotations

import ast
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import _load as _load
from .groups import DEFAULT_BLOCK, n_groups

_ops = torch.ops.structadmm
_fake = torch.library.register_fake
_F = TypeVar("_F", bound=Callable[..., Any])


def isa() -> str:
    """The instruction set that the CPU kernels use: scalar, avx2, avx512, avx512_bf16 or amx_bf16.

    STRUCTADMM_ISA forces one; layers in float32 run the kernels of avx512 on the last two."""
    return str(_ops.isa())


def as_value_error(e: RuntimeError) -> Exception:
    """The ValueError that an op meant; any other error as it is.

    Torch 2.11 passes the core's exception on; 2.15 keeps only its text, "op: ...", in a plain RuntimeError.
    """
    return ValueError(str(e)) if type(e) is RuntimeError and hasattr(_ops, str(e).partition(":")[0]) else e


def _value_errors(op: _F) -> _F:
    @functools.wraps(op)
    def checked(*args: Any, **kwargs: Any) -> Any:
        try:
            return op(*args, **kwargs)
        except RuntimeError as e:
            raise as_value_error(e) from None

    return checked  # type: ignore[return-value]


def _touched(*tensors: Tensor) -> None:
    # torch counts the writes to a tensor, and refuses a backward pass over what was overwritten; it cannot see ours.
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])


@_value_errors
def group_sumsq(
    w: Tensor,
    structure: str,
    conv_groups: int = 1,
    block: int = DEFAULT_BLOCK,
    u: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """f32 [n_groups]: the sum over each group of (w + u)^2, weights outside the mask left out.

    w: [O, C/groups, *kernel], f32, bf16 or f16, any strides (contiguous and channels-last without a copy); u: f32 of
    w's shape; mask: bool of w's shape. The same bits on every CPU, instruction set and thread count: sums run over
    filters in ascending order by fused multiply-add (filter groups: in 32 lanes along the row, which for channels-last
    weights is in memory order).
    """
    result: Tensor = _ops.group_sumsq(w.detach(), structure, conv_groups, block, u, mask)
    return result


@_fake("structadmm::group_sumsq")
def _(
    w: Tensor,
    structure: str,
    conv_groups: int = 1,
    block: int = DEFAULT_BLOCK,
    u: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    return w.new_empty(n_groups(structure, w.shape, conv_groups, block), dtype=torch.float32)


@_value_errors
def topk_keep(scores: Tensor, k: int) -> Tensor:
    """Bool [n], exactly k true: the largest of f32 scores [n], ties to the lower index. NaN or infinite: ValueError."""
    result: Tensor = _ops.topk_keep(scores.detach(), k)
    return result


@_fake("structadmm::topk_keep")
def _(scores: Tensor, k: int) -> Tensor:
    return scores.new_empty(scores.shape[0], dtype=torch.bool)


@_value_errors
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
    """Project V = W + U on the k groups of largest norm and update the dual, in place on z and u, in two passes.

    Z' = V on kept groups and mask, 0 elsewhere; U' = V - Z'. Returns keep, bool [n_groups], and sums, f64 [5]:
    ||W - Z'||^2, ||Z' - Z||^2, ||W||^2, ||Z'||^2, ||U'||^2, within 1e-6 and the same bits for every thread count. The Z
    and U steps of StructADMM; Boyd et al. (2011), section 9.1. Memory layouts and dtypes as in group_sumsq; z and u are
    f32.

    A NaN or infinite group norm is a ValueError on the CPU. On CUDA, to spare the wait for the device, it leaves z and
    u as they are and makes the sums NaN.
    """
    keep, sums = _ops.project_update_(w.detach(), z, u, structure, k, conv_groups, block, mask)
    _touched(z, u)
    return keep, sums


@_fake("structadmm::project_update_")
def _(
    w: Tensor,
    z: Tensor,
    u: Tensor,
    structure: str,
    k: int,
    conv_groups: int = 1,
    block: int = DEFAULT_BLOCK,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    n = n_groups(structure, w.shape, conv_groups, block)
    return w.new_empty(n, dtype=torch.bool), w.new_empty(5, dtype=torch.float64)


@_value_errors
def masked_update_(w: Tensor, z: Tensor, u: Tensor, mask: Tensor) -> Tensor:
    """project_update_ for a mask already known (bool of w's shape), as mixtures need it. Returns the sums, f64 [5]."""
    sums: Tensor = _ops.masked_update_(w.detach(), z, u, mask)
    _touched(z, u)
    return sums


@_fake("structadmm::masked_update_")
def _(w: Tensor, z: Tensor, u: Tensor, mask: Tensor) -> Tensor:
    return w.new_empty(5, dtype=torch.float64)


@_value_errors
def add_penalty_grad_(
    grads: Sequence[Tensor], ws: Sequence[Tensor], zs: Sequence[Tensor], us: Sequence[Tensor], rhos: Sequence[float]
) -> None:
    """grads[i] += rhos[i] * (ws[i] - zs[i] + us[i]) for all layers in one call: the gradient of rho/2 ||W - Z + U||^2.

    grads and ws are f32, bf16 or f16, one dtype per layer, zs and us f32; f32 arithmetic, rounded once to grads' dtype.
    """
    grads = list(grads)
    _ops.add_penalty_grad_(grads, [w.detach() for w in ws], list(zs), list(us), [float(rho) for rho in rhos])
    _touched(*grads)


@_fake("structadmm::add_penalty_grad_")
def _(grads: list[Tensor], ws: list[Tensor], zs: list[Tensor], us: list[Tensor], rhos: list[float]) -> None:
    return None


def _conv_out(
    op: str, x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    if x.dim() != 4:
        raise ValueError(f"{op}: x got {x.dim()} dimensions, wanted 4 (batch, channels, height, width)")
    return [(x.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)]


# Bound once: looking an op up costs as much as a small layer.
_conv2d_packed = _ops.conv2d_packed.default
_linear_packed = _ops.linear_packed.default
run_segment_op = _ops.run_segment.default
run_segment_1_op = _ops.run_segment_1.default  # (x, program, whether its values are bf16): for eager calls alone


@_value_errors
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
    """2-d convolution of x, f32 [batch, channels, height, width] of any strides, with a compacted weight: contiguous.

    The weight and its tables are stored as structadmm.nn says; they are checked and packed at every call. f32 only, CPU
    or CUDA, no autograd.
    """
    return _ops.conv2d_compact(
        x, weight, bias, taps, block_filters, block_taps, out_channels, kernel_size, stride, padding, dilation, groups
    )


@_value_errors
def linear_compact(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    taps: Tensor,
    block_filters: Tensor,
    block_taps: Tensor,
    out_features: int,
) -> Tensor:
    """x [..., in_features] W^T + bias with a compacted weight; otherwise as conv2d_compact."""
    return _ops.linear_compact(x, weight, bias, taps, block_filters, block_taps, out_features)


@_value_errors
def conv2d_pack(
    weight: Tensor,
    bias: Tensor | None,
    taps: Tensor,
    block_filters: Tensor,
    block_taps: Tensor,
    in_channels: int,
    kernel_size: Sequence[int],
    groups: int,
) -> Tensor:
    """The weight and bias as conv2d_packed reads them: opaque bytes (uint8), good in this process."""
    return _ops.conv2d_pack(weight, bias, taps, block_filters, block_taps, in_channels, kernel_size, groups)


@_value_errors
def linear_pack(
    weight: Tensor, bias: Tensor | None, taps: Tensor, block_filters: Tensor, block_taps: Tensor, in_features: int
) -> Tensor:
    """The weight and bias as linear_packed reads them: opaque bytes (uint8), good in this process."""
    return _ops.linear_pack(weight, bias, taps, block_filters, block_taps, in_features)


@_value_errors
def conv2d_packed(
    x: Tensor,
    packed: Tensor,
    out_channels: int,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    padding_h: int,
    padding_w: int,
    dilation_h: int,
    dilation_w: int,
) -> Tensor:
    """conv2d_compact on what conv2d_pack made."""
    sizes = (kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w)
    return _conv2d_packed(x, packed, out_channels, *sizes)


@_value_errors
def linear_packed(x: Tensor, packed: Tensor, out_features: int) -> Tensor:
    """linear_compact on what linear_pack made."""
    return _linear_packed(x, packed, out_features)


@_fake("structadmm::conv2d_compact")
def _(x, weight, bias, taps, block_filters, block_taps, out_channels, kernel_size, stride, padding, dilation, groups):  # type: ignore[no-untyped-def]
    return x.new_empty(
        [x.shape[0], out_channels, *_conv_out("conv2d_compact", x, kernel_size, stride, padding, dilation)]
    )


@_fake("structadmm::conv2d_packed")
def _(x, packed, out_channels, kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w):  # type: ignore[no-untyped-def]
    kernel, stride, padding, dilation = (
        (kernel_h, kernel_w),
        (stride_h, stride_w),
        (padding_h, padding_w),
        (dilation_h, dilation_w),
    )
    return x.new_empty([x.shape[0], out_channels, *_conv_out("conv2d_packed", x, kernel, stride, padding, dilation)])


@_fake("structadmm::linear_compact")
def _(x, weight, bias, taps, block_filters, block_taps, out_features):  # type: ignore[no-untyped-def]
    return x.new_empty([*x.shape[:-1], out_features])


@_fake("structadmm::linear_packed")
def _(x, packed, out_features):  # type: ignore[no-untyped-def]
    return x.new_empty([*x.shape[:-1], out_features])


@_value_errors
def run_segment(inputs: Sequence[Tensor], program: Tensor, dtype: str, shapes: str) -> list[Tensor]:
    """The outputs of a subgraph for `inputs`, [N, C, H, W] or [N, features] of any strides, in one call.

    program: uint8, the bytes of the subgraph's artefact. dtype: of the values inside, "float32" or "bfloat16". shapes:
    the outputs' shapes as tracers need them, dimensions joined by commas, outputs by semicolons: `x0_2` is dimension 2
    of input 0; numbers, + - * // and min are what an expression is made of. CPU only, no autograd.
    """
    result: list[Tensor] = run_segment_op(list(inputs), program, dtype, shapes)
    return result


@_fake("structadmm::run_segment")
def _(inputs: Sequence[Tensor], program: Tensor, dtype: str, shapes: str) -> list[Tensor]:
    names = {f"x{i}_{d}": size for i, x in enumerate(inputs) for d, size in enumerate(x.shape)}
    rows = [[evaluate(size, **names) for size in row.split(",")] for row in shapes.split(";")]
    return [inputs[0].new_empty(row) for row in rows]


_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


def evaluate(text: str, **names: Any) -> Any:
    """The value of one expression of run_segment's `shapes`. Raises ValueError."""

    def value(e: ast.expr) -> Any:
        if isinstance(e, ast.Constant) and type(e.value) is int:
            return e.value
        if isinstance(e, ast.Name) and e.id in names:
            return names[e.id]
        if isinstance(e, ast.BinOp) and type(e.op) in _ARITHMETIC:
            return _ARITHMETIC[type(e.op)](value(e.left), value(e.right))
        if isinstance(e, ast.Call) and isinstance(e.func, ast.Name) and e.func.id == "min" and len(e.args) == 2:
            return torch.sym_min(value(e.args[0]), value(e.args[1]))
        raise ValueError(f"run_segment: shapes got {text!r}, wanted sums, products and quotients of the inputs' sizes")

    try:
        return value(ast.parse(text, mode="eval").body)
    except (SyntaxError, RecursionError, ZeroDivisionError) as e:
        raise ValueError(f"run_segment: shapes got {text!r}, wanted an expression: {e}") from None
