"""What trainers share: the settings of a training, its start, its progress, and the loss of each example."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bezoar.core.examples import ExampleSource
from bezoar.core.run import Run
from bezoar.core.surgery import frozen, logits
from bezoar.core.training import Trainer
from bezoar.ops.answers import answers
from bezoar.ops.augment import as_float
from bezoar.ops.fit import Progress
from bezoar.ops.normalisation import batch_norms
from bezoar.ops.recipe import Recipe

#: Images of one forward pass without gradients.
_CHUNK = 256


@dataclass(frozen=True, kw_only=True)
class Settings(Trainer):
    """Settings of the optimiser and of the augmentation."""

    batch: int = 128
    lr: float | None = None
    optimizer: Literal["sgd", "adam"] | None = None
    momentum: float = 0.9
    weight_decay: float = 1e-4
    pad: int = 4
    flip: bool = False
    cutout: int = 0

    def __post_init__(self) -> None:
        self.require("batch", self.batch >= 1, "at least 1")
        self.require("lr", self.lr is None or self.lr > 0, "above 0, or None")
        self.require("optimizer", self.optimizer in (None, "sgd", "adam"), "sgd or adam, or None")
        self.require("momentum", 0 <= self.momentum < 1, "in [0, 1)")
        for name in ("weight_decay", "pad", "cutout"):
            self.require(name, getattr(self, name) >= 0, "at least 0")

    def recipe(self, model: nn.Module, **more: Any) -> Recipe:
        """A recipe without augmentation: SGD at 0.1 for a net with batch statistics, else Adam at 1e-3.

        Args:
            model: To be trained.
            **more: Further settings of the recipe; those given here come first.
        """
        optimizer = self.optimizer or ("sgd" if batch_norms(model) else "adam")
        usual = 1e-3 if optimizer == "adam" else 0.1
        settings: dict[str, Any] = {
            "batch": self.batch,
            "lr": self.lr or usual,
            "optimizer": optimizer,
            "momentum": self.momentum,
            "weight_decay": self.weight_decay,
        }
        return Recipe(**settings | more)

    def augmentation(self) -> dict[str, Any]:
        """The recipe's settings of augmentation."""
        return {"pad": self.pad, "flip": self.flip, "cutout": self.cutout}


def tell(run: Run, phase: str, part: int = 0, parts: int = 1) -> Progress:
    """Progress of one training, or of one of several alike, which also ends it when the time is over."""

    def told(done: int, total: int, loss: float) -> None:
        run.check()
        run.progress.report(phase, part * total + done, parts * total, f"loss {loss:.3f}")

    return told


def kept(folder: Path | None, name: str) -> Path | None:
    """The checkpoint of one training."""
    return None if folder is None else folder / f"{name}.pt"


def losses_of(
    model: nn.Module, examples: ExampleSource, run: Run, told: Callable[[int, int], None] | None = None
) -> Tensor:
    """``(N,)`` float32 cross-entropy of each example, in eval mode and without augmentation; the model stays as it is.

    Args:
        model: To be asked.
        examples: Read a few at a time.
        run: Device and time.
        told: Told of examples done and in all.
    """
    labels = examples.labels
    losses = torch.empty(len(labels))
    with frozen(model), torch.no_grad():
        for rows in torch.split(torch.arange(len(labels)), _CHUNK):
            run.check()
            out = logits(model, as_float(examples.take(rows)).to(run.device))
            losses[rows] = F.cross_entropy(out.float(), labels[rows].to(run.device), reduction="none").cpu()
            if told is not None:
                told(int(rows[-1]) + 1, len(labels))
    return losses


def correct(model: nn.Module, examples: ExampleSource, run: Run) -> Tensor:
    """``(N,)`` bool: which examples the model gives their label, in eval mode; the model stays as it is."""
    return answers(model, examples, run.device) == examples.labels


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
