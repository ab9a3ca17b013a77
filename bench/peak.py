"""What this CPU can do at most on one thread, measured: fused multiply-adds (f32) and tile products (bf16).

peak.c is compiled with the C compiler at hand; without one the roofline is left out.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).parent / "peak.c"


@functools.cache
def _library() -> ctypes.CDLL | None:
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "peak.so"
        made = subprocess.run([compiler, "-O2", "-shared", "-fPIC", SOURCE, "-o", path], capture_output=True)
        return ctypes.CDLL(str(path)) if made.returncode == 0 else None


def peaks() -> dict[str, float]:
    """Operations per second (an addition and a multiplication are two) of one thread; empty without a C compiler.

    f32: fused multiply-adds; bf16_vector: dot products of pairs; bf16_tile: products of tiles; 0 where the CPU has
    none. bf16: the largest of the three.
    """
    library = _library()
    if library is None:
        return {}
    found = {}
    for name in ("f32", "bf16_vector", "bf16_tile"):
        function = getattr(library, f"peak_{name}")
        function.restype = ctypes.c_double
        found[name] = float(function())
    return found | {"bf16": max(found.values())}


if __name__ == "__main__":
    for name, value in peaks().items():
        print(f"{name:12} {value / 1e9:8.1f} GFLOP/s")
