"""Backdoors that work on images of one label only, or differently on each: small triggers for pairs of labels."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import ClassVar

import torch
from torch import Tensor, nn

from bezoar.core.errors import SettingError, UnsupportedModel
from bezoar.core.evidence import Scores
from bezoar.core.method import Clean, Scorer
from bezoar.core.run import Run
from bezoar.core.surgery import require_gradient
from bezoar.core.trigger import InvertedTrigger
from bezoar.nets.convnet import student_net
from bezoar.ops.answers import answers
from bezoar.ops.augment import as_float
from bezoar.ops.combined import chance_of_pairs
from bezoar.ops.cost import CostController
from bezoar.ops.pair_look import leading_sources
from bezoar.ops.student import NATURAL, transfer, trusted
from bezoar.scorers._sources import SourceSearch

_EACH = 6  # images of each source that the choice of the foremost rests on
_LEAST = 3  # pairs of the same source, or of the same target, that a pair is held against at least
#: Least and most labels of a model that can be suspect: with fewer there is too little to compare with; with more, the
#: pairs of labels that are alike by nature (road signs) are too many, and the images of each too few, to tell.
LABELS = (4, 20)
_IMAGES = 3  # held-out images of a source below which its pairs do not count
_LARGEST = 0.25  # share of the image that a trigger counts as at most, one that never worked too
_VALUES = 200_000_000  # pixels of all triggers together that are searched at once: some 4 GB

Pair = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class SourceSpecific(Scorer):
    """Look for a trigger that works on images of one source label only, by a short search for pairs of labels.

    Neural Cleanse searches triggers for ordered pairs of source and target to find such a backdoor, and names divide
    and conquer as the way to pay less, without trying it. With up to ten labels we search all pairs together, but
    briefly: few steps, few images. With more labels, each source has ``others`` pairs with targets that chance chooses,
    and each target as many. Beside these come the ``foremost`` sources of each target: those on which a few steps with
    images of all labels get furthest, against what the triggers of the other targets do on the same source. The number
    of pairs so grows as the number of labels, not as its square.

    A pair counts as far as three things hold:

    1. Its trigger is smaller than is usual for its source and for its target: the logarithm of how many times smaller
       than the median of the same source, or of the same target, whichever is less. Two labels that are alike, a source
       that is easily turned or a target that is easily reached are no sign of an attack.
    2. It turns held-out images of the source: 1 where it turns all, 0 where it turns half of them or fewer.
    3. It is no natural feature: 1 where it does not move a student of the model (see ``bezoar.ops.student``), 0 where
       it raises the student's probability of the target by 0.1 or more.

    The score is the product. A label has the largest score of its pairs, the model has the largest of all, and is
    suspect above the bound, if it has 4 to 20 labels; with others the scores are shown and say nothing of the model: on
    road signs (43 labels) pairs that are alike score as high as planted ones. An all-to-all backdoor, which each pair
    of neighbouring labels shows, is found as well.

    With ten labels it takes 72,000 image-gradients, less than a scan with its three seeds, and some 10 s for a student.

    Args:
        targets: Labels that can be the target; empty for all.
        steps: Steps of the search, at least 1.
        batch: Images of a step and pair, at least 1.
        others: Targets that each source is tried with, and sources of each target, at least 4.
        foremost: Sources of each target that are tried beside those, where not all are; at least 0.
        screening: Steps with images of all labels that these are chosen after, at least 1.
        lr: Step size of Adam, above 0.
        pressure: First weight of the size, as a share of the whole image, above 0.
        reach: Success rate that counts as a success, in (0, 1].
        bound: Score above which a model of up to ten labels is suspect, above 0; with more it grows by 0.13 times the
            logarithm of a tenth of their number, as chance makes the largest of many scores grow. The default lies
            above all clean nets of the shared set; seven nets with such a backdoor were in view.

    References:
        Ours, after Wang et al., "Neural Cleanse", IEEE S&P 2019, section VII, and Shen et al., "Backdoor Scanning for
        Deep Neural Networks through K-Arm Optimization", ICML 2021, which screens pairs by their first answers.
    """

    calibration: ClassVar[str] = (
        "bound set above the scores of the 24 clean nets of the shared set (the highest: 0.69), with seven nets "
        "with such a backdoor in view, of which five lie above it, all of ten labels; it says nothing of models of "
        "more than 20. Measured on others in docs/results.md"
    )

    targets: tuple[int, ...] = ()
    steps: int = 100
    batch: int = 8
    others: int = 9
    foremost: int = 2
    screening: int = 20
    lr: float = 0.2
    pressure: float = 10.0
    reach: float = 0.99
    bound: float = 0.7

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "screening"):
            self.require(name, getattr(self, name) >= 1, "at least 1")
        self.require("others", self.others > _LEAST, f"at least {_LEAST + 1}")
        self.require("foremost", self.foremost >= 0, "at least 0")
        self.require("lr", self.lr > 0, "above 0")
        self.require("pressure", self.pressure > 0, "above 0")
        self.require("reach", 0 < self.reach <= 1, "in (0, 1]")
        self.require("bound", self.bound > 0, "above 0")

    def bound_for(self, labels: int) -> float:
        """The bound for so many labels: of more pairs the largest score is larger by chance."""
        return self.bound + chance_of_pairs(labels)

    def scores(self, model: nn.Module, clean: Clean, run: Run) -> Scores:
        """See :class:`bezoar.core.method.Scorer`."""
        for label in self.targets:
            if not 0 <= label < clean.num_classes:
                raise SettingError(f"label {label} is not in 0..{clean.num_classes - 1}")
        work, before = _Work(self, model, clean, run), run.image_gradients
        pairs = work.pairs()
        if len(pairs) * math.prod(clean.shape) > _VALUES:
            raise UnsupportedModel(
                f"{len(pairs):,} pairs of labels are too many to search at once", "Say which labels can be the target"
            )
        if not pairs:
            raise UnsupportedModel("there are clean images of one label only", "Give images of at least 2 labels")
        few = sum(int((work.clean.held_y == source).sum()) < _IMAGES for source in {source for source, _ in pairs})
        if few:
            run.warnings.append(f"{few} labels have fewer than {_IMAGES} held-out images: their pairs do not count")
        sizes, triggers = work.searched(pairs)
        run.notes["gradients_for_sources"] = run.image_gradients - before
        run.notes["gradients_of_all_pairs"] = work.all_pairs * self.steps * self.batch
        student = trusted(model, partial(student_net, clean.num_classes, clean.shape[0]), clean, run)
        smaller = smaller_than_usual(sizes)
        scores = {}
        for (source, target), trigger in triggers.items():
            run.check()
            score = smaller[source, target]
            if score > 0:
                moved = transfer(student, work.clean, target, trigger, run, source=source)
                score *= works(work.asr(source, target, trigger)) * planted(moved)
            scores[source, target] = score
        leading = {target: (source, target) for target, source in leading_sources(scores).items()}
        labels = {target: scores[pair] for target, pair in leading.items()}
        return Scores(
            labels=labels,
            model=max(labels.values()),
            meaning="how many times smaller the trigger of a source and target is than usual for both, as a natural "
            "logarithm, as far as it works on other images and is no natural feature",
            suspect=max(labels.values()) > self.bound_for(clean.num_classes) if can_judge(clean.num_classes) else None,
            bound=self.bound_for(clean.num_classes),
            triggers={target: triggers[leading[target]] for target in labels},
            pairs=scores,
        )


def can_judge(labels: int) -> bool:
    """Whether the bound says anything of a model of so many labels."""
    return LABELS[0] <= labels <= LABELS[1]


def smaller_than_usual(sizes: dict[Pair, float]) -> dict[Pair, float]:
    """How many times smaller each pair's size is than the usual one, as a natural logarithm.

    The usual size is the median of the other pairs of the same source, or of the same target if that is less; a median
    of fewer than three counts only where there is no other. A trigger smaller than a pixel counts as one pixel.

    Args:
        sizes: Of each pair of source and target, in pixels.
    """
    of_source, of_target = defaultdict[int, list[Pair]](list), defaultdict[int, list[Pair]](list)
    for pair in sizes:
        of_source[pair[0]].append(pair)
        of_target[pair[1]].append(pair)
    out = {}
    for pair, size in sizes.items():
        others = [[sizes[one] for one in same if one != pair] for same in (of_source[pair[0]], of_target[pair[1]])]
        enough = [one for one in others if len(one) >= _LEAST] or [one for one in others if one]
        out[pair] = math.log(max(1.0, min(map(median, enough))) / max(1.0, size)) if enough else 0.0
    return out


def works(asr: float) -> float:
    """What a success rate on held-out images counts for: 1 at all, 0 at half or fewer, or if unknown."""
    return 0.0 if math.isnan(asr) else max(0.0, 2 * asr - 1)


def planted(moved: float) -> float:
    """What a trigger counts for that moves a student so far: 1 at 0, 0 from ``NATURAL`` on, or if unknown."""
    return 0.0 if math.isnan(moved) else max(0.0, 1 - moved / NATURAL)


class _Work:
    """The searches of one model."""

    def __init__(self, settings: SourceSpecific, model: nn.Module, clean: Clean, run: Run) -> None:
        # Without held-out images those of the search must do.
        judged = (clean.held_x, clean.held_y) if len(clean.held_y) else (clean.x, clean.y)
        self.clean = dataclasses.replace(clean, held_x=judged[0], held_y=judged[1])
        self.settings, self.model, self.run = settings, model, run
        self.bare = answers(model, self.clean.held_x, run.device)
        self.x = as_float(clean.x)
        require_gradient(model, self.x[:2].to(run.device))
        draws = run.generator("source-specific", "images")
        order = torch.randperm(len(clean.y), generator=draws)
        self.members = [order[clean.y[order] == label] for label in range(clean.num_classes)]
        self.present = torch.tensor([len(rows) > 0 for rows in self.members])
        _, height, width = clean.shape
        self.whole = float(height * width)
        self.targets = list(settings.targets) or list(range(clean.num_classes))
        self.all_pairs = sum(int(self.present.sum()) - int(self.present[target]) for target in self.targets)
        self.chosen = self._by_chance()
        self.screening = settings.screening if len(self.chosen) < self.all_pairs and settings.foremost else 0

    def _by_chance(self) -> set[Pair]:
        """As many pairs for each source and for each target: those that are a few places apart on a random ring."""
        count = len(self.members)
        ring = torch.randperm(count, generator=self.run.generator("source-specific", "pairs")).tolist()
        wanted = set(self.targets)
        return {
            (ring[place], ring[(place + step) % count])
            for step in range(1, min(self.settings.others, count - 1) + 1)
            for place in range(count)
            if self.present[ring[place]] and ring[(place + step) % count] in wanted
        }

    def pairs(self) -> list[Pair]:
        """Pairs to search: all of them, or those that chance chooses and the foremost sources of each target."""
        found = self.chosen | (self._foremost() if self.screening else set())
        return sorted(found, key=lambda pair: (pair[1], pair[0]))

    def _foremost(self) -> set[Pair]:
        sources = self.present.repeat(len(self.targets), 1)
        sources[torch.arange(len(self.targets)), self.targets] = False
        rows = [row for row in range(len(self.targets)) if bool(sources[row].any())]
        targets = [self.targets[row] for row in rows]
        search = self._search(targets, sources[rows], "screening")
        self._step(search, self.screening, 0)
        found = foremost(search.losses(_EACH), sources[rows], self.settings.foremost)
        return {(source, target) for target, best in zip(targets, found, strict=True) for source in best}

    def searched(self, pairs: list[Pair]) -> tuple[dict[Pair, float], dict[Pair, InvertedTrigger]]:
        """Size and trigger of each pair; one that never worked, or is larger, is a quarter of the image."""
        sources = torch.zeros(len(pairs), len(self.members), dtype=torch.bool)
        sources[torch.arange(len(pairs)), [source for source, _ in pairs]] = True
        search = self._search([target for _, target in pairs], sources, "pairs")
        self._step(search, self.settings.steps, self.screening)
        sizes = search.sizes.tolist()
        found = {pair: min(size, _LARGEST * self.whole) for pair, size in zip(pairs, sizes, strict=True)}
        return found, {pair: search.trigger(row) for row, pair in enumerate(pairs)}

    def asr(self, source: int, target: int, trigger: InvertedTrigger) -> float:
        """Share of held-out images of the source that the trigger turns; NaN with too few.

        Those that have the target already need no trigger, so they count against it.
        """
        rows = self.clean.held_y == source
        if int(rows.sum()) < _IMAGES:
            return math.nan
        given = answers(self.model, trigger(as_float(self.clean.held_x[rows]).to(self.run.device)), self.run.device)
        turned = (given == target).float() - (self.bare[rows] == target).float()
        return float(turned.mean())

    def _search(self, targets: list[int], sources: Tensor, key: str) -> SourceSearch:
        return SourceSearch(
            self.model,
            self.x,
            self.members,
            targets,
            sources,
            controller=CostController.quick(self.settings.pressure, self.whole, self.settings.reach),
            batch=self.settings.batch,
            lr=self.settings.lr,
            key=key,
            run=self.run,
        )

    def _step(self, search: SourceSearch, steps: int, before: int) -> None:
        for number in range(steps):
            search.step()
            self.run.progress.step(
                self.run.seed, before + number + 1, self.screening + self.settings.steps, _leader(search)
            )


def foremost(losses: Tensor, sources: Tensor, count: int) -> list[list[int]]:
    """The sources of each row with the smallest losses, as multiples of what is usual for the source.

    Args:
        losses: ``(T, K)`` loss of each target's trigger on each source; NaN for sources without images.
        sources: ``(T, K)`` bool, those that may be chosen.
        count: How many of each row, at most.
    """
    logs = losses.double().clamp(min=1e-6).log()
    usual = logs.nanmedian(0).values if len(logs) > 1 else 0.0
    relative = torch.where(sources, logs - usual, torch.inf)
    ranked = relative.argsort(dim=1, stable=True).tolist()
    return [row[: min(count, int(allowed))] for row, allowed in zip(ranked, sources.sum(1), strict=True)]


def _leader(search: SourceSearch) -> str:
    row = int(search.current.argmin())
    many = int(search.sources[row].sum()) > 1
    source = "" if many else f"label {int(search.sources[row].int().argmax())} "
    return f"{source}to label {search.targets[row]}, {float(search.current[row]):.0f} px"
