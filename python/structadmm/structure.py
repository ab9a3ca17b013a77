"""What can be pruned together: coupled filters.

Filters that a network adds up (the layers that write into one residual stream, a convolution and the depthwise one
behind it) can only be cut together. `coupled_layers` finds them, `ADMM(..., coupled=)` prunes them as one group.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import Tensor, nn

from .analysis import Analysis
from .trace import trace


def coupled_layers(model: nn.Module, example: Tensor | Sequence[Tensor]) -> list[tuple[str, ...]]:
    """Sets of layers whose filters go together one by one, in the order of the network; single layers are left out.

    Left out too are layers whose filters can't go at all, such as those that make the network's output or feed a
    LayerNorm. Raises TraceError where the model can't be traced.
    """
    return [names for names in filter_sets(model, example, "coupled_layers")[0] if len(names) > 1]


def filter_sets(
    model: nn.Module, example: Tensor | Sequence[Tensor], who: str = "filter_sets"
) -> tuple[list[tuple[str, ...]], dict[str, dict[int, float]]]:
    """(sets of layers whose filters go together, single layers included; layer -> {number of a set: the share of the
    layer's input channels that this set's filters fill}), for all convolutions and linear layers.

    Layers whose filters can't go are in no set. What no set fills is left out of the shares; a depthwise convolution,
    whose channels are its filters, reads none. Raises TraceError where the model can't be traced.
    """
    analysis = Analysis(trace(model, example, who))
    fixed = {int(n) for ids, _ in analysis.locks for n in analysis.label[ids]}
    sets: dict[bytes, list[str]] = {}
    of: dict[int, bytes] = {}
    for node, layer in analysis.layers.items():
        labels = analysis.label[layer.outs.ids].reshape(-1)
        if not fixed & set(labels.tolist()):
            sets.setdefault(labels.tobytes(), []).append(str(node.target))
            of.update(dict.fromkeys(labels.tolist(), labels.tobytes()))
    number = {key: i for i, key in enumerate(sets)}
    reads: dict[str, dict[int, float]] = {}
    for node, layer in analysis.layers.items():
        ins = analysis.label[layer.ins.ids].reshape(-1).tolist()
        depthwise = layer.groups > 1 and layer.weight.shape[1] == 1
        found = Counter(number[of[n]] for n in ins if n in of)
        reads[str(node.target)] = {} if depthwise else {s: n / len(ins) for s, n in found.items()}
    return [tuple(names) for names in sets.values()], reads
