"""Differential evolution of boxes for one label, in rounds that can be interrupted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from scipy.optimize import differential_evolution
from scipy.stats.qmc import LatinHypercube
from torch import Tensor, nn

from bezoar.core.errors import BudgetSpent
from bezoar.core.method import Clean
from bezoar.core.run import Run, generator
from bezoar.core.surgery import logits
from bezoar.core.trigger import MaskedTrigger
from bezoar.scanners._boxes import Boxes, Genomes, Region

Strategy = Literal["rand1bin", "best1bin"]
# Images that a box must work on before it counts, and how many boxes of a round are tried on them.
_CHECKED, _TRIED = 128, 3
# Classes of size of the first boxes.
_CLASSES = 4
_PIXELS_PER_PASS = 256 * 32 * 32


class Oracle:
    """A model that only answers: how well boxes cause a label. Answers are counted in ``queries``.

    Args:
        model: Eval mode.
        clean: Clean examples.
        run: Device.
        boxes: What genomes mean.
    """

    def __init__(self, model: nn.Module, clean: Clean, run: Run, boxes: Boxes) -> None:
        self.model, self.clean, self.run, self.boxes = model, clean, run, boxes
        self.queries = 0

    def images(self, label: int, count: int, *key: object) -> Tensor:
        """Up to ``count`` images to work with, of other labels; the key draws them."""
        rows = torch.nonzero(self.clean.y != label).flatten()
        rows = rows if len(rows) else torch.arange(len(self.clean.y))
        return self.clean.x[rows[torch.randperm(len(rows), generator=generator(*key))[:count]]]

    @torch.no_grad()
    def answers(self, genomes: Genomes, x: Tensor) -> Iterator[Tensor]:
        """``(s, B, K)`` logits of images ``(B, C, H, W)`` that carry boxes, for a few boxes at a time."""
        x = x.to(self.run.device)
        for part in np.array_split(genomes, max(1, math.ceil(len(genomes) * x[:, 0].numel() / _PIXELS_PER_PASS))):
            mask, pattern = (t.to(x)[:, None] for t in self.boxes.decode(part))
            out = logits(self.model, (x[None] * (1 - mask) + pattern).flatten(0, 1)).float()
            self.queries += len(out)
            yield out.view(len(part), len(x), -1)

    def ask(self, genomes: Genomes, x: Tensor, label: int) -> tuple[Tensor, Tensor]:
        """``(S,)`` mean cross-entropy with the label and ``(S,)`` success of boxes stamped on ``(B, C, H, W)``."""
        found = [
            (-out.log_softmax(2)[:, :, label].mean(1).cpu(), (out.argmax(2) == label).float().mean(1).cpu())
            for out in self.answers(genomes, x)
        ]
        losses, rates = zip(*found, strict=True)
        return torch.cat(losses), torch.cat(rates)

    def screen(self, genomes: Genomes, count: int, *key: object) -> Tensor:
        """``(S, K)`` mean cross-entropy of boxes with each label, over images of other labels: one answer serves all.

        Args:
            genomes: Boxes.
            count: Images; the key draws them.
        """
        rows = torch.randperm(len(self.clean.x), generator=generator(*key))[:count]
        others = self.clean.y[rows, None] != torch.arange(self.clean.num_classes)
        weights = (others / others.sum(0).clamp(min=1)).to(self.run.device)
        found = []
        for out in self.answers(genomes, self.clean.x[rows]):
            self.run.check()
            found.append(-(out.log_softmax(2) * weights).sum(1).cpu())
        return torch.cat(found)


def energies(loss: Tensor, rate: Tensor, size: Tensor, pixels: int, reach: float) -> Genomes:
    """What the evolution makes small: any box that works before any that does not.

    Of boxes that work the smaller one, and of equal ones the surer; of others the one with the smaller loss.

    Args:
        loss, rate, size: ``(S,)`` cross-entropy, success and pixels.
        pixels: Those of the image.
        reach: Success from which on a box works.
    """
    surer = 1 - torch.exp(-loss.double())
    works = (size.double() + 0.5 * surer) / (pixels + 1)
    return torch.where(rate >= reach, works, 1 + loss.double().nan_to_num(1e9, posinf=1e9)).numpy()


@dataclass
class Evolution:
    """The running search for one label.

    Attributes:
        label: The label.
        population: ``(S, genes)`` boxes.
        region: Where boxes may lie.
        rounds: Rounds done.
        best: The smallest box that worked, or the fittest one of the last round.
        size: Pixels of the smallest box that worked; infinite where none did.
        fitness: Energy of the fittest box of the last round.
        dropped: Whether the search was given up, as the label cannot become the smallest.
    """

    label: int
    population: Genomes
    region: Region
    rounds: int
    best: Genomes
    size: float = float("inf")
    fitness: float = float("inf")
    dropped: bool = False

    @classmethod
    def start(cls, boxes: Boxes, label: int, population: Genomes) -> Evolution:
        """The search before its first round."""
        return cls(label, population, boxes.whole, 0, population[0])

    def advance(
        self,
        oracle: Oracle,
        *,
        seed: int,
        generations: int,
        batch: int,
        reach: float,
        strategy: Strategy,
        differential: float,
        crossover: float,
        check: Callable[[], None],
    ) -> None:
        """One round on new images. Nothing changes where ``check`` or the model raises in the middle."""
        boxes = oracle.boxes
        x = oracle.images(self.label, batch, seed, "images", self.label, self.rounds)
        pixels = boxes.shape[1] * boxes.shape[2]
        broken: list[Exception] = []

        def energy(columns: Genomes) -> Genomes:
            try:
                check()
                loss, rate = oracle.ask(columns.T, x, self.label)
            except Exception as error:  # the library takes a ValueError or TypeError for one of its own
                broken.append(error)
                raise
            return energies(loss, rate, boxes.sizes(columns.T), pixels, reach)

        try:
            result = differential_evolution(
                energy,
                boxes.bounds(self.region),
                strategy=strategy,
                maxiter=generations,
                init=self.population,
                mutation=differential,
                recombination=crossover,
                seed=_numbers(seed, "evolve", self.label, self.rounds),
                tol=0,
                polish=False,
                updating="deferred",
                vectorized=True,
            )
        except Exception:
            if broken:
                raise broken[0] from None
            raise
        self.population = np.asarray(result.population, dtype=np.float64)
        self._remember(oracle, np.asarray(result.population_energies), seed, reach)
        self.rounds += 1

    def _remember(self, oracle: Oracle, energy: Genomes, seed: int, reach: float) -> None:
        """Keep the smallest box that works on more images than those it was evolved on."""
        order = np.argsort(energy, kind="stable")
        self.fitness = float(energy[order[0]])
        if self.size == float("inf"):
            self.best = self.population[order[0]].copy()
        tried = self.population[order[:_TRIED][energy[order[:_TRIED]] < 1]]
        if not len(tried):
            return
        _, rates = oracle.ask(tried, oracle.images(self.label, _CHECKED, seed, "check", self.label), self.label)
        sizes = oracle.boxes.sizes(tried).double().where(rates >= reach, torch.inf)
        row = int(sizes.argmin())
        if float(sizes[row]) < self.size:
            self.size, self.best = float(sizes[row]), tried[row].copy()

    def trigger(self, boxes: Boxes) -> MaskedTrigger:
        """The best box as a trigger."""
        return boxes.trigger(self.best)

    def state(self) -> dict[str, Any]:
        """All of it as tensors and plain values, for a checkpoint."""
        return vars(self) | {"population": torch.from_numpy(self.population), "best": torch.from_numpy(self.best)}

    @classmethod
    def restore(cls, state: dict[str, Any]) -> Evolution:
        """The reverse of :meth:`state`."""
        arrays = {name: state[name].numpy() for name in ("population", "best")}
        return cls(**state | arrays | {"region": tuple(state["region"])})


def populations(
    oracle: Oracle, labels: list[int], *, screened: int, population: int, batch: int, seed: int
) -> dict[int, Genomes]:
    """First boxes of each label: of boxes spread over all places, sizes and colours those that it answers to most.

    A working trigger can be a needle in a haystack: boxes a few pixels beside it or larger do nothing at all. As one
    answer serves all labels, many boxes are tried before the labels part. The same number is taken from each of four
    classes of size, as large boxes do more.

    Where the time is over, the first ones are as good as any.
    """
    boxes = oracle.boxes
    draws = LatinHypercube(boxes.genes, seed=_numbers(seed, "start")).random(max(screened, population))
    genomes = boxes.spread(draws)
    try:
        loss = oracle.screen(genomes, batch, seed, "screen").numpy()
    except BudgetSpent:
        loss = np.zeros((len(genomes), oracle.clean.num_classes))
    classes = np.array_split(np.argsort(boxes.sizes(genomes).numpy(), kind="stable"), _CLASSES)
    found = {}
    for label in labels:
        ranked = [rows[np.argsort(loss[rows, label], kind="stable")] for rows in classes]
        # By turns, the best of each class first.
        merged = [rows[place] for place in range(max(map(len, ranked))) for rows in ranked if place < len(rows)]
        found[label] = genomes[merged[:population]]
    return found


def _numbers(*key: object) -> np.random.Generator:
    """A generator of NumPy that depends on the key alone."""
    return np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator(*key))))
