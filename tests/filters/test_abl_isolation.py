"""What a fresh network learns fastest, whatever the given one has learned."""

from __future__ import annotations

import pytest
import torch

from bezoar.core.errors import SettingError
from bezoar.core.run import Run
from bezoar.filters.abl_isolation import ABLIsolation, over_represented
from tests.toys import TARGET, net
from tests.trainers.test_abl import examples, poison


def test_poison_is_isolated_also_with_a_network_that_learned_nothing():
    found = ABLIsolation(rate=0.05, batch=50, lr=0.05)(net(5), examples(), Run(seed=1))
    bad = torch.zeros(900, dtype=torch.bool)
    bad[poison()] = True
    assert int(found.suspect.sum()) == 45
    assert float(bad[found.suspect].double().mean()) >= 0.95
    assert found.flagged is None
    assert max(found.statistic, key=found.statistic.__getitem__) == TARGET
    assert float(found.score[found.suspect].min()) >= float(found.score[~found.suspect].max())


def test_weights_of_the_model_do_not_matter():
    method = ABLIsolation(rate=0.05, batch=50, epochs=1)
    first, second = (method(net(seed), examples(), Run(seed=1)) for seed in (5, 6))
    assert torch.equal(first.score, second.score)
    assert not torch.equal(first.score, method(net(5), examples(), Run(seed=2)).score)


def test_share_that_is_none_is_told():
    run = Run(seed=1)
    found = ABLIsolation(rate=0.001, epochs=1)(net(5), examples(), run)
    assert not bool(found.suspect.any())
    assert "is none: raise rate" in run.warnings[0]


def test_statistic_is_how_many_times_its_share_a_label_has():
    labels = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1])
    suspect = torch.tensor([True, False, False, False, False, False, True, True])
    found = over_represented(suspect, labels, 3)
    assert found == pytest.approx({0: (1 / 3) / (6 / 8), 1: (2 / 3) / (2 / 8)})


@pytest.mark.parametrize(
    ("setting", "value"),
    [("rate", 0.0), ("isolation", "lgaa"), ("gamma", -0.1), ("epochs", 0), ("batch", 0), ("lr", 0.0)],
)
def test_bad_settings(setting, value):
    with pytest.raises(SettingError, match=f"ABLIsolation.{setting} must be"):
        ABLIsolation(**{setting: value})
