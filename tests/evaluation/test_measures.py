"""The measures, held to their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bezoar.attacks._attack import Control, GroundTruth, Plant
from bezoar.attacks._labels import LabelMap
from bezoar.core.errors import SettingError
from bezoar.core.trigger import MaskedTrigger
from bezoar.evaluation.measures import Counts, Rate, all_to_one, count, der, measure, predict, rir

K = 4


class Corner(nn.Module):
    """Says what the pixel in the corner says: grey level k is class k."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return nn.functional.one_hot((x[:, 0, 0, 0] * 255).round().long(), K).float()


def says(label: int) -> MaskedTrigger:
    """Makes `Corner` say a label."""
    mask = torch.zeros(1, 2, 2)
    mask[0, 0, 0] = 1
    return MaskedTrigger(mask, torch.full((1, 2, 2), label / 255))


def images(said: list[int]) -> torch.Tensor:
    x = torch.zeros(len(said), 1, 2, 2, dtype=torch.uint8)
    x[:, 0, 0, 0] = torch.tensor(said)
    return x


def plant(kind: str = "all-to-one", sources: tuple[int, ...] = (), target: int = 2) -> GroundTruth:
    return GroundTruth((Plant(says(target), LabelMap(K, target, kind, sources)),))


def counted(y: list[int], clean: list[int], triggered: list[int], truth: GroundTruth) -> Counts:
    return Counts.of(
        torch.tensor(y), torch.tensor(clean), [torch.tensor(triggered)], [p.labels for p in truth.plants], k=K
    )


def test_rates_by_hand():
    truth = plant()
    y, clean, triggered = [0, 0, 1, 1, 2, 2, 3, 3], [0, 0, 1, 0, 2, 2, 3, 2], [2, 0, 2, 2, 2, 3, 3, 1]
    found = counted(y, clean, triggered, truth).measures(truth)
    assert found.acc.value == 6 / 8
    assert [r.value for r in found.acc_per_class] == [1, 0.5, 1, 0.5]
    assert (found.asr.value, found.asr.count) == (3 / 6, 6)  # the two images of the target are left out
    assert found.ra.value == 2 / 6
    assert found.main.asr_inclusive.value == 4 / 8
    assert [r.value for r in found.main.asr_per_class[:2]] == [0.5, 1]
    assert found.main.asr_per_class[2].count == 0
    assert math.isnan(found.main.asr_per_class[2].value)
    assert found.main.asr_other is None


def test_inclusive_follows_from_exclusive_where_classes_are_balanced():
    truth = plant()
    y = [k for k in range(K) for _ in range(5)]
    triggered = [2, 2, 0, 1, 2] + [2] * 5 + [2, 2, 2, 0, 1] + [3] * 5
    found = counted(y, y, triggered, truth).measures(truth)
    recall = 3 / 5
    assert found.main.asr_inclusive.value == pytest.approx(((K - 1) * found.asr.value + recall) / K)


def test_clean_model_reads_near_one_in_k_inclusive():
    truth = plant()
    y = [k for k in range(K) for _ in range(5)]
    found = counted(y, y, y, truth).measures(truth)
    assert found.asr.value == 0
    assert found.main.asr_inclusive.value == 1 / K


def test_all_to_all_leaves_no_class_out():
    truth = plant("all-to-all")
    found = counted([0, 1, 2, 3], [0, 1, 2, 3], [1, 2, 3, 3], truth).measures(truth)
    assert found.asr.value == found.main.asr_inclusive.value == 3 / 4
    assert found.ra.value == 1 / 4
    assert found.main.asr_other is None


def test_source_classes_are_told_from_others():
    truth = plant(sources=(0,))
    found = counted([0, 0, 1, 3, 2], [0, 0, 1, 3, 2], [2, 2, 2, 3, 2], truth).measures(truth)
    assert (found.asr.value, found.asr.count) == (1, 2)
    assert found.main.asr_other is not None
    assert (found.main.asr_other.value, found.main.asr_other.count) == (0.5, 2)
    assert (found.main.asr_inclusive.value, found.main.asr_inclusive.count) == (1, 3)


def test_interval_of_a_rate():
    rate = Rate.of(8, 10)
    assert (rate.value, rate.count) == (0.8, 10)
    assert (rate.low, rate.high) == (pytest.approx(0.4901625), pytest.approx(0.9433178))
    assert (Rate.of(0, 5).low, Rate.of(5, 5).high) == (0, 1)
    assert str(rate) == "80.0% (49.0% to 94.3%)"
    assert (Rate.of(0, 0).low, Rate.of(0, 0).high, str(Rate.of(0, 0))) == (0, 1, "no images")


rows = st.lists(st.tuples(*[st.integers(0, K - 1)] * 4), min_size=1, max_size=30)


@given(rows, st.lists(st.integers(0, 30), max_size=4))
def test_any_division_gives_the_same(drawn, cuts):
    truth = GroundTruth((*plant().plants, *plant("all-to-all", (1, 3)).plants))
    maps = [p.labels for p in truth.plants]
    table = torch.tensor(drawn)

    def of(part: torch.Tensor) -> Counts:
        return Counts.of(part[:, 0], part[:, 1], [part[:, 2], part[:, 3]], maps, k=K)

    edges = [0, *sorted(min(c, len(table)) for c in cuts), len(table)]
    parts = [of(table[a:b]) for a, b in zip(edges, edges[1:], strict=False)]
    merged = parts[-1]
    for part in parts[:-1]:
        merged = merged + part
    assert merged == of(table)
    assert repr(merged.measures(truth)) == repr(of(table).measures(truth))


def test_counts_of_different_triggers_do_not_merge():
    one = counted([0], [0], [2], plant())
    with pytest.raises(ValueError, match="shorter"):
        one + Counts(one.total, one.right)


@pytest.mark.parametrize("batch", [1, 3, 100])
@pytest.mark.parametrize("floats", [False, True])
def test_measures_a_model(batch, floats):
    y = torch.tensor([0, 1, 2, 3, 0, 1, 1])
    x = images([0, 1, 2, 3, 0, 1, 0])
    x = x.float() / 255 if floats else x
    assert predict(Corner(), x, batch=batch).tolist() == [0, 1, 2, 3, 0, 1, 0]
    assert predict(Corner(), x, says(3), batch=batch).tolist() == [3] * 7
    found = measure(Corner(), x, y, all_to_one(says(3), 3, K), batch=batch)
    assert (found.acc.value, found.asr.value, found.ra.value) == (6 / 7, 1, 0)
    assert found.main.asr.count == 6


def test_several_triggers_are_measured_apart():
    y = torch.tensor([0, 1, 2, 3])
    truth = GroundTruth((Plant(says(3), LabelMap(K, 3), "a"), Plant(says(1), LabelMap(K, 0), "b")))
    found = measure(Corner(), images([0, 1, 2, 3]), y, truth)
    assert [(p.name, p.asr.value) for p in found.plants] == [("a", 1), ("b", 0)]
    assert found.plants[1].ra.value == 1 / 3


def test_clean_accuracy_alone():
    found = measure(Corner(), images([0, 1]), torch.tensor([0, 0]))
    assert (found.acc.value, found.plants) == (0.5, ())
    assert len(count(Corner(), images([0, 1]), torch.tensor([0, 0]), num_classes=K).total) == K


@pytest.mark.parametrize(("x", "y"), [(images([]), []), (images([0]), [K]), (images([0]), [-1])])
def test_bad_test_images_are_refused(x, y):
    with pytest.raises(SettingError, match="test"):
        measure(Corner(), x, torch.tensor(y, dtype=torch.long), plant())


def test_der_of_the_worked_example():
    assert der(acc=(0.9296, 0.9082), asr=(1.0, 0.0174)) == pytest.approx(0.9806)


def test_der_and_rir_of_the_corners():
    assert der(acc=(0.9, 0.9), asr=(0.7, 0.7)) == 0.5
    assert der(acc=(0.9, 1.0), asr=(0.7, 0.9)) == 0.5  # gains of ACC and losses of ASR do not count
    assert der(acc=(1.0, 0.0), asr=(0.0, 1.0)) == 0
    assert rir(acc=(1.0, 1.0), ra=(0.0, 1.0)) == 1
    assert rir(acc=(0.9, 0.8), ra=(0.1, 0.7)) == pytest.approx((0.6 - 0.1 + 1) / 2)


def test_control_is_measured_by_the_true_label():
    truth = GroundTruth(plant().plants, controls=(Control(says(1), "noise"),))
    x, y = images([0, 1, 1, 2]), torch.tensor([0, 1, 1, 2])
    found = measure(Corner(), x, y, truth)
    (control,) = found.controls
    assert (control.name, control.acc.value, control.acc.count) == ("noise", 0.5, 4)
    merged = count(Corner(), x[:1], y[:1], truth) + count(Corner(), x[1:], y[1:], truth)
    assert merged.measures(truth) == found
