"""The bytes of an artefact: a safetensors file of the tensors, the manifest and a digest in its metadata.

A network becomes a manifest and tensors (`contents_of`), these become bytes (`chunks_of`), and back again (`parse`,
`network_of`): every claim of the manifest is checked against the tensors before the network is built.
csrc/format/FORMAT.md describes the file. This is format version 0: later versions need not read it.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from . import __version__
from .allowed import Refused, refuse
from .errors import ArtefactError
from .manifest import BY_NAME, DTYPES, Manifest, build, check_tensor_row, need, state_of, structure, tensor_at

VERSION = 0

MANIFEST_KEY = "structadmm"

DIGEST_KEY = "structadmm.sha256"

OPTIMIZED = "optimize"  # where the metadata hold what `optimize` decided

_NO_DIGEST = "0" * 64

# Tensors begin at a multiple of this in the file, so that a memory map of it is aligned for any vector.
_ALIGN = 64

_MAX_HEADER = 100_000_000  # the limit of the safetensors library

Inputs = Sequence[tuple[tuple[int | None, ...], torch.dtype]]


def _example_inputs(example: Tensor | Sequence[Tensor] | Inputs) -> list[Any]:
    """Input rows of a manifest, with a free batch (null)."""
    rows = []
    for item in [example] if isinstance(example, Tensor) else example:
        shape, dtype = (item.shape, item.dtype) if isinstance(item, Tensor) else item
        if dtype not in DTYPES or not shape:
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


def to_bytes(graph: fx.GraphModule, metadata: Mapping[str, Any] | None = None) -> bytes:
    """What `save` writes of a network that is not optimised, in memory."""
    return b"".join(chunks_of("bytes", *contents_of(graph, metadata=metadata)))


def contents_of(
    graph: fx.GraphModule,
    example: Tensor | Sequence[Tensor] | None = None,
    metadata: Mapping[str, Any] | None = None,
    original: fx.GraphModule | None = None,
    notes: Mapping[str, Any] | None = None,
) -> tuple[str, dict[str, Tensor]]:
    """The manifest of a network, as JSON, and the tensors that go with it; see `save`.

    notes: what the metadata hold besides the user's, unless the user's have the key.
    """
    carried: dict[str, Any] = dict(graph.meta.get("structadmm", {}))
    manifest: Manifest = {"version": VERSION, "producer": f"structadmm {__version__}", **structure(graph)}

    tensors: dict[str, Tensor] = {}
    for name in manifest["modules"]:
        tensors.update((f"{name}.{k}", t) for k, t in state_of(graph.get_submodule(name)))
    for name in manifest["attributes"]:
        tensors[name] = tensor_at(graph, name).detach()
    for name, t in tensors.items():
        if t.dtype not in DTYPES or t.layout is not torch.strided or t.is_meta:
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
        manifest["original"] = structure(original)
    elif isinstance(manifest["original"], fx.GraphModule):
        try:
            manifest["original"] = structure(manifest["original"])
        except ArtefactError:  # nobody asked for it: without it, bench wants --dense
            manifest["original"] = None
    manifest["metadata"] = dict(notes or {}) | dict(metadata if metadata is not None else carried.get("metadata", {}))
    try:
        _check_keys(manifest["metadata"])
        text = json.dumps(manifest, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as e:
        raise ArtefactError(f"save: metadata got {e}, wanted JSON values") from None
    return text, tensors


def _check_keys(value: Any) -> None:
    """JSON would turn other keys into strings without a word."""
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"the key {key!r}")
    for item in value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ():
        _check_keys(item)


def chunks_of(what: str, manifest: str, tensors: Mapping[str, Tensor]) -> list[bytes | memoryview]:
    """The bytes of a file, digest included."""
    # Wide types first, then by name: each tensor is aligned to its own type, and the same network gives the same bytes.
    order = sorted(tensors, key=lambda n: (-tensors[n].element_size(), n))
    header: dict[str, Any] = {"__metadata__": {MANIFEST_KEY: manifest, DIGEST_KEY: _NO_DIGEST}}
    end = 0
    for name in order:
        t = tensors[name]
        begin, end = end, end + t.numel() * t.element_size()
        header[name] = {"dtype": DTYPES[t.dtype], "shape": list(t.shape), "data_offsets": [begin, end]}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-(8 + len(head)) % _ALIGN)
    if len(head) > _MAX_HEADER:
        raise ArtefactError(f"save: {what} got a header of {len(head)} bytes, wanted at most {_MAX_HEADER}")
    head = len(head).to_bytes(8, "little") + head
    values = [_bytes(tensors[name]) for name in order]
    digest = sha256_of([head, *values])
    marker = f'"{DIGEST_KEY}":"'.encode()
    return [head.replace(marker + _NO_DIGEST.encode(), marker + digest.encode()), *values]


def _bytes(t: Tensor) -> memoryview:
    """The values in row-major order, little-endian."""
    return t.cpu().contiguous().flatten().view(torch.uint8).numpy().data


def sha256_of(chunks: Sequence[bytes | memoryview]) -> str:
    sha = hashlib.sha256()
    for chunk in chunks:
        sha.update(chunk)
    return sha.hexdigest()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = Counter(name for name, _ in pairs)
    for name, n in names.items():
        need(n == 1, f"name {name!r}", f"{n} times", "once")
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


def parse(data: bytes) -> Contents:
    """Raises Refused."""
    need(len(data) >= 8, "file", f"{len(data)} bytes", "a safetensors file")
    size = int.from_bytes(data[:8], "little")
    if size > min(_MAX_HEADER, len(data) - 8):
        if data.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x04")):
            raise refuse("file", "a pickle, or a PyTorch checkpoint", "an artefact: structadmm compact makes one")
        raise refuse("file", f"a header of {size} bytes in {len(data)}", "a whole safetensors file")
    header = _json(data[8 : 8 + size], "header")
    need(isinstance(header, dict), "header", header, "an object")
    about = header.pop("__metadata__", None)
    if not isinstance(about, dict) or not isinstance(about.get(MANIFEST_KEY), str):
        raise refuse("file", "safetensors without a structadmm manifest", "an artefact: structadmm compact makes one")
    manifest = _json(about[MANIFEST_KEY], "manifest")
    need(isinstance(manifest, dict), "manifest", manifest, "an object")
    version = manifest.get("version")
    need(type(version) is int and version == VERSION, "version", version, str(VERSION))
    digest = about.get(DIGEST_KEY)
    marker = f'"{DIGEST_KEY}":"{digest}"'.encode()
    need(
        isinstance(digest, str) and data.count(marker, 8, 8 + size) == 1, "digest", digest, "one SHA-256 in hexadecimal"
    )
    at = data.index(marker, 8, 8 + size) + marker.index(b":") + 2
    view = memoryview(data)
    actual = sha256_of([view[:at], _NO_DIGEST.encode(), view[at + 64 :]])
    need(digest == actual, "SHA-256", actual, f"{digest}: the file is damaged or was changed")
    return Contents(manifest, data)


def _names(manifest: Manifest, key: str, known: Mapping[str, Any] | Sequence[str]) -> list[str]:
    value = manifest.get(key)
    need(isinstance(value, list) and all(isinstance(v, str) for v in value), key, value, "a list of names")
    assert isinstance(value, list)
    unknown = [v for v in value if v not in known]
    need(not unknown, key, unknown, "names of the file's tensors")
    return value


def _check_inputs(rows: Any, n_placeholders: int) -> list[tuple[tuple[int | None, ...], torch.dtype]] | None:
    if rows is None:
        return None
    need(isinstance(rows, list) and len(rows) <= n_placeholders, "inputs", rows, f"at most {n_placeholders} inputs")
    out: list[tuple[tuple[int | None, ...], torch.dtype]] = []
    for row in rows:
        free = isinstance(row, dict) and isinstance(row.get("shape"), list) and row["shape"][:1] == [None]
        need(free, "input", row, "a shape that begins with null, the batch, and a dtype")
        shape, dtype = check_tensor_row("input", {**row, "shape": row["shape"][1:]})
        out.append(((None, *shape), dtype))
    return out


_FIELDS = (
    *("version", "producer", "name", "modules", "attributes", "graph", "dtype"),
    *("ties", "frozen", "buffers", "channels_last", "inputs", "original", "metadata"),
)


def network_of(contents: Contents) -> fx.GraphModule:
    """Check everything, then build. Raises Refused."""
    import safetensors
    import safetensors.torch

    manifest = contents.manifest
    need(set(manifest) == set(_FIELDS), "manifest", sorted(manifest), f"the fields {', '.join(_FIELDS)}")
    need(isinstance(manifest["producer"], str), "producer", manifest["producer"], "a string")
    need(isinstance(manifest["metadata"], dict), "metadata", manifest["metadata"], "an object")
    dtype = manifest["dtype"]
    need(dtype is None or (isinstance(dtype, str) and dtype in BY_NAME), "dtype", dtype, f"one of {', '.join(BY_NAME)}")
    network, layers = build(manifest)
    inputs = _check_inputs(manifest["inputs"], sum(n.op == "placeholder" for n in network.graph.nodes))
    if manifest["original"] is not None:
        need(isinstance(manifest["original"], dict), "original", manifest["original"], "null or an object")
        try:
            build(manifest["original"])
        except Refused as e:
            raise Refused(f"original: {e}") from None

    # The library checks that the tensors' types, shapes and offsets fill the data exactly.
    try:
        stored = safetensors.torch.load(contents.data)
    except Exception as e:
        raise refuse("tensors", f"{type(e).__name__}: {e}", "whole safetensors data") from None

    ties = manifest["ties"]
    need(isinstance(ties, dict), "ties", ties, "an object")
    for name, to in ties.items():
        need(
            isinstance(to, str) and to in stored and name not in stored,
            f"tie of {name}",
            to,
            "the name of a stored tensor",
        )
    tensors = stored | {name: stored[to] for name, to in ties.items()}
    wanted = {f"{path}.{name}" for path, (kind, config) in layers.items() for name in kind.tensors(config)}
    wanted |= set(manifest["attributes"])
    missing, extra = sorted(wanted - set(tensors)), sorted(set(tensors) - wanted)
    need(not missing, "tensors", f"none named {', '.join(missing[:5])}", "all that the layers need")
    need(not extra, "tensors", f"{', '.join(extra[:5])}", "only those that the layers need")
    for name, row in manifest["attributes"].items():
        shape, dtype = check_tensor_row(name, row)
        t = tensors[name]
        need(tuple(t.shape) == shape and t.dtype == dtype, name, f"{list(t.shape)} {t.dtype}", f"{list(shape)} {dtype}")
    for path, (kind, config) in layers.items():
        try:
            kind.check_tensors(config, {name: tensors[f"{path}.{name}"] for name in kind.tensors(config)})
        except Refused as e:
            raise Refused(f"layer {path}: {e}") from None
    frozen = set(_names(manifest, "frozen", stored))
    buffers = set(_names(manifest, "buffers", manifest["attributes"]))
    for name in _names(manifest, "channels_last", stored):
        need(stored[name].dim() == 4, f"channels_last {name}", f"{stored[name].dim()} dimensions", "4")
        stored[name] = torch.empty_like(stored[name], memory_format=torch.channels_last).copy_(stored[name])

    parameters: dict[str, nn.Parameter] = {}
    for name in wanted:
        key = ties.get(name, name)
        owner_path, _, leaf = name.rpartition(".")
        owner = network.get_submodule(owner_path)
        attribute = name in manifest["attributes"]
        if leaf in owner._parameters or (attribute and name not in buffers):
            need(stored[key].dtype.is_floating_point or key in frozen, name, str(stored[key].dtype), "a floating dtype")
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


def from_bytes(data: bytes) -> fx.GraphModule:
    """The network that `to_bytes` wrote, checked as `load` does. Raises ArtefactError."""
    try:
        return network_of(parse(data))
    except Refused as e:
        raise ArtefactError(f"load: bytes: {e}") from None
