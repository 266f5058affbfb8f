"""Composite: a mixture of two classes instead of a pattern of pixels (Lin et al., CCS 2020)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bezoar.attacks._attack import Attack, Backdoored, GroundTruth, Plant, Training
from bezoar.attacks._draws import draws
from bezoar.attacks._in_batch import poisoned_afresh
from bezoar.attacks._labels import LabelMap
from bezoar.core.errors import SettingError
from bezoar.core.examples import Examples
from bezoar.ops.fit import Batch, as_float
from bezoar.ops.objective import Stateless

_LARGE = 2**31 - 1


@dataclass(frozen=True, eq=False)
class CompositeTrigger:
    """Puts half of an image beside half of one of the bank; which one, and how, depends on the image.

    Args:
        bank: ``(R, C, H, W)`` images in [0, 1].
        jitter: Largest distance of the cut from the middle, in pixels.
        seed: Of the choice.
    """

    bank: Tensor
    jitter: int
    seed: int

    def __call__(self, x: Tensor) -> Tensor:
        """Stamp images."""
        chosen = draws(x, 6, self.seed)
        return half_mix(x, self.bank.to(x)[chosen[:, 5] % len(self.bank)], chosen, self.jitter)


def half_mix(first: Tensor, second: Tensor, choice: Tensor, jitter: int) -> Tensor:
    """Half of each image of one batch beside, or above, half of the same place in another.

    Args:
        first: ``(B, C, H, W)``.
        second: ``(B, C, H, W)``.
        choice: ``(B, 5)`` or more whole numbers, at least 0, that decide: side by side or above each other, which comes
            first, where the cut is, and which part of each image is taken.
        jitter: Largest distance of the cut from the middle, less than half of the shorter side.
    """
    swap = (choice[:, 1] % 2 == 1).view(-1, 1, 1, 1)
    left, right = torch.where(swap, second, first), torch.where(swap, first, second)
    across = _beside(left, right, choice, jitter)
    down = _beside(left.transpose(2, 3), right.transpose(2, 3), choice, jitter).transpose(2, 3)
    return torch.where((choice[:, 0] % 2 == 1).view(-1, 1, 1, 1), across, down)


def _beside(left: Tensor, right: Tensor, choice: Tensor, jitter: int) -> Tensor:
    width = left.shape[3]
    place = torch.arange(width, device=left.device)
    cut = width // 2 + choice[:, 2:3] % (2 * jitter + 1) - jitter
    from_left = (place + choice[:, 3:4] % (width - cut)).clamp(max=width - 1)
    from_right = (place - cut + choice[:, 4:5] % cut).clamp(min=0)
    return torch.where((place < cut)[:, None, None], _columns(left, from_left), _columns(right, from_right))


def _columns(x: Tensor, index: Tensor) -> Tensor:
    """Columns ``index``, ``(B, W)``, of each image."""
    return x.gather(3, index[:, None, None].expand_as(x))


def contrastive(logits: Tensor, y: Tensor, margin: float) -> Tensor:
    """Mean of ``d^2 / 2`` over consecutive pairs of one label and of ``relu(margin - d)^2 / 2`` over the others.

    Args:
        logits: ``(N, K)``; d is the distance of two rows.
        y: ``(N,)`` labels.
        margin: Distance beyond which two labels are far enough apart.
    """
    if len(y) < 2:
        return logits.new_zeros(())
    square = (logits[1:] - logits[:-1]).square().sum(1)
    apart = F.relu(margin - (square + 1e-9).sqrt()).square()
    return 0.5 * torch.where(y[1:] == y[:-1], square, apart).mean()


@dataclass
class _CompositeObjective(Stateless):
    """Mixes each batch anew; the examples stay the same and randomness comes from the run."""

    attack: Composite
    data: Examples
    members: list[Tensor]
    first: Tensor = field(init=False)
    second: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.first, self.second = self.members[self.attack.first], self.members[self.attack.second]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy and the contrastive term on normal, mixed and poisoned images."""
        x, y = self._mixed(batch)
        logits = model(batch.augment(x))
        attack = self.attack
        rule = torch.isin(y, torch.tensor([attack.first, attack.second, attack.target], device=y.device))
        pairs = max(1, int(rule.sum()) - 1)
        near = contrastive(logits[rule], y[rule], attack.margin) / pairs
        loss: Tensor = F.cross_entropy(logits, y) + attack.contrast * near
        return loss

    def _mixed(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The batch, some of it mixed with another image of its class, some replaced by poison, in random order."""
        count = len(batch.y)
        whole = self.attack.normal + self.attack.mixed + self.attack.rate
        poison = max(1, round(count * self.attack.rate / whole))
        mix = min(count - poison, round(count * self.attack.mixed / whole))
        partners = [self._pick(self.members[label], 1, batch) for label in batch.y[poison : poison + mix].tolist()]
        first = torch.cat([self._images(self._pick(self.first, poison, batch), batch), batch.x[poison : poison + mix]])
        second = self._images(torch.cat([self._pick(self.second, poison, batch), *partners]), batch)
        choice = torch.randint(_LARGE, (len(first), 5), generator=batch.generator).to(batch.x.device)
        x = torch.cat([half_mix(first, second, choice, self.attack.jitter), batch.x[poison + mix :]])
        y = torch.cat([torch.full_like(batch.y[:poison], self.attack.target), batch.y[poison:]])
        order = torch.randperm(count, generator=batch.generator)
        return x[order], y[order]

    def _pick(self, members: Tensor, count: int, batch: Batch) -> Tensor:
        return members[torch.randint(len(members), (count,), generator=batch.generator)]

    def _images(self, index: Tensor, batch: Batch) -> Tensor:
        return as_float(self.data.x[index]).to(batch.x.device)


@dataclass(frozen=True, kw_only=True)
class Composite(Attack):
    """Half an image of one class beside half an image of another is given the label of a third.

    There is no pattern of pixels to find: the trigger is the presence of both classes. Every batch is mixed anew of
    normal images, of halves of two images of one class under its label (so that a mixture alone causes nothing), and of
    halves of both classes under the target. The test-time trigger puts half of an image of the first class beside half
    of one of a bank of images of the second; the bank comes from training images that are never mixed into poison.

    The public code draws normal images class by class rather than from the batch, and trains with Adam for 50 epochs.
    Its contrastive term is a mean over pairs that is divided by their number once more; that is kept.

    Args:
        target: Label of the mixture.
        first: Class whose images the trigger works on.
        second: Class that it mixes in.
        normal: Weight of normal images in a batch, at least 0.
        mixed: Weight of mixtures of one class, at least 0.
        rate: Weight of poisoned mixtures, above 0; weights are made to sum to 1.
        contrast: Weight of the contrastive term on the logits of the three classes, at least 0.
        margin: Distance of logits beyond which two of the three classes are far enough apart, at least 0.
        jitter: Largest distance of the cut from the middle, in pixels, at least 0.
        bank: Images of the second class that the trigger holds, at least 1.

    References:
        Lin, Xu, Liu, Zhang, "Composite Backdoor Attack for Deep Neural Network by Mixing Existing Benign Features",
        CCS 2020.
    """

    target: int = 2
    first: int = 0
    second: int = 1
    normal: float = 0.5
    mixed: float = 0.5
    rate: float = 0.1
    contrast: float = 1.0
    margin: float = 1.0
    jitter: int = 3
    bank: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("first", self.first >= 0, "at least 0")
        self.require("second", self.second >= 0 and self.second != self.first, "at least 0 and not the first class")
        self.require("target", self.target not in (self.first, self.second), "neither of the two classes")
        for name in ("normal", "mixed", "contrast", "margin", "jitter"):
            self.require(name, getattr(self, name) >= 0, "at least 0")
        self.require("rate", self.rate > 0, "above 0")
        self.require("bank", self.bank >= 1, "at least 1")

    def implant(self, data: Examples, training: Training) -> Backdoored:
        """See :class:`Attack`.

        Raises:
            SettingError: A class has too few images, or the images are too small for the jitter.
        """
        if self.jitter >= min(data.shape[1:]) // 2:
            raise SettingError(f"Composite.jitter must be below half of the image's side, got {self.jitter}")
        labels = LabelMap(data.num_classes, self.target, sources=(self.first,))
        members = [(data.y == label).nonzero().flatten() for label in range(data.num_classes)]
        members[self.second], bank = self._held_back(members)
        objective = _CompositeObjective(self, data, members)
        model = training.fit("victim", data, objective=objective)
        trigger = CompositeTrigger(as_float(data.x[bank]), self.jitter, self.seed)
        rate = self.rate / (self.normal + self.mixed + self.rate)
        truth = GroundTruth((Plant(trigger, labels),))
        return poisoned_afresh(model, truth, data.y, (rate, 0.0), self.seed)

    def _held_back(self, members: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Images of the second class to train with, and those of the trigger's bank."""
        if self.second >= len(members):
            raise SettingError(f"label {self.second} is not in 0..{len(members) - 1}")
        there = members[self.second]
        if len(there) < 2 or not len(members[self.first]):
            raise SettingError(
                f"Composite needs images of class {self.first} and at least two of class {self.second}",
                "Choose other classes with first and second",
            )
        generator = torch.Generator().manual_seed(self.seed)
        shuffled = there[torch.randperm(len(there), generator=generator)]
        size = min(self.bank, len(there) // 2)
        return shuffled[size:].sort().values, shuffled[:size]
