"""Arms of K-Arm: triggers that are searched a few steps at a time."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bezoar.core.run import Run
from bezoar.core.space import MaskedSpace, Parameters
from bezoar.core.surgery import logits
from bezoar.core.trigger import InvertedTrigger
from bezoar.ops.cost import CostController

#: Pixels of the images that the authors' figures are for: sizes are brought to it.
AUTHORS_PIXELS = 224 * 224
#: Size of a trigger that the speed of shrinking is counted from, in the authors' pixels.
_FROM = 2500.0
#: Weight of the past in the running success rate.
_PAST = 0.7


@dataclass(frozen=True)
class Aim:
    """What a trigger shall do: send images of some labels to another one.

    Attributes:
        target: The label they are sent to.
        source: The label whose images they are; None for all but the target.
    """

    target: int
    source: int | None = None

    def of(self, y: Tensor) -> Tensor:
        """Positions of its images among ``(N,)`` labels."""
        return torch.nonzero(y != self.target if self.source is None else y == self.source).flatten()


@dataclass
class Arm:
    """The running search for one trigger.

    Attributes:
        aim: What it shall do.
        steps: Steps so far.
        found: Times that a smaller working trigger was found.
        reached: Largest success rate of a step.
        size: Size of the smallest working trigger in pixels; infinite while there is none.
        now: Size of the trigger as it is.
        speed: How fast the trigger shrank when it last did.
        rate: Running success rate.
    """

    aim: Aim
    model: nn.Module
    x: Tensor
    space: MaskedSpace
    controller: CostController
    lr: float
    batch: int
    run: Run
    steps: int = 0
    found: int = 0
    reached: float = 0.0
    size: float = float("inf")
    now: float = float("inf")
    speed: float = -float("inf")
    rate: float = 0.0
    parameters: Parameters = field(default_factory=dict)
    best: Parameters = field(default_factory=dict)

    def __post_init__(self) -> None:
        # A pair starts elsewhere than its target: a second try where the first start was a bad one.
        seed = self.run.seed if self.aim.source is None else self.run.seed + 1 + self.aim.source
        start = self.space.start([self.aim.target], seed)
        self.parameters = {name: value.to(self.run.device).requires_grad_() for name, value in start.items()}
        self.best = {name: value.detach().clone() for name, value in self.parameters.items()}
        self._cost = self.controller.start(1)
        self._adam = torch.optim.Adam(list(self.parameters.values()), lr=self.lr, betas=(0.5, 0.9))

    @property
    def trigger(self) -> InvertedTrigger:
        """The smallest working trigger; where there is none, the one it has now."""
        return self.space.harden(self.best if self.found else self.parameters, 0)

    def pull(self, steps: int) -> None:
        """Search on for some steps."""
        for _ in range(steps):
            self.run.check()
            self._step()

    def _step(self) -> None:
        images = self._images()
        size = self.space.size(self.parameters)
        out = logits(self.model, self.space.stamp(self.parameters, images).flatten(0, 1)).float()
        target = torch.full((len(images),), self.aim.target, device=out.device)
        loss = F.cross_entropy(out, target) + float(self._cost["cost"]) * size.sum()
        self._adam.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        measured = {name: value.detach().clone() for name, value in self.parameters.items()}
        self._adam.step()
        self.run.image_gradients += len(images)
        rate = float((out.argmax(1) == self.aim.target).float().mean())
        # A batch is small: the decision rests on the recent ones too, as in the scanners' search.
        self.rate = rate if self.steps == 0 else _PAST * self.rate + (1 - _PAST) * rate
        self.steps, self.now, self.reached = self.steps + 1, float(size.detach()), max(self.reached, rate)
        works = torch.tensor([self.rate], dtype=torch.float64)
        improved, _ = self.controller.decide(self._cost, works, size.detach().cpu().double())
        if bool(improved):
            self.best, self.size, self.found = measured, self.now, self.found + 1
            self.speed = (_FROM - self.scaled(self.now)) / (self.found + self.steps / 2)

    def scaled(self, size: float) -> float:
        """A size in pixels of the authors' images."""
        _, height, width = self.space.shape
        return size / (height * width) * AUTHORS_PIXELS

    def worth(self, beta: float) -> float:
        """What the bandit goes by: how fast the trigger shrank, and how small it is."""
        return self.speed + beta / max(self.scaled(self.now), 1e-6)

    def _images(self) -> Tensor:
        """Images of the next step: a fresh order for each pass, known from seed, aim and step alone."""
        size = min(self.batch, len(self.x))
        passes, at = divmod(self.steps, max(1, len(self.x) // size))
        source = self.run.generator("k-arm", self.aim.target, self.aim.source, passes)
        order = torch.randperm(len(self.x), generator=source)
        return self.x[order[at * size : (at + 1) * size]].to(self.run.device)
