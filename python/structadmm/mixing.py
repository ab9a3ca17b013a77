"""Rules of channel tracking for operations that mix channels: layers, normalisation, matrix products, attention."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from .tracking import (
    Bools,
    Facts,
    Ints,
    Layer,
    Reading,
    Tracker,
    attribute,
    axes_of,
    by_rows,
    filters,
    for_heads,
    given,
    title,
    values_of,
)

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


def _any_tap(nonzero: Tensor, taps: Bools) -> Bools:
    """[O, Cg] where any of these taps is, of [O, Cg, K]; torch's own reduction over so few takes twice as long."""
    first, *rest = (nonzero[..., k] for k in np.flatnonzero(taps).tolist())
    found = first.clone() if rest else first
    for tap in rest:
        found |= tap
    return found.cpu().numpy()


class Mixing(Tracker):
    def _conv(self, node: fx.Node) -> str | None:
        m = self._module(node)
        source = self._source(node)
        if len(self.shapes[source]) != m.weight.dim():
            return "unbatched input"
        if len(node.all_input_nodes) > 1:
            return "its arguments are tensors"
        bad = np.zeros(m.weight.shape[2:], bool)
        if isinstance(m, TRANSPOSED):
            # How many taps meet at a position of the output depends on where it lies.
            bad[...] = not (set(m.kernel_size) == set(m.stride) == {1} and not any((*m.padding, *m.output_padding)))
        elif m.padding_mode == "zeros":
            for axis, k in enumerate(m.kernel_size):
                d = m.dilation[axis]
                if m.padding == "valid":
                    before = after = 0
                elif m.padding == "same":
                    before = d * (k - 1) // 2
                    after = d * (k - 1) - before
                else:
                    before = after = m.padding[axis]
                # Tap t reads inside the map for every output, at any map size, iff before <= t*d <= (k-1)*d - after.
                t = np.arange(k) * d
                out = (t < before) | (t > (k - 1) * d - after)
                bad |= out.reshape([-1 if a == axis else 1 for a in range(bad.ndim)])
        w = filters(m, m.groups)
        w = w.reshape(m.out_channels, w.shape[2], -1)
        self._mix(node, source, w, bad.reshape(-1), m.bias, m.groups, axis=1)
        return None

    def _linear(self, node: fx.Node) -> str | None:
        m = self._module(node)
        w = m.weight.detach()[:, :, None]
        self._mix(node, self._source(node), w, np.zeros(1, bool), m.bias, 1, axis=-1)
        return None

    def _mix(
        self, node: fx.Node, source: fx.Node, w: Tensor, bad: Bools, bias: Tensor | None, groups: int, axis: int
    ) -> None:
        """w [O, Cg, K]; bad [K]: taps that can lie on zero padding."""
        n_filters, cg, _ = w.shape
        rank = len(self.shapes[source])
        ins = self._adopt(source, axis)
        reads: Bools
        border: Bools = np.broadcast_to(np.False_, (n_filters, cg))
        if w.is_meta:  # no values: all are read, and nothing is constant
            reads = np.broadcast_to(np.True_, (n_filters, cg))
            border = np.broadcast_to(np.array(bool(bad.any())), (n_filters, cg))
        else:
            nonzero = w.bool()
            reads = _any_tap(nonzero, np.ones(len(bad), bool))
            if bad.any():
                border = reads if bad.all() else _any_tap(nonzero, bad)
        b = np.zeros(n_filters) if bias is None else values_of(bias)
        shift = self._shift(node, bias is not None, axis)
        direct = np.array_equal(self.facts[source].ids.reshape(-1), ins.ids)
        layer = Layer(node, source, groups, w, ins, ins, reads, border, b, shift, np.zeros(n_filters, bool), direct)
        layer.full = w.is_meta or bool(reads.all())
        constant: Bools
        edged = np.zeros(n_filters, bool)
        if ins.const.any():
            per_group = (groups, -1, cg)
            nonzero_constant = (ins.const & (ins.value != 0)).reshape(groups, 1, cg)
            varies = reads.reshape(per_group) & ~ins.const.reshape(groups, 1, cg)
            if bad.any():
                inside = varies.any(2)
                varies |= border.reshape(per_group) & nonzero_constant
                edged = (varies.any(2) & ~inside).reshape(-1)
            constant = ~varies.any(2).reshape(-1)
        else:
            constant = np.zeros(n_filters, bool) if layer.full else np.asarray(~reads.any(1))
        emits = b + layer.response(np.where(ins.const, ins.value, 0.0))
        layer.outs = Facts(self._fresh(n_filters), constant, np.where(constant, emits, 0.0))
        if self.alone(node, "weight") and self.alone(node, "bias"):
            layer.silent = constant & ((emits == b) | (shift is not None))
        else:  # weights stay for the other places, and go on reading what is constant here
            layer.silent = np.asarray(~reads.any(1))
        for other in self.sharers(node, "weight"):
            if other in self.layers:
                layer.merges = self.layers[other].merges
        self._hint(layer.outs.ids[edged], f"{title(node)} {self.edge(node)} its constant")
        if groups > 1 and cg == 1 and n_filters == groups:
            self.edges.append((ins.ids, layer.outs.ids))
        self.layers[node] = layer
        self.facts[node] = self._like(layer.outs, rank, axis)
        self.sources[node] = []

    def edge(self, node: fx.Node) -> str:
        """Why a layer takes no constant into its bias, in front of "its constant"."""
        if isinstance(self._module(node), TRANSPOSED):
            return "adds up other taps from place to place, so has no one bias for"
        return "pads with zeros, so sees the edge of"

    def _shift(self, node: fx.Node, biased: bool, axis: int) -> str | None:
        """Where a constant can be added to what the layer emits: Layer.shift."""
        sharers = self.sharers(node, "bias")
        if biased:  # layers of other weights would add other constants
            return "bias" if set(sharers) <= set(self.sharers(node, "weight")) else None
        if all(self._takes_mean(n, axis) for n in sharers):
            return "norm"
        return "new" if self.create_bias else None

    def _takes_mean(self, node: fx.Node, axis: int) -> bool:
        """Whether a BatchNorm that no other tensor goes through follows a layer."""
        follower = next(iter(node.users)) if len(node.users) == 1 else None
        if follower is None or follower.op != "call_module" or axis % len(self.shapes[node]) != 1:
            return False
        m = self._module(follower)
        return type(m) in NORMS and m.running_mean is not None and self.alone(follower, "running_mean")

    # Normalisation

    def _norm(self, node: fx.Node) -> str | None:
        m = self._module(node)
        source = self._source(node)
        known = self._adopt(source, 1)
        rank = len(self.shapes[source])
        if not np.array_equal(self.facts[source].ids.reshape(-1), known.ids):
            return "its channels are not in dimension 1"
        gamma, beta = _affine(m, known.ids.size)
        if m.running_mean is None or m.running_mean.is_meta:  # normalises by the batch in eval mode too
            facts = known.vary()
        else:
            mean, var = values_of(m.running_mean), values_of(m.running_var)
            scale = gamma / np.sqrt(var + m.eps)
            const = known.const | (gamma == 0)
            moved = np.where(gamma == 0, beta, (known.value - mean) * scale + beta)
            facts = Facts(known.ids, const, np.where(const, moved, 0.0))
        matters = self._like(Facts(known.ids, gamma != 0, beta), rank, 1).const
        self._channelwise(node, source, self._like(facts, rank, 1), matters)
        self.norms[node] = source
        return None

    def _group_norm(self, node: fx.Node) -> str | None:
        """GroupNorm and InstanceNorm: the channels of a group are read together, so they go together."""
        m = self._module(node)
        source = self._source(node)
        instance = isinstance(m, INSTANCE_NORMS)
        if instance and len(self.shapes[source]) != int(self._kind(node)[-2]) + 2:
            return "unbatched input"
        if instance and m.track_running_stats:
            return self._norm(node)
        known = self._adopt(source, 1)
        rank = len(self.shapes[source])
        if not np.array_equal(self.facts[source].ids.reshape(-1), known.ids):
            return "its channels are not in dimension 1"
        groups = known.ids.size if instance else m.num_groups
        if groups == 1:
            self._lock(known.ids, f"{title(node)} normalises over all channels")
        gamma, beta = _affine(m, known.ids.size)
        per = known.map(lambda a: a.reshape(groups, -1))
        self._tie([per.ids[:, i] for i in range(per.ids.shape[1])])
        mean = per.value.mean(1, keepdims=True)
        var = ((per.value - mean) ** 2).mean(1, keepdims=True)
        constant = np.broadcast_to(per.const.all(1, keepdims=True), per.const.shape).reshape(-1)
        emits = ((per.value - mean) / np.sqrt(var + m.eps)).reshape(-1) * gamma + beta
        const = constant | (gamma == 0)
        facts = Facts(known.ids, const, np.where(constant, emits, np.where(gamma == 0, beta, 0.0)))
        self._channelwise(node, source, self._like(facts, rank, 1))
        matters = gamma != 0

        def read(need: Bools) -> list[Reading]:
            rows = (need.reshape(-1) & matters).reshape(groups, -1).any(1)
            wanted = np.broadcast_to(rows[:, None], per.ids.shape).reshape(-1)
            return [(source, wanted, wanted & ~constant)]

        self.readers[node] = read
        self.affine[node] = ("weight", "bias")
        return None

    def _layer_norm(self, node: fx.Node) -> str | None:
        """LayerNorm and RMSNorm over the channels: all of them stay, since the norm counts them."""
        source = self._source(node)
        facts = self.facts.get(source)
        if node.op == "call_module":
            m = self._module(node)
            if facts is None:
                return f"{self._kind(node)} reads what is not tracked"
        else:
            chosen = given(node, "input", "normalized_shape", "weight", "bias")
            shape = chosen["normalized_shape"]
            m = SimpleNamespace(normalized_shape=tuple(self.shapes[shape] if isinstance(shape, fx.Node) else shape))
            for name in ("weight", "bias"):
                n = chosen.get(name)
                if n is not None and not (isinstance(n, fx.Node) and n.op == "get_attr"):
                    return f"its {name} is computed"
                setattr(m, name, None if n is None else attribute(self.module, str(n.target)))
            if facts is None:
                self._channelwise(node, source, None)
                return None
        const, value = np.zeros(facts.ids.shape, bool), np.zeros(facts.ids.shape)
        if axes_of(facts.ids) == [facts.ids.ndim - 1] and tuple(m.normalized_shape) == (facts.ids.size,):
            gamma, beta = _affine(m, facts.ids.size)
            const = (gamma == 0).reshape(facts.ids.shape)
            value = np.where(const, beta.reshape(facts.ids.shape), 0.0)
        self._channelwise(node, source, Facts(facts.ids, const, value))
        rank = facts.ids.ndim
        self._counted(node, source, range(rank - len(m.normalized_shape), rank))
        return None

    def _embedding(self, node: fx.Node) -> str | None:
        m = self._module(node)
        if m.max_norm is not None:
            return "rescales its rows"
        low, high = (values_of(f(m.weight.detach(), dim=0)) for f in (torch.amin, torch.amax))
        const = (low == high) & (not m.weight.is_meta)
        outs = Facts(self._fresh(low.size), const, np.where(const, low, 0.0))
        self.facts[node] = self._like(outs, len(self.shapes[node]), -1)
        self.sources[node] = []
        self.tables[node] = 1
        return None

    # Products and attention

    def _matmul(self, node: fx.Node) -> str | None:
        """Batched products: scores q @ k^T over the channels of each head, and scores @ v."""
        if len(node.args) != 2 or not all(isinstance(a, fx.Node) for a in node.args):
            return "its arguments are not tensors"
        a, b = node.args
        assert isinstance(a, fx.Node) and isinstance(b, fx.Node)
        fa, fb = self.facts.get(a), self.facts.get(b)
        if fa is None and fb is None:
            self.why[node] = "made of untracked tensors"
            return None
        rank = len(self.shapes[node])
        if fa is None or fb is None or fa.ids.ndim != rank or fb.ids.ndim != rank or rank < 3 or a is b:
            return "one of its operands is not tracked"
        heads = [d for d in range(rank - 2) if fa.ids.shape[d] > 1 or fb.ids.shape[d] > 1]
        (n, ka), (kb, o) = fa.ids.shape[-2:], fb.ids.shape[-2:]
        if any(fb.ids.shape[d] not in (1, fa.ids.shape[d]) or fa.ids.shape[d] != self.shapes[node][d] for d in heads):
            return "its operands do not line up"
        if ka > 1 and ka == kb and n == 1 and o == 1:
            return self._scores(node, a, b, heads)
        if (ka, kb) == (1, 1) and n == 1 and self.shapes[a][-1] == self.shapes[b][-2]:
            return self._weighted(node, a, b, heads)
        return "multiplies channels in a way that is not tracked"

    def _shared(self, node: fx.Node, heads: Sequence[int], times: int = 1) -> tuple[Facts, Ints]:
        """Facts of keys or values as if every head had its own, and their positions in those that there are."""
        facts = self.facts[node]
        positions = np.arange(facts.ids.size).reshape(facts.ids.shape)
        return facts.map(lambda a: for_heads(a, heads, times)), for_heads(positions, heads, times)

    def copies(self, node: fx.Node) -> int:
        """How many heads of queries of a scaled_dot_product_attention share one of keys and values."""
        chosen = given(node, "query", "key", "value")
        q, k = (self.shapes[chosen[n]] for n in ("query", "key"))
        return int(q[-3] // k[-3]) if chosen.get("enable_gqa") else 1

    def _at(self, node: fx.Node, positions: Ints) -> Bools:
        """The channels of a tensor at these positions."""
        found = np.zeros(self.facts[node].ids.size, bool)
        found[positions] = True
        return found

    def _scores(self, node: fx.Node, q: fx.Node, k: fx.Node, heads: list[int]) -> str | None:
        fq = self.facts[q]
        fk, places = self._shared(k, fq.ids.shape[:-2])
        fk, places = fk.map(lambda x: x.swapaxes(-1, -2)), places.swapaxes(-1, -2)
        self._tie((fq.ids, fk.ids))
        shape = [fq.ids.shape[d] if d in heads else 1 for d in range(fq.ids.ndim)]
        ids = self._fresh(int(np.prod(shape))).reshape(shape)
        self.facts[node] = Facts(ids, np.zeros(shape, bool), np.zeros(shape))
        self.sources[node] = []
        self._by_head(node, [(fq.ids, heads), (ids, heads)])
        zero = (fq.const & (fq.value == 0)) | (fk.const & (fk.value == 0))

        def read(need: Bools) -> list[Reading]:
            wanted = need & ~zero
            back = self._at(k, places[wanted])
            return [(q, wanted, wanted), (k, back, back)]

        self.readers[node] = read
        self.edits[node] = "scores"
        return None

    def _weighted(self, node: fx.Node, weights: fx.Node, v: fx.Node, heads: list[int]) -> str | None:
        fw = self.facts[weights]
        fv, positions = self._shared(v, fw.ids.shape[:-2])
        const = fv.const & ((fv.value == 0) | (weights in self.averages))
        self.facts[node] = Facts(fv.ids, const, np.where(const, fv.value, 0.0))
        self.sources[node] = [(v, positions, None)]
        self._by_head(node, [(fv.ids, heads), (fw.ids, heads)])
        rest = tuple(d for d in range(fv.ids.ndim) if d not in heads)

        def read(need: Bools) -> list[Reading]:
            varies = need & ~const
            read_of = self._at(v, positions[need]), self._at(v, positions[varies])
            return [(v, *read_of), (weights, varies.any(rest, keepdims=True), None)]

        self.readers[node] = read
        self.edits[node] = "weighted"
        return None

    def _attention(self, node: fx.Node) -> str | None:
        """scaled_dot_product_attention: an average of v; of q and k only products matter, and of these only what
        differs between the keys, so a channel of k that is constant goes with its channel of q."""
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
        chosen = given(node, *names)
        q, k, v = (chosen[n] for n in names[:3])
        mask = chosen.get("attn_mask")
        if any(n not in self.facts for n in (q, k, v)):
            return "one of its operands is not tracked"
        if len({q, k, v}) < 3:
            return "one operand is several of its operands"
        fq = self.facts[q]
        rank = fq.ids.ndim
        if len({self.facts[n].ids.ndim for n in (q, k, v)}) > 1 or rank < 3:
            return "its operands do not line up"
        try:
            (fk, places), (fv, positions) = (self._shared(n, fq.ids.shape[:-2], self.copies(node)) for n in (k, v))
        except ValueError:
            return "its operands do not line up"
        if fq.ids.shape != fk.ids.shape:
            return "its operands do not line up"
        if any(f.ids.shape[-2] > 1 for f in (fq, fk, fv)):
            return "its tokens are channels"
        heads = [d for d in range(rank - 2) if fq.ids.shape[d] > 1]
        if isinstance(mask, fx.Node) and heads:
            own = len(self.shapes[mask]) - (rank - heads[0])
            if mask in self.facts or len(heads) > 1 or (own >= 0 and self.shapes[mask][own] > 1):
                for row in by_rows(fq.ids, heads):
                    self._lock(row[:1], f"{title(node)} has a mask for every head")
                if mask in self.facts:
                    self._lock(self.facts[mask].ids, f"{title(node)} takes it as a mask")
        self._tie((fq.ids, fk.ids))
        self.facts[node] = fv
        self.sources[node] = [(v, positions, None)]
        self._by_head(node, [(f.ids, heads) for f in (fq, fk, fv)])
        rest = tuple(d for d in range(rank) if d not in heads)
        same = fk.const | (fq.const & (fq.value == 0))

        def read(need: Bools) -> list[Reading]:
            varies = (need & ~fv.const).any(rest, keepdims=True)
            wanted = np.broadcast_to(varies, fq.ids.shape) & ~same
            back = self._at(k, places[wanted])
            out: list[Reading] = [(v, self._at(v, positions[need]), None), (q, wanted, wanted), (k, back, back)]
            return [*out, (mask, None, None)] if isinstance(mask, fx.Node) else out

        self.readers[node] = read
        self.edits[node] = "attention"
        return None


def _affine(m: Any, n: int) -> tuple[Any, Any]:
    """Scale and shift of a normalisation in float64."""
    weight, bias = getattr(m, "weight", None), getattr(m, "bias", None)
    gamma = np.ones(n) if weight is None or weight.is_meta else values_of(weight)
    beta = np.zeros(n) if bias is None else values_of(bias)
    return gamma, beta
