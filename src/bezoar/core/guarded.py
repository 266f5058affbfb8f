"""A fitted guard on paper: dataclasses that go to JSON and back, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from bezoar.core.document import Document
from bezoar.core.results import DataFacts, ModelFacts, Preflight, RunFacts

SCHEMA = "bezoar.guard/1"
REPORT_SCHEMA = "bezoar.guard-report/1"

#: What happens to a flagged input: it is only flagged, or its answer becomes that of a safe label.
Policy = Literal["flag", "label"]


@dataclass(frozen=True, kw_only=True)
class GuardFacts(Document):
    """What is needed to use a guard again, beside its tensors.

    Attributes:
        method, config: Which guard, and its settings.
        shape: ``(C, H, W)`` of an image.
        num_classes: Number of labels K.
        softmax: Whether the model ends in a softmax, so that the logarithm of its answer is looked at.
        threshold: An input is flagged where its score is above.
        fpr: Share of clean inputs that it shall flag at most.
        count: Held-out clean images that the threshold rests on.
        flagged: How many of these it flags.
        low, high: 95 % Wilson interval of that share, in [0, 1].
        policy: What happens to a flagged input.
        safe_label: The label that a flagged input gets, where the policy is ``label``.
        model: Hash of the model that it was fitted to.
    """

    NAMED: ClassVar[str] = SCHEMA
    WHAT: ClassVar[str] = "the guard.json of a guard"
    WHENCE: ClassVar[str] = "Give the folder of bezoar guard --out"

    method: str
    config: dict[str, Any]
    shape: tuple[int, ...]
    num_classes: int
    softmax: bool
    threshold: float
    fpr: float
    count: int
    flagged: int
    low: float
    high: float
    policy: Policy
    safe_label: int | None
    model: str
    schema: str = SCHEMA


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Median seconds for an input of ``batch`` images, over ``runs`` runs.

    Attributes:
        bare: Of the model alone.
        guarded: Of model and guard.
        batch, runs: What was measured.
    """

    bare: float
    guarded: float
    batch: int
    runs: int

    @property
    def ratio(self) -> float:
        """How many times as long an answer takes."""
        return self.guarded / self.bare


@dataclass(frozen=True, kw_only=True)
class GuardReport(Document):
    """Everything there is to say about a guard that was fitted.

    Attributes:
        guard: The guard.
        model, data, preflight: What it was fitted to, and with.
        triggers: Labels whose inverted triggers it was made from.
        latency: What it costs.
        files: What was written, and how far an exported model's answers are from those of PyTorch at most.
        notes: What the method found out on the way.
        warnings: What the user should know.
        run: All that differs from run to run.
    """

    NAMED: ClassVar[str] = REPORT_SCHEMA
    WHAT: ClassVar[str] = "the report.json of a guard"
    WHENCE: ClassVar[str] = "Give the folder of bezoar guard --out"

    guard: GuardFacts
    model: ModelFacts
    data: DataFacts
    preflight: Preflight
    triggers: tuple[int, ...]
    latency: Latency
    files: dict[str, float] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    run: RunFacts
    schema: str = REPORT_SCHEMA
