"""BN-cleaning: new statistics of BatchNorm, and new gains and shifts, from clean images."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from bezoar.core.errors import UnsupportedModel
from bezoar.core.method import Clean
from bezoar.core.run import Run
from bezoar.core.trigger import InvertedTrigger
from bezoar.ops.fit import fit
from bezoar.ops.normalisation import batch_norms, estimate_statistics, gains_and_shifts
from bezoar.ops.precision import full_precision
from bezoar.purifiers._objective import CleanLoss, too_few_for_statistics
from bezoar.purifiers._tuning import Tuning


def train_only_normalisations(model: nn.Module) -> int:
    """Let only gains and shifts of normalisations take gradients.

    Returns:
        How many numbers that are.

    Raises:
        UnsupportedModel: There are none.
    """
    wanted = {p for p in gains_and_shifts(model) if p.is_floating_point()}
    if not wanted and not batch_norms(model):
        raise UnsupportedModel(
            f"{type(model).__name__} has no normalisation layers to tune",
            "Use a purifier that tunes all weights, such as finetune or unlearn",
        )
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in wanted)
    return sum(p.numel() for p in wanted)


@dataclass(frozen=True, kw_only=True)
class BNCleaning(Tuning):
    """Estimate the statistics of BatchNorm anew on clean images, then tune only the gains and shifts of normalisations.

    A light repair: less than a hundredth of the weights is touched, so even few images do little harm; the weights that
    react to the trigger stay, and only what they lead to is rescaled. Statistics are estimated before the tuning and
    after it. The name is the paper's; what is done is our reading of it, and the settings are ours.

    Args:
        epochs: Passes over the clean images.
        lr: Peak learning rate of SGD (momentum 0.9, Nesterov), falling to zero along a cosine; larger than for whole
            networks, since gains near 1 have far to go.
        batch: Images per step, at least 2.
        weight_decay: L2 penalty on gains and shifts; 0 by default, as it would fade channels.
        pad: Random crop after padding by this many pixels.
        flip: Random horizontal flip; off by default, since signs, digits and text must not be mirrored.
        clip: Largest gradient norm; 0 switches clipping off.

    References:
        "Evolutionary Trigger Detection and Lightweight Model Repair Based Backdoor Defense" (CETF), 2024,
        https://arxiv.org/abs/2407.05396. Frankle et al., "Training BatchNorm and Only BatchNorm", ICLR 2021.
    """

    lr: float = 0.1
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("batch", self.batch >= 2, "at least 2")

    def purify(self, model: nn.Module, clean: Clean, run: Run, triggers: dict[int, InvertedTrigger]) -> nn.Module:
        """See :class:`bezoar.core.method.Purifier`; the triggers are not used."""
        del triggers
        run.notes["tuned"] = train_only_normalisations(model)
        fixed = too_few_for_statistics(model, len(clean.x), run)
        with full_precision(model):
            estimate_statistics(model, clean.x)
            if run.notes["tuned"]:
                fit(
                    *(model, clean.x, clean.y, self.recipe()),
                    seed=run.seed,
                    objective=CleanLoss(fixed),
                    progress=run.progress.training,
                )
                estimate_statistics(model, clean.x)
        return model
