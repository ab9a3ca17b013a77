"""Rules of channel tracking for recurrent layers: nn.RNN, nn.GRU, nn.LSTM.

One hidden unit of one layer and direction is one channel: its rows of every gate in weight_ih, weight_hh and the
biases, its column of weight_hh, and its column of the weight_ih of the layer above. A unit goes when no consumer of the
output or of the last states needs it and no needed unit reads it through weight_hh, or when it is constant for certain:

- it is 0 at every step where it starts at 0 and what writes into it is 0: the cell gate g of an LSTM (c = f*c + i*g),
  n of a GRU (h = (1-z)*n + z*h), the one row of an RNN. Units that read each other alone stay 0 together;
- a unit of an RNN with a bias alone emits act(bias) at every step, though the states begin at 0: a constant for what
  reads the output, not for the states.

A module has one number of units for all its layers and directions, so each keeps as many as the largest needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from .shared import Shared
from .trace import Shape
from .tracking import Bools, Facts, Floats, Ints, Reading, given, values_of

RECURRENT = (nn.RNN, nn.GRU, nn.LSTM)

# Gates of a unit, and which of them writes its state.
_GATES = {"LSTM": (4, 2), "GRU": (3, 2), "RNN_TANH": (1, 0), "RNN_RELU": (1, 0)}


@dataclass
class Cell:
    """One layer and direction. reads [H, I], state [H, H]: the unit has a nonzero weight on the input, on the unit.
    const [H]: the output is `value` [H] at every step; dead [H]: and that is 0, as the state at the start is."""

    suffix: str
    reads: Bools
    state: Bools
    const: Bools
    value: Floats
    dead: Bools


@dataclass
class Recurrent:
    """A recurrent module. ins: facts of its [I] inputs, in the order of the source where `direct`. outs: facts of its
    units, [layers * directions, 1, H]. cells: in that order."""

    source: fx.Node
    ins: Facts
    outs: Facts
    direct: bool
    cells: list[Cell]
    directions: int
    gates: int
    bias: bool

    def inputs(self, row: int) -> Facts:
        """Facts of what the cell reads, [I]."""
        start = row - row % self.directions
        return self.below(self.outs, start) if start else self.ins

    def below(self, outs: Facts, start: int) -> Facts:
        return outs.map(lambda a: a[start - self.directions : start].reshape(-1))

    def wanted(self, need: Bools) -> tuple[Bools, Bools, Bools, Bools]:
        """Units needed and needed though constant [layers * directions, 1, H], inputs likewise [I], where `need` is
        what the consumers need."""
        need, hard = need.reshape(len(self.cells), -1).copy(), np.zeros((len(self.cells), need.shape[-1]), bool)
        for start in range(len(self.cells) - self.directions, -1, -self.directions):
            facts = self.inputs(start)
            into = np.zeros(facts.ids.size, bool)
            for row in range(start, start + self.directions):
                cell, units = self.cells[row], need[row]
                while True:
                    read = cell.state[units & ~cell.const].any(0) & ~cell.dead
                    if not (read & ~units).any():
                        break
                    units |= read
                hard[row] |= read & cell.const
                into |= cell.reads[units & ~cell.dead].any(0)  # constants too: an input that stays keeps its value
            stuck = into & facts.const & (facts.value != 0) & (not self.bias)
            if start:
                need[start - self.directions : start] |= into.reshape(self.directions, -1)
                hard[start - self.directions : start] |= stuck.reshape(self.directions, -1)
        return need[:, None], hard[:, None], into, stuck


class Recurrents(Shared):
    """The rules. The facts of a module's node are those of its units; the output and the last states are movements of
    them."""

    def _recurrent(self, node: fx.Node) -> str | None:
        m = self._module(node)
        if reason := self.tied(node):
            return reason
        if m.proj_size:
            return "it projects its states"
        source, start = (given(node, "input", "hx").get(k) for k in ("input", "hx"))
        if not isinstance(source, fx.Node) or not isinstance(self.shapes.get(source), Shape):
            return "its input is packed"
        if len(self.shapes[source]) != 3:
            return "unbatched input"
        ins = self._adopt(source, 2)
        gates, writer = _GATES[m.mode]
        directions = 2 if m.bidirectional else 1
        rows = m.num_layers * directions
        ids = self._fresh(rows * m.hidden_size).reshape(rows, 1, -1)
        outs = Facts(ids, np.zeros(ids.shape, bool), np.zeros(ids.shape))
        direct = np.array_equal(self.facts[source].ids.reshape(-1), ins.ids)
        layer = Recurrent(source, ins, outs, direct, [], directions, gates, m.bias)
        for row in range(rows):
            suffix = f"l{row // directions}" + "_reverse" * (row % directions)
            cell = _cell(m, suffix, gates, writer, layer.inputs(row), start is None)
            layer.cells.append(cell)
            outs.const[row, 0], outs.value[row, 0] = cell.const, cell.value
        if start is not None:
            self._lock(ids, f"{node.target}: its initial state is given")
            self.whole[str(node.target)] = "its initial state is given, so only inputs go"
        others = [n for n in node.all_input_nodes if n is not source]
        for n in others:
            origin = self.parts[n][0] if n in self.parts else n
            if origin in self.facts:
                self._lock(self.facts[origin].ids, f"{node.target}: is its initial state")

        def read(need: Bools) -> list[Reading]:
            units, hard, into, stuck = layer.wanted(need)
            own: Reading = (node, units, hard)
            below: Reading = (source, into, stuck) if direct else (source, None, None)
            return [own, below, *((n, None, None) for n in others)]

        self.recurrent[node] = layer
        self.facts[node] = outs
        self.sources[node] = []
        self.readers[node] = read
        self.grids.append((node, ids))
        self.together.append((node, list(ids)))
        return None

    def _states(self, node: fx.Node) -> str | None:
        """Items of what a recurrent layer returns: the output, the last states, and these one by one."""
        args: Any = node.args
        source, index = args
        if not isinstance(index, int):
            return "its index is not a number"
        layer = self.recurrent.get(source)
        if layer is not None and index % 2 == 0:
            n = layer.directions
            self._move(node, source, lambda a: a[-n:].reshape(1, 1, -1))
        else:
            self._move(node, source, lambda a: a)
            if not isinstance(self.shapes[node], Shape):
                self.states.add(node)
        return None


def _cell(m: Any, suffix: str, gates: int, writer: int, ins: Facts, from_zero: bool) -> Cell:
    w_ih, w_hh = (getattr(m, f"weight_{k}_{suffix}").detach() for k in ("ih", "hh"))
    n = m.hidden_size
    none = np.zeros(n, bool)
    if w_ih.is_meta:
        return Cell(suffix, np.ones((n, ins.ids.size), bool), np.ones((n, n), bool), none, np.zeros(n), none)
    reads, state = ((w != 0).unflatten(0, (gates, n)).cpu().numpy() for w in (w_ih, w_hh))
    if not from_zero:
        return Cell(suffix, reads.any(0), state.any(0), none, np.zeros(n), none)
    write, back = reads[writer], state[writer]
    biases = [values_of(getattr(m, f"bias_{k}_{suffix}")) if m.bias else np.zeros(gates * n) for k in ("ih", "hh")]
    b_ih, b_hh = (b.reshape(gates, n)[writer] for b in biases)
    unbiased = (b_ih == 0) & (b_hh == 0) if m.mode == "GRU" else b_ih + b_hh == 0
    dead = unbiased & ~write[:, ~ins.const | (ins.value != 0)].any(1)
    while True:
        stays = dead & ~back[:, ~dead].any(1)
        if np.array_equal(stays, dead):
            break
        dead = stays
    const, value = dead, np.zeros(n)
    if gates == 1 and m.bias:
        const = dead | ~(write[:, ~ins.const].any(1) | back[:, ~dead].any(1))
        total = b_ih + b_hh + values_of(w_ih) @ np.where(ins.const, ins.value, 0.0)
        value = np.where(const & ~dead, np.tanh(total) if m.mode == "RNN_TANH" else np.maximum(total, 0.0), 0.0)
    return Cell(suffix, reads.any(0), state.any(0), const, value, dead)


def matrices(m: nn.RNNBase) -> list[Tensor]:
    """The weight matrices of a recurrent module."""
    return [p for name, p in m.named_parameters(recurse=False) if name.startswith("weight")]


def fold(m: Any, layer: Recurrent, gone_in: Bools, gone: Bools, need: Bools) -> None:
    """Write the findings into the weights of `m` in place: units without effect and weights on removed channels become
    zero, removed constants go into bias_ih. gone_in [I], gone, need [layers * directions, 1, H]."""
    idle = (gone | ~need).reshape(len(layer.cells), -1) | np.stack([c.dead for c in layer.cells])
    for row, cell in enumerate(layer.cells):
        start = row - row % layer.directions
        facts = layer.inputs(row)
        away = gone[start - layer.directions : start].reshape(-1) if start else gone_in
        amount = np.where(away & facts.const, facts.value, 0.0)
        w_ih, w_hh = (getattr(m, f"weight_{k}_{cell.suffix}").detach() for k in ("ih", "hh"))

        def on(a: Any, like: Tensor = w_ih) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(a)).to(like.device)

        rows = on(np.tile(~idle[row], layer.gates))
        biases = [getattr(m, f"bias_{k}_{cell.suffix}").detach() for k in ("ih", "hh") if layer.bias]
        if amount.any() and biases:
            biases[0].copy_(biases[0].double() + w_ih.double() @ on(amount))
        w_ih.mul_(rows[:, None] & on(~away))
        w_hh.mul_(rows[:, None] & on(~idle[row]))
        for b in biases:
            b.mul_(rows)


def pieces(layer: Recurrent, ins: Ints, units: Ints) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """Per parameter its name and which rows and columns (None: it has none) are left. ins: remaining inputs. units
    [layers * directions, n]: remaining units of each cell."""
    size = layer.outs.ids.shape[-1]
    for row, cell in enumerate(layer.cells):
        start = row - row % layer.directions
        columns = ins
        if start:
            columns = (units[start - layer.directions : start] + np.arange(layer.directions)[:, None] * size).reshape(
                -1
            )
        rows = torch.from_numpy((np.arange(layer.gates)[:, None] * size + units[row]).reshape(-1))
        yield f"weight_ih_{cell.suffix}", rows, torch.from_numpy(np.ascontiguousarray(columns))
        yield f"weight_hh_{cell.suffix}", rows, torch.from_numpy(np.ascontiguousarray(units[row]))
        for k in ("ih", "hh") if layer.bias else ():
            yield f"bias_{k}_{cell.suffix}", rows, None
