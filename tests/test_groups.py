"""The numbering of groups, and the reference ops against loops over single weights."""

import itertools
import math

import pytest
import torch

from structadmm import reference
from structadmm.groups import STRUCTURES, expand_keep, group_ids, group_sizes, n_groups, nonempty

SHAPES = [((6, 4), 1), ((5, 3, 3), 1), ((12, 2, 3, 3), 2), ((9, 2, 1, 2), 3), ((4, 2, 2, 1, 2), 2), ((10, 1, 3, 3), 1)]
BLOCKS = {s: (1, 3, 8) if s == "block_column" else (8,) for s in STRUCTURES}
CASES = [(s, shape, g, b) for s in STRUCTURES for shape, g in SHAPES for b in BLOCKS[s]]


def group_of(structure, o, c, k, shape, g, b):
    """The number of one weight's group, from the definition in words."""
    taps, filters = math.prod(shape[2:]), shape[0] // g
    conv_group, j, n = o // filters, c * taps + k, shape[1] * taps
    if structure == "filter":
        return o
    if structure == "channel":
        return conv_group * shape[1] + c
    if structure == "column":
        return conv_group * n + j
    if structure == "block_column":
        return (conv_group * math.ceil(filters / b) + (o - conv_group * filters) // b) * n + j
    return o * n + j


@pytest.mark.parametrize(("structure", "shape", "g", "b"), CASES)
def test_numbering(structure, shape, g, b):
    taps = math.prod(shape[2:])
    weights = itertools.product(range(shape[0]), range(shape[1]), range(taps))
    want = torch.tensor([group_of(structure, o, c, k, shape, g, b) for o, c, k in weights])
    ids = group_ids(structure, shape, g, b)
    assert ids.shape == shape and torch.equal(ids.flatten(), want)
    n = n_groups(structure, shape, g, b)
    assert n == want.max() + 1
    assert torch.equal(group_sizes(structure, shape, g, b), torch.bincount(want, minlength=n))
    keep = torch.rand(n, generator=torch.Generator().manual_seed(1)) < 0.5
    mask = expand_keep(keep, structure, shape, g, b)
    assert mask.is_contiguous() and torch.equal(mask, keep[ids])
    assert torch.equal(nonempty(mask, structure, g, b), keep)
    mask[...] = True  # a mask never shares memory with keep
    assert not keep.all()


LAYOUTS = [(*c, "contiguous") for c in CASES] + [(*c, "channels_last") for c in CASES if len(c[1]) == 4]


@pytest.mark.parametrize(("structure", "shape", "g", "b", "layout"), LAYOUTS)
def test_project_update_by_loops(structure, shape, g, b, layout):
    gen = torch.Generator().manual_seed(7)
    w, z, u = (torch.randn(shape, generator=gen) for _ in range(3))
    mask = torch.rand(shape, generator=gen) < 0.8
    if layout == "channels_last":
        w, z, u, mask = (t.to(memory_format=torch.channels_last) for t in (w, z, u, mask))
    n, ids = n_groups(structure, shape, g, b), group_ids(structure, shape, g, b)
    k = max(1, n // 3)
    norms = [math.fsum(float(v) ** 2 for v in (w + u)[mask & (ids == i)]) for i in range(n)]
    got = reference.group_sumsq(w, structure, g, b, u, mask)
    assert got.dtype == torch.float32
    # f64 sums rounded once to f32: half an ulp of f32 is 2^-24; the f64 error is far below it.
    torch.testing.assert_close(got.double(), torch.tensor(norms, dtype=torch.float64), rtol=2**-24 * 1.01, atol=0)
    order = sorted(range(n), key=lambda i: (-float(got[i]), i))
    w0, z0, u0 = w.clone(), z.clone(), u.clone()
    keep, sums = reference.project_update_(w, z, u, structure, k, g, b, mask)
    assert sorted(keep.nonzero().flatten().tolist()) == sorted(order[:k])
    on = keep[ids] & mask
    v = w0 + u0
    assert torch.equal(z, torch.where(on, v, 0.0)) and torch.equal(u, v - z) and torch.equal(w, w0)
    want = [(w - z), (z - z0), w, z, u]
    torch.testing.assert_close(sums, torch.stack([t.double().square().sum() for t in want]), rtol=1e-12, atol=0)
    assert not torch.signbit(z[~on]).any()


def test_topk_is_exact_and_ties_go_to_the_lower_index():
    for scores in itertools.product([0.0, 1.0, 2.0], repeat=4):
        for k in range(5):
            want = sorted(range(4), key=lambda i: (-scores[i], i))[:k]
            assert reference.topk_keep(torch.tensor(scores), k).nonzero().flatten().tolist() == sorted(want)
    many = reference.topk_keep(torch.ones(100_003), 77_777)
    assert many[:77_777].all() and not many[77_777:].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_non_finite_score_changes_nothing(bad):
    w, z, u = torch.randn(4, 3), torch.randn(4, 3), torch.randn(4, 3)
    w[2, 1] = bad
    z0, u0 = z.clone(), u.clone()
    with pytest.raises(ValueError, match="finite"):
        reference.project_update_(w, z, u, "column", 1)
    assert torch.equal(z, z0) and torch.equal(u, u0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_penalty_gradient_is_that_of_the_squared_penalty(dtype):
    gen = torch.Generator().manual_seed(3)
    w = torch.randn(5, 4, generator=gen).to(dtype).requires_grad_()
    z, u = torch.randn(5, 4, generator=gen), torch.randn(5, 4, generator=gen)
    w32 = w.detach().float().requires_grad_()
    (0.25 / 2 * (w32 - z + u).square().sum()).backward()
    g = torch.ones(5, 4, dtype=dtype)
    reference.add_penalty_grad_([g], [w.detach()], [z], [u], [0.25])
    # Both are f32 (autograd may associate differently: a few ulp of values below 8), then rounded once to g's dtype.
    torch.testing.assert_close(g.float(), 1 + w32.grad, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: n_groups("row", (4, 4)), "structure got 'row', wanted one of filter"),
        (lambda: n_groups("filter", (4,)), "shape got"),
        (lambda: n_groups("column", (4, 4), 3), "conv_groups got 3"),
        (lambda: n_groups("block_column", (4, 4), 1, 0), "block got 0"),
        (lambda: expand_keep(torch.ones(3, dtype=torch.bool), "filter", (4, 4)), "keep got"),
        (lambda: reference.topk_keep(torch.ones(3), 4), "k got 4, wanted 0 to 3"),
    ],
)
def test_errors_name_what_was_got_and_wanted(call, words):
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        call()
