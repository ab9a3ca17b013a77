"""Loads the op library beside this file into torch: `torch.ops.structadmm.*`."""

from __future__ import annotations

from pathlib import Path

import torch

LIBRARY = Path(__file__).with_name("_ops.so")


def load() -> None:
    """Load the op library, once. Raises ImportError where it is missing or this torch is too old for it."""
    if not LIBRARY.exists():
        raise ImportError(f"structadmm: {LIBRARY} got no file, wanted the compiled op library: pip install structadmm")
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as e:
        raise ImportError(f"structadmm: the op library got torch {torch.__version__}, wanted >= 2.11: {e}") from e


load()
