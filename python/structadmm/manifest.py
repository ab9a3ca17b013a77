"""The structure of a network as JSON values: layers, attributes and graph, by the allow-list of allowed.py.

`structure` writes it, `build` reads it and trusts none of it: names, kinds, configurations and references are checked
before a layer is made. csrc/format/FORMAT.md describes the fields.
"""

from __future__ import annotations

import keyword
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from .allowed import FUNCTIONS, KINDS, METHODS, Config, Kind, Refused, refuse
from .errors import ArtefactError

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

BY_NAME = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

_PATH = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")

_FUNCTION_NAMES = {function: name for name, function in reversed(FUNCTIONS.items())}

_KIND_NAMES = {kind.cls: name for name, kind in KINDS.items()}

# Names that a module, or the GraphModule around it, has already.
_TAKEN = frozenset(dir(fx.GraphModule(nn.Module(), fx.Graph())))

Manifest = dict[str, Any]


def _encode(value: Any) -> Any:
    """An argument of a node as JSON: scalars and lists as they are, everything else as an object with one typed key."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": str(float(value))}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, tuple):
        return {"tuple": [_encode(v) for v in value]}
    if isinstance(value, list):
        return [_encode(v) for v in value]
    if isinstance(value, slice):
        return {"slice": [_encode(v) for v in (value.start, value.stop, value.step)]}
    if isinstance(value, dict) and all(isinstance(k, str) for k in value):
        return {"dict": [[k, _encode(v)] for k, v in value.items()]}
    if isinstance(value, torch.dtype) and value in DTYPES:
        return {"dtype": str(value).removeprefix("torch.")}
    if value is Ellipsis:
        return {"ellipsis": True}
    raise refuse("an argument", value, "numbers, strings, tensors, and tuples, lists, slices of them")


def _target(node: fx.Node) -> str:
    """The allow-list's name of what a node does. Raises Refused."""
    if node.op == "call_function":
        name = _FUNCTION_NAMES.get(node.target)  # type: ignore[arg-type]
        if name is None:
            shown = f"{getattr(node.target, '__module__', '')}.{getattr(node.target, '__qualname__', node.target)}"
            raise refuse("function", shown, "one of the functions in structadmm/allowed.py")
        return name
    if node.op == "call_method" and node.target not in METHODS:
        raise refuse("method", f"Tensor.{node.target}", "one of the methods in structadmm/allowed.py")
    return str(node.target)


def _where(node: fx.Node) -> str:
    """A node as the user knows it: its name, the module that it is in, the source line where tracing recorded one."""
    inside = list((node.meta.get("nn_module_stack") or {}).values())[-1:]
    place = "".join(f" in {path} ({getattr(cls, '__name__', cls)})" for path, cls in inside if path)
    frames = re.findall(r'File "(.*)", line (\d+), in .*\n\s*(.*)', node.stack_trace or "")
    own = [f" at {file}:{line} `{code}`" for file, line, code in frames if not file.startswith(_TORCH)][-1:]
    return f"node {node.name}{place}{''.join(own)}"


_TORCH = os.path.dirname(torch.__file__) + os.sep  # other packages begin with "torch" too

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def _layer(module: nn.Module) -> tuple[str, Config]:
    """Kind and configuration of a layer. Raises Refused."""
    name = _KIND_NAMES.get(type(module))
    if name is None:
        shown = f"{type(module).__module__}.{type(module).__qualname__}"
        raise refuse("layer", shown, "one of the layers in structadmm/allowed.py")
    if any(getattr(module, hooks, None) for hooks in _HOOKS):
        raise refuse("layer", "one with hooks", "hooks removed: a file cannot hold them")
    config = KINDS[name].read(module)
    KINDS[name].check_tensors(config, dict(state_of(module)))
    return name, config


def state_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers that belong to this module itself, with detached values."""
    for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
        if tensor is not None and name not in module._non_persistent_buffers_set:
            yield name, tensor.detach()


def structure(module: fx.GraphModule) -> Manifest:
    """Layers and graph of a GraphModule as JSON values, without its tensors.

    Raises ArtefactError: an operation outside the allow-list, with the node and its source line.
    """
    modules: dict[str, Any] = {}
    attributes: dict[str, Any] = {}
    graph: list[Any] = []
    if type(module.graph._codegen) is not fx.graph.CodeGen:
        raise ArtefactError("save: module got a graph with nested arguments, wanted one traced by structadmm.trace")
    for node in module.graph.nodes:
        try:
            target = _target(node)
            row: dict[str, Any] = {"name": node.name, "op": node.op}
            if node.op not in ("output",):
                row["target"] = target
            if node.op == "call_module" and target not in modules:
                kind, config = _layer(module.get_submodule(target))
                modules[target] = {"kind": kind, "config": config}
            if node.op == "get_attr":
                value = tensor_at(module, target)
                if not isinstance(value, Tensor) or value.dtype not in DTYPES:
                    raise refuse("attribute", getattr(value, "dtype", type(value).__name__), "a tensor")
                attributes[target] = _tensor_row(value)
            if node.args:
                row["args"] = [_encode(a) for a in node.args]
            if node.kwargs:
                row["kwargs"] = {k: _encode(v) for k, v in node.kwargs.items()}
            _check_row(row)
        except Refused as e:
            raise ArtefactError(f"save: {_where(node)}: {e}") from None
        graph.append(row)
    own = {path: row for path, row in attributes.items() if path.rpartition(".")[0] not in modules}
    return {"name": type(module).__name__, "modules": modules, "attributes": own, "graph": graph}


def _tensor_row(t: Tensor) -> dict[str, Any]:
    return {"shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch.")}


def tensor_at(module: nn.Module, path: str) -> Any:
    owner, _, name = path.rpartition(".")
    return getattr(module.get_submodule(owner), name)


def need(ok: bool, what: str, got: object, wanted: str) -> None:
    if not ok:
        raise refuse(what, got, wanted)


ATTRIBUTES = ("shape", "dtype", "device")  # what getattr may ask for

_OPS = ("placeholder", "call_module", "call_function", "call_method", "get_attr", "output")

_TAGS: dict[str, Callable[[Any], bool]] = {
    "node": lambda v: isinstance(v, str),
    "float": lambda v: v in ("inf", "-inf", "nan"),
    "tuple": lambda v: isinstance(v, list),
    "slice": lambda v: isinstance(v, list) and len(v) == 3,
    "dict": lambda v: (
        isinstance(v, list) and all(isinstance(p, list) and len(p) == 2 and isinstance(p[0], str) for p in v)
    ),
    "dtype": lambda v: isinstance(v, str) and v in BY_NAME,
    "ellipsis": lambda v: v is True,
}


def _decode(value: Any, nodes: Mapping[str, fx.Node]) -> Any:
    """Undo `_encode`; nodes are those that came before. Raises Refused."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (int, float)):
        need(abs(value) < 2**63, "a number", value, "less than 2^63")
        return value
    if isinstance(value, list):
        return [_decode(v, nodes) for v in value]
    need(
        isinstance(value, dict) and len(value) == 1, "an argument", value, "a scalar, a list, or an object with one key"
    )
    ((tag, inner),) = value.items()
    need(tag in _TAGS and _TAGS[tag](inner), "an argument", value, f"one of the forms {', '.join(_TAGS)}")
    if tag == "node":
        need(inner in nodes, "reference", inner, "the name of an earlier node")
        return nodes[inner]
    if tag == "float":
        return float(inner)
    if tag == "tuple":
        return tuple(_decode(v, nodes) for v in inner)
    if tag == "slice":
        return slice(*(_decode(v, nodes) for v in inner))
    if tag == "dict":
        return {k: _decode(v, nodes) for k, v in inner}
    if tag == "dtype":
        return BY_NAME[inner]
    return Ellipsis


def _is_identifier(name: Any) -> bool:
    return isinstance(name, str) and _IDENTIFIER.fullmatch(name) is not None and not keyword.iskeyword(name)


def _check_row(row: Any) -> None:
    """One node by itself: known fields, an allowed operation, names that are only names. Raises Refused.

    torch.fx turns a graph into Python source, so a name that is more than an identifier would be code.
    """
    need(isinstance(row, dict), "node", row, "an object")
    need(
        set(row) <= {"name", "op", "target", "args", "kwargs"}, "fields", sorted(row), "name, op, target, args, kwargs"
    )
    name, op, target = row.get("name"), row.get("op"), row.get("target")
    args, kwargs = row.get("args", []), row.get("kwargs", {})
    need(_is_identifier(name), "name", name, "an identifier")
    need(isinstance(op, str) and op in _OPS, "op", op, f"one of {', '.join(_OPS)}")
    need(isinstance(args, list), "args", args, "a list")
    need(
        isinstance(kwargs, dict) and all(map(_is_identifier, kwargs)),
        "kwargs",
        kwargs,
        "an object with identifiers as keys",
    )
    if op == "placeholder":
        need(_is_identifier(target) and target != "self", "target", target, "an identifier")
        constant = all(v is None or isinstance(v, (bool, int, float, str)) for v in args)
        need(len(args) <= 1 and constant and not kwargs, "args", args, "at most a default value")
    elif op == "output":
        need(target is None and len(args) == 1 and not kwargs, "args", args, "what the network returns")
    elif op == "get_attr":
        need(not args and not kwargs, "args", args, "none")
    elif op == "call_function":
        need(isinstance(target, str) and target in FUNCTIONS, "function", target, "one in the allow-list")
        if target == "getattr":
            fits = len(args) == 2 and isinstance(args[0], dict) and args[1] in ATTRIBUTES and not kwargs
            need(fits, "getattr", args, f"a node and one of {', '.join(ATTRIBUTES)}")
        if str(target).startswith("operator.i"):
            need(bool(args) and isinstance(args[0], dict), "args", args, "a node first")
    elif op == "call_method":
        need(isinstance(target, str) and target in METHODS, "method", target, "one in the allow-list")
        need(bool(args) and isinstance(args[0], dict) and "node" in args[0], "args", args, "a node first")
    if op in ("call_module", "get_attr"):
        _check_path(target)


def _check_path(path: Any) -> None:
    need(isinstance(path, str) and _PATH.fullmatch(path) is not None, "path", path, "names joined by dots")
    taken = [part for part in path.split(".") if part in _TAKEN]
    need(not taken, "path", path, f"no part named {', '.join(taken)}, which torch.nn.Module has already")


def build(spec: Manifest) -> tuple[fx.GraphModule, dict[str, tuple[Kind, Config]]]:
    """The network of a structure, on the meta device, its attributes absent. Raises Refused."""
    modules, attributes, rows = spec.get("modules"), spec.get("attributes"), spec.get("graph")
    need(_is_identifier(spec.get("name")), "name", spec.get("name"), "an identifier")
    need(isinstance(modules, dict), "modules", modules, "an object")
    need(isinstance(attributes, dict), "attributes", attributes, "an object")
    need(isinstance(rows, list), "graph", rows, "a list")
    assert isinstance(modules, dict) and isinstance(attributes, dict) and isinstance(rows, list)

    layers: dict[str, tuple[Kind, Config]] = {}
    root = nn.Module()
    for path, row in modules.items():
        try:
            _check_path(path)
            need(isinstance(row, dict) and set(row) == {"kind", "config"}, "layer", row, "kind and config")
            need(isinstance(row["kind"], str) and row["kind"] in KINDS, "layer", row["kind"], "one in the allow-list")
            kind = KINDS[row["kind"]]
            kind.check_config(row["config"])
            layers[path] = (kind, row["config"])
            _attach(root, path, kind.build(row["config"]))
        except Refused as e:
            raise Refused(f"layer {path}: {e}") from None
        except (ValueError, TypeError, RuntimeError, OverflowError) as e:
            raise Refused(f"layer {path}: config got {row['config']}, wanted one that torch accepts: {e}") from None
    for path, row in attributes.items():
        _check_path(path)
        check_tensor_row(f"attribute {path}", row)
        _attach(root, path, None)

    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for row in rows:
        try:
            _check_row(row)
            op, name, target = row["op"], row["name"], row.get("target")
            need(name not in nodes, "name", name, "another name than an earlier node's")
            if op == "call_module":
                need(target in layers, "target", target, "a layer of the file")
            if op == "get_attr":
                owner, _, leaf = target.rpartition(".")
                held = owner in layers and leaf in layers[owner][0].tensors(layers[owner][1])
                need(held or target in attributes, "target", target, "a tensor of the file")
            args = tuple(_decode(a, nodes) for a in row.get("args", []))
            kwargs = {k: _decode(v, nodes) for k, v in row.get("kwargs", {}).items()}
        except Refused as e:
            raise Refused(f"node {row.get('name') if isinstance(row, dict) else row}: {e}") from None
        if op == "call_function":
            target = FUNCTIONS[target]
        nodes[name] = graph.create_node(op, "output" if op == "output" else target, args, kwargs, name)
    ops = Counter(n.op for n in graph.nodes)
    need(ops["output"] == 1 and rows[-1]["op"] == "output", "graph", f"{ops['output']} outputs", "one, at the end")
    late = [r["name"] for a, r in zip(rows, rows[1:], strict=False) if a["op"] != "placeholder" == r["op"]]
    need(not late, "graph", f"placeholder {late[:1]}", "placeholders first")
    called = {n.target for n in graph.nodes if n.op == "call_module"}
    unused = [path for path in layers if path not in called]
    need(not unused, "layers", unused, "only layers that the graph calls")
    try:
        return fx.GraphModule(root, graph, spec["name"]), layers
    except Exception as e:  # torch.fx compiled what the checks above let through
        raise Refused(f"graph got {type(e).__name__}: {e}, wanted one that torch.fx accepts") from None


def _attach(root: nn.Module, path: str, leaf: nn.Module | None) -> None:
    """Put a layer (or the stand-in of an attribute) at a path, with empty containers on the way. Raises Refused."""
    owner = root
    *parents, last = path.split(".")
    for part in parents:
        if part not in owner._modules:
            need(part not in owner._buffers, "path", path, "a path that passes through no tensor")
            owner.add_module(part, nn.Module())
        owner = owner._modules[part]  # type: ignore[assignment]
        need(type(owner) is nn.Module, "path", path, "a path that passes through no layer")
    need(last not in owner._modules and last not in owner._buffers, "path", path, "one that is not in use")
    if leaf is not None:
        owner.add_module(last, leaf)
    else:
        owner.register_buffer(last, torch.empty(0, device="meta"))


def check_tensor_row(what: str, row: Any) -> tuple[tuple[int, ...], torch.dtype]:
    need(isinstance(row, dict) and set(row) == {"shape", "dtype"}, what, row, "shape and dtype")
    shape, dtype = row["shape"], row["dtype"]
    fits = isinstance(shape, list) and len(shape) < 9 and all(type(s) is int and 0 <= s < 2**31 for s in shape)
    need(fits, f"{what}: shape", shape, "sizes")
    need(isinstance(dtype, str) and dtype in BY_NAME, f"{what}: dtype", dtype, f"one of {', '.join(BY_NAME)}")
    return tuple(shape), BY_NAME[dtype]


def rebuild(spec: Manifest) -> fx.GraphModule:
    """A network of this structure (see `structure`) with random weights, in eval mode, for measuring speed.

    Weights are He-normal, so activations keep their scale through any depth: no denormal numbers, no infinities.
    Attributes are ones. Raises ArtefactError: layers whose sizes only their tensors tell; more than 2^31 weights.
    """
    try:
        network, layers = build(spec)
        total = 0
        for path, (kind, config) in layers.items():
            for name, shape in kind.tensors(config).items():
                need(None not in shape, f"layer {path}: {name}", "a length that only the data knows", "a dense layer")
                total += math.prod(s for s in shape if s is not None)
        need(total < 2**31, "original", f"{total} weights", "fewer than 2^31")
        for path, row in spec["attributes"].items():
            shape, dtype = check_tensor_row(path, row)
            total += math.prod(shape)
            need(total < 2**31, "original", f"{total} weights", "fewer than 2^31")
            owner, _, leaf = path.rpartition(".")
            network.get_submodule(owner)._buffers[leaf] = torch.ones(shape, dtype=dtype)
    except Refused as e:
        raise ArtefactError(f"rebuild: {e}") from None
    for module in network.modules():  # not to_empty on the whole: it would drop the attributes' values
        if any(t.is_meta for t in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
            module.to_empty(device="cpu", recurse=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for module in network.modules():
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()
            weight = getattr(module, "weight", None)
            if isinstance(weight, nn.Parameter) and weight.dim() > 1:
                nn.init.kaiming_normal_(weight, nonlinearity="relu")
    return network.eval()
