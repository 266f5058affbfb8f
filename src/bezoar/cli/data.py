"""``bezoar data``: data sets by name."""

from __future__ import annotations

import sys
from typing import Annotated

from cyclopts import App, Parameter

app = App(
    name="data",
    help="Fetch data sets by name; they then stand wherever --data is asked for.",
    help_format="plaintext",
    help_on_error=False,
)


@app.command
def get(*names: str, quiet: Annotated[bool, Parameter(negative="")] = False) -> int:
    """Fetch data sets, check their SHA-256 and keep them, so that they can be used offline.

    One that is already there and whole is not fetched again. Where a source fails the next one is tried; whatever
    happens, no half of a data set is left behind.

    For instance:

        bezoar data get cifar-10
        bezoar scan student.pth.tar --arch wrn-16-1 --data cifar-10 --out scan/

    As data, NAME stands for its test images, NAME:train for its training images.

    Args:
        names: Such as mnist fashion-mnist; see bezoar data list.
        quiet: Print the files only, no progress.
    """
    from bezoar.core.errors import SettingError
    from bezoar.io import datasets

    if not names:
        known = ", ".join(d.name for d in datasets.DATA_SETS)
        raise SettingError("no data set was named", f"There are: {known}")
    for name in names:
        datasets.find(name)
    for name in names:
        print(datasets.get(name, tell=None if quiet else _tell), flush=True)
    return 0


@app.command(name="list")
def list_() -> int:
    """List the data sets: size, where they come from, who made them, and whether they are here."""
    from bezoar.io import datasets

    for data_set in datasets.DATA_SETS:
        channels, height, width = data_set.shape
        here = "cached" if datasets.is_cached(data_set) else f"bezoar data get {data_set.name}"
        print(f"{data_set.name:15} {here}")
        print(
            f"{'':15} {data_set.train:,} training and {data_set.test:,} test images of {height}x{width} pixels, "
            f"{'colour' if channels == 3 else 'grey'}, {len(data_set.classes)} classes"
        )
        print(f"{'':15} from: {'; else '.join(source.title for source in data_set.sources)}")
        print(f"{'':15} by: {data_set.credit}")
    print(f"\nKept in {datasets.cache_folder() / 'data'}")
    return 0


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
