"""The verb ``guard``: protect a model that is in use, and write model and guard as one."""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from bezoar.api import Result, _scan, _scanner, _triggers_to_unlearn
from bezoar.core.errors import DataError, SettingError
from bezoar.core.guarded import GuardFacts, GuardReport, Latency, Policy
from bezoar.core.guarding import FittedGuard, Guard, Threshold, pixels, threshold
from bezoar.core.method import Scanner
from bezoar.core.plain import plain
from bezoar.core.registry import find, method_name
from bezoar.core.results import write_atomic
from bezoar.core.run import Report as Told
from bezoar.core.run import generator
from bezoar.core.surgery import LogProbabilities, frozen, logits
from bezoar.core.trigger import InvertedTrigger
from bezoar.guarded import DriftWatch, GuardedModel
from bezoar.io.exported import export_program, write_onnx, write_program
from bezoar.io.models import load_model
from bezoar.ops.stats import wilson
from bezoar.options import ModelOptions, RunOptions, divided
from bezoar.session import Session, open_session, size_is_open, sized_by

_RUNS = 7
_PROBES = 4  # images of noise that tell whether a guard belongs to a model
_OUTPUTS = ("logits", "score", "flag")
_Z95 = 1.959964
_LARGEST = 1 << 26  # values of an image


@dataclass(frozen=True)
class Guarded:
    """A guard that is ready to use.

    Attributes:
        fitted: What it learned, and the model, shared with the caller.
        facts: Its threshold, and what that rests on.
        report: All there is to say about the fit; None for a guard that was loaded.
        examples: ``(2, C, H, W)`` images that an exported model is checked with.
    """

    fitted: FittedGuard
    facts: GuardFacts
    report: GuardReport | None
    examples: Tensor

    def score(self, x: Tensor) -> Tensor:
        """``(N,)`` scores of ``(N, C, H, W)`` images, uint8 or in [0, 1]; higher for more suspicious."""
        return self.fitted.score(x)

    def flags(self, x: Tensor) -> Tensor:
        """``(N,)`` whether an image is flagged."""
        return self.score(x) > torch.tensor(self.facts.threshold)

    def model(self) -> GuardedModel:
        """Model and guard as one module; the model in it is a copy."""
        return GuardedModel(self.fitted, self.facts.threshold, self.facts.num_classes, self.facts.safe_label)

    def watch(self, window: int = 1000, alpha: float = 0.001) -> DriftWatch:
        """Watches whether the share of flagged inputs stays what it was calibrated to."""
        return DriftWatch(self.facts.low, self.facts.high, window, alpha)

    def save(self, folder: str | Path, *, onnx: bool = False, program: bool = False) -> Guarded:
        """Write ``guard.safetensors``, ``guard.json`` and ``report.json``; reading them runs no code.

        Args:
            folder: Where to.
            onnx: Also write model and guard as ``guarded.onnx``.
            program: Also write model and guard as ``guarded.pt2``, a program of ``torch.export``.

        Returns:
            The same, whose report names the files.

        Raises:
            ModelError: The model cannot be exported, or answers differently afterwards.
            MissingExtra: A library for ONNX is missing.
        """
        folder, files = Path(folder), dict[str, float]()
        module = self.model().cpu() if onnx or program else None
        if module is not None:
            x = self.examples.cpu()
            exported = export_program(module, x)
            if program:
                files["guarded.pt2"] = write_program(exported, module, x, folder / "guarded.pt2")
            if onnx:
                files["guarded.onnx"] = write_onnx(exported, module, x, folder / "guarded.onnx", _OUTPUTS)
        fitted = self.fitted
        tensors = {f"state.{name}": value.cpu().contiguous() for name, value in fitted.state.items()}
        tensors |= {"held": fitted.held, **{f"probe.{n}": v for n, v in _probe(fitted).items()}}
        write_atomic(folder / "guard.safetensors", save(tensors))
        write_atomic(folder / "guard.json", self.facts.to_json())
        if self.report is None:
            return self
        report = dataclasses.replace(self.report, files=files)
        write_atomic(folder / "report.json", report.to_json())
        return dataclasses.replace(self, report=report)


def guard(
    model: str | Path | nn.Module,
    data: Any,
    *,
    method: Guard | str = "mahalanobis",
    fpr: float = 0.05,
    scanner: Scanner | str | None = None,
    found: Result | None = None,
    label: int | None = None,
    policy: Policy = "flag",
    safe_label: int | None = None,
    out: str | Path | None = None,
    onnx: bool = False,
    program: bool = False,
    model_options: ModelOptions | None = None,
    options: RunOptions | None = None,
    report: Told | None = None,
    **settings: Any,
) -> Guarded:
    """Protect a model that is in use: score each input, and flag those that are likely to carry a trigger.

    The model comes back as it was. A method that needs a trigger scans first. Only clean images are looked at.

    Args:
        model: Any module that maps ``(B, C, H, W)`` to ``(B, K)`` logits, or the path of a model file or folder.
        data: Clean images with labels, of the kind that the model will see; half of them only set the threshold.
        method: A guard with its settings, or its name.
        fpr: Share of clean inputs that it may flag, in (0, 1); it needs ``1 / fpr - 1`` held-out images.
        scanner: What finds the trigger, where the method needs one; see ``method`` of :func:`bezoar.scan`.
        found: Result of an earlier scan, so that none is needed.
        label: Use the inverted trigger of this label, whatever the verdict.
        policy: ``flag`` leaves the answer to a flagged input as it is, ``label`` makes it ``safe_label``.
        safe_label: The label of a flagged input, with ``policy="label"``.
        out: Folder to write the guard to.
        onnx, program: See :meth:`Guarded.save`.
        model_options: How to read the model.
        options: Clean images, seed, budget, device.
        report: Told of progress: phase, steps done, steps in all, a note.
        **settings: Fields of ``model_options`` and ``options`` by name, and of the scanner.

    Raises:
        BezoarError: Model, data or settings cannot be used; the message says what to do.
    """
    made = find("guards", method)() if isinstance(method, str) else method
    if (policy == "label") != (safe_label is not None):
        raise SettingError("policy 'label' and a safe label go together", "Give both, or neither")
    if (onnx or program) and out is None:
        raise SettingError("an exported model needs a folder", "Give out")
    search, model_options, options = divided(
        settings, _scanner(scanner), model_options or ModelOptions(), options or RunOptions()
    )
    least = 2 if made.needs_triggers and found is None else 1
    with open_session(model, data, model_options, options, report, least) as session:
        _check_safe(safe_label, session.clean.num_classes)
        threshold(torch.zeros(len(session.clean.held_x)), fpr)  # too few images are better told before the work
        triggers = _triggers(session, made, search, found, label)
        with session.phase("guard"):
            fitted = made(session.suspect.module, session.clean, session.run, triggers)
            limit = fitted.threshold(fpr)
        facts = _facts(session, fitted, limit, policy, safe_label)
        with session.phase("latency"):
            latency = measure_latency(fitted, facts)
        session.run.warnings += _warnings(fitted, limit)
        whole = GuardReport(
            guard=facts,
            model=session.suspect.facts,
            data=session.data.facts,
            preflight=session.preflight,
            triggers=tuple(triggers),
            latency=latency,
            notes=dict(session.run.notes),
            warnings=(*session.warnings, *session.run.warnings),
            run=session.facts(),
        )
        result = Guarded(fitted, facts, whole, _examples(session))
        return result if out is None else result.save(out, onnx=onnx, program=program)


def load_guard(folder: str | Path, model: str | Path | nn.Module, **settings: Any) -> Guarded:
    """Read back what ``bezoar guard --out`` wrote, for the same model.

    Reading runs no code that came with the files.

    Args:
        folder: Where the guard is.
        model: The model that it was fitted to; a module is shared, not copied.
        **settings: How to read the model, fields of :class:`bezoar.options.ModelOptions` by name.

    Raises:
        DataError: The folder holds no guard, or a damaged one.
        SettingError: The guard was fitted to another model.
    """
    folder = Path(folder)
    try:
        facts = GuardFacts.from_json((folder / "guard.json").read_text(encoding="utf-8"))
        tensors = load((folder / "guard.safetensors").read_bytes())
        if len(facts.shape) != 3 or min(facts.shape) < 1 or math.prod(facts.shape) > _LARGEST:
            raise ValueError(f"images of shape {facts.shape}")
    except (OSError, UnicodeDecodeError, SafetensorError, KeyError, ValueError) as error:
        raise DataError(f"{folder} does not hold a guard: {error}", "Give the folder of bezoar guard --out") from None
    (options,) = divided(settings, ModelOptions())
    channels, height, width = facts.shape
    if size_is_open(model, options):
        options = sized_by((channels, height, width), model, options)
    modes = [(m, m.training) for m in model.modules()] if isinstance(model, nn.Module) else []
    try:
        suspect = load_model(model, **{f.name: getattr(options, f.name) for f in dataclasses.fields(ModelOptions)})
        module = LogProbabilities(suspect.module).eval() if facts.softmax else suspect.module
        fitted = _fitted(facts, tensors, module, (channels, height, width))
    finally:
        for part, mode in modes:
            part.training = mode
    return Guarded(fitted, facts, None, _noise(fitted.shape)[:2])


def _fitted(
    facts: GuardFacts, tensors: dict[str, Tensor], module: nn.Module, shape: tuple[int, int, int]
) -> FittedGuard:
    config = {name: tuple(value) if isinstance(value, list) else value for name, value in facts.config.items()}
    state = {name.removeprefix("state."): value for name, value in tensors.items() if name.startswith("state.")}
    try:
        method: Guard = find("guards", facts.method)(**config)
        fitted = FittedGuard(method, module, state, shape, tensors["held"])
        found = _probe(fitted)
        same = all(_close(value, tensors[f"probe.{name}"]) for name, value in found.items())
    except (KeyError, IndexError, TypeError, RuntimeError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"the guard is damaged or of another model: {first}", "Run bezoar guard again") from None
    if not same:
        raise SettingError("the guard was fitted to another model: its answers differ", "Run bezoar guard again")
    return fitted


def _close(found: Tensor, kept: Tensor) -> bool:
    scale = float(kept.abs().max().clamp(min=1))
    return found.shape == kept.shape and float((found - kept).abs().max()) <= 1e-2 * scale


def _noise(shape: tuple[int, int, int]) -> Tensor:
    return torch.rand(_PROBES, *shape, generator=generator("probes of a guard"))


def _probe(fitted: FittedGuard) -> dict[str, Tensor]:
    """What model and guard make of noise: nothing of anyone's data, and other for another model."""
    device = next((p.device for p in fitted.model.parameters()), torch.device("cpu"))
    x = _noise(fitted.shape)
    with frozen(fitted.model), torch.no_grad():
        answers = logits(fitted.model, x.to(device)).float().cpu()
    return {"logits": answers.contiguous()}


def measure_latency(fitted: FittedGuard, facts: GuardFacts, runs: int = _RUNS) -> Latency:
    """Median time for one image: of the model alone, and of model and guard."""
    together = GuardedModel(fitted, facts.threshold, facts.num_classes, facts.safe_label)
    device = together.threshold.device
    x = _noise(fitted.shape)[:1].to(device)
    taken: tuple[list[float], list[float]] = ([], [])
    with torch.no_grad():
        for run in range(runs + 1):  # in turn, so that a busy machine slows both
            for one, seconds in zip((together.model, together), taken, strict=True):
                elapsed = _seconds(one, x)
                if run:  # the first one warms up
                    seconds.append(elapsed)
    return Latency(bare=median(taken[0]), guarded=median(taken[1]), batch=1, runs=runs)


def _seconds(module: nn.Module, x: Tensor) -> float:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    start = time.perf_counter()
    module(x)
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return max(time.perf_counter() - start, 1e-9)


def _triggers(
    session: Session, method: Guard, search: Scanner, found: Result | None, label: int | None
) -> dict[int, InvertedTrigger]:
    if found is not None and found.report.model.sha256 != session.suspect.facts.sha256:
        raise SettingError("the scan is of another model: the hashes differ", "Scan this model first")
    if not method.needs_triggers:
        if label is not None:
            raise SettingError(f"{type(method).__name__} needs no trigger, so it takes no label", "Leave it out")
        return {}
    if found is None:
        if len(session.data) < 2 * session.clean.num_classes:
            raise SettingError("a scan needs two images for each class", "Give more images, or a scan with --scan")
        found = _scan(session, search)
    if label is None and found.target is None and found.verdict == "clean":
        raise SettingError(
            f"the scan found no backdoor, so there is no trigger that {type(method).__name__} could watch for",
            "Use --label N for the trigger of a label all the same, or a guard that needs none, such as mahalanobis",
        )
    triggers, _ = _triggers_to_unlearn(found, label)
    if label is None and found.target is None:
        used = next(iter(triggers))
        session.run.warnings.append(
            f"the scan was inconclusive: the trigger of its smallest label, {used}, is used, and may be no backdoor's"
        )
    return triggers


def _check_safe(safe_label: int | None, num_classes: int) -> None:
    if safe_label is not None and not 0 <= safe_label < num_classes:
        raise SettingError(f"the safe label must be in 0 to {num_classes - 1}, got {safe_label}")


def _facts(
    session: Session, fitted: FittedGuard, limit: Threshold, policy: Policy, safe_label: int | None
) -> GuardFacts:
    low, high = wilson(limit.flagged / limit.count, limit.count, _Z95)
    return GuardFacts(
        method=method_name(type(fitted.method)),
        config=plain(fitted.method.config()),
        shape=fitted.shape,
        num_classes=session.clean.num_classes,
        softmax=isinstance(fitted.model, LogProbabilities),
        threshold=limit.value,
        fpr=limit.fpr,
        count=limit.count,
        flagged=limit.flagged,
        low=max(0.0, low),
        high=min(1.0, high),
        policy=policy,
        safe_label=safe_label,
        model=session.suspect.facts.sha256,
    )


def _warnings(fitted: FittedGuard, limit: Threshold) -> list[str]:
    name, allowed = method_name(type(fitted.method)), int(limit.fpr * limit.count)
    if limit.value >= fitted.method.highest(fitted.state):
        return [f"{name} flags nothing: too many clean images reach its highest score; try another guard"]
    if limit.flagged < allowed / 2:
        return [
            f"clean images tie under {name}: it flags {limit.flagged} of {limit.count} where {allowed} were allowed, "
            "and misses the more; try another guard"
        ]
    return []


def _examples(session: Session) -> Tensor:
    return pixels(torch.cat([session.clean.held_x[:2], session.clean.x[:2]])[:2].cpu())
