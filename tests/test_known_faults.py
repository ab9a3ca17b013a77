"""Faults that users of pruning tools report most, each as the smallest network that shows it.

The numbers are those of the threads: tp is VainF/Torch-Pruning, nni microsoft/nni, distiller IntelLabs/distiller.
"""

from __future__ import annotations

import time

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import structadmm as sa
from networks import randomise
from test_operators import Attention, Gated, compacted, filled, maps, tokens, weight

torch.set_num_threads(1)  # tiny networks


# Dependency graph wrong or endless


class Dense(nn.Module):
    """Every layer reads all before it, concatenated."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3 + 4 * i, 4, 3, padding=1) for i in range(depth))
        self.out = nn.Conv2d(3 + 4 * depth, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, F.relu(layer(x))], 1)
        return self.out(x).flatten(1)


def test_concatenations_of_concatenations() -> None:
    """tp #415, #481: offsets into concatenated tensors."""
    model = filled(Dense())
    with torch.no_grad():
        for layer, gone in zip(model.layers, ([0], [1, 2], [3], [0, 3]), strict=True):
            layer.weight[gone] = 0
            layer.bias[gone] = -1
    small = compacted(model, maps(2), maps(3))
    assert [weight(small, f"layers.{i}")[:2] for i in range(4)] == [(3, 3), (2, 6), (3, 8), (2, 11)]
    assert weight(small, "out") == (2, 13, 1, 1)


def test_concatenation_after_a_split_that_is_flattened() -> None:
    """tp #415: a concatenation whose channels become features, each with all places of the map."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 6, 3), nn.Linear(4 * 36 + 3 * 36, 2)

        def forward(self, x: Tensor) -> Tensor:
            b, _ = torch.split(self.b(x), 3, 1)
            return self.fc(torch.cat([self.a(x), b], 1).flatten(1))

    model = filled(Net())
    with torch.no_grad():
        model.a.weight[1] = 0
        model.b.weight[[0, 2]] = 0
        model.b.weight[3] = 0
    small = compacted(model, maps(2), maps(3))
    assert weight(small, "fc") == (2, 36 * 4)


def test_queries_that_share_keys_with_normalised_heads() -> None:
    """tp #527: an endless loop on Qwen3, whose queries and keys are normalised by head before a product."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(16, n) for n in (16, 8, 8, 16))
            self.qn, self.kn, self.n = nn.RMSNorm(4), nn.RMSNorm(4), nn.RMSNorm(16)
            self.feed = Gated(16, 12, False)

        def forward(self, x: Tensor) -> Tensor:
            b, n, _ = x.shape
            y = self.n(x)
            q = self.qn(self.q(y).view(b, n, -1, 4)).transpose(1, 2)
            k = self.kn(self.k(y).view(b, n, -1, 4)).transpose(1, 2)
            v = self.v(y).view(b, n, -1, 4).transpose(1, 2)
            k, v = (t[:, :, None].expand(b, 2, 2, n, 4).reshape(b, 4, n, 4) for t in (k, v))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.o(y.transpose(1, 2).contiguous().reshape(b, n, -1))
            return x + self.feed(x)

    model = filled(nn.Sequential(*(Block() for _ in range(4)), nn.Linear(16, 2)))
    with torch.no_grad():
        for block in model[:4]:
            block.feed.w3.weight[:, 2:6] = 0
            block.q.weight[4:8] = 0
    started = time.monotonic()
    small = compacted(model, tokens(2), tokens(3))
    assert weight(small, "2.feed.w1") == (8, 16) and weight(small, "2.q") == (16, 16)
    assert time.monotonic() - started < 60  # it takes one second


def test_time_grows_with_the_network_not_faster() -> None:
    """tp #474, #525: hours and gigabytes for deep networks. Twice the layers may take three times as long at most."""

    def seconds(depth: int) -> float:
        blocks = (nn.Sequential(nn.Linear(16, 16), Attention(16, 4, "fused"), nn.LayerNorm(16)) for _ in range(depth))
        model = filled(nn.Sequential(*blocks, nn.Linear(16, 2)))
        started = time.process_time()
        sa.compact(model, tokens(2), columns="never", verify=False)
        return time.process_time() - started

    seconds(2)
    short, long = min(seconds(8), seconds(8)), min(seconds(16), seconds(16))
    assert long < 3 * short + 0.5


def test_shifted_windows() -> None:
    """tp #490: Swin's windows, rolls, masks and position biases for every head."""

    class Window(nn.Module):
        def __init__(self, c: int, heads: int, side: int) -> None:
            super().__init__()
            self.heads, self.side = heads, side
            self.norm, self.qkv, self.proj = nn.LayerNorm(c), nn.Linear(c, 3 * c), nn.Linear(c, c)
            self.table = nn.Parameter(torch.randn((2 * side - 1) ** 2, heads))
            at = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")).flatten(1)
            apart = (at[:, :, None] - at[:, None] + side - 1).permute(1, 2, 0)
            self.register_buffer("index", (apart[..., 0] * (2 * side - 1) + apart[..., 1]).flatten())
            self.feed = nn.Sequential(nn.LayerNorm(c), nn.Linear(c, 20), nn.GELU(), nn.Linear(20, c))

        def forward(self, x: Tensor) -> Tensor:
            b, h, w, c = x.shape
            s, heads = self.side, self.heads
            y = torch.roll(self.norm(x), (-1, -1), (1, 2))
            y = y.view(b, h // s, s, w // s, s, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, s * s, c)
            q, k, v = self.qkv(y).reshape(-1, s * s, 3, heads, c // heads).permute(2, 0, 3, 1, 4).unbind(0)
            bias = self.table[self.index].view(s * s, s * s, heads).permute(2, 0, 1)
            scores = (q * (c // heads) ** -0.5) @ k.transpose(-2, -1) + bias.unsqueeze(0)
            y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(-1, s * s, c)
            y = self.proj(y).view(b, h // s, w // s, s, s, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
            x = x + torch.roll(y, (1, 1), (1, 2))
            return x + self.feed(x)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.a, self.b = nn.Conv2d(3, 16, 1), Window(16, 2, 4), Window(16, 4, 2)
            self.fc = nn.Linear(16, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.b(self.a(self.embed(x).permute(0, 2, 3, 1))).mean((1, 2)))

    model = filled(Net())
    with torch.no_grad():
        for m in (model.a, model.b):
            m.feed[1].weight[:6] = 0
        for part in range(3):
            for head in range(2):
                at = 16 * part + 8 * head + 2 + head
                model.a.qkv.weight[at] = model.a.qkv.bias[at] = 0
    small = compacted(model, maps(2), maps(3))
    assert weight(small, "a.feed.1") == weight(small, "b.feed.1") == (14, 16)
    assert weight(small, "a.qkv") == (42, 16)


@pytest.mark.parametrize("multiplier", [1, 2])
def test_depthwise_convolutions(multiplier: int) -> None:
    """tp #179, #328: their filters follow the channels that they read."""
    model = filled(
        nn.Sequential(
            nn.Conv2d(3, 8, 1),
            nn.ReLU(),
            nn.Conv2d(8, 8 * multiplier, 3, groups=8),
            nn.ReLU(),
            nn.Conv2d(8 * multiplier, 4, 1),
            nn.Flatten(),
        )  # fmt: skip
    )
    with torch.no_grad():
        model[0].weight[[1, 6]] = 0
        model[0].bias[[1, 6]] = -1
        model[2].bias[1 * multiplier : 2 * multiplier] = -1
        model[2].bias[6 * multiplier : 7 * multiplier] = -1
    small = compacted(model, maps(2), maps(3))
    depthwise = small.get_submodule("2")
    assert (depthwise.in_channels, depthwise.groups, depthwise.out_channels) == (6, 6, 6 * multiplier)


def test_a_module_called_many_times() -> None:
    """nni #4664: a layer that is shared."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.head, self.out = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.a(x))
            return torch.cat([self.out(self.head(x)), self.out(self.head(F.max_pool2d(x, 2)))[:, :, :3, :3].repeat(
                1, 1, 2, 2)], 1).flatten(1)  # fmt: skip

    model = filled(Net())
    with torch.no_grad():
        model.a.weight[:3] = model.head.weight[:2] = 0
    small = compacted(model, maps(2), maps(3))
    assert weight(small, "head") == (6, 5, 1, 1) and "head" not in small.report.whole


# Accuracy collapses: the masked network is not the compacted one


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Sigmoid, nn.Hardswish])
def test_what_batchnorm_leaves_of_a_zero_filter(activation, padding: int) -> None:
    """nni #2130, #3848: beta goes through the activation into what reads the channel, the border of its map too."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), activation(), nn.Conv2d(8, 6, 3, padding=padding),
        nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4),
    )  # fmt: skip
    randomise(model.double(), 0.0, 0).eval()
    with torch.no_grad():
        model[0].weight[:5] = 0
        model[1].bias[:5] = torch.linspace(0.2, 2.0, 5)
    small = compacted(model, maps(2), maps(3))
    assert small.get_submodule("0").out_channels == (3 if padding == 0 else 4)


def test_a_shortcut_that_still_feeds_a_channel() -> None:
    """tp #347, #468: the last convolution of a block loses filters, the stream that it adds to does not."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
            self.fc = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.stem(x))
            return self.fc((x + self.b(F.relu(self.a(x)))).mean((2, 3)))

    model = filled(Net())
    with torch.no_grad():
        model.b.weight[:4] = 0
        model.stem.weight[0] = 0
    small = compacted(model, maps(2), maps(3))
    assert small.b.out_channels == small.stem.out_channels == 7
    assert any("residual stream" in why for why in small.report.notes["b"])


def test_pruned_twice() -> None:
    """distiller #424: pruning what was compacted before, statistics and all."""
    layers = [nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 8, 3), nn.BatchNorm2d(8), nn.ReLU()]
    model = randomise(nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 3)).double(), 0.0, 0).eval()
    with torch.no_grad():
        model[0].weight[:4] = 0
    small = compacted(model, maps(2), maps(3))
    with torch.no_grad():
        small.get_submodule("0").weight[2:4] = 0
        small.get_submodule("3").weight[:3] = 0
    again = compacted(small.eval(), maps(2), maps(3))
    assert again.get_submodule("0").out_channels == 6 and again.get_submodule("3").out_channels == 5
