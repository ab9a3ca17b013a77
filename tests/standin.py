"""run_segment in Python, where the library lacks it."""

import torch

from structadmm import artefact, ops

_KEPT = []


def install() -> None:
    if hasattr(torch.ops.structadmm, "run_segment") or _KEPT:
        return
    library = torch.library.Library("structadmm", "FRAGMENT")
    library.define("run_segment(Tensor[] inputs, Tensor program, str dtype, str shapes) -> Tensor[]")
    networks = {}

    def run(inputs, program, dtype, shapes):
        data = program.numpy().tobytes(), dtype
        if data not in networks:
            networks[data] = artefact.from_bytes(data[0]).to(getattr(torch, dtype))
        inside = getattr(torch, dtype)
        with torch.no_grad():
            out = networks[data](*(x.to(inside) for x in inputs))
        outs = out if isinstance(out, (tuple, list)) else (out,)
        return [t.to(inputs[0].dtype).clone(memory_format=torch.contiguous_format) for t in outs]

    library.impl("run_segment", run, "CPU")
    torch.library.register_fake("structadmm::run_segment", ops._fake_segment)
    _KEPT.append(library)
