"""Tied weights: tensors that several places of the graph use, as calls of one module do, or modules with one parameter.

Along each dimension of such a tensor the channels of all its uses are tied, so an entry goes where every use allows it,
or not at all; where one use needs all entries (the words of an embedding, a normalisation over all channels), all of
them stay. What the tensors hold is changed for all uses at once: a constant goes into a bias only where all that it is
the bias of get the same one, weights move to another channel only where both hold the same in all uses, and a weight
becomes zero where no use reads it. Where one of the uses is not tracked, none of them is.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx, nn

from .tracking import Ints, Tracker, Use, attribute, title

# The ids along each dimension of a tensor; None where all entries stay.
Sides = list["Ints | None"]


class Shared(Tracker):
    def tied(self, node: fx.Node) -> str | None:
        """Why a module is left whole that may be called once only, with tensors of its own."""
        found = dict.fromkeys(n for (user, _), uses in self.shared.items() if user is node for n, _ in uses)
        calls = sum(n.target == node.target for n in found)
        if calls > 1:
            return f"the module is called {calls} times"
        return next((f"its weights are tied to {n.target}" for n in found if n is not node), None)

    def groups(self) -> Iterator[list[Use]]:
        """The uses of each shared tensor."""
        seen: set[int] = set()
        for uses in self.shared.values():
            if id(uses) not in seen:
                seen.add(id(uses))
                yield uses

    def sides(self, use: Use) -> tuple[tuple[bool, int] | None, Sides] | None:
        """How the dimensions of a shared tensor stand for channels, (transposed, conv groups) of a weight of several
        conv groups, whose dimensions are none of one channel each, and the ids; None for a use that is not tracked."""
        node, name = use
        if node in self.apart or node not in self.facts:
            return None
        owner = self._module(node) if node.op == "call_module" else None
        t = attribute(self.module, str(node.target)) if owner is None else attribute(owner, name)
        sides: Sides = [None] * (1 if t is None else t.dim())
        form = None
        if node in self.layers:
            layer = self.layers[node]
            sides[0] = layer.outs.ids
            if name == "weight":
                sides[1] = layer.ins.ids
                transposed = isinstance(owner, nn.modules.conv._ConvTransposeNd)
                form = (transposed, layer.groups) if transposed or layer.groups > 1 else None
        elif node in self.norms or name in self.affine.get(node, ()):
            sides[0] = self.facts[node].ids.reshape(-1)
        elif node in self.tables:
            sides[self.tables[node]] = self.facts[node].ids.reshape(-1)
        return form, sides

    def set_apart(self) -> bool:
        """Set apart the nodes that share a tensor with a use that is not tracked, or that sees it in another form;
        whether there were any."""
        before, more = len(self.apart), True
        while more:
            more = False
            for uses in self.groups():
                found = [self.sides(use) for use in uses]
                forms = {side[0] for side in found if side is not None}
                cut = any(ids is not None for side in found if side is not None for ids in side[1])
                if not cut or (len(forms) == 1 and None not in found):
                    continue
                odd = next((n for (n, _), side in zip(uses, found, strict=True) if side is None), None)
                for node, name in uses:
                    if node not in self.apart:
                        self.apart[node] = self._why_apart(node, name, uses, odd)
                        more = True
        return len(self.apart) > before

    def _why_apart(self, node: fx.Node, name: str, uses: list[Use], odd: fx.Node | None) -> str:
        if odd is node:
            return self.whole.get(title(node), self.why.get(node, "not tracked"))
        if odd is None:
            other = next(n for n, _ in uses if n is not node)
            return f"its {name} is tied to {other.target}, which takes it for weights of another form"
        why = self.apart.get(odd) or self.whole.get(title(odd)) or self.why.get(odd, "not tracked")
        if odd.target == node.target:
            return f"another call of it is left whole: {why}"
        return f"its {name} is tied to {odd.target}, which is left whole: {why}"

    def tie_uses(self, live: set[fx.Node]) -> None:
        """Tie the channels of the live uses of each tensor; where one keeps all entries, all do."""
        for uses in self.groups():
            known = [(use, found[1]) for use in uses if use[0] in live and (found := self.sides(use)) is not None]
            for per in zip(*(sides for _, sides in known), strict=True):
                ids = [i for i in per if i is not None]
                if ids:
                    self._tie(ids)
                keepers = [node for ((node, _), _), i in zip(known, per, strict=True) if i is None]
                for i in ids if keepers else ():
                    self._lock(i, f"{title(keepers[0])} needs all entries of the weights that it shares")
