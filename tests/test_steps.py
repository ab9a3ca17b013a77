"""The steps of a segment that are no convolutions, on planes with halos, against torch in f64 (or its own rule)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from structadmm import _core

ISAS = _core.supported_isas()
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
# Half a unit in the last place of what is stored.
ROUNDING = {"f32": 2.0**-24, "bf16": 2.0**-8, "f16": 2.0**-11}

halos = st.one_of(st.none(), st.tuples(*[st.integers(0, 3)] * 4))
sizes = st.tuples(st.integers(1, 3), st.integers(1, 37), st.integers(1, 9), st.integers(1, 40))
planes = st.sampled_from(["f32", "bf16"])
doors = st.fixed_dictionaries(
    {
        "isa": st.sampled_from(ISAS),
        "dtype": planes,
        "x_halo": halos,
        "y_halo": halos,
        "b_halo": halos,
        "threads": st.sampled_from([1, 3]),
        "spare_images": st.integers(0, 1),
    }
)

EPILOGUES: list[tuple[dict[str, Any], Callable[[Tensor], Tensor]]] = [
    ({}, lambda v: v),
    ({"low": 0.0}, F.relu),
    ({"low": 0.0, "high": 6.0}, F.relu6),
    ({"activation": "silu"}, F.silu),
    ({"activation": "gelu"}, F.gelu),
    ({"activation": "gelu_tanh"}, lambda v: F.gelu(v, approximate="tanh")),
    ({"activation": "hardswish"}, F.hardswish),
    ({"activation": "hardsigmoid"}, F.hardsigmoid),
    ({"activation": "sigmoid"}, torch.sigmoid),
    ({"activation": "tanh"}, torch.tanh),
    ({"activation": "leaky_relu", "slope": 0.1}, lambda v: F.leaky_relu(v, 0.1)),
]


def random(shape: tuple[int, ...], seed: int, dtype: str = "f32") -> Tensor:
    """Values of that dtype, as f32."""
    rng = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=rng) * 2).to(DTYPES[dtype]).float()


def check(got: np.ndarray, want: Tensor, dtype: str, error: Tensor | float) -> None:
    """|got - want| <= error + a rounding to dtype (and to its smallest subnormal)."""
    bound = error + ROUNDING[dtype] * (want.abs() + error) * 1.01 + 1e-37
    off = (torch.from_numpy(got).double() - want).abs()
    assert got.shape == tuple(want.shape) and not torch.isnan(off).any()
    assert bool((off <= bound).all()), f"off by {(off - bound).max()}"


def user_tensor(x: Tensor, dtype: str, layout: str) -> Tensor:
    x = x.to(DTYPES[dtype])
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.t().contiguous().t()
    if layout == "every_other_column":
        return torch.stack([x, torch.full_like(x, torch.nan)], -1).flatten(-2)[..., ::2]
    if layout == "transposed":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "cropped":
        return F.pad(x, (1, 3), value=torch.nan)[..., 1:-3]
    if layout == "one_image_expanded":
        return x[:1].expand(x.shape)
    return x.contiguous()


LAYOUTS = ["contiguous", "channels_last", "every_other_column", "transposed", "cropped", "one_image_expanded"]


def as_numpy(x: Tensor) -> np.ndarray:
    return x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.numpy()


@settings(max_examples=300, deadline=None)
@given(doors, sizes, st.booleans(), st.sampled_from(list(DTYPES)), st.sampled_from(LAYOUTS))
def test_import_copies_and_rounds_once(door: Any, size: Any, flat: Any, dtype: Any, layout: Any) -> None:
    x = user_tensor(random(size[:2] if flat else size, 1), dtype, layout)
    d = _core.StepDoor(**door)
    got = d.import_tensor(as_numpy(x), (size[1], 1, 1) if flat else size[1:])
    want = x.to(DTYPES[door["dtype"]]).float()
    assert np.array_equal(got.reshape(x.shape), want.numpy()), d.kernel


@settings(max_examples=200, deadline=None)
@given(doors, sizes, st.sampled_from(list(DTYPES)), st.sampled_from(LAYOUTS), st.data())
def test_import_of_some_channels(door: Any, size: Any, dtype: Any, layout: Any, data: Any) -> None:
    x = user_tensor(random(size, 1), dtype, layout)
    some = sorted(data.draw(st.sets(st.integers(0, size[1] - 1), min_size=1)))
    d = _core.StepDoor(**door)
    got = d.import_tensor(as_numpy(x), size[1:], some)
    want = x.to(DTYPES[door["dtype"]]).float()
    assert np.array_equal(got[:, some], want.numpy()[:, some]), d.kernel


def test_import_leaves_out_channels() -> None:
    d = _core.StepDoor(ISAS[-1])
    x = random((2, 7, 3, 5), 1)
    got, some = d.import_tensor(x.numpy(), (7, 3, 5), [1, 2, 5]), [1, 2, 5]
    left_out = [c for c in range(7) if c not in some]
    assert np.array_equal(got[:, some], x.numpy()[:, some]) and np.isnan(got[:, left_out]).all()


@pytest.mark.parametrize("isa", ISAS)
def test_import_of_some_channels_of_columns_in_channels_last(isa: str) -> None:
    """Width 1, and a stride of 1 for it as for the channels: neither rows of pixels nor NHWC."""
    x = random((2, 9, 11), 1).contiguous().transpose(1, 2).contiguous().transpose(1, 2).unsqueeze(-1)
    assert x.stride() == (99, 1, 9, 1)
    for halo in ((1, 0, 1, 0), (0, 0, 0, 0), (1, 1, 1, 1)):
        got = _core.StepDoor(isa, y_halo=halo).import_tensor(x.numpy(), (9, 11, 1), [0, 3, 4, 8])
        assert np.array_equal(got[:, [0, 3, 4, 8]], x.numpy()[:, [0, 3, 4, 8]])


@settings(max_examples=300, deadline=None)
@given(doors, sizes, st.booleans(), st.sampled_from(list(DTYPES)), st.sampled_from(LAYOUTS[:-1]))
def test_export_writes_the_tensor_and_nothing_beside_it(
    door: Any, size: Any, flat: Any, dtype: Any, layout: Any
) -> None:
    size = (*size[:2], 1, 1) if flat else size
    x = random(size, 2, door["dtype"])
    y = user_tensor(torch.zeros(size[:2] if flat else size), dtype, layout)
    whole = y._base if y._base is not None else y
    before = whole.clone()
    d = _core.StepDoor(**door)
    d.export_tensor(x.numpy(), as_numpy(y))
    assert torch.equal(y.float(), x.to(y.dtype).float().reshape(y.shape)), d.kernel
    y.zero_()
    assert torch.equal(whole.float().nan_to_num(7), before.float().nan_to_num(7))


def test_export_writes_a_flattened_output() -> None:
    x = random((2, 5, 3, 4), 3)
    y = np.zeros((2, 5 * 3 * 4), "f4")
    _core.StepDoor(ISAS[-1]).export_tensor(x.numpy(), y.reshape(2, 5, 3, 4))
    assert np.array_equal(y, x.flatten(1).numpy())


@pytest.mark.parametrize("shape", [(1, 3, 32, 40), (1, 3, 33, 17), (2, 64, 16, 16), (1, 20, 7, 7)])
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_channels_last_is_transposed_by_vectors(shape: Any, dtype: Any) -> None:
    x = user_tensor(random(shape, 4), dtype, "channels_last")
    d = _core.StepDoor(ISAS[-1], x_halo=(1, 1, 1, 1), y_halo=(1, 1, 1, 1))
    assert np.array_equal(d.import_tensor(as_numpy(x), shape[1:]), x.float().numpy())
    assert d.kernel.startswith("split_triples" if shape[1] == 3 else "transpose")
    y = torch.zeros_like(x)
    d.export_tensor(x.float().numpy(), as_numpy(y))
    assert torch.equal(x, y) and d.kernel.startswith("transpose")


# Curves are within 2 units in the last place (csrc/simd/activate.h); GELU has an absolute error where it ends.
def curve_error(want: Tensor) -> Tensor:
    return want.abs() * 2.0**-21 + 1e-6


@settings(max_examples=300, deadline=None)
@given(doors, planes, sizes, st.sampled_from(EPILOGUES), st.booleans(), st.booleans())
def test_copy_adds_and_activates(door: Any, y_dtype: Any, size: Any, epilogue: Any, add: Any, in_place: Any) -> None:
    x, r = random(size, 5, door["dtype"]), random(size, 6, door["dtype"])
    in_place = add and in_place
    y_dtype = door["dtype"] if in_place else y_dtype
    d = _core.StepDoor(**door, y_dtype=y_dtype)
    got = d.copy(x.numpy(), r.numpy() if add else None, epilogue[0], in_place)
    summed = x + r if add else x  # one rounding to f32, as in the kernel
    want = epilogue[1](summed.double())
    check(got, want, y_dtype, curve_error(want) if epilogue[0].get("activation") else 0.0)


@settings(max_examples=150, deadline=None)
@given(doors, planes, sizes, st.booleans(), st.sampled_from(EPILOGUES[:4]))
def test_scale_shift(door: Any, y_dtype: Any, size: Any, flat: Any, epilogue: Any) -> None:
    size = (*size[:2], 1, 1) if flat else size
    x, scale, shift = random(size, 7, door["dtype"]), random(size[1:2], 8), random(size[1:2], 9)
    got = _core.StepDoor(**door, y_dtype=y_dtype).scale_shift(x.numpy(), scale.numpy(), shift.numpy(), epilogue[0])
    exact = x.double() * scale.double().view(-1, 1, 1) + shift.double().view(-1, 1, 1)
    want = epilogue[1](exact)
    error = exact.abs() * 2.0**-24  # one rounding to f32; no curve is steeper than 1.1
    check(got, want, y_dtype, 1.1 * error + (curve_error(want) if epilogue[0].get("activation") else 0.0))


@settings(max_examples=150, deadline=None)
@given(doors, planes, sizes, st.booleans(), st.sampled_from(EPILOGUES[:3]))
def test_multiply_by_a_gate_or_a_value(door: Any, y_dtype: Any, size: Any, gate: Any, epilogue: Any) -> None:
    x = random(size, 10, door["dtype"])
    b = random((*size[:2], 1, 1) if gate else size, 11, door["dtype"])
    got = _core.StepDoor(**door, y_dtype=y_dtype).multiply(x.numpy(), b.numpy(), epilogue[0])
    check(got, epilogue[1]((x * b).double()), y_dtype, 0.0)


@settings(max_examples=100, deadline=None)
@given(doors, sizes)
def test_flatten(door: Any, size: Any) -> None:
    x = random(size, 12, door["dtype"])
    door["y_halo"] = (0, 0, 0, 0)
    got = _core.StepDoor(**door).flatten(x.numpy())
    assert np.array_equal(got.reshape(size[0], -1), x.flatten(1).numpy())


@st.composite
def pools(draw: Any) -> dict[str, Any]:
    kernel = draw(st.sampled_from([(1, 1), (2, 2), (3, 3), (3, 3), (5, 2), (1, 4), (7, 7)]))
    max_ = draw(st.booleans())
    dilation = (draw(st.integers(1, 2)), draw(st.integers(1, 2))) if max_ else (1, 1)
    return {
        "max": max_,
        "kernel_size": kernel,
        "stride": (draw(st.integers(1, 4)), draw(st.integers(1, 4))),
        "padding": tuple(draw(st.integers(0, k // 2)) for k in kernel),
        "dilation": dilation,
        "count_include_pad": draw(st.booleans()),
        "divisor_override": draw(st.sampled_from([0, 0, 3])),
        "ceil_mode": draw(st.booleans()),
        "extra": (draw(st.integers(0, 9)), draw(st.integers(0, 60))),
        "special": draw(st.sampled_from([0.0, np.nan, -np.inf])),
    }


@settings(max_examples=400, deadline=None)
@given(doors, st.integers(1, 2), st.integers(1, 5), pools())
def test_pools(door: Any, images: Any, channels: Any, p: Any) -> None:
    p = dict(p)
    extra, special, ceil_mode = p.pop("extra"), p.pop("special"), p.pop("ceil_mode")
    reach = [d * (k - 1) + 1 for k, d in zip(p["kernel_size"], p["dilation"], strict=True)]
    x = random((images, channels, *(r + e for r, e in zip(reach, extra, strict=True))), 13, door["dtype"])
    x[torch.rand(x.shape, generator=torch.Generator().manual_seed(14)) < 0.05] = special if p["max"] else 0.0
    where = (p["kernel_size"], p["stride"], p["padding"])
    if p["max"]:
        want = F.max_pool2d(x.double(), *where, p["dilation"], ceil_mode)
    else:
        options = (ceil_mode, p["count_include_pad"], p["divisor_override"] or None)
        want = F.avg_pool2d(x.double(), *where, *options)
    d = _core.StepDoor(**door)
    got = d.pool(x.numpy(), size=tuple(want.shape[2:]), **p)
    if p["max"]:
        assert np.array_equal(got, want.float().numpy(), equal_nan=True)
    else:
        # n - 1 sums and two divisions, each rounded: (n + 1) 2^-24 of the mean of |x|
        size = F.avg_pool2d(x.double().abs(), *where, *options)
        check(got, want, door["dtype"], (np.prod(p["kernel_size"]) + 2) * 2.0**-24 * size)


@settings(max_examples=200, deadline=None)
@given(doors, sizes, st.booleans(), st.sampled_from([(1, 1), (1, 1), (2, 3), (7, 7), (12, 1)]), st.booleans())
def test_adaptive_pools(door: Any, size: Any, largest: Any, out: Any, with_nan: Any) -> None:
    x = random(size, 15, door["dtype"])
    if with_nan:
        x.view(-1)[:: 1 + x.numel() // 3] = torch.nan
    d = _core.StepDoor(**door)
    got = d.adaptive_pool(x.numpy(), largest, out)
    if largest:
        want = F.adaptive_max_pool2d(x, out)
        assert np.array_equal(got, want.numpy(), equal_nan=True)
    else:
        want = F.adaptive_avg_pool2d(x.double(), out)
        error = (size[2] * size[3] + 2) * 2.0**-24 * F.adaptive_avg_pool2d(x.double().abs(), out)
        assert np.array_equal(np.isnan(got), want.isnan().numpy())
        check(np.nan_to_num(got), want.nan_to_num(), door["dtype"], error.nan_to_num())


@pytest.mark.parametrize("isa", ISAS)
def test_results_do_not_depend_on_threads_or_on_other_images(isa: Any) -> None:
    x = random((5, 40, 14, 14), 16)
    runs = []
    for threads, images in ((1, 5), (2, 5), (3, 5), (1, 2)):
        d = _core.StepDoor(isa, x_halo=(1, 1, 1, 1), threads=threads)
        part = x[:images].numpy()
        runs.append(
            [
                d.adaptive_pool(part, False, (1, 1))[:2],
                d.pool(part, False, (7, 7), (3, 3), (2, 2), (1, 1))[:2],
                d.copy(part, None, {"activation": "silu"})[:2],
            ]
        )
    for run in runs[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_what_does_not_fit_is_refused() -> None:
    d = _core.StepDoor(ISAS[-1])
    x = np.zeros((1, 3, 4, 4), "f4")
    with pytest.raises(ValueError, match=r"import: x got shape \[1, 3, 4, 4\], wanted \[N, 3, 4, 5\]"):
        d.import_tensor(x, (3, 4, 5))
    with pytest.raises(ValueError, match="import: channels got 3, wanted 0 to 2"):
        d.import_tensor(x, (3, 4, 4), [0, 3])
    with pytest.raises(ValueError, match="import: x got f64, wanted f32, bf16 or f16"):
        d.import_tensor(x.astype("f8"), (3, 4, 4))
    with pytest.raises(ValueError, match="multiply: gate got planes of"):
        d.multiply(x, np.zeros((1, 2, 1, 1), "f4"))
    with pytest.raises(ValueError, match="max_pool: padding got 2, wanted at most half of the kernel, 3"):
        d.pool(x, True, (4, 4), (3, 3), (1, 1), (2, 2))


@st.composite
def compacted(draw: Any) -> dict[str, Any]:
    """A linear weight [out, in] in blocks of filters that share their taps, and the same with zeros."""
    rng = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    features = draw(st.sampled_from([1, 2, 7, 33, 64, 200]))
    density = draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    blocks = draw(st.lists(st.sampled_from([1, 3, 4, 8, 10, 16, 17, 40, 48, 70]), min_size=1, max_size=4))
    dense = np.zeros((sum(blocks), features), "f4")
    taps: list[int] = []
    weight, block_taps, first = [], [0], 0
    for n in blocks:
        kept = np.flatnonzero(rng.random(features) < density)
        dense[first : first + n, kept] = rng.standard_normal((n, len(kept)))
        weight.append(dense[first : first + n, kept].ravel())
        taps += kept.tolist()
        block_taps.append(len(taps))
        first += n
    bias = rng.standard_normal(sum(blocks)).astype("f4") if draw(st.booleans()) else None
    table = {"weight": np.concatenate(weight), "taps": taps, "block_filters": blocks, "block_taps": block_taps}
    return {"dense": dense, "table": {**table, "bias": bias}}


@settings(max_examples=300, deadline=None)
@given(doors, compacted(), st.integers(1, 19), st.booleans(), st.sampled_from(EPILOGUES))
def test_linear(door: Any, c: Any, rows: int, add: bool, epilogue: Any) -> None:
    door |= {"x_halo": (0,) * 4, "y_halo": (0,) * 4, "b_halo": (0,) * 4}
    filters, features = c["dense"].shape
    x, r = random((rows, features), 17, door["dtype"]), random((rows, filters), 18, door["dtype"])
    d = _core.StepDoor(**door)
    got = d.linear(x.numpy(), **c["table"], residual=r.numpy() if add else None, epilogue=epilogue[0])
    bias = torch.zeros(filters) if c["table"]["bias"] is None else torch.from_numpy(c["table"]["bias"])
    w = torch.from_numpy(c["dense"]).to(DTYPES[door["dtype"]]).double()
    total = F.linear(x.double(), w, bias.double()) + (r.double() if add else 0)
    # features + 2 terms added one by one (Higham, 3.1); no curve is steeper than 1.13
    size = F.linear(x.double().abs(), w.abs(), bias.double().abs()) + (r.double().abs() if add else 0)
    want = epilogue[1](total)
    error = 1.13 * (features + 2) * 2.0**-23 * size + (curve_error(want) if epilogue[0].get("activation") else 0.0)
    check(got.reshape(rows, filters), want, door["dtype"], error)


def test_rows_of_a_linear_layer_do_not_depend_on_each_other_or_on_threads() -> None:
    rng = np.random.default_rng(19)
    x, w = rng.standard_normal((37, 900), "f4"), rng.standard_normal((700, 900), "f4")
    for dtype in ("f32", "bf16"):
        for isa in ISAS:
            runs = []
            for threads, rows in ((1, 37), (2, 37), (3, 37), (1, 5), (2, 1)):
                d = _core.StepDoor(isa, dtype, threads=threads)
                y = d.linear(x[:rows], w.ravel(), None, list(range(900)), [700], [0, 900])
                runs.append(y[:1])
            assert all(np.array_equal(y, runs[0]) for y in runs)


@st.composite
def depthwise(draw: Any) -> dict[str, Any]:
    """A depthwise weight with every tap, or pruned by filter; and where its input must have zeros."""
    square = draw(st.sampled_from([0, 3, 3, 5, 7]))
    kernel = (square, square) if square else (draw(st.integers(1, 4)), draw(st.integers(1, 6)))
    stride = draw(st.sampled_from([(1, 1), (1, 1), (2, 2), (2, 2), (3, 1), (1, 2), (2, 3)]))
    dilation = draw(st.sampled_from([(1, 1), (1, 1), (1, 1), (2, 1), (1, 3)]))
    padding = (draw(st.integers(0, 3)), draw(st.integers(0, 3)))
    least = [max(1, d * (k - 1) + 1 - 2 * p) for k, p, d in zip(kernel, padding, dilation, strict=True)]
    size = (least[0] + draw(st.integers(0, 20)), least[1] + draw(st.integers(0, 50)))
    ends = [
        (s + 2 * p - d * (k - 1) - 1) // t * t - p + d * (k - 1) - (s - 1)
        for s, p, d, k, t in zip(size, padding, dilation, kernel, stride, strict=True)
    ]
    exact = draw(st.booleans()) and padding == (0, 0)
    more = draw(st.tuples(*[st.integers(0, 2)] * 4))
    halo = (padding[0], padding[1], max(0, ends[0]), max(0, ends[1]))
    return {
        "kernel": kernel,
        "conv": {"stride": stride, "padding": padding, "dilation": dilation},
        "x_halo": None if exact else tuple(h + m for h, m in zip(halo, more, strict=True)),
        "shape": (draw(st.integers(1, 3)), draw(st.integers(1, 6)), *size),
        "multiplier": draw(st.sampled_from([1, 1, 2, 3])),
        "density": draw(st.sampled_from([0.0, 0.5, 1.0, 1.0])),
        "bias": draw(st.booleans()),
        "seed": draw(st.integers(0, 1 << 30)),
    }


@settings(max_examples=500, deadline=None)
@given(doors, depthwise(), st.booleans(), st.sampled_from(EPILOGUES))
def test_depthwise(door: Any, c: Any, add: bool, epilogue: Any) -> None:
    rng = np.random.default_rng(c["seed"])
    channels = c["shape"][1]
    filters, positions = channels * c["multiplier"], c["kernel"][0] * c["kernel"][1]
    dense = rng.standard_normal((filters, positions)).astype("f4")
    kept = rng.random((filters, positions)) < c["density"]
    dense[~kept] = 0
    x = random(c["shape"], c["seed"], door["dtype"])
    w = torch.from_numpy(dense).to(DTYPES[door["dtype"]]).double().view(filters, 1, *c["kernel"])
    bias = torch.from_numpy(rng.standard_normal(filters).astype("f4") * c["bias"])
    total = F.conv2d(x.double(), w, bias.double(), **c["conv"], groups=channels)
    size = F.conv2d(x.double().abs(), w.abs(), bias.double().abs(), **c["conv"], groups=channels)
    r = random(tuple(total.shape), 20, door["dtype"])
    if add:
        total, size = total + r.double(), size + r.double().abs()
    d = _core.StepDoor(**{**door, "x_halo": c["x_halo"]})
    got = d.depthwise(
        x.numpy(),
        filters,
        c["kernel"],
        dense[kept],
        bias.numpy() if c["bias"] else None,
        kept.nonzero()[1].tolist(),
        [1] * filters,
        [0, *np.cumsum(kept.sum(1)).tolist()],
        **c["conv"],
        residual=r.numpy() if add else None,
        epilogue=epilogue[0],
    )
    want = epilogue[1](total)
    error = 1.13 * (positions + 2) * 2.0**-23 * size + (curve_error(want) if epilogue[0].get("activation") else 0.0)
    check(got, want, door["dtype"], error)


def test_a_depthwise_kernel_is_chosen_by_shape() -> None:
    def kernel(size: int, k: int, stride: int, halo: Any, **conv: Any) -> str:
        d = _core.StepDoor("avx512", x_halo=halo)
        x, w = np.zeros((1, 2, size, size), "f4"), np.zeros(2 * k * k, "f4")
        taps = [*range(k * k)] * 2
        d.depthwise(x, 2, (k, k), w, None, taps, [1, 1], [0, k * k, 2 * k * k], (stride, stride), **conv)
        return d.kernel

    if "avx512" in ISAS:
        halo = (1, 1, 1, 1)
        assert kernel(28, 3, 1, halo, padding=(1, 1)) == "depthwise_square_f32__avx512"
        assert kernel(28, 3, 2, halo, padding=(1, 1)) == "depthwise_square_f32__avx512"
        assert kernel(7, 3, 1, halo, padding=(1, 1)) == "depthwise_square_f32__avx2"
        assert kernel(33, 4, 1, halo, padding=(1, 1)) == "depthwise_listed_f32__avx512"
        assert kernel(8, 4, 1, halo, padding=(1, 1)) == "depthwise_listed_flat_f32__avx512"
        assert kernel(20, 3, 1, None) == "depthwise_exact_f32__avx512"
