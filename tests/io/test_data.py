import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from bezoar.core.errors import DataError, MissingExtra, SettingError
from bezoar.io.data import CleanData, load_data
from tests.io.hostile_data import labels, npz, pixels, png


def load(source: object, **options: object) -> CleanData:
    return load_data(source, **{"num_classes": None, "size": None, "channels": None, **options})  # type: ignore[arg-type]


def chw(x: np.ndarray) -> Tensor:
    return torch.from_numpy(x.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255))


# npz and arrays


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x,
        lambda x: x.transpose(0, 3, 1, 2),
        lambda x: x.astype(np.float32) / 255,
        lambda x: x.astype(np.float64) / 255,
        lambda x: np.asfortranarray(x),
        lambda x: x.astype(">f4") / 255,
        lambda x: x.astype(np.int64),
    ],
    ids=["nhwc", "nchw", "float32", "float64", "fortran", "big-endian", "int64"],
)
def test_npz_layouts_are_the_same_data(tmp_path: Path, layout) -> None:
    x = pixels()
    data = load(npz(tmp_path, x=layout(x), y=labels()))
    assert data.x.dtype == torch.float32
    assert torch.allclose(data.x, chw(x), atol=1e-6)
    assert data.y.tolist() == labels().tolist()
    assert data.shape == (3, 8, 8)
    assert data.facts.per_class == (4, 4, 4)
    assert data.facts.names == ("0", "1", "2")
    assert data.facts.format == "npz"


@pytest.mark.parametrize("keys", [("images", "labels"), ("x_test", "y_test"), ("data", "targets"), ("X", "Y")])
def test_npz_keys_and_names(tmp_path: Path, keys: tuple[str, str]) -> None:
    file = tmp_path / "data.npz"
    np.savez_compressed(file, **{keys[0]: pixels(), keys[1]: labels()[:, None], "names": np.array(["a", "b", "ü"])})
    data = load(file)
    assert torch.equal(data.x, chw(pixels()))
    assert data.facts.names == ("a", "b", "ü")


def test_test_set_is_preferred_to_training_set(tmp_path: Path) -> None:
    test = pixels(seed=1)
    data = load(npz(tmp_path, x_train=pixels(), y_train=labels(), x_test=test, y_test=labels()))
    assert torch.equal(data.x, chw(test))


def test_object_arrays_that_are_not_needed_do_no_harm(tmp_path: Path) -> None:
    extra = np.array([None, {}], dtype=object)
    assert len(load(npz(tmp_path, x=pixels(), y=labels(), extra=extra))) == 12


def test_grey_and_16_bits_and_bool() -> None:
    grey = np.random.default_rng(0).integers(0, 65536, (12, 8, 8), dtype=np.uint16)
    data = load((grey, labels()))
    assert data.shape == (1, 8, 8)
    assert torch.allclose(data.x[:, 0], torch.from_numpy(grey / 65535).float())
    assert set(load((grey > 30000, labels())).x.unique().tolist()) == {0.0, 1.0}


def test_channels_and_size() -> None:
    x = pixels(size=10)
    grey = load((x, labels()), channels=1, size=(5, 6))
    assert grey.shape == (1, 5, 6)
    expected = Image.fromarray(x[0]).convert("L").resize((6, 5), Image.Resampling.BILINEAR)
    assert torch.equal(grey.x[0, 0], torch.from_numpy(np.asarray(expected) / np.float32(255)))
    rgb = load((grey.x, grey.y), channels=3)
    assert rgb.shape == (3, 5, 6)
    assert torch.equal(rgb.x[:, 0], rgb.x[:, 2])
    floats = load((x.astype(np.float32) / 255, labels()), channels=1, size=(5, 6))
    assert torch.allclose(floats.x, grey.x, atol=1.5 / 255)


def test_resize_is_antialiased() -> None:
    stripes = np.zeros((12, 16, 16, 1), np.uint8)
    stripes[:, :, ::2] = 255
    stripes[:, 0] = np.arange(12, dtype=np.uint8)[:, None, None]
    small = load((stripes, labels()), size=(4, 4))
    assert (small.x[:, :, 1:, :] - 0.5).abs().max() < 0.2  # plain bilinear would give 0 or 1


def test_alpha_is_dropped() -> None:
    rgba = np.concatenate([pixels(), np.zeros((12, 8, 8, 1), np.uint8)], 3)
    assert torch.equal(load((rgba, labels())).x, chw(pixels()))


def test_ambiguous_layout_is_settled_by_the_model() -> None:
    x = np.random.default_rng(0).random((12, 3, 8, 3))
    assert load((x, labels()), channels=3, size=(8, 3)).shape == (3, 8, 3)
    assert load((x, labels()), channels=3, size=(3, 8)).shape == (3, 3, 8)
    assert load((torch.from_numpy(x), labels())).shape == (3, 8, 3)


def test_floats_slightly_out_of_range_are_clipped() -> None:
    x = np.random.default_rng(0).random((12, 8, 8, 3)).astype(np.float32)
    x[0, 0, 0, 0] = 1.00001
    assert load((x, labels())).x.max() == 1


def test_memory_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bezoar.io.data_readers._pixels.MEMORY_CAP", 1000)
    with pytest.raises(DataError, match="need .* GiB"):
        load((pixels(), labels()))


# Parquet and Arrow


def _table(rows: int = 12, names: bool = True, text: bool = False):
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    image = [{"bytes": png(i), "path": f"{i}.png"} for i in range(rows)]
    label = [("cat", "dog", "owl")[i % 3] for i in range(rows)] if text else [i % 3 for i in range(rows)]
    table = pyarrow.table({"img": image, "label": label})
    kind = {"_type": "ClassLabel", "names": ["cat", "dog", "owl"]}
    meta = {"huggingface": json.dumps({"info": {"features": {"img": {"_type": "Image"}, "label": kind}}})}
    return table.replace_schema_metadata(meta) if names else table


def _expected(rows: int = 12) -> Tensor:
    return torch.stack([chw(pixels(1, 8, i))[0] for i in range(rows)])


def test_parquet_file_and_folder(tmp_path: Path) -> None:
    table = _table()
    parquet = importlib.import_module("pyarrow.parquet")
    parquet.write_table(table, tmp_path / "one.parquet", row_group_size=5)
    data = load(tmp_path / "one.parquet")
    assert torch.equal(data.x, _expected())
    assert data.facts.names == ("cat", "dog", "owl")
    (tmp_path / "set" / "data").mkdir(parents=True)
    parquet.write_table(table.slice(0, 7), tmp_path / "set" / "data" / "test-00000-of-00002.parquet", row_group_size=2)
    parquet.write_table(table.slice(7), tmp_path / "set" / "data" / "test-00001-of-00002.parquet")
    both = load(tmp_path / "set", limit=6)
    assert both.facts.per_class == (2, 2, 2)
    assert all((_expected() == x).flatten(1).all(1).any() for x in both.x)
    assert load(tmp_path / "set").facts.sha256 == data.facts.sha256
    parquet.write_table(table, tmp_path / "set" / "data" / "train-00000-of-00001.parquet")
    with pytest.raises(DataError, match="several splits: test, train"):
        load(tmp_path / "set")


def test_parquet_of_text_labels_and_paths(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    table = _table(names=False, text=True)
    parquet = importlib.import_module("pyarrow.parquet")
    parquet.write_table(table, tmp_path / "a.parquet")
    assert load(tmp_path / "a.parquet").facts.names == ("cat", "dog", "owl")
    (tmp_path / "p").mkdir()
    for i in range(12):
        (tmp_path / "p" / f"{i}.png").write_bytes(png(i))
    rows = [{"image": {"bytes": None, "path": f"{i}.png"}, "labels": i % 3} for i in range(12)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p" / "a.parquet")
    assert torch.equal(load(tmp_path / "p").x, _expected())


def test_saved_data_set(tmp_path: Path) -> None:
    """The layout of save_to_disk: an Arrow stream, state.json, dataset_info.json."""
    table = _table(names=False)
    pyarrow = importlib.import_module("pyarrow")
    root = tmp_path / "set" / "test"
    root.mkdir(parents=True)
    for part, rows in (("data-00000-of-00002.arrow", table.slice(0, 5)), ("data-00001-of-00002.arrow", table.slice(5))):
        with pyarrow.ipc.new_stream(str(root / part), table.schema) as stream:
            stream.write_table(rows, max_chunksize=2)
    files = [{"filename": f"data-0000{i}-of-00002.arrow"} for i in (0, 1)]
    (root / "state.json").write_text(json.dumps({"_data_files": files, "_indices_data_files": None}))
    kind = {"names": ["cat", "dog", "owl"], "_type": "ClassLabel"}
    (root / "dataset_info.json").write_text(json.dumps({"features": {"label": kind}}))
    data = load(root, limit=9)
    assert data.facts.names == ("cat", "dog", "owl")
    assert data.facts.per_class == (3, 3, 3)
    assert torch.equal(load(root).x, _expected())
    (tmp_path / "set" / "dataset_dict.json").write_text(json.dumps({"splits": ["test"]}))
    with pytest.raises(DataError, match=r"dictionary of data sets.*set/test"):
        load(tmp_path / "set")


def test_missing_pyarrow_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(MissingExtra, match=r"pip install 'bezoar\[data\]'"):
        load(tmp_path / "a.parquet")


# Dataset and DataLoader


class Items(Dataset):
    def __init__(self, convert=lambda x: x, targets: bool = False) -> None:
        self.convert, self.reads = convert, 0
        if targets:
            self.targets = labels().tolist()

    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int):
        self.reads += 1
        return self.convert(pixels()[i]), int(labels()[i])


class Stream(IterableDataset):
    def __iter__(self):
        return zip(chw(pixels()), labels(), strict=True)


@pytest.mark.parametrize(
    "source",
    [
        Items(),
        Items(Image.fromarray, targets=True),
        Items(lambda x: torch.from_numpy(x).permute(2, 0, 1)),
        TensorDataset(chw(pixels()), torch.from_numpy(labels())),
        DataLoader(TensorDataset(chw(pixels()), torch.from_numpy(labels())), batch_size=5),
        DataLoader(Items(lambda x: torch.from_numpy(x).permute(2, 0, 1)), batch_size=5),
        Stream(),
        (chw(pixels()).requires_grad_(), labels().tolist()),
        (pixels().tolist(), torch.from_numpy(labels())),
    ],
)
def test_python_sources(source: object) -> None:
    data = load(source)
    assert torch.allclose(data.x, chw(pixels()))
    assert data.y.tolist() == labels().tolist()
    assert not data.x.requires_grad


def test_targets_save_reading() -> None:
    items = Items(targets=True)
    assert len(load(items, limit=6)) == 6
    assert items.reads == 7  # one to see that the labels agree


def test_targets_that_disagree_are_not_used() -> None:
    items = Items(targets=True)
    items.targets = items.targets[1:] + [0]
    assert load(items).y.tolist() == labels().tolist()


class Failing(Items):
    def __getitem__(self, i: int):
        if i == 3:
            raise KeyError("lost")
        return super().__getitem__(i)


@pytest.mark.parametrize("targets", [False, True])
def test_errors_of_the_users_own_code_are_named(targets: bool) -> None:
    with pytest.raises(DataError, match="item 3 of Failing raised KeyError") as caught:
        load(Failing(targets=targets))
    assert isinstance(caught.value.__cause__, KeyError)


def test_pairs_of_other_things() -> None:
    for wrong in ((["a"] * 12, labels()), (pixels(), ["a"] * 12), (pixels(), 3)):
        with pytest.raises(DataError):
            load(wrong)


# CleanData


def test_split_is_stratified() -> None:
    y = np.array([0] * 10 + [1] * 2 + [2] + [3] * 7)
    data = load((pixels(20), y))
    rest, held = data.split(0.3, 0)
    assert rest.facts.per_class == (7, 1, 1, 5)
    assert held.facts.per_class == (3, 1, 0, 2)
    assert len(rest) + len(held) == 20
    assert rest.facts.count == 14
    assert data.split(0.3, 0)[1].facts == held.facts
    assert data.split(0.3, 1)[1].facts.sha256 != held.facts.sha256
    joined = torch.cat([rest.x, held.x]).flatten(1)
    assert len(torch.unique(joined, dim=0)) == 20
    for wrong in (0, 1, -0.5):
        with pytest.raises(SettingError):
            data.split(wrong, 0)


def test_hash_is_of_pixels_and_labels(tmp_path: Path) -> None:
    first = load((pixels(), labels()))
    assert load(npz(tmp_path, x=pixels(), y=labels())).facts.sha256 == first.facts.sha256
    changed = pixels()
    changed[3, 0, 0, 0] ^= 1
    assert load((changed, labels())).facts.sha256 != first.facts.sha256
    assert load((pixels(), np.roll(labels(), 1))).facts.sha256 != first.facts.sha256
    assert first.take(torch.arange(12)).facts == first.facts
