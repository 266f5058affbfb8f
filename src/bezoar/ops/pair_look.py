"""Triggers of pairs of labels as a search of its own: what was found, and the verdict of the scorer's own rule."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from itertools import groupby

from torch import nn

from bezoar.core.evidence import LabelScan, Scan, Scores, SeedScan
from bezoar.core.method import Clean
from bezoar.core.results import Figure, Rule, SeedResult
from bezoar.core.run import Run
from bezoar.core.scored import Verdict
from bezoar.core.trigger import MaskedTrigger
from bezoar.ops.answers import answers
from bezoar.ops.verdict import Judgement, judge


def leading_sources(pairs: Mapping[tuple[int, int], float]) -> dict[int, int]:
    """For each target, in order, the source of its most suspicious pair; of equal ones the first."""
    ranked = sorted(pairs, key=lambda pair: (pair[1], -pairs[pair]))
    return {target: next(same)[0] for target, same in groupby(ranked, key=lambda pair: pair[1])}


def found_pairs(scores: Scores, model: nn.Module, clean: Clean, run: Run) -> Scan:
    """The trigger of each target's leading pair as evidence of a search.

    Args:
        scores: Of a scorer that tells pairs and gives masked triggers.
        model: The model.
        clean: The success rate is that on held-out images of the source; NaN where there are none.
        run: Device and seed.
    """
    _, height, width = clean.shape
    labels = {}
    for target, source in leading_sources(scores.pairs).items():
        trigger = scores.triggers[target]
        assert isinstance(trigger, MaskedTrigger)
        rows = clean.held_y == source
        asr = math.nan
        if bool(rows.any()):
            given = answers(model, trigger(clean.held_x[rows].to(run.device)), run.device)
            asr = float((given == target).float().mean())
        labels[target] = LabelScan(float(trigger.mask.sum()), asr, "complete", True, trigger)
    return Scan((SeedScan(run.seed, labels, True),), clean.num_classes, height * width)


def judged_pairs(scan: Scan, scores: Scores, method: str, calibration: str, names: tuple[str, ...]) -> Judgement:
    """The verdict of the scorer's own rule on what was found.

    Args:
        scan: See :func:`found_pairs`.
        scores: They have a bound.
        method: Name of the scorer.
        calibration: On what its bound was calibrated.
        names: Name of each label.
    """
    assert scores.bound is not None
    verdict: Verdict = "inconclusive" if scores.suspect is None else "backdoored" if scores.suspect else "clean"
    target = scores.leader if scores.suspect else None
    text = (
        f"Backdoored: the score of a source and target, {scores.meaning}, is above {scores.bound:.2g}. What the other "
        "searches say is not touched by it."
    )
    figures = (
        Figure(
            name="score", value=scores.model, bound=scores.bound, passed=bool(scores.suspect), meaning=scores.meaning
        ),
    )
    return dataclasses.replace(
        judge(scan, names, leader=scores.leader),
        verdict=verdict,
        target=target,
        rule=Rule(name=method, text=text, calibration=calibration, figures=figures),
        seeds=tuple(SeedResult(seed=one.seed, verdict=verdict, target=target, figures=figures) for one in scan.seeds),
    )
