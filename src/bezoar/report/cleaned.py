"""What is said of a cleaned model beside its rates."""

from __future__ import annotations

from bezoar.core.results import Aftercare, Report
from bezoar.report.wording import label_text, percent


def trials(report: Report) -> list[tuple[str, str]]:
    """What ``auto`` kept and what it measured, as names and texts."""
    notes = {} if report.cleaning is None else report.cleaning.notes
    kept, tried, skipped = notes.get("kept"), notes.get("tried"), notes.get("skipped")
    if not isinstance(kept, str) or not isinstance(tried, list) or not all(isinstance(one, dict) for one in tried):
        return []
    if kept == "none" and isinstance(skipped, list) and skipped and len(tried) < 2:
        return [("kept", f"the model as it was, NOT cleaned: {skipped[0]}")]
    rows = [("kept", "the model as it was: nothing was better" if kept == "none" else kept)]
    found = {one.get("method"): one.get("response") for one in tried}
    before, after = found.get("none"), found.get(kept)
    if isinstance(before, float) and isinstance(after, float):
        rows.append(("response", f"{percent(before)} -> {percent(after)}, mean over triggers of all labels"))
    return rows


def aftercare(report: Report, care: Aftercare) -> list[tuple[str, str]]:
    """What is known of the cleaned model beside its rates, as names and texts."""
    rows = [("same answers", f"on {percent(care.fidelity)} of the clean images")]
    done = report.cleaning
    if done is not None and done.target is not None:
        back, other = (
            f"not within {care.reactivation_limit}" if steps is None else f"after {steps}"
            for steps in (care.reactivation, care.reactivation_other)
        )
        text = f"{back} training steps with its trigger ({other} for a label it never led to)"
        rows.append(("backdoor back", "it is still there" if care.reactivation == 0 else text))
    if care.rescan_verdict is not None:
        target = "" if care.rescan_target is None else f", label {label_text(report, care.rescan_target)}"
        rows.append(("scanned again", f"{care.rescan_verdict}{target}"))
    return rows
