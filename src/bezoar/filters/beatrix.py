"""Beatrix: correlations between channels, of several orders, that clean examples of a label do not show."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bezoar.core.errors import UnsupportedModel
from bezoar.core.examples import ExampleSource
from bezoar.core.filtering import Filter, Suspicion
from bezoar.core.method import Clean
from bezoar.core.run import Run
from bezoar.core.surgery import frozen
from bezoar.filters._classes import FOLDS, by_label, held_out_limit, stands_out
from bezoar.ops.attention import features_at, find_taps
from bezoar.ops.augment import as_float
from bezoar.ops.features import device_of, penultimate
from bezoar.ops.head import find_head

_SMALL = 1e-6  # as in the authors' code
_BATCH = 64


@dataclass(frozen=True)
class Bounds:
    """``(E,)`` lowest and highest usual value of each entry, and what is added to them as a divisor."""

    low: Tensor
    high: Tensor
    floor: float


#: ``(B, C, H, W)`` images to ``(B, M, P)`` float64: M channels at P places.
Maps = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Beatrix(Filter):
    """Hold the Gram matrices of each example's feature maps against those of clean examples of its label.

    Order p is ``(F^p F^p')^(1/p)`` with F the channels of a layer at all places. Clean examples of a label give the
    median and the median absolute deviation of every entry; the deviation of an example is how far its entries lie
    beyond, relative to the bound, on average. Its score is the deviation divided by the one that 5 % of the clean
    examples exceed, each held against the others. A label is poisoned where the examples above that and those below
    differ, by a kernel two-sample statistic, far more than in other labels. A model without feature maps is looked at
    by what goes into its head, where all orders are the same.

    Args:
        orders: Highest order, at least 1 (the authors' code: 8).
        width: Median absolute deviations that an entry may lie off, above 0.
        floor: Share of the mean entry that every bound is raised by where it divides, at least 0. Most entries of a
            ReLU's maps are zero in clean examples; with 0, as in the authors' code, any value there outweighs all else.
        stage: Which stage of the network, counted from the last, at least 1 (the authors' code: the last but one); the
            first one where there are fewer.
        false_alarms: Share of the clean examples that may exceed the threshold, in (0, 1).
        threshold: Anomaly index above which a label is poisoned, above 0 (the paper: e^2, 7.389).
        most: Examples of a label that the two-sample statistic is taken from, at least 1 (the paper: 500 to 1000).

    References:
        Ma et al., "The Beatrix Resurrections: Robust Backdoor Detection via Gram Matrices", NDSS 2023.
    """

    needs_clean = True

    orders: int = 8
    width: float = 10.0
    floor: float = 0.01
    stage: int = 2
    false_alarms: float = 0.05
    threshold: float = math.exp(2)
    most: int = 1000

    def __post_init__(self) -> None:
        for name in ("orders", "stage", "most"):
            self.require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("width", "threshold"):
            self.require(name, getattr(self, name) > 0, "above 0")
        self.require("floor", self.floor >= 0, "at least 0")
        self.require("false_alarms", 0 < self.false_alarms < 1, "in (0, 1)")

    def filter(self, model: nn.Module, examples: ExampleSource, run: Run, clean: Clean | None) -> Suspicion:
        """See :class:`bezoar.core.filtering.Filter`."""
        assert clean is not None
        maps, orders = self._maps(model, clean.x[:2], run)
        score = torch.zeros(len(examples.labels), dtype=torch.float64)
        suspect = torch.zeros(len(examples.labels), dtype=torch.bool)
        statistic: dict[int, float] = {}
        above: dict[int, Tensor] = {}
        unknown = []
        for label, rows in by_label(examples.labels, examples.num_classes, run, least=1):
            known = [maps(part) for part in torch.split(clean.x[clean.y == label], _BATCH)]
            if sum(map(len, known)) < 2:
                unknown.append(label)
                continue
            grams = [gram(torch.cat(known), order) for order in range(1, orders + 1)]
            limit = max(self.limit(grams), _SMALL)
            bounds = [self.bounds(one) for one in grams]
            found, means = self._read(maps, examples, rows, bounds, run)
            score[rows] = found / limit
            above[label] = rows[found > limit]
            statistic[label] = self._apart(means, found > limit, run.generator("beatrix", label))
        if unknown:
            run.warnings.append(f"labels with fewer than 2 clean examples were not looked at: {unknown[:10]}")
        if len(statistic) < 3:
            run.warnings.append(f"Beatrix compares labels with each other, and only {len(statistic)} could be judged")
        index = dict(zip(statistic, stands_out(list(statistic.values())), strict=True))
        flagged = tuple(label for label in index if index[label] > self.threshold)
        for label in flagged:
            suspect[above[label]] = True
        rule = (
            f"deviations that {self.false_alarms:.0%} of the clean examples exceed, of labels with an anomaly index "
            f"above {self.threshold:.2f}"
        )
        return Suspicion(score, suspect, rule, index, flagged)

    def _maps(self, model: nn.Module, x: Tensor, run: Run) -> tuple[Maps, int]:
        """Reads feature maps, and how many orders differ."""
        device = device_of(model)
        pair = as_float(x if len(x) > 1 else torch.cat([x, x])).to(device)
        try:
            tap = find_taps(model, pair, self.stage)[0]
        except UnsupportedModel:
            head = find_head(model, pair[:1])
            run.warnings.append("the model has no feature maps: what goes into its head is looked at")
            return lambda part: penultimate(model, head, part).double()[:, :, None], 1

        def read(part: Tensor) -> Tensor:
            with frozen(model), torch.no_grad():
                found = features_at(model, [tap], as_float(part).to(device))[1][0]
            return (found.flatten(2) if found.ndim == 4 else found.transpose(1, 2)).double().cpu()

        return read, self.orders

    def _read(
        self, maps: Maps, examples: ExampleSource, rows: Tensor, bounds: list[Bounds], run: Run
    ) -> tuple[Tensor, Tensor]:
        """``(n,)`` deviations, and ``(n, M)`` channel means."""
        found, means = [], []
        for part in torch.split(rows, _BATCH):
            run.check()
            seen = maps(examples.take(part)).nan_to_num()
            means.append(seen.mean(2))
            grams = (gram(seen, order) for order in range(1, len(bounds) + 1))
            found.append(torch.stack([deviation(g, b) for g, b in zip(grams, bounds, strict=True)]).mean(0))
        return torch.cat(found), torch.cat(means)

    def bounds(self, grams: Tensor) -> Bounds:
        """What is usual of each entry of ``(n, E)`` Gram matrices."""
        middle = grams.median(0).values
        off = self.width * (grams - middle).abs().median(0).values
        return Bounds(middle - off, middle + off, self.floor * float(middle.abs().mean()) + _SMALL)

    def limit(self, grams: list[Tensor]) -> float:
        """The deviation that a share ``false_alarms`` of clean examples exceeds, each part held against the others.

        Args:
            grams: ``(n, E)`` for each order, n at least 2.
        """
        count = len(grams[0])

        def distances(part: Tensor, others: Tensor) -> Tensor:
            return torch.stack([deviation(g[part], self.bounds(g[others])) for g in grams]).mean(0)

        parts = torch.tensor_split(torch.arange(count), min(FOLDS, count))
        return held_out_limit(parts, count, distances, self.false_alarms)

    def _apart(self, means: Tensor, above: Tensor, generator: torch.Generator) -> float:
        if len(means) > self.most:
            chosen = torch.randperm(len(means), generator=generator)[: self.most]
            means, above = means[chosen], above[chosen]
        return two_sample(means[~above], means[above])


def gram(maps: Tensor, order: int) -> Tensor:
    """``(n, M (M + 1) / 2)`` entries on and above the diagonal of the Gram matrices of an order.

    Args:
        maps: ``(n, M, P)``.
        order: At least 1.
    """
    raised = maps**order
    product = raised @ raised.transpose(1, 2)
    row, column = torch.triu_indices(maps.shape[1], maps.shape[1])
    entries = product[:, row, column]
    return entries.sign() * entries.abs() ** (1 / order)


def deviation(grams: Tensor, bounds: Bounds) -> Tensor:
    """``(n,)`` how far the entries of ``(n, E)`` Gram matrices lie beyond their bounds, relative to these, on average.

    The average is over half the entries of a square matrix, M M / 2, as in the authors' code.
    """
    below = (bounds.low - grams).clamp(min=0) / (bounds.low.abs() + bounds.floor)
    above = (grams - bounds.high).clamp(min=0) / (bounds.high.abs() + bounds.floor)
    channels = (math.isqrt(8 * grams.shape[1] + 1) - 1) // 2
    return (below + above).sum(1) / (channels**2 / 2)


def two_sample(one: Tensor, other: Tensor) -> float:
    """Squared maximum mean discrepancy times ``n m / (n + m)``; 0 where a group is empty.

    The kernel is the sum of two Gaussians, of half the median squared distance and of the whole.

    Args:
        one, other: ``(n, M)`` and ``(m, M)``.
    """
    n, m = len(one), len(other)
    if not n or not m:
        return 0.0
    both = torch.cat([one, other])
    squared = torch.cdist(both, both, compute_mode="donot_use_mm_for_euclid_dist") ** 2
    width = squared.median().clamp(min=1e-30)
    kernel = torch.exp(-squared / (width / 2)) + torch.exp(-squared / width)
    apart = kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2 * kernel[:n, n:].mean()
    return float(apart) * n * m / (n + m)
