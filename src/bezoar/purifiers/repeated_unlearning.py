"""Repeated unlearning: triggers of all labels, inverted anew while the model forgets them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bezoar.core.method import Clean
from bezoar.core.run import Run
from bezoar.core.surgery import frozen, logits
from bezoar.core.trigger import InvertedTrigger
from bezoar.ops.answers import answers
from bezoar.ops.enlarge import changed, enlarged
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
#: Share of answers that must stay the same under slight changes of the images, and how often each is changed.
STEADY, STEADY_DRAWS = 0.6, 8


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
        fill: A smaller set of more than one image is filled up to so many by slightly changed copies, unless the
            suspect loses its answers under such changes (a warped trigger is one of them); 0 never does.
        keep: Share of the suspect's weights in what comes out, where copies were added: few images teach a model less
            than they cost it, and between the two sets of weights accuracy falls later than the backdoor, in [0, 1).
        pad: Random crop after padding by this many pixels, before the trigger is stamped.
        flip: Random horizontal flip, before the trigger is stamped.
        clip: Largest gradient norm; 0 switches clipping off.

    References:
        Ours, after Wang et al., "Neural Cleanse", IEEE S&P 2019, section VI-C, Zeng et al., "Adversarial Unlearning of
        Backdoors via Implicit Hypergradient", ICLR 2022 (one universal change, no labels), and Hinton et al.,
        "Distilling the Knowledge in a Neural Network", 2015. The average of weights is after Wortsman et al., "Robust
        fine-tuning of zero-shot models", CVPR 2022.
    """

    epochs: int = 20
    every: int = 4
    share: float = 0.15
    mask_steps: int = 30
    additive_steps: int = 20
    distill: float = 1.5
    focus: float = 3.0
    fill: int = 128
    keep: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("every", self.every >= 1, "at least 1")
        self.require("share", 0 < self.share <= 1, "in (0, 1]")
        self.require("mask_steps", self.mask_steps >= 0, "at least 0")
        self.require("additive_steps", self.additive_steps + self.mask_steps > 0, "above 0 where mask_steps is 0")
        for name in ("distill", "focus", "fill"):
            self.require(name, getattr(self, name) >= 0, "at least 0")
        self.require("keep", 0 <= self.keep < 1, "in [0, 1)")

    def purify(self, model: nn.Module, clean: Clean, run: Run, triggers: dict[int, InvertedTrigger]) -> nn.Module:
        """See :class:`bezoar.core.method.Purifier`; the triggers are not used."""
        del triggers
        if not 1 < len(clean.x) < self.fill or not _steady(model, clean, run):
            self._forget(model, clean, run)
            return model
        suspect = {name: value.clone() for name, value in model.state_dict().items()}
        x, y = enlarged(clean.x, clean.y, self.fill, run.generator("copies"))
        self._forget(model, dataclasses.replace(clean, x=x, y=y), run)
        run.notes["copies"] = len(x) - len(clean.x)
        average(model, suspect, self.keep)
        return model

    def _forget(self, model: nn.Module, clean: Clean, run: Run) -> None:
        objective = _Forgetting(self, model, clean, run)
        epochs = enough_epochs(len(clean.x), self.batch, self.epochs, LEAST_STEPS * self.epochs)
        recipe = dataclasses.replace(self.recipe(), epochs=epochs)
        fit(model, clean.x, clean.y, recipe, seed=run.seed, objective=objective, progress=run.progress.training)
        run.notes["inversions"] = objective.inversions

    def searches(self) -> list[tuple[Together, int]]:
        """The families of triggers and the steps of each search."""
        both = ((NeuralCleanse(), self.mask_steps), (AdditiveInversion(), self.additive_steps))
        return [(search, steps) for search, steps in both if steps]


@torch.no_grad()
def average(model: nn.Module, other: Mapping[str, Tensor], share: float) -> None:
    """Put the weighted mean of a model's state and another one, of which a ``share`` is taken, into the model."""
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            value.lerp_(other[name].to(value), share)


def _steady(model: nn.Module, clean: Clean, run: Run) -> bool:
    """Whether a model keeps most of its answers when the images change slightly."""
    generator, before = run.generator("steady"), answers(model, clean.x)
    same = [(answers(model, changed(clean.x, generator)) == before).double() for _ in range(STEADY_DRAWS)]
    return float(torch.stack(same).mean()) >= STEADY


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
