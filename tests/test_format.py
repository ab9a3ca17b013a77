"""The artefact in C++: read as Python reads it, refused where Python refuses it; what it is lowered to."""

import contextlib
import copy
import json
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from networks import VGG, InvertedResidual, ResNet, randomise
from structadmm import _core, save
from structadmm.allowed import FUNCTIONS, KINDS, METHODS
from structadmm.artefact import load
from structadmm.container import DIGEST_KEY
from structadmm.errors import ArtefactError
from structadmm.nn import ChannelBias, CompactConv2d, CompactLinear
from test_artefact import columns, mutate, parts, trained, write


def artefact(model, x, tmp_path):
    """The bytes of an artefact of the model in eval mode."""
    path = tmp_path / "net.safetensors"
    save(model.eval(), path, example=x)
    return path.read_bytes()


def lowered(model, x, tmp_path):
    """(kind, inputs, epilogue) of each node, and the nodes."""
    nodes = _core.lower(artefact(model, x, tmp_path))["nodes"]
    return [(n["kind"], n["inputs"], n.get("epilogue", {})) for n in nodes], nodes


def refusals(model, x, tmp_path):
    data = artefact(model, x, tmp_path)
    reasons = [r for r in _core.why_not(data).values() if r]
    if reasons:
        with pytest.raises(ValueError) as caught:
            _core.lower(data)
        assert reasons[0] in str(caught.value)
    return reasons


RELU = {"clamp": (0.0, float("inf"))}
MAPS, FEATURES = torch.zeros(2, 4, 8, 8), torch.zeros(2, 6)


def test_the_allow_list_is_pythons():
    ours = _core.allowed()
    assert ours["kinds"] == {name: list(kind.fields) for name, kind in KINDS.items()}
    assert set(ours["functions"]) == set(FUNCTIONS) and set(ours["methods"]) == set(METHODS)


class Layers(nn.Module):
    """Every kind of layer, for the reader; most are none that the runtime holds."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 8, 3, padding="same", padding_mode="reflect"), nn.GroupNorm(2, 8)
        self.bn, self.act, self.prelu = nn.BatchNorm2d(8, affine=False), nn.GELU("tanh"), nn.PReLU(8)
        self.compact = CompactConv2d.from_dense(columns(nn.Conv2d(8, 6, 3, groups=2), 0.5))
        self.pool, self.flat = nn.AvgPool2d(2, divisor_override=3), nn.Flatten()
        self.ln, self.soft, self.elu = nn.LayerNorm(6), nn.Softmax(1), nn.ELU()
        self.register_buffer("shift", torch.rand(1, 6).to(torch.float16))

    def forward(self, x):
        y = self.prelu(self.act(self.bn(self.norm(self.conv(x)))))
        y = self.flat(F.adaptive_avg_pool2d(self.pool(self.compact(y)), 1))
        return self.soft(self.elu(self.ln(y + self.shift)).clamp(max=float("inf")))


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "net.safetensors"
    save(Layers().eval(), path, example=torch.zeros(2, 4, 8, 8), original=Layers().eval(), metadata={"é": [1, 2.5]})
    return path


def cpp_error(data):
    """What the reader says, or an empty text: whether the runtime holds the network is not asked."""
    try:
        _core.why_not(data)
    except ValueError as e:
        assert str(e).startswith("why_not: ") and " got " in str(e) and ", wanted " in str(e), str(e)
        return str(e)
    return ""


def test_a_sound_file_is_read(saved):
    assert cpp_error(saved.read_bytes()) == ""
    reasons = _core.why_not(saved.read_bytes())
    assert reasons["conv"] == "padding_mode got reflect, wanted zeros" and reasons["compact"] is None


def test_truncations_and_flips_are_refused(saved):
    data = saved.read_bytes()
    rng = random.Random(0)
    for n in {*range(64), *range(len(data) - 64, len(data)), *(rng.randrange(len(data)) for _ in range(200))}:
        assert cpp_error(data[:n])
    assert cpp_error(data + b"\0")
    size = 8 + int.from_bytes(data[:8], "little")
    digest = data.index(DIGEST_KEY.encode())
    places = {*range(9), *range(size - 3, size + 3), *range(digest, digest + 90, 7), len(data) - 1}
    places |= {rng.randrange(len(data)) for _ in range(300)} | {rng.randrange(size) for _ in range(300)}
    for at in places:
        for value in {data[at] ^ (1 << rng.randrange(8)), rng.randrange(256), 0x20, 0x0A} - {data[at]}:
            assert cpp_error(data[:at] + bytes([value]) + data[at + 1 :])


def test_foreign_files_are_refused(saved):
    assert "0 bytes" in cpp_error(b"")
    assert "whole safetensors file" in cpp_error(b"not a model file at all")
    assert "PyTorch checkpoint" in cpp_error(b"PK\x03\x04" + b"\xff" * 60)
    for depth in (400, 600, 1_000_000):
        text = b"[" * depth
        assert "header got" in cpp_error(len(text).to_bytes(8, "little") + text)
    manifest, tensors = parts(saved)
    for text in (
        "{",
        "[" * 100_000,
        '{"version":0,"version":0}',
        '{"version":1e999}',
        '{"version":1}',
        "[0]",
        "\ud800",
    ):
        data = write(saved, text.encode("utf-8", "surrogatepass").decode("utf-8", "replace"), tensors).read_bytes()
        assert cpp_error(data)
    assert "version got 1, wanted 0" in cpp_error(write(saved, manifest | {"version": 1}, tensors).read_bytes())
    deep = json.dumps(manifest | {"metadata": {"x": 0}}).replace('{"x": 0}', '{"x": ' + "[" * 1000 + "]" * 1000 + "}")
    assert "nested" in cpp_error(write(saved, deep, tensors).read_bytes())


def test_forged_manifests_are_refused_where_python_refuses(saved):
    """Python refuses more, names that are its own keywords and configurations that torch judges; C++ never less that is
    in FORMAT.md."""
    manifest, tensors = parts(saved)
    rng = random.Random(3)
    refused = {True: 0, False: 0}
    for _ in range(300):
        data = write(saved, mutate(copy.deepcopy(manifest), rng), tensors).read_bytes()
        error = cpp_error(data)
        try:
            load(saved)
        except ArtefactError as e:
            python = str(e)
            taken = "torch.nn.Module has already" in python or "torch accepts" in python or "torch.fx" in python
            assert error or taken or "identifier" in python, python
            refused[True] += 1
        else:
            assert not error, error
            refused[False] += 1
        with contextlib.suppress(ValueError):
            _core.lower(data)
    assert refused[True] > 150 and refused[False] > 10


def test_forged_tensors_and_tables_are_refused(saved):
    manifest, tensors = parts(saved)

    def error(manifest=manifest, **changes):
        data = write(saved, manifest, tensors | {k.replace("__", "."): v for k, v in changes.items()}).read_bytes()
        return cpp_error(data)

    assert error() == ""
    assert "layer conv: weight got [1]" in error(conv__weight=torch.zeros(1))
    assert "floating dtype" in error(conv__bias=torch.zeros(8, dtype=torch.int64))
    assert "shift got another shape" in error(shift=torch.zeros(1, 6))
    assert "only the" in error(more=torch.zeros(1))
    huge = copy.deepcopy(manifest)
    huge["modules"]["conv"]["config"].update(out_channels=2**31 - 1, in_channels=2**31 - 1)
    assert "layer conv: weight got [8, 4, 3, 3]" in error(huge)
    rng = random.Random(4)
    refused = 0
    for _ in range(200):
        name = rng.choice(["taps", "block_filters", "block_taps"])
        table = tensors[f"compact.{name}"].clone()
        table[rng.randrange(len(table))] = rng.choice([-(2**31), -1, 0, 5, 100, 2**31 - 1, rng.randrange(40)])
        message = error(**{f"compact__{name}": table})
        try:
            load(saved)
        except ArtefactError:
            assert message
            refused += 1
        else:
            assert not message
    assert refused > 50
    for name in ("taps", "block_filters", "block_taps", "weight"):
        assert error(**{f"compact__{name}": tensors[f"compact.{name}"][:-1]})


def test_batch_norm_and_activations_are_folded(tmp_path):
    model, x = trained(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU6(), nn.BatchNorm2d(6)), 2, 4, 8, 8)
    rows, nodes = lowered(model, x, tmp_path)
    assert rows == [("input", [], {}), ("conv", [0], {"clamp": (0.0, 6.0)}), ("scale_shift", [1], {})]
    conv, bn, _, last = model
    scale = bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()
    weight = (conv.weight.double().flatten(1) * scale[:, None]).float()
    bias = (conv.bias.double() * scale + bn.bias.double() - bn.running_mean.double() * scale).float()
    assert np.array_equal(nodes[1]["weight"].reshape(6, -1), weight.detach().numpy())
    assert np.allclose(nodes[1]["bias"], bias.detach().numpy(), rtol=2e-7, atol=1e-7)
    scale = (last.weight.double() / (last.running_var.double() + last.eps).sqrt()).detach()
    assert np.array_equal(nodes[2]["scale"], scale.float().numpy())


def test_columns_without_a_weight_are_left_out(tmp_path):
    conv = columns(nn.Conv2d(4, 6, 3, groups=2), 0.5)
    rows, nodes = lowered(nn.Sequential(conv, nn.Flatten(), columns(nn.Linear(216, 10), 0.75)), MAPS, tmp_path)
    assert [r[0] for r in rows] == ["input", "conv", "flatten", "linear"]
    kept = (conv.weight.reshape(2, 3, 18) != 0).any(1)
    assert nodes[1]["taps"].tolist() == [j for g in range(2) for j in range(18) if kept[g, j]]
    assert nodes[1]["block_filters"].tolist() == [3, 3] and len(nodes[3]["taps"]) == 54
    rows = conv.weight.detach().reshape(2, 3, 18)
    assert np.array_equal(nodes[1]["weight"], np.concatenate([rows[g][:, kept[g]].flatten() for g in range(2)]))


def test_compacted_layers_keep_their_blocks(tmp_path):
    conv = CompactConv2d.from_dense(columns(nn.Conv2d(4, 16, 3, padding=1), 0.5, block=8), block=8)
    linear = CompactLinear.from_dense(columns(nn.Linear(16, 8), 0.5))
    model = nn.Sequential(conv, ChannelBias(torch.rand(16)), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear)
    rows, nodes = lowered(model, MAPS, tmp_path)
    assert rows[1] == ("conv", [0], {"activation": "silu"}) and [r[0] for r in rows[2:]] == [
        "adaptive_pool",
        "flatten",
        "linear",
    ]
    assert nodes[1]["block_filters"].tolist() == [8, 8]
    assert np.array_equal(nodes[1]["taps"], conv.taps.numpy()) and np.array_equal(
        nodes[1]["weight"], conv.weight.detach().numpy()
    )
    assert np.allclose(nodes[1]["bias"], (conv.bias + model[1].bias).detach().numpy(), atol=1e-6)
    assert np.array_equal(nodes[4]["weight"], linear.weight.detach().numpy())


class Net(nn.Module):
    """Layers by name and a forward given as a function."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.run = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.run(self, x)


def conv(a=4, b=4, k=3, **kwargs):
    return nn.Conv2d(a, b, k, padding=k // 2, **kwargs)


def test_additions_go_into_the_last_producer(tmp_path):
    def rows(forward, **layers):
        return lowered(Net(forward, **layers), MAPS, tmp_path)[0]

    got = rows(lambda m, x: F.relu(x + m.a(x)), a=conv())
    assert got == [("input", [], {}), ("conv", [0, 0], RELU | {"residual": True})]
    # Both sides are convolutions: the later one adds. A value with two readers keeps its step.
    assert rows(lambda m, x: m.a(x) + m.b(x), a=conv(), b=conv(k=1)) == [
        ("input", [], {}), ("conv", [0], {}), ("conv", [0, 1], {"residual": True})]  # fmt: skip
    got = rows(lambda m, x: (y := m.a(x), F.relu(y) + y)[1], a=conv())
    assert got == [("input", [], {}), ("conv", [0], {}), ("copy", [1], RELU), ("copy", [2, 1], {"residual": True})]
    # The convolution comes first, so it moves behind the pool.
    got = rows(lambda m, x: m.a(x) + F.max_pool2d(x, 3, 1, 1), a=conv())
    assert [(k, i) for k, i, _ in got] == [("input", []), ("pool", [0]), ("conv", [0, 1])]
    # relu(conv) + x is an addition of its own, and takes the next activation.
    got = rows(lambda m, x: torch.sigmoid(F.relu(m.a(x)) + x), a=conv())
    assert got[1:] == [("conv", [0], RELU), ("copy", [1, 0], {"activation": "sigmoid", "residual": True})]
    got = rows(lambda m, x: m.a(x) - x, a=conv())
    assert [(k, i) for k, i, _ in got] == [("input", []), ("scale_shift", [0]), ("conv", [0, 1])]


def test_gates_shortcuts_and_constants(tmp_path):
    rows, nodes = lowered(InvertedResidual(4, 2, squeeze=True), MAPS, tmp_path)
    assert [r[0] for r in rows] == ["input", "conv", "conv", "adaptive_pool", "conv", "conv", "multiply", "conv"]
    assert rows[6][1] == [2, 5] and rows[7][1] == [6, 0] and rows[5][2] == {"activation": "hardsigmoid"}
    rows, nodes = lowered(Net(lambda m, x: m.a(x) * F.adaptive_avg_pool2d(x, 1).sigmoid(), a=conv()), MAPS, tmp_path)
    assert [k for k, _, _ in rows] == ["input", "conv", "adaptive_pool", "copy", "multiply"] and rows[-1][1] == [1, 3]
    # Subsampling and zero channels are one convolution of ones.
    model = Net(lambda m, x: F.pad(x[:, 1:3, ::2, ::2], (0, 0, 0, 0, 1, 2)))
    rows, nodes = lowered(model, MAPS, tmp_path)
    assert [k for k, _, _ in rows] == ["input", "conv"] and nodes[1]["stride"] == (2, 2)
    assert nodes[1]["block_filters"].tolist() == [1, 1, 1, 2] and nodes[1]["taps"].tolist() == [1, 2]
    assert nodes[1]["block_taps"].tolist() == [0, 0, 1, 2, 2] and nodes[1]["weight"].tolist() == [1, 1]
    rows, nodes = lowered(Net(lambda m, x: x[:, :, ::2, ::3]), MAPS, tmp_path)
    assert (
        [k for k, _, _ in rows] == ["input", "pool"] and nodes[1]["stride"] == (2, 3) and nodes[1]["kernel"] == (1, 1)
    )
    scale = Net(lambda m, x: (m.a(x) * m.scale + 1) / 2)
    scale.a, scale.scale = conv(), nn.Parameter(torch.rand(4, 1, 1))
    rows, nodes = lowered(scale, MAPS, tmp_path)
    assert [k for k, _, _ in rows] == ["input", "conv"]
    assert np.allclose(nodes[1]["bias"], ((scale.a.bias * scale.scale.flatten() + 1) / 2).detach().numpy(), atol=1e-6)
    rows, nodes = lowered(nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(4, 4, 3)), MAPS, tmp_path)
    assert [k for k, _, _ in rows] == ["input", "conv"] and nodes[1]["padding"] == (1, 1)
    rows, _ = lowered(Net(lambda m, x: torch.cat([m.a(x), x, F.relu(x)], 1), a=conv()), MAPS, tmp_path)
    assert rows[-1][:2] == ("concat", [1, 0, 2])
    rows, nodes = lowered(Net(lambda m, x: torch.cat([(c := x.chunk(2, 1))[1], c[0]], 1)), MAPS, tmp_path)
    assert nodes[1]["taps"].tolist() == [2, 3] and nodes[2]["taps"].tolist() == [0, 1]


@pytest.mark.parametrize(
    "flatten",
    [
        lambda x: x.flatten(1),
        lambda x: torch.flatten(x, 1, -1),
        lambda x: x.view(x.size(0), -1),
        lambda x: x.view(-1, 256),
        lambda x: x.reshape(x.shape[0], 4 * x.shape[2] * x.shape[3]),
        lambda x: x.reshape((x.shape[0], x.shape[3] * x.shape[1] * x.shape[2])),
    ],
)
def test_ways_to_flatten(flatten, tmp_path):
    model = Net(lambda m, x: m.b(flatten(m.a(x))), a=conv(), b=nn.Linear(256, 3))
    rows, nodes = lowered(model, MAPS, tmp_path)
    assert [k for k, _, _ in rows] == ["input", "conv", "flatten", "linear"] and nodes[2]["features"] in (0, 256)


def test_shapes(tmp_path):
    data = artefact(VGG(), torch.zeros(2, 3, 12, 12), tmp_path)
    shapes = _core.lower_shapes(data, [[3, 12, 12]])
    assert shapes[-1] == [5] and [90] in shapes
    with pytest.raises(ValueError, match=r"fc1: x got \[N, 160\], wanted 90 features"):
        _core.lower_shapes(data, [[3, 16, 16]])
    with pytest.raises(ValueError, match="features.0: x got .* wanted 3 channels"):
        _core.lower_shapes(data, [[4, 12, 12]])
    for pool in (nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(3, 2, ceil_mode=True), nn.AvgPool2d(2, 3, 1, ceil_mode=True)):
        for size in range(3, 12):
            x = torch.zeros(1, 4, size, size + 1)
            assert _core.lower_shapes(artefact(nn.Sequential(pool), x, tmp_path), [list(x.shape[1:])])[-1] == list(
                pool(x).shape[1:]
            )


def test_refusals_name_the_node_and_the_reason(tmp_path):
    def reason(forward, x=MAPS, **layers):
        (first, *_) = refusals(Net(forward, **layers), x, tmp_path)
        return first

    assert "padding got 'same'" in reason(lambda m, x: m.a(x), a=nn.Conv2d(4, 4, 2, padding="same"))
    assert "padding_mode got circular" in reason(
        lambda m, x: m.a(x), a=nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")
    )
    assert "fixed batch" in reason(lambda m, x: x.view(2, -1))
    assert "opposite sides" in reason(lambda m, x: m.a(F.pad(x, (0, 1, 0, 1))), a=conv())
    assert "no convolution" in reason(lambda m, x: F.relu(F.pad(x, (1, 1, 1, 1))))
    assert "layer got Softmax" in reason(lambda m, x: m.a(x), a=nn.Softmax(1))
    assert "dim got 2, wanted 1" in reason(lambda m, x: torch.cat([x, x], 2))
    assert "torch.matmul" in reason(lambda m, x: torch.matmul(x, x))
    assert "wanted [N, C]" in reason(lambda m, x: m.a(x), a=nn.Linear(8, 8))
    assert "statistics" in reason(lambda m, x: m.a(x), a=nn.BatchNorm2d(4, track_running_stats=False))
    assert "overwrite" in reason(lambda m, x: m.a(x), a=nn.ReLU(inplace=True))
    # structadmm.trace has no such graph, torch.fx does.
    model = fx.symbolic_trace(Net(lambda m, x: (y := m.a(x), F.relu(y, inplace=True) + y)[1], a=conv()))
    assert "overwritten in place" in refusals(model, MAPS, tmp_path)[0]
    # What is behind a refused node is judged by itself.
    model = Net(lambda m, x: F.relu(m.b(torch.softmax(m.a(x), 1))), a=conv(), b=conv())
    reasons = _core.why_not(artefact(model, MAPS, tmp_path))
    assert [n for n, r in reasons.items() if r] == ["softmax"]


@pytest.mark.parametrize("kind", ["A", "B", "bottleneck", "grouped", "mobile", "se"])
def test_whole_networks_are_lowered(kind, tmp_path):
    model = randomise(ResNet(kind), 0.4, 1)
    rows, nodes = lowered(model, torch.zeros(2, 3, 8, 8), tmp_path)
    assert {k for k, _, _ in rows} <= {"input", "conv", "multiply", "adaptive_pool", "flatten", "linear"}
    additions = {"A": 3, "B": 3, "bottleneck": 2, "grouped": 2, "mobile": 2, "se": 2}
    assert sum("residual" in e for _, _, e in rows) == additions[kind]
