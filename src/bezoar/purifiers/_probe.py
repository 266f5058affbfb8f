"""What a defender can measure of a backdoor: how a model answers to the triggers that were inverted before."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import mean

import torch
from torch import Tensor, nn

from bezoar.core.method import Clean
from bezoar.core.run import Run
from bezoar.core.surgery import frozen, logits
from bezoar.core.trigger import InvertedTrigger
from bezoar.scanners._together import Together
from bezoar.scanners.additive_inversion import AdditiveInversion
from bezoar.scanners.neural_cleanse import NeuralCleanse

#: Most images that each trigger is tried on.
TRIED = 128
#: Labels that are inverted at a time.
MOST_LABELS = 12


def inverted(
    model: nn.Module, clean: Clean, run: Run, search: Together, labels: list[int], steps: int, seed: int
) -> list[tuple[int, InvertedTrigger]]:
    """Labels and triggers of a short search for all of them in one batch.

    Args:
        model: Frozen, in eval mode.
        clean: Its working images are used.
        run: Device; counts gradients.
        search: Says which family of triggers and how.
        labels: Labels to invert.
        steps: Steps of the search.
        seed: Of its start and the order of the images.
    """
    inversion = search.inversion(model, clean, run, seed, labels)
    for _ in range(steps):
        inversion.step()
    return [(label, inversion.trigger(row)) for row, label in enumerate(inversion.labels)]


@dataclass(frozen=True)
class Probe:
    """Inverted triggers and the images that they are tried on."""

    triggers: tuple[tuple[int, InvertedTrigger], ...]
    x: Tensor
    y: Tensor

    @classmethod
    def of(
        cls, model: nn.Module, clean: Clean, run: Run, given: dict[int, InvertedTrigger], x: Tensor, y: Tensor
    ) -> Probe:
        """Triggers of a suspect model, of both families, and those that a scan found.

        Args:
            model: The suspect.
            clean: Its working images are used to invert.
            run: Seed and device.
            given: Triggers of a scan by label.
            x, y: Images to try them on, with their labels.
        """
        order = torch.randperm(clean.num_classes, generator=run.generator("probe"))
        labels = sorted(order[:MOST_LABELS].tolist())
        seed = run.seed + 7919  # other starts than the searches of the methods that are judged
        with frozen(model):
            found = [
                one
                for search, steps in ((NeuralCleanse(), 60), (AdditiveInversion(), 40))
                for one in inverted(model, clean, run, search, labels, steps, seed)
            ]
        return cls((*found, *given.items()), x, y)

    @torch.no_grad()
    def successes(self, model: nn.Module, run: Run) -> list[tuple[int, float]]:
        """Label and success of each trigger on images of other labels, in [0, 1]."""
        found = []
        with frozen(model):
            for label, trigger in self.triggers:
                x = self.x[self.y != label][:TRIED]
                if not len(x):
                    continue
                hits = [
                    logits(model, trigger(part.to(run.device))).argmax(1).cpu() == label for part in torch.split(x, 64)
                ]
                found.append((label, float(torch.cat(hits).float().mean())))
        return found

    def response(self, model: nn.Module, run: Run) -> float:
        """Mean success over all triggers, in [0, 1]."""
        return mean([success for _, success in self.successes(model, run)] or [0.0])
