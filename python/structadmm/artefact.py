"""The artefact: a compacted network in one safetensors file, its structure as a JSON manifest in the metadata.

`save` writes it, `load` gives the network back with no model class at hand. Nothing in the file is code: layers,
functions and methods come from the allow-list in allowed.py. manifest.py holds the structure, container.py the bytes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from .allowed import Refused
from .container import OPTIMIZED, Contents, chunks_of, contents_of, network_of, parse
from .errors import ArtefactError, OptimizeError
from .files import atomic_write
from .manifest import need
from .segments import inline, restore
from .trace import trace


def _trace(module: nn.Module, example: Tensor | Sequence[Tensor] | None) -> fx.GraphModule:
    if isinstance(module, fx.GraphModule):
        return module
    if example is None:
        raise ArtefactError(
            f"save: module got {type(module).__name__} without example, wanted a tensor or a tuple to trace it with"
        )
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
    graph, record = _trace(module, example), None
    if is_optimized(graph):
        graph, record = inline(graph)
    to_dict = getattr(getattr(module, "report", None), "to_dict", None)
    report = to_dict() if callable(to_dict) else None
    notes = {"report": report} if report is not None and record is None else {}
    if record is not None:
        given = metadata if metadata is not None else graph.meta.get("structadmm", {}).get("metadata", {})
        metadata = dict(given) | {OPTIMIZED: record | {"report": report}}
    dense = None if original is None else _trace(original, example)
    _write(Path(path), *contents_of(graph, example, metadata, dense, notes))


def is_optimized(module: nn.Module) -> bool:
    """Whether the network came from `optimize`: it has layers that an artefact holds in other terms."""
    return any(type(m).__module__ in _LOWERED for m in module.modules())


_LOWERED = (f"{__package__}.segments", f"{__package__}.forms")


def _write(path: Path, manifest: str, tensors: Mapping[str, Tensor]) -> None:
    chunks = chunks_of(str(path), manifest, tensors)
    with atomic_write(path) as f:
        for chunk in chunks:
            f.write(chunk)


def _read(path: Path) -> Contents:
    """Raises Refused, with what is wrong with the file as a container; OSError."""
    need(not path.is_dir(), "path", "a folder", "a file")
    return parse(path.read_bytes())


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
    network: fx.GraphModule = _checked("load", path, lambda p: network_of(_read(p)))
    metadata = dict(network.meta["structadmm"]["metadata"])
    record = metadata.get(OPTIMIZED)
    if isinstance(record, dict):
        del metadata[OPTIMIZED]
    network.meta["structadmm"]["metadata"] = metadata
    if isinstance(record, dict) and optimized and torch.device(device).type == "cpu":
        try:
            return restore(network, {k: v for k, v in record.items() if k != "report"})
        except OptimizeError as e:
            raise ArtefactError(f"load: {path}: {str(e).removeprefix('optimize: ')}") from None
    return network.to(device)
