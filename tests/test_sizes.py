"""Which size images are brought to, where the weights do not say it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bezoar.nets.registry import find, takes_any_size
from bezoar.options import ModelOptions, RunOptions
from bezoar.session import open_session


@pytest.mark.parametrize(
    ("name", "expected"),
    [("convnet-16-bn", True), ("wrn-16-1", True), ("resnet-20", True), ("nc-mnist", False), ("small-vgg", False)],
)
def test_nets_that_take_any_size(name, expected):
    assert takes_any_size(name) is expected


def model(tmp_path: Path) -> Path:
    found = find("convnet-16")
    assert found is not None
    torch.manual_seed(0)
    save_file(found[0](4, 1, 28).state_dict(), tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


def used(path: Path, images: int, **options: object) -> tuple[int, int]:
    data = (torch.rand(40, 1, images, images), torch.arange(40) % 4)
    given = ModelOptions(arch="convnet-16", **options)  # type: ignore[arg-type]
    with open_session(path, data, given, RunOptions(), None) as session:
        return session.suspect.facts.height, session.suspect.facts.width


@pytest.fixture(autouse=True)
def untrained_net_is_no_fault(monkeypatch):
    monkeypatch.setattr("bezoar.session.check_preflight", lambda *_: ())


def test_images_keep_their_size_where_the_net_takes_any(tmp_path):
    assert used(model(tmp_path), 28) == (28, 28), "not 32, the usual size of this net"
    assert used(model(tmp_path), 32) == (32, 32)


def test_much_larger_images_are_brought_to_the_usual_size(tmp_path):
    assert used(model(tmp_path), 96) == (32, 32)


def test_user_knows_better(tmp_path):
    assert used(model(tmp_path), 28, size=40) == (40, 40)
