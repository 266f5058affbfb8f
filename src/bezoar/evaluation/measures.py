"""The measures of attack and defence, defined once. They need ground truth, so no defence imports this package."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from bezoar.attacks._attack import GroundTruth, Plant
from bezoar.attacks._labels import LabelMap
from bezoar.core.errors import SettingError
from bezoar.core.trigger import Trigger
from bezoar.ops.fit import as_float
from bezoar.ops.stats import wilson

_Z95 = 1.959963984540054  # 95 % of a normal distribution lie within this many standard deviations


@dataclass(frozen=True)
class Rate:
    """A share of ``count`` images, in [0, 1], with its 95 % Wilson interval; NaN in [0, 1] where there was no image."""

    value: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, hits: int, count: int) -> Self:
        """``hits`` of ``count``."""
        if not count:
            return cls(math.nan, 0.0, 1.0, 0)
        value = hits / count
        low, high = wilson(value, count, _Z95)
        return cls(value, min(max(low, 0.0), value), max(min(high, 1.0), value), count)

    def __str__(self) -> str:
        return f"{self.value:.1%} ({self.low:.1%} to {self.high:.1%})" if self.count else "no images"


@dataclass(frozen=True)
class PlantMeasures:
    """What one planted trigger does to the model.

    Attributes:
        name: Of the plant.
        asr: Attack success rate: share of triggered images on which the trigger shall work, the target class left
            out, that are given the label the attacker wants.
        asr_inclusive: The same with the target class counted in, as some publications do; higher by up to 1/K.
        asr_other: The same on classes that are neither sources nor target; None where there is none.
        ra: Robust accuracy: share of the images of ``asr`` that are given their true label.
        asr_per_class, ra_per_class: By true class; ``count`` is 0 where the trigger shall not work.
    """

    name: str
    asr: Rate
    asr_inclusive: Rate
    asr_other: Rate | None
    ra: Rate
    asr_per_class: tuple[Rate, ...]
    ra_per_class: tuple[Rate, ...]


@dataclass(frozen=True)
class ControlMeasures:
    """Accuracy on images with a change that must not work: WaNet's noise accuracy, Input-Aware's cross accuracy.

    Attributes:
        name: Of the control.
        acc: Share of all images, so changed, that are given their true label.
    """

    name: str
    acc: Rate


@dataclass(frozen=True)
class Measures:
    """Measures of a model.

    Attributes:
        acc: Accuracy on clean images of all classes.
        acc_per_class: The same by true class.
        plants: One for each planted trigger, the main one first; empty where no ground truth was given.
        controls: One for each change that must not work.
    """

    acc: Rate
    acc_per_class: tuple[Rate, ...]
    plants: tuple[PlantMeasures, ...] = ()
    controls: tuple[ControlMeasures, ...] = ()

    @property
    def main(self) -> PlantMeasures:
        """Measures of the main trigger."""
        return self.plants[0]

    @property
    def asr(self) -> Rate:
        """ASR of the main trigger."""
        return self.main.asr

    @property
    def ra(self) -> Rate:
        """RA of the main trigger."""
        return self.main.ra


@dataclass(frozen=True)
class PlantCounts:
    """Triggered images by true class, each ``(K,)``: those given the wanted label, and those given their true one."""

    wanted: tuple[int, ...]
    true: tuple[int, ...]

    def __add__(self, other: PlantCounts) -> PlantCounts:
        return PlantCounts(_sum(self.wanted, other.wanted), _sum(self.true, other.true))


@dataclass(frozen=True)
class Counts:
    """What was counted on some test images; ``+`` merges batches or workers, in any order.

    Attributes:
        total: ``(K,)`` images by true class.
        right: ``(K,)`` of them classified rightly while clean.
        plants: Counts of each trigger on all of them, target class included.
        controls: Of each change that must not work, ``(K,)`` images that are given their true label all the same.
    """

    total: tuple[int, ...]
    right: tuple[int, ...]
    plants: tuple[PlantCounts, ...] = ()
    controls: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def of(
        cls,
        y: Tensor,
        clean: Tensor,
        triggered: Sequence[Tensor] = (),
        maps: Sequence[LabelMap] = (),
        controlled: Sequence[Tensor] = (),
        *,
        k: int,
    ) -> Self:
        """Count predictions.

        Args:
            y: ``(N,)`` true labels in 0..K-1.
            clean: ``(N,)`` predictions on the clean images.
            triggered: For each trigger, ``(N,)`` predictions on the same images triggered.
            maps: What the attacker wants of each trigger.
            controlled: For each change that must not work, ``(N,)`` predictions on the images so changed.
            k: Number of classes K.
        """
        plants = tuple(
            PlantCounts(_by_class(y, found == wanted(y), k), _by_class(y, found == y, k))
            for found, wanted in zip(triggered, maps, strict=True)
        )
        controls = tuple(_by_class(y, found == y, k) for found in controlled)
        return cls(_by_class(y, torch.ones_like(y, dtype=torch.bool), k), _by_class(y, clean == y, k), plants, controls)

    def __add__(self, other: Counts) -> Counts:
        plants = tuple(a + b for a, b in zip(self.plants, other.plants, strict=True))
        controls = tuple(_sum(a, b) for a, b in zip(self.controls, other.controls, strict=True))
        return Counts(_sum(self.total, other.total), _sum(self.right, other.right), plants, controls)

    def measures(self, truth: GroundTruth | None = None) -> Measures:
        """The measures; ``truth`` is that of the counts."""
        return Measures(
            acc=Rate.of(sum(self.right), sum(self.total)),
            acc_per_class=tuple(map(Rate.of, self.right, self.total)),
            plants=tuple(self._plant(counts, plant) for counts, plant in zip(self.plants, _plants(truth), strict=True)),
            controls=tuple(
                ControlMeasures(control.name, Rate.of(sum(right), sum(self.total)))
                for right, control in zip(self.controls, () if truth is None else truth.controls, strict=True)
            ),
        )

    def _plant(self, counts: PlantCounts, plant: Plant) -> PlantMeasures:
        classes = torch.arange(len(self.total))
        works = plant.labels.applies(classes)
        is_target = plant.labels(classes) == classes
        other = ~works & ~is_target

        def rate(hits: tuple[int, ...], chosen: Tensor) -> Rate:
            rows = torch.nonzero(chosen).flatten().tolist()
            return Rate.of(sum(hits[i] for i in rows), sum(self.total[i] for i in rows))

        def rates(hits: tuple[int, ...]) -> tuple[Rate, ...]:
            return tuple(rate(hits, works & (classes == k)) for k in range(len(classes)))

        return PlantMeasures(
            name=plant.name,
            asr=rate(counts.wanted, works),
            asr_inclusive=rate(counts.wanted, works | is_target),
            asr_other=rate(counts.wanted, other) if bool(other.any()) else None,
            ra=rate(counts.true, works),
            asr_per_class=rates(counts.wanted),
            ra_per_class=rates(counts.true),
        )


@torch.no_grad()
def predict(model: nn.Module, x: Tensor, trigger: Trigger | None = None, batch: int = 500) -> Tensor:
    """``(N,)`` predicted labels, on the CPU.

    Args:
        model: In eval mode.
        x: ``(N, C, H, W)`` images, uint8 or float in [0, 1].
        trigger: Stamps the images first.
        batch: Images in one pass.
    """
    device = next(model.parameters()).device
    out = []
    for part in torch.split(x, batch):
        images = as_float(part).to(device)
        out.append(model(images if trigger is None else trigger(images)).argmax(1).cpu())
    return torch.cat(out)


def count(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    truth: GroundTruth | None = None,
    *,
    num_classes: int | None = None,
    batch: int = 500,
) -> Counts:
    """What :func:`measure` measures, as counts that can be merged with those of other images.

    Args:
        model: In eval mode.
        x: ``(N, C, H, W)`` clean test images, uint8 or float in [0, 1].
        y: ``(N,)`` labels.
        truth: What was planted; None counts clean accuracy alone.
        num_classes: Number of labels K; that of the truth by default, without one that of the labels.
        batch: Images in one pass.

    Raises:
        SettingError: There are no images, or a label is out of range.
    """
    plants = _plants(truth)
    if not len(x):
        raise SettingError("there are no test images to measure on")
    k = num_classes or (plants[0].labels.num_classes if plants else int(y.max()) + 1)
    if not 0 <= int(y.min()) <= int(y.max()) < k:
        raise SettingError(f"test labels lie in {int(y.min())}..{int(y.max())}, not in 0..{k - 1}")
    clean = predict(model, x, batch=batch)
    triggered = [predict(model, x, plant.trigger, batch) for plant in plants]
    controlled = [predict(model, x, control.trigger, batch) for control in (truth.controls if truth else ())]
    return Counts.of(y, clean, triggered, [plant.labels for plant in plants], controlled, k=k)


def measure(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    truth: GroundTruth | None = None,
    *,
    num_classes: int | None = None,
    batch: int = 500,
) -> Measures:
    """ACC of a model, and ASR and RA of each planted trigger; arguments as for :func:`count`."""
    return count(model, x, y, truth, num_classes=num_classes, batch=batch).measures(truth)


def all_to_one(trigger: Trigger, target: int, num_classes: int) -> GroundTruth:
    """Ground truth of a single trigger that causes one label."""
    return GroundTruth((Plant(trigger, LabelMap(num_classes, target)),))


def der(*, acc: tuple[float, float], asr: tuple[float, float]) -> float:
    """Defence effectiveness rate of BackdoorBench, in [0, 1]: 0.5 is nothing gained.

    ``(max(0, ASR_0 - ASR_1) - max(0, ACC_0 - ACC_1) + 1) / 2``.

    Args:
        acc: Clean accuracy before and after the defence.
        asr: Attack success rate before and after.
    """
    return (max(0.0, asr[0] - asr[1]) - max(0.0, acc[0] - acc[1]) + 1) / 2


def rir(*, acc: tuple[float, float], ra: tuple[float, float]) -> float:
    """Robust improvement rate of BackdoorBench, in [0, 1]: as :func:`der`, with what robust accuracy gains."""
    return (max(0.0, ra[1] - ra[0]) - max(0.0, acc[0] - acc[1]) + 1) / 2


def _plants(truth: GroundTruth | None) -> tuple[Plant, ...]:
    return () if truth is None else truth.plants


def _by_class(y: Tensor, chosen: Tensor, k: int) -> tuple[int, ...]:
    return tuple(torch.bincount(y[chosen], minlength=k).tolist())


def _sum(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(a + b for a, b in zip(one, other, strict=True))
