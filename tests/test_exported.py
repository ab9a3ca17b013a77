"""torch.export as a front end: what it follows, what its graphs say, and that it agrees with torch.fx's tracers."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import importlib.util
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import structadmm as sa
from networks import VGG, MoreInTraining, ResNet, random_chain, randomise
from random_graphs import RandomNet, zero_at_random
from structadmm import exported
from structadmm.errors import TraceError
from structadmm.trace import tensors_in, trace

sys.path.insert(1, str(Path(__file__).resolve().parent.parent / "bench"))


class Base(nn.Module):
    """A convolution of 8 filters, three of which are constant, and what follows it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.b, self.fc = nn.Conv2d(8, 6, 3), nn.Linear(6, 4)
        with torch.no_grad():
            for i in (1, 3, 6):
                self.a.weight[i] = 0
                self.a.bias[i] = 0
            self.b.weight[2] = 0

    def head(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.a(x)))

    def tail(self, y: Tensor) -> Tensor:
        return self.fc(self.b(y).relu().mean((2, 3)))


class Checked(Base):
    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError("no tensor")
        return self.tail(self.head(x))


class Forwarded(Base):
    def forward(self, *args: Tensor, **options: float) -> Tensor:
        return self.scaled(*args, **options)

    def scaled(self, x: Tensor, scale: float = 0.5) -> Tensor:
        return self.tail(self.head(x) * scale)


def of_tensors(function: Any) -> Any:
    @functools.wraps(function)
    def wrapped(*args: Any) -> Any:
        assert all(isinstance(a, Tensor) for a in args[1:])
        return function(*args)

    return wrapped


class Wrapped(Base):
    @of_tensors
    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.head(x))


@functools.singledispatch
def activated(value: Any) -> Any:
    raise TypeError(type(value))


@activated.register
def _(value: Tensor) -> Tensor:
    return value.relu()


@activated.register
def _(value: list) -> list:  # type: ignore[type-arg]
    return [activated(v) for v in value]


class Dispatched(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.tail(sum(activated([self.norm(self.a(x)), self.norm(self.a(x))])))


@dataclasses.dataclass
class Out:
    logits: Tensor
    maps: tuple[Tensor, ...] = ()


class Stated(Base):
    """A class for the output, and state that forward leaves behind."""

    def forward(self, x: Tensor) -> Out:
        assert isinstance(x, Tensor)
        y = self.head(x)
        return Out(self.tail(y), (y.mean((2, 3)),))


FOLLOWED = [Checked, Forwarded, Wrapped, Dispatched, Stated]


def results(model: nn.Module, x: Tensor) -> list[Tensor]:
    out = model(x)
    return [out.logits, *out.maps] if isinstance(out, Out) else tensors_in(out)


@pytest.mark.parametrize("make", FOLLOWED, ids=lambda c: c.__name__)
def test_what_only_export_follows_is_compacted_and_trains(make: type[Base]) -> None:
    torch.manual_seed(0)
    model = make().eval()
    x = torch.randn(2, 3, 12, 12)
    for via in ("fx", "shapes"):
        with pytest.raises(TraceError):
            trace(model, x, via=via)
    small = sa.compact(model, x, columns="never")
    assert small.report.max_abs_diff is not None and small.report.max_abs_diff < 1e-5  # ten roundings of values below 1
    shapes = {r.name: r.shape_after[:2] for r in small.report.layers if r.shape_after is not None}
    whole = make is Stated  # its output holds the channels of the first layer
    assert shapes == {"a": (8 if whole else 5, 3), "b": (5, 8 if whole else 5), "fc": (4, 5)}
    for network in (small, copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        network.eval()
        x = torch.randn(7, 3, 12, 12)
        for a, b in zip(results(model, x), results(network, x), strict=True):
            assert torch.allclose(a, b, atol=1e-5)
        network.train()
        before = {n: p.detach().clone() for n, p in network.named_parameters()}
        optimizer = torch.optim.SGD(network.parameters(), 0.1)
        sum(t.square().mean() for t in results(network, x)).backward()  # type: ignore[union-attr]
        optimizer.step()
        for name in ("a.weight", "norm.weight", "b.weight", "fc.weight"):
            assert not torch.equal(before[name], network.get_parameter(name)), name
        assert network.get_buffer("norm.num_batches_tracked") > 0


class Applied(nn.Module):
    """A function of a tensor behind a convolution, in a module, so that the graph has layers."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.conv, self.function = nn.Conv2d(3, 8, 3, padding=1), function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.conv(x))


def masked(y: Tensor) -> Tensor:
    mask = y.new_zeros(6, 6)
    mask[:3, 1:] = 2
    mask[1].add_(1)
    return y + mask * torch.arange(6)


def overwritten(y: Tensor) -> Tensor:
    y = y + 0
    y[:, 1, 2:] = 3
    y[..., 0] += y[..., 1]
    y[:, 2:4].mul_(2)
    y.clamp_(min=-1)
    return F.relu_(y)


def indexed(y: Tensor) -> Tensor:
    y = y.clone()
    y[:, torch.tensor([0, 3])] = 1.0
    return y[:, [1, 2, 0]]


OPERATIONS: dict[str, Any] = {
    "arithmetic": lambda y: (2 - y) / 3 + y * y - torch.add(y, y, alpha=2) ** 2,
    "division": lambda y: torch.div(y, 0.3, rounding_mode="floor") + y // 2 + y % 3,
    "activations": lambda y: F.relu6(F.gelu(F.silu(y), approximate="tanh")) + F.logsigmoid(F.hardswish(y)) + F.selu(y),
    "more activations": lambda y: (
        F.leaky_relu(y, 0.2) + F.elu(y, 0.5) + F.hardtanh(y, -2, 2) + F.softplus(y) + F.mish(y)
    ),
    "glu": lambda y: F.glu(y, 1),
    "pools": lambda y: (
        F.max_pool2d(y, 2) + F.avg_pool2d(y, 2) + F.adaptive_avg_pool2d(y, 3) + F.adaptive_max_pool2d(y, 3)
    ),
    "padded pools": lambda y: (
        F.avg_pool2d(y, 3, 2, 1, count_include_pad=False) + F.max_pool2d(y, 3, 2, 1, ceil_mode=True)[..., :3, :3]
    ),
    "indices": lambda y: F.max_pool2d(y, 2, return_indices=True),
    "resizing": lambda y: (
        F.interpolate(y, scale_factor=2) + F.interpolate(y, (12, 12), mode="bilinear", align_corners=True)
    ),
    "bicubic": lambda y: (
        F.interpolate(y, scale_factor=2, mode="bicubic") + F.interpolate(y, scale_factor=2, mode="nearest-exact")
    ),
    "pads": lambda y: F.pad(y, (1, 2, 0, 1), value=2.0)[..., 1:, :] + F.pad(y, (1, 2, 0, 0), mode="reflect"),
    "shapes": lambda y: (
        y.view(y.size(0), 2, 4, -1).permute(0, 2, 1, 3).flatten(1, 2).reshape(-1, 8, 6, 6).transpose(1, 3)
    ),
    "splits": lambda y: (y.split(3, 1), y.chunk(2, -1), y.unbind(2), torch.split(y, [1, 7], 1), y.tensor_split(3, 1)),
    "joins": lambda y: (torch.cat([y, y[:, :2]], 1), torch.stack((y, y), -1), torch.cat((y, y), dim=-2)),
    "slices": lambda y: y[:, 1:-1, ::2, 3] + y.select(1, 2)[:, None, ::2, 1] + y.narrow(1, 0, 1)[:, :, :3, -1],
    "squeezes": lambda y: y.unsqueeze(1).squeeze(1).mean(1, keepdim=True).squeeze(1).unflatten(1, (2, 3)),
    "expands": lambda y: (
        y.mean((2, 3), keepdim=True).expand(-1, -1, 6, 6) + y.mean(0).expand_as(y) + y.amax(1, True).repeat(1, 8, 1, 1)
    ),
    "sums": lambda y: (y.sum(), y.sum(1), y.mean(), y.std((1, 2)), y.norm(dim=1), y.argmax(1), y.cumsum(2), y.sort(1)),
    "products": lambda y: (y @ y.mT, torch.einsum("bchw,bdhw->bcd", y, y), torch.bmm(y.flatten(2), y.flatten(2).mT)),
    "attention": lambda y: (
        F.scaled_dot_product_attention(y, y * 2, y + 1, is_causal=True, scale=0.3).softmax(-1).log_softmax(1)
    ),
    "shuffles": lambda y: (
        F.pixel_shuffle(y, 2),
        F.pixel_unshuffle(y, 2),
        F.channel_shuffle(y, 4),
        y.roll(1, 2).flip(1),
    ),
    "types": lambda y: y.double().to(torch.float32).type_as(y).contiguous(memory_format=torch.channels_last),
    "choices": lambda y: (
        torch.where(y > 0, y, torch.zeros(())) + y.masked_fill(y < 0, 1.0) + torch.maximum(y, y.abs().neg())
    ),
    "sizes": lambda y: y.reshape(y.shape[0] * 2, -1).sum(1).view(y.size(0), 2) * y.shape[0] / y.shape[-1],
    "sizes as output": lambda y: {"rows": y.shape[0] * 2, "y": [y, None, "name", 3], "shape": y.shape},
    "factories": lambda y: (
        y + torch.ones(y.shape[0], 1, 1, 1) + torch.linspace(0, 1, 6) + torch.eye(6) + torch.tensor([2.0])
    ),
    "mask": masked,
    "overwritten": overwritten,
    "indexed": indexed,
    "normalise": lambda y: F.normalize(y, dim=1) + F.layer_norm(y, (6, 6)) + F.group_norm(y, 2) + F.instance_norm(y),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_say_the_same(name: str) -> None:
    torch.manual_seed(0)
    model = Applied(OPERATIONS[name]).eval()
    traced = trace(model, torch.randn(2, 3, 6, 6), via="export")
    assert not any("training" in note for note in traced.notes), "the modes say the same"
    for batch in (2, 5):
        x = torch.randn(batch, 3, 6, 6)
        a, b = model(x), traced.module.eval()(x)
        for one, other in zip(tensors_in(a), tensors_in(b), strict=True):
            assert torch.equal(one, other)  # the same kernels in the same order
        if isinstance(a, dict):
            assert b["rows"] == 2 * batch and b["y"][1:] == [None, "name", 3] and b["shape"] == tuple(a["shape"])


def targets(graph: fx.Graph, op: str) -> list[str]:
    return [str(n.target) for n in graph.nodes if n.op == op]


def test_layers_keep_their_places() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.randn(1, 1, 6))
            self.embed, self.rms, self.norm = nn.Embedding(7, 6), nn.RMSNorm(6), nn.LayerNorm(6)
            self.prelu, self.up = nn.PReLU(4), nn.ConvTranspose1d(4, 4, 3, 2, output_padding=1)
            self.group, self.instance = nn.GroupNorm(2, 4), nn.InstanceNorm1d(4, affine=True)
            self.circular = nn.Conv1d(6, 4, 3, padding=1, padding_mode="circular")
            self.drops = nn.Sequential(nn.Dropout(0.1), nn.Dropout1d(0.2))
            self.shared, self.tied = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
            self.tied.weight = self.shared.weight
            self.used = nn.Linear(6, 6)

        def forward(self, i: Tensor) -> Tensor:
            x = self.rms(self.embed(i)) + self.token
            x = self.norm(self.shared(self.tied(self.shared(x))))
            x = F.linear(x, self.used.weight, self.used.bias)
            x = self.instance(self.group(self.prelu(self.circular(x.mT))))
            return self.up(self.drops(F.dropout(x, 0.3, self.training)))

    model = Net().eval()
    traced = trace(model, torch.randint(7, (2, 5)), via="export")
    calls = targets(traced.module.graph, "call_module")
    assert calls[:6] == ["embed", "rms", "shared", "tied", "shared", "norm"]
    assert calls[6:11] == ["used", "circular", "prelu", "group", "instance"]
    assert calls[11:] == ["dropout_0", "drops.0", "drops.1", "up"]
    assert targets(traced.module.graph, "get_attr") == ["token"]
    assert traced.module.get_submodule("shared").weight is traced.module.get_submodule("tied").weight
    dropped = traced.module.get_submodule("dropout_0")
    assert isinstance(dropped, nn.Dropout) and dropped.p == 0.3
    i = torch.randint(7, (4, 5))
    assert torch.equal(model(i), traced.module(i))


def test_training_is_that_of_the_model() -> None:
    class Depth(nn.Module):
        """Stochastic depth, which keeps everything here; it counts what it saw in training."""

        def __init__(self) -> None:
            super().__init__()
            self.seen = 0

        def forward(self, x: Tensor) -> Tensor:
            if not self.training:
                return x
            self.seen += 1
            return x * 2

    class Net(Base):
        def __init__(self) -> None:
            super().__init__()
            self.depth = Depth()

        def forward(self, x: Tensor) -> Tensor:
            return self.tail(self.depth(self.head(x)))

    torch.manual_seed(0)
    model = Net().train()
    traced = trace(model, torch.randn(2, 3, 8, 8), via="export").module
    x = torch.randn(4, 3, 8, 8)
    a, b = model(x), traced(x)
    assert torch.equal(a, b) and traced.depth.seen == 1
    for name, value in model.named_buffers():
        assert torch.equal(value, traced.get_buffer(name)), name
    a.square().sum().backward()
    b.square().sum().backward()
    for name, p in model.named_parameters():
        assert torch.equal(p.grad, traced.get_parameter(name).grad), name  # type: ignore[arg-type]
    assert not hasattr(model.depth.forward, "path") and "forward" not in vars(traced.depth)


def test_forward_that_differs_in_training_is_noted() -> None:
    notes = trace(MoreInTraining(), torch.randn(2, 3), via="export").notes
    assert any("does other things in training mode" in n for n in notes)

    class Unfollowed(MoreInTraining):
        def forward(self, x: Tensor) -> Tensor:
            if self.training and x.sum() > 0:
                return x
            return F.dropout(self.a(x), 0.25, self.training)

    traced = trace(Unfollowed(), torch.randn(2, 3), via="export")
    assert any("training mode" in n and "x.sum() > 0" in n for n in traced.notes)
    assert targets(traced.module.graph, "call_module") == ["a", "dropout_0"], "dropout still obeys the mode"


def test_blocks_are_gone_into() -> None:
    class Net(Base):
        def __init__(self, dtype: torch.dtype | None = None) -> None:
            super().__init__()
            self.dtype = dtype

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                y = self.a(x)
            with torch.autocast("cpu", self.dtype, enabled=self.dtype is not None):
                y = self.norm(y)
            return self.tail(y)

    x = torch.randn(2, 3, 8, 8)
    model = Net().eval()
    traced = trace(model, x, via="export")
    assert targets(traced.module.graph, "call_module") == ["a", "norm", "b", "fc"]
    assert torch.equal(traced.module(x), model(x))
    with pytest.raises(
        TraceError, match=r"Net got wrap_with_autocast at .*test_exported.py:\d+ `y = .*`: not followed"
    ):
        trace(Net(torch.bfloat16), x, via="export")


def test_a_batch_that_is_a_plain_number() -> None:
    class Counted(Base):
        def forward(self, x: Tensor) -> Tensor:
            assert isinstance(x, Tensor)
            y = self.head(x)
            return self.tail(y.reshape(len(y), 8, -1)[:, :, :64].reshape(len(y), 8, 8, 8))

    model = Counted().eval()
    small = sa.compact(model, torch.randn(2, 3, 12, 12), columns="never")
    assert any("example's batch size only" in note for note in small.report.remarks)
    x = torch.randn(2, 3, 12, 12)
    assert torch.allclose(small(x), model(x), atol=1e-5)


@pytest.mark.parametrize("later", [False, True])
def test_overwritten_views_are_refused(later: bool) -> None:
    class Through(nn.Module):
        def forward(self, x: Tensor) -> Any:
            x = x + 1
            view, part = x.view(-1), x[:, 1]
            if later:
                x.mul_(2)
                return part
            view.mul_(2)
            return x

    with pytest.raises(TraceError, match=r"mul_ at .*test_exported.py:\d+ `.*mul_\(2\)`: overwrites a .* used later"):
        trace(Through(), torch.randn(2, 3), via="export")


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x
        return -x


def test_one_error_says_where_each_stopped(capfd: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.ReLU(), Branch()))
    at = r"at \S*test_exported.py:\d+ `if x\.sum\(\) > 0:`"
    fx_part = rf"compact: 1\.1 \(Branch\) got TraceError {at}: symbolically traced .*; and by torch\.export "
    export_part = rf"1\.1 \(Branch\) got \w+ in torch\.Tensor\.__bool__ {at}: .*; wanted a forward that torch\.fx or"
    with pytest.raises(TraceError, match=fx_part + export_part):
        sa.compact(model, torch.randn(2, 3))
    assert capfd.readouterr().err == "", "torch prints nothing of its own"


def test_outputs_and_front_ends_that_are_none() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return object() if isinstance(x, Tensor) else x

    with pytest.raises(TraceError, match="an output that is a object, not tensors in tuples, dicts and dataclasses"):
        trace(Odd(), torch.randn(2, 3), via="export")
    with pytest.raises(TraceError, match="trace: via got 'onnx', wanted one of fx, shapes, export"):
        trace(Odd(), torch.randn(2, 3), via="onnx")


def test_endless_networks_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unrolled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(1000 if isinstance(x, Tensor) else "no"):
                x = x + 1
            return x

    monkeypatch.setattr(exported, "MAX_OPERATIONS", 100)
    with pytest.raises(
        TraceError, match=r"0 \(Unrolled\) got RuntimeError in .*`x = x \+ 1`: more than 100 operations"
    ):
        trace(nn.Sequential(Unrolled()), torch.zeros(2, 2))


# Agreement: which filters go is the same by every front end.


def left(monkeypatch: pytest.MonkeyPatch, model: nn.Module, x: Tensor, via: str | None) -> tuple[dict[str, Any], Any]:
    """What is left of every layer, and the report."""
    module = importlib.import_module("structadmm.compact")  # the package has a function of this name
    with monkeypatch.context() as patch:
        patch.setattr(module, "trace", functools.partial(trace, via=via))
        # Networks with random weights multiply rounding errors; this is about what goes.
        report = sa.compact(model, x, columns="never", tolerance=float("inf")).report
    return {r.name: r.shape_after for r in report.layers}, report


def assert_agreement(monkeypatch: pytest.MonkeyPatch, model: nn.Module, x: Tensor) -> None:
    by_export, report = left(monkeypatch, model, x, "export")
    assert any(r.weights_after < r.weights_before for r in report.layers), "something went"
    assert by_export == left(monkeypatch, model, x, "shapes")[0]
    by_fx, report = left(monkeypatch, model, x, None)  # torch.fx's own tracer, where it sees all parameters
    if by_fx != by_export:
        # torch.fx's own tracer leaves sizes to be computed, so that the network takes maps of any size: it may say
        # less of what depends on them, and then fewer filters go.
        said = str(report)
        assert "computes with the number of channels" in said or "its index is not tracked" in said
        for name, shape in by_export.items():
            fewer = by_fx.get(name)
            assert fewer is None or shape is None or all(n <= m for n, m in zip(shape, fewer, strict=True)), name


@pytest.mark.parametrize("kind", ["A", "B", "bottleneck", "grouped", "mobile", "se", "vgg"])
def test_residual_networks_agree(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = VGG() if kind == "vgg" else ResNet(kind)
    assert_agreement(monkeypatch, randomise(model, 0.4, 1).eval(), torch.randn(2, 3, 12, 12))


@pytest.mark.parametrize("seed", range(4))
def test_chains_agree(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_agreement(monkeypatch, randomise(random_chain(seed), 0.5, seed).eval(), torch.randn(2, 3, 12, 12))


class Tagger(nn.Module):
    """Recurrent layers of all kinds, which hand on outputs and last states."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 10)
        self.lstm = nn.LSTM(10, 8, num_layers=2, bidirectional=True, batch_first=True, dropout=0.1)
        self.gru, self.rnn, self.last = nn.GRU(16, 7), nn.RNN(7, 5, batch_first=True), nn.GRU(5, 4)
        self.head, self.state = nn.Linear(4, 3), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y, (h, c) = self.lstm(self.embed(x).relu())
        z, k = self.gru(y.transpose(0, 1))
        z, _ = self.rnn(z.transpose(0, 1))
        z, _ = self.last(z.transpose(0, 1), z.new_ones(1, x.shape[0], 4))
        return self.head(z[-1]), self.state(h[-1]), self.state(c[0]), k


def test_recurrent_networks_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = Tagger().double(), torch.randn(2, 5, 6, dtype=torch.float64)
    with torch.no_grad():
        for name, p in model.named_parameters():  # units 1 and 3 of every layer write nothing, nothing reads unit 5
            if name.partition(".")[0] in ("lstm", "gru", "rnn"):
                size = getattr(model, name.partition(".")[0]).hidden_size
                gated = p.view(-1, size, *p.shape[1:])
                gated[:, 1] = gated[:, 3] = 0
                if "weight_hh" in name:
                    p[:, 5 % size] = 0
        model.embed.weight[2] = model.embed.bias[2] = 0
        model.gru.weight_ih_l0[:, [5, 13]] = 0
        model.state.weight[:, 5] = 0
    assert_agreement(monkeypatch, model.eval(), x)
    traced = trace(model, x, via="export")
    assert not any("training" in note for note in traced.notes)
    assert [n for n in targets(traced.module.graph, "call_module") if n in ("lstm", "gru", "rnn", "last")] == [
        *("lstm", "gru", "rnn", "last")
    ]
    fresh = torch.randn(7, 5, 6, dtype=torch.float64)
    for a, b in zip(model(fresh), traced.module(fresh), strict=True):
        assert torch.equal(a, b)
    for module in (model, traced.module):  # the dropout between layers is drawn alike
        module.train()
        torch.manual_seed(1)
    a = model(fresh)[0]
    torch.manual_seed(1)
    assert torch.equal(a, traced.module(fresh)[0])


@pytest.mark.parametrize("seed", [n for n in range(20) if n not in (1, 14)] + [27, 28])  # of 1 and 14 nothing goes
def test_random_graphs_agree(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(seed)
    net = RandomNet(seed)
    model = zero_at_random(net.double().eval(), (0.3, 0.7)[seed % 2], seed, leak=seed % 3 > 0)
    assert_agreement(monkeypatch, model, net.example(2))


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed")
@pytest.mark.parametrize("name", ["squeezenet1_0", "shufflenet_v2_x0_5"])
def test_networks_that_people_use_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from zoo import build, fill

    torch.manual_seed(0)
    model, x = build(f"torchvision/{name}")
    fill(model)
    assert_agreement(monkeypatch, zero_at_random(model, 0.3, seed=1), x)
