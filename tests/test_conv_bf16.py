"""Compacted convolution in bf16: every instruction set against F.conv2d in f64 over rounded operands."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import structadmm
from structadmm import _core, reference
from test_conv_steps import CASE, inputs, make_spec, steps

ISAS = _core.supported_isas()


def rounded(x: Tensor) -> Tensor:
    return x.bfloat16().float()


@pytest.mark.parametrize("isa", ISAS)
def test_weights_that_the_cache_does_not_keep(isa: str) -> None:
    """Strips of several pairs of tiles, the last of them short: a weight of one block, in place, with two threads."""
    c = {**CASE, "size": (14, 14), "channels": 96, "filters": 512, "block": 1000, "batch": 1, "residual": "y"}
    c |= {"curve": {"low": 0.0}, "y_layout": "tensor", "y_halo": (0, 0, 0, 0), "x_halo": (1, 1, 1, 1)}
    spec, dense, bias = make_spec(c)
    x, residual = inputs(c, spec, dense)
    got = run(isa, c, spec, x, residual)
    check_close(got, c, x, dense, bias, residual)
    assert torch.equal(got, run(isa, {**c, "threads": 3}, spec, x, residual))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("stride", [3, 4, 5])
@pytest.mark.parametrize("width", [33, 66, 131])
@pytest.mark.parametrize("guard", ["start", "end"])
def test_strides_of_two_windows(isa: str, stride: int, width: int, guard: str) -> None:
    """Sixteen pixels of a wide map, more than 32 elements of x apart; an odd number of taps; at both ends of memory."""
    c = {**CASE, "size": (9, width), "kernel": (5, 3), "padding": (0, 0), "stride": (stride, stride), "filters": 40}
    c |= {"channels": 3, "block": 1000, "density": 1.0, "batch": 2, "residual": "none", "x_layout": "tensor"}
    c |= {"guard": guard, "y_layout": "tensor", "y_halo": (0, 0, 0, 0), "groups": 1, "dilation": (1, 1)}
    spec, dense, bias = make_spec(c)
    x, _ = inputs(c, spec, dense)
    check_close(run(isa, c, spec, x, None), c, x, dense, bias, None)


def is_rounded(got: Tensor, x: Tensor) -> bool:
    """Whether got is x in bf16. Subnormal numbers may be flushed before, even one that would be rounded to 2^-126."""
    subnormal = x.abs() < 2.0**-126
    return bool((torch.where(subnormal, got.abs() <= 2.0**-126, got == rounded(x)) | x.isnan() & got.isnan()).all())


def run(isa: str, c: dict[str, Any], spec: dict[str, Any], x: Tensor, residual: Tensor | None) -> Tensor:
    names = ("x_layout", "y_layout", "y_halo", "spare_images", "threads", "guard")
    halo = c["x_halo"] if c["x_layout"] == "arena" else (0, 0, 0, 0)
    where = {} if residual is None else {"residual_layout": c["residual"]}
    added = None if residual is None else residual.numpy()
    args = {"x_halo": halo, **where, **{n: c[n] for n in names}}
    args |= {n: c[n] for n in ("x_dtype", "y_dtype") if n in c}
    y, kernel = _core.conv_step("taps_bf16", isa, spec, x.numpy(), added, dtype="bf16", **args)
    assert kernel.startswith("gemm_bf16_") and kernel.endswith("__" + isa)
    return torch.from_numpy(y)


def check_close(got: Tensor, c: dict[str, Any], x: Tensor, dense: Tensor, bias: Tensor | None, residual: Any) -> None:
    """Operands are rounded to bf16 on both sides; products of two are exact in f32.

    The sum of T of them with bias and residual is off by (T + 3) 2^-23 of the sum of sizes, whatever the order and
    whether products are fused; no curve is steeper than 1.5; the result is rounded once, by 2^-8 of it. Products of
    less than 2^-126 may be flushed.
    """
    sizes = (c["stride"], c["padding"], c["dilation"], c["groups"])
    x, dense = rounded(x).double(), rounded(dense).double()
    wide = [None if bias is None else bias.double(), None if residual is None else rounded(residual).double()]
    size = reference.conv_step(x.abs(), dense.abs(), *(None if t is None else t.abs() for t in wide), sizes)
    before = reference.conv_step(x, dense, *wide, sizes)
    want = reference.epilogue(before, **c["curve"])
    terms = int((dense.flatten(1) != 0).sum(1).max())
    bound = 1.5 * (terms + 3) * 2.0**-23 * size + (4 + before.square()) * 2.0**-23 * want.abs()
    bound = 1.01 * bound + 2.0**-8 * want.abs() + 1e-36
    assert got.shape == want.shape
    worst = ((got.double() - want).abs() - bound).max()
    assert bool(worst <= 0), worst


@st.composite
def bf16_steps(draw: Any) -> dict[str, Any]:
    c = draw(steps())
    # Several tiles of filters and taps, and blocks of whole units.
    return {
        **c,
        "channels": c["channels"] * draw(st.sampled_from([1, 1, 5, 11])),
        "block": draw(st.sampled_from([c["block"], 16, 32, 48, 1000])),
    }


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=60, deadline=None)
@given(c=bf16_steps())
def test_taps_bf16(isa: str, c: dict[str, Any]) -> None:
    spec, dense, bias = make_spec(c)
    x, residual = inputs(c, spec, dense)
    check_close(run(isa, c, spec, x, residual), c, x, dense, bias, residual)


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=15, deadline=None)
@given(c=bf16_steps())
def test_threads_batch_and_layouts_give_the_same_bits(isa: str, c: dict[str, Any]) -> None:
    c = {**c, "channels": 16 * c["groups"]}
    spec, dense, _ = make_spec(c)
    x, residual = inputs(c, spec, dense)
    got = run(isa, c, spec, x, residual)
    other = {**c, "threads": 3, "y_halo": (0, 0, 0, 0), "y_layout": "tensor"}
    assert torch.equal(got, run(isa, other, spec, x, residual))
    for n in range(len(x)):
        one = None if residual is None else residual[n : n + 1]
        assert torch.equal(got[n : n + 1], run(isa, {**c, "spare_images": 0}, spec, x[n : n + 1], one))


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=60, deadline=None)
@given(c=bf16_steps())
def test_f32_out(isa: str, c: dict[str, Any]) -> None:
    """The sums as they are: what bf16 then gives is their rounding, but for subnormals, which that flushes."""
    c = {**c, "residual": "arena" if c["residual"] == "y" else c["residual"]}
    spec, dense, bias = make_spec(c)
    x, residual = inputs(c, spec, dense)
    for layout in ("tensor", "arena"):
        place = {"y_layout": layout, "y_halo": c["y_halo"] if layout == "arena" else (0, 0, 0, 0)}
        got = run(isa, {**c, **place, "y_dtype": "f32"}, spec, x, residual)
        want = run(isa, c, spec, x, residual)
        assert is_rounded(want, got)
    check_close(got, c, x, dense, bias, residual)


@st.composite
def same_size_steps(draw: Any) -> dict[str, Any]:
    """Convolutions that keep the map's size, for which rows of the caller's x are rows of outputs."""
    c = draw(bf16_steps())
    kernel, dilation = draw(st.sampled_from([(1, 1), (3, 3), (5, 3), (1, 5)])), draw(st.sampled_from([(1, 1), (2, 1)]))
    padding = tuple((k - 1) * d // 2 for k, d in zip(kernel, dilation, strict=True))
    size = draw(st.sampled_from([c["size"], (7, 7), (16, 16), (13, 17), (3, 40), (9, 32)]))
    return {**c, "kernel": kernel, "dilation": dilation, "padding": padding, "stride": (1, 1), "size": size,
            "x_layout": "arena"}  # fmt: skip


F32_ISAS = [isa for isa in ISAS if isa.endswith("_bf16")]


@pytest.mark.skipif(not F32_ISAS, reason="this CPU has no bf16 products")
@pytest.mark.parametrize("isa", F32_ISAS)
@settings(max_examples=150, deadline=None)
@given(c=same_size_steps(), few=st.booleans())
def test_f32_in(isa: str, c: dict[str, Any], few: bool) -> None:
    """Between pages that fault on both sides: the same bits as from planes that were rounded before."""
    c = {**c, "density": 0.1} if few else c
    spec, dense, _ = make_spec(c)
    x, residual = inputs(c, spec, dense)
    want = run(isa, c, spec, x, residual)
    try:
        got = run(isa, {**c, "x_dtype": "f32", "x_layout": "tensor"}, spec, x, residual)
    except ValueError as error:
        # Many taps of each channel: an import is faster, and the step refuses.
        assert "planes got another dtype" in str(error) and len(spec["taps"]) > 4 * c["channels"]
        return
    assert torch.equal(got, want)


@pytest.mark.skipif(not F32_ISAS, reason="this CPU has no bf16 products")
@pytest.mark.parametrize("isa", F32_ISAS)
def test_f32_in_takes_what_lies_beyond_the_edge_for_zero(isa: str) -> None:
    """The neighbours in memory of an edge are pixels of other rows and channels: infinity there must not come in."""
    c = {**CASE, "size": (8, 16), "channels": 3, "filters": 4, "density": 0.4, "batch": 2, "curve": {}}
    spec, dense, bias = make_spec(c)
    x, _ = inputs(c, spec, dense)
    x[:, :, :, 0] = torch.inf
    x[:, :, :, -1] = -torch.inf
    got = run(isa, {**c, "x_dtype": "f32", "x_layout": "tensor"}, spec, x, None)
    assert torch.equal(got.isnan(), run(isa, c, spec, x, None).isnan())
    assert bool(got[:, :, :, 4:-4].isfinite().all()) and bias is not None


@pytest.mark.parametrize("isa", ISAS)
def test_work_enough_to_be_split(isa: str) -> None:
    for size, filters in (((14, 14), 64), ((4, 4), 512)):  # by pixels, and by filters
        c = {**CASE, "size": size, "channels": 48, "filters": filters, "batch": 1, "block": 1000, "density": 0.5}
        spec, dense, bias = make_spec(c)
        x, _ = inputs(c, spec, dense)
        got = run(isa, c, spec, x, None)
        check_close(got, c, x, dense, bias, None)
        for threads in (2, 5):
            assert torch.equal(got, run(isa, {**c, "threads": threads}, spec, x, None))


@pytest.mark.parametrize("isa", F32_ISAS)
def test_panels_in_place_of_the_ones_before(isa: str) -> None:
    """A large y of blocks so long that strips are single pairs: long, without taps, short, and long again."""
    c = {**CASE, "size": (105, 106), "channels": 256, "filters": 52, "batch": 1, "block": 16, "density": 1.0}
    spec, dense, bias = make_spec(c)
    ends, taps, keep = [0], [], [2085, 0, 33, 2304]
    for block, n in enumerate(keep):
        dense.flatten(1)[16 * block : 16 * (block + 1), n:] = 0
        taps += list(range(n))
        ends.append(len(taps))
    filters = [16, 16, 16, 4]
    first = [16 * b for b in range(4)]
    weight = [dense.flatten(1)[f : f + m, :n].flatten() for f, m, n in zip(first, filters, keep, strict=True)]
    spec |= {"weight": torch.cat(weight).tolist(), "taps": taps, "block_filters": filters, "block_taps": ends}
    x, _ = inputs(c, spec, dense)
    got = run(isa, c, spec, x, None)
    check_close(got, c, x, dense, bias, None)
    assert torch.equal(got, run(isa, {**c, "threads": 3}, spec, x, None))


@pytest.mark.parametrize("isa", ISAS)
def test_nan_and_infinity_stay_where_they_belong(isa: str) -> None:
    c = {**CASE, "curve": {"low": 0.0}, "channels": 5}  # 45 taps: the last step is not full
    spec, dense, bias = make_spec(c)
    x, _ = inputs(c, spec, dense)
    x[0, 1, 4, 4] = torch.nan
    x[1, 2, 0, 0] = torch.inf
    got = run(isa, c, spec, x, None)
    assert bias is not None
    sums = reference.conv_step(
        rounded(x).double(), rounded(dense).double(), bias.double(), None, ((1, 1), (1, 1), (1, 1), 1)
    )
    want = reference.epilogue(sums, **c["curve"])
    assert torch.equal(got.isnan(), want.isnan()) and bool(want.isnan().any())
    assert torch.equal(got.isinf(), want.isinf()) and bool(want.isinf().any())


@pytest.mark.parametrize("isa", ISAS)
def test_filters_without_taps_emit_the_epilogue_of_their_bias(isa: str) -> None:
    c = {**CASE, "density": 0.0, "curve": {"activation": "silu"}, "residual": "arena"}
    spec, dense, bias = make_spec(c)
    x, residual = inputs(c, spec, dense)
    got = run(isa, c, spec, x * torch.nan, residual)
    assert bias is not None and residual is not None
    want = torch.nn.functional.silu(bias.view(1, -1, 1, 1) + rounded(residual))
    torch.testing.assert_close(got, want, rtol=2.0**-8, atol=1e-30)


PROBE = """
from structadmm import _core
spec = {"in_channels": 1, "out_channels": 1, "weight": [1.0], "taps": [0], "block_filters": [1], "block_taps": [0, 1]}
import numpy as np
print(_core.isa(), _core.conv_step("taps_bf16", _core.isa(), spec, np.ones((1, 1, 3, 3), "f4"), dtype="bf16")[1])
"""


def test_a_forced_isa_runs() -> None:
    package = str(Path(structadmm.__file__).resolve().parent.parent)
    for isa in ISAS:
        env = {**os.environ, "PYTHONPATH": package, "STRUCTADMM_ISA": isa}
        done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
        ran, kernel = done.stdout.split()
        assert ran == isa and kernel.endswith("__" + isa)


def test_bad_arguments_are_errors() -> None:
    spec, dense, _ = make_spec(CASE)
    x = torch.zeros(2, 3, 9, 9).numpy()
    with pytest.raises(ValueError, match="conv_taps_bf16: planes got another dtype, wanted bf16"):
        _core.conv_step("taps_bf16", "scalar", spec, x)
    with pytest.raises(ValueError, match="conv_taps_bf16: block_filters got 40 filters in all, wanted 41"):
        _core.conv_step("taps_bf16", "scalar", {**spec, "out_channels": 41}, x, dtype="bf16")
    with pytest.raises(ValueError, match="conv_taps_bf16: x has 4 channels, wanted 3"):
        _core.conv_step("taps_bf16", "scalar", spec, torch.zeros(2, 4, 9, 9).numpy(), dtype="bf16")
