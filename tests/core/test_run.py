"""Time, randomness, progress and checkpoints of a run."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bezoar.core.errors import BudgetSpent
from bezoar.core.run import Progress, Run, generator


def test_no_budget_never_ends():
    run = Run(started=time.monotonic() - 1e9)
    run.check()
    assert run.left == float("inf")
    assert not run.budget_spent


def test_budget_counts_from_the_start():
    run = Run(budget=10, started=time.monotonic() - 9, reserve=0.0)
    run.check()
    assert 0 < run.left <= 1
    run = Run(budget=10, started=time.monotonic() - 9, reserve=0.15)
    assert run.spendable < 0 < run.left, "15 % are kept for what comes after"
    assert not run.budget_spent
    with pytest.raises(BudgetSpent, match="10 seconds"):
        run.check()
    assert run.budget_spent


keys = st.tuples(st.integers(0, 9) | st.text(max_size=3), st.integers(0, 9))


@given(st.integers(0, 2**40), st.lists(keys, min_size=2, max_size=5, unique_by=repr))
def test_generator_does_not_depend_on_the_order_of_calls(seed, wanted):
    run = Run(seed=seed)
    first = {key: torch.rand(3, generator=run.generator(*key)).tolist() for key in wanted}
    torch.rand(1)
    second = {key: torch.rand(3, generator=Run(seed=seed).generator(*key)).tolist() for key in reversed(wanted)}
    assert first == second
    assert len({tuple(values) for values in first.values()}) == len(wanted), "other keys, other numbers"
    assert torch.rand(3, generator=Run(seed=seed + 1).generator(*wanted[0])).tolist() != first[wanted[0]]


def test_generator_is_the_same_on_every_machine():
    digest = hashlib.sha256(b"('order', 3)").digest()
    assert generator("order", 3).initial_seed() == int.from_bytes(digest[:7], "big")
    assert generator("a", "b").initial_seed() != generator("ab").initial_seed()


def test_generator_leaves_the_global_one_alone():
    before = torch.get_rng_state()
    Run(seed=1).generator("x")
    assert torch.equal(before, torch.get_rng_state())


# Checkpoints

STATE = {"steps": 3, "values": torch.arange(400.0), "labels": [1, 2]}


def test_checkpoint_comes_back(tmp_path: Path):
    progress = Progress(folder=tmp_path / "new", every=0)
    progress.save(7, lambda: STATE)
    read = Progress(folder=tmp_path / "new").load(7)
    assert read is not None
    assert (read["steps"], read["labels"]) == (3, [1, 2])
    assert torch.equal(read["values"], STATE["values"])
    assert Progress(folder=tmp_path / "new").load(8) is None
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["seed-7.pt"]


def test_checkpoints_are_not_made_all_the_time(tmp_path: Path):
    progress, calls = Progress(folder=tmp_path, every=1000), []

    def state() -> dict[str, object]:
        calls.append(1)
        return STATE

    progress.save(0, state)
    assert calls == []
    progress.save(0, state, now=True)
    progress.save(0, state)
    assert len(calls) == 1


def test_no_folder_keeps_nothing():
    progress = Progress(every=0)
    progress.save(0, lambda: pytest.fail("the state is made for nothing"), now=True)
    assert progress.load(0) is None


def test_failed_save_keeps_the_old_checkpoint_and_leaves_nothing_behind(tmp_path: Path, monkeypatch):
    progress = Progress(folder=tmp_path, every=0)
    progress.save(0, lambda: STATE)

    def full(*_: object, **__: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="the disk is full"):
        progress.save(0, lambda: {"steps": 4})
    assert [p.name for p in tmp_path.iterdir()] == ["seed-0.pt"]
    read = progress.load(0)
    assert read is not None
    assert read["steps"] == 3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> bytes:
    folder = tmp_path_factory.mktemp("checkpoint")
    Progress(folder=folder, every=0).save(0, lambda: STATE)
    return (folder / "seed-0.pt").read_bytes()


@pytest.mark.parametrize("content", [b"", b"\x80", b"nonsense", b"PK\x03\x04", b"\x80\x02}q\x00."])
def test_damaged_checkpoint_is_as_good_as_none(content, tmp_path: Path):
    (tmp_path / "seed-0.pt").write_bytes(content)
    assert not Progress(folder=tmp_path).load(0)


@given(st.data())
def test_no_damage_stops_a_run(checkpoint, tmp_path: Path, data):
    """Cut anywhere, or with bytes changed anywhere: a checkpoint, or none, never an error."""
    content = bytearray(checkpoint[: data.draw(st.integers(0, len(checkpoint)), label="length")])
    for _ in range(data.draw(st.integers(0, 3), label="changes") if content else 0):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "seed-0.pt").write_bytes(bytes(content))
    read = Progress(folder=tmp_path).load(0)
    assert read is None or isinstance(read, dict)


def test_checkpoint_runs_no_code(tmp_path: Path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "touched",))

    torch.save({"steps": Evil()}, tmp_path / "seed-0.pt")
    assert Progress(folder=tmp_path).load(0) is None
    assert not (tmp_path / "touched").exists()


# Progress


def test_seeds_are_counted_as_one_scan():
    told = []
    progress = Progress(report=lambda *what: told.append(what), seeds=2)
    progress.step(5, 3, 10, "label 1")
    progress.seed_done()
    progress.step(6, 4, 10, "label 2")
    assert told == [("scan, seed 1 of 2", 3, 20, "label 1"), ("scan, seed 2 of 2", 14, 20, "label 2")]


def test_one_seed_needs_no_number_and_training_has_its_own_phase():
    told = []
    progress = Progress(report=lambda *what: told.append(what))
    progress.step(0, 3, 10, "")
    progress.training(1, 5, 0.1234)
    assert told == [("scan", 3, 10, ""), ("clean", 1, 5, "loss 0.123")]
