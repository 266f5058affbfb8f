"""Neural Cleanse as a whole: both modes, many labels, a budget, and a scan that is killed and goes on."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from torch import nn

from bezoar.core.errors import SettingError, UnsupportedModel
from bezoar.core.evidence import Scan
from bezoar.core.method import Clean
from bezoar.core.run import Progress, Run
from bezoar.ops.invert import Inversion
from bezoar.ops.verdict import judge
from bezoar.scanners.neural_cleanse import NeuralCleanse
from tests.toys import LABELS, TARGET, images, trained

FAST = NeuralCleanse(seeds=1, steps=60)


@pytest.fixture(scope="module")
def clean() -> Clean:
    return divided(*images(180, seed=7), LABELS)


def divided(x: torch.Tensor, y: torch.Tensor, num_classes: int) -> Clean:
    half = len(x) * 2 // 3
    return Clean(x=x[:half], y=y[:half], held_x=x[half:], held_y=y[half:], num_classes=num_classes)


def smallest(found: Scan) -> list[int]:
    """Labels by size under the first seed; those that never worked come last."""
    labels = found.seeds[0].labels
    return sorted(labels, key=lambda label: (labels[label].status == "failed", labels[label].size))


def assert_equal(found: Scan, wanted: Scan) -> None:
    for one, other in zip(found.seeds, wanted.seeds, strict=True):
        assert (one.seed, one.finished, one.labels.keys()) == (other.seed, other.finished, other.labels.keys())
        for label, scan in one.labels.items():
            again = other.labels[label]
            assert (scan.size, scan.asr, scan.status, scan.reference) == (
                again.size,
                again.asr,
                again.status,
                again.reference,
            )
            assert torch.equal(scan.trigger.mask, again.trigger.mask)
            assert torch.equal(scan.trigger.pattern, again.trigger.pattern)


@pytest.mark.parametrize("loss", ["ce", "linear"])
def test_both_modes_find_the_target(loss, clean):
    fast = NeuralCleanse(seeds=1, steps=80, loss=loss)(trained(backdoored=True), clean, Run())
    reference = NeuralCleanse(mode="reference", seeds=1, reference_steps=14, loss=loss)
    run = Run()
    slow = reference(trained(backdoored=True), clean, run)
    assert smallest(fast)[0] == smallest(slow)[0] == TARGET
    for found in (fast, slow):
        assert found.median(TARGET, "asr") > 0.8
        assert found.median(TARGET, "size") < 0.5 * found.median(smallest(found)[1], "size")
    assert run.image_gradients <= 31 * 32 * 14 * LABELS
    assert run.image_gradients % (31 * 32) == 0


def test_chosen_labels(clean):
    """In fast mode the others are still there, for the median; the procedure of the paper looks at those alone."""
    found = NeuralCleanse(seeds=1, steps=10, labels=(TARGET, 4))(trained(backdoored=True), clean, Run())
    assert found.looked_at() == list(range(LABELS))
    paper = NeuralCleanse(mode="reference", seeds=1, reference_steps=1, labels=(TARGET, 4))
    assert paper(trained(backdoored=True), clean, Run()).looked_at() == [TARGET, 4]
    for label in (-1, LABELS):
        with pytest.raises(SettingError, match=f"label {label} is not in 0..{LABELS - 1}"):
            NeuralCleanse(labels=(label,))(trained(backdoored=True), clean, Run())


def test_model_whose_rows_interact_is_refused(clean):
    mixing = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), *trained(backdoored=True)).eval()
    with pytest.raises(UnsupportedModel, match="other images of its batch"):
        FAST(mixing, clean, Run())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mode", "quick"),
        ("loss", "mse"),
        ("seeds", 0),
        ("steps", 0),
        ("candidates", 0),
        ("reference_labels", 3),
        ("reach", 0.0),
        ("reach", 1.1),
        ("start_mask", 0.6),
        ("lr", 0.0),
        ("pressure", 0.0),
        ("chunk", -1),
    ],
)
def test_settings_out_of_range(name, value):
    with pytest.raises(SettingError, match=f"NeuralCleanse.{name} must be"):
        NeuralCleanse(**{name: value})


# Many labels

MANY, EASY = 60, 37


@pytest.fixture(scope="module")
def crowd() -> tuple[nn.Module, Clean]:
    """60 labels in a random linear net; label 37 is easy to reach."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 6 * 6, MANY))
    with torch.no_grad():
        net[1].weight[EASY] = 0
        net[1].weight[EASY, :2] = 8.0
        net[1].bias[EASY] = -9.0
    x = torch.rand(240, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    return net.eval(), divided(x, torch.arange(240) % MANY, MANY)


@pytest.fixture(scope="module")
def of_many(crowd) -> Scan:
    return NeuralCleanse(seeds=2, steps=100)(*crowd, Run(seed=5))


def test_labels_that_cannot_win_are_dropped(of_many):
    first = of_many.seeds[0]
    assert sorted(first.labels) == list(range(MANY))
    reference = {label for label, scan in first.labels.items() if scan.reference}
    assert len(reference) == 12
    followed = {label for label, scan in first.labels.items() if scan.status == "complete"}
    assert reference <= followed
    assert 1 <= len(followed - reference) <= 4
    assert smallest(of_many)[0] == EASY
    assert first.labels[EASY].status == "complete"


def test_dropped_label_is_not_among_the_smallest(of_many):
    first = of_many.seeds[0].labels
    dropped = [scan for scan in first.values() if scan.status == "eliminated"]
    assert len(dropped) > MANY / 6
    assert all(scan.size >= first[smallest(of_many)[3]].size for scan in dropped)


def test_dropped_label_that_never_worked_does_not_lead(crowd):
    """After few steps most triggers are small because the pressure is still too high for them, and do not work."""
    found = NeuralCleanse(seeds=2, steps=60)(*crowd, Run(seed=5))
    first = found.seeds[0].labels
    never = [scan for scan in first.values() if scan.status == "failed"]
    assert min(scan.size for scan in never) < first[EASY].size, "or the case is not tested"
    assert EASY in found.seeds[1].labels, "the next seed looks at those that worked"
    judged = judge(found, ())
    assert (judged.verdict, judged.target) == ("backdoored", EASY)


def test_elimination_saves_work(crowd):
    run = Run()
    NeuralCleanse(seeds=1, steps=100, refine=0)(*crowd, run)
    assert run.image_gradients < 0.75 * 100 * 16 * MANY


def test_survivors_are_those_of_a_scan_without_the_dropped(crowd, of_many):
    """Dropping labels changes nothing for those that stay: the smallest is found by a scan of all, to the same size."""
    everything = NeuralCleanse(seeds=1, steps=100, candidates=MANY)(*crowd, Run(seed=5))
    for label, scan in of_many.seeds[0].labels.items():
        if scan.status == "complete":
            assert scan.size == pytest.approx(everything.seeds[0].labels[label].size, rel=0.02)


def test_later_seeds_look_only_at_candidates_and_reference_labels(of_many):
    first, second = of_many.seeds
    reference = {label for label, scan in first.labels.items() if scan.reference}
    assert set(second.labels) == reference | set(smallest(of_many)[:4])
    assert {label for label, scan in second.labels.items() if scan.reference} == reference


# Budget


def test_budget_gives_an_anytime_answer(clean):
    run = Run(budget=1000)

    def spend(phase: str, done: int, total: int, note: str) -> None:
        if done == 10:
            run.started -= 2000

    run.progress = Progress(report=spend)
    found = NeuralCleanse(seeds=3, steps=60)(trained(backdoored=True), clean, run)
    assert [seed.finished for seed in found.seeds] == [False]
    assert run.budget_spent
    assert sorted(found.seeds[0].labels) == list(range(LABELS))
    assert all(0 <= scan.asr <= 1 and scan.size > 0 for scan in found.seeds[0].labels.values())


def test_budget_of_the_reference_mode(clean):
    run = Run(budget=1000)

    def spend(phase: str, done: int, total: int, note: str) -> None:
        if done == 3:
            run.started -= 2000

    run.progress = Progress(report=spend)
    found = NeuralCleanse(mode="reference", seeds=2, reference_steps=2)(trained(backdoored=True), clean, run)
    assert [seed.finished for seed in found.seeds] == [False]
    assert list(found.seeds[0].labels) == [0], "what was finished stays"


def test_no_time_at_all(clean):
    started = time.monotonic()
    found = FAST(trained(backdoored=True), clean, Run(budget=0.0))
    assert not found.seeds[0].finished
    assert time.monotonic() - started < 5


# Kill and resume


class Killed(BaseException):
    """As a Ctrl-C: no except clause for errors catches it."""


def kill_at(step: int) -> Progress:
    def report(phase: str, done: int, total: int, note: str) -> None:
        if done == step:
            raise Killed

    return Progress(report=report)


def steps_done(monkeypatch) -> list[int]:
    done, step = [], Inversion.step

    def counted(self: Inversion) -> None:
        done.append(self.steps)
        step(self)

    monkeypatch.setattr(Inversion, "step", counted)
    return done


@pytest.mark.parametrize("killed_at", [20, 45, 75])
def test_killed_scan_goes_on_where_it_was(killed_at, clean, tmp_path: Path, monkeypatch):
    method = NeuralCleanse(seeds=2, steps=50, candidates=1, reference_labels=4, refine=0)
    wanted = method(trained(backdoored=True), clean, Run(seed=3))
    progress = kill_at(killed_at)
    progress.folder, progress.every, progress.seeds = tmp_path, 0.0, 2
    with pytest.raises(Killed):
        method(trained(backdoored=True), clean, Run(seed=3, progress=progress))
    done = steps_done(monkeypatch)
    again = Run(seed=3, progress=Progress(folder=tmp_path, every=0.0, seeds=2))
    assert_equal(method(trained(backdoored=True), clean, again), wanted)
    assert len(done) == 100 - killed_at + 1, "the step that was killed before it was kept is done again"


def test_killed_scan_of_many_labels_goes_on_without_the_dropped(crowd, of_many, tmp_path: Path):
    method = NeuralCleanse(seeds=2, steps=100)
    progress = kill_at(70)
    progress.folder, progress.every = tmp_path, 0.0
    with pytest.raises(Killed):
        method(*crowd, Run(seed=5, progress=progress))
    assert_equal(method(*crowd, Run(seed=5, progress=Progress(folder=tmp_path, every=0.0))), of_many)


def test_killed_reference_scan_keeps_the_labels_that_were_done(clean, tmp_path: Path):
    method = NeuralCleanse(mode="reference", seeds=1, reference_steps=2, labels=(1, 2, 4))
    wanted = method(trained(backdoored=True), clean, Run())
    progress = kill_at(5)
    progress.folder = tmp_path
    with pytest.raises(Killed):
        method(trained(backdoored=True), clean, Run(progress=progress))
    run = Run(progress=Progress(folder=tmp_path))
    assert_equal(method(trained(backdoored=True), clean, run), wanted)
    assert run.image_gradients == 31 * 32 * 2, "one label of three was left"


def test_damaged_checkpoint_starts_anew(clean, tmp_path: Path):
    (tmp_path / "seed-0.pt").write_bytes(b"PK\x03\x04 no checkpoint")
    method = NeuralCleanse(seeds=1, steps=5)
    found = method(trained(backdoored=True), clean, Run(progress=Progress(folder=tmp_path)))
    assert_equal(found, method(trained(backdoored=True), clean, Run()))


def test_progress_counts_to_the_end(clean):
    told = []
    run = Run(progress=Progress(report=lambda *what: told.append(what), seeds=2))
    NeuralCleanse(seeds=2, steps=5)(trained(backdoored=True), clean, run)
    assert [what[1:3] for what in told] == [(step, 10) for step in range(1, 11)]
    assert told[0][3].startswith("label ")
