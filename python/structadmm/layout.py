"""The order of the channels that stay, in every tensor of the compacted network, and the arguments that count them.

The *layout* of a tensor lists its remaining channels by their old positions, in the shape in which the tensor will hold
them. Every operation is followed on layouts as the compacted network will do it. Where the outcome is not what the ids
say (a slice that no longer begins at one place, operands in different orders, heads of different sizes), the channels
concerned are given back and the layouts found anew, so what `Layouts` returns is consistent.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import fx

from .analysis import Analysis
from .recurrent import Recurrent
from .tracking import Ints, Layer, Use, axes_of, for_heads, given, operation, title

# Rounds of giving back channels before everything in conflict stays: more than networks of any depth were seen to take.
MAX_ROUNDS = 40


class Conflict(Exception):
    """Channels that can't be taken out because of what the operation does."""


class Unknown(Exception):
    """The layout of an operand is in conflict itself."""


def settle(analysis: Analysis, round_to: int = 1) -> Layouts:
    """Layouts of all tensors; gives channels back in `analysis` where they can't be taken out, and so many that layers
    keep a multiple of `round_to` filters or all."""
    reason = ""
    for _ in range(MAX_ROUNDS):
        changed = round_to > 1 and _round_up(analysis, round_to)
        layouts = Layouts(analysis)
        if not layouts.conflicts and not changed:
            return layouts
        for ids, reason in layouts.conflicts:
            analysis.give_back(ids, reason)
    analysis.give_back(np.arange(analysis.n_ids), f"{reason or 'rounding'}: no end found in {MAX_ROUNDS} rounds")
    return Layouts(analysis)


def _round_up(analysis: Analysis, multiple: int) -> bool:
    live, changed = analysis.live_nodes(), False
    for node, layer in analysis.layers.items():
        if node not in live:
            continue
        keep = analysis.keep(layer.outs.ids)
        per = keep.reshape(layer.groups, -1)  # in conv groups, all of them grow by as much
        staying = per[per.any(1)]
        depthwise = per.shape[1] == 1
        count = int(keep.sum()) if depthwise else int(staying.sum(1).max(initial=0))
        step = multiple if depthwise or layer.groups == 1 else multiple // math.gcd(multiple, len(staying))
        more = min(-count % step, (keep.size if depthwise else per.shape[1]) - count)
        if more and staying.size:
            row = keep if depthwise else per[per.any(1).argmax()]
            ids = layer.outs.ids if depthwise else layer.outs.ids.reshape(layer.groups, -1)[per.any(1).argmax()]
            analysis.give_back(ids[np.flatnonzero(~row)[:more]], f"{title(node)} is rounded to {multiple} filters")
            changed = True
    for node in analysis.recurrent:
        ids = analysis.facts[node].ids[0, 0]  # the other layers and directions follow
        keep = analysis.keep(ids)
        more = min(-int(keep.sum()) % multiple, int((~keep).sum()))
        if more and node in live:
            analysis.give_back(ids[~keep][:more], f"{title(node)} is rounded to {multiple} units")
            changed = True
    return changed


class Layouts:
    """of: node -> positions of the remaining channels, [tensor dimensions]. args: what edits of the graph need to
    know."""

    def __init__(self, analysis: Analysis) -> None:
        self.analysis = analysis
        self.of: dict[fx.Node, Ints] = {}
        self.parts: dict[fx.Node, list[Ints]] = {}
        self.args: dict[fx.Node, Any] = {}
        self.conflicts: list[tuple[Ints, str]] = []
        live = analysis.live_nodes()
        for node in analysis.module.graph.nodes:
            if node not in live:
                continue
            try:
                if node in analysis.facts:
                    self.of[node] = self._layout(node)
                elif node in analysis.parts:
                    self._split(node)
                elif node not in analysis.sizes:
                    self._whole(node)
            except Unknown:
                pass
            except Conflict as conflict:
                self._give_up(node, str(conflict))
        self._agree()

    def _agree(self) -> None:
        """All uses of a shared tensor have its channels in one order."""
        for uses in self.analysis.groups():
            known = [(use, found[1]) for use in uses if use[0] in self.of and (found := self.analysis.sides(use))]
            for axis in range(len(known[0][1]) if known else 0):
                ids = [sides[axis] for _, sides in known]
                try:
                    orders = [self._along(use, axis) for (use, _), i in zip(known, ids, strict=True) if i is not None]
                except Unknown:
                    continue
                if any(not np.array_equal(order, orders[0]) for order in orders):
                    node = known[0][0][0]
                    self.conflicts += [
                        (i, f"{title(node)} has its channels in another order where its weights are used again")
                        for i in ids
                        if i is not None
                    ]

    def _along(self, use: Use, axis: int) -> Ints:
        """The remaining entries of a tensor along a dimension, in the order of the channels of one of its uses."""
        layer = self.analysis.layers.get(use[0])
        return self.of[use[0]].reshape(-1) if layer is None or axis == 0 else self.inputs(layer)

    def _give_up(self, node: fx.Node, why: str) -> None:
        facts, parts = self.analysis.facts, self.analysis.parts
        for n in (node, *node.all_input_nodes):
            origin = parts[n][0] if n in parts else n
            if origin in facts:
                self.conflicts.append((facts[origin].ids.reshape(-1), f"{title(node)} {why}"))

    def _get(self, node: fx.Node) -> Ints:
        if node not in self.of:
            raise Unknown
        return self.of[node]

    def _whole(self, node: fx.Node) -> None:
        for n in node.all_input_nodes:
            if n in self.of and not np.array_equal(self.of[n].reshape(-1), np.arange(self.analysis.facts[n].ids.size)):
                raise Conflict("takes all channels in their order")

    def inputs(self, layer: Layer | Recurrent) -> Ints:
        """The remaining input channels of a layer, in their order."""
        return self._get(layer.source).reshape(-1) if layer.direct else np.arange(layer.ins.ids.size)

    def outputs(self, layer: Layer) -> Ints:
        """The remaining filters of a layer, in the order of the conv groups of its inputs."""
        keep = self.analysis.keep(layer.outs.ids)
        if layer.groups == 1:
            return np.flatnonzero(keep)
        cg = layer.reads.shape[1]
        group = self.inputs(layer) // cg
        order, count = [g for i, g in enumerate(group) if i == 0 or g != group[i - 1]], np.bincount(group)
        per = keep.reshape(layer.groups, -1)
        if len(set(order)) < len(order) or len(set(count[count > 0])) > 1 or len(set(per[order].sum(1))) > 1:
            raise Conflict("has conv groups of different sizes")
        if per.any(1).sum() != len(order):
            raise Conflict("has conv groups without inputs")
        return np.concatenate([np.flatnonzero(per[g]) + g * per.shape[1] for g in order])

    def _layout(self, node: fx.Node) -> Ints:
        a = self.analysis
        facts = a.facts[node]
        if node in a.layers:
            return self.outputs(a.layers[node]).reshape([-1 if n > 1 else 1 for n in facts.ids.shape])
        if node in a.recurrent:
            return self._units(node)
        kind = a.edits.get(node)
        if kind in ("scores", "weighted", "attention"):
            return self._attention(node, kind)
        if kind == "rows":
            source = a._source(node)
            order = self._get(source)
            return np.asarray(a.moves[node](self._heads(source, order, a.rows[node])))
        if not a.sources[node]:
            keep = a.keep(facts.ids)
            if len(axes_of(facts.ids)) > 1 and not keep.all():
                raise Conflict("has channels along several dimensions")
            found = np.flatnonzero(keep)
            return found.reshape([-1 if n > 1 else 1 for n in facts.ids.shape] if found.size > 1 else (1,) * keep.ndim)
        special = {
            "view": self._view,
            "slice": self._slice,
            "part": self._part,
            "pad": self._pad,
            "cat": self._cat,
            "stack": self._stack,
            "channelshuffle": self._channel_shuffle,
            "pixelshuffle": self._pixel_shuffle,
            "pixelunshuffle": self._pixel_unshuffle,
        }
        if kind in special:
            return special[kind](node)
        if node in a.moves:
            source, positions, _ = a.sources[node][0]
            return self._copies(positions, a.moves[node](self._get(source)))
        return self._same_places(node)

    def _units(self, node: fx.Node) -> Ints:
        """[layers * directions, 1, n] the remaining units of a recurrent layer."""
        keep = self.analysis.keep(self.analysis.facts[node].ids)
        if len(set(keep.sum((1, 2)))) > 1:
            raise Conflict("has layers of different sizes")
        return np.flatnonzero(keep).reshape(len(keep), 1, -1)

    def _inverse(self, positions: Ints, n: int) -> Ints:
        where = np.full(n, -1)
        at = positions.reshape(-1)
        where[at[at >= 0]] = np.flatnonzero(at >= 0)
        return where

    def _copies(self, positions: Ints, moved: Ints) -> Ints:
        """Where the channels of `moved` are in `positions`; of those that are there several times, the first is at the
        first place, and so on."""

        def ranked(a: Ints) -> tuple[Ints, Ints]:
            order = np.argsort(a.reshape(-1), kind="stable")
            channels = a.reshape(-1)[order]
            return order, np.arange(a.size) - np.searchsorted(channels, channels)

        order, _ = ranked(positions)
        at, copy = ranked(moved)
        found = np.empty(moved.size, np.int64)
        found[at] = order[np.searchsorted(positions.reshape(-1)[order], moved.reshape(-1)[at]) + copy]
        return found.reshape(moved.shape)

    def _same_places(self, node: fx.Node) -> Ints:
        """Elementwise operations: the order of the operands that have a channel for each of the result."""
        a = self.analysis
        rank = a.facts[node].ids.ndim
        elided = a.elided[node][0] if node in a.elided else None
        sources = [(n, p) for i, (n, p, _) in enumerate(a.sources[node]) if i != elided]
        found: Ints | None = None
        for n, positions in sources:
            if positions.size == a.facts[n].ids.size:
                order = self._get(n)
                found = order.reshape((1,) * (rank - order.ndim) + order.shape)
                break
        if found is None:
            raise Conflict("has no operand with all channels")
        for n, positions in sources:
            other = self._get(n)
            other = other.reshape((1,) * (rank - other.ndim) + other.shape)
            try:
                same = np.array_equal(positions.reshape(-1)[found], np.broadcast_to(other, found.shape))
            except ValueError:
                same = False
            if not same:
                raise Conflict("has its operands in different orders")
        if node in a.affine and a._kind(node) == "GroupNorm":
            size = a.facts[node].ids.size // a._module(node).num_groups
            if found.size % size or (found.reshape(-1, size) // size != found.reshape(-1, size)[:, :1] // size).any():
                raise Conflict("has its groups mixed")
        return found

    # Reshapes

    def _view(self, node: fx.Node) -> Ints:
        a = self.analysis
        source, spread, _ = a.sources[node][0]
        reshaping = a.reshaping(source, node)
        assert reshaping is not None
        wide, narrow = reshaping
        before, after = a.facts[source].ids.shape, spread.shape
        order = self._get(source)
        # The old place of every remaining element within the blocks of the reshape, row by row.
        coordinates = list(np.unravel_index(order, before))
        shape = [wide[d] if before[d] == 1 else order.shape[d] for d in range(len(wide))]
        for d, n in enumerate(wide):
            if before[d] == 1 and n > 1:
                coordinates[d] = np.arange(n).reshape([-1 if e == d else 1 for e in range(len(wide))])
        element = np.ravel_multi_index([np.broadcast_to(c, shape) for c in coordinates], wide)
        sizes = self._sizes(a.keep(a.facts[node].ids), narrow)
        if math.prod(sizes) != element.size:
            raise Conflict("would have rows of different sizes")
        places = list(np.unravel_index(element.reshape(sizes), narrow))
        first = tuple(slice(0, 1) if after[d] == 1 else slice(None) for d in range(len(narrow)))
        for d, n in enumerate(narrow):
            if after[d] == 1 and n > 1:
                if (places[d] != np.arange(n).reshape([-1 if e == d else 1 for e in range(len(narrow))])).any():
                    raise Conflict("would mix channels with other dimensions")
                places[d] = np.zeros_like(places[d])
        flat = np.ravel_multi_index(places, after)
        if (flat != flat[first]).any():
            raise Conflict("would mix channels with other dimensions")
        kept = {d: sizes[d] for d in axes_of(spread)}
        if any(n != after[d] for d, n in kept.items()):
            self.args[node] = kept
        return flat[first]

    def _sizes(self, keep: Any, narrow: list[int]) -> list[int]:
        """The shape that a reshape leaves: in a block, every row that has channels left has as many of them."""
        axes = axes_of(keep)
        sizes = list(narrow)
        rows = 1
        for i, d in enumerate(axes):
            rest = tuple(axes[i + 1 :])
            alive = int(np.count_nonzero(keep.any(rest) if rest else keep))
            if alive % max(rows, 1):
                raise Conflict("would have rows of different sizes")
            sizes[d] = alive // max(rows, 1)
            rows = alive
        return sizes

    # Slices, splits, concatenation, padding

    def _entries(self, node: fx.Node, rank: int) -> list[Any]:
        args: Any = node.args
        entries = list(args[1]) if isinstance(args[1], tuple) else [args[1]]
        used = sum(e is not None and e is not Ellipsis for e in entries)
        if not any(e is Ellipsis for e in entries):
            entries.append(Ellipsis)
        at = next(i for i, e in enumerate(entries) if e is Ellipsis)
        entries[at : at + 1] = [slice(None)] * (rank - used)
        return entries

    def _where(self, marked: Any, d: int) -> Ints:
        """Indices along dimension d at which all of a boolean array is true; elsewhere none of it may be."""
        rest = tuple(e for e in range(marked.ndim) if e != d)
        some, every = marked.any(rest), marked.all(rest)
        if (some != every).any():
            raise Conflict("would cut rows at different places")
        return np.flatnonzero(every)

    def _slice(self, node: fx.Node) -> Ints:
        a = self.analysis
        source, positions, _ = a.sources[node][0]
        ids = a.facts[source].ids
        order = self._get(source)
        places = np.unravel_index(order, ids.shape)
        entries = self._entries(node, ids.ndim)
        key: list[Any] = []
        changed = False
        d = 0
        for i, e in enumerate(entries):
            if e is None:
                key.append(None)
                continue
            if ids.shape[d] == 1:
                key.append(0 if isinstance(e, int) else slice(None))
            elif isinstance(e, int):
                at = self._where(places[d] == e % ids.shape[d], d)
                if at.size != 1:
                    raise Conflict("takes one channel of those")
                changed |= int(at[0]) != e
                entries[i] = int(at[0])
                key.append(int(at[0]))
            else:
                taken = range(ids.shape[d])[a.numbers(e)]
                at = self._where(np.isin(places[d], taken), d)
                if not at.size or (taken.step == 1 and at[-1] - at[0] + 1 != at.size):
                    raise Conflict("would take channels from several places")
                steps = np.unique(np.diff(at)).tolist() or [1]
                part: Any = at.tolist()
                if len(steps) == 1:
                    part = slice(int(at[0]), int(at[-1]) + 1, *(steps if steps > [1] else []))
                elif any(other is None or isinstance(other, (int, list)) for other in entries):
                    raise Conflict("would take channels without a step")
                if len(taken) < ids.shape[d] or a.numbers(e) != e:
                    entries[i] = part if len(taken) < ids.shape[d] else slice(None)
                    changed = True
                key.append(part)
            d += 1
        if changed:
            self.args[node] = tuple(entries)
        found = self._inverse(positions, ids.size)[order[tuple(key)]]
        if (found < 0).any():
            raise Conflict("would take other channels")
        return found

    def _split(self, node: fx.Node) -> None:
        a = self.analysis
        source, parts = a.parts[node]
        ids = a.facts[source].ids
        order = self._get(source)
        kind = a.edits.get(node)
        names = ("tensor", "dim") if operation(node) == "unbind" else ("tensor", "size", "dim")
        dim = given(node, *names).get("dim", 0) % ids.ndim
        if kind is None:  # along a dimension without channels
            index = 0 if operation(node) == "unbind" else slice(None)
            self.parts[node] = [np.asarray(order.take(0, dim)) if index == 0 else order for _ in parts]
            return
        found, sizes, start = [], [], 0
        for part in parts:
            inside = self._inverse(part, ids.size)[order]
            at = self._where(inside >= 0, dim)
            # A part that nobody takes may be empty.
            if (not at.size and kind == "unbind") or (at.size and (at[0] != start or at[-1] + 1 - start != at.size)):
                raise Conflict("would split at other places")
            start += at.size
            sizes.append(int(at.size))
            found.append(inside.take(at[0], dim) if kind == "unbind" else inside.take(at, dim))
        if kind == "unbind" and any(n != 1 for n in sizes):
            raise Conflict("unbinds fewer parts")
        if kind == "split" and sum(sizes) < ids.shape[dim]:
            self.args[node] = (sizes, dim)
        self.parts[node] = found

    def _part(self, node: fx.Node) -> Ints:
        args: Any = node.args
        if args[0] not in self.parts:
            raise Unknown
        return self.parts[args[0]][args[1]]

    def _pad(self, node: fx.Node) -> Ints:
        a = self.analysis
        source, positions, _ = a.sources[node][0]
        keep = a.keep(a.facts[node].ids).reshape(-1)
        old = positions.reshape(-1) >= 0
        first, last = int(old.argmax()), len(old) - int(old[::-1].argmax())
        before, after = np.flatnonzero(keep[:first]), last + np.flatnonzero(keep[last:])
        self.args[node] = (len(before), len(after))
        order = np.concatenate([before, first + self._get(source).reshape(-1), after])
        return order.reshape([-1 if n > 1 else 1 for n in a.facts[node].ids.shape])

    def _cat(self, node: fx.Node) -> Ints:
        a = self.analysis
        chosen = given(node, "tensors", "dim")
        dim = chosen.get("dim", chosen.get("axis", 0)) % a.facts[node].ids.ndim
        orders = [self._inverse(p, a.facts[n].ids.size)[self._get(n)] for n, p, _ in a.sources[node]]
        if len({o.shape[:dim] + o.shape[dim + 1 :] for o in orders}) > 1:
            raise Conflict("would join rows of different sizes")
        return np.concatenate(orders, dim)

    def _stack(self, node: fx.Node) -> Ints:
        a = self.analysis
        rank = a.facts[node].ids.ndim
        dim = given(node, "tensors", "dim").get("dim", 0) % rank
        orders = []
        for n, positions, _ in a.sources[node]:
            orders.append(np.expand_dims(self._inverse(positions, a.facts[n].ids.size)[self._get(n)], dim))
        if len({o.shape for o in orders}) > 1:
            raise Conflict("would stack tensors of different sizes")
        return np.concatenate(orders, dim)

    # Shuffles

    def _channel_shuffle(self, node: fx.Node) -> Ints:
        a = self.analysis
        g = a._module(node).groups if node.op == "call_module" else given(node, "input", "groups")["groups"]
        order = self._get(a.sources[node][0][0]).reshape(-1)
        n = a.facts[node].ids.size // g
        if order.size % g or (order.reshape(g, -1) // n != np.arange(g)[:, None]).any():
            raise Conflict("would shuffle groups of different sizes")
        rows = order.reshape(g, -1)
        return (rows % n * g + rows // n).T.reshape([-1 if n > 1 else 1 for n in a.facts[node].ids.shape])

    def _pixel_shuffle(self, node: fx.Node) -> Ints:
        a = self.analysis
        order, times = self._get(a.sources[node][0][0]).reshape(-1), len(a.sources[node])
        rows = order.reshape(-1, times) if order.size % times == 0 else order[:0].reshape(-1, times)
        if not rows.size or (rows != rows[:, :1] + np.arange(times)).any() or (rows[:, 0] % times).any():
            raise Conflict("would shuffle parts of channels")
        return (rows[:, 0] // times).reshape([-1 if n > 1 else 1 for n in a.facts[node].ids.shape])

    def _pixel_unshuffle(self, node: fx.Node) -> Ints:
        a = self.analysis
        source = a.sources[node][0][0]
        times = a.facts[node].ids.size // a.facts[source].ids.size
        order = self._get(source).reshape(-1)
        return (order[:, None] * times + np.arange(times)).reshape(
            [-1 if n > 1 else 1 for n in a.facts[node].ids.shape]
        )

    # Attention

    def _heads(self, node: fx.Node, order: Ints, heads: list[int]) -> Ints:
        """The old heads of the rows of a layout, each of one head."""
        shape = self.analysis.facts[node].ids.shape
        places = np.unravel_index(order, shape)
        index = tuple(slice(None) if d in heads else slice(0, 1) for d in range(order.ndim))
        for d in heads:
            if (places[d] != places[d][index]).any():
                raise Conflict("would mix heads")
        if not heads:
            return np.zeros([1] * order.ndim, int)
        return np.ravel_multi_index([places[d][index] for d in heads], [shape[d] for d in heads])

    def _attention(self, node: fx.Node, kind: str) -> Ints:
        """Of scores their heads, else the channels of the values, for every head that reads them."""
        a = self.analysis
        named = given(node, "query", "key", "value") if kind == "attention" else {}
        operands: Any = (named["query"], named["key"]) if named else node.args
        lead, other = operands  # queries or weights, which have all heads
        order, shape = self._get(lead), a.facts[lead].ids.shape
        heads = [d for d in range(order.ndim - 2) if a.facts[node].ids.shape[d] > 1]
        found = self._heads(lead, order, heads)
        if kind == "weighted":
            return self._for_heads(other, found, shape)
        times = a.copies(node) if named else 1
        if not np.array_equal(order, self._for_heads(other, found, shape, times, not named)):
            raise Conflict("has the channels of queries and keys in different orders")
        if not named:
            return found
        if order.shape[-1] != shape[-1]:
            self.args[node] = a.shapes[lead][-1]
        return self._for_heads(named["value"], found, shape, times)

    def _for_heads(self, node: fx.Node, found: Ints, shape: Any, times: int = 1, swap: bool = False) -> Ints:
        """The layout of keys or values as if each of the heads found, of those of `shape`, had its own; `swap`: with
        tokens behind the channels."""
        ids, order = self.analysis.facts[node].ids, self._get(node)
        positions = for_heads(np.arange(ids.size).reshape(ids.shape), shape[:-2], times)
        try:
            order = for_heads(order, found.shape[:-2], times)
        except ValueError as error:
            raise Conflict("has other heads than it is asked for") from error
        places = np.unravel_index(order, ids.shape)
        head = np.unravel_index(found, positions.shape[:-2]) if positions.ndim > 2 else ()
        inside = np.ravel_multi_index((*np.broadcast_arrays(*head, *places[-2:]),), positions.shape)
        if not np.array_equal(positions.reshape(-1)[inside], order):
            raise Conflict("has heads in different orders")
        return inside.swapaxes(-1, -2) if swap else inside
