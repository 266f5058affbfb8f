"""A student: a small net that is taught a model's answers on clean images, and so learns what these images show.

A backdoor answers to what clean images never show, so a student has nothing to learn it from. What it shares with the
model are the natural features of the labels.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bezoar.core.errors import UnsupportedModel
from bezoar.core.evidence import LabelScan, Scan, SeedScan
from bezoar.core.method import Clean, own_randomness, tried_on
from bezoar.core.run import Run
from bezoar.core.surgery import frozen, logits
from bezoar.core.trigger import InvertedTrigger
from bezoar.ops.answers import answers
from bezoar.ops.augment import crop, mixup
from bezoar.ops.fit import Batch, Recipe, fit, tell
from bezoar.ops.objective import Stateless

#: How far the trigger of a label moves a student, see :func:`transfer`.
Transfer = Callable[[int, LabelScan], float]
#: Least rise of a student's probability at which a trigger is taken to be natural, and how much of the distance between
#: its size and the usual one (on a logarithmic scale) counts then. Both were chosen on the shared set of small victims.
NATURAL, COUNTS = 0.1, 0.3
_AGREES = 0.3  # least share of clean images on which a student must agree with the model
_SIDE = 32  # pixels a side that a student sees at most
_VIEWS, _EACH = 4096, 17  # most crops that the model is asked about, half of them mixed with another; most of an image
_EPOCHS = 5
_CHUNK = 128


def _small(x: Tensor) -> Tensor:
    """Images of at most as many pixels a side as a student sees."""
    return F.adaptive_avg_pool2d(x, (min(x.shape[2], _SIDE), min(x.shape[3], _SIDE)))


def taught(model: nn.Module, build: Callable[[], nn.Module], clean: Clean, run: Run) -> nn.Module:
    """A student of a model, taught on the images to work with, in eval mode and frozen.

    Args:
        model: Left as it was.
        build: Makes the student's net, for the colour channels of the images and at most 32 pixels a side; its first
            weights come from torch's global generator, under the seed of the run.
        clean: Clean images; the held-out ones are not used.
        run: Device, seed, time.

    Raises:
        BudgetSpent: Time is over.
    """
    views, wanted = _lessons(model, clean, run)
    with own_randomness(run):
        student = build().to(run.device)
    recipe = Recipe(epochs=_EPOCHS, lr=3e-3, optimizer="adam", weight_decay=0.0, batch=64)
    told = tell(run, "student")
    fit(student, views, wanted.argmax(1), recipe, seed=run.seed, objective=_Answers(wanted), progress=told)
    for parameter in student.parameters():
        parameter.requires_grad_(False)
    return student


def trusted(model: nn.Module, build: Callable[[], nn.Module], clean: Clean, run: Run) -> nn.Module:
    """A student that has learned enough of the model to say what is natural; arguments as for :func:`taught`.

    Raises:
        BudgetSpent: Time is over.
        UnsupportedModel: The student agrees with the model on too few clean images.
    """
    student = taught(model, build, clean, run)
    same = agreement(student, model, clean, run)
    if same < _AGREES:
        raise UnsupportedModel(
            f"a student of the model agrees with it on {same:.0%} of clean images only, too few to tell natural "
            "features by",
            "Give more clean images",
        )
    return student


class _Answers(Stateless):
    """Cross-entropy against the model's probabilities."""

    def __init__(self, wanted: Tensor) -> None:
        self.wanted = wanted

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """See :class:`bezoar.ops.objective.Objective`."""
        return F.cross_entropy(model(batch.x), self.wanted[batch.index].to(batch.x.device))


@torch.no_grad()
def _lessons(model: nn.Module, clean: Clean, run: Run) -> tuple[Tensor, Tensor]:
    """``(V, C, H, W)`` views of the clean images, and ``(V, K)`` the model's probabilities."""
    draw, pad = run.generator("student"), max(1, round(min(clean.shape[1:]) / 14))
    order = torch.cat([torch.randperm(len(clean.x), generator=draw) for _ in range(_EACH)])
    views, wanted = [], []
    with frozen(model):
        for number, rows in enumerate(torch.split(order[:_VIEWS], _CHUNK)):
            run.check()
            x = crop(clean.x[rows].to(run.device), pad, draw)
            if number % 2:
                x = mixup(x, 1.0, draw)[0]
            views.append(_small(x).cpu())
            wanted.append(logits(model, x).float().softmax(1).cpu())
    return torch.cat(views), torch.cat(wanted)


@torch.no_grad()
def transfer(
    student: nn.Module,
    clean: Clean,
    label: int,
    trigger: InvertedTrigger,
    run: Run,
    most: int = 256,
    source: int | None = None,
) -> float:
    """How far a trigger that was found in the model moves its student too.

    Args:
        student: See :func:`taught`.
        clean: Held-out images of other labels are stamped.
        label: What the trigger gives in the model.
        trigger: The trigger.
        run: Device.
        most: Most images.
        source: Label of the images that are stamped; all other labels by default.

    Returns:
        Mean rise of the student's probability of the label, in [0, 1]; NaN without such images.
    """
    rows = tried_on(clean.held_y, label, source).nonzero().flatten()[:most]
    rises = []
    for part in torch.split(rows, _CHUNK):
        x = clean.held_x[part].to(run.device)
        before, after = (student(_small(one)).softmax(1)[:, label] for one in (x, trigger(x)))
        rises.append((after - before).cpu())
    rise = float(torch.cat(rises).mean()) if rises else float("nan")
    return rise if math.isnan(rise) else max(0.0, rise)


def agreement(student: nn.Module, model: nn.Module, clean: Clean, run: Run) -> float:
    """Share of the clean images, the held-out ones where there are any, that both nets give the same label."""
    x = clean.held_x if len(clean.held_x) else clean.x
    run.check()
    same = answers(student, _small(x), run.device) == answers(model, x, run.device)
    return float(same.float().mean())


def discounted(scan: Scan, moved: Transfer) -> Scan:
    """A search in which small triggers that move a student too count as nearer to the usual size.

    A trigger is taken to be natural as far as it moves the student as much as those of the other labels do, and by at
    least ``NATURAL``. Of how much smaller a wholly natural one is than the median, ``COUNTS`` is left, on a logarithmic
    scale.

    Args:
        scan: Evidence of the search.
        moved: How far the trigger of a label moves the student; NaN where that is unknown.
    """
    return dataclasses.replace(scan, seeds=tuple(_discounted(seed, moved) for seed in scan.seeds))


def _discounted(seed: SeedScan, moved: Transfer) -> SeedScan:
    natural = naturalness(seed, moved)
    labels = {}
    for label, found in seed.labels.items():
        usual = seed.usual_size(label)
        if usual is not None and found.size < usual and not math.isnan(natural[label]):
            weight = 1 - (1 - COUNTS) * min(1.0, natural[label])
            found = dataclasses.replace(found, size=usual * (max(found.size, 1e-9) / usual) ** weight)
        labels[label] = found
    return dataclasses.replace(seed, labels=labels)


def naturalness(seed: SeedScan, moved: Transfer) -> dict[int, float]:
    """How far each trigger moves the student, over how far those of the others do, or ``NATURAL`` if that is more.

    It is the median of the others that counts. They are the reference labels whose trigger worked.

    Args:
        seed: Evidence of a search.
        moved: How far the trigger of a label moves the student.

    Returns:
        By label; from 1 on, a trigger is wholly made of natural features; NaN where it is unknown.
    """
    far = {label: moved(label, found) for label, found in seed.labels.items()}
    usual = {
        label: far[label]
        for label, found in seed.labels.items()
        if found.reference and found.status != "failed" and not math.isnan(far[label])
    }
    return {
        label: value / max(NATURAL, float(np.median([v for other, v in usual.items() if other != label] or [0.0])))
        for label, value in far.items()
    }
