"""Faults that users of pruning tools report most, each as the smallest network that shows it.

The numbers are those of the threads: tp is VainF/Torch-Pruning, nni microsoft/nni, distiller IntelLabs/distiller.
"""

from __future__ import annotations

import signal
import time
import tracemalloc
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import structadmm as sa
from networks import randomise
from structadmm.analysis import Analysis
from structadmm.layout import settle
from structadmm.trace import trace
from test_operators import Attention, Gated, compacted, filled, maps, tokens, weight

torch.set_num_threads(1)  # tiny networks


@pytest.fixture(autouse=True)
def ends() -> Iterator[None]:
    """What never ends fails. No network here takes more than some seconds; the clock is the process's own, which stands
    still while others have the machine."""

    def stop(*_: object) -> None:
        raise TimeoutError("no end in sight")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, 40)
    yield
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.signal(signal.SIGPROF, before)


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
            block.o.weight[:, :4] = 0  # a query whose keys and values another one needs: it stays with it
        model[2].v.weight[4:8] = 0  # values that are constant go with their keys, and with both queries
    small = compacted(model, tokens(2), tokens(3))
    assert weight(small, "2.feed.w1") == (8, 16)
    assert [weight(small, f"{i}.q")[0] for i in range(4)] == [16, 16, 8, 16]
    assert [weight(small, f"{i}.k")[0] for i in range(4)] == [8, 8, 4, 8]
    assert set(small.report.whole) <= {"0.n"}  # it reads the network's input, which is whole anyway


class Separate(nn.Module):
    """Attention with projections of its own for each operand, four heads of four channels."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.q, self.k, self.v, self.proj = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (m(x).unflatten(-1, (4, 4)).transpose(1, 2) for m in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v) if self.fused else (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("fused", [True, False])
def test_heads_that_lose_different_numbers_of_channels(fused: bool) -> None:
    """tp #490, #527: what is left of the heads has to be a grid again."""
    model = filled(nn.Sequential(nn.Linear(16, 16), Separate(fused), nn.Linear(16, 2)))
    left = {"q": (0, 1, 2, 2), "v": (3, 0, 1, 3)}  # channels that each head keeps, were it alone
    with torch.no_grad():
        for name in ("q", "k", "v"):
            m = model[1].get_submodule(name)
            for head, n in enumerate(left["v" if name == "v" else "q"]):
                m.weight[4 * head + n : 4 * head + 4] = m.bias[4 * head + n : 4 * head + 4, None] = 0
    small = compacted(model, tokens(2), tokens(3))
    # The second head has no values, so it goes. The first one scores nothing, but its values are used.
    assert weight(small, "1.q") == weight(small, "1.k") == (3 * 2, 16)
    assert weight(small, "1.v") == (3 * 3, 16) and weight(small, "1.proj") == (16, 3 * 3)


def test_time_grows_with_the_network_not_faster() -> None:
    """tp #474: hours for deep networks. Twice the layers may take three times as long at most."""

    def seconds(depth: int) -> float:
        blocks = (nn.Sequential(nn.Linear(16, 16), Attention(16, 4, "fused"), nn.LayerNorm(16)) for _ in range(depth))
        model = filled(nn.Sequential(*blocks, nn.Linear(16, 2)))
        started = time.process_time()
        sa.compact(model, tokens(2), columns="never", verify=False)
        return time.process_time() - started

    seconds(2)
    short, long = min(seconds(8), seconds(8)), min(seconds(16), seconds(16))
    assert long < 3 * short + 0.5


class Conv(nn.Sequential):
    """A convolution as YOLO has them."""

    def __init__(self, c: int, out: int, size: int = 1, stride: int = 1, groups: int = 1) -> None:
        conv = nn.Conv2d(c, out, size, stride, size // 2, groups=groups, bias=False)
        super().__init__(conv, nn.BatchNorm2d(out), nn.SiLU())


class AreaAttention(nn.Module):
    """Attention within each of several stripes of the map, the stripes as a batch; and a convolution of the values."""

    def __init__(self, c: int, area: int) -> None:
        super().__init__()
        self.heads, self.area = c // 8, area
        self.qkv, self.pe, self.proj = Conv(c, 3 * c), Conv(c, c, 5, groups=c), Conv(c, c)
        self.mlp = nn.Sequential(Conv(c, 2 * c), Conv(2 * c, c))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        y = self.qkv(x).flatten(2).transpose(1, 2).reshape(b * self.area, h * w // self.area, 3 * c)
        y = y.view(b * self.area, h * w // self.area, self.heads, 24).permute(0, 2, 3, 1)
        q, k, v = y.split([8, 8, 8], dim=2)
        y = v @ ((q.transpose(-2, -1) @ k) * 8**-0.5).softmax(-1).transpose(-2, -1)
        y, v = (t.permute(0, 3, 1, 2).reshape(b, h * w, c).reshape(b, h, w, c).permute(0, 3, 1, 2) for t in (y, v))
        x = x + self.proj(y.contiguous() + self.pe(v.contiguous()))
        return x + self.mlp(x)


class Bottle(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.a, self.b = Conv(c, c, 3), Conv(c, c, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(self.a(x))


class Collected(nn.Module):
    """YOLO's C2f and A2C2f: both halves and what each block makes of the one before, concatenated."""

    def __init__(self, c: int, out: int, blocks: int, area: int = 0) -> None:
        super().__init__()
        n = out // 2
        self.a, self.b = Conv(c, out), Conv((2 + blocks) * n, out)
        self.m = nn.ModuleList(AreaAttention(n, area) if area else Bottle(n) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.a(x).chunk(2, 1))
        for m in self.m:
            y.append(m(y[-1]))
        return self.b(torch.cat(y, 1))


class Yolo(nn.Module):
    """YOLOv12 in small: three levels on the way down, two of them met again on the way up."""

    def __init__(self, c: int, blocks: int) -> None:
        super().__init__()
        self.stem, self.low = Conv(3, c, 3, 2), Collected(c, c, blocks)
        self.down, self.middle = Conv(c, c, 3, 2), Collected(c, 2 * c, blocks, 4)
        self.further, self.high = Conv(2 * c, 2 * c, 3, 2), Collected(2 * c, 2 * c, blocks, 1)
        self.up, self.back = Collected(4 * c, 2 * c, blocks), Collected(3 * c, c, blocks)
        self.heads = nn.ModuleList(nn.Conv2d(n, 5, 1) for n in (c, 2 * c, 2 * c))

    def forward(self, x: Tensor) -> Tensor:
        low = self.low(self.stem(x))
        middle = self.middle(self.down(low))
        high = self.high(self.further(middle))
        middle = self.up(torch.cat([F.interpolate(high, scale_factor=2), middle], 1))
        low = self.back(torch.cat([F.interpolate(middle, scale_factor=2), low], 1))
        return torch.cat([m(t).flatten(2) for m, t in zip(self.heads, (low, middle, high), strict=True)], 2)


@torch.no_grad()
def silence(conv: Conv, gone: list[int]) -> None:
    """Filters that emit 0: what SiLU makes of no scale and no shift."""
    conv[0].weight[gone] = 0
    conv[1].weight[gone] = conv[1].bias[gone] = 0


def test_collected_blocks_and_areas() -> None:
    """tp #525: YOLOv12's blocks lose channels, each at other places of the concatenations that read them."""
    model = filled(Yolo(16, 2))
    silence(model.low.a, [1, 2])  # of the first half, which only the concatenation reads
    silence(model.low.m[1].a, [0, 3, 4])
    silence(model.middle.m[0].mlp[0], [0, 5, 6, 31])
    silence(model.high.b, [0, 9])  # read by a head, and behind an upsampling
    silence(model.up.b, [3, 4, 30])
    silence(model.middle.m[0].qkv, [16, 17, 41])  # values of two heads, as many as each happens to have
    small = compacted(model, maps(2, 3, 32), maps(3, 3, 32))
    assert weight(small, "low.a.0") == (14, 16, 1, 1) and weight(small, "low.b.0") == (16, 30, 1, 1)
    assert weight(small, "low.m.1.a.0") == (5, 8, 3, 3) and weight(small, "low.m.1.b.0") == (8, 5, 3, 3)
    assert weight(small, "middle.m.0.mlp.0.0") == (28, 16, 1, 1)
    assert weight(small, "up.a.0") == (32, 62, 1, 1) and weight(small, "heads.2") == (5, 30, 1, 1)
    assert weight(small, "back.a.0") == (16, 45, 1, 1) and weight(small, "heads.1") == (5, 29, 1, 1)


def test_memory_is_that_of_the_channels() -> None:
    """tp #525: memory ran out on YOLOv12. The analysis keeps for a channel of a tensor an id, a value and its place in
    what the tensor is made from, of 8 bytes each, and whether it is constant and needed: 26 bytes, of which there are
    two at most while a pass makes new ones of old ones. For a tensor it keeps some dozens of small objects: 4 KiB. How
    large the maps are does not matter."""

    def peak(side: int) -> tuple[int, int]:
        traced = trace(model, maps(2, 3, side), "test", unpacked=True, share=True)
        settle(Analysis(traced))  # what is loaded and cached at first use is not the network's
        tracemalloc.start()
        analysis = Analysis(traced)
        settle(analysis)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most, sum(2 * 26 * facts.ids.size + 4096 for facts in analysis.facts.values())

    model = filled(Yolo(96, 2))
    small, bound = peak(32)
    large, _ = peak(64)
    assert small < bound and large < 1.1 * small


class Window(nn.Module):
    """A block of Swin over shifted windows. early: the projection is made on the map, so that its channels are shifted
    and cut into windows too."""

    def __init__(self, c: int, heads: int, side: int, size: int, early: bool) -> None:
        super().__init__()
        self.heads, self.side, self.early = heads, side, early
        self.norm, self.qkv, self.proj = nn.LayerNorm(c), nn.Linear(c, 3 * c), nn.Linear(c, c)
        self.table = nn.Parameter(torch.randn((2 * side - 1) ** 2, heads))
        at = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")).flatten(1)
        apart = (at[:, :, None] - at[:, None] + side - 1).permute(1, 2, 0)
        self.register_buffer("index", (apart[..., 0] * (2 * side - 1) + apart[..., 1]).flatten())
        # What was shifted in from the other side is another region, and is not attended to.
        region = (torch.arange(size) // side + (torch.arange(size) == size - 1)).expand(size, size)
        region = (region * size + region.T)[None, :, :, None]
        region = self.windows(region).squeeze(-1)
        self.register_buffer("mask", -100.0 * (region[:, :, None] != region[:, None]))
        self.feed = nn.Sequential(nn.LayerNorm(c), nn.Linear(c, 20), nn.GELU(), nn.Linear(20, c))

    def windows(self, y: Tensor) -> Tensor:
        b, h, w, c = y.shape
        s = self.side
        return y.view(b, h // s, s, w // s, s, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, s * s, c)

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        s, heads = self.side, self.heads
        y = self.norm(x)
        y = self.windows(torch.roll(self.qkv(y) if self.early else y, (-1, -1), (1, 2)))
        y = y if self.early else self.qkv(y)
        q, k, v = y.reshape(-1, s * s, 3, heads, c // heads).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.table[self.index].view(s * s, s * s, heads).permute(2, 0, 1)
        scores = (q * (c // heads) ** -0.5) @ k.transpose(-2, -1) + bias.unsqueeze(0)
        scores = scores.view(-1, len(self.mask), heads, s * s, s * s) + self.mask[:, None]
        y = (scores.view(-1, heads, s * s, s * s).softmax(-1) @ v).transpose(1, 2).reshape(-1, s * s, c)
        y = self.proj(y).view(b, h // s, w // s, s, s, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        x = x + torch.roll(y, (1, 1), (1, 2))
        return x + self.feed(x)


@pytest.mark.parametrize("early", [False, True])
def test_shifted_windows(early: bool) -> None:
    """tp #490: Swin's windows, rolls, masks and position biases for every head."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.fc = nn.Conv2d(3, 16, 1), nn.Linear(16, 2)
            self.a, self.b = Window(16, 2, 4, 8, early), Window(16, 4, 2, 8, early)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.b(self.a(self.embed(x).permute(0, 2, 3, 1))).mean((1, 2)))

    net = Net()
    masks = {name: t.clone() for name, t in net.named_buffers()}
    model = filled(net)
    with torch.no_grad():
        for name, t in model.named_buffers():
            t.copy_(masks[name])
        for m in (model.a, model.b):
            m.feed[1].weight[:6] = 0
        for part in range(3):
            for head in range(2):  # one channel of the first head, two of the second: one of each can go
                at = [16 * part + 8 * head + 2 + i for i in range(head + 1)]
                model.a.qkv.weight[at] = model.a.qkv.bias[at, None] = 0
    small = compacted(model, maps(2), maps(3))
    assert weight(small, "a.feed.1") == weight(small, "b.feed.1") == (14, 16)
    assert weight(small, "a.qkv") == (42, 16) and weight(small, "a.proj") == (16, 14)
    assert small.report.whole == {}


@pytest.mark.parametrize("multiplier", [1, 2])
def test_depthwise_convolutions(multiplier: int) -> None:
    """tp #179, #328: their filters follow the channels that they read, and the channels their filters."""
    model = filled(
        nn.Sequential(
            nn.Conv2d(3, 8, 1), nn.ReLU(),
            nn.Conv2d(8, 8 * multiplier, 3, groups=8), nn.ReLU(),
            nn.Conv2d(8 * multiplier, 4, 1), nn.Flatten(),
        )
    )  # fmt: skip
    m = multiplier
    with torch.no_grad():
        model[0].weight[[1, 6]] = 0
        model[0].bias[[1, 6]] = -1
        model[2].bias[[m, 7 * m - 1]] = -1
        model[2].weight[[3 * m, 4 * m]] = 0
        model[2].weight[4 * m : 5 * m] = 0
        model[4].weight[:, 5 * m] = 0  # read by nobody
    small = compacted(model, maps(2), maps(3))
    # With two filters a channel, those of which only one is left keep both.
    gone = {1, 3, 4, 5, 6} if m == 1 else {1, 4, 6}
    depthwise = small.get_submodule("2")
    assert (depthwise.in_channels, depthwise.groups) == (8 - len(gone), 8 - len(gone))
    assert depthwise.out_channels == (8 - len(gone)) * m


def test_conv_groups_that_lose_different_numbers_of_channels() -> None:
    """tp #179, #328: what is left of the conv groups has to be of one size."""
    model = filled(
        nn.Sequential(
            nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 24, 3, groups=4), nn.ReLU(), nn.Conv2d(24, 4, 1), nn.Flatten()
        )
    )
    with torch.no_grad():
        for group, (ins, outs) in enumerate([(1, 4), (3, 2), (0, 0), (2, 3)]):  # as many are left, were each alone
            model[0].weight[4 * group + ins : 4 * group + 4] = 0
            model[2].weight[6 * group + outs : 6 * group + 6] = 0
    small = compacted(model, maps(2), maps(3))
    grouped = small.get_submodule("2")
    assert (grouped.in_channels, grouped.groups, grouped.out_channels) == (3 * 3, 3, 3 * 4)


@pytest.mark.parametrize("aligned", [True, False])
def test_conv_groups_behind_a_shuffle(aligned: bool) -> None:
    """tp #179: ShuffleNet. What is left of a shuffle is in another order, in which the next layer's groups may not be
    one piece each."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1, groups=1), nn.Conv2d(8, 6, 3, groups=2)
            self.fc = nn.Conv2d(6, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.a(x))
            b, c, h, w = x.shape
            x = x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)
            return self.fc(self.b(x)).flatten(1)

    model = filled(Net())
    with torch.no_grad():
        model.a.weight[[1, 3, 4, 6] if aligned else [2, 3, 4, 5]] = 0
    small = compacted(model, maps(2), maps(3))
    assert weight(small, "b") == ((6, 2, 3, 3) if aligned else (6, 4, 3, 3))


def test_a_module_called_many_times() -> None:
    """nni #4664: a layer that is shared is cut once, to what any of its calls needs."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)
            self.large, self.small = nn.Conv2d(8, 2, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.a(x))
            y = self.head(F.relu(self.head(x)))
            return torch.cat([self.large(y).flatten(1), self.small(self.head(F.max_pool2d(x, 2))).flatten(1)], 1)

    model = filled(Net())
    with torch.no_grad():
        model.a.weight[:3] = model.head.weight[:2] = 0
        model.a.bias[:3] = model.head.bias[:2] = -1
        model.head.weight[:, 4:6] = 0  # what reads its filters 4 and 5 is itself
        model.large.weight[:, [2, 4, 5]] = model.small.weight[:, [3, 4]] = 0  # of these only 4 is read by nobody
    small = compacted(model, maps(2), maps(3))
    assert weight(small, "head") == (5, 5, 1, 1) and "head" not in small.report.whole


def test_a_graph_that_is_a_loop() -> None:
    """nni #4664, tp #527: a layer that reads its own filters, by way of the stream that it adds to."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 1), nn.Conv2d(12, 8, 1)
            self.fc = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for _ in range(4):
                x = F.relu(x + self.b(F.relu(self.a(x))))
            return self.fc(x.mean((2, 3)))

    model = filled(Net())
    with torch.no_grad():
        model.stem.weight[[1, 2]] = model.stem.bias[[1, 2], None] = 0
        model.b.weight[[1, 2, 5]] = 0
        model.b.bias[[1, 2, 5]] = 0
        model.a.weight[[0, 7, 8]] = 0
        model.a.bias[[0, 7, 8]] = 0.5
    small = compacted(model, maps(2), maps(3))
    assert weight(small, "stem")[0] == 6 and weight(small, "fc") == (2, 6)
    assert weight(small, "a")[:2] == (9, 6) and weight(small, "b")[:2] == (6, 9)


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


@pytest.mark.parametrize("read", [True, False])
def test_a_shortcut_that_still_feeds_a_channel(read: bool) -> None:
    """tp #468: the last convolution of a block loses filters, or nobody reads what they are added to (not read), but
    the stream is read before."""

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
        if read:
            model.b.weight[:4] = 0
            model.stem.weight[0] = 0
        else:
            model.fc.weight[:, :4] = 0
            model.a.weight[:, 0] = 0
    small = compacted(model, maps(2), maps(3))
    assert small.b.out_channels == small.stem.out_channels == 7
    assert any("residual stream" in why for why in small.report.notes["b"])


class Bottleneck(nn.Module):
    """A block of ResNet-50, with a convolution in its shortcut where the stream changes."""

    def __init__(self, c: int, inner: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.a, self.an = nn.Conv2d(c, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.b, self.bn = nn.Conv2d(inner, inner, 3, stride, 1, bias=False), nn.BatchNorm2d(inner)
        self.c, self.cn = nn.Conv2d(inner, out, 1, bias=False), nn.BatchNorm2d(out)
        down = nn.Sequential(nn.Conv2d(c, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        self.down = nn.Identity() if c == out and stride == 1 else down

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn(self.b(F.relu(self.an(self.a(x))))))
        return F.relu(self.down(x) + self.cn(self.c(y)))


def test_bottlenecks_lose_no_accuracy() -> None:
    """tp #347: ResNet-50 was worse after compaction than its weights are. Everything that its blocks do to a filter at
    zero: what BatchNorm leaves of it goes on into the border of a 3x3, into the stream and on through all blocks that
    add to it, through a stride and into the classifier; and of the stream a channel goes only from all at once."""
    c = 16
    stages = [Bottleneck(8, 6, c), Bottleneck(c, 6, c), Bottleneck(c, 6, c)]
    stages += [Bottleneck(c, 8, 2 * c, 2), Bottleneck(2 * c, 8, 2 * c)]
    stem = [nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    model = nn.Sequential(*stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * c, 10))
    randomise(model.double(), 0.0, 0).eval()
    first, second = stages[:3], stages[3:]
    with torch.no_grad():
        for n, m in enumerate(stages):
            m.a.weight[:2] = m.b.weight[2:4] = 0
            m.an.bias[:2] = torch.tensor([-4.0, 1.0])  # 0 after the activation, and not
            m.bn.bias[2:4] = 0.7
            m.c.weight[[n, n + 1, n + 4]] = 0  # a stream does without few of these
        for stage, gone in ((first, [9, 12]), (second, [8, 9, 20])):
            stage[0].down[0].weight[gone] = 0
            for m in stage:
                m.c.weight[gone] = 0
    small = compacted(model, maps(2, 3, 32), maps(16, 3, 32))
    x = maps(64, 3, 32)
    with torch.no_grad():
        assert torch.equal(model(x).argmax(1), small(x).argmax(1))
    for i in range(4, 9):
        # The constant that is not 0 stays for the border; what the next 1x1 convolution reads goes into its BatchNorm.
        assert weight(small, f"{i}.b")[:2] == ((4, 5) if i < 7 else (6, 7))
        assert weight(small, f"{i}.c")[:2] == ((14, 4) if i < 7 else (29, 6))
    assert weight(small, "7.down.0")[:2] == (29, 14) and weight(small, "11") == (10, 29)


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
