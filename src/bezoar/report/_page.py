"""What the pages share: their parts on disk, and the hashes that the content security policy names them by."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib import resources


@cache
def part(name: str) -> str:
    """Text of a template, style sheet or script of this package."""
    return resources.files("bezoar.report").joinpath(name).read_text(encoding="utf-8")


def hashed(text: str) -> str:
    """SHA-256 of a style sheet or script as the policy wants it, base64."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
