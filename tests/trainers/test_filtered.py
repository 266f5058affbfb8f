"""Filtered: the backdoor does not get in, a clean set loses nothing, and the settings that are refused."""

from __future__ import annotations

import csv
import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import bezoar
from bezoar.cli.main import main
from bezoar.core.errors import DataError, SettingError
from bezoar.core.examples import Examples, Subset
from bezoar.core.filtering import Suspicion
from bezoar.core.method import Clean
from bezoar.core.registry import find
from bezoar.core.run import Run
from bezoar.core.trained import TrainReport
from bezoar.core.training import Trained
from bezoar.io.suspects import read_suspects
from bezoar.trainers.abl import ABL
from bezoar.trainers.filtered import Filtered, ordered, taken_out
from bezoar.trainers.plain import Plain
from tests.filters.planted import toy
from tests.toys import LABELS, SIZE, TARGET, acc, asr, images, net

QUICK = {"epochs": 4, "batch": 50, "lr": 3e-3, "optimizer": "adam", "pad": 0}
FEW = {**QUICK, "epochs": 1}


@functools.cache
def known(count: int = 120) -> Clean:
    x, y = images(count, seed=7)
    return Clean(x, y, x[:0], y[:0], LABELS)


@functools.cache
def clean_set() -> Examples:
    return Examples(*images(900, seed=100), LABELS)


def build() -> nn.Module:
    return net(0)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


@functools.cache
def trained() -> tuple[Trained, Run]:
    run = Run(seed=1)
    return Filtered(**QUICK, filter="scan")(build, toy(7)[0], run, clean=known()), run


class Judging:
    """Stands for a filter that says what it was told to."""

    def __init__(self, suspect: torch.Tensor, flagged: tuple[int, ...] | None, needs_clean: bool = True) -> None:
        score = torch.arange(len(suspect), dtype=torch.float64)
        self.found, self.needs_clean = Suspicion(score, suspect, "what it was told", flagged=flagged), needs_clean

    def __call__(self, *_: object) -> Suspicion:
        return self.found


def judged_by(monkeypatch: pytest.MonkeyPatch, filter_: Judging, **settings: object) -> tuple[Trained, Run]:
    monkeypatch.setattr(Filtered, "_filter", lambda self: filter_)
    run = Run(seed=1)
    return Filtered(**FEW | settings)(build, clean_set(), run, clean=known()), run


# What it is for.


def test_backdoor_does_not_get_in():
    data, _ = toy(7)
    held_out, plain = images(300, seed=8), Plain(**QUICK)(build, data, Run(seed=1)).model
    found, run = trained()
    assert asr(plain, *held_out) > 0.9
    assert asr(found.model, *held_out) < 0.1
    assert acc(found.model, *held_out) > 0.97
    assert not found.model.training
    assert run.notes["flagged"] == [TARGET]
    assert run.warnings == []


def test_suspects_are_the_poison_and_the_most_suspicious_come_first():
    _, bad = toy(7)
    found, run = trained()
    assert float(bad[found.suspects].double().mean()) > 0.95
    assert len(found.suspects) > 0.9 * int(bad.sum())
    assert run.notes["taken_out"] == len(found.suspects) == len(found.suspects.unique())
    assert found.ranked_by == sorted(found.ranked_by, reverse=True)
    assert found.ranked_by == found.suspicion.score[found.suspects].tolist()
    assert found.ranked_by[0] == float(found.suspicion.score.max())


def test_it_is_plain_training_on_the_rest():
    data, _ = toy(7)
    found, _ = trained()
    rest = torch.ones(900, dtype=torch.bool)
    rest[found.suspects] = False
    alone = Plain(**QUICK)(build, Subset(data, rest.nonzero().flatten()), Run(seed=1)).model
    assert same(found.model, alone)


def test_first_weights_are_drawn_alike_in_both_trainings():
    drawn = []

    def fresh() -> nn.Module:
        made = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE**2, LABELS))
        drawn.append(made[1].weight.detach().clone())
        return made

    found = Filtered(**FEW, filter="spectral-signatures")(fresh, clean_set(), Run(seed=1))
    assert len(found.suspects)
    assert len(drawn) == 2
    assert torch.equal(*drawn)


def test_clean_set_is_plain_training_and_nothing_is_taken_out():
    run = Run(seed=1)
    phases = []
    run.progress.report = lambda phase, *_: phases.append(phase)
    found = Filtered(**QUICK, filter="scan")(build, clean_set(), run, clean=known())
    assert same(found.model, Plain(**QUICK)(build, clean_set(), Run(seed=1)).model)
    assert len(found.suspects) == 0
    assert (run.notes["taken_out"], run.notes["flagged"], run.warnings) == (0, [], [])
    assert "train" in phases
    assert "retrain" not in phases


def test_first_training_does_not_crop_the_patch_off(monkeypatch):
    """Crops by 4 of 12 pixels cut the corner off half of the images."""
    data, _ = toy(7)
    asked: list[nn.Module] = []

    class Seeing(Judging):
        def __call__(self, model: nn.Module, *_: object) -> Suspicion:
            asked.append(model)
            return self.found

    monkeypatch.setattr(Filtered, "_filter", lambda self: Seeing(torch.zeros(900, dtype=torch.bool), ()))
    settings = {**QUICK, "pad": 4}
    found = Filtered(**settings)(build, data, Run(seed=1), clean=known())
    assert same(asked[0], Plain(**QUICK)(build, data, Run(seed=1)).model)
    assert same(found.model, Plain(**settings)(build, data, Run(seed=1)).model), "nothing taken out: plain training"
    found = Filtered(**settings, augment_first=True)(build, data, Run(seed=1), clean=known())
    assert found.model is asked[1], "trained once"


def test_filter_without_a_rule_needs_no_clean_examples_and_says_so():
    run = Run(seed=1)
    found = Filtered(**FEW, filter="spectral-signatures")(build, clean_set(), run)
    assert len(found.suspects)
    assert run.notes["flagged"] is None
    assert "clean_accuracy" not in run.notes
    assert "takes examples out of a clean set too" in run.warnings[0]


def test_default_takes_little_out_of_a_clean_set_and_says_so():
    run = Run(seed=1)
    found = Filtered(**QUICK)(build, clean_set(), run, clean=known())
    assert 0 < len(found.suspects) < 0.05 * 900
    assert run.notes["flagged"] == []
    assert run.notes["filters"]["scan"] == {"taken_out": 0, "flagged": []}
    assert run.notes["filters"]["clean-distance"] == {"taken_out": len(found.suspects), "flagged": None}
    assert "takes examples out of a clean set too" in run.warnings[0]


def test_default_takes_rare_poison_out_that_scan_does_not_see():
    data, bad = toy(150)
    assert int(bad.sum()) == 6
    run = Run(seed=1)
    found = Filtered(**{**QUICK, "epochs": 8})(build, data, run, clean=known())
    assert run.notes["filters"]["scan"]["taken_out"] == 0
    assert set(bad.nonzero().flatten().tolist()) <= set(found.suspects.tolist())
    assert len(found.suspects) < 0.03 * 900


# What is taken out.


def test_only_flagged_labels_lose_examples():
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    suspect = torch.tensor([True, True, True, False, False, False])
    score = torch.tensor([1.0, 3.0, 2.0, 9.0, 3.0, 3.0], dtype=torch.float64)

    def out(flagged: tuple[int, ...] | None) -> list[int]:
        return ordered(score, taken_out(Suspicion(score, suspect, "", flagged=flagged), labels)).tolist()

    assert out((1, 2)) == [1, 2]
    assert out(()) == []
    assert out(None) == [1, 2, 0]


def test_equal_scores_keep_their_order():
    assert ordered(torch.zeros(5), torch.tensor([True, False, True, True, True])).tolist() == [0, 2, 3, 4]


@pytest.mark.parametrize(("lost", "warns"), [(112, False), (113, True)])
def test_it_warns_where_a_label_loses_most(monkeypatch, lost, warns):
    mine = (clean_set().labels == 1).nonzero().flatten()
    suspect = torch.zeros(900, dtype=torch.bool)
    suspect[mine[:lost]] = True
    found, run = judged_by(monkeypatch, Judging(suspect, (1,)), max_drop=1.0)
    assert len(found.suspects) == lost
    assert [f"{lost} of the 150 examples of label 1" in text for text in run.warnings] == [True] * warns


def test_it_warns_where_clean_accuracy_falls(monkeypatch):
    suspect = clean_set().labels == 1
    suspect[-6:] = False
    _, run = judged_by(monkeypatch, Judging(suspect, (1,)), epochs=3, max_share=1.0)
    before, after = run.notes["clean_accuracy"]
    assert after <= 1 - 1 / LABELS + 0.01 < before
    assert len(run.warnings) == 1
    assert "some that were taken out may be genuine" in run.warnings[0]


def test_it_warns_where_a_label_has_no_clean_example():
    x, y = images(120, seed=7)
    x, y = x[y != TARGET], y[y != TARGET]
    run = Run(seed=1)
    Filtered(**QUICK)(build, toy(7)[0], run, clean=Clean(x, y, x[:0], y[:0], LABELS))
    assert any(f"no clean example of label {TARGET}" in text for text in run.warnings)


def test_a_filter_that_wants_everything_is_refused(monkeypatch):
    with pytest.raises(DataError, match="finds all 900 examples suspect"):
        judged_by(monkeypatch, Judging(torch.ones(900, dtype=torch.bool), None))


# Settings.


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"filter": "scann"}, "no method 'scann'"),
        ({"filter": "scan", "options": ("treshold=5",)}, "scan has no setting 'treshold'"),
        ({"filter": "scan", "options": ("threshold=-1",)}, "threshold must be"),
        ({"max_share": 1.5}, "max_share must be"),
        ({"max_drop": -0.1}, "max_drop must be"),
        ({"epochs": 0}, "epochs must be"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_settings(settings, said):
    with pytest.raises(SettingError, match=said):
        Filtered(**settings)


def test_options_reach_the_filter():
    made = Filtered(filter="scan", options=("threshold=5", "least=20"))._filter()
    assert made == find("filters", "scan")(threshold=5, least=20)


def test_missing_clean_examples_are_refused_before_the_training():
    def never() -> nn.Module:
        raise AssertionError("it began to train")

    for given in (None, Clean(*(torch.empty(0),) * 4, LABELS)):
        with pytest.raises(SettingError, match="Filtered needs a few clean examples") as error:
            Filtered()(never, clean_set(), Run(), clean=given)
        assert "--clean" in error.value.hint


@pytest.mark.parametrize(
    ("method", "needs"),
    [
        *((Filtered(), True), (Filtered(filter="beatrix"), True), (Filtered(filter="spectre"), False)),
        *((Filtered(filter="activation-clustering"), False), (Plain(), False), (ABL(), False)),
    ],
    ids=["union", "beatrix", "spectre", "activation-clustering", "plain", "abl"],
)
def test_who_needs_clean_examples(method, needs):
    assert method.needs_clean is needs


# Going on after a kill.


@pytest.mark.parametrize("phase", ["train", "features", "retrain"])
def test_killed_run_ends_in_the_same_weights(phase, tmp_path, monkeypatch):
    monkeypatch.setenv("BEZOAR_CHECKPOINT_SECONDS", "0")
    killed = Run(seed=1)

    def kill(name: str, done: int, total: int, note: str) -> None:
        if name == phase and done >= total // 2:
            raise KeyboardInterrupt

    killed.progress.report = kill
    method, (whole, _) = Filtered(**QUICK, filter="scan"), trained()
    with pytest.raises(KeyboardInterrupt):
        method(build, toy(7)[0], killed, tmp_path, known())
    assert killed.progress.folder is None
    again, steps = Run(seed=1), []
    again.progress.report = lambda name, done, *_: steps.append((name, done))
    found = method(build, toy(7)[0], again, tmp_path, known())
    assert same(found.model, whole.model)
    assert torch.equal(found.suspects, whole.suspects)
    assert ("train", 1) not in steps
    assert ("retrain", 1) not in steps or phase != "retrain"


# From the command line.


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The toy as ``.npz`` files of uint8, its clean examples and test images, and the net."""
    folder = tmp_path_factory.mktemp("filtered")
    (folder / "net.py").write_text(
        "from tests.toys import net\ndef make(num_classes, channels, size):\n    return net(0)\n"
    )
    for name, (x, y) in {
        "poisoned": (toy(7)[0].x, toy(7)[0].labels),
        "whole": (clean_set().x, clean_set().labels),
        "clean": images(120, seed=7),
        "test": images(300, seed=8),
    }.items():
        np.savez(folder / f"{name}.npz", x=(x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy(), y=y.numpy())
    return folder


def command(folder: Path, data: str, out: Path, *more: object) -> list[str]:
    tokens = ["train", "--data", folder / f"{data}.npz", "--arch", f"{folder / 'net.py'}:make", "--out", out]
    tokens += ["--method", "filtered", "--threads", 1, "--quiet", *more]
    tokens += [part for name, value in QUICK.items() for part in ("--set", f"{name}={value}")]
    return [str(token) for token in tokens]


def run(tokens: list[str]) -> int:
    with pytest.raises(SystemExit) as left:
        main(tokens)
    return int(left.value.code or 0)


def test_command_shows_what_was_taken_out(folder, tmp_path, capsys):
    out = tmp_path / "out"
    more = ("--clean", folder / "clean.npz", "--test-data", folder / "test.npz", "--set", "filter=scan")
    tokens = [token for token in command(folder, "poisoned", out, *more) if token != "--quiet"]
    assert run(tokens) == 0
    said = " ".join(capsys.readouterr().out.split()).replace("\N{NO-BREAK SPACE}", " ")
    for part in ("taken out before the final training, ", f"Flagged labels: {TARGET}.", "anomaly index"):
        assert part in said, part
    report = TrainReport.from_json((out / "report.json").read_text())
    assert report.acc.value > 0.97
    assert report.clean.count == 120
    assert "anomaly index" in report.rule
    assert report.suspects == report.labels[0].suspects == report.notes["taken_out"] > 90
    assert [one.label for one in report.labels if one.flagged] == [TARGET]
    assert report.labels[0].statistic > 7.389
    with (out / "suspects.csv").open() as file:
        rows = list(csv.DictReader(file))
    scores = [float(row["score"]) for row in rows]
    assert len(rows) == report.suspects
    assert scores == sorted(scores, reverse=True)
    bad = toy(7)[1]
    assert np.mean([bool(bad[int(row["position"])]) for row in rows]) > 0.95
    listed, labels = read_suspects(
        out / "suspects.csv", folder / "poisoned.npz", size=(SIZE, SIZE), channels=3, num_classes=LABELS
    )
    assert (len(listed), set(labels.tolist())) == (report.suspects, {TARGET})
    page = (out / "report.html").read_text()
    for part in ("What the filter says", report.rule, "<td>yes</td>", "What the filter took out."):
        assert part in page, part
    assert page.count('src="data:image/png;base64,') == min(report.suspects, 96)
    assert "learned fastest" not in page


def test_command_on_a_clean_set(folder, tmp_path, capsys):
    tokens = command(folder, "whole", tmp_path, "--clean", folder / "clean.npz", "--json", "--set", "filter=scan")
    assert run(tokens) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["suspects"], report["notes"]["flagged"]) == (0, [])
    page = (tmp_path / "report.html").read_text()
    assert "finds nothing suspect" in page
    assert "so all examples were trained on" in page
    assert (tmp_path / "suspects.csv").read_text() == "position,file,label,score\n"
    plain = [token for token in command(folder, "whole", tmp_path / "plain") if token != "filtered"]
    plain.insert(plain.index("--method") + 1, "plain")
    assert run(plain) == 0
    models = [(place / "model.safetensors").read_bytes() for place in (tmp_path, tmp_path / "plain")]
    assert models[0] == models[1]


def test_command_without_clean_images(folder, tmp_path, capsys, monkeypatch):
    def never(*_: object, **__: object) -> None:
        raise AssertionError("it read the data first")

    monkeypatch.setattr("bezoar.training.open_untrusted", never)
    assert run(command(folder, "whole", tmp_path)) == 2
    said = capsys.readouterr().err
    assert "Filtered needs a few clean examples" in said
    assert "--clean" in said
    monkeypatch.undo()
    assert run(command(folder, "whole", tmp_path, "--clean", "no-such-folder")) == 2
    assert "no-such-folder" in capsys.readouterr().err


def test_other_clean_images_are_another_run(folder, tmp_path):
    for count in (60, 120):
        x, y = images(count, seed=7)
        made = bezoar.train(folder / "whole.npz", build, tmp_path, method=Filtered(**FEW), clean=(x, y), threads=1)
        assert made.report.clean.count == count
    assert len(list((tmp_path / ".checkpoints").iterdir())) == 2
