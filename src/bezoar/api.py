"""The verbs of the library: scan and purify."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from bezoar.aftercare import aftercare
from bezoar.core.errors import DataError, SettingError
from bezoar.core.method import Clean, Purifier, Scanner, tried_on
from bezoar.core.registry import find, method_name
from bezoar.core.results import Cleaning, LayerChange, Report, write_atomic
from bezoar.core.run import Report as Told
from bezoar.core.scored import Verdict
from bezoar.core.trigger import InvertedTrigger, Trigger, trigger_of, trigger_tensors
from bezoar.evidence import scorers
from bezoar.io.containers import sha256
from bezoar.io.models import save_model
from bezoar.io.suspects import read_suspects
from bezoar.ops.answers import answers
from bezoar.options import ModelOptions, RunOptions, divided
from bezoar.report.html import render
from bezoar.report.sarif import to_sarif
from bezoar.scanners.neural_cleanse import NeuralCleanse
from bezoar.scanning import scan_session
from bezoar.session import PURIFY_HELD_OUT, Session, open_session


@dataclass(frozen=True)
class Result:
    """What a scan found.

    Attributes:
        report: All of it, as plain values.
        triggers: Inverted trigger of each label, the smallest over the seeds: masks and patterns, or additive changes
            where that search leads the report.
    """

    report: Report
    triggers: dict[int, InvertedTrigger]

    @property
    def verdict(self) -> Verdict:
        """``clean``, ``backdoored`` or ``inconclusive``."""
        assert self.report.verdict is not None
        return self.report.verdict

    @property
    def target(self) -> int | None:
        """The attacker's label, or None."""
        return self.report.target

    def __repr__(self) -> str:
        return f"Result(verdict={self.verdict!r}, target={self.target!r}, triggers of {len(self.triggers)} labels)"

    def save(self, folder: str | Path) -> Path:
        """Write ``report.json``, ``report.html``, ``report.sarif`` and ``triggers.safetensors``.

        Returns:
            The HTML report.
        """
        folder = Path(folder)
        tensors = {
            f"{label}.{name}": tensor
            for label, trigger in self.triggers.items()
            for name, tensor in trigger_tensors(trigger).items()
        }
        write_atomic(folder / "triggers.safetensors", save(tensors))
        return save_report(self.report, folder)


def load_result(folder: str | Path) -> Result:
    """Read back what :meth:`Result.save` wrote.

    Raises:
        DataError: The folder does not hold a scan.
    """
    folder = Path(folder)
    try:
        report = Report.from_json((folder / "report.json").read_text(encoding="utf-8"))
        tensors = load((folder / "triggers.safetensors").read_bytes())
        parts: dict[int, dict[str, Tensor]] = {}
        for name, tensor in sorted(tensors.items()):
            label, _, field = name.partition(".")
            parts.setdefault(int(label), {})[field] = tensor
        triggers = {label: trigger_of(fields) for label, fields in sorted(parts.items())}
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise DataError(f"{folder} does not hold a scan: {error}", "Give the folder of bezoar scan --out") from None
    if report.verdict is None or not triggers:
        raise DataError(f"{folder} does not hold a scan", "Give the folder of bezoar scan --out")
    return Result(report, triggers)


def save_report(report: Report, folder: Path) -> Path:
    """Write ``report.json``, ``report.sarif`` and ``report.html``; give the path of the last."""
    write_atomic(folder / "report.json", report.to_json())
    write_atomic(folder / "report.sarif", to_sarif(report))
    write_atomic(folder / "report.html", render(report))
    return folder / "report.html"


def scan(
    model: str | Path | nn.Module,
    data: Any,
    *,
    method: Scanner | str | None = None,
    model_options: ModelOptions | None = None,
    options: RunOptions | None = None,
    report: Told | None = None,
    **settings: Any,
) -> Result:
    """Is this model backdoored, and for which label?

    The model comes back as it was.

    Args:
        model: Any module that maps ``(B, C, H, W)`` to ``(B, K)`` logits, or the path of a model file or folder.
        data: Clean images with labels: a path, ``(x, y)`` arrays or tensors, a ``Dataset`` or a ``DataLoader``. Pixels
            are raw: uint8, or float in [0, 1] before any normalisation.
        method: A scanner with its settings, or its name; Neural Cleanse by default, which alone has the search for
            faint changes beside it.
        model_options: How to read the model.
        options: Clean images, seed, budget, device.
        report: Told of progress: phase, steps done, steps in all, a note.
        **settings: Fields of the three by name, such as ``arch``, ``mean``, ``seeds``, ``budget`` or ``threads``.

    Raises:
        BezoarError: Model, data or settings cannot be used; the message says what to do.
    """
    made, model_options, options = divided(
        settings, _scanner(method), model_options or ModelOptions(), options or RunOptions()
    )
    scorers(options.evidence)  # a wrong name is told before the work
    with open_session(model, data, model_options, options, report) as session:
        return _scan(session, made)


def purify(
    model: str | Path | nn.Module,
    data: Any,
    *,
    method: Purifier | str = "auto",
    scanner: Scanner | str | None = None,
    found: Result | None = None,
    label: int | Literal["all"] | None = None,
    suspects: tuple[Any, Any] | None = None,
    out: str | Path | None = None,
    rescan: bool = False,
    model_options: ModelOptions | None = None,
    options: RunOptions | None = None,
    report: Told | None = None,
    **settings: Any,
) -> tuple[nn.Module, Report]:
    """Give back a clean model.

    A method that needs a trigger, or does better with one, scans first. The caller's model comes back as it was.

    Args:
        model: See :func:`scan`.
        data: See :func:`scan`.
        method: A purifier with its settings, or its name.
        scanner: What finds the triggers, where the method wants some; see ``method`` of :func:`scan`.
        found: Result of an earlier scan, so that none is needed.
        label: Unlearn the inverted trigger of this label, whatever the verdict; ``all`` for those of all labels, where
            most are infected and none stands out.
        suspects: Training examples to unlearn, for ``abl-unlearn``: images and the labels that they came with, or a
            list of :func:`bezoar.filter_data` and the data that it is about.
        out: Folder to write the cleaned model to, in the format that was read; the report goes beside it.
        rescan: Scan the cleaned model as well; the verdict stands in ``cleaning.aftercare``.
        model_options: See :func:`scan`.
        options: See :func:`scan`.
        report: See :func:`scan`.
        **settings: Fields of ``model_options`` and ``options`` by name, and of the scanner.

    Returns:
        The new module in eval mode, and the report, whose ``cleaning`` says what changed. For a module it is one of the
        same class that takes what the original takes; for a path it takes raw pixels in [0, 1].

    Raises:
        BezoarError: Model, data or settings cannot be used, or there is no trigger to unlearn.
    """
    purifier = find("purifiers", method)() if isinstance(method, str) else method
    search, model_options, options = divided(
        settings, _scanner(scanner), model_options or ModelOptions(), options or RunOptions()
    )
    least = 2 if purifier.needs_triggers and found is None else 1
    with open_session(model, data, model_options, options, report, least) as session:
        if found is not None and found.report.model.sha256 != session.suspect.facts.sha256:
            raise SettingError("the scan is of another model: the hashes differ", "Scan this model first")
        triggers: dict[int, InvertedTrigger] = {}
        warnings: tuple[str, ...] = ()
        if found is None and (purifier.needs_triggers or purifier.wants_scan):
            if len(session.data) >= 2 * session.clean.num_classes:
                found = _scan(session, search)
            else:
                session.run.warnings.append("with fewer than two images for each class, the model is not scanned first")
        if found is not None and (purifier.needs_triggers or found.verdict == "backdoored" or label is not None):
            triggers, warnings = _triggers_to_unlearn(found, label)
        clean = dataclasses.replace(session.to_purify(), suspects=_suspects(session, purifier, suspects))
        module, network, cleaning = _purify(
            session,
            purifier,
            clean,
            triggers,
            None if out is None else Path(out),
            search if rescan else None,
            _source(found, triggers),
        )
        warnings = (*warnings, *session.run.warnings)
        cleaned = network if isinstance(model, nn.Module) else module
        whole = _purified_report(session, found, cleaning, warnings)
    if out is not None:
        write_atomic(Path(out) / "changes.json", _changes(cleaning))
        if found is None:
            save_report(whole, Path(out))
        else:
            Result(whole, found.triggers).save(out)
    return cleaned, whole


def _scanner(given: Scanner | str | None) -> Scanner:
    """The scanner that is meant, if a verdict can rest on it."""
    made = NeuralCleanse() if given is None else find("scanners", given)() if isinstance(given, str) else given
    if not isinstance(made, Scanner):
        raise SettingError(f"a scanner or its name is needed, got {type(made).__name__}")
    if not made.alone:
        raise SettingError(
            f"a verdict cannot rest on {type(made).__name__} alone",
            "It runs beside the usual scanner; additive=False leaves it out",
        )
    return made


def _scan(session: Session, method: Scanner) -> Result:
    report, triggers = scan_session(session, method)
    return Result(report, triggers)


def _triggers_to_unlearn(
    found: Result, label: int | Literal["all"] | None
) -> tuple[dict[int, InvertedTrigger], tuple[str, ...]]:
    if label == "all":
        first = found.report.triggers[0].label  # the one that before and after are measured of
        return {one: found.triggers[one] for one in sorted(found.triggers, key=lambda n: (n != first, n))}, ()
    if label is not None:
        if label not in found.triggers:
            raise SettingError(f"the scan has no trigger of label {label}", f"There are: {sorted(found.triggers)}")
        other = () if found.target in (None, label) else (f"the scan suspects label {found.target}, not {label}",)
        return {label: found.triggers[label]}, other
    if found.target is not None:
        named = {found.target} | {s.target for s in found.report.searches if s.target is not None}
        return {label: found.triggers[label] for label in sorted(named, key=lambda n: n != found.target)}, ()
    if found.verdict == "clean":
        raise SettingError(
            "the scan found no backdoor, so there is no trigger to unlearn",
            "Use --label N to unlearn the trigger of a label all the same, or --method finetune",
        )
    leader = found.report.triggers[0].label
    warning = f"the scan was inconclusive: the trigger of its smallest label, {leader}, was unlearned"
    return {leader: found.triggers[leader]}, (warning,)


def _source(found: Result | None, triggers: dict[int, InvertedTrigger]) -> int | None:
    """Label of the images that the first of these triggers was made for; None for those of all other labels."""
    if found is None or not triggers:
        return None
    shown = (*found.report.triggers[:1], *(one for search in found.report.searches for one in search.triggers[:1]))
    return next((one.source for one in shown if one.label == next(iter(triggers))), None)


def _suspects(session: Session, purifier: Purifier, given: tuple[Any, Any] | None) -> tuple[Tensor, Tensor] | None:
    if given is None or isinstance(given[0], Tensor):
        return given
    facts = session.suspect.facts
    return read_suspects(
        *given,
        size=(facts.height, facts.width),
        channels=facts.channels,
        num_classes=facts.num_classes,
        most=getattr(purifier, "most", None),
    )


def _purify(
    session: Session,
    purifier: Purifier,
    clean: Clean,
    triggers: dict[int, InvertedTrigger],
    out: Path | None,
    rescan: Scanner | None,
    source: int | None,
) -> tuple[nn.Module, nn.Module, Cleaning]:
    """Clean a copy; ``source`` is the label of the images that the first trigger is made for, where not all others."""
    suspect = session.suspect
    # Copied together, so that the network inside the new module is the very one that is written back.
    module, network = copy.deepcopy((suspect.module, suspect.network))
    before = {k: v.detach().cpu().clone() for k, v in network.state_dict().items()}
    with session.phase("clean"):
        purifier(module, clean, session.run, triggers)
    label, trigger = next(iter(triggers.items()), (None, None))
    x, y = clean.held_x, clean.held_y
    if not len(x):
        x, y = clean.x, clean.y
        note = "no class has two images, so none is held out: the rates are of the images that were trained on"
        session.run.warnings.append(note)
    acc = [_accuracy(m, x, y, session) for m in (suspect.module, module)]
    asr: list[float | None] = [None, None]
    if trigger is not None and label is not None:
        tried = x[tried_on(y, label, source)]
        asr = [_success(m, trigger, label, tried, session) for m in (suspect.module, module)]
    cared = aftercare(session, module, clean, label, trigger, rescan, source)
    module.cpu()
    written = None if out is None else save_model(suspect, network, out)
    module.to(session.home)
    cleaning = Cleaning(
        method=method_name(type(purifier)),
        config=purifier.config(),
        target=label,
        acc_before=acc[0],
        acc_after=acc[1],
        asr_before=asr[0],
        asr_after=asr[1],
        held_out=len(x),
        output="" if written is None else str(written),
        sha256="" if written is None or not written.is_file() else sha256(written),
        layers=_layer_changes(before, network.state_dict()),
        aftercare=cared,
        notes=dict(session.run.notes),
    )
    return module, network, cleaning


@torch.no_grad()
def _accuracy(model: nn.Module, x: Tensor, y: Tensor, session: Session) -> float:
    return float((answers(model, x, session.run.device) == y).float().mean())


def _success(model: nn.Module, trigger: Trigger, label: int, x: Tensor, session: Session) -> float | None:
    return _accuracy(model, trigger(x), torch.full((len(x),), label), session) if len(x) else None


def _layer_changes(before: dict[str, Tensor], after: dict[str, Tensor]) -> tuple[LayerChange, ...]:
    rows = []
    for name, old in before.items():
        if not old.is_floating_point():
            continue
        difference = (after[name].detach().cpu() - old).norm()
        rows.append(LayerChange(name=name, relative=float(difference / old.norm().clamp(min=1e-12))))
    return tuple(sorted(rows, key=lambda row: -row.relative))


def _purified_report(session: Session, found: Result | None, cleaning: Cleaning, warnings: Sequence[str]) -> Report:
    if found is not None:
        same_run = found.report.run.seconds | session.seconds
        scanned = found.report.run
        run = dataclasses.replace(
            session.facts(),
            seconds=same_run,
            image_gradients=scanned.image_gradients,
            budget=scanned.budget,
            budget_spent=scanned.budget_spent or session.run.budget_spent,
        )
        kept = (*found.report.warnings, *warnings)
        return dataclasses.replace(found.report, cleaning=cleaning, warnings=kept, run=run)
    return Report(
        verdict=None,
        target=None,
        summary="",
        model=session.suspect.facts,
        data=session.data.facts,
        preflight=session.preflight,
        method=cleaning.method,
        config=cleaning.config | session.division(PURIFY_HELD_OUT),
        cleaning=cleaning,
        warnings=(*session.warnings, *warnings),
        run=session.facts(),
    )


def _changes(cleaning: Cleaning) -> str:
    return json.dumps(dataclasses.asdict(cleaning), indent=1) + "\n"
