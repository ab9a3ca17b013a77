"""What the rules of channel tracking share: facts about tensors and layers, and the tables that the rules fill.

Every channel of every tensor has an *id*, in an array that broadcasts against the tensor's shape: dimensions along
which the channel does not change, the batch among them, have size 1. The rules for one family of operations each are in
pointwise.py, movement.py, mixing.py and recurrent.py; channels.py puts them together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx, nn

from .trace import Traced

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]

# A node that uses a tensor, and the tensor's name within its module ("" where it is used directly).
Use = tuple[fx.Node, str]
# What an operation reads of one of its inputs: the node, the channels wanted (None: all), and those of them that it
# wants even where they are constant (None: no more).
Reading = tuple[fx.Node, "Bools | None", "Bools | None"]


@dataclass(frozen=True)
class Facts:
    """What is known of a tensor's channels: arrays that broadcast against its shape (untracked dimensions 1).

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

    weight [O, Cg, K], in a transposed convolution a permuted view. reads [O, Cg]: the filter has a nonzero weight
    on the channel; border [O, Cg]: one that can lie on zero padding. shift: where a constant can be added to the
    output: "bias", "norm" (the mean of the BatchNorm behind), "new" (a bias that compact creates), or None. silent
    [O]: filters that emit a constant by their bias alone, and so read nothing. full: all of reads is true. direct:
    `ins` are the channels of the source, in their order. needed [O]: filters whose output is. merges: removed input
    channel -> the one that takes over its constant.
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
    direct: bool = True
    full: bool = False
    needed: Bools | None = None
    merges: dict[int, int] = field(default_factory=dict)

    def response(self, amount: Floats) -> Floats:
        """[O] output, away from the border, for input channels that hold `amount` [groups*Cg]: no bias."""
        at = np.flatnonzero(amount)
        if not at.size:
            return np.zeros(len(self.weight))
        # Few columns of what may be a huge weight.
        w = self.weight.unflatten(0, (self.groups, -1))
        w = w[..., 0] if w.shape[3] == 1 else w
        index = torch.from_numpy(at).to(w.device)
        x = torch.from_numpy(amount[at]).to(w.device)
        if self.groups == 1:
            return (_taps(w[0].index_select(1, index)) @ x).cpu().numpy()
        group = index // w.shape[2]
        each = _taps(w[group, :, index % w.shape[2]]) * x[:, None]
        return each.new_zeros(w.shape[:2]).index_add_(0, group, each).reshape(-1).cpu().numpy()


def _taps(w: Tensor) -> Tensor:
    """The sums in float64 of weights [A, B] or [A, B, K] over the taps."""
    return w.double() if w.dim() == 2 else w.double().sum(2)


def values_of(t: Tensor) -> Floats:
    """In float64 on the host; zeros where there are none, on the meta device."""
    t = t.detach()
    return np.zeros(tuple(t.shape)) if t.is_meta else t.double().cpu().numpy()


def flat(facts: Facts) -> Facts:
    return facts.map(lambda a: a.reshape(-1))


def filters(m: Any, groups: int = 1) -> Tensor:
    """The weight of a convolution or linear layer as [groups, O/groups, Cg, *K]; a view, so writing to it writes to
    the layer."""
    w: Tensor = m.weight.detach().unflatten(0, (groups, -1))
    return w.transpose(1, 2) if isinstance(m, nn.modules.conv._ConvTransposeNd) else w


def function_name(target: Any) -> str:
    """The name of a torch or operator function; '' for functions from elsewhere, which may do anything under a known
    name."""
    module = getattr(target, "__module__", None) or ""
    ours = module.split(".")[0] in ("torch", "_operator", "operator") or isinstance(target, type(torch.relu))
    return getattr(target, "__name__", "") if ours else ""


def operation(node: fx.Node) -> str:
    """The name of the function or method that a node calls."""
    return function_name(node.target) if node.op == "call_function" else str(node.target)


def given(node: fx.Node, *names: str) -> dict[str, Any]:
    """The arguments of a node by name, positional ones as `names` call them."""
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def title(node: fx.Node) -> str:
    """How messages call a node: a module's path, or the operation and the node's name."""
    if node.op == "call_module":
        return str(node.target)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.target)
    return f"{name} ({node.name})"


def attribute(module: nn.Module, path: str) -> Any:
    """What a get_attr node reads."""
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part)
    return value


def axes_of(a: npt.NDArray[Any]) -> list[int]:
    """The dimensions that the channels lie along."""
    return [d for d, n in enumerate(a.shape) if n > 1]


def by_rows(ids: Ints, axes: Sequence[int]) -> Ints:
    """[rows, rest]: the given dimensions in front, as one."""
    order = [*axes, *(d for d in range(ids.ndim) if d not in axes)]
    return ids.transpose(order).reshape(math.prod(ids.shape[d] for d in axes), -1)


def shared_tensors(module: fx.GraphModule) -> dict[Use, list[Use]]:
    """Tensors that several nodes use: each use -> all uses of the same tensor, itself included, in the graph's order.

    A bias that a module lacks counts: one that it were given would be that of all calls.
    """
    uses: dict[int, list[Use]] = {}
    for node in module.graph.nodes:
        found: list[tuple[str, Any]] = []
        if node.op == "call_module":
            m = module.get_submodule(node.target)
            found += m.named_parameters(remove_duplicate=False)
            found += m.named_buffers(remove_duplicate=False)
            found += [("bias", m)] if m._parameters.get("bias", m) is None else []
        elif node.op == "get_attr":
            kind_only = node.users and all(u.target is getattr and u.args[1] in ("device", "dtype") for u in node.users)
            found += [] if kind_only else [("", attribute(module, node.target))]
        for name, t in found:
            if not isinstance(t, Tensor) or t.dim():  # a counter of batches is nobody's channel
                uses.setdefault(id(t), []).append((node, name))
    return {use: several for several in uses.values() if len(several) > 1 for use in several}


def for_heads(a: npt.NDArray[Any], heads: Sequence[int], times: int = 1) -> npt.NDArray[Any]:
    """An array of channels [..., tokens, channels] as if it were copied for the heads [...] that share it: `times`
    along the last of them, and along those where it has one. Raises ValueError where the two do not line up."""
    a = np.repeat(a, times, -3) if times > 1 and a.shape[-3] > 1 else a
    return np.broadcast_to(a, (*heads, *a.shape[-2:]))


class Tracker:
    """The state of tracking, and what every rule needs of it. A rule takes a node and returns None or the reason why
    it leaves what the node touches whole."""

    def __init__(self, traced: Traced, create_bias: bool = True) -> None:
        self.traced = traced
        self.module = traced.module
        self.shapes = traced.shapes
        self.create_bias = create_bias
        self.shared = shared_tensors(self.module)
        # Nodes whose tensors are used elsewhere too in a way that can't be followed: reason.
        self.apart: dict[fx.Node, str] = {}
        self._start()

    def _start(self) -> None:
        """Empty tables."""
        self.n_ids = 0
        self.facts: dict[fx.Node, Facts] = {}
        # Nodes without facts: the reason.
        self.why: dict[fx.Node, str] = {}
        self.layers: dict[fx.Node, Layer] = {}
        # Recurrent layers (recurrent.py), and what they return of several states.
        self.recurrent: dict[fx.Node, Any] = {}
        self.states: set[fx.Node] = set()
        # BatchNorm -> its input; other modules with one set of parameters a channel -> the names of these.
        self.norms: dict[fx.Node, fx.Node] = {}
        self.affine: dict[fx.Node, tuple[str, ...]] = {}
        # Embeddings and parameters of the network used as operands -> the dimension that their channels lie along.
        self.tables: dict[fx.Node, int] = {}
        # Channelwise operations: per source the position of each output channel in it (-1: not from it) and where it
        # matters (None: everywhere).
        self.sources: dict[fx.Node, list[tuple[fx.Node, Ints, Bools | None]]] = {}
        # Operations that mix channels: what they read for the channels needed of them.
        self.readers: dict[fx.Node, Callable[[Bools], list[Reading]]] = {}
        # Data movement that does to the remaining channels what it does to all.
        self.moves: dict[fx.Node, Callable[[npt.NDArray[Any]], npt.NDArray[Any]]] = {}
        # Reductions over channels: the dimensions of the source along which one is left for each row.
        self.rows: dict[fx.Node, list[int]] = {}
        # split, chunk, unbind: source, positions per part.
        self.parts: dict[fx.Node, tuple[fx.Node, list[Ints]]] = {}
        # Integers computed from shapes: ids of the dimensions that they come from.
        self.sizes: dict[fx.Node, list[Ints]] = {}
        # Operations that need the remaining channels in some order or number, by kind (layout.py).
        self.edits: dict[fx.Node, str] = {}
        # Results of softmax over an untracked last dimension, which sum to 1.
        self.averages: set[fx.Node] = set()
        self.edges: list[tuple[Ints, Ints]] = []
        # Additions with ids of their own -> the edges to those of their operands.
        self.sums: dict[fx.Node, tuple[tuple[Ints, Ints], tuple[Ints, Ints]]] = {}
        self.locks: list[tuple[Ints, str]] = []
        self.hints: list[tuple[Ints, str]] = []
        # What the rule of a node added to these two; of the locks those that say what a tensor is, whoever reads it.
        self.spans: dict[fx.Node, tuple[slice, slice]] = {}
        self.lasting: set[int] = set()
        # Channels spread over several dimensions: in every row that has channels left, as many must be left.
        self.grids: list[tuple[fx.Node, Ints]] = []
        # Arrays of ids with equal numbers of rows: where one has channels left, all must.
        self.together: list[tuple[fx.Node, list[Ints]]] = []
        # Operations left whole: title -> reason.
        self.whole: dict[str, str] = {}

    def _module(self, node: fx.Node) -> Any:
        """The module that a call_module node calls."""
        return self.module.get_submodule(str(node.target))

    def _kind(self, node: fx.Node) -> str:
        if node.op == "call_module":
            return type(self._module(node)).__name__
        return str(node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.target))

    def alone(self, node: fx.Node, name: str) -> bool:
        """Whether nothing else uses the tensor (bias: or would, if the module had one) that the node uses by `name`."""
        return (node, name) not in self.shared

    def sharers(self, node: fx.Node, name: str) -> list[fx.Node]:
        """The nodes that use this tensor."""
        return [n for n, _ in self.shared.get((node, name), [(node, name)])]

    def _fresh(self, n: int) -> Ints:
        self.n_ids += n
        return np.arange(self.n_ids - n, self.n_ids)

    def _lock(self, ids: Ints, reason: str, lasting: bool = False) -> None:
        if lasting:
            self.lasting.add(len(self.locks))
        self.locks.append((ids.reshape(-1), reason))

    def _hint(self, ids: Ints, reason: str) -> None:
        """Why channels may have to stay, for those that do and of which nothing else says it."""
        if ids.size:
            self.hints.append((ids.reshape(-1), reason))

    def _keep_along(self, ids: Ints, dims: Iterable[int], reason: str) -> None:
        """Along these dimensions all channels stay; where they lie along others too, all of a row stay or all go."""
        rows = [d for d in axes_of(ids) if d not in set(dims)]
        if not rows:
            self._lock(ids, reason)
        elif len(rows) < len(axes_of(ids)):
            per = by_rows(ids, rows)
            self.edges.append((np.broadcast_to(per[:, :1], per.shape), per))
            self._hint(ids, reason)

    def _counted(self, node: fx.Node, source: fx.Node, dims: Sequence[int]) -> None:
        """`node` normalises over all channels of `source` along these dimensions: they all stay, or all of a row go."""
        ids = self.facts[source].ids
        self._keep_along(ids, dims, f"{title(node)} normalises over all channels")

        def read(need: Bools) -> list[Reading]:
            rows = need.any(tuple(d for d in dims if ids.shape[d] > 1), keepdims=True)
            return [(source, np.broadcast_to(rows, ids.shape), None)]

        self.readers[node] = read

    def _tie(self, ids: Iterable[Ints]) -> None:
        """The ids of several arrays of one shape go together, position by position."""
        first, *rest = ids
        self.edges += [(first, other) for other in rest if other is not first]

    def _by_head(self, node: fx.Node, arrays: Sequence[tuple[Ints, Sequence[int]]]) -> None:
        """Rows of several arrays of ids, along the given dimensions of each, have channels left in all or in none."""
        if all(axes for _, axes in arrays):
            self.together.append((node, [by_rows(ids, axes) for ids, axes in arrays]))

    def _varies(self, node: fx.Node) -> set[int]:
        """Dimensions whose size depends on the batch."""
        return self.traced.varies.get(node, {0})

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
            self._lock(ids, self.why.pop(node, "not tracked"), lasting=True)
        if facts.ids.size == facts.ids.shape[axis] == shape[axis]:
            return flat(facts)
        self._lock(facts.ids, f"{title(node)} is read along another dimension than its channels'")
        ids = self._fresh(shape[axis])
        self._lock(ids, "read along another dimension")
        return Facts(ids, np.zeros(ids.shape, bool), np.zeros(ids.shape))

    def _like(self, vector: Facts, rank: int, axis: int) -> Facts:
        return vector.map(lambda a: a.reshape([-1 if d == axis % rank else 1 for d in range(rank)]))

    def _table(self, node: fx.Node, rank: int, tracked: Sequence[int]) -> Facts | None:
        """Facts of a parameter or buffer, an operand of a tensor of `rank` dimensions of which `tracked` have channels;
        they vary over the others. None where its channels lie along several dimensions or it is used elsewhere too."""
        if node in self.facts:
            return self.facts[node]
        t = attribute(self.module, str(node.target)) if node.op == "get_attr" else None
        if not isinstance(t, Tensor) or not t.is_floating_point() or len(node.users) > 1:
            return None
        if node in self.apart or t.dim() > rank:
            return None
        own = [d - (rank - t.dim()) for d in tracked if d >= rank - t.dim()]
        own = [d for d in own if t.shape[d] > 1]
        if len(own) > 1:
            return None
        v = values_of(t)
        rest = tuple(d for d in range(v.ndim) if d not in own)
        low, high = (np.asarray(f(v, axis=rest, keepdims=True)) for f in (np.min, np.max))
        ids = self._fresh(low.size).reshape(low.shape)
        const = (low == high) & np.isfinite(low) & (not t.is_meta)
        self.facts[node] = Facts(ids, const, np.where(const, low, 0.0))
        self.sources[node] = []
        self.why.pop(node, None)
        if own:
            self.tables[node] = own[0]
        else:
            self._lock(ids, "one value for all channels", lasting=True)
        return self.facts[node]

    def _expression(self, node: fx.Node, rank: int, tracked: Sequence[int]) -> None:
        raise NotImplementedError  # channels.py

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
        self.moves[node] = move

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

    def _constants(self, node: fx.Node, ids: Ints, const: Bools, values: dict[fx.Node, Floats]) -> Facts:
        """Facts of an elementwise operation; what is constant but not finite (1/0) counts as varying."""
        out = self._evaluate(node, values)
        const = const & np.isfinite(out)
        return Facts(ids, const, np.where(const, out, 0.0))


def blocks(s: Sequence[int], t: Sequence[int]) -> list[tuple[int, int, int, int]] | None:
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
