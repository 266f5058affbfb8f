"""A second look at an inconclusive verdict: is a small trigger planted, or a natural feature?"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from bezoar.core.evidence import Scan
from bezoar.core.results import Figure
from bezoar.ops.student import NATURAL, Transfer, enlarged
from bezoar.ops.verdict import Judgement, confirm, judge

_TEXT = (
    " Since that was inconclusive, a student of the model was taught on clean images, which tells natural features "
    "from what was planted: a trigger that moves the student as well counts as up to 1.65 times as large. The figures "
    "are those after that; they can make the verdict backdoored, never clean."
)


def second_look(
    scans: Sequence[Scan], judgements: Sequence[Judgement], names: tuple[str, ...], moved: Transfer
) -> list[Judgement]:
    """Judge searches anew with a student of the model.

    In clean models of some data the smallest natural trigger of one label is far smaller than the others, and beside it
    a planted one of another label does not stand apart.

    Args:
        scans: Evidence of each search, that for masks first.
        judgements: What the rule says of each.
        names: Name of each label.
        moved: How far triggers move a student of the model.

    Returns:
        Each judgement: that on the sizes after the student where it says ``backdoored``, else the one that was given;
        both with one figure more.
    """
    larger = [enlarged(scan, moved) for scan in scans]
    fresh = [judge(scan, names) for scan in larger]
    fresh[1:] = [confirm(one, larger[0]) for one in fresh[1:]]
    return [_chosen(before, after, scan, moved) for before, after, scan in zip(judgements, fresh, scans, strict=True)]


def _chosen(before: Judgement, after: Judgement, scan: Scan, moved: Transfer) -> Judgement:
    found = after.verdict == "backdoored" and before.verdict == "inconclusive"
    # Sizes are shown as they were found.
    one = dataclasses.replace(after, labels=before.labels) if found else before
    far = [moved(one.leader, seed.labels[one.leader]) for seed in scan.seeds if one.leader in seed.labels]
    figure = Figure(
        name="transfer to a student",
        value=float(np.median(far)) if far else float("nan"),
        bound=NATURAL,
        passed=bool(far) and float(np.median(far)) < NATURAL,
        meaning="rise of the label's probability in a student taught on clean images; a natural feature moves it too",
    )
    rule = dataclasses.replace(
        one.rule, text=one.rule.text + (_TEXT if found else ""), figures=(*one.rule.figures, figure)
    )
    return dataclasses.replace(one, rule=rule)
