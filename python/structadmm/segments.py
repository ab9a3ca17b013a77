"""Segments: the parts of a network that the compiled runtime holds, each as one layer that makes one op call.

`why_not` says what keeps an operation out of a segment, `partition` groups the others into maximal convex segments,
`lower` puts a `Segment` in the place of each, `inline` puts the operations back. A segment's program is the artefact of
its subgraph, so nothing is lost on the way: what `inline` returns is the network that was lowered.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from . import _core, ops
from .container import OPTIMIZED, from_bytes, to_bytes
from .errors import OptimizeError
from .forms import COMPILED, FORMS, Form, VendorConv2d, make, use_vendor
from .nn import ChannelBias, CompactConv2d, CompactLinear
from .trace import Shape, Traced
from .tracking import given

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_BY_NAME = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64, "float16": torch.float16}


class Segment(nn.Module):
    """A subgraph in inference, on the compiled runtime: x [N, C, H, W] or [N, features], any batch size, to one or more
    tensors (a tuple then).

    program: uint8, the bytes of the subgraph's artefact. dtype: of the values inside, "float32" or "bfloat16"; outputs
    have the dtype of the inputs. shapes: the outputs' shapes as expressions in the inputs', for tracers.
    """

    program: Tensor

    def __init__(self, program: Tensor, dtype: str, shapes: str) -> None:
        super().__init__()
        if dtype not in DTYPES.values():
            raise OptimizeError(f"Segment: dtype got {dtype!r}, wanted {' or '.join(DTYPES.values())}")
        self.register_buffer("program", program)
        self.dtype, self.shapes = dtype, shapes
        self._single = ";" not in shapes
        super().train(False)

    def forward(self, *inputs: Tensor) -> Any:
        # As ops.run_segment, but in one call; and not by `self.program`, for which nn.Module searches.
        try:
            outputs = ops.run_segment_op(list(inputs), self._buffers["program"], self.dtype, self.shapes)
        except RuntimeError as e:
            raise ops.as_value_error(e) from None
        return outputs[0] if self._single else tuple(outputs)

    def forward_one(self, x: Tensor) -> Any:
        """forward where one tensor comes and one goes, in half the time, and for eager calls alone."""
        try:
            return ops.run_segment_1_op(x, self._buffers["program"], self.dtype == "bfloat16")
        except RuntimeError as e:
            raise ops.as_value_error(e) from None

    def train(self, mode: bool = True) -> Any:
        if mode:
            raise OptimizeError("Segment: mode got training, wanted eval: a network from optimize is for inference")
        return super().train(mode)

    def network(self, path: str = "") -> fx.GraphModule:
        """The subgraph as torch runs it, its layers under the paths that they came from."""
        return from_bytes(self.program.cpu().numpy().tobytes())

    def extra_repr(self) -> str:
        return f"{self.program.numel()} bytes, {self.dtype}, shapes={self.shapes!r}"


_everywhere = torch.nn.modules.module


def _is_watched(network: Any, segment: Any) -> bool:
    """Whether nn.Module's calls of them would do more than call their class's forward: hooks, or what was compiled or
    put in its place."""
    return bool(
        network._forward_hooks
        or network._forward_pre_hooks
        or network._backward_hooks
        or network._backward_pre_hooks
        or network._compiled_call_impl
        or "forward" in network.__dict__
        or type(segment) is not Segment
        or "forward" in segment.__dict__
        or segment._forward_hooks
        or segment._forward_pre_hooks
        or segment._backward_hooks
        or segment._backward_pre_hooks
        or segment._compiled_call_impl
        or _everywhere._global_forward_hooks
        or _everywhere._global_forward_pre_hooks
        or _everywhere._global_backward_hooks
        or _everywhere._global_backward_pre_hooks
    )


def call_at_once(network: fx.GraphModule) -> None:
    """Let a call of a network that is one segment go to its op at once, where nothing looks on.

    What torch.fx and nn.Module do in between takes ten microseconds, as long as a small layer: the instructions are no
    longer in the caches when a layer ends. Hooks, tracers, compilers and modes, and inputs that are not plain
    tensors, find the way as it was. Other networks, and copies, are left as they are.
    """
    *first, last = network.graph.nodes
    inputs = [n for n in first if n.op == "placeholder"]
    calls = [n for n in first if n.op != "placeholder"]
    if [n.op for n in calls] != ["call_module"] or list(calls[0].args) != inputs or last.args != (calls[0],):
        return
    name, types = str(calls[0].target), (Tensor,) * len(inputs)
    if not isinstance(network._modules.get(name), Segment):
        return
    one = len(inputs) == 1
    in_turn = type(network).__call__  # torch.fx gives every GraphModule a class of its own
    is_compiling, is_tracing = torch.compiler.is_compiling, torch._C._get_tracing_state
    modes, function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if is_compiling():
            return nn.Module.__call__(self, *args, **kwargs)
        segment = self._modules[name]
        plain = type(args[0]) is Tensor if one and len(args) == 1 else tuple(map(type, args)) == types
        if not plain or kwargs or _is_watched(self, segment) or is_tracing() or modes() or function_modes():
            return in_turn(self, *args, **kwargs)
        return segment.forward_one(args[0]) if one and segment._single else segment.forward(*args)

    type(network).__call__ = call  # type: ignore[method-assign]


# What the runtime holds.

_Shapes = Mapping[fx.Node, Any]
_WINDOWS = (nn.Conv2d, CompactConv2d, nn.MaxPool2d, nn.AvgPool2d)
_LAYERS = (nn.Conv2d, CompactConv2d, nn.Linear, CompactLinear)


def _pair(v: Any) -> tuple[Any, Any]:
    return (v, v) if not isinstance(v, (tuple, list)) else (v[0], v[0]) if len(v) == 1 else (v[0], v[1])


def _rank(shape: Any) -> int:
    return len(shape) if isinstance(shape, Shape) else 0


def _floats(m: nn.Module) -> str | None:
    for name, t in (*m.named_parameters(), *m.named_buffers()):
        if t.is_floating_point() and t.dtype not in DTYPES:
            return f"{name} got {t.dtype}, wanted float32 or bfloat16"
        if t.device.type != "cpu":
            return f"{name} got a tensor on {t.device}, wanted the CPU"
    return None


def _conv(m: Any, ins: Sequence[Shape], out: Shape) -> str | None:
    if _rank(ins[0]) != 4:
        return f"x got {_rank(ins[0])} dimensions, wanted 4"
    if m.padding_mode != "zeros":
        return f"padding_mode got {m.padding_mode!r}, wanted 'zeros'"
    if m.padding == "same" and any(d * (k - 1) % 2 for d, k in zip(m.dilation, m.kernel_size, strict=True)):
        return "padding got 'same' of an odd total, wanted the same on both sides"
    return None


def _linear(m: Any, ins: Sequence[Shape], out: Shape) -> str | None:
    return None if _rank(ins[0]) == 2 else f"x got {_rank(ins[0])} dimensions, wanted 2"


def _norm(m: Any, ins: Sequence[Shape], out: Shape) -> str | None:
    if m.running_mean is None or m.running_var is None:
        return "running statistics got none, wanted those of training"
    wanted = 4 if isinstance(m, nn.BatchNorm2d) else 2
    return None if _rank(ins[0]) == wanted else f"x got {_rank(ins[0])} dimensions, wanted {wanted}"


def _channel_bias(m: Any, ins: Sequence[Shape], out: Shape) -> str | None:
    return None if m.dim == 1 else f"dim got {m.dim}, wanted 1"


def _pool(m: Any, ins: Sequence[Shape], out: Shape) -> str | None:
    if _rank(ins[0]) != 4:
        return f"x got {_rank(ins[0])} dimensions, wanted 4"
    return "return_indices got True, wanted False" if getattr(m, "return_indices", False) else None


def _adaptive(m: Any, ins: Sequence[Shape], out: Shape) -> str | None:
    if None in _pair(m.output_size):
        return "output_size got None, wanted numbers"
    return _pool(m, ins, out)


def _element_wise(m: Any, ins: Sequence[Shape], out: Shape) -> str | None:
    return None


def _flatten(m: Any, ins: Sequence[Shape], out: Shape) -> str | None:
    fits = _rank(ins[0]) in (2, 4) and m.start_dim == 1 and m.end_dim in (-1, _rank(ins[0]) - 1)
    return None if fits else f"dimensions got {m.start_dim} to {m.end_dim}, wanted 1 to the last of 4"


_Check = Callable[[Any, Sequence[Shape], Shape], "str | None"]
_MODULES: dict[type[nn.Module], _Check] = {
    **dict.fromkeys((nn.Conv2d, CompactConv2d), _conv),
    **dict.fromkeys((nn.Linear, CompactLinear), _linear),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d), _norm),
    ChannelBias: _channel_bias,
    **dict.fromkeys((nn.MaxPool2d, nn.AvgPool2d), _pool),
    **dict.fromkeys((nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d), _adaptive),
    **dict.fromkeys((nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.SiLU, nn.GELU, nn.Hardswish), _element_wise),
    **dict.fromkeys((nn.Hardsigmoid, nn.Sigmoid, nn.Tanh, nn.LeakyReLU, nn.Identity), _element_wise),
    nn.Flatten: _flatten,
    nn.PReLU: lambda m, ins, out: None if m.num_parameters == 1 else f"num_parameters got {m.num_parameters}, wanted 1",
    nn.ChannelShuffle: _pool,
    nn.ZeroPad2d: _pool,
}

_ADD = (operator.add, torch.add, "add")
_MUL = (operator.mul, torch.mul, "mul")
_SCALE = (*_ADD, *_MUL, operator.sub, torch.sub, "sub", operator.truediv, torch.div, "div")
_CAT = (torch.cat, torch.concat)
_FLATTEN = (torch.flatten, "flatten")
_ACTIVATIONS = (
    *(torch.relu, torch.sigmoid, torch.tanh, "relu", "sigmoid", "tanh"),
    *(F.relu, F.relu6, F.silu, F.gelu, F.hardswish, F.hardsigmoid, F.sigmoid, F.tanh, F.leaky_relu, F.hardtanh),
)
_CLAMP = (torch.clamp, "clamp")
_POOLS = (F.max_pool2d, F.avg_pool2d)
_ADAPTIVE = (F.adaptive_avg_pool2d, F.adaptive_max_pool2d)


def _of(node: fx.Node, targets: Sequence[Any]) -> bool:
    return node.op in ("call_function", "call_method") and node.target in targets


def why_not(node: fx.Node, root: nn.Module, shapes: _Shapes, batch: int) -> str | None:
    """What keeps the runtime from holding a node, as `what got ..., wanted ...`; None where it holds it.

    shapes: of the node and its inputs at batch size `batch`.
    """
    out: Any = shapes.get(node)
    ins: list[Any] = [shapes.get(n) for n in node.all_input_nodes]
    for shape in (out, *ins):
        if not isinstance(shape, Shape) or len(shape) not in (2, 4):
            return "a value got no shape of 2 or 4 dimensions, wanted [N, C, H, W] or [N, features]"
        if shape[0] != batch:
            return f"a value got {shape[0]} as first dimension, wanted the batch"
    if node.op == "call_module":
        m = root.get_submodule(str(node.target))
        check = _MODULES.get(type(m))
        if check is None:
            return f"layer got {type(m).__name__}, wanted one that the runtime knows"
        if len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
            return "arguments got others than one tensor, wanted one"
        return _floats(m) or check(m, ins, out)
    if node.op not in ("call_function", "call_method"):
        return f"node got {node.op}, wanted an operation"
    return _function(node, ins, out)


def _function(node: fx.Node, ins: Sequence[Shape], out: Shape) -> str | None:
    args: Any = node.args
    if _of(node, _SCALE) and len(args) == 2 and not node.kwargs:
        numbers = [a for a in args if isinstance(a, (int, float)) and not isinstance(a, bool)]
        if len(numbers) == 1 and isinstance(args[0], fx.Node):
            return None
    if _of(node, (*_ADD, *_MUL)):
        if len(args) != 2 or node.kwargs or not all(isinstance(a, fx.Node) for a in args):
            return "operands got a number or a factor, wanted two tensors"
        a, b = (ins[0], ins[-1])
        if a == b == out:
            return None
        gate = _of(node, _MUL) and out in (a, b) and _gates(a if out == b else b, out)
        return None if gate else f"operands got {tuple(a)} and {tuple(b)}, wanted the same shapes"
    if _of(node, _CAT):
        chosen = given(node, "tensors", "dim")
        dim = chosen.get("dim", chosen.get("axis", 0))
        return None if dim in (1, 1 - len(out)) else f"dim got {dim}, wanted 1"
    if _of(node, _FLATTEN):
        chosen = given(node, "input", "start_dim", "end_dim")
        fits = chosen.get("start_dim", 0) == 1 and chosen.get("end_dim", -1) in (-1, len(ins[0]) - 1)
        return None if fits else "flatten got other dimensions, wanted 1 to the last"
    if len(node.all_input_nodes) != 1 or not isinstance(args[0] if args else None, fx.Node):
        return "arguments got several tensors, wanted one"
    if _of(node, _ACTIVATIONS):
        return None
    if _of(node, (operator.getitem,)):
        parts = args[1] if isinstance(args[1], tuple) else (args[1],)
        static = all(isinstance(p, slice) and not any(isinstance(v, fx.Node) for v in (p.start, p.stop, p.step))
                      for p in parts)  # fmt: skip
        return None if static and _rank(ins[0]) == 4 == _rank(out) else "index got others, wanted slices by numbers"
    if _of(node, (F.pad,)):
        chosen = given(node, "input", "pad", "mode", "value")
        zeros = chosen.get("mode", "constant") == "constant" and not chosen.get("value")
        widths = all(isinstance(v, int) and v >= 0 for v in chosen["pad"])
        return None if zeros and widths and _rank(out) == 4 else "pad got other values, wanted zeros"
    if _of(node, _CLAMP):
        limits = given(node, "input", "min", "max")
        fixed = all(v is None or isinstance(v, (int, float)) for k, v in limits.items() if k != "input")
        return None if fixed else "limits got tensors, wanted numbers"
    if _of(node, _POOLS):
        chosen = given(node, "input", "kernel_size", "stride", "padding")
        static = not any(isinstance(v, fx.Node) for v in chosen.values() if v is not args[0])
        indices = node.kwargs.get("return_indices", False)
        return None if _rank(ins[0]) == 4 and static and not indices else "pool got other arguments, wanted numbers"
    if _of(node, _ADAPTIVE):
        size = given(node, "input", "output_size").get("output_size")
        fits = _rank(ins[0]) == 4 and all(isinstance(s, int) for s in _pair(size)) and len(node.args) <= 2
        return None if fits else f"output_size got {size}, wanted numbers"
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.target)
    return f"operation got {name}, wanted one that the runtime knows"


def _gates(gate: Shape, x: Shape) -> bool:
    return len(gate) == len(x) == 4 and gate[:2] == x[:2] and gate[2:] == (1, 1)


# One way of saying each thing, so that fewer are unknown.


def normalise(traced: Traced) -> None:
    """Say the same without in-place operations, dropout, and reshapes that flatten; in place, on a traced copy."""
    root, graph, shapes = traced.module, traced.module.graph, traced.shapes
    for layer in root.modules():
        if getattr(layer, "inplace", False) is True:
            layer.inplace = False  # type: ignore[assignment]
    for node in list(graph.nodes):
        _out_of_place(node)
        m = root.get_submodule(node.target) if node.op == "call_module" else None
        source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        if isinstance(m, (nn.Identity, nn.modules.dropout._DropoutNd)) or node.target == "contiguous":
            assert source is not None
            node.replace_all_uses_with(source)
            graph.erase_node(node)
        elif _flattens(node, source, shapes, traced.batch):
            _swap(traced, node, torch.flatten, (source, 1))
        elif source is not None and _averages(node, shapes):
            keep = _swap(traced, node, F.adaptive_avg_pool2d, (source, (1, 1)), Shape((*shapes[node][:2], 1, 1)))
            if len(shapes[node]) == 2:
                with graph.inserting_after(keep):
                    flat = graph.call_function(torch.flatten, (keep, 1))
                for user in [u for u in keep.users if u is not flat]:
                    user.replace_input_with(keep, flat)
                shapes[flat] = shapes[node]
    graph.eliminate_dead_code()
    graph.lint()
    root.delete_all_unused_submodules()
    root.recompile()


_PURE = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}


def _out_of_place(node: fx.Node) -> None:
    target: Any = node.target
    if node.op == "call_method" and target.endswith("_") and not target.endswith("__"):
        if hasattr(Tensor, target[:-1]):
            node.target = target[:-1]
    elif node.op == "call_function":
        name = getattr(target, "__name__", "")
        if target in _PURE:
            node.target = _PURE[target]
        elif name.endswith("_") and not name.endswith("__"):
            for owner in (torch, F):
                if getattr(owner, name, None) is target and hasattr(owner, name[:-1]):
                    node.target = getattr(owner, name[:-1])
        if node.kwargs.get("inplace") is True:
            node.kwargs = {k: v for k, v in node.kwargs.items() if k != "inplace"}
        elif target in _ACTIVATIONS and any(a is True for a in node.args[1:]):
            node.args = tuple(a for a in node.args if a is not True)


def _flattens(node: fx.Node, source: fx.Node | None, shapes: _Shapes, batch: int) -> bool:
    """[N, C, H, W] to [N, C*H*W] by any means that says so."""
    if source is None:
        return False
    before, after = shapes.get(source, ()), shapes.get(node, ())
    if _rank(before) != 4 or _rank(after) != 2 or before[0] != batch or after[0] != batch:
        return False
    return _of(node, ("view", "reshape", "flatten", torch.reshape, torch.flatten)) and node.args[1:] != (1,)


def _averages(node: fx.Node, shapes: _Shapes) -> bool:
    if not _of(node, ("mean", torch.mean)) or _rank(shapes.get(node.args[0])) != 4:  # type: ignore[arg-type]
        return False
    chosen = given(node, "input", "dim", "keepdim")
    dims = chosen.get("dim")
    unknown = set(chosen) - {"input", "dim", "keepdim"}
    return not unknown and isinstance(dims, (tuple, list)) and sorted(d % 4 for d in dims) == [2, 3]


def _swap(traced: Traced, node: fx.Node, target: Any, args: tuple[Any, ...], shape: Any = None) -> fx.Node:
    graph = traced.module.graph
    with graph.inserting_before(node):
        new = graph.call_function(target, args)
    traced.shapes[new] = traced.shapes[node] if shape is None else shape
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    return new


# Which nodes go together.


def partition(graph: fx.Graph, held: Iterable[fx.Node]) -> list[list[fx.Node]]:
    """Maximal connected convex groups of the nodes held, each in the graph's order: no path leaves a group and comes
    back, whatever runs as one unit on the way."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    groups: dict[fx.Node, set[fx.Node]] = {node: {node} for node in held}
    merged = True
    while merged:
        merged = False
        for node in sorted(groups, key=order.__getitem__):
            for source in node.all_input_nodes:
                if source in groups and groups[source] is not groups[node]:
                    both = groups[source] | groups[node]
                    if not _returns(both, groups):
                        groups.update(dict.fromkeys(both, both))
                        merged = True
    distinct = {id(group): group for group in groups.values()}
    return sorted((sorted(g, key=order.__getitem__) for g in distinct.values()), key=lambda g: order[g[0]])


def _returns(group: set[fx.Node], groups: Mapping[fx.Node, set[fx.Node]]) -> bool:
    """Whether a path leaves the group and comes back."""
    seen: set[fx.Node] = set()
    todo = [user for node in group for user in node.users if user not in group]
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        for member in groups.get(node, (node,)):  # a group runs as one
            seen.add(member)
            for user in member.users:
                if user in group:
                    return True
                todo.append(user)
    return False


def pays(group: Sequence[fx.Node], root: nn.Module) -> bool:
    """Whether a group does more than torch does in one call: element-wise operations alone don't pay for the way in
    and out."""
    modules = [root.get_submodule(str(n.target)) for n in group if n.op == "call_module"]
    return any(isinstance(m, _LAYERS) for m in modules)


def refusals(network: fx.GraphModule, groups: Sequence[Sequence[fx.Node]], shapes: _Shapes) -> dict[fx.Node, str]:
    """Nodes of the groups that the runtime does not hold after all, with its reasons."""
    out: dict[fx.Node, str] = {}
    for nodes in groups:
        inputs, outputs = boundary(nodes)
        rows = [((None, *shapes[n][1:]), torch.float32) for n in inputs]
        program = _program(network, nodes, inputs, outputs, rows, {})
        reasons = _core.why_not(program.numpy())
        out |= {node: reasons[node.name] for node in nodes if reasons.get(node.name)}
    return out


# Shapes as expressions.


@dataclass(frozen=True)
class _Expr:
    text: str  # a number, or an expression in x0_0, x0_1, ...

    @property
    def number(self) -> int | None:
        return int(self.text) if self.text.isdigit() else None


def _window(size: _Expr, kernel: int, stride: int, padding: int, dilation: int, ceil: bool) -> _Expr:
    reach = dilation * (kernel - 1) + 1
    if size.number is not None:
        return _Expr(
            str(ops.evaluate(_window(_Expr("n"), kernel, stride, padding, dilation, ceil).text, n=size.number))
        )
    if stride == 1:
        change = 2 * padding - reach + 1
        return size if change == 0 else _Expr(f"({size.text}{change:+d})")
    if not ceil:
        return _Expr(f"(({size.text}{2 * padding - reach:+d})//{stride}+1)")
    # The last window begins inside the input or its left padding.
    least = f"({size.text}{2 * padding - reach + stride - 1:+d})//{stride}+1"
    return _Expr(f"min({least},({size.text}{padding - 1:+d})//{stride}+1)")


def _total(terms: Sequence[_Expr], sign: str) -> _Expr:
    numbers = [t.number for t in terms]
    if all(n is not None for n in numbers):
        return _Expr(str(ops.evaluate(sign.join(map(str, numbers)))))
    return _Expr("(" + sign.join(t.text for t in terms) + ")")


def shape_text(nodes: Sequence[fx.Node], inputs: Sequence[fx.Node], outputs: Sequence[fx.Node], root: nn.Module,
               shapes: _Shapes) -> str:  # fmt: skip
    """The outputs' shapes in terms of the inputs': dimensions joined by commas, outputs by semicolons.

    `x0_2` is dimension 2 of input 0; sums, differences, products, floor divisions and min are what there is.
    """
    known = {node: [_Expr(f"x{i}_{d}") for d in range(len(shapes[node]))] for i, node in enumerate(inputs)}
    for node in nodes:
        known[node] = _infer(node, [known[n] for n in node.all_input_nodes], root, shapes)
    return ";".join(",".join(e.text for e in known[node]) for node in outputs)


def _infer(node: fx.Node, ins: list[list[_Expr]], root: nn.Module, shapes: _Shapes) -> list[_Expr]:
    x = ins[0]
    m: Any = root.get_submodule(str(node.target)) if node.op == "call_module" else None
    if isinstance(m, _WINDOWS):
        channels = x[1] if isinstance(m, (nn.MaxPool2d, nn.AvgPool2d)) else _Expr(str(m.out_channels))
        dilation = _pair(getattr(m, "dilation", 1))
        padding = _padding(m)
        return _windows(x, channels, m.kernel_size, m.stride, padding, dilation, getattr(m, "ceil_mode", False))
    if isinstance(m, (nn.Linear, CompactLinear)):
        return [x[0], _Expr(str(m.out_features))]
    if isinstance(m, (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)):
        return [*x[:2], *(_Expr(str(s)) for s in _pair(m.output_size))]
    if isinstance(m, nn.Flatten) or _of(node, _FLATTEN):
        return [x[0], _total(x[1:], "*")]
    if _of(node, _CAT):
        tensors: Any = given(node, "tensors")["tensors"]
        at = dict(zip(node.all_input_nodes, ins, strict=True))
        return [x[0], _total([at[t][1] for t in tensors], "+"), *x[2:]]
    if _of(node, _POOLS):
        names = ("input", "kernel_size", "stride", "padding")
        more = ("dilation", "ceil_mode") if node.target is F.max_pool2d else ("ceil_mode",)
        a = given(node, *names, *more)
        stride = a["kernel_size"] if a.get("stride") in (None, ()) else a["stride"]
        rest = (a.get("padding", 0), a.get("dilation", 1), a.get("ceil_mode", False))
        return _windows(x, x[1], a["kernel_size"], stride, *rest)
    if _of(node, _ADAPTIVE):
        return [*x[:2], *(_Expr(str(s)) for s in _pair(given(node, "input", "output_size")["output_size"]))]
    if isinstance(m, nn.ZeroPad2d) or _of(node, (F.pad,)):
        pad = list(m.padding) if m is not None else list(given(node, "input", "pad")["pad"])
        pad += [0] * (8 - len(pad))
        sums = [pad[i] + pad[i + 1] for i in (4, 2, 0)]
        return [x[0], *(_total([e, _Expr(str(n))], "+") if n else e for e, n in zip(x[1:], sums, strict=True))]
    if _of(node, (operator.getitem,)):
        index: Any = node.args[1]
        parts = index if isinstance(index, tuple) else (index,)
        return [_slice(e, p, n) for e, p, n in zip(x, (*parts, *[slice(None)] * 3), shapes[node], strict=False)]
    if _of(node, _MUL):
        wide = [i for n, i in zip(node.all_input_nodes, ins, strict=True) if shapes[n] == shapes[node]]
        return wide[0]
    return x


def _slice(size: _Expr, part: slice, length: int) -> _Expr:
    """A dimension that a slice takes part of; `length` is right where it is not the whole at a step."""
    step = part.step or 1
    if part.start in (None, 0) and part.stop is None:
        return _window(size, 1, step, 0, 1, False)
    return _Expr(str(length))


def _padding(m: Any) -> Any:
    if m.padding == "same":
        return tuple(d * (k - 1) // 2 for d, k in zip(m.dilation, m.kernel_size, strict=True))
    return 0 if m.padding == "valid" else m.padding


def _windows(
    x: list[_Expr], channels: _Expr, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil: bool
) -> list[_Expr]:
    k, s, p, d = (_pair(v) for v in (kernel, stride, padding, dilation))
    return [x[0], channels, *(_window(x[2 + i], k[i], s[i], p[i], d[i], ceil) for i in (0, 1))]


# Into segments and back.


def lower(
    network: fx.GraphModule,
    groups: Sequence[Sequence[fx.Node]],
    shapes: _Shapes,
    dtype: str,
    families: Mapping[str, str],
) -> fx.GraphModule:
    """A copy of the network in which each group of nodes is one Segment; the tensors outside are shared.

    shapes: of every node of the groups and their inputs. families: layer -> the family of kernels that runs it; the
    runtime chooses for the others.
    """
    made = []
    for nodes in groups:
        inputs, outputs = boundary(nodes)
        text = shape_text(nodes, inputs, outputs, network, shapes)
        rows = [((None, *shapes[n][1:]), torch.float32) for n in inputs]
        program = _program(network, nodes, inputs, outputs, rows, families)
        made.append((list(nodes), Segment(program, dtype, text)))
    lowered = _contract(network, made)
    call_at_once(lowered)
    return lowered


def boundary(nodes: Sequence[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
    """What a group of nodes reads from outside, and which of its nodes are read there."""
    inside = set(nodes)
    inputs = dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n not in inside)
    return list(inputs), [node for node in nodes if any(user not in inside for user in node.users)]


def _program(
    network: fx.GraphModule,
    nodes: Sequence[fx.Node],
    inputs: Sequence[fx.Node],
    outputs: Sequence[fx.Node],
    rows: Any,
    families: Mapping[str, str],
) -> Tensor:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for i, node in enumerate(inputs):
        copies[node] = graph.create_node("placeholder", f"x{i}", name=f"x{i}")
    for node in nodes:
        copies[node] = graph.node_copy(node, lambda n: copies[n])
        copies[node].meta = {}
    graph.output(copies[outputs[0]] if len(outputs) == 1 else tuple(copies[n] for n in outputs))
    part = fx.GraphModule(network, graph, "Segment")
    part.meta["structadmm"] = {"inputs": rows}
    own = {path: name for path, name in families.items() if any(n.target == path for n in nodes)}
    data = bytearray(to_bytes(part, {OPTIMIZED: {"families": own}} if own else {}))
    return torch.frombuffer(data, dtype=torch.uint8).clone()


def _contract(network: fx.GraphModule, made: Sequence[tuple[list[fx.Node], Segment]]) -> fx.GraphModule:
    """The network with a layer in the place of each group; raises OptimizeError where the groups are not convex."""
    order = {node: i for i, node in enumerate(network.graph.nodes)}
    unit: dict[fx.Node, tuple[fx.Node, ...]] = {node: (node,) for node in network.graph.nodes}
    layers: dict[tuple[fx.Node, ...], Segment] = {}
    for nodes, segment in made:
        unit.update(dict.fromkeys(nodes, tuple(nodes)))
        layers[tuple(nodes)] = segment
    graph, root = fx.Graph(), nn.Module()
    copies: dict[fx.Node, fx.Node] = {}
    n_done = 0

    def ready(nodes: Sequence[fx.Node]) -> bool:
        return all(n in copies or n in nodes for node in nodes for n in node.all_input_nodes)

    waiting = sorted(dict.fromkeys(unit.values()), key=lambda u: order[u[-1]])
    while waiting:
        at = next((i for i, u in enumerate(waiting) if ready(u)), None)
        if at is None:
            raise OptimizeError("optimize: segments got groups that wait for one another, wanted convex ones")
        unit_nodes = waiting.pop(at)
        if unit_nodes not in layers:
            (node,) = unit_nodes
            copies[node] = graph.node_copy(node, lambda n: copies[n])
            if node.op in ("call_module", "get_attr"):
                _attach(root, str(node.target), network)
            continue
        inputs, outputs = boundary(unit_nodes)
        name, n_done = f"segment_{n_done}", n_done + 1
        while hasattr(network, name):
            name += "_"
        root.add_module(name, layers[unit_nodes])
        call = graph.call_module(name, tuple(copies[n] for n in inputs))
        for i, node in enumerate(outputs):
            copies[node] = call if len(outputs) == 1 else graph.call_function(operator.getitem, (call, i))
    graph.lint()
    fast = fx.GraphModule(root, graph, type(network).__name__)
    # fx's own call only dresses up the errors of generated code, at two microseconds a call.
    type(fast).__call__ = _call  # type: ignore[method-assign]
    fast.meta.update({k: v for k, v in network.meta.items() if k == "structadmm"})
    return fast.eval()


def _call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    # Looked up at each call: tracers put their own in its place for a while.
    return nn.Module.__call__(self, *args, **kwargs)


def _attach(root: nn.Module, path: str, source: nn.Module) -> None:
    """The layer or tensor of `source` at `path`, with empty modules on the way."""
    owner = root
    *parents, last = path.split(".")
    for part in parents:
        if not hasattr(owner, part):
            owner.add_module(part, nn.Module())
        owner, source = getattr(owner, part), getattr(source, part)
    value = getattr(source, last)
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        if last not in owner._buffers:
            owner.register_buffer(last, value)
    elif not hasattr(owner, last):
        setattr(owner, last, value)


def segments_of(network: nn.Module) -> dict[str, Segment]:
    """The segments of a network by path."""
    return {name: m for name, m in network.named_modules() if isinstance(m, Segment)}


def inline(fast: fx.GraphModule) -> tuple[fx.GraphModule, dict[str, Any]]:
    """The network with the operations of its segments and vendor layers in their place, and what `restore` makes them
    from again, as JSON values."""
    graph = fx.Graph()
    copies: dict[fx.Node, Any] = {}
    root = nn.Module()
    record: dict[str, Any] = {"form": None, "segments": [], "vendor": {}, "families": {}}

    def copy_node(node: fx.Node, source: nn.Module, known: dict[fx.Node, Any]) -> fx.Node:
        if node.op in ("call_module", "get_attr"):
            _attach(root, str(node.target), source)
        new = graph.node_copy(node, lambda n: known[n])
        new.meta = {}
        return new

    for node in fast.graph.nodes:
        m: Any = fast.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(m, (Segment, Form, VendorConv2d)):
            part: Any = m.network(str(node.target))
            if isinstance(m, Form):
                part, within = inline(part)
                record["vendor"] = within["vendor"]
                part = copy.deepcopy(part).to(torch.float32) if m.cast else part  # not the tensors shared with m
            arguments = [copies[a] for a in node.args]
            inner = dict(zip([n for n in part.graph.nodes if n.op == "placeholder"], arguments, strict=True))
            for n in part.graph.nodes:
                if n.op not in ("placeholder", "output"):
                    inner[n] = copy_node(n, part, inner)
            results = part.graph.output_node().args[0]
            copies[node] = fx.node.map_arg(results, inner.__getitem__)
            if isinstance(m, Segment):
                names = [inner[n].name for n in part.graph.nodes if n.op not in ("placeholder", "output")]
                about = part.meta["structadmm"]["metadata"].get(OPTIMIZED, {})
                record["families"].update(about.get("families", {}))
                row = {"nodes": names, "shapes": m.shapes, "dtype": m.dtype}
                record["segments"].append(row)
            elif isinstance(m, Form):
                record["form"] = {"name": m.name, "dtype": str(m.dtype).removeprefix("torch.")}
            else:
                record["vendor"][str(node.target)] = m.adds
        elif node.op == "output":
            graph.output(fx.node.map_aggregate(node.args[0], lambda v: copies[v] if isinstance(v, fx.Node) else v))
        elif node.target is operator.getitem and isinstance(copies.get(node.args[0]), (tuple, list)):
            copies[node] = copies[node.args[0]][node.args[1]]
        else:
            copies[node] = copy_node(node, fast, copies)
    graph.lint()
    network = fx.GraphModule(root, graph, type(fast).__name__)
    network.meta.update({k: v for k, v in fast.meta.items() if k == "structadmm"})
    return network.eval(), record


def restore(network: fx.GraphModule, record: Any) -> fx.GraphModule:
    """The optimised network that `inline` took apart. Raises OptimizeError where the record does not fit."""

    def need(ok: bool, what: str, wanted: str) -> None:
        if not ok:
            raise OptimizeError(f"optimize: {what} of the record got other values, wanted {wanted}")

    fields = ("form", "segments", "vendor", "families")
    need(isinstance(record, dict) and set(record) == set(fields), "fields", ", ".join(fields))
    form, rows, vendor, families = (record[k] for k in fields)
    layers = {n.target for n in network.graph.nodes if n.op == "call_module"}
    fits = isinstance(vendor, dict) and all(v in layers and isinstance(adds, bool) for v, adds in vendor.items())
    need(fits, "vendor", "layers, and whether they add")
    fits = isinstance(families, dict) and all(v in layers and isinstance(f, str) for v, f in families.items())
    need(fits, "families", "layers and names of families")
    if form is not None:
        fits = isinstance(form, dict) and set(form) == {"name", "dtype"} and form["name"] in (*FORMS, COMPILED)
        need(fits and form["dtype"] in _BY_NAME, "form", f"one of {', '.join(FORMS)}, and its dtype")
        return make(network, form["name"], _BY_NAME[form["dtype"]], vendor)
    need(isinstance(rows, list), "segments", "a list")
    by_name = {n.name: n for n in network.graph.nodes if n.op not in ("placeholder", "output", "get_attr")}
    made, seen = [], set[str]()
    for row in rows:
        need(isinstance(row, dict) and set(row) == {"nodes", "shapes", "dtype"}, "segment", "its fields")
        names, shapes, dtype = (row[k] for k in ("nodes", "shapes", "dtype"))
        known = isinstance(names, list) and names and all(isinstance(n, str) and n in by_name for n in names)
        need(bool(known) and len(set(names) - seen) == len(names), "nodes", "those of the network, each once")
        seen |= set(names)
        inside = set(names)
        nodes = [n for n in network.graph.nodes if n.name in inside]
        inputs, outputs = boundary(nodes)
        need(bool(inputs and outputs), "nodes", "some that read and are read")
        need(isinstance(dtype, str) and dtype in DTYPES.values(), "dtype", " or ".join(DTYPES.values()))
        need(isinstance(shapes, str) and len(shapes) < 100_000 and shapes.count(";") == len(outputs) - 1, "shapes",
             "one of each output")  # fmt: skip
        program = _program(network, nodes, inputs, outputs, None, families)
        made.append((nodes, Segment(program, dtype, shapes)))
    fast = _contract(network, made)
    if vendor:
        use_vendor(fast, vendor)
    call_at_once(fast)
    return fast
