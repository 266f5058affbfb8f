"""Dataclasses that are one JSON file each, which names its schema."""

from __future__ import annotations

import json
from typing import Any, ClassVar, Self

from bezoar.core.errors import DataError
from bezoar.core.plain import built, plain


class Document:
    """Base of a dataclass with a field ``schema``.

    Attributes:
        NAMED: Its schema, and the default of the field.
        WHAT: What it is, for the error of one that is not.
        WHENCE: What to do then.
    """

    NAMED: ClassVar[str]
    WHAT: ClassVar[str]
    WHENCE: ClassVar[str]

    def to_json(self) -> str:
        """As JSON text, ending in a newline; floats that JSON cannot hold become null."""
        return json.dumps(plain(self), indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read back what :meth:`to_json` wrote.

        Raises:
            DataError: It is no such text.
        """
        try:
            raw: Any = json.loads(text)
            if raw.get("schema") != cls.NAMED:
                raise ValueError(f"expected schema {cls.NAMED!r}, got {raw.get('schema')!r:.80}")
            made: Self = built(cls, raw)
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise DataError(f"not {cls.WHAT}: {error}", cls.WHENCE) from None
        return made
