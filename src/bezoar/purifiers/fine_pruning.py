"""Fine-Pruning: prune what clean images leave at rest, then fine-tune."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import nn

from bezoar.core.method import Clean
from bezoar.core.run import Run
from bezoar.core.trigger import InvertedTrigger
from bezoar.ops.fit import as_float, fit
from bezoar.ops.units import last_channels
from bezoar.purifiers._masks import device_of, most_tolerated
from bezoar.purifiers._tuning import Tuning


@dataclass(frozen=True, kw_only=True)
class FinePruning(Tuning):
    """Prune the channels of the last convolution that clean images excite least, then train all weights on the images.

    A backdoor may sit in channels that clean images leave at rest. Channels are ranked by their mean activation as the
    next layer reads them, after activation and pooling, and shut in this order, a hundredth at a time, as long as the
    clean images keep their accuracy. They stay shut while the rest is fine-tuned. Where the channels of the last
    convolution cannot be told apart, as behind attention, the inputs of the last layer are ranked.

    Args:
        tolerance: Share of the accuracy on the clean images that pruning may cost before fine-tuning, in [0, 1];
            of the confidence where there are fewer than 50 images.
        share: Share of the channels to prune, in [0, 1); None prunes as many as the tolerance allows.
        epochs: Passes over the clean images.
        lr: Peak learning rate of SGD (momentum 0.9, Nesterov), falling to zero along a cosine.
        batch: Images per step.
        weight_decay: L2 penalty.
        pad: Random crop after padding by this many pixels.
        flip: Random horizontal flip.
        clip: Largest gradient norm; 0 switches clipping off.

    References:
        Liu, Dolan-Gavitt and Garg, "Fine-Pruning: Defending Against Backdooring Attacks on Deep Neural Networks", RAID
        2018; tolerance and step as in Wu et al., "BackdoorBench", NeurIPS 2022, but the last acceptable model is kept
        and the clean images decide, not the test set.
    """

    tolerance: float = 0.1
    share: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("tolerance", 0 <= self.tolerance <= 1, "in [0, 1]")
        self.require("share", self.share is None or 0 <= self.share < 1, "in [0, 1), or None")

    def purify(self, model: nn.Module, clean: Clean, run: Run, triggers: dict[int, InvertedTrigger]) -> nn.Module:
        """See :class:`bezoar.core.method.Purifier`; the triggers are not used."""
        del triggers
        x = as_float(clean.x)
        units = last_channels(model, x[:1].to(device_of(model)))
        quiet_first = units.activations(model, x).argsort(stable=True)

        def shut(count: int) -> AbstractContextManager[None]:
            return units.shut(quiet_first[:count])

        if self.share is None:
            counts = range(-(-units.count // 100), units.count, -(-units.count // 100))
            count = most_tolerated(model, counts, shut, clean, self.tolerance, run)
        else:
            count = int(self.share * units.count)
        run.notes["pruned"], run.notes["channels"] = count, units.count
        units.fold(quiet_first[:count])
        with shut(count):
            fit(model, clean.x, clean.y, self.recipe(), seed=run.seed, progress=run.progress.training)
        return model
