"""The verb ``train``: a clean model from training data that nobody vouches for."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from bezoar.core.errors import BezoarError, ModelError, SettingError
from bezoar.core.examples import Subset
from bezoar.core.filtering import Suspicion
from bezoar.core.method import Clean
from bezoar.core.pictures import thumbnails
from bezoar.core.registry import find, method_name
from bezoar.core.results import write_atomic
from bezoar.core.run import Progress, Run
from bezoar.core.run import Report as Told
from bezoar.core.surgery import frozen, logits
from bezoar.core.trained import Accuracy, CurvePoint, DataFindings, LabelShare, Spread, TrainReport
from bezoar.core.training import Trained, Trainer
from bezoar.io.arch import resolve
from bezoar.io.containers import sha256
from bezoar.io.data import CleanData, load_data
from bezoar.io.suspects import ranked_csv, suspects_csv
from bezoar.io.untrusted import UntrustedData, open_untrusted
from bezoar.ops.answers import answers
from bezoar.ops.augment import as_float
from bezoar.ops.stats import wilson
from bezoar.report.trained import Picture, render_training
from bezoar.session import device_named
from bezoar.version import versions

MODEL, SUSPECTS, RECORD, PAGE = "model.safetensors", "suspects.csv", "report.json", "report.html"
_Z95 = 1.959963984540054  # 95 % of a normal distribution lie within this many standard deviations
_PICTURES, _SIDE, _LISTED = 96, 64, 10
_CLEAN = 1000  # most clean examples that are read


@dataclass(frozen=True)
class TrainResult:
    """A trained model, and what was found on the way.

    Attributes:
        model: In eval mode; takes ``(B, C, H, W)`` in [0, 1].
        report: All that was found, as plain values.
        data: The training set.
        suspects: ``(S,)`` positions of the isolated examples in the data as it came, most suspicious first.
        losses: ``(E + 1, N)`` loss of each example before and after each of the first epochs, or None.
    """

    model: nn.Module
    report: TrainReport
    data: UntrustedData
    suspects: Tensor
    losses: Tensor | None = field(repr=False)


def train(
    data: Any,
    arch: str | Callable[[], nn.Module],
    out: str | Path,
    *,
    method: Trainer | str = "abl",
    clean: Any = None,
    test_data: Any = None,
    size: tuple[int, int] | None = None,
    channels: int | None = None,
    num_classes: int | None = None,
    limit: int | None = None,
    max_unreadable: float = 0.01,
    seed: int = 0,
    budget: float | None = None,
    device: str = "auto",
    threads: int = 0,
    report: Told | None = None,
) -> TrainResult:
    """Train a clean model on data that nobody vouches for.

    A killed run goes on from ``out/.checkpoints`` when it is called again, with the same final weights.

    Args:
        data: The training set: what :func:`bezoar.io.untrusted.open_untrusted` reads, or what it gave.
        arch: Architecture by name, see :func:`bezoar.io.arch.resolve`; or what makes the network, freshly initialised.
        out: Folder for the model, the list of suspects and the report.
        method: A trainer with its settings, or its name.
        clean: A few clean images with labels, for the trainers that need some; other ones than ``test_data``.
        test_data: Clean images with labels to measure the accuracy on, for :func:`bezoar.io.data.load_data`.
        size: Height and width that all images are brought to.
        channels: 1 or 3, that all images are brought to.
        num_classes: Number of labels; by default what the data says.
        limit: Train on at most so many images, as many of each label as there are.
        max_unreadable: Share of the images that may be unreadable, in [0, 1); they are left out.
        seed: Root of all randomness.
        budget: Seconds allowed; a training that they do not suffice for ends with an error and can go on later.
        device: Such as cpu or cuda:0; auto takes CUDA where there is one.
        threads: CPU threads; 0 leaves it to torch.
        report: Told of progress: phase, steps done, steps in all, a note.

    Raises:
        BezoarError: Data, network or settings cannot be used; the message says what to do.
    """
    if threads < 0 or (budget is not None and budget <= 0):
        raise SettingError("threads must be at least 0, and budget above 0")
    if isinstance(arch, str):
        resolve(arch)  # before the data are read
    trainer = find("trainers", method)() if isinstance(method, str) else method
    trainer.require_clean(clean is not None)  # before the data are read
    where, before = device_named(device), torch.get_num_threads()
    progress = Progress() if report is None else Progress(report=report)
    run = Run(seed=seed, device=where, budget=budget, progress=progress, reserve=0.0)
    if threads:
        torch.set_num_threads(threads)
    try:
        start = time.perf_counter()
        opened = (
            data
            if isinstance(data, UntrustedData)
            else open_untrusted(
                data,
                size,
                channels,
                num_classes=num_classes,
                limit=limit,
                seed=seed,
                max_unreadable=max_unreadable,
                folder=Path(out),
                report=report,
            )
        )
        known = None if clean is None else _known(clean, opened, _CLEAN, seed)
        test = None if test_data is None else _known(test_data, opened)
        work = _Work(opened, known, test, arch, trainer, Path(out), run)
        work.seconds["read"] = round(time.perf_counter() - start, 3)
        return work.done()
    finally:
        torch.set_num_threads(before)


def _known(source: Any, data: UntrustedData, limit: int | None = None, seed: int = 0) -> CleanData:
    depth, height, width = data.shape
    return load_data(
        source, num_classes=data.num_classes, size=(height, width), channels=depth, limit=limit, seed=seed, least=1
    )


@dataclass
class _Work:
    data: UntrustedData
    clean: CleanData | None
    test: CleanData | None
    arch: str | Callable[[], nn.Module]
    trainer: Trainer
    out: Path
    run: Run
    seconds: dict[str, float] = field(default_factory=dict)

    def done(self) -> TrainResult:
        """All steps."""
        with torch.random.fork_rng(devices=[]):
            self._network()  # what cannot work fails before the training
        start = time.perf_counter()
        folder, clean = self.out / ".checkpoints" / self._key()[:32], None
        if self.clean is not None:
            x, y = self.clean.x, self.clean.y
            clean = Clean(x, y, x[:0], y[:0], self.data.num_classes)
        trained = self.trainer(self._network, self.data, self.run, folder, clean)
        self.seconds["train"] = round(time.perf_counter() - start, 3)
        _require_finite(trained.model)
        report = self._described(trained)
        report = self._write(trained, report)
        return TrainResult(trained.model, report, self.data, self.data.origin[trained.suspects], trained.losses)

    @property
    def arch_name(self) -> str:
        """The architecture, for people."""
        return self.arch if isinstance(self.arch, str) else getattr(self.arch, "__qualname__", "network")

    def _network(self) -> nn.Module:
        """The network, with first weights from torch's global generator.

        Raises:
            ModelError: It does not take images of this size, or gives another number of labels.
        """
        channels, height, width = self.data.shape
        built = self.arch
        network = (
            resolve(built).build(self.data.num_classes, channels, (height, width))
            if isinstance(built, str)
            else built()
        )
        try:
            with frozen(network), torch.no_grad():
                labels = logits(network, as_float(self.data.take(torch.arange(2)))).shape[1]
        except BezoarError:
            raise
        except Exception as error:  # any network may be named, and it may raise anything
            reason = (str(error).splitlines() or [""])[0][:160]
            message = f"{self.arch_name} does not take images of shape {self.data.shape}: {reason}"
            raise ModelError(message, "Choose another --arch, or --size and --channels that it takes") from None
        if labels != self.data.num_classes:
            message = f"{self.arch_name} gives {labels} labels, the data has {self.data.num_classes}"
            raise ModelError(message, "Check --arch and --num-classes")
        return network

    def _key(self) -> str:
        """Hash over all that decides the outcome."""
        code = Path(self.arch_name.rpartition(":")[0])
        parts = [
            method_name(type(self.trainer)),
            self.trainer.config(),
            self.arch_name,
            hashlib.sha256(code.read_bytes()).hexdigest() if code.suffix == ".py" and code.is_file() else "",
            self.data.sha256,
            self.data.num_classes,
            None if self.clean is None else self.clean.facts.sha256,
            self.run.seed,
            {name: value for name, value in versions().items() if name in ("bezoar", "torch")},
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _described(self, trained: Trained) -> TrainReport:
        start = time.perf_counter()
        isolated = torch.zeros(len(self.data), dtype=torch.bool)
        isolated[trained.suspects] = True
        acc = None if self.test is None else self._acc(trained.model, self.test.x, self.test.y)
        rest = Subset(self.data, (~isolated).nonzero().flatten())
        kept = self._acc(trained.model, rest, rest.labels)
        self.seconds["measure"] = round(time.perf_counter() - start, 3)
        return TrainReport(
            method=method_name(type(self.trainer)),
            config=self.trainer.config() | {"seed": self.run.seed},
            arch=self.arch_name,
            parameters=sum(p.numel() for p in trained.model.parameters()),
            shape=self.data.shape,
            data=self.data.facts,
            findings=findings(self.data),
            test=None if self.test is None else self.test.facts,
            acc=acc,
            kept_acc=kept,
            suspects=len(trained.suspects),
            labels=_labels(self.data, isolated, trained.suspicion),
            rule=None if trained.suspicion is None else trained.suspicion.rule,
            clean=None if self.clean is None else self.clean.facts,
            curve=curve(trained.losses, isolated),
            notes=dict(self.run.notes),
            warnings=tuple(self.run.warnings),
            run=self.run.facts(self.seconds, versions()),
        )

    def _acc(self, model: nn.Module, images: Tensor | Subset, labels: Tensor) -> Accuracy:
        count = len(labels)
        value = int((answers(model, images, self.run.device) == labels).sum()) / count
        low, high = wilson(value, count, _Z95)
        return Accuracy(value=value, low=max(0.0, low), high=min(1.0, high), count=count)

    def _write(self, trained: Trained, report: TrainReport) -> TrainReport:
        """All files; the report, which vouches for the others, comes last."""
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / RECORD).unlink(missing_ok=True)
        state = {
            name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, value in trained.model.state_dict().items()
        }
        write_atomic(self.out / MODEL, safetensors.torch.save(state))
        write_atomic(self.out / SUSPECTS, self._suspects(trained))
        files = {name: sha256(self.out / name) for name in (MODEL, SUSPECTS)}
        report = TrainReport(**{**vars(report), "files": files})
        write_atomic(self.out / PAGE, render_training(report, self._pictures(trained), str(self.out / MODEL)))
        write_atomic(self.out / RECORD, report.to_json())
        return report

    def _suspects(self, trained: Trained) -> str:
        data, values = self.data, trained.ranked_by
        rows = [
            (int(data.origin[row]), data.name(row), int(data.labels[row]), value)
            for row, value in zip(trained.suspects.tolist(), values, strict=True)
        ]
        if trained.suspicion is not None:
            return suspects_csv(rows)
        return ranked_csv((*row[:3], rank, row[3]) for rank, row in enumerate(rows, start=1))

    def _pictures(self, trained: Trained) -> tuple[Picture, ...]:
        rows = trained.suspects[:_PICTURES]
        if not len(rows):
            return ()
        shown = thumbnails(as_float(self.data.take(rows)), _SIDE)
        return tuple(
            Picture(
                position=int(self.data.origin[row]),
                name=self.data.name(row),
                label=self.data.names[int(self.data.labels[row])],
                value=value,
                png=image,
            )
            for row, image, value in zip(rows.tolist(), shown, trained.ranked_by, strict=False)
        )


def findings(data: UntrustedData) -> DataFindings:
    """What is odd about a training set, with some examples of each."""
    twice, conflicts = data.duplicates, data.conflicts
    first = data.first[twice[:_LISTED]].tolist()
    return DataFindings(
        unreadable=len(data.unreadable),
        unreadable_examples=tuple(f"{one.where}: {one.reason}" for one in data.unreadable[:_LISTED]),
        duplicates=len(twice),
        duplicate_examples=tuple(
            f"{data.name(row)} is {data.name(earlier)}"
            for row, earlier in zip(twice[:_LISTED].tolist(), first, strict=True)
        ),
        conflicts=len(conflicts),
        conflict_examples=tuple(
            f"{data.name(row)} is labelled {data.names[int(data.labels[row])]}"
            for row in conflicts[data.first[conflicts].argsort(stable=True)][:_LISTED].tolist()
        ),
        empty=data.empty,
        notes=data.notes,
    )


def curve(losses: Tensor | None, isolated: Tensor) -> tuple[CurvePoint, ...]:
    """Quantiles of the losses ``(E + 1, N)`` of the isolated examples, a mask ``(N,)``, and of the rest."""
    if losses is None or not isolated.any() or isolated.all():
        return ()
    return tuple(
        CurvePoint(epoch=epoch, isolated=_spread(row[isolated]), rest=_spread(row[~isolated]))
        for epoch, row in enumerate(losses)
        if bool(row.isfinite().all())
    )


def _spread(values: Tensor) -> Spread:
    ordered = values.sort().values  # torch's quantile takes 16 million values at most
    low, median, high = (float(ordered[round(share * (len(ordered) - 1))]) for share in (0.1, 0.5, 0.9))
    return Spread(low=low, median=median, high=high)


def _labels(data: UntrustedData, isolated: Tensor, suspicion: Suspicion | None) -> tuple[LabelShare, ...]:
    suspects = torch.bincount(data.labels[isolated], minlength=data.num_classes).tolist()
    statistic = {} if suspicion is None else suspicion.statistic
    flagged = () if suspicion is None else suspicion.flagged or ()
    made = [
        LabelShare(
            label=label,
            name=data.names[label],
            count=count,
            suspects=suspects[label],
            statistic=statistic.get(label),
            flagged=label in flagged,
        )
        for label, count in enumerate(data.facts.per_class)
    ]
    return tuple(sorted(made, key=lambda one: (-one.suspects, -(one.statistic or 0.0), one.label)))


def _require_finite(model: nn.Module) -> None:
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise ModelError(f"the training diverged: {name} is not finite", "Lower the learning rate: --set lr=0.01")
