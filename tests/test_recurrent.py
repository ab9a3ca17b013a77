"""What goes from networks with nn.RNN, nn.GRU and nn.LSTM, and that they compute the same afterwards."""

from __future__ import annotations

import copy
import itertools
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import structadmm as sa
from random_graphs import zero_recurrent
from structadmm import _core
from structadmm.allowed import KINDS as LAYERS
from structadmm.allowed import Refused
from structadmm.errors import ArtefactError
from structadmm.paths import report_of

C, H, T = 6, 5, 7


def sequences(n: int, length: int = T, c: int = C) -> Tensor:
    return torch.randn(n, length, c, dtype=torch.float64, generator=torch.Generator().manual_seed(n))


class Net(nn.Module):
    """Linear, recurrent, linear. `reads`: the output, or the last states of all layers, or both and all there is."""

    def __init__(self, kind: type[nn.RNNBase], reads: str = "output", batch_first: bool = True, **kwargs) -> None:
        super().__init__()
        self.a = nn.Linear(C, C)
        self.rnn = kind(C, H, batch_first=batch_first, **kwargs)
        self.reads, self.batch_first = reads, batch_first
        directions = 2 if self.rnn.bidirectional else 1
        self.b = nn.Linear(H * directions * (self.rnn.num_layers if reads == "states" else 1), 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if not self.batch_first:
            x = x.transpose(0, 1)
        if self.reads == "output":
            y = self.rnn(x)[0]
        elif self.reads == "last":
            y = self.rnn(x)[1]
            y = (y[1] if isinstance(self.rnn, nn.LSTM) else y)[-1:].transpose(0, 1)
        else:
            y, last = self.rnn(x)
            h = last[0] if isinstance(self.rnn, nn.LSTM) else last
            y = h.transpose(0, 1).flatten(1)
        return self.b(y)


def filled(model: nn.Module, seed: int = 0) -> nn.Module:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.5)
    return model.double().eval()


def compacted(model: nn.Module, x: Tensor, *others: Tensor) -> nn.Module:
    """compact, with what holds for every network: the same outputs at another batch and length, copies, a step."""
    small = sa.compact(model, x, columns="never")
    for other in (x, *others):
        with torch.no_grad():
            a, b = model(other), small(other)
        assert (a - b).abs().max() <= 1e-10 * max(1.0, a.abs().max().item())
    again = pickle.loads(pickle.dumps(copy.deepcopy(small)))
    with torch.no_grad():
        assert torch.equal(again(x), small(x))
    small.train()
    small(x).square().mean().backward()
    assert all(p.grad is not None and p.shape == p.grad.shape for p in small.parameters())
    small.zero_grad()
    cleared = sa.remove_unused_paths(model, x)
    with torch.no_grad():
        assert (cleared(x) - model(x)).abs().max() <= 1e-10 * max(1.0, model(x).abs().max().item())
    return small.eval()


def shapes(small: nn.Module, name: str = "rnn") -> dict[str, tuple[int, ...]]:
    return {n: tuple(p.shape) for n, p in small.get_submodule(name).named_parameters()}


def rows(m: nn.RNNBase, unit: int, gates: list[int] | None = None) -> list[int]:
    n = m.weight_hh_l0.shape[0] // m.hidden_size
    return [g * m.hidden_size + unit for g in (range(n) if gates is None else gates)]


KINDS = [nn.LSTM, nn.GRU, nn.RNN]
WRITER = {nn.LSTM: 2, nn.GRU: 2, nn.RNN: 0}


@pytest.mark.parametrize("kind", KINDS)
def test_units_that_nothing_reads_go(kind: type[nn.RNNBase]) -> None:
    """Unit 1 feeds unit 3 and nothing else; unit 3 feeds nothing: both go. Unit 2 is read by unit 0 alone: it stays."""
    model = filled(Net(kind))
    with torch.no_grad():
        model.b.weight[:, [1, 2, 3]] = 0
        w = model.rnn.weight_hh_l0
        w[:, [1, 2, 3]] = 0
        w[rows(model.rnn, 3), 1] = 1.0
        w[rows(model.rnn, 0), 2] = 1.0
    small = compacted(model, sequences(2), sequences(3), sequences(3, 4))
    n = WRITER[kind] + 1 + (kind is nn.LSTM)
    wanted = {"weight_ih_l0": (3 * n, C), "weight_hh_l0": (3 * n, 3), "bias_ih_l0": (3 * n,), "bias_hh_l0": (3 * n,)}
    assert shapes(small) == wanted and small.rnn.hidden_size == 3 and small.b.in_features == 3
    row = next(r for r in small.report.layers if r.name == "rnn")
    assert (row.weights_before, row.weights_after) == (n * H * (C + H), 3 * n * (C + 3))
    assert row.macs_after == row.weights_after * T and not small.report.whole


@pytest.mark.parametrize("kind", KINDS)
def test_units_whose_state_stays_zero_go(kind: type[nn.RNNBase]) -> None:
    """Units 1 and 4 are written by each other alone, without bias: whatever their other gates do, they emit 0."""
    model = filled(Net(kind))
    with torch.no_grad():
        for unit, other in ((1, 4), (4, 1)):
            at = rows(model.rnn, unit, [WRITER[kind]])
            for p in model.rnn.parameters():
                p[at] = 0
            model.rnn.weight_hh_l0[at, other] = 1.0
    small = compacted(model, sequences(2), sequences(3, 4))
    assert small.rnn.hidden_size == 3 and small.b.in_features == 3
    with torch.no_grad():  # one of them has a bias, so both vary
        model.rnn.bias_ih_l0[rows(model.rnn, 1, [WRITER[kind]])] = 0.5
    assert compacted(model, sequences(2)).rnn.hidden_size == H


def test_biases_that_cancel_write_nothing() -> None:
    """Where they are added; the reset gate of a GRU comes between them."""
    for kind, left in ((nn.LSTM, H - 1), (nn.RNN, H - 1), (nn.GRU, H)):
        model = filled(Net(kind))
        at = rows(model.rnn, 1, [WRITER[kind]])
        with torch.no_grad():
            for p in model.rnn.parameters():
                p[at] = 0
            model.rnn.bias_ih_l0[at], model.rnn.bias_hh_l0[at] = 0.5, -0.5
        assert compacted(model, sequences(2)).rnn.hidden_size == left


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_a_unit_of_an_rnn_that_emits_its_bias(nonlinearity: str) -> None:
    """A constant for the next layer, but the states begin at 0: it stays where another unit reads it."""
    model = filled(Net(nn.RNN, nonlinearity=nonlinearity))
    with torch.no_grad():
        model.rnn.weight_ih_l0[1] = model.rnn.weight_hh_l0[1] = 0
        model.rnn.bias_ih_l0[1] = 2.0
    assert compacted(model, sequences(2)).rnn.hidden_size == H
    with torch.no_grad():
        model.rnn.weight_hh_l0[:, 1] = 0
    small = compacted(model, sequences(2), sequences(3, 4))
    assert small.rnn.hidden_size == H - 1 and small.b.in_features == H - 1


def test_a_constant_unit_reads_the_constant_that_stays() -> None:
    """Of inputs that are all constant one is left; a unit of which the bias alone is constant would not know it."""
    model = filled(Net(nn.RNN))
    with torch.no_grad():
        model.a.weight.zero_()
        model.rnn.weight_ih_l0[:, 0] = 0
        model.rnn.weight_ih_l0[1, 0] = 1.0
        model.rnn.weight_hh_l0[1] = 0
    small = compacted(model, sequences(2), sequences(3, 4))
    assert small.rnn.input_size == 1 and small.rnn.hidden_size == H


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_inputs_go(kind: type[nn.RNNBase], bias: bool) -> None:
    """Input 0 is not read, input 1 is 0; input 2 is a constant, which goes where there is a bias to take it."""
    model = filled(Net(kind, bias=bias))
    with torch.no_grad():
        model.rnn.weight_ih_l0[:, 0] = 0
        model.a.weight[1:3] = 0
        model.a.bias[1] = 0
    small = compacted(model, sequences(2), sequences(3, 4))
    assert small.rnn.input_size == small.a.out_features == (C - 3 if bias else C - 2)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("reads", ["output", "states", "last"])
def test_layers_and_directions_keep_as_many_units(reads: str, batch_first: bool) -> None:
    """A module has one number of units, so the cell with most decides."""
    model = filled(Net(nn.LSTM, reads, batch_first, num_layers=2, bidirectional=reads != "last"))
    gone = {"l0": [0, 1], "l1": [2, 3, 4]}
    if reads != "last":
        gone |= {"l0_reverse": [1, 2, 3], "l1_reverse": [0, 4]}
    with torch.no_grad():
        for suffix, units in gone.items():
            at = [i for u in units for i in rows(model.rnn, u)]
            for k in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                getattr(model.rnn, f"{k}_{suffix}")[at] = 0
    small = compacted(model, sequences(2), sequences(3, 4))
    assert small.rnn.hidden_size == 3
    assert small.b.in_features == 3 * {"output": 2, "states": 4, "last": 1}[reads]
    assert any("keeps its rows of one size" in why for why in small.report.notes["rnn"])


def test_a_direction_that_nothing_reads_keeps_its_size() -> None:
    model = filled(Net(nn.GRU, bidirectional=True))
    with torch.no_grad():
        model.b.weight[:, H:] = 0
        model.b.weight[:, 0] = model.rnn.weight_hh_l0[:, 0] = 0
    small = compacted(model, sequences(2))
    assert small.rnn.hidden_size == H - 1 and small.b.in_features == 2 * (H - 1)
    assert small.rnn.weight_ih_l0_reverse.count_nonzero() == 0


def test_units_go_with_their_residual_stream() -> None:
    class Stream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.rnn, self.b = nn.Linear(C, C), nn.GRU(C, C, batch_first=True), nn.Linear(C, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.b(x + self.rnn(x)[0])

    model = filled(Stream())
    with torch.no_grad():
        model.b.weight[:, :3] = 0
        model.rnn.weight_hh_l0[:, :2] = model.rnn.weight_ih_l0[:, :2] = 0
    small = compacted(model, sequences(2), sequences(3, 4))
    assert small.a.out_features == small.rnn.input_size == small.rnn.hidden_size == C - 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_given_state_keeps_the_units(kind: type[nn.RNNBase]) -> None:
    """They may start anywhere; inputs go."""

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = (kind(C, H, batch_first=True) for _ in range(2))
            self.b = nn.Linear(H, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.decoder(x.flip(1), self.encoder(x)[1])[0])

    model = filled(Decoder())
    with torch.no_grad():
        for p in model.decoder.parameters():
            p[rows(model.decoder, 1)] = 0
        model.encoder.weight_ih_l0[rows(model.encoder, 2)] = 0
    small = compacted(model, sequences(2), sequences(3, 4))
    assert small.encoder.hidden_size == small.decoder.hidden_size == H
    assert small.report.whole == {"decoder": "its initial state is given, so only inputs go"}


def test_what_stays_whole_says_why() -> None:
    class Twice(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.rnn(self.rnn(self.a(x))[0])[0])

    model = filled(Net(nn.LSTM, proj_size=3))
    model.b = filled(nn.Linear(3, 4))
    assert compacted(model, sequences(2)).report.whole == {"rnn": "it projects its states"}
    model = Twice(nn.LSTM)
    model.rnn, model.b = nn.LSTM(C, C, batch_first=True), nn.Linear(C, 4)
    assert compacted(filled(model), sequences(2)).report.whole == {"rnn": "the module is called 2 times"}


@pytest.mark.parametrize("seed", range(24))
def test_random_units_layers_and_directions(seed: int) -> None:
    r = random.Random(seed)
    kind = r.choice(KINDS)
    extra: dict[str, Any] = {"nonlinearity": r.choice(["tanh", "relu"])} if kind is nn.RNN else {}
    reads = r.choice(["output", "states", "last"])
    both = r.random() < 0.5 and reads != "last"
    extra |= {"num_layers": r.choice([1, 2, 3]), "bidirectional": both, "bias": r.random() < 0.7}
    model = Net(kind, reads, r.random() < 0.5, **extra)
    filled(model, seed)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        zero_recurrent(model.rnn, 0.5, g)
        model.a.weight[torch.rand(C, generator=g) < 0.3] = 0
        model.b.weight[:, torch.rand(model.b.in_features, generator=g) < 0.3] = 0
    small = compacted(model, sequences(2), sequences(3), sequences(4, 3))
    wanted = needed_units(model)
    most = max(max(len(units) for units in wanted.values()), 1)
    if kind is nn.RNN and model.rnn.bias:  # units may emit a constant, too
        assert small.rnn.hidden_size <= most, f"seed {seed}: {wanted}"
    else:
        assert small.rnn.hidden_size == most, f"seed {seed}: {wanted}"


def needed_units(model: Net) -> dict[str, set[int]]:
    """Units with an effect, by hand: written to other than by zeros, and on a path to what the last layer reads."""
    m = model.rnn
    directions = ["", "_reverse"] if m.bidirectional else [""]
    gate = WRITER[type(m)] * m.hidden_size
    varies: dict[str, set[int]] = {}
    inputs = {c for c in range(C) if model.a.weight[c].any()}
    constant = {c: model.a.bias[c].item() for c in range(C) if c not in inputs and model.a.bias[c] != 0}
    for k in range(m.num_layers):
        for d in directions:
            s = f"l{k}{d}"
            zero = set(range(H))
            parts = [0.0, 0.0]
            for u in range(H):
                row = getattr(m, f"weight_ih_{s}")[gate + u]
                if m.bias:
                    parts = [getattr(m, f"bias_{n}_{s}")[gate + u].item() for n in ("ih", "hh")]
                biased = any(parts) if isinstance(m, nn.GRU) else sum(parts) != 0
                if biased or any(row[c] != 0 for c in (*inputs, *constant)):
                    zero.discard(u)
            w = getattr(m, f"weight_hh_{s}")
            while bad := {u for u in zero if any(w[gate + u, j] != 0 for j in range(H) if j not in zero)}:
                zero -= bad
            varies[s] = set(range(H)) - zero
        units = [i * H + u for i, d in enumerate(directions) for u in varies[f"l{k}{d}"]]
        inputs, constant = set(units), {}
    needed: dict[str, set[int]] = {f"l{k}{d}": set() for k in range(m.num_layers) for d in directions}
    for k, (i, d) in itertools.product(reversed(range(m.num_layers)), enumerate(directions)):
        s = f"l{k}{d}"
        read = model.b.weight.any(0).reshape(-1, H)
        row = i if model.reads == "output" else 0 if model.reads == "last" else k * len(directions) + i
        top = k == m.num_layers - 1 or model.reads == "states"
        found = {u for u in range(H) if top and read[row, u]}
        for e in directions if k < m.num_layers - 1 else ():
            w = getattr(m, f"weight_ih_l{k + 1}{e}").reshape(-1, H, H * len(directions)).any(0)
            found |= {u for u in range(H) for v in needed[f"l{k + 1}{e}"] if w[v, i * H + u]}
        w = getattr(m, f"weight_hh_{s}").reshape(-1, H, H).any(0)
        found &= varies[s]
        while more := {u for u in varies[s] - found if any(w[v, u] for v in found)}:
            found |= more
        needed[s] = found
    return needed


def test_optimizer_state_follows() -> None:
    model = filled(Net(nn.LSTM, num_layers=2, bidirectional=True))
    optimizer = torch.optim.Adam(model.parameters())
    model(sequences(2)).square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        for suffix in ("l0", "l1", "l0_reverse", "l1_reverse"):
            for k in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                getattr(model.rnn, f"{k}_{suffix}")[rows(model.rnn, 2)] = 0
    small = compacted(model, sequences(2))
    assert small.rnn.hidden_size == H - 1
    carried = sa.carry_state(optimizer, model, small)
    left = [g * H + u for g in range(4) for u in (0, 1, 3, 4)]
    below = [d * H + u for d in range(2) for u in (0, 1, 3, 4)]
    state = {n: optimizer.state[p]["exp_avg"] for n, p in model.rnn.named_parameters()}
    found = {n: carried.state[p]["exp_avg"] for n, p in small.rnn.named_parameters()}
    assert torch.equal(found["weight_ih_l1_reverse"], state["weight_ih_l1_reverse"][left][:, below])
    assert torch.equal(found["weight_hh_l0"], state["weight_hh_l0"][left][:, [0, 1, 3, 4]])
    assert torch.equal(found["bias_hh_l1"], state["bias_hh_l1"][left])
    before = [p.clone() for p in small.parameters()]
    small(sequences(2)).square().mean().backward()
    carried.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, small.parameters(), strict=True))


def test_unused_paths_become_zero() -> None:
    """In a model of the same class: columns of inputs that are gone, rows and columns of units without effect."""
    model = filled(Net(nn.GRU))
    with torch.no_grad():
        model.a.weight[1] = 0
        model.b.weight[:, 2] = model.rnn.weight_hh_l0[:, 2] = 0
    cleared = sa.remove_unused_paths(model, sequences(2))
    assert not cleared.rnn.weight_ih_l0[:, 1].any() and not cleared.rnn.weight_ih_l0[rows(model.rnn, 2)].any()
    assert not cleared.rnn.bias_hh_l0[rows(model.rnn, 2)].any() and cleared.a.bias[1] == 0
    assert report_of(cleared).notes == {}
    assert sa.purify(model, sequences(2)).rnn.hidden_size == H


def test_units_are_rounded_up() -> None:
    model = filled(Net(nn.LSTM, bidirectional=True))
    with torch.no_grad():
        for suffix in ("l0", "l0_reverse"):
            for k in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                getattr(model.rnn, f"{k}_{suffix}")[[i for u in (0, 1) for i in rows(model.rnn, u)]] = 0
    small = sa.compact(model, sequences(2), columns="never", round_to=4)
    assert small.rnn.hidden_size == 4
    assert any("rounded to 4 units" in why for why in small.report.notes["rnn"])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_files_hold_recurrent_layers(kind: type[nn.RNNBase], tmp_path: Path) -> None:
    model = filled(Net(kind, num_layers=2, bidirectional=True, batch_first=False))
    with torch.no_grad():
        for p in model.rnn.parameters():
            p[rows(model.rnn, 2)] = 0
    small = sa.compact(model, sequences(2), columns="never")
    path = tmp_path / "net.safetensors"
    sa.save(small, path, example=sequences(2))
    loaded = sa.load(path)
    assert loaded.rnn.hidden_size == H - 1
    with torch.no_grad():
        assert torch.equal(loaded(sequences(3, 4)), small(sequences(3, 4)))
    assert _core.why_not(path.read_bytes())["rnn"] is not None


def test_files_hold_no_other_recurrent_layers(tmp_path: Path) -> None:
    for model, why in ((nn.LSTM(C, H, proj_size=3), "proj_size got 3"), (nn.RNN(C, H), "RNN")):
        with pytest.raises(ArtefactError, match=why):
            sa.save(nn.Sequential(model), tmp_path / "net.safetensors", example=torch.randn(T, 2, C))
    config = LAYERS["GRU"].read(nn.GRU(C, H, num_layers=2))
    with pytest.raises(Refused, match="num_layers got 65, wanted at most 64"):
        LAYERS["GRU"].check_config(config | {"num_layers": 65})
    tensors = dict(nn.GRU(C, H, num_layers=2).state_dict())
    LAYERS["GRU"].check_tensors(config, tensors)
    with pytest.raises(Refused, match="weight_hh_l1 got"):
        LAYERS["GRU"].check_tensors(config, tensors | {"weight_hh_l1": torch.zeros(3 * H, C)})
