"""The loss of each example, and how it changes over the first epochs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bezoar.core.examples import ExampleSource
from bezoar.core.run import Run
from bezoar.core.surgery import frozen, logits
from bezoar.ops.augment import as_float

#: Images of one forward pass without gradients.
_CHUNK = 256
_CROSS_ENTROPY = partial(F.cross_entropy, reduction="none")


def losses_of(
    model: nn.Module,
    examples: ExampleSource,
    run: Run,
    told: Callable[[int, int], None] | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] = _CROSS_ENTROPY,
) -> Tensor:
    """``(N,)`` float32 loss of each example, in eval mode and without augmentation; the model stays as it is.

    Args:
        model: To be asked.
        examples: Read a few at a time.
        run: Device and time.
        told: Told of examples done and in all.
        loss: ``(B,)`` of ``(B, K)`` logits and ``(B,)`` labels; the cross-entropy by default.
    """
    labels = examples.labels
    losses = torch.empty(len(labels))
    with frozen(model), torch.no_grad():
        for rows in torch.split(torch.arange(len(labels)), _CHUNK):
            run.check()
            out = logits(model, as_float(examples.take(rows)).to(run.device))
            losses[rows] = loss(out.float(), labels[rows].to(run.device)).cpu()
            if told is not None:
                told(int(rows[-1]) + 1, len(labels))
    return losses


class Curves:
    """Loss of each example before and after each of the first epochs: a ``.npy`` file that is written row by row.

    An epoch that was lost, as when the file was deleted under a run that was killed, is NaN.

    Args:
        rows, count: Shape of the table.
        path: The file; None keeps the table in memory.
    """

    def __init__(self, rows: int, count: int, path: Path | None) -> None:
        self.table = torch.full((rows, count), float("nan")) if path is None else _mapped(path, (rows, count))

    def record(self, done: int, losses: Tensor) -> None:
        """Keep the losses ``(N,)`` after so many epochs."""
        self.table[done] = losses


def _mapped(path: Path, shape: tuple[int, int]) -> Tensor:
    try:
        old = np.lib.format.open_memmap(path, mode="r+")
        if old.shape == shape and old.dtype == np.float32:
            return torch.from_numpy(old)
    except (OSError, ValueError):
        pass
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    fresh = np.lib.format.open_memmap(part, mode="w+", dtype=np.float32, shape=shape)
    for row in fresh:
        row[:] = np.nan
    fresh.flush()
    part.replace(path)
    return torch.from_numpy(fresh)
