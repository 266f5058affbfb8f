"""A grid from end to end on a tiny task: figures, resuming, failures, the index and the page."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bezoar.bench import measure as measuring
from bezoar.bench import run as running
from bezoar.bench.grid import read_grid
from bezoar.bench.run import run_grid
from bezoar.bench.store import Store
from bezoar.cli.main import app
from bezoar.core.cell import CellResult
from bezoar.core.errors import SettingError
from bezoar.report.board import lines, render_board
from tests.executors import Copying
from tests.toys import LABELS, images

VERSIONS = {"bezoar": "test"}
GRID = """
[grid]
data = "toys.npz"
archs = ["{arch}"]
images = [60]
seeds = [0]
[recipe]
epochs = 4
batch = 50
optimizer = "adam"
lr = 3e-3
[scan]
seeds = 1
additive = false
[[victim]]
attack = "badnets"
settings = {{size = 3, rate = 0.2, target = 2, margin = 0}}
[[victim]]
attack = "none"
[[purifier]]
method = "finetune"
settings = {{epochs = 1, lr = 1e-6}}
name = "nothing"
[[purifier]]
method = "finetune"
settings = {{epochs = 2}}
oracle = {{lr = [0.0, 0.02]}}
"""
NET = """
from torch import nn
def net(num_classes):
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * 9, num_classes))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folder with a small data set, a network of its own and a grid."""
    folder = tmp_path_factory.mktemp("bench")
    train, test = images(600, seed=1), images(360, seed=2)
    parts = {}
    for name, (x, y) in (("train", train), ("test", test)):
        parts[f"{name}_x"] = (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        parts[f"{name}_y"] = y.numpy()
    np.savez(folder / "toys.npz", **parts)
    (folder / "net.py").write_text(NET)
    text = GRID.format(arch=f"{folder / 'net.py'}:net").replace("toys.npz", str(folder / "toys.npz"))
    (folder / "grid.toml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def outcome(place):
    return run_grid(read_grid(place / "grid.toml"), place / "out", VERSIONS, device="cpu")


def by(outcome, attack, purifier):
    return next(one for one in outcome.results if one.attack == attack and purifier in one.purifier)


def test_all_cells_are_measured(outcome):
    assert [one.status for one in outcome.results] == ["done"] * 4
    assert outcome.missing == 0


def test_figures_are_those_of_the_models(outcome):
    nothing = by(outcome, "badnets", "nothing")
    assert nothing.asr_before > 0.9
    assert nothing.asr_after == pytest.approx(nothing.asr_before, abs=0.05)
    assert nothing.acc_before > 0.9
    assert nothing.der == pytest.approx(0.5, abs=0.05)
    assert nothing.image_gradients == 48, "four fifths of the images, once"
    clean = by(outcome, "none", "nothing")
    assert clean.asr_after is None
    assert clean.der is None


def test_oracle_keeps_the_best_and_says_so(outcome):
    best = by(outcome, "badnets", "finetune")
    assert best.oracle
    assert not by(outcome, "badnets", "nothing").oracle
    assert best.config["lr"] in (0.0, 0.02)
    assert best.der >= by(outcome, "badnets", "nothing").der - 0.05


def test_defender_never_sees_a_measured_image(place, monkeypatch):
    grid = read_grid(place / "grid.toml")
    bench = measuring.Bench(grid, measuring_splits(grid), place, "cpu", 1, VERSIONS)
    x, y = bench.defenders_images(60, seed=3)
    assert torch.bincount(y).tolist() == [10] * LABELS
    _, rows = measuring.stratified(bench.splits.test.y, 0.5, 0)
    measured = {image.numpy().tobytes() for image in bench.splits.test.x[rows]}
    assert not {image.numpy().tobytes() for image in x} & measured


def measuring_splits(grid):
    from bezoar.bench.victims import splits_of

    return splits_of(grid)


def test_nothing_is_measured_twice(place, outcome, monkeypatch):
    monkeypatch.setattr(measuring, "purify", lambda *_, **__: pytest.fail("a finished cell was measured again"))
    again = run_grid(read_grid(place / "grid.toml"), place / "out", VERSIONS, device="cpu")
    assert again.results == outcome.results


def test_one_cell_again_gives_the_same_figures(place, outcome):
    one = by(outcome, "badnets", "nothing")
    again = run_grid(read_grid(place / "grid.toml"), place / "out", VERSIONS, only=one.key, device="cpu")
    found = next(other for other in again.results if other.key == one.key)
    assert (found.acc_after, found.asr_after, found.ra_after) == (one.acc_after, one.asr_after, one.ra_after)
    with pytest.raises(SettingError, match="no cell"):
        run_grid(read_grid(place / "grid.toml"), place / "out", VERSIONS, only="0" * 16)


def test_cells_in_other_processes_give_the_same_figures(place, outcome, monkeypatch):
    copying = Copying()
    shutil.copytree(place / "out" / "victims", place / "spread" / "victims")
    monkeypatch.setattr(running, "executor", lambda ray, **_: nullcontext(copying))
    grid, told = read_grid(place / "grid.toml"), []
    spread = run_grid(
        grid, place / "spread", VERSIONS, device="cpu", ray="local", report=lambda *step: told.append(step[1:3])
    )
    assert copying.pieces == len(told) == 4
    figures = [(one.key, one.status, one.acc_after, one.asr_after, one.der) for one in spread.results]
    assert figures == [(one.key, one.status, one.acc_after, one.asr_after, one.der) for one in outcome.results]
    run_grid(grid, place / "spread", VERSIONS, device="cpu", ray="local")
    assert copying.pieces == 4


def test_failed_cell_is_noted_and_the_others_go_on(place, tmp_path, monkeypatch):
    real = measuring.purify

    def broken(*given, **more):
        if more["method"].lr == 1e-6:
            raise RuntimeError("the method broke")
        return real(*given, **more)

    monkeypatch.setattr(measuring, "purify", broken)
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "victims").symlink_to(place / "out" / "victims")
    found = run_grid(read_grid(place / "grid.toml"), folder, VERSIONS, device="cpu")
    assert sorted(one.status for one in found.results) == ["done", "done", "failed", "failed"]
    assert "the method broke" in by(found, "badnets", "nothing").error
    monkeypatch.setattr(measuring, "purify", real)
    assert run_grid(read_grid(place / "grid.toml"), folder, VERSIONS, device="cpu").count("failed") == 2
    assert run_grid(read_grid(place / "grid.toml"), folder, VERSIONS, device="cpu", again=True).count("failed") == 0


def test_victim_that_cannot_be_trained_fails_its_cells_alone(place, tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "record.json").write_text("{}")
    text = (place / "grid.toml").read_text() + '[[victim]]\nfolder = "broken"\n'
    (tmp_path / "grid.toml").write_text(text)
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "victims").symlink_to(place / "out" / "victims")
    found = run_grid(read_grid(tmp_path / "grid.toml"), folder, VERSIONS, device="cpu")
    assert found.count("failed") == 2
    assert found.count("done") == 4
    assert all("not a record" in one.error for one in found.results if one.status == "failed")


def test_other_images_are_other_cells(place, tmp_path):
    text = (place / "grid.toml").read_text().replace(str(place / "toys.npz"), str(tmp_path / "toys.npz"))
    (tmp_path / "grid.toml").write_text(text)
    keys = []
    for seed in (1, 1, 9):
        with np.load(place / "toys.npz") as arrays:
            parts = {name: array.copy() for name, array in arrays.items()}
        parts["test_x"][0, 0, 0, 0] = seed
        np.savez(tmp_path / "toys.npz", **parts)
        grid = read_grid(tmp_path / "grid.toml")
        splits = measuring_splits(grid)
        hashes = (splits.train_facts.sha256, splits.test_facts.sha256)
        keys.append([grid.key(cell, VERSIONS, hashes) for cell in grid.cells()])
    assert keys[0] == keys[1]
    assert not set(keys[0]) & set(keys[2])


def test_index_answers_questions(place, outcome):
    with sqlite3.connect(place / "out" / "results.sqlite") as base:
        rows = base.execute("SELECT victim, asr_after FROM cells WHERE purifier = 'nothing' ORDER BY attack").fetchall()
        config = json.loads(base.execute("SELECT config FROM cells WHERE purifier = 'nothing'").fetchone()[0])
    assert [asr for _, asr in rows] == [by(outcome, "badnets", "nothing").asr_after, None]
    assert config["lr"] == 1e-6


def test_claims_keep_others_off(tmp_path):
    store = Store(tmp_path)
    with store.claim("work") as mine:
        with store.claim("work") as other:
            assert mine
            assert not other
        with store.claim("else") as free:
            assert free
    with store.claim("work") as again:
        assert again


def test_damaged_cell_is_as_good_as_none(tmp_path):
    store = Store(tmp_path)
    store.write(result())
    assert store.read("k") == result()
    (tmp_path / "cells" / "k.json").write_text("{")
    assert store.read("k") is None


def test_command_line(place, outcome, capsys):
    arguments = ["bench", str(place / "grid.toml"), "--out", str(place / "other"), "--threads", "1", "--quiet"]
    assert app(arguments, result_action="return_value") == 0
    assert (place / "other" / "leaderboard.html").exists()
    command = [sys.executable, "-m", "bezoar.cli.main", "bench", "missing.toml", "--out", str(place / "o")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert run.stderr.startswith("error: missing.toml is not a grid")


# The leaderboard


def result(**given) -> CellResult:
    base = {"key": "k", "victim": "v", "attack": "badnets", "arch": "a", "data": "d", "purifier": "p", "method": "m"}
    figures = {"acc_before": 0.9, "acc_after": 0.8, "asr_before": 1.0, "asr_after": 0.1, "ra_after": 0.7, "der": 0.9}
    more = {"config": {}, "oracle": False, "images": 100, "seed": 0, "status": "done"}
    return CellResult(**{**base, **figures, **more, **given})


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=8))
def test_line_is_mean_and_worst_over_cells(rates):
    found = lines(result(key=str(i), asr_after=asr, acc_after=acc) for i, (asr, acc) in enumerate(rates))
    (line,) = found
    assert line.asr == pytest.approx(sum(asr for asr, _ in rates) / len(rates))
    assert line.worst_asr == max(asr for asr, _ in rates)
    assert line.acc_loss == pytest.approx(0.9 - sum(acc for _, acc in rates) / len(rates))
    assert line.worst_acc_loss == pytest.approx(0.9 - min(acc for _, acc in rates))


def test_failed_cells_count_nowhere_and_clean_nets_apart():
    clean = {"attack": "none", "asr_before": None, "asr_after": None, "der": None, "ra_after": None}
    (line,) = lines([result(), result(status="failed", acc_after=None), result(acc_after=0.9, **clean)])
    assert (line.cells, line.failed) == (3, 1)
    assert line.asr == 0.1
    assert line.clean_loss == pytest.approx(0.0)


def test_page_shows_all_and_is_safe():
    page = render_board([result(purifier="<b>evil</b>", error="x"), result(purifier="other", images=10)], missing=3)
    assert "<b>evil</b>" not in page
    assert "&lt;b&gt;evil" in page
    assert "3 still to be measured" in page
    assert page.count("<svg") == 4, "one plot for each number of images, wide and narrow"
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_oracle_is_labelled_wherever_it_stands():
    page = render_board([result(purifier="(oracle) rnp", oracle=True)])
    assert "(oracle)" in page
    assert "upper bound, no defence" in page


def test_refusal_is_neither_plotted_nor_coloured():
    page = render_board([result(status="refused", error="nothing to do", asr_after=0.0, acc_after=0.9, der=0.5)])
    assert "<svg" not in page
    assert 'class="good"' not in page
    assert "nothing to do" in page


def test_empty_board():
    assert "0 cells" in render_board([], missing=5)
