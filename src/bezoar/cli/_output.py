"""Flags into settings, and results onto the terminal."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bezoar.core.errors import BezoarError, DataError, SettingError
from bezoar.core.fields import fields_from
from bezoar.options import ModelOptions, RunOptions

if TYPE_CHECKING:
    from bezoar.core.results import Report

EXIT_CODES = {"clean": 0, "backdoored": 1, "inconclusive": 3}
_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """How to read the model.

    Args:
        arch: Architecture of a bare state dict: a reference net such as wrn-16-1 or preactresnet-18, timm/NAME,
            torchvision/NAME, or file.py:function for your own code.
        num_classes: Number of labels; found in the weights by default.
        mean: Normalisation of the input, one value per channel, such as 0.485,0.456,0.406; from the model's own
            configuration by default.
        std: Normalisation of the input, one value per channel, such as 0.229,0.224,0.225.
        size: Height and width of the input in pixels, such as 64 or 55x47.
        channels: Colour channels of the input.
        allow_code: Also open formats that bring code with them, and run it. Only for files you trust.
    """

    arch: str | None = None
    num_classes: int | None = None
    mean: str = ""
    std: str = ""
    size: str = ""
    channels: int | None = None
    allow_code: bool = False

    def make(self) -> ModelOptions:
        """The options of the library."""
        return ModelOptions(
            arch=self.arch,
            num_classes=self.num_classes,
            mean=_numbers("--mean", self.mean),
            std=_numbers("--std", self.std),
            size=size_of(self.size),
            channels=self.channels,
            allow_code=self.allow_code,
        )


def _numbers(flag: str, text: str) -> tuple[float, ...] | None:
    if not text.strip():
        return None
    try:
        return tuple(float(part) for part in re.split(r"[,\s]+", text.strip(" ,()[]")))
    except ValueError:
        raise SettingError(f"{flag} {text!r} is not a list of numbers", f"Such as {flag} 0.5,0.5,0.5") from None


def size_of(text: str) -> int | tuple[int, int] | None:
    """``64`` or ``55x47`` in pixels; None for the empty text."""
    if not text.strip():
        return None
    found = re.fullmatch(r"(\d{1,5})(?:[x,](\d{1,5}))?", text.strip().lower())
    if not found:
        raise SettingError(f"--size {text!r} is not a size", "Give pixels, such as 64, or height and width: 55x47")
    return (int(found[1]), int(found[2])) if found[2] else int(found[1])


@dataclass(frozen=True, kw_only=True)
class RunFlags:
    """Means of a run.

    Args:
        images: Most clean images to use, as many of each class as there are.
        held_out: Share of the images that only measures, in (0, 1); by default half in a scan, a fifth in a
            purification.
        seed: Root of all randomness.
        device: Such as cpu or cuda:0; auto takes CUDA where there is one.
        threads: CPU threads; 0 leaves it to torch.
        additive: Also search for faint changes of the whole image, such as blended pictures and waves.
        resume: Go on where a killed run of the same command stopped.
    """

    images: int = 1000
    held_out: float | None = None
    seed: int = 0
    device: str = "auto"
    threads: int = 0
    additive: bool = True
    resume: bool = True

    def make(self, budget: str, evidence: tuple[str, ...] = (), fpr: float | None = None, ray: str = "") -> RunOptions:
        """The options of the library."""
        return RunOptions(**dataclasses.asdict(self), budget=seconds(budget), evidence=evidence, fpr=fpr, ray=ray)


def seconds(text: str, flag: str = "--budget") -> float | None:
    """``90``, ``90s``, ``2m`` or ``1h`` in seconds; None for the empty text."""
    if not text:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text.strip().lower())
    if not found or float(found[1]) <= 0:
        raise SettingError(f"{flag} {text!r} is not a time", "Give seconds, or a number with s, m or h, such as 2m")
    return float(found[1]) * _UNITS[found[2]]


def name_list(text: str) -> tuple[str, ...]:
    """``mm-bd, k-arm`` as names."""
    return tuple(filter(None, text.replace(" ", "").split(",")))


def label_list(text: str) -> tuple[int, ...]:
    """``3,7,10-14`` as labels."""
    labels: set[int] = set()
    for part in filter(None, (p.strip() for p in text.split(","))):
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if not found or (found[2] and int(found[2]) < int(found[1])):
            raise SettingError(f"--labels {text!r}: {part!r} is not a label", "Give numbers, such as 3,7,10-14")
        last = int(found[2] or found[1])
        if last - int(found[1]) > 1_000_000:
            raise SettingError(f"--labels {text!r}: the range is too long", "Leave it out for all labels")
        labels.update(range(int(found[1]), last + 1))
    return tuple(sorted(labels))


def method_from(kind: str, name: str, settings: dict[str, Any], pairs: tuple[str, ...]) -> Any:
    """A method with settings; each of ``pairs`` is ``key=value``."""
    from bezoar.core.registry import find

    method = find(kind, name)
    for given in settings.keys() - {f.name for f in dataclasses.fields(method)}:
        raise SettingError(f"--{given} is no setting of {name}", f"See bezoar methods {name}")
    return method(**settings | fields_from(method, name, "--set", pairs))


def explain(name: str) -> str:
    """What a method does, its settings with their defaults, and where it comes from.

    Raises:
        SettingError: There is no such method; the hint names the nearest.
    """
    from bezoar.core import registry

    known = {one: (kind, method) for kind in registry.KINDS for one, method in registry.methods(kind).items()}
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        raise SettingError(f"no method {name!r}", f"Did you mean {near[0]!r}?" if near else "See bezoar methods")
    kind, method = known[name]
    lines = [f"{name} ({kind.removesuffix('s')})", "", inspect.cleandoc(method.__doc__ or ""), "", "Defaults:"]
    lines += [f"    {f.name} = {_shown(getattr(method(), f.name))}" for f in dataclasses.fields(method)]
    return "\n".join(lines)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else repr(value)


def check_folder(out: Path | None) -> None:
    """Refuse an output folder that cannot be written, before hours of work."""
    if out is None:
        return
    nearest = out
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir():
        raise SettingError(f"--out {out}: {nearest} is a file", "Give a folder")
    if not os.access(nearest, os.W_OK):
        raise SettingError(f"--out {out}: {nearest} cannot be written to", "Give another folder")


def read_report(source: Path) -> Report:
    """A report from JSON; a folder stands for its report.json."""
    from bezoar.core.results import Report

    path = source / "report.json" if source.is_dir() else source
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} cannot be read: {error}", "Give the report.json that bezoar scan --out wrote"
        ) from None
    return Report.from_json(text)


def show(report: Report, saved: Path | None, *, json: bool, sarif: bool, quiet: bool) -> None:
    """Print the outcome."""
    from bezoar.report.sarif import to_sarif
    from bezoar.report.text import summary

    if json:
        sys.stdout.write(report.to_json())
    elif sarif:
        sys.stdout.write(to_sarif(report))
    elif not quiet:
        width = shutil.get_terminal_size((100, 24)).columns
        color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        sys.stdout.write(summary(report, min(width, 110), color, None if saved is None else str(saved)))


def print_error(error: BezoarError) -> None:
    """One clear error on standard error."""
    print(f"error: {error.message}", file=sys.stderr)
    if error.hint:
        print(f"  {error.hint}", file=sys.stderr)


@contextmanager
def progress(quiet: bool) -> Iterator[Callable[[str, int, int, str], None] | None]:
    """A progress bar with ETA on standard error; plain lines every few seconds where that is no terminal."""
    if quiet:
        yield None
    elif sys.stderr.isatty():
        with _bars() as told:
            yield told
    else:
        yield _lines()


@contextmanager
def _bars() -> Iterator[Callable[[str, int, int, str], None]]:
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        tasks: dict[str, Any] = {}

        def told(phase: str, done: int, total: int, note: str) -> None:
            name = phase.split(",")[0]
            if name not in tasks:
                tasks[name] = bar.add_task(phase, total=total, note="")
            bar.update(tasks[name], completed=done, total=total, description=phase, note=escape(note))

        yield told


def _lines(every: float = 10.0) -> Callable[[str, int, int, str], None]:
    began: dict[str, tuple[float, int]] = {}
    last = [time.monotonic()]

    def told(phase: str, done: int, total: int, note: str) -> None:
        now = time.monotonic()
        name = phase.split(",")[0]
        start, first = began.setdefault(name, (now, done))
        if now - last[0] < every:
            return
        last[0] = now
        left = (now - start) / max(1, done - first) * (total - done)
        print(f"{phase}: {done} of {total}, about {left:.0f} s left, {note}", file=sys.stderr, flush=True)

    return told
