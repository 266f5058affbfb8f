"""VGG networks for small images.

Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015.
"""

import torch
from torch import Tensor, nn

_PLANS: dict[int, tuple[int, ...]] = {  # output channels of each convolution, 0 for a pooling layer
    11: (64, 0, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0),
    13: (64, 64, 0, 128, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0),
    16: (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0),
    19: (64, 64, 0, 128, 128, 0, 256, 256, 256, 256, 0, 512, 512, 512, 512, 0, 512, 512, 512, 512, 0),
}


class VGG(nn.Module):
    """VGG-``depth`` with one linear layer on top, the usual CIFAR form.

    Args:
        depth: 11, 13, 16 or 19.
        num_classes: Number of labels.
        channels: Colour channels of the input.
        batch_norm: Whether each convolution is followed by BatchNorm.
    """

    def __init__(self, depth: int = 16, num_classes: int = 10, channels: int = 3, batch_norm: bool = True) -> None:
        super().__init__()
        if depth not in _PLANS:
            raise ValueError(f"VGG depth must be one of {sorted(_PLANS)}, got {depth}")
        layers: list[nn.Module] = []
        for width in _PLANS[depth]:
            if width == 0:
                layers.append(nn.MaxPool2d(2))
                continue
            layers.append(nn.Conv2d(channels, width, 3, padding=1))
            if batch_norm:
                layers.append(nn.BatchNorm2d(width))
            layers.append(nn.ReLU(inplace=True))
            channels = width
        layers.append(nn.AdaptiveAvgPool2d(1))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(512, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(torch.flatten(self.features(x), 1))
        return logits


class SmallVGG(nn.Module):
    """Six convolutions with BatchNorm and ELU in three stages; the net of the checkpoints published with I-BAU.

    Args:
        num_classes: Number of labels.
        channels: Colour channels of the input.
        size: Height and width of the input, in pixels; a multiple of 8.
    """

    def __init__(self, num_classes: int = 10, channels: int = 3, size: int = 32) -> None:
        super().__init__()
        if size % 8:
            raise ValueError(f"SmallVGG size must be a multiple of 8, got {size}")
        layers: list[nn.Module] = []
        for width, dropout in ((32, 0.3), (64, 0.4), (128, 0.4)):
            for inputs in (channels, width):
                layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ELU()]
            layers += [nn.MaxPool2d(2), nn.Dropout(dropout)]
            channels = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(128 * (size // 8) ** 2, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(torch.flatten(self.features(x), 1))
        return logits
