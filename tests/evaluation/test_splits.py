"""Training and test images of a victim."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from bezoar.core.errors import DataError
from bezoar.evaluation.splits import levels, read_splits, stratified
from bezoar.ops.fit import as_float


def arrays(count: int, classes: int = 3, seed: int = 0, channels: int = 3) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    x = random.integers(0, 256, (count, 9, 8, channels), dtype=np.uint8)
    return x, np.arange(count) % classes


def npz(path, **more):
    (train_x, train_y), (test_x, test_y) = arrays(30), arrays(12, seed=1)
    np.savez(path, train_x=train_x, train_y=train_y, test_x=test_x, test_y=test_y, names=["a", "b", "c"], **more)
    return path


def test_both_parts_of_an_npz(tmp_path):
    splits = read_splits(npz(tmp_path / "both.npz"))
    assert torch.equal(splits.train.x, torch.from_numpy(arrays(30)[0]).permute(0, 3, 1, 2))
    assert torch.equal(splits.test.x, torch.from_numpy(arrays(12, seed=1)[0]).permute(0, 3, 1, 2))
    assert splits.train.y.tolist() == arrays(30)[1].tolist()
    assert (splits.train.num_classes, splits.names) == (3, ("a", "b", "c"))
    assert splits.test_positions is None
    assert splits.train_positions.tolist() == list(range(30))
    assert splits.whole
    assert splits.train_facts.path.endswith("both.npz:train")


def test_channels_first_is_read_the_same(tmp_path):
    (train_x, train_y), (test_x, test_y) = arrays(30), arrays(12, seed=1)
    first = {"train_x": train_x.transpose(0, 3, 1, 2), "test_x": test_x.transpose(0, 3, 1, 2)}
    np.savez(tmp_path / "first.npz", train_y=train_y, test_y=test_y, **first)
    one, other = read_splits(tmp_path / "first.npz"), read_splits(npz(tmp_path / "both.npz"))
    assert torch.equal(one.train.x, other.train.x)
    assert one.test_facts.sha256 == other.test_facts.sha256


def test_a_tenth_of_each_class_is_held_out(tmp_path):
    x, y = arrays(60)
    np.savez(tmp_path / "one.npz", x=x, y=y)
    splits = read_splits(str(tmp_path / "one.npz"), seed=3)
    assert splits.test_positions is not None
    assert torch.bincount(splits.test.y).tolist() == [2, 2, 2]
    assert not splits.whole
    together = torch.cat([splits.train_positions, splits.test_positions])
    assert together.sort().values.tolist() == list(range(60))
    for part, positions in ((splits.train, splits.train_positions), (splits.test, splits.test_positions)):
        assert torch.equal(part.x, torch.from_numpy(x).permute(0, 3, 1, 2)[positions])
        assert torch.equal(part.y, torch.from_numpy(y)[positions])
    assert read_splits(tmp_path / "one.npz", seed=3).train_facts == splits.train_facts
    assert read_splits(tmp_path / "one.npz", seed=4).train_facts != splits.train_facts


def test_other_test_images_from_a_folder(tmp_path):
    for i, (image, label) in enumerate(zip(*arrays(6, seed=2), strict=True)):
        (tmp_path / "test" / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).resize((16, 18)).save(tmp_path / "test" / str(label) / f"{i}.png")
    splits = read_splits(npz(tmp_path / "both.npz"), tmp_path / "test")
    assert splits.test.x.shape == (6, 3, 9, 8)  # brought to the size of the training images


def test_fewer_training_images(tmp_path):
    splits = read_splits(npz(tmp_path / "both.npz"), limit=9)
    assert torch.bincount(splits.train.y).tolist() == [3, 3, 3]
    assert torch.equal(splits.train.x, torch.from_numpy(arrays(30)[0]).permute(0, 3, 1, 2)[splits.train_positions])
    assert len(splits.test.x) == 12


def test_training_images_are_no_test_images(tmp_path):
    x, y = arrays(30)
    np.savez(tmp_path / "x.npz", x=x, y=y)
    with pytest.raises(DataError, match="are the training images"):
        read_splits(tmp_path / "x.npz", tmp_path / "x.npz")


@pytest.mark.parametrize("name", ["no-such-folder", "cifar-11", "cifar-10:valid"])
def test_unknown_data(name, tmp_path, monkeypatch):
    monkeypatch.setenv("BEZOAR_CACHE", str(tmp_path))
    with pytest.raises(DataError):
        read_splits(name)


def test_a_data_set_by_name_brings_both_parts(tmp_path, monkeypatch):
    monkeypatch.setenv("BEZOAR_CACHE", str(tmp_path))
    with pytest.raises(DataError, match="cifar-10 is not here yet"):
        read_splits("cifar-10")


@given(st.lists(st.integers(0, 255), min_size=1, max_size=20))
def test_grey_levels_stay_what_they_are(drawn):
    x = torch.tensor(drawn, dtype=torch.uint8).view(-1, 1, 1, 1)
    assert torch.equal(levels(as_float(x)), x)
    between = as_float(x) * 0.999 + 1e-4
    assert torch.equal(levels(between), between)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.floats(0.01, 0.99), st.integers(0, 5))
def test_division_is_stratified(labels, share, seed):
    y = torch.tensor(labels)
    train, test = stratified(y, share, seed)
    assert torch.cat([train, test]).sort().values.tolist() == list(range(len(y)))
    for label in set(labels):
        total, held = int((y == label).sum()), int((y[test] == label).sum())
        assert (held == 0) == (total == 1)
        assert total == 1 or abs(held - share * total) <= max(1, 0.5)
        assert held < total
