"""The published inversion of Neural Cleanse for many labels, one iteration of all of them after the other.

What :func:`bezoar.ops.reference.invert_label` does label by label, in chunks of labels that fit into memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bezoar.core.run import Run, generator
from bezoar.core.space import MaskedSpace, Parameters
from bezoar.core.surgery import logits
from bezoar.core.trigger import MaskedTrigger, trigger_of, trigger_tensors
from bezoar.ops.cost import CostController
from bezoar.ops.invert import Loss, target_loss


@dataclass(frozen=True, kw_only=True)
class Iteration:
    """One iteration: updates on random batches, then one decision on their averages.

    Args:
        batches: Updates.
        batch: Images of an update.
        lr: Step size of Adam (0.5, 0.9).
        loss: ``ce`` (paper) or ``linear`` (code).
        pixels_per_pass: Bound on labels x images x H x W of one forward pass.
    """

    batches: int = 31
    batch: int = 32
    lr: float = 0.1
    loss: Loss = "ce"
    pixels_per_pass: int = 256 * 32 * 32


@dataclass(frozen=True)
class Found:
    """What the search for one label came to.

    Attributes:
        trigger: The smallest working one, or the last one where none worked.
        size: Its mask norm in pixels.
        works: Whether any reached the success rate.
        iterations: How many it took.
    """

    trigger: MaskedTrigger
    size: float
    works: bool
    iterations: int


class LockStep:
    """Running searches of several labels. Labels that are done leave; :attr:`found` has them.

    The draws of a label depend on the seed and the label alone, so neither chunks nor the other labels change anything.

    Args:
        model: Eval mode, frozen.
        x: ``(N, C, H, W)`` clean images of all labels; the authors leave none out.
        labels: Labels to invert.
        controller: Weight of the mask norm.
        iteration: What an iteration is.
        seed: Start and order of the images.
        run: Device, and where gradients are counted.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        labels: list[int],
        *,
        controller: CostController,
        iteration: Iteration,
        seed: int,
        run: Run,
    ) -> None:
        self.found: dict[int, Found] = {}
        self.iterations = 0
        _, height, width = x.shape[1:]
        size = max(1, iteration.pixels_per_pass // (iteration.batch * height * width))
        self._chunks = [
            _Chunk(model, x, labels[at : at + size], controller, iteration, seed, run)
            for at in range(0, len(labels), size)
        ]

    @property
    def labels(self) -> list[int]:
        """Labels that are still searched."""
        return [label for chunk in self._chunks for label in chunk.labels]

    @property
    def norms(self) -> Tensor:
        """``(T,)`` mask norms of the searched labels, means over the last iteration."""
        return torch.cat([chunk.norms for chunk in self._chunks]) if self._chunks else torch.empty(0)

    def iterate(self) -> None:
        """One iteration of every label; what it finds done is taken out.

        Raises:
            BudgetSpent: The time is over.
        """
        # A chunk that the budget stops short of must not be an iteration behind when a checkpoint is taken.
        for chunk in self._chunks:
            if chunk.iterations == self.iterations:
                chunk.run.check()
                done = chunk.iterate()
                self.found |= {chunk.labels[row]: chunk.result(row) for row in done}
                chunk.keep([row for row in range(len(chunk.labels)) if row not in set(done)])
        self._chunks = [chunk for chunk in self._chunks if chunk.labels]
        self.iterations += 1

    def results(self) -> dict[int, Found]:
        """What all labels have come to so far."""
        running = {label: chunk.result(row) for chunk in self._chunks for row, label in enumerate(chunk.labels)}
        return self.found | running

    def state(self) -> dict[str, Any]:
        """Tensors and numbers that :meth:`restore` continues from."""
        return {
            "iterations": self.iterations,
            "found": {
                label: {"size": f.size, "works": f.works, "at": f.iterations, "trigger": trigger_tensors(f.trigger)}
                for label, f in self.found.items()
            },
            "chunks": [chunk.state() for chunk in self._chunks],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a state of the same search."""
        self.iterations = int(state["iterations"])
        for label, saved in state["found"].items():
            trigger = trigger_of(saved["trigger"])
            assert isinstance(trigger, MaskedTrigger)
            self.found[int(label)] = Found(trigger, saved["size"], saved["works"], saved["at"])
        by_first = {first: chunk for chunk in self._chunks for first in chunk.labels}
        self._chunks = [by_first[saved["labels"][0]].restored(saved) for saved in state["chunks"]]


class _Chunk:
    """Labels that go through the model together."""

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        labels: list[int],
        controller: CostController,
        iteration: Iteration,
        seed: int,
        run: Run,
    ) -> None:
        channels, height, width = x.shape[1:]
        self.model, self.x, self.labels = model, x, list(labels)
        self.controller, self.settings, self.run = controller, iteration, run
        self.space = MaskedSpace((channels, height, width))
        self.parameters = {k: v.to(run.device).requires_grad_() for k, v in self.space.start(labels, seed).items()}
        self.best: list[MaskedTrigger | None] = [None] * len(labels)
        self.cost = controller.start(len(labels))
        self.norms = torch.full((len(labels),), float("inf"), dtype=torch.float64)
        self.orders = [generator("reference", seed, label) for label in labels]
        self.optimizer = self._adam(self.parameters)
        self.iterations = 0

    def iterate(self) -> list[int]:
        """One iteration; gives the rows that are done."""
        cost = self.cost["cost"].to(self.run.device)
        targets = torch.tensor(self.labels, device=self.run.device)
        rates, norms = [], []
        for _ in range(self.settings.batches):
            rate, norm = self._update(targets, cost)
            rates.append(rate)
            norms.append(norm)
        self.optimizer.zero_grad(set_to_none=True)  # the next chunk needs the memory
        self.run.image_gradients += len(self.labels) * self.settings.batches * self.settings.batch
        self.norms = torch.stack(norms).mean(0).cpu()
        improved, done = self.controller.decide(self.cost, torch.stack(rates).mean(0).cpu(), self.norms)
        for row in torch.nonzero(improved).flatten().tolist():
            self.best[row] = self.space.harden(self.parameters, row)
        self.iterations += 1
        return [int(row) for row in torch.nonzero(done).flatten()]

    def _update(self, targets: Tensor, cost: Tensor) -> tuple[Tensor, Tensor]:
        count, batch = len(self.labels), self.settings.batch
        index = torch.cat([torch.randint(len(self.x), (batch,), generator=order) for order in self.orders])
        images = self.x[index].to(self.run.device).view(count, batch, *self.x.shape[1:])
        mask, pattern = (value[:, None] for value in self.space.values(self.parameters))
        stamped = ((1 - mask) * images + mask * pattern).flatten(0, 1)
        out = logits(self.model, stamped.contiguous(memory_format=torch.channels_last)).float()
        wanted = targets.repeat_interleave(batch)
        size = self.space.size(self.parameters)
        loss = target_loss(out, wanted, self.settings.loss).view(count, batch).mean(1) + cost.to(size) * size
        self.optimizer.zero_grad(set_to_none=True)
        loss.sum().backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        hit = (out.argmax(1) == wanted).view(count, batch).double().mean(1)
        return hit.detach(), size.detach().double()

    def result(self, row: int) -> Found:
        """What a row has come to."""
        best = self.best[row]
        if best is None:
            return Found(self.space.harden(self.parameters, row), float(self.norms[row]), False, self.iterations)
        return Found(best, float(self.cost["best"][row]), True, self.iterations)

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows only."""
        if len(rows) == len(self.labels):
            return
        index = torch.tensor(rows, dtype=torch.long)
        moved = index.to(self.run.device)
        old = self.optimizer.state_dict()["state"]
        self.labels = [self.labels[row] for row in rows]
        self.orders = [self.orders[row] for row in rows]
        self.best = [self.best[row] for row in rows]
        self.parameters = {k: v.detach()[moved].clone().requires_grad_() for k, v in self.parameters.items()}
        self.cost = {k: v[index] for k, v in self.cost.items()}
        self.norms = self.norms[index]
        moments = {
            i: {k: v[moved] if k.startswith("exp_avg") else v for k, v in entry.items()} for i, entry in old.items()
        }
        self.optimizer = self._adam(self.parameters)
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})

    def state(self) -> dict[str, Any]:
        """Tensors and numbers that :meth:`restored` continues from."""
        return {
            "labels": self.labels,
            "iterations": self.iterations,
            "parameters": {k: v.detach().cpu() for k, v in self.parameters.items()},
            "best": {row: trigger_tensors(best) for row, best in enumerate(self.best) if best is not None},
            "cost": self.cost,
            "norms": self.norms,
            "orders": [order.get_state() for order in self.orders],
            "optimizer": self.optimizer.state_dict(),
        }

    def restored(self, saved: dict[str, Any]) -> _Chunk:
        """This chunk, or what was left of it, as it was."""
        self.labels, self.iterations = list(saved["labels"]), int(saved["iterations"])
        self.parameters = {k: v.to(self.run.device).requires_grad_() for k, v in saved["parameters"].items()}
        self.best = [None] * len(self.labels)
        for row, tensors in saved["best"].items():
            trigger = trigger_of(tensors)
            assert isinstance(trigger, MaskedTrigger)
            self.best[int(row)] = trigger
        self.cost, self.norms = saved["cost"], saved["norms"]
        self.orders = [torch.Generator() for _ in self.labels]
        for order, state in zip(self.orders, saved["orders"], strict=True):
            order.set_state(state)
        self.optimizer = self._adam(self.parameters)
        self.optimizer.load_state_dict(saved["optimizer"])
        return self

    def _adam(self, parameters: Parameters) -> torch.optim.Adam:
        return torch.optim.Adam(list(parameters.values()), lr=self.settings.lr, betas=(0.5, 0.9))
