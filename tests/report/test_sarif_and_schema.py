"""SARIF 2.1.0 by its essential rules, and the JSON Schema of the report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jsonschema
import pytest

from bezoar.core.results import Report
from bezoar.report.sarif import SURVIVES, to_sarif, uri
from bezoar.report.schema import report_schema, schema_text
from tests.report import samples

SCHEMA_FILE = Path(__file__).parents[2] / "docs" / "schema" / "report-1.json"
# What section 3 of the standard demands of the parts that are used here.
SARIF: dict[str, Any] = {
    "type": "object",
    "required": ["version", "runs"],
    "additionalProperties": False,
    "properties": {
        "$schema": {"type": "string", "format": "uri"},
        "version": {"const": "2.1.0"},
        "runs": {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/run"}},
    },
    "$defs": {
        "text": {"type": "object", "required": ["text"], "properties": {"text": {"type": "string", "minLength": 1}}},
        "level": {"enum": ["none", "note", "warning", "error"]},
        "location": {
            "type": "object",
            "required": ["uri"],
            "additionalProperties": False,
            "properties": {
                "uri": {"type": "string", "pattern": r"^[A-Za-z0-9\-._~:/?#\[\]@!$&'()*+,;=%]+$"},
                "index": {"type": "integer", "minimum": -1},
            },
        },
        "run": {
            "type": "object",
            "required": ["tool", "results"],
            "properties": {
                "tool": {
                    "type": "object",
                    "required": ["driver"],
                    "properties": {
                        "driver": {
                            "type": "object",
                            "required": ["name"],
                            "properties": {
                                "rules": {"type": "array", "uniqueItems": True, "items": {"$ref": "#/$defs/rule"}}
                            },
                        }
                    },
                },
                "automationDetails": {"type": "object", "properties": {"id": {"type": "string"}}},
                "invocations": {"type": "array", "items": {"type": "object", "required": ["executionSuccessful"]}},
                "artifacts": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "properties": {
                            "location": {"$ref": "#/$defs/location"},
                            "roles": {"type": "array", "items": {"enum": ["analysisTarget", "added"]}},
                            "hashes": {"type": "object", "additionalProperties": {"type": "string"}},
                        },
                    },
                },
                "columnKind": {"enum": ["utf16CodeUnits", "unicodeCodePoints"]},
                "results": {"type": "array", "items": {"$ref": "#/$defs/result"}},
            },
        },
        "rule": {
            "type": "object",
            "required": ["id"],
            "properties": {
                "shortDescription": {"$ref": "#/$defs/text"},
                "fullDescription": {"$ref": "#/$defs/text"},
                "help": {"$ref": "#/$defs/text"},
                "defaultConfiguration": {"type": "object", "properties": {"level": {"$ref": "#/$defs/level"}}},
            },
        },
        "result": {
            "type": "object",
            "required": ["message", "ruleId", "level", "locations"],
            "properties": {
                "message": {"$ref": "#/$defs/text"},
                "level": {"$ref": "#/$defs/level"},
                "kind": {"enum": ["notApplicable", "pass", "fail", "review", "open", "informational"]},
                "ruleIndex": {"type": "integer", "minimum": 0},
                "partialFingerprints": {"type": "object", "additionalProperties": {"type": "string"}},
                "locations": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "properties": {
                            "physicalLocation": {
                                "type": "object",
                                "required": ["artifactLocation"],
                                "properties": {"artifactLocation": {"$ref": "#/$defs/location"}},
                            }
                        },
                    },
                },
            },
        },
    },
}


def run_of(report: Report) -> dict[str, Any]:
    log: dict[str, Any] = json.loads(to_sarif(report))
    run: dict[str, Any] = log["runs"][0]
    return run


@pytest.mark.parametrize("name", samples.ALL)
def test_sarif_meets_the_standard(name: str) -> None:
    log = json.loads(to_sarif(samples.ALL[name]()))
    jsonschema.validate(log, SARIF)
    run = log["runs"][0]
    rules, artifacts = run["tool"]["driver"]["rules"], run["artifacts"]
    for result in run["results"]:
        assert rules[result["ruleIndex"]]["id"] == result["ruleId"]
        assert rules[result["ruleIndex"]]["defaultConfiguration"]["level"] == result["level"]
        place = result["locations"][0]["physicalLocation"]["artifactLocation"]
        assert artifacts[place["index"]]["location"]["uri"] == place["uri"]


def test_the_check_can_fail() -> None:
    log = json.loads(to_sarif(samples.backdoored()))
    log["runs"][0]["results"][0]["level"] = "fatal"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(log, SARIF)


def test_levels_follow_the_verdict() -> None:
    (found,) = run_of(samples.backdoored())["results"]
    assert (found["ruleId"], found["level"]) == ("BEZ001", "error")
    assert found["properties"]["target"] == 5
    assert found["properties"]["anomalyIndex"] == pytest.approx(3.85, abs=0.01)
    assert "label 5 (dog)" in found["message"]["text"]
    (open_,) = run_of(samples.inconclusive())["results"]
    assert (open_["ruleId"], open_["level"]) == ("BEZ002", "warning")
    assert run_of(samples.clean())["results"] == []
    assert run_of(samples.purify_only())["results"] == []


def test_a_trigger_that_survives_is_a_finding_about_the_cleaned_model() -> None:
    report = samples.backdoored()
    assert report.cleaning is not None
    bad = replace(report, cleaning=replace(report.cleaning, asr_after=SURVIVES + 0.01))
    finding = run_of(bad)["results"][1]
    assert finding["ruleId"] == "BEZ003"
    place = finding["locations"][0]["physicalLocation"]["artifactLocation"]
    assert place == {"uri": "cleaned/wrn-16-1.pth.tar", "index": 1}


def test_artifact_is_the_model_with_its_hash() -> None:
    report = samples.clean()
    (artifact,) = run_of(report)["artifacts"]
    assert artifact["hashes"] == {"sha-256": report.model.sha256}
    assert artifact["location"]["uri"] == report.model.path


def test_warnings_are_notifications() -> None:
    notes = run_of(samples.inconclusive())["invocations"][0]["toolExecutionNotifications"]
    assert [n["message"]["text"] for n in notes] == list(samples.inconclusive().warnings)


def test_uris_are_escaped() -> None:
    assert uri("a b/ü#1.pth") == "a%20b/%C3%BC%231.pth"
    assert uri("/tmp/x y.pt") == "file:///tmp/x%20y.pt"
    assert uri("C:\\models\\a.pt") == "file:///C:/models/a.pt"
    assert uri("bad\ud800name")
    # A colon in the first segment would read as a scheme.
    assert urlsplit(uri("javascript:alert(1)")).scheme == ""


@pytest.mark.parametrize("name", samples.ALL)
def test_reports_meet_the_schema(name: str) -> None:
    raw = json.loads(samples.ALL[name]().to_json())
    jsonschema.Draft202012Validator.check_schema(report_schema())
    jsonschema.Draft202012Validator(report_schema()).validate(raw)


def test_nan_is_null_in_a_valid_report_and_comes_back() -> None:
    raw = json.loads(samples.backdoored().to_json())
    assert raw["labels"][9]["size"] is None and raw["labels"][9]["sizes"] == [None] * 5
    again = Report.from_json(json.dumps(raw))
    assert again.labels[9].size != again.labels[9].size
    assert to_sarif(again) == to_sarif(samples.backdoored())


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("verdict",), "maybe"),
        (("schema",), "bezoar.report/2"),
        (("model", "parameters"), "many"),
        (("labels", 0, "status"), "unknown"),
        (("extra",), 1),
    ],
)
def test_wrong_reports_do_not_meet_the_schema(path: tuple[str | int, ...], value: object) -> None:
    raw = json.loads(samples.backdoored().to_json())
    place: Any = raw
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    assert not jsonschema.Draft202012Validator(report_schema()).is_valid(raw)


def test_schema_file_is_up_to_date() -> None:
    hint = "write it anew: python -m bezoar.report.schema > docs/schema/report-1.json"
    assert SCHEMA_FILE.read_text(encoding="utf-8") == schema_text(), hint


def test_schema_describes_fields() -> None:
    label = report_schema()["$defs"]["LabelEvidence"]
    assert label["properties"]["asr"]["description"].startswith("Success of the inverted trigger")
    assert label["properties"]["name"]["description"] == label["properties"]["label"]["description"] == "The label."
    assert label["additionalProperties"] is False
