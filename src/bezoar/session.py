"""What scan and purify share: model and data in hand, checked, divided and described."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bezoar.core.cluster import check_address
from bezoar.core.errors import DataError, SettingError
from bezoar.core.exec import executor
from bezoar.core.method import Clean
from bezoar.core.model import Suspect
from bezoar.core.results import Preflight, RunFacts
from bezoar.core.run import Progress, Report, Run
from bezoar.core.surgery import LogProbabilities, frozen, gives_probabilities
from bezoar.io.data import CleanData, load_data
from bezoar.io.datasets import cache_folder
from bezoar.io.models import load_model
from bezoar.io.preflight import check_preflight, preflight
from bezoar.nets.registry import find, takes_any_size
from bezoar.ops.verdict import CALIBRATED_LABELS, RatioRule
from bezoar.options import ModelOptions, RunOptions
from bezoar.version import __version__, versions

#: Shares of the clean images that only measure.
SCAN_HELD_OUT, PURIFY_HELD_OUT = 0.5, 0.2


@dataclass
class Session:
    """Model and data in hand; :func:`open_session` makes it and puts everything back afterwards."""

    suspect: Suspect
    data: CleanData
    clean: Clean  # divided for a scan
    preflight: Preflight
    warnings: tuple[str, ...]
    run: Run
    options: RunOptions
    home: torch.device  # where the caller's module was
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the wall time of a phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - start, 3)

    def facts(self) -> RunFacts:
        """What differs from run to run."""
        return self.run.facts(self.seconds, versions())

    def to_purify(self) -> Clean:
        """The clean images divided for a purification, which needs most of them to train on."""
        share = self.options.held_out or PURIFY_HELD_OUT
        return _divide(self.data, self.clean.num_classes, share, self.options.seed)

    def division(self, share: float) -> dict[str, Any]:
        """How the clean images were divided, as settings; ``share`` is the usual one."""
        return {"seed": self.options.seed, "held_out": self.options.held_out or share}

    def checkpoints(self, method: Any) -> Path | None:
        """Folder for checkpoints of this model, data, method and seed; None where none are kept."""
        if not self.options.resume:
            return None
        key = [
            self.suspect.facts.sha256,
            dataclasses.asdict(self.suspect.facts),
            self.data.facts.sha256,
            type(method).__name__,
            method.config(),
            self.options.seed,
            self.options.held_out or SCAN_HELD_OUT,
            __version__,
            torch.__version__,
        ]
        digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()
        return cache_folder() / "scans" / digest[:32]


@contextmanager
def open_session(
    model: str | Path | nn.Module,
    data: Any,
    model_options: ModelOptions,
    options: RunOptions,
    report: Report | None,
    least: int = 2,
) -> Iterator[Session]:
    """Load, check, move to the device; on the way out the caller's module and threads are as they were.

    Args:
        model, data: As the user gave them.
        model_options, options: How to read the model, and the means of the run.
        report: Told of progress.
        least: Fewest images for each class, on average; a scan needs 2.
    """
    started = time.monotonic()
    device = device_named(options.device)
    threads = torch.get_num_threads()
    if options.threads:
        torch.set_num_threads(options.threads)
    modes = [(m, m.training) for m in model.modules()] if isinstance(model, nn.Module) else []
    home = next((p.device for p in model.parameters()), None) if isinstance(model, nn.Module) else None
    suspect: Suspect | None = None
    ended = ExitStack()
    try:
        begun = time.perf_counter()
        check_address(options.ray)
        model_options = _sized_by_data(model, data, model_options, options)
        suspect = load_model(
            model, **{f.name: getattr(model_options, f.name) for f in dataclasses.fields(ModelOptions)}
        )
        facts = suspect.facts
        clean_data = load_data(
            data,
            num_classes=facts.num_classes,
            size=(facts.height, facts.width),
            channels=facts.channels,
            limit=options.images,
            seed=options.seed,
            least=least,
        )
        loaded = time.perf_counter()
        pool = ended.enter_context(
            executor(options.ray, cpus=torch.get_num_threads(), gpus=float(device.type == "cuda"))
        )
        connected = time.perf_counter()
        suspect.module.to(device)
        progress = Progress() if report is None else Progress(report=report)
        run = Run(
            seed=options.seed,
            device=device,
            budget=options.budget,
            progress=progress,
            started=started,
            executor=pool,
        )
        with frozen(suspect.module):
            if gives_probabilities(suspect.module, clean_data.x[:16].to(device)):
                note = "the model ends in a softmax: the logarithm of its output is used as logits"
                wrapped = LogProbabilities(suspect.module).eval()
                suspect = dataclasses.replace(suspect, module=wrapped, warnings=(*suspect.warnings, note))
            if report is not None:
                report("check", 0, 1, "accuracy on the clean images")
            measured = preflight(suspect.module, clean_data)
            warnings = check_preflight(measured, suspect.module, clean_data)
        session = Session(
            suspect,
            clean_data,
            _divide(clean_data, facts.num_classes, options.held_out or SCAN_HELD_OUT, options.seed),
            measured,
            (*suspect.warnings, *clean_data.notes, *warnings, *_uncalibrated(facts.num_classes)),
            run,
            options,
            home or torch.device("cpu"),
        )
        session.seconds["load"] = round(loaded - begun, 3)
        if options.ray:
            session.seconds["cluster"] = round(connected - loaded, 3)
        session.seconds["preflight"] = round(time.perf_counter() - connected, 3)
        yield session
    finally:
        ended.close()
        torch.set_num_threads(threads)
        for module, mode in modes:
            module.training = mode
        if home is not None and suspect is not None:
            suspect.module.to(home)


def _sized_by_data(
    model: str | Path | nn.Module, data: Any, model_options: ModelOptions, options: RunOptions
) -> ModelOptions:
    if not size_is_open(model, model_options):
        return model_options
    size = (model_options.size,) * 2 if isinstance(model_options.size, int) else model_options.size
    try:
        seen = load_data(
            data,
            num_classes=None,
            size=size,
            channels=model_options.channels,
            limit=options.images,
            seed=options.seed,
            least=1,
        )
    except DataError:
        if _own(model, model_options):
            raise
        return model_options  # of several sizes, for one: the usual size it is, and a true fault comes up again
    return sized_by(seen.shape, model, model_options)


def size_is_open(model: str | Path | nn.Module, model_options: ModelOptions) -> bool:
    """Whether the size of the input is that of the data, see :func:`sized_by`."""
    reference = model_options.size is None and takes_any_size(model_options.arch or "")
    told = model_options.size is not None and model_options.channels is not None
    return (_own(model, model_options) or reference) and not told


def sized_by(shape: tuple[int, int, int], model: str | Path | nn.Module, model_options: ModelOptions) -> ModelOptions:
    """What does not say which images it takes: their own size is the best guess, unless the user knows.

    That is a module of the user's own, and a reference net whose weights fit every size. For the latter, images that
    are much larger or smaller than it is made for are brought to its usual size.

    Args:
        shape: Channels, height and width of the images.
        model, model_options: As the user gave them.
    """
    channels, height, width = shape
    if not _own(model, model_options):
        usual = max(find(model_options.arch or "")[1])  # type: ignore[index]
        near = max(height, width, usual) <= 1.5 * min(height, width, usual)
        return dataclasses.replace(model_options, size=(height, width)) if near else model_options
    return dataclasses.replace(
        model_options, size=model_options.size or (height, width), channels=model_options.channels or channels
    )


def _own(model: str | Path | nn.Module, model_options: ModelOptions) -> bool:
    return isinstance(model, nn.Module) or ".py:" in (model_options.arch or "")


def _uncalibrated(num_classes: int) -> tuple[str, ...]:
    """Where the verdict rule was never measured."""
    if num_classes > CALIBRATED_LABELS:
        return (f"the verdict rule was calibrated with up to {CALIBRATED_LABELS} labels: beyond, it is extrapolated",)
    if num_classes < RatioRule.least_labels:
        return (f"with fewer than {RatioRule.least_labels} labels no verdict of backdoored is given: see the figures",)
    return ()


def _divide(data: CleanData, num_classes: int, held_out: float, seed: int) -> Clean:
    work, held = data.split(held_out, seed)
    return Clean(x=work.x, y=work.y, held_x=held.x, held_y=held.y, num_classes=num_classes)


def device_named(name: str) -> torch.device:
    """A device by name; ``auto`` takes CUDA where there is one.

    Raises:
        SettingError: It cannot be used.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SettingError(
            f"device {name!r} cannot be used: {str(error).splitlines()[0]}", "Try --device cpu"
        ) from None
    return device
