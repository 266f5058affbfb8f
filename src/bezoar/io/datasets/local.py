"""Data sets that only a folder of the user's own holds."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bezoar.core.errors import DataError
from bezoar.io.data_readers._base import reading
from bezoar.io.datasets._source import Arrays, Files, Tell

_VARIABLE = "BEZOAR_SHARED_DATA"


@dataclass(frozen=True)
class LocalFolder:
    """A folder inside the one that the environment variable ``BEZOAR_SHARED_DATA`` names; only read, never run.

    Args:
        folder: Its name.
        read: Makes the arrays of its files.
        elsewhere: What to do without it.
    """

    folder: str
    read: Callable[[Files], Arrays]
    elsewhere: str = ""
    megabytes: int = 0

    @property
    def title(self) -> str:
        """Where it is looked for."""
        return f"folder {self.folder} in ${_VARIABLE}"

    def fetch(self, folder: Path, tell: Tell) -> Arrays:  # noqa: ARG002 - nothing is downloaded
        """Convert.

        Raises:
            DataError: There is no such folder, or its files cannot be read.
        """
        root = os.environ.get(_VARIABLE, "")
        if not root:
            raise DataError(f"it is no download, and {_VARIABLE} is not set", self.elsewhere)
        place = Path(root) / self.folder
        if not place.is_dir():
            raise DataError(f"{place} is not there", self.elsewhere)
        tell("converting")
        with reading(place, "this data set"):
            return self.read(lambda name: (place / name).read_bytes())
