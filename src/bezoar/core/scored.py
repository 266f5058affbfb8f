"""What scorers found, and what all sources of evidence say together, as plain values of a report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Verdict = Literal["clean", "backdoored", "inconclusive"]


@dataclass(frozen=True, kw_only=True)
class LabelScore:
    """How suspicious one label is to a scorer, higher for more."""

    label: int
    name: str
    score: float


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What a scorer says beside the searches; a verdict rests on it where it is combined, or is a search of its own.

    Attributes:
        method, config: The scorer and its settings.
        meaning: What its scores are, in words.
        score: Of the model as a whole, higher for more suspicious.
        suspect: What the paper's own rule says, or None where it has none.
        pvalue: The paper's own, or None.
        labels: The most suspicious labels, first the leading one.
        source, target: The most suspicious pair, for scorers that tell source-specific backdoors apart.
    """

    method: str
    config: dict[str, Any]
    meaning: str
    score: float
    suspect: bool | None
    pvalue: float | None
    labels: tuple[LabelScore, ...]
    source: int | None = None
    target: int | None = None


@dataclass(frozen=True, kw_only=True)
class Source:
    """What one search or scorer adds to a combined verdict.

    Attributes:
        method: Its name.
        leader: The label that it finds most suspicious.
        surprise: How rarely the combination's leading label would stand out as far in a clean model, by this source
            alone: 2 is one clean label in a hundred.
    """

    method: str
    leader: int
    surprise: float


@dataclass(frozen=True, kw_only=True)
class Combination:
    """All sources of evidence together; where it is there, the verdict of the report rests on it.

    Attributes:
        fpr: Share of clean models that may be called backdoored, as the user named it.
        pvalue: Share of clean models in which some label stands out as far in all sources together.
        leader: The label that stands out most.
        labels: Sums of the surprises, the most suspicious labels first.
        sources: What each source says.
        alone: Verdict of the searches without the scorers, by their own rule.
        text: The rule in words.
        calibration: What the p-value rests on.
    """

    fpr: float
    pvalue: float
    leader: int
    labels: tuple[LabelScore, ...]
    sources: tuple[Source, ...]
    alone: Verdict
    text: str
    calibration: str
