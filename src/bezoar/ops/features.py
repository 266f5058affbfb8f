"""What goes into the head of a network, for as many images as there are: never all of them in memory."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bezoar.core.errors import UnsupportedModel
from bezoar.core.examples import ExampleSource
from bezoar.core.results import write_atomic
from bezoar.core.run import Run
from bezoar.core.surgery import frozen
from bezoar.ops._checkpoint import digest
from bezoar.ops.augment import as_float
from bezoar.ops.head import find_head

_PROBES = 16  # images that tell a data set from another one of the same labels


def penultimate(model: nn.Module, head: nn.Module, x: Tensor) -> Tensor:
    """``(B, D)`` float32 what goes into the head, on the CPU; the mean over the places of a map.

    Args:
        model: In eval mode.
        head: See :func:`bezoar.ops.head.find_head`.
        x: ``(B, C, H, W)`` images, uint8 or float, anywhere.

    Raises:
        UnsupportedModel: The head did not run, or not once for each image.
    """
    caught: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _module, given: caught.append(given[0].detach()))
    try:
        with torch.no_grad():
            model(as_float(x).to(device_of(model)))
    finally:
        handle.remove()
    if not caught or len(caught[-1]) != len(x):
        raise UnsupportedModel(f"the head of {type(model).__name__} does not see one row for each image")
    given = caught[-1].float()
    if given.ndim == 4:
        given = given.mean((2, 3))
    elif given.ndim == 3:
        given = given.mean(1)
    return given.flatten(1).cpu()


def device_of(model: nn.Module) -> torch.device:
    """Where the model runs."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def read_features(
    model: nn.Module, examples: ExampleSource, run: Run, *, folder: Path | None = None, batch: int = 256
) -> Tensor:
    """``(N, D)`` float32 features of all examples, in their order.

    Args:
        model: Left as it was.
        examples: Read ``batch`` at a time.
        run: Progress, and time.
        folder: Where they are kept, mapped from disk; a killed run of the same model and data goes on there. None
            keeps them in memory.
        batch: Examples at a time.

    Raises:
        UnsupportedModel: See :func:`penultimate`.
        BudgetSpent: The time is over.
    """
    count = len(examples.labels)
    with frozen(model):
        first = examples.take(torch.arange(min(1, count)))
        head = find_head(model, as_float(first).to(device_of(model)))
        width = penultimate(model, head, first).shape[1]
        kept = _Kept(folder, count, width, _identity(model, examples) if folder else "")
        broken = 0
        for start in range(kept.done, count, batch):
            run.check()
            rows = torch.arange(start, min(start + batch, count))
            found = penultimate(model, head, examples.take(rows))
            wrong = ~torch.isfinite(found).all(1)
            broken += int(wrong.sum())
            kept.add(rows, found.masked_fill(wrong[:, None], 0.0), run.progress.every)
            run.progress.report("features", int(rows[-1]) + 1, count, "")
    if broken:
        run.warnings.append(f"{broken} examples have features that are not finite; they count as zero")
    return kept.finished()


def _identity(model: nn.Module, examples: ExampleSource) -> str:
    """Tells model and data from others; a source that has a hash is taken at its word."""
    known = getattr(examples, "sha256", None)
    probes = torch.linspace(0, max(len(examples.labels) - 1, 0), _PROBES).long()
    data = known if isinstance(known, str) else [examples.labels, examples.take(probes)]
    return digest([model, data, list(examples.shape)])


class _Kept:
    """Features in memory, or in a file beside which stands how many of them are there."""

    def __init__(self, folder: Path | None, count: int, width: int, identity: str) -> None:
        self.folder, self.done, self.last = folder, 0, time.monotonic()
        self.facts = {"identity": identity, "count": count, "width": width}
        self.rows: Any = None
        if folder is None:
            self.rows = np.empty((count, width), dtype=np.float32)
            return
        folder.mkdir(parents=True, exist_ok=True)
        self.file, self.state = folder / "features.npy", folder / "features.json"
        self.done = self._resumed()
        mode = "r+" if self.done else "w+"
        shape = None if self.done else (count, width)
        self.rows = np.lib.format.open_memmap(self.file, mode=mode, dtype=np.float32, shape=shape)

    def _resumed(self) -> int:
        try:
            found = json.loads(self.state.read_text(encoding="utf-8"))
            rows = np.load(self.file, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError):
            return 0
        same = isinstance(found, dict) and {key: found.get(key) for key in self.facts} == self.facts
        whole = rows.shape == (self.facts["count"], self.facts["width"]) and rows.dtype == np.float32
        return int(found.get("done", 0)) if same and whole else 0

    def add(self, rows: Tensor, features: Tensor, every: float) -> None:
        self.rows[int(rows[0]) : int(rows[-1]) + 1] = features.numpy()
        self.done = int(rows[-1]) + 1
        if self.folder is not None and time.monotonic() - self.last >= every:
            self._note()

    def finished(self) -> Tensor:
        if self.folder is not None:
            self._note()
        return torch.from_numpy(self.rows)

    def _note(self) -> None:
        self.rows.flush()
        write_atomic(self.state, json.dumps(self.facts | {"done": self.done}))
        self.last = time.monotonic()
