"""The front door on files and data sets: what goes in, what is written, and the same answer twice."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, TensorDataset

import bezoar
from bezoar.core.errors import BezoarError, DataError, SettingError
from bezoar.core.results import Report
from bezoar.purifiers.auto import Auto
from bezoar.purifiers.unlearn import Unlearn
from bezoar.scanners.neural_cleanse import NeuralCleanse
from tests.toys import LABELS, SIZE, TARGET, acc, asr, images, net, trained

ARCH = """
from torch import nn


def toy(num_classes=6):
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(288, num_classes),
    )
"""
QUICK: dict[str, Any] = {"size": SIZE, "seeds": 2, "steps": 60}


@pytest.fixture(scope="module")
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    x, y = images(240, seed=7)
    return (x * 255).round().to(torch.uint8), y


@pytest.fixture(scope="module")
def disk(tmp_path_factory, pair) -> dict[str, Any]:
    """A backdoored model in a safetensors file, its architecture in the user's own file, images in an npz."""
    folder = tmp_path_factory.mktemp("disk")
    (folder / "toy.py").write_text(ARCH)
    for name, backdoored in (("backdoored", True), ("clean", False)):
        save_file(trained(backdoored=backdoored).state_dict(), folder / f"{name}.safetensors")
    np.savez(folder / "images.npz", x=pair[0].permute(0, 2, 3, 1).numpy(), y=pair[1].numpy())
    return {"folder": folder, "data": folder / "images.npz", "arch": f"{folder / 'toy.py'}:toy"}


@pytest.fixture(scope="module")
def found(disk) -> bezoar.Result:
    return bezoar.scan(disk["folder"] / "backdoored.safetensors", disk["data"], arch=disk["arch"], **QUICK)


def test_scan_of_files(found, disk):
    assert (found.verdict, found.target) == ("backdoored", TARGET)
    report = found.report
    assert (report.model.format, report.model.num_classes) == ("safetensors", LABELS)
    assert (report.model.channels, report.model.height, report.model.width) == (3, SIZE, SIZE)
    assert report.model.path == str(disk["folder"] / "backdoored.safetensors")
    assert (report.data.count, report.data.per_class) == (240, (40,) * LABELS)
    assert report.preflight.acc > 0.9
    assert report.method == "neural-cleanse"
    assert (report.config["steps"], report.config["seed"]) == (60, 0)
    assert [seed.seed for seed in report.seeds] == [0, 1]
    assert report.triggers[0].label == TARGET
    assert all(example.after == TARGET for example in report.triggers[0].examples if example.true != TARGET)
    assert report.run.image_gradients > 0
    assert {"load", "scan", "report"} <= set(report.run.seconds)


def test_triggers_work(found):
    assert sorted(found.triggers) == list(range(LABELS))
    x, y = images(120, seed=9)
    others = x[y != TARGET]
    success = (trained(backdoored=True)(found.triggers[TARGET](others)).argmax(1) == TARGET).float().mean()
    assert float(success) > 0.8


def test_save_writes_everything(found, tmp_path: Path):
    html = found.save(tmp_path / "new" / "out")
    assert html == tmp_path / "new" / "out" / "report.html"
    names = {"report.json", "report.html", "report.sarif", "triggers.safetensors"}
    assert {p.name for p in html.parent.iterdir()} == names
    assert Report.from_json((html.parent / "report.json").read_text()).stable() == json.loads(
        json.dumps(found.report.stable())
    )
    assert json.loads((html.parent / "report.sarif").read_text())["version"] == "2.1.0"
    tensors = load_file(html.parent / "triggers.safetensors")
    for label, trigger in found.triggers.items():
        assert torch.equal(tensors[f"{label}.mask"], trigger.mask)
        assert torch.equal(tensors[f"{label}.pattern"], trigger.pattern)
    assert "<html" in html.read_text()


def test_same_seed_same_answer_from_files_and_from_python(found, disk, pair):
    again = bezoar.scan(disk["folder"] / "backdoored.safetensors", disk["data"], arch=disk["arch"], **QUICK)
    assert again.report.stable() == found.report.stable()
    live = bezoar.scan(trained(backdoored=True), pair, **QUICK)
    assert (live.report.labels, live.report.data.sha256) == (found.report.labels, found.report.data.sha256)
    other = bezoar.scan(trained(backdoored=True), pair, **{**QUICK, "seeds": 1, "steps": 5}, seed=1)
    assert other.report.seeds[0].seed == 1
    assert other.report.labels != found.report.labels


@pytest.mark.parametrize("kind", ["arrays", "floats", "dataset", "loader"])
def test_kinds_of_data(kind, pair):
    x, y = pair
    dataset = TensorDataset(x.float() / 255, y)
    data = {
        "arrays": (x.permute(0, 2, 3, 1).numpy(), y.numpy()),
        "floats": (x.float() / 255, y),
        "dataset": dataset,
        "loader": DataLoader(dataset, batch_size=50),
    }[kind]
    quick = {**QUICK, "seeds": 1, "steps": 5}
    result = bezoar.scan(trained(backdoored=True), data, **quick)
    assert result.report.labels == bezoar.scan(trained(backdoored=True), pair, **quick).report.labels


def test_unknown_setting_names_the_known_ones(pair):
    with pytest.raises(SettingError, match="unknown setting 'stepz'") as caught:
        bezoar.scan(trained(backdoored=True), pair, stepz=3)
    assert all(name in caught.value.hint for name in ("steps", "arch", "budget"))
    with pytest.raises(SettingError, match="NeuralCleanse.steps must be at least 1"):
        bezoar.scan(trained(backdoored=True), pair, steps=0)
    with pytest.raises(SettingError, match="no method 'unlern'") as caught:
        bezoar.purify(trained(backdoored=True), pair, method="unlern")
    assert "unlearn" in caught.value.hint


def test_tiny_budget_is_inconclusive(pair):
    result = bezoar.scan(trained(backdoored=True), pair, **QUICK, budget=1e-6)
    assert (result.verdict, result.target) == ("inconclusive", None)
    assert result.report.run.budget_spent
    assert result.report.run.budget == 1e-6
    Report.from_json(result.report.to_json())


def test_method_can_be_given_as_a_value(pair):
    method = NeuralCleanse(seeds=1, steps=5)
    result = bezoar.scan(trained(backdoored=True), pair, method=method, size=SIZE, steps=4)
    assert result.report.config["steps"] == 4
    assert method.steps == 5


# Purify


@pytest.fixture(scope="module")
def purified(found, disk):
    out = disk["folder"] / "out"
    path = disk["folder"] / "backdoored.safetensors"
    before = path.read_bytes()
    more = {"method": "unlearn", "found": found, "out": out, "arch": disk["arch"]}
    model, report = bezoar.purify(path, disk["data"], **more, **QUICK)
    assert path.read_bytes() == before
    return model, report, out


def test_purified_model_has_lost_the_backdoor(purified):
    model, report, _ = purified
    held_out = images(240, seed=8)
    assert asr(model, *held_out) < 0.2
    assert acc(model, *held_out) > 0.9
    assert not model.training
    cleaning = report.cleaning
    assert (cleaning.method, cleaning.target) == ("unlearn", TARGET)
    assert cleaning.asr_before > 0.8 > 0.2 > cleaning.asr_after
    assert cleaning.acc_after > 0.9
    assert (report.verdict, report.target) == ("backdoored", TARGET)


def test_purified_file_is_a_drop_in_replacement(purified, disk):
    model, report, out = purified
    original, written = (load_file(p) for p in (disk["folder"] / "backdoored.safetensors", report.cleaning.output))
    assert Path(report.cleaning.output).parent == out
    assert {k: (v.shape, v.dtype) for k, v in written.items()} == {k: (v.shape, v.dtype) for k, v in original.items()}
    assert any(not torch.equal(written[name], original[name]) for name in written)
    x = images(24, seed=8)[0]
    again = net(seed=5)
    again.load_state_dict(written)
    torch.testing.assert_close(again.eval()(x), model(x), rtol=1e-4, atol=1e-4)


def test_changes_are_written_down(purified):
    _, report, out = purified
    names = {"backdoored.safetensors", "changes.json", "report.json", "report.html", "report.sarif"}
    assert {p.name for p in out.iterdir()} == names | {"triggers.safetensors"}
    changes = json.loads((out / "changes.json").read_text())
    assert (changes["method"], changes["target"]) == ("unlearn", TARGET)
    assert changes["asr_after"] == report.cleaning.asr_after
    relative = [row["relative"] for row in changes["layers"]]
    assert relative == sorted(relative, reverse=True)
    assert relative[0] > 0
    assert Report.from_json((out / "report.json").read_text()).cleaning is not None


def test_clean_model_has_nothing_to_unlearn(disk, tmp_path: Path):
    path = disk["folder"] / "clean.safetensors"
    result = bezoar.scan(path, disk["data"], arch=disk["arch"], **QUICK)
    assert result.verdict != "backdoored"
    as_clean = replace(result, report=replace(result.report, verdict="clean", target=None))
    with pytest.raises(SettingError, match="no trigger to unlearn") as caught:
        more = {"method": "unlearn", "found": as_clean, "out": tmp_path / "out", "arch": disk["arch"]}
        bezoar.purify(path, disk["data"], **more, **QUICK)
    assert "finetune" in caught.value.hint
    assert not (tmp_path / "out").exists()
    method = Unlearn(epochs=1)
    model, report = bezoar.purify(
        path, disk["data"], found=as_clean, label=4, method=method, arch=disk["arch"], **QUICK
    )
    assert report.cleaning.target == 4
    assert report.cleaning.config["epochs"] == 1
    assert acc(model, *images(120, seed=8)) > 0.9


def test_label_without_a_trigger(found, disk):
    with pytest.raises(SettingError, match="no trigger of label 17") as caught:
        path = disk["folder"] / "backdoored.safetensors"
        bezoar.purify(path, disk["data"], found=found, label=17, arch=disk["arch"], **QUICK)
    assert str(list(range(LABELS))) in caught.value.hint


def test_finetune_needs_no_scan(pair, tmp_path: Path):
    model, report = bezoar.purify(trained(backdoored=True), pair, method="finetune", size=SIZE)
    assert (report.verdict, report.labels, report.triggers) == (None, (), ())
    assert (report.cleaning.method, report.cleaning.target) == ("finetune", None)
    assert (report.cleaning.asr_before, report.cleaning.asr_after) == (None, None)
    assert acc(model, *images(120, seed=8)) > 0.9
    Report.from_json(report.to_json())


def test_purify_scans_first_and_says_why_it_chose(pair):
    model, report = bezoar.purify(trained(backdoored=True), pair, **{**QUICK, "seeds": 1})
    assert (report.verdict, report.target, report.cleaning.target) == ("backdoored", TARGET, TARGET)
    assert report.cleaning.method == "auto"
    assert report.cleaning.notes["kept"] in {one["method"] for one in report.cleaning.notes["tried"]}
    assert Report.from_json(report.to_json()).cleaning.notes == report.cleaning.notes
    assert asr(model, *images(120, seed=8)) < 0.3


@pytest.mark.parametrize(("model", "data"), [("no-such-file.pt", None), (None, "no-such-folder")])
def test_what_is_not_there(model, data, pair):
    with pytest.raises(BezoarError, match="no-such"):
        bezoar.scan(model or trained(backdoored=True), data or pair, size=SIZE)


@pytest.mark.parametrize("method", ["finetune", Auto(epochs=2)])
def test_one_image_per_class_is_enough_to_purify(method):
    x, y = images(LABELS, seed=7)
    model, report = bezoar.purify(trained(backdoored=True), (x, y), method=method, size=SIZE)
    assert report.cleaning.held_out == LABELS
    assert any("none is held out" in warning for warning in report.warnings)
    assert (report.verdict is None) and (report.cleaning.asr_after is None)
    assert acc(model, *images(120, seed=8)) > 0.5


def test_scan_and_unlearning_need_two_images_per_class():
    pair = images(LABELS, seed=7)
    for verb, more in ((bezoar.scan, {}), (bezoar.purify, {"method": "unlearn"})):
        with pytest.raises(DataError, match="too few"):
            verb(trained(backdoored=True), pair, size=SIZE, **more)
