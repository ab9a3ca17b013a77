"""Random networks made of every operation that the tracker knows and some that it does not, and random zeros for them.

`check` compares the masked network of a seed with the compacted one. The test suite runs a few seeds,
bench/random_graphs.py thousands.
"""

from __future__ import annotations

import math
import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTS: list[Any] = [nn.ReLU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Hardswish, nn.Tanh, nn.Softplus, nn.PReLU]


def pick(r: random.Random, words: str) -> str:
    return r.choice(words.split())


class Attention(nn.Module):
    """Self-attention as timm writes it (fused), or with separate projections and a softmax in sight."""

    def __init__(self, c: int, heads: int, how: str, kv_heads: int | None = None) -> None:
        super().__init__()
        self.heads, self.how = heads, how
        self.kv = kv_heads or heads
        self.d = c // heads
        if how == "fused":
            self.qkv = nn.Linear(c, 3 * c)
        else:
            self.q = nn.Linear(c, c)
            self.k, self.v = (nn.Linear(c, self.kv * self.d, bias=how != "plain") for _ in range(2))
        self.proj = nn.Linear(c, c)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        if self.how == "fused":
            qkv = self.qkv(x).reshape(b, n, 3, self.heads, self.d).permute(2, 0, 3, 1, 4)
            q, k, v = qkv.unbind(0)
            y = F.scaled_dot_product_attention(q, k, v)
        elif self.how == "gqa":
            q = self.q(x).view(b, n, self.heads, self.d).transpose(1, 2)
            k, v = (m(x).view(b, n, self.kv, self.d).transpose(1, 2) for m in (self.k, self.v))
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        elif self.how == "interleaved":
            q = self.q(x).view(b, n, self.heads, self.d).transpose(1, 2)
            k, v = (m(x).view(b, n, self.kv, self.d).transpose(1, 2) for m in (self.k, self.v))
            k, v = (t.repeat_interleave(self.heads // self.kv, dim=1) for t in (k, v))
            y = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        elif self.how == "plain":
            q = self.q(x).view(b, n, self.heads, self.d).transpose(1, 2) * self.d**-0.5
            k, v = (m(x).view(b, n, self.heads, self.d).transpose(1, 2) for m in (self.k, self.v))
            y = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        else:  # grouped queries
            q = self.q(x).view(b, n, self.heads, self.d).transpose(1, 2)
            k, v = (m(x).view(b, n, self.kv, self.d).transpose(1, 2) for m in (self.k, self.v))
            times = self.heads // self.kv
            k, v = (
                t[:, :, None].expand(b, self.kv, times, n, self.d).reshape(b, self.heads, n, self.d) for t in (k, v)
            )
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(y.transpose(1, 2).reshape(b, n, c))


class Gated(nn.Module):
    def __init__(self, c: int, hidden: int, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.w1 = nn.Linear(c, 2 * hidden if fused else hidden)
        self.w2 = nn.Identity() if fused else nn.Linear(c, hidden)
        self.w3 = nn.Linear(hidden, c)

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            gate, up = self.w1(x).chunk(2, -1)
        else:
            gate, up = self.w1(x), self.w2(x)
        return self.w3(F.silu(gate) * up)


class Scale(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Normed(nn.Module):
    """A norm over channels in dimension 1, or -1 without a map, written by hand."""

    def __init__(self, c: int, nd: int, how: str) -> None:
        super().__init__()
        self.dim, self.how = 1 if nd else -1, how
        self.gamma = nn.Parameter(torch.randn(c, *[1] * nd))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "rms":
            y = x * torch.rsqrt(x.pow(2).mean(self.dim, keepdim=True) + 1e-3)
        elif self.how == "mean":
            u = x.mean(self.dim, keepdim=True)
            y = (x - u) / torch.sqrt((x - u).pow(2).mean(self.dim, keepdim=True) + 1e-3)
        elif self.how == "var":
            y = (x - x.mean(self.dim, True)) / torch.sqrt(x.var(self.dim, unbiased=False, keepdim=True) + 1e-3)
        elif self.how == "norm":
            y = x / (x.norm(dim=self.dim, keepdim=True) + 1)
        else:
            y = x.softmax(self.dim) * 5
        return y * self.gamma


class Prefix(nn.Module):
    """A class token in front, a position embedding on top."""

    def __init__(self, n: int, c: int) -> None:
        super().__init__()
        self.token, self.position = nn.Parameter(torch.randn(1, 1, c)), nn.Parameter(torch.randn(1, n + 1, c))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position


class Recurrent(nn.Module):
    """The output of a recurrent layer, or `state`: what it ends with, added to every token; stepwise where its state is
    `given`."""

    def __init__(self, c: int, hidden: int, kind: Any, state: bool = False, given: bool = False, **kwargs: Any) -> None:
        super().__init__()
        self.rnn = kind(c, hidden, **kwargs)
        self.state, self.given = state, given

    def forward(self, x: Tensor) -> Tensor:
        first = self.rnn.batch_first
        y = x if first else x.transpose(0, 1)
        out, last = self.rnn(y)
        if self.given:
            out, last = self.rnn(out, last)
        if self.state:
            h = last[0] if isinstance(self.rnn, nn.LSTM) else last
            return x + h[-1].unsqueeze(1)
        return out if first else out.transpose(0, 1)


class Branch(nn.Module):
    """Parts of the channels go different ways: a split by sizes or into equal parts, one of them through a layer."""

    def __init__(self, c: int, cut: int, how: str, layer: nn.Module) -> None:
        super().__init__()
        self.c, self.cut, self.how, self.inner = c, cut, how, layer

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "sizes":
            a, b = torch.split(x, [self.cut, self.c - self.cut], dim=1)
            return torch.cat([self.inner(a), b], 1)
        if self.how == "method":
            first, *rest = x.split(self.cut, 1)
            return torch.cat([*rest, self.inner(first)], dim=1)
        a, b = x.split_with_sizes((self.cut, self.c - self.cut), 1)  # the rest is not used
        return self.inner(a)


class Reshaped(nn.Module):
    """Maps [B, C, H, W] to and from other shapes, as networks write it."""

    def __init__(self, how: str, groups: int = 2) -> None:
        super().__init__()
        self.how, self.groups = how, groups

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        g = self.groups
        if self.how == "maxout":
            return x.view(b, g, c // g, h, w).amax(1)
        if self.how == "inner":  # the mean of neighbouring channels
            return x.reshape(b, c // g, g, h, w).mean(dim=2)
        if self.how == "depth":  # space to depth by hand
            y = x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4)
            return y.reshape(b, c * 4, h // 2, w // 2)
        if self.how == "select":  # weights of the groups among themselves
            y = x.view(b, g, -1, h, w)
            return (y * torch.softmax(y.mean((3, 4), keepdim=True), dim=1)).sum(1)
        if self.how == "lines":
            return x.permute(0, 2, 3, 1).reshape(b, h * w, c).permute(0, 2, 1).unflatten(2, (h, w))
        if self.how == "extra":
            return x.unsqueeze(2).expand(-1, -1, 2, -1, -1).sum(2).squeeze(-1)
        if self.how == "windows":  # and back
            y = x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1).contiguous().view(-1, 4, c)
            y = y * torch.softmax(y.mean(-1, keepdim=True), 1)
            return y.view(b, h // 2, w // 2, 2, 2, c).permute(0, 5, 1, 3, 2, 4).reshape(b, c, h, w)
        return x.reshape(b, c, -1).contiguous().view(b, c, h, w)


class Tokens(nn.Module):
    """Embeddings of words and places."""

    def __init__(self, words: int, n: int, c: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, c), nn.Embedding(n, c)
        self.register_buffer("at", torch.arange(n))

    def forward(self, x: Tensor) -> Tensor:
        return self.words(x) + self.places(self.at)


class Rows(nn.Module):
    """A linear layer on [B * N, C]."""

    def __init__(self, c: int, out: int) -> None:
        super().__init__()
        self.c, self.fc = c, nn.Linear(c, out)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.size()
        return self.fc(x.reshape(-1, self.c)).view(b, n, -1)


class Levels(nn.Module):
    """One module at several places, each with a scale of its own: on levels of a pyramid, or beside each other."""

    def __init__(self, inner: nn.Module, how: str, act: nn.Module) -> None:
        super().__init__()
        self.inner, self.how, self.act = inner, how, act

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "pyramid":
            low = F.max_pool2d(x, 2)
            return self.act(self.inner(x)) + F.interpolate(self.act(self.inner(low)), scale_factor=2)
        y, z = self.act(self.inner(x)), self.act(self.inner(torch.sigmoid(x)))
        return y * z if self.how == "product" else torch.cat([y, z], 1)


def tie(r: random.Random, a: Any, b: Any) -> None:
    """Some of the parameters of b are a's."""
    names = [n for n in ("weight", "bias") if getattr(a, n, None) is not None and getattr(b, n, None) is not None]
    for name in r.choice([names, names[:1], names[1:]]):
        setattr(b, name, getattr(a, name))


# Seeds from here on have more layers whose weights are used at several places; those before are as they were.
TIES = 100_000
WORDS = 11
CONVS: Any = (None, nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED: Any = (None, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS: Any = (None, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
INSTANCES: Any = (None, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
MAX_POOLS: Any = (None, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
AVG_POOLS: Any = (None, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)


class RandomNet(nn.Module):
    """A program of random steps on maps [B, C, ...] of one to three dimensions and tokens [B, N, C].

    sample: shape of an input without its batch; words: inputs are numbers of words.
    """

    def __init__(self, seed: int, steps: int = 9) -> None:
        super().__init__()
        self.rng = r = random.Random(seed)
        self.ties = seed >= TIES
        # Layers that may be called again: number, shape of the input, of the output.
        self.known: list[tuple[int, list[int], list[int]]] = []
        self.layers = nn.ModuleList()
        self.program: list[tuple[Any, ...]] = []
        begin = pick(r, "map map map map map map line line volume words words")
        self.words = begin == "words"
        if self.words:
            kind, shape = "tokens", [9, r.choice([8, 12])]
            self.sample = [9]
            self.layer(Tokens(WORDS, *shape))
        else:
            kind = "map"
            self.sample = shape = {"map": [3, 8, 8], "line": [3, 16], "volume": [2, 4, 4, 4]}[begin]
            shape = list(shape)
            self.conv(shape, r.choice([8, 12, 16]), 3, padding=1)
        saved: list[tuple[int, list[int]]] = []
        for _ in range(steps):
            if kind == "map" and r.random() < 0.12:
                self.step("tokens")
                kind, shape = "tokens", [math.prod(shape[1:]), shape[0]]
                saved = []
            elif kind == "tokens" and r.random() < 0.08:
                side = math.isqrt(shape[0])
                sides = [side, side] if side**2 == shape[0] and r.random() < 0.7 else [shape[0]]
                self.step("maps", *sides)
                kind, shape = "map", [shape[1], *sides]
                saved = []
            if saved and saved[-1][1] == shape and r.random() < 0.35:
                self.step(r.choice(["add", "add", "mul"]), saved[-1][0])
            elif saved and kind == "map" and saved[-1][1][1:] == shape[1:] and r.random() < 0.3:
                self.step("cat", saved[-1][0])
                shape = [shape[0] + saved[-1][1][0], *shape[1:]]
            else:
                shape = self.one_step(kind, list(shape))
            if r.random() < 0.5:
                self.step("save", None)
                saved.append((sum(p[0] == "save" for p in self.program) - 1, list(shape)))
        self.last(kind, shape)
        del self.rng, self.known

    def one_step(self, kind: str, shape: list[int]) -> list[int]:
        if self.ties and self.rng.random() < 0.35:
            return self.tied_step(kind, shape)
        before = len(self.program)
        out = self.map_step(list(shape)) if kind == "map" else self.token_step(list(shape))
        if len(self.program) == before + 1 and self.program[-1][0] == "layer":
            self.known.append((self.program[-1][1], shape, out))
        return out

    def tied_step(self, kind: str, shape: list[int]) -> list[int]:
        """A layer that is called again, or that shares parameters with another one."""
        r, nd, flat = self.rng, len(shape) - 1, len(shape) == 3
        c = shape[0] if kind == "map" else shape[1]
        again = [k for k in self.known if k[1] == shape]
        choice = pick(r, "again again levels levels pair norms")
        if choice == "again" and again:
            number, _, out = r.choice(again)
            self.step("layer", number)
            return list(out)
        if choice == "levels" and kind == "map":
            even = flat and not any(n % 2 for n in shape[1:])
            how = r.choice(["pyramid", "pyramid", "cat", "product"] if even else ["cat", "product"])
            out, k = r.choice([4, c]), r.choice([1, 3])
            inner: list[nn.Module] = [CONVS[nd](c, out, k, padding=k // 2, bias=r.random() < 0.6)]
            inner += [NORMS[nd](out)] if r.random() < 0.4 else []
            if r.random() < 0.5:
                inner += [r.choice(ACTS)(), CONVS[nd](out, out, k, padding=r.choice([0, k // 2]) if k == 1 else 1)]
            self.layer(Levels(nn.Sequential(*inner), how, r.choice(ACTS)()))
            return [2 * out if how == "cat" else out, *shape[1:]]
        if choice == "norms" and kind == "map":
            pair: Any = [NORMS[nd](c) for _ in range(2)]
        elif kind == "map":
            pair = [CONVS[nd](c, c, 3, padding=1, groups=r.choice([1, 1, 2 if c % 2 == 0 else 1])) for _ in range(2)]
            pair[1].groups = pair[0].groups if pair[0].weight.shape == pair[1].weight.shape else pair[1].groups
        else:
            pair = [nn.Linear(c, c, bias=r.random() < 0.7) for _ in range(2)]
        if pair[0].weight.shape == pair[1].weight.shape:
            tie(r, *pair)
        self.layer(pair[0])
        self.layer(r.choice(ACTS[:6])())
        self.layer(pair[1])
        return shape

    def last(self, kind: str, shape: list[int]) -> None:
        r = self.rng
        if kind == "map":
            self.step(r.choice(["pooled", "flat"]))
            self.layer(nn.Linear(shape[0] if self.program[-1][0] == "pooled" else math.prod(shape), 4))
            return
        first = self.layers[0]
        if isinstance(first, Tokens) and first.words.embedding_dim == shape[1] and r.random() < 0.6:
            head = nn.Linear(shape[1], WORDS, bias=False)
            if r.random() < 0.6:
                head.weight = first.words.weight
            self.layer(head)
            return
        self.step("average")
        self.layer(nn.Linear(shape[1], 4))

    def step(self, name: str, *rest: Any) -> None:
        self.program.append((name, *rest))

    def layer(self, m: nn.Module) -> None:
        self.layers.append(m)
        self.step("layer", len(self.layers) - 1)

    def conv(self, shape: list[int], out: int, k: int, **kwargs: Any) -> None:
        self.layer(CONVS[len(shape) - 1](shape[0], out, k, **kwargs))
        shape[0] = out

    def map_step(self, shape: list[int]) -> list[int]:
        r = self.rng
        c, *sizes = shape
        nd, low = len(sizes), min(sizes)
        flat = nd == 2
        choice = pick(
            r,
            "conv conv conv grouped depthwise transposed norm norm group instance layernorm act act prelu pool avg up "
            "shuffle unshuffle channels channels2 se slice parts padc padm scale stack twice tied roll single rot "
            "spatial softmax whole index squeeze branch branch reshaped reshaped hand hand strided glu where gate own",
        )
        if choice == "conv":
            k = r.choice([1, 3])
            mode = r.choice(["zeros", "zeros", "reflect", "circular"]) if k == 3 and low > 3 else "zeros"
            self.conv(shape, r.choice([8, 12, 16]), k, padding=k // 2, bias=r.random() < 0.6, padding_mode=mode)
        elif choice == "grouped":
            g = r.choice([g for g in (2, 4) if c % g == 0] or [1])
            self.conv(shape, r.choice([2, 3]) * 4, 3, padding=1, groups=g)
        elif choice == "depthwise":
            self.conv(shape, c * r.choice([1, 1, 2]), 3, padding=1, groups=c, bias=r.random() < 0.5)
        elif choice == "transposed" and low <= 8:
            g = 2 if c % 2 == 0 and r.random() < 0.4 else 1
            k, stride, padding = r.choice([(2, 2, 0), (3, 1, 1), (1, 1, 0)] if nd < 3 else [(3, 1, 1), (1, 1, 0)])
            self.layer(TRANSPOSED[nd](c, 12, k, stride, padding, groups=g))
            return [12, *(n * stride for n in sizes)]
        elif choice == "norm":
            self.layer(NORMS[nd](c))
        elif choice == "group":
            self.layer(nn.GroupNorm(r.choice([g for g in (1, 2, 4) if c % g == 0]), c))
        elif choice == "instance":
            if low > 1:
                self.layer(INSTANCES[nd](c, affine=r.random() < 0.5))
        elif choice == "layernorm" and flat:
            self.step("permuted", len(self.layers))
            self.layers.append(nn.LayerNorm(c))
        elif choice == "act":
            self.layer(r.choice(ACTS)())
        elif choice == "prelu":
            self.layer(nn.PReLU(c))
        elif choice in ("pool", "avg") and low >= 4 and not any(n % 2 for n in sizes):
            pools = [MAX_POOLS[nd](2)] if choice == "pool" else [AVG_POOLS[nd](3, 2, 1), AVG_POOLS[nd](2)]
            self.layer(r.choice(pools))
            return [c, *(n // 2 for n in sizes)]
        elif choice == "up" and low <= 4 and nd < 3:
            mode = r.choice(["nearest", "bilinear"] if flat else ["nearest", "linear"])
            if r.random() < 0.5:
                self.layer(nn.Upsample(scale_factor=2, mode=mode))
            else:
                self.step("up", mode)
            return [c, *(2 * n for n in sizes)]
        elif choice == "shuffle" and flat and c % 4 == 0 and low <= 4 and c > 4:
            self.step("pixel_shuffle")
            return [c // 4, 2 * sizes[0], 2 * sizes[1]]
        elif choice == "unshuffle" and flat and not any(n % 2 for n in sizes) and c <= 12:
            self.layer(nn.PixelUnshuffle(2))
            return [4 * c, sizes[0] // 2, sizes[1] // 2]
        elif choice in ("channels", "channels2") and flat and c % 2 == 0:
            if choice == "channels":
                self.layer(nn.ChannelShuffle(2))
            else:
                self.step("shuffled", r.choice([g for g in (2, 4) if c % g == 0]))
        elif choice == "se" and flat:
            self.step("se", len(self.layers))
            self.layers.append(nn.Sequential(nn.Conv2d(c, 4, 1), nn.ReLU(), nn.Conv2d(4, c, 1), nn.Sigmoid()))
        elif choice == "slice" and c >= 8:
            a = r.randrange(0, c // 2)
            self.step("slice", a, a + c // 2)
            return [c // 2, *sizes]
        elif choice == "parts" and c % 2 == 0:
            self.step("parts", r.choice(["swap", "product"]))
            return [c if self.program[-1][1] == "swap" else c // 2, *sizes]
        elif choice == "branch" and c >= 4:
            cut, out, how = r.randrange(1, c // 2), r.choice([4, 8]), r.choice(["sizes", "method", "one"])
            inner = nn.Sequential(CONVS[nd](cut, out, 3, padding=1), r.choice(ACTS[:6])())
            self.layer(Branch(c, cut, how, inner))
            return [out if how == "one" else c - cut + out, *sizes]
        elif choice == "reshaped" and flat and c % 2 == 0 and not any(n % 2 for n in sizes):
            how = pick(r, "maxout inner depth select lines extra windows plain")
            if how == "depth" and c > 12:
                how = "plain"
            self.layer(Reshaped(how))
            c = c // 2 if how in ("maxout", "inner", "select") else 4 * c if how == "depth" else c
            return [c, *(n // 2 if how == "depth" else n for n in sizes)]
        elif choice == "hand":
            self.layer(Normed(c, nd, pick(r, "rms mean var softmax norm")))
        elif choice == "strided" and c >= 8 and c % 2 == 0:
            self.step("strided", r.choice(["half", "sum", "both"]))
            how = self.program[-1][1]
            return [c + c // 2 if how == "both" else c // 2, *sizes]
        elif choice == "glu" and c % 2 == 0:
            self.layer(nn.GLU(1))
            return [c // 2, *sizes]
        elif choice == "where":
            self.step("where", pick(r, "self number mask fill"))
        elif choice == "gate" and flat:
            self.step("gate", len(self.layers))
            self.layers.append(nn.Conv2d(3, 1, 3, padding=1))
        elif choice == "own" and flat and 2 < low <= 8:
            self.layer(r.choice([nn.ReflectionPad2d, nn.ReplicationPad2d, nn.CircularPad2d])(1))
            return [c, *(n + 2 for n in sizes)]
        elif choice == "padc" and flat:
            self.step("padc", 1, 2)
            return [c + 3, *sizes]
        elif choice == "padm" and flat and low <= 8:
            self.step("padm", r.choice(["constant", "reflect"] if low > 2 else ["constant"]))
            return [c, *(n + 2 for n in sizes)]
        elif choice == "scale":
            self.layer(Scale(c, *[1] * nd))
        elif choice == "stack" and c % 2 == 0:
            self.step("stack", r.choice(["sum", "interleave"]))
        elif choice == "twice":
            self.layer(CONVS[nd](c, c, 1))
            self.step("layer", len(self.layers) - 1)
        elif choice == "tied":
            a, b = (CONVS[nd](c, c, 3, padding=1) for _ in range(2))
            b.weight = a.weight
            self.layer(a)
            self.layer(r.choice(ACTS)())
            self.layer(b)
        elif choice == "roll" and flat:
            self.step("roll")
        elif choice == "single":
            self.step("single", len(self.layers))
            self.layers.append(CONVS[nd](c, 1, 1))
        elif choice == "rot" and flat and len(set(sizes)) == 1:
            self.step("rot")
        elif choice == "spatial" and flat and r.random() < 0.5:
            self.step("spatial")
        elif choice == "softmax" and r.random() < 0.5:
            self.step("softmax")
        elif choice == "whole" and r.random() < 0.5:
            self.step("cumsum")
        elif choice == "index":
            self.step("index", r.randrange(c))
        elif choice == "squeeze" and flat:
            self.step("fold")
        return [shape[0], *sizes]

    def token_step(self, shape: list[int]) -> list[int]:
        r = self.rng
        n, c = shape
        choice = pick(
            r,
            "linear linear norm rms attention attention attention mha gated gated mlp mix scale prefix rnn rnn act "
            "heads attend rows tied hand",
        )
        heads = r.choice([h for h in (1, 2, 4) if c % h == 0])
        if choice == "linear":
            self.layer(nn.Linear(c, 12, bias=r.random() < 0.7))
            return [n, 12]
        if choice == "norm":
            self.layer(nn.LayerNorm(c))
        elif choice == "rms":
            self.layer(nn.RMSNorm(c, eps=1e-3))  # what is 0 but for rounding stays so
        elif choice == "attention":
            how = pick(r, "fused plain grouped gqa interleaved")
            shared = how in ("grouped", "gqa", "interleaved")
            self.layer(Attention(c, heads, how, max(1, heads // r.choice([2, 2, 4])) if shared else None))
        elif choice == "mha":
            self.step("mha", len(self.layers))
            self.layers.append(nn.MultiheadAttention(c, heads, batch_first=True))
        elif choice == "gated":
            self.layer(Gated(c, 10, r.random() < 0.5))
        elif choice == "mlp":
            self.layer(nn.Sequential(nn.Linear(c, 14), r.choice(ACTS[:6])(), nn.Dropout(0.1), nn.Linear(14, c)))
        elif choice == "mix":
            self.step("mix", len(self.layers))
            self.layers.append(nn.Linear(n, n))
        elif choice == "hand":
            self.layer(Normed(c, 0, pick(r, "rms mean var softmax norm")))
        elif choice == "scale":
            self.layer(Scale(c))
        elif choice == "prefix" and n < 70:
            self.layer(Prefix(n, c))
            return [n + 1, c]
        elif choice == "rnn" and n < 70:
            kind, state = r.choice([nn.LSTM, nn.GRU, nn.RNN]), r.random() < 0.25
            both = not state and r.random() < 0.4
            hidden = c if state else r.choice([5, 8])
            given = not both and hidden == c and r.random() < 0.3
            extra: dict[str, Any] = {"num_layers": r.choice([1, 1, 2]), "bidirectional": both}
            extra |= {"batch_first": r.random() < 0.6, "bias": r.random() < 0.7}
            if kind is nn.RNN and r.random() < 0.5:
                extra["nonlinearity"] = "relu"
            self.layer(Recurrent(c, hidden, kind, state, given, **extra))
            return [n, hidden * (1 + both)]
        elif choice == "act":
            self.layer(r.choice(ACTS[:6])())
        elif choice == "heads" and c % 2 == 0:
            self.step("heads", 2)
        elif choice == "attend":
            self.step("attend", len(self.layers))
            self.layers.append(nn.Linear(c, 8))
        elif choice == "rows":
            self.layer(Rows(c, 10))
            return [n, 10]
        elif choice == "tied":
            a, b = nn.Linear(c, c), nn.Linear(c, c)
            b.weight = a.weight
            self.layer(a)
            self.layer(b)
        return [n, c]

    def example(self, batch: int) -> Tensor:
        shape = (batch, *self.sample)
        return torch.randint(WORDS, shape) if self.words else torch.randn(shape, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        saved: list[Tensor] = []
        for name, *rest in self.program:
            x = self.run(x, saved, name, *rest)
        return x

    def run(self, x: Tensor, saved: list[Tensor], name: str, *rest: Any) -> Tensor:
        if name == "layer":
            return self.layers[rest[0]](x)
        if name == "save":
            saved.append(x)
            return x
        if name in ("add", "mul", "cat"):
            other = saved[rest[0]]
            return x + other if name == "add" else x * other if name == "mul" else torch.cat([other, x], 1)
        if name == "tokens":
            return x.flatten(2).transpose(1, 2)
        if name == "maps":
            return x.transpose(1, 2).reshape(x.shape[0], -1, *rest)
        if name == "strided":
            a, b = x[:, ::2], x[:, 1::2]
            return a if rest[0] == "half" else a + b if rest[0] == "sum" else torch.cat([x, a], 1)
        if name == "where":
            if rest[0] == "fill":
                return x.masked_fill(x < -0.5, -0.5)
            mask = x.flatten(2).mean(-1).view(*x.shape[:2], *[1] * (x.dim() - 2)) > 0
            mask = x.amax(1, keepdim=True) > 0.3 if rest[0] == "mask" else mask
            return torch.where(mask, x, 0.1 if rest[0] == "number" else -x)
        if name == "gate":
            most, common = torch.max(x, 1, keepdim=True)[0], x.mean(1, keepdim=True)
            return x * torch.sigmoid(self.layers[rest[0]](torch.cat([most, common, x.sum(1).unsqueeze(1)], 1)))
        if name == "permuted":
            return self.layers[rest[0]](x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if name == "up":
            return F.interpolate(x, scale_factor=2, mode=rest[0])
        if name == "pixel_shuffle":
            return F.pixel_shuffle(x, 2)
        if name == "shuffled":
            b, c, h, w = x.size()
            x = x.view(b, rest[0], c // rest[0], h, w)
            return torch.transpose(x, 1, 2).contiguous().view(b, -1, h, w)
        if name == "se":
            return x * self.layers[rest[0]](F.adaptive_avg_pool2d(x, 1))
        if name == "slice":
            return x[:, rest[0] : rest[1]]
        if name == "parts":
            a, b = x.chunk(2, 1)
            return torch.cat([b, a], 1) if rest[0] == "swap" else a * torch.sigmoid(b)
        if name == "padc":
            return F.pad(x, (0, 0, 0, 0, rest[0], rest[1]))
        if name == "padm":
            return F.pad(x, (1, 1, 1, 1), rest[0])
        if name == "stack":
            y = torch.stack([x, torch.relu(x)], 1)
            if rest[0] == "sum":
                return y.sum(1)
            return y.flatten(1, 2)[:, : x.shape[1]]
        if name == "roll":
            return torch.roll(x, shifts=(1, 1), dims=(2, 3))
        if name == "single":
            return x * torch.sigmoid(self.layers[rest[0]](x))
        if name == "rot":
            return x.transpose(2, 3)
        if name == "spatial":
            return x - x.amax((2, 3), keepdim=True)
        if name == "softmax":
            return x.flatten(2).softmax(-1).view(x.shape) * 10
        if name == "cumsum":
            return x.cumsum(1) * 0.1
        if name == "index":
            return x + x[:, rest[0]].unsqueeze(1)
        if name == "fold":
            return x.flatten(1).unflatten(1, (x.shape[1], x.shape[2], x.shape[3]))
        if name == "mha":
            return self.layers[rest[0]](x, x, x, need_weights=False)[0]
        if name == "mix":
            return self.layers[rest[0]](x.transpose(1, 2)).transpose(1, 2)
        if name == "heads":
            b, n, c = x.shape
            return x.view(b, n, rest[0], c // rest[0]).transpose(2, 3).reshape(b, n, c)
        if name == "attend":
            y = self.layers[rest[0]](x)
            return torch.softmax(torch.bmm(y, y.transpose(1, 2)), -1) @ x
        if name == "pooled":
            return x.mean(tuple(range(2, x.dim())))
        if name == "flat":
            return x.flatten(1)
        return x.mean(1)


@torch.no_grad()
def zero_at_random(model: nn.Module, rate: float, seed: int, leak: bool = True) -> nn.Module:
    """Random weights and statistics; in every layer a share of about `rate` of filters and of columns set to zero.

    leak: zero filters keep their bias; otherwise it is zero too, with the scale and shift of a norm behind it.
    """
    g = torch.Generator().manual_seed(seed)

    def gone(n: int) -> Tensor:
        return torch.rand(n, generator=g) < rate

    previous: Any = None
    for m in model.modules():
        if isinstance(m, (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)):
            for name in ("weight", "bias", "running_mean", "running_var"):
                t = getattr(m, name, None)
                if isinstance(t, Tensor):
                    away = {"weight": 1.0, "running_var": 1.0}.get(name, 0.0)
                    t.copy_(away + 0.3 * torch.rand(t.shape, generator=g) * (1 if away else 2) - (0 if away else 0.3))
            if previous is not None and not leak and getattr(m, "num_features", 0) == previous.numel():
                for t in (m.running_mean, m.bias):
                    if t is not None:
                        t[previous] = 0
        elif isinstance(m, (nn.modules.conv._ConvNd, nn.Linear)):
            w: Any = m.weight
            w.copy_(torch.randn(w.shape, generator=g) * (2.0 / w[0].numel()) ** 0.5)
            transposed = isinstance(m, nn.modules.conv._ConvTransposeNd)
            outs, ins = (w.transpose(0, 1), w) if transposed else (w, w.transpose(0, 1))
            previous = gone(outs.shape[0])
            outs[previous] = 0
            ins[gone(ins.shape[0]) if ins.shape[0] > 1 else torch.zeros(1, dtype=torch.bool)] = 0
            if m.bias is not None:
                m.bias.copy_(torch.randn(m.bias.shape, generator=g) * 0.3)
                if not leak and not transposed:
                    m.bias[previous] = 0
            if transposed:
                previous = None
        elif isinstance(m, nn.RNNBase):
            zero_recurrent(m, rate, g)
        elif isinstance(m, nn.Embedding):
            m.weight.copy_(torch.randn(m.weight.shape, generator=g))
            m.weight[:, gone(m.embedding_dim)] = float(leak)
        elif isinstance(m, nn.MultiheadAttention):
            w = m.in_proj_weight
            if w is not None:
                w[gone(w.shape[0])] = 0
                if m.in_proj_bias is not None and leak:
                    m.in_proj_bias.copy_(torch.randn(m.in_proj_bias.shape, generator=g) * 0.3)
    return model


def zero_recurrent(m: Any, rate: float, g: torch.Generator) -> None:
    """Units without weights, written to by nothing, or read by nothing; inputs that are not read."""
    n = m.hidden_size
    writer = {"LSTM": 2, "GRU": 2}.get(m.mode, 0) * n
    for p in m.parameters():
        p.copy_(torch.randn(p.shape, generator=g) * (0.5 if p.dim() > 1 else 0.3))
    for name in [name for name, _ in m.named_parameters() if name.startswith("weight_hh")]:
        suffix = name.removeprefix("weight_hh_")
        w_ih, w_hh = getattr(m, f"weight_ih_{suffix}"), getattr(m, name)
        rest = [getattr(m, f"bias_{k}_{suffix}") for k in ("ih", "hh")] if m.bias else []
        w_hh[torch.rand(w_hh.shape, generator=g) < rate] = 0
        w_ih[:, torch.rand(w_ih.shape[1], generator=g) < rate / 2] = 0
        for unit in range(n):
            how = torch.rand(1, generator=g).item() / rate
            if how < 0.3:  # all of it, biases included or not
                for p in (w_ih, w_hh, *(rest if how < 0.2 else [])):
                    p[unit::n] = 0
            elif how < 0.6:  # what writes its state
                for p in (w_ih, w_hh, *(rest if how < 0.5 else [])):
                    p[writer + unit] = 0
            elif how < 1:
                w_hh[:, unit] = 0


def outputs(model: nn.Module) -> dict[str, int]:
    """Filters and hidden units by layer."""
    out = {}
    for name, m in model.named_modules():
        if isinstance(m, nn.RNNBase):
            out[name] = m.hidden_size * m.num_layers * (2 if m.bidirectional else 1)
        elif isinstance(m, (nn.modules.conv._ConvNd, nn.Linear)):
            out[name] = m.weight.shape[0] if isinstance(m, nn.Linear) else m.out_channels
    return out


def idle(m: Any) -> int:
    """Filters without weights, hidden units without weights and biases: units with a bias change from step to step."""
    if isinstance(m, nn.RNNBase):
        busy: dict[str, Tensor] = {}
        for name, p in m.named_parameters():
            has = (p != 0).reshape(-1, m.hidden_size, p.numel() // len(p)).any(2).any(0)
            cell = name.split("_", 2)[2]
            busy[cell] = busy[cell] | has if cell in busy else has
        return sum(int((~b).sum()) for b in busy.values())
    w = m.weight
    if isinstance(m, nn.modules.conv._ConvTransposeNd):
        w = w.unflatten(0, (m.groups, -1)).transpose(1, 2).flatten(0, 1)
    return int((w.flatten(1) == 0).all(1).sum())


def check_nothing_left(seed: int, small: Any, example: Tensor) -> None:
    """Filters and units without effect are named, and what a second compaction takes was among them."""
    import structadmm as sa

    notes, whole = small.report.notes, small.report.whole
    before, after = outputs(small), outputs(sa.compact(small, example, columns="never"))
    for name, n in before.items():
        named = sum(notes.get(name, {}).values())
        if name not in whole and idle(small.get_submodule(name)) > named:
            raise AssertionError(
                f"seed {seed}: {name} has {idle(small.get_submodule(name))} filters without weights, {notes.get(name)}"
            )
        if n - after.get(name, 0) > named:
            raise AssertionError(f"seed {seed}: {name} has {n} filters, then {after.get(name)}, {notes.get(name)}")


def check(seed: int) -> tuple[int, int]:
    """Compact one random network; weights before and after. Raises where the two differ, where a second compaction
    finds more, and where a filter without weights stays for no reason."""
    import structadmm as sa

    rate = (0.3, 0.7)[seed % 2]
    torch.manual_seed(seed)
    net = RandomNet(seed)
    model = zero_at_random(net.double().eval(), rate, seed, leak=seed % 3 > 0)
    example = net.example(2)
    small = sa.compact(model, example, columns="never")
    misread = [why for why in small.report.whole.values() if "not understood" in why]
    if misread:
        raise AssertionError(f"seed {seed}: {misread[0]}")
    x = net.example(3)
    with torch.no_grad():
        a, b = model(x), small(x)
    scale = max(1.0, a.abs().max().item())
    if not (a - b).abs().max().item() <= 1e-10 * scale:
        raise AssertionError(f"seed {seed}: outputs differ by {(a - b).abs().max().item():.3g} of {scale:.3g}")
    check_nothing_left(seed, small, example)
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, small))
    return before, after
