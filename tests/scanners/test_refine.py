"""The second look at the leading label: where searches start, and that it is for the picture only."""

from __future__ import annotations

import pytest
import torch

from bezoar.core.method import Clean
from bezoar.core.run import Run
from bezoar.ops.verdict import judge
from bezoar.ops.windows import WindowSpace
from bezoar.scanners.neural_cleanse import NeuralCleanse
from tests.toys import LABELS, TARGET, images, trained


@pytest.fixture(scope="module")
def clean() -> Clean:
    x, y = images(180, seed=7)
    return Clean(x=x[:120], y=y[:120], held_x=x[120:], held_y=y[120:], num_classes=LABELS)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (10, 7), (4, 4)])
def test_windows_cover_the_image(height, width):
    space = WindowSpace((1, height, width))
    mask, pattern = space.values(space.start([5] * 16, seed=0))
    assert mask.shape == (16, 1, height, width)
    assert pattern.shape == (16, 1, height, width)
    inside = mask > 0.1
    assert bool(inside.any(0).all()), "each pixel lies in some window"
    assert bool(inside.flatten(1).any(1).all()), "each search starts somewhere"
    assert bool((inside.sum(0) == 1).all()), "windows do not overlap"
    torch.testing.assert_close(mask[inside], torch.full((int(inside.sum()),), 0.3), atol=1e-4, rtol=0)


def test_starts_of_one_label_differ():
    space = WindowSpace((3, 8, 8))
    _, pattern = space.values(space.start([5, 5], seed=0))
    assert not torch.equal(pattern[0], pattern[1])


def test_refined_trigger_is_smaller_and_no_part_of_the_verdict(clean):
    model = trained(backdoored=True)
    with_it = NeuralCleanse(seeds=1)(model, clean, Run())
    without = NeuralCleanse(seeds=1, refine=0)(model, clean, Run())
    assert set(with_it.refined) == {TARGET}
    assert without.refined == {}
    names = tuple("abcdef")
    assert judge(with_it, names) == judge(without, names)
    _, shown = with_it.smallest(TARGET)
    assert shown.size <= without.smallest(TARGET)[1].size
    found = with_it.refined[TARGET]
    assert found.size == pytest.approx(float(found.trigger.mask.sum()), rel=1e-4)
    assert found.asr >= 0.85
    rows, columns = torch.nonzero(found.trigger.mask[0] > 0.5, as_tuple=True)
    assert int(rows.min()) >= 9
    assert int(columns.min()) >= 9, "in the corner where it was planted"


def test_clean_net_gets_no_second_look(clean):
    assert NeuralCleanse(seeds=1)(trained(backdoored=False), clean, Run()).refined == {}
