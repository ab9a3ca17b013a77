"""Small networks and random zeros for the tests of tracing, purification and compaction."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from structadmm.groups import expand_keep, n_groups

ACTIVATIONS = [nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish, nn.Sigmoid, nn.Tanh, nn.LeakyReLU, nn.Identity]


class Basic(nn.Module):
    """A basic residual block; shortcut "A" subsamples and pads channels, "B" is a 1x1 convolution with BatchNorm."""

    def __init__(self, c_in: int, c_out: int, stride: int = 1, shortcut: str = "A", act: type[nn.Module] = nn.ReLU):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.act = act()
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.downsample = None
        self.stride, self.extra = stride, c_out - c_in
        if (stride > 1 or c_in != c_out) and shortcut == "B":
            self.downsample = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))
        if self.downsample is not None:
            x = self.downsample(x)
        elif self.stride > 1 or self.extra:
            before = self.extra // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.extra - before))
        y += x
        return self.act(y)


class Bottleneck(nn.Module):
    """A bottleneck block of ResNet-50's kind, its 3x3 convolution in conv groups."""

    def __init__(self, c_in: int, width: int, c_out: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c_in, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, c_out, 1, bias=False), nn.BatchNorm2d(c_out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        return self.relu(torch.add(self.bn3(self.conv3(y)), self.downsample(x)))


class InvertedResidual(nn.Module):
    """MobileNetV2's block, with squeeze-excite on request."""

    def __init__(self, c: int, expand: int, squeeze: bool = False) -> None:
        super().__init__()
        h = c * expand
        self.body = nn.Sequential(
            nn.Conv2d(c, h, 1, bias=False), nn.BatchNorm2d(h), nn.ReLU6(inplace=True),
            nn.Conv2d(h, h, 3, padding=1, groups=h, bias=False), nn.BatchNorm2d(h), nn.ReLU6(inplace=True),
        )  # fmt: skip
        self.squeeze = (
            nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(h, 4, 1), nn.SiLU(), nn.Conv2d(4, h, 1), nn.Hardsigmoid())
            if squeeze
            else None
        )
        self.project = nn.Sequential(nn.Conv2d(h, c, 1, bias=False), nn.BatchNorm2d(c))

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        if self.squeeze is not None:
            y = y * self.squeeze(y)
        return x + self.project(y)


class ResNet(nn.Module):
    """A residual net for small images from the blocks above: "A", "B" (basic), "bottleneck", "grouped", "mobile",
    "se"."""

    def __init__(self, kind: str = "B", width: int = 8, act: type[nn.Module] = nn.ReLU, classes: int = 10) -> None:
        super().__init__()
        w = width
        self.conv1, self.bn1 = nn.Conv2d(3, w, 3, padding=1, bias=False), nn.BatchNorm2d(w)
        if kind in "AB":
            blocks = [Basic(w, w, 1, kind, act), Basic(w, 2 * w, 2, kind, act), Basic(2 * w, 2 * w, 1, kind, act)]
        elif kind in ("bottleneck", "grouped"):
            groups = 4 if kind == "grouped" else 1
            blocks = [Bottleneck(w, w, 2 * w, 1, groups), Bottleneck(2 * w, w, 2 * w, 2, groups)]
        else:
            down = nn.Sequential(nn.Conv2d(w, 2 * w, 1, bias=False), nn.BatchNorm2d(2 * w))
            blocks = [InvertedResidual(w, 3, kind == "se"), down, InvertedResidual(2 * w, 2, kind == "se")]
        self.layer1 = nn.Sequential(*blocks)
        self.fc = nn.Linear(2 * w, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer1(F.relu(self.bn1(self.conv1(x))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).view(x.size(0), -1))


class VGG(nn.Module):
    """A chain with pooling, a flatten of whole maps, BatchNorm1d and functional dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12),
            nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(12, 10, 3), nn.Tanh(), nn.AvgPool2d(2, padding=1),
        )  # fmt: skip
        self.fc1, self.bn, self.fc2 = nn.Linear(90, 16), nn.BatchNorm1d(16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = x.reshape(x.shape[0], x.shape[1] * x.shape[2] * x.shape[3])
        return self.fc2(F.dropout(F.relu(self.bn(self.fc1(x))), 0.5, self.training))


class MoreInTraining(nn.Module):
    """A forward that calls another layer in training."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)) if self.training else self.a(x)


def random_chain(seed: int) -> nn.Sequential:
    """Convolutions with random kernels, padding, strides, conv groups and biases, normalisations, activations,
    pools."""
    g = torch.Generator().manual_seed(seed)

    def pick(*options):
        return options[int(torch.randint(len(options), (1,), generator=g))]

    layers: list[nn.Module] = []
    c, size = 3, 12
    for i in range(pick(2, 3, 4)):
        groups = pick(1, 1, 2, 4) if i else 1
        out = c if i and pick(0, 0, 1) else pick(8, 12, 16)
        groups = out if i and out == c and pick(0, 1) else groups
        k = pick(1, 3)
        padding = pick(0, 1) if k == 3 else 0
        mode = pick("zeros", "zeros", "reflect", "replicate") if padding else "zeros"
        layers.append(nn.Conv2d(c, out, k, padding=padding, groups=groups, bias=pick(True, False), padding_mode=mode))
        size += 2 * padding - k + 1
        if pick(0, 1):
            layers.append(nn.BatchNorm2d(out))
        layers.append(pick(*ACTIVATIONS)())
        if size >= 6 and pick(0, 1):
            pool = pick(
                nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2), nn.AvgPool2d(3, 2, 1),
                nn.AvgPool2d(3, 2, 1, count_include_pad=False),
            )  # fmt: skip
            layers.append(pool)
            size = (size + 2 * pool.padding - pool.kernel_size) // pool.stride + 1
        c = out
    if pick(0, 1):
        layers += [nn.AdaptiveAvgPool2d(1)]
        size = 1
    layers += [nn.Flatten(), nn.Dropout(0.5), nn.Linear(c * size * size, 12), pick(*ACTIVATIONS)(), nn.Linear(12, 4)]
    return nn.Sequential(*layers)


@torch.no_grad()
def randomise(model: nn.Module, rate: float, seed: int, leak: bool = True) -> nn.Module:
    """Random weights and BatchNorm statistics, and in each layer a random structure at `rate` set to zero.

    leak: filters set to zero keep their bias and BatchNorm; otherwise both become zero with the filter.
    """
    g = torch.Generator().manual_seed(seed)
    previous = None
    for m in model.modules():
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
            m.running_mean.copy_(torch.randn(m.num_features, generator=g) * 0.3)
            m.running_var.copy_(torch.rand(m.num_features, generator=g) + 0.5)
            m.weight.copy_(torch.rand(m.num_features, generator=g) + 0.5)
            m.bias.copy_(torch.randn(m.num_features, generator=g) * 0.5)
            if not leak and previous is not None and previous.weight.shape[0] == m.num_features:
                empty = previous.weight.flatten(1).abs().sum(1) == 0
                for t in (m.running_mean, m.bias):
                    t[empty] = 0
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            shape, groups = m.weight.shape, getattr(m, "groups", 1)
            m.weight.copy_(torch.randn(shape, generator=g) * (2 / m.weight[0].numel()) ** 0.5)
            for structure in ("filter", "channel", "column", "block_column"):
                if torch.rand(1, generator=g) < 0.5:
                    keep = torch.rand(n_groups(structure, shape, groups), generator=g) >= rate
                    m.weight.mul_(expand_keep(keep, structure, shape, groups))
            if m.bias is not None:
                m.bias.copy_(torch.randn(m.bias.shape, generator=g) * 0.3)
                if not leak:
                    m.bias[m.weight.flatten(1).abs().sum(1) == 0] = 0
            previous = m
    return model
