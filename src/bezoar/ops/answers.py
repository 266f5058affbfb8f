"""What a model says of many images, a few at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from bezoar.core.examples import ExampleSource
from bezoar.core.surgery import frozen, logits
from bezoar.ops.augment import as_float


@torch.no_grad()
def answers(
    model: nn.Module, images: Tensor | ExampleSource, device: torch.device | None = None, batch: int = 256
) -> Tensor:
    """``(N,)`` labels that a model gives, in eval mode and on the CPU; the model is left as it was.

    Args:
        model: To be asked.
        images: ``(N, C, H, W)`` images, uint8 in [0, 255] or float in [0, 1], or a source that is read batch by batch.
        device: Where the model is; that of its first parameter by default.
        batch: Images of one forward pass.
    """
    device = device or next(model.parameters()).device
    with frozen(model):
        return torch.cat([logits(model, as_float(part).to(device)).argmax(1).cpu() for part in _batches(images, batch)])


def _batches(images: Tensor | ExampleSource, batch: int) -> Iterator[Tensor]:
    if isinstance(images, Tensor):
        yield from torch.split(images, batch)
    else:
        yield from (images.take(rows) for rows in torch.split(torch.arange(len(images.labels)), batch))
