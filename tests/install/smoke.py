"""Smoke test of an installed structadmm: the op library loads under this torch and computes what plain torch computes.

Also that the package holds what a C++ program needs. Run by the scripts beside it with the interpreter of the
environment under test.
"""

import struct
import tempfile
from pathlib import Path

import torch

import structadmm
from structadmm import ops, reference
from structadmm.nn import CompactConv2d


def has_symbol_table(elf: bytes) -> bool:
    """Whether an ELF file has a section of type SHT_SYMTAB; CUDA code within it may well name one."""
    (headers,) = struct.unpack_from("<Q", elf, 0x28)
    size, count = struct.unpack_from("<HH", elf, 0x3A)
    return any(struct.unpack_from("<I", elf, headers + i * size + 4)[0] == 2 for i in range(count))


def main() -> None:
    torch.manual_seed(0)
    w = torch.randn(16, 8, 3, 3)
    for structure in ("filter", "channel", "column", "block_column", "element"):
        torch.testing.assert_close(ops.group_sumsq(w, structure), reference.group_sumsq(w, structure))
    z, u = torch.zeros_like(w), torch.zeros_like(w)
    keep, _ = ops.project_update_(w, z, u, "column", 10)
    assert int(keep.sum()) == 10 and torch.equal(z + u, w)

    conv = torch.nn.Conv2d(8, 16, 3, padding=1).eval()
    with torch.no_grad():
        conv.weight.copy_(z)
        x = torch.randn(2, 8, 9, 9)
        torch.testing.assert_close(CompactConv2d.from_dense(conv).eval()(x), conv(x), rtol=1e-5, atol=1e-5)
        net = torch.nn.Sequential(conv, torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()).eval()
        with tempfile.TemporaryDirectory() as folder:
            structadmm.save(net, f"{folder}/net", example=x)
            scores = torch.from_numpy(structadmm.Engine(f"{folder}/net").run(x.numpy()))
        torch.testing.assert_close(scores, net(x), rtol=1e-5, atol=1e-5)

    package = Path(structadmm.__file__).parent
    for name in (
        "include/structadmm/engine.h",
        "lib/libstructadmm.so",
        "lib/cmake/structadmm/structadmmConfig.cmake",
        "lib/cmake/structadmm/structadmmConfigVersion.cmake",
    ):
        assert (package / name).is_file(), f"{name} is not in the package"
    for library in (*package.glob("*.so"), package / "lib/libstructadmm.so"):
        assert not has_symbol_table(library.read_bytes()), f"{library.name} is not stripped"
    print(f"structadmm {structadmm.__version__} with torch {torch.__version__}: ok")


if __name__ == "__main__":
    main()
