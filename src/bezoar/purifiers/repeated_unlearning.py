"""Repeated unlearning: triggers of all labels, inverted anew while the model forgets them."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bezoar.core.method import Clean
from bezoar.core.run import Run
from bezoar.core.surgery import frozen, logits
from bezoar.core.trigger import InvertedTrigger
from bezoar.ops.fit import fit
from bezoar.ops.objective import Batch
from bezoar.purifiers._objective import CleanLoss, enough_epochs, too_few_for_statistics
from bezoar.purifiers._probe import MOST_LABELS, inverted
from bezoar.purifiers._tuning import Tuning
from bezoar.scanners._together import Together
from bezoar.scanners.additive_inversion import AdditiveInversion
from bezoar.scanners.neural_cleanse import NeuralCleanse

#: Fewer steps than this for each of the passes asked for are too few to forget anything: then there are more passes.
LEAST_STEPS = 5


@dataclass(frozen=True, kw_only=True)
class RepeatedUnlearning(Tuning):
    """Fine-tune while a few images carry triggers that were inverted from the model as it is, with their true labels.

    No label need be suspected and no scan comes first: every few passes a short search inverts a mask and a faint
    change for every label, all in one batch, and part of each training batch carries one of them. The planted trigger
    is among the shortest ways to its label, so it is found and forgotten again and again, also where a single inversion
    would miss it; what the clean images need is held by the model's own answers on them (distillation).

    Args:
        epochs: Passes over the clean images; more where they are few.
        lr: Peak learning rate of SGD, falling to zero along a cosine.
        batch: Images per step.
        weight_decay: L2 penalty.
        every: Passes after which the triggers are inverted anew.
        share: Share of each batch that carries a trigger, in (0, 1].
        mask_steps: Steps of the search for masks; 0 leaves it out.
        additive_steps: Steps of the search for faint changes of the whole image; 0 leaves it out.
        distill: Weight of the divergence from the suspect model's answers on clean images.
        focus: Power of a trigger's smallness, against the usual one of its search, that says how often it is shown; 0
            shows all alike.
        pad: Random crop after padding by this many pixels, before the trigger is stamped.
        flip: Random horizontal flip, before the trigger is stamped.
        clip: Largest gradient norm; 0 switches clipping off.

    References:
        Ours, after Wang et al., "Neural Cleanse", IEEE S&P 2019, section VI-C, Zeng et al., "Adversarial Unlearning of
        Backdoors via Implicit Hypergradient", ICLR 2022 (one universal change, no labels), and Hinton et al.,
        "Distilling the Knowledge in a Neural Network", 2015.
    """

    epochs: int = 20
    every: int = 4
    share: float = 0.15
    mask_steps: int = 30
    additive_steps: int = 20
    distill: float = 1.5
    focus: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("every", self.every >= 1, "at least 1")
        self.require("share", 0 < self.share <= 1, "in (0, 1]")
        self.require("mask_steps", self.mask_steps >= 0, "at least 0")
        self.require("additive_steps", self.additive_steps + self.mask_steps > 0, "above 0 where mask_steps is 0")
        for name in ("distill", "focus"):
            self.require(name, getattr(self, name) >= 0, "at least 0")

    def purify(self, model: nn.Module, clean: Clean, run: Run, triggers: dict[int, InvertedTrigger]) -> nn.Module:
        """See :class:`bezoar.core.method.Purifier`; the triggers are not used."""
        del triggers
        objective = _Forgetting(self, model, clean, run)
        epochs = enough_epochs(len(clean.x), self.batch, self.epochs, LEAST_STEPS * self.epochs)
        recipe = dataclasses.replace(self.recipe(), epochs=epochs)
        fit(model, clean.x, clean.y, recipe, seed=run.seed, objective=objective, progress=run.progress.training)
        run.notes["inversions"] = objective.inversions
        return model

    def searches(self) -> list[tuple[Together, int]]:
        """The families of triggers and the steps of each search."""
        both = ((NeuralCleanse(), self.mask_steps), (AdditiveInversion(), self.additive_steps))
        return [(search, steps) for search, steps in both if steps]


class _Forgetting(CleanLoss):
    """Cross-entropy, partly on stamped images, and the divergence from the suspect model on the others."""

    def __init__(self, settings: RepeatedUnlearning, model: nn.Module, clean: Clean, run: Run) -> None:
        super().__init__(too_few_for_statistics(model, len(clean.x), run))
        self.settings, self.clean, self.run = settings, clean, run
        self.suspect = copy.deepcopy(model).eval().requires_grad_(False)
        self.triggers: list[InvertedTrigger] = []
        self.weights: list[float] = []
        self.inversions = 0

    def epoch(self, model: nn.Module, number: int, epochs: int) -> None:
        super().epoch(model, number, epochs)
        if number % self.settings.every == 0:
            with frozen(model):
                for search, steps in self.settings.searches():
                    self._invert(model, search, steps, number)
            self.inversions += 1

    def _invert(self, model: nn.Module, search: Together, steps: int, number: int) -> None:
        order = torch.randperm(self.clean.num_classes, generator=self.run.generator("labels", number))
        labels = sorted(order[:MOST_LABELS].tolist())
        found = inverted(model, self.clean, self.run, search, labels, steps, self.run.seed + number)
        usual = median(trigger.size for _, trigger in found)
        for _, trigger in found:
            self.triggers.append(trigger)
            self.weights.append((usual / max(trigger.size, 1e-6)) ** self.settings.focus)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        x = self.images(model, batch)
        carries = torch.rand(len(x), generator=batch.generator) < self.settings.share
        weights = torch.tensor(self.weights)
        which = torch.multinomial(weights, len(x), replacement=True, generator=batch.generator)
        shown = x.clone()
        for row in torch.nonzero(carries).flatten().tolist():
            shown[row : row + 1] = self.triggers[int(which[row])](x[row : row + 1])
        out = logits(model, shown)
        loss = F.cross_entropy(out, batch.y)
        bare = (~carries).to(x.device)
        if self.settings.distill and bool(bare.any()):
            with torch.no_grad():
                wanted = logits(self.suspect, x[bare]).softmax(1)
            loss = loss + self.settings.distill * F.kl_div(out[bare].log_softmax(1), wanted, reduction="batchmean")
        return loss
