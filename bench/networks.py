"""The networks and layers that the benchmarks measure, in plain torch.nn, with weights from a seed.

BatchNorm has statistics as after training (variances and scales apart from one, means and shifts apart from zero), so
folding is put to work and activations stay finite through fifty layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Layer:
    """A convolution with its input's shape; `same` padding (kernel // 2) unless `padding` says otherwise."""

    name: str
    channels: int
    size: int
    filters: int
    kernel: int = 3
    stride: int = 1
    groups: int = 1
    padding: int | None = None

    def conv(self) -> nn.Conv2d:
        padding = self.kernel // 2 if self.padding is None else self.padding
        return nn.Conv2d(self.channels, self.filters, self.kernel, self.stride, padding, groups=self.groups).eval()

    def input(self, batch: int) -> Tensor:
        return torch.randn(batch, self.channels, self.size, self.size)

    def macs(self) -> int:
        """Multiply-adds per image."""
        padding = self.kernel // 2 if self.padding is None else self.padding
        out = (self.size + 2 * padding - self.kernel) // self.stride + 1
        return self.filters * self.channels // self.groups * self.kernel**2 * out**2


ALEXNET_GROUPED = [
    Layer("alexnet conv2 g2", 96, 27, 256, 5, groups=2),
    Layer("alexnet conv3", 256, 13, 384),
    Layer("alexnet conv4 g2", 384, 13, 384, groups=2),
    Layer("alexnet conv5 g2", 384, 13, 256, groups=2),
]
ALEXNET_UNGROUPED = [
    Layer("alexnet conv2 g1", 96, 27, 256, 5),
    Layer("alexnet conv4 g1", 384, 13, 384),
    Layer("alexnet conv5 g1", 384, 13, 256),
]
RESNET18 = [
    Layer("resnet18 stage1", 64, 32, 64),
    Layer("resnet18 stage2", 128, 16, 128),
    Layer("resnet18 stage3", 256, 8, 256),
    Layer("resnet18 stage4", 512, 4, 512),
]
# The first convolution of a stage halves the map.
RESNET18_STRIDED = [
    Layer("resnet18 stage2 s2", 64, 32, 128, stride=2),
    Layer("resnet18 stage3 s2", 128, 16, 256, stride=2),
    Layer("resnet18 stage4 s2", 256, 8, 512, stride=2),
]
RESNET50 = [
    Layer(f"resnet50 {kind} @{size}", channels, size, filters, kernel)
    for size, width in ((56, 64), (28, 128), (14, 256), (7, 512))
    for kind, channels, filters, kernel in (
        ("1x1 in", 4 * width, width, 1),
        ("3x3", width, width, 3),
        ("1x1 out", width, 4 * width, 1),
    )
]
VGG16 = [
    Layer("vgg16 3x3 @112 64", 64, 112, 128),
    Layer("vgg16 3x3 @112", 128, 112, 128),
    Layer("vgg16 3x3 @28 256", 256, 28, 512),
    Layer("vgg16 3x3 @28", 512, 28, 512),
]
LAYERS = ALEXNET_GROUPED + ALEXNET_UNGROUPED + RESNET18 + RESNET18_STRIDED + RESNET50 + VGG16
ALEXNET_CONV1 = Layer("alexnet conv1", 3, 227, 96, 11, 4, padding=0)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels)


def trained_like(net: nn.Module, example: Tensor, seed: int = 0) -> nn.Module:
    """Weights and BatchNorm statistics as a trained network has them, in place; eval mode.

    Kaiming weights, scales and shifts around 1 and 0, and running statistics from the example, layer by layer.
    """
    generator = torch.Generator().manual_seed(seed)
    for m in net.modules():
        if isinstance(m, nn.Conv2d | nn.Linear):
            fan = m.weight[0].numel()
            nn.init.normal_(m.weight, std=(2 / fan) ** 0.5, generator=generator)
            if m.bias is not None:
                nn.init.normal_(m.bias, std=0.1, generator=generator)
        elif isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(m.bias, std=0.2, generator=generator)
            m.momentum = None  # a mean over the passes, here one
    # A trained residual branch adds a fraction of what it is added to.
    for m in net.modules():
        last = m.bn3 if isinstance(m, _Bottleneck) else m.bn2 if isinstance(m, _Basic) else None
        if last is not None:
            nn.init.uniform_(last.weight, 0.1, 0.4, generator=generator)
    net.train()
    with torch.no_grad():
        net(example)
    return net.eval()


class _Caffe(nn.Module):
    """AlexNet's five convolutions as Caffe has them: groups of two in conv2, conv4 and conv5; no normalisation."""

    def __init__(self, groups: int = 2):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 96, 11, 4)
        self.conv2 = nn.Conv2d(96, 256, 5, padding=2, groups=groups)
        self.conv3 = nn.Conv2d(256, 384, 3, padding=1)
        self.conv4 = nn.Conv2d(384, 384, 3, padding=1, groups=groups)
        self.conv5 = nn.Conv2d(384, 256, 3, padding=1, groups=groups)
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.conv1(x)))
        x = self.pool(self.relu(self.conv2(x)))
        x = self.relu(self.conv3(x))
        x = self.relu(self.conv4(x))
        return self.pool(self.relu(self.conv5(x)))


def alexnet_convs(groups: int = 2) -> tuple[nn.Module, tuple[int, ...]]:
    return _Caffe(groups), (3, 227, 227)


class _Basic(nn.Module):
    def __init__(self, channels: int, filters: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, filters, 3, stride, 1, bias=False)
        self.bn1 = _norm(filters)
        self.conv2 = nn.Conv2d(filters, filters, 3, 1, 1, bias=False)
        self.bn2 = _norm(filters)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != filters:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, filters, 1, stride, bias=False), _norm(filters))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def resnet18_cifar() -> tuple[nn.Module, tuple[int, ...]]:
    blocks: list[nn.Module] = []
    channels = 64
    for filters, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        blocks += [_Basic(channels, filters, stride), _Basic(filters, filters, 1)]
        channels = filters
    stem = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), _norm(64), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10)]
    return nn.Sequential(*stem, *blocks, *head), (3, 32, 32)


class _Bottleneck(nn.Module):
    def __init__(self, channels: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = _norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = _norm(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = _norm(4 * width)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != 4 * width:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, 4 * width, 1, stride, bias=False), _norm(4 * width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        return self.relu(self.bn3(self.conv3(y)) + self.shortcut(x))


def resnet50() -> tuple[nn.Module, tuple[int, ...]]:
    blocks: list[nn.Module] = []
    channels = 64
    for width, depth, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for i in range(depth):
            blocks.append(_Bottleneck(channels, width, stride if i == 0 else 1))
            channels = 4 * width
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), _norm(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000)]
    return nn.Sequential(*stem, *blocks, *head), (3, 224, 224)


def vgg16_convs() -> tuple[nn.Module, tuple[int, ...]]:
    layers: list[nn.Module] = []
    channels = 3
    for filters, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(depth):
            layers += [nn.Conv2d(channels, filters, 3, padding=1), nn.ReLU()]
            channels = filters
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers), (3, 224, 224)


class _Inverted(nn.Module):
    def __init__(self, channels: int, filters: int, stride: int, expand: int):
        super().__init__()
        width = channels * expand
        layers: list[nn.Module] = []
        if expand != 1:
            layers += [nn.Conv2d(channels, width, 1, bias=False), _norm(width), nn.ReLU6()]
        layers += [nn.Conv2d(width, width, 3, stride, 1, groups=width, bias=False), _norm(width), nn.ReLU6()]
        layers += [nn.Conv2d(width, filters, 1, bias=False), _norm(filters)]
        self.body = nn.Sequential(*layers)
        self.residual = stride == 1 and channels == filters

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return x + y if self.residual else y


def mobilenet_v2() -> tuple[nn.Module, tuple[int, ...]]:
    layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, 2, 1, bias=False), _norm(32), nn.ReLU6()]
    channels = 32
    table = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    for expand, filters, depth, stride in table:
        for i in range(depth):
            layers.append(_Inverted(channels, filters, stride if i == 0 else 1, expand))
            channels = filters
    layers += [nn.Conv2d(channels, 1280, 1, bias=False), _norm(1280), nn.ReLU6()]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, 1000)]
    return nn.Sequential(*layers), (3, 224, 224)


NETWORKS: dict[str, Callable[[], tuple[nn.Module, tuple[int, ...]]]] = {
    "alexnet convs": alexnet_convs,
    "resnet18/cifar": resnet18_cifar,
    "resnet50": resnet50,
    "vgg16 convs": vgg16_convs,
    "mobilenet_v2": mobilenet_v2,
}


def network(name: str, seed: int = 0) -> tuple[nn.Module, tuple[int, ...]]:
    """The network by name with weights as after training, in eval mode, and the shape of an image."""
    torch.manual_seed(seed)
    net, shape = NETWORKS[name]()
    return trained_like(net, torch.randn(4, *shape), seed), shape


def prune_(conv: nn.Conv2d, density: float, structure: str = "column", block: int = 8, seed: int = 0) -> nn.Conv2d:
    """Leave exactly round(density * n) random units of the convolution, at least one; n counts, in each conv group,

    column: (channel, ky, kx) positions, for all filters alike; block: the same for each `block` filters by themselves;
    filter: filters, with their biases; element: weights, exact over the group. In place; returns the convolution.
    """
    generator = torch.Generator().manual_seed(seed)
    columns = conv.weight[0].numel()
    filters = conv.out_channels // conv.groups

    def some(n: int) -> Tensor:
        return torch.randperm(n, generator=generator)[: max(1, round(density * n))]

    mask = torch.zeros(conv.out_channels, columns)
    for group in mask.split(filters):
        if structure == "element":
            group.view(-1)[some(group.numel())] = 1
        elif structure == "filter":
            group[some(filters)] = 1
        elif structure in ("column", "block"):
            for rows in group.split(filters if structure == "column" else block):
                rows[:, some(columns)] = 1
        else:
            raise ValueError(f"prune_: structure got {structure!r}, wanted column, block, filter or element")
    with torch.no_grad():
        conv.weight.mul_(mask.view_as(conv.weight))
        if structure == "filter" and conv.bias is not None:
            conv.bias.mul_(mask.any(1))
    return conv


def convs(net: nn.Module) -> dict[str, nn.Conv2d]:
    """Its convolutions by name, in order of registration."""
    return {name: m for name, m in net.named_modules() if isinstance(m, nn.Conv2d)}


def prune_convs_(
    net: nn.Module, density: float, structure: str = "column", block: int = 8, kernel: int = 0, skip: int = 1
) -> nn.Module:
    """prune_ for every convolution but the first `skip`, or every one with kernels of this size. In place."""
    for i, conv in enumerate(convs(net).values()):
        if i >= skip and (not kernel or conv.kernel_size == (kernel, kernel)):
            prune_(conv, density, structure, block, seed=i)
    return net


def halve_inner_filters_(net: nn.Module, columns: float = 1.0, share: float = 0.5) -> nn.Module:
    """Zero a share of the filters inside every residual block, with what BatchNorm would add to them, and leave this
    share of the columns that then remain of each bottleneck's 3x3. In place.
    """
    for i, block in enumerate(m for m in net.modules() if isinstance(m, _Bottleneck | _Basic)):
        inner = [(block.conv1, block.bn1)] + ([(block.conv2, block.bn2)] if isinstance(block, _Bottleneck) else [])
        gone: list[Tensor] = []
        with torch.no_grad():
            for j, (conv, norm) in enumerate(inner):
                generator = torch.Generator().manual_seed(100 * i + j)
                gone.append(torch.randperm(conv.out_channels, generator=generator)[: round(share * conv.out_channels)])
                for t in (conv.weight, norm.weight, norm.bias):
                    t[gone[-1]] = 0
            if columns < 1:
                conv = block.conv2
                alive = torch.ones(conv.in_channels, dtype=torch.bool)
                alive[gone[0]] = False
                w = conv.weight.view(conv.out_channels, conv.in_channels, -1)
                n = int(alive.sum()) * w.shape[2]
                generator = torch.Generator().manual_seed(100 * i + 50)
                mask = torch.zeros(n)
                mask[torch.randperm(n, generator=generator)[: round(columns * n)]] = 1
                w[:, alive] *= mask.view(-1, w.shape[2])
    return net


def ssl_pattern_(net: nn.Module, path: Path) -> nn.Module:
    """Give the AlexNet convolutions the trained weights, and so the zero filters and columns, of structured sparsity
    learning (Wen et al., 2016), from an .npz of conv1 to conv5. In place.
    """
    import numpy as np

    weights = np.load(path)
    with torch.no_grad():
        for name, conv in convs(net).items():
            conv.weight.copy_(torch.from_numpy(weights[name]))
            if conv.bias is not None:
                conv.bias.mul_(conv.weight.flatten(1).any(1))
    return net


def multiply_adds(net: nn.Module, x: Tensor) -> int:
    """Of convolutions and linear layers, for this input."""
    total = 0

    def count(m: nn.Conv2d | nn.Linear, _args: object, y: Tensor) -> None:
        nonlocal total
        total += m.weight.numel() * (y[0, 0].numel() if y.dim() == 4 else 1) * y.shape[0]

    hooks = [m.register_forward_hook(count) for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    with torch.no_grad():
        net(x)
    for hook in hooks:
        hook.remove()
    return total
