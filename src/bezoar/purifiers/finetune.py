"""Fine-tuning: the baseline of every repair method."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from bezoar.core.method import Clean
from bezoar.core.run import Run
from bezoar.core.trigger import InvertedTrigger
from bezoar.ops.fit import fit
from bezoar.purifiers._tuning import Tuning


@dataclass(frozen=True, kw_only=True)
class Finetune(Tuning):
    """Train all weights on the clean images with cross-entropy.

    Args:
        epochs: Passes over the clean images.
        lr: Peak learning rate of SGD (momentum 0.9, Nesterov), falling to zero along a cosine. It decides everything:
            0.1 forgets the backdoor and some accuracy, 0.001 changes next to nothing.
        batch: Images per step.
        weight_decay: L2 penalty.
        pad: Random crop after padding by this many pixels.
        flip: Random horizontal flip; off by default, since signs, digits and text must not be mirrored.
        clip: Largest gradient norm; 0 switches clipping off.

    References:
        Wu et al., "BackdoorBench", NeurIPS 2022, defence ``ft`` (SGD 0.01, cosine, weight decay 5e-4).
    """

    def purify(self, model: nn.Module, clean: Clean, run: Run, triggers: dict[int, InvertedTrigger]) -> nn.Module:
        """See :class:`bezoar.core.method.Purifier`; the triggers are not used."""
        del triggers
        fit(model, clean.x, clean.y, self.recipe(), seed=run.seed, progress=run.progress.training)
        return model
