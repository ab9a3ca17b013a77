"""The artefact: a compacted network in one safetensors file, its structure as a JSON manifest in the metadata.

`save` writes it, `load` gives the network back with no model class at hand. Nothing in the file is code: layers,
functions and methods come from the allow-list in allowed.py, and every claim of the manifest is checked against the
tensors before the network is built. csrc/format/FORMAT.md describes the file. This is format version 0: later versions
need not read it.
"""

from __future__ import annotations

import hashlib
import json
import keyword
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from . import __version__
from .allowed import FUNCTIONS, KINDS, METHODS, Config, Kind, Refused, refuse
from .errors import ArtefactError, OptimizeError
from .files import atomic_write

VERSION = 0

MANIFEST_KEY = "structadmm"
DIGEST_KEY = "structadmm.sha256"
OPTIMIZED = "optimize"  # where the metadata hold what `optimize` decided
_NO_DIGEST = "0" * 64
# Tensors begin at a multiple of this in the file, so that a memory map of it is aligned for any vector.
_ALIGN = 64
_MAX_HEADER = 100_000_000  # the limit of the safetensors library

_DTYPES = {
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
_BY_NAME = {str(dtype).removeprefix("torch."): dtype for dtype in _DTYPES}

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PATH = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
_FUNCTION_NAMES = {function: name for name, function in reversed(FUNCTIONS.items())}
_KIND_NAMES = {kind.cls: name for name, kind in KINDS.items()}
# Names that a module, or the GraphModule around it, has already.
_TAKEN = frozenset(dir(fx.GraphModule(nn.Module(), fx.Graph())))

Manifest = dict[str, Any]
Inputs = Sequence[tuple[tuple[int | None, ...], torch.dtype]]


# Writing: from a GraphModule to a manifest.


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
    if isinstance(value, torch.dtype) and value in _DTYPES:
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


_TORCH = os.path.dirname(torch.__file__)
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
    KINDS[name].check_tensors(config, dict(_state(module)))
    return name, config


def _state(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
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
                value = _attribute(module, target)
                if not isinstance(value, Tensor) or value.dtype not in _DTYPES:
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


def _attribute(module: nn.Module, path: str) -> Any:
    owner, _, name = path.rpartition(".")
    return getattr(module.get_submodule(owner), name)


def _example_inputs(example: Tensor | Sequence[Tensor] | Inputs) -> list[Any]:
    """Input rows of a manifest, with a free batch (null)."""
    rows = []
    for item in [example] if isinstance(example, Tensor) else example:
        shape, dtype = (item.shape, item.dtype) if isinstance(item, Tensor) else item
        if dtype not in _DTYPES or not shape:
            raise ArtefactError(
                f"save: example got {dtype} {list(shape)}, wanted tensors whose first dimension is the batch"
            )
        rows.append(
            {"shape": [None, *(int(s) for s in shape[1:] if s is not None)], "dtype": str(dtype).removeprefix("torch.")}
        )
    return rows


def _tied(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Name -> the first name of the same tensor (same memory, shape and strides), for all but the first."""
    first: dict[Any, str] = {}
    ties = {}
    for name, t in tensors.items():
        if t.numel() == 0:
            continue  # all empty tensors share the null address
        key = (t.untyped_storage().data_ptr(), t.storage_offset(), tuple(t.shape), t.stride(), t.dtype)
        if key in first:
            ties[name] = first[key]
        first.setdefault(key, name)
    return ties


def _is_channels_last(t: Tensor) -> bool:
    """By strides: a 1x1 kernel counts as contiguous in both layouts, yet torch's convolution heeds the strides."""
    if t.dim() != 4:
        return False
    _, c, h, w = t.shape
    return t.stride() == (c * h * w, 1, c * w, c) != (c * h * w, h * w, w, 1)


def _trace(module: nn.Module, example: Tensor | Sequence[Tensor] | None) -> fx.GraphModule:
    if isinstance(module, fx.GraphModule):
        return module
    if example is None:
        raise ArtefactError(
            f"save: module got {type(module).__name__} without example, wanted a tensor or a tuple to trace it with"
        )
    from .trace import trace

    return trace(module, example, who="save").module


def save(
    module: nn.Module,
    path: str | os.PathLike[str],
    *,
    example: Tensor | Sequence[Tensor] | None = None,
    metadata: Mapping[str, Any] | None = None,
    original: nn.Module | None = None,
) -> None:
    """Write a network to one safetensors file, whole or not at all.

    module: what `compact` returned, any other fx.GraphModule, or, with `example`, any module that structadmm.trace can
        trace.
    example: a tensor or a tuple of tensors, batch first; their shapes (batch left free) and dtypes are noted in the
        file.
    metadata: JSON values of the user's own (class names, normalisation, accuracy); `load` gives them back. The report
        of `compact`, where the module has one, is added as "report".
    original: the dense network, of which only the structure is noted, for `structadmm bench`.
    A network from `optimize` is stored as the network that it was made from, with the decisions in the metadata under
    "optimize"; `load` carries them out again.
    What is not given is taken from `module.meta["structadmm"]` ("inputs", "metadata", "original"), where `compact` and
    `load` leave it.

    Tensors are stored contiguously (channels-last ones are channels-last again after loading), shared ones once.
    Raises ArtefactError: an operation, layer or value that the format does not hold, with the node and source line.
    TraceError: the module cannot be traced.
    """
    _write(Path(path), *_contents(module, example, metadata, original))


def to_bytes(module: fx.GraphModule, metadata: Mapping[str, Any] | None = None) -> bytes:
    """What `save` writes, in memory."""
    return b"".join(_chunks("bytes", *_contents(module, None, metadata, None)))


def _contents(
    module: nn.Module,
    example: Tensor | Sequence[Tensor] | None,
    metadata: Mapping[str, Any] | None,
    original: nn.Module | None,
) -> tuple[str, dict[str, Tensor]]:
    """The manifest and the tensors of `save`."""
    graph, record = _trace(module, example), None
    if is_optimized(graph):
        from .segments import inline

        graph, record = inline(graph)
    carried: dict[str, Any] = dict(graph.meta.get("structadmm", {}))
    manifest: Manifest = {"version": VERSION, "producer": f"structadmm {__version__}", **structure(graph)}

    tensors: dict[str, Tensor] = {}
    for name in manifest["modules"]:
        tensors.update((f"{name}.{k}", t) for k, t in _state(graph.get_submodule(name)))
    for name in manifest["attributes"]:
        tensors[name] = _attribute(graph, name).detach()
    for name, t in tensors.items():
        if t.dtype not in _DTYPES or t.layout is not torch.strided or t.is_meta:
            raise ArtefactError(
                f"save: {name} got a {t.layout} {t.dtype} tensor on {t.device}, wanted a dense tensor with values"
            )
    ties = _tied(tensors)
    tensors = {name: t for name, t in tensors.items() if name not in ties}

    parameters = dict(graph.named_parameters(remove_duplicate=False))
    floating: Counter[torch.dtype] = Counter()
    for t in tensors.values():
        if t.dtype.is_floating_point:
            floating[t.dtype] += t.numel()
    manifest["dtype"] = str(floating.most_common(1)[0][0]).removeprefix("torch.") if floating else None
    manifest["ties"] = ties
    manifest["frozen"] = [n for n, p in parameters.items() if n in tensors and not p.requires_grad]
    manifest["buffers"] = [n for n in manifest["attributes"] if n not in parameters]
    manifest["channels_last"] = [n for n, t in tensors.items() if _is_channels_last(t)]
    inputs = example if example is not None else carried.get("inputs")
    manifest["inputs"] = _example_inputs(inputs) if inputs is not None else None
    n_inputs = sum(node.op == "placeholder" for node in graph.graph.nodes)
    if manifest["inputs"] is not None and len(manifest["inputs"]) > n_inputs:
        raise ArtefactError(f"save: example got {len(manifest['inputs'])} tensors, wanted at most {n_inputs}")
    manifest["original"] = carried.get("original")
    if original is not None:
        manifest["original"] = structure(_trace(original, example))
    elif isinstance(manifest["original"], fx.GraphModule):
        try:
            manifest["original"] = structure(manifest["original"])
        except ArtefactError:  # nobody asked for it: without it, bench wants --dense
            manifest["original"] = None
    notes = dict(metadata if metadata is not None else carried.get("metadata", {}))
    report = getattr(module, "report", None)
    to_dict = getattr(report, "to_dict", None)
    if record is not None:
        notes[OPTIMIZED] = record | {"report": to_dict() if callable(to_dict) else None}
    elif callable(to_dict):
        notes.setdefault("report", to_dict())
    manifest["metadata"] = notes
    try:
        _check_keys(notes)
        text = json.dumps(manifest, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as e:
        raise ArtefactError(f"save: metadata got {e}, wanted JSON values") from None
    return text, tensors


def is_optimized(module: nn.Module) -> bool:
    """Whether the network came from `optimize`: it has layers that an artefact holds in other terms."""
    return any(type(m).__module__ in _LOWERED for m in module.modules())


_LOWERED = (f"{__package__}.segments", f"{__package__}.forms")


def _check_keys(value: Any) -> None:
    """JSON would turn other keys into strings without a word."""
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"the key {key!r}")
    for item in value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ():
        _check_keys(item)


def _write(path: Path, manifest: str, tensors: Mapping[str, Tensor]) -> None:
    chunks = _chunks(str(path), manifest, tensors)
    with atomic_write(path) as f:
        for chunk in chunks:
            f.write(chunk)


def _chunks(what: str, manifest: str, tensors: Mapping[str, Tensor]) -> list[bytes | memoryview]:
    """The bytes of a file, digest included."""
    # Wide types first, then by name: each tensor is aligned to its own type, and the same network gives the same bytes.
    order = sorted(tensors, key=lambda n: (-tensors[n].element_size(), n))
    header: dict[str, Any] = {"__metadata__": {MANIFEST_KEY: manifest, DIGEST_KEY: _NO_DIGEST}}
    end = 0
    for name in order:
        t = tensors[name]
        begin, end = end, end + t.numel() * t.element_size()
        header[name] = {"dtype": _DTYPES[t.dtype], "shape": list(t.shape), "data_offsets": [begin, end]}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-(8 + len(head)) % _ALIGN)
    if len(head) > _MAX_HEADER:
        raise ArtefactError(f"save: {what} got a header of {len(head)} bytes, wanted at most {_MAX_HEADER}")
    head = len(head).to_bytes(8, "little") + head
    values = [_bytes(tensors[name]) for name in order]
    digest = _digest([head, *values])
    marker = f'"{DIGEST_KEY}":"'.encode()
    return [head.replace(marker + _NO_DIGEST.encode(), marker + digest.encode()), *values]


def _bytes(t: Tensor) -> memoryview:
    """The values in row-major order, little-endian."""
    return t.cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _digest(chunks: Sequence[bytes | memoryview]) -> str:
    sha = hashlib.sha256()
    for chunk in chunks:
        sha.update(chunk)
    return sha.hexdigest()


# Reading: from bytes that nobody vouches for to a GraphModule.


def _need(ok: bool, what: str, got: object, wanted: str) -> None:
    if not ok:
        raise refuse(what, got, wanted)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = Counter(name for name, _ in pairs)
    for name, n in names.items():
        _need(n == 1, f"name {name!r}", f"{n} times", "once")
    return dict(pairs)


def _no_constant(text: str) -> Any:
    raise refuse("number", text, "a finite one")


def _json(text: str | bytes, what: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as e:
        raise refuse(what, f"{type(e).__name__}: {e}", "JSON") from None


@dataclass(frozen=True)
class Contents:
    """A file whose digest is right, and its manifest, not yet checked."""

    manifest: Manifest
    data: bytes


def _read(path: Path) -> Contents:
    """Raises Refused, with what is wrong with the file as a container; OSError."""
    _need(not path.is_dir(), "path", "a folder", "a file")
    return _parse(path.read_bytes())


def _parse(data: bytes) -> Contents:
    """Raises Refused."""
    _need(len(data) >= 8, "file", f"{len(data)} bytes", "a safetensors file")
    size = int.from_bytes(data[:8], "little")
    if size > min(_MAX_HEADER, len(data) - 8):
        if data.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x04")):
            raise refuse("file", "a pickle, or a PyTorch checkpoint", "an artefact: structadmm compact makes one")
        raise refuse("file", f"a header of {size} bytes in {len(data)}", "a whole safetensors file")
    header = _json(data[8 : 8 + size], "header")
    _need(isinstance(header, dict), "header", header, "an object")
    about = header.pop("__metadata__", None)
    if not isinstance(about, dict) or not isinstance(about.get(MANIFEST_KEY), str):
        raise refuse("file", "safetensors without a structadmm manifest", "an artefact: structadmm compact makes one")
    manifest = _json(about[MANIFEST_KEY], "manifest")
    _need(isinstance(manifest, dict), "manifest", manifest, "an object")
    version = manifest.get("version")
    _need(type(version) is int and version == VERSION, "version", version, str(VERSION))
    digest = about.get(DIGEST_KEY)
    marker = f'"{DIGEST_KEY}":"{digest}"'.encode()
    _need(
        isinstance(digest, str) and data.count(marker, 8, 8 + size) == 1, "digest", digest, "one SHA-256 in hexadecimal"
    )
    at = data.index(marker, 8, 8 + size) + marker.index(b":") + 2
    view = memoryview(data)
    actual = _digest([view[:at], _NO_DIGEST.encode(), view[at + 64 :]])
    _need(digest == actual, "SHA-256", actual, f"{digest}: the file is damaged or was changed")
    return Contents(manifest, data)


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
    "dtype": lambda v: isinstance(v, str) and v in _BY_NAME,
    "ellipsis": lambda v: v is True,
}


def _decode(value: Any, nodes: Mapping[str, fx.Node]) -> Any:
    """Undo `_encode`; nodes are those that came before. Raises Refused."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (int, float)):
        _need(abs(value) < 2**63, "a number", value, "less than 2^63")
        return value
    if isinstance(value, list):
        return [_decode(v, nodes) for v in value]
    _need(
        isinstance(value, dict) and len(value) == 1, "an argument", value, "a scalar, a list, or an object with one key"
    )
    ((tag, inner),) = value.items()
    _need(tag in _TAGS and _TAGS[tag](inner), "an argument", value, f"one of the forms {', '.join(_TAGS)}")
    if tag == "node":
        _need(inner in nodes, "reference", inner, "the name of an earlier node")
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
        return _BY_NAME[inner]
    return Ellipsis


def _is_identifier(name: Any) -> bool:
    return isinstance(name, str) and _IDENTIFIER.fullmatch(name) is not None and not keyword.iskeyword(name)


def _check_row(row: Any) -> None:
    """One node by itself: known fields, an allowed operation, names that are only names. Raises Refused.

    torch.fx turns a graph into Python source, so a name that is more than an identifier would be code.
    """
    _need(isinstance(row, dict), "node", row, "an object")
    _need(
        set(row) <= {"name", "op", "target", "args", "kwargs"}, "fields", sorted(row), "name, op, target, args, kwargs"
    )
    name, op, target = row.get("name"), row.get("op"), row.get("target")
    args, kwargs = row.get("args", []), row.get("kwargs", {})
    _need(_is_identifier(name), "name", name, "an identifier")
    _need(isinstance(op, str) and op in _OPS, "op", op, f"one of {', '.join(_OPS)}")
    _need(isinstance(args, list), "args", args, "a list")
    _need(
        isinstance(kwargs, dict) and all(map(_is_identifier, kwargs)),
        "kwargs",
        kwargs,
        "an object with identifiers as keys",
    )
    if op == "placeholder":
        _need(_is_identifier(target) and target != "self", "target", target, "an identifier")
        constant = all(v is None or isinstance(v, (bool, int, float, str)) for v in args)
        _need(len(args) <= 1 and constant and not kwargs, "args", args, "at most a default value")
    elif op == "output":
        _need(target is None and len(args) == 1 and not kwargs, "args", args, "what the network returns")
    elif op == "get_attr":
        _need(not args and not kwargs, "args", args, "none")
    elif op == "call_function":
        _need(isinstance(target, str) and target in FUNCTIONS, "function", target, "one in the allow-list")
        if target == "getattr":
            fits = len(args) == 2 and isinstance(args[0], dict) and args[1] in ATTRIBUTES and not kwargs
            _need(fits, "getattr", args, f"a node and one of {', '.join(ATTRIBUTES)}")
        if str(target).startswith("operator.i"):
            _need(bool(args) and isinstance(args[0], dict), "args", args, "a node first")
    elif op == "call_method":
        _need(isinstance(target, str) and target in METHODS, "method", target, "one in the allow-list")
        _need(bool(args) and isinstance(args[0], dict) and "node" in args[0], "args", args, "a node first")
    if op in ("call_module", "get_attr"):
        _check_path(target)


def _check_path(path: Any) -> None:
    _need(isinstance(path, str) and _PATH.fullmatch(path) is not None, "path", path, "names joined by dots")
    taken = [part for part in path.split(".") if part in _TAKEN]
    _need(not taken, "path", path, f"no part named {', '.join(taken)}, which torch.nn.Module has already")


def _build(spec: Manifest) -> tuple[fx.GraphModule, dict[str, tuple[Kind, Config]]]:
    """The network of a structure, on the meta device, its attributes absent. Raises Refused."""
    modules, attributes, rows = spec.get("modules"), spec.get("attributes"), spec.get("graph")
    _need(_is_identifier(spec.get("name")), "name", spec.get("name"), "an identifier")
    _need(isinstance(modules, dict), "modules", modules, "an object")
    _need(isinstance(attributes, dict), "attributes", attributes, "an object")
    _need(isinstance(rows, list), "graph", rows, "a list")
    assert isinstance(modules, dict) and isinstance(attributes, dict) and isinstance(rows, list)

    layers: dict[str, tuple[Kind, Config]] = {}
    root = nn.Module()
    for path, row in modules.items():
        try:
            _check_path(path)
            _need(isinstance(row, dict) and set(row) == {"kind", "config"}, "layer", row, "kind and config")
            _need(isinstance(row["kind"], str) and row["kind"] in KINDS, "layer", row["kind"], "one in the allow-list")
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
        _check_tensor_row(f"attribute {path}", row)
        _attach(root, path, None)

    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for row in rows:
        try:
            _check_row(row)
            op, name, target = row["op"], row["name"], row.get("target")
            _need(name not in nodes, "name", name, "another name than an earlier node's")
            if op == "call_module":
                _need(target in layers, "target", target, "a layer of the file")
            if op == "get_attr":
                owner, _, leaf = target.rpartition(".")
                held = owner in layers and leaf in layers[owner][0].tensors(layers[owner][1])
                _need(held or target in attributes, "target", target, "a tensor of the file")
            args = tuple(_decode(a, nodes) for a in row.get("args", []))
            kwargs = {k: _decode(v, nodes) for k, v in row.get("kwargs", {}).items()}
        except Refused as e:
            raise Refused(f"node {row.get('name') if isinstance(row, dict) else row}: {e}") from None
        if op == "call_function":
            target = FUNCTIONS[target]
        nodes[name] = graph.create_node(op, "output" if op == "output" else target, args, kwargs, name)
    ops = Counter(n.op for n in graph.nodes)
    _need(ops["output"] == 1 and rows[-1]["op"] == "output", "graph", f"{ops['output']} outputs", "one, at the end")
    late = [r["name"] for a, r in zip(rows, rows[1:], strict=False) if a["op"] != "placeholder" == r["op"]]
    _need(not late, "graph", f"placeholder {late[:1]}", "placeholders first")
    called = {n.target for n in graph.nodes if n.op == "call_module"}
    unused = [path for path in layers if path not in called]
    _need(not unused, "layers", unused, "only layers that the graph calls")
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
            _need(part not in owner._buffers, "path", path, "a path that passes through no tensor")
            owner.add_module(part, nn.Module())
        owner = owner._modules[part]  # type: ignore[assignment]
        _need(type(owner) is nn.Module, "path", path, "a path that passes through no layer")
    _need(last not in owner._modules and last not in owner._buffers, "path", path, "one that is not in use")
    if leaf is not None:
        owner.add_module(last, leaf)
    else:
        owner.register_buffer(last, torch.empty(0, device="meta"))


def _names(manifest: Manifest, key: str, known: Mapping[str, Any] | Sequence[str]) -> list[str]:
    value = manifest.get(key)
    _need(isinstance(value, list) and all(isinstance(v, str) for v in value), key, value, "a list of names")
    assert isinstance(value, list)
    unknown = [v for v in value if v not in known]
    _need(not unknown, key, unknown, "names of the file's tensors")
    return value


def _check_tensor_row(what: str, row: Any) -> tuple[tuple[int, ...], torch.dtype]:
    _need(isinstance(row, dict) and set(row) == {"shape", "dtype"}, what, row, "shape and dtype")
    shape, dtype = row["shape"], row["dtype"]
    fits = isinstance(shape, list) and len(shape) < 9 and all(type(s) is int and 0 <= s < 2**31 for s in shape)
    _need(fits, f"{what}: shape", shape, "sizes")
    _need(isinstance(dtype, str) and dtype in _BY_NAME, f"{what}: dtype", dtype, f"one of {', '.join(_BY_NAME)}")
    return tuple(shape), _BY_NAME[dtype]


def _check_inputs(rows: Any, n_placeholders: int) -> list[tuple[tuple[int | None, ...], torch.dtype]] | None:
    if rows is None:
        return None
    _need(isinstance(rows, list) and len(rows) <= n_placeholders, "inputs", rows, f"at most {n_placeholders} inputs")
    out: list[tuple[tuple[int | None, ...], torch.dtype]] = []
    for row in rows:
        free = isinstance(row, dict) and isinstance(row.get("shape"), list) and row["shape"][:1] == [None]
        _need(free, "input", row, "a shape that begins with null, the batch, and a dtype")
        shape, dtype = _check_tensor_row("input", {**row, "shape": row["shape"][1:]})
        out.append(((None, *shape), dtype))
    return out


_FIELDS = (
    *("version", "producer", "name", "modules", "attributes", "graph", "dtype"),
    *("ties", "frozen", "buffers", "channels_last", "inputs", "original", "metadata"),
)


def _restore(contents: Contents) -> fx.GraphModule:
    """Check everything, then build. Raises Refused."""
    import safetensors
    import safetensors.torch

    manifest = contents.manifest
    _need(set(manifest) == set(_FIELDS), "manifest", sorted(manifest), f"the fields {', '.join(_FIELDS)}")
    _need(isinstance(manifest["producer"], str), "producer", manifest["producer"], "a string")
    _need(isinstance(manifest["metadata"], dict), "metadata", manifest["metadata"], "an object")
    dtype = manifest["dtype"]
    _need(
        dtype is None or (isinstance(dtype, str) and dtype in _BY_NAME), "dtype", dtype, f"one of {', '.join(_BY_NAME)}"
    )
    network, layers = _build(manifest)
    inputs = _check_inputs(manifest["inputs"], sum(n.op == "placeholder" for n in network.graph.nodes))
    if manifest["original"] is not None:
        _need(isinstance(manifest["original"], dict), "original", manifest["original"], "null or an object")
        try:
            _build(manifest["original"])
        except Refused as e:
            raise Refused(f"original: {e}") from None

    # The library checks that the tensors' types, shapes and offsets fill the data exactly.
    try:
        stored = safetensors.torch.load(contents.data)
    except Exception as e:
        raise refuse("tensors", f"{type(e).__name__}: {e}", "whole safetensors data") from None

    ties = manifest["ties"]
    _need(isinstance(ties, dict), "ties", ties, "an object")
    for name, to in ties.items():
        _need(
            isinstance(to, str) and to in stored and name not in stored,
            f"tie of {name}",
            to,
            "the name of a stored tensor",
        )
    tensors = stored | {name: stored[to] for name, to in ties.items()}
    wanted = {f"{path}.{name}" for path, (kind, config) in layers.items() for name in kind.tensors(config)}
    wanted |= set(manifest["attributes"])
    missing, extra = sorted(wanted - set(tensors)), sorted(set(tensors) - wanted)
    _need(not missing, "tensors", f"none named {', '.join(missing[:5])}", "all that the layers need")
    _need(not extra, "tensors", f"{', '.join(extra[:5])}", "only those that the layers need")
    for name, row in manifest["attributes"].items():
        shape, dtype = _check_tensor_row(name, row)
        t = tensors[name]
        _need(
            tuple(t.shape) == shape and t.dtype == dtype, name, f"{list(t.shape)} {t.dtype}", f"{list(shape)} {dtype}"
        )
    for path, (kind, config) in layers.items():
        try:
            kind.check_tensors(config, {name: tensors[f"{path}.{name}"] for name in kind.tensors(config)})
        except Refused as e:
            raise Refused(f"layer {path}: {e}") from None
    frozen = set(_names(manifest, "frozen", stored))
    buffers = set(_names(manifest, "buffers", manifest["attributes"]))
    for name in _names(manifest, "channels_last", stored):
        _need(stored[name].dim() == 4, f"channels_last {name}", f"{stored[name].dim()} dimensions", "4")
        stored[name] = torch.empty_like(stored[name], memory_format=torch.channels_last).copy_(stored[name])

    parameters: dict[str, nn.Parameter] = {}
    for name in wanted:
        key = ties.get(name, name)
        owner_path, _, leaf = name.rpartition(".")
        owner = network.get_submodule(owner_path)
        attribute = name in manifest["attributes"]
        if leaf in owner._parameters or (attribute and name not in buffers):
            _need(
                stored[key].dtype.is_floating_point or key in frozen, name, str(stored[key].dtype), "a floating dtype"
            )
            owner._buffers.pop(leaf, None)
            if key not in parameters:
                parameters[key] = nn.Parameter(stored[key], requires_grad=key not in frozen)
            owner._parameters[leaf] = parameters[key]
        else:
            owner._buffers[leaf] = stored[key]
    network.meta["structadmm"] = {
        "inputs": inputs,
        "metadata": manifest["metadata"],
        "original": manifest["original"],
        "producer": manifest["producer"],
    }
    return network.eval()


def _checked(function: str, path: str | os.PathLike[str], work: Callable[[Path], Any]) -> Any:
    try:
        return work(Path(path))
    except Refused as e:
        raise ArtefactError(f"{function}: {path}: {e}") from None
    except FileNotFoundError:
        raise ArtefactError(f"{function}: {path}: file got none, wanted an artefact") from None
    except OSError as e:
        raise ArtefactError(f"{function}: {path}: file got {e.strerror or e}, wanted one that can be read") from None
    except RecursionError:
        raise ArtefactError(f"{function}: {path}: manifest got values nested too deeply, wanted an artefact") from None


def load(path: str | os.PathLike[str], device: str | torch.device = "cpu", optimized: bool = True) -> fx.GraphModule:
    """The network of an artefact, in eval mode, on `device`; it runs, trains, deep-copies and saves again.

    One that was saved from `optimize` is optimised again, for inference on the CPU, unless `optimized` is False or the
    device is another.

    Its `meta["structadmm"]` holds what the file says of it: "inputs" (a list of (shape, dtype), the batch None),
    "metadata" (the user's), "original" (the structure of the dense network, or None) and "producer".

    The digest, the manifest, and every tensor's name, shape, type and table are checked before the network is built;
    NaN and infinite weights are values like others. Raises ArtefactError with what was got and wanted.
    """
    network: fx.GraphModule = _checked("load", path, lambda p: _restore(_read(p)))
    metadata = dict(network.meta["structadmm"]["metadata"])
    record = metadata.get(OPTIMIZED)
    if isinstance(record, dict):
        del metadata[OPTIMIZED]
    network.meta["structadmm"]["metadata"] = metadata
    if isinstance(record, dict) and optimized and torch.device(device).type == "cpu":
        from .segments import restore

        try:
            return restore(network, {k: v for k, v in record.items() if k != "report"})
        except OptimizeError as e:
            raise ArtefactError(f"load: {path}: {str(e).removeprefix('optimize: ')}") from None
    return network.to(device)


def from_bytes(data: bytes) -> fx.GraphModule:
    """The network that `to_bytes` wrote, checked as `load` does. Raises ArtefactError."""
    try:
        return _restore(_parse(data))
    except Refused as e:
        raise ArtefactError(f"load: bytes: {e}") from None


def rebuild(spec: Manifest) -> fx.GraphModule:
    """A network of this structure (see `structure`) with random weights, in eval mode, for measuring speed.

    Weights are He-normal, so activations keep their scale through any depth: no denormal numbers, no infinities.
    Attributes are ones. Raises ArtefactError: layers whose sizes only their tensors tell; more than 2^31 weights.
    """
    try:
        network, layers = _build(spec)
        total = 0
        for path, (kind, config) in layers.items():
            for name, shape in kind.tensors(config).items():
                _need(None not in shape, f"layer {path}: {name}", "a length that only the data knows", "a dense layer")
                total += math.prod(s for s in shape if s is not None)
        _need(total < 2**31, "original", f"{total} weights", "fewer than 2^31")
        for path, row in spec["attributes"].items():
            shape, dtype = _check_tensor_row(path, row)
            total += math.prod(shape)
            _need(total < 2**31, "original", f"{total} weights", "fewer than 2^31")
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
