"""The verb sweep: many models, each in a process of its own; what is done is not done again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bezoar.apart import Job, Limits, lost, scan_apart
from bezoar.core.claims import Claims
from bezoar.core.errors import DataError, SettingError
from bezoar.core.exec import executor
from bezoar.core.method import Scanner
from bezoar.core.plain import built, plain
from bezoar.core.registry import method_name
from bezoar.core.results import write_atomic
from bezoar.core.run import Report as Told
from bezoar.core.swept import Swept, exit_code
from bezoar.evidence import scorers
from bezoar.io.arch import resolve
from bezoar.io.containers import sha256
from bezoar.io.listing import Entry, find_models, hash_data
from bezoar.options import ModelOptions, RunOptions
from bezoar.report.swept import render_sweep, sweep_sarif
from bezoar.scanners.neural_cleanse import NeuralCleanse
from bezoar.session import device_named
from bezoar.version import versions

_EVERY = 60.0  # seconds between two pages
#: Settings that a list may give for each model, beside ``data``.
_LISTED = ("arch", "num_classes", "mean", "std", "size", "channels")


@dataclass(frozen=True)
class Sweep:
    """What a sweep left behind.

    Attributes:
        rows: One for each model that was listed, in that order; models that are equal share a key.
        missing: Models that another sweep of the same folder is at.
        scanned: Models that this run scanned; the others were there.
        page: The HTML page.
    """

    rows: tuple[Swept, ...]
    missing: int
    scanned: int
    page: Path

    @property
    def counts(self) -> dict[str, int]:
        """Number of models of each outcome."""
        return dict(Counter(row.outcome for row in self.rows))

    @property
    def exit_code(self) -> int:
        """See :func:`bezoar.core.swept.exit_code`."""
        return exit_code(self.counts)


def sweep(
    models: str | Path | Iterable[Any],
    data: str | None,
    out: str | Path,
    *,
    method: Scanner | None = None,
    model_options: ModelOptions | None = None,
    options: RunOptions | None = None,
    limits: Limits | None = None,
    workers: int = 1,
    ray: str = "",
    again: bool = False,
    report: Told | None = None,
) -> Sweep:
    """Scan many models and keep a record of each under ``out``.

    Args:
        models: See :func:`bezoar.io.listing.find_models`.
        data: Clean images with labels: a path or a name; None where the list gives each model's own.
        out: Folder of records, reports and pages; several sweeps may share it.
        method: The scanner.
        model_options: For all models; a list may say otherwise for one.
        options: Means of each scan. ``threads`` are those of one scan; 0 shares the CPUs among the workers.
        limits: Of each scan.
        workers: Scans at a time.
        ray: See :func:`bezoar.core.exec.executor`. The models, unless they come from a hub, and the data must be under
            the same paths on every node.
        again: Also repeat models that could not be scanned.
        report: Told of progress.

    Raises:
        BezoarError: There are no models, or the settings cannot be used. A fault of one model is a record.
    """
    options = options or RunOptions()
    if workers < 1:
        raise SettingError("a sweep needs at least 1 worker")
    threads = options.threads or (1 if ray else max(1, (os.cpu_count() or 1) // workers))
    device = device_named(options.device).type
    work = _Work(
        find_models(models),
        data,
        Path(out),
        method or NeuralCleanse(),
        model_options or ModelOptions(),
        dataclasses.replace(options, threads=threads, device=device if ray else options.device),
        limits or Limits(),
        again,
        report,
    )
    work.check()
    with executor(ray, cpus=threads, gpus=float(device == "cuda"), workers=workers) as pool:
        try:
            with closing(pool.map(scan_apart, work.limits, work.jobs(), lost=lost)) as results:
                for job, (row, files) in results:
                    work.keep(job, row, files)
        finally:
            work.claims.release_all()
            done = work.pages()
    return done


@dataclass
class _Work:
    entries: list[Entry]
    data: str | None
    out: Path
    method: Scanner
    model_options: ModelOptions
    options: RunOptions
    limits: Limits
    again: bool
    report: Told | None
    rows: dict[str, Swept] = field(default_factory=dict)
    keys: list[str] = field(default_factory=list)  # of the entries so far
    seen: set[str] = field(default_factory=set)
    hashes: dict[str, str] = field(default_factory=dict)  # of data and of files with architectures
    repeated: int = 0
    scanned: int = 0
    due: float = field(default_factory=lambda: time.monotonic() + _EVERY)

    def __post_init__(self) -> None:
        self.claims = Claims(self.out / ".locks")
        known = versions()
        self.versions = {name: known[name] for name in ("bezoar", "torch")}

    def check(self) -> None:
        """Refuse, before any work, what would fail for every model."""
        scorers(self.options.evidence)
        arch = self.model_options.arch
        if arch is not None and ".py:" not in arch:  # the user's own code is left to the processes of the scans
            resolve(arch)
        for entry in self.entries:
            self._data_hash(self._settings(entry)[0])

    def jobs(self) -> Iterator[Job]:
        """Models that are not there yet, looked at one by one as workers become free."""
        for entry in self.entries:
            job = self._job(entry)
            self.repeated += job.key in self.seen
            self.seen.add(job.key)
            self.keys.append(job.key)
            if job.key in self.rows:
                continue
            found = self._read(job.key)
            if found is not None and self._settled(found):
                self.rows[job.key] = found
                self._tell("skip", entry.name)
            elif self.claims.take(job.key):
                found = self._read(job.key)  # another sweep may have been quicker
                if found is not None and self._settled(found):
                    self.claims.release(job.key)
                    self.rows[job.key] = found
                else:
                    self._tell("sweep", entry.name)
                    yield job

    def _settled(self, row: Swept) -> bool:
        if row.judged:
            return True
        return not self.again and not (row.outcome == "killed" and row.limit < self.limits.seconds)

    def _job(self, entry: Entry) -> Job:
        data, model_options = self._settings(entry)
        fingerprint, weights = entry.fingerprint()
        options = dataclasses.asdict(self.options) | {"resume": False, "ray": ""}
        config = {"method": method_name(type(self.method)), "config": self.method.config()}
        told = {key: value for key, value in options.items() if key not in ("threads", "device", "resume")}
        # A file of the user's counts by what is in it, not by where it lies.
        arch = self._arch_hash(model_options.arch) or model_options.arch
        parts = [fingerprint, self._data_hash(data), config, dataclasses.asdict(model_options) | {"arch": arch}]
        parts += [told, self.versions]
        key = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]
        absolute = str(Path(entry.path).absolute()) if entry.path else ""
        payload = {
            **config,
            "name": entry.name,
            "model": absolute,
            "sha256": weights,
            "hub": None if entry.hub is None else dataclasses.asdict(entry.hub),
            "data": str(Path(data).expanduser().absolute()) if Path(data).expanduser().exists() else data,
            "model_options": dataclasses.asdict(model_options) | {"arch": _absolute(model_options.arch)},
            "options": options,
        }
        facts = {"model": entry.name, "sha256": fingerprint, "data": data, "settings": entry.settings}
        return Job(key, payload, facts)

    def _settings(self, entry: Entry) -> tuple[str, ModelOptions]:
        """Data and options of one model: those of the list before those of the sweep."""
        listed = dict(entry.settings)
        data = listed.pop("data", self.data)
        if not isinstance(data, str) or not data:
            raise DataError(f"no clean images for {entry.name}", "Give --data, or a column data in the list")
        for name in listed.keys() - set(_LISTED):
            raise SettingError(f"{entry.name}: unknown setting {name!r}", f"A list may give data, {', '.join(_LISTED)}")
        made = {name: _value(entry.name, name, value) for name, value in listed.items()}
        return data, dataclasses.replace(self.model_options, **made)

    def _data_hash(self, data: str) -> str:
        if data not in self.hashes:
            try:
                self.hashes[data] = hash_data(data)
            except OSError as error:
                raise DataError(f"{data} cannot be read: {error}", "Check --data") from None
        return self.hashes[data]

    def _arch_hash(self, arch: str | None) -> str:
        file, _, function = (arch or "").rpartition(":")
        path = Path(file).expanduser()
        if path.suffix != ".py" or not path.is_file():
            return ""
        if file not in self.hashes:
            self.hashes[file] = sha256(path)
        return f"{self.hashes[file]}:{function}"

    def _folder(self, key: str) -> Path:
        return self.out / "models" / key[:2] / key

    def _read(self, key: str) -> Swept | None:
        """A record that is there, or None; a damaged one is as good as none."""
        try:
            text = (self._folder(key) / "record.json").read_text(encoding="utf-8")
            row: Swept = built(Swept, json.loads(text))
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return row

    def keep(self, job: Job, row: Swept, files: dict[str, bytes]) -> None:
        """Write the report, then the record, which says that all is there."""
        row = dataclasses.replace(row, versions=self.versions)
        folder = self._folder(job.key)
        for name, content in files.items():
            write_atomic(folder / name, content)
        write_atomic(folder / "record.json", json.dumps(plain(row), indent=1) + "\n")
        self.claims.release(job.key)
        self.rows[job.key] = row
        self.scanned += 1
        self._tell("sweep", row.model)
        if time.monotonic() > self.due:
            began = time.monotonic()
            self.pages()
            self.due = time.monotonic() + max(_EVERY, 20 * (time.monotonic() - began))

    def _tell(self, phase: str, model: str) -> None:
        if self.report is not None:  # what is skipped must not make the rest look quick
            self.report(phase, len(self.rows) + self.repeated, len(self.entries), Path(model).name)

    def pages(self) -> Sweep:
        """Write ``sweep.jsonl``, ``sweep.sarif`` and ``index.html`` of what is there."""
        rows = tuple(
            dataclasses.replace(self.rows[key], model=entry.name)
            for entry, key in zip(self.entries, self.keys, strict=False)
            if key in self.rows
        )
        missing = len(self.entries) - len(rows)
        write_atomic(self.out / "sweep.jsonl", "".join(json.dumps(plain(row)) + "\n" for row in rows))
        write_atomic(self.out / "sweep.sarif", sweep_sarif(rows, missing))
        write_atomic(self.out / "index.html", render_sweep(rows, missing))
        return Sweep(rows, missing, self.scanned, self.out / "index.html")


def _absolute(arch: str | None) -> str | None:
    path, colon, function = (arch or "").rpartition(":")
    return f"{Path(path).expanduser().absolute()}:{function}" if colon and path.endswith(".py") else arch


def _value(model: str, name: str, value: Any) -> Any:
    """A setting of a list, as text or number, as the library wants it."""
    try:
        if name == "arch":
            return str(value)
        if name in ("num_classes", "channels"):
            return int(value)
        parts = value if isinstance(value, list) else str(value).replace("x", ",").split(",")
        if name == "size":
            sides = tuple(int(part) for part in parts)
            return sides[0] if len(sides) == 1 else (sides[0], sides[1])
        return tuple(float(part) for part in parts)
    except (ValueError, TypeError):
        raise SettingError(f"{model}: {value!r} is no value of {name}", "Such as 32, or 0.5,0.5,0.5") from None
