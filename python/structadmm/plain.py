"""Graphs in plain terms: layers of torch.nn and of this package where a network has layers of other libraries.

Functional calls with the parameters of one module become calls of a torch.nn module in its place. Networks are full of
subclasses that a tracer goes into: a normalisation with an activation behind it, a convolution that pads by the size of
its input. What is left of them in a graph is `F.batch_norm(x, norm.running_mean, ...)`, frozen in one mode; as a plain
module under the same path, with the same parameters, it trains and is understood.

Stochastic depth of other libraries becomes structadmm.nn.DropPath, so the network needs them no longer. Layers that are
nothing but a function (Upsample, Unfold, Fold) become that function; einsum of two operands becomes a matrix product,
addcmul a product and a sum, glu a product of halves, max along a dimension amax where only the values are used; a
linear layer whose bias is computed becomes one without, and an addition.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from .nn import DropPath
from .symbolic import mode

_CONVS: dict[Any, type[nn.Module]] = {F.conv1d: nn.Conv1d, F.conv2d: nn.Conv2d, F.conv3d: nn.Conv3d}
_CONV_ARGUMENTS = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}


def _norm(owner: Any, a: dict[str, Any]) -> nn.Module | None:
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    cls = next((k for k in kinds if isinstance(owner, k)), None)
    if cls is None or a["running_mean"] is None:
        return None
    affine = a["weight"] is not None
    return cls(owner.num_features, a["eps"], owner.momentum, affine, True)


def _layer_norm(owner: Any, a: dict[str, Any]) -> nn.Module | None:
    shape = a["normalized_shape"]
    if not isinstance(owner, nn.LayerNorm) or not all(isinstance(s, int) for s in shape):
        return None
    return nn.LayerNorm(tuple(shape), a["eps"], a["weight"] is not None, a["bias"] is not None)


def _group_norm(owner: Any, a: dict[str, Any]) -> nn.Module | None:
    alone = not owner._modules and {*owner._parameters, *owner._buffers} <= {"weight", "bias"}
    if not isinstance(owner, nn.GroupNorm) and not alone:
        return None
    channels = next(t.numel() for t in owner._parameters.values() if t is not None)
    return nn.GroupNorm(a["num_groups"], channels, a["eps"], a["weight"] is not None)


def _instance_norm(owner: Any, a: dict[str, Any]) -> nn.Module | None:
    cls = next((k for k in (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d) if isinstance(owner, k)), None)
    if cls is None:
        return None
    return cls(owner.num_features, a["eps"], owner.momentum, a["weight"] is not None, a["running_mean"] is not None)


def _is_layer(owner: Any, cls: type[nn.Module], dims: int) -> bool:
    """Whether a module is a layer of this kind, be it by a class that is not torch's: it has a weight of so many
    dimensions, perhaps a bias, and nothing else."""
    foreign = not type(owner).__module__.startswith("torch.") and not owner._modules and not owner._buffers
    weight = owner._parameters.get("weight")
    named = foreign and set(owner._parameters) <= {"weight", "bias"} and weight is not None
    return isinstance(owner, cls) or bool(named and weight.dim() == dims)


def _linear(owner: Any, a: dict[str, Any]) -> nn.Module | None:
    if not _is_layer(owner, nn.Linear, 2):
        return None
    n_filters, channels = owner.weight.shape
    return nn.Linear(channels, n_filters, a["bias"] is not None)


def _conv(owner: Any, a: dict[str, Any]) -> nn.Module | None:
    cls = _CONVS[a["function"]]
    fields = [a[name] for name in ("stride", "padding", "dilation", "groups")]
    numbers = all(isinstance(v, (int, str)) or all(isinstance(i, int) for i in v) for v in fields)
    if not _is_layer(owner, cls, int(cls.__name__[-2]) + 2) or not numbers:
        return None
    weight: Any = owner.weight
    make: Any = cls
    stride, padding, dilation, groups = fields
    channels = weight.shape[1] * groups, weight.shape[0]
    return make(*channels, tuple(weight.shape[2:]), stride, padding, dilation, groups, a["bias"] is not None)


_RULES: dict[Any, tuple[Callable[[Any, dict[str, Any]], nn.Module | None], tuple[str, ...]]] = {
    F.batch_norm: (_norm, ("running_mean", "running_var", "weight", "bias")),
    F.layer_norm: (_layer_norm, ("weight", "bias")),
    F.group_norm: (_group_norm, ("weight", "bias")),
    F.instance_norm: (_instance_norm, ("running_mean", "running_var", "weight", "bias")),
    F.linear: (_linear, ("weight", "bias")),
    **dict.fromkeys(_CONVS, (_conv, ("weight", "bias"))),
}


def _arguments(node: fx.Node) -> dict[str, Any] | None:
    """Arguments of a functional call by name, the defaults too."""
    if node.target in _CONVS or node.target is F.linear:
        defaults = _CONV_ARGUMENTS if node.target in _CONVS else {"bias": None}
        names = ("input", "weight", *defaults)
        return {**defaults, **dict(zip(names, node.args, strict=False)), **node.kwargs, "function": node.target}
    try:
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    bound.apply_defaults()
    return dict(bound.arguments)


def in_plain_terms(root: nn.Module, *graphs: fx.Graph) -> None:
    """Rewrite graphs of one network in place, and the modules that they call."""
    for graph in graphs:
        for node in list(graph.nodes):
            if node.op in ("call_function", "call_method") and node.target in _REWRITES:
                _REWRITES[node.target](graph, node)
    _zeros_in_parameters(root, graphs)
    _tied_heads(root, graphs)
    _computed_biases(root, graphs)
    _modules_for_functions(root, graphs)
    own: dict[nn.Module, nn.Module] = {}
    for graph in graphs:
        for node in list(graph.nodes):
            if node.op != "call_module":
                continue
            m = root.get_submodule(str(node.target))
            if type(m) in _PLAIN_FUNCTIONS:
                _function_for_module(graph, node, m)
            elif m not in own and (path := _drop_path(m)) is not None:
                own[m] = path
    for name, m in list(root.named_modules(remove_duplicate=False)):
        if m in own and name:
            parent, _, last = name.rpartition(".")
            setattr(root.get_submodule(parent), last, own[m])


def _swap(graph: fx.Graph, node: fx.Node, new: fx.Node) -> None:
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _einsum(graph: fx.Graph, node: fx.Node) -> None:
    """A sum of products of two operands over one label, as a matrix product: channels are followed through those."""
    args: Any = node.args
    if len(args) == 2 and isinstance(args[1], (tuple, list)):
        args = (args[0], *args[1])
    equation = args[0].replace(" ", "") if isinstance(args[0], str) else ""
    sides = equation.partition("->")
    labels, out = sides[0].split(","), sides[2]
    if len(args) != 3 or len(labels) != 2 or not sides[1] or "." in equation or node.kwargs:
        return
    x, y = labels
    if any(len(set(t)) < len(t) for t in (x, y, out)) or set(out) - set(x + y):
        return
    batch = [c for c in out if c in x and c in y]
    summed = [c for c in x if c in y and c not in out]
    rows, columns = ([c for c in t if c not in other] for t, other in ((x, y), (y, x)))
    if len(summed) != 1 or not rows or not columns or set(rows + columns) - set(out) or len(columns) > 1:
        return

    def permuted(t: Any, have: Sequence[str], want: Sequence[str]) -> fx.Node:
        order = [have.index(c) for c in want]
        return t if order == list(range(len(order))) else graph.call_method("permute", (t, *order))

    with graph.inserting_before(node):
        a = permuted(args[1], x, [*batch, *rows, *summed])
        b = permuted(args[2], y, [*batch, *summed, *columns])
        for i in range(len(rows) - 1):
            b = graph.call_method("unsqueeze", (b, len(batch) + i))
        product = graph.call_function(torch.matmul, (a, b))
        new = permuted(product, [*batch, *rows, *columns], list(out))
    _swap(graph, node, new)


def _addcmul(graph: fx.Graph, node: fx.Node) -> None:
    args: Any = node.args
    value = node.kwargs.get("value", 1)
    if len(args) == 3 and not set(node.kwargs) - {"value"} and isinstance(value, (int, float)):
        with graph.inserting_before(node):
            product = graph.call_function(operator.mul, (args[1], args[2]))
            product = product if value == 1 else graph.call_function(operator.mul, (product, value))
            new = graph.call_function(operator.add, (args[0], product))
        _swap(graph, node, new)


def _glu(graph: fx.Graph, node: fx.Node) -> None:
    """One half, gated by the other."""
    dim: Any = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else -1)
    with graph.inserting_before(node):
        halves = graph.call_function(torch.chunk, (node.args[0], 2, dim))
        a, b = (graph.call_function(operator.getitem, (halves, i)) for i in (0, 1))
        new = graph.call_function(operator.mul, (a, graph.call_function(torch.sigmoid, (b,))))
    _swap(graph, node, new)


def _extreme(graph: fx.Graph, node: fx.Node) -> None:
    """The largest or smallest values along a dimension, where nobody asks for their places."""
    args: Any = (*node.args, *(node.kwargs[n] for n in ("dim", "keepdim") if n in node.kwargs))
    values = ((operator.getitem, 0), (getattr, "values"))
    if any(u.users and (u.target, *u.args[1:]) not in values for u in node.users):
        return
    if len(args) not in (2, 3) or type(args[1]) is not int:
        return
    function = torch.amax if str(getattr(node.target, "__name__", node.target)) == "max" else torch.amin
    with graph.inserting_before(node):
        new = graph.call_function(function, args)
    new.meta = dict(node.meta)
    for user in list(node.users):
        user.replace_all_uses_with(new)
        graph.erase_node(user)
    graph.erase_node(node)


def _narrow(graph: fx.Graph, node: fx.Node) -> None:
    """A slice."""
    args: Any = node.args
    if len(args) == 4 and not node.kwargs and all(type(n) is int for n in args[1:]) and min(args[1:]) >= 0:
        _, dim, start, length = args
        with graph.inserting_before(node):
            index = (*[slice(None)] * dim, slice(start, start + length))
            new = graph.call_function(operator.getitem, (args[0], index))
        _swap(graph, node, new)


# By functions, and methods by their names.
_REWRITES: dict[Any, Callable[[fx.Graph, fx.Node], None]] = {
    torch.einsum: _einsum,
    **dict.fromkeys((torch.addcmul, "addcmul"), _addcmul),
    F.glu: _glu,
    **dict.fromkeys((torch.max, torch.min, "max", "min"), _extreme),
    **dict.fromkeys((torch.narrow, "narrow"), _narrow),
}


def _zeros_in_parameters(root: nn.Module, graphs: tuple[fx.Graph, ...]) -> None:
    """A copy of a parameter with a part set to zero is its product with a mask."""
    for graph in graphs:
        order = {node: i for i, node in enumerate(graph.nodes)}
        for node in list(graph.nodes):
            part: Any = node.args[0] if node.op == "call_method" and node.target == "zero_" else None
            if node.users or not isinstance(part, fx.Node) or part.target is not operator.getitem:
                continue
            if len(part.users) > 1 or len(part.all_input_nodes) > 1:
                continue
            copied: Any = part.args[0]
            if copied.op != "call_method" or copied.target != "clone" or copied.args[0].op != "get_attr":
                continue
            path = str(copied.args[0].target)
            owner = root.get_submodule(path.rpartition(".")[0])
            parameter = getattr(owner, path.rpartition(".")[2])
            mask = torch.ones_like(parameter, requires_grad=False)
            index: Any = part.args[1]
            mask[index] = 0
            parent, _, last = path.rpartition(".")[0].rpartition(".")
            name = f"{last}_mask" if last else "mask"
            root.get_submodule(parent).register_buffer(name, mask)
            with graph.inserting_after(node):
                held = graph.get_attr(f"{parent}.{name}" if parent else name)
            with graph.inserting_after(held):
                new = graph.call_function(operator.mul, (copied.args[0], held))
            for user in list(copied.users):
                if order[user] > order[node]:
                    user.replace_input_with(copied, new)
            graph.erase_node(node)
            graph.erase_node(part)


def _tied_heads(root: nn.Module, graphs: tuple[fx.Graph, ...]) -> None:
    """A product with the weight of an embedding, said as a function or with @, is a linear layer beside the embedding
    that shares the weight."""
    made: dict[str, str] = {}
    for graph in graphs:
        for node in list(graph.nodes):
            found = _product(node)
            if found is None:
                continue
            x, weight, bias = found
            path, _, name = str(weight.target).rpartition(".")
            embedding = root.get_submodule(path)
            if type(embedding) is not nn.Embedding or name != "weight":
                continue
            if path not in made:
                parent, _, last = path.rpartition(".")
                owner, new = root.get_submodule(parent), f"{last}_linear"
                while hasattr(owner, new):
                    new += "_"
                with torch.device("meta"):
                    head = nn.Linear(embedding.embedding_dim, embedding.num_embeddings, bias=False)
                head.weight = embedding.weight
                owner.add_module(new, head.train(embedding.training))
                made[path] = f"{parent}.{new}" if parent else new
            with graph.inserting_before(node):
                called = graph.call_module(made[path], (x,))
                called.meta = dict(node.meta)
                if bias is not None:
                    called = graph.call_function(operator.add, (called, bias))
            _swap(graph, node, called)


def _product(node: fx.Node) -> tuple[fx.Node, fx.Node, Any] | None:
    """Input, weight and bias of x @ weight.T + bias, where the weight is a parameter."""
    args: Any = node.args
    if node.op == "call_function" and node.target is F.linear:
        a = _arguments(node)
        x, weight, bias = (a["input"], a["weight"], a["bias"]) if a else (None, None, None)
    elif node.target in (torch.matmul, operator.matmul, "matmul") and len(args) == 2 and not node.kwargs:
        x, turned = args
        if not isinstance(turned, fx.Node) or not _swaps_axes(turned):
            return None
        weight, bias = turned.args[0], None
    else:
        return None
    if not isinstance(x, fx.Node) or not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return None
    return x, weight, bias


def _swaps_axes(node: fx.Node) -> bool:
    """Whether a node transposes a matrix."""
    target: Any = node.target
    rest: Any = node.args[1:]
    if target is getattr:
        return rest[0] in ("T", "mT")
    name = str(target if isinstance(target, str) else target.__name__)
    if name in ("transpose", "swapaxes"):
        return len(rest) == 2 and {d % 2 for d in rest} == {0, 1}
    if name == "permute":
        return tuple(rest[0] if len(rest) == 1 else rest) == (1, 0)
    return name in ("t", "numpy_T.default") and not rest


def _computed_biases(root: nn.Module, graphs: tuple[fx.Graph, ...]) -> None:
    """A linear function whose weight is a layer's and whose bias is computed: the layer without, and an addition."""
    moved: dict[str, str] = {}
    for graph in graphs:
        for node in list(graph.nodes):
            if node.op != "call_function" or node.target is not F.linear:
                continue
            a = _arguments(node)
            weight: Any = a["weight"] if a else None
            bias = a["bias"] if a else None
            if not isinstance(bias, fx.Node) or bias.op == "get_attr" or getattr(weight, "op", "") != "get_attr":
                continue
            path = str(weight.target).rpartition(".")[0]
            owner = root.get_submodule(path)
            if not isinstance(owner, nn.Linear) or not str(weight.target).endswith(".weight"):
                continue
            if owner.bias is not None and not _takes(graphs, path):  # what it is computed from goes beside the layer
                parent, _, last = path.rpartition(".")
                root.get_submodule(parent).register_parameter(f"{last}_bias", owner.bias)
                moved[f"{path}.bias"] = f"{parent}.{last}_bias" if parent else f"{last}_bias"
                owner.register_parameter("bias", None)
            with graph.inserting_before(node):
                product = graph.call_function(F.linear, (node.args[0], weight))
                new = graph.call_function(operator.add, (product, bias))
            _swap(graph, node, new)
    for graph in graphs:
        for node in graph.nodes:
            if node.op == "get_attr":
                node.target = moved.get(str(node.target), node.target)


def _takes(graphs: tuple[fx.Graph, ...], path: str) -> bool:
    """Whether a layer is called with its bias, as a module or by a function."""
    for node in (n for graph in graphs for n in graph.nodes):
        if node.op == "call_module" and node.target == path:
            return True
        if node.op == "call_function" and node.target is F.linear:
            bias: Any = (_arguments(node) or {}).get("bias")
            if isinstance(bias, fx.Node) and bias.op == "get_attr" and bias.target == f"{path}.bias":
                return True
    return False


# Modules without tensors or modes -> the function, and its arguments by the names that the module has them under.
_INTERPOLATE = ("size", "scale_factor", "mode", "align_corners")
_PLAIN_FUNCTIONS: dict[type[nn.Module], tuple[Any, tuple[str, ...]]] = {
    **dict.fromkeys((nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d), (F.interpolate, _INTERPOLATE)),
    nn.ZeroPad2d: (F.pad, ("pad",)),
    nn.GLU: (F.glu, ("dim",)),
    nn.Unfold: (F.unfold, ("kernel_size", "dilation", "padding", "stride")),
    nn.Fold: (F.fold, ("output_size", "kernel_size", "dilation", "padding", "stride")),
}


def _function_for_module(graph: fx.Graph, node: fx.Node, m: nn.Module) -> None:
    function, names = _PLAIN_FUNCTIONS[type(m)]
    if isinstance(m, nn.ZeroPad2d) and min(m.padding) >= 0:  # the artefact holds this one as a layer
        return
    if len(node.args) != 1 or node.kwargs or getattr(m, "recompute_scale_factor", None):
        return
    with graph.inserting_before(node):
        new = graph.call_function(
            function, node.args, {name: getattr(m, "padding" if name == "pad" else name) for name in names}
        )
    _swap(graph, node, new)
    if function in _REWRITES:
        _REWRITES[function](graph, new)


def _drop_path(m: nn.Module) -> DropPath | None:
    """Our layer in the place of another library's stochastic depth, if it does the same with the same random numbers;
    where the two differ in kind, `m` was something else."""
    if type(m).__name__ not in ("StochasticDepth", "DropPath") or type(m) is DropPath:
        return None
    p = getattr(m, "p", getattr(m, "drop_prob", None))
    if not isinstance(p, (int, float)) or not 0 <= p <= 1:
        return None
    ours = DropPath(float(p), getattr(m, "mode", "row") == "row", bool(getattr(m, "scale_by_keep", True)))
    x = torch.ones(64, 2, 3)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for training in (True, False):
            results = []
            for layer in (m, ours):
                torch.manual_seed(0)
                with mode(layer, training):
                    results.append(layer.forward(x.clone()))
            if not torch.equal(*results):
                return None
    return ours.train(m.training)


def _modules_for_functions(root: nn.Module, graphs: tuple[fx.Graph, ...]) -> None:
    """Modules are replaced where a function took their parameters."""
    made: dict[str, nn.Module] = {}
    others: dict[str, list[str]] = {}
    for graph in graphs:
        for node in list(graph.nodes):
            if node.op == "call_function" and node.target in _RULES:
                _replace(root, graphs, node, made, others)
        if made:
            _drop_counters(graph, made)
    _move_children(root, graphs, made)


def _replace(
    root: nn.Module,
    graphs: tuple[fx.Graph, ...],
    node: fx.Node,
    made: dict[str, nn.Module],
    others: dict[str, list[str]],
) -> None:
    rule, names = _RULES[node.target]
    arguments = _arguments(node)
    if arguments is None or not isinstance(arguments["input"], fx.Node):
        return
    own = {n: arguments.get(n) for n in names if arguments.get(n) is not None}
    if not own or any(not isinstance(v, fx.Node) or v.op != "get_attr" for v in own.values()):
        return
    paths = {n: str(v.target).rpartition(".") for n, v in own.items() if isinstance(v, fx.Node)}
    owners = {p[0] for p in paths.values()}
    if len(owners) != 1 or any(p[2] != n for n, p in paths.items()) or "" in owners:
        return
    path = owners.pop()
    owner = root.get_submodule(path)
    with torch.device("meta"):
        plain = rule(owner, arguments)
    if plain is None or not _filled(plain, owner, set(own)):
        return
    called = _settled(root, graphs, path, owner, plain, made, others)
    if called is None:
        return
    with node.graph.inserting_before(node):
        new = node.graph.call_module(called, (arguments["input"],))
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)
    for v in own.values():
        if isinstance(v, fx.Node) and not v.users:
            v.graph.erase_node(v)


def _filled(plain: nn.Module, owner: nn.Module, own: set[str]) -> bool:
    """Give a layer the tensors that the function took, and the counter of a normalisation; whether it has all then."""
    for name, value in (*owner._parameters.items(), *owner._buffers.items()):
        if value is not None and (name in own or name not in ("weight", "bias")) and _tensor(plain, name) is not None:
            setattr(plain, name, value)
    mine = plain.state_dict(keep_vars=True)
    return own <= set(mine) and all(t is _tensor(owner, name) for name, t in mine.items())


def _tensor(m: nn.Module, name: str) -> Any:
    return m._parameters.get(name, m._buffers.get(name))


def _settled(
    root: nn.Module,
    graphs: tuple[fx.Graph, ...],
    path: str,
    owner: nn.Module,
    plain: nn.Module,
    made: dict[str, nn.Module],
    others: dict[str, list[str]],
) -> str | None:
    """The path of a layer like `plain`: in the place of the module that owns its tensors, or, where the graph calls
    that with other arguments, beside it."""
    for known in (path, *others.get(path, ())):
        if _alike(root.get_submodule(known), plain):
            return known
    parent, _, last = path.rpartition(".")
    place = root.get_submodule(parent)
    called = any(n.op == "call_module" and n.target == path for g in graphs for n in g.nodes)
    plain.training = owner.training
    if not called and path not in made:
        left = [n for n in (*owner._parameters, *owner._buffers) if _tensor(plain, n) is not _tensor(owner, n)]
        read = {str(n.target) for g in graphs for n in g.nodes if n.op == "get_attr"}
        if not any(f"{path}.{n}" in read for n in left):
            for name, child in owner.named_children():
                plain.add_module(name, child)
            setattr(place, last, plain)
            made[path] = plain
            return path
    if any(True for _ in plain.buffers()):
        return None  # counted and averaged in two places
    new = f"{last}_other"
    while hasattr(place, new):
        new += "_"
    place.add_module(new, plain)
    others.setdefault(path, []).append(f"{parent}.{new}" if parent else new)
    return others[path][-1]


def _alike(a: nn.Module, b: nn.Module) -> bool:
    """Whether two layers do the same with the same tensors."""
    return (
        type(a) is type(b)
        and a.extra_repr() == b.extra_repr()
        and a._parameters.keys() == b._parameters.keys()
        and all(a._parameters[n] is p for n, p in b._parameters.items())
        and all(_tensor(a, n) is t for n, t in b.named_buffers(recurse=False))
    )


def _move_children(root: nn.Module, graphs: tuple[fx.Graph, ...], made: dict[str, nn.Module]) -> None:
    """Layers inside what is now a layer, such as the activation of a normalisation, go beside it."""
    moved: dict[str, str] = {}
    for path, plain in made.items():
        for name, child in list(plain.named_children()):
            parent, _, last = path.rpartition(".")
            owner, new = root.get_submodule(parent), f"{last}_{name}"
            while hasattr(owner, new):
                new += "_"
            delattr(plain, name)
            owner.add_module(new, child)
            moved[f"{path}.{name}"] = f"{parent}.{new}" if parent else new
    for graph in graphs if moved else ():
        for node in graph.nodes:
            if node.op in ("call_module", "get_attr"):
                node.target = _renamed(str(node.target), moved)


def _renamed(target: str, moved: dict[str, str]) -> str:
    """A path with the part in front that was moved, perhaps more than once, under its new name."""
    at = len(target)
    while at > 0:
        if target[:at] in moved:
            return _renamed(moved[target[:at]] + target[at:], moved)
        at = target.rfind(".", 0, at)
    return target


def _drop_counters(graph: fx.Graph, made: dict[str, nn.Module]) -> None:
    """The module counts its batches by itself."""
    for node in list(graph.nodes):
        if node.op == "get_attr" and str(node.target).endswith(".num_batches_tracked"):
            users = list(node.users)
            if str(node.target).rpartition(".")[0] in made and all(not u.users for u in users):
                for user in users:
                    graph.erase_node(user)
                graph.erase_node(node)
