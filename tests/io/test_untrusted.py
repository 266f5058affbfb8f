"""Data that nobody vouches for: read once, bad images listed, copies and contradictions found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bezoar.core.errors import DataError, SettingError
from bezoar.core.examples import ExampleSource
from bezoar.io.data import load_data
from bezoar.io.untrusted import open_untrusted
from bezoar.ops.augment import as_float


def pixels(count: int, seed: int = 0, depth: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 8, 9, depth), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """30 images of 3 labels; 2 copies, 1 of them under another label; nothing unreadable."""
    x = pixels(30)
    x[4], x[15] = x[3], x[25]
    for i, image in enumerate(x):
        place = tmp_path / "data" / "abc"[i // 10]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{i:02d}.png")
    return tmp_path / "data"


def test_a_folder_is_streamed(folder):
    found = open_untrusted(folder)
    assert isinstance(found, ExampleSource)
    assert (len(found), found.num_classes, found.shape) == (30, 3, (3, 8, 9))
    assert found.names == ("a", "b", "c")
    assert found.name(12) == "b/12.png"
    assert found.facts.per_class == (10, 10, 10)
    assert found.origin.tolist() == list(range(30))
    rows = torch.tensor([29, 0, 0, 7])
    taken = found.take(rows)
    assert taken.dtype == torch.uint8
    expected = load_data(folder, num_classes=None, size=None, channels=None)
    torch.testing.assert_close(as_float(taken), expected.x[rows])
    assert torch.equal(found.labels, expected.y)
    taken[:] = 0
    assert found.take(rows).float().mean() > 100, "what was taken is a copy"


def test_copies_and_contradictions(folder):
    found = open_untrusted(folder)
    assert found.duplicates.tolist() == [4, 25]
    assert found.first[torch.tensor([4, 25])].tolist() == [3, 15]
    assert found.conflicts.tolist() == [15, 25]
    assert open_untrusted((pixels(20), np.arange(20) % 2)).duplicates.tolist() == []


def test_unreadable_images_are_listed_and_left_out(folder):
    (folder / "a" / "02.png").write_bytes(b"no image")
    (folder / "c" / "21.png").write_bytes((folder / "c" / "21.png").read_bytes()[:60])
    with pytest.raises(
        DataError, match=r"too many unreadable images, 1 so far of 30: a/02.png \(not an image\)"
    ) as told:
        open_untrusted(folder)
    assert "--max-unreadable" in told.value.hint
    found = open_untrusted(folder, max_unreadable=0.1)
    assert [one.where for one in found.unreadable] == ["a/02.png", "c/21.png"]
    assert len(found) == 28
    assert found.origin.tolist() == [i for i in range(30) if i not in (2, 21)]
    assert found.name(2) == "a/03.png"
    assert found.labels.tolist() == [0] * 9 + [1] * 10 + [2] * 9


def test_limit_is_a_share(folder):
    for i in (2, 5, 8):
        (folder / "a" / f"{i:02d}.png").write_bytes(b"")
    assert len(open_untrusted(folder, max_unreadable=0.1).unreadable) == 3
    with pytest.raises(DataError, match="3 so far of 30"):
        open_untrusted(folder, max_unreadable=0.09)


@pytest.mark.parametrize("value", [-0.1, 1.0])
def test_bad_limit(folder, value):
    with pytest.raises(SettingError, match="max_unreadable"):
        open_untrusted(folder, max_unreadable=value)


def test_hash_tells_content(folder):
    first, again = open_untrusted(folder), open_untrusted(folder)
    assert first.sha256 == again.sha256
    (folder / "a" / "00.png").rename(folder / "b" / "00.png")
    assert open_untrusted(folder).sha256 != first.sha256
    x, y = pixels(10), np.arange(10) % 2
    assert open_untrusted((x, y)).sha256 != open_untrusted((x, 1 - y)).sha256


def test_size_and_colours(folder):
    found = open_untrusted(folder, (4, 5), 1)
    assert found.shape == (1, 4, 5)
    expected = load_data(folder, num_classes=None, size=(4, 5), channels=1)
    torch.testing.assert_close(as_float(found.take(torch.arange(30))), expected.x)
    Image.fromarray(pixels(1)[0, :5]).save(folder / "b" / "99.png")
    with pytest.raises(DataError, match="8 x 9 pixels, b/99.png has 5 x 9") as told:
        open_untrusted(folder)
    assert "--size" in told.value.hint
    Image.fromarray(pixels(1)[0, :, :, 0]).save(folder / "b" / "99.png")
    with pytest.raises(DataError, match="3 channels, b/99.png has 1"):
        open_untrusted(folder)


def test_floats_sixteen_bits_and_bad_values():
    x = np.random.default_rng(0).random((20, 8, 8, 1), dtype=np.float32)
    found = open_untrusted((x, np.arange(20) % 2))
    assert found.take(torch.arange(3)).dtype == torch.float32
    torch.testing.assert_close(found.take(torch.tensor([3]))[0, 0], torch.from_numpy(x[3, :, :, 0]))
    deep = open_untrusted(((x * 65535).round().astype(np.uint16), np.arange(20) % 2))
    torch.testing.assert_close(deep.take(torch.arange(20)), found.take(torch.arange(20)), atol=1e-4, rtol=0)
    bad = x.copy()
    bad[3, 0, 0, 0], bad[5, 0, 0, 0] = np.nan, 7.0
    found = open_untrusted((bad, np.arange(20) % 2), max_unreadable=0.2)
    assert [one.reason.split(" [")[0] for one in found.unreadable] == ["holds NaN or Inf", "pixels lie in"]
    with pytest.raises(DataError, match="almost black"):
        open_untrusted((x * 0.001, np.arange(20) % 2))


def test_mixed_depths_are_rounded_and_told(tmp_path):
    for name, image in (("a", pixels(1)[0, :, :, 0]), ("b", pixels(1, 1)[0, :, :, 0].astype(np.uint16) * 257)):
        (tmp_path / name).mkdir()
        Image.fromarray(image).save(tmp_path / name / "0.png")
    found = open_untrusted(tmp_path)
    assert found.take(torch.arange(2)).dtype == torch.uint8
    assert found.take(torch.tensor([1]))[0, 0].numpy().tolist() == pixels(1, 1)[0, :, :, 0].tolist()
    assert "rounded" in found.notes[0]


@pytest.mark.parametrize(
    ("y", "classes", "fragment"),
    [
        ([0, -1, 1, 0], None, "between -1 and 1"),
        ([0, 1, 5, 0], 3, "between 0 and 5, with 3"),
        ([0, 0, 0, 0], None, "one class only"),
        ([0, 1, 1, 900], None, "only 3 of 901 are there"),
    ],
)
def test_bad_labels(y, classes, fragment):
    with pytest.raises(DataError, match=fragment):
        open_untrusted((pixels(4), np.array(y)), num_classes=classes)


def test_empty_labels_are_told():
    found = open_untrusted((pixels(4), np.array([0, 1, 3, 3])))
    assert (found.num_classes, found.empty, found.names) == (4, (2,), ("0", "1", "2", "3"))


def test_training_images_of_a_file_with_both_parts(tmp_path):
    x = pixels(12)
    np.savez(tmp_path / "d.npz", train_x=x[:8], train_y=np.arange(8) % 2, test_x=x[8:], test_y=np.arange(4) % 2)
    found = open_untrusted(tmp_path / "d.npz")
    assert torch.equal(found.take(torch.arange(8)), torch.from_numpy(x[:8]).permute(0, 3, 1, 2))


def test_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    import io

    x, cells = pixels(12), []
    for image in x:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format="PNG")
        cells.append({"bytes": buffer.getvalue(), "path": None})
    cells[7] = {"bytes": b"broken", "path": None}
    pq.write_table(pa.table({"image": cells, "label": [i % 3 for i in range(12)]}), tmp_path / "d.parquet")
    found = open_untrusted(tmp_path / "d.parquet", max_unreadable=0.1)
    assert found.unreadable[0].where == "row 7"
    assert torch.equal(found.take(torch.tensor([7, 2])), torch.from_numpy(x[[8, 2]]).permute(0, 3, 1, 2))


def test_fewer_images_are_spread_over_the_labels(folder):
    found = open_untrusted(folder, limit=9)
    assert found.facts.per_class == (3, 3, 3)
    assert torch.equal(found.take(torch.arange(9)), open_untrusted(folder).take(found.origin))


def test_nothing_is_left_on_disk(folder, tmp_path):
    place = tmp_path / "work"
    found = open_untrusted(folder, folder=place)
    assert list(place.iterdir()) == []
    assert found.take(torch.tensor([5])).float().mean() > 0


def test_full_disk_is_one_clear_error(folder, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 100))
    with pytest.raises(DataError, match="has 0.0 GiB left"):
        open_untrusted(folder)


def test_progress_is_told(folder):
    told = []
    open_untrusted(folder, report=lambda *step: told.append(step))
    assert told == [("read", 30, 30, "")]
