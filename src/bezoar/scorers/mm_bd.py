"""MM-BD: the largest margin that any input gives each label; needs no data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from bezoar.core.errors import UnsupportedModel
from bezoar.core.evidence import Scores
from bezoar.core.method import Clean, Scorer
from bezoar.core.run import Run
from bezoar.core.surgery import logits, require_gradient
from bezoar.ops.chunks import label_chunks
from bezoar.ops.stats import largest_pvalue, log_ratios


@dataclass(frozen=True, kw_only=True)
class MMBD(Scorer):
    """Maximum-margin statistic: for each label, how far above the others any input can lift its logit.

    Training on a backdoor boosts the target label beyond what the class itself needs, so some input gives it a margin
    that no input gives another label, whatever the trigger looks like. Inputs start at random and climb the margin
    ``z_c - max_{k != c} z_k`` by gradient ascent, all starts of many labels in one batch. No image is looked at.

    The score of a label is the logarithm of its largest margin over the median of the others': 0 is ordinary, 0.69
    twice as much. The model's is that of the leading label. The p-value is the paper's: the largest margin against the
    distribution of all others. Up to 90,000 image-gradients for ten labels, and in proportion for more: 10 to 60 s on a
    free core with small nets.

    Args:
        starts: Random inputs for each label, at least 1 (the authors' code: 30). A third costs a third, and rarely
            finds a smaller margin.
        steps: Most steps of gradient ascent, at least 1 (300).
        lr: Step size, above 0 (0.01).
        tolerance: A label is done when the sum of its margins changes by less than this share in a step, at least 0
            (1e-5).
        projected: Bring the inputs back into [0, 1] after each step, as the paper says. The authors' code clips only
            what the model is given, so that a pixel that has left the range never comes back.
        null: Distribution fitted to the margins of the other labels: ``gamma`` (the code) or ``exponential``, which has
            a parameter less and is steadier with few labels.
        level: A p-value below this makes the model suspect, in (0, 1) (0.05).
        pixels_per_pass: Bound on inputs x H x W of one forward pass, at least 1.

    References:
        Wang, Xiang, Miller, Kesidis, "MM-BD: Post-Training Detection of Backdoor Attacks with Arbitrary Backdoor
        Pattern Types Using a Maximum Margin Statistic", IEEE S&P 2024, and its public code.
    """

    needs_clean = False

    starts: int = 30
    steps: int = 300
    lr: float = 0.01
    tolerance: float = 1e-5
    projected: bool = True
    null: Literal["gamma", "exponential"] = "gamma"
    level: float = 0.05
    pixels_per_pass: int = 256 * 32 * 32

    def __post_init__(self) -> None:
        for name in ("starts", "steps", "pixels_per_pass"):
            self.require(name, getattr(self, name) >= 1, "at least 1")
        self.require("lr", self.lr > 0, "above 0")
        self.require("tolerance", self.tolerance >= 0, "at least 0")
        self.require("null", self.null in ("gamma", "exponential"), "'gamma' or 'exponential'")
        self.require("level", 0 < self.level < 1, "in (0, 1)")

    def scores(self, model: nn.Module, clean: Clean, run: Run) -> Scores:
        """See :class:`bezoar.core.method.Scorer`."""
        margins = self.margins(model, clean, run)
        ratios = log_ratios(margins)
        pvalue = largest_pvalue(margins, self.null)
        known = not math.isnan(pvalue)
        run.notes["margins"] = [round(value, 3) for value in margins[:100]]
        return Scores(
            labels={label: float(ratio) for label, ratio in enumerate(ratios)},
            model=float(ratios.max()),
            meaning="logarithm of the largest margin of a label over the median of the others",
            suspect=pvalue < self.level if known else None,
            pvalue=pvalue if known else None,
        )

    def margins(self, model: nn.Module, clean: Clean, run: Run) -> list[float]:
        """Largest margin found for each label."""
        if clean.num_classes < 2:
            raise UnsupportedModel("a margin needs at least 2 labels", "Use a method that looks at weights")
        channels, height, width = clean.shape
        one = torch.zeros(2, channels, height, width, dtype=_type(model), device=run.device)
        require_gradient(model, one)
        parts = label_chunks(list(range(clean.num_classes)), self.starts * height * width, self.pixels_per_pass)
        found: list[float] = []
        for number, labels in enumerate(parts):
            drawn = [torch.rand(self.starts, *clean.shape, generator=run.generator("mm-bd", c)) for c in labels]
            x = torch.stack(drawn).to(run.device, one.dtype)
            found += self._climb(model, x, torch.tensor(labels, device=run.device), run, number, len(parts))
        return found

    def _climb(self, model: nn.Module, x: Tensor, labels: Tensor, run: Run, number: int, parts: int) -> list[float]:
        """Largest margins of some labels; ``x`` is ``(t, starts, C, H, W)``, changed in place."""
        largest = torch.full((len(labels),), -torch.inf, dtype=torch.float64)
        last = torch.full((len(labels),), torch.inf, dtype=torch.float64)
        rows = torch.arange(len(labels))
        for step in range(self.steps):
            run.check()
            given = x[rows].flatten(0, 1).requires_grad_()
            values = margin(
                logits(model, given if self.projected else given.clamp(0, 1)),
                labels[rows].repeat_interleave(self.starts),
            )
            (gradient,) = torch.autograd.grad(values.sum(), given)
            run.image_gradients += len(given)
            by_label = values.detach().cpu().double().view(len(rows), -1)
            largest[rows] = by_label.amax(1)
            moved = (given.detach() + self.lr * gradient).view_as(x[rows])
            x[rows] = moved.clamp(0, 1) if self.projected else moved
            change = (by_label.sum(1) - last[rows]).abs() / last[rows].abs().clamp(min=1e-12)
            last[rows] = by_label.sum(1)
            rows = rows[~(change < self.tolerance)]
            lead = int(largest.argmax())
            note = f"label {int(labels[lead])}, margin {float(largest[lead]):.1f}"
            run.progress.step(run.seed, number * self.steps + step + 1, parts * self.steps, note)
            if not len(rows):
                break
        if not bool(torch.isfinite(largest).all()):
            raise UnsupportedModel("the model gives NaN or infinite logits", "Check the weights")
        return [float(value) for value in largest]


def margin(out: Tensor, labels: Tensor) -> Tensor:
    """``(N,)`` logits of the labels less the largest other one, of ``(N, K)`` logits."""
    others = out.scatter(1, labels[:, None], -torch.inf)
    return out.gather(1, labels[:, None]).squeeze(1) - others.amax(1)


def _type(model: nn.Module) -> torch.dtype:
    """Type of the inputs: float64 for a model in float64, else float32."""
    return torch.float64 if any(p.dtype == torch.float64 for p in model.parameters()) else torch.float32
