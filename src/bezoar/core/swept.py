"""One model of a sweep: what its scan said, or why there was none."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

#: ``refused``: the model or its data cannot be used, ``error`` says why. ``crashed``: the scan broke. ``killed``: it
#: reached a limit. ``lost``: so did its worker. The first three are verdicts.
Outcome = Literal["clean", "backdoored", "inconclusive", "refused", "crashed", "killed", "lost"]
VERDICTS: tuple[Outcome, ...] = ("clean", "backdoored", "inconclusive")
FAILURES: tuple[Outcome, ...] = ("refused", "crashed", "killed", "lost")


@dataclass(frozen=True, kw_only=True)
class Swept:
    """One model of a sweep, as a line of ``sweep.jsonl``.

    Attributes:
        key: Hash of weights, data, settings and version; also the folder of its report.
        model: As the list names it: a path, or ``hf:OWNER/NAME@REVISION``.
        sha256: Hash of the weights as they were found, or the revision of a hub.
        outcome: Verdict, or why there is none.
        error, hint: What was wrong, and what to do about it; empty for a verdict.
        limit: Seconds that the scan was allowed.
        target, name: The attacker's label and its name, or None and empty.
        label: The label with the smallest trigger, whatever the verdict.
        size, fraction, asr, ratio: Of its trigger: size in ``unit``, share of the image, success on held-out images,
            and size over the median of the other labels.
        unit: ``px`` or ``rms``.
        arch, format, num_classes, acc: Of the model, where it could be read.
        data: The clean images, as given.
        summary: The verdict in a sentence.
        warnings: Number of warnings in its report.
        seconds, cpu_seconds, peak_mib: Means of the process that scanned it.
        created: ISO 8601, UTC.
        versions: Of bezoar and torch.
        settings: Those of the model that are not the sweep's own.
    """

    key: str
    model: str
    sha256: str
    outcome: Outcome
    error: str = ""
    hint: str = ""
    limit: float = 0.0
    target: int | None = None
    name: str = ""
    label: int | None = None
    size: float | None = None
    fraction: float | None = None
    asr: float | None = None
    ratio: float | None = None
    unit: Literal["px", "rms"] = "px"
    arch: str = ""
    format: str = ""
    num_classes: int | None = None
    acc: float | None = None
    data: str = ""
    summary: str = ""
    warnings: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_mib: int = 0
    created: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def judged(self) -> bool:
        """Whether there is a verdict."""
        return self.outcome in VERDICTS


def exit_code(outcomes: dict[str, int]) -> int:
    """Exit code of a sweep from the number of models of each outcome, the gravest first.

    1 where a model is backdoored, 2 where one could not be scanned, 3 where one is inconclusive, 0 where all are clean.
    """
    if outcomes.get("backdoored"):
        return 1
    if any(outcomes.get(one) for one in FAILURES):
        return 2
    return 3 if outcomes.get("inconclusive") else 0
