"""One model of a sweep as a piece of work: scanned in a process of its own, under limits."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bezoar.core.child import Ended, run_child
from bezoar.core.errors import DataError, SettingError
from bezoar.core.results import Report
from bezoar.core.swept import Outcome, Swept
from bezoar.report import wording

#: What the process leaves where it could not scan, see :mod:`bezoar.one_scan`.
ERROR = "error.json"
_FILES = ("report.json", "report.html", "report.sarif", "triggers.safetensors")
_MOST = 64 << 20  # bytes of one of these files


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one model may take.

    Args:
        seconds: Wall time, after which its process is killed with all that it started.
        memory_mib: Resident memory in MiB, 0 for no limit; on Linux.
    """

    seconds: float = 1800.0
    memory_mib: int = 0

    def __post_init__(self) -> None:
        if not self.seconds > 0 or self.memory_mib < 0:
            raise SettingError("a limit of time must be above 0, one of memory at least 0")


@dataclass(frozen=True)
class Job:
    """One model to scan.

    Attributes:
        key: Of its record.
        payload: What its process is told, plain values.
        facts: Fields of its record that are known before.
    """

    key: str
    payload: dict[str, Any]
    facts: dict[str, Any]


def scan_apart(limits: Limits, job: Job) -> tuple[Swept, dict[str, bytes]]:
    """Scan one model in a process of its own; the record, and the files of its report."""
    env = os.environ | {"OMP_NUM_THREADS": str(job.payload["options"]["threads"])}
    with tempfile.TemporaryDirectory(prefix="bezoar-sweep-", ignore_cleanup_errors=True) as folder:
        ended = run_child(
            [sys.executable, "-P", "-m", "bezoar.one_scan"],
            json.dumps(job.payload | {"folder": folder}, default=str).encode(),
            seconds=limits.seconds,
            memory_mib=limits.memory_mib,
            env=env,
        )
        files = {name: _content(Path(folder, name)) for name in (*_FILES, ERROR)}
    files = {name: content for name, content in files.items() if content}
    return _row(job, limits, ended, files), {name: files[name] for name in _FILES if name in files}


def _content(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_MOST)
    except OSError:
        return b""


def _row(job: Job, limits: Limits, ended: Ended, files: dict[str, bytes]) -> Swept:
    facts: dict[str, Any] = {
        **_now(job),
        "limit": limits.seconds,
        "seconds": round(ended.seconds, 3),
        "cpu_seconds": round(ended.cpu_seconds, 3),
        "peak_mib": ended.peak_mib,
    }
    if ended.reason:
        outcome: Outcome = "killed" if ended.killed else "crashed"
        words = ended.words.splitlines()[-1][:300] if ended.words and not ended.killed else ""
        files.clear()  # of what was not finished, nothing is kept
        return Swept(**facts, outcome=outcome, error=ended.reason + (f": {words}" if words else ""))
    try:
        if ERROR in files:
            return Swept(**facts, **json.loads(files[ERROR]))
        return Swept(**facts, **_verdict(Report.from_json(files["report.json"].decode())))
    except (KeyError, TypeError, ValueError, DataError) as error:
        files.clear()
        return Swept(**facts, outcome="crashed", error=f"it left no report: {type(error).__name__}: {error}"[:300])


def _verdict(report: Report) -> dict[str, Any]:
    evidence, ratio = wording.suspect(report), wording.size_ratio(report)
    found = {
        "outcome": report.verdict,
        "target": report.target,
        "name": evidence.name if evidence is not None and report.target is not None else "",
        "ratio": None if ratio is None else ratio[0],
        "unit": report.unit,
        "arch": report.model.arch,
        "format": report.model.format,
        "num_classes": report.model.num_classes,
        "acc": report.preflight.acc,
        "summary": wording.sentence(report),
        "warnings": len(report.warnings),
    }
    if evidence is not None:
        found |= {"label": evidence.label, "size": evidence.size, "fraction": evidence.fraction, "asr": evidence.asr}
    return found


def _now(job: Job) -> dict[str, Any]:
    return {"key": job.key, **job.facts, "created": datetime.now(UTC).isoformat(timespec="seconds")}


def lost(job: Job, reason: str) -> tuple[Swept, dict[str, bytes]]:
    """The same of a model whose worker was lost."""
    return Swept(**_now(job), outcome="lost", error=reason, hint="Try again with --again"), {}
