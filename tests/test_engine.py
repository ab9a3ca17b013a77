"""The engine against torch: whole networks, batches, dtypes, strides, instruction sets, threads; and its errors."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import structadmm as sa
from networks import VGG, ResNet, random_chain, randomise
from structadmm import _core
from structadmm.errors import ArtefactError
from structadmm.nn import CompactConv2d
from test_artefact import Residual, trained


def engine(model, x, tmp_path, **options):
    path = tmp_path / "net.safetensors"
    sa.save(model.eval(), path, example=x)
    return sa.Engine(path, **options)


def assert_close(got, want, rtol=2e-5):
    """f32 sums in another order: an error of some units of the last place of the largest output."""
    for a, b in zip(
        got if isinstance(got, tuple) else (got,), want if isinstance(want, tuple) else (want,), strict=True
    ):
        b = b.detach().numpy()
        assert a.shape == b.shape and a.dtype == b.dtype
        assert np.abs(a - b).max() <= rtol * max(1.0, np.abs(b).max())


@pytest.fixture(scope="module")
def lenet():
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 20, 5), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.MaxPool2d(2), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10)), torch.randn(2, 1, 28, 28)


NETWORKS = {
    **{k: (lambda k=k: (ResNet(k), (3, 9, 8))) for k in ("A", "B", "bottleneck", "grouped", "mobile", "se")},
    "silu": lambda: (ResNet("B", act=nn.SiLU), (3, 8, 8)),
    "vgg": lambda: (VGG(), (3, 12, 12)),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_networks_give_what_torch_gives(name, tmp_path):
    model, shape = NETWORKS[name]()
    model = randomise(model, 0.4, 1).eval()
    run = engine(model, torch.randn(2, *shape), tmp_path)
    for batch in (1, 3, 8):
        x = torch.randn(batch, *shape)
        assert_close(run(x.numpy()), model(x))


@pytest.mark.parametrize("seed", [s for s in range(24) if s not in (4, 5, 6)])
@torch.no_grad()
def test_random_networks_give_what_torch_gives(seed, tmp_path):
    model = randomise(random_chain(seed), 0.5, seed).eval()
    x = torch.randn(2, 3, 12, 12)
    if any(getattr(m, "padding_mode", "zeros") != "zeros" for m in model):
        with pytest.raises(ArtefactError, match=r"Engine: .*: node .*: padding_mode got .*, wanted zeros"):
            engine(model, x, tmp_path)
        return
    assert_close(engine(model, x, tmp_path)(x.numpy()), model(x), 1e-4)


@torch.no_grad()
def test_compacted_networks_and_every_instruction_set(tmp_path):
    model = randomise(ResNet("B", 16), 0.5, 2).eval()
    x = torch.randn(4, 3, 16, 16)
    small = sa.compact(model, x)
    assert any(isinstance(m, CompactConv2d) for m in small.modules())
    want = model(x)
    results = {}
    for isa in _core.supported_isas():
        results[isa] = engine(small, x, tmp_path, isa=isa)(x.numpy())
        assert_close(results[isa], want)
    bf16 = engine(small, x, tmp_path, dtype="bfloat16")
    got = bf16(x.numpy())
    # 2^-9 is the rounding of one value to bf16; there are some of them on the way.
    assert got.dtype == np.float32 and np.abs(got - want.numpy()).max() < 2**-9 * 12 * np.abs(want.numpy()).max()


class Tails(nn.Module):
    """Two inputs, several outputs, features and maps, concatenation, gates over linear layers, constants."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(3, 4, 1, 2)
        self.squeeze, self.excite = nn.Linear(12, 3), nn.Linear(3, 12)
        self.fc = nn.Linear(12, 5)
        self.scale = nn.Parameter(torch.rand(12, 1, 1))

    def forward(self, x, y):
        z = torch.cat([F.relu(self.a(x)), F.leaky_relu(self.b(y), 0.2)], 1)
        gate = torch.sigmoid(self.excite(F.gelu(self.squeeze(z.mean((2, 3))))))
        z = z * gate[:, :, None, None] * self.scale - 0.5
        return self.fc(F.max_pool2d(z, 3, 2, 1, ceil_mode=True).mean([2, 3])), z, z.flatten(1), gate


@torch.no_grad()
def test_several_inputs_and_outputs(tmp_path):
    model = Tails().eval()
    x, y = torch.randn(2, 3, 10, 7), torch.randn(2, 3, 10, 7)
    run = engine(model, (x, y), tmp_path)
    assert_close(run(x.numpy(), y.numpy()), model(x, y))
    assert run.output_shapes((4, 3, 12, 12), (4, 3, 12, 12)) == [(4, 5), (4, 12, 6, 6), (4, 432), (4, 12)]
    with pytest.raises(ValueError, match="inputs got 1 tensors, wanted 2"):
        run(x.numpy())


@torch.no_grad()
def test_the_formats_own_example_is_refused_where_it_must(tmp_path):
    model, x = trained(Residual(), 2, 3, 8, 8)
    with pytest.raises(ArtefactError, match=r"node cat.*: dim got 3, wanted 1"):
        engine(model, x, tmp_path)


@torch.no_grad()
def test_strides_and_dtypes(lenet, tmp_path):
    model, x = lenet
    run, want = engine(model, x, tmp_path), model(x)
    assert_close(run(np.asfortranarray(x.numpy())), want)
    assert_close(run(np.repeat(x.numpy(), 2, axis=3)[..., ::2]), want)
    assert_close(run(x.numpy()[:, :, ::-1, ::-1]), model(x.flip(2, 3)))
    half = run(x.half().numpy())
    assert half.dtype == np.float16 and np.abs(half - want.numpy()).max() < 4e-3 * np.abs(want.numpy()).max()
    assert run(np.zeros((0, 1, 28, 28), np.float32)).shape == (0, 10)


def test_threads(lenet, tmp_path):
    """The same bits for any number of threads, and from several threads at once."""
    run, x = engine(*lenet, tmp_path), np.random.default_rng(0).random((5, 1, 28, 28), np.float32)
    before, answers = _core.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            _core.set_num_threads(threads)
            answers.append(run(x))
        workers = [threading.Thread(target=lambda: answers.append(run(x))) for _ in range(6)]
        for w in workers:
            w.start()
        for w in workers:
            w.join()
    finally:
        _core.set_num_threads(before)
    assert len(answers) == 9 and all((a == answers[0]).all() for a in answers)
    # An image's result does not depend on its neighbours.
    assert (run(x[2:3]) == answers[0][2:3]).all()


@pytest.mark.parametrize("side", [70, 500])
def test_large_outputs_keep_their_memory_apart(side, tmp_path):
    """They lie in memory that is used again, the last one first, but only when nobody holds it; longer than the engine
    lives."""
    net = nn.Sequential(nn.Conv2d(1, 8, 1))
    xs = [torch.randn(1, 1, side, side) for _ in range(3)]
    e = engine(net, xs[0], tmp_path)
    a, b = e.run(xs[0].numpy()), e.run(xs[1].numpy())
    part, place = b[0, 1:3], b.ctypes.data
    del b
    c = e.run(xs[2].numpy())
    assert len({a.ctypes.data, place, c.ctypes.data}) == 3, "a view of the output holds its memory"
    assert_close((a, part, c), (net(xs[0]), net(xs[1])[0, 1:3], net(xs[2])))
    del part
    d = e.run(xs[1].numpy())
    assert d.ctypes.data == place and d.flags.writeable and d.flags.c_contiguous
    last = c.ctypes.data
    del d, c
    f = e.run(xs[1].numpy())
    assert f.ctypes.data == last, "of two that are idle, caches may still hold the last"
    del e
    assert_close((a, f + 1), (net(xs[0]), net(xs[1]) + 1))


def test_what_an_engine_tells(lenet, tmp_path):
    model, x = lenet
    path = tmp_path / "net.safetensors"
    sa.save(model, path, example=x, metadata={"classes": ["é", 1]})
    for run in (sa.Engine(path), sa.Engine(str(path)), sa.Engine(path.read_bytes())):
        assert run.inputs == [((None, 1, 28, 28), "float32")] and run.metadata == {"classes": ["é", 1]}
        assert run.dtype == "float32" and "float32" in repr(run)
    steps = run.profile(x.numpy(), repeats=2)
    assert [s["node"] for s in steps if s["node"] in ("0", "2")] == ["0", "2"] and all(s["seconds"] >= 0 for s in steps)


def test_errors(lenet, tmp_path):
    run = engine(*lenet, tmp_path)
    path = tmp_path / "net.safetensors"
    with pytest.raises(ArtefactError, match="missing: file got none, wanted an artefact"):
        sa.Engine(tmp_path / "missing")
    with pytest.raises(ArtefactError, match="path got a folder, wanted a file"):
        sa.Engine(tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtefactError, match="net.safetensors: SHA-256 got .*, wanted .*damaged"):
        sa.Engine(path)
    shapes = [((1, 1, 28), "f4"), ((1, 2, 28, 28), "f4"), ((1, 1, 28, 28), "f8"), ((1, 1, 4, 4), "f4")]
    for shape, dtype in [*shapes, ((1, 1, 28, 28), "i4")]:
        with pytest.raises(ValueError, match=r" got .*, wanted "):
            run(np.zeros(shape, dtype))
    with pytest.raises(ArtefactError, match="dtype got 'int8', wanted float32 or bfloat16"):
        engine(*lenet, tmp_path, dtype="int8")
    with pytest.raises(ArtefactError, match="isa got 'neon'"):
        engine(*lenet, tmp_path, isa="neon")


def test_needs_no_torch(lenet, tmp_path):
    model, x = lenet
    sa.save(model, tmp_path / "n.safetensors", example=x)
    np.save(tmp_path / "x.npy", x.numpy())
    code = (
        "import sys, numpy as np, structadmm as sa\n"
        f"y = sa.Engine({str(tmp_path / 'n.safetensors')!r}).run(np.load({str(tmp_path / 'x.npy')!r}))\n"
        "assert 'torch' not in sys.modules; print(y.argmax(1).tolist())"
    )
    package = str(Path(sa.__file__).resolve().parent.parent)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([package, os.environ.get("PYTHONPATH", "")])}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert json.loads(out.stdout) == model.eval()(x).argmax(1).tolist()
