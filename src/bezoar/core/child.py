"""A child process under limits of time and memory, killed with all that it started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bezoar.core.exec import nobody_waits

_EVERY = 0.1  # seconds between two looks at a child
_TAIL = 2000  # bytes of its last words that are kept


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    Attributes:
        reason: Empty where it left by itself with code 0; else why not, in words.
        killed: ``time`` or ``memory`` where a limit ended it, ``stop`` where nobody waited any more, or empty.
        code: Exit code, negative for a signal.
        seconds: Wall time.
        cpu_seconds: CPU time of it and of what it waited for; 0 where the platform does not tell.
        peak_mib: Most resident memory that was seen; 0 where the platform does not tell.
        words: The end of what it wrote to standard error.
    """

    reason: str
    killed: str
    code: int
    seconds: float
    cpu_seconds: float
    peak_mib: int
    words: str


def run_child(
    command: Sequence[str], given: bytes, *, seconds: float, memory_mib: int = 0, env: dict[str, str] | None = None
) -> Ended:
    """Run a command in a session of its own until it ends, a limit ends it, or nobody waits for it any more.

    Standard input stays open after ``given``: a child can tell from its end that this process is gone.

    Args:
        command: Program and arguments.
        given: First line of its standard input, without the line break.
        seconds: Limit of wall time.
        memory_mib: Limit of resident memory of the process, in MiB; 0 for none. Looked at ten times a second, on Linux.
        env: Environment; that of this process by default.
    """
    with tempfile.TemporaryFile() as words:
        started = time.monotonic()
        child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=words,
            env=env,
            start_new_session=True,
        )
        killed, peak, cpu = "", 0, 0.0
        try:
            assert child.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                child.stdin.write(given + b"\n")
                child.stdin.flush()
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(_EVERY)
                    break
                peak, cpu = max(peak, _resident_mib(child.pid)), _cpu_seconds(child.pid) or cpu
                killed = _limit(time.monotonic() - started, seconds, peak, memory_mib)
                if killed:
                    break
        finally:
            _kill(child)
        took = time.monotonic() - started
        reason = _reason(killed, child.returncode, seconds, memory_mib)
        return Ended(reason, killed, child.returncode, took, cpu, peak, _tail(words))


def _limit(took: float, seconds: float, peak: int, memory_mib: int) -> str:
    if took > seconds:
        return "time"
    if memory_mib and peak > memory_mib:
        return "memory"
    return "stop" if nobody_waits() else ""


def _reason(killed: str, code: int, seconds: float, memory_mib: int) -> str:
    if killed:
        return {
            "time": f"killed at the limit of {seconds:g} seconds",
            "memory": f"killed at the limit of {memory_mib} MiB of memory",
            "stop": "stopped with the sweep",
        }[killed]
    if code >= 0:
        return f"left with code {code}" if code else ""
    try:
        return f"died of {signal.Signals(-code).name}"
    except ValueError:
        return f"died of signal {-code}"


def _kill(child: subprocess.Popen[bytes]) -> None:
    """End the child and all of its session that is left, also where it ended well."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    if child.stdin is not None:
        with contextlib.suppress(OSError):
            child.stdin.close()
    child.wait()


def _resident_mib(pid: int) -> int:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") >> 20
    except (OSError, ValueError, IndexError):
        return 0


def _cpu_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return 0.0


def _tail(file: object) -> str:
    assert hasattr(file, "seek")
    assert hasattr(file, "read")
    end = file.seek(0, os.SEEK_END)
    file.seek(max(0, end - _TAIL))
    return bytes(file.read()).decode("utf-8", "replace").strip()
