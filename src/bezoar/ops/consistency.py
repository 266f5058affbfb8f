"""How far the features of an image move when it is turned and shifted: poisoned ones move further."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bezoar.core.examples import ExampleSource
from bezoar.core.run import Run
from bezoar.core.surgery import frozen
from bezoar.ops.augment import as_float
from bezoar.ops.features import device_of, penultimate
from bezoar.ops.head import find_head


def turned_and_shifted(x: Tensor, degrees: float, shift: float, generator: torch.Generator) -> Tensor:
    """Each image is turned about its centre, and then shifted; what comes in from outside is 0.

    Args:
        x: ``(B, C, H, W)`` floats.
        degrees: It is turned by up to this many degrees either way.
        shift: It is shifted by up to this share of its height and width either way.
        generator: A CPU generator.
    """
    draws = 2 * torch.rand(3, len(x), generator=generator) - 1
    angle, down, right = draws[0] * torch.pi * degrees / 180, draws[1] * shift, draws[2] * shift
    height, width = x.shape[2:]
    cos, sin = angle.cos(), angle.sin()
    ratio = height / width
    # From places of the result to places of the image, both from -1 to 1: the shift is undone first, then the turn.
    linear = torch.stack([torch.stack([cos, -sin * ratio], 1), torch.stack([sin / ratio, cos], 1)], 1)
    moved = torch.stack([2 * right, 2 * down], 1)
    matrix = torch.cat([linear, -(linear @ moved[:, :, None])], 2).to(x.device, x.dtype)
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="nearest", padding_mode="zeros", align_corners=False)


def consistency(
    model: nn.Module,
    examples: ExampleSource,
    run: Run,
    *,
    degrees: float,
    shift: float,
    repeats: int = 1,
    batch: int = 256,
) -> Tensor:
    """``(N,)`` float64: mean square by which the features of each example move, over some draws of a transformation.

    Args:
        model: Left as it was; its features are what goes into its last layer.
        examples: Read ``batch`` at a time.
        run: Time, progress, and the seed: each example has draws of its own, whatever the batches are.
        degrees, shift: See :func:`turned_and_shifted`.
        repeats: Draws for each example.
        batch: Examples at a time.
    """
    count = len(examples.labels)
    found = torch.zeros(count, dtype=torch.float64)
    generator = run.generator("consistency")
    with frozen(model):
        head = find_head(model, as_float(examples.take(torch.arange(1))).to(device_of(model)))
        for rows in torch.split(torch.arange(count), batch):
            run.check()
            x = as_float(examples.take(rows))
            still = penultimate(model, head, x).double()
            for _ in range(repeats):
                moved = penultimate(model, head, turned_and_shifted(x, degrees, shift, generator)).double()
                found[rows] += ((still - moved) ** 2).mean(1) / repeats
            run.progress.report("transform", int(rows[-1]) + 1, count, "")
    return found
