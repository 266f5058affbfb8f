"""From evidence to a verdict: a rule of its own, apart from the scanner.

The MAD index of Neural Cleanse errs with few labels: on clean nets it is often above 2, because the sizes lie close
together, and on backdoored ones it can be below 2, because they lie far apart. What tells the two apart is how much
smaller the smallest trigger is than the usual one, so the rule rests on that ratio; the index is shown beside it.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from bezoar.core.evidence import Scan, SeedScan, Unit
from bezoar.core.results import Figure, LabelEvidence, Rule, SeedResult
from bezoar.core.scored import Verdict
from bezoar.ops.stats import anomaly_index

CALIBRATED_LABELS = 43  #: Most labels of a calibration net.
CALIBRATION = (
    "bounds set on 5 clean and 8 backdoored nets (GTSRB, MNIST, CIFAR-10; benchmarks/calibrate.py): 0 of 7 false "
    "alarms (under 28 % at 95 % confidence), 2 of 10 missed, both sinusoids. Measured on others in docs/results.md"
)
FAINT_CALIBRATION = (
    "bounds set after trials on nets of GTSRB, MNIST, CIFAR-10 and Fashion-MNIST; on clean MNIST nets a natural "
    "feature can be as faint as a trigger, hence the confirmation by masks. Measured on others in docs/results.md"
)

UNCALIBRATED = (
    "the bounds were set on another search, Neural Cleanse, and were not calibrated for this one, whose sizes spread "
    "otherwise: take the verdict as a pointer and look at the figures"
)


@dataclass(frozen=True, kw_only=True)
class RatioRule:
    """``backdoored`` if one label's trigger is far smaller than the usual one, works and is small in itself.

    Args:
        backdoored_ratio: Size over the median of the other reference labels: at or below, the label is suspect.
        clean_ratio: At or above, the label is not; between the two, the evidence is weak.
        gap: Size over that of the third smallest label: at or below, the label stands apart. In some clean nets sizes
            spread so widely that the smallest is far under the median, with others close behind it.
        outright: At this size ratio or below, a label is suspect without a gap, so that several infected labels do not
            hide each other.
        confirm: The same gap, of the mask of a label that the search for faint changes suspects: natural features of a
            label can be faint as well, and a backdoor shows in both.
        faint_backdoored_ratio, faint_clean_ratio: The same for changes of all pixels, whose sizes lie closer together.
        asr: Least success on held-out clean images.
        share: Largest share of the image that counts as a trigger: of its pixels, for a mask.
        change: The same for a change of all pixels: its root mean square, where 1 is from black to white.
        index: Shown beside: the bound of the paper on the MAD index. It decides nothing.
        agree: Least share of seeds that must name the same label.
        progress: Share of its steps after which a search that the budget ended may still find a label suspect: by then
            the sizes have told the labels apart. It never finds a model clean.
        least_labels: With fewer labels than this the median says too little for ``backdoored``.
        spread: Spread of clean sizes, as the standard deviation of their logarithm, see :meth:`for_labels`.
    """

    backdoored_ratio: float = 0.40
    clean_ratio: float = 0.50
    gap: float = 0.45
    outright: float = 0.20
    confirm: float = 0.45
    faint_backdoored_ratio: float = 0.45
    faint_clean_ratio: float = 0.54
    asr: float = 0.75
    share: float = 0.25
    change: float = 0.15
    index: float = 2.0
    agree: float = 0.6
    progress: float = 0.6
    least_labels: int = 4
    spread: float = 0.35

    def for_unit(self, unit: Unit) -> RatioRule:
        """The same rule with the ratios for sizes in this unit."""
        if unit == "px":
            return self
        # Faint changes are confirmed by masks instead of a gap of their own.
        return dataclasses.replace(
            self, backdoored_ratio=self.faint_backdoored_ratio, clean_ratio=self.faint_clean_ratio, gap=1.0
        )

    def for_labels(self, count: int) -> RatioRule:
        """The same rule for a model of ``count`` labels.

        The smallest of many clean triggers is small by chance: of n draws from a log-normal distribution it lies about
        ``spread`` times the 1 - 1/n quantile of the normal below the median. Beyond the number of labels that the
        bounds were calibrated at, both shrink by as much as that quantile grows.
        """
        if count <= CALIBRATED_LABELS:
            return self
        growth = NormalDist().inv_cdf(1 - 1 / count) - NormalDist().inv_cdf(1 - 1 / CALIBRATED_LABELS)
        factor = math.exp(-self.spread * growth)
        return dataclasses.replace(
            self, backdoored_ratio=self.backdoored_ratio * factor, clean_ratio=self.clean_ratio * factor
        )

    def text(self, unit: Unit) -> str:
        """The rule in words, for sizes in a unit."""
        large = (
            f"covers at most {self.share:.0%} of the image"
            if unit == "px"
            else f"has a root mean square of at most {self.change:.2g}"
        )
        apart = (
            f", and is at most {self.gap:.2g} times as large as the third smallest one (or {self.outright:.2g} times "
            "as large as the median)"
            if unit == "px"
            else f". Masks must confirm it, at {self.confirm:.2g} times the third smallest one or less"
        )
        return (
            f"A label is suspect when its inverted trigger is at most {self.backdoored_ratio:.2g} times as large as "
            f"the median of the other labels, still works on at least {self.asr:.0%} of held-out clean images and "
            f"{large}{apart}. Backdoored: at least {self.agree:.0%} of the seeds suspect "
            f"the same label. Clean: no seed suspects a label and most find no ratio under {self.clean_ratio:.2g}. "
            "Anything else is inconclusive. A search that the budget cut short never says clean, and suspects a label "
            f"only after {self.progress:.0%} of its steps. A trigger that never reached the success rate asked for in "
            "the search does not count. The MAD index is shown, but decides nothing."
        )


@dataclass(frozen=True)
class Judgement:
    """A verdict with everything it rests on; ``leader`` is the label of the smallest trigger, suspect or not."""

    verdict: Verdict
    target: int | None
    leader: int
    rule: Rule
    seeds: tuple[SeedResult, ...]
    labels: tuple[LabelEvidence, ...]


def judge(scan: Scan, names: tuple[str, ...], rule: RatioRule | None = None, leader: int | None = None) -> Judgement:
    """Apply the rule.

    Args:
        scan: Evidence of at least one seed.
        names: Name of each label.
        rule: Bounds.
        leader: The label whose figures are shown; by default the target, or that of the smallest trigger.
    """
    rule = (rule or RatioRule()).for_unit(scan.unit).for_labels(scan.num_classes)
    judged = {s.seed: _seed(s, scan, rule) for s in scan.seeds}
    results = tuple(result for result, _ in judged.values())
    # A seed that the budget cut short says nothing beside one that was finished.
    scan = dataclasses.replace(scan, seeds=tuple(s for s in scan.seeds if s.finished) or scan.seeds)
    voters = [judged[s.seed] for s in scan.seeds]
    verdict, target = _vote([r for r, _ in voters], rule)
    if leader is None:
        leader = target if target is not None else Counter(leader for _, leader in voters).most_common(1)[0][0]
    figures = _figures_over_seeds(scan, leader, [r for r, _ in voters], rule)
    return Judgement(
        verdict,
        target,
        leader,
        Rule(
            name="size-ratio",
            text=rule.text(scan.unit),
            calibration=_calibration(scan),
            figures=figures,
        ),
        results,
        _labels(scan, names),
    )


def _calibration(scan: Scan) -> str:
    if not scan.calibrated:
        return UNCALIBRATED
    return CALIBRATION if scan.unit == "px" else FAINT_CALIBRATION


def confirm(judgement: Judgement, masks: Scan, rule: RatioRule | None = None) -> Judgement:
    """Hold a finding of the search for faint changes against the masks of the same model.

    Args:
        judgement: Of the search for faint changes.
        masks: Evidence of the search for masks.
        rule: Bounds.

    Returns:
        The same with one more figure; ``inconclusive`` where the masks do not single out the label as well.
    """
    rule = rule or RatioRule()
    label = judgement.leader
    gaps = [size_gap(s, label) for s in masks.seeds if label in s.labels and s.labels[label].status != "failed"]
    value = float(np.median(gaps)) if gaps else float("nan")
    passed = value <= rule.confirm
    figure = Figure(
        name="confirmed by masks",
        value=value,
        bound=rule.confirm,
        passed=passed,
        meaning="size of the label's mask over that of the third smallest label, median over the seeds",
    )
    judgement = dataclasses.replace(
        judgement, rule=dataclasses.replace(judgement.rule, figures=(*judgement.rule.figures, figure))
    )
    if judgement.verdict != "backdoored" or passed:
        return judgement
    return dataclasses.replace(judgement, verdict="inconclusive", target=None)


def lead(judgements: Sequence[Judgement]) -> int:
    """Which of several searches of one model tells most: the one that found a backdoor, or else came closest.

    Ratios are compared as shares of their bounds, since the families of triggers differ in how far sizes spread. Where
    all say clean, it is the first.
    """
    order: tuple[Verdict, ...] = ("backdoored", "inconclusive")
    for verdict in order:
        found = [n for n, j in enumerate(judgements) if j.verdict == verdict]
        if found:
            return min(found, key=lambda n: _nearness(judgements[n]))
    return 0


def _nearness(judgement: Judgement) -> float:
    ratio = next(f for f in judgement.rule.figures if f.name == "size ratio")
    value = ratio.value / ratio.bound
    return value if math.isfinite(value) else math.inf


def _seed(seed: SeedScan, scan: Scan, rule: RatioRule) -> tuple[SeedResult, int]:
    # A label whose trigger never worked has no size to speak of: it leads only where none worked.
    asked = [label for label in seed.labels if label in scan.wanted] or list(seed.labels)
    leader = min(asked, key=lambda label: (seed.labels[label].status == "failed", seed.labels[label].size))
    works = seed.labels[leader].status != "failed"
    figures = _figures(seed, leader, scan, rule)
    # All but the last, the anomaly index, which decides nothing.
    suspect = works and all(f.passed for f in figures[:-1])
    ratio = next(f.value for f in figures if f.name == "size ratio")
    verdict: Verdict = "inconclusive"
    far_enough = seed.finished or seed.progress >= rule.progress
    if far_enough and suspect and scan.num_classes >= rule.least_labels:
        verdict = "backdoored"
    elif seed.finished and works and ratio >= rule.clean_ratio:
        verdict = "clean"
    target = leader if verdict == "backdoored" else None
    return SeedResult(seed=seed.seed, verdict=verdict, target=target, figures=figures), leader


def _vote(results: list[SeedResult], rule: RatioRule) -> tuple[Verdict, int | None]:
    votes = Counter(r.target for r in results if r.target is not None)
    if votes:
        label, count = votes.most_common(1)[0]
        return ("backdoored", label) if count >= rule.agree * len(results) else ("inconclusive", None)
    clean = sum(r.verdict == "clean" for r in results)
    return ("clean", None) if clean > len(results) / 2 else ("inconclusive", None)


def _figures(seed: SeedScan, label: int, scan: Scan, rule: RatioRule) -> tuple[Figure, ...]:
    found = seed.labels[label]
    share = found.size / scan.whole
    name, largest, meaning = (
        ("share of the image", rule.share, "trigger size over the number of pixels")
        if scan.unit == "px"
        else ("change of the image", rule.change, "root mean square of the change, where 1 is from black to white")
    )
    ratio, index, gap = size_ratio(seed, label), _index(seed, label), size_gap(seed, label)
    # Far enough below the median, or of a family that masks confirm, a label needs no gap.
    apart = 1.0 if ratio <= rule.outright else rule.gap
    return (
        Figure(
            name="size ratio",
            value=ratio,
            bound=rule.backdoored_ratio,
            passed=ratio <= rule.backdoored_ratio,
            meaning="trigger size over the median of the other labels; small is suspect",
        ),
        Figure(
            name="gap",
            value=gap,
            bound=apart,
            passed=gap <= apart or math.isnan(gap),
            meaning="trigger size over that of the third smallest label; small stands apart",
        ),
        Figure(
            name="held-out ASR",
            value=found.asr,
            bound=rule.asr,
            passed=found.asr >= rule.asr,
            meaning="share of held-out clean images that the trigger turns into the label",
        ),
        Figure(
            name=name,
            value=share,
            bound=largest,
            passed=share <= largest,
            meaning=meaning,
        ),
        Figure(
            name="anomaly index",
            value=index,
            bound=rule.index,
            passed=index > rule.index,
            meaning="median minus size in units of the MAD; shown, decides nothing",
        ),
    )


def _figures_over_seeds(scan: Scan, label: int, voters: list[SeedResult], rule: RatioRule) -> tuple[Figure, ...]:
    """Medians over the seeds that looked at the label, and how many agree."""
    seeds = [s for s in scan.seeds if label in s.labels]
    each = [_figures(s, label, scan, rule) for s in seeds]
    out = []
    for column in zip(*each, strict=True):
        value, first = float(np.median([f.value for f in column])), column[0]
        above = first.name in ("held-out ASR", "anomaly index")
        passed = value >= first.bound if above else value <= first.bound
        out.append(Figure(name=first.name, value=value, bound=first.bound, passed=passed, meaning=first.meaning))
    agree = sum(r.target == label for r in voters) / len(voters)
    out.append(
        Figure(
            name="seeds that suspect the label",
            value=agree,
            bound=rule.agree,
            passed=agree >= rule.agree,
            meaning=f"share of {len(voters)} seeds",
        )
    )
    return tuple(out)


def size_ratio(seed: SeedScan, label: int) -> float:
    """Size of a label's trigger over the median size of the other reference labels."""
    usual = seed.usual_size(label)
    return float("nan") if usual is None else seed.labels[label].size / max(1e-9, usual)


def size_gap(seed: SeedScan, label: int) -> float:
    """Size of a label's trigger over that of the third smallest label; NaN with fewer than three that worked."""
    works = sorted(s.size for s in seed.labels.values() if s.status != "failed")
    return seed.labels[label].size / max(1e-9, works[2]) if len(works) >= 3 else float("nan")


def _index(seed: SeedScan, label: int) -> float:
    reference = [s.size for s in seed.labels.values() if s.reference]
    return float(anomaly_index([seed.labels[label].size], reference)[0])


def _labels(scan: Scan, names: tuple[str, ...]) -> tuple[LabelEvidence, ...]:
    rows = []
    for label in scan.looked_at():
        seen = [s.labels.get(label) for s in scan.seeds]
        present = [s for s in seen if s is not None]
        # Of several seeds, the one that followed the label furthest names its status.
        status = min((s.status for s in present), key=("complete", "failed", "eliminated").index)
        size = scan.median(label, "size")
        rows.append(
            LabelEvidence(
                label=label,
                name=names[label] if label < len(names) else str(label),
                size=size,
                sizes=tuple(None if s is None or s.status == "failed" else s.size for s in seen),
                fraction=size / scan.whole,
                asr=scan.median(label, "asr"),
                index=float(np.median([_index(s, label) for s in scan.seeds if label in s.labels])),
                status=status,
            )
        )
    return tuple(rows)
