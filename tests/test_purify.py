"""purify and remove_unused_paths: the same class with more zeros, the same function where promised, criteria without
scale."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import structadmm as sa
from networks import VGG, ResNet, random_chain, randomise
from structadmm.errors import CompactError
from structadmm.paths import report_of


def images(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, 3, 12, 12, dtype=dtype, generator=torch.Generator().manual_seed(n))


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(model).eval()(x)


def nonzeros(model: nn.Module) -> int:
    return sum(int((m.weight != 0).sum()) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))


def masks(model: nn.Module) -> list[Tensor]:
    return [m.weight != 0 for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]


@pytest.mark.parametrize("rate", [0.3, 0.7])
@pytest.mark.parametrize("seed", range(10))
def test_unused_paths_of_random_chains(seed: int, rate: float) -> None:
    model = randomise(random_chain(seed).double(), rate, seed, leak=seed % 2 > 0)
    cleared = sa.remove_unused_paths(model, images(2))
    assert type(cleared) is type(model)
    x = images(3)
    a, b = outputs(model, x), outputs(cleared, x)
    # float64; some thousand roundings of 1e-16
    assert (a - b).abs().max() <= 1e-12 * max(1.0, a.abs().max().item())
    for before, after in zip(masks(model), masks(cleared), strict=True):
        assert before.shape == after.shape
    report = report_of(cleared)
    assert report.weights_after == nonzeros(cleared) <= nonzeros(model) == report.weights_before


@pytest.mark.parametrize("kind", ("A", "B", "bottleneck", "grouped", "mobile", "se"))
def test_unused_paths_of_residual_nets(kind: str) -> None:
    model = randomise(ResNet(kind).double(), 0.5, 3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    cleared = sa.remove_unused_paths(model, images(2))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), "the input is left as it is"
    assert type(cleared) is ResNet and set(cleared.state_dict()) == set(before), "no bias is created"
    assert (outputs(model, images(3)) - outputs(cleared, images(3))).abs().max() <= 1e-12
    assert nonzeros(cleared) < nonzeros(model)
    # To a fixed point: a second pass finds nothing.
    assert nonzeros(sa.remove_unused_paths(cleared, images(2))) == nonzeros(cleared)
    small, smaller = (sa.compact(m, images(2), "never").report.weights_after for m in (model, cleared))
    assert smaller <= small


def test_unused_paths_report_names_what_went() -> None:
    model = randomise(ResNet("B").double(), 0.0, 0)
    with torch.no_grad():
        model.layer1[2].conv2.weight[:, 3] = 0
    report = report_of(sa.remove_unused_paths(model, images(1)))
    row = next(r for r in report.layers if r.name == "layer1.2.conv1")
    assert (row.filters, row.filters_before, row.filters_after) == (16, 16, 15)
    assert "16 -> 15 / 16" in str(report)
    assert report.max_abs_diff <= 1e-12


# purify


def test_thresholds_do_not_feel_a_rescaling_behind_batchnorm() -> None:
    model = randomise(ResNet("B").double(), 0.0, 1)
    scaled = copy.deepcopy(model)
    g = torch.Generator().manual_seed(0)
    for m in (model, scaled):
        for bn in m.modules():
            if isinstance(bn, nn.BatchNorm2d):
                bn.eps = 1e-30  # eps is what breaks the invariance of BatchNorm itself
    with torch.no_grad():
        for conv, bn in (
            (scaled.layer1[0].conv1, scaled.layer1[0].bn1),
            (scaled.layer1[1].conv2, scaled.layer1[1].bn2),
            (scaled.conv1, scaled.bn1),
        ):
            factor = 10 ** (4 * torch.rand(conv.out_channels, generator=g, dtype=torch.float64) - 2)
            conv.weight.mul_(factor[:, None, None, None])
            bn.running_mean.mul_(factor)
            bn.running_var.mul_(factor**2)
    assert (outputs(model, images(2)) - outputs(scaled, images(2))).abs().max() < 1e-10
    a = sa.purify(model, images(2), sigma=0.8, eta=0.3)
    b = sa.purify(scaled, images(2), sigma=0.8, eta=0.3)
    assert nonzeros(a) < nonzeros(model)
    assert all(torch.equal(x, y) for x, y in zip(masks(a), masks(b), strict=True))


def test_what_a_channel_reads_counts() -> None:
    """A channel scaled down by the BatchNorm before it and up by the weights behind it is as important as before."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 4, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    randomise(model.double(), 0.0, 0)
    moved = copy.deepcopy(model)
    with torch.no_grad():
        factor = torch.logspace(-2, 2, 8, dtype=torch.float64)
        moved[1].weight.mul_(factor)
        moved[1].bias.mul_(factor)
        moved[3].weight.div_(factor[:, None, None])
    a, b = (sa.purify(m, images(2), sigma=0.9, structures=("channel", "column")) for m in (model, moved))
    assert nonzeros(a) < nonzeros(model)
    assert torch.equal(a[3].weight != 0, b[3].weight != 0)


def test_small_groups_go_and_large_ones_stay() -> None:
    model = randomise(VGG().double(), 0.0, 2)
    with torch.no_grad():
        model.features[2].weight[3] *= 1e-3  # a filter; BatchNorm behind it
        model.features[2].weight[:, 5] *= 1e-3  # a channel
        model.features[6].weight[:, 2, 1, 1] *= 1e-3  # a column
        model.features[6].weight[:, 4] = 0
        model.features[6].weight[0, 4, 0, 0] = 1.0  # a nearly empty channel
    out = sa.purify(model, images(2), sigma=0.05, eta=0.05)
    assert not out.features[2].weight[3].any()
    assert not out.features[2].weight[:, 5].any() and not out.features[0].weight[5].any()
    assert not out.features[6].weight[:, 2, 1, 1].any()
    assert not out.features[6].weight[:, 4].any() and not out.features[2].weight[4].any()
    report = report_of(out)
    assert report.dropped["features.2"] == {"filter": 1, "channel": 1}
    assert report.dropped["features.6"] == {"channel": 1, "column": 1}
    assert "features.6: dropped 1 channel, 1 column" in str(report)
    kept = [i for i in range(12) if i not in (3, 4)]
    assert all(out.features[2].weight[i].any() for i in kept)
    only = sa.purify(model, images(2), sigma=0.05, eta=0.0, structures=("filter",), skip=("fc*",))
    assert set(report_of(only).dropped) == {"features.2"}


def test_block_columns_go_one_by_one() -> None:
    model = randomise(VGG().double(), 0.0, 2)
    with torch.no_grad():
        model.features[6].weight[4:8, 3, 0, 2] *= 1e-3
    out = sa.purify(model, images(2), sigma=0.02, structures=("block_column",), block=4)
    changed = (out.features[6].weight != 0) ^ (model.features[6].weight != 0)
    assert changed[4:8, 3, 0, 2].all() and changed.sum() == 4
    assert report_of(out).dropped["features.6"] == {"block_column": 1}


def closeness(model: nn.Module, x: Tensor) -> Callable[[nn.Module], float]:
    """1 for the outputs of `model`, 0 for outputs as far off as zero."""
    wanted = outputs(model, x)

    def evaluate(other: nn.Module) -> float:
        assert not other.training
        with torch.no_grad():
            return 1 - ((other(x) - wanted).norm() / wanted.norm()).item()

    return evaluate


@pytest.mark.parametrize("max_drop", [0.01, 0.2])
def test_bisection_finds_the_largest_cut_within_the_budget(max_drop: float) -> None:
    model = randomise(ResNet("B"), 0.0, 7)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for m in model.modules():  # norms of all sizes, so that something can go
            if isinstance(m, nn.Conv2d):
                m.weight.mul_(torch.rand(m.weight.shape[1:], generator=g) ** 4 * 3)
    x = images(64, torch.float32)
    evaluate = closeness(model, x)
    out = sa.purify(model, x[:2], evaluate, max_drop=max_drop)
    report = report_of(out)
    assert evaluate(out.eval()) >= 1 - max_drop - 1e-5  # the paths removed after the search cost a rounding
    assert report.score == pytest.approx(evaluate(out))
    assert report.baseline == 1.0
    assert nonzeros(out) < nonzeros(model)
    assert len(report.trials) <= 12
    failed = [t.scale for t in report.trials if not t.kept]
    assert all(t.score >= 1 - max_drop for t in report.trials if t.kept)
    assert failed and min(failed) > report.scale, "the next larger cut that was tried broke the budget"
    small = sa.compact(out, x[:2], "never")
    assert (outputs(small, x) - outputs(out, x)).abs().max() < 1e-4


def test_a_larger_budget_never_keeps_more() -> None:
    model = randomise(ResNet("B"), 0.0, 8)
    x = images(64, torch.float32)
    left = [nonzeros(sa.purify(model, x[:2], closeness(model, x), max_drop=d)) for d in (0.01, 0.2, 0.6)]
    assert left[0] >= left[1] >= left[2] and left[0] > left[2]


def test_nothing_goes_when_nothing_may() -> None:
    model = randomise(ResNet("B"), 0.0, 9)
    calls = []

    def evaluate(other: nn.Module) -> float:
        calls.append(nonzeros(other))
        return 1.0 if nonzeros(other) == nonzeros(model) else 0.0

    out = sa.purify(model, images(2, torch.float32), evaluate, trials=6)
    assert nonzeros(out) == nonzeros(model) and report_of(out).dropped == {}
    assert 1 < len(calls) <= 7


def test_purify_leaves_its_input_and_flags() -> None:
    model = randomise(ResNet("B"), 0.3, 0).train()
    before = {k: v.numpy().tobytes() for k, v in model.state_dict().items()}
    out = sa.purify(model, images(2, torch.float32), sigma=0.5)
    assert {k: v.numpy().tobytes() for k, v in model.state_dict().items()} == before
    assert type(out) is ResNet and all(m.training for m in out.modules())
    assert report_of(model) is None


def test_errors() -> None:
    model, x = ResNet("B"), images(2, torch.float32)
    with pytest.raises(CompactError, match="purify: sigma got -1"):
        sa.purify(model, x, sigma=-1)
    with pytest.raises(
        CompactError, match="structures got 'row', wanted some of filter, channel, column, block_column"
    ):
        sa.purify(model, x, structures=("row",))
    with pytest.raises(CompactError, match=r"skip got 'layer9\.\*', which matches no layer"):
        sa.purify(model, x, skip=("layer9.*",))
    with pytest.raises(CompactError, match="evaluate got nan"):
        sa.purify(model, x, lambda m: float("nan"))
    with pytest.raises(CompactError, match="max_drop got -0.1"):
        sa.purify(model, x, lambda m: 1.0, max_drop=-0.1)


class Reader(nn.Module):
    """The last output of a recurrent layer, classified."""

    def __init__(self, kind: type[nn.RNNBase], **options: bool | int) -> None:
        super().__init__()
        self.rnn = kind(6, 8, batch_first=True, **options)
        self.head = nn.Linear(8 * (1 + self.rnn.bidirectional), 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"num_layers": 2}])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_hidden_units_go(kind: type[nn.RNNBase], options: dict[str, bool | int]) -> None:
    torch.manual_seed(0)
    model = Reader(kind, **options).double()
    small = [1, 4, 5]  # what writes into these is a thousandth of the others'
    with torch.no_grad():
        for p in model.rnn.parameters():
            p.unflatten(0, (-1, 8))[:, small] *= 1e-3
    before = {n: p.clone() for n, p in model.named_parameters()}
    x = torch.randn(4, 5, 6, dtype=torch.float64)
    purified = sa.purify(model, x)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    report = report_of(purified)
    cells = model.rnn.num_layers * (1 + model.rnn.bidirectional)
    assert report.dropped["rnn"] == {"unit": 3 * cells}
    row = next(r for r in report.layers if r.name == "rnn")
    assert (row.filters, row.filters_before, row.filters_after) == (8 * cells, 8 * cells, 5 * cells)
    for name, p in purified.rnn.named_parameters():
        rows = p.unflatten(0, (-1, 8))
        assert not rows[:, small].any()
        # Others are as they were, but for what they read of the units that are gone.
        kept = [i for i in range(8) if i not in small]
        columns = kept if name.startswith("weight_hh") else range(p.shape[-1]) if name.endswith("l0") else None
        if p.dim() > 1 and columns is not None:
            assert torch.equal(
                rows[:, kept][..., columns], before[f"rnn.{name}"].unflatten(0, (-1, 8))[:, kept][..., columns]
            )
    compacted = sa.compact(purified, x)
    assert compacted.rnn.hidden_size == 5
    assert (outputs(purified, x) - outputs(compacted, x)).abs().max() <= 1e-12
    # The units held at most a thousandth of what the others hold; a wrong one would show in the first digit.
    assert (outputs(model, x) - outputs(purified, x)).abs().max() <= 1e-2 * outputs(model, x).abs().max()


def test_hidden_units_with_given_states_stay() -> None:
    class Given(Reader):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x, x.new_ones(1, x.shape[0], 8))[0][:, -1])

    model = Given(nn.GRU).double()
    with torch.no_grad():
        for p in model.rnn.parameters():
            p.unflatten(0, (-1, 8))[:, 2] *= 1e-3
    report = report_of(sa.purify(model, torch.randn(4, 5, 6, dtype=torch.float64), structures=("filter",)))
    assert not report.dropped


def test_arguments_that_are_refused() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2)), torch.randn(1, 3, 4, 4)
    for arguments, message in (
        ({"trials": 0}, "trials got 0, wanted an integer of at least 1"),
        ({"block": 0}, "block got 0, wanted"),
        ({"evaluate": 3}, "evaluate got int, wanted a function"),
        ({"evaluate": lambda m: None}, "evaluate got NoneType, wanted a function that returns a number"),
    ):
        with pytest.raises(CompactError, match=message):
            sa.purify(model, x, **{"evaluate": lambda m: 1.0, **arguments})
    with pytest.raises(CompactError, match="weight got device meta, wanted values"):
        sa.purify(model.to("meta"), x.to("meta"))
