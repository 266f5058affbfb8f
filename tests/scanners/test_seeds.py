"""Pieces of a search elsewhere: the same evidence, whatever the order, and nothing of the caller is changed."""

from __future__ import annotations

import time

import pytest
import torch

from bezoar.core.exec import Serial
from bezoar.core.method import Clean
from bezoar.core.run import Progress, Run
from bezoar.scanners.additive_inversion import AdditiveInversion
from bezoar.scanners.neural_cleanse import NeuralCleanse
from tests import toys
from tests.executors import Copying

QUICK = {"steps": 16, "batch": 8}
SEARCHES = {
    "fast": (NeuralCleanse(seeds=3, refine=4, **QUICK), 3),
    "sampled": (NeuralCleanse(seeds=3, refine=0, reference_labels=4, candidates=1, **QUICK), 3),
    "additive": (AdditiveInversion(seeds=2, **QUICK), 2),
    "reference": (NeuralCleanse(mode="reference", seeds=2, reference_steps=1), 12),
}


@pytest.fixture(scope="module")
def clean() -> Clean:
    x, y = toys.images(120, seed=9)
    return Clean(x=x[:60], y=y[:60], held_x=x[60:], held_y=y[60:], num_classes=toys.LABELS)


@pytest.mark.parametrize("name", SEARCHES)
def test_pieces_elsewhere_say_the_same(clean, name):
    method, pieces = SEARCHES[name]
    model, copying = toys.trained(True), Copying()
    before = torch.get_rng_state()
    here, there = Run(seed=4), Run(seed=4, executor=copying)
    expected, found = method(model, clean, here), method(model, clean, there)
    assert copying.pieces == pieces
    assert [seed.seed for seed in found.seeds] == [seed.seed for seed in expected.seeds]
    for one, other in zip(expected.seeds, found.seeds, strict=True):
        assert one.finished
        assert other.finished
        assert list(one.labels) == list(other.labels)
        for label, scan in one.labels.items():
            seen = other.labels[label]
            assert (seen.size, seen.asr, seen.status, seen.reference) == (
                scan.size,
                scan.asr,
                scan.status,
                scan.reference,
            )
            assert all(
                torch.equal(a, b) for a, b in zip(vars(scan.trigger).values(), vars(seen.trigger).values(), strict=True)
            )
    assert found.refined.keys() == expected.refined.keys()
    assert there.image_gradients == here.image_gradients > 0
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["fast", "reference"])
def test_progress_is_told_piece_by_piece(clean, name):
    told: list[tuple[int, int]] = []
    method, _ = SEARCHES[name]
    progress = Progress(report=lambda _p, done, total, _n: told.append((done, total)), seeds=method.seeds)
    method(toys.trained(True), clean, Run(executor=Copying(), progress=progress))
    assert len(told) >= method.seeds
    assert all(0 <= done <= total for done, total in told)


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("executor", [Serial(), Copying()], ids=["here", "elsewhere"])
def test_a_budget_ends_the_pieces(clean, name, executor):
    method, _ = SEARCHES[name]
    run = Run(budget=1e-6, started=time.monotonic() - 1, executor=executor)
    found = method(toys.trained(False), clean, run)
    assert run.budget_spent
    assert len(found.seeds) == 1 or executor.away
    assert not found.seeds[0].finished


def test_a_run_elsewhere_keeps_its_end():
    run = Run(seed=3, budget=100.0, reserve=0.2, executor=Copying())
    there = run.elsewhere().resumed()
    assert (there.seed, there.executor) == (3, Serial())
    assert there.spendable == pytest.approx(run.spendable, abs=1)
    assert Run().elsewhere().resumed().budget is None
