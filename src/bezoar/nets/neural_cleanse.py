"""The small nets of Neural Cleanse (Wang et al., IEEE S&P 2019, Tables VII and VIII); none has BatchNorm."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MnistNet(nn.Module):
    """Two 5x5 convolutions with pooling and two linear layers (Table VII).

    Args:
        num_classes: Number of labels.
        channels: Colour channels of the input.
        size: Height and width of the input, in pixels; at least 16.
    """

    def __init__(self, num_classes: int = 10, channels: int = 1, size: int = 28) -> None:
        super().__init__()
        side = ((size - 4) // 2 - 4) // 2
        if side < 1:
            raise ValueError(f"MnistNet size must be at least 16, got {size}")
        self.conv1 = nn.Conv2d(channels, 16, 5)
        self.conv2 = nn.Conv2d(16, 32, 5)
        self.fc1 = nn.Linear(32 * side * side, 512)
        self.fc2 = nn.Linear(512, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = F.max_pool2d(F.relu(self.conv1(x)), 2)
        out = F.max_pool2d(F.relu(self.conv2(out)), 2)
        logits: Tensor = self.fc2(F.relu(self.fc1(torch.flatten(out, 1))))
        return logits


class GtsrbNet(nn.Module):
    """Six 3x3 convolutions in three stages with pooling and dropout, two linear layers (Table VIII).

    Args:
        num_classes: Number of labels.
        channels: Colour channels of the input.
        size: Height and width of the input, in pixels; at least 8.
    """

    def __init__(self, num_classes: int = 43, channels: int = 3, size: int = 32) -> None:
        super().__init__()
        if size < 8:
            raise ValueError(f"GtsrbNet size must be at least 8, got {size}")
        layers: list[nn.Module] = []
        for width in (32, 64, 128):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.2)]
            channels = width
        self.features = nn.Sequential(*layers)
        self.fc1 = nn.Linear(128 * (size // 8) ** 2, 512)
        self.dropout = nn.Dropout(0.5)
        self.fc2 = nn.Linear(512, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.flatten(self.features(x), 1)
        logits: Tensor = self.fc2(self.dropout(F.relu(self.fc1(out))))
        return logits
