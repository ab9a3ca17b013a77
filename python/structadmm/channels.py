"""Ids and constants: which channel of every tensor in a traced network comes from which filter, and what it holds.

Every channel of every tensor has an *id*; data movement (reshape, slice, concat, pad) is done on the ids as it is on
the data, and an addition ties the ids of its operands, so tied channels go together or not at all. A channel is a
*constant* c when it holds c on the whole map, border included, whatever the input: a filter without weights emits its
bias; BatchNorm and activations map constants; zero padding leaves only 0 constant. An operation that is not tracked
pins the channels it touches, with the reason.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .trace import Shape, Traced

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class Facts:
    """What is known of a tensor's channels: arrays that broadcast against its shape (batch dimension 1, untracked
    dimensions 1).

    ids: the channel's id. const: the channel holds `value` everywhere, whatever the input; value: meaningful where
    const.
    """

    ids: Ints
    const: Bools
    value: Floats

    def map(self, move: Callable[[npt.NDArray[Any]], npt.NDArray[Any]]) -> Facts:
        return Facts(move(self.ids), move(self.const), move(self.value))

    def vary(self) -> Facts:
        """The same channels with nothing known of their values."""
        return Facts(self.ids, np.zeros_like(self.const), np.zeros_like(self.value))


@dataclass
class Layer:
    """A convolution or linear layer: [O] filters in `groups` conv groups, each of which reads Cg of the [groups*Cg]
    input channels.

    weight [O, Cg, K]. reads [O, Cg]: the filter has a nonzero weight on the channel; border [O, Cg]: one that can lie
    on zero padding. shift: where a constant can be added to the output: "bias", "norm" (the mean of the BatchNorm
    behind), "new" (a bias that compact creates), or None. silent [O]: filters that emit a constant by their bias alone,
    and so read nothing. needed [O]: filters whose output is. merges: removed input channel -> the one that takes over
    its constant.
    """

    node: fx.Node
    source: fx.Node
    groups: int
    weight: Tensor
    ins: Facts
    outs: Facts
    reads: Bools
    border: Bools
    bias: Floats
    shift: str | None
    silent: Bools
    needed: Bools | None = None
    merges: dict[int, int] = field(default_factory=dict)

    def response(self, amount: Floats) -> Floats:
        """[O] output, away from the border, for input channels that hold `amount` [groups*Cg]: no bias."""
        at = np.flatnonzero(amount)
        if not at.size:
            return np.zeros(len(self.weight))
        x = torch.from_numpy(amount).to(self.weight.device)
        if self.groups == 1:  # few columns of what may be a huge weight
            index = torch.from_numpy(at).to(self.weight.device)
            return (self.weight[:, index].double().sum(2) @ x[index]).cpu().numpy()
        total = self.weight.double().sum(2).reshape(self.groups, -1, self.weight.shape[1])
        return (total @ x.reshape(self.groups, -1, 1)).reshape(-1).cpu().numpy()


def flat(facts: Facts) -> Facts:
    return facts.map(lambda a: a.reshape(-1))


def _blocks(s: Sequence[int], t: Sequence[int]) -> list[tuple[int, int, int, int]] | None:
    """Shortest runs s[i0:i1], t[j0:j1] of equal products that together make up a reshape from s to t; None if there are
    none."""
    if math.prod(s) != math.prod(t) or 0 in s:
        return None
    out, i, j = [], 0, 0
    while i < len(s) or j < len(t):
        i0, j0, p, q = i, j, 1, 1
        if i < len(s):
            p, i = p * s[i], i + 1
        if j < len(t):
            q, j = q * t[j], j + 1
        while p != q:
            if p < q:
                p, i = p * s[i], i + 1
            else:
                q, j = q * t[j], j + 1
        out.append((i0, i, j0, j))
    return out


# fmt: off
# Elementwise operations of one tensor; the identities are identities in eval mode.
_IDENTITY_MODULES = (
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
)
_POINTWISE_MODULES = (
    nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh, nn.LeakyReLU, nn.ELU,
    nn.SELU, nn.CELU, nn.Mish, nn.Softplus, nn.Softsign, nn.Hardtanh, nn.LogSigmoid, nn.Threshold, nn.Hardshrink,
    nn.Softshrink, nn.Tanhshrink,
)
_POINTWISE_NAMES = {
    "relu", "relu_", "relu6", "silu", "gelu", "hardswish", "hardsigmoid", "sigmoid", "sigmoid_", "tanh", "tanh_",
    "leaky_relu", "leaky_relu_", "elu", "elu_", "selu", "selu_", "celu", "celu_", "mish", "softplus", "softsign",
    "hardtanh", "hardtanh_", "logsigmoid", "threshold", "hardshrink", "softshrink", "tanhshrink", "abs", "neg", "exp",
    "sqrt", "square", "clamp", "clamp_", "clip", "pow", "erf", "sin", "cos", "log1p", "expm1", "rsqrt", "reciprocal",
}
_IDENTITY_NAMES = {"contiguous", "clone", "detach"}
BINARY_NAMES = {
    "add": "add", "add_": "add", "iadd": "add", "sub": "sub", "sub_": "sub", "isub": "sub", "mul": "mul", "mul_":
    "mul", "imul": "mul", "multiply": "mul", "subtract": "sub", "truediv": "div", "div": "div", "div_": "div",
    "itruediv": "div", "maximum": "max", "minimum": "min",
}
_CONST_POOLS = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d, nn.Upsample, nn.UpsamplingNearest2d,
    nn.UpsamplingBilinear2d,
)
_AVG_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_CONST_POOL_FUNCTIONS = {
    F.max_pool1d, F.max_pool2d, F.max_pool3d, torch.max_pool1d, torch.max_pool2d, torch.max_pool3d,
    F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d, F.adaptive_max_pool1d, F.adaptive_max_pool2d,
    F.adaptive_max_pool3d, F.interpolate,
}
_AVG_POOL_FUNCTIONS = {F.avg_pool1d, F.avg_pool2d, F.avg_pool3d}
_PADS = (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)
# What may be asked of a tensor without learning how many channels it has.
_HARMLESS = ("device", "dtype", "ndim", "is_cuda", "layout", "requires_grad", "dim")
# fmt: on


def function_name(target: Any) -> str:
    """The name of a torch or operator function; '' for functions from elsewhere, which may do anything under a known
    name."""
    module = getattr(target, "__module__", None) or ""
    ours = module.split(".")[0] in ("torch", "_operator", "operator") or isinstance(target, type(torch.relu))
    return getattr(target, "__name__", "") if ours else ""


def given(node: fx.Node, *names: str) -> dict[str, Any]:
    """The arguments of a node by name, positional ones as `names` call them."""
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def title(node: fx.Node) -> str:
    """How messages call a node: a module's path, or the operation and the node's name."""
    if node.op == "call_module":
        return str(node.target)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.target)
    return f"{name} ({node.name})"


class Channels:
    """Ids and constants of every tensor.

    create_bias: a layer without bias may get one to take a constant.
    """

    def __init__(self, traced: Traced, create_bias: bool = True) -> None:
        self.traced = traced
        self.module = traced.module
        self.shapes = traced.shapes
        self.create_bias = create_bias
        self.n_ids = 0
        self.facts: dict[fx.Node, Facts] = {}
        # Nodes without facts: the reason.
        self.why: dict[fx.Node, str] = {}
        self.layers: dict[fx.Node, Layer] = {}
        # BatchNorm -> its input.
        self.norms: dict[fx.Node, fx.Node] = {}
        # Channelwise operations: per source the position of each output channel in it (-1: not from it) and where it
        # matters (None: everywhere).
        self.sources: dict[fx.Node, list[tuple[fx.Node, Ints, Bools | None]]] = {}
        # split and chunk: source, positions per part.
        self.parts: dict[fx.Node, tuple[fx.Node, list[Ints]]] = {}
        # Integers computed from shapes: ids of the dimensions that they come from.
        self.sizes: dict[fx.Node, list[Ints]] = {}
        # Operations whose arguments count channels.
        self.edits: dict[fx.Node, str] = {}
        self.edges: list[tuple[Ints, Ints]] = []
        self.locks: list[tuple[Ints, str]] = []
        # Operations left whole: title -> reason.
        self.whole: dict[str, str] = {}
        self._calls: dict[str, int] = {}
        owners: dict[int, list[str]] = {}
        for name, module in self.module.named_modules():
            for p in module.parameters(recurse=False):
                owners.setdefault(id(p), []).append(name)
        for node in self.module.graph.nodes:
            if node.op == "call_module":
                self._calls[node.target] = self._calls.get(node.target, 0) + 1
            elif node.op == "get_attr":
                owners.setdefault(id(_get(self.module, node.target)), []).append(node.target)
        self._tied = {n: o for names in owners.values() if len(names) > 1 for n in names for o in names if o != n}
        for node in self.module.graph.nodes:
            self._forward(node)

    # Ids, locks, lookups

    def _module(self, node: fx.Node) -> Any:
        """The module that a call_module node calls."""
        return self.module.get_submodule(str(node.target))

    def _fresh(self, n: int) -> Ints:
        self.n_ids += n
        return np.arange(self.n_ids - n, self.n_ids)

    def _lock(self, ids: Ints, reason: str) -> None:
        self.locks.append((ids.reshape(-1), reason))

    def _adopt(self, node: fx.Node, axis: int) -> Facts:
        """Facts of `node` spread along `axis` only, flattened; channels of anything else are whole."""
        shape = self.shapes[node]
        axis %= len(shape)
        facts = self.facts.get(node)
        if facts is None:
            n = shape[axis]
            ids = self._fresh(n).reshape([-1 if d == axis else 1 for d in range(len(shape))])
            facts = Facts(ids, np.zeros(ids.shape, bool), np.zeros(ids.shape))
            self.facts[node] = facts
            self.sources[node] = []
            self._lock(ids, self.why.pop(node, "not tracked"))
        if facts.ids.size == facts.ids.shape[axis] == shape[axis]:
            return flat(facts)
        self._lock(facts.ids, f"{title(node)} is read along another dimension than its channels'")
        ids = self._fresh(shape[axis])
        self._lock(ids, "read along another dimension")
        return Facts(ids, np.zeros(ids.shape, bool), np.zeros(ids.shape))

    def _like(self, vector: Facts, rank: int, axis: int) -> Facts:
        return vector.map(lambda a: a.reshape([-1 if d == axis % rank else 1 for d in range(rank)]))

    # Forward: ids and constants

    def _forward(self, node: fx.Node) -> None:
        shape = self.shapes.get(node)
        if node.op == "placeholder":
            self.why[node] = "network input"
            return
        if node.op == "get_attr":
            self.why[node] = f"{node.target} is used directly"
            return
        if node.op == "output":
            self._pin(node, "network output")
            return
        inputs = node.all_input_nodes
        if inputs and all(n in self.sizes for n in inputs):
            self._forward_size(node)
            return
        handler = self._handler(node)
        if handler is None:
            self._pin(node, f"{self._kind(node)} is not tracked")
            return
        if not isinstance(shape, Shape) and handler not in (self._split, self._size):
            self._pin(node, f"{self._kind(node)} does not return one tensor")
            return
        try:
            reason = handler(node)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
            # An overload or argument that the rule does not foresee: as good as untracked.
            for found in (self.facts, self.sources, self.layers, self.norms, self.parts, self.sizes, self.edits):
                found.pop(node, None)
            reason = f"its arguments are not understood ({type(error).__name__}: {error})"
        if reason is not None:
            self._pin(node, reason)
        elif handler != self._reshape or node not in self.facts:
            self._pin_sizes(node)

    def _kind(self, node: fx.Node) -> str:
        if node.op == "call_module":
            return type(self._module(node)).__name__
        return str(node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.target))

    def _pin_sizes(self, node: fx.Node) -> None:
        for source in node.all_input_nodes:
            for ids in self.sizes.get(source, []):
                self._lock(ids, f"{title(node)} computes with the number of channels")

    def _pin(self, node: fx.Node, reason: str) -> None:
        """Leave everything that `node` touches whole."""
        self.why[node] = reason
        tracked = any(n in self.facts or n in self.parts for n in node.all_input_nodes)
        if node.op == "call_module":
            tracked |= next(self._module(node).parameters(), None) is not None
        if node.op != "output" and tracked:
            self.whole[title(node)] = reason
        for source in node.all_input_nodes:
            origin = self.parts[source][0] if source in self.parts else source
            if origin in self.facts:
                self._lock(self.facts[origin].ids, reason if node.op == "output" else f"{title(node)}: {reason}")
        self._pin_sizes(node)

    def _handler(self, node: fx.Node) -> Callable[[fx.Node], str | None] | None:
        if node.op == "call_module":
            kind = type(self._module(node))
            if kind in CONVS:
                return self._conv
            if kind is nn.Linear:
                return self._linear
            if kind in NORMS:
                return self._norm
            if kind in _IDENTITY_MODULES:
                return self._identity
            if kind in _POINTWISE_MODULES:
                return self._pointwise
            if kind in _CONST_POOLS or kind in _AVG_POOLS:
                return self._pool
            if kind in _PADS:
                return self._pad
            return self._reshape if kind is nn.Flatten else None
        if node.op == "call_function":
            if node.target in _CONST_POOL_FUNCTIONS or node.target in _AVG_POOL_FUNCTIONS:
                return self._pool
            name = function_name(node.target)
            if name == "getattr" or node.target is getattr:
                return self._size if node.args[1] in ("shape", *_HARMLESS) else None
        else:
            name = str(node.target)
        if name in _POINTWISE_NAMES:
            return self._pointwise
        if name in _IDENTITY_NAMES:
            return self._identity
        if name in BINARY_NAMES:
            return self._binary
        return {
            "flatten": self._reshape,
            "view": self._reshape,
            "reshape": self._reshape,
            "squeeze": self._reshape,
            "unsqueeze": self._unsqueeze,
            "permute": self._permute,
            "transpose": self._permute,
            "mean": self._mean,
            "getitem": self._getitem,
            "pad": self._pad,
            "cat": self._cat,
            "concat": self._cat,
            "split": self._split,
            "chunk": self._split,
            "size": self._size,
            "dim": self._size,
        }.get(name)

    def _source(self, node: fx.Node) -> fx.Node:
        """The tensor that a one-tensor operation works on."""
        arg: Any = node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("self"))
        return arg if isinstance(arg, fx.Node) else node.all_input_nodes[0]

    def _channelwise(self, node: fx.Node, source: fx.Node, facts: Facts | None, matters: Bools | None = None) -> None:
        """`node` has the channels of `source` in their places, with these facts; without facts it is as untracked as
        its source."""
        if facts is None:
            self.why[node] = self.why.get(source, "not tracked")
            return
        self.facts[node] = facts
        positions = np.arange(facts.ids.size).reshape(facts.ids.shape)
        self.sources[node] = [(source, positions, matters)]

    def _move(self, node: fx.Node, source: fx.Node, move: Callable[[npt.NDArray[Any]], npt.NDArray[Any]]) -> None:
        facts = self.facts[source]
        self.facts[node] = facts.map(move)
        self.sources[node] = [(source, move(np.arange(facts.ids.size).reshape(facts.ids.shape)), None)]

    def _conv(self, node: fx.Node) -> str | None:
        m = self._module(node)
        source = self._source(node)
        reason = self._unshared(node)
        if reason or len(self.shapes[source]) != m.weight.dim():
            return reason or "unbatched input"
        w = m.weight.detach().reshape(*m.weight.shape[:2], -1)
        bad = np.zeros(m.weight.shape[2:], bool)
        if m.padding_mode == "zeros":
            for axis, k in enumerate(m.kernel_size):
                d = m.dilation[axis]
                if m.padding == "valid":
                    before = after = 0
                elif m.padding == "same":
                    before = d * (k - 1) // 2
                    after = d * (k - 1) - before
                else:
                    before = after = m.padding[axis]
                # Tap t reads inside the map for every output, at any map size, iff before <= t*d <= (k-1)*d - after.
                t = np.arange(k) * d
                out = (t < before) | (t > (k - 1) * d - after)
                bad |= out.reshape([-1 if a == axis else 1 for a in range(bad.ndim)])
        self._mix(node, source, w, bad.reshape(-1), m.bias, m.groups, axis=1)
        return None

    def _linear(self, node: fx.Node) -> str | None:
        m = self._module(node)
        reason = self._unshared(node)
        if reason is None:
            w = m.weight.detach()[:, :, None]
            self._mix(node, self._source(node), w, np.zeros(1, bool), m.bias, 1, axis=-1)
        return reason

    def _unshared(self, node: fx.Node) -> str | None:
        name = str(node.target)
        if self._calls[name] > 1:
            return f"the module is called {self._calls[name]} times"
        return f"its weights are tied to {self._tied[name]}'s" if name in self._tied else None

    def _mix(
        self, node: fx.Node, source: fx.Node, w: Tensor, bad: Bools, bias: Tensor | None, groups: int, axis: int
    ) -> None:
        """w [O, Cg, K]; bad [K]: taps that can lie on zero padding."""
        n_filters, cg, _ = w.shape
        rank = len(self.shapes[source])
        ins = self._adopt(source, axis)
        nonzero = w != 0
        reads = nonzero.any(2).cpu().numpy()
        border = np.broadcast_to(np.False_, reads.shape)
        if bad.any():
            border = nonzero[..., torch.from_numpy(np.flatnonzero(bad)).to(w.device)].any(2).cpu().numpy()
        b = np.zeros(n_filters) if bias is None else bias.detach().double().cpu().numpy()
        follower = next(iter(node.users)) if len(node.users) == 1 else None
        if bias is not None:
            shift: str | None = "bias"
        elif follower is not None and axis % rank == 1 and self._takes_mean(follower):
            shift = "norm"
        else:
            shift = "new" if self.create_bias else None

        layer = Layer(node, source, groups, w, ins, ins, reads, border, b, shift, np.zeros(n_filters, bool))
        per_group = (groups, -1, cg)
        nonzero_constant = (ins.const & (ins.value != 0)).reshape(groups, 1, cg)
        varies = reads.reshape(per_group) & ~ins.const.reshape(groups, 1, cg)
        varies |= border.reshape(per_group) & nonzero_constant
        constant = ~varies.any(2).reshape(-1)
        emits = b + layer.response(np.where(ins.const, ins.value, 0.0))
        layer.outs = Facts(self._fresh(n_filters), constant, np.where(constant, emits, 0.0))
        layer.silent = constant & ((emits == b) | (shift is not None))
        if groups > 1 and cg == 1 and n_filters == groups:
            self.edges.append((ins.ids, layer.outs.ids))
        self.layers[node] = layer
        self.facts[node] = self._like(layer.outs, rank, axis)
        self.sources[node] = []

    def _takes_mean(self, node: fx.Node) -> bool:
        name = str(node.target)
        if node.op != "call_module" or self._calls[name] > 1 or name in self._tied:
            return False
        m = self._module(node)
        return type(m) in NORMS and m.running_mean is not None

    def _norm(self, node: fx.Node) -> str | None:
        m = self._module(node)
        source = self._source(node)
        reason = self._unshared(node)
        if reason:
            return reason
        known = self._adopt(source, 1)
        rank = len(self.shapes[source])
        if not np.array_equal(self.facts[source].ids.reshape(-1), known.ids):
            return "its channels are not in dimension 1"
        gamma = np.ones(known.ids.size) if m.weight is None else m.weight.detach().double().cpu().numpy()
        beta = np.zeros(known.ids.size) if m.bias is None else m.bias.detach().double().cpu().numpy()
        if m.running_mean is None:  # normalises by the batch in eval mode too
            facts = known.vary()
        else:
            mean, var = m.running_mean.double().cpu().numpy(), m.running_var.double().cpu().numpy()
            scale = gamma / np.sqrt(var + m.eps)
            const = known.const | (gamma == 0)
            moved = np.where(gamma == 0, beta, (known.value - mean) * scale + beta)
            facts = Facts(known.ids, const, np.where(const, moved, 0.0))
        matters = self._like(Facts(known.ids, gamma != 0, beta), rank, 1).const
        self._channelwise(node, source, self._like(facts, rank, 1), matters)
        self.norms[node] = source
        return None

    def _identity(self, node: fx.Node) -> str | None:
        source = self._source(node)
        self._channelwise(node, source, self.facts.get(source))
        return None

    def _evaluate(self, node: fx.Node, values: dict[fx.Node, Floats]) -> Floats:
        """The node's own operation in float64 on arrays of constants."""
        tensors = {n: torch.from_numpy(np.array(v)) for n, v in values.items()}
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: tensors[n].clone())
        with torch.no_grad():
            if node.op == "call_module":
                out = self._module(node)(*args, **kwargs)
            elif node.op == "call_method":
                out = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                out = node.target(*args, **kwargs)  # type: ignore[operator]
        return out.double().numpy()

    def _pointwise(self, node: fx.Node) -> str | None:
        if len(node.all_input_nodes) != 1:
            return "its arguments are tensors"
        source = node.all_input_nodes[0]
        facts = self.facts.get(source)
        if facts is not None:
            facts = self._constants(node, facts.ids, facts.const, {source: facts.value})
        self._channelwise(node, source, facts)
        return None

    def _constants(self, node: fx.Node, ids: Ints, const: Bools, values: dict[fx.Node, Floats]) -> Facts:
        """Facts of an elementwise operation; what is constant but not finite (1/0) counts as varying."""
        out = self._evaluate(node, values)
        const = const & np.isfinite(out)
        return Facts(ids, const, np.where(const, out, 0.0))

    def _pool(self, node: fx.Node) -> str | None:
        source = self._source(node)
        facts = self.facts.get(source)
        if len(node.all_input_nodes) - sum(n in self.sizes for n in node.all_input_nodes) != 1:
            return "its arguments are tensors"
        if not isinstance(self.shapes[node], Shape) or len(self.shapes[node]) != len(self.shapes[source]):
            return "does not return one tensor"
        if facts is None:
            self._channelwise(node, source, None)
            return None
        kind = self._kind(node)
        dims = int(kind[-2]) if kind[-2:] in ("1d", "2d", "3d") else facts.ids.ndim - 2
        if facts.ids.ndim != dims + 2 or any(n > 1 for d, n in enumerate(facts.ids.shape) if d != 1):
            return "pools over channels"
        average = self._average_pool(node)
        if average is not None:
            padding, ceil_mode, include_pad, divisor = average
            padded = any(padding if isinstance(padding, (tuple, list)) else (padding,))
            if divisor is not None or (padded and (include_pad or ceil_mode)):
                facts = Facts(facts.ids, facts.const & (facts.value == 0), facts.value)
        self._channelwise(node, source, facts)
        return None

    def _average_pool(self, node: fx.Node) -> tuple[Any, ...] | None:
        """padding, ceil_mode, count_include_pad, divisor_override of an average pooling."""
        if node.op == "call_module":
            m = self._module(node)
            if type(m) not in _AVG_POOLS:
                return None
            return m.padding, m.ceil_mode, m.count_include_pad, getattr(m, "divisor_override", None)
        if node.target not in _AVG_POOL_FUNCTIONS:
            return None
        defaults = {"padding": 0, "ceil_mode": False, "count_include_pad": True, "divisor_override": None}
        names = ("input", "kernel_size", "stride", *defaults)
        chosen = {**defaults, **given(node, *names)}
        return tuple(chosen[name] for name in defaults)

    def _binary(self, node: fx.Node) -> str | None:
        inputs = list(node.all_input_nodes)
        operands = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, fx.Node)]
        if any(n in self.sizes for n in inputs):
            return "computes with the number of channels"
        if len(operands) == 1 or len(inputs) == 1:  # a scalar, or x op x
            return self._pointwise(node)
        if len(inputs) != 2:
            return "its arguments are tensors"
        known = [n for n in inputs if n in self.facts]
        shape = self.shapes[node]
        if len(known) < 2:
            for n in known:
                other = next(m for m in inputs if m is not n)
                self._lock(
                    self.facts[n].ids, f"{title(node)} with {title(other)}: {self.why.get(other, 'not tracked')}"
                )
            if known and self.shapes[known[0]] == shape:
                self._channelwise(node, known[0], self.facts[known[0]].vary())
            else:
                self.why[node] = "combined with an untracked tensor"
            return None
        a, b = inputs
        rank = len(shape)
        fa, fb = (self.facts[n].map(lambda x: x.reshape((1,) * (rank - x.ndim) + x.shape)) for n in (a, b))
        full = [n for n in inputs if self.shapes[n] == shape]
        matters: dict[fx.Node, Bools | None] = {a: None, b: None}
        kind = BINARY_NAMES[function_name(node.target) if node.op == "call_function" else str(node.target)]
        if fa.ids.shape == fb.ids.shape:
            self.edges.append((fa.ids, fb.ids))
            ids = fa.ids
        elif full and (fa.ids.size == 1 or fb.ids.size == 1):  # one channel broadcast over many stays one channel
            one, many = (fa, fb) if fa.ids.size == 1 else (fb, fa)
            if self.shapes[a if many is fa else b] != shape:
                return "its operands do not line up"
            self._lock(one.ids, f"{title(node)} spreads it over all channels")
            ids = many.ids
        else:
            return "its operands do not line up"
        const = fa.const & fb.const
        values = {a: np.broadcast_to(fa.value, ids.shape), b: np.broadcast_to(fb.value, ids.shape)}
        facts = self._constants(node, ids, np.broadcast_to(const, ids.shape), values)
        if kind == "mul":  # a factor that is 0 everywhere makes the product 0, whatever the other one holds
            zero_a, zero_b = (np.broadcast_to(f.const & (f.value == 0), ids.shape) for f in (fa, fb))
            facts = Facts(ids, facts.const | zero_a | zero_b, np.where(zero_a | zero_b, 0.0, facts.value))
            matters = {a: ~zero_b, b: ~zero_a | zero_b}
        self.facts[node] = facts
        self.sources[node] = [
            (
                n,
                np.broadcast_to(np.arange(f.ids.size).reshape(f.ids.shape), ids.shape),
                matters[n],
            )
            for n, f in ((a, fa), (b, fb))
        ]
        return None

    def _reshape(self, node: fx.Node) -> str | None:
        source = self._source(node)
        facts = self.facts.get(source)
        if facts is None:
            self._channelwise(node, source, None)
            return None
        s, t = self.shapes[source], self.shapes[node]
        blocks = _blocks(s[1:], t[1:]) if s[:1] == t[:1] else None
        if blocks is None:
            return "reshapes over the batch or in a way that is not tracked"
        wide: list[int] = [1]
        narrow: list[int] = [1]
        for i0, i1, j0, j1 in blocks:
            tracked = any(n > 1 for n in facts.ids.shape[1 + i0 : 1 + i1])
            wide += s[1 + i0 : 1 + i1] if tracked else [1] * (i1 - i0)
            narrow += t[1 + j0 : 1 + j1] if tracked else [1] * (j1 - j0)
        positions = np.arange(facts.ids.size).reshape(facts.ids.shape)
        spread = np.broadcast_to(positions, wide).reshape(narrow)
        for d in range(1, spread.ndim):  # dimensions along which the channel does not change are untracked again
            first = spread.take([0], d)
            if spread.shape[d] > 1 and (spread == first).all():
                spread = first
        self._move(node, source, lambda a: a.reshape(-1)[spread])
        if np.count_nonzero(np.array(spread.shape) > 1) > 1:
            self._lock(facts.ids, f"{title(node)}: channels are spread over several dimensions")
        elif node.op == "call_method" or function_name(node.target) == "reshape":
            self.edits[node] = "view"
        return None

    def _unsqueeze(self, node: fx.Node) -> str | None:
        source = self._source(node)
        dim = given(node, "input", "dim").get("dim")
        rank = len(self.shapes[node])
        if source not in self.facts:
            self._channelwise(node, source, None)
            return None
        if not isinstance(dim, int) or dim % rank == 0:
            return "moves the batch dimension"
        self._move(node, source, lambda a: np.expand_dims(a, dim % rank))
        return None

    def _permute(self, node: fx.Node) -> str | None:
        source = self._source(node)
        if source not in self.facts:
            self._channelwise(node, source, None)
            return None
        rank = len(self.shapes[source])
        rest: Any = node.args[1:] if len(node.args) > 1 else tuple(node.kwargs.values())
        dims: list[Any] = list(rest[0]) if len(rest) == 1 and isinstance(rest[0], (tuple, list)) else list(rest)
        if not all(isinstance(d, int) for d in dims):
            return "its dimensions are computed"
        if "transpose" in self._kind(node):
            order = list(range(rank))
            order[dims[0]], order[dims[1]] = order[dims[1]], order[dims[0]]
        else:
            order = [d % rank for d in dims]
        if order[0] != 0:
            return "moves the batch dimension"
        self._move(node, source, lambda a: a.transpose(order))
        return None

    def _mean(self, node: fx.Node) -> str | None:
        source = self._source(node)
        facts = self.facts.get(source)
        if facts is None:
            self._channelwise(node, source, None)
            return None
        rank = len(self.shapes[source])
        chosen = given(node, "input", "dim", "keepdim")
        dim = chosen.get("dim")
        if dim is None or not set(chosen) <= {"input", "self", "dim", "keepdim"}:
            return "averages over everything"
        dims = [d % rank for d in (dim if isinstance(dim, (tuple, list)) else (dim,))]
        if 0 in dims or any(facts.ids.shape[d] > 1 for d in dims):
            return "averages over channels or the batch"
        squeeze = tuple(dims)
        self._move(node, source, (lambda a: a) if chosen.get("keepdim") else (lambda a: a.squeeze(squeeze)))
        return None

    def _getitem(self, node: fx.Node) -> str | None:
        args: Any = node.args
        source, index = args
        if source in self.parts:
            origin, parts = self.parts[source]
            if not isinstance(index, int):
                return "its index is not a number"
            where = parts[index]
            self._move(node, origin, lambda a: a.reshape(-1)[where])
            return None
        facts = self.facts.get(source)
        if facts is None:
            self.why[node] = self.why.get(source, "not tracked")
            return None
        entries = list(index) if isinstance(index, tuple) else [index]
        shape = self.shapes[source]
        used = sum(e is not None and e is not Ellipsis for e in entries)
        if not any(e is Ellipsis for e in entries):
            entries.append(Ellipsis)
        at = next(i for i, e in enumerate(entries) if e is Ellipsis)
        entries[at : at + 1] = [slice(None)] * (len(shape) - used)
        moved: list[Any] = []
        d = 0
        for e in entries:
            if e is None:
                if d == 0:
                    return "moves the batch dimension"
                moved.append(None)
                continue
            tracked = d > 0 and facts.ids.shape[d] > 1
            if isinstance(e, slice) and all(isinstance(v, (int, type(None))) for v in (e.start, e.stop, e.step)):
                if tracked and e.step not in (None, 1) and len(range(shape[d])[e]) != shape[d]:
                    return "takes channels with a step"
                moved.append(e if tracked else slice(None))
            elif isinstance(e, int) and d > 0:
                if tracked:
                    return "takes one channel"
                moved.append(0)
            else:
                return "its index is not tracked"
            d += 1
        key = tuple(moved)
        self._move(node, source, lambda a: a[key])
        self.edits[node] = "slice"
        return None

    def _pad(self, node: fx.Node) -> str | None:
        source = self._source(node)
        facts = self.facts.get(source)
        if node.op == "call_module":
            m = self._module(node)
            pad, how, fill = m.padding, "constant", m.value
        else:
            chosen = {"mode": "constant", "value": None, **given(node, "input", "pad", "mode", "value")}
            pad, how, fill = chosen["pad"], chosen["mode"], chosen["value"] or 0.0
        if not all(isinstance(p, int) and p >= 0 for p in pad):
            return "pads by a computed or negative amount"
        if facts is None:
            self._channelwise(node, source, None)
            return None
        rank = len(self.shapes[source])
        pairs = [(0, 0)] * (rank - len(pad) // 2) + [(pad[i], pad[i + 1]) for i in range(len(pad) - 2, -1, -2)]
        tracked = [d for d in range(rank) if facts.ids.shape[d] > 1] or [1]
        spatial = any(any(p) for d, p in enumerate(pairs) if d not in tracked)
        if any(pairs[0]) or len(tracked) > 1 or (how != "constant" and any(pairs[tracked[0]])):
            return "pads channels in a way that is not tracked"
        if spatial and how == "constant":
            facts = Facts(facts.ids, facts.const & (facts.value == fill), facts.value)
        before, after = pairs[tracked[0]]
        positions = np.arange(facts.ids.size).reshape(facts.ids.shape)
        width = [(before, after) if d == tracked[0] else (0, 0) for d in range(rank)]
        positions = np.pad(positions, width, constant_values=-1)
        ids = facts.ids.reshape(-1)[positions]
        ids[positions < 0] = self._fresh(before + after)
        new = positions < 0
        self.facts[node] = Facts(
            ids,
            np.where(new, True, facts.const.reshape(-1)[positions]),
            np.where(new, float(fill), facts.value.reshape(-1)[positions]),
        )
        self.sources[node] = [(source, positions, None)]
        if before + after:
            self.edits[node] = "pad"
        return None

    def _cat(self, node: fx.Node) -> str | None:
        chosen = given(node, "tensors", "dim")
        tensors, dim = chosen["tensors"], chosen.get("dim", chosen.get("axis", 0))
        rank = len(self.shapes[node])
        if (
            not isinstance(tensors, (list, tuple))
            or not all(isinstance(t, fx.Node) for t in tensors)
            or not isinstance(dim, int)
            or dim % rank == 0
        ):
            return "concatenates over the batch or what is not tracked"
        dim %= rank
        if all(t not in self.facts for t in tensors):
            self.why[node] = "made of untracked tensors"
            return None
        axes = {d for t in tensors if t in self.facts for d, n in enumerate(self.facts[t].ids.shape) if n > 1}
        if not axes <= {dim} or any(
            t in self.facts and self.facts[t].ids.shape[dim] != self.shapes[t][dim] for t in tensors
        ):
            return "concatenates over another dimension than the channels'"
        for t in tensors:
            self._adopt(t, dim)
        parts = [self.facts[t] for t in tensors]
        self.facts[node] = Facts(
            np.concatenate([p.ids for p in parts], dim),
            np.concatenate([p.const for p in parts], dim),
            np.concatenate([p.value for p in parts], dim),
        )
        offset = 0
        self.sources[node] = []
        for t, p in zip(tensors, parts, strict=True):
            positions = np.full(self.facts[node].ids.shape, -1)
            positions.reshape(-1)[offset : offset + p.ids.size] = np.arange(p.ids.size)
            offset += p.ids.size
            self.sources[node].append((t, positions, None))
        return None

    def _split(self, node: fx.Node) -> str | None:
        source = self._source(node)
        facts = self.facts.get(source)
        if facts is None:
            self.why[node] = self.why.get(source, "not tracked")
            return None
        dim = given(node, "tensor", "size", "dim").get("dim", 0)
        rank = len(self.shapes[source])
        if not isinstance(dim, int) or dim % rank == 0:
            return "splits the batch"
        dim %= rank
        positions = np.arange(facts.ids.size).reshape(facts.ids.shape)
        sizes = [s[dim] for s in self.shapes[node]]
        if facts.ids.shape[dim] == 1 and self.shapes[source][dim] > 1:
            self.parts[node] = (source, [positions] * len(sizes))
            return None
        self.parts[node] = (source, np.split(positions, np.cumsum(sizes)[:-1], dim))
        self.edits[node] = "split"
        return None

    def _size(self, node: fx.Node) -> str | None:
        source = self._source(node)
        if node.target == "size":
            self.sizes[node] = self._dimension_ids(source, given(node, "self", "dim").get("dim"))
        else:
            counts = node.op == "call_function" and node.args[1] == "shape"
            self.sizes[node] = self._dimension_ids(source, None) if counts else []
        return None

    def _dimension_ids(self, source: fx.Node, dim: Any) -> list[Ints]:
        facts = self.facts.get(source)
        if facts is None:
            return []
        if isinstance(dim, int):
            # Where there is one channel, dimension 1 still counts channels.
            d = dim % len(self.shapes[source])
            return [facts.ids] if facts.ids.shape[d] > 1 or d == 1 else []
        return [facts.ids]

    def _forward_size(self, node: fx.Node) -> None:
        """Integers computed from sizes carry the ids of the dimensions they come from."""
        if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
            args: Any = node.args
            origin, index = args
            whole = (origin.op == "call_method" and len(origin.args) == 1) or origin.target is getattr
            if whole and isinstance(index, (int, slice)):
                source = self._source(origin)
                rank = len(self.shapes[source])
                dims = [index] if isinstance(index, int) else list(range(rank))[index]
                self.sizes[node] = [i for d in dims for i in self._dimension_ids(source, d)]
                return
        self.sizes[node] = [ids for n in node.all_input_nodes for ids in self.sizes[n]]


def _get(module: nn.Module, path: str) -> Any:
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part)
    return value
