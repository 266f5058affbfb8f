"""One cell: the defender's images, the purification through the front door, and the truth at the end."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bezoar.api import Result, load_result, purify, scan
from bezoar.bench.grid import Cell, Grid, needs_scan
from bezoar.bench.victims import Ready
from bezoar.core.cell import CellResult
from bezoar.core.errors import BezoarError, DataError
from bezoar.core.method import Purifier
from bezoar.core.registry import method_name
from bezoar.core.run import Report
from bezoar.evaluation.measures import Measures, der, measure
from bezoar.evaluation.splits import Splits, stratified
from bezoar.io.models import load_model

_MEASURED = 0.5  #: Share of the test images that measures; the defender's are drawn from the rest.


@dataclass(frozen=True)
class Bench:
    """What all cells share."""

    grid: Grid
    splits: Splits
    scans: Path
    device: str
    threads: int
    versions: Mapping[str, str]
    report: Report | None = None
    known: dict[Path, Measures] = field(default_factory=dict)  # of victims as they were, by their file

    def defenders_images(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """Clean images of the defender: test images, as many of each class, that nothing is measured on."""
        x, y = self.splits.test.x, self.splits.test.y
        pool, _ = stratified(y, _MEASURED, 0)
        order = pool[torch.randperm(len(pool), generator=torch.Generator().manual_seed(1000 + seed))]
        classes = self.splits.test.num_classes
        each = max(1, count // classes)
        rows = torch.cat([order[y[order] == label][:each] for label in range(classes)])
        if len(rows) < each * classes:
            raise DataError(f"the test images do not hold {count} for the defender", "Lower [grid] images")
        return x[rows], y[rows]

    def measured(self, model: nn.Module, ready: Ready) -> Measures:
        """ACC, ASR and RA on the other test images."""
        test = self.splits.test
        _, rows = stratified(test.y, _MEASURED, 0)
        return measure(model, test.x[rows], test.y[rows], ready.truth, num_classes=test.num_classes)

    def before(self, ready: Ready) -> Measures:
        """The measures of a victim as it was, taken once."""
        if ready.model not in self.known:
            self.known[ready.model] = self.measured(load_model(ready.model, **self._model(ready)).module, ready)
        return self.known[ready.model]

    def run(self, cell: Cell, key: str, ready: Ready) -> CellResult:
        """Measure one cell; what a method refuses or breaks on is a result as well."""
        spec, facts = cell.purifier, self._facts(cell, key, ready)
        images = self.defenders_images(cell.images, cell.seed)
        before = self.before(ready)
        figures = _figures(before, before)
        found = None
        try:
            if needs_scan(spec.purifier):
                found = self._scan(cell, ready, images)
        except BezoarError as error:
            if spec.purifier.needs_triggers:
                return CellResult(**facts, **figures, status="refused", error=f"no scan: {error}")
        best: CellResult | None = None
        for purifier in spec.candidates():
            one = self._one(facts, ready, images, purifier, found, before, cell.seed)
            if best is None or _merit(one) > _merit(best):
                best = one
        assert best is not None
        return best

    def _one(
        self,
        facts: dict[str, Any],
        ready: Ready,
        images: tuple[Tensor, Tensor],
        purifier: Purifier,
        found: Result | None,
        before: Measures,
        seed: int,
    ) -> CellResult:
        facts = facts | {"config": purifier.config()}
        module = load_model(ready.model, **self._model(ready)).module
        start, cpu = time.perf_counter(), time.process_time()
        spent: dict[str, Any] = {"scan_seconds": None if found is None else sum(found.report.run.seconds.values())}
        try:
            with _gradients_counted(module) as count:
                cleaned, report = purify(
                    module, images, method=purifier, found=found, report=self.report, **self._settings(seed)
                )
        except BezoarError as error:
            return CellResult(**facts, **_figures(before, before), **spent, status="refused", error=str(error))
        except Exception as error:  # one method's fault must not end a night's grid
            return CellResult(**facts, **spent, status="failed", error=f"{type(error).__name__}: {error}"[:500])
        spent |= {"seconds": round(time.perf_counter() - start, 3), "cpu_seconds": round(time.process_time() - cpu, 3)}
        assert report.cleaning is not None
        return CellResult(
            **facts,
            **_figures(before, self.measured(cleaned, ready)),
            **spent,
            status="done",
            image_gradients=count[0],
            notes=report.cleaning.notes,
            warnings=report.warnings,
        )

    def _scan(self, cell: Cell, ready: Ready, images: tuple[Tensor, Tensor]) -> Result:
        settings = {**self._settings(cell.seed), **self.grid.scan}
        parts = [str(ready.model.resolve()), cell.images, settings, dict(self.versions)]
        folder = self.scans / hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
        try:
            return load_result(folder)
        except DataError:
            module = load_model(ready.model, **self._model(ready)).module
            result = scan(module, images, report=self.report, **settings)
            result.save(folder)
            return result

    def _model(self, ready: Ready) -> dict[str, Any]:
        channels, height, width = self.splits.test.shape
        classes = self.splits.test.num_classes
        return {"arch": ready.arch, "num_classes": classes, "size": (height, width), "channels": channels}

    def _settings(self, seed: int) -> dict[str, Any]:
        return {"seed": seed, "device": self.device, "threads": self.threads, "images": 10**9}

    def _facts(self, cell: Cell, key: str, ready: Ready) -> dict[str, Any]:
        return {
            "key": key,
            "victim": cell.victim.name,
            "attack": ready.attack,
            "arch": ready.arch,
            "data": self.grid.data,
            "purifier": cell.purifier.name,
            "method": method_name(type(cell.purifier.purifier)),
            "config": cell.purifier.purifier.config(),
            "oracle": cell.purifier.oracle is not None,
            "images": cell.images,
            "seed": cell.seed,
            "versions": dict(self.versions),
        }


def failed(bench: Bench, cell: Cell, key: str, error: Exception) -> CellResult:
    """A cell whose victim could not be had."""
    ready = Ready(Path(), cell.victim.arch, cell.victim.attack, None)
    return CellResult(**bench._facts(cell, key, ready), status="failed", error=f"{type(error).__name__}: {error}"[:500])


def _figures(before: Measures, after: Measures) -> dict[str, Any]:
    """Of several triggers, the one that works best counts."""
    found: dict[str, Any] = {"acc_before": before.acc.value, "acc_after": after.acc.value}
    if before.plants:
        for name, one in (("before", before), ("after", after)):
            found[f"asr_{name}"] = max(p.asr.value for p in one.plants)
            found[f"ra_{name}"] = min(p.ra.value for p in one.plants)
        found["der"] = der(acc=(found["acc_before"], found["acc_after"]), asr=(found["asr_before"], found["asr_after"]))
    return found


def _merit(one: CellResult) -> float:
    if one.status == "failed":
        return -2.0
    assert one.acc_after is not None
    return one.acc_after - 1 if one.der is None else one.der


@contextmanager
def _gradients_counted(module: nn.Module) -> Iterator[list[int]]:
    """Images that the model, or a copy of it, sees with gradients switched on."""
    count = [0]

    def told(_: nn.Module, given: tuple[Any, ...]) -> None:
        if torch.is_grad_enabled() and given and isinstance(given[0], Tensor):
            count[0] += len(given[0])

    handle = module.register_forward_pre_hook(told)
    try:
        yield count
    finally:
        handle.remove()
