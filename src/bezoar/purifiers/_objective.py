"""What purifiers that train on clean images minimise, and for how many steps."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bezoar.core.run import Run
from bezoar.core.surgery import logits
from bezoar.ops.normalisation import batch_norms, fix_statistics
from bezoar.ops.objective import Batch, Stateless


class CleanLoss(Stateless):
    """Cross-entropy on the augmented images; the base of richer objectives.

    Args:
        fixed: BatchNorm uses its running statistics and keeps them; see :func:`too_few_for_statistics`.
        stamp: Changes the images after the augmentation.
    """

    def __init__(self, fixed: bool = False, stamp: Callable[[Tensor, torch.Generator], Tensor] | None = None) -> None:
        self.fixed, self.stamp = fixed, stamp

    def images(self, model: nn.Module, batch: Batch) -> Tensor:
        """The images of a step, changed as the recipe says."""
        x = batch.augment(batch.x)
        if self.stamp is not None:
            x = self.stamp(x, batch.generator)
        x = x.to(memory_format=torch.channels_last)
        # On the CPU, torch (2.13) crashes in the backward pass of a GroupNorm whose gain takes a gradient and whose
        # channels-last input takes none: so let all inputs take one, also behind layers that are not trained.
        if any(isinstance(module, nn.GroupNorm) for module in model.modules()):
            x = x.detach().requires_grad_()
        return x

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """See :class:`bezoar.ops.objective.Objective`."""
        return F.cross_entropy(logits(model, self.images(model, batch)), batch.y)

    def epoch(self, model: nn.Module, number: int, epochs: int) -> None:
        """See :class:`bezoar.ops.objective.Objective`."""
        del number, epochs
        if self.fixed:
            fix_statistics(model)


def too_few_for_statistics(model: nn.Module, count: int, run: Run) -> bool:
    """Whether BatchNorm must keep its running statistics because there is a single image; the user is told."""
    if count > 1 or not batch_norms(model):
        return False
    run.warnings.append("With a single clean image, BatchNorm keeps the running statistics of the suspect model")
    return True


#: Passes after which a handful of images is known by heart, and more of them only harm.
MOST_PASSES = 50


def enough_epochs(count: int, batch: int, epochs: int, steps: int) -> int:
    """Passes over ``count`` images: ``epochs``, or more where these take fewer than ``steps`` steps, up to a bound."""
    wanted = -(-steps // -(-count // batch))
    return max(epochs, min(wanted, MOST_PASSES))
