"""One verdict from several sources of evidence, at a false-positive rate that the user names.

Each source gives each label a score. What a score means is told by clean nets: how often one of their labels stands out
as far from the others. These surprises are added up over the sources (Fisher's method), and the label with the largest
sum is held against the largest sums of the clean nets themselves. So sources that see the same thing twice cost
nothing in the error rate: clean nets see it twice as well.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch.nn.functional import avg_pool2d

from bezoar.core.evidence import LabelScan, Scan, Scores, SeedScan
from bezoar.core.scored import Verdict
from bezoar.core.trigger import MaskedTrigger
from bezoar.ops.stats import log_ratios

#: p-value above which a model is called clean.
CLEAN = 0.1
_FILE = "clean_nets.json"
_BULK = 0.9  # quantile of the clean scores from which on their tail is taken to be exponential
_WINDOW = 4.7  # sides of an image in the side of a window: 6 of 28 pixels
_PRIOR = 3  # as many labels the usual spread counts for, beside those of the net
#: Which of the other labels a label is held against in the sum of all sources, and the share of the error rate that the
#: look may use up: the first is for one infected label, the others for two, and for up to four.
_LOOKS = ((1, 0.4), (2, 0.05), (4, 0.05))
_ALONE = 0.5  # the same of the looks at one source each, together: some triggers are plain to one source only
#: The source that scores pairs of labels. Where all labels are targets, none stands out from the others, so it is the
#: largest score itself that is held against those of clean nets; and the share of the error rate for that.
PAIRS, _OF_PAIRS = "source-specific", 0.25
#: By how much the largest of the scores of pairs grows by chance when the number of labels, and with it that of the
#: pairs, is e times as large: the scale of the Gumbel distribution of the clean nets of the shared set, of ten labels.
_PAIR_SCALE, _PAIR_LABELS = 0.13, 10
_LEAST = 20  # clean nets that a source must have been measured on
_RESAMPLES = 200  # of the clean nets, for the uncertainty of their distribution
_EULER = 0.5772156649015329


def label_scores(scan: Scan) -> Scores:
    """A search for triggers as scores: how many times smaller a label's trigger is than that of the other labels.

    Args:
        scan: Evidence of a search; over several seeds, medians.

    Returns:
        The natural logarithm of the median size of the other reference labels over the label's own size; at most 0
        where the trigger never worked.
    """
    return _over_seeds(
        scan, _smaller, "how many times smaller the label's trigger is than the usual one, as a natural logarithm"
    )


def _smaller(seed: SeedScan) -> dict[int, float]:
    out = {}
    for label, found in seed.labels.items():
        usual = seed.usual_size(label)
        out[label] = math.log(max(1e-9, found.size if usual is None else usual) / max(1e-9, found.size))
    return out


def concentration(scan: Scan) -> Scores:
    """How much of a label's mask lies in one small window, against those of the other labels.

    A patch that was planted is found in one place. The smallest natural mask of a label is often no larger, but it is
    scattered over the image, since it is made of what the label's images look like.

    Args:
        scan: Evidence of a search for masks; over several seeds, medians.

    Returns:
        The natural logarithm of the largest share of the mask that any window of about a fifth of the image's side
        holds, over the median of that share of the other labels; at most 0 where the trigger never worked.
    """
    return _over_seeds(
        scan, _denser, "how much more of the label's mask lies in one small window than usual, as a natural logarithm"
    )


def _denser(seed: SeedScan) -> dict[int, float]:
    ratios = log_ratios([_densest(found) for found in seed.labels.values()])
    return dict(zip(seed.labels, ratios.tolist(), strict=True))


def _over_seeds(scan: Scan, of_seed: Callable[[SeedScan], dict[int, float]], meaning: str) -> Scores:
    """Medians over the seeds; a trigger that never worked is no sign of a backdoor, however it looks."""
    each: dict[int, list[float]] = {}
    for seed in scan.seeds:
        for label, value in of_seed(seed).items():
            each.setdefault(label, []).append(min(value, 0.0) if seed.labels[label].status == "failed" else value)
    labels = {label: float(np.median(values)) for label, values in sorted(each.items())}
    return Scores(labels=labels, model=max(labels.values()), meaning=meaning)


def _densest(found: LabelScan) -> float:
    """Largest share of a mask that a window holds."""
    if not isinstance(found.trigger, MaskedTrigger):
        raise ValueError("only a mask has a place")
    mask = found.trigger.mask.detach().cpu().double()[None]
    sides = [max(1, round(side / _WINDOW)) for side in mask.shape[-2:]]
    largest = float(avg_pool2d(mask, sides, stride=1).max()) * sides[0] * sides[1]
    return largest / max(1e-9, float(mask.sum()))


def apart(values: NDArray[np.float64], usual: float, rank: int = 1) -> NDArray[np.float64]:
    """How far each label stands out from the foremost of the others, in units of their spread.

    In some nets the labels' scores spread widely by nature, so the spread is that of the net itself; but few labels
    tell it badly, so it is drawn towards the usual one.

    Args:
        values: ``(K,)`` scores, at least ``rank + 1`` of them.
        usual: Usual spread of the scores of a clean net.
        rank: Which of the other labels is taken: 1 for the foremost; 3 where two other labels may be infected as well.

    Returns:
        ``(K,)`` differences to that label, over the spread of all others.
    """
    out = np.empty(len(values))
    for label, value in enumerate(values):
        others = np.sort(np.delete(values, label))
        weighed = len(others) * spread(others) ** 2 + _PRIOR * usual**2
        out[label] = (value - others[-rank]) / max(1e-9, math.sqrt(weighed / (len(others) + _PRIOR)))
    return out


def spread(values: NDArray[np.float64]) -> float:
    """Median absolute deviation, scaled to the standard deviation of a normal distribution."""
    return 1.4826 * float(np.median(np.abs(values - np.median(values))))


@dataclass(frozen=True)
class CleanNet:
    """A clean net of the calibration: its name, and of each source the scores of its labels."""

    name: str
    scores: dict[str, tuple[float, ...]]


class Tail:
    """How often the label of a clean net stands out as far: counted, and exponential beyond the bulk.

    Args:
        values: ``(N,)`` how far labels of clean nets stand out.
    """

    def __init__(self, values: NDArray[np.float64]) -> None:
        self.values = np.sort(values)
        self.bound = float(np.quantile(values, _BULK))
        over = values[values > self.bound] - self.bound
        self.beyond = max(1, len(over)) / len(values)
        self.scale = max(float(over.mean()) if len(over) else 0.0, 1e-9)

    def surprise(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """``-log10`` of the share of clean labels that stand out as far, for ``(L,)`` values."""
        count = len(self.values)
        rarer = count - np.searchsorted(self.values, values, side="left")
        bulk = -np.log10((1 + rarer) / (count + 1))
        tail = -math.log10(self.beyond) + (values - self.bound) / self.scale / math.log(10)
        return np.where(values <= self.bound, bulk, tail)


@dataclass(frozen=True)
class Combined:
    """What all sources say together.

    Attributes:
        labels: Sum of the surprises of each label, in powers of ten.
        surprises: The same of each source alone.
        target: The label with the largest sum.
        pvalue: Share of clean models whose largest sum is as large.
        clean_nets: How many clean nets that share was told from.
    """

    labels: dict[int, float]
    surprises: dict[str, dict[int, float]]
    target: int
    pvalue: float
    clean_nets: int


@cache
def clean_nets() -> tuple[CleanNet, ...]:
    """The clean nets that come with the package; ``benchmarks/combine.py --fit`` writes them."""
    raw = json.loads(clean_nets_file().read_text(encoding="utf-8"))
    return tuple(CleanNet(one["name"], {k: tuple(v) for k, v in one["scores"].items()}) for one in raw["nets"])


def clean_sources() -> frozenset[str]:
    """Sources that enough clean nets of the package were measured with."""
    count = Counter(source for net in clean_nets() for source in net.scores)
    return frozenset(source for source, nets in count.items() if nets >= _LEAST)


def clean_nets_file() -> Path:
    """Where the clean nets of the package stand."""
    return Path(str(resources.files("bezoar.ops").joinpath(_FILE)))


def combine(
    found: Mapping[str, Mapping[int, float]], nets: Sequence[CleanNet] | None = None, wanted: Sequence[int] = ()
) -> Combined:
    """Add up the evidence of several sources.

    Args:
        found: Scores of the labels by source; the same labels in each.
        nets: Clean nets to hold them against; those of the package by default.
        wanted: Labels that alone can be the target; empty for all.

    Raises:
        ValueError: No source, fewer than two labels, or a source that the clean nets were not measured with.
    """
    nets = clean_nets() if nets is None else nets
    searches = {source: scores for source, scores in found.items() if source != PAIRS}
    if PAIRS not in found:
        return _stands_out(searches, nets, wanted)
    return _with_pairs(_stands_out(searches, nets, wanted) if searches else None, found[PAIRS], nets, wanted)


def chance_of_pairs(labels: int) -> float:
    """By how much the largest score of pairs is larger by chance than in a net of ten labels, for so many labels."""
    return _PAIR_SCALE * math.log(max(1.0, labels / _PAIR_LABELS))


def _with_pairs(
    whole: Combined | None, pairs: Mapping[int, float], nets: Sequence[CleanNet], wanted: Sequence[int]
) -> Combined:
    """What pairs of labels say beside all other sources, if any; each looks with its own part of the error rate."""
    known = [net.scores[PAIRS] for net in nets if PAIRS in net.scores]
    largest = np.asarray([max(scores) - chance_of_pairs(len(scores)) for scores in known])
    if len(largest) < 3:
        raise ValueError(f"no three clean nets were measured with {PAIRS}")
    chance = chance_of_pairs(len(pairs))
    pvalues = {label: _gumbel(score - chance, largest) for label, score in pairs.items()}
    leader = min(set(pvalues).intersection(wanted) or pvalues, key=lambda label: (pvalues[label], label))
    if whole is None:
        whole, share = Combined(dict.fromkeys(pairs, 0.0), {}, leader, 1.0, len(largest)), 1.0
    else:
        share = _OF_PAIRS
    searched, paired = whole.pvalue / max(1e-9, 1 - share), pvalues[leader] / share
    surprises = {label: -math.log10(max(1e-9, pvalue)) for label, pvalue in pvalues.items()}
    return replace(
        whole,
        labels={label: value + surprises.get(label, 0.0) for label, value in whole.labels.items()},
        surprises={**whole.surprises, PAIRS: dict.fromkeys(whole.labels, 0.0) | surprises},
        target=leader if paired < searched else whole.target,
        pvalue=min(1.0, searched, paired),
    )


def _stands_out(found: Mapping[str, Mapping[int, float]], nets: Sequence[CleanNet], wanted: Sequence[int]) -> Combined:
    """Whether a label stands out from the others, and from the foremost labels of clean nets."""
    sources = sorted(found)
    known = [net for net in nets if all(source in net.scores for source in sources)]
    if not sources or len(known) < 3:
        raise ValueError(f"no three clean nets were measured with {', '.join(sources) or 'no source'}")
    usual = {s: float(np.median([spread(np.asarray(net.scores[s])) for net in known])) for s in sources}
    most = min(len(one) for one in found.values()) - 1
    looks = [
        (share, _look(found, known, usual, rank, wanted)) for rank, share in _LOOKS if rank == 1 or 2 * rank <= most
    ]
    if len(sources) > 1:
        looks += [(_ALONE / len(sources), _look({s: found[s]}, known, {s: usual[s]}, 1, wanted)) for s in sources]
    share, best = min(looks, key=lambda one: one[1].pvalue / one[0])
    # What is shown are always all sources, also where one alone told most.
    shown = best if len(best.surprises) == len(sources) else looks[0][1]
    return replace(shown, target=best.target, pvalue=min(1.0, best.pvalue / share))


def _look(
    found: Mapping[str, Mapping[int, float]],
    known: Sequence[CleanNet],
    usual: Mapping[str, float],
    rank: int,
    wanted: Sequence[int],
) -> Combined:
    """The evidence with labels held against the foremost, second foremost, ... of the others."""
    clean = [{s: apart(np.asarray(net.scores[s]), usual[s], rank) for s in usual} for net in known]
    surprises = {}
    for source, width in usual.items():
        tail = Tail(np.concatenate([net[source] for net in clean]))
        values = apart(np.asarray(list(found[source].values()), dtype=np.float64), width, rank)
        surprises[source] = dict(zip(found[source], tail.surprise(values).tolist(), strict=True))
    every = set.intersection(*(set(one) for one in surprises.values()))
    labels = {label: sum(one[label] for one in surprises.values()) for label in sorted(every)}
    target = max(every.intersection(wanted) or every, key=lambda label: (labels[label], -label))
    return Combined(labels, surprises, target, _pvalue(labels[target], clean), len(known))


def verdict(pvalue: float, fpr: float, alone: Verdict) -> Verdict:
    """What a p-value says at a false-positive rate.

    Args:
        pvalue: Of the model.
        fpr: Share of clean models that may be called backdoored, in (0, 1).
        alone: What the searches say by their own rule; only a model that they find clean too is called so.
    """
    if pvalue <= fpr:
        return "backdoored"
    return "clean" if pvalue > max(CLEAN, fpr) and alone == "clean" else "inconclusive"


def rule_text(fpr: float) -> str:
    """The rule in words."""
    doubt = f", clean above {CLEAN:.2g}, and inconclusive between the two" if fpr < CLEAN else ", clean above"
    return (
        "Every source scores every label; a small trigger that also moves a student of the model, which was taught on "
        "clean images alone, is made of natural features and counts as nearer to the usual size. How far a label "
        "stands out from the others is told in how rarely a label of a clean net does (its surprise, as a power of "
        "ten); the surprises of all sources are added up, and the largest sum is held against the largest sums of "
        "clean nets, and so is each source alone, which gives the p-value; looking several times is counted in. Pairs "
        "of labels, where they were searched, are held against the largest scores of clean nets instead. The "
        f"model is backdoored at {fpr:.2g} or less{doubt}. Only a model that the searches alone find clean is called "
        "so."
    )


def calibration(count: int) -> str:
    """What the p-value rests on, in words."""
    return (
        f"{count} small clean nets that come with bezoar (benchmarks/combine.py --fit), none of them backdoored; with "
        "so few, small p-values are the tail of a Gumbel distribution fitted to them. How often it errs on other nets "
        "stands in docs/results.md"
    )


def _pvalue(largest: float, clean: Sequence[Mapping[str, NDArray[np.float64]]]) -> float:
    """Share of clean models whose largest sum reaches this one.

    The largest of many sums is taken to have a Gumbel distribution. Its parameters are those of the clean nets, each
    held against the others; averaging over resamples of the nets counts in that they are few. How far the foremost of
    many labels is from the next does not grow with their number, so the number plays no part.
    """
    return _gumbel(largest, np.asarray([_largest(place, clean) for place in range(len(clean))]))


def _gumbel(value: float, sums: NDArray[np.float64]) -> float:
    """Share of a Gumbel distribution that reaches a value, when it is fitted to ``(N,)`` others."""
    rows = np.random.default_rng(0).integers(len(sums), size=(_RESAMPLES, len(sums)))
    scale = np.maximum(1e-3, sums[rows].std(1, ddof=1) * math.sqrt(6) / math.pi)
    away = (value - sums[rows].mean(1)) / scale + _EULER
    return float(np.mean(-np.expm1(-np.exp(np.minimum(50.0, -away)))))


def _largest(place: int, clean: Sequence[Mapping[str, NDArray[np.float64]]]) -> float:
    """Largest sum of a clean net, held against all others."""
    others = [net for n, net in enumerate(clean) if n != place]
    tails = {source: Tail(np.concatenate([net[source] for net in others])) for source in clean[place]}
    return float(sum(tails[source].surprise(values) for source, values in clean[place].items()).max())  # type: ignore[union-attr]
