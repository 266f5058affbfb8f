"""The verb ``filter_data``: which training examples are poisoned, seen through a model trained on them?"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bezoar.core.errors import DataError
from bezoar.core.examples import Subset
from bezoar.core.filtered import FilterReport, LabelFindings
from bezoar.core.filtering import Filter, Suspicion
from bezoar.core.method import Clean
from bezoar.core.model import Suspect
from bezoar.core.pictures import thumbnails
from bezoar.core.registry import find, method_name
from bezoar.core.results import DataFacts, write_atomic
from bezoar.core.run import Progress, Run
from bezoar.core.run import Report as Told
from bezoar.core.scored import Verdict
from bezoar.io.data import load_data, open_source, train_and_test
from bezoar.io.data_readers._base import Picture, Wanted
from bezoar.io.datasets import cache_folder
from bezoar.io.models import load_model
from bezoar.io.suspects import suspects_csv
from bezoar.io.untrusted import UntrustedData, open_untrusted
from bezoar.ops.answers import answers
from bezoar.ops.augment import as_float
from bezoar.options import ModelOptions, RunOptions, divided
from bezoar.report.contact_sheet import SheetRow, Thumbnail, render_sheet
from bezoar.session import device_named, size_is_open, sized_by
from bezoar.version import __version__, versions

_SHEET_LABELS, _SHEET_EXAMPLES, _SIDE = 20, 12, 64
_SAMPLE = 1000  # examples that the model's fit is measured on


@dataclass(frozen=True)
class Filtered:
    """What a filter found.

    Attributes:
        report: All of it, as plain values.
        data: The training set.
        score: ``(N,)`` float64 for each example of ``data``, higher for more suspicious.
        suspect: ``(N,)`` bool.
    """

    report: FilterReport
    data: UntrustedData
    score: Tensor
    suspect: Tensor
    seed: int = field(default=0, repr=False)

    @property
    def suspects(self) -> Tensor:
        """``(S,)`` positions of the suspects in the data as it came, most suspicious first."""
        return self.data.origin[self._ordered()]

    @property
    def clean_index(self) -> Tensor:
        """``(N - S,)`` positions of all others in the data as it came, ascending."""
        return self.data.origin[~self.suspect]

    def _ordered(self) -> Tensor:
        rows = self.suspect.nonzero().flatten()
        return rows[torch.sort(self.score[rows], descending=True, stable=True).indices]

    def save(self, folder: str | Path) -> Path:
        """Write ``suspects.csv``, ``clean_index.npy``, ``report.json`` and ``contact-sheet.html``.

        Returns:
            The contact sheet.
        """
        folder = Path(folder)
        data, rows = self.data, self._ordered().tolist()
        listed = ((int(data.origin[r]), data.name(r), int(data.labels[r]), float(self.score[r])) for r in rows)
        write_atomic(folder / "suspects.csv", suspects_csv(listed))
        positions = io.BytesIO()
        np.save(positions, self.clean_index.numpy(), allow_pickle=False)
        write_atomic(folder / "clean_index.npy", positions.getvalue())
        write_atomic(folder / "report.json", self.report.to_json())
        write_atomic(folder / "contact-sheet.html", render_sheet(self.report, self._sheet()))
        return folder / "contact-sheet.html"

    def _sheet(self) -> list[SheetRow]:
        rows = []
        for one in self.report.labels[:_SHEET_LABELS]:
            own = (self.data.labels == one.label).nonzero().flatten()
            if not len(own):
                continue
            first = own[torch.sort(self.score[own], descending=True, stable=True).indices]
            first = torch.cat([first[self.suspect[first]], first[~self.suspect[first]]])[:_SHEET_EXAMPLES]
            others = own[~self.suspect[own] & ~torch.isin(own, first)]
            generator = Run(seed=self.seed).generator("contact sheet", one.label)
            drawn = others[torch.randperm(len(others), generator=generator)[:_SHEET_EXAMPLES]]
            rows.append(SheetRow(one, self._thumbnails(first), self._thumbnails(drawn)))
        return rows

    def _thumbnails(self, rows: Tensor) -> tuple[Thumbnail, ...]:
        if not len(rows):
            return ()
        shown = thumbnails(as_float(self.data.take(rows)), _SIDE)
        return tuple(
            Thumbnail(
                position=int(self.data.origin[row]),
                name=self.data.name(row),
                score=float(self.score[row]),
                png=image,
                suspect=bool(self.suspect[row]),
            )
            for row, image in zip(rows.tolist(), shown, strict=True)
        )


def default_filter(clean: bool) -> str:
    """Name of the filter to take where none is named, with or without clean examples at hand."""
    return "scan" if clean else "spectral-signatures"


def filter_data(
    model: str | Path | nn.Module,
    data: Any,
    *,
    method: Filter | str | None = None,
    clean: Any = None,
    out: str | Path | None = None,
    limit: int | None = None,
    max_unreadable: float = 0.01,
    model_options: ModelOptions | None = None,
    options: RunOptions | None = None,
    report: Told | None = None,
    **settings: Any,
) -> Filtered:
    """Which examples of a training set are poisoned, seen through a model that was trained on it?

    The model comes back as it was. The images are unpacked to disk and read a few at a time.

    Args:
        model: Any module that maps ``(B, C, H, W)`` to ``(B, K)`` logits, or the path of a model file or folder.
        data: The training set: what :func:`bezoar.io.untrusted.open_untrusted` reads, or what it gave.
        method: A filter with its settings, or its name; None is ``default_filter(clean is not None)``.
        clean: Clean images with labels, for the methods that need some.
        out: Folder to write suspects, positions to keep, contact sheet and report to.
        limit: Look at so many examples at most, as many of each label as there are.
        max_unreadable: Share of the images that may be unreadable, in [0, 1); they are left out.
        model_options: How to read the model.
        options: Seed, budget, device; ``images`` bounds the clean ones.
        report: Told of progress: phase, steps done, steps in all, a note.
        **settings: Fields of ``model_options`` and ``options`` by name.

    Raises:
        BezoarError: Model, data or settings cannot be used; the message says what to do.
    """
    method = default_filter(clean is not None) if method is None else method
    found = find("filters", method)() if isinstance(method, str) else method
    model_options, options = divided(settings, model_options or ModelOptions(), options or RunOptions())
    job = _Job(model, data, found, clean, limit, max_unreadable, model_options, options, report)
    with job.prepared() as (suspect, examples, run):
        made = job.look(suspect, examples, run)
    if out is not None:
        made.save(out)
    return made


@dataclass
class _Job:
    model: str | Path | nn.Module
    source: Any
    method: Filter
    clean: Any
    limit: int | None
    max_unreadable: float
    model_options: ModelOptions
    options: RunOptions
    report: Told | None
    seconds: dict[str, float] = field(default_factory=dict)
    clean_facts: DataFacts | None = None

    @contextmanager
    def prepared(self) -> Iterator[tuple[Suspect, UntrustedData, Run]]:
        """Model and data in hand; on the way out the caller's module and threads are as they were."""
        device, threads = device_named(self.options.device), torch.get_num_threads()
        if self.options.threads:
            torch.set_num_threads(self.options.threads)
        own = self.model if isinstance(self.model, nn.Module) else None
        home = None if own is None else next((p.device for p in own.parameters()), None)
        modes = [] if own is None else [(m, m.training) for m in own.modules()]
        started = time.monotonic()
        try:
            suspect, examples = self._timed("load", self._load)
            suspect.module.to(device)
            progress = Progress() if self.report is None else Progress(report=self.report)
            yield suspect, examples, Run(self.options.seed, device, self.options.budget, progress, started=started)
        finally:
            torch.set_num_threads(threads)
            for module, mode in modes:
                module.training = mode
            if own is not None and home is not None:
                own.to(home)

    def _load(self) -> tuple[Suspect, UntrustedData]:
        options = self.model_options
        if size_is_open(self.model, options):
            options = sized_by(self._shape(), self.model, options)
        suspect = load_model(self.model, **{f.name: getattr(options, f.name) for f in dataclasses.fields(ModelOptions)})
        if isinstance(self.source, UntrustedData):
            return suspect, self.source
        facts = suspect.facts
        return suspect, open_untrusted(
            self.source,
            (facts.height, facts.width),
            facts.channels,
            num_classes=facts.num_classes,
            limit=self.limit,
            seed=self.options.seed,
            max_unreadable=self.max_unreadable,
            report=self.report,
        )

    def _shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the first image that can be read."""
        if isinstance(self.source, UntrustedData):
            return self.source.shape
        opened = open_source(train_and_test(self.source)[0], Wanted())
        for picture in opened.pictures(np.arange(len(opened.labels), dtype=np.int64)):
            if isinstance(picture, Picture):
                height, width, channels = picture.pixels.shape
                return channels, height, width
        raise DataError(f"{opened.path} holds no image that can be read", "Give images with labels")

    def look(self, suspect: Suspect, examples: UntrustedData, run: Run) -> Filtered:
        """Run the method, and describe what it found."""
        clean = self._clean(suspect)
        acc = _fit(suspect.module, examples, run, warn=self.method.through_model)
        folder = self._folder(suspect, examples) if self.options.resume else None
        run.progress.folder = folder
        found = self._timed("filter", lambda: self.method(suspect.module, examples, run, clean))
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        report = self._described(suspect, examples, found, run, acc)
        return Filtered(report, examples, found.score, found.suspect, self.options.seed)

    def _clean(self, suspect: Suspect) -> Clean | None:
        if self.clean is None:
            return None
        facts = suspect.facts
        data = load_data(
            self.clean,
            num_classes=facts.num_classes,
            size=(facts.height, facts.width),
            channels=facts.channels,
            limit=self.options.images,
            seed=self.options.seed,
            least=1,
        )
        self.clean_facts = data.facts
        return Clean(data.x, data.y, data.x[:0], data.y[:0], facts.num_classes)

    def _folder(self, suspect: Suspect, examples: UntrustedData) -> Path:
        """Where a killed run of this model and data finds its features; methods share them."""
        key = json.dumps([suspect.facts.sha256, examples.sha256, str(suspect.facts), __version__, torch.__version__])
        return cache_folder() / "filters" / hashlib.sha256(key.encode()).hexdigest()[:32]

    def _timed(self, name: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        try:
            return work()
        finally:
            self.seconds[name] = round(time.perf_counter() - start, 3)

    def _described(
        self, suspect: Suspect, examples: UntrustedData, found: Suspicion, run: Run, acc: float
    ) -> FilterReport:
        return FilterReport(
            verdict=_verdict(found),
            method=method_name(type(self.method)),
            config=self.method.config() | {"seed": self.options.seed},
            rule=found.rule,
            model=suspect.facts,
            data=examples.facts,
            clean=self.clean_facts,
            acc=acc,
            count=len(examples),
            suspects=int(found.suspect.sum()),
            labels=_labels(examples, found),
            notes=dict(run.notes),
            warnings=(*suspect.warnings, *_of_data(examples), *run.warnings),
            run=run.facts(self.seconds, versions()),
        )


def _fit(model: nn.Module, examples: UntrustedData, run: Run, warn: bool) -> float:
    """Share of a sample that the model gives its label; a bad fit is told where it matters."""
    rows = torch.linspace(0, len(examples) - 1, min(_SAMPLE, len(examples))).long()
    acc = float((answers(model, Subset(examples, rows), run.device) == examples.labels[rows]).double().mean())
    if warn and acc < max(0.5, 2 / examples.num_classes):
        run.warnings.append(
            f"the model gives only {acc:.0%} of the examples their label: was it trained on this data? Filters look "
            "through a model that was; check its normalisation too (--mean, --std)"
        )
    return acc


def _of_data(examples: UntrustedData) -> tuple[str, ...]:
    notes = list(examples.notes)
    if examples.unreadable:
        notes.append(f"{len(examples.unreadable)} images could not be read and were left out")
    if examples.empty:
        notes.append(f"labels without any example: {', '.join(map(str, examples.empty[:10]))}")
    if len(examples.conflicts):
        notes.append(f"the pixels of {len(examples.conflicts)} examples stand under more than one label")
    return tuple(notes)


def _verdict(found: Suspicion) -> Verdict:
    if found.flagged:
        return "backdoored"
    return "clean" if found.decides else "inconclusive"


def _labels(examples: UntrustedData, found: Suspicion) -> tuple[LabelFindings, ...]:
    counts = torch.bincount(examples.labels, minlength=examples.num_classes).tolist()
    suspects = torch.bincount(examples.labels[found.suspect], minlength=examples.num_classes).tolist()
    made = [
        LabelFindings(
            label=label,
            name=examples.names[label],
            count=counts[label],
            suspects=suspects[label],
            statistic=found.statistic.get(label),
            flagged=label in (found.flagged or ()),
        )
        for label in range(examples.num_classes)
    ]

    def order(one: LabelFindings) -> tuple[bool, float]:
        return not one.flagged, float("inf") if one.statistic is None else -one.statistic

    return tuple(sorted(made, key=order))
