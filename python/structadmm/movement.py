"""Rules of channel tracking for data movement: reshapes, permutations, slices, splits, concatenation, padding."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import numpy as np
from torch import fx, nn

from .tracking import Facts, Ints, Tracker, axes_of, blocks, flat, given, operation, title

# What may be asked of a tensor without learning how many channels it has.
HARMLESS = ("device", "dtype", "ndim", "is_cuda", "layout", "requires_grad", "dim")

# Layers that pad a map with its own values.
OWN_PADS: dict[type[nn.Module], str] = {
    **dict.fromkeys((nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d), "reflect"),
    **dict.fromkeys((nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d), "replicate"),
    **dict.fromkeys((nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d), "circular"),
}


class Movement(Tracker):
    def _reshape(self, node: fx.Node) -> str | None:
        source = self._source(node)
        facts = self.facts.get(source)
        if facts is None:
            self._channelwise(node, source, None)
            return None
        t = self.shapes[node]
        found = self.reshaping(source, node)
        if found is None:
            return "reshapes over the batch or in a way that is not tracked"
        wide, narrow = found
        positions = np.arange(facts.ids.size).reshape(facts.ids.shape)
        spread = np.broadcast_to(positions, wide).reshape(narrow)
        for d in range(spread.ndim):  # dimensions along which the channel does not change are untracked again
            first = spread.take([0], d)
            if spread.shape[d] > 1 and (spread == first).all():
                spread = first
        self.facts[node] = facts.map(lambda a: a.reshape(-1)[spread])
        self.sources[node] = [(source, spread, None)]
        self.edits[node] = "view"
        if len(axes_of(spread)) > 1:
            self.grids.append((node, self.facts[node].ids))
        if operation(node) in ("reshape_as", "view_as") and node.op != "call_module":
            like = node.args[1]
            other = self.facts[like].ids if isinstance(like, fx.Node) and like in self.facts else None
            if other is None or not np.array_equal(other, self.facts[node].ids):
                return "takes the shape of another tensor"
        sizes = self.view_sizes(node)
        for d, size in enumerate(sizes if sizes is not None and len(sizes) == len(t) else ()):
            if isinstance(size, fx.Node) and spread.shape[d] == 1:
                for ids in self.sizes.get(size, []):
                    self._lock(ids, f"{title(node)} computes with the number of channels")
        if sizes is None or len(sizes) != len(t):
            self._pin_sizes(node)
        return None

    def reshaping(self, source: fx.Node, node: fx.Node) -> tuple[list[int], list[int]] | None:
        """Shapes before and after, with 1 for dimensions that share no block of the reshape with channels."""
        ids = self.facts[source].ids
        s, t = self.shapes[source], self.shapes[node]
        found = blocks(s, t)
        if found is None:
            return None
        wide, narrow = [1] * len(s), [1] * len(t)
        for i0, i1, j0, j1 in found:
            if any(ids.shape[d] > 1 for d in range(i0, i1)):
                if self._varies(source) & set(range(i0, i1)) or self._varies(node) & set(range(j0, j1)):
                    return None
                wide[i0:i1], narrow[j0:j1] = s[i0:i1], t[j0:j1]
        return wide, narrow

    def view_sizes(self, node: fx.Node) -> list[Any] | None:
        """The sizes that a view or reshape names; None for operations that name none."""
        if node.op == "call_module" or operation(node) not in ("view", "reshape"):
            return None
        named: Any = node.kwargs.get("shape", node.kwargs.get("size"))
        sizes: Any = node.args[1:] if len(node.args) > 1 else (named,)
        return list(sizes[0] if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes)

    def _pin_sizes(self, node: fx.Node) -> None:
        self._pin_numbers(node, node.all_input_nodes)

    def _pin_numbers(self, node: fx.Node, numbers: Iterable[Any]) -> None:
        for number in numbers:
            for ids in self.sizes.get(number, []):
                self._lock(ids, f"{title(node)} computes with the number of channels")

    def _unsqueeze(self, node: fx.Node) -> str | None:
        source = self._source(node)
        dim = given(node, "input", "dim").get("dim")
        rank = len(self.shapes[node])
        if source not in self.facts:
            self._channelwise(node, source, None)
            return None
        if not isinstance(dim, int):
            return "its dimension is computed"
        self._move(node, source, lambda a: np.expand_dims(a, dim % rank))
        return None

    def _permute(self, node: fx.Node) -> str | None:
        source = self._source(node)
        if source not in self.facts:
            self._channelwise(node, source, None)
            return None
        rank = len(self.shapes[source])
        rest: Any = node.args[1:] if len(node.args) > 1 else tuple(node.kwargs.values())
        dims: list[Any] = list(rest[0]) if len(rest) == 1 and isinstance(rest[0], (tuple, list)) else list(rest)
        if not all(isinstance(d, int) for d in dims):
            return "its dimensions are computed"
        kind = operation(node)
        if kind == "permute":
            order = [d % rank for d in dims]
        elif kind in ("movedim", "moveaxis"):
            if len(dims) != 2:
                return "moves several dimensions"
            order = [d for d in range(rank) if d != dims[0] % rank]
            order.insert(dims[1] % rank, dims[0] % rank)
        else:
            a, b = (dims[0], dims[1]) if kind not in ("t", "mT") else (rank - 2, rank - 1)
            order = list(range(rank))
            order[a], order[b] = order[b], order[a]
        self._move(node, source, lambda a: a.transpose(order))
        return None

    def _roll(self, node: fx.Node) -> str | None:
        """roll and flip along dimensions without channels."""
        source = self._source(node)
        facts = self.facts.get(source)
        names = ("input", "shifts", "dims") if operation(node) == "roll" else ("input", "dims")
        dims = given(node, *names).get("dims")
        if facts is not None:
            dims = [dims] if isinstance(dims, int) else list(dims) if isinstance(dims, (tuple, list)) else [None]
            if any(not isinstance(d, int) or facts.ids.shape[d] > 1 for d in dims):
                return "moves channels in a way that is not tracked"
        self._channelwise(node, source, facts)
        return None

    def _expand(self, node: fx.Node) -> str | None:
        source = self._source(node)
        facts = self.facts.get(source)
        if facts is None:
            self._channelwise(node, source, None)
            return None
        s, t = self.shapes[source], self.shapes[node]
        new = len(t) - len(s)
        if operation(node) == "expand_as" and axes_of(facts.ids):
            return "takes the shape of another tensor"
        self._move(node, source, lambda a: a.reshape((1,) * new + a.shape))
        self.edits[node] = "expand"
        return None

    def _repeat(self, node: fx.Node) -> str | None:
        """repeat_interleave, repeat, tile: the copies of a channel go together."""
        source = self._source(node)
        facts = self.facts.get(source)
        if facts is None:
            self._channelwise(node, source, None)
            return None
        ids = facts.ids
        new = len(self.shapes[node]) - ids.ndim
        if operation(node) == "repeat_interleave":
            chosen = given(node, "input", "repeats", "dim")
            times, dim = chosen["repeats"], chosen.get("dim")
            if not isinstance(dim, int):
                return "repeats everything"
            if ids.shape[dim] == 1:
                self._move(node, source, lambda a: a)
            elif not isinstance(times, int) or chosen.get("output_size") is not None:
                return "repeats channels by what is computed"
            else:
                self._move(node, source, lambda a: np.repeat(a, times, dim))
            return None
        rest: Any = node.args[1:] if len(node.args) > 1 else tuple(node.kwargs.values())
        sizes = list(rest[0] if len(rest) == 1 and isinstance(rest[0], (tuple, list)) else rest)
        sizes = [1] * (ids.ndim + new - len(sizes)) + sizes
        counts = [n if d >= new and ids.shape[d - new] > 1 else 1 for d, n in enumerate(sizes)]
        if not all(isinstance(n, int) for n in counts):
            return "repeats channels by a number that is computed"
        self._move(node, source, lambda a: np.tile(a.reshape((1,) * new + a.shape), counts))
        return None

    def _getitem(self, node: fx.Node) -> str | None:
        args: Any = node.args
        source, index = args
        if source in self.parts:
            origin, parts = self.parts[source]
            if not isinstance(index, int):
                return "its index is not a number"
            where = parts[index]
            self.facts[node] = self.facts[origin].map(lambda a: a.reshape(-1)[where])
            self.sources[node] = [(origin, where, None)]
            self.edits[node] = "part"
            return None
        facts = self.facts.get(source)
        if facts is None:
            self.why[node] = self.why.get(source, "not tracked")
            return None
        entries = list(index) if isinstance(index, tuple) else [index]
        shape = self.shapes[source]
        used = sum(e is not None and e is not Ellipsis for e in entries)
        if not any(e is Ellipsis for e in entries):
            entries.append(Ellipsis)
        at = next(i for i, e in enumerate(entries) if e is Ellipsis)
        entries[at : at + 1] = [slice(None)] * (len(shape) - used)
        moved: list[Any] = []
        d = 0
        for e in entries:
            if e is None:
                moved.append(None)
                continue
            tracked = facts.ids.shape[d] > 1
            if isinstance(e, slice) and tracked:
                e = self.numbers(e)
            if isinstance(e, slice) and all(isinstance(v, (int, type(None))) for v in (e.start, e.stop, e.step)):
                moved.append(e if tracked else slice(None))
            elif isinstance(e, int) and (d not in self._varies(source)):
                moved.append((e % shape[d]) if tracked else 0)
            elif isinstance(e, slice) and not tracked:
                moved.append(slice(None))
            else:
                return "its index is not tracked"
            d += 1
        key = tuple(moved)
        self.facts[node] = facts.map(lambda a: a[key])
        self.sources[node] = [(source, np.arange(facts.ids.size).reshape(facts.ids.shape)[key], None)]
        self.edits[node] = "slice"
        for d, e in enumerate(e for e in entries if e is not None):
            if isinstance(e, slice) and facts.ids.shape[d] == 1:
                self._pin_numbers(node, (e.start, e.stop, e.step))
        return None

    def numbers(self, e: slice) -> slice:
        """A slice whose bounds are computed from nothing but numbers of channels, with these."""
        return slice(*(self.shapes[v] if self._counts(v) else v for v in (e.start, e.stop, e.step)))

    def _counts(self, value: Any) -> bool:
        """Whether an argument is a number made of numbers of channels alone."""
        if not isinstance(value, fx.Node) or value not in self.sizes or not isinstance(self.shapes[value], int):
            return False
        made_of = [n for n in value.all_input_nodes if isinstance(self.shapes[n], int)]
        return all(self._counts(n) for n in made_of) if made_of else bool(self.sizes[value])

    def _select(self, node: fx.Node) -> str | None:
        """select(x, dim, index) and narrow(x, dim, start, length)."""
        source = self._source(node)
        facts = self.facts.get(source)
        if facts is None:
            self._channelwise(node, source, None)
            return None
        chosen = given(node, "input", "dim", "index") if operation(node) == "select" else {}
        dim, index = chosen.get("dim"), chosen.get("index")
        rank = len(self.shapes[source])
        if not isinstance(dim, int) or not isinstance(index, int) or dim % rank in self._varies(source):
            return "its index is not tracked"
        if facts.ids.shape[dim] > 1:
            return "takes channels in a way that is not tracked"
        self._move(node, source, lambda a: a.squeeze(dim))
        return None

    def _pad(self, node: fx.Node) -> str | None:
        source = self._source(node)
        facts = self.facts.get(source)
        if node.op == "call_module":
            m = self._module(node)
            how, fill = OWN_PADS.get(type(m), "constant"), getattr(m, "value", 0.0)
            pad = m.padding
        else:
            chosen = {"mode": "constant", "value": None, **given(node, "input", "pad", "mode", "value")}
            pad, how, fill = chosen["pad"], chosen["mode"], chosen["value"] or 0.0
        if facts is None:
            self._channelwise(node, source, None)
            return None
        rank = len(self.shapes[source])
        tracked = axes_of(facts.ids) or [1]
        pairs: list[tuple[Any, Any]] = [(0, 0)] * (rank - len(pad) // 2)
        pairs += [(pad[i], pad[i + 1]) for i in range(len(pad) - 2, -1, -2)]
        spatial = any(p != (0, 0) for d, p in enumerate(pairs) if d not in tracked)
        channels = [p for d, p in enumerate(pairs) if d in tracked and p != (0, 0)]
        if channels and (
            len(tracked) > 1 or how != "constant" or not all(isinstance(p, int) and p >= 0 for p in channels[0])
        ):
            return "pads channels in a way that is not tracked"
        if spatial and how == "constant":
            lost = facts.const & (facts.value != fill)
            self._hint(facts.ids[lost], f"{title(node)} pads with {fill:g}, so sees the edge of its constant")
            facts = Facts(facts.ids, facts.const & (facts.value == fill), facts.value)
        if not channels:
            self._channelwise(node, source, facts)
            return None
        before, after = channels[0]
        positions = np.arange(facts.ids.size).reshape(facts.ids.shape)
        width = [(before, after) if d == tracked[0] else (0, 0) for d in range(rank)]
        positions = np.pad(positions, width, constant_values=-1)
        ids = facts.ids.reshape(-1)[positions]
        ids[positions < 0] = self._fresh(before + after)
        new = positions < 0
        self.facts[node] = Facts(
            ids,
            np.where(new, True, facts.const.reshape(-1)[positions]),
            np.where(new, float(fill), facts.value.reshape(-1)[positions]),
        )
        self.sources[node] = [(source, positions, None)]
        self.edits[node] = "pad"
        return None

    def _cat(self, node: fx.Node) -> str | None:
        chosen = given(node, "tensors", "dim")
        tensors, dim = chosen["tensors"], chosen.get("dim", chosen.get("axis", 0))
        stack = operation(node) == "stack"
        rank = len(self.shapes[node])
        if (
            not isinstance(tensors, (list, tuple))
            or not all(isinstance(t, fx.Node) for t in tensors)
            or not isinstance(dim, int)
        ):
            return "its arguments are not tracked"
        dim %= rank
        known = [t for t in tensors if t in self.facts]
        if not known:
            self.why[node] = "made of untracked tensors"
            return None
        if stack:
            return self._stack(node, tensors, dim)
        axes = {d for t in known for d in axes_of(self.facts[t].ids)}
        if dim not in axes and axes:  # along the map or the tokens: the channels of all operands are tied
            return self._join(node, tensors)
        if any(self.facts[t].ids.shape[dim] != self.shapes[t][dim] for t in known):
            return "concatenates over another dimension than the channels'"
        rows = sorted(axes - {dim})
        for t in tensors if not rows else ():
            self._adopt(t, dim)
        if any(t not in self.facts for t in tensors):
            return "made of untracked tensors among others"
        parts = [self.facts[t] for t in tensors]
        if len({p.ids.shape[:dim] + p.ids.shape[dim + 1 :] for p in parts}) > 1:
            return "its operands do not line up"
        self._by_head(node, [(p.ids, rows) for p in parts])
        self.facts[node] = Facts(
            np.concatenate([p.ids for p in parts], dim),
            np.concatenate([p.const for p in parts], dim),
            np.concatenate([p.value for p in parts], dim),
        )
        offset = 0
        self.sources[node] = []
        for t, p in zip(tensors, parts, strict=True):
            positions = np.full(self.facts[node].ids.shape, -1)
            end = offset + p.ids.shape[dim]
            positions.swapaxes(0, dim)[offset:end] = np.arange(p.ids.size).reshape(p.ids.shape).swapaxes(0, dim)
            offset = end
            self.sources[node].append((t, positions, None))
        self.edits[node] = "cat"
        return None

    def _join(self, node: fx.Node, tensors: Any) -> str | None:
        known = [t for t in tensors if t in self.facts]
        first = self.facts[known[0]]
        if any(self.facts[t].ids.shape != first.ids.shape for t in known):
            return "its operands do not line up"
        if len(known) < len(tensors):
            self.whole[title(node)] = "joins its operands with a tensor that is not tracked"
            for t in known:
                self._lock(self.facts[t].ids, f"{title(node)} joins it with a tensor that is not tracked")
        self._tie(self.facts[t].ids for t in known)
        const, value = first.const & (len(known) == len(tensors)), first.value
        for t in known[1:]:
            const = const & self.facts[t].const & (self.facts[t].value == value)
        self.facts[node] = Facts(first.ids, const, np.where(const, value, 0.0))
        positions = np.arange(first.ids.size).reshape(first.ids.shape)
        self.sources[node] = [(t, positions, None) for t in dict.fromkeys(known)]
        return None

    def _stack(self, node: fx.Node, tensors: Any, dim: int) -> str | None:
        if any(t not in self.facts for t in tensors):
            return "made of untracked tensors among others"
        parts = [self.facts[t].map(lambda a: np.expand_dims(a, dim)) for t in tensors]
        if any(p.ids.shape != parts[0].ids.shape for p in parts):
            return "its operands do not line up"
        self.facts[node] = Facts(
            np.concatenate([p.ids for p in parts], dim),
            np.concatenate([p.const for p in parts], dim),
            np.concatenate([p.value for p in parts], dim),
        )
        self.sources[node] = []
        for i, t in enumerate(tensors):
            positions = np.full(self.facts[node].ids.shape, -1)
            at = tuple(slice(i, i + 1) if d == dim else slice(None) for d in range(positions.ndim))
            positions[at] = np.arange(parts[i].ids.size).reshape(parts[i].ids.shape)
            self.sources[node].append((t, positions, None))
        ids = self.facts[node].ids
        order = [dim, *(d for d in range(ids.ndim) if d != dim)]
        self.grids.append((node, ids.transpose(order)))
        self.edits[node] = "stack"
        return None

    def _split(self, node: fx.Node) -> str | None:
        source = self._source(node)
        facts = self.facts.get(source)
        if facts is None:
            self.why[node] = self.why.get(source, "not tracked")
            return None
        kind = operation(node)
        names = ("tensor", "dim") if kind == "unbind" else ("tensor", "size", "dim")
        dim = given(node, *names).get("dim", 0)
        rank = len(self.shapes[source])
        if not isinstance(dim, int) or dim % rank in self._varies(source):
            return "splits the batch"
        dim %= rank
        positions = np.arange(facts.ids.size).reshape(facts.ids.shape)
        count = len(self.shapes[node])
        tracked = facts.ids.shape[dim] > 1
        if kind == "unbind":
            self.parts[node] = (source, [np.take(positions, i if tracked else 0, dim) for i in range(count)])
        elif not tracked:
            self.parts[node] = (source, [positions] * count)
        else:
            sizes = [s[dim] for s in self.shapes[node]]
            self.parts[node] = (source, np.split(positions, np.cumsum(sizes)[:-1], dim))
        if tracked:
            self.edits[node] = kind if kind == "unbind" else "split"
        return None

    def _shuffle(self, node: fx.Node) -> str | None:
        """pixel_shuffle, pixel_unshuffle, channel_shuffle."""
        source = self._source(node)
        facts = self.facts.get(source)
        if facts is None:
            self._channelwise(node, source, None)
            return None
        if len(axes_of(facts.ids)) > 1 or (facts.ids.size != self.shapes[source][1]):
            return "its channels are not in dimension 1"
        known, rank = flat(facts), len(self.shapes[node])
        kind = self._kind(node).lower().replace("_", "")
        if kind == "channelshuffle":
            g = self._module(node).groups if node.op == "call_module" else given(node, "input", "groups")["groups"]
            positions = np.arange(known.ids.size).reshape(g, -1).T.reshape(-1)
            self.grids.append((node, known.ids.reshape(g, -1)))
            self.facts[node] = self._like(known.map(lambda a: a[positions]), rank, 1)
            self.sources[node] = [(source, positions.reshape(self.facts[node].ids.shape), None)]
        elif kind == "pixelunshuffle":
            times = self.shapes[node][1] // self.shapes[source][1]
            positions = np.repeat(np.arange(known.ids.size), times)
            self.facts[node] = self._like(known.map(lambda a: a[positions]), rank, 1)
            self.sources[node] = [(source, positions.reshape(self.facts[node].ids.shape), None)]
        else:  # the channels that make up one go together
            times = self.shapes[source][1] // self.shapes[node][1]
            parts = known.map(lambda a: a.reshape(-1, times))
            self._tie([parts.ids[:, i] for i in range(times)])
            const = parts.const.all(1) & (parts.value == parts.value[:, :1]).all(1)
            self.facts[node] = self._like(Facts(parts.ids[:, 0], const, np.where(const, parts.value[:, 0], 0)), rank, 1)
            places = np.arange(known.ids.size).reshape(-1, times)
            shape = self.facts[node].ids.shape
            self.sources[node] = [(source, places[:, i].reshape(shape), None) for i in range(times)]
        self.edits[node] = kind
        return None

    def _size(self, node: fx.Node) -> str | None:
        source = self._source(node)
        if node.target == "size":
            self.sizes[node] = self._dimension_ids(source, given(node, "self", "dim").get("dim"))
        else:
            counts = node.op == "call_function" and node.args[1] == "shape"
            self.sizes[node] = self._dimension_ids(source, None) if counts else []
        return None

    def _dimension_ids(self, source: fx.Node, dim: Any) -> list[Ints]:
        facts = self.facts.get(source)
        if facts is None:
            return []
        if isinstance(dim, int):
            # Where there is one channel, dimension 1 still counts channels.
            d = dim % len(self.shapes[source])
            return [facts.ids] if facts.ids.shape[d] > 1 or (d == 1 and facts.ids.size == 1) else []
        return [facts.ids]

    def _forward_size(self, node: fx.Node) -> None:
        """Integers computed from sizes carry the ids of the dimensions they come from."""
        if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
            args: Any = node.args
            origin, index = args
            whole = (origin.op == "call_method" and len(origin.args) == 1) or origin.target is getattr
            if whole and isinstance(index, (int, slice)):
                source = self._source(origin)
                rank = len(self.shapes[source])
                dims = [index] if isinstance(index, int) else list(range(rank))[index]
                self.sizes[node] = [i for d in dims for i in self._dimension_ids(source, d)]
                return
        self.sizes[node] = [ids for n in node.all_input_nodes for ids in self.sizes[n]]
