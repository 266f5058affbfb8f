"""AWM: adversarial weight masking."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bezoar.core.errors import UnsupportedModel
from bezoar.core.method import Clean, Purifier
from bezoar.core.run import Run
from bezoar.core.trigger import InvertedTrigger
from bezoar.ops.augment import as_float, flip
from bezoar.ops.batches import drawn
from bezoar.ops.head import find_head
from bezoar.ops.precision import full_precision

_WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear, nn.MultiheadAttention)
#: L1 norm of the perturbation on the values of one CIFAR-10 image: 1000, and 100 with one image per class.
_BOUND, _BOUND_ONE_SHOT = 1000 / 3072, 100 / 3072
#: Least batches that count as a pass; both of the paper's settings come to three.
_BATCHES = 3
#: Factor of the learning rate after each epoch, as in the authors' code.
_DECAY = 0.9


@dataclass(frozen=True, kw_only=True)
class AWM(Purifier):
    """Mask every single weight, so that the model keeps its answers under the worst change common to all images.

    Each epoch finds one additive change of the image that takes the model away from its own answers, and then trains
    masks in [0, 1] on the weights: the cross-entropy on clean and on changed images plus the sum of the masks. Made for
    very few images. BatchNorm keeps its statistics.

    The paper masks the convolutions; in its networks those are all layers but the one that gives the logits. Here it is
    every weight matrix but that one, attention and hidden linear layers too. ``None`` takes the paper's value for the
    number of images that are there: it has settings for 500 images, and one-shot settings for one image per class.

    Args:
        epochs: Rounds of finding a change and training the masks, at least 1.
        inner_epochs: Passes over the images in each of both, at least 1; a pass has no fewer than three batches.
        batch: Images per step, drawn with replacement, at least 1; None: 128, one-shot 32.
        lr: Learning rate of Adam on the masks, at least 0; it falls by a tenth after each epoch.
        inner_lr: Learning rate of the change, at least 0.
        alpha: Share of the clean loss, in [0, 1]; the loss on changed images has the rest. None: 0.9, one-shot 0.99.
        sparsity: Weight of the sum of all masks, at least 0. The paper's value is so small that the masks fall because
            of the changed images alone.
        bound: Largest mean absolute value of the change over the values of the image, above 0. None: 0.3255, one-shot
            0.03255, which is the paper's L1 norm of 1000, or 100, on 3 x 32 x 32 values.
        copies: Copies of each image with a random crop, at least 0. None: 0, one-shot 9.
        flip: Whether copies are mirrored at random; off by default, since signs, digits and text must not be.

    References:
        Chai and Chen, "One-shot Neural Backdoor Erasing via Adversarial Weight Masking", NeurIPS 2022.
    """

    epochs: int = 20
    inner_epochs: int = 5
    batch: int | None = None
    lr: float = 0.01
    inner_lr: float = 10.0
    alpha: float | None = None
    sparsity: float = 1e-8
    bound: float | None = None
    copies: int | None = None
    flip: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "inner_epochs"):
            self.require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("lr", "inner_lr", "sparsity"):
            self.require(name, getattr(self, name) >= 0, "at least 0")
        self.require("batch", self.batch is None or self.batch >= 1, "at least 1")
        self.require("alpha", self.alpha is None or 0 <= self.alpha <= 1, "in [0, 1]")
        self.require("bound", self.bound is None or self.bound > 0, "above 0")
        self.require("copies", self.copies is None or self.copies >= 0, "at least 0")

    def purify(self, model: nn.Module, clean: Clean, run: Run, triggers: dict[int, InvertedTrigger]) -> nn.Module:
        """See :class:`bezoar.core.method.Purifier`; the triggers are not used."""
        del triggers
        model.eval()
        with full_precision(model):
            one_shot = len(clean.x) <= clean.num_classes
            _Masking(self, model, clean, run, one_shot).train()
        return model


class _Masking:
    """The masks of one run, and how they are trained."""

    def __init__(self, method: AWM, model: nn.Module, clean: Clean, run: Run, one_shot: bool) -> None:
        self.method, self.model, self.run = method, model, run
        self.batch = method.batch or (32 if one_shot else 128)
        self.alpha = (0.99 if one_shot else 0.9) if method.alpha is None else method.alpha
        self.bound = method.bound or (_BOUND_ONE_SHOT if one_shot else _BOUND)
        copies = (9 if one_shot else 0) if method.copies is None else method.copies
        source = run.generator("awm", "copies")
        first = as_float(clean.x)
        self.x = torch.cat([first, *(_cropped(first, method.flip, source) for _ in range(copies))])
        self.y = clean.y.repeat(copies + 1)
        self.steps = max(_BATCHES, len(self.x) // self.batch) * method.inner_epochs
        self.draws = run.generator("awm", "batches")
        self.weights = _maskable(model, first[:1])
        self.device = self.weights[0].device
        self.original = [w.detach().clone() for w in self.weights]
        self.masks = [torch.ones_like(w) for w in self.weights]
        for parameter in model.parameters():
            parameter.requires_grad_(False)

    def train(self) -> None:
        """All epochs; the model ends with its weights masked."""
        optimizer = torch.optim.Adam(self.masks, lr=self.method.lr)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, _DECAY)
        total = self.method.epochs * self.steps
        for epoch in range(self.method.epochs):
            change = self.worst_change()
            for number, (x, y) in enumerate(self._batches()):
                loss = self._step(optimizer, x, y, change)
                self.run.progress.training(epoch * self.steps + number + 1, total, loss)
            schedule.step()
        values = torch.cat([m.flatten() for m in self.masks])
        self.run.notes["masked_weights"] = len(values)
        self.run.notes["below_half"] = int((values < 0.5).sum())
        self.run.notes["switched_off"] = int((values == 0).sum())

    def worst_change(self) -> Tensor:
        """``(1, C, H, W)`` the change that takes the model away from its own answers, scaled down to the bound."""
        change = torch.zeros_like(self.x[:1], device=self.device)
        for x, _ in self._batches():
            change.requires_grad_(True)
            with torch.no_grad():
                answers = self.model(x).argmax(1)
            slope = torch.autograd.grad(F.cross_entropy(self.model(x + change), answers), change)[0]
            change = (change + self.method.inner_lr * slope).detach()
            self.run.image_gradients += len(x)
        size = float(change.abs().mean())
        return change * min(1.0, self.bound / size) if size else change

    def _step(self, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, change: Tensor) -> float:
        for weight in self.weights:
            weight.requires_grad_(True)
        clean_loss = F.cross_entropy(self.model(x), y)
        changed_loss = F.cross_entropy(self.model((x + change).clamp(0, 1)), y)
        loss = self.alpha * clean_loss + (1 - self.alpha) * changed_loss
        slopes = torch.autograd.grad(loss, self.weights)
        self.run.image_gradients += 2 * len(x)
        with torch.no_grad():
            # The weight is mask times original, so the mask's gradient is the weight's times the original.
            for mask, first, slope in zip(self.masks, self.original, slopes, strict=True):
                mask.grad = slope * first + self.method.sparsity
            optimizer.step()
            for weight, mask, first in zip(self.weights, self.masks, self.original, strict=True):
                weight.requires_grad_(False)
                weight.copy_(mask.clamp_(0, 1) * first)
        return float(loss.detach())

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        return drawn(self.x, self.y, self.batch, self.steps, self.draws, device=self.device)


def _maskable(model: nn.Module, x: Tensor) -> list[nn.Parameter]:
    """Weight matrices and kernels that the logits depend on, but for those of the layer that gives the logits."""
    x = x.to(next(model.parameters()).device)
    head = find_head(model, x)
    ours = {
        id(p): p for m in model.modules() if isinstance(m, _WEIGHTED) and m is not head for p in m.parameters(False)
    }
    used = [p for p in ours.values() if p.ndim >= 2 and p.requires_grad]
    if not used:
        raise UnsupportedModel(
            f"{type(model).__name__} has no hidden layer whose weights could be masked",
            "Use a method that tunes all weights, such as finetune",
        )
    slopes = torch.autograd.grad(model(x).sum(), used, allow_unused=True)
    return [p for p, slope in zip(used, slopes, strict=True) if slope is not None]


def _cropped(x: Tensor, mirror: bool, source: torch.Generator) -> Tensor:
    """Random crops of 8 to 100 % of the area and 3:4 to 4:3 in shape, scaled to the old size, as is custom."""
    n = len(x)
    area = 0.08 + 0.92 * torch.rand(n, generator=source)
    shape = (4 / 3) ** (2 * torch.rand(n, generator=source) - 1)
    size = torch.stack([(area * shape).sqrt(), (area / shape).sqrt()], 1).clamp(max=1)  # of width and height
    centre = (2 * torch.rand(n, 2, generator=source) - 1) * (1 - size)
    grid = F.affine_grid(
        torch.cat([torch.diag_embed(size), centre.unsqueeze(2)], 2), list(x.shape), align_corners=False
    )
    out = F.grid_sample(x, grid.to(x), padding_mode="border", align_corners=False)
    return flip(out, source) if mirror else out
