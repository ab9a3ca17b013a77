"""Convolution steps on planes: every family and instruction set against F.conv2d in f64, shapes and layouts at random.

The door (`_core.conv_step`) fails where a step writes on y's halo, and faults where it reads or writes outside of what
the planes say.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from structadmm import _core, reference

ISAS = _core.supported_isas()
CURVES = ("silu", "gelu", "gelu_tanh", "hardswish", "hardsigmoid", "sigmoid", "tanh", "leaky_relu")


def make_spec(c: dict[str, Any]) -> tuple[dict[str, Any], Tensor, Tensor | None]:
    """A random compacted weight as the door takes it, the dense weight, the bias; some blocks may have no taps."""
    rng = torch.Generator().manual_seed(c["seed"])
    shape = (c["channels"] // c["groups"], *c["kernel"])
    filters, per_group, columns = c["filters"], c["filters"] // c["groups"], math.prod(shape)
    dense = torch.zeros(filters, columns)
    taps: list[Tensor] = []
    sizes, offsets = [], [0]
    for group in range(0, filters, per_group):
        for first in range(group, group + per_group, c["block"]):
            n = min(c["block"], group + per_group - first)
            kept = (torch.rand(columns, generator=rng) < c["density"]).nonzero().flatten()
            dense[first : first + n, kept] = torch.randn(n, len(kept), generator=rng)
            taps.append(kept)
            sizes.append(n)
            offsets.append(offsets[-1] + len(kept))
    first, weight = 0, []
    for n, kept in zip(sizes, taps, strict=True):
        weight.append(dense[first : first + n, kept].flatten())
        first += n
    bias = torch.randn(filters, generator=rng) if c["bias"] else None
    spec = {
        "in_channels": c["channels"],
        "out_channels": filters,
        "weight": torch.cat(weight).tolist(),
        "bias": None if bias is None else bias.tolist(),
        "taps": torch.cat(taps).tolist(),
        "block_filters": sizes,
        "block_taps": offsets,
        **{k: c[k] for k in ("groups", "kernel", "stride", "padding", "dilation")},
        **c["curve"],
    }
    return spec, dense.view(filters, *shape), bias


@st.composite
def curves(draw: Any) -> dict[str, Any]:
    curve = draw(st.sampled_from(["none", "relu", "relu6", *CURVES]))
    if curve == "leaky_relu":
        return {"activation": curve, "slope": draw(st.sampled_from([0.01, 0.2, -0.5]))}
    if curve in ("none", "relu", "relu6"):
        return {} if curve == "none" else {"low": 0.0, **({"high": 6.0} if curve == "relu6" else {})}
    return {"activation": curve}


@st.composite
def steps(draw: Any) -> dict[str, Any]:
    integer = lambda low, high: draw(st.integers(low, high))  # noqa: E731
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    pointwise = draw(st.sampled_from([True, False, False]))
    kernel = (1, 1) if pointwise else (integer(1, 5), integer(1, 5))
    dilation = (integer(1, 3), integer(1, 2))
    padding = (0, 0) if pointwise else (integer(0, 4), integer(0, 4))
    least = [max(1, d * (k - 1) + 1 - 2 * p) for k, p, d in zip(kernel, padding, dilation, strict=True)]
    no_halo = padding == (0, 0)
    y_layout = draw(st.sampled_from(["arena", "arena", "tensor"]))
    halo = st.tuples(*[st.integers(0, 3)] * 4)
    return {
        "groups": groups,
        "kernel": kernel,
        "dilation": dilation,
        "padding": padding,
        "stride": (integer(1, 4), integer(1, 4)),
        "size": (least[0] + integer(0, 18), least[1] + draw(st.sampled_from([0, 2, 4, 7, 13, 14, 28, 40]))),
        "batch": integer(1, 9),
        "channels": groups * integer(1, 9),
        "filters": groups * draw(st.sampled_from([1, 3, 4, 5, 8, 13, 16, 20, 31, 32, 48, 64, 70])),
        "block": draw(st.sampled_from([1, 3, 4, 8, 16, 1000])),
        "density": draw(st.sampled_from([0.0, 0.05, 0.3, 1.0])),
        "bias": draw(st.booleans()),
        "curve": draw(curves()),
        "residual": draw(st.sampled_from(["none", "none", "arena", "tensor", "y"])),
        "x_layout": draw(st.sampled_from(["tensor", "arena"])) if no_halo else "arena",
        "y_layout": y_layout,
        "x_halo": draw(halo),
        "y_halo": draw(halo) if y_layout == "arena" else (0, 0, 0, 0),
        "spare_images": draw(st.sampled_from([0, 0, 3])),
        "guard": draw(st.sampled_from(["start", "end"])),
        "threads": draw(st.sampled_from([1, 1, 3])),
        "seed": integer(0, 1 << 30),
    }


def inputs(c: dict[str, Any], spec: dict[str, Any], dense: Tensor) -> tuple[Tensor, Tensor | None]:
    torch.manual_seed(c["seed"])
    x = torch.randn(c["batch"], c["channels"], *c["size"])
    out = torch.nn.functional.conv2d(x, dense, None, c["stride"], c["padding"], c["dilation"], c["groups"]).shape
    return x, None if c["residual"] == "none" else torch.randn(out)


def run_step(
    family: str, isa: str, c: dict[str, Any], spec: dict[str, Any], x: Tensor, residual: Tensor | None, **more: Any
) -> tuple[Tensor, str]:
    """y, and the kernel that computed it."""
    names = ("x_layout", "y_layout", "y_halo", "spare_images", "threads", "guard")
    halo = c["x_halo"] if c["x_layout"] == "arena" else (0, 0, 0, 0)
    where = more if residual is None else {**more, "residual_layout": c["residual"]}
    added = None if residual is None else residual.numpy()
    y, kernel = _core.conv_step(family, isa, spec, x.numpy(), added, x_halo=halo, **where, **{n: c[n] for n in names})
    assert (isa if isa in ("scalar", "avx2") else "avx512") in kernel  # the best row not above
    return torch.from_numpy(y), kernel


def run(*args: Any, **more: Any) -> Tensor:
    return run_step(*args, **more)[0]


def check_within(got: Tensor, curve: dict[str, Any], before: Tensor, bound: Tensor) -> None:
    """got is the curve of sums `before`, each within its bound.

    No curve is steeper than 1.5, and each is good to 4 units in the last place; GELU, which ends as e^(-v^2 / 2), to
    v^2 of them.
    """
    want = reference.epilogue(before, **curve)
    if "activation" in curve:
        bound = 1.5 * bound + (4 + before.square()) * 2.0**-23 * want.abs() + 1e-37
    assert got.shape == want.shape
    worst = ((got.double() - want).abs() - bound).max()
    assert bool(worst <= 0), worst


def check_close(got: Tensor, c: dict[str, Any], x: Tensor, dense: Tensor, bias: Tensor | None, residual: Any) -> None:
    """|error of the sum| <= (T + 3) 2^-23 (|w| . |x| + |b| + |r|), T rounded products and sums in a row, fused or
    not."""
    sizes = (c["stride"], c["padding"], c["dilation"], c["groups"])
    wide = [None if t is None else t.double() for t in (bias, residual)]
    size = reference.conv_step(
        x.double().abs(), dense.double().abs(), *(None if t is None else t.abs() for t in wide), sizes
    )
    before = reference.conv_step(x.double(), dense.double(), *wide, sizes)
    terms = int((dense.flatten(1) != 0).sum(1).max())
    check_within(got, c["curve"], before, (terms + 3) * 2.0**-23 * size)


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=60, deadline=None)
@given(c=steps())
def test_taps_f32(isa: str, c: dict[str, Any]) -> None:
    spec, dense, bias = make_spec(c)
    x, residual = inputs(c, spec, dense)
    got = run("taps_f32", isa, c, spec, x, residual)
    check_close(got, c, x, dense, bias, residual)


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=20, deadline=None)
@given(c=steps())
def test_threads_batch_and_layouts_give_the_same_bits(isa: str, c: dict[str, Any]) -> None:
    c = {**c, "channels": 16 * c["channels"]}  # work enough to be split
    spec, dense, _ = make_spec(c)
    x, residual = inputs(c, spec, dense)
    got = run("taps_f32", isa, c, spec, x, residual)
    for threads in (2, 5):
        other = {**c, "threads": threads, "y_halo": (0, 0, 0, 0), "y_layout": "tensor"}
        other |= {"residual": "y"} if c["residual"] == "y" else {}
        assert torch.equal(got, run("taps_f32", isa, other, spec, x, residual))
    one = {**c, "spare_images": 0}
    for n in range(len(x)):
        alone = run("taps_f32", isa, one, spec, x[n : n + 1], None if residual is None else residual[n : n + 1])
        assert torch.equal(got[n : n + 1], alone)


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=60, deadline=None)
@given(c=steps())
def test_planes_without_the_halo_that_the_kernel_reaches(isa: str, c: dict[str, Any]) -> None:
    """A caller's tensor, zeros at its edges and nothing read beyond them; the bits of a padded copy."""
    spec, dense, bias = make_spec(c)
    x, residual = inputs(c, spec, dense)
    bare = {**c, "x_layout": "tensor"}
    # With a stride, its phases are copied of x between zeros.
    strided = c["stride"] != (1, 1) and len(spec["taps"]) > 0
    if isa == "scalar" and c["x_layout"] == "arena" and needs_halo(c) and not strided:
        with pytest.raises(ValueError, match="x got a halo of 0"):
            run("taps_f32", isa, bare, spec, x, residual)
        return
    got = run("taps_f32", isa, bare, spec, x, residual)
    check_close(got, c, x, dense, bias, residual)
    assert torch.equal(got, run("taps_f32", isa, c, spec, x, residual))


@pytest.mark.parametrize("core", ["intel", "zen4", "zen5"])
@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa != "scalar"])
def test_edges_of_more_taps_than_a_copy_holds(isa: str, core: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """540 taps in parts, of which each finds its positions; at each stride that vectors are read by (four on wide
    maps). A tap of each channel: phases would be copied for one tap alone."""
    monkeypatch.setenv("STRUCTADMM_AVX512_CORE", core)
    for stride, size in ((1, (14, 19)), (2, (14, 19)), (3, (14, 19)), (2, (14, 61)), (4, (5, 9)), (4, (14, 66))):
        c = {"groups": 1, "kernel": (3, 3), "dilation": (1, 1), "padding": (1, 1), "stride": (stride, stride)}
        c |= {"size": size, "batch": 2, "channels": 540, "filters": 16, "block": 1000, "density": 1 / 9}
        c |= {"bias": True}
        c |= {"curve": {}, "residual": "none", "x_layout": "arena", "y_layout": "tensor", "x_halo": (0, 0, 0, 0)}
        c |= {"y_halo": (0, 0, 0, 0), "spare_images": 0, "guard": "end", "threads": 1, "seed": 0}
        spec, dense, bias = make_spec(c)
        x, _ = inputs(c, spec, dense)
        got, kernel = run_step("taps_f32", isa, {**c, "x_layout": "tensor"}, spec, x, None)
        # Every fourth place of a wide map is collected with AVX2 alone.
        assert ("_phases" in kernel) == (isa != "avx2" and size == (14, 66)), kernel
        check_close(got, c, x, dense, bias, None)
        assert torch.equal(got, run("taps_f32", isa, c, spec, x, None))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("residual,x_layout", [("arena", "arena"), ("y", "tensor"), ("none", "tensor")])
def test_phases_of_some_images(isa: str, residual: str, x_layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of five images at a time, each with its residual, to planes with a halo; on threads that share the copy."""
    monkeypatch.setenv("STRUCTADMM_AVX512_CORE", "zen5")
    c = {"groups": 1, "kernel": (7, 7), "dilation": (1, 1), "padding": (3, 3), "stride": (2, 2), "size": (150, 130)}
    c |= {"batch": 5, "channels": 3, "filters": 20, "block": 1000, "density": 1.0, "bias": True, "curve": {"low": 0.0}}
    c |= {"residual": residual, "x_layout": x_layout, "x_halo": (1, 0, 2, 1), "y_layout": "arena"}
    c |= {"y_halo": (1, 2, 1, 2), "spare_images": 2, "guard": "end", "threads": 1, "seed": 0}
    spec, dense, bias = make_spec(c)
    x, added = inputs(c, spec, dense)
    got, kernel = run_step("taps_f32", isa, c, spec, x, added)
    assert "_phases" in kernel
    check_close(got, c, x, dense, bias, added)
    assert torch.equal(got, run("taps_f32", isa, {**c, "threads": 3}, spec, x, added))


@pytest.mark.parametrize("isa", [i for i in ISAS if i != "scalar"])
@pytest.mark.parametrize("batch,size", [(1, (7, 7)), (1, (13, 13)), (2, (5, 5)), (3, (3, 11)), (1, (10, 10))])
@pytest.mark.parametrize(
    "filters,curve",
    [
        (16, {}),
        (45, {"low": 0.0}),
        (100, {"low": 0.0}),
        (28, {"low": 0.0, "high": 6.0}),
        (64, {"activation": "silu"}),
    ],
)
@pytest.mark.parametrize("bare,residual", [(False, "arena"), (True, "y"), (True, "none")])
@pytest.mark.parametrize("block,density", [(1000, 0.8), (16, 0.3), (4, 0.3)])
def test_pixels_that_fill_no_vector(
    isa: str,
    batch: int,
    size: tuple[int, int],
    filters: int,
    curve: dict[str, Any],
    bare: bool,
    residual: str,
    block: int,
    density: float,
    monkeypatch: Any,
) -> None:
    """Whether or not they are multiplied one by one: tails of filters, more taps than a copy holds (of one block or of
    all), images that are not there, two threads."""
    monkeypatch.setenv("STRUCTADMM_AVX512_CORE", "zen5")
    c = {"groups": 1, "kernel": (3, 3), "dilation": (1, 1), "padding": (1, 1), "stride": (1, 1), "size": size}
    c |= {"batch": batch, "channels": 200, "filters": filters, "block": block, "density": density, "bias": True}
    c |= {"curve": curve, "residual": residual, "x_layout": "tensor" if bare else "arena", "y_layout": "tensor"}
    c |= {"x_halo": (0, 0, 0, 0) if bare else (1, 1, 1, 1), "y_halo": (0, 0, 0, 0)}
    c |= {"spare_images": 2, "guard": "end", "threads": 2, "seed": 3}
    spec, dense, bias = make_spec(c)
    x, more = inputs(c, spec, dense)
    got, kernel = run_step("taps_f32", isa, c, spec, x, more)
    check_close(got, c, x, dense, bias, more)
    if isa == "avx2" and batch == 1 and size != (10, 10) and block == 1000 and (bare or filters > 16):
        assert "_rest" in kernel
    if isa.startswith("avx512") and batch == 1 and size == (7, 7) and block == 1000 and bare:
        assert "_rest" in kernel


@pytest.mark.parametrize("isa", [i for i in ISAS if i != "scalar"])
@pytest.mark.parametrize("size", [(7, 7), (14, 14), (6, 11)])  # one pixel, four, and two beyond whole vectors
@pytest.mark.parametrize(
    "groups,filters,block,curve",
    [
        (1, 100, 1000, {"low": 0.0}),  # six panels, and one of four filters
        (1, 64, 32, {"low": 0.0, "high": 6.0}),
        (1, 45, 1000, {"activation": "silu"}),
        (1, 48, 20, {}),  # a panel and a narrow one in each block
        (2, 80, 1000, {"low": 0.0}),  # a tail of eight filters in each group
        (1, 40, 8, {}),
    ],
)
@pytest.mark.parametrize("residual", ["none", "y", "arena"])
def test_pixels_that_fill_no_vector_on_the_planes(
    isa: str,
    size: tuple[int, int],
    groups: int,
    filters: int,
    block: int,
    curve: dict[str, Any],
    residual: str,
    monkeypatch: Any,
) -> None:
    """Panels go together up to four, of one block; the last may have fewer filters; narrow panels are vectors. With
    AVX-512, as vectors (on a core whose cycles of them are not known) they have the same bits."""
    c = {"groups": groups, "kernel": (1, 1), "dilation": (1, 1), "padding": (0, 0), "stride": (1, 1), "size": size}
    c |= {"channels": 400 * groups, "filters": filters, "block": block, "density": 0.7, "bias": True, "curve": curve}
    c |= {"residual": residual, "x_layout": "arena", "y_layout": "tensor", "x_halo": (0, 0, 0, 0)}
    c |= {"y_halo": (0, 0, 0, 0), "guard": "end", "seed": 4}
    for batch, threads in ((1, 1), (1, 2), (3, 2)):
        c |= {"batch": batch, "threads": threads, "spare_images": batch // 2}
        spec, dense, bias = make_spec(c)
        x, more = inputs(c, spec, dense)
        monkeypatch.setenv("STRUCTADMM_AVX512_CORE", "zen5")
        got, kernel = run_step("taps_f32", isa, c, spec, x, more)
        check_close(got, c, x, dense, bias, more)
        if isa != "avx2":
            assert ("planes_" in kernel and "_rest" in kernel) == (block > 8), kernel
        monkeypatch.setenv("STRUCTADMM_AVX512_CORE", "intel")
        other, kernel = run_step("taps_f32", isa, c, spec, x, more)
        assert torch.equal(got, other) and (isa == "avx2" or "_rest" not in kernel)


@pytest.mark.parametrize("isa", [i for i in ISAS if i != "scalar"])
@pytest.mark.parametrize("filters,block", [(32, 1000), (24, 8), (12, 4)])
def test_x_that_lies_far_is_fetched_a_strip_ahead(isa: str, filters: int, block: int, monkeypatch: Any) -> None:
    """Many strips of a 1x1 layer, of an odd number of taps, with images that are not there; a smaller one of blocks is
    one strip."""
    monkeypatch.setenv("STRUCTADMM_AVX512_CORE", "zen5")
    c = {"groups": 1, "kernel": (1, 1), "dilation": (1, 1), "padding": (0, 0), "stride": (1, 1), "size": (40, 40)}
    c |= {"channels": 131, "filters": filters, "block": block, "density": 1.0, "bias": True, "curve": {"low": 0.0}}
    c |= {"residual": "none", "x_layout": "tensor", "y_layout": "tensor", "x_halo": (0, 0, 0, 0), "batch": 7}
    c |= {"y_halo": (0, 0, 0, 0), "guard": "end", "seed": 6, "spare_images": 3}
    spec, dense, bias = make_spec(c)
    x, _ = inputs(c, spec, dense)
    for images, threads in ((7, 1), (7, 2), (1, 2)):
        got, kernel = run_step("taps_f32", isa, {**c, "threads": threads}, spec, x[:images], None)
        assert "planes_" in kernel or isa == "avx2", kernel
        check_close(got, c, x[:images], dense, bias, None)


@pytest.mark.parametrize("isa", [i for i in ISAS if i != "scalar"])
@pytest.mark.parametrize("width", [3, 4, 5, 7, 9, 13, 14, 20])
@pytest.mark.parametrize("between", [0, 1, 3, 8, 9])
@pytest.mark.parametrize("residual,apart", [("none", 0), ("arena", 0), ("arena", 1), ("arena", 9), ("y", 0)])
def test_vectors_of_two_rows(isa: str, width: int, between: int, residual: str, apart: int) -> None:
    """The places between the rows may be as many in the residual as in y, fewer or more, and more than a vector;
    filters that leave tails, several images in one table, one that is not there, and a limit above."""
    c = {"groups": 1, "kernel": (1, 1), "dilation": (1, 1), "padding": (0, 0), "channels": 5, "density": 1.0}
    c |= {"block": 1000, "bias": True, "residual": residual, "x_layout": "arena", "x_halo": (0, 0, 0, 0)}
    c |= {"y_layout": "arena" if between else "tensor", "y_halo": (1 if between else 0, between, 0, between)}
    c |= {"guard": "end", "threads": 1, "seed": 5}
    for batch, stride, filters, curve in (
        (1, 1, 40, {"low": 0.0}),
        (3, 1, 23, {"low": 0.0, "high": 1.0}),
        (2, 2, 64, {}),
    ):
        c |= {"batch": batch, "stride": (stride, stride), "filters": filters, "curve": curve}
        c |= {"size": (5 * stride, width * stride), "spare_images": batch // 2}
        spec, dense, bias = make_spec(c)
        x, more = inputs(c, spec, dense)
        got, kernel = run_step("taps_f32", isa, c, spec, x, more, residual_halo=(0, apart, 0, apart))
        check_close(got, c, x, dense, bias, more)
        if isa == "avx2" and width > 3:  # the sums of narrower maps are few enough for filters kernels
            assert "panel_" in kernel or "planes_" in kernel, (batch, kernel)


def needs_halo(c: dict[str, Any]) -> bool:
    axes = zip(c["size"], c["kernel"], c["stride"], c["padding"], c["dilation"], strict=True)
    reach = [((n + 2 * p - d * (k - 1) - 1) // s * s + d * (k - 1) - p, n, p) for n, k, s, p, d in axes]
    return any(p > 0 or last >= n for last, n, p in reach)


CASE: dict[str, Any] = {
    "groups": 1, "kernel": (3, 3), "dilation": (1, 1), "padding": (1, 1), "stride": (1, 1), "size": (9, 9), "batch": 2,
    "channels": 3, "filters": 40, "block": 8, "density": 1.0, "bias": True, "curve": {}, "residual": "none",
    "x_layout": "arena", "y_layout": "arena", "x_halo": (0, 0, 0, 0), "y_halo": (1, 1, 1, 1), "spare_images": 0,
    "guard": "end", "threads": 1, "seed": 0,
}  # fmt: skip


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("block", [4, 8, 1000])
@pytest.mark.parametrize("curve", ["relu", *CURVES])
def test_nan_and_infinity(isa: str, block: int, curve: str) -> None:
    c = {**CASE, "block": block, "curve": {"low": 0.0} if curve == "relu" else {"activation": curve, "slope": 0.1}}
    spec, dense, bias = make_spec(c)
    x, _ = inputs(c, spec, dense)
    x[0, 1, 4, 4] = torch.nan
    x[1, 2, 0, 0] = torch.inf
    got = run("taps_f32", isa, c, spec, x, None)
    assert bias is not None
    before = reference.conv_step(x.double(), dense.double(), bias.double(), None, ((1, 1), (1, 1), (1, 1), 1))
    want = reference.epilogue(before, **c["curve"])
    defined = before != -torch.inf  # some curves are inf * 0 there, or their limit, as torch's own are
    assert torch.equal(got.isnan() & defined, want.isnan() & defined) and bool(want.isnan().any())
    assert torch.equal(got.isinf() & defined, want.isinf() & defined)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("filters", [24, 400])
@pytest.mark.parametrize("batch", [1, 3])
def test_weights_and_pixels_beyond_the_cache_give_the_same_bits(isa: str, filters: int, batch: int) -> None:
    """A 1 x 1 layer of a megabyte of weights, or pixels, comes in blocks of taps: the order of a sum stays."""
    c = {**CASE, "kernel": (1, 1), "padding": (0, 0), "size": (12, 64), "batch": batch, "channels": 700}
    c |= {"filters": filters, "block": 1000, "bias": True, "y_halo": (0, 0, 0, 0)}
    spec, dense, bias = make_spec(c)
    x, _ = inputs(c, spec, dense)
    got = run("taps_f32", isa, c, spec, x, None)
    check_close(got, c, x, dense, bias, None)
    assert torch.equal(got, run("taps_f32", isa, {**c, "threads": 3, "x_layout": "tensor"}, spec, x, None))
    few = {**spec, "out_channels": 20, "block_filters": [20], "weight": spec["weight"][: 20 * 700]}
    few["bias"] = spec["bias"][:20]
    assert torch.equal(got[:, :20, :2], run("taps_f32", isa, c, few, x[:, :, :2].contiguous(), None))


@pytest.mark.parametrize("isa", ISAS)
def test_filters_without_taps_emit_the_epilogue_of_their_bias(isa: str) -> None:
    c = {**CASE, "density": 0.0, "curve": {"activation": "silu"}, "residual": "arena"}
    spec, dense, bias = make_spec(c)
    x, residual = inputs(c, spec, dense)
    got = run("taps_f32", isa, c, spec, x * torch.nan, residual)
    assert bias is not None and residual is not None
    torch.testing.assert_close(got, torch.nn.functional.silu(bias.view(1, -1, 1, 1) + residual))


@pytest.mark.parametrize("isa", ISAS)
def test_subnormal_numbers_are_not_lost(isa: str) -> None:
    c = {**CASE, "channels": 1, "kernel": (1, 1), "padding": (0, 0), "bias": False}
    spec, dense, _ = make_spec(c)
    spec["weight"] = [1.0] * len(spec["weight"])
    x = torch.full((2, 1, 9, 9), 1e-41)
    got = run("taps_f32", isa, c, spec, x, None)
    assert torch.equal(got, x.expand(2, 40, 9, 9))


def test_bad_arguments_are_errors() -> None:
    spec, dense, _ = make_spec(CASE)
    x = np.zeros((2, 3, 9, 9), np.float32)
    with pytest.raises(ValueError, match="halo"):
        _core.conv_step("taps_f32", "scalar", spec, x, x_halo=(-1, 0, 0, 0))
    with pytest.raises(ValueError, match="x has 4 channels, wanted 3"):
        _core.conv_step("taps_f32", "scalar", spec, np.zeros((2, 4, 9, 9), np.float32))
    with pytest.raises(ValueError, match="out_channels"):
        _core.conv_step("taps_f32", "scalar", {**spec, "out_channels": 41}, x)
    with pytest.raises(ValueError, match="family"):
        _core.conv_step("taps", "scalar", spec, x)
