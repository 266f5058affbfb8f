"""Claims on pieces of work, so that several processes can share a folder: each ends with the process at the latest."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO


class Claims:
    """Locks on files of a folder.

    Args:
        folder: Made where it is missing; a released claim leaves nothing in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._held: dict[str, IO[str]] = {}

    def take(self, name: str) -> bool:
        """Claim a piece of work; False where another process holds it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{name}.lock"
        while True:
            file = path.open("w")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                same = os.path.samestat(os.fstat(file.fileno()), path.stat())
            except BlockingIOError:
                file.close()
                return False
            except FileNotFoundError:  # released between the two
                same = False
            if same:
                self._held[name] = file
                return True
            file.close()

    def release(self, name: str) -> None:
        """Give a claim back."""
        file = self._held.pop(name)
        (self.folder / f"{name}.lock").unlink(missing_ok=True)  # while it is held: nobody else can hold it meanwhile
        file.close()

    def release_all(self) -> None:
        """Give all claims back."""
        for name in list(self._held):
            self.release(name)
