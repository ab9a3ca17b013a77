"""structadmm: ADMM-regularised structured pruning, and compacted kernels that run what it prunes.

The parts are loaded at first use, so that importing the package costs nothing and does not import torch.
"""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

# Public name -> the module that defines it.
_PARTS = {
    "ADMM": "admm",
    "Masks": "admm",
    "StepReport": "admm",
    "Plan": "plan",
    "ResolvedPlan": "plan",
    "LayerPlan": "plan",
    "Constraint": "plan",
    "purify": "purify",
    "coupled_layers": "structure",
    "plan_for": "rates",
    "LatencyPlan": "latency",
    "measure_speedup": "latency",
    "remove_unused_paths": "paths",
    "report_of": "paths",
    "compact": "compact",
    "optimize": "optimize",
    "import_history_": "importers",
    "import_masks_": "importers",
    "load_masked_": "importers",
    "carry_state": "carry",
    "carry_tensors": "carry",
    "save": "artefact",
    "load": "artefact",
    "Engine": "engine",
    "CompactConv2d": "nn",
    "CompactLinear": "nn",
    "Error": "errors",
    "PlanError": "errors",
    "TraceError": "errors",
    "CompactError": "errors",
    "OptimizeError": "errors",
    "ArtefactError": "errors",
}
__all__ = ["__version__", *_PARTS]


def __getattr__(name: str) -> Any:
    if name in _PARTS:
        value = getattr(importlib.import_module(f"{__name__}.{_PARTS[name]}"), name)
        globals()[name] = value
        return value
    if not name.startswith("__") and find_spec(f"{__name__}.{name}"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PARTS})


class _Package(ModuleType):
    # `purify` and `compact` are functions and also the modules that define them. Importing such a module would make it
    # the package's attribute; the function keeps the name, and the module stays importable as structadmm.compact.
    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _PARTS and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
