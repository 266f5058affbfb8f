"""The report as SARIF 2.1.0, for the tools that collect findings of many checks."""

from __future__ import annotations

import json
import math
from pathlib import PurePath, PureWindowsPath
from typing import Any
from urllib.parse import quote

from bezoar.core.results import LabelEvidence, Report
from bezoar.report import wording

SCHEMA_URI = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"

_RULES: dict[str, tuple[str, str, str, str]] = {
    "BEZ001": (
        "BackdoorFound",
        "error",
        "The model has a backdoor",
        "A small trigger turns images of other labels into one label, far more easily than into any other label.",
    ),
    "BEZ002": (
        "BackdoorNotExcluded",
        "warning",
        "The scan was inconclusive",
        "One label stands out, or the seeds disagree, but too weakly for a verdict. More images or seeds may help.",
    ),
    "BEZ003": (
        "TriggerSurvivesCleaning",
        "warning",
        "The trigger still works after cleaning",
        "The inverted trigger still turns more than one in ten images of other labels into its label.",
    ),
}
SURVIVES = 0.1  # Success after cleaning above which the cleaned model is a finding of its own.
_BY_VERDICT = {"backdoored": "BEZ001", "inconclusive": "BEZ002"}


def to_sarif(report: Report) -> str:
    """SARIF 2.1.0 text: one result for a backdoor or an open verdict, none for a clean model.

    The artifact is the model with its SHA-256; size, success, index and seeds stand under ``properties``; warnings of
    the run are notifications of the invocation.
    """
    run = {
        "tool": {"driver": _driver(report)},
        "automationDetails": {"id": f"bezoar/{report.method or 'scan'}/"},
        "invocations": [_invocation(report)],
        "artifacts": _artifacts(report),
        "results": _results(report),
        "columnKind": "utf16CodeUnits",
        "properties": plain_values({"verdict": report.verdict, "target": report.target, "schema": report.schema}),
    }
    return json.dumps({"$schema": SCHEMA_URI, "version": "2.1.0", "runs": [run]}, indent=1, allow_nan=False) + "\n"


def uri(path: str) -> str:
    """A path as URI reference: absolute ones as ``file:``, relative ones with forward slashes."""
    windows = PureWindowsPath(path)
    pure: PurePath = windows if windows.drive else PurePath(path)
    safe = path.encode("utf-8", "replace").decode()
    if pure.is_absolute():
        return "file://" + quote("/" + pure.as_posix().lstrip("/"), safe="/:", errors="replace")
    return quote(PurePath(safe).as_posix(), safe="/")


def _driver(report: Report) -> dict[str, Any]:
    driver: dict[str, Any] = {"name": "bezoar", "rules": described()}
    version = report.run.versions.get("bezoar")
    return {**driver, "version": version} if version else driver


def described(further: dict[str, tuple[str, str, str, str]] | None = None) -> list[dict[str, Any]]:
    """The rules as SARIF has them; ``further`` are name, level, short and full text of others, by identity."""
    return [_rule(identity, *texts) for identity, texts in (_RULES | (further or {})).items()]


def _rule(identity: str, name: str, level: str, short: str, full: str) -> dict[str, Any]:
    return {
        "id": identity,
        "name": name,
        "shortDescription": {"text": f"{short}."},
        "fullDescription": {"text": full},
        "help": {"text": "bezoar purify MODEL --data DATA --out DIR writes a cleaned copy of the model."},
        "defaultConfiguration": {"level": level},
        "properties": {"tags": ["security", "machine-learning"]},
    }


def _invocation(report: Report) -> dict[str, Any]:
    notes = [{"level": "warning", "message": {"text": wording.printable(text)}} for text in report.warnings]
    return {"executionSuccessful": True, "toolExecutionNotifications": notes}


def _artifacts(report: Report) -> list[dict[str, Any]]:
    model = {"location": {"uri": uri(report.model.path)}, "roles": ["analysisTarget"]}
    found = [{**model, **_hashes(report.model.sha256)}]
    if report.cleaning is not None and report.cleaning.output:
        cleaned = {"location": {"uri": uri(report.cleaning.output)}, "roles": ["added"]}
        found.append({**cleaned, **_hashes(report.cleaning.sha256)})
    return found


def _hashes(sha256: str) -> dict[str, Any]:
    return {"hashes": {"sha-256": sha256}} if sha256 else {}


def _results(report: Report) -> list[dict[str, Any]]:
    results = []
    identity = _BY_VERDICT.get(report.verdict or "")
    if identity:
        text = f"{wording.title(report).word}. {wording.sentence(report)}"
        results.append(_result(report, identity, text, 0, report.model.path, report.model.sha256))
    done = report.cleaning
    if done is not None and done.output and done.asr_after is not None and done.asr_after > SURVIVES:
        text = (
            f"After {done.method} the inverted trigger still succeeds on {wording.percent(done.asr_after)} of images."
        )
        results.append(_result(report, "BEZ003", text, 1, done.output, done.sha256))
    return results


def _result(report: Report, identity: str, text: str, artifact: int, path: str, sha256: str) -> dict[str, Any]:
    return {
        "ruleId": identity,
        "ruleIndex": list(_RULES).index(identity),
        "level": _RULES[identity][1],
        "kind": "fail",
        "message": {"text": wording.printable(text)},
        "locations": [{"physicalLocation": {"artifactLocation": {"uri": uri(path), "index": artifact}}}],
        "partialFingerprints": {"modelAndTarget/v1": f"{sha256}:{report.target if report.target is not None else '-'}"},
        "properties": plain_values(_evidence(report, wording.suspect(report))),
    }


def _evidence(report: Report, evidence: LabelEvidence | None) -> dict[str, Any]:
    figures = {f.name: f.value for f in report.rule.figures} if report.rule else {}
    values: dict[str, Any] = {"target": report.target, "method": report.method, "figures": figures}
    values |= {"seeds": len(report.seeds), "seedsThatAgree": wording.agreeing(report), "acc": report.preflight.acc}
    if evidence is not None:
        values |= {"label": evidence.label, "labelName": evidence.name}
        values["triggerPixels" if report.unit == "px" else "triggerChange"] = evidence.size
        values |= {"triggerFraction": evidence.fraction, "asr": evidence.asr, "anomalyIndex": evidence.index}
    return values


def plain_values(values: dict[str, Any]) -> dict[str, Any]:
    """Values by name, those of values that are such themselves included: the same without what JSON cannot hold."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            out[key] = plain_values(value)
        elif value is not None and not (isinstance(value, float) and not math.isfinite(value)):
            out[key] = value
    return out
