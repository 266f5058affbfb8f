"""Training on a source of examples is training on the images that it gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bezoar.core.errors import SettingError
from bezoar.core.examples import Examples, ExampleSource, Subset
from bezoar.ops._checkpoint import digest
from bezoar.ops.fit import Recipe, fit
from tests.toys import LABELS, SIZE, images, net

RECIPE = Recipe(epochs=2, batch=16, lr=0.05, pad=1, flip=True)


class Counting:
    """A source that is no dataclass, and counts what is read at a time."""

    def __init__(self, x: Tensor, labels: Tensor, sha256: str | None = None) -> None:
        self.x, self.labels, self.num_classes, self.shape = x, labels, LABELS, (3, SIZE, SIZE)
        self.most = self.read = 0
        if sha256 is not None:
            self.sha256 = sha256

    def take(self, rows: Tensor) -> Tensor:
        self.most, self.read = max(self.most, len(rows)), self.read + len(rows)
        return self.x[rows]


def weights(model: torch.nn.Module) -> list[Tensor]:
    return list(model.state_dict().values())


@pytest.mark.parametrize("levels", [False, True], ids=["float", "uint8"])
def test_streamed_training_ends_in_the_same_weights(levels):
    x, y = images(90, seed=1)
    x = (x * 255).round().to(torch.uint8) if levels else x
    whole, streamed, source = net(0), net(0), Counting(x, y)
    assert isinstance(source, ExampleSource)
    losses = fit(whole, x, y, RECIPE, seed=3)
    assert fit(streamed, source, source.labels, RECIPE, seed=3) == losses
    assert all(map(torch.equal, weights(whole), weights(streamed)))
    assert source.most == 16
    assert source.read == 2 * 90


def test_subset_is_the_subset():
    x, y = images(90, seed=1)
    rows = torch.arange(90)[::2].flip(0)
    whole, streamed = net(0), net(0)
    part = Subset(Examples(x, y, LABELS), rows)
    assert (part.shape, part.num_classes) == ((3, SIZE, SIZE), LABELS)
    fit(whole, x[rows], y[rows], RECIPE, seed=3)
    fit(streamed, part, part.labels, RECIPE, seed=3)
    assert all(map(torch.equal, weights(whole), weights(streamed)))


def test_checkpoint_of_other_images_is_refused(tmp_path):
    x, y = images(90, seed=1)
    fit(net(0), Counting(x, y), y, RECIPE, checkpoint=tmp_path / "a.pt")
    fit(net(0), Counting(x.clone(), y), y, RECIPE, checkpoint=tmp_path / "a.pt")
    other = x.clone()
    other[70, 0, 0, 0] += 0.01
    with pytest.raises(SettingError, match="other images"):
        fit(net(0), Counting(other, y), y, RECIPE, checkpoint=tmp_path / "a.pt")


def test_a_known_hash_is_trusted_and_nothing_is_read():
    x, y = images(30, seed=1)
    source = Counting(x, y, sha256="abc")
    assert digest(source) == digest(Counting(x + 1, y, sha256="abc")) != digest(Counting(x, y, sha256="abd"))
    assert source.read == 0
    rows = torch.arange(5)
    assert digest(Subset(source, rows)) != digest(Subset(source, rows + 1))
    assert digest(Subset(source, rows)) == digest(Subset(Counting(x, y, sha256="abc"), rows.clone()))


def test_content_is_hashed_a_few_at_a_time():
    x, y = torch.rand(3000, 1, 2, 2), torch.zeros(3000, dtype=torch.int64)
    source = Counting(x, y)
    assert digest(source) == digest(Examples(x, y, LABELS))
    assert source.most == 1024
    assert source.read == 3000


def test_several_devices_want_images_in_memory():
    x, y = images(32, seed=1)
    with pytest.raises(SettingError, match="in memory"):
        fit(net(0), Counting(x, y), y, RECIPE, devices=2)
