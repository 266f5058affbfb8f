"""Inverted and true triggers side by side, against figures that can be counted by hand."""

from __future__ import annotations

import io
import json

import pytest
import torch
from PIL import Image
from torch import nn

from bezoar.attacks._attack import GroundTruth, Plant
from bezoar.attacks._labels import LabelMap
from bezoar.core.errors import SettingError
from bezoar.core.trigger import AdditiveTrigger, MaskedTrigger
from bezoar.evaluation.compare import compare, comparison_sheet, text, to_json
from bezoar.evaluation.measures import all_to_one
from tests.toys import LABELS, SIZE, TARGET, images, trained, trigger

NEURONS = 200


class Counting(nn.Module):
    """Neuron i is pixel i of the first row and column order; class 1 wins where pixel 0 or 1 is bright."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(NEURONS, 3)
        with torch.no_grad():
            self.head.weight.zero_()
            self.head.weight[1, :2] = 10.0
            self.head.bias.copy_(torch.tensor([1.0, 0.0, 0.0]))

    def forward(self, x):
        return self.head(x.flatten(1)[:, :NEURONS])


def bright(*pixels: int, value: float = 1.0) -> MaskedTrigger:
    mask = torch.zeros(1, 10, 20)
    mask.view(-1)[list(pixels)] = 1
    return MaskedTrigger(mask, torch.full((1, 10, 20), value))


def dark(count: int = 30) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(count, 1, 10, 20), torch.arange(count) % 3


def test_figures_of_a_net_that_can_be_counted():
    x, y = dark()
    truth = all_to_one(bright(0, 5), 1, 3)
    inverted = {1: bright(0, 7, value=0.5)}
    (found,) = compare(Counting(), x, y, truth, inverted)
    assert (found.neurons, found.top) == (NEURONS, 2)
    assert (found.clean.value, found.inverted.value, found.true.value) == (0.0, 1.0, 1.0)
    assert found.true.count == 20, "the target class is left out"
    assert (found.inverted_size, found.true_size) == (2.0, 2.0)
    assert found.overlap == pytest.approx(1 / 3)
    assert found.neuron_iou == pytest.approx(1 / 3), "0 and 7 against 0 and 5"
    assert found.activity.clean == 0
    assert found.activity.inverted == pytest.approx(0.5)
    assert found.activity.true == pytest.approx(0.5), "of 0 and 7, the true trigger raises 0 alone, to 1"


def test_share_of_the_neurons():
    x, y = dark()
    (found,) = compare(Counting(), x, y, all_to_one(bright(0), 1, 3), {1: bright(0)}, top=0.001)
    assert (found.top, found.neuron_iou, found.overlap) == (1, 1.0, 1.0)
    with pytest.raises(SettingError, match="top"):
        compare(Counting(), x, y, all_to_one(bright(0), 1, 3), {1: bright(0)}, top=0.0)


def test_images_of_the_sources_only():
    x, y = dark()
    truth = GroundTruth((Plant(bright(0), LabelMap(3, 1, sources=(2,))),))
    (found,) = compare(Counting(), x, y, truth, {1: bright(3)})
    assert found.true.count == 10
    assert (found.true.value, found.inverted.value) == (1.0, 0.0)


def test_faint_changes_have_no_mask():
    x, y = dark()
    (found,) = compare(Counting(), x, y, all_to_one(bright(0), 1, 3), {1: AdditiveTrigger(torch.ones(1, 10, 20))})
    assert (found.inverted_size, found.overlap) == (None, None)
    assert json.loads(to_json((found,)))["comparisons"][0]["overlap"] is None


def test_only_planted_labels_that_were_inverted():
    x, y = dark()
    truth = GroundTruth((Plant(bright(0), LabelMap(3, 1)), Plant(bright(1), LabelMap(3, kind="all-to-all"))))
    assert len(compare(Counting(), x, y, truth, {1: bright(0), 2: bright(4)})) == 1
    with pytest.raises(SettingError, match=r"planted \[1\], inverted \[2\]"):
        compare(Counting(), x, y, truth, {2: bright(4)})


def test_no_image_to_work_on():
    x, y = dark()
    truth = GroundTruth((Plant(bright(0), LabelMap(4, 1, sources=(3,))),))
    with pytest.raises(SettingError, match="no test image"):
        compare(Counting(), x, y, truth, {1: bright(0)})


def test_a_backdoored_toy_raises_the_same_neurons():
    x, y = images(120, seed=8)
    model = trained(backdoored=True)
    modes = [module.training for module in model.modules()]
    (same,) = compare(model, x, y, all_to_one(trigger(), TARGET, LABELS), {TARGET: trigger()})
    assert same.neuron_iou == same.overlap == 1.0
    assert same.inverted == same.true
    assert same.activity.true > 2 * same.activity.clean
    assert [module.training for module in model.modules()] == modes
    far = MaskedTrigger(trigger().mask.flip(1, 2), torch.zeros(3, SIZE, SIZE))
    (other,) = compare(model, x, y, all_to_one(trigger(), TARGET, LABELS), {TARGET: far})
    assert other.neuron_iou < 0.5
    assert other.overlap == 0


def test_picture_and_words():
    x, y = images(24, seed=8)
    truth, inverted = all_to_one(trigger(), TARGET, LABELS), {TARGET: trigger()}
    sheet = Image.open(io.BytesIO(comparison_sheet(x, y, truth, inverted)))
    assert sheet.size[0] > 500
    assert len({sheet.getpixel((column, 80)) for column in range(sheet.size[0])}) > 5
    written = text(compare(trained(backdoored=True), x, y, truth, inverted))
    assert f"label {TARGET}, 20 test images" in written
    assert "L1 of the mask            -     4.0 px     4.0 px" in written
    assert "neurons 1.00; of the masks 1.00" in written
