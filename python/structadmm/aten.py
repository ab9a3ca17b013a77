"""A program of torch.export, a list of ATen operations, said in torch.fx's terms over the modules of the network.

An operation that a module of torch.nn did is a call of this module, one with a module's parameters is the functional
call that `plain` turns into one, the rest are the functions and methods of torch that the rules of tracking know.
Operations in place are not in place.
"""

from __future__ import annotations

import dataclasses
import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._ops import HigherOrderOperator, OpOverload
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from .symbolic import assigned

# Modules that are called as such, where the one operation that they consist of is met.
_LAYERS: dict[str, tuple[type[nn.Module], ...]] = {
    "linear": (nn.Linear,),
    "batch_norm": (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    "instance_norm": (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    "layer_norm": (nn.LayerNorm,),
    "group_norm": (nn.GroupNorm,),
    "rms_norm": (nn.RMSNorm,),
    "embedding": (nn.Embedding,),
    "prelu": (nn.PReLU,),
    **{f"conv{n}d": (c,) for n, c in enumerate((nn.Conv1d, nn.Conv2d, nn.Conv3d), 1)},
    **{
        f"conv_transpose{n}d": (c,)
        for n, c in enumerate((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), 1)
    },
}
# Assertions and bookkeeping, and operations that hand on what they get.
_NOTHING = {"_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range"}
_NOTHING |= {"sym_constrain_range_for_size"}
_SAME = {"alias", "lift_fresh_copy", "lift_fresh", "detach_", "lift"}
# In torch.nn.functional under the same name, with the same arguments in the same order.
_FUNCTIONAL = {f"{kind}_pool{n}d" for kind in ("max", "avg", "adaptive_avg") for n in (1, 2, 3)}
_FUNCTIONAL |= {"linear", "prelu", "group_norm", "layer_norm", "rms_norm", "pixel_shuffle", "pixel_unshuffle", "pad"}
_FUNCTIONAL |= {f"conv{n}d" for n in (1, 2, 3)} | {f"conv_transpose{n}d" for n in (1, 2, 3)}
_FUNCTIONAL |= {"scaled_dot_product_attention", "selu", "celu", "hardshrink", "channel_shuffle"}
_OPERATORS = {"add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv}
_OTHER_NAMES = {"log_sigmoid": "logsigmoid", "_unsafe_view": "reshape", "split_with_sizes": "split"}
_NEW = {f"aten::new_{kind}" for kind in ("zeros", "ones", "full", "empty")}
_FOREVER = 2**63 - 1
# Operations whose result shares memory with their first argument.
_VIEWS = {"view", "reshape", "flatten", "slice", "select", "transpose", "permute", "squeeze", "unsqueeze", "expand"}
_VIEWS |= {"split", "split_with_sizes", "chunk", "unbind", "narrow", "detach", "unflatten", "contiguous", "to", "alias"}
_VIEWS |= {"t", "mT", "view_as", "expand_as", "reshape_as", "_unsafe_view", "movedim", "swapaxes", "diagonal", "unfold"}


@dataclasses.dataclass(frozen=True)
class Slot:
    """The place of a tensor or number in a nested output."""

    index: int


@dataclasses.dataclass(frozen=True)
class Made:
    """A part of the output that is made by calling its class with keywords."""

    cls: type
    fields: dict[str, Any]


class Translation:
    """An exported program as a graph over the modules of `root`."""

    def __init__(
        self, root: nn.Module, program: ExportedProgram, template: Any, n_inputs: int, trains: bool = False
    ) -> None:
        self.root, self.program = root, program
        self.trains = trains  # functional dropout drops, whatever the program says
        self.graph = fx.Graph()
        # The value of every ATen node; after an operation in place, what it left there.
        self.env: dict[fx.Node, Any] = {}
        # Views by slices: the tensor that they are of, and their index.
        self.views: dict[fx.Node, tuple[fx.Node, list[Any]]] = {}
        self.order = {n: i for i, n in enumerate(program.graph.nodes)}
        self.paths: dict[int, str] = {}
        for path, m in root.named_modules():
            self.paths.setdefault(id(m), path)
        self.owners: dict[int, list[str]] = {}
        for path, m in root.named_modules():
            for name, t in (*m._parameters.items(), *m._buffers.items()):
                if t is not None:
                    self.owners.setdefault(id(t), []).append(f"{path}.{name}" if path else name)
        self._placeholders(program, n_inputs)
        self._nodes(program.graph, program.graph_module)
        self._output(program, template)

    def _placeholders(self, program: ExportedProgram, n_inputs: int) -> None:
        lifted = {}
        names = iter(_names(self.root, n_inputs))
        for spec in program.graph_signature.input_specs:
            lifted[getattr(spec.arg, "name", "")] = spec
        for node in program.graph.nodes:
            if node.op != "placeholder":
                continue
            spec = lifted[node.name]
            if spec.kind is InputKind.USER_INPUT:
                self.env[node] = self.graph.placeholder(next(names))
            elif spec.target is not None:
                self.env[node] = self._stored(spec.target)

    def _stored(self, target: str) -> _Stored:
        value: Any = self.root
        try:
            for part in target.removeprefix("network.").split("."):
                value = getattr(value, part)
            return _Stored(value)
        except AttributeError:  # a constant in the code of forward
            return _Stored(self.program.constants[target].clone(), constant=True)

    def _read(self, value: Any, node: fx.Node) -> Any:
        """An argument as a node of the new graph; parameters by the name that the calling module has for them."""
        if not isinstance(value, _Stored):
            return value
        t = value.value
        names = self.owners.get(id(t), [])
        home = self._home(node)
        here = next((n for n in names if home is not None and n.rpartition(".")[0] == home), None)
        name = here or (names[0] if names else None)
        return self.graph.get_attr(self._constant(t) if name is None else name)

    def _constant(self, t: Tensor) -> str:
        """The name of a buffer with these values: those that the network's other mode made, or a new one."""
        number = 0
        while hasattr(self.root, name := f"constant_{number}"):
            known = getattr(self.root, name)
            if isinstance(known, Tensor) and known.dtype == t.dtype and torch.equal(known, t):
                return name
            number += 1
        self.root.register_buffer(name, t.detach().clone())
        return name

    def _home(self, node: fx.Node) -> str | None:
        """The path of the module that did an operation."""
        stack = list(node.meta.get("nn_module_stack", {}).values())
        path = str(stack[-1][0]).partition("@")[0] if stack else "network"
        if path != "network" and not path.startswith("network."):
            return None
        try:
            module = self.root.get_submodule(path.removeprefix("network").removeprefix("."))
        except AttributeError:
            return None
        return self.paths.get(id(module))

    def _nodes(self, graph: fx.Graph, owner: nn.Module) -> None:
        for node in graph.nodes:
            if node.op == "get_attr":
                value: Any = owner
                for part in str(node.target).split("."):
                    value = getattr(value, part)
                self.env[node] = value if isinstance(value, nn.Module) else _Stored(value)
            elif node.op == "call_function":
                self._call(node)

    def _call(self, node: fx.Node) -> None:
        target: Any = node.target
        if not isinstance(target, OpOverload):
            if str(target) == "wrap_with_set_grad_enabled":
                self._inside(node, node.args[1], node.args[2:])
                return
            if str(target) == "wrap_with_autocast" and not node.args[2]:  # a block without autocast
                self._inside(node, node.args[4], node.args[5:])
                return
            if isinstance(target, HigherOrderOperator):
                blocks = [self.env[n] for n in node.all_input_nodes if isinstance(self.env.get(n), nn.Module)]
                lines = [line_of(n) for block in blocks for n in getattr(block, "graph", fx.Graph()).nodes]
                raise Unsaid(f"{target}{next(filter(None, lines), line_of(node))}: not followed")
            given: Any = node.args
            if target is operator.getitem and isinstance(found := self.env.get(given[0]), (list, _Stored)):
                value = found.value if isinstance(found, _Stored) else found
                self.env[node] = value[given[1]] if isinstance(found, list) else _Stored(value[given[1]], True)
                return
            self._emit(node, target, *self._mapped(node, (node.args, node.kwargs)))
            return
        name = target._schema.name.partition("::")[2]
        if name in _NOTHING:
            return
        if name in _SAME:
            self.env[node] = self.env[node.all_input_nodes[0]]
            return
        if target.namespace == "structadmm_trace":
            self._leaf(node, name)
            return
        if self._folded(node, target):
            return
        named = self._arguments(node, target)
        if name.endswith("_") and target._schema.is_mutable:
            self._in_place(node, name, target, named)
            return
        self._view(node, name, named)
        if name == "slice" and _slice(named) == slice(None):
            self.env[node] = self.env[named["self"]]
            return
        if name.startswith("adaptive_max_pool") and not any(
            u.args[1] == 1 and u.users for u in node.users
        ):  # nobody takes the indices
            self._emit(node, getattr(F, name), (self._mapped(node, named["self"]), named["output_size"]))
            self.env[node] = [self.env[node], None]
            return
        x = named["indices"] if name == "embedding" else named.get("input", named.get("self"))
        layer = self._layer(node, x, name, named)
        if layer is not None:
            self._emit(node, layer, (self._mapped(node, x),), {}, "call_module")
            return
        self._emit(node, *self._said(node, name, target, self._mapped(node, named)))

    def _leaf(self, node: fx.Node, name: str) -> None:
        """The call of a module that left one operation."""
        args: Any = self._mapped(node, node.args)
        if name == "module":
            x, path = args
            self._emit(node, path, (x,), op="call_module")
            return
        x, start, path, *_ = args
        lstm = isinstance(self.root.get_submodule(path), nn.LSTM)
        self._emit(node, path, (x, *([tuple(start) if lstm else start[0]] if start else [])), op="call_module")
        called = self.env[node]
        y, last = (self.graph.call_function(operator.getitem, (called, i)) for i in (0, 1))
        states = [self.graph.call_function(operator.getitem, (last, i)) for i in (0, 1)] if lstm else [last]
        self.env[node] = [y, *states]

    def _folded(self, node: fx.Node, target: OpOverload) -> bool:
        """Constants made of constants are computed, in place too, as torch.fx's tracers do."""
        sources = [self.env.get(n) for n in node.all_input_nodes]
        constant = all(isinstance(s, _Stored) and s.constant for s in sources)
        name = target._schema.name
        if torch.Tag.nondeterministic_seeded in target.tags or target.namespace != "aten":
            return False
        args, kwargs = node.args, node.kwargs
        if name in _NEW and len(sources) == 1:  # of the first argument only its type counts
            like = node.meta["val"]
            args = (torch.empty(0, dtype=like.dtype, device=like.device), *node.args[1:])
        elif not constant:
            return False
        args, kwargs = fx.node.map_arg((args, kwargs), lambda n: self.env[n].value)
        with torch.no_grad():
            found = target(*args, **kwargs)
        self.env[node] = _Stored(found, constant=True)
        return True

    def _inside(self, node: fx.Node, body: Any, operands: Any) -> None:
        """The operations of a block, such as that of torch.no_grad."""
        module = self.env[body]
        names = [n for n in module.graph.nodes if n.op == "placeholder"]
        for inner, outer in zip(names, operands, strict=True):
            self.env[inner] = self.env[outer] if isinstance(outer, fx.Node) else outer
        self.order.update({n: self.order[node] for n in module.graph.nodes})
        self._nodes(module.graph, module)
        returned = next(n for n in module.graph.nodes if n.op == "output").args[0]
        self.env[node] = [self.env[v] if isinstance(v, fx.Node) else v for v in returned]

    def _arguments(self, node: fx.Node, target: OpOverload) -> dict[str, Any]:
        """Arguments by the names of the schema, the defaults too."""
        schema = target._schema.arguments
        given = dict(zip((a.name for a in schema), node.args, strict=False)) | dict(node.kwargs)
        return {a.name: given.get(a.name, a.default_value if a.has_default_value() else None) for a in schema}

    def _mapped(self, node: fx.Node, value: Any) -> Any:
        return fx.node.map_arg(value, lambda n: self._read(self.env[n], node))

    def _emit(self, node: fx.Node, target: Any, args: Any, kwargs: Any = None, op: str = "") -> None:
        op = op or ("call_method" if isinstance(target, str) else "call_function")
        new = self.graph.create_node(op, target, tuple(args), kwargs or {}, name=node.name)
        if node.meta.get("stack_trace"):
            new.meta["stack_trace"] = node.meta["stack_trace"]
        self.env[node] = new

    # Operations in place

    def _view(self, node: fx.Node, name: str, a: dict[str, Any]) -> None:
        source = a.get("self")
        if name not in _VIEWS or not isinstance(source, fx.Node):
            return
        base, index = self.views.get(source, (source, []))
        rank = source.meta["val"].dim() if "val" in source.meta else 0
        if name not in ("slice", "select") or index is None:
            self.views[node] = (base, None)  # type: ignore[assignment]
            return
        index = list(index) or [slice(None)] * rank
        free = [i for i, e in enumerate(index) if isinstance(e, slice)]
        at = free[a["dim"] % len(free)]
        entry = a["index"] if name == "select" else _slice(a)
        if entry == slice(None):
            self.views[node] = (base, index)
        elif index[at] == slice(None):
            index[at] = entry
            self.views[node] = (base, index)
        else:
            self.views[node] = (base, None)  # type: ignore[assignment]

    def _in_place(self, node: fx.Node, name: str, target: OpOverload, a: dict[str, Any]) -> None:
        """The operation as one that is not, whose result all that comes after sees in the tensor's place."""
        destination = a["self"]
        stored = self.env[destination]
        if (
            isinstance(stored, _Stored) and not stored.constant
        ):  # a counter, a running value: nothing that evaluation reads
            self.env[node] = stored
            return
        mapped = self._mapped(node, a)
        if name in ("copy_", "fill_", "zero_"):
            value = mapped.get("src", mapped.get("value", 0))
            self._emit(node, assigned, (mapped["self"], ..., value))
        elif name in ("index_put_", "_index_put_impl_") and not mapped.get("accumulate"):
            index = tuple(slice(None) if i is None else i for i in mapped["indices"])
            self._emit(node, assigned, (mapped["self"], index, mapped["values"]))
        else:
            self._emit(node, *self._said(node, name[:-1], target, mapped))
        new = self.env[node]
        base, index_of = self.views.get(destination, (destination, []))
        now = self.order[node]
        chain = {destination, node}
        at = destination
        while at is not base and isinstance(at, fx.Node):
            chain.add(at)
            at = at.args[0]
        if base is not destination:
            later = [u for u in base.users if self.order.get(u, -1) > now]
            if index_of is None and later:
                raise Unsaid(f"{name}{line_of(node)}: overwrites a view of a tensor that is used later")
            if later or base.op == "placeholder":
                self._put(node, base, index_of, new)
        for view, (origin, _) in self.views.items():
            if origin is base and view not in chain and any(self.order.get(u, -1) > now for u in view.users):
                raise Unsaid(f"{name}{line_of(node)}: overwrites a tensor of which a view is used later")
        self.env[destination] = self.env[node] = new

    def _put(self, node: fx.Node, base: fx.Node, index: list[Any], value: Any) -> None:
        old = self.env[base]
        entries = self._mapped(node, tuple(index))
        whole = value.target is assigned and value.args[1] is ...
        put = value.args[2] if whole else value
        self.env[base] = self.graph.call_function(assigned, (old, entries, put))

    # What an operation is in terms of torch

    def _said(self, node: fx.Node, name: str, target: OpOverload, a: dict[str, Any]) -> tuple[Any, ...]:
        """Target, positional and keyword arguments, and the kind of node where it is none of a function or method."""
        if name in ("dropout", "feature_dropout", "alpha_dropout"):
            function: Any = F.alpha_dropout if name == "alpha_dropout" else F.dropout
            if name == "feature_dropout":
                function = {3: F.dropout1d, 5: F.dropout3d}.get(node.meta["val"].dim(), F.dropout2d)
            return function, (a["input"], a["p"], a["train"] or self.trains), {}
        special = _SAID.get(name)
        if special is not None:
            found = special(a)
            if found is not None:
                return found
        names = [arg for arg in target._schema.arguments]
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for arg in names:
            if arg.kwarg_only:
                if a[arg.name] is not None and not (arg.has_default_value() and a[arg.name] == arg.default_value):
                    kwargs[arg.name] = a[arg.name]
            else:
                args.append(a[arg.name])
        positional = [arg for arg in names if not arg.kwarg_only]
        while args and positional[-1].has_default_value() and _same(args[-1], positional[-1].default_value):
            args.pop()
            positional.pop()
        kwargs.pop("pin_memory", None)
        if kwargs.get("layout") == torch.strided:
            kwargs.pop("layout")
        return self._function(name, target), tuple(args), kwargs

    def _layer(self, node: fx.Node, x: Any, name: str, a: dict[str, Any]) -> str | None:
        """The path of the module of torch.nn whose forward is this operation on x, and nothing else."""
        home = self._home(node)
        layer: Any = self.root.get_submodule(home) if home else None
        if type(layer) not in _LAYERS.get(name, ()):
            return None
        own = {id(t) for t in (*layer.parameters(recurse=False), *layer.buffers(recurse=False))}
        stored = [self.env[n] for n in node.all_input_nodes if n is not x and isinstance(self.env.get(n), _Stored)]
        if not all(id(s.value) in own for s in stored) or getattr(layer, "padding_mode", "zeros") != "zeros":
            return None
        if "transpose" in name and tuple(a["output_padding"]) != layer.output_padding:
            return None
        return None if getattr(layer, "max_norm", None) is not None else home

    def _function(self, name: str, target: OpOverload) -> Any:
        name = _OTHER_NAMES.get(name, name)
        if target.namespace != "aten":
            return target
        if name in _FUNCTIONAL or (hasattr(F, name) and not hasattr(torch, name)):
            return getattr(F, name)
        if hasattr(torch, name) and callable(getattr(torch, name)):
            return getattr(torch, name)
        return name if callable(getattr(Tensor, name, None)) else target

    def _output(self, program: ExportedProgram, template: Any) -> None:
        node = next(n for n in program.graph.nodes if n.op == "output")
        results = list(node.args[0])
        skip = len(results) - _slots(template)
        leaves = [self._read(self.env[n], node) if isinstance(n, fx.Node) else n for n in results[skip:]]
        self.graph.output(self._filled(template, leaves))

    def _filled(self, template: Any, leaves: list[Any]) -> Any:
        if isinstance(template, Slot):
            return leaves[template.index]
        if isinstance(template, Made):
            fields = {k: self._filled(v, leaves) for k, v in template.fields.items()}
            if all(isinstance(k, str) for k in fields):
                return self.graph.call_function(template.cls, (), fields)
            return fields
        if isinstance(template, dict):
            return {k: self._filled(v, leaves) for k, v in template.items()}
        if isinstance(template, (tuple, list)):
            items = [self._filled(v, leaves) for v in template]
            return type(template)(*items) if hasattr(template, "_fields") else type(template)(items)
        return template


def _names(root: nn.Module, count: int) -> list[str]:
    """What forward calls its inputs."""
    parameters = list(inspect.signature(root.forward).parameters.values())
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][:count]
    rest = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), "inputs")
    return [*positional, *(f"{rest}_{i}" for i in range(count - len(positional)))]


@dataclasses.dataclass(frozen=True, eq=False)
class _Stored:
    """A parameter, buffer or other tensor of the network; or a constant, which is known as it is."""

    value: Any
    constant: bool = False


class Unsaid(Exception):
    """An operation that can't be said in terms of torch.fx."""


def _slots(template: Any) -> int:
    if isinstance(template, Slot):
        return 1
    if isinstance(template, Made):
        return _slots(template.fields)
    values = template.values() if isinstance(template, dict) else template
    return sum(map(_slots, values)) if isinstance(template, (dict, tuple, list)) else 0


def line_of(node: fx.Node) -> str:
    """The source line that an operation comes from."""
    trace = str(node.meta.get("stack_trace") or "").strip().splitlines()
    files = [i for i, line in enumerate(trace) if line.strip().startswith("File ") and "/torch/nn/" not in line]
    if not files:
        return ""
    where = trace[files[-1]].strip().split('"')
    number = where[2].split("line ")[1].split(",")[0]
    source = trace[files[-1] + 1].strip() if files[-1] + 1 < len(trace) else ""
    return f" at {where[1]}:{number} `{source}`"


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, fx.Node) or isinstance(b, fx.Node):
        return a is b
    return bool(type(a) is type(b) and a == b)


def _slice(a: dict[str, Any]) -> slice:
    start, end, step = a["start"], a["end"], a["step"]
    start = None if isinstance(start, int) and start == 0 else start
    end = None if isinstance(end, int) and end == _FOREVER else end
    return slice(start, end, None if isinstance(step, int) and step == 1 else step)


def _binary(a: dict[str, Any], function: Callable[..., Any], swap: bool = False) -> tuple[Any, ...] | None:
    alpha = a.get("alpha", 1)
    if not (isinstance(alpha, (int, float)) and alpha == 1) or a.get("rounding_mode") is not None:
        return None
    pair = (a["self"], a["other"])
    return function, pair[::-1] if swap else pair, {}


def _getitem_slice(a: dict[str, Any]) -> tuple[Any, ...] | None:
    if a["dim"] < 0:
        return operator.getitem, (a["self"], (..., _slice(a), *[slice(None)] * (-a["dim"] - 1))), {}
    return operator.getitem, (a["self"], (*[slice(None)] * a["dim"], _slice(a))), {}


def _getitem_select(a: dict[str, Any]) -> tuple[Any, ...]:
    if a["dim"] < 0:
        return operator.getitem, (a["self"], (..., a["index"], *[slice(None)] * (-a["dim"] - 1))), {}
    return operator.getitem, (a["self"], (*[slice(None)] * a["dim"], a["index"])), {}


def _index(a: dict[str, Any]) -> tuple[Any, ...]:
    return operator.getitem, (a["self"], tuple(slice(None) if i is None else i for i in a["indices"])), {}


def _batch_norm(a: dict[str, Any]) -> tuple[Any, ...]:
    names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    return F.batch_norm, tuple(a[n] for n in names), {}


def _instance_norm(a: dict[str, Any]) -> tuple[Any, ...]:
    names = ("input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps")
    return F.instance_norm, tuple(a[n] for n in names), {}


def _first(function: Callable[..., Any], *names: str) -> Callable[[dict[str, Any]], tuple[Any, ...]]:
    """A function that takes these of the operation's arguments, in this order."""
    return lambda a: (function, tuple(a[n] for n in names), {})


def _pool(function: Callable[..., Any]) -> Callable[[dict[str, Any]], tuple[Any, ...]]:
    def said(a: dict[str, Any]) -> tuple[Any, ...]:
        args = [None if n == "stride" and v == [] else v for n, v in a.items()]
        return function, tuple(args), {}

    return said


def _upsample(how: str) -> Callable[[dict[str, Any]], tuple[Any, ...] | None]:
    def said(a: dict[str, Any]) -> tuple[Any, ...] | None:
        if "scale_factors" not in a:
            return None
        corners = {"align_corners": a["align_corners"]} if "align_corners" in a else {}
        scales = a["scale_factors"]
        chosen = {"size": a["output_size"]} if scales is None else {"scale_factor": tuple(scales)}
        return F.interpolate, (a["input"],), {**chosen, "mode": how, **corners}

    return said


def _to(a: dict[str, Any]) -> tuple[Any, ...]:
    options = {n: a[n] for n in ("device", "dtype") if a.get(n) is not None}
    if a.get("other") is not None:
        return "to", (a["self"], a["other"]), {}
    return "to", (a["self"],), options


# What is said otherwise in torch than in ATen. None from one of these: as the general rule says it.
_SAID: dict[str, Callable[[dict[str, Any]], tuple[Any, ...] | None]] = {
    **{name: (lambda a, f=f: _binary(a, f)) for name, f in _OPERATORS.items()},  # type: ignore[misc]
    **{f"{kind}_pool{n}d": _pool(getattr(F, f"{kind}_pool{n}d")) for kind in ("max", "avg") for n in (1, 2, 3)},
    "rsub": lambda a: _binary(a, operator.sub, swap=True),
    "slice": _getitem_slice,
    "select": _getitem_select,
    "index": _index,
    "sym_size": lambda a: ("size", (a["self"], a["dim"]), {}) if "dim" in a else ("size", (a["self"],), {}),
    "mT": lambda a: (torch.transpose, (a["self"], -2, -1), {}),
    "batch_norm": _batch_norm,
    "instance_norm": _instance_norm,
    "layer_norm": _first(F.layer_norm, "input", "normalized_shape", "weight", "bias", "eps"),
    "group_norm": _first(F.group_norm, "input", "num_groups", "weight", "bias", "eps"),
    "linalg_vector_norm": _first(torch.linalg.vector_norm, "self", "ord", "dim", "keepdim"),
    "embedding": _first(F.embedding, "indices", "weight"),
    "constant_pad_nd": lambda a: (F.pad, (a["self"], tuple(a["pad"]), "constant", a["value"]), {}),
    "pad": lambda a: (F.pad, (a["self"], tuple(a["pad"]), a["mode"], a["value"]), {}),
    "softmax": lambda a: (torch.softmax, (a["self"], a["dim"]), {"dtype": a["dtype"]} if a.get("dtype") else {}),
    "to": _to,
    "_to_copy": _to,
    **{f"upsample_nearest{n}d": _upsample("nearest") for n in (1, 2, 3)},
    **{f"_upsample_nearest_exact{n}d": _upsample("nearest-exact") for n in (1, 2, 3)},
    "upsample_linear1d": _upsample("linear"),
    "upsample_bilinear2d": _upsample("bilinear"),
    "upsample_trilinear3d": _upsample("trilinear"),
    "upsample_bicubic2d": _upsample("bicubic"),
}
