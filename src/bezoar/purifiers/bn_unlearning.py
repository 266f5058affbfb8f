"""BN-unlearning: the trigger is unlearned by gains and shifts of normalisations alone."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from bezoar.core.errors import UnsupportedModel
from bezoar.core.method import Clean
from bezoar.core.run import Run
from bezoar.core.trigger import InvertedTrigger
from bezoar.ops.fit import fit
from bezoar.ops.precision import full_precision
from bezoar.purifiers._objective import CleanLoss, too_few_for_statistics
from bezoar.purifiers.bn_cleaning import train_only_normalisations
from bezoar.purifiers.unlearn import Unlearn


@dataclass(frozen=True, kw_only=True)
class BNUnlearning(Unlearn):
    """Unlearn the inverted trigger by tuning only the gains and shifts of normalisations.

    As light as BN-cleaning, but aimed: part of the images carry the trigger with their true labels. The name is the
    paper's; what is done is our reading of it, and the settings are ours.

    Args:
        share: Share of each batch that carries a trigger, in (0, 1].
        epochs: Passes over the clean images.
        lr: Peak learning rate of SGD (momentum 0.9, Nesterov), falling to zero along a cosine; larger than for whole
            networks, since gains near 1 have far to go.
        batch: Images per step, at least 2.
        weight_decay: L2 penalty on gains and shifts; 0 by default, as it would fade channels.
        jitter: Each stamped image carries the trigger at a random strength between this and 1, in (0, 1].
        pad: Random crop after padding by this many pixels, before the trigger is stamped.
        flip: Random horizontal flip, before the trigger is stamped.
        clip: Largest gradient norm; 0 switches clipping off.

    References:
        "Evolutionary Trigger Detection and Lightweight Model Repair Based Backdoor Defense" (CETF), 2024,
        https://arxiv.org/abs/2407.05396.
    """

    epochs: int = 20
    lr: float = 0.1
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("batch", self.batch >= 2, "at least 2")

    def purify(self, model: nn.Module, clean: Clean, run: Run, triggers: dict[int, InvertedTrigger]) -> nn.Module:
        """See :class:`bezoar.core.method.Purifier`."""
        run.notes["tuned"] = train_only_normalisations(model)
        if not run.notes["tuned"]:
            raise UnsupportedModel(
                f"the normalisations of {type(model).__name__} have no gains and shifts to tune", "Use unlearn"
            )
        objective = CleanLoss(too_few_for_statistics(model, len(clean.x), run), self.stamp(list(triggers.values())))
        with full_precision(model):
            fit(
                *(model, clean.x, clean.y, self.recipe()),
                seed=run.seed,
                objective=objective,
                progress=run.progress.training,
            )
        return model
