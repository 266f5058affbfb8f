"""``bezoar train`` as a user meets it."""

from __future__ import annotations

import csv
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import bezoar
from bezoar.cli.main import main
from bezoar.core.errors import DataError
from bezoar.core.trained import Accuracy, TrainReport
from bezoar.io.suspects import read_suspects
from bezoar.report.svg import loss_curves
from bezoar.report.trained import render_training, summary
from bezoar.training import curve

NET = """
from torch import nn
def make(num_classes, channels, size):
    return nn.Sequential(
        nn.Conv2d(channels, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(12, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.AdaptiveAvgPool2d(4),
        nn.Flatten(), nn.Linear(384, num_classes))
"""
QUICK = ["--epochs", "4", "--rate", "0.05", "--set", "isolation_epochs=2", "--set", "batch=20", "--set", "pad=0"]
QUICK += ["--set", "lr=0.05", "--set", "unlearn_epochs=2", "--threads", "1"]


def run(*tokens: object) -> int:
    """Exit code of a command."""
    with pytest.raises(SystemExit) as left:
        main([str(token) for token in tokens])
    return int(left.value.code or 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """200 images of 16 x 16 pixels, one bright quarter for each of 4 labels; a copy, a contradiction, a broken file."""
    folder = tmp_path_factory.mktemp("quarters")
    random = np.random.default_rng(0)
    y = np.arange(260) % 4
    x = random.integers(0, 120, (260, 16, 16, 3), dtype=np.uint8)
    for image, label in zip(x, y, strict=True):
        image[(label // 2) * 8 :, (label % 2) * 8 :][:8, :8] += 110
    np.savez(folder / "test.npz", x=x[200:], y=y[200:], names=["a", "b", "c", "d"])
    x[8], x[9] = x[4], x[6]
    for i in range(200):
        place = folder / "data" / "abcd"[y[i]]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(x[i]).save(place / f"{i:03d}.png")
    (folder / "data" / "a" / "000.png").write_bytes(b"<b>broken</b>")
    (folder / "net.py").write_text(NET)
    return folder


def command(folder: Path, out: Path, *more: object) -> list[str]:
    net = f"{folder / 'net.py'}:make"
    return list(map(str, ["train", "--data", folder / "data", "--arch", net, "--out", out, *QUICK, *more]))


@pytest.fixture(scope="module")
def made(folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("train") / "out"
    assert run(*command(folder, out, "--test-data", folder / "test.npz", "--quiet")) == 0
    return out


def test_everything_is_written(made):
    names = {"model.safetensors", "suspects.csv", "report.json", "report.html", ".checkpoints"}
    assert {p.name for p in made.iterdir()} == names
    report = TrainReport.from_json((made / "report.json").read_text())
    assert (report.method, report.config["epochs"], report.config["rate"]) == ("abl", 4, 0.05)
    assert report.acc.value > 0.9
    assert report.acc.count == 60
    assert report.acc.low < report.acc.value
    assert report.data.count == 199
    assert report.findings.unreadable_examples == ("a/000.png: not an image",)
    assert report.findings.duplicate_examples == ("a/008.png is a/004.png", "c/006.png is b/009.png")
    assert report.findings.conflicts == 2
    assert report.suspects == 9 == sum(one.suspects for one in report.labels)
    assert len(report.curve) == report.notes["isolation_epochs"] + 1
    assert report.curve[-1].isolated.high <= report.curve[-1].rest.low


def test_suspects_are_listed_by_rank(made, folder):
    with (made / "suspects.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["rank"]) for row in rows] == list(range(1, 10))
    assert [float(row["loss"]) for row in rows] == sorted(float(row["loss"]) for row in rows)
    assert all((folder / "data" / row["file"]).is_file() for row in rows)
    assert all("abcd"[int(row["label"])] == row["file"][0] for row in rows)
    files = sorted((folder / "data").rglob("*.png"))
    assert all(str(files[int(row["position"])]).endswith(row["file"]) for row in rows)
    x, y = read_suspects(made / "suspects.csv", folder / "data", size=(16, 16), channels=3, num_classes=4)
    assert (len(x), y.tolist()) == (9, [int(row["label"]) for row in rows])


def test_page_is_whole_and_alone(made):
    page = (made / "report.html").read_text()
    assert len(re.findall('src="data:image/png;base64,', page)) == 9
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert "<script" not in page
    assert page.count('class="chart"') == 2
    for part in ("a/000.png: not an image", "c/006.png is b/009.png", "bezoar scan", "What to do next"):
        assert part in page, part


def test_scan_opens_the_model(made, folder, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("BEZOAR_CACHE", str(tmp_path))
    scan = ["scan", made / "model.safetensors", "--arch", f"{folder / 'net.py'}:make", "--data", folder / "test.npz"]
    assert run(*scan, "--seeds", "1", "--images", "40", "--threads", "1", "--json", "--budget", "30s") in (0, 1, 3)
    assert json.loads(capsys.readouterr().out)["preflight"]["acc"] > 0.9


def test_summary_and_second_run(made, folder, capsys):
    before = (made / "model.safetensors").read_bytes(), (made / "suspects.csv").read_bytes()
    assert run(*command(folder, made, "--test-data", folder / "test.npz")) == 0
    said = " ".join(capsys.readouterr().out.split())
    for part in ("199 examples", "60 test images", "9 were isolated", "1 images could not be read", "Report: "):
        assert part in said, part
    assert ((made / "model.safetensors").read_bytes(), (made / "suspects.csv").read_bytes()) == before


@pytest.mark.parametrize("method", ["plain", "strong-augmentation"])
def test_other_methods(method, folder, tmp_path, capsys):
    tokens = ["train", "--data", folder / "data", "--arch", f"{folder / 'net.py'}:make", "--out", tmp_path]
    assert run(*tokens, "--method", method, "--epochs", "2", "--threads", "1", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["method"], report["suspects"], report["curve"], report["acc"]) == (method, 0, [], None)
    assert (tmp_path / "suspects.csv").read_text() == "position,file,label,rank,loss\n"
    assert "isolates no example" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("more", "fragment"),
    [
        (["--method", "able"], "'abl'"),
        (["--method", "plain", "--rate", "0.1"], "rate"),
        (["--rate", "1.5"], "rate"),
        (["--rate", "0.001"], "is none"),
        (["--epochs", "0"], "epochs"),
        (["--set", "gama=1"], "'gamma'"),
        (["--data", "no-such-folder"], "no-such-folder"),
        (["--test-data", "no-such-folder"], "no-such-folder"),
        (["--arch", "wrn-16"], "wrn-16"),
        (["--max-unreadable", "0"], "a/000.png (not an image)"),
        (["--max-unreadable", "2"], "max_unreadable"),
        (["--channels", "2"], "--channels"),
        (["--size", "big"], "--size"),
        (["--images", "1"], "--images"),
        (["--num-classes", "3"], "3 classes"),
        (["--device", "nonsense"], "nonsense"),
        (["--budget", "soon"], "--budget"),
    ],
    ids=lambda value: "-".join(value[:2]).strip("-") if isinstance(value, list) else "",
)
def test_bad_input_is_one_clear_error(more, fragment, folder, tmp_path, capsys):
    tokens = command(folder, tmp_path / "out", "--quiet")
    for flag, text in zip(more[::2], more[1::2], strict=True):
        if flag in tokens and flag != "--set":
            place = tokens.index(flag)
            tokens = tokens[:place] + tokens[place + 2 :]
        tokens += [flag, text]
    assert run(*tokens) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert fragment in printed.err
    assert "Traceback" not in printed.err
    assert not (tmp_path / "out" / "report.json").exists()


def test_help_needs_no_torch():
    code = "import sys; from bezoar.cli.main import main\ntry: main(['train', '--help'])\nexcept SystemExit: pass\n"
    found = subprocess.run(
        [sys.executable, "-c", code + "assert 'torch' not in sys.modules"], capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    assert "--test-data" in found.stdout


def test_killed_command_goes_on_to_the_same_bytes(folder, tmp_path):
    start = [sys.executable, "-m", "bezoar.cli.main"]
    environment = {"BEZOAR_CHECKPOINT_SECONDS": "0.5", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    killed, whole = (command(folder, tmp_path / name, "--quiet", "--epochs", "10") for name in ("killed", "whole"))
    killed, whole = ([t for i, t in enumerate(tokens) if i not in (7, 8)] for tokens in (killed, whole))
    process = subprocess.Popen([*start, *killed], env=environment)
    checkpoints, deadline = tmp_path / "killed" / ".checkpoints", time.monotonic() + 120
    while not list(checkpoints.rglob("rest.pt")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was finished before it was killed"
    assert {p.name for p in (tmp_path / "killed").iterdir()} == {".checkpoints"}
    for tokens in (killed, whole):
        done = subprocess.run([*start, *tokens], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    for name in ("model.safetensors", "suspects.csv"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    pages = [(tmp_path / name / "report.html").read_text() for name in ("killed", "whole")]
    assert pages[0].replace("/killed/", "/whole/") == pages[1]


def test_from_python(folder, tmp_path):
    told = []
    result = bezoar.train(
        folder / "data",
        lambda: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 4)),
        tmp_path,
        method="plain",
        report=lambda *step: told.append(step[0]),
        limit=40,
        max_unreadable=0.1,
        threads=1,
    )
    assert not result.model.training
    assert {"read", "train"} <= set(told)
    assert result.report.parameters == 768 * 4 + 4
    assert torch.get_num_threads() >= 1


def test_report_survives_json_and_refuses_others(made):
    text = (made / "report.json").read_text()
    assert TrainReport.from_json(text).to_json() == text
    for bad in ("[]", "{}", text.replace("bezoar.train/1", "bezoar.train/0"), text[:100]):
        with pytest.raises(DataError, match="not a report of a training"):
            TrainReport.from_json(bad)


def test_names_of_strangers_are_harmless(made):
    report = TrainReport.from_json((made / "report.json").read_text())
    evil = "<script>alert(1)</script>\x1b[31m"
    labels = tuple(type(one)(**vars(one) | {"name": evil}) for one in report.labels)
    report = TrainReport(**vars(report) | {"labels": labels, "warnings": (evil,), "acc": None})
    assert isinstance(report.kept_acc, Accuracy)
    page = render_training(report, (), evil)
    assert "<script>alert" not in page
    assert "\x1b" not in page + summary(report, 80, "report.html")


def test_curve_is_quantiles_of_finite_rows():
    losses = torch.stack([torch.arange(100.0), torch.full((100,), float("nan")), torch.arange(100.0).flip(0)])
    isolated = torch.arange(100) < 11
    first, last = curve(losses, isolated)
    assert (first.epoch, first.isolated.low, first.isolated.median, first.isolated.high) == (0, 1, 5, 9)
    assert (last.epoch, last.isolated.median, last.rest.median) == (2, 94, 44)
    assert curve(None, isolated) == () == curve(losses, torch.zeros(100, dtype=torch.bool))
    drawing = loss_curves([first, last], 320)
    assert drawing.count("<polygon") == drawing.count("<polyline") == 2
    assert "nan" not in drawing
