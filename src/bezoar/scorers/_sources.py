"""Triggers for pairs of source and target: each row has images of its own sources."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bezoar.core.run import Run
from bezoar.core.space import MaskedSpace
from bezoar.core.surgery import logits
from bezoar.core.trigger import InvertedTrigger
from bezoar.ops.cost import CostController
from bezoar.ops.invert import target_loss

#: Weight of the past in the running success rate.
_PAST = 0.7
_PIXELS_PER_PASS = 256 * 32 * 32


class SourceSearch:
    """The running search for one trigger a row, each for one target and the sources of its own.

    Args:
        model: Eval mode, frozen.
        x: ``(N, C, H, W)`` clean images in [0, 1], on the CPU.
        members: For each label, the positions of its images.
        targets: Target of each row.
        sources: ``(T, K)`` bool, sources of each row, at least one; none is its target, and all have images.
        controller: Weight of the size.
        batch: Images of a step and row.
        lr: Step size of Adam.
        key: Names the draws.
        run: Device, seed and budget.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        members: Sequence[Tensor],
        targets: Sequence[int],
        sources: Tensor,
        *,
        controller: CostController,
        batch: int,
        lr: float,
        key: str,
        run: Run,
    ) -> None:
        channels, height, width = x.shape[1:]
        self.model, self.x, self.members, self.run = model, x, members, run
        self.targets, self.sources = list(targets), sources.clone()
        self.space = MaskedSpace((channels, height, width), start_mask=0.12)
        self.controller, self.batch = controller, batch
        start = self.space.start(self.targets, run.seed)
        self.parameters = {name: value.to(run.device).requires_grad_() for name, value in start.items()}
        self.best = {name: value.detach().clone() for name, value in self.parameters.items()}
        self.cost = controller.start(len(self.targets))
        self.success = torch.zeros(len(self.targets), dtype=torch.float64)
        self.current = torch.full((len(self.targets),), torch.inf, dtype=torch.float64)
        self.steps = 0
        self._adam = torch.optim.Adam(list(self.parameters.values()), lr=lr, betas=(0.5, 0.9))
        self._draws = run.generator("source-specific", key)

    def step(self) -> None:
        """One step of all rows.

        Raises:
            BudgetSpent: The time is over.
        """
        self.run.check()
        self._adam.zero_grad(set_to_none=True)
        size = self.space.size(self.parameters)
        (self.cost["cost"].to(size) * size).sum().backward()  # type: ignore[no-untyped-call]
        index = torch.stack([self._images(row) for row in range(len(self.targets))])
        rate = torch.cat([self._chunk(rows, index[rows]) for rows in self._chunks(self.batch)])
        self.run.image_gradients += index.numel()
        self.success = rate if self.steps == 0 else _PAST * self.success + (1 - _PAST) * rate
        self.current = size.detach().cpu().double()
        improved, _ = self.controller.decide(self.cost, self.success, self.current)
        rows = torch.nonzero(improved).flatten().to(self.run.device)
        for name, value in self.parameters.items():
            self.best[name][rows] = value.detach()[rows]
        self._adam.step()  # last: the decision is about the triggers that were measured
        self.steps += 1

    @torch.no_grad()
    def losses(self, each: int) -> Tensor:
        """``(T, K)`` mean losses on up to ``each`` images of every label; NaN for labels without images."""
        out = torch.full((len(self.targets), len(self.members)), torch.nan)
        index = torch.cat([rows[:each] for rows in self.members])
        owner = torch.cat([torch.full((len(rows[:each]),), label) for label, rows in enumerate(self.members)])
        for rows in self._chunks(len(index)):
            self.run.check()
            part = {name: value[rows] for name, value in self.parameters.items()}
            targets = torch.tensor(self.targets[rows], device=self.run.device)
            answer = torch.cat(
                [
                    self._answers(self.space.stamp(part, self.x[some].to(self.run.device)))
                    for some in torch.split(index, 256)
                ],
                1,
            )
            loss = target_loss(answer.flatten(0, 1), targets.repeat_interleave(len(index)), "ce")
            table = loss.view(len(targets), -1).cpu()
            for label in range(len(self.members)):
                if bool((owner == label).any()):
                    out[rows, label] = table[:, owner == label].mean(1)
        return out

    @property
    def sizes(self) -> Tensor:
        """``(T,)`` size of the smallest working trigger; infinite where none worked."""
        return self.cost["best"]

    def trigger(self, row: int) -> InvertedTrigger:
        """The smallest working trigger of a row; where none has worked, the one it has now."""
        source = self.best if torch.isfinite(self.sizes[row]) else self.parameters
        return self.space.harden(source, row)

    def _images(self, row: int) -> Tensor:
        """Positions of images of a row's sources, as many of each as chance gives."""
        sources = torch.nonzero(self.sources[row]).flatten()
        chosen = sources[torch.randint(len(sources), (self.batch,), generator=self._draws)].tolist()
        draws = zip(chosen, torch.rand(self.batch, generator=self._draws).tolist(), strict=True)
        picked = [self.members[label][int(place * len(self.members[label]))] for label, place in draws]
        return torch.stack(picked)

    def _chunks(self, images: int) -> list[slice]:
        _, height, width = self.space.shape
        count = max(1, _PIXELS_PER_PASS // (min(images, 256) * height * width))
        return [slice(at, at + count) for at in range(0, len(self.targets), count)]

    def _chunk(self, rows: slice, index: Tensor) -> Tensor:
        targets = torch.tensor(self.targets[rows], device=self.run.device)
        mask, pattern = self.space.values({name: value[rows] for name, value in self.parameters.items()})
        images = self.x[index].to(self.run.device)
        answer = self._answers((1 - mask[:, None]) * images + mask[:, None] * pattern[:, None])
        wanted = targets.repeat_interleave(self.batch)
        loss = target_loss(answer.flatten(0, 1), wanted, "ce")
        (loss.sum() / self.batch).backward()  # type: ignore[no-untyped-call]
        hit = answer.detach().argmax(2) == targets[:, None]
        return hit.double().mean(1).cpu()

    def _answers(self, stamped: Tensor) -> Tensor:
        """``(T, B, K)`` logits of ``(T, B, C, H, W)``."""
        flat = stamped.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        return logits(self.model, flat).float().view(*stamped.shape[:2], -1)
