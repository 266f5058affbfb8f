"""What a filter found in a training set: dataclasses that go to JSON and back, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from bezoar.core.document import Document
from bezoar.core.results import DataFacts, ModelFacts, RunFacts
from bezoar.core.scored import Verdict

SCHEMA = "bezoar.filter/1"


@dataclass(frozen=True, kw_only=True)
class LabelFindings:
    """What was found among the examples of one label.

    Attributes:
        label, name: The label.
        count, suspects: Its examples, and how many of them are suspect.
        statistic: What the method measured of the label, higher for more suspicious; None where it did not look.
        flagged: Whether the method's rule says that the label is poisoned.
    """

    label: int
    name: str
    count: int
    suspects: int
    statistic: float | None
    flagged: bool


@dataclass(frozen=True, kw_only=True)
class FilterReport(Document):
    """Everything a filter has to say.

    Attributes:
        verdict: ``backdoored`` where the method's rule flags a label, ``clean`` where it flags none, ``inconclusive``
            where it has no such rule and takes something out of a clean set too.
        method, config: Which filter, and its settings.
        rule: What made an example suspect, in words.
        model, data: What was looked at.
        clean: The clean examples, where some were given.
        acc: Share of the examples that the model gives their label, in [0, 1], from a sample.
        count, suspects: Examples, and how many of them are suspect.
        labels: All labels, the most suspicious first.
        notes: What the method found out on the way.
        warnings: What the user should know.
        run: All that differs from run to run.
    """

    NAMED: ClassVar[str] = SCHEMA
    WHAT: ClassVar[str] = "a report of a filter"
    WHENCE: ClassVar[str] = "Give the report.json of bezoar filter data"

    verdict: Verdict
    method: str
    config: dict[str, Any]
    rule: str
    model: ModelFacts
    data: DataFacts
    clean: DataFacts | None
    acc: float
    count: int
    suspects: int
    labels: tuple[LabelFindings, ...]
    notes: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    run: RunFacts
    schema: str = SCHEMA
