"""What a run found: dataclasses that go to JSON and back, and nothing else.

Everything that depends on the clock stands under ``run``; the rest is the same for the same seed on the same machine.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from bezoar.core.errors import DataError
from bezoar.core.plain import built, plain
from bezoar.core.scored import Combination, Evidence, Verdict

SCHEMA = "bezoar.report/1"


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """The model that was looked at.

    Attributes:
        path: As the user gave it, or the class name of a module given in Python.
        format: ``state-dict``, ``safetensors``, ``onnx``, ``huggingface``, ``timm``, ``module``, ...
        sha256: Hash of the file (of the weights for a module given in Python).
        arch: Architecture name or class.
        parameters: Number of parameters.
        num_classes: Number of labels.
        channels, height, width: Input size.
        mean, std: Per-channel normalisation that is part of the model; empty if there is none.
    """

    path: str
    format: str
    sha256: str
    arch: str
    parameters: int
    num_classes: int
    channels: int
    height: int
    width: int
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class DataFacts:
    """The clean data: ``count`` images, ``per_class`` of each label, SHA-256 over pixels and labels."""

    path: str
    format: str
    sha256: str
    count: int
    per_class: tuple[int, ...]
    names: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """Accuracy on the clean data before anything else, in [0, 1], beside that of guessing."""

    acc: float
    chance: float
    count: int


@dataclass(frozen=True, kw_only=True)
class LabelEvidence:
    """What was found for one label.

    Attributes:
        label, name: The label.
        size: L1 norm of the mask in pixels, or root mean square of an additive change in [0, 1]; median over seeds.
        sizes: The same for each seed; None where no trigger reached the success rate that is asked for.
        fraction: ``size`` as a share of the whole image, in [0, 1].
        asr: Success of the inverted trigger on held-out clean images of other labels, median over seeds, in [0, 1].
        index: Anomaly index, positive for smaller than the median, median over seeds.
        status: ``complete``, ``eliminated`` (could not become the smallest, stopped early) or ``failed``.
    """

    label: int
    name: str
    size: float
    sizes: tuple[float | None, ...]
    fraction: float
    asr: float
    index: float
    status: Literal["complete", "eliminated", "failed"]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure that the verdict rests on, with the bound it was held against."""

    name: str
    value: float
    bound: float
    passed: bool
    meaning: str


@dataclass(frozen=True, kw_only=True)
class SeedResult:
    """Verdict of one seed alone."""

    seed: int
    verdict: Verdict
    target: int | None
    figures: tuple[Figure, ...]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """The rule that turned evidence into a verdict: its name, its text and on what it was calibrated."""

    name: str
    text: str
    calibration: str
    figures: tuple[Figure, ...]

    def figure(self, name: str) -> Figure | None:
        """The figure of this name; None if the rule uses none."""
        return next((figure for figure in self.figures if figure.name == name), None)


@dataclass(frozen=True, kw_only=True)
class Example:
    """A clean image and the same image stamped: PNG as base64, true label, predictions before and after."""

    original: str
    stamped: str
    true: int
    before: int
    after: int


@dataclass(frozen=True, kw_only=True)
class TriggerFacts:
    """An inverted trigger, with PNG pictures as base64; ``refined`` if it comes from the second look at its label.

    ``mask``, ``pattern`` and ``stamp`` (mask times pattern) of a masked one; of an additive one ``pattern`` is the
    change on mid-grey, amplified until its largest value is white or black, and the others are empty. ``source`` is the
    label of the images that it was made for and measured on, where these are not the images of all other labels.
    """

    label: int
    name: str
    seed: int
    size: float
    fraction: float
    asr: float
    mask: str
    pattern: str
    stamp: str
    examples: tuple[Example, ...] = ()
    refined: bool = False
    source: int | None = None


@dataclass(frozen=True, kw_only=True)
class Search:
    """Evidence of a further family of triggers, beside that of the search which leads the report.

    Attributes:
        method, config: The scanner and its settings.
        unit: What sizes are counted in: ``px`` or ``rms``.
        verdict, target: By this evidence alone.
        rule: The rule and its figures.
        seeds: Each seed on its own.
        labels: Evidence by label.
        triggers: Inverted triggers, the leading label's first.
    """

    method: str
    config: dict[str, Any]
    unit: Literal["px", "rms"]
    verdict: Verdict
    target: int | None
    rule: Rule
    seeds: tuple[SeedResult, ...]
    labels: tuple[LabelEvidence, ...]
    triggers: tuple[TriggerFacts, ...]


@dataclass(frozen=True, kw_only=True)
class LayerChange:
    """How much one tensor changed: L2 norm of the difference relative to that of the original."""

    name: str
    relative: float


@dataclass(frozen=True, kw_only=True)
class Aftercare:
    """How a cleaned model compares with the one it came from.

    Attributes:
        fidelity: Share of clean images that both give the same label, in [0, 1].
        reactivation: Training steps with the inverted trigger after which it works on half of the images again; None
            where it took more than ``reactivation_limit``, or no trigger was known.
        reactivation_other: The same for a label to which the trigger never led: a backdoor that is gone takes as long.
        reactivation_limit: Most steps tried.
        rescan_verdict, rescan_target: Of a scan of the cleaned model, where one was asked for.
    """

    fidelity: float
    reactivation: int | None
    reactivation_other: int | None
    reactivation_limit: int
    rescan_verdict: Verdict | None = None
    rescan_target: int | None = None


@dataclass(frozen=True, kw_only=True)
class Cleaning:
    """What a purifier did; all rates in [0, 1], on held-out clean images, with inverted triggers only.

    Attributes:
        method: Registry name of the purifier.
        config: Its settings.
        target: Label whose inverted trigger was used, or None.
        acc_before, acc_after: Clean accuracy.
        asr_before, asr_after: Success of the inverted trigger; None where there was none.
        held_out: Number of images that these were measured on.
        output: File that was written, or empty.
        sha256: Hash of that file, or empty.
        layers: Change of each tensor, largest first.
        aftercare: How it compares with the model as it was.
        notes: What the purifier found out on the way, such as the label that it suspects or what it pruned.
    """

    method: str
    config: dict[str, Any]
    target: int | None
    acc_before: float
    acc_after: float
    asr_before: float | None
    asr_after: float | None
    held_out: int
    output: str = ""
    sha256: str = ""
    layers: tuple[LayerChange, ...] = ()
    aftercare: Aftercare | None = None
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What differs from run to run.

    Attributes:
        created: ISO 8601, UTC.
        seconds: Wall time of each phase.
        image_gradients: Forward and backward passes of single images that the scan took.
        versions: Of bezoar, torch, python and the platform.
        device: Such as ``cpu`` or ``cuda:0``.
        threads: CPU threads.
        budget: Seconds allowed, or None.
        budget_spent: Whether the budget ended the scan early.
    """

    created: str
    seconds: dict[str, float]
    image_gradients: int
    versions: dict[str, str]
    device: str
    threads: int
    budget: float | None = None
    budget_spent: bool = False


@dataclass(frozen=True, kw_only=True)
class Report:
    """A scan, a purification, or both, in full; the HTML report is made from it alone.

    Where several families of triggers were searched, ``method`` to ``triggers`` are those of the search that leads: the
    one that found the backdoor, or else came closest. ``searches`` are the others. ``evidence`` is what scorers say
    beside them, ``combination`` what all say together.
    """

    verdict: Verdict | None
    target: int | None
    summary: str
    model: ModelFacts
    data: DataFacts
    preflight: Preflight
    method: str
    config: dict[str, Any]
    unit: Literal["px", "rms"] = "px"
    rule: Rule | None = None
    labels: tuple[LabelEvidence, ...] = ()
    seeds: tuple[SeedResult, ...] = ()
    triggers: tuple[TriggerFacts, ...] = ()
    searches: tuple[Search, ...] = ()
    evidence: tuple[Evidence, ...] = ()
    combination: Combination | None = None
    cleaning: Cleaning | None = None
    warnings: tuple[str, ...] = ()
    run: RunFacts
    schema: str = field(default=SCHEMA)

    def to_json(self) -> str:
        """The report as JSON text; floats that JSON cannot hold become null."""
        return json.dumps(plain(self), indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read a report back.

        Raises:
            DataError: The text is not a report of this schema.
        """
        try:
            raw = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"not a report: {error}", "Give the report.json that bezoar wrote") from None
        if not isinstance(raw, dict) or raw.get("schema") != SCHEMA:
            found = raw.get("schema") if isinstance(raw, dict) else type(raw).__name__
            raise DataError(f"expected a report of schema {SCHEMA!r}, got {found!r}", "Run the scan again")
        try:
            report: Self = built(cls, raw)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise DataError(f"the report is damaged: {error}", "Run the scan again") from None
        return report

    def stable(self) -> dict[str, Any]:
        """Everything but ``run``: equal for equal seeds."""
        values: dict[str, Any] = plain(self)
        del values["run"]
        return values


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file under a temporary name and rename it, so that no reader ever sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
