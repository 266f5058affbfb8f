"""What purifiers that learn a mask of channels share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bezoar.core.method import Clean, Purifier
from bezoar.core.run import Run
from bezoar.core.surgery import frozen, logits
from bezoar.ops.augment import as_float
from bezoar.ops.channels import Gates, find_sites
from bezoar.ops.recipe import Recipe
from bezoar.purifiers._choose import accuracy, strongest

#: Channels with a higher mask than this are never pruned: where the sweeps of the public code of ANP and RNP end.
HIGHEST = 0.95
#: Of fewer images than this the accuracy is too coarse to choose by, and the confidence is what may not fall.
FEW = 50

#: A value for each channel, by name of the site.
Masks = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Masking(Purifier):
    """Settings of SGD on masks, and of the batches that they are learned from."""

    lr: float = 0.2
    momentum: float = 0.9
    batch: int = 128
    pad: int = 2
    flip: bool = False

    def __post_init__(self) -> None:
        self.require("lr", self.lr >= 0, "at least 0")
        self.require("momentum", 0 <= self.momentum < 1, "in [0, 1)")
        self.require("batch", self.batch >= 2, "at least 2, as BatchNorm cannot train on one image")
        self.require("pad", self.pad >= 0, "at least 0")

    def augmentation(self) -> Recipe:
        """Crop and flip of each batch."""
        return Recipe(pad=self.pad, flip=self.flip)


@dataclass(frozen=True, kw_only=True)
class Pruning(Masking):
    """Masks that decide which channels of the original model are switched off."""

    threshold: float | None = None
    tolerance: float = 0.03

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("threshold", self.threshold is None or 0 <= self.threshold <= 1, "in [0, 1], or None")
        self.require("tolerance", 0 <= self.tolerance <= 1, "in [0, 1]")

    def prune(self, model: nn.Module, learned: Learned, clean: Clean, run: Run) -> None:
        """Switch off the channels with the lowest masks.

        Those up to the threshold where it is set; otherwise as many as the tolerance allows.

        Args:
            model: Changed in place.
            learned: Masks by site.
            clean: Its held-out part is not looked at.
            run: Told of the threshold and the number of channels.
        """
        gates = gates_of(model, clean)
        ranks, lowest_first = learned.ranks()
        if self.threshold is None:
            most, step = int((lowest_first <= HIGHEST).sum()), -(-gates.count // 100)

            def shut(count: int) -> AbstractContextManager[None]:
                return gates.applied(gain=beyond(ranks, count))

            count = most_tolerated(model, [*range(step, most, step), most], shut, clean, self.tolerance, run)
        else:
            count = int((lowest_first <= self.threshold).sum())
        gates.gain = beyond(ranks, count)
        gates.fold()
        run.notes["pruned"], run.notes["channels"] = count, gates.count
        run.notes["threshold"] = round(float(lowest_first[count - 1]), 4) if count else None


@dataclass(frozen=True)
class Learned:
    """What came of learning masks.

    Attributes:
        masks: ``(channels,)`` values in [0, 1] by site.
        means: Their means over all steps: of two channels at 0, the one that got there first has the lower mean.
    """

    masks: Masks
    means: Masks

    def ranks(self) -> tuple[Masks, Tensor]:
        """Place of each channel by site, the lowest mask first, and all masks in this order."""
        masks, means = (torch.cat([*values.values()]).double().cpu() for values in (self.masks, self.means))
        by_mean = means.argsort(stable=True)
        order = by_mean[masks[by_mean].argsort(stable=True)]
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
        parts = torch.split(place, [len(mask) for mask in self.masks.values()])
        return dict(zip(self.masks, parts, strict=True)), masks[order]


def beyond(ranks: Masks, count: int) -> Masks:
    """0 for each of the first ``count`` channels, 1 for the others."""
    return {name: (place >= count).float() for name, place in ranks.items()}


def most_tolerated(
    model: nn.Module,
    counts: Sequence[int],
    shut: Callable[[int], AbstractContextManager[None]],
    clean: Clean,
    tolerance: float,
    run: Run,
) -> int:
    """How many channels to prune, judged by the clean images: 0 where they cannot tell or all numbers cost too much.

    Args:
        model: Left as it was.
        counts: Numbers to try, ascending.
        shut: Runs the model without so many channels.
        clean: Its held-out part is not looked at.
        tolerance: Share of the accuracy that it may cost; of the confidence where there are few images.
        run: Gets warnings.
    """
    if 2 * len(set(clean.y.tolist())) < clean.num_classes:
        run.warnings.append("Nothing is pruned: most labels have no clean image, so what pruning costs cannot be seen")
        return 0
    measure = accuracy if len(clean.x) >= FEW else confidence

    def measured_at(count: float) -> float:
        with shut(int(count)):
            return measure(model, as_float(clean.x), clean.y)

    floor = (1 - tolerance) * measure(model, as_float(clean.x), clean.y)
    chosen = strongest((count for count in counts if count > 0), measured_at, floor)
    if chosen is None:
        run.warnings.append("Nothing is pruned: no channel is suspect, or each costs more accuracy than tolerated")
    elif len(clean.x) < FEW:
        run.warnings.append(f"How much to prune was chosen from {len(clean.x)} clean images and may be far off")
    return int(chosen or 0)


@torch.no_grad()
def confidence(model: nn.Module, x: Tensor, y: Tensor, batch: int = 256) -> float:
    """Mean probability that the model gives the ``(N,)`` labels of ``(N, C, H, W)`` images, in eval mode."""
    device, total = device_of(model), 0.0
    with frozen(model):
        for part, truth in zip(torch.split(x, batch), torch.split(y, batch), strict=True):
            given = logits(model, part.to(device)).float().softmax(1).cpu()
            total += float(given.gather(1, truth.cpu().view(-1, 1)).sum())
    return total / len(x)


def gates_of(model: nn.Module, clean: Clean) -> Gates:
    """Gates on all sites of the model."""
    return Gates(find_sites(model, as_float(clean.x[:1]).to(device_of(model))))


def device_of(model: nn.Module) -> torch.device:
    """Where the model runs."""
    return next(model.parameters()).device


def train_mode(model: nn.Module, examples: int, run: Run) -> None:
    """Train mode, as in the public code of ANP, RNP and NFT; eval mode where a batch holds a single example."""
    model.train(examples > 1)
    if examples == 1:
        run.warnings.append("BatchNorm cannot train on a single image: its statistics are left as they are")


def learn(
    masks: Masks,
    losses: Callable[[], Tensor],
    steps: int,
    *,
    lr: Callable[[int], float],
    momentum: float,
    lowest: dict[str, float] | None = None,
    progress: Callable[[int, float], None],
) -> Learned:
    """SGD on masks, each kept between its lowest value (0 by default) and 1 after every step.

    Args:
        masks: Changed in place; need gradients.
        losses: Loss of the next step, a function of the masks.
        steps: Number of steps.
        lr: Learning rate of a step, counted from 0.
        momentum: That of SGD.
        lowest: Least value by site.
        progress: Told of the number of steps done and the loss.

    Raises:
        FloatingPointError: The loss is no longer finite.
    """
    means = {name: torch.zeros_like(mask) for name, mask in masks.items()}
    optimizer = torch.optim.SGD(list(masks.values()), lr=lr(0), momentum=momentum)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr(step)
        optimizer.zero_grad(set_to_none=True)
        loss = losses()
        if not math.isfinite(float(loss.detach())):
            raise FloatingPointError("the loss is not finite")
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        with torch.no_grad():
            for name, mask in masks.items():
                mask.clamp_(lowest[name] if lowest else 0.0, 1.0)
                means[name] += mask / steps
        progress(step + 1, float(loss.detach()))
    return Learned({name: mask.detach() for name, mask in masks.items()}, means)
