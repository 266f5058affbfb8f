"""``bezoar.filter_data`` and ``bezoar filter data`` on real images, from files to contact sheet and unlearning."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import bezoar
from bezoar.cli import _output
from bezoar.core.errors import DataError, SettingError
from bezoar.core.filtered import FilterReport
from bezoar.filters.abl_isolation import ABLIsolation
from bezoar.filters.scan import SCAn
from bezoar.io.untrusted import UntrustedData, open_untrusted
from bezoar.options import ModelOptions
from tests.test_cli import DATA as CLEAN
from tests.test_cli import MODEL, run
from tests.toys import LABELS, TARGET, images, trained, trigger

ASSETS = Path(_output.__file__).parents[1] / "demo" / "assets"


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BEZOAR_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory) -> tuple[Path, Path, list[int]]:
    """Real images: a training set as npz with planted poison, clean ones, and where the poison is."""
    truth = json.loads((ASSETS / "truth.json").read_text())
    planted = np.load(ASSETS / "truth.npz")
    data = np.load(CLEAN)
    x, y = data["x"].copy(), data["y"].copy()
    half = np.arange(len(y)) % 2 == 0
    train_x, train_y = x[half], y[half]
    bad = [i for i in range(0, len(train_y), 9) if train_y[i] != truth["target"]]
    mask, pattern = (planted[name].transpose(1, 2, 0) for name in ("mask", "pattern"))
    stamped = train_x[bad].reshape(len(bad), *train_x.shape[1:3], -1) / 255
    stamped = ((1 - mask) * stamped + mask * pattern) * 255
    train_x[bad] = stamped.round().astype(np.uint8).reshape(train_x[bad].shape)
    train_y[bad] = truth["target"]
    folder = tmp_path_factory.mktemp("data")
    np.savez(folder / "train.npz", x=train_x, y=train_y)
    np.savez(folder / "clean.npz", x=x[~half], y=y[~half])
    return folder / "train.npz", folder / "clean.npz", bad


@pytest.fixture(scope="module")
def found(poisoned, tmp_path_factory) -> Path:
    """What the command leaves."""
    out = tmp_path_factory.mktemp("found") / "out"
    train, clean, _ = poisoned
    common = ["--method", "scan", "--clean", str(clean), "--threads", "1", "--quiet"]
    assert run("filter", "data", str(train), "--model", MODEL, "--out", str(out), *common) == 1
    return out


def listed(folder: Path) -> list[dict[str, str]]:
    with (folder / "suspects.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_command_finds_the_poison_in_real_images(found, poisoned):
    truth = json.loads((ASSETS / "truth.json").read_text())
    assert {p.name for p in found.iterdir()} == {
        *("suspects.csv", "clean_index.npy", "report.json", "contact-sheet.html")
    }
    rows, bad = listed(found), set(poisoned[2])
    positions = {int(row["position"]) for row in rows}
    assert len(positions & bad) > 0.9 * len(bad)
    assert len(positions - bad) < 0.1 * len(bad)
    assert {row["label"] for row in rows} == {str(truth["target"])}
    scores = [float(row["score"]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    kept = np.load(found / "clean_index.npy")
    assert sorted([*positions, *kept.tolist()]) == list(range(len(np.load(poisoned[0])["y"])))
    report = FilterReport.from_json((found / "report.json").read_text())
    assert (report.verdict, report.suspects) == ("backdoored", len(rows))
    assert report.labels[0].label == truth["target"]
    assert report.clean is not None


def test_summary_names_the_label(poisoned, tmp_path, capsys):
    train, clean, _ = poisoned
    more = ("--method", "scan", "--clean", str(clean), "--out", str(tmp_path / "out"))
    code = run("filter", "data", str(train), "--model", MODEL, *more)
    said = capsys.readouterr().out
    assert code == 1
    assert said.startswith("POISONED")
    assert "contact-sheet.html" in said


def test_exit_codes_tell_the_verdict(poisoned, tmp_path, capsys):
    _, clean, _ = poisoned
    common = ("--model", MODEL, "--out", str(tmp_path / "out"), "--quiet")
    assert run("filter", "data", str(clean), *common, "--method", "scan", "--clean", CLEAN) == 0
    assert run("filter", "data", str(clean), *common) == 3
    assert run("filter", "data", str(clean), *common, "--method", "scan") == 2
    assert "--clean" in capsys.readouterr().err
    assert run("filter", "data", str(tmp_path / "absent"), *common) == 2
    assert run("filter", "data", str(clean), *common, "--method", "skan") == 2


def test_json_is_the_report(poisoned, tmp_path, capsys):
    _, clean, _ = poisoned
    run("filter", "data", str(clean), "--model", MODEL, "--out", str(tmp_path / "out"), "--json")
    printed = FilterReport.from_json(capsys.readouterr().out)
    assert printed == FilterReport.from_json((tmp_path / "out" / "report.json").read_text())


def test_suspects_are_unlearned(found, poisoned, tmp_path):
    train, clean, _ = poisoned
    out = tmp_path / "cleaned"
    common = ["--method", "abl-unlearn", "--suspects", str(found / "suspects.csv"), "--suspect-data", str(train)]
    more = ["--set", "statistics=fixed", "--set", "lr=0.002", "--quiet"]
    assert run("purify", MODEL, "--data", str(clean), *common, *more, "--out", str(out)) == 0
    notes = json.loads((out / "changes.json").read_text())["notes"]
    assert notes["suspects_before"] > 0.9
    assert notes["suspects_after"] < notes["suspects_before"] - 0.2


def test_unlearning_without_suspects_is_refused(poisoned, tmp_path, capsys):
    out = ("--out", str(tmp_path / "out"), "--quiet")
    assert run("purify", MODEL, "--data", CLEAN, "--method", "abl-unlearn", *out) == 2
    assert "bezoar filter data" in capsys.readouterr().err
    assert run("purify", MODEL, "--data", CLEAN, "--method", "abl-unlearn", "--suspects", "s.csv", *out) == 2
    assert "--suspect-data" in capsys.readouterr().err


def toy_data(every: int = 20) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, y = images(600, seed=100)
    bad = torch.zeros(600, dtype=torch.bool)
    bad[::every] = True
    bad &= y != TARGET
    x[bad], y[bad] = trigger()(x[bad]), TARGET
    return x, y, bad


def test_module_and_tensors(tmp_path):
    x, y, bad = toy_data()
    result = bezoar.filter_data(
        trained(backdoored=True), (x, y), method=SCAn(), clean=images(120, seed=7), out=tmp_path / "out"
    )
    assert isinstance(result, bezoar.Filtered)
    assert torch.equal(result.suspect, bad)
    assert set(result.suspects.tolist()) == set(bad.nonzero().flatten().tolist())
    assert torch.equal(result.clean_index, (~bad).nonzero().flatten())
    assert result.report.acc > 0.9
    assert result.report.labels[0].label == TARGET
    assert (tmp_path / "out" / "contact-sheet.html").exists()


def test_data_that_is_open_already_is_taken_as_it_is():
    x, y, bad = toy_data()
    opened = open_untrusted((x, y), num_classes=LABELS)
    assert isinstance(opened, UntrustedData)
    result = bezoar.filter_data(trained(backdoored=True), opened, method="scan", clean=images(120, seed=7))
    assert torch.equal(result.suspect, bad)


def test_callers_model_comes_back_as_it_was():
    x, y, _ = toy_data()
    model = trained(backdoored=True).train()
    try:
        before = {k: v.clone() for k, v in model.state_dict().items()}
        threads, state = torch.get_num_threads(), torch.get_rng_state()
        bezoar.filter_data(model, (x, y), threads=1)
        assert model.training
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert torch.get_num_threads() == threads
        assert torch.equal(torch.get_rng_state(), state)
    finally:
        model.eval()


def test_positions_count_images_that_cannot_be_read(tmp_path):
    x, y, bad = toy_data()
    names = []
    for i, (image, label) in enumerate(zip(x[:240], y[:240].tolist(), strict=True)):
        path = tmp_path / "images" / str(label) / f"{i:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()).save(path)
        names.append(path)
    (tmp_path / "images" / "0" / "0000a.png").write_bytes(b"not an image")
    result = bezoar.filter_data(
        trained(backdoored=True), tmp_path / "images", method="scan", clean=images(120, seed=7), out=tmp_path / "out",
        max_unreadable=0.05,
    )  # fmt: skip
    files = sorted(tmp_path.glob("images/*/*.png"), key=lambda p: (int(p.parent.name), p.name))
    rows = listed(tmp_path / "out")
    wanted = {str(names[i].relative_to(tmp_path / "images")) for i in bad[:240].nonzero().flatten().tolist()}
    assert {row["file"] for row in rows} == wanted
    assert all(files[int(row["position"])].name == Path(row["file"]).name for row in rows)
    assert any("could not be read" in warning for warning in result.report.warnings)


def test_label_without_examples_and_examples_under_two_labels_are_told():
    x, y, _ = toy_data()
    y[y == 4] = 3
    x[1], y[1], y[0] = x[0], 5, 0
    result = bezoar.filter_data(trained(backdoored=True), (x, y))
    said = " ".join(result.report.warnings)
    assert "labels without any example: 4" in said
    assert "2 examples stand under more than one label" in said
    assert result.report.labels[-1].label == 4
    assert result.report.labels[-1].statistic is None


def test_model_that_was_not_trained_on_the_data_is_told():
    x, y, _ = toy_data()
    result = bezoar.filter_data(trained(backdoored=True), (1 - x, y))
    assert any("was it trained on this data" in warning for warning in result.report.warnings)


def test_killed_run_keeps_its_features_and_a_finished_one_clears_them(monkeypatch):
    from bezoar.io.datasets import cache_folder

    x, y, _ = toy_data()
    kept = cache_folder() / "filters"

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("bezoar.filters.spectral_signatures.by_label", stop)
        with pytest.raises(KeyboardInterrupt):
            bezoar.filter_data(trained(backdoored=True), (x, y), resume=True)
    assert list(kept.glob("*/features.npy"))
    bezoar.filter_data(trained(backdoored=True), (x, y), resume=True)
    assert not list(kept.glob("*/features.npy"))


def test_clean_images_choose_a_filter_that_uses_them():
    x, y, _ = toy_data()
    model = trained(backdoored=True)
    assert bezoar.filter_data(model, (x, y)).report.method == "spectral-signatures"
    assert bezoar.filter_data(model, (x, y), clean=images(120, seed=7)).report.method == "scan"


def test_wrong_settings_are_refused():
    x, y, _ = toy_data()
    model = trained(backdoored=True)
    with pytest.raises(SettingError, match="no_such"):
        bezoar.filter_data(model, (x, y), no_such=1)
    with pytest.raises(SettingError, match="no method"):
        bezoar.filter_data(model, (x, y), method="spectral")
    with pytest.raises(DataError):
        bezoar.filter_data(model, (x, y + 1), model_options=ModelOptions())


def test_filter_that_trains_anew_does_not_ask_for_a_trained_model():
    x, y, _ = toy_data()
    result = bezoar.filter_data(trained(backdoored=True), (1 - x, y), method=ABLIsolation(epochs=1))
    assert not any("was it trained on this data" in warning for warning in result.report.warnings)
    assert result.report.suspects == len(y) // 100
    assert result.report.verdict == "inconclusive"
