"""What filters that look at one label at a time share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bezoar.core.run import Run
from bezoar.ops.stats import anomaly_index

_NO_VARIANCE = 1e-12  # relative: below this a direction is rounding
_TRIES, _STEPS = 10, 100
#: Parts that clean examples are divided into, each to be held against the others.
FOLDS = 5


def by_label(labels: Tensor, num_classes: int, run: Run, least: int) -> Iterator[tuple[int, Tensor]]:
    """Label and ``(n,)`` positions of its examples; labels with fewer than ``least`` are left out, with a warning."""
    few = []
    for label in range(num_classes):
        run.check()
        rows = (labels == label).nonzero().flatten()
        if len(rows) < least:
            few.append(f"{label} ({len(rows)})")
            continue
        run.progress.report("labels", label + 1, num_classes, "")
        yield label, rows
    if few:
        shown = ", ".join(few[:5]) + (f" and {len(few) - 5} more" if len(few) > 5 else "")
        run.warnings.append(f"labels with fewer than {least} examples were not looked at: {shown}")


def principal(centred: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The directions of largest variance.

    Args:
        centred: ``(n, D)`` rows with mean zero.
        most: Directions wanted.

    Returns:
        ``(D, k)`` orthonormal directions and ``(k,)`` variances (divisor n), largest first. ``k`` is at most ``most``;
        directions without variance are left out.
    """
    count, width = centred.shape
    if count >= width:
        values, vectors = torch.linalg.eigh(centred.T @ centred / count)
    else:
        values, left = torch.linalg.eigh(centred @ centred.T / count)
        vectors = torch.nn.functional.normalize(centred.T @ left, dim=0)
    values, vectors = values.flip(0)[:most], vectors.flip(1)[:, :most]
    real = values > _NO_VARIANCE * max(float((centred**2).mean()) * width, 1e-30)
    return vectors[:, real], values[real]


@dataclass(frozen=True)
class Split:
    """Rows in two groups.

    Attributes:
        second: ``(n,)`` bool: rows of the second group, never the larger one.
        means: ``(2, D)`` means of the first and of the second group.
    """

    second: Tensor
    means: Tensor


def two_means(rows: Tensor) -> Split | None:
    """2-means; the best of several starts, none of which depends on the order of the rows.

    A start cuts the rows at their mean along one of the directions of largest variance.

    Args:
        rows: ``(n, D)``.

    Returns:
        None where the rows do not fall into two groups, such as equal ones.
    """
    centred = rows - rows.mean(0)
    directions, _ = principal(centred, _TRIES)
    best, least = None, float("inf")
    for direction in directions.T:
        found = _lloyd(rows, centred @ direction > 0)
        if found is not None and found[1] < least * (1 - 1e-9):
            best, least = found[0], found[1]
    return best


def _lloyd(rows: Tensor, second: Tensor) -> tuple[Split, float] | None:
    for _ in range(_STEPS):
        if bool(second.all()) or not bool(second.any()):
            return None
        means = torch.stack([rows[~second].mean(0), rows[second].mean(0)])
        apart = torch.stack([((rows - mean) ** 2).sum(1) for mean in means])
        nearer = apart[1] < apart[0]
        if torch.equal(nearer, second):
            break
        second = nearer
    if int(second.sum()) * 2 > len(rows):
        second, means = ~second, means.flip(0)
    return Split(second, means), float(apart.min(0).values.sum())


def stands_out(statistic: Sequence[float]) -> list[float]:
    """Anomaly index of each label, in robust standard deviations above the median; finite, 0 at the median."""
    if not statistic:
        return []
    return [min(-float(one), 1e6) for one in anomaly_index(list(statistic))]


def over_represented(suspect: Tensor, labels: Tensor, num_classes: int) -> dict[int, float]:
    """How many times its share of the examples each label has of the suspects; labels without examples have none."""
    counts = torch.bincount(labels, minlength=num_classes).double()
    found = torch.bincount(labels[suspect], minlength=num_classes).double()
    lift = (found / found.sum().clamp(min=1)) / (counts / counts.sum().clamp(min=1))
    return {label: float(lift[label]) for label in range(num_classes) if counts[label]}


def held_out_limit(
    parts: Iterable[Tensor], count: int, distances: Callable[[Tensor, Tensor], Tensor], share: float
) -> float:
    """The distance that a share of clean examples exceeds, each part held against the others.

    Args:
        parts: Positions of the examples, each in one part.
        count: How many examples there are.
        distances: Of the examples of a part, from their positions and ``(count,)`` bool, the others.
        share: In (0, 1).
    """
    found = []
    for part in parts:
        others = torch.ones(count, dtype=torch.bool)
        others[part] = False
        found.append(distances(part, others))
    ordered = torch.cat(found).sort().values
    return float(ordered[min(int((1 - share) * len(ordered)), len(ordered) - 1)])
