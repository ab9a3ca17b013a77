"""The direction of imports and includes: a file may use its own layer and the layers below it, never one above.

The layers are stated here and in CONTRIBUTING.md. A file that no layer names fails the test, so that a new one finds
its place.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

PYTHON_LAYERS: list[set[str]] = [
    {"errors", "files"},
    {"allocate", "decisions", "engine", "groups", "layers", "reference", "timing"},
    {"_load", "ops"},
    {"constraints", "masks", "plan", "schedules", "copies", "nn", "symbolic", "aten", "plain", "unpack"},
    {"exported"},
    {"admm", "trace"},
    {"tracking", "shared", "pointwise", "movement", "mixing", "recurrent", "channels", "analysis"},
    {"layout", "rewrite", "paths", "purify", "compact", "carry", "structure", "importers", "forms"},
    {"allowed"},
    {"manifest"},
    {"container"},
    {"segments"},
    {"artefact"},
    {"optimize"},
    {"latency"},
    {"rates"},
    {"data", "models", "report"},
    {"pipeline"},
    {"progress"},
    {"cli"},
]

CPP_LAYERS: list[str] = ["base", "simd", "kernels", "ops", "format", "runtime", "bindings"]
# The core never sees torch or Python: these may be included below the bindings by nobody.
FOREIGN = re.compile(r"^(torch|ATen|c10|pybind11|Python\.h)")


def rank(module: str) -> int:
    for depth, layer in enumerate(PYTHON_LAYERS):
        if module in layer:
            return depth
    pytest.fail(f"python/structadmm/{module}.py: no layer in tests/test_layering.py names it")


def imported_modules(path: Path) -> set[str]:
    """Modules of this package that a file imports when it is imported itself or later, inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level == 1 and base:
                found.add(base.split(".")[0])
            elif (node.level == 1 and not base) or base == "structadmm":
                found.update(alias.name for alias in node.names)
            elif base.startswith("structadmm."):
                found.add(base.split(".")[1])
        elif isinstance(node, ast.Import):
            found.update(a.name.split(".")[1] for a in node.names if a.name.startswith("structadmm."))
    return {name for name in found if (path.parent / f"{name}.py").exists()}


@pytest.mark.parametrize("path", sorted((ROOT / "python/structadmm").glob("*.py")), ids=lambda p: p.stem)
def test_python_imports_point_down(path: Path) -> None:
    if path.stem in ("__init__", "__main__"):
        return
    above = {m for m in imported_modules(path) if m != path.stem and rank(m) > rank(path.stem)}
    assert not above, f"{path.name} imports from layers above it: {sorted(above)}"


@pytest.mark.parametrize(
    "path",
    sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".inc"}),
    ids=lambda p: str(p.relative_to(ROOT / "csrc")),
)
def test_cpp_includes_point_down(path: Path) -> None:
    layer = path.relative_to(ROOT / "csrc").parts[0]
    if layer == "include":  # the public API stands on nothing but std
        layer = "base"
    assert layer in CPP_LAYERS, f"{path}: no layer names the folder {layer}"
    for include in re.findall(r'^\s*#\s*include\s+[<"]([^">]+)[">]', path.read_text(), flags=re.M):
        if FOREIGN.match(include):
            assert layer == "bindings", f"{path.name} includes {include}: only csrc/bindings sees torch and Python"
        top = include.split("/")[0]
        if top in CPP_LAYERS:
            assert CPP_LAYERS.index(top) <= CPP_LAYERS.index(layer), f"{path.name} includes {include}, a layer above it"


def test_bindings_do_not_see_each_other() -> None:
    for side, other in (("torch", "python"), ("python", "torch")):
        for path in (ROOT / "csrc/bindings" / side).rglob("*"):
            if path.is_file():
                assert f"bindings/{other}" not in path.read_text(), f"{path.name} includes from bindings/{other}"
