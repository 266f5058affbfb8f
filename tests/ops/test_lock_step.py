"""The published inversion in lock step against the same label by label."""

from __future__ import annotations

import pytest
import torch

from bezoar.core.errors import BudgetSpent
from bezoar.core.run import Run
from bezoar.core.surgery import frozen
from bezoar.ops.cost import CostController
from bezoar.ops.lock_step import Iteration, LockStep
from bezoar.ops.reference import invert_label
from tests.purifiers.nets import toy_clean
from tests.toys import LABELS, SIZE, TARGET, trained

SMALL = {"batches": 3, "batch": 16}


def search(labels: list[int], run: Run, count: int = LABELS, **controller: float) -> LockStep:
    return LockStep(
        trained(backdoored=True),
        toy_clean().x,
        labels,
        controller=CostController(**controller),
        iteration=Iteration(**SMALL, pixels_per_pass=count * 16 * SIZE * SIZE),
        seed=5,
        run=run,
    )


def one_by_one(label: int, steps: int, run: Run) -> tuple[torch.Tensor, float, bool]:
    trigger, size, works = invert_label(
        trained(backdoored=True),
        toy_clean().x,
        label,
        controller=CostController(),
        steps=steps,
        **SMALL,
        lr=0.1,
        loss="ce",
        seed=5,
        run=run,
        progress=lambda _step, _best: None,
    )
    return trigger.mask, size, works


@pytest.mark.parametrize("count", [1, 2, LABELS], ids=["one", "two", "all"])
def test_gives_what_the_search_label_by_label_gives(count):
    run, other = Run(), Run()
    with frozen(trained(backdoored=True)):
        made = search(list(range(LABELS)), run, count)
        for _ in range(7):
            made.iterate()
        found = made.results()
        for label in range(LABELS):
            mask, size, works = one_by_one(label, 7, other)
            torch.testing.assert_close(found[label].trigger.mask, mask, rtol=0, atol=1e-3)
            assert found[label].size == pytest.approx(size, rel=1e-4)
            assert found[label].works == works
    assert run.image_gradients == other.image_gradients == LABELS * 7 * 3 * 16


def test_order_and_company_of_the_labels_change_nothing():
    with frozen(trained(backdoored=True)):
        both, alone = search([4, 1], Run()), search([1], Run())
        for _ in range(3):
            both.iterate()
            alone.iterate()
    torch.testing.assert_close(both.norms[1:], alone.norms, rtol=1e-5, atol=0)


def test_labels_that_are_done_leave_with_their_trigger():
    run = Run()
    with frozen(trained(backdoored=True)):
        made = search(list(range(LABELS)), run, init_cost=0.05, patience=1, stall_patience=2, reach=0.8)
        while made.labels and made.iterations < 60:
            made.iterate()
    assert made.found, "no label was done in 60 iterations"
    assert run.image_gradients < 60 * LABELS * 3 * 16
    for label, found in made.found.items():
        assert label not in made.labels
        assert found.works
        assert found.size <= SIZE * SIZE
        assert float(found.trigger.mask.sum()) == pytest.approx(found.size, rel=0.3)


def test_target_needs_the_smallest_trigger():
    with frozen(trained(backdoored=True)):
        made = search(list(range(LABELS)), Run(), init_cost=0.05, patience=2)
        for _ in range(60):
            made.iterate()
    sizes = {label: found.size for label, found in made.results().items() if found.works}
    assert min(sizes, key=sizes.__getitem__) == TARGET


def test_goes_on_from_its_state_as_if_nothing_had_happened():
    with frozen(trained(backdoored=True)):
        settings = {"init_cost": 0.05, "patience": 1, "stall_patience": 2, "reach": 0.8}
        whole = search([0, 2, 5], Run(), 2, **settings)
        for _ in range(30):
            whole.iterate()
        first = search([0, 2, 5], Run(), 2, **settings)
        for _ in range(17):
            first.iterate()
        second = search([0, 2, 5], Run(), 2, **settings)
        second.restore(first.state())
        while second.iterations < 30:
            second.iterate()
    assert second.labels == whole.labels
    one, other = whole.results(), second.results()
    assert {k: (v.size, v.works, v.iterations) for k, v in one.items()} == {
        k: (v.size, v.works, v.iterations) for k, v in other.items()
    }
    assert all(torch.equal(one[label].trigger.mask, other[label].trigger.mask) for label in one)


def test_time_that_is_over_stops_it():
    with frozen(trained(backdoored=True)), pytest.raises(BudgetSpent):
        search([0], Run(budget=0.0)).iterate()
