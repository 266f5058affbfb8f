"""Inversion in feature space, for triggers that warp, tint or blend: a simplified FeatureRE."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bezoar.core.errors import UnsupportedModel
from bezoar.core.evidence import Scores
from bezoar.core.method import Clean, Scorer
from bezoar.core.run import Run
from bezoar.core.space import Parameters
from bezoar.core.surgery import logits, require_gradient
from bezoar.ops.augment import as_float
from bezoar.ops.chunks import label_chunks
from bezoar.ops.head import features_of, find_head
from bezoar.scorers._transform import Smooth, distortion

# Weights of the terms in the authors' code: of the cosine, and of what is over its bound.
_COSINE, _OVER = 5.0, 10.0
# Success beyond which the label is no part of the loss, there.
_ENOUGH = 0.9


@dataclass(frozen=True, kw_only=True)
class FeatureInversion(Scorer):
    """For each label, the smooth change of images that reaches it through a few features, unlike the label's own.

    FeatureRE's observation: whatever a trigger looks like, in feature space a backdoor fixes a few features and so cuts
    a hyperplane. So a transformation of the image and a mask of features are searched together: the masked features of
    the changed image, put into those of another clean image, must give the label; they must be alike for all images;
    and the features of changed images must not point where those of real images of the label do. All labels are
    searched in one batch.

    The score of a label is the share of held-out images of other labels that reach it in this way, less the cosine
    between the mean features of changed images and of the label: in [-1, 1]. The model's is that of the leading label,
    and the paper's rule calls it backdoored above 0.75. Some 5 to 30 s on a free core with small nets and ten
    labels, and in proportion for more.

    Ours, for the cost: the transformation is a warp and a low-frequency change of colour on coarse grids, of bounded
    size, where the paper trains a U-Net for each label; the features are what goes into the last linear layer, and both
    are searched at once. A model without such a layer is searched without features, by the label and the bound alone.

    Args:
        steps: Steps, at least 1; the first quarter goes without the features.
        batch: Images per step, the same ones for all labels, at least 2.
        lr: Step size of Adam, above 0.
        warp: Side of the grid of the warp, at least 2 (WaNet: 4).
        colour: Side of the grid of the change of colour, at least 2.
        size: Largest root mean square of the change of the images, in (0, 1].
        share: Largest share of the features in the mask, in (0, 1] (the authors: 0.03, of a whole feature map).
        deviation: Largest standard deviation of a masked feature over images, in those of all images, above 0 (1).
        level: A score above this makes the model suspect, in (-1, 1) (0.75).
        pixels_per_pass: Bound on images x H x W of one forward pass, at least 1.

    References:
        Wang et al., "Rethinking the Reverse-engineering of Trojan Triggers", NeurIPS 2022, and its public code.
    """

    steps: int = 150
    batch: int = 16
    lr: float = 0.02
    warp: int = 4
    colour: int = 6
    size: float = 0.1
    share: float = 0.1
    deviation: float = 1.0
    level: float = 0.75
    pixels_per_pass: int = 256 * 32 * 32

    def __post_init__(self) -> None:
        for name in ("steps", "pixels_per_pass"):
            self.require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("batch", "warp", "colour"):
            self.require(name, getattr(self, name) >= 2, "at least 2")
        for name in ("size", "share"):
            self.require(name, 0 < getattr(self, name) <= 1, "in (0, 1]")
        for name in ("lr", "deviation"):
            self.require(name, getattr(self, name) > 0, "above 0")
        self.require("level", -1 < self.level < 1, "in (-1, 1)")

    def scores(self, model: nn.Module, clean: Clean, run: Run) -> Scores:
        """See :class:`bezoar.core.method.Scorer`."""
        require_gradient(model, as_float(clean.x[:2]).to(run.device))
        space = Smooth(clean.shape, self.warp, self.colour)
        area = min(self.batch, len(clean.x)) * clean.shape[1] * clean.shape[2]
        parts = label_chunks(list(range(clean.num_classes)), area, self.pixels_per_pass)
        known = Known.of(model, clean, run)
        scores: dict[int, float] = {}
        for number, labels in enumerate(parts):
            search = _Search(self, model, clean, run, space, known, labels)
            for step in range(self.steps):
                run.check()
                search.step(step, warm=step < self.steps // 4)
                lead = labels[int(search.success.argmax())]
                run.progress.step(run.seed, number * self.steps + step + 1, len(parts) * self.steps, f"label {lead}")
            scores |= search.measured()
        largest = max(scores.values())
        return Scores(
            labels=scores,
            model=largest,
            meaning="held-out success of a smooth change through a few features, less its cosine to the label's own",
            suspect=largest > self.level,
        )


@dataclass(frozen=True)
class Known:
    """What is known of the features of clean images.

    Attributes:
        head: The linear layer that gives the logits, or None.
        means: ``(K, D)`` mean features of each label; zero without images.
        spread: ``(D,)`` standard deviations over all images.
    """

    head: nn.Linear | None
    means: Tensor
    spread: Tensor

    @classmethod
    def of(cls, model: nn.Module, clean: Clean, run: Run) -> Known:
        """Look at the clean images."""
        x = as_float(clean.x)
        try:
            head = find_head(model, x[:1].to(run.device))
            if not isinstance(head, nn.Linear):
                raise UnsupportedModel("the last layer is not linear")
            features = features_of(model, head, x).float()
        except UnsupportedModel as refusal:
            run.warnings.append(f"Searched without features: {refusal.message}")
            return cls(None, torch.zeros(clean.num_classes, 1), torch.ones(1))
        means = torch.zeros(clean.num_classes, features.shape[1], device=features.device)
        for label in set(clean.y.tolist()):
            means[label] = features[(clean.y == label).to(features.device)].mean(0)
        return cls(head, means, features.std(0).clamp(min=1e-6) if len(features) > 1 else torch.ones_like(features[0]))


class _Search:
    """The running search for some labels."""

    def __init__(
        self,
        method: FeatureInversion,
        model: nn.Module,
        clean: Clean,
        run: Run,
        space: Smooth,
        known: Known,
        labels: list[int],
    ) -> None:
        self.method, self.model, self.clean, self.run, self.space, self.known = method, model, clean, run, space, known
        self.labels = torch.tensor(labels, device=run.device)
        self.parameters: Parameters = space.start(labels, run)
        # The authors start the mask at ones, of a tanh.
        self.mask = torch.full((len(labels), known.means.shape[1]), 1.0, device=run.device).requires_grad_()
        self.success = torch.zeros(len(labels))
        self.adam = torch.optim.Adam(
            [
                {"params": list(self.parameters.values()), "lr": method.lr},
                {"params": [self.mask], "lr": 0.1},
            ],
            betas=(0.5, 0.9),
        )

    def step(self, number: int, warm: bool) -> None:
        """One step on the next batch."""
        source = self.run.generator("feature inversion", number)
        rows = torch.randperm(len(self.clean.x), generator=source)[: self.method.batch]
        x, y = as_float(self.clean.x[rows]).to(self.run.device), self.clean.y[rows].to(self.run.device)
        swap = torch.randperm(len(x), generator=source).to(x.device)
        changed, features, out = self._run(x, swap, plain=warm)
        others = (y[None] != self.labels[:, None]).float()
        count = others.sum(1).clamp(min=1)
        targets = self.labels[:, None].expand(-1, len(x))
        entropy = F.cross_entropy(out.flatten(0, 1), targets.flatten(), reduction="none").view_as(others)
        hit = ((out.argmax(2) == targets) * others).sum(1) / count
        reached = (hit.detach() >= _ENOUGH) & (not warm)
        loss = (entropy * others).sum(1) / count * ~reached
        over = (distortion(changed, x) / self.method.size - 1).clamp(min=0)
        loss = loss + _OVER * over
        if not warm and self.known.head is not None:
            loss = loss + self._feature_terms(features)
        self.adam.zero_grad(set_to_none=True)
        loss.sum().backward()  # type: ignore[no-untyped-call]
        self.adam.step()
        self.success = hit.detach().cpu()
        self.run.image_gradients += len(self.labels) * len(x)

    def _feature_terms(self, features: Tensor) -> Tensor:
        mask = self._mask()
        cosine = self._cosine(features).clamp(min=0)
        # A single image has no deviation: the biased one is 0.
        spread = (features / self.known.spread * mask[:, None]).std(1, correction=0).sum(1) / mask.sum(1)
        over = (mask.mean(1) / self.method.share - 1).clamp(min=0)
        return _COSINE * cosine + _OVER * (spread / self.method.deviation - 1).clamp(min=0) + over

    def _cosine(self, features: Tensor) -> Tensor:
        own = self.known.means[self.labels]
        return F.cosine_similarity(own, features.mean(1), dim=1) * (own.abs().sum(1) > 0)

    def _mask(self) -> Tensor:
        return torch.tanh(self.mask) / 2 + 0.5

    def _run(self, x: Tensor, swap: Tensor, plain: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Changed images, their features ``(T, B, D)`` and logits ``(T, B, K)``, through the masked features or not."""
        changed = self.space.stamp(self.parameters, x)
        head = self.known.head
        if head is None:
            out = logits(self.model, changed.flatten(0, 1)).float()
            return changed, torch.empty(0), out.view(*changed.shape[:2], -1)
        caught: list[Tensor] = []
        handle = head.register_forward_pre_hook(lambda _module, given: caught.append(given[0]))
        try:
            out = logits(self.model, changed.flatten(0, 1)).float().view(*changed.shape[:2], -1)
            if not plain:
                with torch.no_grad():
                    logits(self.model, x)
        finally:
            handle.remove()
        features = caught[0].float().view(*changed.shape[:2], -1)
        if plain:
            return changed, features, out
        mask = self._mask()[:, None]
        mixed = mask * features + (1 - mask) * caught[1].float()[swap]
        return changed, features, F.linear(mixed.to(head.weight), head.weight, head.bias).float()

    @torch.no_grad()
    def measured(self) -> dict[int, float]:
        """Scores of the labels on held-out images."""
        held = len(self.clean.held_x) > 0
        x, y = (self.clean.held_x, self.clean.held_y) if held else (self.clean.x, self.clean.y)
        x, y = x[:256], y[:256]
        self._bound(as_float(x[: 4 * self.method.batch]).to(self.run.device))
        hits, seen = torch.zeros(len(self.labels)), torch.zeros(len(self.labels))
        total = torch.zeros(len(self.labels), self.known.means.shape[1])
        source = self.run.generator("feature inversion", "measure")
        for part, truth in zip(torch.split(x, self.method.batch), torch.split(y, self.method.batch), strict=True):
            swap = torch.randperm(len(part), generator=source).to(self.run.device)
            _, features, out = self._run(as_float(part).to(self.run.device), swap, plain=False)
            others = truth[None] != self.labels[:, None].cpu()
            hits += ((out.argmax(2) == self.labels[:, None]).cpu() & others).sum(1)
            seen += others.sum(1)
            if self.known.head is not None:
                total += features.sum(1).cpu()
        cosine = self._cosine(total[:, None].to(self.run.device)).cpu()
        values = hits / seen.clamp(min=1) - cosine
        return dict(zip(self.labels.tolist(), values.tolist(), strict=True))

    def _bound(self, x: Tensor) -> None:
        """Bring changes that are over their bound back to it, near enough."""
        size = distortion(self.space.stamp(self.parameters, x), x)
        factor = (self.method.size / size).clamp(max=1)
        for value in self.parameters.values():
            value.mul_(factor.view(-1, 1, 1, 1))
