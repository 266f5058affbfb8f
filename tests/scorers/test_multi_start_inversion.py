"""Masks of all labels from many starting places."""

from __future__ import annotations

import math

import pytest
import torch

from bezoar.core.errors import SettingError
from bezoar.core.run import Run
from bezoar.ops.windows import search_windows
from bezoar.scorers import multi_start_inversion
from bezoar.scorers.multi_start_inversion import MultiStartInversion
from tests.purifiers.nets import toy_clean
from tests.toys import LABELS, TARGET, trained


def test_planted_label_has_by_far_the_smallest_mask():
    run = Run(seed=0)
    found = MultiStartInversion(steps=40).scores(trained(backdoored=True), toy_clean(), run)
    others = [score for label, score in found.labels.items() if label != TARGET]
    assert found.leader == TARGET
    assert found.model == found.labels[TARGET] > max(others) + 0.5
    mask = found.triggers[TARGET].mask[0]
    assert mask[-3:, -3:].sum() > 0.8 * mask.sum()  # the planted corner
    assert run.image_gradients > 0


def test_clean_net_has_no_such_label():
    scores = {}
    for backdoored in (False, True):
        found = MultiStartInversion(steps=20).scores(trained(backdoored=backdoored), toy_clean(), Run(seed=0))
        scores[backdoored] = found.model
    assert scores[True] > scores[False] + 0.3


def test_scores_are_logarithms_of_size_ratios(monkeypatch):
    """Half the size of the median of the others is 0.69; a label without a working mask counts as the whole image."""
    sizes = {0: 8.0, 1: 4.0, 2: 8.0, 3: 16.0, 4: 8.0, 5: None}

    def searched(model, clean, label, **_):
        return None if sizes[label] is None else (sizes[label], None)

    monkeypatch.setattr(multi_start_inversion, "search_windows", searched)
    found = MultiStartInversion().scores(trained(backdoored=False), toy_clean(), Run(seed=0))
    assert len(found.labels) == LABELS
    assert found.labels[1] == pytest.approx(math.log(2))
    assert found.labels[3] == pytest.approx(math.log(0.5))
    assert found.labels[5] == pytest.approx(math.log(8 / 144))
    assert sorted(found.triggers) == [0, 1, 2, 3, 4]


def test_worse_half_is_dropped(monkeypatch):
    """16 starts: 40 % of the steps with all, then with 8, 4 and 2."""
    model, clean, run = trained(backdoored=True), toy_clean(), Run(seed=0)
    scorer = MultiStartInversion(steps=20)
    scorer.scores(model, clean, run)
    assert run.image_gradients == LABELS * scorer.batch * (8 * 16 + 4 * 8 + 4 * 4 + 4 * 2)


@pytest.mark.parametrize("settings", [{"steps": 4}, {"reach": 0}, {"reach": 1.5}, {"batch": 0}, {"lr": 0}])
def test_bad_settings(settings):
    with pytest.raises(SettingError):
        MultiStartInversion(**settings)


def test_none_where_no_mask_works():
    from bezoar.ops.cost import CostController
    from bezoar.ops.invert import InversionSettings

    class Stubborn(torch.nn.Module):
        def forward(self, x):
            return torch.stack([x.mean((1, 2, 3)), 10 - x.mean((1, 2, 3))], 1)

    controller = CostController(init_cost=0.01, patience=5, multiplier=1.5, reach=0.99, from_zero=False)
    clean = toy_clean()
    found = search_windows(
        Stubborn(), clean, 0, controller=controller, settings=InversionSettings(), steps=5, seed=0, run=Run(seed=0)
    )
    assert found is None
