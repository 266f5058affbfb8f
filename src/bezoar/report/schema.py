"""JSON Schema (draft 2020-12) of the report, made from the dataclasses, so that the two cannot differ."""

from __future__ import annotations

import dataclasses
import json
import re
import types
import typing
from typing import Any, Literal

from bezoar.core.results import SCHEMA, Report

Schema = dict[str, Any]
_PLAIN = {str: "string", int: "integer", bool: "boolean"}


def report_schema() -> Schema:
    """The schema that every ``report.json`` meets; one definition per dataclass, with its own description."""
    definitions: dict[str, Schema] = {}
    _define(Report, definitions)
    root = definitions.pop("Report")
    root["properties"]["schema"] = {"const": SCHEMA}
    root["required"].append("schema")
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": SCHEMA}
    return {**head, **root, "$defs": dict(sorted(definitions.items()))}


def schema_text() -> str:
    """The schema as the text that is kept in ``docs/schema/report-1.json``."""
    return json.dumps(report_schema(), indent=2) + "\n"


def _define(kind: type, definitions: dict[str, Schema]) -> Schema:
    """Add a dataclass, and all that it refers to, to the definitions; returns a reference to it."""
    if kind.__name__ not in definitions:
        definitions[kind.__name__] = {}
        summary, described = _documented(kind)
        hints = typing.get_type_hints(kind)
        properties = {name: _schema(hint, definitions) for name, hint in hints.items()}
        for name, text in described.items():
            if name in properties:
                properties[name] = {**properties[name], "description": text}
        required = [f.name for f in dataclasses.fields(kind) if _required(f)]
        definitions[kind.__name__].update(
            type="object",
            description=summary,
            properties=properties,
            required=required,
            additionalProperties=False,
        )
    return {"$ref": f"#/$defs/{kind.__name__}"}


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _schema(kind: Any, definitions: dict[str, Schema]) -> Schema:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _define(kind, definitions)
    if origin in (types.UnionType, typing.Union):
        return {"anyOf": [_schema(a, definitions) for a in arguments]}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is tuple:
        return {"type": "array", "items": _schema(arguments[0], definitions)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema(arguments[1], definitions)}
    if kind is type(None):
        return {"type": "null"}
    if kind is float:
        # JSON has no NaN: a figure that could not be had is null.
        return {"type": ["number", "null"]}
    return {"type": _PLAIN[kind]} if kind in _PLAIN else {}


def _documented(kind: type) -> tuple[str, dict[str, str]]:
    """First paragraph of the docstring, and what its section on attributes says about each field."""
    lines = [line.strip() for line in (kind.__doc__ or "").splitlines()]
    text = "\n".join(lines)
    summary = " ".join(text.split("\n\n")[0].split())
    section = text.partition("Attributes:\n")[2].split("\n\n")[0]
    described: dict[str, str] = {}
    current: list[str] = []
    for line in section.splitlines():
        start = re.match(r"(\w+(?:, \w+)*): (.+)", line)
        if start:
            current = start[1].split(", ")
        for name in current:
            described[name] = f"{described.get(name, '')} {start[2] if start else line}".strip()
    return summary, described


if __name__ == "__main__":
    print(schema_text(), end="")
