"""``bezoar attack``: plant a known backdoor, to measure the defences."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from bezoar.cli import _output
from bezoar.core.errors import SettingError
from bezoar.core.fields import fields_from

if TYPE_CHECKING:
    from bezoar.evaluation.measures import Measures
    from bezoar.evaluation.record import Record
    from bezoar.evaluation.stealth import Stealth


@dataclass(frozen=True, kw_only=True)
class RecipeFlags:
    """How the victim is trained.

    Args:
        epochs: Passes over the training images.
        batch: Examples per step.
        lr: Peak learning rate; by default 0.1 for a net with BatchNorm, and 0.001 with Adam.
        optimizer: sgd or adam; by default sgd for a net with BatchNorm, else adam.
        weight_decay: L2 penalty; 0.0005 by default, 0 with Adam.
        schedule: How the learning rate changes.
        pad: Random crops after padding by this many pixels.
        flip: Random horizontal flips.
    """

    epochs: int | None = None
    batch: int | None = None
    lr: float | None = None
    optimizer: Literal["sgd", "adam"] | None = None
    weight_decay: float | None = None
    schedule: Literal["constant", "cosine", "onecycle", "step"] | None = None
    pad: int | None = None
    flip: Annotated[bool, Parameter(negative="")] = False


@dataclass(frozen=True, kw_only=True)
class DataFlags:
    """How the images are read.

    Args:
        images: Most training images to use, as many of each class as there are.
        size: Height and width that all images are brought to, such as 64 or 55x47.
        channels: 1 or 3, that all images are brought to.
    """

    images: int | None = None
    size: str = ""
    channels: int | None = None


_RECIPE, _DATA = RecipeFlags(), DataFlags()
_Switch = Annotated[bool, Parameter(negative="")]


def attack(
    name: str,
    /,
    *,
    data: str,
    arch: str,
    out: Path,
    test: str | None = None,
    target: int | None = None,
    rate: float | None = None,
    set_: Annotated[tuple[str, ...], Parameter(name="--set", negative="")] = (),
    recipe_flags: Annotated[RecipeFlags, Parameter(name="*")] = _RECIPE,
    recipe: Annotated[tuple[str, ...], Parameter(negative="")] = (),
    data_flags: Annotated[DataFlags, Parameter(name="*")] = _DATA,
    clean_twin: _Switch = False,
    export: Literal["npz", "images"] | None = None,
    seed: int = 0,
    device: str = "auto",
    devices: int = 1,
    threads: int = 0,
    json: _Switch = False,
    quiet: _Switch = False,
) -> int:
    """Train a network with a known backdoor, as ground truth for the defences.

    Writes the model, the trigger, which examples were poisoned, ACC, ASR and RA, and a picture of the trigger. The
    attacks and their settings: bezoar methods.

    For instance:

        bezoar attack badnets --data cifar-10 --arch wrn-16-1 --target 5 --epochs 20 --pad 4 --flip --out victim/
        bezoar attack blend --data images/ --arch resnet-18 --size 32 --set alpha=0.1 --clean-twin --out victim/
        bezoar attack sig --data mnist --arch nc-mnist --epochs 5 --export npz --out victim/

    A killed command goes on where it stopped when it is given again; a victim that is there is not trained again.

    Args:
        name: Attack, such as badnets; see bezoar methods.
        data: Training images: a data set by name, see bezoar data list; a folder with one folder per class; an .npz
            with x and y, or with train_x, train_y, test_x and test_y; Parquet.
        arch: Architecture: a reference net such as wrn-16-1 or preactresnet-18, timm/NAME, torchvision/NAME, or
            file.py:function for your own code.
        out: Folder to write to.
        test: Test images; by default those that come with the data, or else a tenth of each class.
        target: Label that the trigger shall cause.
        rate: Poisoned share of the training images, for attacks that have one.
        set_: Another setting of the attack, such as --set pattern=noise.
        recipe: Another setting of the training, such as --recipe mixup=0.2.
        clean_twin: Also train the same net on the clean images, to compare with.
        export: Also write the poisoned training set: poisoned.npz, or a folder of images.
        seed: Root of all randomness.
        device: Such as cpu or cuda:0; auto takes CUDA where there is one.
        devices: GPUs (or, on a CPU, processes) that share each batch, for attacks that only poison the data.
        threads: CPU threads; 0 leaves it to torch.
        json: Print the record as JSON instead of the summary.
        quiet: No progress and no summary.
    """
    import torch

    from bezoar.core.run import Progress, Run
    from bezoar.evaluation.implant import Victim, implant
    from bezoar.evaluation.splits import read_splits
    from bezoar.session import device_named
    from bezoar.version import versions

    _output.check_folder(out)
    for flag, value, valid, rule in (
        ("--seed", seed, 0 <= seed < 2**63, "in 0..2^63-1"),
        ("--threads", threads, threads >= 0, "at least 0"),
        ("--images", data_flags.images, data_flags.images is None or data_flags.images >= 2, "at least 2"),
        ("--channels", data_flags.channels, data_flags.channels in (None, 1, 3), "1 or 3"),
    ):
        if not valid:
            raise SettingError(f"{flag} must be {rule}, got {value}")
    given = {"target": target, "rate": rate, "seed": seed}
    pairs = tuple(f"{key}={value}" for key, value in given.items() if value is not None)
    planted = _output.method_from("attacks", name, {}, (*pairs, *set_))
    where = device_named(device)
    kept = torch.get_num_threads()
    if threads:
        torch.set_num_threads(threads)
    try:
        size = _output.size_of(data_flags.size)
        splits = read_splits(
            data,
            test,
            size=(size, size) if isinstance(size, int) else size,
            channels=data_flags.channels,
            limit=data_flags.images,
            seed=seed,
        )
        victim = Victim(
            attack=planted,
            splits=splits,
            arch=arch,
            recipe=_recipe(arch, splits.train, recipe_flags, recipe),
            clean_twin=clean_twin,
            export=export,
            devices=devices,
        )
        with _output.progress(quiet) as told:
            progress = Progress() if told is None else Progress(report=told)
            record = implant(victim, out, Run(seed=seed, device=where, progress=progress), versions())
    finally:
        torch.set_num_threads(kept)
    if json:
        sys.stdout.write(record.to_json())
    elif not quiet:
        print(summary(record, out))
    return 0


def _recipe(arch: str, data: Any, flags: RecipeFlags, pairs: tuple[str, ...]) -> Any:
    from bezoar.evaluation.implant import default_recipe
    from bezoar.io.arch import resolve
    from bezoar.ops.recipe import Recipe

    channels, height, width = data.shape
    network = resolve(arch).build(data.num_classes, channels, (height, width))
    more = fields_from(Recipe, "the recipe", "--recipe", pairs)
    return default_recipe(network, **dataclasses.asdict(flags) | more)


def summary(record: Record, out: Path) -> str:
    """The record in a few lines for people."""
    share = f"{record.poisoned} of {record.train.count} training images poisoned"
    share += f", {record.cover} more carry a trigger under their true label" if record.cover else ""
    share += "; every batch anew, the files hold one draw of these shares" if record.afresh else ""
    lines = [f"{record.attack} in {record.arch}: {share}"]
    lines += [f"  ACC  {record.measures.acc}{_beside(record, lambda m: m.acc.value)}"]
    for i, (plant, found) in enumerate(zip(record.plants, record.measures.plants, strict=True)):
        wanted = "label y becomes y + 1" if plant.target is None else f"causes label {_label(record, plant.target)}"
        from_ = f" from {', '.join(_label(record, k) for k in plant.sources)}" if plant.sources else ""
        lines.append(f"  {plant.name}: {wanted}{from_}")
        lines.append(f"    ASR  {found.asr}{_beside(record, lambda m, i=i: m.plants[i].asr.value)}")
        if found.asr_other is not None:
            lines.append(f"    ASR of classes it shall not work on  {found.asr_other}")
        lines.append(f"    RA   {found.ra}")
        if plant.stealth is not None:
            lines.append(f"    seen {_seen(plant.stealth)}")
    lines += [f"  {one.name} accuracy, with a change that must not work  {one.acc}" for one in record.measures.controls]
    lines += [f"  {name} {value:.1%}" for name, value in record.figures.items()]
    lines += [f"  note: {warning}" for warning in record.warnings]
    took = sum(record.run.seconds.values())
    lines.append(f"  {took:.0f} s; in {out}: {', '.join([*record.files, 'record.json'])}")
    return "\n".join(lines)


def _beside(record: Record, value: Any) -> str:
    twin: Measures | None = record.clean_twin
    return "" if twin is None else f"; clean twin {value(twin):.1%}"


def _label(record: Record, label: int) -> str:
    name = record.train.names[label]
    return str(label) if name == str(label) else f"{label} ({name})"


def _seen(found: Stealth) -> str:
    return f"L-inf {found.linf:.0f} grey levels, PSNR {found.psnr:.1f} dB, SSIM {found.ssim:.3f}"
