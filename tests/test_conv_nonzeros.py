"""The family "nonzeros" and its linear layer: single weights at random against F.conv2d in f64, on every ISA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from structadmm import _core
from test_conv_steps import CASE, check_close, curves, inputs, make_spec, run, steps

# Those with kernels of their own.
ISAS = [isa for isa in _core.supported_isas() if isa in ("scalar", "avx2", "avx512")]


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=60, deadline=None)
@given(c=steps(), images=st.integers(1, 40), block=st.sampled_from([1, 1, 1, 8]))
def test_conv_is_the_dense_convolution(isa: str, c: dict[str, Any], images: int, block: int) -> None:
    c = {**c, "block": block, "batch": images if c["size"][0] * c["size"][1] < 200 else c["batch"]}
    spec, dense, bias = make_spec(c)
    x, residual = inputs(c, spec, dense)
    check_close(run("nonzeros", isa, c, spec, x, residual), c, x, dense, bias, residual)


LANES = {"scalar": 4, "avx2": 8, "avx512": 16}


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=80, deadline=None)
@given(c=steps(), data=st.data())
def test_planes_in_lanes_hold_the_same(isa: str, c: dict[str, Any], data: Any) -> None:
    rows = data.draw(st.sampled_from([n for n in (1, 2, 4) if n <= LANES[isa]]))
    cols = data.draw(st.sampled_from([n for n in (1, 2, 4) if rows * n <= LANES[isa]]))
    grid = (LANES[isa] // rows // cols, rows, cols)
    if rows * cols > 1:  # a rectangle of outputs is that of inputs
        c["kernel"] = tuple(k | 1 for k in c["kernel"])
        c["padding"] = tuple(d * (k // 2) for k, d in zip(c["kernel"], c["dilation"], strict=True))
        c["size"] = tuple(n * s * data.draw(st.integers(1, 6)) for n, s in zip(grid[1:], c["stride"], strict=True))
    where = st.sampled_from(["lanes", "arena"])
    c |= {"block": 1, "batch": data.draw(st.integers(1, 2 * grid[0] + 1)), "x_layout": data.draw(where)}
    c |= {"y_layout": data.draw(where), "x_halo": (0, 0, 0, 0), "y_halo": (0, 0, 0, 0)}
    c |= {"residual": data.draw(st.sampled_from(["none", "lanes", "arena", "tensor", "y"]))}
    spec, dense, bias = make_spec(c)
    x, residual = inputs(c, spec, dense)
    got = run("nonzeros", isa, c, spec, x, residual, grid=grid)
    check_close(got, c, x, dense, bias, residual)
    plain = {**c, "x_layout": "arena", "y_layout": "arena", "residual": "none" if residual is None else "arena"}
    assert torch.equal(got, run("nonzeros", isa, plain, spec, x, residual))


def test_a_grid_that_does_not_fit_is_an_error() -> None:
    spec, _, _ = make_spec({**CASE, "block": 1})
    x = torch.zeros(2, 3, 9, 9).numpy()
    for grid in ((2, 1, 1), (1, 2, 2)):
        with pytest.raises(ValueError, match="conv_nonzeros: planes in lanes got a grid of .* wanted 4 lanes that fit"):
            _core.conv_step("nonzeros", "scalar", spec, x, y_layout="lanes", grid=grid)
    with pytest.raises(ValueError, match="planes in lanes"):
        _core.conv_step("taps_f32", "scalar", spec, x, y_layout="lanes", grid=(4, 1, 1))


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 40),
    features=st.integers(1, 700),
    filters=st.integers(1, 40),
    density=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    residual=st.sampled_from(["none", "arena", "tensor", "y"]),
    layouts=st.tuples(*[st.sampled_from(["arena", "tensor"])] * 2),
    curve=curves(),
    threads=st.integers(1, 3),
    guard=st.sampled_from(["start", "end"]),
    seed=st.integers(0, 1 << 30),
)
def test_linear_is_the_dense_product(
    isa: str,
    rows: int,
    features: int,
    filters: int,
    density: float,
    residual: str,
    layouts: tuple[str, str],
    curve: dict[str, Any],
    threads: int,
    guard: str,
    seed: int,
) -> None:
    c = {**CASE, "kernel": (1, 1), "padding": (0, 0), "size": (1, 1), "y_halo": (0, 0, 0, 0), "block": 1}
    c |= {"batch": rows, "channels": features, "filters": filters, "density": density, "residual": residual}
    c |= {"x_layout": layouts[0], "y_layout": layouts[1], "curve": curve, "threads": threads, "guard": guard}
    c |= {"seed": seed}
    spec, dense, bias = make_spec(c)
    x, added = inputs(c, spec, dense)
    check_close(run("linear_nonzeros", isa, c, spec, x, added), c, x, dense, bias, added)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", [(14, 14), (4, 4), (1, 1)])
def test_an_image_does_not_depend_on_its_batch_or_the_threads(isa: str, size: tuple[int, int]) -> None:
    c = {**CASE, "size": size, "batch": 33, "channels": 70, "filters": 48, "block": 1, "density": 0.1}
    spec, dense, _ = make_spec(c)
    x, _ = inputs(c, spec, dense)
    alone = torch.cat([run("nonzeros", isa, c, spec, x[n : n + 1], None) for n in range(33)])
    for batch in (2, 5, 16, 33):
        for threads in (1, 2, 3):
            other = {**c, "threads": threads, "spare_images": batch % 3}
            assert torch.equal(run("nonzeros", isa, other, spec, x[:batch], None), alone[:batch])


@pytest.mark.parametrize("isa", ISAS)
def test_filters_that_are_summed_together_keep_their_places(isa: str) -> None:
    """Sorted by how many weights they have, in conv groups that are no whole number of windows, on several threads. A
    map of four pixels is at most four vectors a filter, of which registers hold those of several filters."""
    c = {**CASE, "size": (2, 2), "batch": 33, "channels": 400, "filters": 80, "groups": 2, "block": 1, "density": 0.3}
    spec, dense, bias = make_spec(c)
    x, _ = inputs(c, spec, dense)
    one = run("nonzeros", isa, c, spec, x, None)
    check_close(one, c, x, dense, bias, None)
    for threads in (2, 3):
        assert torch.equal(run("nonzeros", isa, {**c, "threads": threads}, spec, x, None), one)


@pytest.mark.parametrize("isa", ISAS)
def test_nan_stays_in_its_outputs_and_a_zero_weight_does_not_see_it(isa: str) -> None:
    c = {**CASE, "size": (6, 6), "batch": 17, "channels": 2, "filters": 2, "block": 2, "bias": False}
    c |= {"curve": {"low": 0.0}}
    spec, _, _ = make_spec(c)
    w = torch.ones(2, 2, 9)
    w[0, 1] = w[1, 0] = 0.0
    spec["weight"] = w.flatten().tolist()
    x = torch.zeros(17, 2, 6, 6)
    x[3, 0, 2, 2] = torch.nan
    want = torch.zeros(17, 2, 6, 6, dtype=torch.bool)
    want[3, 0, 1:4, 1:4] = True
    assert torch.equal(run("nonzeros", isa, c, spec, x, None).isnan(), want)


@pytest.mark.parametrize("isa", ISAS)
def test_filters_without_weights_emit_the_epilogue_of_their_bias(isa: str) -> None:
    c = {**CASE, "density": 0.0, "curve": {"activation": "silu"}, "residual": "arena"}
    spec, dense, bias = make_spec(c)
    x, residual = inputs(c, spec, dense)
    got = run("nonzeros", isa, c, spec, x * torch.nan, residual)
    assert bias is not None and residual is not None
    torch.testing.assert_close(got, torch.nn.functional.silu(bias.view(1, -1, 1, 1) + residual))


def test_errors_name_what_is_wrong() -> None:
    spec, _, _ = make_spec({**CASE, "block": 1})
    x = torch.zeros(2, 3, 9, 9).numpy()
    with pytest.raises(ValueError, match=r"conv_nonzeros: taps\[0\] got 99, wanted 0 to 26"):
        _core.conv_step("nonzeros", "scalar", {**spec, "taps": [99] * len(spec["taps"])}, x)
    with pytest.raises(ValueError, match="conv_nonzeros: bias got 3 values, wanted 40"):
        _core.conv_step("nonzeros", "scalar", {**spec, "bias": [0.0] * 3}, x)
    with pytest.raises(ValueError, match="conv_nonzeros: x got planes of 4 x 9 x 9, wanted 3 x 9 x 9"):
        _core.conv_step("nonzeros", "scalar", spec, torch.zeros(2, 4, 9, 9).numpy())
    with pytest.raises(ValueError, match="conv_nonzeros: got stride 0"):
        _core.conv_step("nonzeros", "scalar", {**spec, "stride": (0, 1)}, x)
