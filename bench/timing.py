"""What the benchmarks share: the interleaved timer, the machine in words, results written whole or not at all.

A result is one JSON object: the question, the machine (CPU, ISA, threads, versions, dtype), and rows of figures. Ratios
are medians over rounds in which both sides took turns, with the quartiles of the pairwise ratios.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch

import structadmm
from structadmm import ops
from structadmm.files import atomic_write_text
from structadmm.timing import Spread, Timings, interleave

__all__ = [
    "Spread",
    "Timings",
    "arguments",
    "copy_bandwidth",
    "finish",
    "interleave",
    "keep",
    "kept",
    "machine",
    "settle",
    "sync_of",
]


def cpu_model() -> str:
    """The processor's name as the system tells it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def machine(device: str = "cpu", **more: Any) -> dict[str, Any]:
    """What a figure depends on: processor, instruction set, threads, versions; `more` adds dtype and the like."""
    info: dict[str, Any] = {"cpu": cpu_model(), "isa": ops.isa(), "threads": torch.get_num_threads()}
    if device == "cuda":
        info["gpu"] = torch.cuda.get_device_name()
    versions = {"structadmm": structadmm.__version__, "torch": torch.__version__, "python": platform.python_version()}
    return {**info, **versions, **more}


def sync_of(device: str) -> Any:
    """What waits for the device, for `interleave`."""
    return torch.cuda.synchronize if device == "cuda" else None


def copy_call(megabytes: int = 256, device: str = "cpu") -> tuple[Any, int]:
    """A callable that copies a buffer far larger than the caches with torch, and the bytes it reads and writes."""
    source = torch.ones(megabytes << 18, device=device)
    target = torch.empty_like(source)
    return (lambda: target.copy_(source)), 2 * 4 * source.numel()


def copy_bandwidth(device: str = "cpu") -> float:
    """Bytes per second, read and written, of torch's copy of a large buffer with the threads set now."""
    call, size = copy_call(device=device)
    return size / interleave({"copy": call}, sync=sync_of(device))["copy"].median


def settle(threads: int) -> float:
    """Seconds that interleave waits before each turn: libgomp's and ONNX Runtime's threads spin for about one
    millisecond after their last work.
    """
    return 0.005 if threads > 1 else 0.0


def arguments(description: str, **defaults: Any) -> argparse.ArgumentParser:
    """The options that all benchmarks take."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, help="write the result there, whole or not at all")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=defaults.get("repeats", 15), help="rounds of each comparison")
    parser.add_argument("--threads", type=int, nargs="+", default=defaults.get("threads", [1, 2]))
    return parser


def finish(result: dict[str, Any], path: Path | None) -> None:
    """Write the result where --json said."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(path, json.dumps(result, indent=1) + "\n")
        print(f"wrote {path}")


def keep(question: str, rows: list[dict[str, Any]], path: Path | None) -> None:
    """Write rows one to a line, floats to five digits, so that a long run leaves what it has at any time."""

    def short(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.5g}")
        if isinstance(value, dict):
            return {k: short(v) for k, v in value.items()}
        return [short(v) for v in value] if isinstance(value, list) else value

    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join("  " + json.dumps(short(row)) for row in rows)
        atomic_write_text(path, f'{{\n "question": {json.dumps(question)},\n "rows": [\n{lines}\n ]\n}}\n')


def kept(path: Path | None) -> list[dict[str, Any]]:
    """The rows that `keep` wrote, if any."""
    return json.loads(path.read_text())["rows"] if path is not None and path.exists() else []
