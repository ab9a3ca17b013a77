"""The built libraries: what they may depend on, what an ISA object may contain, and how an ISA is forced.

The objects of the build are looked at where a build tree is found: in build/ of the checkout, or STRUCTADMM_BUILD.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import structadmm
from structadmm import _core
from structadmm._load import LIBRARY

ROOT = Path(__file__).resolve().parent.parent
TARGET = (2, 11)
SHIM_HEADERS = ["csrc/stable/c/shim.h", "csrc/inductor/aoti_torch/c/shim.h", "csrc/inductor/aoti_torch/c/shim_cpu.h"]


def tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"no {name} (binutils) on this machine")
    return path


def output(*command: str | Path) -> str:
    return subprocess.run([str(c) for c in command], check=True, capture_output=True, text=True).stdout


def undefined(library: Path) -> list[str]:
    """Undefined dynamic symbols, with their versions, weak ones left out (they may stay undefined)."""
    lines = output(tool("nm"), "-D", "--undefined-only", library).splitlines()
    return [line.split()[-1] for line in lines if line.split()[-2] == "U"]


def run_python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    package = str(Path(structadmm.__file__).resolve().parent.parent)
    path = os.pathsep.join([package, os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path, **env}
    )


def shim_versions() -> dict[str, tuple[int, int]]:
    """For each function of torch's C shim, the torch that its declaration is guarded by ((0, 0): by none)."""
    versions: dict[str, tuple[int, int]] = {}
    for header in SHIM_HEADERS:
        text = (Path(torch.__file__).parent / "include/torch" / header).read_text()
        stack: list[tuple[int, int]] = []
        for line in text.splitlines():
            if re.match(r"\s*#\s*if", line):
                guard = re.search(r"TORCH_FEATURE_VERSION >= TORCH_VERSION_(\d+)_(\d+)_0", line)
                stack.append((int(guard[1]), int(guard[2])) if guard else (0, 0))
            elif re.match(r"\s*#\s*endif", line):
                stack.pop()
            for name in re.findall(r"\b((?:aoti_)?torch_\w+)\s*\(", line):
                versions[name] = max([*stack, (0, 0)])
    return versions


def test_the_op_library_stands_on_the_c_shim_of_the_target_alone():
    shim = shim_versions()
    newest = max(shim.values())
    if tuple(int(x) for x in torch.__version__.split(".")[:2]) > TARGET:
        assert newest > TARGET, "no guard newer than the target was read: the headers look different now"
    ours = [s for s in undefined(LIBRARY) if "@" not in s]  # glibc's, gcc's and libstdc++'s carry a version
    assert len(ours) > 20
    for symbol in ours:
        assert not symbol.startswith("_Z"), f"{symbol} is a C++ symbol that no stable ABI promises"
        assert symbol in shim, f"{symbol} is not declared in torch's C shim"
        assert shim[symbol] <= TARGET, f"{symbol} came with torch {shim[symbol]}"


def test_libraries_need_no_python_no_path_and_export_nothing_else():
    for library, exported in ((LIBRARY, set()), (Path(_core.__file__), {"PyInit__core"})):
        dynamic = output(tool("readelf"), "-d", library)
        assert "RPATH" not in dynamic and "RUNPATH" not in dynamic and "libpython" not in dynamic
        defined = output(tool("nm"), "-D", "--defined-only", library).splitlines()
        assert {line.split()[-1].split("@")[0] for line in defined} <= exported
    needed = re.findall(r"NEEDED.*\[(.+)\]", output(tool("readelf"), "-d", LIBRARY))
    assert [n for n in needed if "torch" in n or "c10" in n or "cuda" in n] == ["libtorch_cpu.so"]
    assert "libtorch" not in output(tool("readelf"), "-d", Path(_core.__file__))


def test_the_cpp_library_exports_its_header_and_needs_the_system_alone():
    library = Path(structadmm.__file__).resolve().parent / "lib/libstructadmm.so"
    dynamic = output(tool("readelf"), "-d", library)
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic
    needed = re.findall(r"NEEDED.*\[(.+?)\.so", dynamic)
    assert set(needed) <= {"libstdc++", "libm", "libgcc_s", "libc", "libpthread", "ld-linux-x86-64", "ld-linux-aarch64"}
    lines = output(tool("nm"), "-DC", "--defined-only", library).splitlines()
    names = {re.sub(r"^\w+ \w (typeinfo (name )?for |vtable for )?", "", line) for line in lines}
    engine = "Engine ~Engine operator= inputs outputs input_sizes output_sizes metadata run"
    api = {"STRUCTADMM_0", *(f"structadmm::{n}" for n in ("version", "supported_isas", "Error"))}
    assert {re.split(r"[@(\[]", n)[0] for n in names} == api | {f"structadmm::Engine::{n}" for n in engine.split()}


def core_objects() -> list[Path]:
    """The objects of structadmm_core in the build tree that was written last."""
    places = [Path(os.environ["STRUCTADMM_BUILD"])] if "STRUCTADMM_BUILD" in os.environ else ROOT.glob("build/*")
    found = [sorted(p.glob("CMakeFiles/structadmm_core.dir/csrc/**/*.o")) for p in places]
    found = [objects for objects in found if objects]
    if not found:
        pytest.skip("no build tree in build/ or STRUCTADMM_BUILD")
    return max(found, key=lambda objects: max(o.stat().st_mtime for o in objects))


def test_isa_objects_define_no_weak_symbols():
    """The linker keeps one copy of a weak symbol: the AVX-512 one would kill an older CPU in code that did not ask."""
    objects = [o for o in core_objects() if o.name.startswith("x86_")]
    if not objects:
        pytest.skip("no x86 objects in this build")
    for obj in objects:
        symbols = [line.split() for line in output(tool("nm"), "--defined-only", obj).splitlines()]
        assert symbols
        weak = [s[-1] for s in symbols if s[-2] in "WwVvu"]
        assert not weak, f"{obj.parent.name}/{obj.name} defines weak {weak}"


def test_wide_registers_stay_in_isa_objects():
    marks = {"avx2": r"%ymm", "avx512": r"%zmm", "avx512_bf16": r"vdpbf16ps|vcvtne2?ps2bf16", "amx_bf16": r"%tmm"}
    order = list(marks)
    seen = set()
    for obj in core_objects():
        code = output(tool("objdump"), "-d", "--no-show-raw-insn", obj)
        match = re.match(r"x86_(\w+)", obj.name)
        isa = match[1] if match else ""
        assert not isa or isa in order
        for name, pattern in marks.items():
            if re.search(pattern, code) is not None:
                assert isa and order.index(name) <= order.index(isa), f"{obj.parent.name}/{obj.name} holds {name} code"
                seen.add((isa, name))
    for isa in {isa for isa, _ in seen}:
        assert (isa, isa) in seen, f"no object of {isa} holds its own code"
    if any(o.name.startswith("x86_") for o in core_objects()):
        assert {isa for isa, _ in seen} >= {"avx2", "avx512"}


def test_importing_the_package_is_quick_and_lazy():
    code = "import sys, structadmm; assert not {'torch', 'numpy'} & {*sys.modules}; print(structadmm.__version__)"
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == structadmm.__version__ == _core.__version__ == torch.ops.structadmm.version()
    done = run_python("import sys; from structadmm import _core; _core.isa(); assert 'torch' not in sys.modules")
    assert done.returncode == 0, done.stderr


def test_public_names_are_there_and_functions_keep_theirs():
    import structadmm.compact
    import structadmm.purify  # noqa: F401  these modules are named as the functions that they define

    for name in structadmm.__all__:
        assert getattr(structadmm, name) is not None, name
    assert callable(structadmm.compact) and callable(structadmm.purify)
    with pytest.raises(AttributeError, match="no attribute 'prune'"):
        _ = structadmm.prune


PROBE = """
import torch
from structadmm import _core, ops
# Not by torch's sin, whose last bits depend on how its threads cut the tensor.
w = (torch.arange(70 * 45).view(70, 5, 3, 3) * 7919 % 1009).float() / 1009 - 0.5
sums = [ops.group_sumsq(w, s) for s in ("filter", "channel", "column", "block_column", "element")]
assert all((torch.from_numpy(_core.group_sumsq(w.numpy(), s)) == t).all() for s, t in
           zip(("filter", "channel", "column", "block_column", "element"), sums))
print(ops.isa(), _core.isa(), torch.cat(sums).view(torch.int32).sum().item())
"""


def test_a_forced_isa_runs_and_gives_the_same_bits():
    answers = set()
    for isa in _core.supported_isas():
        done = run_python(PROBE, STRUCTADMM_ISA=isa)
        assert done.returncode == 0, done.stderr
        ran, core_ran, bits = done.stdout.split()
        assert ran == core_ran == isa
        answers.add(bits)
    assert len(answers) == 1
    unforced = run_python(PROBE, STRUCTADMM_ISA="")
    assert unforced.stdout.split()[0] == _core.supported_isas()[-1]


@pytest.mark.parametrize("value", ["sse9", "AVX2", "neon"])
def test_an_unknown_isa_is_an_error_at_the_first_op_and_names_the_choices(value):
    for code in (
        "import torch; from structadmm import ops; ops.group_sumsq(torch.ones(2, 2), 'filter')",
        "import numpy; from structadmm import _core; _core.group_sumsq(numpy.ones((2, 2), 'f4'), 'filter')",
    ):
        done = run_python(code, STRUCTADMM_ISA=value)
        assert done.returncode == 1
        assert f"ValueError: STRUCTADMM_ISA: got '{value}', wanted one of scalar" in done.stderr


def test_bad_thread_counts_are_errors():
    done = run_python("from structadmm import _core; _core.get_num_threads()", STRUCTADMM_NUM_THREADS="two")
    assert "ValueError: STRUCTADMM_NUM_THREADS: got 'two', wanted 1 to 1024" in done.stderr
    done = run_python("from structadmm import _core; print(_core.get_num_threads())", STRUCTADMM_NUM_THREADS="3")
    assert done.stdout.strip() == "3"
