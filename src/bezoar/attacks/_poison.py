"""What attacks that only change training examples share: which examples change, and how."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bezoar.attacks._attack import Attack, Backdoored, GroundTruth, Plant, Training
from bezoar.attacks._labels import Kind, LabelMap
from bezoar.core.errors import SettingError
from bezoar.core.examples import Examples
from bezoar.core.trigger import Trigger
from bezoar.ops.fit import as_float


def _none() -> Tensor:
    return torch.empty(0, dtype=torch.long)


@dataclass(frozen=True)
class Poisoned:
    """A poisoned training set and its ground truth.

    Attributes:
        data: Examples as the victim sees them; images of the type they came in (uint8 is rounded, like a saved file).
        truth: What the attacker knows.
        index: ``(P,)`` positions of the poisoned examples, ascending.
        cover: ``(Q,)`` positions of examples that carry a trigger and keep their true label, ascending.
    """

    data: Examples
    truth: GroundTruth
    index: Tensor
    cover: Tensor = field(default_factory=_none)


@dataclass(frozen=True, kw_only=True)
class PoisonAttack(Attack):
    """A dirty-label or clean-label attack that only changes training examples.

    Args:
        target: Label that the trigger shall cause.
        seed: Chooses the examples and any random part of the trigger.
        rate: Poisoned share of the training set (dirty label; the target class is left out, as ASR leaves it out) or of
            the target class (clean label), in (0, 1].
        label_map: ``all-to-one`` or ``all-to-all`` (label y becomes ``(y + 1) mod K``).
        sources: Poison images of these classes only, so that the trigger works on them only; empty for all.
        cover_classes: Classes whose images carry the trigger under their true label; empty for all that are neither
            sources nor the target.
        cover_rate: Share of the training set that does so, in [0, 1).
    """

    rate: float = 0.1
    label_map: Kind = "all-to-one"
    sources: tuple[int, ...] = ()
    cover_classes: tuple[int, ...] = ()
    cover_rate: float = 0.0

    @property
    def clean_label(self) -> bool:
        """Whether examples of the target class are changed and keep their label."""
        return False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("rate", 0 < self.rate <= 1, "in (0, 1]")
        self.require("cover_rate", 0 <= self.cover_rate < 1, "in [0, 1)")
        both = set(self.cover_classes) & {*self.sources, self.target}
        self.require("cover_classes", not both, "neither sources nor the target")
        one = self.label_map == "all-to-one" or not self.clean_label
        self.require("label_map", one, "all-to-one, since a clean-label attack keeps the labels")

    @abstractmethod
    def trigger(self, shape: tuple[int, int, int]) -> Trigger:
        """The test-time trigger for images of ``shape`` (C, H, W)."""

    def train_trigger(self, shape: tuple[int, int, int]) -> Trigger:
        """What is stamped on training examples, where that is not the test-time trigger."""
        return self.trigger(shape)

    def poison(self, data: Examples, training: Training | None = None) -> Poisoned:
        """Poison a copy of the examples.

        Args:
            data: Clean examples.
            training: Means to train a helper network, for attacks that need one.

        Raises:
            SettingError: The rate asks for more examples than may be poisoned, or a label is out of range.
        """
        del training
        return self.stamp_with(data, self.train_trigger(data.shape), self.trigger(data.shape))

    def stamp_with(self, data: Examples, train_trigger: Trigger, trigger: Trigger) -> Poisoned:
        """Poison a copy of the examples with given triggers, for attacks that learn theirs."""
        labels = self.labels(data.num_classes)
        index = self.choose(data.y, labels)
        cover = self.choose_cover(data.y, labels, index)
        x, y = data.x.clone(), data.y.clone()
        both = torch.cat([index, cover])
        x[both] = stamped(train_trigger, x[both])
        if not self.clean_label:
            y[index] = labels(y[index])
        truth = GroundTruth((Plant(trigger, labels),))
        return Poisoned(Examples(x, y, data.num_classes), truth, index, cover)

    def implant(self, data: Examples, training: Training) -> Backdoored:
        """See :class:`Attack`: train on the poisoned examples as on any others."""
        poisoned = self.poison(data, training)
        model = training.fit("victim", poisoned.data)
        return Backdoored(model, poisoned.truth, poisoned.index, poisoned.cover)

    def labels(self, num_classes: int) -> LabelMap:
        """The attacker's label map."""
        return LabelMap(num_classes, self.target, self.label_map, self.sources)

    def choose(self, y: Tensor, labels: LabelMap) -> Tensor:
        """``(P,)`` positions to poison, ascending."""
        allowed = torch.nonzero(y == self.target if self.clean_label else labels.applies(y)).flatten()
        count = max(1, int(self.rate * (len(allowed) if self.clean_label else len(y))))
        return self._pick("poison", allowed, count, "rate")

    def choose_cover(self, y: Tensor, labels: LabelMap, index: Tensor) -> Tensor:
        """``(Q,)`` positions of cover examples, ascending; none of them is poisoned."""
        count = int(self.cover_rate * len(y))
        if not count:
            return _none()
        classes = torch.tensor(
            self.cover_classes or [k for k in range(labels.num_classes) if k not in (*self.sources, self.target)]
        )
        allowed = torch.isin(y, classes)
        allowed[index] = False
        return self._pick("cover", torch.nonzero(allowed).flatten(), count, "cover_rate")

    def _pick(self, key: str, allowed: Tensor, count: int, name: str) -> Tensor:
        if count > len(allowed):
            raise SettingError(
                f"{type(self).__name__}.{name} {getattr(self, name):g} asks for {count} examples, "
                f"only {len(allowed)} may be chosen"
            )
        generator = torch.Generator().manual_seed(self.seed + (7919 if key == "cover" else 0))
        return allowed[torch.randperm(len(allowed), generator=generator)[:count]].sort().values


def stamped(trigger: Trigger, x: Tensor, batch: int = 512) -> Tensor:
    """Stamp images and keep their type: uint8 is rounded to the nearest grey level, as a saved file would be."""
    out = torch.cat([trigger(as_float(part)) for part in torch.split(x, batch)]) if len(x) else x
    return (out * 255).round().clamp(0, 255).to(torch.uint8) if x.dtype == torch.uint8 and len(x) else out
