"""Plant a backdoor in a network and write down everything about it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import safetensors.torch
import torch
from torch import nn

from bezoar.attacks._attack import Attack, Backdoored, Plant, Training
from bezoar.attacks._in_batch import carried
from bezoar.attacks._poison import Poisoned
from bezoar.attacks._store import NUMBERS, TEXT, save_truth
from bezoar.core.errors import BezoarError, DataError, MissingExtra, ModelError, SettingError
from bezoar.core.examples import Examples
from bezoar.core.registry import method_name
from bezoar.core.results import write_atomic
from bezoar.core.run import Run
from bezoar.core.surgery import logits
from bezoar.evaluation.export import examples_sheet, export_images, export_npz
from bezoar.evaluation.measures import Measures, measure
from bezoar.evaluation.record import PlantFacts, Record
from bezoar.evaluation.splits import Splits
from bezoar.evaluation.stealth import Stealth, stealth
from bezoar.io.arch import resolve
from bezoar.io.containers import sha256
from bezoar.ops.fit import Recipe, as_float

Export = Literal["npz", "images"]

RECORD, MODEL, INDEX, SHEET = "record.json", "model.safetensors", "index.json", "examples.png"
EXPORTS: dict[Export, str] = {"npz": "poisoned.npz", "images": "poisoned"}
_SEEN = 1000  # test images that visibility is measured on
_WEAK = 0.8


@runtime_checkable
class Poisons(Protocol):
    """An attack whose victim trains on a poisoned data set like any other."""

    seed: int

    def poison(self, data: Examples, training: Training | None = None) -> Poisoned:
        """The poisoned data set."""


@dataclass(frozen=True, kw_only=True)
class Victim:
    """What to train.

    Attributes:
        attack: What is planted.
        splits: Training and test images.
        arch: Architecture, see :func:`bezoar.io.arch.resolve`.
        recipe: How to train; see :func:`default_recipe`.
        clean_twin: Also train the same net on the clean data.
        export: Also write the poisoned training set.
        devices: How many devices share each batch, where the attack leaves the training alone.
    """

    attack: Attack
    splits: Splits
    arch: str
    recipe: Recipe
    clean_twin: bool = False
    export: Export | None = None
    devices: int = 1

    def build(self) -> nn.Module:
        """The network, with first weights from torch's global generator.

        Raises:
            ModelError: It does not take images of this size.
        """
        data = self.splits.train
        channels, height, width = data.shape
        network = resolve(self.arch).build(data.num_classes, channels, (height, width))
        try:
            with torch.no_grad():
                found = logits(network.eval(), as_float(data.x[:2])).shape[1]
        except BezoarError:
            raise
        except Exception as error:  # any network may be named, and it may raise anything
            reason = (str(error).splitlines() or [""])[0][:160]
            message = f"{self.arch} does not take images of shape {data.shape}: {reason}"
            raise ModelError(message, "Choose another --arch, or --size and --channels that it takes") from None
        if found != data.num_classes:
            raise ModelError(f"{self.arch} gives {found} labels, the data has {data.num_classes}", "Check --arch")
        return network

    def key(self, seed: int, versions: Mapping[str, str]) -> str:
        """Hash over all that decides the outcome."""
        code = Path(self.arch.rpartition(":")[0])
        settings = self.attack.config()
        parts = [
            method_name(type(self.attack)),
            settings,
            [_contents(value) for value in settings.values() if isinstance(value, str)],  # pictures, folders of them
            self.arch,
            hashlib.sha256(code.read_bytes()).hexdigest() if code.suffix == ".py" and code.is_file() else "",
            dataclasses.asdict(self.recipe),
            self.devices,  # each sees a share of the batch, so BatchNorm gives other weights
            seed,
            self.splits.train_facts.sha256,
            self.splits.test_facts.sha256,
            dict(versions),
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def check(self) -> None:
        """Refuse what could only fail after the training.

        Raises:
            SettingError: The target is no label of the data, or the attack cannot work with these settings.
            ModelError: The network does not take the images.
        """
        classes = self.splits.train.num_classes
        if self.attack.target >= classes:
            raise SettingError(f"target {self.attack.target} is no label of the data", f"Give one in 0..{classes - 1}")
        self.attack.check(self.build().eval(), self.splits.train.shape)


def default_recipe(network: nn.Module, **given: Any) -> Recipe:
    """A recipe that trains most networks: SGD at 0.1 where there are batch statistics, else Adam at 1e-3.

    Args:
        network: To be trained.
        **given: Settings that are known already; None stands for unknown.

    Raises:
        SettingError: A setting is out of range.
    """
    known = {name: value for name, value in given.items() if value is not None}
    normalised = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules())
    optimizer = known.setdefault("optimizer", "sgd" if normalised else "adam")
    adam = optimizer == "adam"
    known.setdefault("lr", 1e-3 if adam else 0.1 if normalised else 0.01)
    known.setdefault("weight_decay", 0.0 if adam else 5e-4)
    try:
        return Recipe(**known)
    except ValueError as error:
        raise SettingError(str(error)) from None


def implant(victim: Victim, out: Path, run: Run, versions: Mapping[str, str]) -> Record:
    """Train a victim and write all about it into a folder.

    A killed run goes on from ``out/.checkpoints``, with the same final weights; a victim that is there already is not
    trained again. ``record.json`` is written last: where it is, everything that it names is.

    Args:
        victim: What to train.
        out: Folder to write to.
        run: Device, seed and progress.
        versions: Of the software, for the record.

    Raises:
        BezoarError: Settings, data and network do not go together.
    """
    key = victim.key(run.seed, versions)
    earlier = _earlier(out, key)
    if earlier is not None and _serves(victim, earlier):
        return earlier
    if earlier is not None and earlier.clean_twin is not None:
        victim = dataclasses.replace(victim, clean_twin=True)  # what is there must not get lost
    victim.check()
    return _Work(victim, out, run, key, dict(versions)).done()


def _earlier(out: Path, key: str) -> Record | None:
    """The record of an earlier run of the same training, if all that it names is still there."""
    try:
        record = Record.from_json((out / RECORD).read_text(encoding="utf-8"))
        whole = all(_sha256(out / name) == digest for name, digest in record.files.items())
    except (OSError, UnicodeDecodeError, DataError):
        return None
    return record if record.key == key and whole else None


def _serves(victim: Victim, record: Record) -> bool:
    exported = victim.export is None or EXPORTS[victim.export] in record.files
    return exported and (not victim.clean_twin or record.clean_twin is not None)


@dataclass
class _Work:
    victim: Victim
    out: Path
    run: Run
    key: str
    versions: dict[str, str]
    seconds: dict[str, float] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def done(self) -> Record:
        """All steps."""
        victim = self.victim
        folder = self.out / ".checkpoints" / self.key[:32]
        training = Training(victim.build, victim.recipe, self.run, folder, victim.devices)
        with self.phase("train"):
            backdoored = victim.attack(victim.splits.train, training)
        twin = None
        if victim.clean_twin:
            with self.phase("clean twin"):
                twin = training.fit("clean-twin", victim.splits.train)
        _require_finite(backdoored.model)
        test = victim.splits.test
        with self.phase("measure"):
            found = measure(backdoored.model, test.x, test.y, backdoored.truth)
            of_twin = None if twin is None else measure(twin, test.x, test.y, backdoored.truth)
            plants = tuple(self._plant(plant) for plant in backdoored.truth.plants)
        self._judge(found, of_twin)
        with self.phase("write"):
            self._write(backdoored, training)
        record = self._record(backdoored, found, of_twin, plants)
        write_atomic(self.out / RECORD, record.to_json())
        return record

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the wall time of a phase."""
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 3)

    def _plant(self, plant: Plant) -> PlantFacts:
        labels = plant.labels
        one = labels.kind == "all-to-one"
        return PlantFacts(
            name=plant.name,
            trigger=type(plant.trigger).__name__,
            label_map=labels.kind,
            target=labels.target if one else None,
            sources=labels.sources,
            stealth=self._stealth(plant),
        )

    def _stealth(self, plant: Plant) -> Stealth | None:
        test = self.victim.splits.test
        x = test.x[plant.labels.applies(test.y)]
        if not len(x):
            return None
        try:
            return stealth(x[torch.linspace(0, len(x) - 1, min(_SEEN, len(x))).round().long()], plant.trigger)
        except MissingExtra as error:
            self.warnings.append(f"visibility was not measured: {error.message}")
            return None

    def _judge(self, found: Measures, twin: Measures | None) -> None:
        chance = 1 / self.victim.splits.train.num_classes
        if found.acc.low < 2 * chance:
            self.warnings.append(
                f"ACC is near that of guessing ({chance:.1%}): the victim has not learned, and its ASR says nothing"
            )
        for plant in found.plants:
            if plant.asr.value < _WEAK:
                self.warnings.append(
                    f"the backdoor is weak, with an ASR of {plant.asr.value:.1%} ({plant.name}): "
                    "defences will look better than they are"
                )
        if twin is not None and twin.acc.value - found.acc.value > 0.02:
            self.warnings.append("ACC is more than 2 points below that of the clean twin: the victim is conspicuous")

    def _write(self, backdoored: Backdoored, training: Training) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / RECORD).unlink(missing_ok=True)  # it would vouch for files of another run
        test = self.victim.splits.test
        state = {
            k: v.detach().cpu().clone(memory_format=torch.contiguous_format)
            for k, v in backdoored.model.state_dict().items()
        }
        write_atomic(self.out / MODEL, safetensors.torch.save(state))
        save_truth(backdoored.truth, self.out)
        write_atomic(self.out / INDEX, self._index(backdoored))
        write_atomic(self.out / SHEET, examples_sheet(test.x, test.y, backdoored.truth))
        self.files = {name: _sha256(self.out / name) for name in (MODEL, TEXT, NUMBERS, INDEX, SHEET)}
        for name in EXPORTS.values():  # of another run
            path = self.out / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        if self.victim.export is not None:
            name = EXPORTS[self.victim.export]
            data = _poisoned(self.victim.attack, backdoored, self.victim.splits.train, training)
            if self.victim.export == "npz":
                export_npz(data, self.victim.splits.names, self.out / name)
            else:
                export_images(data, self.out / name)
            self.files[name] = _sha256(self.out / name)

    def _index(self, backdoored: Backdoored) -> str:
        splits = self.victim.splits
        positions = splits.train_positions.tolist()
        found = {
            "schema": "bezoar.index/1",
            "count": len(positions),
            "poisoned": backdoored.index.tolist(),
            "cover": backdoored.cover.tolist(),
            "afresh": backdoored.afresh,
            "train_positions": None if splits.whole else positions,
            "test_positions": None if splits.test_positions is None else splits.test_positions.tolist(),
        }
        return json.dumps(found) + "\n"

    def _record(
        self, backdoored: Backdoored, found: Measures, twin: Measures | None, plants: tuple[PlantFacts, ...]
    ) -> Record:
        victim = self.victim
        return Record(
            attack=method_name(type(victim.attack)),
            config=victim.attack.config(),
            arch=victim.arch,
            parameters=sum(p.numel() for p in backdoored.model.parameters()),
            recipe=dataclasses.asdict(victim.recipe),
            seed=self.run.seed,
            shape=victim.splits.train.shape,
            train=victim.splits.train_facts,
            test=victim.splits.test_facts,
            poisoned=len(backdoored.index),
            cover=len(backdoored.cover),
            afresh=backdoored.afresh,
            plants=plants,
            measures=found,
            figures=backdoored.truth.figures,
            clean_twin=twin,
            files=self.files,
            warnings=(*victim.splits.notes, *self.warnings),
            key=self.key,
            run=self.run.facts(self.seconds, self.versions),
        )


def _require_finite(model: nn.Module) -> None:
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise ModelError(f"the training diverged: {name} is not finite", "Lower --lr")


def _poisoned(attack: Attack, backdoored: Backdoored, data: Examples, training: Training) -> Examples:
    """The training set that the victim saw, made again under the random state that the attack itself had; for an attack
    on batches, one that a victim might have seen.
    """
    if not isinstance(attack, Poisons):
        return carried(data, backdoored)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(attack.seed)
        return attack.poison(data, training).data


def _contents(value: str) -> str:
    """Hash of the file, or of the files in the folder, that a setting names; empty where it names none."""
    path = Path(value)
    if not value or not path.exists():
        return ""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return hashlib.sha256("".join(_sha256(p) for p in files).encode()).hexdigest()


def _sha256(path: Path) -> str:
    return "" if path.is_dir() else sha256(path)
