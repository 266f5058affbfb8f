"""Suppressing model shortcuts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bezoar.core.errors import SettingError, UnsupportedModel
from bezoar.core.method import Clean
from bezoar.core.run import Run
from bezoar.core.surgery import frozen, logits
from bezoar.core.trigger import InvertedTrigger
from bezoar.ops.augment import as_float
from bezoar.ops.fit import Batch, fit
from bezoar.ops.precision import full_precision
from bezoar.ops.residual import Shortcut, find_shortcuts, scaled
from bezoar.purifiers._objective import CleanLoss, enough_epochs, too_few_for_statistics
from bezoar.purifiers._tuning import Tuning


@dataclass(frozen=True, kw_only=True)
class SMS(Tuning):
    """Weaken the residual shortcut that matters most to the logits and least to the accuracy, then tune its stage.

    Backdoors travel by few shortcuts: scaled down, the attack fails before the accuracy does. The authors' code finds
    the shortcut with triggered images, which a defender lacks; here each is switched off in turn, and the one with the
    highest ``change * exp(-penalty * loss)`` is taken, where ``change`` is the mean size of the change of the logits of
    clean images relative to the logits, and ``loss`` is the accuracy lost on them.

    A shortcut with weights of its own, the projection of a ResNet, keeps the factor in its weights, which then stay as
    they are. An identity has none that could hold it: there the factor applies during the first half of the tuning and
    grows back to 1 over the next quarter, so that the result is the suspect's architecture with other weights. Such a
    repair is weaker.

    Args:
        gamma: Factor of the shortcut, in [0, 1]; 0, the authors', removes it.
        shortcut: Which one, counted from 0 in the order in which they run; None searches.
        penalty: Weight of the accuracy lost, at least 0. Ours; not high, since the tuning brings much of it back.
        identities: Whether the search may choose a shortcut without weights where there are others; where there are
            none, it does so anyway. Off by default, see above.
        epochs: Passes over the clean images (the authors: 10 over 5,000 images).
        steps: At least so many steps: with fewer images more passes are taken, at most 50.
        lr: Peak learning rate of SGD, falling to zero along a cosine.
        batch: Images per step, at least 2.
        weight_decay: L2 penalty.
        pad: Random crop after padding by this many pixels.
        flip: Random horizontal flip; off by default, since signs, digits and text must not be mirrored.
        clip: Largest gradient norm; 0 switches clipping off.

    References:
        Yang et al., "Backdoor Defense via Suppressing Model Shortcuts", ICASSP 2023.
    """

    gamma: float = 0.0
    shortcut: int | None = None
    penalty: float = 1.0
    identities: bool = False
    epochs: int = 10
    steps: int = 390
    batch: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("batch", self.batch >= 2, "at least 2")
        self.require("gamma", 0 <= self.gamma <= 1, "in [0, 1]")
        self.require("shortcut", self.shortcut is None or self.shortcut >= 0, "at least 0, or None")
        self.require("penalty", self.penalty >= 0, "at least 0")
        self.require("steps", self.steps >= 0, "at least 0")

    def purify(self, model: nn.Module, clean: Clean, run: Run, triggers: dict[int, InvertedTrigger]) -> nn.Module:
        """See :class:`bezoar.core.method.Purifier`; the triggers are not used."""
        del triggers
        with full_precision(model):
            chosen, number = self._choose(model, clean)
            run.notes["shortcut"] = {"number": number, "block": chosen.block, "layer": chosen.layer}
            wanted = set(stage_of(model, chosen.block).parameters())
            if chosen.layer is not None:
                wanted -= suppress(model.get_submodule(chosen.layer), self.gamma)
            else:
                run.warnings.append("The shortcut is an identity: it could be suppressed during the tuning only")
            for parameter in model.parameters():
                parameter.requires_grad_(parameter in wanted and parameter.is_floating_point())
            epochs = enough_epochs(len(clean.x), self.batch, self.epochs, self.steps)
            fixed = too_few_for_statistics(model, len(clean.x), run)
            fit(
                *(model, clean.x, clean.y, dataclasses.replace(self.recipe(), epochs=epochs)),
                seed=run.seed,
                objective=Suppressed(chosen if chosen.layer is None else None, self.gamma, fixed),
                progress=run.progress.training,
            )
        return model

    def _choose(self, model: nn.Module, clean: Clean) -> tuple[Shortcut, int]:
        device = next(model.parameters()).device
        found = find_shortcuts(model, as_float(clean.x[:2]).to(device))
        if not found:
            raise UnsupportedModel(
                f"{type(model).__name__} has no residual shortcuts that could be suppressed",
                "Use a purifier that needs none, such as nad or finetune",
            )
        if self.shortcut is not None:
            if self.shortcut >= len(found):
                raise SettingError(f"SMS.shortcut must be below {len(found)}, the number of shortcuts")
            return found[self.shortcut], self.shortcut
        with_weights = [n for n, one in enumerate(found) if one.layer is not None]
        numbers = with_weights if with_weights and not self.identities else list(range(len(found)))
        scores = score(model, clean.x, clean.y, [found[n] for n in numbers], self.penalty)
        best = numbers[max(range(len(numbers)), key=scores.__getitem__)]
        return found[best], best


@torch.no_grad()
def score(model: nn.Module, x: Tensor, y: Tensor, shortcuts: Sequence[Shortcut], penalty: float) -> list[float]:
    """How much each shortcut matters to the logits and how little to the accuracy; see :class:`SMS`.

    Args:
        model: Left as it was.
        x: ``(N, C, H, W)`` clean images.
        y: ``(N,)`` their labels.
        shortcuts: Each is switched off in turn.
        penalty: Weight of the accuracy lost.
    """
    with frozen(model):
        whole = _all_logits(model, x, None)
        size = whole.norm(dim=1).mean().clamp(min=1e-12)
        right = _hits(whole, y)
        found = []
        for one in shortcuts:
            without = _all_logits(model, x, one)
            change = float((without - whole).norm(dim=1).mean() / size)
            found.append(change * math.exp(-penalty * max(0.0, right - _hits(without, y))))
    return found


def _hits(out: Tensor, y: Tensor) -> float:
    return float((out.argmax(1) == y.to(out.device)).float().mean())


def _all_logits(model: nn.Module, x: Tensor, without: Shortcut | None, batch: int = 256) -> Tensor:
    device = next(model.parameters()).device
    parts = []
    for part in torch.split(x, batch):
        with scaled({} if without is None else {without: 0.0}):
            parts.append(logits(model, as_float(part).to(device)).float())
    return torch.cat(parts)


def stage_of(model: nn.Module, block: str) -> nn.Module:
    """The part of the network around a block: the child of the outermost module that has more than one."""
    stage, rest = model, [part for part in block.split(".") if part]
    while rest:
        children = list(stage.children())
        stage = stage.get_submodule(rest.pop(0))
        if len(children) > 1:
            break
    return stage


@torch.no_grad()
def suppress(layer: nn.Module, gamma: float) -> set[nn.Parameter]:
    """Multiply what a layer gives by ``gamma``, in its weights.

    Returns:
        The parameters that hold the factor: they must not be trained.
    """
    held = set(layer.parameters(recurse=False))
    for parameter in held:
        parameter.mul_(gamma)
    return held


class Suppressed(CleanLoss):
    """Cross-entropy with an identity shortcut suppressed, until it is brought back.

    Args:
        shortcut: The identity, or None where the weights hold the factor.
        gamma: Its factor at first.
        fixed: See :class:`bezoar.purifiers._objective.CleanLoss`.
    """

    def __init__(self, shortcut: Shortcut | None, gamma: float, fixed: bool = False) -> None:
        super().__init__(fixed)
        self.shortcut, self.gamma, self.factor = shortcut, gamma, gamma

    def epoch(self, model: nn.Module, number: int, epochs: int) -> None:
        """See :class:`bezoar.ops.objective.Objective`."""
        super().epoch(model, number, epochs)
        back = min(1.0, max(0.0, 4 * (number + 1) / epochs - 2))  # 0 in the first half, 1 in the last quarter
        self.factor = self.gamma + (1 - self.gamma) * back

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """See :class:`bezoar.ops.objective.Objective`."""
        images = self.images(model, batch)
        with scaled({} if self.shortcut is None else {self.shortcut: self.factor}):
            out = logits(model, images)
        return F.cross_entropy(out, batch.y)
