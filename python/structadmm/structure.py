"""What can be pruned together: coupled filters.

Filters that a network adds up (the layers that write into one residual stream, a convolution and the depthwise one
behind it) can only be cut together, and conv groups and attention heads stay of one size. `coupled_layers` finds what
this means for the filters of every layer, `ADMM(..., coupled=)` prunes them so that all that it prunes can go.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from .analysis import Analysis, components
from .constraints import Coupled
from .paths import homes
from .trace import trace
from .tracking import Ints


def coupled_layers(model: nn.Module, example: Tensor | Sequence[Tensor]) -> list[Coupled]:
    """Sets of layers whose filters go together, in the order of the network; layers whose filters each go by themselves
    are left out. Layers with one weight count as one, under the first name of the weight.

    Left out too are layers whose filters can't go at all, such as those that make the network's output or feed a
    LayerNorm. Raises TraceError where the model can't be traced.
    """
    sets = filter_sets(model, example, "coupled_layers")[0]
    return [names for names in sets if len(names) > 1 or not names.plain]


Reads = tuple[Ints, Ints]


def filter_sets(
    model: nn.Module, example: Tensor | Sequence[Tensor], who: str = "filter_sets"
) -> tuple[list[Coupled], dict[str, Reads]]:
    """(sets of layers whose filters go together, single layers included; layer -> per input channel the number of the
    set that fills it, or -1, and which of the set's classes), for all convolutions and linear layers.

    Layers of which a filter can't go are in no set; a shared weight's are there once, under the first layer that has
    it. A depthwise convolution's channels are its filters: it reads none.
    Raises TraceError where the model can't be traced.
    """
    analysis = Analysis(trace(model, example, who, share=True))
    label = analysis.label
    locked = np.zeros(analysis.n_ids, bool)
    for ids, _ in analysis.locks:
        locked[label[ids]] = True
    home = homes(model, analysis)
    # Channels that something else fills too stay, whatever the filters are: columns of an embedding, units of a
    # recurrent layer, filters of a layer by a class that a plan knows nothing of.
    for node, facts in analysis.facts.items():
        if node in analysis.tables:
            locked[label[facts.ids[~facts.const]]] = True
    for recurrent in analysis.recurrent.values():
        locked[label[recurrent.outs.ids]] = True
    for node, layer in analysis.layers.items():
        if not isinstance(model.get_submodule(home[str(node.target)]), (nn.Linear, nn.modules.conv._ConvNd)):
            locked[label[layer.outs.ids]] = True
    names = set(home.values())
    first: dict[int, str] = {}
    owner = {n: first.setdefault(id(m._parameters.get("weight", m)), n) for n, m in model.named_modules() if n in names}
    labels: dict[str, Ints] = {}
    for node, layer in analysis.layers.items():
        name = home[str(node.target)]
        mine = label[layer.outs.ids].reshape(-1)
        if not locked[mine].any():
            labels.setdefault(owner.get(name, name), mine)
    # Sets are layers with a label in common, perhaps through others.
    holder = np.full(analysis.n_ids, -1)
    edges = []
    for i, mine in enumerate(labels.values()):
        known = holder[mine]
        edges.append((known[known >= 0], np.full(int((known >= 0).sum()), i)))
        holder[mine] = i
    members: dict[int, list[str]] = {}
    for name, component in zip(labels, components(len(labels), edges).tolist(), strict=True):
        members.setdefault(component, []).append(name)
    cells = _cells(analysis, labels)
    sets = []
    number, place = np.full(analysis.n_ids, -1), np.zeros(analysis.n_ids, np.int64)
    for i, layers in enumerate(members.values()):
        found = np.concatenate([labels[name] for name in layers])
        found = found[np.sort(np.unique(found, return_index=True)[1])]  # in the order of the first layer's filters
        number[found], place[found] = i, np.arange(len(found))
        _, own = np.unique(cells[found], return_inverse=True)
        classes = {name: torch.from_numpy(place[labels[name]]) for name in layers}
        sets.append(Coupled(layers, classes, torch.from_numpy(own.reshape(-1))))
    reads: dict[str, Reads] = {}
    for node, layer in analysis.layers.items():
        depthwise = layer.groups > 1 and layer.weight.shape[1] == 1
        ins = label[layer.ins.ids].reshape(-1)[: 0 if depthwise else None]
        reads[home[str(node.target)]] = (number[ins], np.where(number[ins] < 0, 0, place[ins]))
    return sets, reads


def _cells(analysis: Analysis, labels: dict[str, Ints]) -> Ints:
    """[ids] a number for each label that filters have: those of one number are filters of the same layers and of the
    same conv groups and rows, of which a network keeps as many in each."""
    cells = np.zeros(analysis.n_ids, np.int64)
    last = 0

    def split(at: Ints, keys: Ints) -> None:
        nonlocal last
        _, new = np.unique(cells[at] * (keys.max(initial=0) + 1) + keys, return_inverse=True)
        cells[at] = last + 1 + new
        last = int(cells[at].max(initial=last))

    for mine in labels.values():
        split(*np.unique(mine, return_counts=True))
    rows = [f.ids.reshape(la.groups, -1) for la in analysis.layers.values() if la.groups > 1 for f in (la.ins, la.outs)]
    for _, ids in analysis.grids:
        axes = [d for d, n in enumerate(ids.shape) if n > 1]
        rows += [ids.reshape(-1, ids.shape[axes[-1]])] if len(axes) > 1 else []
    for ids in rows:
        at, where = np.unique(analysis.label[ids], return_index=True)
        row = where // ids.shape[1]
        if 2 * len(np.unique(row)) <= len(at):  # else a row is one channel
            split(at, row)
    return cells
