"""Data sets that Debian packages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bezoar.core.errors import DataError
from bezoar.io.data_readers._base import reading
from bezoar.io.datasets._source import Arrays, Files, Tell, check_file, only_file, run_client

_INSTALL = "This source needs Debian or one of its descendants"


@dataclass(frozen=True)
class DebianPackage:
    """A Debian package, fetched with ``apt-get download`` and unpacked into a folder: nothing is installed.

    Args:
        package: Its name.
        version: The one version that is taken.
        sha256: Of the ``.deb`` file.
        megabytes: Size of that file.
        root: Folder inside the package that holds the files.
        read: Makes the arrays of those files.
    """

    package: str
    version: str
    sha256: str
    megabytes: int
    root: str
    read: Callable[[Files], Arrays]

    @property
    def title(self) -> str:
        """Kind, name and version."""
        return f"Debian package {self.package} {self.version}"

    def fetch(self, folder: Path, tell: Tell) -> Arrays:
        """Fetch, check, unpack and convert.

        Raises:
            DataError: apt-get is missing or failed, or the package is another one.
        """
        try:
            command = ["apt-get", "download", "-qq", f"{self.package}={self.version}"]
            run_client(command, folder, tell, install=_INSTALL)
        except DataError as error:
            if "it is not offered" in error.message:
                error.hint = "Run: apt-get update"
            raise
        archive = only_file(folder, "*.deb", "apt-get")
        check_file(archive, self.sha256, tell)
        unpacked = folder / "unpacked"
        run_client(["dpkg-deb", "--extract", str(archive), str(unpacked)], folder, tell, install=_INSTALL)
        tell("converting")
        with reading(archive.name, "a Debian package"):
            return self.read(lambda name: (unpacked / self.root / name).read_bytes())
