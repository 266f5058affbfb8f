"""``bezoar evaluate`` as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.test_cli_attack import command, folder, run

__all__ = ["folder"]


@pytest.fixture(scope="module")
def victim(folder: Path, tmp_path_factory) -> Path:  # noqa: F811
    out = tmp_path_factory.mktemp("evaluate") / "victim"
    assert run(*command(folder, out, "--set", "rate=0.2", "--quiet")) == 0
    return out


@pytest.fixture(scope="module")
def scanned(folder: Path, victim: Path) -> Path:  # noqa: F811
    out = victim.parent / "scan"
    net, data = f"{folder / 'net.py'}:make", folder / "quarters.npz"
    told = ["--size", "16", "--channels", "3", "--seeds", "1", "--set", "steps=60", "--set", "refine=0", "--quiet"]
    code = run("scan", victim / "model.safetensors", "--data", data, "--arch", net, "--out", out, *told)
    assert code in (0, 1, 3)
    return out


def test_figures_of_the_victim_are_those_of_its_record(folder, victim, capsys):  # noqa: F811
    assert run("evaluate", victim, "--data", folder / "quarters.npz", "--json", "--device", "cpu") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["measures"] == json.loads((victim / "record.json").read_text())["measures"]
    assert found["comparisons"] == []


def test_compares_with_a_scan(folder, victim, scanned, tmp_path, capsys):  # noqa: F811
    given = [victim, "--data", folder / "quarters.npz", "--scan", scanned, "--out", tmp_path]
    assert run("evaluate", *given, "--device", "cpu") == 0
    said = capsys.readouterr().out
    assert "trigger: label 2" in said
    assert "overlap (IoU)" in said
    (one,) = json.loads((tmp_path / "comparison.json").read_text())["comparisons"]
    assert one["true_size"] == 16.0
    assert 0 <= one["neuron_iou"] <= 1
    assert (tmp_path / "comparison.png").stat().st_size > 500


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--out", "somewhere"], "--scan"),
        (["--images", "-1"], "--images"),
        (["--truth", "nowhere"], "nowhere"),
        (["--scan", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_told(folder, victim, more, message, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    assert run("evaluate", victim, "--data", folder / "quarters.npz", *more) == 2
    assert message in capsys.readouterr().err
