"""The CUDA kernels against the same references as the CPU's; skipped, and says so, where torch sees no GPU."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from structadmm import ops, reference
from structadmm.admm import ADMM
from structadmm.groups import STRUCTURES, n_groups
from structadmm.nn import CompactConv2d, CompactLinear
from structadmm.plan import Plan, Rule, Spec
from structadmm.schedules import ResidualBalancing

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

# Odd sizes leave tails in every tile; the larger shape fills several blocks.
SHAPES = [((7, 5, 3, 3), 1), ((12, 3, 3, 3), 4), ((33, 17), 1), ((96, 64, 3, 3), 1), ((130, 67, 1, 1), 1)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weights(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(shape).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape,conv_groups", SHAPES, ids=str)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_group_sums_are_the_cpus_bit_for_bit(structure: str, shape, conv_groups: int, dtype: torch.dtype) -> None:
    w, u = weights(shape, dtype), torch.randn(shape)
    mask = torch.rand(shape) > 0.3
    cpu = ops.group_sumsq(w, structure, conv_groups, 4, u=u, mask=mask)
    gpu = ops.group_sumsq(w.cuda(), structure, conv_groups, 4, u=u.cuda(), mask=mask.cuda())
    assert torch.equal(gpu.cpu(), cpu)  # one summation contract; a last bit is another mask


@pytest.mark.parametrize("shape,conv_groups", SHAPES, ids=str)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_project_update(structure: str, shape, conv_groups: int) -> None:
    w = weights(shape, torch.float32)
    z, u = torch.randn(shape), torch.randn(shape)
    k = max(1, n_groups(structure, w.shape, conv_groups, 4) // 3)
    gz, gu = z.cuda(), u.cuda()
    keep, sums = ops.project_update_(w.cuda(), gz, gu, structure, k, conv_groups, 4)
    want_keep, want_sums = reference.project_update_(w, z, u, structure, k, conv_groups, 4)
    assert torch.equal(keep.cpu(), want_keep)
    assert torch.equal(gz.cpu(), z) and torch.equal(gu.cpu(), u)  # one rounding per element on both sides
    torch.testing.assert_close(sums.cpu(), want_sums, rtol=1e-6, atol=0)  # f64 sums of f32 squares


def test_ties_go_to_the_lower_index() -> None:
    scores = torch.tensor([1.0, 2.0, 2.0, 2.0, 0.5] * 1000)
    for k in (0, 1, 1500, 3000, 5000):
        assert torch.equal(ops.topk_keep(scores.cuda(), k).cpu(), reference.topk_keep(scores, k))


def test_penalty_gradient() -> None:
    ws = [torch.randn(s) for s, _ in SHAPES]
    zs, us, grads = ([torch.randn_like(w) for w in ws] for _ in range(3))
    rhos = [0.0, 1e-3, 0.5, 1.0, 2.0]
    got = [g.cuda() for g in grads]
    ops.add_penalty_grad_(got, [w.cuda() for w in ws], [z.cuda() for z in zs], [u.cuda() for u in us], rhos)
    reference.add_penalty_grad_(grads, ws, zs, us, rhos)
    for a, b in zip(got, grads, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-6, atol=1e-6)  # two f32 roundings on values of size one


@pytest.mark.parametrize("stride,padding,dilation,groups", [(1, 1, 1, 1), (2, 1, 1, 1), (1, 2, 2, 1), (2, 3, 1, 2)])
def test_conv2d_compact(stride: int, padding: int, dilation: int, groups: int) -> None:
    torch.manual_seed(1)
    conv = nn.Conv2d(12, 20, 3, stride, padding, dilation, groups).eval()
    with torch.no_grad():
        conv.weight.mul_(torch.rand(1, *conv.weight.shape[1:]) < 0.3)
        x = torch.randn(3, 12, 17, 13)
        layer = CompactConv2d.from_dense(conv).cuda().eval()
        want = F.conv2d(x.double(), conv.weight.double(), conv.bias.double(), stride, padding, dilation, groups)
        # f32 dot products of at most 108 terms of size one: 108 * 2^-24 * sum of magnitudes, well under 1e-4
        torch.testing.assert_close(layer(x.cuda()).cpu().double(), want, rtol=1e-5, atol=1e-4)


def test_linear_compact() -> None:
    torch.manual_seed(2)
    linear = nn.Linear(200, 37).eval()
    with torch.no_grad():
        linear.weight.mul_(torch.rand(1, 200) < 0.2)
        x = torch.randn(5, 200)
        got = CompactLinear.from_dense(linear).cuda().eval()(x.cuda()).cpu()
        torch.testing.assert_close(got, linear(x), rtol=1e-5, atol=1e-4)


def test_ops_run_on_the_current_stream() -> None:
    """A long kernel on a side stream delays ours only if ours runs there too; then the result sees its write."""
    stream = torch.cuda.Stream()
    w = torch.zeros(4096, 4096, device="cuda")
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        w.fill_(1.0)
        sums = ops.group_sumsq(w, "filter")
    stream.synchronize()
    assert torch.equal(sums.cpu(), torch.full((4096,), 4096.0))


def test_admm_follows_the_model_to_the_gpu_and_does_the_same_there() -> None:
    rules = (
        Rule("0", (Spec("block_column", 0.7, 4),)),
        Rule("1", (Spec("filter", 0.5), Spec("column", 0.6))),
        Rule("2", (Spec("channel", 0.5),)),
    )
    torch.manual_seed(0)
    here = nn.Sequential(nn.Conv2d(3, 12, 3), nn.Conv2d(12, 8, 3, groups=2), nn.Linear(4, 6))
    there = copy.deepcopy(here)
    a, b = (ADMM(m, Plan(rules), rho=ResidualBalancing(1e-2)) for m in (here, there))
    there.cuda()
    noise = [torch.randn_like(m.weight) for m in here]
    for model, admm in ((here, a), (there, b)):
        admm.add_penalty_grad_()
        with torch.no_grad():
            for m, n in zip(model, noise, strict=True):
                m.weight.add_(n.to(m.weight.device))
        report = admm.step()
    masks, gpu_masks = a.harden_(), b.harden_()
    # Group sums and updates are the same bits on both, so the same groups survive.
    for name, mask in masks.items():
        assert b.z(name).is_cuda and torch.equal(a.z(name), b.z(name).cpu()) and torch.equal(a.u(name), b.u(name).cpu())
        assert torch.equal(mask, gpu_masks[name].cpu())
    assert report.primal > 0
    optimizer = torch.optim.AdamW(there.parameters(), 0.1)
    gpu_masks.hold(optimizer)
    for p in there.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    for name, mask in gpu_masks.items():
        w = there.get_submodule(name).weight.detach()
        assert not w[~mask].view(torch.int32).any() and w[mask].any()
