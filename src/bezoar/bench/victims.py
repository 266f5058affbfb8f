"""The nets of a grid: trained where they are missing, read where they are there."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from bezoar.attacks._attack import Training
from bezoar.bench.grid import CLEAN, Grid, VictimSpec
from bezoar.core.errors import DataError
from bezoar.core.fields import fields_from
from bezoar.core.registry import find
from bezoar.core.results import write_atomic
from bezoar.core.run import Run
from bezoar.evaluation.implant import MODEL, RECORD, Victim, default_recipe, implant
from bezoar.evaluation.record import Record
from bezoar.evaluation.splits import Splits, read_splits
from bezoar.evaluation.truth import GroundTruth, load_truth
from bezoar.io.arch import resolve
from bezoar.ops.recipe import Recipe

_CLEAN_FACTS = "clean.json"


@dataclass(frozen=True)
class Ready:
    """A victim in hand.

    Attributes:
        model: Its weights, a bare state dict.
        arch: Its architecture.
        attack: Registry name, or ``none``.
        truth: What was planted; None for a clean net.
    """

    model: Path
    arch: str
    attack: str
    truth: GroundTruth | None


def splits_of(grid: Grid) -> Splits:
    """Training and test images of a grid."""
    size = None if grid.size is None else (grid.size, grid.size)
    return read_splits(grid.data, grid.test, size=size, channels=grid.channels, limit=grid.train_images)


def prepare(spec: VictimSpec, splits: Splits, folder: Path, run: Run, versions: Mapping[str, str]) -> Ready:
    """Train a victim, or read it where it is already there.

    Args:
        spec: Which.
        splits: The grid's data.
        folder: Of all victims.
        run: Device and progress; its seed is that of the victim.
        versions: Of the software.

    Raises:
        BezoarError: Settings, data and network do not go together.
    """
    if spec.folder:
        return _given(Path(spec.folder), splits)
    recipe = _recipe(spec, splits)
    if spec.attack == CLEAN:
        return _clean(spec, splits, recipe, folder / spec.name, run, versions)
    kind = find("attacks", spec.attack)
    settings: dict[str, Any] = fields_from(kind, spec.attack, "[[victim]] settings", spec.settings)
    attack = kind(**{"seed": spec.seed, **settings})
    record = implant(
        Victim(attack=attack, splits=splits, arch=spec.arch, recipe=recipe), folder / spec.name, run, versions
    )
    return Ready(folder / spec.name / MODEL, record.arch, record.attack, load_truth(folder / spec.name))


def _given(folder: Path, splits: Splits) -> Ready:
    try:
        record = Record.from_json((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{folder} holds no victim: {error}", "Give a folder of bezoar attack --out") from None
    if record.test.sha256 != splits.test_facts.sha256:
        raise DataError(
            f"the victim in {folder} was measured on other images than the data of this grid",
            "Give its data in [grid], with the same size and channels",
        )
    return Ready(folder / MODEL, record.arch, record.attack, load_truth(folder))


def _recipe(spec: VictimSpec, splits: Splits) -> Recipe:
    channels, height, width = splits.train.shape
    with torch.random.fork_rng(devices=[]):
        network = resolve(spec.arch).build(splits.train.num_classes, channels, (height, width))
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in spec.recipe}
    return default_recipe(network, **given)


def _clean(
    spec: VictimSpec, splits: Splits, recipe: Recipe, folder: Path, run: Run, versions: Mapping[str, str]
) -> Ready:
    data = splits.train
    parts = [spec.arch, dataclasses.asdict(recipe), spec.seed, splits.train_facts.sha256, dict(versions)]
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    facts, model = folder / _CLEAN_FACTS, folder / MODEL
    if not (facts.is_file() and model.is_file() and json.loads(facts.read_text())["key"] == key):
        channels, height, width = data.shape
        training = Training(
            lambda: resolve(spec.arch).build(data.num_classes, channels, (height, width)),
            recipe,
            run,
            folder / ".checkpoints" / key[:32],
        )
        network = training.fit("clean", data)
        weights = {k: v.detach().cpu().contiguous() for k, v in network.state_dict().items()}
        write_atomic(model, safetensors.torch.save(weights))
        write_atomic(facts, json.dumps({"key": key}) + "\n")
    return Ready(model, spec.arch, CLEAN, None)
