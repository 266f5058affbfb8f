import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from bezoar.core.errors import DataError, SettingError
from bezoar.io.data import CleanData, choose, load_data
from tests.io.hostile_data import folder, labels, pixels, png

SHARED = Path(os.environ.get("BEZOAR_SHARED_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))


def load(source: object, **options: object) -> CleanData:
    return load_data(source, **{"num_classes": None, "size": None, "channels": None, **options})  # type: ignore[arg-type]


def chw(x: np.ndarray) -> Tensor:
    return torch.from_numpy(x.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255))


def test_folder(tmp_path: Path) -> None:
    root = folder(tmp_path / "d", ("owl", "cat", "Dog"))
    (root / "cat" / ".hidden.png").write_text("x")
    (root / "cat" / "Thumbs.db").write_text("x")
    (root / ".cache").mkdir()
    (root / "cat" / "more").mkdir()
    (root / "cat" / "more" / "e.PNG").write_bytes(png(999))
    data = load(root)
    assert data.facts.names == ("Dog", "cat", "owl")  # by code point, as sorted() and ImageFolder do
    assert data.facts.per_class == (4, 5, 4)
    assert data.facts.count == 13
    assert data.notes == ("1 files in class folders are not images and were left out",)
    assert torch.equal(data.x[0], chw(pixels(1, 8, 200))[0])


def test_numbers_are_labels(tmp_path: Path) -> None:
    root = folder(tmp_path / "d", ("00002", "00000", "00010", *(f"0000{i}" for i in (1, 3, 4, 5, 6, 7, 8, 9))), each=2)
    data = load(root)
    assert data.num_classes == 11
    assert torch.equal(data.x[data.y == 10], torch.stack([chw(pixels(1, 8, 200 + i))[0] for i in (0, 1)]))
    renamed = folder(tmp_path / "e", ("1", "2", "3"))
    with pytest.raises(DataError, match="subtract 1"):
        load(renamed, num_classes=3)


def test_two_folders_of_one_number(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="same number"):
        load(folder(tmp_path / "d", ("1", "01", "0")))


def test_nested_folder_hint(tmp_path: Path) -> None:
    folder(tmp_path / "d" / "train")
    folder(tmp_path / "d" / "test")
    with pytest.raises(DataError) as caught:
        load(tmp_path / "d")
    assert caught.value.hint.endswith("d/test")
    folder(tmp_path / "e" / "all")
    with pytest.raises(DataError, match="Give .*e/all"):
        load(tmp_path / "e")


def test_image_modes(tmp_path: Path) -> None:
    root = tmp_path / "d"
    rgb = Image.fromarray(pixels(1, 8)[0])
    for i, mode in enumerate(("RGB", "RGBA", "L", "LA", "P", "1", "I;16", "CMYK", "F")):
        (root / str(i % 2)).mkdir(parents=True, exist_ok=True)
        kind = "tiff" if mode in ("CMYK", "F") else "png"
        image = rgb.convert("L").convert(mode) if mode in ("I;16", "LA") else rgb.convert(mode)
        if mode == "F":
            image = Image.fromarray(np.asarray(image) / np.float32(255))
        if mode == "I;16":
            image = Image.fromarray(np.asarray(rgb.convert("L")).astype(np.uint16) * 257)
        image.save(root / str(i % 2) / f"{i}.{kind}")
    data = load(root, channels=1)
    grey = torch.from_numpy(np.asarray(rgb.convert("L")) / np.float32(255))
    order = {"RGB": 0, "L": 1, "P": 2, "I;16": 3, "F": 4, "RGBA": 5, "LA": 6, "1": 7, "CMYK": 8}
    for mode in ("RGB", "L", "I;16", "F", "RGBA", "LA"):
        assert torch.allclose(data.x[order[mode], 0], grey, atol=0.6 / 255), mode
    assert (data.x[order["CMYK"], 0] - grey).abs().max() < 2 / 255
    mixed = pytest.raises(DataError, match="Give --channels")
    with mixed:
        load(root)


def test_exif_orientation(tmp_path: Path) -> None:
    root = folder(tmp_path / "d", ("a", "b"), each=2)
    image = Image.fromarray(pixels(1, 8)[0])
    exif = image.getexif()
    exif[0x0112] = 6  # turned clockwise for display
    image.save(root / "a" / "0.png", exif=exif)
    expected = torch.from_numpy(np.rot90(pixels(1, 8)[0], -1).copy()).permute(2, 0, 1) / 255
    assert torch.allclose(load(root).x[0], expected)


def test_odd_file_names(tmp_path: Path) -> None:
    root = folder(tmp_path / "d", ("猫", "dog\x1b[31m"))
    os.rename(root / "猫" / "0.png", os.path.join(os.fsencode(root / "猫"), b"\xff\xfe.png"))
    data = load(root)
    assert data.facts.names == ("dog\\x1b[31m", "猫")
    os.rename(root / "猫" / "1.png", os.path.join(os.fsencode(root / "猫"), b"\xff\n.png"))
    with open(os.path.join(os.fsencode(root / "猫"), b"\xff\n.png"), "wb") as file:
        file.write(b"x")
    with pytest.raises(DataError) as caught:
        load(root)
    str(caught.value).encode()
    assert "\\n" in str(caught.value)


def test_links_inside_are_followed_and_outside_counted(tmp_path: Path) -> None:
    root = folder(tmp_path / "d")
    (tmp_path / "out.png").write_bytes(png(77))
    (root / "cat" / "out.png").symlink_to(tmp_path / "out.png")
    (root / "cat" / "in.png").symlink_to(root / "dog" / "0.png")
    (root / "cat" / "loop").symlink_to(root)
    data = load(root)
    assert data.facts.per_class == (5, 4, 4)
    assert data.notes == ("2 links that lead out of the folder, or to folders, were not followed",)


def test_different_sizes_need_a_size(tmp_path: Path) -> None:
    root = folder(tmp_path / "d")
    (root / "cat" / "9.png").write_bytes(png(9, 16))
    with pytest.raises(DataError, match="--size"):
        load(root)
    assert load(root, size=(8, 8)).shape == (3, 8, 8)


def test_limit_chooses_before_it_decodes(tmp_path: Path) -> None:
    root = folder(tmp_path / "d", each=6)
    data = load(root, limit=9)
    assert data.facts.per_class == (3, 3, 3)
    assert load(root, limit=9).facts.sha256 == data.facts.sha256
    assert load(root, limit=9, seed=1).facts.sha256 != data.facts.sha256
    for file in root.glob("*/*.png"):
        image = torch.from_numpy(np.asarray(Image.open(file)) / np.float32(255)).permute(2, 0, 1)
        if not (data.x == image).flatten(1).all(1).any():
            file.write_bytes(b"broken")  # those that were not chosen
    assert load(root, limit=9).facts.sha256 == data.facts.sha256


def test_choose_is_balanced() -> None:
    y = np.array([0] * 100 + [1] * 5 + [2] * 50)
    index = choose(y, 60, 0)
    assert np.bincount(y[index]).tolist() in ([27, 5, 28], [28, 5, 27])
    assert (np.diff(index) > 0).all()
    assert choose(y, None, 0).tolist() == list(range(155))
    draws = {tuple(choose(y, 6, seed)) for seed in range(20)}
    assert len(draws) == 20


def test_settings_are_checked() -> None:
    for wrong in ({"size": (0, 8)}, {"channels": 0}, {"limit": 0}):
        with pytest.raises(SettingError):
            load((pixels(), labels()), **wrong)


# real data


def test_real_gtsrb(tmp_path: Path) -> None:
    if not (SHARED / "gtsrb" / "gtsrb_meta.npz").exists():
        pytest.skip("needs ../shared/data/gtsrb")
    y = np.load(SHARED / "gtsrb" / "gtsrb_meta.npz")["yte"]
    with zipfile.ZipFile(SHARED / "gtsrb" / "gtsrb_test_sheets.zip") as archive:
        sheets = [np.asarray(Image.open(io.BytesIO(archive.read(name)))) for name in sorted(archive.namelist())]
    rows = [s.reshape(-1, 32, 100, 32, 3).transpose(0, 2, 1, 3, 4).reshape(-1, 32, 32, 3) for s in sheets]
    x = np.concatenate(rows)[: len(y)]
    chosen = choose(y, 129, 0)
    for i in chosen:
        (tmp_path / f"{y[i]:05d}").mkdir(exist_ok=True)
        Image.fromarray(x[i]).save(tmp_path / f"{y[i]:05d}" / f"{i}.ppm")
    data = load(tmp_path, num_classes=43)
    assert data.facts.per_class == (3,) * 43
    assert torch.equal(data.x[data.y == 14], chw(x[[i for i in sorted(chosen, key=str) if y[i] == 14]]))
