"""NFT: train nothing but a mask on the gains of the normalisations, on mixed clean images."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bezoar.core.method import Clean
from bezoar.core.run import Run
from bezoar.core.surgery import logits
from bezoar.core.trigger import InvertedTrigger
from bezoar.ops.augment import mixup
from bezoar.ops.batches import drawn
from bezoar.ops.channels import Gates
from bezoar.purifiers._masks import Masking, Masks, device_of, gates_of, learn

#: The learning rate falls to ``lr_floor`` along a cosine in so many stairs.
_STAIRS = 5


@dataclass(frozen=True, kw_only=True)
class NFT(Masking):
    """Neural mask fine-tuning: masks on the gains of the channels, trained on MixUp images, deeper ones more freely.

    The mask of layer l (1, 2, ...) stays in ``[bound exp(-decay l), 1]``: shallow layers keep doing what they did. All
    weights stay, and the masks are folded into the gains; BatchNorm is in train mode, so its statistics are part of the
    result. In nets of few layers the bounds stay high and the method can do little.

    Args:
        steps: Steps, at least 1. One-shot runs take as many as others.
        lr: Learning rate of the masks at the beginning (SGD), at least 0.
        lr_floor: What it falls to along a cosine, in five stairs, at least 0.
        momentum: That of SGD, in [0, 1).
        batch: Images per step, drawn with replacement, at least 2.
        mixup: Alpha of MixUp's Beta distribution, at least 0; 0 switches MixUp off.
        penalty: Factor on the summed distance of the masks from 1, divided by the number of clean images per class, so
            that with fewer images the masks stay closer to 1. At least 0.
        bound: Bound of layer 0, in [0, 1].
        decay: How fast the bound falls with depth, at least 0.
        first: Whether the first normalisation has a mask too; the authors leave out that of a ResNet's stem, and count
            the layers from the next.
        pad: Random crop after padding by this many pixels (the authors: 4 of 32).
        flip: Random horizontal flip (the authors: on).

    References:
        Karim et al., "Augmented Neural Fine-Tuning for Efficient Backdoor Purification", ECCV 2024, and its public code
        for all values.
    """

    steps: int = 1000
    lr: float = 0.05
    lr_floor: float = 0.02
    momentum: float = 0.95
    mixup: float = 1.0
    penalty: float = 1e-3
    bound: float = 0.8
    decay: float = 0.5
    first: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("steps", self.steps >= 1, "at least 1")
        for name in ("lr_floor", "mixup", "penalty", "decay"):
            self.require(name, getattr(self, name) >= 0, "at least 0")
        self.require("bound", 0 <= self.bound <= 1, "in [0, 1]")

    def purify(self, model: nn.Module, clean: Clean, run: Run, triggers: dict[int, InvertedTrigger]) -> nn.Module:
        """See :class:`bezoar.core.method.Purifier`; the triggers are not used."""
        del triggers
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        gates = self.gates(model, clean)
        masks = {name: gain.requires_grad_() for name, gain in gates.gain.items()}
        model.train()
        try:
            with gates.applied(gain=masks):
                self._learn(model, masks, clean, run)
        except FloatingPointError:
            run.warnings.append("The loss was no longer finite and the training ended there: lower lr")
        gates.gain = {name: mask.detach() for name, mask in masks.items()}
        gates.fold()
        run.notes["channels"] = gates.count
        run.notes["below_half"] = sum(int((mask < 0.5).sum()) for mask in gates.gain.values())
        return model

    def gates(self, model: nn.Module, clean: Clean) -> Gates:
        """Gates on all sites, but the first where it is left out and there are others."""
        sites = gates_of(model, clean).sites
        return Gates(sites if self.first or len(sites) == 1 else sites[1:])

    def bounds(self, count: int) -> list[float]:
        """Least mask of each of ``count`` layers."""
        return [self.bound * math.exp(-self.decay * layer) for layer in range(1, count + 1)]

    def lr_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0: constant for a fifth of the steps at a time."""
        stair = step * _STAIRS // self.steps
        return self.lr_floor + (self.lr - self.lr_floor) * (1 + math.cos(math.pi * stair / _STAIRS)) / 2

    def _learn(self, model: nn.Module, masks: Masks, clean: Clean, run: Run) -> None:
        generator = run.generator("nft")
        batches = drawn(
            clean.x, clean.y, self.batch, self.steps, generator, device=device_of(model), recipe=self.augmentation()
        )
        # At least one image per class: with fewer the authors' factor would grow without end.
        weight = self.penalty / max(1.0, len(clean.x) / clean.num_classes)

        def loss() -> Tensor:
            x, y = next(batches)
            away = torch.stack([(1 - mask).abs().sum() for mask in masks.values()]).sum()
            return mixed_loss(model, x, y, self.mixup, generator) + weight * away

        learn(
            masks,
            loss,
            self.steps,
            lr=self.lr_at,
            momentum=self.momentum,
            lowest=dict(zip(masks, self.bounds(len(masks)), strict=True)),
            progress=lambda done, value: run.progress.training(done, self.steps, value),
        )


def mixed_loss(model: nn.Module, x: Tensor, y: Tensor, alpha: float, generator: torch.Generator) -> Tensor:
    """Cross-entropy of images mixed in pairs, with both labels in the shares of the images.

    Args:
        model: Gives logits.
        x: ``(B, C, H, W)`` images.
        y: ``(B,)`` labels.
        alpha: That of the Beta distribution; 0 mixes nothing.
        generator: A CPU generator.
    """
    if not alpha:
        return F.cross_entropy(logits(model, x), y)
    x, pairs, share = mixup(x, alpha, generator)
    out = logits(model, x)
    return share * F.cross_entropy(out, y) + (1 - share) * F.cross_entropy(out, y[pairs.to(y.device)])
