"""What the pages share: their parts on disk, and the hashes that the content security policy names them by."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup

from bezoar.report.wording import printable


@cache
def part(name: str) -> str:
    """Text of a template, style sheet or script of this package."""
    return resources.files("bezoar.report").joinpath(name).read_text(encoding="utf-8")


def hashed(text: str) -> str:
    """SHA-256 of a style sheet or script as the policy wants it, base64."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def pages(template: str) -> Environment:
    """Renders a template of this package, there named ``page``: all text escaped, without control characters."""
    return Environment(
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=DictLoader({"page": part(template)}),
    )


def _finalize(value: Any) -> Any:
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return printable(value, keep="\n")
