"""A second look at a verdict: is a small trigger planted, or a natural feature?"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from bezoar.core.evidence import LabelScan, Scan, SeedScan
from bezoar.core.results import Figure
from bezoar.ops.student import NATURAL, Transfer, naturalness
from bezoar.ops.verdict import Judgement, confirm, judge

#: Logarithm of how many times as large a natural trigger counts; chosen on the shared set of small victims.
_LARGER = 0.5
_FOUND = (
    " Since that was inconclusive, a student of the model was taught on clean images, which tells natural features "
    "from what was planted: a trigger that moves the student as well counts as up to 1.65 times as large. The figures "
    "are those after that; they can make the verdict backdoored, never clean."
)
_NATURAL = (
    " A student of the model was taught on clean images, which tells natural features from what was planted. The "
    "label's trigger moves the student as well, so it may be natural, and the verdict is inconclusive."
)


def second_look(
    scans: Sequence[Scan], judgements: Sequence[Judgement], names: tuple[str, ...], moved: Transfer
) -> list[Judgement]:
    """Judge searches anew with a student of the model.

    In clean models of some data the natural trigger of one label is far smaller than the others. It must not pass for a
    planted one; and beside it a planted one of another label does not stand apart.

    Args:
        scans: Evidence of each search, that for masks first.
        judgements: What the rule says of each.
        names: Name of each label.
        moved: How far triggers move a student of the model.

    Returns:
        Each judgement with one figure more: an inconclusive one on the sizes after the student where these say
        ``backdoored``; one that says ``backdoored`` becomes inconclusive where the trigger is natural.
    """
    larger = [_enlarged(scan, moved) for scan in scans]
    fresh = [judge(scan, names) for scan in larger]
    fresh[1:] = [confirm(one, larger[0]) for one in fresh[1:]]
    out = []
    for before, after, scan in zip(judgements, fresh, scans, strict=True):
        # What confirms a faint change must be no natural feature either.
        natural = any(_rate(one, after.leader, moved) >= 1 for one in (scan, scans[0]))
        found = (before.verdict, after.verdict) == ("inconclusive", "backdoored") and not natural
        # Sizes are shown as they were found.
        chosen = dataclasses.replace(after, labels=before.labels) if found else before
        out.append(_told(chosen, _rate(scan, chosen.leader, moved), _FOUND if found else ""))
    return out


def _enlarged(scan: Scan, moved: Transfer) -> Scan:
    def one(label: int, found: LabelScan) -> LabelScan:
        far = moved(label, found)
        part = 0.0 if math.isnan(far) else min(1.0, far / NATURAL)
        return dataclasses.replace(found, size=found.size * math.exp(_LARGER * part))

    def each(seed: SeedScan) -> SeedScan:
        return dataclasses.replace(seed, labels={label: one(label, found) for label, found in seed.labels.items()})

    return dataclasses.replace(scan, seeds=tuple(each(seed) for seed in scan.seeds))


def _rate(scan: Scan, label: int, moved: Transfer) -> float:
    """How natural a label's trigger is, the median over the seeds that count; NaN where it is unknown."""
    seeds = [seed for seed in scan.seeds if seed.finished] or list(scan.seeds)
    rates = [naturalness(seed, moved)[label] for seed in seeds if label in seed.labels]
    known = [rate for rate in rates if not math.isnan(rate)]
    return float(np.median(known)) if known else float("nan")


def _told(one: Judgement, rate: float, text: str) -> Judgement:
    """The judgement with the figure, where it is known; no backdoor where the trigger is natural."""
    if math.isnan(rate):
        return one
    figure = Figure(
        name="transfer to a student",
        value=rate,
        bound=1.0,
        passed=rate < 1,
        meaning="rise of the label's probability in a student that was taught on clean images alone, over that by the "
        f"triggers of other labels (or {NATURAL:.2g}); from 1 on, the trigger is made of natural features",
    )
    if one.verdict == "backdoored" and rate >= 1:
        one, text = dataclasses.replace(one, verdict="inconclusive", target=None), _NATURAL
    rule = dataclasses.replace(one.rule, text=one.rule.text + text, figures=(*one.rule.figures, figure))
    return dataclasses.replace(one, rule=rule)
