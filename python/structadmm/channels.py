"""Ids and constants: which channel of every tensor in a traced network comes from which filter, and what it holds.

Every channel of every tensor has an *id*; data movement (reshape, slice, concat, pad) is done on the ids as it is on
the data, and an addition ties the ids of its operands, so tied channels go together or not at all. A channel is a
*constant* c when it holds c on the whole map, border included, whatever the input: a filter without weights emits its
bias; BatchNorm and activations map constants; zero padding leaves only 0 constant. An operation that is not tracked
pins the channels it touches, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import fx, nn

from .mixing import CONVS, INSTANCE_NORMS, NORMS, TRANSPOSED, Mixing
from .movement import HARMLESS, OWN_PADS, Movement
from .nn import ChannelBias
from .pointwise import (
    AVG_POOL_FUNCTIONS,
    AVG_POOLS,
    BINARY_NAMES,
    CONST_POOL_FUNCTIONS,
    CONST_POOLS,
    IDENTITY_MODULES,
    IDENTITY_NAMES,
    POINTWISE_MODULES,
    POINTWISE_NAMES,
    REDUCTIONS,
    Pointwise,
)
from .recurrent import RECURRENT, Recurrents
from .symbolic import is_identity
from .trace import Shape, Traced
from .tracking import axes_of, function_name, given, title

_PADS = (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d, *OWN_PADS)

# The rules of modules and of functions and methods, as names of the methods below.
_MODULES: dict[type[nn.Module], str] = {
    **dict.fromkeys((*CONVS, *TRANSPOSED), "_conv"),
    **dict.fromkeys(NORMS, "_norm"),
    **dict.fromkeys((nn.GroupNorm, *INSTANCE_NORMS), "_group_norm"),
    **dict.fromkeys((nn.LayerNorm, nn.RMSNorm), "_layer_norm"),
    **dict.fromkeys(IDENTITY_MODULES, "_identity"),
    **dict.fromkeys(POINTWISE_MODULES, "_pointwise"),
    **dict.fromkeys((*CONST_POOLS, *AVG_POOLS), "_pool"),
    **dict.fromkeys(_PADS, "_pad"),
    **dict.fromkeys((nn.Flatten, nn.Unflatten), "_reshape"),
    **dict.fromkeys((nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle), "_shuffle"),
    nn.Linear: "_linear",
    nn.PReLU: "_prelu",
    ChannelBias: "_channel_bias",
    nn.Softmax: "_softmax",
    nn.LogSoftmax: "_softmax",
    nn.Softmax2d: "_softmax",
    nn.Embedding: "_embedding",
    **dict.fromkeys(RECURRENT, "_recurrent"),
}
_FUNCTIONS: dict[str, str] = {
    **dict.fromkeys(POINTWISE_NAMES, "_pointwise"),
    **dict.fromkeys(IDENTITY_NAMES, "_identity"),
    **dict.fromkeys(BINARY_NAMES, "_binary"),
    **dict.fromkeys(("flatten", "view", "reshape", "squeeze", "unflatten", "reshape_as", "view_as"), "_reshape"),
    **dict.fromkeys(("permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "t", "mT"), "_permute"),
    **dict.fromkeys(REDUCTIONS, "_mean"),
    **dict.fromkeys(("where", "masked_fill"), "_where"),
    **dict.fromkeys(("layer_norm", "rms_norm"), "_layer_norm"),
    **dict.fromkeys(("cat", "concat", "concatenate", "stack"), "_cat"),
    **dict.fromkeys(("split", "chunk", "unbind", "split_with_sizes"), "_split"),
    **dict.fromkeys(("pixel_shuffle", "pixel_unshuffle", "channel_shuffle"), "_shuffle"),
    **dict.fromkeys(("roll", "flip"), "_roll"),
    **dict.fromkeys(("expand", "expand_as"), "_expand"),
    **dict.fromkeys(("softmax", "log_softmax"), "_softmax"),
    **dict.fromkeys(("matmul", "bmm"), "_matmul"),
    **dict.fromkeys(("size", "dim"), "_size"),
    **dict.fromkeys(("float", "double", "to", "type_as"), "_cast"),
    **dict.fromkeys(("repeat_interleave", "repeat", "tile"), "_repeat"),
    "normalize": "_normalize",
    "scaled_dot_product_attention": "_attention",
    "unsqueeze": "_unsqueeze",
    "getitem": "_getitem",
    "select": "_select",
    "pad": "_pad",
}
# Why well-known layers are left whole.
_WHOLE: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.RNNCellBase, "what its state holds at the start is not tracked"),
    (nn.MultiheadAttention, "its projections are packed; compact takes it apart where its arguments allow"),
    (nn.Bilinear, "it multiplies channels of two inputs"),
    (nn.EmbeddingBag, "it pools over rows"),
    (nn.LocalResponseNorm, "it reads neighbouring channels"),
    (nn.Transformer, "torch's own forward is not traced into"),
    (nn.TransformerEncoderLayer, "torch's own forward is not traced into"),
    (nn.TransformerDecoderLayer, "torch's own forward is not traced into"),
)


class Channels(Pointwise, Movement, Mixing, Recurrents):
    """Ids and constants of every tensor.

    create_bias: a layer without bias may get one to take a constant.
    """

    def __init__(self, traced: Traced, create_bias: bool = True) -> None:
        super().__init__(traced, create_bias)
        # Rules of what returns several tensors or numbers.
        self._several = (self._split, self._size, self._recurrent, self._states)
        while True:
            for node in self.module.graph.nodes:
                edges, locks = len(self.edges), len(self.locks)
                self._forward(node)
                self.spans[node] = slice(edges, len(self.edges)), slice(locks, len(self.locks))
            if not self.set_apart():
                break
            self._start()

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
        if inputs and all(n in self.sizes for n in inputs) and not isinstance(shape, Shape):
            self._forward_size(node)
            return
        handler = self._handler(node)
        if handler is None or node in self.apart:
            self._pin(node, self.apart.get(node) or self._untracked(node))
            return
        if not isinstance(shape, Shape) and handler not in self._several:
            self._pin(node, f"{self._kind(node)} does not return one tensor")
            return
        try:
            reason = handler(node)
        except (AssertionError, AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
            # An overload or argument that the rule does not foresee: as good as untracked.
            reason = f"its arguments are not understood ({type(error).__name__}: {error})"
        if reason is not None:
            tables = (self.facts, self.sources, self.layers, self.norms, self.affine, self.tables, self.parts)
            rest = (self.edits, self.readers, self.moves, self.rows, self.sizes, self.recurrent, self.sums)
            for found in (*tables, *rest):
                found.pop(node, None)
            self.grids = [g for g in self.grids if g[0] is not node]
            self.together = [g for g in self.together if g[0] is not node]
            self._pin(node, reason)
        elif handler not in (self._reshape, self._expand, self._getitem) or node not in self.facts:
            self._pin_sizes(node)

    def _expression(self, node: fx.Node, rank: int, tracked: Sequence[int]) -> None:
        """Track an operand that is computed from vectors of parameters alone, as its other operand has channels along
        the `tracked` of `rank` dimensions: afterwards it has facts, or is as it was."""
        found: list[fx.Node] = []
        stack = [node]
        while stack:
            n = stack.pop()
            if n in found:
                continue
            found.append(n)
            stack += n.all_input_nodes
            leaf = n.op == "get_attr"
            if len(n.users) > 1 or n in self.facts or not isinstance(self.shapes.get(n), Shape):
                return
            if not leaf and (n.op == "call_module" or self._handler(n) not in self._of_parameters()):
                return
            if leaf and sum(size > 1 for size in self.shapes[n]) != 1:
                return
        before = (self.n_ids, len(self.locks), len(self.edges), dict(self.why), len(self.hints))
        order = {n: i for i, n in enumerate(self.module.graph.nodes)}
        for n in sorted(found, key=order.__getitem__):
            if n.op == "get_attr":
                shape = self.shapes[n]
                reason = None if self._table(n, len(shape), [d for d, k in enumerate(shape) if k > 1]) else "no table"
            else:
                handler = self._handler(n)
                assert handler is not None
                self.why.pop(n, None)
                reason = handler(n)
            if reason is not None or n not in self.facts:
                break
        facts = self.facts.get(node)
        if facts is not None and {d + rank - facts.ids.ndim for d in axes_of(facts.ids)} <= set(tracked):
            return
        self.n_ids = before[0]
        del self.locks[before[1] :], self.edges[before[2] :], self.hints[before[4] :]
        self.why = before[3]
        for n in found:
            for table in (self.facts, self.sources, self.tables, self.edits, self.moves, self.sums):
                table.pop(n, None)
        self.grids = [g for g in self.grids if g[0] not in found]
        self.together = [g for g in self.together if g[0] not in found]

    def _of_parameters(self) -> tuple[Callable[[fx.Node], str | None], ...]:
        return (self._pointwise, self._identity, self._reshape, self._unsqueeze, self._cat, self._binary)

    def _untracked(self, node: fx.Node) -> str:
        kind = self._kind(node)
        if node.op == "call_module":
            m = self._module(node)
            for cls, why in _WHOLE:
                if isinstance(m, cls):
                    return f"{kind}: {why}"
        return f"{kind} is not tracked"

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
        name: str | None
        if node.op == "call_module":
            m = self._module(node)
            name = _MODULES.get(type(m)) or ("_identity" if is_identity(m) else None)
        elif node.op == "call_function":
            if node.target in CONST_POOL_FUNCTIONS or node.target in AVG_POOL_FUNCTIONS:
                return self._pool
            if node.target is getattr or function_name(node.target) == "getattr":
                return self._size if node.args[1] in ("shape", *HARMLESS) else None
            name = _FUNCTIONS.get(function_name(node.target))
            if name == "_getitem" and (node.args[0] in self.recurrent or node.args[0] in self.states):
                return self._states
            if "dropout" in function_name(node.target) and given(node, "input", "p", "training").get("training", True):
                name = None
        else:
            name = _FUNCTIONS.get(str(node.target))
        return None if name is None else getattr(self, name)
