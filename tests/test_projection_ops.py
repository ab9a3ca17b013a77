"""The training ops against reference.py: shapes, tails, layouts, dtypes, instruction sets, threads, bad input."""

from __future__ import annotations

import math
import os
import sys
import threading
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from structadmm import _core, ops, reference
from structadmm.groups import STRUCTURES, expand_keep, group_sizes, n_groups

ISAS = _core.supported_isas()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["contiguous", "channels_last", "transposed", "sliced"]
# Residual sums add 16 nonnegative squares in f32, each addition rounded once, and the rest in f64.
SUMS_RTOL = 16 * 2**-24
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(autouse=True)
def defaults_afterwards():
    threads, core_threads = torch.get_num_threads(), _core.get_num_threads()
    yield
    use_isa("")
    torch.set_num_threads(threads)
    _core.set_num_threads(core_threads)


def use_isa(name: str) -> None:
    torch.ops.structadmm.set_isa(name)
    _core.set_isa(name)


def in_layout(t: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout; 'sliced' leaves gaps between rows and between elements."""
    if layout == "channels_last" and t.dim() in (4, 5):
        return t.contiguous(memory_format=torch.channels_last if t.dim() == 4 else torch.channels_last_3d)
    if layout == "transposed":
        return t.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "sliced":
        wide = t.new_zeros(t.shape[0] * 2, *t.shape[1:-1], t.shape[-1] * 3)
        wide[::2, ..., 1::3] = t
        return wide[::2, ..., 1::3]
    return t.contiguous()


@st.composite
def problems(draw):
    """A weight's shape, its groups, layouts and values."""
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    kernel = draw(st.sampled_from([(), (3,), (1, 1), (3, 3), (2, 5), (7, 7), (2, 1, 3)]))
    shape = (groups * draw(st.integers(1, 30)), draw(st.integers(1, 40)), *kernel)
    gen = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    w, z, u = (torch.randn(shape, generator=gen) for _ in range(3))
    if draw(st.booleans()):  # many equal norms: ties
        w, u = w.round(), torch.zeros_like(u)
    mask = torch.rand(shape, generator=gen) < 0.7 if draw(st.booleans()) else None
    layout = draw(st.sampled_from(LAYOUTS))
    other = layout if draw(st.booleans()) else draw(st.sampled_from(LAYOUTS))
    structure = draw(st.sampled_from(STRUCTURES))
    block = draw(st.sampled_from([1, 2, 3, 8, 100]))
    n = n_groups(structure, shape, groups, block)
    return {
        "w": in_layout(w.to(draw(st.sampled_from(DTYPES))), layout),
        "z": in_layout(z, layout),
        "u": in_layout(u, other),
        "mask": None if mask is None else in_layout(mask, other),
        "spec": (structure, groups, block),
        "k": draw(st.integers(0, n)),
        "isa": draw(st.sampled_from(ISAS)),
    }


@QUICK
@given(problems())
def test_group_sumsq(p):
    structure, groups, block = p["spec"]
    w, u, mask = p["w"], p["u"], p["mask"]
    use_isa(p["isa"])
    for with_u in (None, u):
        got = ops.group_sumsq(w, structure, groups, block, with_u, mask)
        want = reference.group_sumsq(w, structure, groups, block, with_u, mask)
        # n nonnegative terms, each addition rounded once: a relative error of at most n * 2^-24.
        n = int(group_sizes(structure, w.shape, groups, block).max())
        torch.testing.assert_close(got, want, rtol=(n + 1) * 2**-24, atol=0)
    use_isa("scalar")
    assert torch.equal(got, ops.group_sumsq(w, structure, groups, block, u, mask))
    if structure != "filter":  # whose lanes follow the memory
        assert torch.equal(got, ops.group_sumsq(w.contiguous(), structure, groups, block, u, mask))


@QUICK
@given(problems())
def test_project_update(p):
    structure, groups, block = p["spec"]
    w, z, u, mask, k = p["w"], p["z"], p["u"], p["mask"], p["k"]
    use_isa(p["isa"])
    w0, z1, u1 = w.clone(), z.clone(), u.clone()
    scores = ops.group_sumsq(w, structure, groups, block, u, mask)
    strides = z.stride(), u.stride()
    keep, sums = ops.project_update_(w, z, u, structure, k, groups, block, mask)
    assert torch.equal(keep, reference.topk_keep(scores, k))
    on = expand_keep(keep, structure, w.shape, groups, block)
    want = reference.masked_update_(w, z1, u1, on if mask is None else on & mask)
    assert torch.equal(z, z1) and torch.equal(u, u1) and torch.equal(w, w0)
    assert (z.stride(), u.stride()) == strides
    torch.testing.assert_close(sums, want, rtol=SUMS_RTOL, atol=0)


@QUICK
@given(problems())
def test_masked_update(p):
    w, z, u = p["w"], p["z"], p["u"]
    mask = torch.ones(w.shape, dtype=torch.bool) if p["mask"] is None else p["mask"]
    use_isa(p["isa"])
    z1, u1 = z.clone(), u.clone()
    sums, want = ops.masked_update_(w, z, u, mask), reference.masked_update_(w, z1, u1, mask)
    assert torch.equal(z, z1) and torch.equal(u, u1)
    torch.testing.assert_close(sums, want, rtol=SUMS_RTOL, atol=0)


@QUICK
@given(st.lists(problems(), min_size=1, max_size=4), st.sampled_from(ISAS), st.data())
def test_add_penalty_grad(ps, isa, data):
    use_isa(isa)
    ws, zs, us = [p["w"] for p in ps], [p["z"] for p in ps], [p["u"] for p in ps]
    grads = [in_layout(torch.randn(w.shape).to(w.dtype), data.draw(st.sampled_from(LAYOUTS))) for w in ws]
    rhos = [data.draw(st.sampled_from([0.0, 1e-3, 0.3, 7.5])) for _ in ws]
    want = [g.clone() for g in grads]
    reference.add_penalty_grad_(want, ws, zs, us, rhos)
    ops.add_penalty_grad_(grads, ws, zs, us, rhos)
    assert all(torch.equal(g, r) for g, r in zip(grads, want, strict=True))  # the same roundings


@QUICK
@given(
    st.lists(
        st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-42, 3e38, 0.5]) | st.floats(width=32, allow_nan=False), max_size=300
    ),
    st.data(),
)
def test_topk_keep(values, data):
    scores = torch.tensor([v for v in values if math.isfinite(v)], dtype=torch.float32)
    k = data.draw(st.integers(0, len(scores)))
    assert torch.equal(ops.topk_keep(scores, k), reference.topk_keep(scores, k))
    assert np.array_equal(_core.topk_keep(scores.numpy()[::-1], k), reference.topk_keep(scores.flip(0), k).numpy())


def test_topk_of_many_and_of_ties():
    gen = torch.Generator().manual_seed(0)
    for scores in (torch.rand(200_003, generator=gen), torch.randint(0, 5, (200_003,), generator=gen).float()):
        for k in (0, 1, 77_777, 200_002, 200_003):
            assert torch.equal(ops.topk_keep(scores, k), reference.topk_keep(scores, k))


def nearest_f32(x: Fraction) -> Fraction:
    """A nonnegative number rounded to f32, ties to even, in the normal range."""
    if x == 0:
        return x
    exponent = x.numerator.bit_length() - x.denominator.bit_length()
    exponent += (x >= Fraction(2) ** (exponent + 1)) - (x < Fraction(2) ** exponent)
    ulp = Fraction(2) ** (exponent - 23)
    return round(x / ulp) * ulp


def fma_sum(values) -> Fraction:
    total = Fraction(0)
    for v in values:
        total = nearest_f32(total + Fraction(float(v)) ** 2)
    return total


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_summation_contract_to_the_bit(isa, layout):
    """The orders of kernels/group_sumsq/group_sumsq.h, in exact arithmetic rounded after every step."""
    use_isa(isa)
    w = torch.randn(11, 5, 3, 3, generator=torch.Generator().manual_seed(5))
    flat = w.reshape(11, 45)
    w = in_layout(w, layout)
    columns = [fma_sum(flat[:, j]) for j in range(45)]
    channels = []
    for c in range(5):
        total = columns[9 * c]
        for t in range(1, 9):
            total = nearest_f32(total + columns[9 * c + t])
        channels.append(total)
    blocks = [fma_sum(flat[b : b + 4, j]) for b in (0, 4, 8) for j in range(45)]
    filters = []
    for o in range(11):
        row = (w[o].permute(1, 2, 0) if layout == "channels_last" else w[o]).flatten()
        lanes = [fma_sum(row[i::32]) for i in range(32)]
        while len(lanes) > 1:
            half = len(lanes) // 2
            lanes = [nearest_f32(a + b) for a, b in zip(lanes[:half], lanes[half:], strict=True)]
        filters.append(lanes[0])
    wants = {"column": columns, "channel": channels, "block_column": blocks, "filter": filters}
    wants["element"] = [fma_sum([v]) for v in flat.flatten()]
    for structure, want in wants.items():
        got = ops.group_sumsq(w, structure, 1, 4)
        assert [Fraction(float(s)) for s in got] == want, structure


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_results_do_not_depend_on_threads_or_isa(structure, layout):
    # Large enough for several tiles and column tasks: above the size that one thread does alone.
    gen = torch.Generator().manual_seed(1)
    w, z, u = (in_layout(torch.randn(96, 70, 3, 3, generator=gen), layout) for _ in range(3))
    k = n_groups(structure, w.shape, 2, 8) // 3
    results = []
    for isa in ISAS:
        for threads in (1, 2, 3):
            use_isa(isa)
            torch.set_num_threads(threads)
            _core.set_num_threads(threads)
            z1, u1, z2, u2 = z.clone(), u.clone(), z.clone(), u.clone()
            results.append((*ops.project_update_(w, z1, u1, structure, k, 2, 8), z1, u1))
            out = _core.project_update_(w.numpy(), z2.numpy(), u2.numpy(), structure, k, 2, 8)
            results.append((*(torch.from_numpy(a) for a in out), z2, u2))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("isa", ISAS)
def test_every_half_converts_as_in_torch(isa, dtype):
    """All finite 16-bit patterns are loaded exactly, and sums are rounded to them as torch rounds."""
    use_isa(isa)
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    w = patterns[torch.isfinite(patterns)].view(1, -1)
    z = torch.zeros(w.shape)
    u, g = z.clone(), torch.zeros_like(w)
    ops.add_penalty_grad_([g], [w], [z], [u], [1.0])
    assert torch.equal(g, w)
    # Values between two neighbours, at their midpoint (a tie), overflowing, and subnormal.
    for scale in (1 + 2**-12, 1 + 2**-9, 1 + 2**-11, 1.5, 2.0**-9):
        f = w.float() * scale
        g = torch.zeros_like(w)
        ops.add_penalty_grad_([g], [torch.zeros_like(w)], [-f], [z], [1.0])
        assert torch.equal(g, f.to(dtype))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e19])
def test_a_norm_that_is_not_finite_changes_nothing(bad):
    w, z, u = torch.randn(8, 3, 3, 3), torch.randn(8, 3, 3, 3), torch.randn(8, 3, 3, 3)
    w[2, 1, 0, 2] = bad
    z0, u0 = z.clone(), u.clone()
    with pytest.raises(ValueError, match="the norm of w . u got .* in group 11, wanted finite values"):
        ops.project_update_(w, z, u, "column", 1)
    assert torch.equal(z, z0) and torch.equal(u, u0)
    mask = torch.ones(w.shape, dtype=torch.bool)
    mask[2, 1, 0, 2] = False
    keep, _ = ops.project_update_(w, z, u, "column", 1, mask=mask)  # outside the mask it is not looked at
    assert keep.sum() == 1 and z[2, 1, 0, 2] == 0


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


W, Z, U = zeros(4, 3, 3, 3), zeros(4, 3, 3, 3), zeros(4, 3, 3, 3)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ops.group_sumsq(W, "row"), "group_sumsq: structure got 'row', wanted one of filter"),
        (lambda: ops.group_sumsq(W, "column", 3), "conv_groups got 3, wanted a divisor of the 4 filters"),
        (lambda: ops.group_sumsq(W, "block_column", 1, 0), "block got 0, wanted at least 1"),
        (lambda: ops.group_sumsq(zeros(4), "filter"), r"w got shape \[4\], wanted"),
        (lambda: ops.group_sumsq(zeros(4, 0), "filter"), r"w got shape \[4, 0\]"),
        (lambda: ops.group_sumsq(W.double(), "filter"), "w got f64, wanted f32, bf16 or f16"),
        (lambda: ops.group_sumsq(W, "filter", u=U.double()), "u got f64, wanted f32"),
        (lambda: ops.group_sumsq(W, "filter", mask=U), "mask got f32, wanted bool"),
        (lambda: ops.project_update_(W, Z, U, "filter", 5), "project_update_: k got 5, wanted 0 to 4"),
        (lambda: ops.project_update_(W, Z, U, "filter", -1), "k got -1"),
        (lambda: ops.project_update_(W, zeros(4, 27), U, "filter", 1), r"z got shape \[4, 27\], wanted w's"),
        (lambda: ops.project_update_(W, W, U, "filter", 1), "z got memory that it shares with w"),
        (lambda: ops.project_update_(W, Z, Z, "filter", 1), "z got memory that it shares with u"),
        (lambda: ops.project_update_(W, zeros(1).expand(W.shape), U, "filter", 1), "z got an expanded tensor"),
        (lambda: ops.masked_update_(W, Z, U, Z), "masked_update_: mask got f32"),
        (lambda: ops.topk_keep(torch.ones(3), 4), "topk_keep: k got 4, wanted 0 to 3"),
        (lambda: ops.topk_keep(torch.ones(3, 3), 1), r"scores got shape \[3, 3\]"),
        (lambda: ops.topk_keep(torch.tensor([1.0, math.nan]), 1), "scores got nan in group 1"),
        (lambda: ops.add_penalty_grad_([Z], [W], [U], [], [1.0]), "lists got 1, 1, 1, 0 and 1 entries"),
        (lambda: ops.add_penalty_grad_([Z], [W], [U], [U], [math.nan]), "layer 0: rho got nan"),
        (lambda: ops.add_penalty_grad_([Z.half()], [W], [U], [U], [1.0]), "layer 0: grad got f16, wanted f32"),
        (lambda: ops.add_penalty_grad_([W], [W], [U], [U], [1.0]), "grad got memory that it shares with w"),
        (lambda: _core.group_sumsq(W.numpy().astype(">f4"), "filter"), "w got dtype >f4"),
        (lambda: _core.group_sumsq(W.long().numpy(), "filter"), "w got dtype int64"),
        (lambda: _core.project_update_(W.numpy(), read_only(), U.numpy(), "filter", 1), "z got a read-only array"),
        (lambda: _core.group_sumsq(unaligned(), "filter"), "w got an array that is not aligned"),
        (lambda: _core.set_isa("avx1024"), "set_isa: got 'avx1024', wanted one of scalar"),
        (lambda: _core.set_num_threads(0), "threads got 0"),
    ],
)
def test_bad_input_is_an_error_that_says_what_was_wanted(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_every_torch_gives_a_value_error(monkeypatch):
    """Torch 2.11 raises the core's own error, torch 2.15 a RuntimeError with its text: here in one run."""
    text = "topk_keep: k got 4, wanted 0 to 3"
    foreign = RuntimeError("CUDA error: topk_keep"), torch.OutOfMemoryError(text), NotImplementedError(text)
    for error in (RuntimeError(text), *foreign):

        def fail(*_, error=error):
            raise error

        monkeypatch.setattr(ops, "_ops", SimpleNamespace(topk_keep=fail))
        with pytest.raises(Exception, match="topk_keep") as caught:
            ops.topk_keep(torch.ones(3), 4)
        if error in foreign:
            assert caught.value is error
        else:
            assert type(caught.value) is ValueError and str(caught.value) == text


def read_only():
    a = np.zeros(W.shape, np.float32)
    a.flags.writeable = False
    return a


def unaligned():
    return np.frombuffer(bytes(4 * 12 + 1), np.uint8)[1:].view(np.float32).reshape(4, 3)


def test_opcheck():
    o = torch.ops.structadmm
    w = torch.nn.Parameter(torch.randn(8, 4, 3, 3)).detach()
    z, u, mask = torch.randn(8, 4, 3, 3), torch.randn(8, 4, 3, 3), torch.rand(8, 4, 3, 3) < 0.5
    torch.library.opcheck(o.group_sumsq.default, (w, "column"))
    torch.library.opcheck(o.group_sumsq.default, (w, "block_column", 2, 3, u, mask))
    torch.library.opcheck(o.topk_keep.default, (torch.rand(9), 4))
    torch.library.opcheck(o.project_update_.default, (w, z, u, "channel", 2))
    torch.library.opcheck(o.project_update_.default, (w, z, u, "filter", 2, 1, 8, mask))
    torch.library.opcheck(o.masked_update_.default, (w, z, u, mask))
    lists = [[torch.randn(8, 4), torch.randn(3, 2)] for _ in range(4)]
    torch.library.opcheck(o.add_penalty_grad_.default, (*lists, [0.1, 0.2]))


def test_compiles_as_one_graph():
    def step(w, z, u, g):
        ops.add_penalty_grad_([g], [w], [z], [u], [0.1])
        keep, sums = ops.project_update_(w, z, u, "column", 5)
        return ops.topk_keep(ops.group_sumsq(z, "filter", u=u) * 2, 3), keep, sums

    gen = torch.Generator().manual_seed(2)
    tensors = [torch.randn(8, 4, 3, 3, generator=gen) for _ in range(4)]
    eager, compiled = ([t.clone() for t in tensors] for _ in range(2))
    want = step(*eager)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(torch.nn.Parameter(compiled[0]), *compiled[1:])
    assert all(torch.equal(a, b) for a, b in zip((*want, *eager), (*got, *compiled), strict=True))


def test_a_write_is_seen_by_autograd():
    z = torch.randn(4, 3)
    y = (z * torch.ones(4, 3, requires_grad=True)).sum()  # saves z for the backward pass
    ops.project_update_(torch.randn(4, 3), z, torch.zeros(4, 3), "column", 1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_tensors_of_inference_mode():
    with torch.inference_mode():
        w, z, u = torch.randn(4, 3), torch.zeros(4, 3), torch.zeros(4, 3)
        keep, _ = ops.project_update_(w, z, u, "column", 1)
        assert torch.equal(z, w * keep)


def test_numpy_arrays_of_any_strides():
    rng = np.random.default_rng(3)
    wide = [rng.standard_normal((12, 40, 5, 3)).astype(np.float32) for _ in range(3)]
    views = [a[::-2, 3:37:2].transpose(0, 1, 3, 2) for a in wide]
    w, z, u = views
    mask = rng.random((6, 17, 3, 5)) < 0.8
    tw, tz, tu = (torch.from_numpy(v.copy()) for v in views)
    keep, sums = _core.project_update_(w, z, u, "block_column", 40, 1, 4, mask)
    want_keep, want_sums = ops.project_update_(tw, tz, tu, "block_column", 40, 1, 4, torch.from_numpy(mask))
    assert np.array_equal(keep, want_keep.numpy()) and np.array_equal(z, tz.numpy()) and np.array_equal(u, tu.numpy())
    np.testing.assert_allclose(sums, want_sums.numpy(), rtol=SUMS_RTOL)  # other tiles
    g, tg = np.ones_like(w), torch.ones_like(tw)
    _core.add_penalty_grad_([g], [w], [z], [u], [0.5])
    ops.add_penalty_grad_([tg], [tw], [tz], [tu], [0.5])
    assert np.array_equal(g, tg.numpy())
    assert np.array_equal(_core.masked_update_(w, z, u, mask) > 0, [True] * 5)
    half = rng.standard_normal((5, 9)).astype(np.float16)
    assert np.array_equal(_core.group_sumsq(half, "filter"), ops.group_sumsq(torch.from_numpy(half), "filter").numpy())


def test_the_gil_is_released():
    a = np.ones((4000, 4000), np.float32).T  # gathered, by scalar code: long enough for the other thread to wake
    _core.set_isa("scalar")
    _core.set_num_threads(1)
    count, stop = [0], threading.Event()

    def spin():
        while not stop.is_set():
            count[0] += 1

    thread = threading.Thread(target=spin)
    interval = sys.getswitchinterval()
    thread.start()
    try:
        # Python takes the GIL away only after half a second, so the other thread runs only if the call gives it up.
        sys.setswitchinterval(0.5)
        before = count[0]
        _core.group_sumsq(a, "column")
        moved = count[0] - before
    finally:
        stop.set()
        sys.setswitchinterval(interval)
        thread.join()
    assert moved > 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_threads_after_a_fork():
    _core.set_num_threads(2)
    a = np.ones((512, 512), np.float32)
    want = _core.group_sumsq(a, "column")
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(_core.group_sumsq(a, "column"), want) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("family", ["group_sumsq", "admm_update"])
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
def test_selection_names_what_another_cpu_would_run(family, dtype):
    x86 = "avx2" in ISAS or os.uname().machine == "x86_64"
    for isa in ("scalar", "avx2", "avx512"):
        want = f"{family}_{dtype}__{isa if x86 else 'scalar'}"
        assert _core.selected_kernel(family, isa, dtype) == want
    for isa in ("avx512_bf16", "amx_bf16"):
        assert _core.selected_kernel(family, isa, dtype) == _core.selected_kernel(family, "avx512", dtype)
    with pytest.raises(ValueError, match="dtype got another dtype, wanted f32, bf16 or f16"):
        _core.selected_kernel(family, "scalar", "f8")
