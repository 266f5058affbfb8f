"""One training loop for everything that trains: victims, fine-tuning, unlearning."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bezoar.core.errors import SettingError
from bezoar.core.examples import ExampleSource
from bezoar.core.run import Run
from bezoar.ops._checkpoint import Checkpoint, digest, settings
from bezoar.ops._optim import Stepper
from bezoar.ops.augment import as_float, augment, mixup
from bezoar.ops.objective import Batch, Objective
from bezoar.ops.parallel import ALONE, Worker, fit_parallel
from bezoar.ops.recipe import Recipe

__all__ = ["Batch", "Objective", "Progress", "Recipe", "Stamp", "as_float", "augment", "fit", "tell"]


#: Changes a batch of images before the step; the generator is the run's own.
Stamp = Callable[[Tensor, torch.Generator], Tensor]
#: Told after each step: steps done, steps in all, loss of the step.
Progress = Callable[[int, int, float], None]


def tell(run: Run, phase: str, part: int = 0, parts: int = 1) -> Progress:
    """Progress of one training, or of one of several alike, which also ends it when the time is over."""

    def told(done: int, total: int, loss: float) -> None:
        run.check()
        run.progress.report(phase, part * total + done, parts * total, f"loss {loss:.3f}")

    return told


def fit(
    model: nn.Module,
    x: Tensor | ExampleSource,
    y: Tensor,
    recipe: Recipe,
    *,
    seed: int = 0,
    stamp: Stamp | None = None,
    objective: Objective | None = None,
    progress: Progress | None = None,
    checkpoint: Path | None = None,
    devices: int = 1,
    worker: Worker = ALONE,
) -> list[float]:
    """Train ``model`` in place and leave it in eval mode.

    Args:
        model: Takes ``(B, C, H, W)`` in [0, 1], gives ``(B, K)`` logits; parameters that need no gradient stay fixed.
        x: ``(N, C, H, W)`` images in [0, 1], or uint8 in [0, 255]; or a source of them, read a batch at a time.
        y: ``(N,)`` labels.
        recipe: Optimiser, schedule and augmentation.
        seed: Order of the examples and augmentation.
        stamp: Changes each batch after the augmentation, on the CPU.
        objective: What to minimise instead of the cross-entropy on the augmented (and stamped) batch.
        progress: Called after each step.
        checkpoint: File that a killed run goes on from, with the same final weights (on CUDA as far as its kernels
            repeat themselves); a finished one is read back. Written after each epoch and every
            ``BEZOAR_CHECKPOINT_SECONDS`` (5); a damaged one is as good as none.
        devices: At least 1; more share each batch among so many processes, see :mod:`bezoar.ops.parallel`.
        worker: Which of these processes this is; not for callers.

    Returns:
        Mean loss of each epoch.

    Raises:
        SettingError: The checkpoint is of another training, or the settings do not go together.
        MissingExtra: The augmentation needs a library that is missing.
    """
    if objective is not None and recipe.mixup:
        raise SettingError("MixUp mixes labels, which a training objective of its own does not know", "Set mixup to 0")
    if devices != 1:
        if objective is not None or stamp is not None:
            raise SettingError("only plain training can use several devices", "Set devices to 1")
        if not isinstance(x, Tensor):
            raise SettingError("only images in memory can be shared by several devices", "Set devices to 1")
        return fit_parallel(model, x, y, recipe, devices, seed=seed, progress=progress, checkpoint=checkpoint)
    identity = {} if checkpoint is None else _identity(model, x, y, recipe, seed, stamp, objective)
    kept = Checkpoint(checkpoint, identity, writes=worker.rank == 0)
    with _random_state(next(model.parameters()).device, seed):
        training = _Training(model, x, y, recipe, seed, stamp, objective, worker)
        state = kept.load()
        if state is not None:
            training.load_state_dict(state)
        training.run(kept, progress)
    model.eval()
    return training.losses


def _identity(
    model: nn.Module,
    x: Tensor | ExampleSource,
    y: Tensor,
    recipe: Recipe,
    seed: int,
    stamp: Stamp | None,
    objective: Objective | None,
) -> dict[str, str]:
    return {
        "recipe": digest(recipe),
        "seed": digest(seed),
        "images": digest(x),
        "labels": digest(y),
        "network or first weights": digest(model),
        "stamp": digest(stamp),
        "objective": digest(settings(objective)),
    }


@contextmanager
def _random_state(device: torch.device, seed: int) -> Iterator[None]:
    # Dropout draws from the global generator of the device.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@dataclass
class _Training:
    """One training and where it stands."""

    model: nn.Module
    x: Tensor | ExampleSource
    y: Tensor
    recipe: Recipe
    seed: int
    stamp: Stamp | None
    objective: Objective | None
    worker: Worker
    losses: list[float] = field(default_factory=list)
    done: int = 0  # steps in all
    at: int = 0  # steps in this epoch
    summed: float = 0.0  # loss of this epoch
    order: Tensor | None = None  # of the examples in this epoch; None between epochs

    def __post_init__(self) -> None:
        self.device = next(self.model.parameters()).device
        self.generator = torch.Generator().manual_seed(self.seed)
        self.total = self.recipe.epochs * -(-len(self.y) // self.recipe.batch)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.stepper = Stepper(parameters, self.recipe, self.total, self.device)
        self.model.train()

    def run(self, kept: Checkpoint, progress: Progress | None) -> None:
        network = self.worker.wrap(self.model)
        while len(self.losses) < self.recipe.epochs:
            if self.order is None:
                self._start_epoch()
            assert self.order is not None
            for index in self._batches(self.order)[self.at :]:
                loss = self._step(network, index)
                self.done, self.at, self.summed = self.done + 1, self.at + 1, self.summed + loss * len(index)
                kept.save(self.state_dict)
                if progress is not None:
                    progress(self.done, self.total, loss)
            self.losses.append(self.summed / len(self.y))
            self.at, self.summed, self.order = 0, 0.0, None
            kept.save(self.state_dict, now=True)

    def _start_epoch(self) -> None:
        if self.objective is not None:
            with warnings.catch_warnings():
                # Right after a restart, torch takes a schedule's step for one that came before the optimiser's.
                warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler.step\(\)` before")
                self.objective.epoch(self.model, len(self.losses), self.recipe.epochs)
        self.order = torch.randperm(len(self.y), generator=self.generator)

    def _batches(self, order: Tensor) -> list[Tensor]:
        parts = [self.worker.whole_shares(part) for part in torch.split(order, self.recipe.batch)]
        # BatchNorm cannot train on a single example.
        return [part for part in parts if len(part) > self.worker.world or len(order) == 1]

    def _images(self, index: Tensor) -> Tensor:
        return self.x[index] if isinstance(self.x, Tensor) else self.x.take(index)

    def _step(self, network: nn.Module, index: Tensor) -> float:
        with self.stepper.autocast():
            loss = self._plain_loss(network, index) if self.objective is None else self._own_loss(self.objective, index)
        self.stepper.step(loss)
        return self.worker.mean(loss.detach())

    def _own_loss(self, objective: Objective, index: Tensor) -> Tensor:
        images = as_float(self._images(index).to(self.device))
        change = partial(augment, recipe=self.recipe, generator=self.generator)
        batch = Batch(images, self.y[index].to(self.device), index, change, self.generator)
        return objective.loss(self.model, batch)

    def _plain_loss(self, network: nn.Module, index: Tensor) -> Tensor:
        images, y = self._images(index), self.y[index].to(self.device)
        if self.stamp is None:
            images = images.to(self.device)
        images = augment(as_float(images), self.recipe, self.generator)
        if self.stamp is not None:
            images = self.stamp(images, self.generator)
        images = images.to(self.device, memory_format=torch.channels_last)
        if not self.recipe.mixup:
            return self._cross_entropy(network(self.worker.share(images)), y)
        images, pairs, weight = mixup(images, self.recipe.mixup, self.generator)
        logits, other = network(self.worker.share(images)), y[pairs.to(self.device)]
        return weight * self._cross_entropy(logits, y) + (1 - weight) * self._cross_entropy(logits, other)

    def _cross_entropy(self, logits: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits, self.worker.share(y), label_smoothing=self.recipe.label_smoothing)

    def state_dict(self) -> dict[str, Any]:
        """All that the further course depends on; when the training is over, what came of it."""
        finished = len(self.losses) == self.recipe.epochs
        result = {
            "finished": finished,
            "model": self.model.state_dict(),
            "objective": None if self.objective is None else self.objective.state_dict(),
            "place": {"losses": self.losses, "done": self.done, "at": self.at, "summed": self.summed},
        }
        return result if finished else result | self._means()

    def _means(self) -> dict[str, Any]:
        cuda = self.device.type == "cuda"
        return {
            "order": self.order,
            "stepper": self.stepper.state_dict(),
            "generator": self.generator.get_state(),
            "global": torch.get_rng_state(),
            "device": torch.cuda.get_rng_state(self.device) if cuda else None,
            # An objective may set these for an epoch.
            "modes": [module.training for module in self.model.modules()],
            "trained": [parameter.requires_grad for parameter in self.model.parameters()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        if self.objective is not None:
            self.objective.load_state_dict(state["objective"])
        place = state["place"]
        self.losses, self.done, self.at, self.summed = (place[name] for name in ("losses", "done", "at", "summed"))
        if not state["finished"]:
            self._load_means(state)

    def _load_means(self, state: dict[str, Any]) -> None:
        self.order = state["order"]
        self.stepper.load_state_dict(state["stepper"])
        for module, mode in zip(self.model.modules(), state["modes"], strict=True):
            module.training = mode
        for parameter, trained in zip(self.model.parameters(), state["trained"], strict=True):
            parameter.requires_grad_(trained)
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["global"])
        if state["device"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["device"], self.device)
