"""Backdoors that work on images of one label only, found by divide and conquer over the sources."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn

from bezoar.core.errors import SettingError, UnsupportedModel
from bezoar.core.evidence import Scores
from bezoar.core.method import Clean, Scorer
from bezoar.core.run import Run
from bezoar.core.surgery import require_gradient
from bezoar.core.trigger import InvertedTrigger
from bezoar.ops.augment import as_float
from bezoar.ops.cost import CostController
from bezoar.scorers._sources import SourceSearch

#: Share of the steps after which the sources are halved for the first time, and for the last.
_FIRST, _LAST = 0.2, 0.65


@dataclass(frozen=True)
class _Pair:
    source: int
    target: int
    size: float
    trigger: InvertedTrigger


@dataclass(frozen=True, kw_only=True)
class SourceSpecific(Scorer):
    """Look for a trigger that works on images of one source label only, without a search for each of K x K pairs.

    Neural Cleanse searches triggers for ordered pairs of source and target to find such a backdoor, and names divide
    and conquer as the way to pay less, without trying it. Here it is. One search a target starts with images of all
    other labels. In rounds, each target keeps the half of its sources on which its trigger does best, until one is left
    and the trigger shrinks for that one alone: K searches, whatever the number of pairs. Since some labels are easily
    turned into anything, what counts is how well the trigger does on a source against what the triggers of the other
    targets do there.

    Then the foremost pairs are held against chance. The trigger of a pair is compared with those of some other pairs
    of the same source, and of the same target. The score of a pair is the logarithm of how many times smaller it is
    than the usual one of these two, whichever is smaller: two labels that are alike, a source that is easily turned or
    a target that is easily reached are no sign of an attack. A label has the largest score of its pairs; the model has
    the largest of all, and is suspect above the bound.

    Some 20 to 60 s on a free core with small nets. The halving asks for K x K x ``each`` answers a round besides, of no
    gradient: with many hundreds of labels, say which can be the target.

    Args:
        targets: Labels that can be the target; empty for all.
        steps: Steps of a search, at least 1.
        batch: Images of a step and target, at least 1.
        each: Images of each source that the halving rests on, at least 1.
        looks: How often all targets are searched, each time without the pairs of the times before, at least 1.
        checked: Foremost pairs that are held against others, at least 1.
        others: Pairs of the same source that each is held against, and as many of the same target, at least 1.
        check_batch: Images of a step of these, at least 1.
        lr: Step size of Adam, above 0.
        pressure: First weight of the size, as a share of the whole image, above 0.
        reach: Success rate that counts as a success, in (0, 1].
        bound: A trigger this many times smaller than the usual ones is suspect, above 1. On 14 small nets without such
            a backdoor, 4 of them with another one, none was above it (under 20 % at 95 % confidence; the highest at
            3.3); of 3 with one, 2 were, the third cannot be told from a clean net by sizes.

    References:
        Ours, after Wang et al., "Neural Cleanse", IEEE S&P 2019, section VII, and Shen et al., "Backdoor Scanning for
        Deep Neural Networks through K-Arm Optimization", ICML 2021, which screens pairs by their first answers.
    """

    targets: tuple[int, ...] = ()
    steps: int = 100
    batch: int = 16
    each: int = 6
    looks: int = 1
    checked: int = 3
    others: int = 5
    check_batch: int = 8
    lr: float = 0.2
    pressure: float = 10.0
    reach: float = 0.99
    bound: float = 3.5

    def __post_init__(self) -> None:
        self.require("steps", self.steps >= 1, "at least 1")
        for name in ("batch", "each", "looks", "checked", "others", "check_batch"):
            self.require(name, getattr(self, name) >= 1, "at least 1")
        self.require("lr", self.lr > 0, "above 0")
        self.require("pressure", self.pressure > 0, "above 0")
        self.require("reach", 0 < self.reach <= 1, "in (0, 1]")
        self.require("bound", self.bound > 1, "above 1")

    def scores(self, model: nn.Module, clean: Clean, run: Run) -> Scores:
        """See :class:`bezoar.core.method.Scorer`."""
        for label in self.targets:
            if not 0 <= label < clean.num_classes:
                raise SettingError(f"label {label} is not in 0..{clean.num_classes - 1}")
        work = _Work(self, model, clean, run)
        spent = run.image_gradients
        found = work.divide()
        if not found:
            raise UnsupportedModel("there are clean images of one label only", "Give images of at least 2 labels")
        ranked = sorted(found, key=lambda pair: (pair.size, pair.target, pair.source))[: self.checked]
        pairs = {(pair.source, pair.target): work.score(pair) for pair in ranked}
        labels: dict[int, float] = {}
        triggers: dict[int, InvertedTrigger] = {}
        for pair in ranked:
            score = pairs[pair.source, pair.target]
            if pair.target not in labels or score > labels[pair.target]:
                labels[pair.target], triggers[pair.target] = score, pair.trigger
        run.notes["gradients_for_sources"] = run.image_gradients - spent
        run.notes["gradients_of_all_pairs"] = work.all_pairs
        largest = max(labels.values())
        return Scores(
            labels=labels,
            model=largest,
            meaning="logarithm of how many times smaller the trigger of a source and target is than usual for both",
            suspect=largest > math.log(self.bound),
            triggers=triggers,
            pairs=pairs,
        )


class _Work:
    """The searches of one model."""

    def __init__(self, settings: SourceSpecific, model: nn.Module, clean: Clean, run: Run) -> None:
        self.settings, self.model, self.run = settings, model, run
        self.x = as_float(clean.x)
        require_gradient(model, self.x[:2].to(run.device))
        draws = run.generator("source-specific", "images")
        order = torch.randperm(len(clean.y), generator=draws)
        self.members = [order[clean.y[order] == label] for label in range(clean.num_classes)]
        self.present = torch.tensor([len(rows) > 0 for rows in self.members])
        _, height, width = clean.shape
        self.whole = float(height * width)
        self.targets = list(settings.targets) or list(range(clean.num_classes))
        count = int(self.present.sum())
        self.all_pairs = sum(count - int(self.present[t]) for t in self.targets) * settings.steps * settings.batch

    def _search(self, targets: list[int], sources: Tensor, batch: int, key: str) -> SourceSearch:
        controller = CostController.quick(self.settings.pressure, self.whole, self.settings.reach)
        return SourceSearch(
            self.model,
            self.x,
            self.members,
            targets,
            sources,
            controller=controller,
            batch=batch,
            lr=self.settings.lr,
            key=key,
            run=self.run,
        )

    def divide(self) -> list[_Pair]:
        """The foremost source of each target, once for each look."""
        left = self.present.repeat(len(self.targets), 1)
        left[torch.arange(len(self.targets)), self.targets] = False
        found = []
        for look in range(self.settings.looks):
            rows = [row for row in range(len(self.targets)) if bool(left[row].any())]
            if not rows:
                break
            search = self._search([self.targets[row] for row in rows], left[rows], self.settings.batch, f"look {look}")
            self._halve(search, look)
            for place, row in enumerate(rows):
                source = int(search.sources[place].int().argmax())
                left[row, source] = False
                found.append(_Pair(source, self.targets[row], self._size(search, place), search.trigger(place)))
        return found

    def _halve(self, search: SourceSearch, look: int) -> None:
        steps = self.settings.steps
        rounds = max(1, math.ceil(math.log2(max(2, int(search.sources.sum(1).max())))))
        every = (_LAST - _FIRST) / max(1, rounds - 1)
        cuts = {max(1, int(steps * (_FIRST + every * number))) for number in range(rounds)}
        last = max(cuts)
        for number in range(steps):
            search.step()
            if search.steps in cuts:
                search.narrow(better_half(search.losses(self.settings.each), search.sources, search.steps == last))
            self.run.progress.step(
                self.run.seed, look * steps + number + 1, (self.settings.looks + 1) * steps, _leader(search)
            )

    def score(self, pair: _Pair) -> float:
        """How many times smaller a pair's trigger is than those of others, as a logarithm."""
        draws = self.run.generator("source-specific", "others", pair.source, pair.target)
        other = [k for k in torch.nonzero(self.present).flatten().tolist() if k not in (pair.source, pair.target)]
        # A target needs no images of its own.
        ends = [k for k in range(len(self.members)) if k not in (pair.source, pair.target)]
        chosen = [other[i] for i in torch.randperm(len(other), generator=draws)[: self.settings.others].tolist()]
        reached = [ends[i] for i in torch.randperm(len(ends), generator=draws)[: self.settings.others].tolist()]
        # The pair itself is searched again, from the same start and as hard as the others.
        pairs = [(pair.source, pair.target), *((pair.source, end) for end in reached)]
        pairs += [(source, pair.target) for source in chosen]
        if len(pairs) == 1:
            return 0.0
        sources = torch.zeros(len(pairs), len(self.members), dtype=torch.bool)
        sources[torch.arange(len(pairs)), [source for source, _ in pairs]] = True
        key = f"others of {pair.source} and {pair.target}"
        search = self._search([target for _, target in pairs], sources, self.settings.check_batch, key)
        for _ in range(self.settings.steps):
            search.step()
        own, *sizes = [self._size(search, row) for row in range(len(pairs))]
        usual = [median(part) for part in (sizes[: len(reached)], sizes[len(reached) :]) if part]
        return math.log(min(usual) / max(min(own, pair.size), 1e-6))

    def _size(self, search: SourceSearch, row: int) -> float:
        """A trigger that never worked is as large as the image."""
        size = float(search.sizes[row])
        return size if math.isfinite(size) else self.whole


def better_half(losses: Tensor, sources: Tensor, last: bool = False) -> Tensor:
    """``(T, K)`` the half of each row's sources with the smallest losses for it, as multiples of what is usual there.

    Args:
        losses: ``(T, K)`` loss of each target's trigger on each source; NaN for sources without images.
        sources: ``(T, K)`` bool, those that are left.
        last: Keep a single one.
    """
    logs = losses.double().clamp(min=1e-6).log()
    relative = logs - logs.nanmedian(0).values
    relative = torch.where(sources, relative, torch.inf)
    kept = torch.zeros_like(sources)
    for row in range(len(sources)):
        count = 1 if last else max(1, (int(sources[row].sum()) + 1) // 2)
        kept[row, relative[row].argsort(stable=True)[:count]] = True
    return kept & sources


def _leader(search: SourceSearch) -> str:
    row = int(search.current.argmin())
    left = int(search.sources[row].sum())
    source = f"label {int(search.sources[row].int().argmax())}" if left == 1 else f"one of {left} labels"
    return f"{source} to label {search.targets[row]}, {float(search.current[row]):.0f} px"
