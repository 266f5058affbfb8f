"""What the reports say: figures as text, the verdict in words, limits and next steps, shared by all formats."""

from __future__ import annotations

import math
import shlex
import statistics
import unicodedata
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from bezoar.core.results import Figure, LabelEvidence, Report

MISSING = "n/a"
# Invisible characters that can reorder or hide text, or drive a terminal.
_UNSAFE = {"Cc", "Cf", "Cs", "Zl", "Zp"}


@dataclass(frozen=True)
class Title:
    """How a verdict is shown: ``kind`` picks colour and icon, ``word`` is the heading."""

    kind: Literal["backdoored", "clean", "inconclusive", "cleaned"]
    word: str


@dataclass(frozen=True)
class Band:
    """Median of the trigger sizes and the band ``k`` MADs wide on both sides of it, in pixels."""

    median: float
    mad: float
    k: float

    @property
    def low(self) -> float:
        """Lower edge, at least 0."""
        return max(0.0, self.median - self.k * self.mad)

    @property
    def high(self) -> float:
        """Upper edge."""
        return self.median + self.k * self.mad


def printable(text: str, keep: str = "") -> str:
    """Text without control, bidirectional-override and unpaired surrogate characters; names come from strangers."""
    return "".join(
        c if c in keep or unicodedata.category(c) not in _UNSAFE else "\N{REPLACEMENT CHARACTER}" for c in text
    )


def number(value: float | None) -> str:
    """Three significant digits, with thousands separators: ``1,024``, ``12.3``, ``0.0123``."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value == 0:
        return "0"
    if abs(value) < 1e-4:
        return f"{value:.1e}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{digits}f}"
    return text.rstrip("0").rstrip(".") if digits else text


def pixels(value: float | None) -> str:
    """A trigger size: ``12.3 px``."""
    if value is None or not math.isfinite(value):
        return MISSING
    return f"{value:,.0f} px" if value >= 100 else f"{value:.1f} px"


def levels(value: float | None) -> str:
    """A root mean square in [0, 1] as grey levels: ``4.1 of 255``."""
    return MISSING if value is None or not math.isfinite(value) else f"{255 * value:.1f} of 255"


def sized(unit: str, value: float | None) -> str:
    """A trigger size with its unit, ``px`` or ``rms``."""
    return pixels(value) if unit == "px" else levels(value)


def percent(value: float | None) -> str:
    """A rate in [0, 1] as per cent with one decimal: ``99.8 %``."""
    return MISSING if value is None or not math.isfinite(value) else f"{100 * value:.1f} %"


def margin(rate: float | None, count: int) -> str:
    """Half width of the 95 % confidence interval (Wilson) of a rate measured on ``count`` images, in points."""
    if rate is None or not math.isfinite(rate) or count < 1:
        return MISSING
    z, share = 1.96, min(max(rate, 0.0), 1.0)
    half = z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2) / (1 + z * z / count)
    return f"{100 * half:.1f}"


def duration(seconds: float | None) -> str:
    """A time span: ``0.8 s``, ``42 s``, ``1 min 12 s``, ``2 h 5 min``."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def moment(created: str) -> str:
    """``2026-01-31 12:00 UTC`` from ISO 8601, or the text itself where it is something else."""
    try:
        when = datetime.fromisoformat(created)
    except ValueError:
        return created
    return (when.astimezone(UTC) if when.tzinfo else when).strftime("%Y-%m-%d %H:%M UTC")


def total_seconds(report: Report) -> float:
    """Wall time of the run: the phase named ``total``, else the sum of all phases."""
    seconds = report.run.seconds
    return seconds.get("total", sum(seconds.values()))


def label_text(report: Report, label: int | None) -> str:
    """A label as number and name: ``5 (dog)``, or the number alone where it has no other name."""
    if label is None:
        return "none"
    name = _names(report).get(label, "").strip()
    return f"{label} ({name})" if name and name != str(label) else str(label)


def _names(report: Report) -> dict[int, str]:
    names = dict(enumerate(report.data.names))
    names.update({t.label: t.name for t in report.triggers})
    names.update({e.label: e.name for e in report.labels})
    return names


def title(report: Report) -> Title:
    """The heading of the report."""
    if report.verdict == "backdoored":
        where = f": label {label_text(report, report.target)}" if report.target is not None else ""
        if where and source(report) is not None:
            where += f" on {whose(report)}"
        done = report.cleaning
        if done is None:
            return Title("backdoored", f"Backdoored{where}")
        if still_backdoored(report):
            return Title("backdoored", f"Still backdoored{where}")
        return Title("cleaned", f"Was backdoored{where}; cleaned with {done.method}")
    if report.verdict == "clean":
        return Title("clean", "Clean: no trigger stands out")
    if report.verdict == "inconclusive":
        return Title("inconclusive", "Inconclusive: too little evidence for a verdict")
    return Title("cleaned", "Cleaned without a scan" if report.cleaning else "No verdict")


def sentence(report: Report) -> str:
    """The verdict in one sentence: the run's own, or one made from its figures; of a cleaned model, the outcome too."""
    text = report.summary.strip() or _sentence(report)
    return text if report.cleaning is None or report.verdict is None else f"{text} {_cleaning_sentence(report)}"


#: Success of the inverted trigger above which a cleaned model still has its backdoor.
STILL = 0.5


def still_backdoored(report: Report) -> bool:
    """Whether the trigger that was inverted before still works after the cleaning, or a second scan still finds one."""
    done = report.cleaning
    if done is None:
        return False
    again = done.aftercare is not None and done.aftercare.rescan_verdict == "backdoored"
    return again or (done.asr_after is not None and done.asr_after > STILL)


def _sentence(report: Report) -> str:
    evidence = suspect(report)
    if report.verdict is None:
        return _cleaning_sentence(report)
    if evidence is None:
        return "No label gave a trigger that could be judged."
    label, hits = label_text(report, evidence.label), percent(evidence.asr)
    if report.unit == "rms":
        what = f"A faint change of all pixels (RMS {levels(evidence.size)})"
        size = f"a change of all pixels by {levels(evidence.size)} (RMS)"
    else:
        size = f"{pixels(evidence.size)} ({percent(evidence.fraction)} of the image)"
        what = f"A trigger of {size}"
    if report.verdict == "backdoored":
        images = "held-out images" if source(report) is None else f"held-out {whose(report)}"
        return f"{what} turns {hits} of {images} into label {label}."
    start = "No trigger stands out" if report.verdict == "clean" else "The evidence does not settle it"
    return f"{start}: the smallest one found leads to label {label} and takes {size}."


def _cleaning_sentence(report: Report) -> str:
    done = report.cleaning
    if done is None:
        return "The run ended without a verdict."
    kept = done.notes.get("kept") == "none"
    text = f"{done.method} {'changed nothing' if kept else 'ran'}; clean accuracy went from "
    text += f"{percent(done.acc_before)} to {percent(done.acc_after)}"
    if done.asr_before is None:
        unknown = "" if report.verdict else " The model was not scanned, so nothing is said about a backdoor."
        return f"{text}.{unknown}"
    return f"{text}, success of the inverted trigger from {percent(done.asr_before)} to {percent(done.asr_after)}."


def has_size(evidence: LabelEvidence) -> bool:
    """Whether a label has a trigger whose size counts."""
    return evidence.status != "failed" and math.isfinite(evidence.size)


def ranked(report: Report) -> list[LabelEvidence]:
    """Labels by trigger size, smallest first; those without one last."""
    return sorted(report.labels, key=lambda e: (not has_size(e), e.size if has_size(e) else 0.0, e.label))


def suspect(report: Report) -> LabelEvidence | None:
    """Evidence of the target, or of the label with the smallest trigger where there is no target."""
    for evidence in report.labels:
        if evidence.label == report.target:
            return evidence
    complete = [e for e in ranked(report) if has_size(e)]
    return next((e for e in complete if e.status == "complete"), complete[0] if complete else None)


def source(report: Report) -> int | None:
    """Label of the images that the leading trigger was made for and measured on; None for those of all others."""
    return report.triggers[0].source if report.triggers else None


def whose(report: Report) -> str:
    """The images that the leading trigger was measured on."""
    label = source(report)
    return "images of other labels" if label is None else f"images of label {label_text(report, label)}"


def _figure(report: Report, name: str) -> Figure | None:
    """A figure of the rule by its name, where it has a value."""
    found = report.rule.figure(name) if report.rule else None
    return found if found is not None and math.isfinite(found.value) else None


def size_ratio(report: Report) -> tuple[float, float] | None:
    """The size ratio that the verdict rests on, and its bound; None if the rule uses none."""
    ratio = _figure(report, "size ratio")
    return None if ratio is None else (ratio.value, ratio.bound)


def natural(report: Report) -> Figure | None:
    """How far the trigger moves a student of the model too, where that was measured."""
    return _figure(report, "transfer to a student")


def index_bound(report: Report) -> float | None:
    """Bound that the rule holds the anomaly index against, or None if it uses none."""
    figures = report.rule.figures if report.rule else ()
    return next((f.bound for f in figures if "index" in f.name.lower() and math.isfinite(f.bound)), None)


def band(report: Report) -> Band | None:
    """Median and MAD of the sizes shown; None for fewer than three of them."""
    sizes = [e.size for e in report.labels if has_size(e)]
    if len(sizes) < 3:
        return None
    median = statistics.median(sizes)
    # 1.4826 makes the MAD an estimate of the standard deviation of a normal distribution.
    mad = 1.4826 * statistics.median(abs(s - median) for s in sizes)
    return Band(median, mad, index_bound(report) or 2.0)


def agreeing(report: Report) -> int:
    """Number of seeds that alone give the verdict and the target of the whole."""
    return sum(s.verdict == report.verdict and s.target == report.target for s in report.seeds)


def votes(report: Report) -> tuple[str, str]:
    """How the seeds voted, as a figure and what it means: ``("5 of 5", "agree with the verdict")``."""
    total = len(report.seeds)
    if report.verdict != "inconclusive":
        return f"{agreeing(report)} of {total}", "agree with the verdict"
    named = Counter(s.target for s in report.seeds if s.verdict == "backdoored")
    if not named:
        return f"0 of {total}", "found a backdoor alone"
    label, count = named.most_common(1)[0]
    return f"{count} of {total}", f"found a backdoor alone, label {label_text(report, label)}"


def condition(figure: Figure) -> str:
    """The bound with its direction (``>= 2``), which follows from value and outcome; bare where it cannot be told."""
    bound = number(figure.bound)
    if not math.isfinite(figure.value) or figure.value == figure.bound:
        return bound
    return f">= {bound}" if figure.passed == (figure.value > figure.bound) else f"<= {bound}"


def _model_flags(report: Report) -> str:
    """What the command needs to read the model the same way again, as flags."""
    facts = report.model
    flags = [f"--arch {shlex.quote(printable(facts.arch))}"] if facts.format in ("state-dict", "safetensors") else []
    if facts.mean and facts.format not in ("huggingface", "timm"):
        for name, values in (("mean", facts.mean), ("std", facts.std)):
            flags.append(f"--{name} {','.join(format(v, '.6g') for v in values)}")
    return "".join(f" {flag}" for flag in flags)


def next_steps(report: Report) -> str:
    """One or two sentences on what to do now."""
    done = report.cleaning
    model = shlex.quote(printable(report.model.path))
    data = shlex.quote(printable(report.data.path)) + _model_flags(report)
    data += "" if source(report) is None else " --source-specific"
    if done is not None and done.output and done.aftercare is not None and done.aftercare.rescan_verdict == "clean":
        return "The cleaned model scans as clean. Try it on your own test images before use."
    if done is not None and done.output:
        return f"Check the cleaned model before use: bezoar scan {shlex.quote(printable(done.output))} --data {data}"
    if report.verdict == "backdoored" and done is None:
        return f"Do not use this model as it is. To clean it: bezoar purify {model} --data {data} --out cleaned"
    if report.verdict == "backdoored":
        return "Do not use the original model. Check the cleaned one with another scan before use."
    if report.verdict == "inconclusive" and report.model.num_classes < 4:
        return (
            "With so few labels there is nothing to compare with: look at the trigger. A tiny one that works everywhere"
            f" is suspect; bezoar purify {model} --data {data} --label N --out cleaned unlearns it."
        )
    moved = natural(report)
    if report.verdict == "inconclusive" and moved is not None and not moved.passed:
        return "The trigger may be a natural feature of the label: look at its picture, and scan with more images."
    if report.verdict == "inconclusive":
        return "Scan again with more clean images or more seeds (--seeds 5)" + (
            ", and a larger budget." if report.run.budget_spent else "."
        )
    if report.verdict == "clean":
        return "Nothing to clean. Mind the limits: other kinds of backdoor can go unseen."
    return f"To look for a backdoor: bezoar scan {model} --data {data}"
