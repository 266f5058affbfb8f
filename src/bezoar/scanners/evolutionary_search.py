"""Evolutionary search: the smallest box with a pattern that causes each label, by forward passes alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from bezoar.core.errors import BudgetSpent, SettingError
from bezoar.core.evidence import LabelScan, Scan, SeedScan, Status
from bezoar.core.method import Clean, Scanner
from bezoar.core.run import Run
from bezoar.core.surgery import require_independent_rows
from bezoar.ops.attention import Tap
from bezoar.ops.cam import cam_layer, grad_cam
from bezoar.scanners._boxes import Boxes, Region, box_around
from bezoar.scanners._evolve import Evolution, Oracle, Strategy, populations
from bezoar.scanners._seeds import Wanted
from bezoar.scanners._together import held_out, wanted_labels

# Images of a map.
_SEEN = 16


@dataclass(frozen=True, kw_only=True)
class EvolutionarySearch(Scanner):
    """Search, for each label, the smallest box with a coarse pattern that causes it, by differential evolution.

    The search of CETF without its suspicious inputs: the paper cuts the box out of an image that may be poisoned, here
    its pattern is searched as well, on clean images. No gradient of the input is needed, only answers. After
    ``explore`` of the search, Grad-CAM of images that carry the best box so far narrows the region of the next ones,
    where the model lets a layer be differentiated. Boxes that work come before those that do not; of those that work
    the smaller is fitter, of the others the one with the smaller cross-entropy.

    Args:
        seeds: Seeds to scan with; they must agree for a verdict.
        labels: Labels to look at, which alone can be the target; empty for all. Others are sampled for the median.
        screened: Boxes that are tried before the labels part; each label starts from those that do most for it.
        population: Boxes of a generation, at least 5.
        generations: Generations of each label.
        batch: Images that a box is stamped on; new ones each round.
        rounds: Rounds that the generations are divided into: all labels take their turn in each.
        differential: Weight F of the difference of two boxes that is added to a third one, in (0, 2).
        crossover: Share CR of the genes that are taken from the changed box, in [0, 1].
        strategy: Which box is changed: a random one (``rand1bin``, DE/rand/1/bin) or the best one (``best1bin``).
        cells: Cells of the pattern a side.
        reach: Success rate that counts as a success, in (0, 1].
        focus: ``grad-cam`` narrows the region of the search; ``none`` searches the whole image throughout.
        explore: Share of the rounds before the region is narrowed, in [0, 1].
        threshold: Share of the largest value of the map from which a place is in the region, in (0, 1].
        candidates: Smallest labels that are followed to the end.
        reference_labels: Random labels that are followed to the end for median and MAD.

    References:
        Zhou, Ye, Tang, Luo, Shi, Jia, "Evolutionary Trigger Detection and Lightweight Model Repair Based Backdoor
        Defense", 2024, https://arxiv.org/abs/2407.05396.
        Storn, Price, "Differential Evolution", Journal of Global Optimization, 1997.
        Deb, "An efficient constraint handling method for genetic algorithms", 2000, for what is fitter.
    """

    phase: ClassVar[str] = "evolve"

    seeds: int = 3
    labels: tuple[int, ...] = ()
    screened: int = 4000
    population: int = 24
    generations: int = 40
    batch: int = 24
    rounds: int = 8
    differential: float = 0.5
    crossover: float = 0.9
    strategy: Strategy = "rand1bin"
    cells: int = 3
    reach: float = 0.95
    focus: Literal["grad-cam", "none"] = "grad-cam"
    explore: float = 0.4
    threshold: float = 0.5
    candidates: int = 4
    reference_labels: int = 12

    def __post_init__(self) -> None:
        self.require("screened", self.screened >= 0, "at least 0")
        for name in ("seeds", "generations", "batch", "rounds", "cells", "candidates"):
            self.require(name, getattr(self, name) >= 1, "at least 1")
        self.require("population", self.population >= 5, "at least 5")
        self.require("differential", 0 < self.differential < 2, "in (0, 2)")
        self.require("crossover", 0 <= self.crossover <= 1, "in [0, 1]")
        self.require("strategy", self.strategy in ("rand1bin", "best1bin"), "'rand1bin' or 'best1bin'")
        self.require("reach", 0 < self.reach <= 1, "in (0, 1]")
        self.require("focus", self.focus in ("grad-cam", "none"), "'grad-cam' or 'none'")
        self.require("explore", 0 <= self.explore <= 1, "in [0, 1]")
        self.require("threshold", 0 < self.threshold <= 1, "in (0, 1]")
        self.require("reference_labels", self.reference_labels >= 4, "at least 4")

    def scan(self, model: nn.Module, clean: Clean, run: Run) -> Scan:
        """See :class:`Scanner`. A budget that runs out ends the scan early with what was found."""
        for label in self.labels:
            if not 0 <= label < clean.num_classes:
                raise SettingError(f"label {label} is not in 0..{clean.num_classes - 1}")
        require_independent_rows(model, clean.x[:4].to(run.device))
        oracle = Oracle(model, clean, run, Boxes(clean.shape, self.cells))
        layer = self._layer(oracle)
        found: list[SeedScan] = []
        for number in range(self.seeds):
            if number and run.spendable <= 0:
                run.budget_spent = True
                break
            wanted = wanted_labels(clean, run.seed, found, self.labels, self.candidates, self.reference_labels)
            found.append(self.look(oracle, layer, run.seed + number, wanted))
            run.progress.seed_done()
        run.notes["queries"] = oracle.queries
        _, height, width = clean.shape
        return Scan(tuple(found), clean.num_classes, height * width, wanted=self.labels, calibrated=False)

    def look(self, oracle: Oracle, layer: Tap | None, seed: int, wanted: Wanted) -> SeedScan:
        """One seed; ``wanted`` are the labels to look at and those of them that median and MAD are taken from."""
        labels, reference = wanted
        run = oracle.run
        saved = run.progress.load(seed)
        if saved is None:
            searches = self._start(oracle, labels, seed)
        else:
            searches = [Evolution.restore(state) for state in saved["searches"]]
        finished = True
        try:
            for number in range(self.rounds):
                self._drop(searches, number, reference)
                for place, search in enumerate(searches, 1):
                    if search.dropped or search.rounds > number:  # the latter was done before a kill
                        continue
                    if layer is not None and search.size < float("inf") and number >= self.explore * self.rounds:
                        search.region = self._focus(oracle, layer, search, seed)
                    self._advance(oracle, search, seed)
                    done = number * len(labels) + place
                    run.progress.step(seed, done, self.rounds * len(labels), _leader(searches))
                    run.progress.save(seed, lambda: {"searches": [one.state() for one in searches]})
        except BudgetSpent:
            finished = False
        run.progress.save(seed, lambda: {"searches": [one.state() for one in searches]}, now=True)
        share = sum(s.rounds for s in searches) / (self.rounds * len(searches))
        found = {search.label: self._label(oracle, search, search.label in reference) for search in searches}
        return SeedScan(seed, held_out(oracle.model, oracle.clean, run, found), finished, 1.0 if finished else share)

    def _start(self, oracle: Oracle, labels: list[int], seed: int) -> list[Evolution]:
        found = populations(
            *(oracle, labels), screened=self.screened, population=self.population, batch=self.batch, seed=seed
        )
        return [Evolution.start(oracle.boxes, label, found[label]) for label in labels]

    def _advance(self, oracle: Oracle, search: Evolution, seed: int) -> None:
        # Round n ends at generation n G / R, so that the rounds add up to all generations.
        ends = [(search.rounds + more) * self.generations // self.rounds for more in (0, 1)]
        search.advance(
            oracle,
            seed=seed,
            generations=ends[1] - ends[0],
            batch=self.batch,
            reach=self.reach,
            strategy=self.strategy,
            differential=self.differential,
            crossover=self.crossover,
            check=oracle.run.check,
        )

    def _drop(self, searches: list[Evolution], number: int, reference: list[int]) -> None:
        """Before a round from 40 % to 80 % on: keep the smaller half, at least the candidates, and the reference."""
        going = [s for s in searches if not s.dropped]
        begun = any(s.rounds > number for s in going)  # before a kill, and the labels were dropped then
        if begun or not 0.4 * self.rounds <= number < 0.8 * self.rounds or len(going) <= self.candidates + 1:
            return
        others = sum(s.label not in reference for s in going)
        ranked = sorted(going, key=lambda s: (s.size, s.fitness))
        for search in ranked[max(self.candidates, others // 2) :]:
            search.dropped = search.label not in reference

    def _layer(self, oracle: Oracle) -> Tap | None:
        """Where maps are taken; None without a focus, or where the model has no such layer or gives no gradient."""
        if self.focus == "none":
            return None
        x = oracle.clean.x[:2].to(oracle.run.device)
        try:
            layer = cam_layer(oracle.model, x)
            grad_cam(oracle.model, layer, x, 0)
        except Exception:  # a backward pass may raise anything; a forward pass that fails does so again in the search
            oracle.run.notes["focus"] = "none: no layer of pictures that can be differentiated"
            return None
        return layer

    def _focus(self, oracle: Oracle, layer: Tap, search: Evolution, seed: int) -> Region:
        """The region in which the model sees the label on images that carry its best box."""
        x = oracle.images(search.label, _SEEN, seed, "map", search.label, search.rounds)
        oracle.queries += len(x)
        stamped = search.trigger(oracle.boxes)(x.to(oracle.run.device))
        seen = grad_cam(oracle.model, layer, stamped, search.label).mean(0).cpu()
        return box_around(seen, self.threshold) or oracle.boxes.whole

    def _label(self, oracle: Oracle, search: Evolution, reference: bool) -> LabelScan:
        trigger = search.trigger(oracle.boxes)
        if search.size == float("inf"):
            return LabelScan(trigger.size, float("nan"), "failed", reference, trigger)
        status: Status = "eliminated" if search.dropped else "complete"
        return LabelScan(search.size, float("nan"), status, reference, trigger)


def _leader(searches: list[Evolution]) -> str:
    """The label with the smallest box now, for the progress bar."""
    best = min(searches, key=lambda search: (search.size, search.fitness))
    size = "none works yet" if best.size == float("inf") else f"{best.size:.0f} px"
    return f"label {best.label}, {size}"
