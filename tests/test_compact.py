"""compact: the smaller network computes what the masked one computes, is as small as the zeros allow, and lives on."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import structadmm as sa
from networks import VGG, ResNet, random_chain, randomise
from structadmm.copies import clone
from structadmm.errors import CompactError, TraceError
from structadmm.groups import expand_keep, n_groups

KINDS = ("A", "B", "bottleneck", "grouped", "mobile", "se")


def same(model: nn.Module, small: nn.Module, x: Tensor, tolerance: float = 1e-10) -> None:
    """Equal outputs in eval mode, relative to the largest; 1e-10 is some thousand roundings in float64."""
    model, small = copy.deepcopy(model).eval(), copy.deepcopy(small).eval()
    with torch.no_grad():
        a, b = model(x), small(x)
    assert (a - b).abs().max() <= tolerance * max(1.0, a.abs().max().item())


def images(n: int, dtype: torch.dtype = torch.float64, size: int = 12) -> Tensor:
    return torch.randn(n, 3, size, size, dtype=dtype, generator=torch.Generator().manual_seed(n))


@pytest.mark.parametrize("rate", [0.3, 0.7])
@pytest.mark.parametrize("seed", range(30))
def test_random_chains(seed: int, rate: float) -> None:
    model = randomise(random_chain(seed).double(), rate, seed, leak=seed % 3 > 0)
    small = sa.compact(model, images(2), columns="never")
    same(model, small, images(3))
    report = small.report
    assert report.weights_after <= report.weights_before
    assert report.max_abs_diff is not None and report.max_abs_diff <= 1e-10


@pytest.mark.parametrize("rate", [0.3, 0.7])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_random_residual_nets(kind: str, seed: int, rate: float) -> None:
    act = (nn.ReLU, nn.SiLU, nn.Hardswish)[seed]
    model = randomise(ResNet(kind, act=act).double(), rate, seed, leak=seed > 0)
    small = sa.compact(model, images(2), columns="never")
    same(model, small, images(5))
    assert small.report.weights_after < small.report.weights_before


@pytest.mark.parametrize("seed", range(4))
def test_vgg_with_flatten_and_dropout(seed: int) -> None:
    model = randomise(VGG().double(), 0.5, seed)
    small = sa.compact(model, images(2), columns="never")
    same(model, small, images(4))
    small.train()
    a, b = small(images(8)), small(images(8))
    assert not torch.equal(a, b), "dropout must be active in training mode"
    small.eval()
    assert torch.equal(small(images(8)), small(images(8)))


# What the zeros allow, against a plain fixed point


def live_counts(weights: list[Tensor]) -> list[tuple[int, int]]:
    """Filters and channels that a bias-free ReLU chain needs: those on a path of nonzero weights from input to
    output."""
    connects = [w.flatten(2).abs().sum(2) != 0 for w in weights]
    forward = [torch.ones(connects[0].shape[1], dtype=torch.bool)]
    for c in connects:
        forward.append((c & forward[-1]).any(1))
    backward = [torch.ones(connects[-1].shape[0], dtype=torch.bool)]
    for c in reversed(connects):
        backward.insert(0, (c & backward[0][:, None]).any(0))
    live = [f & b for f, b in zip(forward, backward, strict=True)]
    live[0], live[-1] = torch.ones_like(live[0]), torch.ones_like(live[-1])
    return [(max(1, int(o.sum())), max(1, int(i.sum()))) for i, o in zip(live, live[1:], strict=False)]


@pytest.mark.parametrize("seed", range(8))
def test_a_chain_shrinks_to_its_live_paths(seed: int) -> None:
    convs = [nn.Conv2d(c, d, 3, padding=1, bias=False) for c, d in ((3, 8), (8, 10), (10, 6), (6, 4))]
    model = nn.Sequential(*[m for c in convs for m in (c, nn.ReLU())][:-1]).double()
    randomise(model, 0.5, seed)
    small = sa.compact(model, images(1), columns="never")
    expected = live_counts([c.weight.detach() for c in convs])
    got = [tuple(m.weight.shape[:2]) for m in small.modules() if isinstance(m, nn.Conv2d)]
    assert got == expected
    assert small.report.weights_after == sum(o * i * 9 for o, i in expected)


def test_filters_of_a_dead_stream_channel_go_and_others_stay() -> None:
    model = randomise(ResNet("B").double(), 0.0, 0)
    block = model.layer1[1]
    with torch.no_grad():
        for conv, bn in ((block.conv2, block.bn2), (block.downsample[0], block.downsample[1])):
            conv.weight[:6] = 0  # channels 0-5 of the second stage have no producer once the next block adds nothing
            bn.weight[:6] = bn.bias[:6] = 0
        last = model.layer1[2]
        last.conv2.weight[:4] = 0
        last.bn2.weight[:4] = last.bn2.bias[:4] = 0
    small = sa.compact(model, images(2), columns="never")
    same(model, small, images(3))
    # Channels 4 and 5 are still fed by the last block, so only 0-3 go, in every layer of the stream.
    assert small.layer1.get_submodule("1").conv2.weight.shape[0] == 12
    assert small.layer1.get_submodule("1").downsample.get_submodule("0").weight.shape[0] == 12
    assert small.layer1.get_submodule("2").conv1.weight.shape[1] == 12
    assert small.layer1.get_submodule("2").conv2.weight.shape[0] == 12
    assert small.fc.weight.shape[1] == 12
    idle = small.report.notes["layer1.1.conv2"]
    assert sum(idle.values()) == 2 and "residual stream" in next(iter(idle))


def test_a_channel_nobody_reads_takes_its_filters_along() -> None:
    model = randomise(ResNet("B").double(), 0.0, 1)
    with torch.no_grad():
        model.layer1[2].conv1.weight[:, :5] = 0
        model.fc.weight[:, :5] = 0
    small = sa.compact(model, images(2), columns="never")
    same(model, small, images(3))
    assert small.fc.in_features == 11
    assert small.layer1.get_submodule("1").conv2.out_channels == 11


@pytest.mark.parametrize("beta", [0.0, 0.7])
def test_a_dead_branch_vanishes(beta: float) -> None:
    model = randomise(ResNet("B").double(), 0.0, 2)
    block = model.layer1[2]
    with torch.no_grad():
        block.conv2.weight.zero_()
        block.bn2.running_mean.zero_()
        block.bn2.bias.fill_(beta)
    small = sa.compact(model, images(2), columns="never")
    same(model, small, images(3))
    names = [name for name, _ in small.named_modules()]
    assert "layer1.2.conv1" not in names and "layer1.2.conv2" not in names
    assert {r.name: r.shape_after for r in small.report.layers}["layer1.2.conv1"] is None
    assert any(type(m).__name__ == "ChannelBias" for m in small.modules()) == (beta != 0)


# Constants of zero filters


def leaky(padding: int, activation: nn.Module, bias: bool = True) -> nn.Sequential:
    """conv - BN - activation - conv - global mean; the first two filters of the first conv are zero, their BN betas are
    not."""
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), activation,
        nn.Conv2d(6, 4, 3, padding=padding, bias=bias), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2),
    )  # fmt: skip
    randomise(model.double(), 0.0, 3)
    with torch.no_grad():
        model[0].weight[:2] = 0
        model[1].running_mean[:2] = 0
        model[1].bias[:2] = torch.tensor([0.9, 0.4])
    return model


def test_batchnorm_beta_leak_at_the_border() -> None:
    """A zero filter emits relu(beta); behind zero padding that is no bias, so one filter stays to carry both
    constants."""
    model = leaky(1, nn.ReLU())
    small = sa.compact(model, images(1), columns="never")
    same(model, small, images(2))
    assert small.get_submodule("0").out_channels == 5
    assert "pads with zeros" in next(iter(small.report.notes["0"]))
    # The tempting shortcut, the constant in the bias, is far off at the border.
    shortcut = copy.deepcopy(model).eval()
    with torch.no_grad():
        x = images(2)
        constant = torch.tensor([0.9, 0.4], dtype=torch.float64)
        shortcut[3].bias += (shortcut[3].weight[:, :2].sum((2, 3)) * constant).sum(1)
        shortcut[3].weight[:, :2] = 0
        assert (shortcut(x) - copy.deepcopy(model).eval()(x)).abs().max() > 1e-3


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Sigmoid(), nn.SiLU(), nn.Hardswish(), nn.GELU()])
def test_constants_fold_where_there_is_no_padding(activation: nn.Module, bias: bool) -> None:
    model = leaky(0, activation, bias)
    small = sa.compact(model, images(1), columns="never")
    same(model, small, images(2))
    assert small.get_submodule("0").out_channels == 4
    assert small.get_submodule("3").bias is not None


def test_negative_beta_behind_relu_is_zero_and_goes_through_padding() -> None:
    model = leaky(1, nn.ReLU())
    with torch.no_grad():
        model[1].bias[:2] = -0.5
    small = sa.compact(model, images(1), columns="never")
    same(model, small, images(2))
    assert small.get_submodule("0").out_channels == 4


def test_taps_that_never_touch_padding_take_a_constant() -> None:
    model = leaky(1, nn.ReLU())
    with torch.no_grad():
        centre = torch.zeros(3, 3, dtype=torch.float64)
        centre[1, 1] = 1
        model[3].weight[:, :2] *= centre
    small = sa.compact(model, images(1), columns="never")
    same(model, small, images(2))
    assert small.get_submodule("0").out_channels == 4


def test_average_pooling_that_counts_padding_keeps_a_constant() -> None:
    for include in (True, False):
        model = leaky(0, nn.Sigmoid())
        model.insert(3, nn.AvgPool2d(3, 1, 1, count_include_pad=include))
        small = sa.compact(model, images(1), columns="never")
        same(model, small, images(2))
        assert small.get_submodule("0").out_channels == (6 if include else 4)


def test_constant_goes_into_the_mean_of_the_batchnorm_behind() -> None:
    model = leaky(0, nn.ReLU(), bias=False)
    model.insert(4, nn.BatchNorm2d(4).double())
    small = sa.compact(model, images(1), columns="never")
    same(model, small, images(2))
    assert small.get_submodule("0").out_channels == 4
    assert small.get_submodule("3").bias is None


# What cannot be tracked


class Odd(nn.Module):
    """A network with one operation in the middle that mixes channels in a way of its own."""

    def __init__(self, how) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 2)
        self.norm = nn.GroupNorm(2, 8)
        self.scale = nn.Parameter(torch.ones(1, 8, 1, 1))
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        x = self.how(self, F.relu(self.a(x)))
        return self.fc(F.relu(self.b(x)).mean((2, 3)))


ODD = {
    "softmax": lambda m, x: torch.softmax(x, 1),
    "flip": lambda m, x: torch.flip(x, (1,)),
    "cumsum": lambda m, x: x.cumsum(1),
    "sum over channels": lambda m, x: x / x.sum(1, keepdim=True),
    "number of channels": lambda m, x: x * x.shape[1],
    "channel taken": lambda m, x: x + x[:, 6:7],
    "transposed linear": lambda m, x: x.transpose(1, 3).contiguous().transpose(1, 3),
    "parts handed on": lambda m, x: torch.cat(torch.chunk(x, 2, 1), 1),
    "unforeseen arguments": lambda m, x: torch.add(input=x, other=x.flip(1), alpha=2),
    "pooled over channels": lambda m, x: F.avg_pool1d(x.flatten(2).transpose(1, 2), 2).mean(2)[:, :8, None, None] + x,
    "device": lambda m, x: x.cumsum(1).to(x.device),
    "expand": lambda m, x: x + x.mean(1, keepdim=True).expand(-1, 8, -1, -1),
}


@pytest.mark.parametrize("name", ODD)
def test_untracked_operations_leave_channels_whole(name: str) -> None:
    model = randomise(Odd(ODD[name]).double(), 0.0, 0)
    with torch.no_grad():
        model.a.weight[:4] = 0
        model.b.weight[:4] = 0
        model.b.bias[:4] = 0
    small = sa.compact(model, images(2), columns="never")
    same(model, small, images(3))
    assert small.b.out_channels == 4, "what is tracked still goes"
    if name != "transposed linear":
        assert small.a.out_channels == 8
        assert "left whole" in str(small.report) or small.report.notes["a"]


def rotate(x: Tensor) -> Tensor:
    return torch.cat([x[:, 2:], x[:, :2]], 1)


def halves(x: Tensor, sizes: list[int]) -> Tensor:
    a, b = torch.split(x, sizes, 1)
    return torch.cat([b, a], 1)


def in_place(x: Tensor) -> Tensor:
    x.add_(0.25)  # a statement: what follows sees its result
    F.relu_(x)
    return x


# Operation and what its constants become: the filters of `a` that stay once half of them are zero with bias 0.5.
TRACKED = {
    "rotated": (lambda m, x: rotate(x), 5),
    "split unevenly": (lambda m, x: halves(x, [3, 5]), 5),
    "padded channels": (lambda m, x: F.pad(x, (0, 0, 0, 0, 1, 2))[:, 1:9], 4),
    "padded map": (lambda m, x: F.pad(x, (1, 1, 1, 1)), 8),
    "padded map with the constant": (lambda m, x: F.pad(x, (1, 1, 1, 1), value=0.5), 4),
    "in place": (lambda m, x: in_place(x), 4),
    "upsampled": (lambda m, x: F.interpolate(x, scale_factor=2), 4),
    "channels last": (lambda m, x: F.relu(x.permute(0, 2, 3, 1)).contiguous().permute(0, 3, 1, 2), 4),
    "views": (lambda m, x: x.view(x.size(0), x.size(1), -1).view(x.size(0), 8, *(10, 10)), 4),
    "gated by its mean": (lambda m, x: x * torch.sigmoid(x.mean((2, 3), keepdim=True)), 4),
    "arithmetic": (lambda m, x: 1 - x**2 / (1 + x.abs()), 4),
    "group normalised": (lambda m, x: m.norm(x), 4),
    "parameter": (lambda m, x: x * m.scale, 4),
    "shuffled": (lambda m, x: x.view(-1, 2, 4, 10, 10).transpose(1, 2).reshape(-1, 8, 10, 10), 4),
    "channel index": (lambda m, x: x * x[:, 2].unsqueeze(1), 5),
    "parts added": (lambda m, x: torch.cat([x[:, :4] + x[:, 4:], x[:, 4:]], 1), 4),  # one is a bias of the other
    "parts multiplied": (lambda m, x: torch.cat([x[:, :4] * x[:, 4:], x[:, 4:]], 1), 8),
}


@pytest.mark.parametrize("name", TRACKED)
def test_tracked_operations(name: str) -> None:
    how, stay = TRACKED[name]
    model = randomise(Odd(how).double(), 0.0, 0)
    with torch.no_grad():
        model.a.weight[:4] = 0
        model.a.bias[:4] = 0.5
    small = sa.compact(model, images(2), columns="never")
    same(model, small, images(3))
    # A padded map makes the constants vary, so each channel of it stays; a part of a split keeps at least one.
    assert small.a.out_channels == stay
    assert small.report.whole == {}


class Twice(nn.Module):
    """A convolution after itself, then two of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.conv = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3)
        self.bridge, self.other, self.tied = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 3), nn.Conv2d(6, 6, 3)
        self.tied.weight = self.other.weight
        self.fc = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bridge(self.conv(self.conv(self.first(x))))
        return self.fc(self.tied(self.other(x)).mean((2, 3)))


@pytest.mark.parametrize("read", [True, False])
def test_modules_called_twice_and_tied_weights_lose_what_no_use_needs(read: bool) -> None:
    model = randomise(Twice().double(), 0.0, 0)
    with torch.no_grad():
        for conv in (model.first, model.conv, model.bridge, model.other):
            conv.weight[0] = 0
        if not read:  # the constants, other ones at each place
            for layer in (model.conv, model.bridge, model.other, model.fc):
                layer.weight[:, 0] = 0
    small = sa.compact(model, images(2), columns="never")
    same(model, small, images(3))
    left = 6 if read else 5
    assert small.conv.weight.shape[:2] == (left, left) and small.first.out_channels == left
    # Each of the two has a bias of its own, which its own constant goes into.
    assert small.tied.weight is small.other.weight and small.other.weight.shape[:2] == (5, 5)
    assert small.report.whole == {}


# Columns


@pytest.mark.parametrize("rate", [0.3, 0.7])
@pytest.mark.parametrize("kind", KINDS)
def test_columns_of_residual_nets(kind: str, rate: float) -> None:
    model = randomise(ResNet(kind), rate, 11)
    plain, auto, always = (sa.compact(model, images(2, torch.float32), c) for c in ("never", "auto", "always"))
    for small in (plain, auto, always):
        same(model, small, images(3, torch.float32), 1e-5)  # float32: some hundred roundings of 6e-8
    stored = [small.report.weights_after for small in (plain, auto, always)]
    assert stored[0] >= stored[1] >= stored[2] and stored[0] > stored[2]


@pytest.mark.parametrize("block", [4, 8])
def test_block_columns_keep_their_blocks_when_filters_go(block: int) -> None:
    """Filters cut from the middle of blocks must not make the stored taps of neighbouring blocks grow together."""
    g = torch.Generator().manual_seed(block)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3, bias=False), nn.ReLU(), nn.Conv2d(32, 8, 1)
    )
    with torch.no_grad():
        conv = model[2]
        keep = torch.rand(n_groups("block_column", conv.weight.shape, 1, block), generator=g) < 0.15
        conv.weight.mul_(expand_keep(keep, "block_column", conv.weight.shape, 1, block))
        gone = torch.tensor([1, 5, 6, 13, 22, 30])
        conv.weight[gone] = 0
        conv.bias = None
        nonzero = int((conv.weight != 0).sum())
    small = sa.compact(model, images(1, torch.float32), "always")
    same(model, small, images(2, torch.float32), 1e-5)
    layer = small.get_submodule("2")
    assert type(layer) is sa.CompactConv2d
    assert layer.out_channels <= 26
    assert layer.weight.numel() == nonzero


def test_auto_leaves_dense_what_would_not_pay() -> None:
    model = randomise(ResNet("B"), 0.0, 0)
    with torch.no_grad():
        first, second = model.layer1[0].conv1, model.layer1[2].conv2
        for conv, every in ((first, 8), (second, 2)):  # densities 0.875 and 0.5
            keep = torch.arange(conv.weight[0].numel()) % every != 0
            conv.weight.mul_(expand_keep(keep, "column", conv.weight.shape))
    small = sa.compact(model, images(2, torch.float32))
    kinds = {r.name: r.kind for r in small.report.layers}
    assert kinds["layer1.0.conv1"] == "Conv2d" and kinds["layer1.2.conv2"] == "CompactConv2d"


def test_compacted_layers_are_compacted_again() -> None:
    model, small = small_resnet("always")
    with torch.no_grad():
        small.fc.weight.zero_()
    again = sa.compact(small, images(2, torch.float32), "never")
    same(small, again, images(3, torch.float32), 1e-5)
    assert again.report.weights_after < small.report.weights_before


def test_float64_keeps_ordinary_layers() -> None:
    small = sa.compact(randomise(ResNet("B").double(), 0.7, 0), images(2), "always")
    assert not any(isinstance(m, (sa.CompactConv2d, sa.CompactLinear)) for m in small.modules())


# Life after compaction


def small_resnet(columns: str = "never") -> tuple[nn.Module, nn.Module]:
    model = randomise(ResNet("B"), 0.5, 5)
    return model, sa.compact(model, images(2, torch.float32), columns=columns)


def test_input_is_left_as_it_is() -> None:
    model = randomise(ResNet("A"), 0.5, 4)
    model.train()
    model.layer1[0].eval()
    before = {k: v.numpy().tobytes() for k, v in model.state_dict().items()}
    flags = [m.training for m in model.modules()]
    small = sa.compact(model, images(2, torch.float32), columns="never")
    assert {k: v.numpy().tobytes() for k, v in model.state_dict().items()} == before
    assert [m.training for m in model.modules()] == flags
    memory = {t.untyped_storage().data_ptr() for t in model.state_dict().values()}
    assert not memory & {t.untyped_storage().data_ptr() for t in small.state_dict().values()}, "nothing is shared"
    with torch.no_grad():
        for p in small.parameters():
            p.add_(1)
    assert {k: v.numpy().tobytes() for k, v in model.state_dict().items()} == before


def test_names_flags_and_classes_are_kept() -> None:
    model = randomise(ResNet("B"), 0.5, 4)
    model.train()
    model.layer1[1].eval()
    model.conv1.weight.requires_grad_(False)
    small = sa.compact(model, images(2, torch.float32), columns="never")
    modules = dict(model.named_modules())
    for name, m in small.named_modules():
        if name and list(m.children()) == []:
            assert type(m) is type(modules[name]) and m.training == modules[name].training, name
    wanted = {n: p.requires_grad for n, p in model.named_parameters()}
    assert all(wanted.get(n, True) == p.requires_grad for n, p in small.named_parameters())
    assert not small.conv1.weight.requires_grad
    assert set(small.state_dict()) <= set(model.state_dict()) | {"layer1.0.conv1.bias"}


@pytest.mark.parametrize("columns", ["never", "always"])
def test_trains(columns: str) -> None:
    model, small = small_resnet(columns)
    small.train()
    optimizer = torch.optim.SGD(small.parameters(), 0.05, momentum=0.9)
    x, y = images(16, torch.float32), torch.arange(16) % 10
    losses = []
    for _ in range(8):
        loss = F.cross_entropy(small(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(p.grad is not None for p in small.parameters())


@pytest.mark.parametrize("columns", ["never", "always"])
def test_copies_pickles_and_takes_any_batch(columns: str) -> None:
    model, small = small_resnet(columns)
    x = images(7, torch.float32)
    small.eval()
    buffer = io.BytesIO()
    torch.save(small, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(small), pickle.loads(pickle.dumps(small)), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(x), small(x))
        assert other.report.weights_after == small.report.weights_after
        assert set(other.state_dict()) == set(small.state_dict())
    for n in (1, 2, 9):
        same(model, small, images(n, torch.float32), 1e-5)  # float32: some hundred roundings of 6e-8


def test_another_image_size_where_the_network_takes_it() -> None:
    model = randomise(ResNet("B").double(), 0.5, 6)
    small = sa.compact(model, images(1), columns="never")
    same(model, small, images(2, size=19))


def test_compacting_twice_changes_nothing_more() -> None:
    _, small = small_resnet()
    again = sa.compact(small, images(2, torch.float32), columns="never")
    same(small, again, images(3, torch.float32), 1e-5)
    assert again.report.weights_after == small.report.weights_after


class Halves(nn.Module):
    """Two convolutions after each other, each of which also gets a half of what the first layer makes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 4, 1)
        self.a, self.b = (nn.Conv2d(6, 6, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x, more = self.first(x).relu().chunk(2, 1)
        y = self.a(x).relu()
        return self.last(torch.cat([y, self.b(y + more)], 1))


def test_an_operand_that_becomes_a_bias_is_not_tied_to_the_other_one() -> None:
    torch.manual_seed(0)
    model = Halves().double()
    with torch.no_grad():
        model.first.weight[6:] = 0
        model.first.bias[6:] = torch.linspace(0.2, 1.0, 6, dtype=torch.float64)
    small = sa.compact(model, images(2), columns="never")
    same(model, small, images(3))
    assert isinstance(small.get_submodule("add_bias"), sa.nn.ChannelBias)
    assert small.first.out_channels == 6
    # Channels are followed through the bias as through any other layer.
    with torch.no_grad():
        small.a.weight[1] = 0
        small.a.bias[1] = -1.0
        small.b.weight[:, 2] = 0
        small.last.weight[:, 2] = 0
    less = sa.compact(small, images(2), columns="never")
    same(small, less, images(3))
    assert less.a.out_channels == 5 and less.add_bias.bias.numel() == 5
    assert not less.report.whole
    again = sa.compact(less, images(2), columns="never")
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in less.parameters())


class Branched(nn.Module):
    """A stream that a normalised branch is added to."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.branch, self.b = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(y + self.branch(self.norm(y)))


@pytest.mark.parametrize("constant", [True, False])
def test_a_branch_that_became_a_bias_holds_nothing(constant: bool) -> None:
    torch.manual_seed(0)
    model = Branched().double()
    with torch.no_grad():
        model.a.weight[2] = 0
        model.a.bias[2] = 0.5
        model.b.weight[:, 5] = 0
        if constant:
            model.branch.weight.zero_()
    x = torch.randn(4, 3, dtype=torch.float64)
    small = sa.compact(model, x, columns="never")
    same(model, small, x)
    # The normalisation sees all channels, as long as anything sees the normalisation.
    assert small.a.out_features == (6 if constant else 8)
    assert hasattr(small, "norm") != constant


def test_pruning_hooks_are_baked_and_other_hooks_are_announced() -> None:
    model = randomise(ResNet("B"), 0.0, 0)
    torch.nn.utils.prune.ln_structured(model.layer1[0].conv1, "weight", 0.5, 2, 0)
    model.layer1[0].bn1.bias.data.zero_()
    model.layer1[0].bn1.running_mean.zero_()
    model.fc.register_forward_hook(lambda m, i, o: None)
    with pytest.warns(UserWarning, match="fc: its hooks"):
        small = sa.compact(model, images(2, torch.float32), columns="never")
    same(clone(model), small, images(3, torch.float32), 1e-5)
    assert small.layer1.get_submodule("0").conv1.out_channels == 4
    assert hasattr(model.layer1[0].conv1, "weight_orig"), "the input keeps its hooks"


def test_no_warning_without_hooks() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small_resnet()


def test_report_counts_and_prints() -> None:
    model, small = small_resnet()
    report = small.report
    assert report.weights_before == sum(
        m.weight.numel() for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))
    )
    assert report.weights_after == sum(
        m.weight.numel() for m in small.modules() if isinstance(m, (nn.Conv2d, nn.Linear))
    )
    conv1 = report.layers[0]
    assert (conv1.name, conv1.macs_before) == ("conv1", 8 * 27 * 144)
    text = str(report)
    assert "layer1.1.downsample.0" in text and "largest difference" in text
    assert report.to_dict()["macs_after"] == report.macs_after


# Bad input


def test_errors_name_what_is_wrong() -> None:
    model = ResNet("B")
    x = images(2, torch.float32)
    with pytest.raises(CompactError, match="columns got 'some', wanted one of auto, always, never"):
        sa.compact(model, x, columns="some")
    with torch.no_grad():
        model.layer1[1].conv2.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(CompactError, match=r"layer1\.1\.conv2\.weight got NaN"):
        sa.compact(model, x)


def test_a_difference_is_an_error_not_a_result() -> None:
    class Aliased(nn.Module):
        """Adds in place to a tensor that it still uses, which symbolic tracing does not see."""

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            z = y
            y += 1
            return y + z

    with pytest.raises(CompactError, match="Aliased got outputs that differ"):
        sa.compact(Aliased(), images(2, torch.float32), columns="never")


def test_block_columns_expand() -> None:
    """The zeros that randomise makes are what they are called, so that the property tests test something."""
    keep = torch.tensor([True, False] * 9)
    assert expand_keep(keep, "column", (4, 2, 3, 3)).float().mean() == 0.5


class Sized(nn.Module):
    """Does on large maps what it does not on small ones."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return 2 * y if x.shape[-1] > 8 else y


def test_verify_takes_the_users_data() -> None:
    model, x = Sized().eval(), torch.randn(2, 3, 8, 8)
    report = sa.compact(model, x).report
    assert report.data_abs_diff is None and "on data" not in str(report)
    report = sa.compact(model, x, verify=torch.randn(6, 3, 8, 8)).report
    assert report.max_abs_diff is not None and report.data_abs_diff is not None and report.data_abs_diff < 1e-5
    assert report.data_rel_diff is not None and "input network on data: " in str(report)
    assert sa.compact(model, x, verify=(x,)).report.data_abs_diff is not None
    assert sa.compact(model, x, verify=False).report.max_abs_diff is None
    with pytest.raises(CompactError, match="outputs that differ by"):  # the probe, of the example's size, does not
        sa.compact(model, x, verify=torch.randn(2, 3, 12, 12))
    for data, message in (
        ("data", "compact: verify got str, wanted a tensor or a tuple of tensors"),
        ((x, x), "compact: verify got 2 tensors, wanted 1 as example"),
        (x.double(), "compact: verify got torch.float64, wanted torch.float32 as conv.weight"),
        (
            torch.randn(2, 5, 8, 8),
            r"compact: verify got shapes \(2, 5, 8, 8\) .*wanted .* the example's \(2, 3, 8, 8\)",
        ),
    ):
        with pytest.raises((TraceError, CompactError), match=message):
            sa.compact(model, x, verify=data)  # type: ignore[arg-type]
