"""Convolution and linear layer over single weights, on planes: every instruction set against F.conv2d in f64."""

from __future__ import annotations

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
EPS = 2.0**-23


def make_table(w: Tensor, block: int) -> dict[str, Any]:
    """W [filters, columns], some of it zero, as blocks of `block` filters that share the union of their taps."""
    weight, taps, sizes, offsets = [], [], [], [0]
    for rows in w.split(block):
        kept = (rows != 0).any(0).nonzero().flatten()
        weight.append(rows[:, kept].flatten())
        taps.append(kept)
        sizes.append(len(rows))
        offsets.append(offsets[-1] + len(kept))
    return {
        "weight": torch.cat(weight).tolist(),
        "taps": torch.cat(taps).tolist(),
        "block_filters": sizes,
        "block_taps": offsets,
    }


def random_weight(rng: torch.Generator, filters: int, shape: tuple[int, ...], density: float) -> Tensor:
    w = torch.randn(filters, *shape, generator=rng)
    return w * (torch.rand(w.shape, generator=rng) < density)


def check_close(got: Tensor, want: Tensor, size: Tensor, terms: int) -> None:
    """|error| <= (T + 3) 2^-23 (|w| . |x| + |b| + |residual|): T products and sums in a row, fused or not (Higham, 3.1)."""
    assert got.shape == want.shape and got.dtype == torch.float32
    assert bool(((got.double() - want).abs() <= (terms + 3) * EPS * size).all())


pair = st.tuples(st.integers(1, 3), st.integers(1, 3))


@settings(max_examples=150, deadline=None)
@given(
    images=st.integers(1, 35),
    groups=st.sampled_from([1, 1, 1, 2, 3]),
    channels=st.integers(1, 40),
    filters=st.integers(1, 20),
    block=st.sampled_from([1, 1, 1, 2, 8]),
    size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    kernel=pair,
    stride=pair,
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    density=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    bias=st.booleans(),
    residual=st.sampled_from(["none", "other", "in place"]),
    relu=st.booleans(),
    halo=st.tuples(*[st.integers(0, 2)] * 4),
    planned=st.sampled_from([0, 0, 40]),
    isa=st.sampled_from(ISAS),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_conv_is_the_dense_convolution(
    images: int,
    groups: int,
    channels: int,
    filters: int,
    block: int,
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    padding: tuple[int, int],
    density: float,
    bias: bool,
    residual: str,
    relu: bool,
    halo: tuple[int, int, int, int],
    planned: int,
    isa: str,
    threads: int,
    seed: int,
) -> None:
    size = tuple(max(n, d * (k - 1) + 1) for n, d, k in zip(size, dilation, kernel, strict=True))  # type: ignore[assignment]
    rng = torch.Generator().manual_seed(seed)
    w = random_weight(rng, filters * groups, (channels, *kernel), density)
    x = torch.randn(images, channels * groups, *size, generator=rng)
    b = torch.randn(filters * groups, generator=rng) if bias else None
    args = (stride, padding, dilation, groups)
    want = F.conv2d(x.double(), w.double(), None if b is None else b.double(), *args)
    bound = F.conv2d(x.double().abs(), w.double().abs(), None if b is None else b.double().abs(), *args)
    other = torch.randn(want.shape, generator=rng) if residual != "none" else None
    if other is not None:
        want, bound = want + other, bound + other.abs()
    if relu:
        want = want.relu()
    tables = [make_table(part.flatten(1), block) for part in w.split(filters)]
    table = {k: sum((t[k] for t in tables), []) for k in ("weight", "taps", "block_filters")}
    table["block_taps"] = [0]
    for t in tables:
        table["block_taps"] += [table["block_taps"][-1] + n for n in t["block_taps"][1:]]
    got, name = _core.nonzeros_step(
        x.numpy(),
        bias=[] if b is None else b.tolist(),
        kernel_size=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        residual=None if other is None else other.numpy(),
        in_place=residual == "in place",
        low=0.0 if relu else -np.inf,
        extra_halo=halo,
        planned_images=planned,
        isa=isa,
        threads=threads,
        **table,
    )
    assert name.endswith(f"__{isa if isa in ('scalar', 'avx2') else 'avx512'}")
    check_close(torch.from_numpy(got), want, bound, int((w != 0).flatten(1).sum(1).max()))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    features=st.integers(1, 700),
    filters=st.integers(1, 40),
    density=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    residual=st.sampled_from(["none", "other", "in place"]),
    isa=st.sampled_from(ISAS),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_linear_is_the_dense_product(
    rows: int, features: int, filters: int, density: float, residual: str, isa: str, threads: int, seed: int
) -> None:
    rng = torch.Generator().manual_seed(seed)
    w = random_weight(rng, filters, (features,), density)
    x, b = torch.randn(rows, features, generator=rng), torch.randn(filters, generator=rng)
    other = torch.randn(rows, filters, generator=rng) if residual != "none" else None
    want = F.linear(x.double(), w.double(), b.double())
    bound = F.linear(x.double().abs(), w.double().abs(), b.double().abs())
    if other is not None:
        want, bound = want + other, bound + other.abs()
    got, _ = _core.nonzeros_step(
        x[..., None, None].numpy(),
        bias=b.tolist(),
        kernel_size=(1, 1),
        residual=None if other is None else other[..., None, None].numpy(),
        in_place=residual == "in place",
        linear=True,
        isa=isa,
        threads=threads,
        **make_table(w, 1),
    )
    check_close(torch.from_numpy(got)[..., 0, 0], want, bound, int((w != 0).sum(1).max()))


@pytest.mark.parametrize("isa", ISAS)
def test_an_image_does_not_depend_on_its_batch_or_the_threads(isa: str) -> None:
    rng = torch.Generator().manual_seed(7)
    w = random_weight(rng, 48, (70, 3, 3), 0.1)
    x = torch.randn(33, 70, 14, 14, generator=rng).numpy()
    args: dict[str, Any] = {"bias": [], "kernel_size": (3, 3), "padding": (1, 1), "isa": isa}
    args |= make_table(w.flatten(1), 1)
    alone = np.concatenate([_core.nonzeros_step(x[i : i + 1], **args)[0] for i in range(33)])
    for batch in (2, 5, 16, 33):
        for threads in (1, 2, 3):
            got, _ = _core.nonzeros_step(x[:batch], threads=threads, planned_images=batch + 1, **args)
            assert (got == alone[:batch]).all()


@pytest.mark.parametrize("isa", ISAS)
def test_nan_stays_in_its_outputs_and_a_zero_weight_does_not_see_it(isa: str) -> None:
    x = np.zeros((17, 2, 6, 6), np.float32)
    x[3, 0, 2, 2] = np.nan
    w = torch.zeros(2, 2, 3, 3)
    w[0, 0] = 1.0
    w[1, 1] = 1.0
    got, _ = _core.nonzeros_step(
        x, bias=[], kernel_size=(3, 3), padding=(1, 1), low=0.0, isa=isa, **make_table(w.flatten(1), 2)
    )
    want = np.zeros_like(got, bool)
    want[3, 0, 1:4, 1:4] = True
    assert (np.isnan(got) == want).all()


CURVES = {
    1: F.silu,
    2: F.gelu,
    3: lambda x: F.gelu(x, approximate="tanh"),
    4: F.hardswish,
    5: F.hardsigmoid,
    6: torch.sigmoid,
    7: torch.tanh,
}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("activation", CURVES)
def test_curves_are_applied_after_the_residual(isa: str, activation: int) -> None:
    rng = torch.Generator().manual_seed(activation)
    w = random_weight(rng, 5, (3, 1, 1), 0.7)
    x, other = torch.randn(3, 3, 5, 7, generator=rng), torch.randn(3, 5, 5, 7, generator=rng)
    got, _ = _core.nonzeros_step(
        x.numpy(),
        bias=[],
        kernel_size=(1, 1),
        residual=other.numpy(),
        activation=activation,
        isa=isa,
        **make_table(w.flatten(1), 1),
    )
    # The sums are a few units off, and no curve is steeper than 1.13.
    want = CURVES[activation](F.conv2d(x.double(), w.double()) + other)
    torch.testing.assert_close(torch.from_numpy(got).double(), want, rtol=1e-5, atol=2e-6)


def test_errors_name_what_is_wrong() -> None:
    x = np.zeros((1, 2, 4, 4), np.float32)
    table = make_table(torch.ones(2, 18), 1)
    with pytest.raises(ValueError, match=r"conv_nonzeros: taps\[0\] got 18, wanted 0 to 17"):
        _core.nonzeros_step(x, bias=[], kernel_size=(3, 3), **(table | {"taps": [18] * 36}))
    with pytest.raises(ValueError, match="conv_nonzeros: bias got 3 values, wanted 2"):
        _core.nonzeros_step(x, bias=[0.0] * 3, kernel_size=(3, 3), **table)
    with pytest.raises(ValueError, match="conv_nonzeros: x got planes of 2 x 2"):
        _core.nonzeros_step(x[..., :2, :2], bias=[], kernel_size=(3, 3), **table)
