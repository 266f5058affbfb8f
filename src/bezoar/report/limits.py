"""What a report does not show."""

from __future__ import annotations

from bezoar.core.results import Report


def limits(report: Report) -> list[str]:
    """What the report does not show, in plain sentences."""
    lines = _scan_limits(report) if report.verdict is not None else []
    if report.verdict is None:
        lines.append("No scan was part of this run: nothing here says whether the model has a backdoor.")
    if report.cleaning is not None:
        lines += _cleaning_limits(report)
    lines.append(
        f"Everything rests on the {report.data.count:,} images given, taken to be clean and correctly labelled."
    )
    return lines


_BY_VERDICT = {
    "clean": '"Clean" means that no trigger of the kind looked for stood out, not that the model is safe.',
    "backdoored": "The trigger shown was computed from the model. The attacker's own may have another shape, place or "
    "colour, and a natural feature of a label can at times act as a small trigger.",
    "inconclusive": '"Inconclusive" is neither an all-clear nor an accusation: more images or seeds may settle it.',
}


def _families(report: Report) -> str:
    units = {report.unit, *(search.unit for search in report.searches)}
    words = {"px": "one small patch", "rms": "one faint change of the whole image"}
    found = " or ".join(words[unit] for unit in ("px", "rms") if unit in units)
    return found if "rms" in units else f"{found} (not for faint changes of the whole image)"


def _pairs_unseen(report: Report) -> str:
    triggers = (*report.triggers, *(one for search in report.searches for one in search.triggers))
    if any(one.source is not None for one in triggers):
        return ""
    return ", act on some source labels only, or map every label to another one"


def _scan_limits(report: Report) -> list[str]:
    lines = [
        _BY_VERDICT[report.verdict or "inconclusive"],
        f"The scan looks for {_families(report)} that turns images of any kind into one label. Triggers that "
        f"differ from image to image or warp it{_pairs_unseen(report)} can go unseen.",
    ]
    if len(report.labels) < report.model.num_classes:
        lines.append(f"{len(report.labels):,} of the model's {report.model.num_classes:,} labels were looked at.")
    stopped = sum(e.status == "eliminated" for e in report.labels)
    if stopped:
        many = f"{stopped:,} labels were" if stopped > 1 else "1 label was"
        lines.append(f"{many} stopped early, too large to become the smallest; the sizes shown are upper bounds.")
    if report.run.budget_spent:
        lines.append("The time budget ended the scan early; sizes may still have been falling.")
    return lines


def _cleaning_limits(report: Report) -> list[str]:
    done = report.cleaning
    if done is None or done.asr_before is None:
        return ["No trigger was at hand to test the cleaning with: whether a backdoor is gone was not measured."]
    return [
        "The cleaning was tested with the inverted trigger. The attacker's own trigger is unknown and may still work "
        "in part: scan the cleaned model again before use."
    ]
