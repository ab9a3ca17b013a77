"""What goes from networks of the operations that mix, move and normalise channels, and what stays with a reason."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import structadmm as sa
from networks import ResNet, randomise
from random_graphs import Attention, Gated, Scale
from structadmm import symbolic
from structadmm.analysis import Analysis
from structadmm.errors import ArtefactError, CompactError, TraceError
from structadmm.layout import settle
from structadmm.trace import trace


def maps(n: int, c: int = 3, size: int = 8) -> Tensor:
    return torch.randn(n, c, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(n))


def tokens(n: int, c: int = 16, length: int = 5) -> Tensor:
    return torch.randn(n, length, c, dtype=torch.float64, generator=torch.Generator().manual_seed(n))


@torch.no_grad()
def filled(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random parameters, also where they begin as ones and zeros."""
    g = torch.Generator().manual_seed(seed)
    for name, p in [*model.named_parameters(), *model.named_buffers()]:
        if p.is_floating_point():
            p.copy_(torch.randn(p.shape, generator=g).to(p) * (0.5 if p.dim() > 1 else 0.3))
            if p.dim() == 1 and name.endswith(("weight", "running_var")):
                p.abs_().add_(0.5)
    return model.double().eval()


def compacted(model: nn.Module, x: Tensor, other: Tensor) -> nn.Module:
    """compact, with the checks that hold for every network: the same outputs at another batch, copies, a step."""
    small = sa.compact(model, x, columns="never")
    with torch.no_grad():
        a, b = model(other), small(other)
    assert (a - b).abs().max() <= 1e-10 * max(1.0, a.abs().max().item())
    again = pickle.loads(pickle.dumps(copy.deepcopy(small)))
    with torch.no_grad():
        assert torch.equal(again(other), b)
    small.train()
    small(other).square().mean().backward()
    assert any(p.grad is not None and p.grad.any() for p in small.parameters())
    small.zero_grad()
    return small.eval()


def weight(model: nn.Module, name: str) -> tuple[int, ...]:
    return tuple(model.get_submodule(name).weight.shape)


# Attention


@pytest.mark.parametrize("how", ["fused", "plain", "grouped"])
def test_channels_of_every_head_go(how: str) -> None:
    """The same number in each head, from other places; the scale stays that of the whole head."""
    model = filled(nn.Sequential(nn.Linear(16, 16), Attention(16, 4, how), nn.Linear(16, 2)))
    a = model[1]
    gone = torch.tensor([0, 5, 10, 15])  # one of four in each head, another one each time
    with torch.no_grad():
        if how == "fused":
            for part in range(3):
                a.qkv.weight[16 * part + gone] = 0
                a.qkv.bias[16 * part + gone] = 0
        else:
            for m in (a.q, a.k, a.v):
                m.weight[gone] = 0
                if m.bias is not None:
                    m.bias[gone] = 0
    small = compacted(model, tokens(2), tokens(3))
    assert weight(small, "1.proj") == (16, 12)
    if how == "fused":
        assert weight(small, "1.qkv") == (36, 16)
    else:
        assert weight(small, "1.q") == weight(small, "1.k") == weight(small, "1.v") == (12, 16)
    assert small.report.whole == {}


@pytest.mark.parametrize("how", ["fused", "plain"])
def test_heads_without_values_go(how: str) -> None:
    """A head whose values are constant, or read by nobody, goes with its queries and keys."""
    model = filled(nn.Sequential(nn.Linear(16, 16), Attention(16, 4, how), nn.Linear(16, 2)))
    a = model[1]
    with torch.no_grad():
        rows = a.qkv.weight[32:36] if how == "fused" else a.v.weight[:4]
        rows.zero_()  # values of head 0: their bias is left
        a.proj.weight[:, 12:] = 0  # head 3
    small = compacted(model, tokens(2), tokens(3))
    assert weight(small, "1.proj") == (16, 8)
    assert weight(small, "1.qkv" if how == "fused" else "1.q")[0] == (24 if how == "fused" else 8)


def test_a_constant_key_changes_no_weights() -> None:
    """It adds the same to the scores of all keys, so its query goes too; a constant query does not."""
    model = filled(nn.Sequential(nn.Linear(8, 8), Attention(8, 1, "grouped"), nn.Linear(8, 2)))
    a = model[1]
    with torch.no_grad():
        a.k.weight[:3] = 0
        a.q.weight[5:] = 0
    small = compacted(model, tokens(2, 8), tokens(3, 8))
    assert weight(small, "1.q") == weight(small, "1.k") == (5, 8)


def test_grouped_queries_keep_whole_groups() -> None:
    model = filled(nn.Sequential(nn.Linear(16, 16), Attention(16, 4, "grouped", 2), nn.Linear(16, 2)))
    a = model[1]
    with torch.no_grad():
        a.v.weight[:4] = a.v.bias[:4, None] = 0
    small = compacted(model, tokens(2), tokens(3))
    assert weight(small, "1.q") == (8, 16) and weight(small, "1.k") == weight(small, "1.v") == (4, 16)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_attention_is_taken_apart(batch_first: bool, need_weights: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn, self.fc = nn.MultiheadAttention(16, 4, batch_first=batch_first), nn.Linear(16, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = x if batch_first else x.transpose(0, 1)
            y = self.attn(x, x, x, need_weights=need_weights)[0]
            return self.fc(y if batch_first else y.transpose(0, 1))

    model = filled(Net())
    with torch.no_grad():
        model.attn.in_proj_weight[32:40] = 0  # two heads' values
    small = compacted(model, tokens(2), tokens(3))
    assert weight(small, "attn.in_proj") == (24, 16) and weight(small, "attn.out_proj") == (16, 8)
    cleared = sa.remove_unused_paths(model, tokens(2))
    assert type(cleared.attn) is nn.MultiheadAttention


def test_masked_attention_stays_with_a_reason() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn, self.fc = nn.MultiheadAttention(16, 4, batch_first=True), nn.Linear(16, 2)
            self.register_buffer("mask", torch.zeros(5, 5))

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.attn(x, x, x, attn_mask=self.mask)[0])

    small = compacted(filled(Net()), tokens(2), tokens(3))
    assert "packed" in small.report.whole["attn"]


@pytest.mark.parametrize("fused", [True, False])
def test_gated_units_shrink(fused: bool) -> None:
    model = filled(nn.Sequential(nn.Linear(16, 16), Gated(16, 10, fused), nn.Linear(16, 2)))
    m = model[1]
    with torch.no_grad():
        gate = m.w1.weight[:3] if fused else m.w1.weight[:3]
        gate.zero_()  # silu(bias) times the other half: not constant, stays
        up = (m.w1.weight, m.w1.bias) if fused else (m.w2.weight, m.w2.bias)
        for t in up:
            t[(10 if fused else 0) + 5 : (10 if fused else 0) + 8] = 0
        m.w3.weight[:, 9] = 0
    small = compacted(model, tokens(2), tokens(3))
    assert weight(small, "1.w3") == (16, 6)
    assert weight(small, "1.w1")[0] == (12 if fused else 6)


class Summed(nn.Module):
    """Attention by torch.einsum, as MaxViT writes it."""

    def __init__(self, c: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.proj = (nn.Linear(c, c) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (m(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for m in (self.q, self.k, self.v))
        scores = torch.einsum("b h i d, b h j d -> b h i j", q, k) * 0.5
        return self.proj(torch.einsum("bhij,bhjd->bihd", scores.softmax(-1), v).flatten(2))


def test_channels_are_followed_through_einsum() -> None:
    model = filled(nn.Sequential(nn.Linear(16, 16), Summed(16, 4), nn.Linear(16, 2)))
    a = model[1]
    with torch.no_grad():
        for m in (a.q, a.k):
            m.weight[::4] = m.bias[::4, None] = 0
        a.v.weight[4:8] = 0  # a head whose values are constant
    small = compacted(model, tokens(2), tokens(3))
    assert weight(small, "1.q") == weight(small, "1.k") == (9, 16) and weight(small, "1.v") == (12, 16)
    assert small.report.whole == {}


@pytest.mark.parametrize(
    "equation, shapes",
    [
        ("bhid,bhjd->bhij", ((2, 3, 4, 5), (2, 3, 6, 5))),
        ("bhij,bhjd->bihd", ((2, 3, 4, 5), (2, 3, 5, 6))),
        ("byhwc,hkc->byhwk", ((2, 3, 4, 5, 6), (4, 7, 6))),
        ("ij,jk->ki", ((2, 3), (3, 4))),
        ("bi,bi->b", ((2, 3), (2, 3))),
        ("bi,bj->bij", ((2, 3), (2, 4))),
        ("bii->b", ((2, 3, 3),)),
        ("bij,bkl->bik", ((2, 3, 4), (2, 5, 6))),
        ("b...d,bd->b...", ((2, 3, 4), (2, 4))),
    ],
)
def test_einsum_as_a_product(equation: str, shapes: tuple[tuple[int, ...], ...]) -> None:
    """The same values, whether it becomes a matrix product or stays."""

    g = torch.Generator().manual_seed(0)
    operands = [torch.randn(s, generator=g, dtype=torch.float64) for s in shapes]

    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum(equation, x, *operands[1:])

    wanted = torch.einsum(equation, *operands)
    found = trace(Fixed(), operands[0]).module(operands[0])
    assert found.shape == wanted.shape and (found - wanted).abs().max() < 1e-12


class Cosine(nn.Module):
    """Attention over normalised queries and keys, with a scale per head and a bias in parts, as Swin V2 has them."""

    def __init__(self, c: int, heads: int, joined: bool) -> None:
        super().__init__()
        self.heads, self.joined = heads, joined
        self.qkv, self.proj = nn.Linear(c, 3 * c, bias=not joined), nn.Linear(c, c)
        if joined:
            self.q_bias, self.v_bias = nn.Parameter(torch.ones(c)), nn.Parameter(torch.ones(c))
            self.register_buffer("k_bias", torch.zeros(c))
        self.scale = nn.Parameter(torch.ones(heads, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        c = x.shape[-1]
        if self.joined:
            bias = torch.cat((self.q_bias, self.k_bias, self.v_bias))
        else:
            bias = self.qkv.bias.clone()
            n = bias.numel() // 3
            bias[n : 2 * n].zero_()
        qkv = F.linear(x, self.qkv.weight, bias).reshape(x.size(0), x.size(1), 3, self.heads, c // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        scores = scores * torch.clamp(self.scale, max=2.0).exp()
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(x.size(0), x.size(1), c))


@pytest.mark.parametrize("joined", [True, False])
def test_normalised_queries_and_computed_biases(joined: bool) -> None:
    model = filled(nn.Sequential(nn.Linear(16, 16), Cosine(16, 4, joined), nn.Linear(16, 2)))
    a = model[1]
    if joined:
        a.k_bias.zero_()
    with torch.no_grad():
        biases = (a.q_bias, a.k_bias, a.v_bias) if joined else a.qkv.bias.chunk(3)
        for part in range(3):  # one channel of each head: zero, and so no part of a norm
            a.qkv.weight[16 * part : 16 * (part + 1) : 4] = 0
            biases[part][::4] = 0
        a.qkv.weight[36:40] = 0  # and the values of the second head, but for a bias
    small = compacted(model, tokens(2), tokens(3))
    assert weight(small, "1.qkv") == (27, 16) and weight(small, "1.proj") == (16, 9)
    assert small.report.whole == {}
    assert tuple(small.get_parameter("1.scale").shape) == (3, 1, 1)


def test_a_norm_over_a_constant_keeps_it() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.normalize(self.a(x), dim=-1))

    model = filled(Net())
    with torch.no_grad():
        model.a.weight[:4] = 0
        model.a.bias[:2] = 0
        model.b.weight[:, 6:] = 0  # not read, but part of the norm
    assert weight(compacted(model, tokens(2), tokens(3)), "a") == (6, 16)


def test_products_and_sums_in_one() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 8), nn.Linear(8, 2)
            self.alpha, self.beta = nn.Parameter(torch.ones(1, 1, 8)), nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            y = torch.addcmul(self.beta, self.alpha, self.a(x), value=0.5)
            return self.b(y.float().to(torch.float64).double().repeat_interleave(2, dim=1))

    model = filled(Net())
    with torch.no_grad():
        model.a.weight[:3] = 0
        model.b.weight[:, 6:] = 0
    x, other = tokens(2), tokens(3)
    small = sa.compact(model, x, columns="never", tolerance=1e-6)  # it computes in single precision by itself
    assert weight(small, "a") == (6, 16) and tuple(small.get_parameter("alpha").shape) == (1, 1, 6)
    with torch.no_grad():
        assert (small(other) - model(other)).abs().max() < 1e-5


@pytest.mark.parametrize("make", ["torchvision", "timm"])
def test_stochastic_depth_of_other_libraries_becomes_ours(make: str) -> None:
    """By what it does: the same with the same random numbers; what only has the name stays what it is."""

    class StochasticDepth(nn.Module):
        def __init__(self, p: float, mode: str) -> None:
            super().__init__()
            self.p, self.mode = p, mode

        def forward(self, x: Tensor) -> Tensor:
            if not self.training:
                return x
            size = [x.shape[0] if self.mode == "row" else 1] + [1] * (x.ndim - 1)
            return x * torch.empty(size, dtype=x.dtype).bernoulli_(1 - self.p).div_(1 - self.p)

    class DropPath(nn.Module):
        def __init__(self, drop_prob: float, scale_by_keep: bool) -> None:
            super().__init__()
            self.drop_prob, self.scale_by_keep = drop_prob, scale_by_keep

        def forward(self, x: Tensor) -> Tensor:
            if not self.training:
                return x
            kept = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(1 - self.drop_prob)
            return x * (kept / (1 - self.drop_prob) if self.scale_by_keep else kept)

    theirs = [StochasticDepth(0.3, "row"), StochasticDepth(0.3, "batch")]
    theirs = theirs if make == "torchvision" else [DropPath(0.4, True), DropPath(0.4, False)]

    class Doubles(nn.Module):
        drop_prob = 0.5

        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if self.training else x

    Doubles.__name__ = "DropPath"
    model = nn.Sequential(nn.Linear(3, 3), *theirs, Doubles()).train()
    traced = trace(model, torch.randn(2, 3)).module.train()
    assert [type(m) for m in list(traced.children())[1:]] == [sa.nn.DropPath] * 2 + [Doubles]
    x = torch.randn(8, 3)
    for training in (True, False):
        results = []
        for m in (model.train(training), traced.train(training)):
            torch.manual_seed(1)
            results.append(m(x))
        assert torch.equal(*results)


# Normalisation and embeddings


def test_layer_norm_keeps_its_channels_and_frees_the_rest() -> None:
    model = filled(nn.Sequential(nn.Linear(16, 12), nn.LayerNorm(12), nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 2)))
    with torch.no_grad():
        model[0].weight[:3] = 0
        model[2].weight[:5] = 0
    small = compacted(model, tokens(2), tokens(3))
    assert weight(small, "0") == (12, 16) and weight(small, "2") == (15, 12)
    assert any("normalises over all channels" in why for why in small.report.notes["0"])


@pytest.mark.parametrize("norm", [lambda: nn.GroupNorm(4, 12), lambda: nn.InstanceNorm2d(12, affine=True)])
def test_groups_of_a_norm_go_together(norm) -> None:
    model = filled(nn.Sequential(nn.Conv2d(3, 12, 3), norm(), nn.ReLU(), nn.Conv2d(12, 4, 3), nn.Flatten()))
    with torch.no_grad():
        model[0].weight[3:7] = 0
    small = compacted(model, maps(2), maps(3))
    assert small.get_submodule("0").out_channels == (9 if isinstance(model[1], nn.GroupNorm) else 8)


def test_an_embedding_loses_columns() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.position = nn.Embedding(11, 8), nn.Parameter(torch.randn(1, 5, 8))
            self.fc, self.out = nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(F.relu(self.fc(self.embed(x) + self.position)))

    model = filled(Net())
    with torch.no_grad():
        model.fc.weight[:, 2:5] = 0
    x = torch.randint(0, 11, (2, 5))
    small = sa.compact(model, x)
    assert torch.allclose(small(x), model(x), atol=1e-12)
    assert tuple(small.embed.weight.shape) == (11, 5) and tuple(small.position.shape) == (1, 5, 5)
    model.out = nn.Linear(8, 11, bias=False).double()
    model.out.weight = model.embed.weight
    tied = sa.compact(model, x)  # what the output reads of the channels is what the embedding writes to them
    assert torch.allclose(tied(x), model(x), atol=1e-12)
    assert tied.embed.weight is tied.out.weight and tuple(tied.embed.weight.shape) == (11, 8)
    with torch.no_grad():
        model.embed.weight[:, 2:4] = model.fc.weight[2:4] = model.fc.bias[2:4] = model.position[:, :, 2:4] = 0
    tied = sa.compact(model, x)
    assert torch.allclose(tied(x), model(x), atol=1e-12)
    assert tied.embed.weight is tied.out.weight and tuple(tied.embed.weight.shape) == (11, 6)


# Shapes


def test_transposed_convolutions() -> None:
    model = filled(
        nn.Sequential(
            nn.ConvTranspose2d(3, 8, 2, 2),
            nn.ReLU(),
            nn.ConvTranspose2d(8, 8, 3, 2, 1, 1, groups=2),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 4, 3),
            nn.Flatten(),
        )  # fmt: skip
    )
    with torch.no_grad():
        model[0].weight[:, [0, 5]] = 0
        model[0].bias[[0, 5]] = -1  # relu: 0
        model[2].weight[:, 2] = 0  # the third filter of each conv group
    small = compacted(model, maps(2, size=4), maps(3, size=4))
    assert weight(small, "0") == (3, 6, 2, 2) and weight(small, "2") == (6, 3, 3, 3)


def test_shuffles() -> None:
    model = filled(
        nn.Sequential(
            nn.Conv2d(3, 16, 3),
            nn.ChannelShuffle(4),
            nn.ReLU(),
            nn.Conv2d(16, 16, 1),
            nn.PixelShuffle(2),
            nn.Conv2d(4, 4, 3),
            nn.PixelUnshuffle(2),
            nn.Conv2d(16, 4, 1),
            nn.Flatten(),
        )  # fmt: skip
    )
    with torch.no_grad():
        for i in (0, 6, 9, 15):  # one in each group
            model[0].weight[i] = 0
            model[0].bias[i] = -1
        model[3].weight[4:8] = 0  # all that makes up one channel
        model[3].bias[4:8] = 0.5
        model[7].weight[:, 8:12] = 0
    small = compacted(model, maps(2, size=8), maps(3, size=8))
    assert small.get_submodule("0").out_channels == 12
    assert small.get_submodule("3").out_channels == 12
    assert small.get_submodule("5").out_channels == 3


def test_stacked_branches_keep_as_many_channels() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), nn.Conv2d(16, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.stack([F.relu(self.a(x)), F.relu(self.b(x))], 2).flatten(1, 2)).flatten(1)

    model = filled(Net())
    with torch.no_grad():
        model.a.weight[:3] = 0
        model.b.weight[2:4] = 0
    small = compacted(model, maps(2), maps(3))
    assert small.a.out_channels == small.b.out_channels and small.a.out_channels >= 6


def test_one_and_three_dimensions() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.n, self.b = nn.Conv1d(3, 8, 3, padding=1), nn.BatchNorm1d(8), nn.Conv1d(8, 4, 3)
            self.c, self.d = nn.Conv3d(1, 6, 3, padding=1), nn.Conv3d(6, 2, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.b(F.gelu(self.n(self.a(x.flatten(2)))))
            z = self.d(F.silu(self.c(x.unsqueeze(1))))
            return torch.cat([y.mean(2), z.mean((2, 3, 4))], 1)

    model = filled(Net())
    with torch.no_grad():
        model.b.weight[:, 1:3] = 0
        model.c.weight[0] = model.c.bias[0] = 0
    small = compacted(model, maps(2), maps(3))
    assert small.a.out_channels == 6 and small.c.out_channels == 5


def test_layer_scale_and_activations_that_are_not_zero_at_zero() -> None:
    model = filled(
        nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.Softplus(),
            Scale(8, 1, 1),
            nn.PReLU(8),
            nn.Conv2d(8, 4, 3),
            nn.Sigmoid(),
            nn.Flatten(),
            nn.Linear(64, 2),
        )  # fmt: skip
    )
    with torch.no_grad():
        model[0].weight[:2] = 0
        model[2].gamma[5] = 0
    small = compacted(model, maps(2), maps(3))
    assert small.get_submodule("0").out_channels == 5
    assert small.get_submodule("2").gamma.shape[0] == 5 and small.get_submodule("3").num_parameters == 5


# Tracing


class Branching(nn.Module):
    """Branches on shapes, iterates over a tensor, writes into a mask: too much for torch.fx alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        if h % 4:
            x = F.pad(x, (0, 0, 0, 4 - h % 4))
        if b > 0 and len(x.shape) > 3:
            x = self.a(x)
        mask = x.new_zeros(x.shape[2:])
        mask[1:, 1:] = 1
        y = F.relu(x) * mask
        return sum(t for t in self.b(y).flatten(2).unbind(1)) + (1 if x.dim() == 4 else 0)


def test_branches_on_shapes_are_followed() -> None:
    model = filled(Branching())
    with torch.no_grad():
        model.a.weight[:3] = 0
        model.a.bias[:3] = -1
    small = compacted(model, maps(2, size=6), maps(5, size=6))
    assert small.a.out_channels == 5
    assert any("computes with shapes" in remark for remark in small.report.remarks)


def test_items_are_assigned() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(self.b(F.relu(self.a(x))))
            y[:, :, 1:, 1:] = y[:, :, 1:, 1:] + y[:, :, :-1, :-1]
            return self.c(y).flatten(1)

    model = filled(Net())
    with torch.no_grad():
        model.a.weight[:3] = model.b.weight[:2] = 0
    small = compacted(model, maps(2), maps(3))
    assert weight(small, "a")[0] == 5 and weight(small, "b")[0] == 8
    assert "assigned" in str(small.report.whole)


def test_what_no_tracer_follows_is_named() -> None:
    class Values(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * int(x.sum())

    with pytest.raises(TraceError, match=r"1 \(Values\) got .*test_operators.py:\d+ `return x \* int\(x.sum\(\)\)`"):
        trace(nn.Sequential(nn.Linear(3, 3), Values()), torch.randn(2, 3))


def test_normalisation_with_an_activation_inside_trains() -> None:
    """A subclass that torch.fx goes into, as timm has them: it becomes a module again, and keeps its names."""

    class NormAct(nn.BatchNorm2d):
        def __init__(self, n: int) -> None:
            super().__init__(n)
            self.act = nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            if self.training and self.track_running_stats:
                self.num_batches_tracked.add_(1)
            training = self.training or self.running_mean is None
            return self.act(F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, training))

    model = filled(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), NormAct(8), nn.Conv2d(8, 4, 1), nn.Flatten()))
    with torch.no_grad():
        model[0].weight[:3] = 0
    small = compacted(model, maps(2), maps(3))
    assert small.get_submodule("0").out_channels == 5 and type(small.get_submodule("1")) is nn.BatchNorm2d
    assert "1.running_mean" in small.state_dict() and small.report.remarks == []
    before = small.get_submodule("1").running_mean.clone()
    small.train()(maps(4))
    assert not torch.equal(before, small.get_submodule("1").running_mean)


def test_layers_that_hand_on_in_evaluation_stay_layers() -> None:
    class DropPath(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if not self.training:
                return x
            return x * torch.empty(x.shape[0], 1, 1, 1, dtype=x.dtype).bernoulli_(0.5)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.path = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), DropPath()

        def forward(self, x: Tensor) -> Tensor:
            return (x + self.path(self.b(F.relu(self.a(x))))).flatten(1)

    traced = trace(Net(), torch.randn(2, 3, 4, 4))
    assert any(n.target == "path" for n in traced.module.graph.nodes) and traced.notes == []


@pytest.mark.parametrize("kind", ["B", "grouped", "mobile", "se"])
def test_widths_are_rounded_up(kind: str) -> None:
    model = randomise(ResNet(kind, width=16).double(), 0.4, 2).eval()
    x, other = maps(2, size=12), maps(3, size=12)
    plain = sa.compact(model, x, columns="never")
    small = sa.compact(model, x, columns="never", round_to=4)
    with torch.no_grad():
        assert (small(other) - model(other)).abs().max() < 1e-10
    full = dict(model.named_modules())
    widths = {n: m.out_channels for n, m in small.named_modules() if isinstance(m, nn.Conv2d)}
    assert all(w % 4 == 0 or w == full[n].out_channels for n, w in widths.items())
    assert plain.report.weights_after <= small.report.weights_after < small.report.weights_before
    with pytest.raises(CompactError, match="round_to got 0, wanted an integer of at least 1"):
        sa.compact(model, x, round_to=0)


def test_shapes_taken_from_another_tensor() -> None:
    """As LeViT normalises its tokens."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.n, self.b = nn.Linear(16, 12), nn.BatchNorm1d(12), nn.Linear(12, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.b(F.relu(self.n(x.flatten(0, 1)).reshape_as(x)))

    model = filled(Net())
    with torch.no_grad():
        model.a.weight[:4] = 0
        model.b.weight[:, 9:] = 0  # what lends its shape alone is not needed for it
    small = compacted(model, tokens(2), tokens(3))
    assert weight(small, "a") == (5, 16) and small.n.num_features == 5


def test_tensors_made_of_numbers_do_not_count_channels() -> None:
    """Positions on the device of a parameter, as XCiT makes them."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.at, self.b = nn.Linear(16, 8), nn.Linear(1, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            places = torch.arange(5, device=self.a.weight.device, dtype=self.a.weight.dtype)
            return self.b(self.a(x) + self.at(places.unsqueeze(1)))

    model = filled(Net())
    with torch.no_grad():
        model.b.weight[:, 5:] = 0
    small = compacted(model, tokens(2), tokens(3))
    assert weight(small, "a") == (5, 16) and weight(small, "at") == (5, 1)


class Decoder(nn.Module):
    """Blocks of a Llama-like decoder: RMSNorm, grouped queries, SwiGLU."""

    def __init__(self, c: int, hidden: int, heads: int, kv: int, depth: int, words: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, c)
        self.blocks = nn.ModuleList(
            nn.ModuleList([nn.RMSNorm(c), Attention(c, heads, "grouped", kv), nn.RMSNorm(c), Gated(c, hidden, False)])
            for _ in range(depth)
        )
        self.norm, self.head = nn.RMSNorm(c), nn.Linear(c, words, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for n1, attention, n2, feed in self.blocks:
            x = x + attention(n1(x))
            x = x + feed(n2(x))
        return self.head(self.norm(x))


def test_a_decoder_shrinks_inside_its_stream() -> None:
    model = filled(Decoder(16, 20, 4, 2, 2, 31))
    with torch.no_grad():
        for *_, feed in model.blocks:
            feed.w3.weight[:, :7] = 0
        model.blocks[0][1].proj.weight[:, :8] = 0  # the two heads of one pair of keys and values
    x = torch.randint(0, 31, (2, 6))
    small = sa.compact(model, x, columns="never")
    y = torch.randint(0, 31, (3, 6))
    with torch.no_grad():
        assert (model(y) - small(y)).abs().max() < 1e-10
    assert weight(small, "blocks.0.3.w1") == (13, 16) and weight(small, "blocks.0.1.q") == (8, 16)
    assert weight(small, "blocks.0.1.k") == (4, 16)


def test_the_graph_of_a_large_decoder_takes_no_values() -> None:
    """Seven billion parameters on the meta device: tracing and analysis alone."""
    with torch.device("meta"):
        model = Decoder(4096, 11008, 32, 32, 32, 32000)
        x = torch.zeros(1, 16, dtype=torch.long)
    assert sum(p.numel() for p in model.parameters()) > 6e9
    analysis = Analysis(trace(model, x))
    assert settle(analysis).conflicts == [] and not analysis.removed.any()
    assert analysis.whole == {}


def test_endless_networks_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unrolled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(1000):
                x = x + 1
            return x

    monkeypatch.setattr(symbolic, "MAX_NODES", 100)
    with pytest.raises(TraceError, match=r"1 \(Unrolled\) got RuntimeError at .*`x = x \+ 1`: more than 100 op"):
        trace(nn.Sequential(nn.Linear(3, 3), Unrolled()), torch.randn(2, 3))


# Operators written by hand, and functions of torch


class Exported(nn.Module):
    """A network that only torch.export follows."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.net = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError("no tensor")
        return self.net(x)


class Apply(nn.Module):
    """A function as a layer."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)

    def __deepcopy__(self, memo: object) -> Apply:
        return Apply(self.function)


def shrunk(via: str, x: Tensor, other: Tensor, layers: list[nn.Module]) -> tuple[nn.Module, list[tuple[int, ...]]]:
    """The compacted network of these layers as a front end sees it, and the first two sizes of their weights."""
    model = nn.Sequential(*layers) if via == "fx" else Exported(*layers)
    small = compacted(model, x, other)
    assert via == "fx" or any("computes with shapes" in remark for remark in small.report.remarks)
    assert "not understood" not in str(small.report.whole)
    return small, [r.shape_after[:2] if r.shape_after else () for r in small.report.layers]


VIAS = pytest.mark.parametrize("via", ["fx", "export"])


class SharedHeads(nn.Module):
    """Grouped queries as networks write them, with or without a rotary embedding."""

    def __init__(self, c: int, heads: int, kv: int, how: str, rotary: bool = False, tokens: int = 5) -> None:
        super().__init__()
        self.heads, self.kv, self.d, self.how, self.rotary = heads, kv, c // heads, how, rotary
        self.q, self.k, self.v, self.proj = (nn.Linear(c, n * self.d) for n in (heads, kv, kv, heads))
        angle = torch.outer(torch.arange(tokens), 0.1 ** torch.arange(0, self.d, 2)).repeat(1, 2)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def turned(self, x: Tensor) -> Tensor:
        if not self.rotary:
            return x
        a, b = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
        return x * self.cos.unsqueeze(0) + torch.cat((-b, a), dim=-1) * self.sin.unsqueeze(0)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        times = self.heads // self.kv
        q = self.turned(self.q(x).view(b, n, self.heads, self.d).transpose(1, 2))
        k, v = (m(x).view(b, n, self.kv, self.d).transpose(1, 2) for m in (self.k, self.v))
        k = self.turned(k)
        if self.how == "gqa":
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        elif self.how == "broadcast":
            q = q.reshape(b, self.kv, times, n, self.d)
            y = (q @ k.unsqueeze(2).transpose(-1, -2) * self.d**-0.5).softmax(-1) @ v.unsqueeze(2)
            y = y.reshape(b, self.heads, n, self.d)
        elif self.how == "masked":
            k, v = torch.repeat_interleave(k, times, 1), torch.repeat_interleave(v, times, dim=1)
            mask = torch.ones(n, n, dtype=torch.bool, device=x.device).triu(1)
            y = (q @ k.transpose(-1, -2) * self.d**-0.5).masked_fill(mask, float("-inf")).softmax(-1) @ v
        elif self.how == "repeat":  # heads in another order
            k, v = k.repeat(1, times, 1, 1), torch.tile(v, (1, times, 1, 1))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            k, v = (t.repeat_interleave(times, dim=1) for t in (k, v))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(y.transpose(1, 2).reshape(b, n, c))


@VIAS
@pytest.mark.parametrize("kv", [1, 2])
@pytest.mark.parametrize("how", ["gqa", "interleave", "broadcast", "masked", "repeat"])
def test_heads_that_share_keys_go_together(how: str, kv: int, via: str) -> None:
    a = SharedHeads(16, 4, kv, how)
    layers = [filled(m) for m in (nn.Linear(16, 16), a, nn.Linear(16, 2))]
    with torch.no_grad():
        for t in (a.k.weight, a.k.bias):
            t[1::4] = 0  # a channel of every head of keys, with those of the queries
        a.v.weight[2] = 0  # a constant value
        if kv > 1:
            a.v.weight[:4] = 0
    small, sizes = shrunk(via, tokens(2), tokens(3), layers)
    values = [(4, 16), (16, 8)] if kv > 1 else [(3, 16), (16, 12)]
    assert sizes[1:5] == [(6 if kv > 1 else 12, 16), (3, 16), *values]
    assert small.report.whole == {}


@VIAS
def test_a_head_stays_for_a_query_that_shares_its_keys(via: str) -> None:
    a = SharedHeads(16, 4, 2, "gqa")
    layers = [filled(m) for m in (nn.Linear(16, 16), a, nn.Linear(16, 2))]
    with torch.no_grad():
        a.proj.weight[:, 4:8] = 0  # one of the two heads of the first pair, and the last pair
        a.proj.weight[:, 8:] = 0
    _, sizes = shrunk(via, tokens(2), tokens(3), layers)
    assert sizes[1:5] == [(8, 16), (4, 16), (4, 16), (16, 8)]


class RMS(nn.Module):
    """Llama's norm."""

    def __init__(self, c: int, cast: str) -> None:
        super().__init__()
        self.weight, self.cast = nn.Parameter(torch.ones(c)), cast

    def forward(self, x: Tensor) -> Tensor:
        y = x.to(torch.float64) if self.cast == "to" else x.double() if self.cast == "type_as" else x
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * (y.to(x.dtype) if self.cast == "to" else y.type_as(x) if self.cast == "type_as" else y)


class Llama(nn.Module):
    def __init__(self, how: str, cast: str) -> None:
        super().__init__()
        self.n1, self.n2 = RMS(16, cast), RMS(16, cast)
        self.attention, self.feed = SharedHeads(16, 4, 2, how, rotary=True), Gated(16, 20, False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.n1(x))
        return x + self.feed(self.n2(x))


@VIAS
@pytest.mark.parametrize("how, cast", [("gqa", ""), ("interleave", "type_as"), ("masked", "to"), ("broadcast", "")])
def test_blocks_of_llama(how: str, cast: str, via: str) -> None:
    """Heads go through a rotary embedding, and pairs of channels where its tables are constants of torch.fx; tables
    that queries and keys share stay, with the channels. The norms keep the stream."""
    block = Llama(how, cast)
    layers = [filled(m) for m in (nn.Linear(16, 16), block, nn.Linear(16, 2))]
    with torch.no_grad():
        block.attention.v.weight[:4] = 0
        block.attention.v.weight[5] = 0
        for m in (block.attention.q, block.attention.k):
            m.weight[5::2] = m.bias[5::2, None] = 0
        block.feed.w2.weight[:7] = block.feed.w2.bias[:7, None] = 0
        layers[0].weight[:3] = 0
    small, sizes = shrunk(via, tokens(2), tokens(3), layers)
    pair = 1 if via == "export" else 2
    assert sizes[:5] == [(16, 16), (8 // pair, 16), (4 // pair, 16), (3, 16), (16, 6)]
    assert sizes[5:] == [(13, 16), (13, 16), (16, 13), (2, 16)]
    assert small.report.whole == {}
    notes = {name.removeprefix("net."): note for name, note in small.report.notes.items()}
    assert any("averages over all channels" in why for why in notes["0"])
    assert via == "fx" or any("with unsqueeze" in why for why in notes["1.attention.k"])


class FirstNorm(nn.Module):
    """ConvNeXt's norm over the first dimension of maps, by mean or by variance."""

    def __init__(self, c: int, how: str) -> None:
        super().__init__()
        self.weight, self.bias, self.how = nn.Parameter(torch.ones(c)), nn.Parameter(torch.zeros(c)), how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "mean":
            u = x.mean(1, keepdim=True)
            s = (x - u).pow(2).mean(1, keepdim=True)
            x = (x - u) / torch.sqrt(s + 1e-6)
            return self.weight[:, None, None] * x + self.bias[:, None, None]
        if self.how == "var":
            x = (x - x.mean(1, keepdim=True)) / torch.sqrt(x.var(1, unbiased=False, keepdim=True) + 1e-6)
        elif self.how == "std":
            x = (x - x.mean(dim=1).unsqueeze(1)) / (x.std(dim=1, keepdim=True) + 1e-6)
        else:
            x = F.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias).permute(0, 3, 1, 2)
        return x


@VIAS
@pytest.mark.parametrize("how", ["mean", "var", "std", "function"])
def test_norms_by_hand_keep_their_channels_and_free_the_rest(how: str, via: str) -> None:
    layers = [nn.Conv2d(3, 8, 3), FirstNorm(8, how), nn.Conv2d(8, 10, 1), nn.GELU(), nn.Conv2d(10, 4, 1), nn.Flatten()]
    layers = [filled(m) for m in layers]
    with torch.no_grad():
        layers[0].weight[:3] = 0
        layers[2].weight[:4] = 0
        layers[4].weight[:, 9] = 0
    small, sizes = shrunk(via, maps(2), maps(3), layers)
    assert sizes == [(8, 3), (5, 8), (4, 5)]
    assert small.report.whole == {}
    reasons = " ".join(next(iter(small.report.notes.values())))
    assert ("normalises over all channels" if how == "function" else "averages over all channels") in reasons


class SpatialGate(nn.Module):
    """CBAM's: a map of weights from what all channels have in common."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.conv, self.how = nn.Conv2d(2, 1, 3, padding=1), how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "max":
            most = torch.max(x, dim=1, keepdim=True)[0]
        elif self.how == "values":
            most = x.max(1).values.unsqueeze(1)
        else:
            most = x.amax(1, keepdim=True)
        return x * torch.sigmoid(self.conv(torch.cat([most, x.sum(1, keepdim=True)], 1)))


@VIAS
@pytest.mark.parametrize("how", ["max", "values", "amax"])
def test_weights_from_all_channels(how: str, via: str) -> None:
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), SpatialGate(how), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 4, 1), nn.Flatten()]
    layers = [filled(m) for m in layers]
    with torch.no_grad():
        layers[0].weight[:2] = 0
        layers[3].weight[:2] = 0
    small, sizes = shrunk(via, maps(2), maps(3), layers)
    assert sizes == [(8, 3), (1, 2), (4, 8), (4, 4)]
    assert any("compares all channels" in why for why in next(iter(small.report.notes.values())))


@VIAS
@pytest.mark.parametrize("function", [lambda x: x.sum(1, True), lambda x: x.norm(dim=1, keepdim=True)])
def test_a_sum_over_channels_loses_those_that_are_zero(function, via: str) -> None:
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), Apply(lambda x: x * torch.sigmoid(function(x))), nn.Conv2d(8, 4, 1)]
    layers = [filled(m) for m in (*layers, nn.Flatten())]
    with torch.no_grad():
        layers[0].weight[:4] = 0
        layers[0].bias[:3], layers[0].bias[3] = -1, 1
    small, sizes = shrunk(via, maps(2), maps(3), layers)
    assert sizes == [(5, 3), (4, 5)]


def halves(x: Tensor) -> Tensor:
    a, b = torch.chunk(x, 2, dim=1)
    return torch.where(b > 0, a, 0.5 * a)


def strided(x: Tensor) -> Tensor:
    return x[:, ::2] + x[:, 1::2]


def noted(small: nn.Module) -> str:
    return str(small.report.notes)


# The function, how many channels it leaves of 8, and how many filters are left in front and behind of it. In front
# filters 0, 1, 4 and 5 have no weights and the biases 0, 1, -1 and 0; behind, channel 2 is not read.
FUNCTIONS = {
    "strided": (strided, 4, (4, 2)),
    "glu": (lambda x: F.glu(x, 1), 4, (2, 1)),
    "halves": (halves, 4, (4, 2)),
    "where": (lambda x: torch.where(x > 0.1, x, 0.2 * x), 8, (3, 3)),
    "where with a number": (lambda x: torch.where(x.mean((2, 3), keepdim=True) > 0, x, 0.0), 8, (3, 3)),
    "where of maps": (lambda x: x.where(x.amax((1,), keepdim=True) > 0, -x), 8, (8, 8)),
    "masked_fill": (lambda x: x.masked_fill(x < 0, 0.0), 8, (3, 3)),
    "reflect": (lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"), 8, (3, 3)),
    "replicate": (lambda x: F.pad(x, (1, 1, 1, 1), mode="replicate"), 8, (3, 3)),
    "circular": (lambda x: F.pad(x, (1, 1, 1, 1), mode="circular"), 8, (3, 3)),
    "softmax over channels": (lambda x: torch.softmax(x, dim=1), 8, (8, 8)),
    "narrow": (lambda x: x.narrow(1, 1, 6), 6, (2, 2)),
}


@VIAS
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_maps(name: str, via: str) -> None:
    function, channels, wanted = FUNCTIONS[name]
    layers = [nn.Conv2d(3, 8, 3), Apply(function), nn.Conv2d(channels, 4, 1), nn.Flatten()]
    layers = [filled(m) for m in layers]
    with torch.no_grad():
        layers[0].weight[[0, 1, 4, 5]] = 0
        layers[0].bias[[0, 1, 4, 5]] = torch.tensor([0.0, 1.0, -1.0, 0.0], dtype=torch.float64)
        layers[2].weight[:, 2] = 0
    small, sizes = shrunk(via, maps(2), maps(3), layers)
    assert (sizes[0][0], sizes[1][1]) == wanted, noted(small)
    assert small.report.whole == {}


MODULES = {
    "glu": (nn.GLU(1), 4, (2, 1)),
    "reflect": (nn.ReflectionPad2d(1), 8, (3, 3)),
    "replicate": (nn.ReplicationPad2d((1, 0, 1, 0)), 8, (3, 3)),
    "circular": (nn.CircularPad2d(1), 8, (3, 3)),
    "instance norm": (nn.InstanceNorm2d(8, affine=True, track_running_stats=True), 8, (3, 3)),
    "softmax": (nn.Softmax2d(), 8, (8, 8)),
}


@VIAS
@pytest.mark.parametrize("name", MODULES)
def test_layers_of_maps(name: str, via: str) -> None:
    layer, channels, wanted = MODULES[name]
    layers = [nn.Conv2d(3, 8, 3), copy.deepcopy(layer), nn.Conv2d(channels, 4, 1), nn.Flatten()]
    layers = [filled(m) for m in layers]
    with torch.no_grad():
        layers[0].weight[[0, 1, 4, 5]] = 0
        layers[0].bias[[0, 1, 4, 5]] = torch.tensor([0.0, 1.0, -1.0, 0.0], dtype=torch.float64)
        layers[2].weight[:, 2] = 0
    small, sizes = shrunk(via, maps(2), maps(3), layers)
    assert (sizes[0][0], sizes[1][1]) == wanted, noted(small)
    assert small.report.whole == {}


@VIAS
def test_every_other_of_what_is_left(via: str) -> None:
    """Channels 0, 2 and 6 of what were 8 are now at 0, 1 and 3."""
    both = Apply(lambda x: torch.cat([x[:, ::2], x[:, 1:]], 1))
    layers = [filled(m) for m in (nn.Conv2d(3, 8, 3), both, nn.Conv2d(11, 4, 1), nn.Flatten())]
    with torch.no_grad():
        layers[0].weight[[1, 4, 5]] = 0
    small, sizes = shrunk(via, maps(2), maps(3), layers)
    assert sizes == [(5, 3), (4, 3 + 4)] and small.report.whole == {}


@VIAS
def test_a_slice_as_long_as_another_tensor(via: str) -> None:
    """Both had 8 channels, now one has 5 and the other 6."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (
                nn.Conv2d(3, 8, 3),
                nn.Conv2d(3, 8, 3),
                nn.Conv2d(8, 4, 1),
                nn.Conv2d(8, 4, 1),
            )

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.a(x), self.b(x)
            return (self.c(a[:, : b.shape[1]]) + self.d(b)).flatten(1)

    model = filled(Net())
    with torch.no_grad():
        model.a.weight[:2] = 0
        model.b.weight[:3] = 0
    _, sizes = shrunk(via, maps(2), maps(3), [model])
    assert sizes == [(6, 3), (5, 3), (4, 6), (4, 5)]


def test_a_comparison_that_rounding_decides_is_not_constant() -> None:
    """One that is clear is."""
    layers = [nn.Conv2d(3, 8, 3), Apply(lambda x: torch.where(x > 0.3, x, 2 * x)), nn.Conv2d(8, 4, 1), nn.Flatten()]
    layers = [filled(m) for m in layers]
    with torch.no_grad():
        layers[0].weight[:2] = 0
        layers[0].bias[:2] = torch.tensor([0.3, 0.4], dtype=torch.float64)
    small = compacted(nn.Sequential(*layers), maps(2), maps(3))
    assert weight(small, "0")[0] == 7


class OwnNorm(nn.Module):
    """A norm of the user's around a function of torch."""

    def __init__(self, how: str, c: int) -> None:
        super().__init__()
        self.weight, self.bias, self.how = nn.Parameter(torch.ones(c)), nn.Parameter(torch.zeros(c)), how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "groups":
            return F.group_norm(x, 4, self.weight, self.bias, 1e-5)
        return F.rms_norm(x.movedim(1, -1), self.weight.shape, self.weight).movedim(-1, 1) + self.bias[:, None, None]


class OwnInstanceNorm(nn.InstanceNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.instance_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.1, self.eps)


@VIAS
@pytest.mark.parametrize("how, left", [("groups", 6), ("rms", 8), ("instance", 5)])
def test_norms_of_the_users_around_functions(how: str, left: int, via: str) -> None:
    norm = OwnInstanceNorm(8, affine=True, track_running_stats=True) if how == "instance" else OwnNorm(how, 8)
    layers = [filled(m) for m in (nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Flatten())]
    with torch.no_grad():
        layers[0].weight[:3] = 0
        layers[0].bias[:3] = 0
    small, sizes = shrunk(via, maps(2), maps(3), layers)
    assert sizes == [(left, 3), (4, left)] and small.report.whole == {}


# Reasons


@pytest.mark.parametrize(
    "between, why",
    [
        (nn.ZeroPad2d(1), "pads with 0, so sees the edge of its constant"),
        (nn.AvgPool2d(3, 1, 1), "pads with zeros, so sees the edge of its constant"),
        (nn.Conv2d(8, 8, 3, padding=1, groups=8), "pads with zeros, so sees the edge of its constant"),
        (nn.ConvTranspose2d(8, 8, 3, groups=8), "adds up other taps from place to place"),
        (nn.ConvTranspose2d(8, 8, 3), "adds up other taps from place to place"),
    ],
    ids=["pad", "pool", "depthwise", "depthwise transposed", "transposed"],
)
def test_what_sees_the_edge_of_a_constant_is_named(between: nn.Module, why: str) -> None:
    layers = [filled(m) for m in (nn.Conv2d(3, 8, 3), copy.deepcopy(between), nn.Conv2d(8, 4, 3), nn.Flatten())]
    with torch.no_grad():
        layers[0].weight[3] = 0
    small = compacted(nn.Sequential(*layers), maps(2), maps(3))
    assert [why in reason for reason in small.report.notes["0"]] == [True], small.report.notes


def test_tokens_joined_with_what_is_not_tracked_are_listed() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.cat([self.a(x), x.cumsum(1)], 1))

    small = compacted(filled(Net()), tokens(2), tokens(3))
    assert small.report.whole["cat (cat)"] == "joins its operands with a tensor that is not tracked"


@pytest.mark.parametrize("name", [*FUNCTIONS, "gqa"])
def test_what_new_operators_leave_is_saved_or_named(name: str, tmp_path: Path) -> None:
    if name == "gqa":
        layers, x = [nn.Linear(16, 16), SharedHeads(16, 4, 2, "gqa", rotary=True), nn.Linear(16, 2)], tokens(2)
    else:
        function, channels, _ = FUNCTIONS[name]
        layers, x = [nn.Conv2d(3, 8, 3), Apply(function), nn.Conv2d(channels, 4, 1)], maps(2)
    small = sa.compact(filled(nn.Sequential(*layers)), x, columns="never")
    compares = name in ("halves", "masked_fill") or name.startswith("where")
    with pytest.raises(ArtefactError, match="function got _operator.[gl]t") if compares else nullcontext():
        sa.save(small, tmp_path / "net.safetensors", example=x)
        with torch.no_grad():
            assert torch.equal(sa.load(tmp_path / "net.safetensors").eval()(x), small(x))
