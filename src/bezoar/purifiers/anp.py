"""ANP: learn which channels make a model collapse when its neurons are disturbed, and prune them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bezoar.core.method import Clean
from bezoar.core.run import Run
from bezoar.core.surgery import frozen, logits
from bezoar.core.trigger import InvertedTrigger
from bezoar.ops.batches import drawn
from bezoar.ops.channels import Gates
from bezoar.purifiers._masks import Learned, Masks, Pruning, device_of, gates_of, learn


@dataclass(frozen=True, kw_only=True)
class ANP(Pruning):
    """Adversarial neuron pruning: learn channel masks while gains and shifts are disturbed, prune the lowest.

    With mask m, gain g and shift b a disturbed channel has the gain ``(m + d) g`` and the shift ``(1 + e) b``. In each
    step d and e are drawn anew and moved towards a higher loss; the masks then learn to keep the clean images right
    with and without the disturbance. Channels of a backdoor are what such a disturbance wakes up, so their masks fall.
    Nets without normalisation have masks on the outputs of their hidden layers, and their biases are disturbed.

    Args:
        steps: Steps of the masks, at least 1 (the authors: 2000). Each takes three passes forward and back, and in
            a net of 208 channels a few hundred steps did no worse than 800.
        eps: Size of the disturbance, at least 0; with 0 the masks are merely fine-tuned.
        ascents: Steps of the disturbance, each of size ``eps / ascents``, at least 1.
        project: Whether the disturbance is kept within ``eps``. The public code does not, so that it reaches ``2 eps``.
        alpha: Share of the loss without disturbance, in [0, 1].
        lr: Learning rate of the masks (SGD), at least 0.
        momentum: That of SGD, in [0, 1).
        batch: Images per step, drawn with replacement, at least 2.
        pad: Random crop after padding by this many pixels (the authors: 4 of 32).
        flip: Random horizontal flip (the authors: on).
        threshold: Channels whose mask is at most this are pruned, in [0, 1]. None prunes from the lowest mask upwards
            as many as the tolerance allows, up to 0.95; of those at 0, the first to get there comes first.
        tolerance: Share of the accuracy on the clean images that pruning may cost where ``threshold`` is None, in
            [0, 1]; of the confidence where there are fewer than 50 images.

    References:
        Wu and Wang, "Adversarial Neuron Pruning Purifies Backdoored Deep Models", NeurIPS 2021, and its public code:
        shift of a pruned channel kept, BatchNorm in train mode while learning.
    """

    steps: int = 300
    eps: float = 0.4
    ascents: int = 1
    project: bool = False
    alpha: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steps", "ascents"):
            self.require(name, getattr(self, name) >= 1, "at least 1")
        self.require("eps", self.eps >= 0, "at least 0")
        self.require("alpha", 0 <= self.alpha <= 1, "in [0, 1]")

    def purify(self, model: nn.Module, clean: Clean, run: Run, triggers: dict[int, InvertedTrigger]) -> nn.Module:
        """See :class:`bezoar.core.method.Purifier`; the triggers are not used."""
        del triggers
        try:
            learned = self.learned(model, clean, run)
        except FloatingPointError:
            run.warnings.append("The loss was no longer finite and nothing is pruned: lower lr or eps")
            return model
        self.prune(model, learned, clean, run)
        return model

    def learned(self, model: nn.Module, clean: Clean, run: Run) -> Learned:
        """Masks by site; the model is left as it was, its statistics too.

        Raises:
            FloatingPointError: The loss is no longer finite.
        """
        gates = gates_of(model, clean)
        masks = {name: gain.requires_grad_() for name, gain in gates.gain.items()}
        generator = run.generator("anp")
        batches = drawn(
            clean.x, clean.y, self.batch, self.steps, generator, device=device_of(model), recipe=self.augmentation()
        )

        def loss() -> Tensor:
            x, y = next(batches)
            return self.loss(model, gates, masks, x, y, generator)

        with frozen(model):
            model.train()
            return learn(
                masks,
                loss,
                self.steps,
                lr=lambda _: self.lr,
                momentum=self.momentum,
                progress=lambda done, value: run.progress.training(done, self.steps, value),
            )

    def loss(
        self, model: nn.Module, gates: Gates, masks: Masks, x: Tensor, y: Tensor, generator: torch.Generator
    ) -> Tensor:
        """What the masks minimise on a batch: cross-entropy with and without the worst disturbance.

        Args:
            model: Without gates applied.
            gates: Its gates.
            masks: By site.
            x: ``(B, C, H, W)`` images.
            y: ``(B,)`` labels.
            generator: Draws where the disturbance starts.
        """
        with gates.applied(gain=masks):
            clean = F.cross_entropy(logits(model, x), y)
        if not self.eps:
            return self.alpha * clean
        noise = self.disturbance(model, gates, masks, x, y, generator)
        with disturbed(gates, masks, *noise):
            worst = F.cross_entropy(logits(model, x), y)
        return self.alpha * clean + (1 - self.alpha) * worst

    def disturbance(
        self, model: nn.Module, gates: Gates, masks: Masks, x: Tensor, y: Tensor, generator: torch.Generator
    ) -> tuple[Masks, Masks]:
        """Changes of gains and shifts by site that raise the loss on a batch; arguments as for :meth:`loss`."""
        noise = [self._drawn(masks, generator), self._drawn(masks, generator)]
        flat = [one for part in noise for one in part.values()]
        still = {name: mask.detach() for name, mask in masks.items()}
        for _ in range(self.ascents):
            with disturbed(gates, still, *noise):
                loss = F.cross_entropy(logits(model, x), y)
            # A layer without shift, or whose output is not used, has no gradient.
            slopes = torch.autograd.grad(loss, flat, allow_unused=True)
            with torch.no_grad():
                for one, slope in zip(flat, slopes, strict=True):
                    if slope is not None:
                        one += self.eps / self.ascents * slope.sign()
                    if self.project:
                        one.clamp_(-self.eps, self.eps)
        first, second = ({name: one.detach() for name, one in part.items()} for part in noise)
        return first, second

    def _drawn(self, masks: Masks, generator: torch.Generator) -> Masks:
        return {
            name: ((2 * torch.rand(mask.shape, generator=generator) - 1) * self.eps).to(mask.device).requires_grad_()
            for name, mask in masks.items()
        }


@contextmanager
def disturbed(gates: Gates, masks: Masks, gain: Masks, shift: Masks) -> Iterator[None]:
    """Run the model with masks plus a change of the gains, and with a relative change of the shifts."""
    with gates.applied(
        gain={name: mask + gain[name] for name, mask in masks.items()},
        shift={name: 1 + change for name, change in shift.items()},
    ):
        yield
