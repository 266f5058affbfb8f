"""``bezoar filter``: find poisoned examples in a training set."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from bezoar.cli import _output
from bezoar.core.errors import SettingError
from bezoar.options import RunOptions

app = App(
    name="filter",
    help="Find poisoned examples in a training set that nobody vouches for.",
    help_format="plaintext",
    help_on_error=False,
)

_Switch = Annotated[bool, Parameter(negative="")]
_MODEL = _output.ModelFlags()


@app.command(name="data")
def data_(
    data: str,
    /,
    *,
    model: str,
    out: Path,
    method: str | None = None,
    clean: str | None = None,
    images: int = 1000,
    limit: int | None = None,
    max_unreadable: float = 0.01,
    set_: Annotated[tuple[str, ...], Parameter(name="--set", negative="")] = (),
    model_flags: Annotated[_output.ModelFlags, Parameter(name="*")] = _MODEL,
    seed: int = 0,
    budget: str = "",
    device: str = "auto",
    threads: int = 0,
    resume: bool = True,
    json: _Switch = False,
    quiet: _Switch = False,
) -> int:
    """Which examples are poisoned, seen through a model that was trained on them?

    A poisoned example gets its label for another reason than its class, and what the model makes of it shows that.
    Train a model on the data first, as you would anyway; then look through it:

        bezoar filter data train/ --model student.pth --arch wrn-16-1 --out found/
        bezoar filter data train/ --model student.pth --arch wrn-16-1 --clean clean.npz --out found/

    It leaves found/contact-sheet.html to look at, found/suspects.csv (most suspicious first), and
    found/clean_index.npy, the positions of all others: numpy.load gives them, to train again without the suspects.
    A model that was trained on poison can be cleaned with them:

        bezoar purify student.pth --arch wrn-16-1 --data clean.npz --method abl-unlearn \
--suspects found/suspects.csv --suspect-data train/ --out cleaned/

    spectral-signatures and spectre need nothing else and take examples out of a clean set too; activation-clustering
    says which labels are poisoned, where the poison is the smaller part; scan and beatrix compare with a few clean
    examples, and find large shares too. abl-isolation needs no trained model: it trains the architecture anew, briefly.
    Each one's rule and settings: bezoar methods NAME.

    Exit codes: 0 no label is flagged, 1 poisoned, 2 bad input, 3 the method gives no verdict (see the suspects).

    Args:
        data: The training set: a folder with one folder per class, an .npz with x and y, Parquet, or a data set by
            name.
        model: Model file or folder, trained on this data, see bezoar scan.
        out: Folder for suspects.csv, clean_index.npy, contact-sheet.html and report.json.
        method: Filter, see bezoar methods; by default scan with --clean, else spectral-signatures.
        clean: A few clean images with labels, for scan and beatrix; with them poison is found far better.
        images: Most clean images to use, as many of each class as there are.
        limit: Look at so many examples at most, as many of each label as there are.
        max_unreadable: Share of the images that may be unreadable; they are left out.
        set_: A setting of the method, such as --set epsilon=0.05.
        seed: Root of all randomness.
        budget: Time allowed, such as 90s, 2m or 1h.
        device: Such as cpu or cuda:0; auto takes CUDA where there is one.
        threads: CPU threads; 0 leaves it to torch.
        resume: Go on where a killed run of the same command stopped.
        json: Print the report as JSON instead of the summary.
        quiet: No progress and no summary; the exit code tells.
    """
    from bezoar.filtering import default_filter, filter_data

    _output.check_folder(out)
    if limit is not None and limit < 2:
        raise SettingError(f"--limit must be at least 2, got {limit}")
    found = _output.method_from("filters", method or default_filter(clean is not None), {}, set_)
    options = RunOptions(
        images=images, seed=seed, budget=_output.seconds(budget), device=device, threads=threads, resume=resume
    )
    with _output.progress(quiet) as told:
        result = filter_data(
            model,
            data,
            method=found,
            clean=clean,
            out=out,
            limit=limit,
            max_unreadable=max_unreadable,
            model_options=model_flags.make(),
            options=options,
            report=told,
        )
    if json:
        sys.stdout.write(result.report.to_json())
    elif not quiet:
        from bezoar.report.filtered import summary

        width = min(shutil.get_terminal_size((100, 24)).columns, 110)
        color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        sys.stdout.write(summary(result.report, width, color, str(out / "contact-sheet.html")))
    return _output.EXIT_CODES[result.report.verdict]
