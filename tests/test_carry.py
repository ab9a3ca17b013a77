"""State carried over a compaction: training goes on as the masked network's would."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import structadmm as sa
from networks import ResNet, randomise
from structadmm.errors import CompactError
from test_operators import Cosine, filled, tokens

torch.set_num_threads(1)  # tiny networks

OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, 0.01),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5),
}


def net() -> nn.Sequential:
    """Filters 1 and 4 are zero and stay so: bias and all."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 4))
    filled(model)
    with torch.no_grad():
        model[0].weight[[1, 4]] = 0
        model[0].bias[[1, 4]] = 0
        model[2].weight[:, [1, 4]] = 0
    return model


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, masks: dict[str, Tensor] | None = None) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(8, 3, 8, 8, generator=g, dtype=torch.float64)
    optimizer.zero_grad()
    F.cross_entropy(model(x), torch.arange(8) % 4).backward()
    optimizer.step()
    with torch.no_grad():
        for name, mask in (masks or {}).items():
            model.get_parameter(name).mul_(mask)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_training_goes_on_as_it_would_have(kind: str) -> None:
    model = net()
    masks = {n: (p != 0).double() for n, p in model.named_parameters()}
    optimizer = OPTIMIZERS[kind](model.parameters())
    for i in range(3):
        step(model, optimizer, i, masks)
    small = sa.compact(model, torch.randn(2, 3, 8, 8, dtype=torch.float64), columns="never")
    assert small.get_submodule("0").out_channels == 6
    carried = sa.carry_state(optimizer, model, small)
    assert type(carried) is type(optimizer) and carried.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    assert all(p.grad is not None for p in small.parameters()), "gradients too"
    for i in range(3, 6):
        step(model, optimizer, i, masks)
        step(small, carried, i)
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    assert (model(x) - small(x)).abs().max() < 1e-9


def test_compacted_columns_and_groups_keep_their_entries() -> None:
    model = randomise(ResNet("grouped"), 0.5, 3)
    for p in model.parameters():
        p.grad = p.detach() * 3
    small = sa.compact(model, torch.randn(2, 3, 12, 12), columns="always")
    assert any(isinstance(m, sa.CompactConv2d) for m in small.modules())
    # Weights that compact neither zeroed nor made: their gradient is three times the weight still.
    carried = sa.carry_tensors({n: p.grad for n, p in model.named_parameters()}, small)
    seen = 0
    for name, m in small.named_modules():
        if isinstance(m, (sa.CompactConv2d, nn.Conv2d, sa.CompactLinear)):
            w = m.weight.detach()
            assert torch.equal(carried[f"{name}.weight"][w != 0], w[w != 0] * 3), name
            seen += isinstance(m, sa.CompactConv2d)
    assert seen > 2


def test_biases_that_are_computed_with_are_carried() -> None:
    model = filled(nn.Sequential(nn.Linear(16, 16), Cosine(16, 4, False), nn.Linear(16, 2)))
    qkv = model[1].qkv

    @torch.no_grad()
    def hold() -> None:
        """One channel of each head is zero in queries, keys and values."""
        qkv.weight[::4] = 0
        qkv.bias[::4] = 0

    hold()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    model(tokens(4)).square().sum().backward()
    optimizer.step()
    hold()
    small = sa.compact(model, tokens(2), columns="never")
    assert {n for n, _ in small.named_parameters()} == {n for n, _ in model.named_parameters()}
    carried = sa.carry_state(optimizer, model, small)
    assert all(p in carried.state for p in small.parameters())
    before = optimizer.state[qkv.bias]["exp_avg"]
    after = carried.state[small.get_parameter("1.qkv.bias")]["exp_avg"]
    stays = [i for i in range(48) if i % 4]
    assert torch.equal(after, before[stays]) and after.any()
    assert torch.equal(small.get_parameter("1.qkv.bias").grad, qkv.bias.grad[stays])


def test_parameter_groups_and_averages() -> None:
    model = net()
    optimizer = torch.optim.SGD(
        [{"params": model[0].parameters(), "lr": 0.5}, {"params": model[2:].parameters(), "weight_decay": 0.1}], lr=0.1
    )
    average = copy.deepcopy(model).state_dict()
    small = sa.compact(model, torch.randn(2, 3, 8, 8, dtype=torch.float64), columns="never")
    carried = sa.carry_state(optimizer, model, small)
    assert [g["lr"] for g in carried.param_groups] == [0.5, 0.1]
    assert [len(g["params"]) for g in carried.param_groups] == [2, 4]
    ema = sa.carry_tensors(average, small)
    assert {n: t.shape for n, t in ema.items()} == {n: t.shape for n, t in small.state_dict().items()}


class TiedHead(nn.Module):
    """An embedding whose table is the output layer's weight, around a layer that can lose features."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner, self.outer = nn.Embedding(30, 8), nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 30, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.outer(F.relu(self.inner(self.table(x)))))


def test_tied_parameters_go_on_training() -> None:
    torch.manual_seed(0)
    model, x = TiedHead(), torch.randint(0, 30, (2, 7))
    with torch.no_grad():
        model.inner.weight[:4] = 0
        model.inner.bias[:4] = 0
    optimizer = torch.optim.Adam(model.parameters())
    model(x).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        model.outer.weight[:, :4] = 0
    small = sa.compact(model, x)
    assert small.get_submodule("inner").out_features == 8
    assert small.get_parameter("table.weight") is small.get_parameter("head.weight")
    carried = sa.carry_state(optimizer, model, small)
    trained = [p for g in carried.param_groups for p in g["params"]]
    assert {id(p) for p in trained} == {id(p) for p in small.parameters()} and len(trained) == 5
    table = small.get_parameter("table.weight")
    assert torch.equal(carried.state[table]["exp_avg"], optimizer.state[model.table.weight]["exp_avg"])


def test_what_is_not_compacted_is_refused() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(CompactError, match="small got Sequential, wanted what compact returned"):
        sa.carry_state(optimizer, model, copy.deepcopy(model))
    small = sa.compact(model, torch.randn(2, 3, 8, 8, dtype=torch.float64))
    with pytest.raises(CompactError, match="none of the parameters of model"):
        sa.carry_state(torch.optim.SGD(net().parameters(), 0.1), model, small)


@pytest.mark.parametrize("kind", ["plain", "averaged"])
def test_averages_compute_what_they_did(kind: str) -> None:
    """Constants that compact moved into biases and means are moved in copies of the values too."""
    conv = [nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Sigmoid(), nn.Conv2d(8, 6, 3, bias=False)]
    model = nn.Sequential(*conv, nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 4))
    randomise(model.double(), 0.0, 0).eval()
    with torch.no_grad():
        model[0].weight[:3] = 0
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    small = sa.compact(model, x, columns="never")
    source = model.state_dict()
    if kind == "averaged":
        source = torch.optim.swa_utils.AveragedModel(model).state_dict()
    average = copy.deepcopy(small)
    average.load_state_dict(sa.carry_tensors(source, small, folded=True))
    assert (average(x) - model(x)).abs().max() < 1e-12
    means = [
        name for name, t in sa.carry_tensors(source, small).items() if not torch.equal(t, small.state_dict()[name])
    ]
    assert means == ["4.running_mean"]


def test_names_and_shapes_that_do_not_fit() -> None:
    small = sa.compact(net(), torch.randn(2, 3, 8, 8, dtype=torch.float64))
    with pytest.raises(CompactError, match="tensors got 'nothing', wanted names"):
        sa.carry_tensors({"nothing": torch.ones(2)}, small)
    with pytest.raises(CompactError, match=r"0\.weight got shape \(3,\), wanted that of the tensor before"):
        sa.carry_tensors({"0.weight": torch.ones(3)}, small)
    other = nn.Linear(2, 2)
    with pytest.raises(CompactError, match="model got none of the trained parameters of small"):
        sa.carry_state(torch.optim.SGD(other.parameters(), 0.1), other, small)
    other = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(CompactError, match=r"model: 0\.weight got shape \(2, 2\)"):
        sa.carry_state(torch.optim.SGD(other.parameters(), 0.1), other, small)


def test_places_of_columns_in_half_precision() -> None:
    model = randomise(ResNet("A"), 0.5, 3)
    small = sa.compact(model, torch.randn(2, 3, 12, 12), columns="always")
    tensors = {n: p.detach() for n, p in model.named_parameters()}
    before = sa.carry_tensors(tensors, small)
    after = sa.carry_tensors(tensors, small.bfloat16())
    assert any(isinstance(m, sa.CompactConv2d) and m.weight.numel() > 256 for m in small.modules())
    assert all(torch.equal(t, before[n]) for n, t in after.items())


def test_other_networks_under_the_optimizer_stay() -> None:
    model, other = net(), nn.Linear(4, 4).double()
    groups = [{"params": [*other.named_parameters()], "lr": 0.5}, {"params": [*model.named_parameters()]}]
    optimizer = torch.optim.Adam(groups, 0.1, amsgrad=True)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    other(model(x)).square().sum().backward()
    optimizer.step()
    small = sa.compact(net(), x, columns="never")
    carried = sa.carry_state(optimizer, model, small)
    assert [g["lr"] for g in carried.param_groups] == [0.5, 0.1]
    assert carried.param_groups[0]["params"] == [*other.parameters()]
    assert carried.param_groups[1]["param_names"] == [n for n, _ in small.named_parameters()]
    mine, theirs = carried.state[other.weight], optimizer.state[other.weight]
    assert torch.equal(mine["exp_avg"], theirs["exp_avg"]) and mine["exp_avg"] is not theirs["exp_avg"]
    assert "max_exp_avg_sq" in carried.state[small.get_parameter("0.weight")]


@pytest.mark.parametrize("kind", [torch.optim.Adafactor, torch.optim.LBFGS])
def test_state_of_other_shapes_is_refused(kind) -> None:
    model = net()
    optimizer = kind(model.parameters())
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        return loss

    small = sa.compact(model, x, columns="never")
    optimizer.step(closure)
    with pytest.raises(CompactError, match="this optimizer's state can't be carried over"):
        sa.carry_state(optimizer, model, small)
