"""K-Arm: what is screened in, what the bandit goes by, and which label or pair it finds."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bezoar.core.errors import SettingError, UnsupportedModel
from bezoar.core.evidence import Scores
from bezoar.core.method import Clean
from bezoar.core.run import Run
from bezoar.core.space import MaskedSpace
from bezoar.ops.cost import CostController
from bezoar.scorers._arms import Aim, Arm
from bezoar.scorers.k_arm import KArm, first_answers, given_up
from tests.purifiers.nets import NAMES, few, make, toy_clean
from tests.toys import SOURCE, TARGET, images, source_specific, trained

BRIEF = KArm(rounds=3, patience=1, pull=2, pairs=2, least=3, checked=1)


class Fixed(nn.Module):
    """Gives an image the row of a table that its first pixel tells."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, x: Tensor) -> Tensor:
        return self.table[(x[:, 0, 0, 0] * 100).round().long()] + 0 * x.sum()


def numbered(count: int) -> Tensor:
    return torch.arange(count).view(-1, 1, 1, 1).expand(-1, 1, 4, 4) / 100


@functools.cache
def toy(backdoored: bool) -> Scores:
    return KArm(rounds=24, patience=6, batch=16, pairs=0)(trained(backdoored), toy_clean(), Run(seed=3))


def arm(aim: Aim, backdoored: bool = True) -> Arm:
    clean = toy_clean()
    controller = CostController(init_cost=0.07, multiplier=1.5, from_zero=False)
    space = MaskedSpace(clean.shape, start_mask=0.12)
    return Arm(aim, trained(backdoored), clean.x[aim.of(clean.y)], space, controller, 0.2, 16, Run(seed=3))


def test_first_answers_are_the_largest_logits_but_the_images_own_label():
    table = torch.arange(40.0).view(2, 20).flip(0)
    table[1, 7] = 99.0
    first = first_answers(Fixed(table), numbered(2), torch.tensor([19, 7]), 20, 0.25, torch.device("cpu"))
    assert torch.nonzero(first[0]).flatten().tolist() == [15, 16, 17, 18]
    assert torch.nonzero(first[1]).flatten().tolist() == [16, 17, 18, 19]
    few_labels = first_answers(Fixed(table[:, :8]), numbered(1), torch.tensor([0]), 8, 0.9, torch.device("cpu"))
    assert int(few_labels.sum()) == 2, "the first two where there are 8 labels or fewer"


def test_pairs_are_screened_by_the_images_of_their_source_and_labels_by_all():
    table = torch.zeros(10, 10)
    table[torch.arange(10), torch.arange(10)] = 9.0
    table[:, 4] += 5.0  # a second answer everywhere
    run, y = Run(), torch.arange(10)
    aims = KArm(gamma=0.2, least=1)
    found = aims.aims(Fixed(table), numbered(10), y, 10, run)
    assert [aim.target for aim in found if aim.source is None] == [4]
    pairs = {(aim.source, aim.target) for aim in found if aim.source is not None}
    assert sum(target == 4 for _, target in pairs) == 3, "at most 3 sources of a target"
    assert run.notes["labels_screened_in"] == 1, "its own images do not count"
    assert run.notes["pairs_screened_in"] >= 9
    assert KArm(pairs=0).aims(Fixed(table), numbered(10), y, 10, run) == [Aim(label) for label in range(10)]


def test_aim_takes_the_images_it_is_about():
    y = torch.tensor([0, 1, 2, 1])
    assert Aim(1).of(y).tolist() == [0, 2]
    assert Aim(1, 2).of(y).tolist() == [2]


def test_worth_is_the_authors_objective_in_their_pixels():
    one = arm(Aim(TARGET))
    one.pull(30)
    assert one.found >= 1
    now = one.now / 144 * 224**2
    assert one.worth(1e4) == pytest.approx(one.speed + 1e4 / now)
    assert one.scaled(144.0) == 224**2
    one.speed = -math.inf
    assert one.worth(1e4) == -math.inf, "an arm that never worked waits"


def test_trigger_is_the_smallest_that_worked():
    one = arm(Aim(TARGET))
    one.pull(60)
    assert one.steps == 60
    assert one.trigger.size == pytest.approx(one.size, rel=1e-4)
    assert one.size < 12
    x, y = images(120, seed=8)
    with torch.no_grad():
        assert float((trained(True)(one.trigger(x[y != TARGET])).argmax(1) == TARGET).float().mean()) > 0.9


def test_hopeless_pairs_are_given_up_and_labels_never():
    pair, label = arm(Aim(1, 0)), arm(Aim(1))
    for one in (pair, label):
        one.steps, one.reached = 11, 0.0
    assert given_up(pair)
    assert not given_up(label)
    pair.reached = 0.5
    assert not given_up(pair)
    pair.steps = 201
    assert given_up(pair)
    pair.found = 1
    assert not given_up(pair)


def test_planted_label_leads_and_the_clean_toy_scores_lower():
    found = toy(True)
    assert found.leader == TARGET
    assert found.model == found.labels[TARGET]
    assert found.model > toy(False).model + 0.2
    size = found.triggers[TARGET].size
    assert found.model == pytest.approx(math.log(1700 / 224**2 * 144 / size), rel=1e-4)
    assert found.suspect is (found.model > 0)


def test_planted_pair_leads():
    found = KArm(rounds=30, least=1, patience=7, batch=16)(source_specific(0), toy_clean(), Run(seed=3))
    assert max(found.pairs, key=found.pairs.__getitem__) == (SOURCE, TARGET)
    assert found.leader == TARGET
    assert found.labels[TARGET] == found.pairs[SOURCE, TARGET]
    others = [score for pair, score in found.pairs.items() if pair != (SOURCE, TARGET)]
    assert found.pairs[SOURCE, TARGET] > max(others) + 0.5


def test_a_pair_that_works_both_ways_is_not_suspect():
    one, clean = arm(Aim(1, 0)), toy_clean()
    one.size, one.found = 0.5, 1
    small = math.log(KArm.pair_bound * 144 / 0.5)
    score = KArm()._judge([one], {one.aim: 1.0}, clean).pairs[0, 1]
    assert score == pytest.approx(math.log(1 / 10))
    assert KArm()._judge([one], {}, clean).pairs[0, 1] == score, "not looked at is not suspect either"
    assert KArm()._judge([one], {one.aim: 1e6}, clean).pairs[0, 1] == pytest.approx(small)


@pytest.mark.parametrize("name", NAMES)
def test_architectures(name):
    found = BRIEF(make(name), few(24), Run())
    assert found.labels
    assert all(np.isfinite(value) for value in [*found.labels.values(), *found.pairs.values()])
    assert found.model == max(found.labels.values())
    assert found.triggers.keys() == found.labels.keys()


def test_same_seed_same_scores():
    first, again = (BRIEF(trained(True), toy_clean(), Run(seed=5)) for _ in range(2))
    assert (first.labels, first.pairs) == (again.labels, again.pairs)


def test_images_of_one_label_only():
    x, y = torch.rand(4, 3, 12, 12), torch.zeros(4, dtype=torch.long)
    clean = Clean(x=x, y=y, held_x=x[:0], held_y=y[:0], num_classes=1)
    with pytest.raises(UnsupportedModel, match="one label only"):
        BRIEF(nn.Sequential(nn.Flatten(), nn.Linear(432, 1)), clean, Run())


def test_two_labels_and_no_pair():
    x, y = torch.rand(8, 3, 12, 12), torch.arange(8) % 2
    clean = Clean(x=x, y=y, held_x=x[:0], held_y=y[:0], num_classes=2)
    assert BRIEF(nn.Sequential(nn.Flatten(), nn.Linear(432, 2)), clean, Run()).labels.keys() == {0, 1}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("gamma", 0.0), ("reach", 1.1), ("label_theta", -0.1), ("pair_theta", 1.1), ("epsilon", 2.0)),
        *(("label_bound", 0.0), ("pair_bound", 1.0), ("least", 0), ("pull", 0), ("batch", 0), ("warmup", 0)),
        *(("patience", 0), ("checked", 0), ("pairs", -1), ("rounds", -1), ("beta", -1.0), ("lr", 0.0)),
        *(("ratio_bound", 0.0), ("pressure", 0.0)),
    ],
)
def test_settings_out_of_range(name, value):
    with pytest.raises(SettingError, match=f"KArm.{name} must be"):
        KArm(**{name: value})
