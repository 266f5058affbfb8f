"""The input filter of Neural Cleanse: neurons that an inverted trigger excites."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bezoar.core.guarding import Guard, See, seer
from bezoar.core.method import Clean
from bezoar.core.run import Run
from bezoar.core.trigger import InvertedTrigger
from bezoar.guards._features import read
from bezoar.ops.head import find_head

_SMALL = 1e-12


@dataclass(frozen=True, kw_only=True)
class ActivationFilter(Guard):
    """Watch the neurons of the second-to-last layer that an inverted trigger excites most.

    Neurons are ranked by how far the trigger raises their activation over that of the same images without it; images
    of the trigger's own label are left out where there are others. The profile of an input is the mean activation of
    the first ones. The score is the profile in standard deviations of clean images, and the largest one where there
    are several triggers; with one trigger that is the paper's order. It costs no further answer of the model.

    Args:
        share: Share of the neurons that make the profile, in (0, 1] (the paper: 0.01); at least one neuron is.

    References:
        Wang et al., "Neural Cleanse: Identifying and Mitigating Backdoor Attacks in Neural Networks", IEEE S&P 2019,
        section VI-A.
    """

    needs_triggers = True

    share: float = 0.01

    def __post_init__(self) -> None:
        self.require("share", 0 < self.share <= 1, "in (0, 1]")

    def fit(self, model: nn.Module, clean: Clean, run: Run, triggers: dict[int, InvertedTrigger]) -> dict[str, Tensor]:
        """See :class:`bezoar.core.guarding.Guard`."""
        x = clean.x
        see = seer(model, self.reads(model, x[:1].to(run.device)))
        usual = read(see, x, run)[1]
        chosen, mean, deviation = [], [], []
        for label, trigger in triggers.items():
            others = clean.y.cpu() != label
            rows = others if bool(others.any()) else torch.ones_like(others)
            raised = read(see, trigger(x[rows.to(x.device)]), run)[1].mean(0) - usual[rows].mean(0)
            neurons = torch.sort(raised, descending=True, stable=True).indices[: self.count(len(raised))]
            profile = usual[:, neurons].mean(1)
            chosen.append(neurons)
            mean.append(profile.mean())
            deviation.append(profile.std(correction=0))
        run.notes["neurons"] = {str(label): one.tolist()[:20] for label, one in zip(triggers, chosen, strict=True)}
        if not all(one > _SMALL for one in deviation):
            run.warnings.append("the watched neurons are silent on all clean images: their activation is not scaled")
        scale = torch.stack([one if one > _SMALL else torch.ones_like(one) for one in deviation])
        return {"neurons": torch.stack(chosen), "mean": torch.stack(mean).float(), "scale": scale.float()}

    def count(self, width: int) -> int:
        """Neurons of a profile, of a layer of ``width``."""
        return max(1, math.ceil(self.share * width - 1e-9))

    def look(self, see: See, state: Mapping[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`bezoar.core.guarding.Guard`."""
        answers, features = see(x)
        neurons = state["neurons"]
        profile = features[:, neurons.flatten()].reshape(-1, neurons.shape[0], neurons.shape[1]).mean(2)
        return answers, ((profile - state["mean"]) / state["scale"]).amax(1)

    def reads(self, model: nn.Module, x: Tensor) -> nn.Module | None:
        """See :class:`bezoar.core.guarding.Guard`."""
        return find_head(model, x)
