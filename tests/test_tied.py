"""Tied weights: layers that are called several times and parameters of several modules, cut as one and still tied."""

from __future__ import annotations

import copy
import importlib
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import structadmm as sa
from structadmm.paths import report_of
from structadmm.structure import filter_sets
from test_operators import filled, maps, tokens

torch.set_num_threads(1)  # tiny networks


class Sequence(nn.Module):
    """A convolution after itself: what it reads are its own filters."""

    def __init__(self, padding: int = 1) -> None:
        super().__init__()
        self.first, self.twice, self.last = (
            nn.Conv2d(3, 10, 3),
            nn.Conv2d(10, 10, 3, padding=padding),
            nn.Conv2d(10, 4, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        return self.last(F.relu(self.twice(F.relu(self.twice(x))))).mean((2, 3))


class Siamese(nn.Module):
    """Two branches of the same layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 10, 3), nn.Conv2d(10, 8, 3, bias=False), nn.Linear(8, 4)

    def branch(self, x: Tensor) -> Tensor:
        return F.relu(self.b(F.relu(self.a(x)))).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.abs(self.branch(x) - self.branch(x.flip(3))))


class Pyramid(nn.Module):
    """A head on three levels, each with a layer of its own before it."""

    def __init__(self, c: int = 10) -> None:
        super().__init__()
        self.levels = nn.ModuleList(nn.Conv2d(3, c, 3, padding=1) for _ in range(3))
        self.tower = nn.Sequential(
            nn.Conv2d(c, c, 3, padding=1), nn.ReLU(), nn.Conv2d(c, 8, 3, padding=1, bias=False), nn.PReLU()
        )
        self.score = nn.Conv2d(8, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        maps = [F.relu(level(F.avg_pool2d(x, 2**i))) for i, level in enumerate(self.levels)]
        return torch.cat([self.score(self.tower(m)).flatten(2) for m in maps], 2)


class Normed(nn.Module):
    """One BatchNorm behind two layers, and one PReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm, self.act = nn.Conv2d(3, 10, 3), nn.Conv2d(3, 10, 3), nn.BatchNorm2d(10), nn.PReLU(10)
        self.last = nn.Conv2d(10, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y, z = (self.act(self.norm(m(x))) for m in (self.a, self.b))
        return self.last(y * torch.sigmoid(z)).mean((2, 3))


class Weights(nn.Module):
    """Two linear layers with one weight and a bias each."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.a, self.b, self.last = (
            nn.Linear(16, 10),
            nn.Linear(10, 10),
            nn.Linear(10, 10),
            nn.Linear(10, 4),
        )
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.b(F.relu(self.a(F.relu(self.first(x)))))))


class Language(nn.Module):
    """An embedding that is the head too, around a block with a residual stream."""

    def __init__(self, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(23, 10), nn.Linear(10, 12), nn.Linear(12, 10)
        self.norm, self.head = norm or nn.Identity(), nn.Linear(10, 23, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(self.norm(x + self.down(F.relu(self.up(x)))))


def words(n: int, length: int = 6) -> Tensor:
    return torch.randint(0, 23, (n, length), generator=torch.Generator().manual_seed(n))


# Per network: how it is made, its inputs, and its channels as (number, layers that fill them, layers that read them).
NETWORKS: dict[str, tuple[Any, Any, list[tuple[int, tuple[str, ...], tuple[str, ...]]]]] = {
    "sequence": (Sequence, maps, [(10, ("first", "twice"), ("twice", "last"))]),
    "siamese": (Siamese, maps, [(10, ("a",), ("b",)), (8, ("b",), ("c",))]),
    "pyramid": (
        Pyramid,
        maps,
        [
            (10, ("levels.0", "levels.1", "levels.2"), ("tower.0",)),
            (10, ("tower.0",), ("tower.2",)),
            (8, ("tower.2",), ("score",)),
        ],
    ),
    "normed": (Normed, maps, [(10, ("a", "b", "norm"), ("last",))]),
    "weights": (Weights, tokens, [(10, ("first", "a", "b"), ("a", "last"))]),
    "language": (Language, words, [(10, ("embed", "down"), ("up", "head")), (12, ("up",), ("down",))]),
}


@torch.no_grad()
def empty(model: nn.Module, fill: tuple[str, ...], rows: Tensor) -> None:
    """What the layers put into these channels is 0."""
    for name in fill:
        m: Any = model.get_submodule(name)
        m.weight[(slice(None), rows) if isinstance(m, nn.Embedding) else rows] = 0
        if getattr(m, "bias", None) is not None:
            m.bias[rows] = 0


def ties(model: nn.Module) -> list[list[str]]:
    found: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(p), []).append(name)
    return [names for names in found.values() if len(names) > 1]


def agree(a: nn.Module, b: nn.Module, x: Tensor, tolerance: float) -> None:
    a, b = copy.deepcopy(a).eval(), copy.deepcopy(b).eval()
    with torch.no_grad():
        y, z = a(x), b(x)
    assert (y - z).abs().max() <= tolerance * max(1.0, y.abs().max().item())


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("rate", [0.3, 0.7])
@pytest.mark.parametrize("name", NETWORKS)
def test_channels_go_where_every_use_allows_it(name: str, rate: float, tmp_path: Path) -> None:
    make, inputs, channels = NETWORKS[name]
    torch.manual_seed(int(10 * rate))
    model, g = filled(make()), torch.Generator().manual_seed(int(10 * rate))
    left: dict[str, int] = {}
    for n, fill, read in channels:
        rows, columns = (torch.rand(n, generator=g) < rate / 2 for _ in range(2))
        rows[0], columns[0], rows[1], columns[1] = False, False, True, False
        columns[2] = True
        empty(model, fill, rows)
        with torch.no_grad():
            for reader in read:
                model.get_submodule(reader).weight[:, columns] = 0
        left |= dict.fromkeys(fill, int((~(rows | columns)).sum()))
    x, other = inputs(2), inputs(5)
    small = sa.compact(model, x, columns="never")
    agree(model, small, other, 1e-10)
    for filler, count in left.items():
        m: Any = small.get_submodule(filler)
        assert (m.weight.shape[1] if isinstance(m, nn.Embedding) else m.weight.shape[0]) == count, filler
    assert small.report.whole == {} and ties(small) == ties(model)
    again = sa.compact(small, x, columns="never")
    assert parameters(again) == parameters(small) < parameters(model)
    agree(small, again, other, 1e-10)

    for copied in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert ties(copied) == ties(model)
        agree(small, copied, other, 0)
    sa.save(small, tmp_path / "net", example=x)
    loaded = sa.load(tmp_path / "net")
    assert ties(loaded) == ties(model)
    agree(small, loaded, other, 0)

    single = copy.deepcopy(model).float()
    x, other = (t if t.dtype == torch.int64 else t.float() for t in (x, other))
    for columns in ("never", "always"):
        fast = sa.compact(single, x, columns=columns)
        agree(single, fast, other, 1e-4)
        assert ties(fast) == ties(model)


@pytest.mark.parametrize("name", NETWORKS)
def test_training_goes_on_as_it_would_have(name: str) -> None:
    make, inputs, channels = NETWORKS[name]
    model = filled(make()).train()
    for n, fill, read in channels:
        gone = torch.arange(n) % 3 == 1
        empty(model, fill, gone)
        with torch.no_grad():
            for reader in read:
                model.get_submodule(reader).weight[:, gone] = 0
    masks = {n: (p != 0).double() for n, p in model.named_parameters()}
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)

    def step(network: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        optimizer.zero_grad()
        network(inputs(seed + 2)).square().mean().backward()
        optimizer.step()
        if network is model:
            with torch.no_grad():
                for n, p in model.named_parameters():
                    p.mul_(masks[n])

    step(model, optimizer, 0)
    with torch.no_grad():  # what the first batch left of the mean of channels that are 0
        if isinstance(model, Normed):
            model.norm.running_mean[masks["norm.bias"] == 0] = 0
    average = {n: p.detach().clone() for n, p in model.named_parameters(remove_duplicate=False)}
    small = sa.compact(model, inputs(2), columns="never")
    assert parameters(small) < parameters(model)
    carried = sa.carry_state(optimizer, model, small)
    held = [p for group in carried.param_groups for p in group["params"]]
    assert len(held) == len({id(p) for p in held}) == len(list(small.parameters()))
    for n, t in sa.carry_tensors(average, small).items():
        if t.is_floating_point() and n in dict(small.named_parameters()):
            assert torch.equal(t, small.get_parameter(n)), n
    for i in range(1, 4):
        step(model, optimizer, i)
        step(small, carried, i)
    assert ties(small) == ties(model)
    agree(model, small, inputs(4), 1e-9)


class Custom(nn.Module):
    def __init__(self, function: Any, **modules: Any) -> None:
        super().__init__()
        self.function = function
        for name, m in modules.items():
            setattr(self, name, m)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


# Constants


@pytest.mark.parametrize(("first", "second"), [(0.5, 0.5), (0.5, 0.8), (0.5, -1.0), (-1.0, 0.5), (-1.0, -0.2)])
@pytest.mark.parametrize("padding", [0, 1])
def test_a_constant_goes_into_the_bias_where_all_calls_see_it(padding: int, first: float, second: float) -> None:
    """Filters 2 and 6 emit a constant: relu of one bias in front of the first call, of another one after it."""
    model = filled(Sequence(padding))
    with torch.no_grad():
        for m, value in ((model.first, first), (model.twice, second)):
            m.weight[[2, 6]] = 0
            m.bias[[2, 6]] = value
    small = sa.compact(model, maps(2), columns="never")
    agree(model, small, maps(3), 1e-10)
    alike = max(first, 0) == max(second, 0)
    # Behind zero padding a constant is none; one channel carries both then.
    gone = 2 if alike and (padding == 0 or first < 0) else 1 if alike else 0
    assert small.twice.out_channels == small.twice.in_channels == 10 - gone
    if not alike:
        why = " ".join(small.report.notes["twice"])
        assert ("the bias that it shares" in why) or padding
    assert parameters(sa.compact(small, maps(2), columns="never")) == parameters(small)


def test_layers_of_one_weight_take_other_constants_each() -> None:
    model = filled(Weights())
    with torch.no_grad():
        for m, value in ((model.first, 0.3), (model.a, 0.7), (model.b, 0.2)):
            m.weight[4] = 0
            m.bias[4] = value
    small = sa.compact(model, tokens(2), columns="never")
    agree(model, small, tokens(3), 1e-10)
    assert small.a.weight is small.b.weight and small.a.weight.shape == (9, 9)
    model.b.bias = model.a.bias
    with torch.no_grad():
        model.a.bias[4] = 0.7
    small = sa.compact(model, tokens(2), columns="never")
    agree(model, small, tokens(3), 1e-10)
    assert small.a.bias is small.b.bias and small.a.weight.shape == (10, 10), "now one bias would have to take both"
    with torch.no_grad():
        model.first.bias[4] = 0.7
    small = sa.compact(model, tokens(2), columns="never")
    agree(model, small, tokens(3), 1e-10)
    assert small.a.bias is small.b.bias and small.a.weight.shape == (9, 9)


@pytest.mark.parametrize("norms", [0, 1, 2])
def test_a_bias_that_calls_are_given_is_given_once(norms: int) -> None:
    """A layer without a bias, called twice on the same constant: into the means of the norms behind, if both have
    one."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.last = nn.Conv2d(3, 10, 3), nn.Conv2d(10, 8, 1, bias=False), nn.Conv2d(8, 4, 1)
            self.norms = nn.ModuleList(nn.BatchNorm2d(8) if i < norms else nn.Identity() for i in range(2))

        def forward(self, x: Tensor) -> Tensor:
            y, z = (norm(self.b(torch.sigmoid(self.a(t)))) for norm, t in zip(self.norms, (x, x.flip(3)), strict=True))
            return self.last(y * z).mean((2, 3))

    model = filled(Net())
    with torch.no_grad():
        model.a.weight[:4] = 0
    small = sa.compact(model, maps(2), columns="never")
    agree(model, small, maps(3), 1e-10)
    assert small.b.in_channels == 6 and (small.b.bias is None) == (norms == 2)


def test_a_constant_in_one_call_alone_leaves_the_bias() -> None:
    """A filter that reads one channel, a constant in one call only."""
    layers = {"a": nn.Linear(16, 8), "b": nn.Linear(16, 8), "twice": nn.Linear(8, 8), "last": nn.Linear(8, 4)}
    model = filled(Custom(lambda m, x: m.last(m.twice(torch.sigmoid(m.a(x))) * m.twice(m.b(x))), **layers))
    with torch.no_grad():
        model.a.weight[2] = 0
        keep = model.twice.weight[1, 2].clone()
        model.twice.weight[1] = model.twice.weight[:, 2] = 0
        model.twice.weight[1, 2] = keep
    small = sa.compact(model, tokens(2), columns="never")
    agree(model, small, tokens(3), 1e-10)
    assert small.twice.weight.shape == (8, 8)


def test_a_bias_and_a_mean_that_other_weights_add_to_take_no_constant() -> None:
    def both(m: Any, x: Tensor) -> Tensor:
        y = torch.sigmoid(m.first(x))
        return m.last(m.norm(m.a(y)) * m.norm(m.b(y))).mean((2, 3))

    def make(biased: bool) -> Any:
        convs = {"a": nn.Conv2d(8, 8, 1, bias=biased), "b": nn.Conv2d(8, 8, 1, bias=biased), "last": nn.Conv2d(8, 4, 1)}
        norm = nn.Identity() if biased else nn.BatchNorm2d(8)
        model: Any = filled(Custom(both, first=nn.Conv2d(3, 8, 3), norm=norm, **convs))
        if biased:
            model.b.bias = model.a.bias
        with torch.no_grad():
            model.first.weight[2] = 0
        return model

    model = make(True)
    small = sa.compact(model, maps(2), columns="never")
    agree(model, small, maps(3), 1e-10)
    assert small.first.out_channels == 8 and small.a.bias is small.b.bias
    model = make(False)
    small = sa.compact(model, maps(2), columns="never")
    agree(model, small, maps(3), 1e-10)
    assert small.first.out_channels == 7 and None not in (small.a.bias, small.b.bias)


@pytest.mark.parametrize("order", [1, -1])
def test_what_one_call_needs_the_others_keep(order: int) -> None:
    """One of two branches of the same layers reads fewer of their channels."""

    def branches(m: Any, x: Tensor) -> Tensor:
        every, some = (m.norm(m.twice(F.relu(m.first(t)))) for t in (x, x.flip(3))[::order])
        if order < 0:
            every, some = some, every
        return (m.last(every) * m.less(some)).mean((2, 3))

    convs = {"twice": nn.Conv2d(8, 8, 1), "last": nn.Conv2d(8, 4, 1), "less": nn.Conv2d(8, 4, 1)}
    model = filled(Custom(branches, first=nn.Conv2d(3, 8, 3), norm=nn.BatchNorm2d(8), **convs))
    with torch.no_grad():
        model.less.weight[:, [1, 4, 6]] = 0
    for small in (sa.compact(model, maps(2), columns="never"), sa.remove_unused_paths(model, maps(2))):
        agree(model, small, maps(3), 1e-10)
    with torch.no_grad():
        model.last.weight[:, [4, 5]] = 0
    small = sa.compact(model, maps(2), columns="never")
    agree(model, small, maps(3), 1e-10)
    assert small.twice.weight.shape == (7, 8, 1, 1) and small.norm.num_features == 7


def test_an_addition_becomes_the_bias_of_one_call_only() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.off, self.last = nn.Linear(16, 8), nn.Linear(16, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(F.relu(self.a(x) + self.off(x)) * self.a(2 * x))

    model = filled(Net())
    with torch.no_grad():
        model.off.weight.zero_()
    small = sa.compact(model, tokens(2), columns="never")
    agree(model, small, tokens(3), 1e-10)
    assert not hasattr(small, "off") and any(isinstance(m, sa.nn.ChannelBias) for m in small.modules())


def test_an_embedding_keeps_its_rows_and_a_norm_its_channels() -> None:
    model = filled(Language(nn.LayerNorm(10)))
    empty(model, ("embed", "down"), torch.tensor([1, 4]))
    with torch.no_grad():
        model.embed.weight[7] = 0  # a word
        model.up.weight[:3] = 0
    small = sa.compact(model, words(2))
    agree(model, small, words(3), 1e-10)
    assert small.head.weight is small.embed.weight and small.embed.weight.shape == (23, 10)
    assert small.up.out_features == 9
    assert any("norm normalises over all channels" in why for why in small.report.notes["down"])
    assert any("embed needs all entries" in why or "network output" in why for why in small.report.notes["head"])

    class Inner(Language):
        """The head's words are read by a layer that ignores some."""

        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(23, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(super().forward(x))

    model = filled(Inner())
    with torch.no_grad():
        model.last.weight[:, 5:9] = 0
    small = sa.compact(model, words(2))
    agree(model, small, words(3), 1e-10)
    assert small.head.weight.shape == (23, 10) and small.embed.weight is small.head.weight
    assert small.report.notes["head"] == {"embed needs all entries of the weights that it shares": 4}


# Kinds of layers


def thrice(m: Any, x: Tensor) -> Tensor:
    return m.last(F.relu(m.twice(F.relu(m.twice(F.relu(m.first(x))))))).mean((2, 3))


# Layers called twice, channels of theirs to take out, and the shape that is left of their weight.
LAYERS = {
    "depthwise": (lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8), (2, 5), (6, 1, 3, 3)),
    "grouped": (lambda: nn.Conv2d(8, 8, 3, padding=1, groups=2), (2, 5), (6, 3, 3, 3)),
    "transposed": (lambda: nn.ConvTranspose2d(8, 8, 2, 2), (2, 5), (6, 6, 2, 2)),
    "group norm": (lambda: nn.GroupNorm(4, 8), (2, 3), (6,)),
    "batch norm": (lambda: nn.BatchNorm2d(8), (2, 5), (6,)),
    "prelu": (lambda: nn.PReLU(8), (2, 5), (6,)),
    "one slope": (lambda: nn.PReLU(), (2, 5), (1,)),
    "layer norm": (lambda: nn.LayerNorm([6, 6]), (2, 5), (6, 6)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_kinds_of_layers_called_twice(name: str) -> None:
    make, gone, shape = LAYERS[name]
    model = filled(Custom(thrice, first=nn.Conv2d(3, 8, 3), twice=make(), last=nn.Conv2d(8, 4, 1)))
    rows = list(gone)
    with torch.no_grad():
        model.last.weight[:, rows] = 0
        if isinstance(model.twice, nn.ConvTranspose2d):
            model.twice.weight[rows] = 0
        elif isinstance(model.twice, nn.Conv2d) and model.twice.groups == 2:
            model.twice.weight[:, [c % 4 for c in rows]] = 0  # of either conv group
    small = sa.compact(model, maps(2), columns="never")
    agree(model, small, maps(3), 1e-10)
    assert small.twice.weight.shape == shape and small.first.out_channels == 6
    assert small.report.whole == {}
    assert parameters(sa.compact(small, maps(2), columns="never")) == parameters(small)


def test_embeddings_biases_and_operands_that_are_shared() -> None:
    model: Any = filled(
        Custom(
            lambda m, x: m.last(F.relu(m.embed(x) + m.fc(m.embed(x.flip(1))))),
            embed=nn.Embedding(23, 8),
            fc=nn.Linear(8, 8),
            last=nn.Linear(8, 3),
        )  # fmt: skip
    )
    with torch.no_grad():
        model.last.weight[:, [2, 6]] = model.fc.weight[:, [2, 5]] = 0
    small = sa.compact(model, words(2))
    agree(model, small, words(3), 1e-10)
    assert small.embed.weight.shape == (23, 7) and small.fc.weight.shape == (7, 7)

    model = filled(
        Custom(lambda m, x: m.b(F.relu(m.norm(m.a(x)))).mean((2, 3)), a=nn.Conv2d(3, 8, 3), norm=nn.BatchNorm2d(8),
               b=nn.Conv2d(8, 3, 1))
    )  # fmt: skip
    model.norm.bias = model.a.bias
    with torch.no_grad():
        model.b.weight[:, 2] = model.a.weight[5] = 0
    small = sa.compact(model, maps(2))
    agree(model, small, maps(3), 1e-10)
    assert small.a.bias is small.norm.bias and small.a.bias.shape == (6,)

    def scaled(m: Any, x: Tensor) -> Tensor:
        """By what is a slope elsewhere."""
        y = m.b(x) if m.followed else m.b(x).cumsum(-1)
        return m.more(m.a(x) * m.act.weight) + m.last(m.act(y.transpose(1, 2)).transpose(1, 2))

    for followed in (True, False):
        layers = {"a": nn.Linear(16, 8), "b": nn.Linear(16, 8), "act": nn.PReLU(8), "last": nn.Linear(8, 3)}
        model = filled(Custom(scaled, followed=followed, more=nn.Linear(8, 3), **layers))
        with torch.no_grad():
            model.more.weight[:, 2] = model.last.weight[:, 2] = 0
        small = sa.compact(model, tokens(2))
        agree(model, small, tokens(3), 1e-10)
        assert small.act.weight.shape == ((7,) if followed else (8,))
        assert small.report.whole.get("act") == (None if followed else "cumsum is not tracked")


# What is pruned together, purified, left whole


def test_calls_are_coupled_and_pruned_as_one() -> None:
    model = filled(Sequence(0)).float()
    assert sa.coupled_layers(model, maps(2).float()) == [("first", "twice")]
    rules = [{"match": name, "structure": "filter", "rate": 0.5} for name in ("first", "twice")]
    plan = sa.Plan.from_dict({"rule": rules})
    admm = sa.ADMM(model, plan, rho=0.1, coupled=sa.coupled_layers(model, maps(2).float()))
    masks = admm.harden_()
    assert torch.equal(*(masks[name].flatten(1).any(1) for name in ("first", "twice")))
    with torch.no_grad():
        for m in (model.first, model.twice):
            m.bias[m.weight.flatten(1).abs().sum(1) == 0] = 0
    small = sa.compact(model, maps(2).float(), columns="never")
    assert small.first.out_channels == small.twice.out_channels == small.twice.in_channels == 5

    model = filled(Weights()).float()
    assert sa.coupled_layers(model, tokens(2).float()) == [("first", "a")], "a weight counts once"
    model = filled(Language()).float()
    assert sa.coupled_layers(model, words(2)) == [], "the words and the embedding are no filters of a layer"
    plan = sa.plan_for(Siamese(), maps(2).float(), "filter", weights=0.6, round_to=2)
    assert [rule.match for rule in plan.rules] == ["b"], "but for the first convolution"


@pytest.mark.parametrize("name", NETWORKS)
def test_purify_and_unused_paths(name: str) -> None:
    make, inputs, channels = NETWORKS[name]
    model = filled(make())
    n, fill, read = channels[0]
    empty(model, fill, torch.tensor([1, 4]))
    clean = sa.remove_unused_paths(model, inputs(2))
    agree(model, clean, inputs(3), 1e-10)
    assert ties(clean) == ties(model)
    for reader in read:  # nothing is read from what is 0
        weight = clean.get_submodule(reader).weight
        assert not weight[:, [1, 4]].any(), reader
    small = sa.compact(clean, inputs(2), columns="never")
    assert parameters(small) == parameters(sa.compact(model, inputs(2), columns="never"))
    with torch.no_grad():  # next to nothing, in all layers that fill it
        for filler in fill:
            m: Any = model.get_submodule(filler)
            if not isinstance(m, (nn.Embedding, nn.BatchNorm2d)):
                m.weight[2] *= 1e-6
    pure = sa.purify(model, inputs(2), structures=("filter",))
    report = report_of(pure)
    assert ties(pure) == ties(model) and set(report.dropped) <= {n for n, _ in model.named_modules()}
    for filler in fill:
        m = pure.get_submodule(filler)
        if not isinstance(m, (nn.Embedding, nn.BatchNorm2d)):
            assert not m.weight[2].any(), filler
    if name == "normed":
        assert report.dropped == {"a": {"filter": 1}, "b": {"filter": 1}}
        assert torch.equal(pure.norm.running_mean[[2]], model.norm.running_mean[[2]]), "of other filters too"


def test_what_stays_whole_says_why() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.last = nn.Linear(16, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)
            self.conv, self.other = nn.Conv1d(8, 8, 1, groups=2), nn.ConvTranspose1d(8, 4, 1, groups=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.middle(F.relu(self.a(x))))

        def middle(self, x: Tensor) -> Tensor:
            raise NotImplementedError

    class Transposed(Net):
        def middle(self, x: Tensor) -> Tensor:
            return F.linear(F.relu(self.b(x)), self.b.weight.t())

    class Sorted(Net):
        def middle(self, x: Tensor) -> Tensor:
            return self.b(self.b(x).sort(-1).values.cumsum(-1))

    class Unbatched(Net):
        def middle(self, x: Tensor) -> Tensor:
            y = self.conv(x.transpose(1, 2)).transpose(1, 2)
            return y + self.conv(x[0].transpose(0, 1)).transpose(0, 1)

    class Formed(Net):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Conv1d(4, 8, 1)
            self.other.weight = self.conv.weight

        def middle(self, x: Tensor) -> Tensor:
            y = self.conv(x.transpose(1, 2))
            return (y + self.other(x[:, :, :4].transpose(1, 2))).transpose(1, 2)

    def whole(model: nn.Module) -> dict[str, str]:
        filled(model)
        with torch.no_grad():
            model.a.weight[3] = model.b.weight[3] = model.conv.weight[3] = 0
            model.a.bias[3] = model.b.bias[3] = model.conv.bias[3] = 0
        small = sa.compact(model, tokens(2), columns="never")
        agree(model, small, tokens(2), 1e-10)
        for name in ("b", "conv"):
            if hasattr(small, name):
                assert small.get_submodule(name).weight.shape == model.get_submodule(name).weight.shape
        return dict(small.report.whole)

    assert whole(Transposed())["b"] == (
        "its weight is tied to b.weight, which is left whole: b.weight is used directly"
    )
    assert "b" not in whole(Sorted()), "both calls are tracked; what lies between keeps their channels"
    assert whole(Unbatched())["conv"] == "unbatched input"
    found = whole(Formed())
    assert found["conv"] == "its weight is tied to other, which takes it for weights of another form"
    assert found["other"] == "its weight is tied to conv, which takes it for weights of another form"


class Foreign(nn.Module):
    """A layer by a class of its own."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(shape)), nn.Parameter(torch.empty(shape[0]))

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.dim() == 4:
            return F.conv2d(x, self.weight, self.bias, padding=1)
        return F.linear(x, self.weight, self.bias)


# Ways to say the product with an embedding's weight.
HEADS = {
    "linear": lambda h, w, b: F.linear(h, w),
    "linear with a bias": lambda h, w, b: F.linear(h, w, b),
    "t": lambda h, w, b: h @ w.t(),
    "T": lambda h, w, b: torch.matmul(h, w.T) + b,
    "mT": lambda h, w, b: h @ w.mT,
    "transpose": lambda h, w, b: h.matmul(w.transpose(0, -1)),
    "permute": lambda h, w, b: h @ w.permute(1, 0),
}


@pytest.mark.parametrize("via", [None, "export"])
@pytest.mark.parametrize("how", HEADS)
def test_heads_that_are_the_embedding(how: str, via: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        h = m.embed(x)
        return HEADS[how](h + m.back(F.relu(m.hidden(h))), m.embed.weight, m.shift)

    shift = nn.Parameter(torch.ones(23))
    parts = {"embed": nn.Embedding(23, 12), "hidden": nn.Linear(12, 9), "back": Foreign(12, 9), "shift": shift}
    model: Any = filled(Custom(function, **parts))
    with torch.no_grad():
        model.embed.weight[:, :4] = 0
        model.back.weight[:4], model.back.bias[:4] = 0, 0
        model.hidden.weight[7:], model.hidden.bias[7:] = 0, 0
    module: Any = importlib.import_module("structadmm.compact")
    monkeypatch.setattr(module, "trace", partial(module.trace, via=via))
    small = sa.compact(model, words(2))
    agree(model, small, words(3), 1e-10)
    assert small.embed.weight.shape == (23, 8) and small.embed_linear.weight is small.embed.weight
    assert type(small.back) is nn.Linear and small.back.weight.shape == (8, 7) and small.hidden.weight.shape == (7, 8)
    assert small.report.whole == {}
    optimizer = sa.carry_state(torch.optim.Adam(model.parameters()), model, small)
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in small.parameters()}


def test_a_convolution_by_another_class() -> None:
    model: Any = filled(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), Foreign(6, 8, 3, 3), nn.ReLU(), nn.Conv2d(6, 2, 1))
    )
    with torch.no_grad():
        model[0].weight[:3], model[0].bias[:3] = 0, 0
        model[2].weight[:, 5:] = 0
    small = sa.compact(model, maps(2), columns="never")
    agree(model, small, maps(3), 1e-10)
    assert small.get_submodule("2").weight.shape == (6, 2, 3, 3) and small.report.whole == {}


def dilated(m: Any, x: Tensor) -> Tensor:
    y = F.relu(m.a(x))
    z = F.relu(m.c(y)) + F.relu(F.conv2d(y, m.c.weight, m.c.bias, padding=2, dilation=2))
    return m.last(z + F.conv2d(y, m.c.weight, padding=2, dilation=2)).mean((2, 3))


class Unbiased(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight, None, self.eps)


class Adapted(nn.Linear):
    """With a small term beside it, of parameters of its own."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.down, self.up = nn.Parameter(torch.empty(2, 8)), nn.Parameter(torch.empty(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + x @ self.down.t() @ self.up.t()


# Functions that take a module's parameters otherwise than the module, or another function, does; its parts, the inputs,
# and the layer and its shape that is left.
OTHERWISE: dict[str, tuple[Any, dict[str, Any], Any, tuple[int, ...]]] = {
    "dilations": (dilated, {"a": nn.Conv2d(3, 8, 3), "c": nn.Conv2d(8, 8, 3, padding=1), "last": nn.Conv2d(8, 3, 1)},
                  maps, (7, 7, 3, 3)),
    "no bias": (lambda m, x: m.last(F.relu(F.linear(F.relu(m.a(x)), m.c.weight))),
                {"a": nn.Linear(16, 8), "c": nn.Linear(8, 8), "last": nn.Linear(8, 3)}, tokens, (7, 7)),
    "a bias once": (lambda m, x: m.last(F.relu(F.linear(m.a(x), m.c.weight)) * F.linear(m.a(x), m.c.weight, m.c.bias)),
                    {"a": nn.Linear(16, 8), "c": nn.Linear(8, 8), "last": nn.Linear(8, 3)}, tokens, (7, 7)),
    "called too": (lambda m, x: m.last(F.relu(F.linear(m.a(x), m.c.weight)) * m.c(m.a(x))),
                   {"a": nn.Linear(16, 8), "c": nn.Linear(8, 8), "last": nn.Linear(8, 3)}, tokens, (7, 7)),
    "a computed bias": (lambda m, x: m.last(F.relu(F.linear(m.a(x), m.c.weight, m.c.bias * 2)) * m.c(m.a(x))),
                        {"a": nn.Linear(16, 8), "c": nn.Linear(8, 8), "last": nn.Linear(8, 3)}, tokens, ()),
    "norm without its bias": (lambda m, x: m.last(m.norm(m.a(x))),
                              {"a": nn.Linear(16, 8), "norm": Unbiased(8), "last": nn.Linear(8, 3)}, tokens, ()),
    "adapted": (lambda m, x: m.last(F.relu(m.c(F.relu(m.a(x))))),
                {"a": nn.Linear(16, 8), "c": Adapted(), "last": nn.Linear(8, 3)}, tokens, ()),
}  # fmt: skip


@pytest.mark.parametrize("via", [None, "export"])
@pytest.mark.parametrize("name", OTHERWISE)
def test_functions_that_take_parameters_otherwise(name: str, via: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    function, parts, inputs, shape = OTHERWISE[name]
    model: Any = filled(Custom(function, **copy.deepcopy(parts)))
    with torch.no_grad():
        model.a.weight[3], model.a.bias[3], model.last.weight[:, 5] = 0, 0, 0
    module: Any = importlib.import_module("structadmm.compact")
    monkeypatch.setattr(module, "trace", partial(module.trace, via=via))
    small = sa.compact(model, inputs(2), columns="never", verify=False)
    agree(model, small, inputs(3), 1e-10)
    if shape:
        assert small.c.weight.shape == shape and small.report.whole == {}
    small.train()(inputs(3)).square().mean().backward()
    for clean in (sa.remove_unused_paths(model, inputs(2)), sa.purify(model, inputs(2), structures=("filter",))):
        agree(model, clean, inputs(3), 1e-10)
        assert type(clean) is type(model) and (not shape or not clean.c.weight[:, 3].any())
    names = {n for n, _ in model.named_modules()}
    assert all(set(c) <= names for c in sa.coupled_layers(model, inputs(2)))
    optimizer = torch.optim.Adam(model.parameters())
    model(inputs(3)).square().mean().backward()
    optimizer.step()
    small = sa.compact(model, inputs(2), columns="never")
    carried = sa.carry_state(optimizer, model, small)
    assert all(p in carried.state for n, p in small.named_parameters() if not n.endswith("c_other.bias"))


def test_paths_and_purify_see_heads_that_are_functions() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        h = m.embed(x)
        return F.linear(h + m.back(F.relu(m.hidden(h))), m.embed.weight)

    parts = {"embed": nn.Embedding(23, 12), "hidden": Foreign(9, 12), "back": nn.Linear(9, 12)}
    model: Any = filled(Custom(function, **parts))
    with torch.no_grad():
        model.back.weight[:, 4] = 0
        model.hidden.weight[2] *= 1e-6
    clean, pure = sa.remove_unused_paths(model, words(2)), sa.purify(model, words(2), structures=("filter",))
    agree(model, clean, words(3), 1e-10)
    assert not clean.hidden.weight[4].any() and not pure.hidden.weight[2].any()
    assert model.hidden.weight[[2, 4]].all(), "the model is left as it is"


def test_filters_are_coupled_only_where_they_can_go() -> None:
    """Not with columns of an embedding, nor with layers that no plan prunes."""

    def function(m: Any, x: Tensor) -> Tensor:
        h = m.embed(x)
        h = h + m.back(F.relu(m.hidden(h)))
        return m.last(h + m.more(F.relu(m.plain(h)) * torch.sigmoid(m.gate(h))))

    layers = {"back": nn.Linear(9, 12), "plain": nn.Linear(12, 8), "gate": nn.Linear(12, 8), "more": nn.Linear(8, 12)}
    parts = {"embed": nn.Embedding(23, 12), "hidden": Foreign(9, 12), "last": nn.Linear(12, 3)}
    model = filled(Custom(function, **layers, **parts)).float()
    assert sa.coupled_layers(model, words(2)) == [("plain", "gate")]
    assert [list(s) for s in filter_sets(model, words(2))[0]] == [["plain", "gate"]]
