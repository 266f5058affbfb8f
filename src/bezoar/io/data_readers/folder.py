"""An image folder with one folder per class, read as torchvision's ``ImageFolder`` reads it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bezoar.core.errors import DataError
from bezoar.io.data_readers._base import COUNT_CAP, Broken, Index, Picture, Source, Wanted, listed, shown
from bezoar.io.data_readers._pixels import decode

SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp", ".gif")
_SPLITS = re.compile(r"(train|training|val|valid|validation|test|testing|eval)", re.IGNORECASE)


class FolderReader:
    """Folders of image files."""

    def claims(self, source: object) -> bool:
        """Whether it is a folder."""
        return isinstance(source, Path) and source.is_dir()

    def open(self, source: Path, wanted: Wanted) -> Source:  # noqa: ARG002 - part of the interface
        """List the files; nothing is decoded yet."""
        classes = _class_folders(source)
        labels = _labels(source, classes)
        skipped = _Skipped(Path(os.path.realpath(source)))
        files: list[Path] = []
        of_file: list[int] = []
        empty = []
        for folder, label in zip(classes, labels, strict=True):
            found = skipped.images(folder)
            if not found:
                empty.append(shown(folder.name))
            files += found
            of_file += [label] * len(found)
        if empty:
            kinds = ", ".join(s[1:] for s in SUFFIXES)
            hint = f"Add images ({kinds}) or remove the folder"
            raise DataError(f"class folders without an image: {listed(empty)}", hint)

        def pictures(index: Index) -> Iterator[Picture | Broken]:
            for i in index:
                yield decode(str(files[i]), shown(files[i].relative_to(source)))

        numbered = _all_numbers(classes)
        return Source(
            path=shown(source),
            format="folder",
            labels=np.array(of_file, dtype=np.int64),
            names=() if numbered else tuple(shown(c.name) for c in classes),
            pictures=pictures,
            notes=skipped.notes(),
            named=not numbered,
        )


def _class_folders(source: Path) -> list[Path]:
    entries = sorted((e for e in os.scandir(source) if not e.name.startswith(".")), key=lambda e: e.name)
    root = os.path.realpath(source)
    folders = [Path(e.path) for e in entries if e.is_dir() and Path(os.path.realpath(e.path)).is_relative_to(root)]
    if not entries:
        raise DataError(f"the folder {shown(source)} is empty", "Give a folder with one folder of images per class")
    splits = [f for f in folders if _SPLITS.fullmatch(f.name)]
    if splits and len(splits) == len(folders):
        best = next((f for f in splits if not f.name.lower().startswith("train")), splits[0])
        message = f"{shown(source)} holds {listed([shown(f.name) for f in folders])}, not classes"
        raise DataError(message, f"Give one of them, such as {shown(best)}")
    if len(folders) == 1 and sum(e.is_dir() for e in os.scandir(folders[0])) > 1:
        raise DataError(f"{shown(source)} holds one folder with folders in it", f"Give {shown(folders[0])}")
    if len(folders) < 2:
        flat = any(e.name.lower().endswith(SUFFIXES) for e in entries)
        what = "images but no class folders" if flat else f"{len(folders)} class folder{'s' if not folders else ''}"
        raise DataError(
            f"{shown(source)} has {what}", "Sort the images into one folder per class, at least two classes"
        )
    return folders


def _all_numbers(folders: list[Path]) -> bool:
    return all(f.name.isascii() and f.name.isdecimal() for f in folders)


def _labels(source: Path, folders: list[Path]) -> list[int]:
    """The number where all names are numbers (``00014`` of GTSRB is 14), else the place in sorted order."""
    if not _all_numbers(folders):
        return list(range(len(folders)))
    if any(len(f.name) > 9 for f in folders):
        raise DataError(
            f"{shown(source)} has class folders named by huge numbers", "Name them 0, 1, 2, ... or by words"
        )
    labels = [int(f.name) for f in folders]
    if len(set(labels)) < len(labels):
        twice = [shown(f.name) for f, label in zip(folders, labels, strict=True) if labels.count(label) > 1]
        raise DataError(f"class folders with the same number: {listed(twice)}", "Merge or rename them")
    return labels


class _Skipped:
    """Finds images below a folder and counts what is left out."""

    def __init__(self, root: Path) -> None:
        self.root, self.others, self.links, self.seen = root, 0, 0, 0

    def images(self, folder: Path) -> list[Path]:
        found = []
        for parent, folders, names in os.walk(folder):
            links = [f for f in folders if Path(parent, f).is_symlink()]
            self.links += len(links)
            folders[:] = sorted(f for f in folders if not f.startswith(".") and f not in links)
            found += [Path(parent, n) for n in sorted(names) if not n.startswith(".") and self._usable(Path(parent, n))]
            self.seen += len(names)
            if self.seen > COUNT_CAP:
                raise DataError(f"more than {COUNT_CAP:,} files under {shown(self.root)}", "Give a smaller folder")
        return found

    def _usable(self, path: Path) -> bool:
        if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(self.root):
            self.links += 1
            return False
        usable = path.name.lower().endswith(SUFFIXES) and path.is_file()
        self.others += not usable
        return usable

    def notes(self) -> tuple[str, ...]:
        counted = (
            (self.others, "files in class folders are not images and were left out"),
            (self.links, "links that lead out of the folder, or to folders, were not followed"),
        )
        return tuple(f"{count} {what}" for count, what in counted if count)
