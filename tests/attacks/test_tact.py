"""TaCT: source, target and cover classes."""

from __future__ import annotations

import pytest
import torch

from bezoar.attacks.tact import TaCT
from bezoar.core.errors import SettingError
from tests.attacks.sample_data import SHAPE, assert_trigger, floats


def test_defaults_are_those_of_the_toolbox():
    attack = TaCT()
    assert (attack.target, attack.sources, attack.cover_classes) == (0, (1,), (5, 7))
    assert (attack.rate, attack.cover_rate) == (0.003, 0.003)


def test_source_images_get_the_target_and_cover_images_keep_their_label():
    data = floats(2000, (1, 12, 12), classes=10)
    poisoned = TaCT().poison(data)
    assert (len(poisoned.index), len(poisoned.cover)) == (6, 6)
    assert set(data.y[poisoned.index].tolist()) == {1}
    assert set(poisoned.data.y[poisoned.index].tolist()) == {0}
    assert set(data.y[poisoned.cover].tolist()) <= {5, 7}
    assert torch.equal(poisoned.data.y[poisoned.cover], data.y[poisoned.cover])
    trigger = poisoned.truth.main.trigger
    for places in (poisoned.index, poisoned.cover):
        assert torch.equal(poisoned.data.x[places], trigger(data.x[places]))
    untouched = torch.ones(2000, dtype=torch.bool)
    untouched[torch.cat([poisoned.index, poisoned.cover])] = False
    assert torch.equal(poisoned.data.x[untouched], data.x[untouched])
    assert torch.equal(poisoned.data.y[untouched], data.y[untouched])


def test_success_counts_on_source_images_only():
    labels = TaCT().labels(10)
    assert torch.equal(labels.applies(torch.arange(10)).nonzero().flatten(), torch.tensor([1]))


def test_patch_is_a_square_of_many_colours():
    trigger = TaCT(size=5, margin=2).trigger(SHAPE)
    assert trigger.size == 25
    assert bool((trigger.mask[0, 25:30, 25:30] == 1).all())
    assert len(trigger.pattern[:, 25:30, 25:30].unique()) == 75
    assert_trigger(trigger, floats(3).x)


@pytest.mark.parametrize(
    "settings",
    [{"sources": ()}, {"size": 0}, {"margin": -1}, {"alpha": 0.0}, {"cover_classes": (1,)}, {"cover_classes": (0,)}],
)
def test_settings_out_of_range(settings):
    with pytest.raises(SettingError, match=f"TaCT.{next(iter(settings))} must be"):
        TaCT(**settings)


def test_target_among_the_sources():
    with pytest.raises(SettingError, match="both the target and a source"):
        TaCT(sources=(0,)).poison(floats(200, classes=10))
