"""Rules of channel tracking for operations that treat each channel by itself: activations, arithmetic, pools, means."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn

from .trace import Shape
from .tracking import Bools, Facts, Ints, Reading, Tracker, axes_of, given, operation, title, values_of

# fmt: off
# Elementwise operations of one tensor; the identities are identities in eval mode.
IDENTITY_MODULES = (
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
)
POINTWISE_MODULES = (
    nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh, nn.LeakyReLU, nn.ELU,
    nn.SELU, nn.CELU, nn.Mish, nn.Softplus, nn.Softsign, nn.Hardtanh, nn.LogSigmoid, nn.Threshold, nn.Hardshrink,
    nn.Softshrink, nn.Tanhshrink,
)
POINTWISE_NAMES = {
    "relu", "relu_", "relu6", "silu", "gelu", "hardswish", "hardsigmoid", "sigmoid", "sigmoid_", "tanh", "tanh_",
    "leaky_relu", "leaky_relu_", "elu", "elu_", "selu", "selu_", "celu", "celu_", "mish", "softplus", "softsign",
    "hardtanh", "hardtanh_", "logsigmoid", "threshold", "hardshrink", "softshrink", "tanhshrink", "abs", "neg", "exp",
    "sqrt", "square", "clamp", "clamp_", "clip", "pow", "erf", "sin", "cos", "log1p", "expm1", "rsqrt", "reciprocal",
    "log", "clamp_min", "clamp_max", "sign", "floor", "ceil", "round",
}
IDENTITY_NAMES = {"contiguous", "clone", "detach", "dropout", "dropout1d", "dropout2d", "dropout3d"}
BINARY_NAMES = {
    "add": "add", "add_": "add", "iadd": "add", "sub": "sub", "sub_": "sub", "isub": "sub", "mul": "mul", "mul_":
    "mul", "imul": "mul", "multiply": "mul", "subtract": "sub", "truediv": "div", "div": "div", "div_": "div",
    "itruediv": "div", "maximum": "max", "minimum": "min", "gt": "compare", "lt": "compare", "ge": "compare", "le":
    "compare", "eq": "compare", "ne": "compare",
}
# Reductions over dimensions, by what they depend on.
REDUCTIONS = {
    "mean": "mean", "sum": "sum", "amax": "max", "amin": "max", "var": "var", "std": "var", "norm": "norm",
    "linalg_vector_norm": "norm",
}
VERBS = {"mean": "averages over", "sum": "adds up", "var": "normalises over", "norm": "takes the norm of"}
# A constant as the network computes it, in its own precision, may be off by so much.
CLOSE = 1e-4
CONST_POOLS = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d, nn.Upsample, nn.UpsamplingNearest2d,
    nn.UpsamplingBilinear2d,
)
AVG_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
CONST_POOL_FUNCTIONS = {
    F.max_pool1d, F.max_pool2d, F.max_pool3d, torch.max_pool1d, torch.max_pool2d, torch.max_pool3d,
    F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d, F.adaptive_max_pool1d, F.adaptive_max_pool2d,
    F.adaptive_max_pool3d, torch.adaptive_avg_pool1d, torch.adaptive_max_pool1d, F.interpolate, F.upsample,
}
AVG_POOL_FUNCTIONS = {F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, torch.avg_pool1d}
# fmt: on


class Pointwise(Tracker):
    def _identity(self, node: fx.Node) -> str | None:
        source = self._source(node)
        self._channelwise(node, source, self.facts.get(source))
        if source in self.averages:
            self.averages.add(node)
        return None

    def _pointwise(self, node: fx.Node) -> str | None:
        if len(node.all_input_nodes) != 1:
            return "its arguments are tensors"
        source = node.all_input_nodes[0]
        facts = self.facts.get(source)
        if facts is not None:
            facts = self._constants(node, facts.ids, facts.const, {source: facts.value})
        self._channelwise(node, source, facts)
        return None

    def _prelu(self, node: fx.Node) -> str | None:
        source, m = self._source(node), self._module(node)
        facts = self.facts.get(source)
        slope = values_of(m.weight)
        if facts is None:
            self._channelwise(node, source, None)
            return None
        if slope.size > 1:
            known = self._adopt(source, 1)
            if not np.array_equal(self.facts[source].ids.reshape(-1), known.ids):
                return "its channels are not in dimension 1"
            slope = slope.reshape(facts.ids.shape)
            self.affine[node] = ("weight",)
        value = np.where(facts.value >= 0, facts.value, slope * facts.value)
        self._channelwise(node, source, Facts(facts.ids, facts.const, value))
        return None

    def _channel_bias(self, node: fx.Node) -> str | None:
        source, m = self._source(node), self._module(node)
        facts = self.facts.get(source)
        if facts is None:
            return f"{self._kind(node)} adds to what is not tracked"
        bias, dim = values_of(m.bias), m.dim % facts.ids.ndim
        if axes_of(facts.ids) not in ([dim], []) or facts.ids.size != bias.size:
            return "its channels lie along another dimension"
        self.affine[node] = ("bias",)
        value = facts.value + bias.reshape(facts.ids.shape)
        self._channelwise(node, source, Facts(facts.ids, facts.const, np.where(facts.const, value, 0.0)))
        return None

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
                lost = facts.const & (facts.value != 0)
                self._hint(facts.ids[lost], f"{title(node)} pads with zeros, so sees the edge of its constant")
                facts = Facts(facts.ids, facts.const & ~lost, facts.value)
        self._channelwise(node, source, facts)
        return None

    def _average_pool(self, node: fx.Node) -> tuple[Any, ...] | None:
        """padding, ceil_mode, count_include_pad, divisor_override of an average pooling."""
        if node.op == "call_module":
            m = self._module(node)
            if type(m) not in AVG_POOLS:
                return None
            return m.padding, m.ceil_mode, m.count_include_pad, getattr(m, "divisor_override", None)
        if node.target not in AVG_POOL_FUNCTIONS:
            return None
        defaults = {"padding": 0, "ceil_mode": False, "count_include_pad": True, "divisor_override": None}
        names = ("input", "kernel_size", "stride", *defaults)
        chosen = {**defaults, **given(node, *names)}
        return tuple(chosen[name] for name in defaults)

    def _binary(self, node: fx.Node) -> str | None:
        inputs = list(node.all_input_nodes)
        operands = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, fx.Node)]
        if any(n in self.sizes for n in inputs):
            return self._with_number(node)
        if len(operands) == 1 or len(inputs) == 1:  # a scalar, or x op x
            reason = self._pointwise(node)
            self._decided(node, inputs)
            return reason
        if len(inputs) != 2:
            return "its arguments are tensors"
        shape = self.shapes[node]
        rank = len(shape)
        for n, other in (inputs, inputs[::-1]):
            if other in self.facts and n.op == "get_attr":
                ids = self.facts[other].ids
                self._table(n, rank, [d + rank - ids.ndim for d in axes_of(ids)])
            elif other in self.facts and n not in self.facts:
                ids = self.facts[other].ids
                self._expression(n, rank, [d + rank - ids.ndim for d in axes_of(ids)])
        known = [n for n in inputs if n in self.facts]
        if len(known) < 2:
            facts = self._beside(node, known[0], inputs[known[0] is inputs[0]]) if known else None
            if facts is None:
                self.why[node] = "combined with an untracked tensor"
            else:
                zero = facts.const & (facts.value == 0) & (BINARY_NAMES[operation(node)] == "mul")
                self._channelwise(node, known[0], Facts(facts.ids, zero, np.zeros_like(facts.value)), ~zero)
            return None
        a, b = inputs
        fa, fb = (self.facts[n].map(lambda x: x.reshape((1,) * (rank - x.ndim) + x.shape)) for n in (a, b))
        sizes = [(1,) * (rank - len(self.shapes[n])) + tuple(self.shapes[n]) for n in (a, b)]
        matters: dict[fx.Node, Bools | None] = {a: None, b: None}
        if fa.ids.shape == fb.ids.shape:
            if BINARY_NAMES[operation(node)] in ("add", "sub") and (fa.const.any() or fb.const.any()):
                # Ids of its own: where one operand turns out to be a bias, it goes its own way (see Analysis).
                ids = self._fresh(fa.ids.size).reshape(fa.ids.shape)
                self.sums[node] = ((ids, fa.ids), (ids, fb.ids))
            else:
                self._tie((fa.ids, fb.ids))
                ids = fa.ids
        else:  # one operand has a channel for each of the result, the other one for all of them, or for each row
            wide, one, small = (fa, fb, 1) if fa.ids.size >= fb.ids.size else (fb, fa, 0)
            if reason := self._spread(node, wide.ids, one.ids, sizes[small]):
                return reason
            ids = wide.ids
        const = fa.const & fb.const
        values = {a: np.broadcast_to(fa.value, ids.shape), b: np.broadcast_to(fb.value, ids.shape)}
        facts = self._constants(node, ids, np.broadcast_to(const, ids.shape), values)
        if BINARY_NAMES[operation(node)] == "mul":  # a factor that is 0 makes the product 0, whatever the other one
            zero_a, zero_b = (np.broadcast_to(f.const & (f.value == 0), ids.shape) for f in (fa, fb))
            facts = Facts(ids, facts.const | zero_a | zero_b, np.where(zero_a | zero_b, 0.0, facts.value))
            matters = {a: ~zero_b, b: ~zero_a | zero_b}
        self.facts[node] = facts
        self._decided(node, inputs)
        self.sources[node] = [
            (n, np.broadcast_to(np.arange(f.ids.size).reshape(f.ids.shape), ids.shape), matters[n])
            for n, f in ((a, fa), (b, fb))
        ]
        return None

    def _decided(self, node: fx.Node, inputs: list[fx.Node]) -> None:
        """A comparison is constant where rounding can't turn it: where it is the same for an operand a bit off."""
        if BINARY_NAMES[operation(node)] != "compare" or node not in self.facts:
            return
        facts = self.facts[node]
        values = {n: self.facts[n].value for n in inputs}
        first = values[inputs[0]]
        const = facts.const
        for off in (-CLOSE, CLOSE):
            moved = self._evaluate(node, {**values, inputs[0]: first + off * np.maximum(1.0, np.abs(first))})
            const = const & (moved == facts.value)
        self.facts[node] = Facts(facts.ids, const, np.where(const, facts.value, 0.0))

    def _spread(self, node: fx.Node, wide: Ints, one: Ints, size: Sequence[int]) -> str | None:
        """An operand that has one channel for all of another one's, or for each row of them; size: its shape."""
        shape = self.shapes[node]
        spread = [d for d in range(wide.ndim) if wide.shape[d] != one.shape[d]]
        if any(one.shape[d] > 1 or size[d] > 1 for d in spread) or any(
            wide.shape[d] != shape[d] for d in axes_of(wide)
        ):
            return "its operands do not line up"
        if one.size == 1:
            self._lock(one, f"{title(node)} spreads it over all channels")
        else:
            self._by_head(node, [(wide, axes_of(one)), (one, axes_of(one))])
        return None

    def _where(self, node: fx.Node) -> str | None:
        """where(condition, x, y), masked_fill(x, mask, value): a channel is constant where x and y hold the same."""
        fill, method = operation(node) == "masked_fill", node.op == "call_method"
        names = ("x", "condition", "other") if fill or method else ("condition", "x", "other")
        old = {"input": "other" if method and not fill else "x", "self": "x", "mask": "condition", "value": "other"}
        chosen = {old.get(name, name): value for name, value in given(node, *names).items()}
        condition, x, y = (chosen[name] for name in ("condition", "x", "other"))
        x, y = (y, x) if fill else (x, y)
        shape = self.shapes[node]
        tensors = list(dict.fromkeys(n for n in (x, y, condition) if isinstance(n, fx.Node)))
        known = [n for n in tensors if n in self.facts]
        if any(n in self.sizes for n in tensors):
            return "computes with the number of channels"
        if not known:
            self.why[node] = "made of untracked tensors"
            return None
        facts = {n: self.facts[n].map(lambda a: a.reshape((1,) * (len(shape) - a.ndim) + a.shape)) for n in known}
        lead = max(known, key=lambda n: facts[n].ids.size)
        ids = facts[lead].ids
        for n in tensors:
            if n not in facts:
                if self._beside(node, lead, n) is None:
                    return "its operands do not line up"
            elif facts[n].ids.shape == ids.shape:
                self._tie((ids, facts[n].ids))
            elif reason := self._spread(
                node, ids, facts[n].ids, (1,) * (len(shape) - len(self.shapes[n])) + self.shapes[n]
            ):
                return reason
        const, value = [], []
        for n in (x, y):
            given_facts = facts.get(n) if isinstance(n, fx.Node) else Facts(ids, np.array(True), np.array(float(n)))
            const.append(np.False_ if given_facts is None else given_facts.const)
            value.append(0.0 if given_facts is None else given_facts.value)
        holds, chosen_value = value[0] == value[1], value[0]
        if condition in facts:
            holds = holds | facts[condition].const
            chosen_value = np.where(facts[condition].value != 0, *value)
        same = np.broadcast_to(const[0] & const[1] & holds & np.isfinite(chosen_value), ids.shape)
        self.facts[node] = Facts(ids, same, np.where(same, chosen_value, 0.0))
        self.sources[node] = [
            (n, np.broadcast_to(np.arange(f.ids.size).reshape(f.ids.shape), ids.shape), None if n in (x, y) else ~same)
            for n, f in facts.items()
        ]
        return None

    def _beside(self, node: fx.Node, known: fx.Node, other: fx.Node) -> Facts | None:
        """The channels of `known` in an elementwise operation with a tensor that is not tracked, if the result has them
        as they are: along dimensions where the other one has one value they go as they like."""
        shape = self.shapes[node]
        if len(self.shapes[known]) > len(shape) or not isinstance(self.shapes[other], Shape):
            return None
        facts = self.facts[known].map(lambda a: a.reshape((1,) * (len(shape) - a.ndim) + a.shape))
        axes = axes_of(facts.ids)
        size = (1,) * (len(shape) - len(self.shapes[other])) + self.shapes[other]
        reason = f"{title(node)} with {title(other)}: {self.why.get(other, 'not tracked')}"
        if any(shape[d] != facts.ids.shape[d] for d in axes) or (not axes and shape != self.shapes[known]):
            self._lock(facts.ids, reason)
            return None
        if against := [d for d in axes if size[d] > 1]:
            self._keep_along(facts.ids, against, reason)
        return facts

    def _with_number(self, node: fx.Node) -> str | None:
        """Arithmetic with a number computed from shapes; the channels that it counts are kept (see _pin_sizes)."""
        tensors = [n for n in node.all_input_nodes if n not in self.sizes]
        if len(tensors) != 1:
            return "computes with the number of channels"
        facts = self.facts.get(tensors[0])
        kind = BINARY_NAMES[operation(node)]
        if facts is not None:  # another map size may give another number
            zero = facts.const & (facts.value == 0) & (kind == "mul" or (kind == "div" and node.args[0] is tensors[0]))
            facts = Facts(facts.ids, zero, np.zeros_like(facts.value))
        self._channelwise(node, tensors[0], facts)
        return None

    def _mean(self, node: fx.Node) -> str | None:
        """mean, sum, amax, amin, var, std; norm, of which only what is 0 everywhere stays so."""
        source = self._source(node)
        facts = self.facts.get(source)
        if facts is None:
            self._channelwise(node, source, None)
            return None
        rank = len(self.shapes[source])
        kind = REDUCTIONS[operation(node)]
        names = {"norm": ("p",), "var": ("dim", "unbiased")}.get(kind, ("dim",))
        chosen = given(node, "input", *names, *(n for n in ("dim", "keepdim") if n not in names))
        dim = chosen.get("dim")
        known = {"input", "self", "x", "dim", "keepdim", "unbiased", "correction", "p", "ord"}
        if dim in (None, [], ()) or isinstance(dim, bool) or not set(chosen) <= known:
            return "reduces everything, or in a way that is not tracked"
        p = chosen.get("p", chosen.get("ord", 2))
        if kind == "norm" and p not in (None, "fro") and not (isinstance(p, (int, float)) and 1 <= p < np.inf):
            return "is a norm that is not tracked"
        dims = tuple(sorted(d % rank for d in (dim if isinstance(dim, (tuple, list)) else (dim,))))
        if any(d in self._varies(source) for d in dims):
            return "reduces the batch"
        keep = bool(chosen.get("keepdim"))
        move: Callable[[Any], Any] = (lambda a: a) if keep else (lambda a: a.squeeze(dims))
        if any(facts.ids.shape[d] > 1 for d in dims):
            self._over_channels(node, source, dims, kind, move)
            return None
        self._move(node, source, move)
        found = self.facts[node]
        if kind in ("sum", "norm"):  # other numbers for maps of other sizes, but for 0
            self.facts[node] = Facts(found.ids, found.const & (found.value == 0), np.zeros_like(found.value))
        elif kind == "var":
            self.facts[node] = found.vary()
        return None

    def _over_channels(
        self, node: fx.Node, source: fx.Node, dims: tuple[int, ...], kind: str, move: Callable[[Any], Any]
    ) -> None:
        """A reduction of channels to one, or to one for every row of them along the other dimensions. A mean counts its
        channels, so they all stay; to a sum or a norm a channel that is 0 adds nothing."""
        facts = self.facts[source]
        rows = [d for d in axes_of(facts.ids) if d not in dims]
        shape = [n if d in rows else 1 for d, n in enumerate(facts.ids.shape)]
        ids = self._fresh(int(np.prod(shape))).reshape(shape)
        free = facts.const & (facts.value == 0) & (kind in ("sum", "norm") and not rows)
        reason = f"{title(node)} {VERBS.get(kind, 'compares')} all channels"
        if rows or kind not in ("sum", "norm"):
            self._keep_along(facts.ids, dims, reason)
        else:
            self._hint(facts.ids, reason)
        self._by_head(node, [(facts.ids, rows), (ids, rows)])
        self.facts[node] = Facts(ids, np.zeros(shape, bool), np.zeros(shape)).map(move)
        self.sources[node] = []
        self.edits[node], self.rows[node] = "rows", rows
        self.moves[node] = move

        def read(need: Bools) -> list[Reading]:
            wanted = np.broadcast_to(need.reshape(shape), facts.ids.shape) & ~free
            return [(source, wanted, wanted)]

        self.readers[node] = read

    def _cast(self, node: fx.Node) -> str | None:
        """Another type of number: constants that it may not hold exactly are none any more."""
        source = self._source(node)
        facts = self.facts.get(source)
        if facts is not None:
            single = operation(node) in ("float", "double")
            exact = facts.value.astype(np.float32) == facts.value if single else np.isin(facts.value, (0, 1))
            facts = Facts(facts.ids, facts.const & exact, np.where(exact, facts.value, 0.0))
        self._channelwise(node, source, facts)
        return None

    def _normalize(self, node: fx.Node) -> str | None:
        """F.normalize: a channel that is 0 adds nothing to the norm, and stays 0."""
        source = self._source(node)
        facts = self.facts.get(source)
        chosen = {"p": 2.0, "dim": 1, **given(node, "input", "p", "dim", "eps")}
        p, dim = chosen["p"], chosen["dim"]
        if facts is None:
            self._channelwise(node, source, None)
            return None
        if not isinstance(dim, int) or not isinstance(p, (int, float)) or not 1 <= p < np.inf:
            return "normalises in a way that is not tracked"
        if dim % facts.ids.ndim in self._varies(source):
            return "normalises over the batch"
        zero = facts.const & (facts.value == 0)
        self._channelwise(node, source, Facts(facts.ids, zero, np.zeros_like(facts.value)))
        if facts.ids.shape[dim] > 1:

            def read(need: Bools) -> list[Reading]:
                wanted = np.broadcast_to(need.any(dim, keepdims=True), zero.shape) & ~zero
                return [(source, wanted, wanted)]

            self.readers[node] = read
        return None

    def _softmax(self, node: fx.Node) -> str | None:
        source = self._source(node)
        facts = self.facts.get(source)
        if facts is None:
            self._channelwise(node, source, None)
            return None
        chosen = vars(self._module(node)) if node.op == "call_module" else given(node, "input", "dim")
        dim = chosen.get("dim", -3 if self._kind(node) == "Softmax2d" else None)
        if not isinstance(dim, int) or dim % facts.ids.ndim in self._varies(source):
            return "normalises over the batch"
        self._channelwise(node, source, facts.vary())
        if facts.ids.shape[dim] > 1:
            self._counted(node, source, (dim % facts.ids.ndim,))
        elif dim % facts.ids.ndim == facts.ids.ndim - 1 and "log" not in self._kind(node).lower():
            self.averages.add(node)
        return None
