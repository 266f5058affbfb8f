"""A small plain convolutional net, with or without BatchNorm, for quick studies."""

import torch
from torch import Tensor, nn


class ConvNet(nn.Module):
    """Five 3x3 convolutions, three of stride 2, global average pooling and one linear layer.

    With width 16 it has some 70,000 parameters, and 60,000 small images take it ten seconds on one core.

    Args:
        width: Channels of the first stage; the second has twice, the third four times as many.
        num_classes: Number of labels.
        channels: Colour channels of the input.
        norm: Whether a BatchNorm follows each convolution.
    """

    def __init__(self, width: int = 16, num_classes: int = 10, channels: int = 3, norm: bool = False) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for out, stride in ((width, 2), (2 * width, 1), (2 * width, 2), (4 * width, 1), (4 * width, 2)):
            layers.append(nn.Conv2d(channels, out, 3, stride=stride, padding=1, bias=not norm))
            layers += [nn.BatchNorm2d(out), nn.ReLU()] if norm else [nn.ReLU()]
            channels = out
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(torch.flatten(nn.functional.adaptive_avg_pool2d(self.features(x), 1), 1))
        return logits


def student_net(num_classes: int, channels: int) -> ConvNet:
    """The net of a student of a model: large enough for the natural features of small images, and quickly taught."""
    return ConvNet(24, num_classes, channels, norm=True)
