"""Two processes on the CPU train as one does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bezoar.core.errors import SettingError
from bezoar.ops.fit import Recipe, fit
from bezoar.ops.parallel import Worker
from tests.toys import images

RECIPE = Recipe(epochs=3, batch=8, lr=0.05, pad=1, flip=True, mixup=0.5)


class Kill(Exception):
    pass


def small() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(400, 6))


def close(model: nn.Module, other: nn.Module) -> None:
    for parameter, wanted in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(parameter, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_two_devices_end_like_one():
    x, y = images(24, seed=0)
    wanted, model, told = small(), small(), []
    losses = fit(wanted, x, y, RECIPE, seed=1)
    found = fit(model, x, y, RECIPE, seed=1, devices=2, progress=lambda done, total, _: told.append((done, total)))
    assert found == pytest.approx(losses)
    assert told == [(done, 9) for done in range(1, 10)]
    assert not model.training
    close(model, wanted)


@pytest.mark.slow
def test_two_devices_go_on_after_a_kill(tmp_path):
    x, y = images(24, seed=0)
    wanted, model, told, path = small(), small(), [], tmp_path / "net.pt"
    losses = fit(wanted, x, y, RECIPE, seed=1)

    def progress(done: int, *_: object) -> None:
        told.append(done)
        if len(told) == 5:
            raise Kill

    with pytest.raises(Kill):
        fit(small(), x, y, RECIPE, seed=1, devices=2, checkpoint=path, progress=progress)
    assert path.exists() and told == [1, 2, 3, 4, 5]
    with pytest.raises(SettingError, match="other seed"):
        fit(small(), x, y, RECIPE, seed=2, devices=2, checkpoint=path)
    assert fit(model, x, y, RECIPE, seed=1, devices=2, checkpoint=path, progress=progress) == pytest.approx(losses)
    assert told[5:] == list(range(10 - len(told[5:]), 10)) and len(told[5:]) < 9, "it went on, to the end"
    close(model, wanted)


def test_what_cannot_be_shared():
    x, y = images(24, seed=0)
    with pytest.raises(SettingError, match="batch of 8 cannot be shared by 3 devices"):
        fit(small(), x, y, RECIPE, devices=3)
    with pytest.raises(SettingError, match="batch of 8 cannot be shared by 0 devices"):
        fit(small(), x, y, RECIPE, devices=0)
    with pytest.raises(SettingError, match="one device|several devices"):
        fit(small(), x, y, RECIPE, devices=2, stamp=lambda images, _: images)


@pytest.mark.parametrize(("count", "world"), [(8, 2), (7, 2), (11, 4), (3, 4)])
def test_shares_are_equal_and_cover_the_batch(count, world):
    index = torch.arange(count)
    workers = [Worker(rank, world) for rank in range(world)]
    whole = workers[0].whole_shares(index)
    assert len(whole) == count // world * world
    if len(whole):
        shares = [worker.share(whole) for worker in workers]
        assert {len(share) for share in shares} == {count // world}
        assert torch.equal(torch.cat(shares), whole)
