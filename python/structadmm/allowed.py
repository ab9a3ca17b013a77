"""The operations that an artefact may hold: layers with their configurations, functions, tensor methods.

A name outside these tables is refused on save and on load, so a file never names code of its own choice. Every kind of
layer declares the fields that build it, and the shapes that its tensors then have, so a file is checked against its own
tensors before anything is built or allocated.
"""

from __future__ import annotations

import math
import operator
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .nn import ChannelBias, CompactConv2d, CompactLinear, DropPath, check_tables
from .symbolic import assigned

# Sizes and counts of a file stay below this, so that products of a few of them are far from overflow.
_LIMIT = 2**31


class Refused(Exception):
    """`what got ..., wanted ...`: the reason why a layer, a node or a file is not accepted."""


def refuse(what: str, got: object, wanted: str) -> Refused:
    return Refused(f"{what} got {got if isinstance(got, str) else reprlib.repr(got)}, wanted {wanted}")


@dataclass(frozen=True)
class Field:
    """One configuration field: `read` turns an attribute into JSON, `test` accepts that, `build` undoes `read`."""

    wanted: str
    test: Callable[[Any], bool]
    read: Callable[[Any], Any] = lambda v: v
    build: Callable[[Any], Any] = lambda v: v


def _is_int(low: int) -> Callable[[Any], bool]:
    return lambda v: type(v) is int and low <= v < _LIMIT


def _is_float(v: Any) -> bool:
    return type(v) in (int, float) and math.isfinite(v)


def _integer(low: int) -> Field:
    return Field(f"an integer of at least {low}", _is_int(low))


def _sizes(n: int, low: int) -> Field:
    """n integers; a layer built with one integer for all is written as n."""

    def read(v: Any) -> Any:
        return [v] * n if isinstance(v, int) else v if isinstance(v, str) else list(v)

    item = _is_int(low)
    return Field(
        f"{n} integers of at least {low}",
        lambda v: isinstance(v, list) and len(v) == n and all(map(item, v)),
        read,
        tuple,
    )


def _optional(field: Field) -> Field:
    return Field(
        f"null or {field.wanted}",
        lambda v: v is None or field.test(v),
        lambda v: None if v is None else field.read(v),
        lambda v: None if v is None else field.build(v),
    )


def _choice(*values: str) -> Field:
    return Field(f"one of {', '.join(values)}", lambda v: v in values if isinstance(v, str) else False)


def _either(a: Field, b: Field) -> Field:
    return Field(
        f"{a.wanted}, or {b.wanted}",
        lambda v: a.test(v) or b.test(v),
        a.read,
        lambda v: a.build(v) if a.test(v) else b.build(v),
    )


def _adaptive(n: int) -> Field:
    """An output size of adaptive pooling, in which null means the input's."""

    def read(v: Any) -> Any:
        return [v] * n if v is None or isinstance(v, int) else list(v)

    size = _is_int(1)
    return Field(
        f"{n} sizes or nulls",
        lambda v: isinstance(v, list) and len(v) == n and all(s is None or size(s) for s in v),
        read,
        tuple,
    )


BOOL = Field("true or false", lambda v: isinstance(v, bool))
FLOAT = Field("a finite number", _is_float)
PROBABILITY = Field("a number in [0, 1]", lambda v: _is_float(v) and 0 <= v <= 1)
COUNT = _integer(1)
DIM = Field("an integer", lambda v: type(v) is int and -_LIMIT < v < _LIMIT)
PRESENT = Field(BOOL.wanted, BOOL.test, lambda v: v is not None if not isinstance(v, bool) else v)
SHAPE = Field(
    "a list of sizes",
    lambda v: isinstance(v, list) and 0 < len(v) < 9 and all(map(_is_int(1), v)),
    lambda v: [v] if isinstance(v, int) else list(v),
    tuple,
)

Config = dict[str, Any]
Shapes = dict[str, tuple[int | None, ...]]
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Kind:
    """How one class of layer is written, checked and built.

    `fields` are constructor arguments, read from the attributes of the same names. `tensors` gives, for a configuration
    that passed its fields, the shape of each tensor of the state (None where the length is the data's own), `integers`
    the dtype of those that are not floating. `consistent` says what is wrong with fields that are right one by one, and
    `values` with the contents of integer tables.
    """

    cls: type[nn.Module]
    fields: Mapping[str, Field]
    tensors: Callable[[Config], Shapes] = lambda c: {}
    integers: Mapping[str, torch.dtype] | None = None
    consistent: Callable[[Config], str | None] = lambda c: None
    values: Callable[[Config, dict[str, Tensor]], str | None] = lambda c, t: None
    getters: Mapping[str, Callable[[Any], Any]] | None = None  # for fields that are no attributes
    make: Callable[..., nn.Module] | None = None  # for constructors that take other arguments
    fixed: Mapping[str, object] | None = None  # attributes that are not written, and the one value that they may have

    def read(self, module: nn.Module) -> Config:
        """The configuration of a layer, as JSON values. Raises Refused where this kind cannot hold it."""
        for name, value in (self.fixed or {}).items():
            if getattr(module, name) != value:
                raise refuse(name, getattr(module, name), repr(value))
        getters = self.getters or {}
        config = {
            name: field.read(getters[name](module) if name in getters else getattr(module, name))
            for name, field in self.fields.items()
        }
        self.check_config(config)
        return config

    def check_config(self, config: Any) -> None:
        if not isinstance(config, dict) or set(config) != set(self.fields):
            got = sorted(config) if isinstance(config, dict) else config
            raise refuse("config", got, f"the fields {', '.join(self.fields) or '(none)'}")
        for name, field in self.fields.items():
            if not field.test(config[name]):
                raise refuse(name, config[name], field.wanted)
        if wrong := self.consistent(config):
            raise Refused(wrong)

    def check_tensors(self, config: Config, tensors: dict[str, Tensor]) -> None:
        """Names, shapes, dtypes and, for tables, values. Raises Refused."""
        wanted = self.tensors(config)
        if set(tensors) != set(wanted):
            raise refuse("tensors", sorted(tensors), f"{', '.join(sorted(wanted)) or 'none'}")
        for name, shape in wanted.items():
            t = tensors[name]
            if len(t.shape) != len(shape) or any(w not in (None, s) for s, w in zip(t.shape, shape, strict=True)):
                shown = ", ".join("any" if s is None else str(s) for s in shape)
                raise refuse(name, str(list(t.shape)), f"[{shown}]")
            integer = (self.integers or {}).get(name)
            if t.dtype != integer if integer is not None else t.dtype not in _FLOATS:
                raise refuse(name, str(t.dtype), str(integer) if integer is not None else "a floating dtype")
        if wrong := self.values(config, tensors):
            raise Refused(wrong)

    def build(self, config: Config) -> nn.Module:
        """The layer on the meta device, so nothing is allocated, whatever the sizes."""
        arguments = {name: field.build(config[name]) for name, field in self.fields.items()}
        with torch.device("meta"):
            return (self.make or self.cls)(**arguments)


def _conv(cls: type[nn.Module], n: int) -> Kind:
    return Kind(
        cls,
        {
            "in_channels": COUNT,
            "out_channels": COUNT,
            "kernel_size": _sizes(n, 1),
            "stride": _sizes(n, 1),
            "padding": _either(_sizes(n, 0), _choice("same", "valid")),
            "dilation": _sizes(n, 1),
            "groups": COUNT,
            "bias": PRESENT,
            "padding_mode": _choice("zeros", "reflect", "replicate", "circular"),
        },
        lambda c: {
            "weight": (c["out_channels"], c["in_channels"] // c["groups"], *c["kernel_size"]),
            **({"bias": (c["out_channels"],)} if c["bias"] else {}),
        },
        consistent=_divides,
    )


def _divides(c: Config) -> str | None:
    if c["in_channels"] % c["groups"] or c["out_channels"] % c["groups"]:
        return f"groups got {c['groups']}, wanted a divisor of {c['in_channels']} and {c['out_channels']} channels"
    return None


def _batch_norm(cls: type[nn.Module]) -> Kind:
    def tensors(c: Config) -> Shapes:
        n = (c["num_features"],)
        affine: Shapes = {"weight": n, "bias": n} if c["affine"] else {}
        running: Shapes = {"running_mean": n, "running_var": n, "num_batches_tracked": ()}
        return {**affine, **(running if c["track_running_stats"] else {})}

    fields = {
        "num_features": COUNT,
        "eps": FLOAT,
        "momentum": _optional(FLOAT),
        "affine": BOOL,
        "track_running_stats": BOOL,
    }
    return Kind(cls, fields, tensors, {"num_batches_tracked": torch.int64})


def _pool(cls: type[nn.Module], n: int, average: bool) -> Kind:
    fields = {
        "kernel_size": _sizes(n, 1),
        "stride": _sizes(n, 1),
        "padding": _sizes(n, 0),
        **(
            {"ceil_mode": BOOL, "count_include_pad": BOOL} if average else {"dilation": _sizes(n, 1), "ceil_mode": BOOL}
        ),
        **({"divisor_override": _optional(COUNT)} if average and n > 1 else {}),
    }
    return Kind(cls, fields, fixed={} if average else {"return_indices": False})


# Most layers of a recurrent module: its tensors are counted before any is looked for.
_LAYERS = 64


def _recurrent(cls: type[nn.Module], gates: int) -> Kind:
    def tensors(c: Config) -> Shapes:
        h = c["hidden_size"]
        directions = ("", "_reverse") if c["bidirectional"] else ("",)
        shapes: Shapes = {}
        for layer in range(c["num_layers"]):
            for suffix in (f"l{layer}{d}" for d in directions):
                shapes[f"weight_ih_{suffix}"] = (gates * h, h * len(directions) if layer else c["input_size"])
                shapes[f"weight_hh_{suffix}"] = (gates * h, h)
                if c["bias"]:
                    shapes[f"bias_ih_{suffix}"] = shapes[f"bias_hh_{suffix}"] = (gates * h,)
        return shapes

    fields = {
        "input_size": COUNT,
        "hidden_size": COUNT,
        "num_layers": COUNT,
        "bias": BOOL,
        "batch_first": BOOL,
        "dropout": PROBABILITY,
        "bidirectional": BOOL,
    }
    return Kind(
        cls,
        fields,
        tensors,
        consistent=lambda c: (
            f"num_layers got {c['num_layers']}, wanted at most {_LAYERS}" if c["num_layers"] > _LAYERS else None
        ),
        fixed={"proj_size": 0},
    )


def _plain(cls: type[nn.Module], **fields: Field) -> Kind:
    return Kind(cls, fields)


_TABLES = {name: torch.int32 for name in ("taps", "block_filters", "block_taps")}


def _compact(cls: type[nn.Module], fields: Mapping[str, Field], view: Callable[[Config], tuple[int, int, int]]) -> Kind:
    """A compacted layer; `view` gives columns of a conv group, filters, conv groups."""

    def tensors(c: Config) -> Shapes:
        bias: Shapes = {"bias": (view(c)[1],)} if c["bias"] else {}
        return {"weight": (None,), **bias, **{name: (None,) for name in _TABLES}}

    def values(c: Config, t: dict[str, Tensor]) -> str | None:
        try:
            n = check_tables(cls.__name__, *view(c), *(t[name] for name in _TABLES))
        except ValueError as e:
            return str(e)
        return (
            None if t["weight"].numel() == n else f"weight got [{t['weight'].numel()}], wanted [{n}] as its tables say"
        )

    def make(**arguments: Any) -> nn.Module:
        # Tables of any length serve, their values are the file's; the layer's own would cost torch's decompositions.
        lengths = zip(_TABLES, (0, 1, 2), strict=True)
        return cls(**arguments, **{name: torch.empty(n, dtype=torch.int32) for name, n in lengths})

    consistent = _divides if "groups" in fields else lambda c: None
    return Kind(cls, fields, tensors, _TABLES, consistent, values, make=make)


_CONV2D = {
    "in_channels": COUNT,
    "out_channels": COUNT,
    "kernel_size": _sizes(2, 1),
    "stride": _sizes(2, 1),
    "padding": _sizes(2, 0),
    "dilation": _sizes(2, 1),
    "groups": COUNT,
    "bias": PRESENT,
}

KINDS: dict[str, Kind] = {
    kind.cls.__name__: kind
    for kind in (
        _conv(nn.Conv1d, 1),
        _conv(nn.Conv2d, 2),
        _conv(nn.Conv3d, 3),
        Kind(
            nn.Linear,
            {"in_features": COUNT, "out_features": COUNT, "bias": PRESENT},
            lambda c: {
                "weight": (c["out_features"], c["in_features"]),
                **({"bias": (c["out_features"],)} if c["bias"] else {}),
            },
        ),
        _batch_norm(nn.BatchNorm1d),
        _batch_norm(nn.BatchNorm2d),
        _batch_norm(nn.BatchNorm3d),
        Kind(
            nn.GroupNorm,
            {"num_groups": COUNT, "num_channels": COUNT, "eps": FLOAT, "affine": BOOL},
            lambda c: {"weight": (c["num_channels"],), "bias": (c["num_channels"],)} if c["affine"] else {},
            consistent=lambda c: (
                f"num_groups got {c['num_groups']}, wanted a divisor of {c['num_channels']} channels"
                if c["num_channels"] % c["num_groups"]
                else None
            ),
        ),
        Kind(
            nn.LayerNorm,
            {"normalized_shape": SHAPE, "eps": FLOAT, "elementwise_affine": BOOL, "bias": PRESENT},
            lambda c: {
                **({"weight": tuple(c["normalized_shape"])} if c["elementwise_affine"] else {}),
                **({"bias": tuple(c["normalized_shape"])} if c["elementwise_affine"] and c["bias"] else {}),
            },
        ),
        Kind(
            nn.RMSNorm,
            {"normalized_shape": SHAPE, "eps": _optional(FLOAT), "elementwise_affine": BOOL},
            lambda c: {"weight": tuple(c["normalized_shape"])} if c["elementwise_affine"] else {},
        ),
        Kind(
            nn.Embedding,
            {"num_embeddings": COUNT, "embedding_dim": COUNT},
            lambda c: {"weight": (c["num_embeddings"], c["embedding_dim"])},
            fixed={"padding_idx": None, "max_norm": None, "scale_grad_by_freq": False, "sparse": False},
        ),
        Kind(nn.PReLU, {"num_parameters": COUNT}, lambda c: {"weight": (c["num_parameters"],)}),
        _plain(nn.ReLU, inplace=BOOL),
        _plain(nn.ReLU6, inplace=BOOL),
        _plain(nn.LeakyReLU, negative_slope=FLOAT, inplace=BOOL),
        _plain(nn.ELU, alpha=FLOAT, inplace=BOOL),
        _plain(nn.GELU, approximate=_choice("none", "tanh")),
        _plain(nn.SiLU, inplace=BOOL),
        _plain(nn.Mish, inplace=BOOL),
        _plain(nn.Hardswish, inplace=BOOL),
        _plain(nn.Hardsigmoid, inplace=BOOL),
        _plain(nn.Hardtanh, min_val=FLOAT, max_val=FLOAT, inplace=BOOL),
        _plain(nn.Softplus, beta=FLOAT, threshold=FLOAT),
        _plain(nn.Sigmoid),
        _plain(nn.Tanh),
        _plain(nn.Softmax, dim=DIM),
        _plain(nn.LogSoftmax, dim=DIM),
        _pool(nn.MaxPool1d, 1, average=False),
        _pool(nn.MaxPool2d, 2, average=False),
        _pool(nn.MaxPool3d, 3, average=False),
        _pool(nn.AvgPool1d, 1, average=True),
        _pool(nn.AvgPool2d, 2, average=True),
        _pool(nn.AvgPool3d, 3, average=True),
        _plain(nn.AdaptiveAvgPool1d, output_size=_adaptive(1)),
        _plain(nn.AdaptiveAvgPool2d, output_size=_adaptive(2)),
        _plain(nn.AdaptiveAvgPool3d, output_size=_adaptive(3)),
        Kind(nn.AdaptiveMaxPool1d, {"output_size": _adaptive(1)}, fixed={"return_indices": False}),
        Kind(nn.AdaptiveMaxPool2d, {"output_size": _adaptive(2)}, fixed={"return_indices": False}),
        _plain(nn.ZeroPad2d, padding=_sizes(4, 0)),
        _plain(nn.PixelShuffle, upscale_factor=COUNT),
        _plain(nn.PixelUnshuffle, downscale_factor=COUNT),
        _plain(nn.ChannelShuffle, groups=COUNT),
        _plain(nn.Flatten, start_dim=DIM, end_dim=DIM),
        _plain(nn.Dropout, p=PROBABILITY, inplace=BOOL),
        _plain(nn.Dropout1d, p=PROBABILITY, inplace=BOOL),
        _plain(nn.Dropout2d, p=PROBABILITY, inplace=BOOL),
        _plain(DropPath, p=PROBABILITY, per_sample=BOOL, rescale=BOOL),
        _plain(nn.Identity),
        _compact(
            CompactConv2d,
            _CONV2D,
            lambda c: (c["in_channels"] // c["groups"] * math.prod(c["kernel_size"]), c["out_channels"], c["groups"]),
        ),
        _compact(
            CompactLinear,
            {"in_features": COUNT, "out_features": COUNT, "bias": PRESENT},
            lambda c: (c["in_features"], c["out_features"], 1),
        ),
        Kind(
            ChannelBias,
            {"channels": COUNT, "dim": _integer(0)},
            lambda c: {"bias": (c["channels"],)},
            getters={"channels": lambda m: m.bias.numel()},
            make=lambda channels, dim: ChannelBias(torch.empty(channels), dim),
        ),
        _recurrent(nn.LSTM, 4),
        _recurrent(nn.GRU, 3),
    )
}


def _named(prefix: str, owner: Any, names: str) -> dict[str, Callable[..., Any]]:
    return {f"{prefix}.{name}": getattr(owner, name) for name in names.split()}


FUNCTIONS: dict[str, Callable[..., Any]] = {
    **_named(
        "operator", operator, "add sub mul truediv floordiv mod neg iadd isub imul getitem matmul pow invert ne eq"
    ),
    **_named("torch", torch, "add sub mul div neg maximum minimum clamp abs exp sqrt rsqrt square pow matmul"),
    **_named("torch", torch, "relu relu_ sigmoid tanh softmax log_softmax dropout"),
    **_named("torch", torch, "cat concat stack chunk split flatten reshape permute transpose squeeze unsqueeze"),
    **_named("torch", torch, "mean sum amax argmax bmm roll unbind unflatten swapaxes movedim flip tile erf log where"),
    **_named(
        "torch", torch, "einsum addcmul zeros ones arange cumsum sin cos masked_fill repeat_interleave tensor_split"
    ),
    **_named("F", F, "relu relu_ relu6 leaky_relu elu gelu silu mish hardswish hardsigmoid hardtanh softplus prelu"),
    **_named("F", F, "sigmoid tanh softmax log_softmax dropout dropout2d pad conv1d conv2d linear layer_norm"),
    **_named("F", F, "max_pool1d max_pool2d avg_pool1d avg_pool2d pixel_shuffle pixel_unshuffle channel_shuffle"),
    **_named("F", F, "scaled_dot_product_attention interpolate group_norm rms_norm normalize selu celu logsigmoid"),
    **_named("F", F, "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool1d adaptive_max_pool2d"),
    **_named("F", F, "unfold fold dropout1d dropout3d max_pool3d avg_pool3d adaptive_avg_pool3d conv3d"),
    "getattr": getattr,  # of `shape`, `dtype`, `device` alone, see manifest.py
    "math.ceil": math.ceil,
    "structadmm.assigned": assigned,
}

_WORDS = (
    "add add_ sub sub_ mul mul_ div div_ neg clamp abs exp sqrt rsqrt square pow matmul relu relu_ sigmoid tanh",
    "softmax log_softmax flatten view reshape permute transpose squeeze unsqueeze chunk split contiguous mean sum amax",
    "argmax size dim bmm roll unbind unflatten swapaxes movedim flip expand expand_as reshape_as repeat amin erf log",
    "type_as select narrow norm to float sin cos cumsum repeat_interleave unfold masked_fill clone zero_ addcmul max",
    "new_zeros new_ones new_full detach",
)
METHODS = frozenset(word for line in _WORDS for word in line.split())
