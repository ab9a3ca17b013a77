"""Plans against torch: random networks of every node that a segment holds, batches, threads, layouts, dtypes.

What is random comes from a seed that the test's name shows. f32 tolerance: both sides sum the same products in another
order, so outputs differ by a few roundings per layer relative to the largest magnitude of the tensor (1e-4 of it leaves
room for 2000-term sums over a dozen layers). bf16 keeps 8 bits per value, and errors of layers add up like a walk.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import structadmm as sa
from structadmm import _core, container
from structadmm.trace import trace

ACTIVATIONS = [nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish, nn.Sigmoid, nn.Tanh, nn.LeakyReLU, nn.Identity]


class ConvBlock(nn.Module):
    """Convolution, BatchNorm, activation, in which some columns, filters or single weights are zero."""

    def __init__(self, r: random.Random, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        k = r.choice([1, 1, 3, 3, 3, 5])
        dilation = r.choice([1, 1, 2])
        groups = r.choice([g for g in (1, 1, 2, 4, inputs) if inputs % g == 0 and outputs % g == 0])
        padding = r.choice([dilation * (k - 1) // 2] * 3 + [k - 1])
        self.conv = nn.Conv2d(inputs, outputs, k, stride, padding, dilation, groups, bias=r.random() < 0.5)
        self.norm = nn.BatchNorm2d(outputs) if r.random() < 0.7 else nn.Identity()
        self.act = r.choice(ACTIVATIONS)()
        with torch.no_grad():
            w = self.conv.weight
            how = r.choice(["dense", "column", "block", "filter", "element"])
            if how == "column":
                w *= torch.rand(1, *w.shape[1:]) < 0.4
            elif how == "block":
                w *= (torch.rand(-(-outputs // 8), *w.shape[1:]) < 0.4).repeat_interleave(8, 0)[:outputs]
            elif how == "filter":
                w *= torch.rand(outputs, 1, 1, 1) < 0.5
            elif how == "element":
                w *= torch.rand_like(w) < 0.2

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class Residual(nn.Module):
    def __init__(self, r: random.Random, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.relu_after = r.random() < 0.7

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x)) + x
        return F.relu(y) if self.relu_after else y


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.down = nn.Conv2d(channels, max(1, channels // 4), 1)
        self.up = nn.Conv2d(max(1, channels // 4), channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(F.relu(self.down(self.pool(x)))))


class Concat(nn.Module):
    def __init__(self, r: random.Random, channels: int, more: int) -> None:
        super().__init__()
        self.a = nn.Conv2d(channels, more, 3, padding=1)
        self.b = nn.Conv2d(channels, more, 1)
        self.keeps = r.random() < 0.5

    def forward(self, x: Tensor) -> Tensor:
        a, b = F.relu(self.a(x)), self.b(x)
        return torch.cat([x, a, b] if self.keeps else [a, b], 1)


class Net(nn.Module):
    """A random chain of blocks, and one of three heads."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        r = random.Random(seed)
        torch.manual_seed(seed)
        self.size = r.choice([(7, 7), (8, 8), (9, 13), (14, 14), (16, 16), (33, 20)])
        self.inputs = channels = r.choice([1, 3, 8])
        blocks: list[nn.Module] = []
        for _ in range(r.randint(2, 5)):
            kind = r.choice(["conv", "conv", "stride", "residual", "excite", "concat", "pool", "act"])
            if kind in ("conv", "stride"):
                outputs = r.choice([4, 8, 12, 16, 24, 40])
                blocks.append(ConvBlock(r, channels, outputs, 2 if kind == "stride" else 1))
                channels = outputs
            elif kind == "residual":
                blocks.append(Residual(r, channels))
            elif kind == "excite":
                blocks.append(SqueezeExcite(channels))
            elif kind == "concat":
                more = r.choice([4, 6, 16])
                blocks.append(Concat(r, channels, more))
                channels = (channels if blocks[-1].keeps else 0) + 2 * more
            elif kind == "pool":
                pools = [
                    nn.MaxPool2d(2, 1),
                    nn.MaxPool2d(3, 2, 1),
                    nn.AvgPool2d(2, 1),
                    nn.AvgPool2d(3, 2, 1, count_include_pad=r.random() < 0.5),
                    nn.MaxPool2d(3, 2, 1, ceil_mode=True),
                ]
                blocks.append(r.choice(pools))
            else:
                blocks.append(r.choice(ACTIVATIONS)())
        self.blocks = nn.Sequential(*blocks)
        self.head = r.choice(["map", "mean", "flat"])
        features = channels
        if self.head == "flat":
            with torch.no_grad():
                features = self.blocks.eval()(torch.zeros(1, self.inputs, *self.size)).flatten(1).shape[1]
        self.fc = nn.Linear(features, 10)
        for m in self.modules():
            if isinstance(m, nn.BatchNorm2d):
                nn.init.uniform_(m.running_mean, -0.5, 0.5)
                nn.init.uniform_(m.running_var, 0.5, 2.0)
                nn.init.uniform_(m.weight, 0.5, 1.5)
                nn.init.uniform_(m.bias, -0.5, 0.5)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(x)
        if self.head == "map":
            return x
        x = x.mean((2, 3)) if self.head == "mean" else torch.flatten(x, 1)
        return self.fc(x)

    def example(self, batch: int) -> Tensor:
        return torch.randn(batch, self.inputs, *self.size)


def engine(net: nn.Module, x: Tensor, dtype: str = "float32") -> sa.Engine:
    return sa.Engine(container.to_bytes(trace(net, x).module), dtype=dtype)


def close(got: np.ndarray, want: np.ndarray, share: float) -> None:
    assert got.shape == want.shape and got.dtype == want.dtype
    np.testing.assert_allclose(got, want, rtol=0, atol=share * max(1e-3, float(np.abs(want).max())))


@pytest.mark.parametrize("seed", range(60))
def test_random_networks(seed: int) -> None:
    net = Net(seed)
    x = net.example(5)
    e = engine(net, x)
    with torch.no_grad():
        want = net(x).numpy()
    got = e.run(x.numpy())
    close(got, want, 1e-4)
    last = x.contiguous(memory_format=torch.channels_last).numpy()
    np.testing.assert_array_equal(e.run(last), got)
    for batch in (1, 2, 3):
        np.testing.assert_array_equal(e.run(x[:batch].numpy()), got[:batch], err_msg=f"batch {batch}")
    threads = _core.get_num_threads()
    try:
        for n in (1, 2, 3):
            _core.set_num_threads(n)
            np.testing.assert_array_equal(e.run(x.numpy()), got, err_msg=f"{n} threads")
    finally:
        _core.set_num_threads(threads)


@pytest.mark.parametrize("seed", range(0, 60, 3))
def test_random_networks_in_bf16(seed: int) -> None:
    net = Net(seed)
    x = net.example(3)
    with torch.no_grad():
        want = net(x).numpy()
    e = engine(net, x, dtype="bfloat16")
    got = e.run(x.numpy())
    close(got, want, 0.05)
    np.testing.assert_array_equal(e.run(x[1:2].numpy()), got[1:2])


@pytest.mark.parametrize("isa", _core.supported_isas())
@pytest.mark.parametrize("seed", [0, 7, 11])
def test_every_isa(seed: int, isa: str) -> None:
    net = Net(seed)
    x = net.example(2)
    with torch.no_grad():
        want = net(x).numpy()
    _core.set_isa(isa)
    try:
        close(engine(net, x).run(x.numpy()), want, 1e-4)
        close(engine(net, x, dtype="bfloat16").run(x.numpy()), want, 0.05)
    finally:
        _core.set_isa("")


@pytest.mark.parametrize("l2", [256 << 10, 512 << 10, 2 << 20])
def test_large_batches_go_in_chunks(l2: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More images than fit the caches at a time: several stages, chunks not full, uneven shares per thread. On an L2 of
    512 KB one stage took the whole batch while another had a chunk to spare, and its planes were taken for too small.
    """
    monkeypatch.setenv("STRUCTADMM_L2_BYTES", str(l2))
    torch.manual_seed(0)
    small = [layer for _ in range(5) for layer in (nn.Conv2d(256, 256, 3, padding=1), nn.ReLU())]
    net = nn.Sequential(
        *(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, 2, 1), nn.Conv2d(64, 256, 3, 4, 1), *small),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10)),
    ).eval()
    x = torch.randn(13, 3, 64, 64)
    e = engine(net, x)
    with torch.no_grad():
        want = net(x).numpy()
    threads = _core.get_num_threads()
    try:
        for n in (1, 2, 4):
            _core.set_num_threads(n)
            for batch in (13, 7, 1):
                close(e.run(x[:batch].numpy()), want[:batch], 1e-4)
    finally:
        _core.set_num_threads(threads)
    assert len({row["images"] for row in e.describe(tuple(x.shape))}) > 1


def test_layers_without_weights_do_not_make_their_neighbours_read_theirs_for_every_image(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nine megabytes of weights a layer on maps of 4 x 4, behind large maps with few: those go image by image."""
    monkeypatch.setenv("STRUCTADMM_L2_BYTES", str(512 << 10))
    torch.manual_seed(0)
    early = [nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.MaxPool2d(8)]
    late = [nn.Conv2d(32, 512, 3, padding=1), nn.MaxPool2d(3, 1, 1), nn.Conv2d(512, 512, 3, padding=1)]
    net = nn.Sequential(*early, *late, nn.MaxPool2d(3, 1, 1), nn.Conv2d(512, 512, 3, padding=1)).eval()
    x = torch.randn(16, 3, 32, 32)
    e = engine(net, x)
    images = {s["node"]: s["images"] for s in e.describe(tuple(x.shape))}
    assert images["2"] == 1 and images["6"] >= 8 and images["8"] >= 8, images
    with torch.no_grad():
        close(e.run(x.numpy()), net(x).numpy(), 1e-4)


class Bottlenecks(nn.Module):
    """Values without a halo, `wide` channels each, that are added to narrow branches; `again`: one of them twice."""

    def __init__(self, wide: int, again: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, wide, 1)
        self.narrow = nn.ModuleList(nn.Conv2d(wide, 8, 1) for _ in range(3))
        self.widen = nn.ModuleList(nn.Conv2d(8, wide, 1) for _ in range(3))
        self.last = nn.Conv2d(wide, 4, 1)
        self.again = again

    def forward(self, x: Tensor) -> Tensor:
        x = first = torch.relu(self.stem(x))
        for narrow, widen in zip(self.narrow, self.widen, strict=True):
            x = torch.relu(widen(torch.relu(narrow(x))) + x)
        return self.last(x + first if self.again else x)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("again", [False, True])
def test_a_residual_is_overwritten_where_it_was_read_for_the_last_time(again: bool, dtype: str) -> None:
    net = Bottlenecks(64, again).eval()
    x = torch.randn(1, 3, 24, 24)
    wide = 64 * 24 * 24 * (4 if dtype == "float32" else 2)
    # One wide value and the narrow ones beside it (and what is kept until it is read again), not two in turns.
    places = engine(net, x, dtype)._core.arena_bytes([list(x.shape)]) / wide
    assert (2 if again else 1) < places < (2.5 if again else 1.5)


class Neighbours(nn.Module):
    """Values without a halo that a depthwise and a 3x3 convolution (by Winograd's algorithm where that pays) add."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.start, self.beside = nn.Conv2d(3, channels, 1), nn.Conv2d(3, channels, 1)
        self.depthwise = nn.Conv2d(channels, channels, 3, 1, 1, groups=channels)
        self.square = nn.Conv2d(channels, channels, 3, 1, 1)
        self.last = nn.Conv2d(channels, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        beside = torch.relu(self.beside(x))
        y = torch.relu(self.depthwise(beside) + torch.relu(self.start(x)))
        return self.last(torch.relu(self.square(beside) + y))


@pytest.mark.parametrize("isa", _core.supported_isas())
@pytest.mark.parametrize("kind", ["taps", "single weights", "neighbours"])
@pytest.mark.parametrize("size", [(24, 24), (13, 11), (4, 4), (1, 1)])
def test_residuals_in_place(size: tuple[int, int], kind: str, isa: str) -> None:
    """By taps, by single weights (where most are zero), by linear layers (maps of one pixel), depthwise and 3x3."""
    torch.manual_seed(0)
    net: Any = Neighbours(68) if kind == "neighbours" else Bottlenecks(68, True)
    net.eval()
    with torch.no_grad():
        if kind == "single weights":
            for conv in (*net.narrow, *net.widen):
                conv.weight[torch.rand_like(conv.weight) < 0.9] = 0
        x = torch.randn(5, 3, *size)
        want = net(x).numpy()
    threads = _core.get_num_threads()
    _core.set_isa(isa)
    try:
        for dtype, share in (("float32", 1e-4), ("bfloat16", 0.05)):
            e = engine(net, x, dtype)
            _core.set_num_threads(1)
            got = e.run(x.numpy())
            close(got, want, share)
            for n in (1, 2, 3):
                _core.set_num_threads(n)
                for batch in (1, 5):
                    np.testing.assert_array_equal(e.run(x[:batch].numpy()), got[:batch])
    finally:
        _core.set_num_threads(threads)
        _core.set_isa("")


@pytest.mark.parametrize("isa", _core.supported_isas())
def test_bf16_convolutions_take_the_callers_f32(isa: str) -> None:
    """No step before the convolution nor behind it, where the instruction set has products of bf16; the same numbers as
    from a network whose values pass through an import and an export."""
    torch.manual_seed(0)
    conv = nn.Conv2d(12, 40, 3, padding=1).eval()
    with torch.no_grad():
        conv.weight *= torch.rand(1, 12, 3, 3) < 0.3
    net = nn.Sequential(conv)
    x = torch.randn(6, 12, 11, 13)
    e = sa.Engine(container.to_bytes(trace(net, x).module), dtype="bfloat16", isa=isa)
    want = F.conv2d(x.bfloat16().float(), conv.weight.bfloat16().float(), conv.bias, padding=1).detach().numpy()
    for batch in (1, 4, 6):
        steps = [s["kernel"] for s in e.describe((batch, 12, 11, 13))]
        assert len(steps) == (1 if isa.endswith("_bf16") else 2), steps
        close(e.run(x[:batch].numpy()), want[:batch], 1e-5)  # sums as they are, of operands that are rounded once
    # The channels of another tensor, rows with gaps between them, and the last bytes of what may be read.
    wide = torch.randn(6, 20, 11, 13)
    wide[:, 5:17] = x
    gaps = torch.randn(6, 12, 11, 16)
    gaps[..., :13] = x
    swapped = x.transpose(0, 1).contiguous().transpose(0, 1)
    for view in (wide[:, 5:17], gaps[..., :13], x.to(memory_format=torch.channels_last), swapped):
        np.testing.assert_array_equal(e.run(view.numpy()), e.run(x.numpy()))
    for same in (x[:1].expand(5, -1, -1, -1), x[:, :1].expand(-1, 12, -1, -1)):
        np.testing.assert_array_equal(e.run(same.numpy()), e.run(same.contiguous().numpy()))


@pytest.mark.parametrize("core", ["intel", "zen4", "zen5"])
@pytest.mark.parametrize("isa", _core.supported_isas())
def test_f32_convolutions_take_the_callers_edges(isa: str, core: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a map of few taps there is no padded copy where an image goes at a time: in AVX2 for one image, in AVX-512 for
    any batch that does not fit L2."""
    monkeypatch.setenv("STRUCTADMM_AVX512_CORE", core)
    monkeypatch.setenv("STRUCTADMM_L2_BYTES", str(256 << 10))
    torch.manual_seed(0)
    conv = nn.Conv2d(192, 128, 3, padding=1).eval()
    with torch.no_grad():
        conv.weight *= torch.rand(1, 192, 3, 3) < 0.08
    x = torch.randn(5, 192, 13, 13)
    net = nn.Sequential(sa.nn.CompactConv2d.from_dense(conv, block=128))
    e = sa.Engine(container.to_bytes(trace(net, x).module), isa=isa)
    with torch.no_grad():
        want = conv(x).numpy()
    assert e.run(x[:0].numpy()).shape == (0, 128, 13, 13)
    for batch in (1, 2, 5):
        steps = [s["kernel"] for s in e.describe((batch, 192, 13, 13))]
        direct = isa.startswith(("avx512", "amx")) or (isa == "avx2" and batch == 1)
        assert len(steps) == (1 if direct else 2), steps
        close(e.run(x[:batch].numpy()), want[:batch], 1e-5)
    assert all(s["images"] == 1 for s in e.describe((5, 192, 13, 13)))


def test_bf16_imports_leave_out_channels_that_nothing_reads() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(64, 32, 3, stride=2, padding=1).eval()
    with torch.no_grad():
        conv.weight[:, 3:] = 0
    net = nn.Sequential(sa.nn.CompactConv2d.from_dense(conv))
    x = torch.randn(2, 64, 16, 16)
    x[:, 3:] = torch.nan
    want = F.conv2d(x[:, :3].bfloat16().float(), conv.weight[:, :3].bfloat16().float(), conv.bias, 2, 1).detach()
    close(engine(net, x, dtype="bfloat16").run(x.numpy()), want.numpy(), 0.01)


def test_several_callers_at_once() -> None:
    from concurrent.futures import ThreadPoolExecutor

    net = Net(3)
    xs = [net.example(b) for b in (1, 2, 3, 4) for _ in range(4)]
    e = engine(net, xs[0])
    want = [e.run(x.numpy()) for x in xs]
    with ThreadPoolExecutor(4) as pool:
        for got, w in zip(pool.map(lambda x: e.run(x.numpy()), xs), want, strict=True):
            np.testing.assert_array_equal(got, w)


def test_bad_inputs_are_errors_that_name_what_was_got() -> None:
    net = Net(0)
    x = net.example(2)
    e = engine(net, x)
    for bad in (x[0].numpy(), x.double().numpy(), torch.cat([x, x], 1).numpy()):
        with pytest.raises(ValueError, match="got"):
            e.run(bad)
    with pytest.raises(ValueError, match="inputs got"):
        e.run(x.numpy(), x.numpy())
    assert e.run(x[:0].numpy()).shape[0] == 0


class Scattered(nn.Module):
    """Residual blocks of single weights over maps of several sizes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.first = nn.ModuleList([nn.Conv2d(16, 16, 3, padding=1) for _ in range(4)])
        self.down = nn.Conv2d(16, 24, 3, 2, 1)
        self.short = nn.Conv2d(16, 24, 1, 2)
        self.last = nn.ModuleList([nn.Conv2d(24, 24, 3, padding=1) for _ in range(4)])
        with torch.no_grad():
            for conv in (*self.first, self.down, self.short, *self.last):
                conv.weight *= torch.rand_like(conv.weight) < 0.2
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for a, b in (self.first[:2], self.first[2:]):
            x = F.relu(x + b(F.relu(a(x))))
        x = F.relu(self.down(x) + self.short(x))
        for a, b in (self.last[:2], self.last[2:]):
            x = F.relu(x + b(F.relu(a(x))))
        return x


@pytest.mark.parametrize("isa", [isa for isa in ("scalar", "avx2", "avx512") if isa in _core.supported_isas()])
@pytest.mark.parametrize("size", [(16, 16), (8, 8), (12, 20), (14, 14), (9, 7)])
def test_single_weights_keep_values_in_lanes(isa: str, size: tuple[int, int]) -> None:
    net = Scattered()
    x = torch.randn(33, 3, *size)
    e = sa.Engine(container.to_bytes(trace(net, x).module), isa=isa)
    with torch.no_grad():
        want = net(x).numpy()
    got = e.run(x.numpy())
    close(got, want, 1e-4)
    for batch in (1, 2, 3, 5, 16):
        np.testing.assert_array_equal(e.run(x[:batch].numpy()), got[:batch], err_msg=f"batch {batch}")
    for batch in (1, 16):
        kernels = [s["kernel"] for s in e.describe((batch, 3, *size))]
        inner = [k for k in kernels if "_xy__" in k]
        assert all("__" + isa in k for k in inner)
        if size == (16, 16):  # grids divide the maps
            assert len(inner) >= 6, kernels


class Wide(nn.Module):
    """Outputs of many filters over few channels: of one convolution, or the sum of two, clamped on both sides."""

    def __init__(self, adds: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(6, 250, 3, 2, 1), nn.Conv2d(6, 250, 3, 2, 1)
        self.adds = adds

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x))
        return F.relu6(self.second(x) + y) if self.adds else y


class Pointwise(nn.Module):
    """Outputs of many filters of 1x1 convolutions, which panels read from the planes, and a sum of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(40, 20, 1), nn.Conv2d(40, 20, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu6(self.second(x) + torch.relu(self.first(x)))


@pytest.mark.parametrize("size", [(512, 512), (511, 513), (516, 517)])  # with a few pixels that fill no vector
def test_outputs_that_caches_do_not_keep_from_the_planes(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    net, x = Pointwise().eval(), torch.randn(1, 40, *size)
    with torch.no_grad():
        want = net(x)
    assert want.numel() * 4 > 16 << 20
    e = engine(net, x)
    if _core.isa() not in ("scalar", "avx2"):
        assert "planes" in e.describe(tuple(x.shape))[-1]["kernel"]
    close(e.run(x.numpy()), want.numpy(), 1e-4)
    fast = sa.optimize(net, x, budget=0.0, report=False)
    threads = torch.get_num_threads()
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            assert np.array_equal(fast(x).numpy(), e.run(x.numpy()))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("size", [(264, 264), (261, 265)])
def test_outputs_that_caches_do_not_keep(size: tuple[int, int], adds: bool) -> None:
    """More than 16 MiB: where filters lie whole lines apart, AVX-512's panel kernel writes them past the caches.
    torch's memory begins at a line, NumPy's elsewhere.
    """
    torch.manual_seed(0)
    net = Wide(adds).eval()
    x = torch.randn(1, 6, *size)
    with torch.no_grad():
        want = net(x)
    assert want.numel() * 4 > 16 << 20
    e = engine(net, x)
    if _core.isa() not in ("scalar", "avx2"):
        assert "panel" in e.describe(tuple(x.shape))[-1]["kernel"]
    got = e.run(x.numpy())
    close(got, want.numpy(), 1e-4)
    fast = sa.optimize(net, x, budget=0.0, report=False)
    threads = torch.get_num_threads()
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            assert np.array_equal(fast(x).numpy(), got)
    finally:
        torch.set_num_threads(threads)
