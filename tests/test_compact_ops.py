"""conv2d_compact, linear_compact and their packed forms: every kernel against F.conv2d in f64, and bad input."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from structadmm import _core, ops, reference

ISAS = _core.supported_isas()


@pytest.fixture(autouse=True)
def _best_isa() -> Iterator[None]:
    yield
    use("")


def use(isa: str) -> None:
    torch.ops.structadmm.set_isa(isa)
    _core.set_isa(isa)


def make_table(
    filters: int, columns: int, groups: int, block: int, density: float, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A random W [filters, columns] and its weight, taps, block_filters, block_taps; some blocks may have no taps."""
    rng = torch.Generator().manual_seed(seed)
    w = torch.zeros(filters, columns)
    weight, taps, sizes, offsets = [], [], [], [0]
    per_group = filters // groups
    for group in range(0, filters, per_group):
        for first in range(group, group + per_group, block):
            n = min(block, group + per_group - first)
            kept = (torch.rand(columns, generator=rng) < density).nonzero().flatten()
            values = torch.randn(n, len(kept), generator=rng)
            w[first : first + n, kept] = values
            weight.append(values.flatten())
            taps.append(kept)
            sizes.append(n)
            offsets.append(offsets[-1] + len(kept))
    int32 = torch.int32
    return (
        w,
        torch.cat(weight),
        torch.cat(taps).to(int32),
        torch.tensor(sizes, dtype=int32),
        torch.tensor(offsets, dtype=int32),
    )


def check_close(got: Tensor, x: Tensor, w: Tensor, b: Tensor | None, dense: Any, *args: Any) -> None:
    """|error| <= (T + 2) 2^-23 (|w| . |x| + |b|): T rounded products and sums in a row, fused or not (Higham, 3.1)."""
    want = dense(x.double(), w.double(), None if b is None else b.double(), *args)
    size = dense(x.double().abs(), w.double().abs(), None if b is None else b.double().abs(), *args)
    terms = int((w.flatten(1) != 0).sum(1).max()) if w.numel() else 0
    assert got.shape == want.shape and got.dtype == torch.float32 and got.is_contiguous()
    assert bool(((got.double() - want).abs() <= (terms + 2) * 2.0**-23 * size).all())


LAYOUTS = ("contiguous", "channels_last", "every_other_column", "transposed", "one_image_expanded")


def lay_out(x: Tensor, layout: str) -> Tensor:
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "every_other_column":
        return torch.stack([x, torch.full_like(x, torch.nan)], -1).flatten(3)[..., ::2]
    if layout == "transposed":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "one_image_expanded":
        return x[:1].expand(x.shape)
    return x


@st.composite
def convolutions(draw: Any) -> dict[str, Any]:
    integer = lambda low, high: draw(st.integers(low, high))  # noqa: E731
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    kernel = (integer(1, 5), integer(1, 5))
    dilation = (integer(1, 3), integer(1, 2))
    padding = (integer(0, 4), integer(0, 4))
    least = [max(1, d * (k - 1) + 1 - 2 * p) for k, p, d in zip(kernel, padding, dilation, strict=True)]
    return {
        "groups": groups,
        "kernel": kernel,
        "dilation": dilation,
        "padding": padding,
        "stride": (integer(1, 4), integer(1, 3)),
        "size": (least[0] + integer(0, 18), least[1] + integer(0, 40)),
        "batch": integer(1, 9),
        "channels": groups * integer(1, 9),
        "filters": groups * draw(st.sampled_from([1, 3, 4, 5, 8, 13, 16, 20, 31, 32, 48, 64, 70])),
        "block": draw(st.sampled_from([1, 3, 4, 8, 16, 1000])),
        "density": draw(st.sampled_from([0.0, 0.05, 0.3, 1.0])),
        "bias": draw(st.booleans()),
        "layout": draw(st.sampled_from(LAYOUTS)),
        "seed": integer(0, 1 << 30),
    }


def prepare(c: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor | None, tuple[Any, ...], tuple[Any, ...]]:
    """x, dense weight, bias, the op's arguments, those of F.conv2d after the bias."""
    shape = (c["channels"] // c["groups"], *c["kernel"])
    w, weight, *tables = make_table(c["filters"], int(np.prod(shape)), c["groups"], c["block"], c["density"], c["seed"])
    torch.manual_seed(c["seed"])
    x = lay_out(torch.randn(c["batch"], c["channels"], *c["size"]), c["layout"])
    b = torch.randn(c["filters"]) if c["bias"] else None
    sizes = (c["stride"], c["padding"], c["dilation"], c["groups"])
    return x, w.view(-1, *shape), b, (x, weight, b, *tables, c["filters"], c["kernel"], *sizes), sizes


# Outputs 0, 2, 2, 4, 4 places into x: rows whose halo is shared, with a stride. First and last are as far apart as five
# neighbours.
SHARED_HALO = {
    "groups": 1, "kernel": (1, 1), "dilation": (1, 1), "padding": (0, 1), "stride": (1, 2), "size": (5, 1), "batch": 2,
    "channels": 1, "filters": 16, "block": 1000, "density": 1.0, "bias": False, "layout": "contiguous", "seed": 3,
}  # fmt: skip

# The same with stride 1: outputs at 0, 1, 2, 3, 3, 4, 5, 6.
SHARED_PLACE = SHARED_HALO | {"stride": (1, 1), "size": (2, 2), "batch": 1, "filters": 24, "block": 8}


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=80, deadline=None)
@given(c=convolutions())
@example(c=SHARED_HALO)
@example(c=SHARED_PLACE)
@example(c=SHARED_PLACE | {"stride": (1 << 20, 1 << 20), "size": (5, 7)})
def test_conv2d_compact(isa: str, c: dict[str, Any]) -> None:
    use(isa)
    x, w, b, args, sizes = prepare(c)
    got = ops.conv2d_compact(*args)
    check_close(got, x, w, b, F.conv2d, *sizes)
    torch.testing.assert_close(reference.conv2d_compact(*args), F.conv2d(x, w, b, *sizes))


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=15, deadline=None)
@given(c=convolutions())
def test_packed_threads_and_batch_give_the_same_bits(isa: str, c: dict[str, Any]) -> None:
    use(isa)
    # 16 times the channels and a wider map: work enough to be split
    c = {**c, "channels": 16 * c["channels"], "size": (c["size"][0] + 16, c["size"][1])}
    x, w, b, args, sizes = prepare(c)
    got = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        got.append(ops.conv2d_compact(*args))
    packed = ops.conv2d_pack(*args[1:6], x.shape[1], c["kernel"], c["groups"])
    geometry = (*c["kernel"], *c["stride"], *c["padding"], *c["dilation"])
    got.append(ops.conv2d_packed(x, packed, c["filters"], *geometry))
    got.append(torch.cat([ops.conv2d_packed(image[None], packed, c["filters"], *geometry) for image in x]))
    arrays = [None if a is None else a.numpy() for a in args[:6]]
    for threads in (1, 3):
        _core.set_num_threads(threads)
        got.append(torch.from_numpy(_core.conv2d_compact(*arrays, c["kernel"], *sizes)))
    for other in got[1:]:
        assert torch.equal(got[0], other)


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 70),
    features=st.integers(1, 90),
    filters=st.sampled_from([1, 5, 8, 16, 17, 48, 64, 100, 130]),
    block=st.sampled_from([1, 4, 8, 16, 1000]),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    bias=st.booleans(),
    apart=st.booleans(),
    seed=st.integers(0, 1 << 30),
)
def test_linear_compact(
    isa: str, rows: int, features: int, filters: int, block: int, density: float, bias: bool, apart: bool, seed: int
) -> None:
    use(isa)
    w, *table = make_table(filters, features, 1, block, density, seed)
    weight, taps, sizes, offsets = table
    x = torch.randn(rows, features + 3)[:, :features] if apart else torch.randn(rows, features)
    b = torch.randn(filters) if bias else None
    got = ops.linear_compact(x, weight, b, taps, sizes, offsets, filters)
    check_close(got, x, w, b, F.linear)
    torch.testing.assert_close(reference.linear_compact(x, weight, b, taps, sizes, offsets, filters), F.linear(x, w, b))
    packed = ops.linear_pack(weight, b, taps, sizes, offsets, features)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(got, ops.linear_packed(x, packed, filters))
    from_numpy = _core.linear_compact(*(None if a is None else a.numpy() for a in (x, weight, b, taps, sizes, offsets)))
    assert torch.equal(got, torch.from_numpy(from_numpy))


def test_linear_of_other_dimensions() -> None:
    w, weight, taps, sizes, offsets = make_table(20, 12, 1, 8, 0.5, 0)
    for shape in ((12,), (2, 3, 12), (0, 12), (2, 0, 12)):
        x = torch.randn(shape)
        check_close(ops.linear_compact(x, weight, None, taps, sizes, offsets, 20), x, w, None, F.linear)
    x = torch.randn(12, 5).t()
    check_close(ops.linear_compact(x, weight, None, taps, sizes, offsets, 20), x, w, None, F.linear)


def test_many_threads_split_a_large_layer() -> None:
    c = {"groups": 1, "kernel": (3, 3), "dilation": (1, 1), "padding": (1, 1), "stride": (1, 1), "size": (30, 30)}
    c |= {"batch": 5, "channels": 64, "filters": 70, "block": 1000, "density": 0.2, "bias": True, "seed": 3}
    for block, stride in ((1000, (1, 1)), (8, (1, 1)), (8, (2, 2))):
        x, w, b, args, sizes = prepare({**c, "block": block, "stride": stride, "layout": "contiguous"})
        torch.set_num_threads(1)
        one = ops.conv2d_compact(*args)
        check_close(one, x, w, b, F.conv2d, *sizes)
        torch.set_num_threads(3)
        assert torch.equal(one, ops.conv2d_compact(*args))


def kernel_of(isa: str, c: dict[str, Any], x: torch.Tensor, args: Any) -> str:
    """That runs a case of prepare()."""
    names = ("weight", "bias", "taps", "block_filters", "block_taps")
    spec = {n: t.tolist() for n, t in zip(names, args[1:6], strict=True)}
    spec |= {"in_channels": c["channels"], "out_channels": c["filters"]}
    spec |= {n: c[n] for n in ("kernel", "stride", "padding", "dilation", "groups")}
    _, kernel = _core.conv_step("taps_f32", isa, spec, x.numpy())
    return str(kernel)


# Many narrow blocks on one copy of x: of one part and of two, read in two runs, alternately, by permutation.
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("channels,size,stride", [(200, 4, 1), (48, 18, 2), (48, 9, 2), (48, 3, 1), (48, 13, 3)])
def test_blocks_that_share_a_copy(isa: str, channels: int, size: int, stride: int, monkeypatch: Any) -> None:
    monkeypatch.setenv("STRUCTADMM_AVX512_CORE", "intel")
    use(isa)
    c = {"groups": 1, "kernel": (3, 3), "dilation": (1, 1), "padding": (1, 1), "stride": (stride, stride)}
    c |= {"size": (size, size), "batch": 5, "channels": channels, "filters": 252, "block": 8, "density": 0.1}
    x, w, b, args, sizes = prepare({**c, "bias": True, "layout": "contiguous", "seed": 0})
    kernel = kernel_of(isa, c, x, args)
    assert ("shared" in kernel) == (isa != "scalar"), kernel
    torch.set_num_threads(1)
    got = ops.conv2d_compact(*args)
    check_close(got, x, w, b, F.conv2d, *sizes)
    torch.set_num_threads(3)
    assert torch.equal(got, ops.conv2d_compact(*args))


@pytest.mark.parametrize("isa", ISAS)
def test_other_taps_of_the_same_shape(isa: str) -> None:
    use(isa)
    c = {"groups": 1, "kernel": (3, 3), "dilation": (1, 1), "padding": (1, 1), "stride": (1, 1), "size": (12, 12)}
    c |= {"batch": 1, "channels": 3, "filters": 32, "bias": False, "layout": "contiguous", "density": 1.0}
    for block in (32, 8):
        for first in (0, 1, 2):  # as many taps, in other channels
            x, w, _, args, sizes = prepare({**c, "block": block, "seed": 0})
            kept = torch.zeros(27, dtype=torch.bool)
            kept[9 * first : 9 * first + 9] = True
            weight, taps = w.flatten(1)[:, kept].flatten(), kept.nonzero().flatten().int().repeat(32 // block)
            table = (taps, torch.full((32 // block,), block).int(), torch.arange(0, len(taps) + 1, 9).int())
            got = ops.conv2d_compact(x, weight, None, *table, *args[6:])
            check_close(got, x, (w.flatten(1) * kept).view_as(w), None, F.conv2d, *sizes)


def test_empty_batch_and_filters_without_taps() -> None:
    w, weight, taps, sizes, offsets = make_table(24, 27, 1, 8, 0.0, 0)
    b = torch.randn(24)
    table = (weight, b, taps, sizes, offsets, 24, (3, 3), (1, 1), (1, 1), (1, 1), 1)
    y = ops.conv2d_compact(torch.randn(2, 3, 5, 5), *table)
    assert torch.equal(y, b.view(1, -1, 1, 1).expand(2, 24, 5, 5))
    assert ops.conv2d_compact(torch.randn(0, 3, 5, 5), *table).shape == (0, 24, 5, 5)


def test_nan_and_infinity_propagate() -> None:
    w, weight, taps, sizes, offsets = make_table(32, 9, 1, 1000, 1.0, 0)
    x = torch.randn(1, 1, 9, 9)
    x[0, 0, 4, 4] = torch.nan
    args = (taps, sizes, offsets, 32, (3, 3), (1, 1), (1, 1), (1, 1), 1)
    y = ops.conv2d_compact(x, weight, None, *args)
    assert bool(y[:, :, 3:6, 3:6].isnan().all()) and int(y.isnan().sum()) == 32 * 9
    weight[0] = torch.inf
    y = ops.conv2d_compact(torch.rand(1, 1, 9, 9) + 1, weight, None, *args)
    assert bool(y[0, 0, 1:, 1:].isinf().all()) and bool(y[0, 1:].isfinite().all())


# What runs where. Column sparsity of many taps holds vectors of filters, or where registers are few collects the pixels
# of its taps; narrow blocks read vectors of pixels from the planes, or where rows are short from what is collected for
# many blocks together; a whole vector never reads where there is nothing. A few pixels that would be a vector are
# multiplied one by one (rest).
@pytest.mark.parametrize(
    "isa,x,blocks,kernels",
    [
        ("avx512", (1, 192, 13, 13), [384], {"filters_6x64__avx512"}),
        ("avx512", (1, 128, 16, 16), [128], {"filters_6x64__avx512"}),
        ("avx512", (1, 64, 32, 32), [64], {"filters_6x64__avx512"}),
        ("avx512", (1, 64, 32, 32), [8] * 8, {"planes_8x48__avx512"}),
        ("avx512", (1, 64, 8, 8), [8] * 8, {"shared_8x32__avx512"}),
        ("avx512", (16, 64, 4, 4), [8] * 8, {"shared_8x48_gather__avx512"}),
        ("avx512", (1, 64, 32, 32), [4] * 16, {"planes_4x96__avx512"}),
        ("avx512", (1, 64, 1, 1), [8] * 8, {"filters_8x8__avx512"}),
        ("avx512_bf16", (1, 64, 32, 32), [64], {"filters_6x64__avx512"}),
        ("amx_bf16", (1, 192, 13, 13), [384], {"filters_6x64__avx512"}),
        ("avx2", (1, 512, 4, 4), [512], {"panel_6x16__avx2"}),
        ("avx2", (1, 192, 13, 13), [384], {"panel_4x24_rest__avx2"}),
        ("avx2", (1, 128, 32, 32), [128], {"panel_4x24__avx2"}),
        ("avx2", (1, 512, 4, 4), [8] * 64, {"shared_6x16__avx2"}),
        ("avx2", (1, 512, 7, 7), [8] * 64, {"shared_4x24_rest__avx2"}),
        ("avx2", (1, 64, 1, 1), [8] * 8, {"filters_6x8__avx2"}),
        ("avx2", (1, 64, 32, 32), [8] * 8, {"planes_4x24__avx2"}),
        ("avx2", (1, 512, 28, 28), [8] * 64, {"shared_4x24__avx2"}),
        ("avx2", (1, 64, 32, 32), [8], {"planes_4x24__avx2"}),
        ("scalar", (1, 64, 32, 32), [8] * 8, {"planes_4x8__scalar"}),
    ],
)
def test_selection(isa: str, x: tuple[int, ...], blocks: list[int], kernels: set[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("STRUCTADMM_AVX512_CORE", "intel")
    names = _core.conv2d_kernels(isa, x, blocks, (3, 3), padding=(1, 1))
    assert {n.removeprefix("gemm_compact_f32_") for n in names} == kernels


@pytest.mark.parametrize("isa", ISAS)
def test_selection_with_a_stride(isa: str, monkeypatch: Any) -> None:
    """First layers, and narrow blocks on wide maps: as without a stride, on phases. Where few taps are read of each
    channel, or strides are odd, pixels are collected."""
    monkeypatch.setenv("STRUCTADMM_AVX512_CORE", "zen5")
    on_phases = {
        "first of AlexNet": ((1, 3, 227, 227), [84], (11, 11), {"stride": (4, 4)}),
        "first of ResNet-50": ((1, 3, 224, 224), [64], (7, 7), {"stride": (2, 2), "padding": (3, 3)}),
        "narrow blocks": ((1, 64, 32, 32), [8] * 16, (3, 3), {"stride": (2, 2), "padding": (1, 1)}),
    }
    for name, (x, blocks, kernel, sizes) in on_phases.items():
        assert all("_phases" in n for n in _core.conv2d_kernels(isa, x, blocks, kernel, **sizes)), name
    if isa != "scalar":
        names = _core.conv2d_kernels(isa, (1, 512, 8, 8), [8] * 64, (3, 3), stride=(3, 3), padding=(1, 1))
        assert not any("_phases" in n for n in names)


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=25, deadline=None)
@given(
    kernel=st.tuples(st.integers(1, 11), st.integers(1, 11)),
    stride=st.tuples(st.integers(1, 5), st.sampled_from([2, 2, 3, 4, 4, 5])),
    padding=st.tuples(st.integers(0, 6), st.integers(0, 6)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    size=st.tuples(st.integers(1, 40), st.integers(1, 90)),
    batch=st.integers(1, 3),
    channels=st.integers(1, 4),
    block=st.sampled_from([4, 8, 1000]),
    density=st.sampled_from([0.1, 1.0]),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 1 << 30),
)
def test_phases_of_first_layers(isa: str, seed: int, **c: Any) -> None:
    """Few channels and many filters, whose kernels mostly run on phases of x: wide strides, kernels that reach beyond
    the padding, maps narrower than a stride."""
    use(isa)
    least = [max(1, d * (k - 1) + 1 - 2 * p) for k, p, d in zip(c["kernel"], c["padding"], c["dilation"], strict=True)]
    c["size"] = tuple(max(s, n) for s, n in zip(c["size"], least, strict=True))
    x, w, b, args, sizes = prepare({**c, "groups": 1, "filters": 52, "bias": True, "seed": seed})
    check_close(ops.conv2d_compact(*args), x, w, b, F.conv2d, *sizes)


@pytest.mark.parametrize("isa", ISAS)
def test_phases_of_some_images_at_a_time(isa: str, monkeypatch: Any) -> None:
    """Five large images, of which a copy holds one or two; a run may have fewer than the plan; threads share a copy."""
    monkeypatch.setenv("STRUCTADMM_AVX512_CORE", "zen5")
    use(isa)
    c = {"groups": 1, "kernel": (7, 7), "dilation": (1, 1), "padding": (3, 3), "stride": (2, 2), "size": (150, 130)}
    c |= {"batch": 5, "channels": 3, "filters": 20, "block": 1000, "density": 1.0, "bias": True, "seed": 0}
    x, w, b, args, sizes = prepare({**c, "layout": "contiguous"})
    assert "_phases" in kernel_of(isa, c, x, args)
    got = ops.conv2d_compact(*args)
    check_close(got, x, w, b, F.conv2d, *sizes)
    torch.set_num_threads(3)
    assert torch.equal(got, ops.conv2d_compact(*args))
    for n in range(len(x)):
        assert torch.equal(got[n : n + 1], ops.conv2d_compact(x[n : n + 1], *args[1:]))


def test_phases_that_no_table_holds() -> None:
    """Planes of more than 2^28 places: it is still answered that a padded copy is read."""
    far = {"stride": (2, 2), "padding": (20000, 20000), "dilation": (20000, 20000)}
    for isa in ISAS:
        assert not any("_phases" in n for n in _core.conv2d_kernels(isa, (1, 1, 3, 3), [4], (3, 3), **far))


@pytest.mark.parametrize("x,blocks", [((1, 512, 28, 28), [64]), ((1, 256, 56, 56), [32])])
def test_selection_where_each_tap_is_a_page(x: tuple[int, ...], blocks: list[int]) -> None:
    """In a 1x1 layer of few filters a copy is read faster than the planes."""
    assert _core.conv2d_kernels("avx2", x, blocks, (1, 1)) == ["gemm_compact_f32_panel_4x24__avx2"]


@pytest.mark.parametrize("isa", [i for i in ISAS if i != "scalar"])
def test_conv_groups_share_no_copy(isa: str, monkeypatch: Any) -> None:
    monkeypatch.setenv("STRUCTADMM_AVX512_CORE", "zen5")
    use(isa)
    c = {"groups": 2, "kernel": (3, 3), "dilation": (1, 1), "padding": (1, 1), "stride": (1, 1), "size": (13, 13)}
    c |= {"batch": 1, "channels": 384, "filters": 256, "block": 1000, "density": 0.5}
    x, w, b, args, sizes = prepare({**c, "bias": True, "layout": "contiguous", "seed": 0})
    kernel = kernel_of(isa, c, x, args)
    assert "shared" not in kernel
    check_close(ops.conv2d_compact(*args), x, w, b, F.conv2d, *sizes)


@pytest.mark.parametrize(
    "x,blocks,zen4,zen5",
    [
        ((1, 128, 28, 28), [64], "filters_6x64", "planes_8x48_rest"),
        ((1, 128, 16, 16), [128], "planes_8x48", "planes_8x48"),
        ((1, 64, 32, 32), [8] * 8, "planes_8x48", "planes_8x48"),
        ((1, 64, 32, 32), [4] * 16, "planes_4x96", "planes_4x96"),
        ((1, 64, 8, 8), [8] * 8, "shared_8x32", "shared_8x32"),
        ((1, 64, 4, 4), [8] * 8, "shared_8x16", "shared_8x16"),
        ((16, 64, 4, 4), [8] * 8, "shared_8x32_gather", "shared_8x32_gather"),
        ((1, 64, 28, 28), [32], "filters_8x32", "planes_8x48_rest"),
        ((1, 64, 7, 7), [16] * 4, "filters_8x16", "planes_8x48_rest"),
        ((1, 8, 13, 13), [384], "panel_8x48", "panel_8x48"),
        ((1, 64, 1, 1), [8] * 8, "filters_8x8", "filters_8x8"),
    ],
)
def test_selection_by_cycles(x: tuple[int, ...], blocks: list[int], zen4: str, zen5: str, monkeypatch: Any) -> None:
    """Where 512 bits are two halves, lanes without an output cost as much as any."""
    for core, kernel in (("zen4", zen4), ("zen5", zen5)):
        monkeypatch.setenv("STRUCTADMM_AVX512_CORE", core)
        names = _core.conv2d_kernels("avx512", x, blocks, (3, 3), padding=(1, 1))
        assert set(names) == {f"gemm_compact_f32_{kernel}__avx512"}


def test_a_core_that_there_is_not(monkeypatch: Any) -> None:
    monkeypatch.setenv("STRUCTADMM_AVX512_CORE", "zen9")
    with pytest.raises(ValueError, match="STRUCTADMM_AVX512_CORE: got 'zen9', wanted intel, zen4 or zen5"):
        _core.conv2d_kernels("avx512", (1, 64, 8, 8), [64], (3, 3))


def conv_arguments() -> dict[str, Any]:
    _, weight, taps, sizes, offsets = make_table(16, 36, 1, 8, 0.5, 0)
    return {
        "x": torch.randn(2, 4, 6, 6),
        "weight": weight,
        "bias": torch.randn(16),
        "taps": taps,
        "block_filters": sizes,
        "block_taps": offsets,
        "out_channels": 16,
        "kernel_size": (3, 3),
        "stride": (1, 1),
        "padding": (1, 1),
        "dilation": (1, 1),
        "groups": 1,
    }


def with_value(t: Tensor, index: int, value: int) -> Tensor:
    t = t.clone()
    t[index] = value
    return t


BAD: list[tuple[str, Any, str]] = [
    ("x", torch.randn(2, 3, 6, 6), "taps got|x has 3 channels, wanted|taps.* wanted 0 to"),
    ("x", torch.randn(2, 5, 6, 6).double(), "x got f64, wanted f32"),
    ("x", torch.randn(4, 6, 6), "x got 3 dimensions, wanted"),
    ("x", torch.randn(2, 4, 6, 6).bfloat16(), "x got bf16, wanted f32"),
    ("x", torch.randn(2, 4, 1, 0), "wanted at least the 3 that the kernel spans"),
    ("weight", torch.randn(3), "weight got 3 values, wanted"),
    ("weight", torch.randn(3).double(), "weight got f64, wanted f32"),
    ("weight", torch.randn(3, 3), r"weight got shape \[3, 3\], wanted a contiguous vector"),
    ("bias", torch.randn(3), "bias got 3 values, wanted 16"),
    ("taps", lambda a: with_value(a["taps"], 0, -1), r"taps\[0\] got -1, wanted 0 to 35"),
    ("taps", lambda a: with_value(a["taps"], len(a["taps"]) - 1, 36), "got 36, wanted 0 to 35"),
    ("taps", lambda a: with_value(a["taps"], 1, int(a["taps"][0])), "wanted ascending taps"),
    ("taps", lambda a: a["taps"].long(), "taps got another dtype, wanted i32"),
    ("taps", lambda a: a["taps"][:-1], "block_taps"),
    ("block_filters", torch.tensor([8, 9], dtype=torch.int32), "weight got"),
    ("block_filters", torch.tensor([16, 0], dtype=torch.int32), r"block_filters\[1\] got 0, wanted at least 1"),
    ("block_filters", torch.tensor([16], dtype=torch.int32), "block_taps got 3 offsets, wanted 2"),
    ("block_filters", torch.tensor([], dtype=torch.int32), "no block"),
    ("block_taps", lambda a: with_value(a["block_taps"], 0, 1), r"block_taps\[0\] got 1, wanted 0"),
    ("block_taps", lambda a: with_value(a["block_taps"], 1, 10_000), r"block_taps\[1\] got 10000, wanted"),
    ("out_channels", 15, "out_channels got 15, wanted the 16 filters"),
    ("kernel_size", (3, 0), r"kernel_size got \(3, 0\), wanted at least 1"),
    ("kernel_size", (3, 3, 3), "kernel_size got 3 numbers, wanted 2"),
    ("stride", (0, 1), "stride got 0, wanted at least 1"),
    ("padding", (1, -1), "padding got -1, wanted at least 0"),
    ("dilation", (1, 0), "dilation got 0, wanted at least 1"),
    ("groups", 3, "in_channels got 4, wanted a positive multiple of groups 3"),
    ("groups", 0, "groups got 0, wanted at least 1"),
]


@pytest.mark.parametrize("name,value,message", BAD)
def test_bad_arguments(name: str, value: Any, message: str) -> None:
    args = conv_arguments()
    args[name] = value(args) if callable(value) else value
    with pytest.raises(ValueError, match=f"conv2d_compact: .*({message})"):
        ops.conv2d_compact(**args)


def test_blocks_must_not_cross_conv_groups() -> None:
    args = conv_arguments()
    with pytest.raises(ValueError, match=r"block_filters\[1\] got filters 4 to 11, wanted a block within a conv group"):
        ops.conv2d_compact(
            args["x"],
            torch.empty(0),
            None,
            torch.empty(0, dtype=torch.int32),
            torch.tensor([4, 8, 4], dtype=torch.int32),
            torch.zeros(4, dtype=torch.int32),
            *(args[k] for k in ("out_channels", "kernel_size", "stride", "padding", "dilation")),
            2,
        )


def test_bad_packed() -> None:
    args = conv_arguments()
    packed = ops.conv2d_pack(
        *(args[k] for k in ("weight", "bias", "taps", "block_filters", "block_taps")), 4, (3, 3), 1
    )
    sizes = (3, 3, 1, 1, 1, 1, 1, 1)
    for bad in (
        packed[:-1],
        packed[:10],
        packed[:0],
        packed.float(),
        torch.zeros_like(packed),
        packed[1:],
        packed[::2],
    ):
        with pytest.raises(ValueError, match="conv2d_packed: packed got .*, wanted"):
            ops.conv2d_packed(args["x"], bad, 16, *sizes)
    with pytest.raises(ValueError, match="x has 3 channels, wanted 4"):
        ops.conv2d_packed(torch.randn(1, 3, 6, 6), packed, 16, *sizes)
    with pytest.raises(ValueError, match=r"kernel_size got \(3, 1\), wanted \(3, 3\)"):
        ops.conv2d_packed(args["x"], packed, 16, 3, *sizes[2:], 1)
    with pytest.raises(ValueError, match="x has 5 features, wanted 4"):
        ops.linear_packed(torch.randn(2, 5), packed, 16)


def test_numpy_refuses_what_torch_refuses() -> None:
    args = conv_arguments()
    names = ("x", "weight", "bias", "taps", "block_filters", "block_taps")
    arrays = {k: args[k].numpy() for k in names} | {"kernel_size": (3, 3), "padding": (1, 1)}
    want = ops.conv2d_compact(**args)
    assert torch.equal(torch.from_numpy(_core.conv2d_compact(**arrays)), want)
    for name, value in (("x", np.zeros((2, 4, 6, 6))), ("taps", arrays["taps"].astype(np.int64)), ("x", np.zeros(3))):
        with pytest.raises(ValueError, match=f"conv2d_compact: {name} got"):
            _core.conv2d_compact(**(arrays | {name: value}))


@pytest.mark.parametrize("op", ["conv2d_compact", "conv2d_packed", "conv2d_pack"])
def test_opcheck_conv2d(op: str) -> None:
    args = conv_arguments()
    table = tuple(args[k] for k in ("weight", "bias", "taps", "block_filters", "block_taps"))
    packed = ops.conv2d_pack(*table, 4, (3, 3), 1)
    samples = {
        "conv2d_compact": tuple(args.values()),
        "conv2d_packed": (args["x"], packed, 16, 3, 3, 2, 1, 1, 0, 1, 1),
        "conv2d_pack": (*table, 4, (3, 3), 1),
    }
    utils = ("test_schema", "test_autograd_registration") if op == "conv2d_pack" else None
    torch.library.opcheck(
        getattr(torch.ops.structadmm, op).default, samples[op], **({"test_utils": utils} if utils else {})
    )


def test_opcheck_linear() -> None:
    _, weight, taps, sizes, offsets = make_table(16, 36, 1, 8, 0.5, 0)
    x = torch.randn(3, 36)
    ops_ = torch.ops.structadmm
    torch.library.opcheck(ops_.linear_compact.default, (x, weight, None, taps, sizes, offsets, 16))
    packed = ops.linear_pack(weight, None, taps, sizes, offsets, 36)
    torch.library.opcheck(ops_.linear_packed.default, (x, packed, 16))
