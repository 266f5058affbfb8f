"""ABS: stimulate inner neurons, and see whether a small trigger can stimulate those that lift one label."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bezoar.core.errors import UnsupportedModel
from bezoar.core.evidence import Scores
from bezoar.core.method import Clean, Scorer
from bezoar.core.run import Run
from bezoar.core.space import MaskedSpace, Parameters
from bezoar.core.surgery import logits, require_gradient
from bezoar.core.trigger import InvertedTrigger, MaskedTrigger
from bezoar.ops.augment import as_float
from bezoar.ops.channels import find_sites
from bezoar.scorers._stimulate import (
    Activations,
    Layer,
    Neuron,
    layers_of,
    leaders,
    lifts,
    stimulated,
    stimulation_loss,
    told,
)

# With many labels, images that the stimulation looks at in all.
_MOST = 64


@dataclass(frozen=True, kw_only=True)
class ABSStimulation(Scorer):
    """Artificial brain stimulation: find neurons that lift one label whatever the image, and triggers that drive them.

    Each neuron is held at several values while a few clean images of each label run through the model. One that lifts
    the same label well above all others, on every image of another label, may have been taken over by a backdoor. For
    such candidates a small trigger is searched that drives the neuron up and leaves the others of its layer alone; in
    the authors' later code, and here, it is also to raise the label. REASR is the share of held-out images of other
    labels that the trigger sends to the label.

    The score of a label is the logarithm of the odds of its best REASR: 0 is one half. Labels that no candidate lifts
    have the lowest score there is. The model's score is that of the leading label. A neuron is a channel, at all
    positions. Some 10 to 50 s on a free core with small nets.

    Args:
        images: Clean images of each label that the stimulation looks at, at least 1; of many labels, 64 in all.
        values: Values that a neuron is held at, evenly from 0 to the largest that its layer shows, at least 1.
        channels: Neurons that are stimulated at most, at least 1; those of the last layers come first.
        neurons: Candidates that triggers are searched for, at least 1.
        per_label: Most candidates of one label, at least 1.
        steps: Steps of that search, at least 0.
        batch: Images per step, at least 1.
        lr: Step size of Adam, above 0.
        size: Largest share of the image that a trigger may cover, in (0, 1] (the paper: 0.06).
        others: Weight of the change of the other neurons, at least 0.
        label: Weight of the label's own cross-entropy in the search, at least 0; 0 searches by the neuron alone, as the
            paper does.
        pressure: Weight of a trigger's excess over that size, at least 0.
        reasr: A REASR of at least this makes the model suspect, in (0, 1] (the paper: 0.88).
        pixels_per_pass: Bound on images x H x W of one forward pass, at least 1.

    References:
        Liu et al., "ABS: Scanning Neural Networks for Back-doors by Artificial Brain Stimulation", CCS 2019. Its code
        is public as a binary only, and in part for the TrojAI competition; the weights of the search are ours.
    """

    images: int = 2
    values: int = 4
    channels: int = 512
    neurons: int = 20
    per_label: int = 2
    steps: int = 100
    batch: int = 16
    lr: float = 0.2
    size: float = 0.06
    others: float = 0.3
    label: float = 1.0
    pressure: float = 20.0
    reasr: float = 0.88
    pixels_per_pass: int = 256 * 32 * 32

    def __post_init__(self) -> None:
        for name in ("images", "values", "channels", "neurons", "per_label", "batch", "pixels_per_pass"):
            self.require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("steps", "others", "label", "pressure"):
            self.require(name, getattr(self, name) >= 0, "at least 0")
        for name in ("size", "reasr"):
            self.require(name, 0 < getattr(self, name) <= 1, "in (0, 1]")
        self.require("lr", self.lr > 0, "above 0")

    def scores(self, model: nn.Module, clean: Clean, run: Run) -> Scores:
        """See :class:`bezoar.core.method.Scorer`."""
        if clean.num_classes < 2:
            raise UnsupportedModel("one label has no other to be lifted above", "Use a method that looks at weights")
        require_gradient(model, as_float(clean.x[:2]).to(run.device))
        neurons = chosen(self.candidates(model, clean, run), self.neurons, self.per_label)
        triggers = self.invert(model, clean, neurons, run)
        best: dict[int, tuple[float, InvertedTrigger]] = {}
        count = 0
        for neuron, trigger in zip(neurons, triggers, strict=True):
            hits, count = measured(model, clean, trigger, neuron.label, run)
            if neuron.label not in best or hits > best[neuron.label][0]:
                best[neuron.label] = (hits, trigger)
        scores = dict.fromkeys(range(clean.num_classes), odds(0.0, max(count, 1)))
        for label, (hits, _) in best.items():
            scores[label] = odds(hits, len(others_of(clean, label)))
        rate = max((hits / max(1, len(others_of(clean, label))) for label, (hits, _) in best.items()), default=0.0)
        run.notes["reasr"], run.notes["candidates"] = round(rate, 4), len(neurons)
        return Scores(
            labels=scores,
            model=max(scores.values()),
            meaning="logarithm of the odds that a small trigger of a neuron sends held-out images to the label",
            suspect=rate >= self.reasr,
            triggers={label: trigger for label, (_, trigger) in best.items()},
        )

    def candidates(self, model: nn.Module, clean: Clean, run: Run) -> list[Neuron]:
        """All stimulated neurons with the label that each lifts most."""
        rows = [torch.nonzero(clean.y == c).flatten()[: self.images] for c in range(clean.num_classes)]
        picked = torch.cat(rows)
        if len(picked) > _MOST:
            picked = picked[torch.randperm(len(picked), generator=run.generator("abs", "seeds"))[:_MOST]]
        x, y = as_float(clean.x[picked]).to(run.device), clean.y[picked].to(run.device)
        layers = layers_of(model, x, find_sites(model, x[:1]))
        with torch.no_grad():
            natural = logits(model, x).float()
        at_once = max(1, self.pixels_per_pass // (len(x) * self.values * x.shape[2] * x.shape[3]))
        left, found = self.channels, list[Neuron]()
        for done, layer in enumerate(reversed(layers)):
            if not left:
                break
            for part in torch.split(torch.arange(min(layer.site.channels, left)), at_once):
                values = layer.top * torch.linspace(0, 1, self.values + 1)[1:]
                lifted = lifts(stimulated(model, x, layer, part, values), natural, y)
                found += self._neurons(layer, part, lifted)
                told(run, done, 2 * len(layers), "stimulate")
            left -= min(layer.site.channels, left)
        return found

    def _neurons(self, layer: Layer, part: Tensor, lifted: Tensor) -> list[Neuron]:
        labels, gaps = leaders(lifted)
        columns = zip(part.tolist(), labels.tolist(), gaps.tolist(), strict=True)
        return [Neuron(layer, channel, label, gap) for channel, label, gap in columns]

    def invert(self, model: nn.Module, clean: Clean, neurons: list[Neuron], run: Run) -> list[MaskedTrigger]:
        """A trigger for each candidate."""
        _, height, width = clean.shape
        size = max(1, self.pixels_per_pass // (min(self.batch, len(clean.x)) * height * width))
        found: list[MaskedTrigger] = []
        for at in range(0, len(neurons), size):
            found += self._search(model, clean, neurons[at : at + size], at, len(neurons), run)
        return found

    def _search(
        self, model: nn.Module, clean: Clean, neurons: list[Neuron], at: int, total: int, run: Run
    ) -> list[MaskedTrigger]:
        space, bound = MaskedSpace(clean.shape, start_mask=2 * self.size if self.size < 0.3 else None), self.size
        area = clean.shape[1] * clean.shape[2]
        start = space.start(range(at, at + len(neurons)), run.seed)
        parameters: Parameters = {name: value.to(run.device).requires_grad_() for name, value in start.items()}
        adam = torch.optim.Adam(list(parameters.values()), lr=self.lr, betas=(0.5, 0.9))
        source, seen = run.generator("abs", "images"), Activations(neurons)
        with seen.caught():
            for step in range(self.steps):
                rows = torch.randperm(len(clean.x), generator=source)[: self.batch]
                x = as_float(clean.x[rows]).to(run.device)
                wanted = torch.tensor([n.label for n in neurons], device=run.device).repeat_interleave(len(x))
                with torch.no_grad():
                    logits(model, x)
                    natural = seen.take()
                out = logits(model, space.stamp(parameters, x).flatten(0, 1)).float()
                losses = stimulation_loss(seen.take(), natural, neurons, len(x), self.others)
                losses = losses + self.label * F.cross_entropy(out, wanted, reduction="none").view(
                    len(neurons), -1
                ).mean(1)
                excess = (space.size(parameters) / area - bound).clamp(min=0) / bound
                adam.zero_grad(set_to_none=True)
                (losses + self.pressure * excess).sum().backward()  # type: ignore[no-untyped-call]
                adam.step()
                run.image_gradients += len(neurons) * len(x)
                told(run, total + (at * self.steps + step * len(neurons)) // max(1, self.steps), 2 * total, "invert")
        return [bounded(space.harden(parameters, row), bound * area) for row in range(len(neurons))]


def chosen(neurons: list[Neuron], count: int, per_label: int) -> list[Neuron]:
    """The candidates with the largest gaps, at most so many of each label."""
    taken: Counter[int] = Counter()
    found: list[Neuron] = []
    for neuron in sorted(neurons, key=lambda one: -one.gap):
        if len(found) < count and taken[neuron.label] < per_label and math.isfinite(neuron.gap):
            taken[neuron.label] += 1
            found.append(neuron)
    return found


def bounded(trigger: MaskedTrigger, pixels: float) -> MaskedTrigger:
    """The trigger with its mask scaled down to at most this size."""
    return MaskedTrigger(trigger.mask * min(1.0, pixels / max(trigger.size, 1e-9)), trigger.pattern)


def others_of(clean: Clean, label: int) -> Tensor:
    """Held-out images of other labels; those to work with where none are held out."""
    x, y = (clean.held_x, clean.held_y) if len(clean.held_x) else (clean.x, clean.y)
    return x[y != label][:256]


@torch.no_grad()
def measured(model: nn.Module, clean: Clean, trigger: MaskedTrigger, label: int, run: Run) -> tuple[float, int]:
    """How many images of other labels a trigger sends to a label, and of how many."""
    x = others_of(clean, label)
    hits = [
        logits(model, trigger(as_float(part).to(run.device))).argmax(1).cpu() == label for part in torch.split(x, 64)
    ]
    return float(torch.cat(hits).sum()) if len(x) else 0.0, len(x)


def odds(hits: float, count: int) -> float:
    """Logarithm of the odds of a rate, with half an image added to both sides."""
    return math.log((hits + 0.5) / (count - hits + 0.5))
