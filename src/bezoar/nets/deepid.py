"""DeepID (Sun et al., CVPR 2014), the face net of Neural Cleanse's YouTube Face task (Table IX)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DeepID(nn.Module):
    """Four convolutions; the third and the fourth each feed a linear layer, and the two are added.

    Args:
        num_classes: Number of labels.
        channels: Colour channels of the input.
        height, width: Size of the input, in pixels.
    """

    def __init__(self, num_classes: int = 1283, channels: int = 3, height: int = 55, width: int = 47) -> None:
        super().__init__()
        self.conv_1 = nn.Conv2d(channels, 20, 4)
        self.conv_2 = nn.Conv2d(20, 40, 3)
        self.conv_3 = nn.Conv2d(40, 60, 3)
        self.conv_4 = nn.Conv2d(60, 80, 2)
        # Each convolution cuts off its size less one, each pooling halves.
        rows, columns = ((((side - 3) // 2 - 2) // 2 - 2) // 2 for side in (height, width))
        self.fc_1 = nn.Linear(60 * rows * columns, 160)
        self.fc_2 = nn.Linear(80 * (rows - 1) * (columns - 1), 160)
        self.output = nn.Linear(160, num_classes)

    def _maps(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out = F.max_pool2d(F.relu(self.conv_1(x)), 2)
        out = F.max_pool2d(F.relu(self.conv_2(out)), 2)
        third = F.max_pool2d(F.relu(self.conv_3(out)), 2)
        return third, F.relu(self.conv_4(third))

    def forward(self, x: Tensor) -> Tensor:
        third, fourth = self._maps(x)
        # Height, width, channel order: the published weights come from a channels-last framework.
        a, b = (torch.flatten(f.permute(0, 2, 3, 1), 1) for f in (third, fourth))
        logits: Tensor = self.output(F.relu(self.fc_1(a) + self.fc_2(b)))
        return logits
