"""The cost controller, held to the published traces and to a transcription of the state machine in plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bezoar.ops.cost import CostController

PAPER = CostController()


class Scalar:
    """The authors' state machine, one label, written with plain numbers from the description of its five rules."""

    def __init__(self, controller: CostController) -> None:
        self.c = controller
        self.cost = 0.0 if controller.from_zero else controller.init_cost
        self.set = self.up = self.down = self.stall = 0
        self.up_flag = self.down_flag = False
        self.best = self.previous = math.inf

    def decide(self, success: float, size: float) -> tuple[bool, bool]:
        good = success >= self.c.reach
        improved = good and size < self.best
        if improved:
            self.best = size
        if self.best < math.inf:
            self.stall = self.stall + 1 if self.best >= self.c.stall_ratio * self.previous else 0
            self.previous = min(self.best, self.previous)
        done = self.up_flag and self.down_flag and self.stall >= self.c.stall_patience
        if self.cost == 0 and good:
            self.set += 1
            if self.set >= self.c.patience:
                self.cost = self.c.init_cost
                self.up = self.down = 0
                self.up_flag = self.down_flag = False
        else:
            self.set = 0
        if good:
            self.up, self.down = self.up + 1, 0
        else:
            self.up, self.down = 0, self.down + 1
        if self.up >= self.c.patience:
            self.up = 0
            self.cost *= self.c.multiplier
            self.up_flag = True
        elif self.down >= self.c.patience:
            self.down = 0
            self.cost /= self.c.multiplier**1.5
            self.down_flag = True
        return improved, done


def trace(controller: CostController, successes: list[bool]) -> list[float]:
    """The weight after each decision, for triggers that shrink all the time."""
    state = controller.start(1)
    out = []
    for step, works in enumerate(successes):
        controller.decide(state, torch.tensor([float(works)]), torch.tensor([100.0 - step]))
        out.append(float(state["cost"]))
    return out


def changes(costs: list[float]) -> dict[int, float]:
    return {step: cost for step, cost in enumerate(costs) if cost != (costs[step - 1] if step else 0.0)}


def test_trace_of_twenty_successes():
    assert changes(trace(PAPER, [True] * 20)) == {4: 0.001, 8: 0.002, 13: 0.004, 18: 0.008}


def test_trace_of_failures_successes_failures():
    found = changes(trace(PAPER, [False] * 7 + [True] * 12 + [False] * 11))
    assert found == pytest.approx({11: 0.001, 15: 0.002, 23: 7.0711e-4, 28: 2.5e-4}, rel=1e-4)


def test_low_cost_scan_starts_above_zero():
    started = CostController(from_zero=False)
    assert float(started.start(3)["cost"][2]) == 0.001
    assert changes(trace(started, [True] * 5))[4] == 0.002


def test_stops_after_25_stalls_with_both_flags():
    state = PAPER.start(1)
    for _ in range(12):  # raises the weight twice: the up flag
        PAPER.decide(state, torch.ones(1), torch.tensor([50.0]))
    done = []
    for step in range(40):  # fails: the weight falls, and nothing gets better
        done.append(bool(PAPER.decide(state, torch.zeros(1), torch.tensor([50.0 + step]))[1][0]))
    # The first working trigger is no stall, each of the other 11 decisions of the first loop is one.
    assert int(state["stall"]) == 11 + 40
    assert done.index(True) == 25 - 11 - 1
    assert all(done[done.index(True) :])


@pytest.mark.parametrize("works", [True, False])
def test_one_flag_never_stops(works):
    state = PAPER.start(1)
    PAPER.decide(state, torch.ones(1), torch.tensor([50.0]))
    done = [bool(PAPER.decide(state, torch.tensor([float(works)]), torch.tensor([60.0]))[1]) for _ in range(80)]
    assert int(state["stall"]) >= 25
    assert not any(done)


def test_smaller_trigger_starts_the_stalls_anew():
    state = PAPER.start(1)
    for size in (50.0, 50.0, 50.0):
        PAPER.decide(state, torch.ones(1), torch.tensor([size]))
    assert int(state["stall"]) == 2
    PAPER.decide(state, torch.ones(1), torch.tensor([49.0]))
    assert int(state["stall"]) == 0


rates = st.sampled_from([0.0, 0.5, 0.98, 0.99, 1.0])
decisions = st.tuples(rates, st.integers(1, 400).map(lambda n: n / 4))
sequences = st.integers(1, 4).flatmap(
    lambda labels: st.lists(st.lists(decisions, min_size=labels, max_size=labels), min_size=1, max_size=70)
)
controllers = st.builds(
    CostController,
    patience=st.integers(1, 5),
    multiplier=st.sampled_from([1.5, 2.0]),
    from_zero=st.booleans(),
    stall_patience=st.integers(1, 10),
    stall_ratio=st.sampled_from([0.99, 1.0]),
)


@given(controllers, sequences)
def test_vector_is_as_many_scalar_machines(controller, sequence):
    scalars = [Scalar(controller) for _ in sequence[0]]
    state = controller.start(len(scalars))
    for row in sequence:
        success, size = (torch.tensor(column, dtype=torch.float64) for column in zip(*row, strict=True))
        improved, done = controller.decide(state, success, size)
        assert [s.decide(*one) for s, one in zip(scalars, row, strict=True)] == list(
            zip(improved.tolist(), done.tolist(), strict=True)
        )
        assert state["cost"].tolist() == [s.cost for s in scalars]
        assert state["best"].tolist() == [s.best for s in scalars]


@given(st.lists(decisions, min_size=1, max_size=40))
def test_best_is_the_smallest_that_worked(sequence):
    state = PAPER.start(1)
    worked = []
    for success, size in sequence:
        before = float(state["best"])
        improved, _ = PAPER.decide(state, torch.tensor([success]), torch.tensor([size]))
        assert bool(improved) == (success >= 0.99 and size < before)
        worked += [size] if success >= 0.99 else []
        assert float(state["best"]) == min(worked, default=math.inf)
