"""The family "winograd": 3x3 convolutions by F(4x4, 3x3) against F.conv2d in f64, on every instruction set, within the
bound of its own rounding errors; and where the runtime chooses it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import structadmm as sa
from structadmm import _core, container, reference, segments
from structadmm.trace import trace
from test_conv_steps import CASE, check_within, curves, inputs, make_spec, run

# Those with kernels of their own.
ISAS = [isa for isa in _core.supported_isas() if isa in ("scalar", "avx2", "avx512")]
POINTS = [0.0, math.sqrt(0.5), -math.sqrt(0.5), math.sqrt(2), -math.sqrt(2)]  # and infinity


def matrices() -> tuple[Tensor, Tensor, Tensor]:
    """A', G and B' of F(4, 3), from the definition: values of polynomials at the points, the leading coefficient for
    infinity, and Lagrange's interpolation between them (Toom and Cook)."""
    a = torch.tensor([[p**i for p in POINTS] + [float(i == 3)] for i in range(4)], dtype=torch.float64)
    weight = [math.prod(p - q for q in POINTS if q != p) for p in POINTS]
    values = [[p**i / w for i in range(3)] for p, w in zip(POINTS, weight, strict=True)]
    g = torch.tensor([*values, [0.0, 0.0, 1.0]], dtype=torch.float64)
    rows = [np.poly([q for q in POINTS if q != p])[::-1] for p in POINTS]
    b = torch.tensor(np.array([*(np.append(r, 0.0) for r in rows), np.poly(POINTS)[::-1]]))
    return a, g, b


def tiles_of(x: Tensor, padding: tuple[int, int], out: tuple[int, int]) -> Tensor:
    """[N, C, tile rows, tiles, 6, 6], zeros beyond x."""
    high, wide = -(-out[0] // 4), -(-out[1] // 4)
    behind = [4 * n + 2 - p - s for n, p, s in zip((high, wide), padding, x.shape[2:], strict=True)]
    x = F.pad(x, (padding[1], behind[1], padding[0], behind[0]))
    return x.unfold(2, 6, 4).unfold(3, 6, 4)


def winograd(a: Tensor, u: Tensor, v: Tensor, out: tuple[int, int]) -> Tensor:
    """A' [sum over channels of u . v] A, cut to the outputs."""
    m = a @ torch.einsum("fcij,ncyxij->nfyxij", u, v) @ a.T
    return m.permute(0, 1, 2, 4, 3, 5).flatten(4, 5).flatten(2, 3)[..., : out[0], : out[1]]


def test_the_matrices_are_those_of_a_convolution() -> None:
    """So is the bound below one of the algorithm that computes it."""
    torch.manual_seed(0)
    x, w = torch.randn(2, 3, 9, 14, dtype=torch.float64), torch.randn(5, 3, 3, 3, dtype=torch.float64)
    want = F.conv2d(x, w, padding=1)
    a, g, b = matrices()
    got = winograd(a, g @ w @ g.T, b @ tiles_of(x, (1, 1), (9, 14)) @ b.T, (9, 14))
    assert bool((got - want).abs().max() < 1e-13 * want.abs().max())


@st.composite
def squares(draw: Any) -> dict[str, Any]:
    """A case of tests/test_conv_steps.py with a 3x3 kernel."""
    integer = lambda low, high: draw(st.integers(low, high))  # noqa: E731
    padding = (integer(0, 3), integer(0, 3))
    y_layout, halo = draw(st.sampled_from(["arena", "arena", "tensor"])), st.tuples(*[st.integers(0, 3)] * 4)
    return {
        **CASE,
        "padding": padding,
        "size": tuple(max(1, 3 - 2 * p) + n for p, n in zip(padding, (integer(0, 18), integer(0, 70)), strict=True)),
        "batch": integer(1, 9),
        "channels": integer(1, 40),
        "filters": draw(st.sampled_from([1, 3, 8, 15, 16, 20, 33, 64, 70, 100])),
        "block": draw(st.sampled_from([8, 1000, 1000])),
        "density": draw(st.sampled_from([0.0, 0.5, 1.0, 1.0])),
        "bias": draw(st.booleans()),
        "curve": draw(curves()),
        "residual": draw(st.sampled_from(["none", "none", "arena", "tensor", "y"])),
        "x_layout": draw(st.sampled_from(["tensor", "arena"])),
        "y_layout": y_layout,
        "x_halo": draw(halo),
        "y_halo": draw(halo) if y_layout == "arena" else (0, 0, 0, 0),
        "spare_images": draw(st.sampled_from([0, 0, 3])),
        "guard": draw(st.sampled_from(["start", "end"])),
        "threads": draw(st.sampled_from([1, 1, 3])),
        "seed": integer(0, 1 << 30),
    }


def check_close(got: Tensor, c: dict[str, Any], x: Tensor, dense: Tensor, bias: Tensor | None, residual: Any) -> None:
    """|error of the sum| <= (C + 40) 2^-23 (|A'| [sum of |G||g||G'| . |B'||d||B|] |A| + |b| + |r|)

    Each value is a sum of products of the constants, rounded on the way: C times over channels, less than 10 times for
    each of two dimensions before and after that, and twice for a constant that is itself rounded. So all roundings
    together are at most C + 40 of at most 2^-24 each, and a factor of two covers their products.
    """
    sizes = ((1, 1), c["padding"], (1, 1), 1)
    wide = [None if t is None else t.double() for t in (bias, residual)]
    before = reference.conv_step(x.double(), dense.double(), *wide, sizes)
    out = (before.shape[2], before.shape[3])
    a, g, b = (m.abs() for m in matrices())
    tiles = tiles_of(x.double().abs(), c["padding"], out)
    size = winograd(a, g @ dense.double().abs() @ g.T, b @ tiles @ b.T, out)
    size = size + sum(t.abs() for t in (None if bias is None else wide[0].view(-1, 1, 1), wide[1]) if t is not None)
    check_within(got, c["curve"], before, (x.shape[1] + 40) * 2.0**-23 * size)


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=60, deadline=None)
@given(c=squares())
def test_conv_is_the_dense_convolution(isa: str, c: dict[str, Any]) -> None:
    spec, dense, bias = make_spec(c)
    x, residual = inputs(c, spec, dense)
    check_close(run("winograd", isa, c, spec, x, residual), c, x, dense, bias, residual)


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=20, deadline=None)
@given(c=squares())
def test_threads_batch_and_layouts_give_the_same_bits(isa: str, c: dict[str, Any]) -> None:
    c = {**c, "channels": 16 * c["channels"]}  # work enough to be split
    spec, dense, _ = make_spec(c)
    x, residual = inputs(c, spec, dense)
    got = run("winograd", isa, c, spec, x, residual)
    layout = "arena" if c["x_layout"] == "tensor" else "tensor"
    for threads in (2, 5):
        other = {**c, "threads": threads, "y_halo": (0, 0, 0, 0), "y_layout": "tensor", "x_layout": layout}
        assert torch.equal(got, run("winograd", isa, other, spec, x, residual))
    one = {**c, "spare_images": 0}
    for n in range(len(x)):
        alone = run("winograd", isa, one, spec, x[n : n + 1], None if residual is None else residual[n : n + 1])
        assert torch.equal(got[n : n + 1], alone)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("y_halo", [(0, 0, 0, 0), (1, 1, 1, 1)])
@pytest.mark.parametrize("width", [1, 2, 3, 5])
def test_vectors_that_hold_tiles_of_several_rows(isa: str, y_halo: tuple[int, ...], width: int) -> None:
    """Between the rows that share a vector are outputs, even where a vector reaches from one to the next."""
    for height in (5, 6, 12):
        c = {**CASE, "size": (height, width), "y_halo": y_halo, "residual": "y"}
        spec, dense, bias = make_spec(c)
        x, residual = inputs(c, spec, dense)
        check_close(run("winograd", isa, c, spec, x, residual), c, x, dense, bias, residual)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("channels", "filters", "size"),
    [(300, 200, (13, 27)), (48, 40, (9, 150)), (20, 20, (5, 571)), (512, 20, (4, 4))],
)
def test_blocks_and_weights_beyond_the_cache(isa: str, channels: int, filters: int, size: tuple[int, int]) -> None:
    """Several blocks of tiles, rows that are more than one block, weights that are fetched ahead."""
    c = {**CASE, "channels": channels, "filters": filters, "size": size, "block": 1000, "threads": 3}
    spec, dense, bias = make_spec(c)
    x, _ = inputs(c, spec, dense)
    check_close(run("winograd", isa, c, spec, x, None), c, x, dense, bias, None)


@pytest.mark.parametrize("isa", ISAS)
def test_errors_are_a_few_times_those_of_a_plain_sum(isa: str) -> None:
    """Three times at most, in the 2-norm: the bound above is for the worst case, far from what there is."""
    c = {**CASE, "channels": 64, "size": (28, 28), "block": 1000}
    spec, dense, bias = make_spec(c)
    x, _ = inputs(c, spec, dense)
    assert bias is not None
    want = reference.conv_step(x.double(), dense.double(), bias.double(), None, ((1, 1), (1, 1), (1, 1), 1))
    error = {f: (run(f, isa, c, spec, x, None).double() - want).norm() for f in ("winograd", "taps_f32")}
    assert bool(error["winograd"] < 3 * error["taps_f32"]), error


@pytest.mark.parametrize("isa", ISAS)
def test_nan_and_infinity_stay_in_their_tiles(isa: str) -> None:
    c = {**CASE, "size": (16, 40)}
    spec, dense, _ = make_spec(c)
    x, _ = inputs(c, spec, dense)
    x[0, 1, 6, 10], x[1, 2, 0, 0] = torch.nan, torch.inf
    touched = torch.zeros(2, 40, 16, 40, dtype=torch.bool)
    touched[0, :, 4:8, 8:12] = touched[1, :, 0:4, 0:4] = True
    assert torch.equal(~run("winograd", isa, c, spec, x, None).isfinite(), touched)


@pytest.mark.parametrize("isa", ISAS)
def test_filters_without_taps_emit_the_epilogue_of_their_bias(isa: str) -> None:
    c = {**CASE, "density": 0.0, "curve": {"activation": "silu"}, "residual": "arena"}
    spec, dense, bias = make_spec(c)
    x, residual = inputs(c, spec, dense)
    got = run("winograd", isa, c, spec, x * torch.nan, residual)
    assert bias is not None and residual is not None
    torch.testing.assert_close(got, F.silu(bias.view(1, -1, 1, 1) + residual))


@pytest.mark.parametrize(
    "change", [{"stride": (2, 1)}, {"kernel": (3, 1)}, {"dilation": (1, 2)}, {"groups": 3, "filters": 39}]
)
def test_other_convolutions_are_refused(change: dict[str, Any]) -> None:
    c = {**CASE, **change}
    spec, dense, _ = make_spec(c)
    x, _ = inputs(c, spec, dense)
    with pytest.raises(ValueError, match="conv_winograd: got a kernel of .* wanted 3 x 3 and ones"):
        run("winograd", "scalar", c, spec, x, None)


def kernels(net: nn.Module, *shape: int) -> list[str]:
    """What the runtime chooses for the layers of a network."""
    torch.manual_seed(0)
    engine = sa.Engine(container.to_bytes(trace(net.eval(), torch.randn(shape)).module))
    return [step["kernel"].partition("__")[0] for step in engine.describe(shape)]


def conv(channels: int, filters: int, kernel: int = 3, **more: int) -> nn.Conv2d:
    return nn.Conv2d(channels, filters, kernel, padding=kernel // 2, **more)


def test_the_runtime_takes_it_where_it_pays() -> None:
    def taken(net: nn.Module, *shape: int) -> bool:
        return any(name == "winograd_f32_4x4" for name in kernels(net, *shape))

    wide = conv(64, 64)
    for batch in (1, 3):  # the same for any batch: so are the results
        assert taken(wide, batch, 64, 28, 28)
        assert not taken(conv(3, 64), batch, 3, 32, 32), "transforms that few channels share"
        assert not taken(conv(512, 512), batch, 512, 4, 4), "weights four times as large, read for one tile"
    assert not taken(conv(64, 64, stride=2), 1, 64, 28, 28)
    assert not taken(conv(64, 64, 5), 1, 64, 28, 28)
    assert not taken(conv(64, 64, groups=2), 1, 64, 28, 28)
    with torch.no_grad():
        wide.weight[torch.rand(64, 64, 3, 3) < 0.7] = 0
        assert not taken(wide, 1, 64, 28, 28), "single weights"
        wide.weight.view(64, -1)[:, torch.rand(576) < 0.5] = 0
    few = sa.compact(nn.Sequential(wide), torch.randn(1, 64, 28, 28))
    assert not taken(few, 1, 64, 28, 28), "columns"


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=30, deadline=None)
@given(c=squares())
def test_bf16_planes_are_rounded_once(isa: str, c: dict[str, Any]) -> None:
    """What lies between is f32: the bits of the f32 step on the same values, rounded."""
    spec, dense, _ = make_spec(c)
    x, residual = inputs(c, spec, dense)
    x, residual = x.bfloat16().float(), None if residual is None else residual.bfloat16().float()
    if isa != "avx512":
        with pytest.raises(ValueError, match="conv_winograd: planes got bf16, .*, wanted f32"):
            run("winograd", isa, c, spec, x, residual, dtype="bf16")
        return
    got = run("winograd", isa, c, spec, x, residual, dtype="bf16")
    assert torch.equal(got, run("winograd", isa, c, spec, x, residual).bfloat16().float())


@pytest.mark.parametrize("isa", _core.supported_isas())
def test_in_bf16_the_runtime_takes_it_where_it_pays(isa: str) -> None:
    """That is on AVX-512 without tiles; with its products of bf16 pairs, of more channels."""
    torch.manual_seed(0)
    layers = {64: conv(64, 64), 16: conv(16, 16)}
    taken = {}
    for channels, layer in layers.items():
        x = torch.randn(2, channels, 56, 56)
        net = nn.Sequential(nn.Conv2d(channels, channels, 1), layer, nn.ReLU()).eval()
        data = container.to_bytes(trace(net, x).module)
        e = sa.Engine(data, dtype="bfloat16", isa=isa)
        taken[channels] = any(s["kernel"].startswith("winograd_bf16") for s in e.describe(tuple(x.shape)))
        want = net.double()(x.double()).detach().numpy()
        # Inputs, values between layers and outputs are rounded to eight bits.
        assert np.abs(e.run(x.numpy()) - want).max() < 0.02 * np.abs(want).max()
        assert np.array_equal(e.run(x[1:].numpy()), e.run(x.numpy())[1:])
    assert taken == {"avx512": {64: True, 16: True}, "avx512_bf16": {64: True, 16: False}}.get(
        isa, {64: False, 16: False}
    )


def engine_of(layer: nn.Conv2d, family: str, example: Tensor) -> sa.Engine:
    """From a file that asks for a family."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_module("layer", (x,))
    graph.output(y)
    root = nn.Module().eval()
    root.add_module("layer", layer.eval())
    shapes = {x: example.shape, y: layer(example).shape}
    made: Any = segments.lower(fx.GraphModule(root, graph), [[y]], shapes, "float32", {"layer": family})
    return sa.Engine(bytes(made.segment_0.program.numpy()))


@pytest.mark.parametrize(
    ("layer", "family", "wanted"),
    [
        (conv(64, 64), "taps", False),
        (conv(512, 512), "winograd", True),
        (conv(64, 64, 5), "winograd", False),  # as far as it can
        (conv(64, 64, stride=2), "winograd", False),
    ],
)
def test_a_file_can_ask_for_a_family(layer: nn.Conv2d, family: str, wanted: bool) -> None:
    example = torch.randn(1, layer.in_channels, 8, 8)
    engine = engine_of(layer, family, example)
    assert any("winograd" in step["kernel"] for step in engine.describe(example.shape)) == wanted
    want = layer(example).detach().numpy()
    # Both sides are f32: ten times the errors seen, and far from those of a wrong kernel.
    np.testing.assert_allclose(engine.run(example.numpy()), want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_stages_are_cut_by_the_weights_that_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four times those of the file, which more images share."""
    monkeypatch.setenv("STRUCTADMM_L2_BYTES", str(256 << 10))
    layer, example = conv(64, 64), torch.randn(8, 64, 12, 12)
    threads = _core.get_num_threads()
    try:
        _core.set_num_threads(1)
        steps = {f: engine_of(layer, f, example).describe(example.shape)[-1] for f in ("taps", "winograd")}
    finally:
        _core.set_num_threads(threads)
    assert steps["taps"]["images"] < steps["winograd"]["images"], steps


def test_batches_give_the_same_bits() -> None:
    net = nn.Sequential(conv(64, 64), nn.ReLU(), conv(64, 72)).eval()
    torch.manual_seed(0)
    x = torch.randn(5, 64, 13, 18)
    engine = sa.Engine(container.to_bytes(trace(net, x).module))
    assert sum("winograd" in s["kernel"] for s in engine.describe(x.shape)) == 2
    every = engine.run(x.numpy())
    for n in range(5):
        assert np.array_equal(every[n : n + 1], engine.run(x[n : n + 1].numpy()))
    want = net.double()(x.double()).detach()
    assert bool((torch.from_numpy(every) - want).abs().max() < 1e-5 * want.abs().max())  # see test_planner.py
