"""Which channels of a traced network can go: the analysis that remove_unused_paths, purify and compact stand on.

Three passes over the graph, each near-linear in the number of channels:

1. forward (channels.py), *ids and constants*: which channel comes from which filter, and which hold a constant.
2. backward, *need*: a channel is needed when something that reaches the output reads it. A filter that is constant or
   not needed itself reads nothing.
3. per class of tied ids, *removal*: every tensor that holds the channel must not need it, or hold a constant that each
   layer which reads it can take into its bias exactly. Of the channels whose constant some layer can't take, because it
   pads with zeros, one stays and carries it for the others. An operation that is not tracked pins its channels. Uses of
   one tensor at several places are tied (shared.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import fx

from .channels import Channels
from .pointwise import BINARY_NAMES
from .trace import Traced
from .tracking import Bools, Floats, Ints, Layer, flat, operation, title

# Largest ratio of constants at which one channel carries another's weights: rounding grows by as much at worst.
MAX_RATIO = 100.0


# Operations that take the shape or type of their second operand and no values.
LIKE = ("reshape_as", "view_as", "type_as")


def components(n: int, edges: Sequence[tuple[Ints, Ints]]) -> Ints:
    """[n] labels: equal exactly for nodes that the edges connect (minimum propagation with pointer jumping)."""
    label = np.arange(n)
    if not edges:
        return label
    a = np.concatenate([e[0].reshape(-1) for e in edges])
    b = np.concatenate([e[1].reshape(-1) for e in edges])
    while True:
        la, lb = label[a], label[b]
        if np.array_equal(la, lb):
            return label
        low = np.minimum(la, lb)
        np.minimum.at(label, la, low)
        np.minimum.at(label, lb, low)
        while not np.array_equal(label, label[label]):
            label = label[label]


class Analysis(Channels):
    """The three passes over a traced network; afterwards `removed` [ids] says whether a channel goes.

    create_bias: a layer without bias may get one. elide: an addition of a constant may become a bias, its operand
    vanishes; `elided` then names the operand and the constant per channel.
    """

    def __init__(self, traced: Traced, *, create_bias: bool = True, elide: bool = True) -> None:
        super().__init__(traced, create_bias)
        self.elide = elide
        self.elided: dict[fx.Node, tuple[int, Floats]] = {}
        self.need: dict[fx.Node, Bools] = {}
        # Channels that are needed even where they are constant.
        self.hard: dict[fx.Node, Bools] = {}
        self.reasons: dict[int, str] = {}
        self._kept = np.zeros(self.n_ids, bool)
        self.live: set[fx.Node] = set()
        self._backward()
        if self.elided:
            self._forget()
        self.tie_uses(self.live)
        # An operand that becomes a bias is not tied to the other one any more.
        sums = (e for n, pair in self.sums.items() for i, e in enumerate(pair) if self.elided.get(n, (2,))[0] != i)
        self.label = components(self.n_ids, [*self.edges, *sums])
        self._remove()

    # Backward: need

    def _backward(self) -> None:
        for node in reversed(self.module.graph.nodes):
            facts = self.facts.get(node)
            if not self._reaches(node):
                if facts is not None:
                    self.need[node] = np.zeros(facts.ids.shape, bool)
                if node in self.layers:
                    self.layers[node].needed = self.need[node].reshape(-1)
                continue
            self.live.add(node)
            if facts is None:
                if node not in self.parts and node not in self.sizes:
                    for source in node.all_input_nodes:
                        self._demand(source, None)
                continue
            need = self.need.setdefault(node, np.zeros(facts.ids.shape, bool))
            layer = self.layers.get(node)
            if layer is not None:
                self._read(layer, need.reshape(-1))
                continue
            if node in self.readers:
                for source, wanted, hard in self.readers[node](need):
                    self._demand(source, wanted)
                    if hard is not None and source in self.facts:
                        shape = self.facts[source].ids.shape
                        self.hard[source] = self.hard.get(source, np.False_) | hard.reshape(shape)
                continue
            tracked = [s for s, _, _ in self.sources[node]]
            alike = operation(node) in LIKE and node.op != "call_module"
            for source in node.all_input_nodes[:1] if alike else node.all_input_nodes:
                origin = self.parts[source][0] if source in self.parts else source
                if origin not in tracked and source not in self.sizes:
                    self._demand(source, None)
            skip = self._elidable(node, need) if self.elide else None
            for i, (source, positions, matters) in enumerate(self.sources[node]):
                if i == skip:
                    continue
                wanted = (need if matters is None else need & matters) & (positions >= 0)
                into = np.zeros(self.facts[source].ids.size, bool) if source in self.facts else None
                if into is not None:
                    into[positions[wanted]] = True
                self._demand(source, into)

    def _reaches(self, node: fx.Node) -> bool:
        """Whether anything but additions that became biases leads from a node to the output; asked from there on."""
        if node.op == "output" or not node.users:
            return True
        operands = ((u, u.args[self.elided[u][0]] if u in self.elided else None) for u in node.users)
        return any(u in self.live and gone is not node for u, gone in operands)

    def _forget(self) -> None:
        """Drop what operations tied and locked that lead to nothing any more."""
        dead = [span for node, span in self.spans.items() if node not in self.live]
        edges = {i for e, _ in dead for i in range(e.start, e.stop)}
        locks = {i for _, k in dead for i in range(k.start, k.stop)} - self.lasting
        self.edges = [e for i, e in enumerate(self.edges) if i not in edges]
        self.locks = [k for i, k in enumerate(self.locks) if i not in locks]
        self.sums = {node: pair for node, pair in self.sums.items() if node in self.live}

    def _demand(self, node: fx.Node, wanted: Bools | None) -> None:
        """Mark channels of a tensor (all of them for None) as needed."""
        facts = self.facts.get(node)
        if node in self.parts:
            origin, parts = self.parts[node]
            for p in parts if wanted is None else []:
                into = np.zeros(self.facts[origin].ids.size, bool)
                into[p.reshape(-1)] = True
                self._demand(origin, into)
        if facts is None:
            return
        need = self.need.setdefault(node, np.zeros(facts.ids.shape, bool))
        need |= True if wanted is None else wanted.reshape(facts.ids.shape)

    def _read(self, layer: Layer, need: Bools) -> None:
        layer.needed = need
        rows = need & ~layer.silent
        _, cg = layer.reads.shape
        if layer.full:
            wanted = np.repeat(rows.reshape(layer.groups, -1).any(1), cg)
        else:
            wanted = (layer.reads & rows[:, None]).reshape(layer.groups, -1, cg).any(1).reshape(-1)
        self._demand(layer.source, wanted if layer.direct else None)

    def _elidable(self, node: fx.Node, need: Bools) -> int | None:
        """Which operand of an addition is a constant in every needed channel, so that a bias can stand for it."""
        kind = BINARY_NAMES.get(operation(node))
        sources = self.sources[node]
        if kind not in ("add", "sub") or len(sources) != 2 or len(node.args) != 2 or node.kwargs or not need.any():
            return None
        if sum(n > 1 for n in need.shape) > 1:
            return None
        for i in (1, 0) if kind == "add" else (1,):
            source, positions, _ = sources[i]
            if sources[1 - i][0] is not node.args[1 - i] or self.shapes[sources[1 - i][0]] != self.shapes[node]:
                continue
            facts = flat(self.facts[source])
            if (facts.const[positions] | ~need).all():
                constant = np.where(need & facts.const[positions], facts.value[positions], 0.0).reshape(-1)
                self.elided[node] = (i, constant if kind == "add" else -constant)
                return i
        return None

    # Removal

    def _remove(self) -> None:
        alive = np.zeros(self.n_ids, bool)
        for ids, reason in self.locks:
            alive[ids] = True
            for label in np.unique(self.label[ids]).tolist():
                self.reasons.setdefault(label, reason)
        for node, facts in self.facts.items():
            alive[facts.ids[self.need[node] & ~facts.const]] = True
            if node in self.hard:
                alive[facts.ids[self.hard[node]]] = True
        self._kept[self.label[alive]] = True
        for ids, reason in self.hints:
            for label in np.unique(self.label[ids[self._kept[self.label[ids]]]]).tolist():
                self.reasons.setdefault(label, reason)
        self._merge()
        self._repair()
        self.removed: Bools = ~self._kept[self.label]

    def give_back(self, ids: Ints, reason: str) -> None:
        """Keep channels after all."""
        labels = np.unique(self.label[ids])
        self._keep(labels[~self._kept[labels]], reason)
        self._repair()
        self.removed = ~self._kept[self.label]

    def _rows(self, layer: Layer) -> Bools:
        """Filters that read their inputs."""
        assert layer.needed is not None
        return layer.needed & ~layer.silent

    def users(self, node: fx.Node, name: str) -> list[fx.Node]:
        """The nodes that use this tensor and that the output depends on; at least the node itself."""
        return [n for n in self.sharers(node, name) if n in self.live] or [node]

    def idle(self, node: fx.Node, name: str) -> Bools:
        """[channels] of a parameter with one value a channel: no use of it needs that."""
        idle = np.ones(self.facts[node].ids.size, bool)
        for n in self.users(node, name):
            if not (n in self.layers or n in self.norms or name in self.affine.get(n, ())):
                return np.zeros_like(idle)  # an operand, or a normalisation over all channels
            idle &= (self.removed[self.facts[n].ids] | ~self.need[n]).reshape(-1)
        return idle

    def reading(self, layer: Layer) -> Bools:
        """[O] rows of the weight that some use of it reads its inputs by."""
        out = np.zeros(len(layer.weight), bool)
        for n in self.users(layer.node, "weight"):
            out |= self._rows(self.layers[n]) if n in self.layers else True  # the rows of an embedding
        return out

    def _stuck(self, layer: Layer) -> Ints:
        """Input channels whose nonzero constant the layer can't take into its bias exactly."""
        ins = layer.ins
        at = np.flatnonzero(ins.const & (ins.value != 0) & ~self._kept[self.label[ins.ids]])
        if not at.size:
            return at
        cg = layer.reads.shape[1]
        reads, border = (a.reshape(layer.groups, -1, cg)[at // cg, :, at % cg] for a in (layer.reads, layer.border))
        bad = reads if layer.shift is None else border
        several = layer.shift in ("bias", "new") and not self.alone(layer.node, "bias")
        for n in self.users(layer.node, "bias") if several else ():  # one bias, one constant
            needed, differs = self.need[n].reshape(layer.groups, -1), self.layers[n].ins.value[at] != ins.value[at]
            bad = bad | (differs[:, None] & needed[at // cg] & reads)
        rows = self._rows(layer).reshape(layer.groups, -1)[at // cg]
        return at[(bad & rows).any(1)]

    def _alike(self, layer: Layer) -> tuple[Bools, Bools]:
        """Input channels that hold one constant, not 0, wherever the layer's weight is used: their weights may move;
        and those of them that weights may move to."""
        alike = layer.ins.const & (layer.ins.value != 0)
        carries = alike
        for n in self.users(layer.node, "weight"):
            other = self.layers.get(n)
            if other is None:  # the columns of an embedding are its output
                return np.zeros_like(alike), np.zeros_like(alike)
            alike = alike & other.ins.const & (other.ins.value == layer.ins.value)
            carries = carries & (self.need[other.source].reshape(-1) if other.direct else np.False_)
        return alike, alike & carries

    def _merge(self) -> None:
        """Of the channels that go but for a constant that some layer can't take, keep as few as can carry the others'
        weights.

        For a layer, channels with constants a and b are one channel: b with the weights w_b + (a/b) w_a, zero padding
        included.
        """
        where: dict[int, list[tuple[Layer, int]]] = {}
        # Per layer and conv group: channels that can carry others, [(label, index)].
        carriers: dict[tuple[fx.Node, int], list[tuple[int, int]]] = {}
        alike: dict[fx.Node, Bools] = {}
        for layer in self.layers.values():
            stuck = self._stuck(layer)
            labels = self.label[layer.ins.ids]
            for i in stuck.tolist():
                where.setdefault(int(labels[i]), []).append((layer, i))
            if stuck.size:
                alike[layer.node], carries = self._alike(layer)
                for i in np.flatnonzero(carries).tolist():
                    group = (layer.node, i // layer.reads.shape[1])
                    carriers.setdefault(group, []).append((int(labels[i]), i))
        serves: dict[int, int] = {}
        size: dict[int, float] = {}
        for (node, _), entries in carriers.items():
            values = self.layers[node].ins.value
            for label, i in entries:
                serves[label] = serves.get(label, 0) + 1
                size[label] = min(size.get(label, np.inf), abs(values[i]))
        # The most used and largest constants first: they become the carriers.
        for label in sorted(where, key=lambda k: (-serves.get(k, 0), -size.get(k, 0.0), k)):
            found = []
            for layer, i in where[label]:
                value = layer.ins.value
                group = (layer.node, i // layer.reads.shape[1])
                candidates = [
                    j
                    for other, j in carriers.get(group, [])
                    if alike[layer.node][i] and self._kept[other] and abs(value[i]) <= MAX_RATIO * abs(value[j])
                ]
                if not candidates:
                    break
                found.append((layer, i, max(candidates, key=lambda j, v=value: abs(v[j]))))  # type: ignore[misc]
            else:
                for layer, i, j in found:
                    layer.merges[i] = j
                continue
            layer, i = where[label][0]
            why = self.edge(layer.node)
            if layer.shift is None:
                why = "has no bias for"
            elif not layer.border[:, i % layer.reads.shape[1]].any():
                why = "adds to the bias that it shares with others something else than they for"
            self._keep(np.array([label]), f"{title(layer.node)} {why} its constant")

    def live_nodes(self) -> set[fx.Node]:
        """Nodes that the output still depends on once elided operands are gone."""
        live: set[fx.Node] = set()
        stack = [n for n in self.module.graph.nodes if n.op == "output"]
        while stack:
            node = stack.pop()
            if node in live:
                continue
            live.add(node)
            gone = node.args[self.elided[node][0]] if node in self.elided else None
            stack += [n for n in node.all_input_nodes if n is not gone]
        return live

    def _repair(self) -> None:
        """Give back channels until every tensor has one and the conv groups of every layer are of one size."""
        live = self.live_nodes()
        changed = True
        while changed:
            changed = False
            for node, facts in self.facts.items():
                labels = self.label[facts.ids.reshape(-1)]
                if node in live and not self._kept[labels].any():
                    self._keep(labels[:1], f"{title(node)} keeps one channel")
                    changed = True
            for node, layer in self.layers.items():
                if node in live and layer.groups > 1:
                    changed |= self._balance(layer)
            for node, rows in self.together:
                if node in live:
                    changed |= self._revive(node, rows)
            for node, ids in self.grids:
                if node in live:
                    changed |= self._even(node, self.label[ids])

    def _keep(self, labels: Ints, reason: str) -> None:
        self._kept[labels] = True
        for label in labels.tolist():
            self.reasons.setdefault(label, reason)

    def _balance(self, layer: Layer) -> bool:
        sides = [self.label[f.ids].reshape(layer.groups, -1) for f in (layer.ins, layer.outs)]
        counts = [self._kept[s].sum(1) for s in sides]
        stays = (counts[0] > 0) | (counts[1] > 0)
        changed = False
        for labels, count in zip(sides, counts, strict=True):
            want = max(int(count.max()), 1)
            for g in np.flatnonzero(stays & (count < want)):
                gone = labels[g][~self._kept[labels[g]]]
                self._keep(gone[: want - count[g]], f"{title(layer.node)} keeps its conv groups of one size")
                changed = True
        return changed

    def _revive(self, node: fx.Node, arrays: list[Ints]) -> bool:
        """Where one of several arrays has channels left in a row, each keeps at least one."""
        alive = [self._kept[self.label[a]].any(1) for a in arrays]
        wanted = np.logical_or.reduce(alive)
        changed = False
        for ids, has in zip(arrays, alive, strict=True):
            rows = np.flatnonzero(wanted & ~has)
            if rows.size:
                self._keep(self.label[ids[rows, 0]], f"{title(node)} keeps the head that it belongs to")
                changed = True
        return changed

    def _even(self, node: fx.Node, labels: Ints) -> bool:
        """As many channels in every row of a grid that keeps any; over several dimensions from the innermost out."""
        axes = [d for d, n in enumerate(labels.shape) if n > 1]
        grid = labels.reshape([labels.shape[d] for d in axes])
        changed = False
        for level in range(grid.ndim - 1, 0, -1):
            first = grid.reshape(*grid.shape[: level + 1], -1)[..., 0]  # what revives an entry at this level
            kept = self._kept[grid].reshape(*grid.shape[: level + 1], -1).any(-1).reshape(-1, grid.shape[level])
            count = kept.sum(1)
            want = int(count.max())
            rows = first.reshape(-1, grid.shape[level])
            for r in np.flatnonzero((count > 0) & (count < want)):
                gone = rows[r][~kept[r]]
                self._keep(gone[: want - count[r]], f"{title(node)} keeps its rows of one size")
                changed = True
        return changed

    # What the passes tell those who change weights

    def keep(self, ids: Ints) -> Bools:
        return ~self.removed[ids]

    def shift_of(self, layer: Layer) -> Floats:
        """[O] what must be added to the layer's output once removed inputs are gone and silent filters are without
        weights."""
        gone = layer.ins.const & self.removed[layer.ins.ids]
        gone[list(layer.merges)] = False
        delta = layer.response(np.where(gone, layer.ins.value, 0.0))
        delta[~self._rows(layer)] = 0.0
        own = layer.needed & layer.silent  # type: ignore[operator]
        delta[own] = (layer.outs.value - layer.bias)[own]
        return delta

    def notes(self) -> dict[str, dict[str, int]]:
        """Per layer: reasons why filters or hidden units without effect stay, each with their number."""
        out: dict[str, dict[str, int]] = {}
        idle: dict[str, Bools] = {}
        for node in (*self.layers, *self.recurrent):
            outs = self.layers[node].outs if node in self.layers else self.facts[node]
            here = (outs.const | ~self.need[node].reshape(outs.ids.shape)) & ~self.removed[outs.ids]
            name = str(node.target)
            if node in self.users(node, "weight"):  # no dead call of a layer that lives
                idle[name] = here & idle.get(name, np.True_)
        for node in (*self.layers, *self.recurrent):
            ids = (self.layers[node].outs if node in self.layers else self.facts[node]).ids
            default = "other layers of its residual stream use the channel"
            if not self.alone(node, "weight"):
                default = "other layers that it shares its weights with, or of its residual stream, use the channel"
            for label in self.label[ids[idle.pop(str(node.target), np.zeros(ids.shape, bool))]].tolist():
                reason = self.reasons.get(label, default)
                per = out.setdefault(str(node.target), {})
                per[reason] = per.get(reason, 0) + 1
        return out
