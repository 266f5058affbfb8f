"""K-Arm: a bandit that spends its steps on the labels, and pairs of labels, whose triggers shrink."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bezoar.core.errors import UnsupportedModel
from bezoar.core.evidence import Scores
from bezoar.core.method import Clean, Scorer
from bezoar.core.run import Run
from bezoar.core.space import MaskedSpace
from bezoar.core.surgery import logits, require_gradient
from bezoar.core.trigger import InvertedTrigger
from bezoar.ops.augment import as_float
from bezoar.ops.cost import CostController
from bezoar.scorers._arms import AUTHORS_PIXELS, Aim, Arm

# Most source labels of a target, and how few of the labels count as the first answers of an image, as in the code.
_SOURCES = 3
_FEW_LABELS, _FIRST_OF_FEW = 8, 2
# A pair whose trigger never worked on this share of images in this many steps is given up, as in the code.
_HOPELESS = ((10, 0.0), (20, 0.3), (200, 0.8))


@dataclass(frozen=True, kw_only=True)
class KArm(Scorer):
    """K-Arm optimisation: search triggers for labels and for pairs of labels, most of the time where it pays.

    Pre-screening picks what is searched: labels that are among the first answers for nearly all clean images, and pairs
    whose target is among the first answers for nearly all images of the source. Each is an arm, the search for a small
    mask as in Neural Cleanse. After a warm-up each round goes to the arm whose trigger shrank fastest and is smallest,
    or with probability epsilon to a random one. The foremost pairs are also searched the other way round: where both
    directions are easy, the two classes are alike and nothing was planted. So pairs cost far less than K x K searches.

    The score of a label or pair is the logarithm of how far its trigger is inside the authors' bound on its size, as a
    share of the image; that of a pair is no more than the logarithm of the ratio of the two directions over the bound
    on it. A label has the larger of its own score and those of the pairs that it is the target of; the model has the
    largest, and above 0 the paper's rule calls it backdoored. Some 10 to 40 s on a free core with small nets.

    Ours: on few labels the backdoored one is often not among the first answers, so ``least`` labels are always
    searched; a round is some steps of one batch, where the authors take a pass over all images, and the weight of the
    size and the step are those of the scanners' short search.

    Args:
        gamma: Share of the labels that count as the first answers of an image, in (0, 1] (0.25).
        label_theta: A label is screened in if it is among the first answers for this share of the images of other
            labels, in [0, 1] (0.95).
        pair_theta: A pair is screened in if its target is, for this share of the images of its source, in [0, 1] (0.9).
        least: Labels that are searched at least, in order of that share, at least 1.
        pairs: Most pairs that are searched, at least 0.
        rounds: Rounds of the bandit after the warm-up, at least 0.
        pull: Steps of a round, at least 1.
        batch: Images of a step, at least 1.
        warmup: Times that each arm must have found a smaller trigger before the bandit starts, at least 1 (2).
        patience: Rounds that an arm gets for it, at least 1.
        epsilon: Probability of a random arm, in [0, 1] (0.3).
        beta: Weight of the size against the speed, in the authors' pixels, at least 0 (10,000).
        lr: Step size of Adam, above 0 (0.1).
        pressure: First weight of the size, as a share of the whole image, above 0. The authors start at 0.
        reach: Success rate that counts as a success, in (0, 1] (0.99).
        label_bound: A trigger below this share of the image is suspect for a label, in (0, 1): 1,700 of 224 x 224.
        pair_bound: The same for a pair: 1,000 of 224 x 224.
        ratio_bound: A pair's other direction must need a trigger this many times as large, above 0 (10).
        checked: Pairs whose other direction is searched, at least 1.

    References:
        Shen et al., "Backdoor Scanning for Deep Neural Networks through K-Arm Optimization", ICML 2021, and its public
        code.
    """

    gamma: float = 0.25
    label_theta: float = 0.95
    pair_theta: float = 0.9
    least: int = 10
    pairs: int = 10
    rounds: int = 120
    pull: int = 5
    batch: int = 32
    warmup: int = 2
    patience: int = 8
    epsilon: float = 0.3
    beta: float = 1e4
    lr: float = 0.2
    pressure: float = 10.0
    reach: float = 0.99
    label_bound: float = 1700 / AUTHORS_PIXELS
    pair_bound: float = 1000 / AUTHORS_PIXELS
    ratio_bound: float = 10.0
    checked: int = 3

    def __post_init__(self) -> None:
        for name in ("gamma", "reach"):
            self.require(name, 0 < getattr(self, name) <= 1, "in (0, 1]")
        for name in ("label_theta", "pair_theta", "epsilon"):
            self.require(name, 0 <= getattr(self, name) <= 1, "in [0, 1]")
        for name in ("label_bound", "pair_bound"):
            self.require(name, 0 < getattr(self, name) < 1, "in (0, 1)")
        for name in ("least", "pull", "batch", "warmup", "patience", "checked"):
            self.require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("pairs", "rounds", "beta"):
            self.require(name, getattr(self, name) >= 0, "at least 0")
        for name in ("lr", "pressure", "ratio_bound"):
            self.require(name, getattr(self, name) > 0, "above 0")

    def scores(self, model: nn.Module, clean: Clean, run: Run) -> Scores:
        """See :class:`bezoar.core.method.Scorer`."""
        x, y = as_float(clean.x), clean.y
        require_gradient(model, x[:2].to(run.device))
        arms = [self._arm(model, x, aim, y, clean, run) for aim in self.aims(model, x, y, clean.num_classes, run)]
        arms = [arm for arm in arms if len(arm.x)]
        if not arms:
            raise UnsupportedModel("there are clean images of one label only", "Give images of at least 2 labels")
        self._search(arms, run)
        ratios = self._backwards(model, x, y, clean, arms, run)
        return self._judge(arms, ratios, clean)

    def aims(self, model: nn.Module, x: Tensor, y: Tensor, num_classes: int, run: Run) -> list[Aim]:
        """What is searched, by pre-screening."""
        shares = first_answers(model, x, y, num_classes, self.gamma, run.device)
        others = (len(y) - torch.bincount(y.cpu(), minlength=num_classes)).clamp(min=1)
        overall = shares.sum(0) / others
        order = overall.argsort(descending=True, stable=True).tolist()
        labels = [
            label for place, label in enumerate(order) if place < self.least or overall[label] >= self.label_theta
        ]
        by_source = torch.stack(
            [shares[y == c].mean(0) if bool((y == c).any()) else torch.zeros(num_classes) for c in range(num_classes)]
        ).fill_diagonal_(-1.0)
        found: list[Aim] = []
        taken = [0] * num_classes
        for place in by_source.flatten().argsort(descending=True, stable=True).tolist():
            source, target = divmod(place, num_classes)
            if len(found) >= self.pairs or float(by_source[source, target]) < self.pair_theta:
                break
            if taken[target] < _SOURCES:
                taken[target] += 1
                found.append(Aim(target, source))
        run.notes["labels_screened_in"] = int((overall >= self.label_theta).sum())
        run.notes["pairs_screened_in"] = int((by_source >= self.pair_theta).sum())
        return [Aim(label) for label in sorted(labels)] + found

    def _arm(self, model: nn.Module, x: Tensor, aim: Aim, y: Tensor, clean: Clean, run: Run) -> Arm:
        controller = CostController.quick(self.pressure, whole(clean), self.reach)
        space = MaskedSpace(clean.shape, start_mask=0.12)
        return Arm(aim, model, x[aim.of(y)], space, controller, self.lr, self.batch, run)

    def _search(self, arms: list[Arm], run: Run) -> None:
        total, done = len(arms) * self.patience + self.rounds, 0
        for arm in arms:
            for _ in range(self.patience):
                if arm.found >= self.warmup or given_up(arm):
                    break
                arm.pull(self.pull)
            done += self.patience
            self._tell(arms, done, total, run)
        chance = run.generator("k-arm", "bandit")
        for _ in range(self.rounds):
            alive = [arm for arm in arms if not given_up(arm)]
            at = int(torch.randint(len(alive), (1,), generator=chance)) if alive else 0
            if not alive:
                break
            random = float(torch.rand(1, generator=chance)) < self.epsilon
            chosen = alive[at] if random else max(alive, key=lambda arm: arm.worth(self.beta))
            chosen.pull(self.pull)
            done += 1
            self._tell(arms, done, total, run)

    def _tell(self, arms: list[Arm], done: int, total: int, run: Run) -> None:
        lead = min(arms, key=lambda arm: arm.size)
        run.progress.step(run.seed, done, total, f"label {lead.aim.target}, {lead.size:.0f} px")

    def _backwards(
        self, model: nn.Module, x: Tensor, y: Tensor, clean: Clean, arms: list[Arm], run: Run
    ) -> dict[Aim, float]:
        """Size of the other direction over that of the foremost pairs."""
        worked = sorted((a for a in arms if a.aim.source is not None and a.found), key=lambda arm: arm.size)
        ratios = {}
        for arm in worked[: self.checked]:
            assert arm.aim.source is not None
            back = self._arm(model, x, Aim(arm.aim.source, arm.aim.target), y, clean, run)
            if len(back.x):
                back.pull(arm.steps)
                ratios[arm.aim] = min(back.size, whole(clean)) / arm.size
        return ratios

    def _judge(self, arms: list[Arm], ratios: dict[Aim, float], clean: Clean) -> Scores:
        labels: dict[int, float] = {}
        pairs: dict[tuple[int, int], float] = {}
        triggers: dict[int, InvertedTrigger] = {}
        for arm in arms:
            share = min(arm.size, whole(clean)) / whole(clean)
            target, source = arm.aim.target, arm.aim.source
            score = math.log((self.label_bound if source is None else self.pair_bound) / share)
            if source is not None:
                # A pair that was not searched the other way round may be two classes that are alike.
                score = min(score, math.log(ratios.get(arm.aim, 1.0) / self.ratio_bound))
                pairs[source, target] = score
            if target not in labels or score > labels[target]:
                labels[target], triggers[target] = score, arm.trigger
        largest = max(labels.values())
        return Scores(
            labels=labels,
            model=largest,
            meaning="logarithm of the bound on the size of a trigger, as a share of the image, over its size",
            suspect=largest > 0,
            triggers=triggers,
            pairs=pairs,
        )


def whole(clean: Clean) -> float:
    """Pixels of an image."""
    _, height, width = clean.shape
    return float(height * width)


def given_up(arm: Arm) -> bool:
    """Whether a pair is hopeless."""
    return arm.aim.source is not None and any(
        arm.steps > steps and arm.reached <= rate and not arm.found for steps, rate in _HOPELESS
    )


@torch.no_grad()
def first_answers(
    model: nn.Module, x: Tensor, y: Tensor, num_classes: int, gamma: float, device: torch.device, batch: int = 256
) -> Tensor:
    """``(N, K)`` 1 where a label is among the first answers for an image and not its own, else 0."""
    count = _FIRST_OF_FEW if num_classes <= _FEW_LABELS else max(2, round(num_classes * gamma))
    out = torch.cat([logits(model, part.to(device)).float().cpu() for part in torch.split(x, batch)])
    first = out.topk(min(count, num_classes), dim=1).indices
    return torch.zeros(len(x), num_classes).scatter_(1, first, 1.0).scatter_(1, y.cpu()[:, None], 0.0)
