"""Residual networks in their CIFAR form.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, and "Identity Mappings in Deep Residual
Networks", ECCV 2016. Parameter names follow the two public families of CIFAR checkpoints: ``layer1.0.shortcut.0`` with
a projection shortcut (ResNet-18, PreActResNet-18), and the parameter-free shortcut of ResNet-20 to ResNet-110.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, each followed by BatchNorm, with a projection shortcut where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


class PreActBlock(nn.Module):
    """The same with BatchNorm and ReLU before each convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = self.shortcut(out) if hasattr(self, "shortcut") else x
        out = self.conv2(F.relu(self.bn2(self.conv1(out))))
        result: Tensor = out + shortcut
        return result


class PaddedBlock(BasicBlock):
    """:class:`BasicBlock` whose shortcut has no parameters: every second pixel, new channels zero (option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__(inputs, outputs, stride)
        self.shortcut = nn.Sequential()
        self.stride, self.extra = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride != 1 or self.extra:
            half = self.extra // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, self.extra - half))
        return F.relu(out + x)


def _stage(block: type[nn.Module], inputs: int, outputs: int, depth: int, stride: int) -> nn.Sequential:
    strides = [stride] + [1] * (depth - 1)
    return nn.Sequential(*(block(inputs if i == 0 else outputs, outputs, s) for i, s in enumerate(strides)))


class ResNet(nn.Module):
    """ResNet-18 for 32x32 images: 3x3 stem, four stages, no initial pooling."""

    def __init__(self, num_classes: int = 10, channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = _stage(BasicBlock, 64, 64, 2, 1)
        self.layer2 = _stage(BasicBlock, 64, 128, 2, 2)
        self.layer3 = _stage(BasicBlock, 128, 256, 2, 2)
        self.layer4 = _stage(BasicBlock, 256, 512, 2, 2)
        self.linear = nn.Linear(512, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        logits: Tensor = self.linear(torch.flatten(F.adaptive_avg_pool2d(out, 1), 1))
        return logits


class PreActResNet(nn.Module):
    """PreActResNet-18 for 32x32 images, as in the public backdoor benchmarks (no BatchNorm after the last stage)."""

    def __init__(self, num_classes: int = 10, channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        self.layer1 = _stage(PreActBlock, 64, 64, 2, 1)
        self.layer2 = _stage(PreActBlock, 64, 128, 2, 2)
        self.layer3 = _stage(PreActBlock, 128, 256, 2, 2)
        self.layer4 = _stage(PreActBlock, 256, 512, 2, 2)
        self.linear = nn.Linear(512, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        logits: Tensor = self.linear(torch.flatten(F.adaptive_avg_pool2d(out, 1), 1))
        return logits


class CifarResNet(nn.Module):
    """The thin ResNet-``depth`` of He et al. 2016, section 4.2 (ResNet-20, -32, -44, -56, -110).

    Args:
        depth: 6n+2 layers.
        num_classes: Number of labels.
        channels: Colour channels of the input.
    """

    def __init__(self, depth: int = 20, num_classes: int = 10, channels: int = 3) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"CifarResNet depth must be 6n+2 and at least 8, got {depth}")
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(PaddedBlock, 16, 16, blocks, 1)
        self.layer2 = _stage(PaddedBlock, 16, 32, blocks, 2)
        self.layer3 = _stage(PaddedBlock, 32, 64, blocks, 2)
        self.linear = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        logits: Tensor = self.linear(torch.flatten(F.adaptive_avg_pool2d(out, 1), 1))
        return logits
