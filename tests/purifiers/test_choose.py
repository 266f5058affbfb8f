"""Choosing by clean accuracy: the last acceptable setting, never the one that broke the rule."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from bezoar.purifiers._choose import accuracy, strongest
from tests.toys import acc, images, trained


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(0, 1))
def test_last_setting_before_the_first_violation(accuracies, floor):
    chosen = strongest(range(len(accuracies)), lambda n: accuracies[int(n)], floor)
    good = 0
    while good < len(accuracies) and accuracies[good] >= floor:
        good += 1
    assert chosen == (None if good == 0 else good - 1)


def test_accuracy_is_that_of_the_whole_set_and_leaves_the_mode():
    model, (x, y) = trained(backdoored=False), images(37, seed=5)
    assert abs(accuracy(model, x, y, batch=10) - acc(model, x, y)) < 1e-6
    assert not model.training
