"""``bezoar train``: a clean model from training data that nobody vouches for."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from bezoar.cli import _output
from bezoar.core.errors import SettingError

_Switch = Annotated[bool, Parameter(negative="")]


def train(
    *,
    data: str,
    arch: str,
    out: Path,
    method: str = "abl",
    epochs: int | None = None,
    rate: float | None = None,
    clean: str | None = None,
    test_data: str | None = None,
    set_: Annotated[tuple[str, ...], Parameter(name="--set", negative="")] = (),
    size: str = "",
    channels: int | None = None,
    num_classes: int | None = None,
    images: int | None = None,
    max_unreadable: float = 0.01,
    seed: int = 0,
    budget: str = "",
    device: str = "auto",
    threads: int = 0,
    json: _Switch = False,
    quiet: _Switch = False,
) -> int:
    """Train a clean model on data that you scraped or bought, and show what looks poisoned.

    Poison is learned faster than anything else. abl isolates what is learned fastest in the first epochs, trains on the
    rest, and then unlearns of each label what was learned fastest, where it is not tied to the rest of the label. Where
    nothing is poisoned nothing is unlearned. filtered trains plainly, takes out what a filter finds suspect in what was
    learned, and trains again on the rest; it needs a few clean images, and finds poison that abl misses. d-st and dbd
    learn features without trusting the labels, which takes many epochs. plain trains without any defence;
    strong-augmentation mixes images with each other.

    Before that, all images are read once: those that cannot be read are listed and left out; copies, and images that
    stand under two labels, are reported.

    For instance:

        bezoar train --data scraped/ --size 32 --arch wrn-16-1 --out model/
        bezoar train --data train.parquet --arch preactresnet-18 --set flip=true --test-data clean/ --out model/
        bezoar train --data scraped/ --size 32 --arch wrn-16-1 --method filtered --clean clean.npz --out model/
        bezoar train --data scraped/ --size 32 --arch resnet-18 --method plain --epochs 50 --out plain/

    It leaves model/report.html to look at, with the isolated pictures; model/model.safetensors; model/suspects.csv, the
    most suspicious first; and model/report.json. To see whether a backdoor is left:

        bezoar scan model/model.safetensors --arch wrn-16-1 --data clean/ --out scan/

    A killed command goes on where it stopped when it is given again, and ends in the same weights.

    Args:
        data: The training set: a folder with one folder per class, an .npz with x and y, Parquet, or a data set by name
            (its training images).
        arch: Architecture: a reference net such as wrn-16-1 or preactresnet-18, timm/NAME, torchvision/NAME, or
            file.py:function for your own code.
        out: Folder to write to.
        method: Trainer, see bezoar methods.
        epochs: Passes over the data; for abl those after the isolation, for filtered those of each training, for d-st
            and dbd those that learn features.
        rate: Share of the examples that abl isolates; below the share of poison that you fear.
        clean: A few clean images with labels, for filtered: some 25 of each label; other ones than --test-data.
        test_data: Clean images to measure the accuracy on.
        set_: Another setting of the method, such as --set pad=2; see bezoar methods abl.
        size: Height and width that all images are brought to, such as 64 or 55x47.
        channels: 1 or 3, that all images are brought to.
        num_classes: Number of labels; by default what the data says.
        images: Most training images to use, as many of each label as there are.
        max_unreadable: Share of the images that may be unreadable; more is an error.
        seed: Root of all randomness.
        budget: Time allowed, such as 90m or 8h; when it is over, the command can be given again to go on.
        device: Such as cpu or cuda:0; auto takes CUDA where there is one.
        threads: CPU threads; 0 leaves it to torch.
        json: Print the report as JSON instead of the summary.
        quiet: No progress and no summary.
    """
    _output.check_folder(out)
    for flag, value, valid, rule in (
        ("--seed", seed, 0 <= seed < 2**63 - 2**20, "in 0..2^63-2^20"),
        ("--threads", threads, threads >= 0, "at least 0"),
        ("--images", images, images is None or images >= 2, "at least 2"),
        ("--channels", channels, channels in (None, 1, 3), "1 or 3"),
        ("--num-classes", num_classes, num_classes is None or num_classes >= 2, "at least 2"),
    ):
        if not valid:
            raise SettingError(f"{flag} must be {rule}, got {value}")
    given = tuple(f"{key}={value}" for key, value in {"epochs": epochs, "rate": rate}.items() if value is not None)
    trainer = _output.method_from("trainers", method, {}, (*given, *set_))
    from bezoar import training

    side = _output.size_of(size)
    with _output.progress(quiet) as told:
        result = training.train(
            data,
            arch,
            out,
            method=trainer,
            clean=clean,
            test_data=test_data,
            size=(side, side) if isinstance(side, int) else side,
            channels=channels,
            num_classes=num_classes,
            limit=images,
            max_unreadable=max_unreadable,
            seed=seed,
            budget=_output.seconds(budget),
            device=device,
            threads=threads,
            report=told,
        )
    if json:
        sys.stdout.write(result.report.to_json())
    elif not quiet:
        from bezoar.report.trained import summary

        width = min(shutil.get_terminal_size((100, 24)).columns, 110)
        sys.stdout.write(summary(result.report, width, str(out / training.PAGE)))
    return 0
