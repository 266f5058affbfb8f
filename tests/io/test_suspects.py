"""Lists of suspects: written, read back, and held against the data that they are about."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from bezoar.core.errors import DataError
from bezoar.io.suspects import read_suspects, suspects_csv


@pytest.fixture
def data(tmp_path):
    """An npz of 30 images whose first pixel tells the position."""
    x = np.full((30, 8, 8, 3), 100, dtype=np.uint8)
    x[:, 0, 0, 0] = np.arange(30)
    path = tmp_path / "data.npz"
    np.savez(path, x=x, y=np.arange(30) % 3)
    return path


def write(tmp_path, text: str):
    path = tmp_path / "suspects.csv"
    path.write_text(text)
    return path


def read(listed, data, **more):
    return read_suspects(listed, data, **{"size": (8, 8), "channels": 3, "num_classes": 3} | more)


def test_list_comes_back_in_its_order(tmp_path, data):
    rows = [(7, "a.png", 1, 3.5), (2, "b, or c.png", 2, 2.25), (29, '"d".png', 2, 1e-9)]
    x, y = read(write(tmp_path, suspects_csv(rows)), data)
    assert (x[:, 0, 0, 0] * 255).round().tolist() == [7, 2, 29]
    assert y.tolist() == [1, 2, 2]
    assert x.dtype == torch.float32
    assert len(read(tmp_path / "suspects.csv", data, most=2)[1]) == 2


def test_same_example_twice_is_given_twice(tmp_path, data):
    x, _ = read(write(tmp_path, "position,label\n4,1\n4,1\n"), data)
    assert (x[:, 0, 0, 0] * 255).round().tolist() == [4, 4]


def test_names_cannot_become_formulas():
    assert suspects_csv([(1, "=cmd()", 0, 1.0)]).splitlines()[1] == "1,'=cmd(),0,1"


def test_only_the_images_on_the_list_are_decoded(tmp_path):
    for label in ("0", "1"):
        (tmp_path / "images" / label).mkdir(parents=True)
        Image.fromarray(np.full((8, 8, 3), 90, np.uint8)).save(tmp_path / "images" / label / "good.png")
        (tmp_path / "images" / label / "worse.png").write_bytes(b"not an image")
    x, y = read(write(tmp_path, "position,label\n2,1\n"), tmp_path / "images", num_classes=2)
    assert x.shape == (1, 3, 8, 8)
    assert y.tolist() == [1]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "lists no suspects"),
        ("position,label\n", "lists no suspects"),
        ("place,label\n1,1\n", "no column 'position'"),
        ("position,label\n1,0\n", "do not agree"),
        ("position,label\n99,0\n", "names example 99 of 30"),
        ("position,label\n-1,2\n", "negative"),
        ("position,label\n1.5,1\n", "cannot read"),
        ("position,label\n1\n", "cannot read"),
        ("position,label\n99999999999999999999,1\n", "cannot read"),
    ],
)
def test_bad_lists_are_refused(tmp_path, data, text, told):
    with pytest.raises(DataError, match=told) as caught:
        read(write(tmp_path, text), data)
    assert caught.value.hint


def test_missing_or_binary_list_is_refused(tmp_path, data):
    with pytest.raises(DataError, match="cannot read"):
        read(tmp_path / "absent.csv", data)
    (tmp_path / "binary.csv").write_bytes(bytes(range(256)))
    with pytest.raises(DataError, match="cannot read"):
        read(tmp_path / "binary.csv", data)


def test_label_that_the_model_does_not_have_is_refused(tmp_path, data):
    with pytest.raises(DataError, match="do not agree"):
        read(write(tmp_path, "position,label\n2,2\n"), data, num_classes=2)
