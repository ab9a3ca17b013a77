"""What can be pruned together: coupled filters.

Filters that a network adds up (the layers that write into one residual stream, a convolution and the depthwise one
behind it) can only be cut together. `coupled_layers` finds them, `ADMM(..., coupled=)` prunes them as one group.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from .analysis import Analysis
from .trace import trace


def coupled_layers(model: nn.Module, example: Tensor | Sequence[Tensor]) -> list[tuple[str, ...]]:
    """Sets of layers whose filters go together one by one, in the order of the network; single layers are left out.
    Layers with one weight count as one, under the first name of the weight.

    Left out too are layers whose filters can't go at all, such as those that make the network's output or feed a
    LayerNorm. Raises TraceError where the model can't be traced.
    """
    return [names for names in filter_sets(model, example, "coupled_layers")[0] if len(names) > 1]


Reads = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]


def filter_sets(
    model: nn.Module, example: Tensor | Sequence[Tensor], who: str = "filter_sets"
) -> tuple[list[tuple[str, ...]], dict[str, Reads]]:
    """(sets of layers whose filters go together, single layers included; layer -> per input channel the number of the
    set that fills it, or -1, and which of the set's filters), for all convolutions and linear layers.

    Layers whose filters can't go are in no set; a shared weight's are there once, under the first layer that has it. A
    depthwise convolution's channels are its filters: it reads none.
    Raises TraceError where the model can't be traced.
    """
    analysis = Analysis(trace(model, example, who, share=True))
    fixed = {int(n) for ids, _ in analysis.locks for n in analysis.label[ids]}
    first: dict[int, str] = {}
    names = {str(node.target) for node in analysis.layers}
    owner = {n: first.setdefault(id(m._parameters.get("weight", m)), n) for n, m in model.named_modules() if n in names}
    sets: dict[bytes, dict[str, None]] = {}
    of: dict[int, tuple[bytes, int]] = {}
    for node, layer in analysis.layers.items():
        labels = analysis.label[layer.outs.ids].reshape(-1)
        if not fixed & set(labels.tolist()):
            name = str(node.target)
            sets.setdefault(labels.tobytes(), {})[owner.get(name, name)] = None
            of.update({label: (labels.tobytes(), i) for i, label in enumerate(labels.tolist())})
    number = {key: i for i, key in enumerate(sets)}
    reads: dict[str, Reads] = {}
    for node, layer in analysis.layers.items():
        depthwise = layer.groups > 1 and layer.weight.shape[1] == 1
        ins = [] if depthwise else analysis.label[layer.ins.ids].reshape(-1).tolist()
        found = [(number[of[n][0]], of[n][1]) if n in of else (-1, 0) for n in ins]
        columns = np.array(found, np.int64).reshape(-1, 2)
        reads[str(node.target)] = (columns[:, 0], columns[:, 1])
    return [tuple(found) for found in sets.values()], reads
