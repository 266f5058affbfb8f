"""What a training on untrusted data found: dataclasses that go to JSON and back, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from bezoar.core.document import Document
from bezoar.core.results import DataFacts, RunFacts

SCHEMA = "bezoar.train/1"


@dataclass(frozen=True, kw_only=True)
class DataFindings:
    """What was seen in the data before the training.

    Attributes:
        unreadable: Images that were left out.
        unreadable_examples: Some of them, with the reason.
        duplicates: Examples whose pixels came before.
        duplicate_examples: Some of them, each with the one that came before.
        conflicts: Examples whose pixels also stand under another label.
        conflict_examples: Some of them, with their labels.
        empty: Labels without any example.
        notes: What the reader of the data had to say.
    """

    unreadable: int
    unreadable_examples: tuple[str, ...]
    duplicates: int
    duplicate_examples: tuple[str, ...]
    conflicts: int
    conflict_examples: tuple[str, ...]
    empty: tuple[int, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LabelShare:
    """A label, its examples, and how many of them were isolated.

    Attributes:
        label, name, count, suspects: The label, and how many examples it has and had isolated.
        statistic: What a filter measured of it, higher for more suspicious; None where none did.
        flagged: Whether the filter's own rule says that it is poisoned.
    """

    label: int
    name: str
    count: int
    suspects: int
    statistic: float | None = None
    flagged: bool = False


@dataclass(frozen=True, kw_only=True)
class Spread:
    """10 %, 50 % and 90 % quantile of a loss."""

    low: float
    median: float
    high: float


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """The loss of the isolated examples and of the rest after so many epochs."""

    epoch: int
    isolated: Spread
    rest: Spread


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """A share of ``count`` images in [0, 1], with its 95 % Wilson interval."""

    value: float
    low: float
    high: float
    count: int


@dataclass(frozen=True, kw_only=True)
class TrainReport(Document):
    """Everything a training on untrusted data has to say.

    Attributes:
        method, config: Which trainer, and its settings.
        arch, parameters: The network, and how many parameters it has.
        shape: ``(C, H, W)`` of the images that it takes.
        data, findings: What it was trained on.
        test: The clean test images, where some were given.
        acc: Accuracy on them.
        kept_acc: Share of the examples that were not isolated that are given their label; says nothing of other images.
        suspects: Number of isolated examples.
        labels: All labels, the one with most isolated examples first.
        rule: What made the isolated examples suspect, in words, where a filter chose them; else None.
        clean: The clean examples that the method was given, where it was given some.
        curve: Losses over the first epochs; empty where none were kept.
        notes: What the method found out on the way.
        warnings: What the user should know.
        files: SHA-256 of each file that was written, by name.
        run: All that differs from run to run.
    """

    NAMED: ClassVar[str] = SCHEMA
    WHAT: ClassVar[str] = "a report of a training"
    WHENCE: ClassVar[str] = "Give the report.json of bezoar train"

    method: str
    config: dict[str, Any]
    arch: str
    parameters: int
    shape: tuple[int, ...]
    data: DataFacts
    findings: DataFindings
    test: DataFacts | None
    acc: Accuracy | None
    kept_acc: Accuracy
    suspects: int
    labels: tuple[LabelShare, ...]
    curve: tuple[CurvePoint, ...]
    rule: str | None = None
    clean: DataFacts | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    files: dict[str, str] = field(default_factory=dict)
    run: RunFacts
    schema: str = SCHEMA
