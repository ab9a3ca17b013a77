"""Networks for the recipes: a residual net for 8x8 digits, Caffe's LeNet-5, and the ResNets for CIFAR-10."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import Error


class ModelError(Error, ValueError):
    """A model's name or arguments are not what was wanted."""


class ResidualBlock(nn.Module):
    """conv3x3 - BN - ReLU - conv3x3 - BN, added to a shortcut, ReLU (He et al., CVPR 2016).

    shortcut "A": subsample and pad with zero channels; "B": 1x1 conv and BN where the shape changes; identity where it
    does not.
    """

    def __init__(self, c_in: int, c_out: int, stride: int = 1, shortcut: str = "B") -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or c_in != c_out:
            if shortcut == "A":
                self.shortcut = PadShortcut(c_in, c_out, stride)
            else:
                self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class PadShortcut(nn.Module):
    """Option A of He et al.: every stride-th pixel, zero channels on both sides; no weights."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.stride, self.before = stride, (c_out - c_in) // 2
        self.after = c_out - c_in - self.before

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


class DigitsResNet(nn.Module):
    """Residual net for 8x8 grey images: a first conv, two blocks (the second halves the map), average pooling, linear.

    With the default widths 97,680 conv weights and 2.26 million multiply-adds. Input [N, 1, 8, 8], output [N, classes].
    """

    def __init__(self, stem: int = 16, width: int = 32, deep: int = 80, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, stem, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.block1 = ResidualBlock(stem, width)
        self.block2 = ResidualBlock(width, deep, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(deep, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.block2(self.block1(x))
        return self.linear(torch.flatten(self.pool(x), 1))


class LeNet5(nn.Module):
    """Caffe's LeNet-5: conv 20, conv 50, each max-pooled, linear 500 and 10. Input [N, 1, 28, 28]; 430,500 weights."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.pool2 = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(800, 500)
        self.fc2 = nn.Linear(500, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool2(self.conv2(self.pool1(self.conv1(x))))
        return self.fc2(F.relu(self.fc1(torch.flatten(x, 1))))


class CifarResNet(nn.Module):
    """ResNet-(6n+2) for 32x32 RGB (He et al., section 4.2): three stages of n blocks, widths 16, 32, 64."""

    def __init__(self, depth: int = 20, shortcut: str = "A", classes: int = 10) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ModelError(f"CifarResNet: depth got {depth}, wanted 6n+2 (20, 32, 44, 56)")
        if shortcut not in ("A", "B"):
            raise ModelError(f"CifarResNet: shortcut got {shortcut!r}, wanted 'A' or 'B'")
        n = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, n, 1, shortcut)
        self.layer2 = _stage(16, 32, n, 2, shortcut)
        self.layer3 = _stage(32, 64, n, 2, shortcut)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(64, classes)
        _he_init(self)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(torch.flatten(self.pool(x), 1))


class ResNet18(nn.Module):
    """ResNet-18 with a 3x3 first conv, for 32x32 RGB: four stages of two blocks, widths w, 2w, 4w, 8w (w = 64)."""

    def __init__(self, width: int = 64, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(width, width, 2, 1, "B")
        self.layer2 = _stage(width, 2 * width, 2, 2, "B")
        self.layer3 = _stage(2 * width, 4 * width, 2, 2, "B")
        self.layer4 = _stage(4 * width, 8 * width, 2, 2, "B")
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(8 * width, classes)
        _he_init(self)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.linear(torch.flatten(self.pool(x), 1))


def _stage(c_in: int, c_out: int, n: int, stride: int, shortcut: str) -> nn.Sequential:
    first = ResidualBlock(c_in, c_out, stride, shortcut)
    return nn.Sequential(first, *(ResidualBlock(c_out, c_out) for _ in range(n - 1)))


def _he_init(model: nn.Module) -> None:
    for m in model.modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(m.weight)


MODELS: dict[str, Callable[..., nn.Module]] = {
    "digits-resnet": DigitsResNet,
    "lenet5": LeNet5,
    "cifar-resnet": CifarResNet,
    "resnet18": ResNet18,
}


def build(name: str, args: Mapping[str, Any] | None = None) -> nn.Module:
    """A network by name, or by "module:function" for one's own; args are its keyword arguments.

    Raises ModelError, or DataError where the module cannot be imported.
    """
    if ":" in name:
        from .data import import_function

        make: Callable[..., Any] = import_function("model.name", name)
    elif name in MODELS:
        make = MODELS[name]
    else:
        raise ModelError(f"model.name: got {name!r}, wanted one of {', '.join(MODELS)} or module:function")
    try:
        model = make(**dict(args or {}))
    except TypeError as e:
        raise ModelError(f"model.args: got {dict(args or {})}, which {name} does not take: {e}") from e
    if not isinstance(model, nn.Module):
        raise ModelError(f"model.name: {name} returned a {type(model).__name__}, wanted a torch.nn.Module")
    return model
