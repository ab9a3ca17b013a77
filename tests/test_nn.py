"""CompactConv2d and CompactLinear: equal to the masked dense layer, in inference and training, stored and copied."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from structadmm.nn import CompactConv2d, CompactLinear

Layer = CompactConv2d | CompactLinear
SHAPE = (2, 12, 9, 7)


def sparse_conv(block: int = 4, groups: int = 2, density: float = 0.3, **kwargs: Any) -> nn.Conv2d:
    """A convolution with block-columns of zeros."""
    conv = nn.Conv2d(12, 20, 3, padding=1, groups=groups, **kwargs)
    with torch.no_grad():
        for first in range(0, 20, block):
            conv.weight[first : first + block] *= torch.rand(1, *conv.weight.shape[1:]) < density
    return conv


def sparse_linear(density: float = 0.3, **kwargs: Any) -> nn.Linear:
    linear = nn.Linear(30, 21, **kwargs)
    with torch.no_grad():
        linear.weight.mul_(torch.rand(1, 30) < density)
    return linear


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["conv", "linear"])
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any, Tensor]:
    """A dense layer, its compacted form, an input."""
    if request.param == "conv":
        conv = sparse_conv()
        return conv, CompactConv2d.from_dense(conv), torch.randn(SHAPE)
    linear = sparse_linear()
    return linear, CompactLinear.from_dense(linear), torch.randn(5, 30)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # sums of at most 54 f32 products of size below one


@settings(max_examples=60, deadline=None)
@given(
    groups=st.sampled_from([1, 2, 4]),
    true_block=st.sampled_from([2, 4, 8, 20]),
    block=st.sampled_from(["auto", 1, 3, 4, 8, 16, 100]),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    stride=st.sampled_from([1, 2, (2, 1)]),
    padding=st.sampled_from([0, 1, (2, 1), "valid"]),
    bias=st.booleans(),
)
def test_conv_equals_dense(
    groups: int, true_block: int, block: Any, density: float, stride: Any, padding: Any, bias: bool
) -> None:
    conv = sparse_conv(true_block, groups, density, bias=bias)
    conv.stride, conv.padding = (stride, stride) if isinstance(stride, int) else stride, padding
    x = torch.randn(SHAPE)
    layer = CompactConv2d.from_dense(conv, block=block)
    assert torch.equal(layer.dense_weight(), conv.weight)
    want = F.conv2d(x, conv.weight, conv.bias, stride, padding, 1, groups)
    with torch.no_grad():
        close(layer(x), want)
    close(layer(x), want)
    close(layer.to_dense()(x), want)


def test_auto_takes_the_blocks_that_the_zeros_have() -> None:
    conv = nn.Conv2d(64, 64, 3)
    with torch.no_grad():
        conv.weight.mul_(torch.rand(1, 64, 3, 3) < 0.2)
    assert CompactConv2d.from_dense(conv).block_filters.tolist() == [64]
    for size in (8, 16):
        blocks = nn.Conv2d(64, 64, 3)
        with torch.no_grad():
            for first in range(0, 64, size):
                blocks.weight[first : first + size] *= torch.rand(1, 64, 3, 3) < 0.2
        layer = CompactConv2d.from_dense(blocks)
        assert layer.block_filters.tolist() == [size] * (64 // size)
        assert layer.weight.numel() == int((blocks.weight != 0).sum())
    # 16 filters of 64 left: their block keeps all columns, the others none
    rows = nn.Conv2d(64, 64, 3)
    with torch.no_grad():
        rows.weight[16:] = 0
    layer = CompactConv2d.from_dense(rows)
    assert layer.weight.numel() == 16 * 64 * 9


def test_without_gradients_the_op_runs_and_follows_the_weight(pair: Any) -> None:
    dense, layer, x = pair
    with torch.no_grad():
        first = layer(x)
        close(first, dense(x))
        packed = layer._packed
        assert packed is not None
        layer(x)
        assert layer._packed is packed  # not packed twice
        layer.weight.mul_(2)
        layer.bias.add_(1)
        dense.weight.mul_(2)
        dense.bias.add_(1)
        close(layer(x), dense(x))
        layer.weight.data.mul_(2)  # unseen by torch's version counter: eval() forgets the packed copy
        dense.weight.mul_(2)
        layer.eval()
        close(layer(x), dense(x))
        layer.weight = nn.Parameter(layer.weight * 2)
        dense.weight.mul_(2)
        close(layer(x), dense(x))
        layer.bias = None
        close(layer(x), dense(x) - dense.bias.view(-1, *[1] * (x.dim() - 2)))
    with torch.inference_mode():
        layer.weight.mul_(0.5)
        dense.weight.mul_(0.5)
        close(layer(x), dense(x) - dense.bias.view(-1, *[1] * (x.dim() - 2)))


def test_training_is_that_of_the_dense_layer_with_its_zeros_held(pair: Any) -> None:
    dense, layer, x = pair
    stored = copy.deepcopy(layer)
    nn.init.ones_(stored.weight)
    mask = stored.dense_weight().detach()  # a block keeps a column for all its filters
    steps = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1) for m in (dense, layer)]
    for _ in range(3):
        for m, optimizer in zip((dense, layer), steps, strict=True):
            optimizer.zero_grad()
            m(x).square().mean().backward()
            optimizer.step()
        with torch.no_grad():
            dense.weight.mul_(mask)
    torch.testing.assert_close(layer.dense_weight(), dense.weight, rtol=1e-4, atol=1e-5)
    close(layer.bias, dense.bias)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), dense(x), rtol=1e-4, atol=1e-4)


def test_gradients_f64() -> None:
    conv = CompactConv2d.from_dense(sparse_conv().double())
    x = torch.randn(1, 12, 4, 4, dtype=torch.float64, requires_grad=True)
    linear = CompactLinear.from_dense(sparse_linear().double())
    v = torch.randn(2, 30, dtype=torch.float64, requires_grad=True)
    for layer, inputs in ((conv, x), (linear, v)):
        run: Callable[..., Tensor] = lambda i, w, b, layer=layer: torch.func.functional_call(  # noqa: E731
            layer, {"weight": w, "bias": b}, i
        )
        assert torch.autograd.gradcheck(run, (inputs, layer.weight, layer.bias))


def test_other_dtypes_take_the_reference(pair: Any) -> None:
    dense, layer, x = pair
    with torch.no_grad():
        for dtype in (torch.float64, torch.bfloat16):
            m, want = copy.deepcopy(layer).to(dtype), copy.deepcopy(dense).to(dtype)
            y = m(x.to(dtype))
            assert y.dtype == dtype
            torch.testing.assert_close(y, want(x.to(dtype)), rtol=1e-2, atol=1e-2)
        with pytest.raises(RuntimeError):
            layer(x.double())
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(layer(x.bfloat16()), dense(x.bfloat16()), rtol=1e-2, atol=1e-2)


def test_copies_and_pickles(pair: Any) -> None:
    dense, layer, x = pair
    with torch.no_grad():
        want = layer(x)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert other._packed is None
            other.weight.zero_()
            other.bias.fill_(3)
            assert bool((other(x) == 3).all())
        assert torch.equal(layer(x), want)


def test_state_dict_brings_its_tables(pair: Any) -> None:
    dense, layer, x = pair
    assert set(layer.state_dict()) == {"weight", "bias", "taps", "block_filters", "block_taps"}
    conv = isinstance(layer, CompactConv2d)
    other: Layer = CompactConv2d(12, 20, 3, padding=1, groups=2) if conv else CompactLinear(30, 21)
    assert other.weight.numel() == dense.weight.numel()  # nothing pruned yet
    file = io.BytesIO()
    torch.save(nn.Sequential(layer).state_dict(), file)
    file.seek(0)
    nn.Sequential(other).load_state_dict(torch.load(file))
    with torch.no_grad():
        assert torch.equal(other(x), layer(x))
    bad = layer.state_dict()
    bad["taps"] = bad["taps"] + 1000
    with pytest.raises(ValueError, match=r"\(0\): taps got .* wanted 0 to"):
        nn.Sequential(other).load_state_dict({f"0.{k}": v for k, v in bad.items()})
    with torch.no_grad():
        assert torch.equal(other(x), layer(x))


def test_compile_and_export_with_any_batch(pair: Any) -> None:
    dense, layer, x = pair
    layer.eval()
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
        dynamic = {0: torch.export.Dim("batch", min=1, max=64)}
        exported = torch.export.export(layer, (x,), dynamic_shapes=(dynamic,)).module()
        for n in (x.shape[0], 7):
            inputs = torch.randn(n, *x.shape[1:])
            close(compiled(inputs), dense(inputs))
            close(exported(inputs), dense(inputs))


def test_compiled_training(pair: Any) -> None:
    dense, layer, x = pair
    torch.compile(layer, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    want = layer.weight.grad.clone()
    layer.weight.grad = None
    layer(x).square().sum().backward()
    torch.testing.assert_close(want, layer.weight.grad)


def test_nan_weights_are_kept_and_propagate() -> None:
    conv = sparse_conv(block=20, groups=1, density=0.1)
    with torch.no_grad():
        conv.weight[3, 5, 1, 1] = torch.nan
        layer = CompactConv2d.from_dense(conv)
        y = layer(torch.randn(SHAPE))
    assert bool(y[:, 3].isnan().all()) and bool(y[:, [0, 1, 2, *range(4, 20)]].isfinite().all())


def test_frozen_and_training_flags_are_carried() -> None:
    conv = sparse_conv().eval()
    conv.weight.requires_grad_(False)
    layer = CompactConv2d.from_dense(conv)
    assert not layer.training and not layer.weight.requires_grad and layer.bias.requires_grad
    dense = layer.to_dense()
    assert not dense.training and not dense.weight.requires_grad and torch.equal(dense.weight, conv.weight)


def test_weight_in_place_of_the_layers_own() -> None:
    conv = nn.Conv2d(12, 20, 3)
    weight = conv.weight.detach() * (torch.rand(1, 12, 3, 3) < 0.2)
    layer = CompactConv2d.from_dense(conv, weight)
    assert torch.equal(layer.dense_weight(), weight)


def test_attributes_and_repr() -> None:
    layer = CompactConv2d.from_dense(sparse_conv())
    for name in (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
    ):
        assert getattr(layer, name) == getattr(sparse_conv(), name)
    assert repr(layer).startswith("CompactConv2d(12, 20, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), groups=2, ")
    assert repr(CompactLinear(3, 2)) == (
        "CompactLinear(in_features=3, out_features=2, bias=True, blocks=1, weights=6 of 6 (100.0%))"
    )
    assert CompactConv2d(4, 4, 3, padding="same").padding == (1, 1)


int32 = torch.int32


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: CompactConv2d(3, 4, 3, groups=2), "in_channels got 3, wanted a positive multiple of groups 2"),
        (lambda: CompactConv2d(4, 0, 3), "out_channels got 0, wanted"),
        (lambda: CompactConv2d(4, 4, 0), "kernel_size got 0, wanted"),
        (lambda: CompactConv2d(4, 4, (3, 3, 3)), "kernel_size got .*, wanted one or two"),
        (lambda: CompactConv2d(4, 4, 3, stride=0), "stride got 0"),
        (lambda: CompactConv2d(4, 4, 3, padding=-1), "padding got -1"),
        (lambda: CompactConv2d(4, 4, 3, padding="around"), "padding got 'around'"),
        (lambda: CompactConv2d(4, 4, 2, padding="same"), 'padding got "same"'),
        (lambda: CompactConv2d(4, 4, 3, dilation=0), "dilation got 0"),
        (lambda: CompactLinear(0, 4), "in_features got 0"),
        (lambda: CompactLinear(4, 4, taps=torch.arange(4)), "got some, wanted all or none"),
        (lambda: table_of([0, 4], [4], [0, 2]), "taps got 0 to 4, wanted 0 to 3"),
        (lambda: table_of([1, 1], [4], [0, 2]), "wanted taps that ascend"),
        (lambda: table_of([1, 2], [3], [0, 2]), "add up to 4"),
        (lambda: table_of([1, 2], [2, 2], [0, 2]), "block_taps got 2 offsets, wanted 3"),
        (lambda: table_of([1, 2], [4], [0, 1]), "wanted offsets from 0 up to 2"),
        (lambda: table_of([1, 2], [4], [0, 2], torch.int64), "taps got torch.int64"),
        (lambda: CompactConv2d.from_dense(sparse_conv(), block=0), 'block got 0, wanted "auto" or'),
        (lambda: CompactConv2d.from_dense(sparse_conv(), torch.zeros(3)), r"weight got \[3\], wanted"),
        (lambda: CompactConv2d.from_dense(sparse_conv(padding_mode="reflect")), "padding_mode got 'reflect', wanted"),
    ],
)
def test_bad_arguments(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"Compact(Conv2d|Linear).*{message}"):
        make()


def table_of(taps: list[int], sizes: list[int], offsets: list[int], dtype: torch.dtype = int32) -> CompactLinear:
    tables = [torch.tensor(t, dtype=dtype) for t in (taps, sizes, offsets)]
    return CompactLinear(4, 4, taps=tables[0], block_filters=tables[1], block_taps=tables[2])


def test_wrong_input_names_what_was_wanted(pair: Any) -> None:
    _, layer, x = pair
    wrong = x[:, :7]
    with torch.no_grad(), pytest.raises(ValueError, match="x has 7 (channels|features), wanted"):
        layer(wrong)
    with pytest.raises(ValueError, match="x has 7 (channels|features), wanted"):
        layer(wrong)
