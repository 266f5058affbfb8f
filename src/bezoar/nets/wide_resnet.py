"""Wide residual networks for small images.

Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016. Parameter names are those of the checkpoints published
with NAD (Li et al., ICLR 2021), so that these load without renaming.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Pre-activation block: BN, ReLU, 3x3 convolution, twice, and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.dropout = dropout
        self.convShortcut = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        activated = self.relu1(self.bn1(x))
        out = self.relu2(self.bn2(self.conv1(activated)))
        if self.dropout > 0:
            out = F.dropout(out, p=self.dropout, training=self.training)
        out = self.conv2(out)
        # Where the width changes, the shortcut starts after the activation, as in the published code.
        shortcut = x if self.convShortcut is None else self.convShortcut(activated)
        result: Tensor = shortcut + out
        return result


class NetworkBlock(nn.Module):
    """A stage: ``depth`` blocks of one width, the first with the stride."""

    def __init__(self, depth: int, inputs: int, outputs: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.layer = nn.Sequential(
            *(
                BasicBlock(inputs if i == 0 else outputs, outputs, stride if i == 0 else 1, dropout)
                for i in range(depth)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


class WideResNet(nn.Module):
    """WRN-``depth``-``width``.

    Args:
        depth: 6n+4 layers, at least 10.
        width: Widening factor, at least 1.
        num_classes: Number of labels.
        channels: Colour channels of the input.
        dropout: Dropout rate inside the blocks, in [0, 1).
    """

    def __init__(
        self, depth: int = 16, width: int = 1, num_classes: int = 10, channels: int = 3, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"WideResNet depth must be 6n+4 and at least 10, got {depth}")
        blocks = (depth - 4) // 6
        widths = [16, 16 * width, 32 * width, 64 * width]
        self.conv1 = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        self.block1 = NetworkBlock(blocks, widths[0], widths[1], 1, dropout)
        self.block2 = NetworkBlock(blocks, widths[1], widths[2], 2, dropout)
        self.block3 = NetworkBlock(blocks, widths[2], widths[3], 2, dropout)
        self.bn1 = nn.BatchNorm2d(widths[3])
        self.relu = nn.ReLU()
        self.fc = nn.Linear(widths[3], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.block3(self.block2(self.block1(self.conv1(x))))
        out = self.relu(self.bn1(out))
        logits: Tensor = self.fc(torch.flatten(F.adaptive_avg_pool2d(out, 1), 1))
        return logits
