"""``bezoar attack`` as a user meets it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from bezoar.cli.main import main
from bezoar.core.errors import SettingError
from bezoar.core.fields import value
from bezoar.core.registry import methods

NET = """
from torch import nn
def make(num_classes, channels, size):
    return nn.Sequential(
        nn.Conv2d(channels, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(12, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.AdaptiveAvgPool2d(4),
        nn.Flatten(), nn.Linear(384, num_classes))
"""


def run(*tokens: object) -> int:
    """Exit code of a command."""
    with pytest.raises(SystemExit) as left:
        main([str(token) for token in tokens])
    return int(left.value.code or 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """200 images of 16 x 16 pixels, one bright quarter for each of 4 labels, and a net."""
    folder = tmp_path_factory.mktemp("quarters")
    random = np.random.default_rng(0)
    y = np.arange(200) % 4
    x = random.integers(0, 120, (200, 16, 16, 3), dtype=np.uint8)
    for image, label in zip(x, y, strict=True):
        image[(label // 2) * 8 :, (label % 2) * 8 :][:8, :8] += 110
    np.savez(folder / "quarters.npz", x=x, y=y, names=["a", "b", "c", "d"])
    (folder / "net.py").write_text(NET)
    return folder


def command(folder: Path, out: Path, *more: object, name: str = "badnets") -> list[str]:
    net, data = f"{folder / 'net.py'}:make", folder / "quarters.npz"
    recipe = ["--epochs", "12", "--batch", "20", "--lr", "0.05", "--target", "2", "--threads", "1"]
    return list(map(str, ["attack", name, "--data", data, "--arch", net, "--out", out, *recipe, *more]))


@pytest.fixture(scope="module")
def made(folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("attack") / "out"
    assert run(*command(folder, out, "--clean-twin", "--export", "images", "--quiet")) == 0
    return out


def test_everything_is_written(made):
    assert {p.name for p in made.iterdir()} == {
        *("model.safetensors", "truth.json", "truth.safetensors", "index.json", "examples.png", "poisoned"),
        *("record.json", ".checkpoints"),
    }
    record = json.loads((made / "record.json").read_text())
    assert record["schema"] == "bezoar.attack/1"
    assert record["measures"]["plants"][0]["asr"]["value"] > 0.9
    assert record["measures"]["acc"]["value"] > 0.9
    assert record["clean_twin"]["acc"]["value"] > 0.9
    assert record["clean_twin"]["plants"][0]["asr"]["value"] < 0.3
    assert record["test"]["count"] == 20
    assert record["recipe"]["epochs"] == 12
    assert record["config"]["target"] == 2


def test_summary_of_a_finished_victim(made, folder, capsys):
    before = (made / "record.json").read_bytes()
    assert run(*command(folder, made, "--clean-twin", "--export", "images")) == 0
    assert (made / "record.json").read_bytes() == before
    said = capsys.readouterr().out
    for part in ("badnets in", "18 of 180 training images", "ACC", "ASR", "RA", "clean twin", "2 (c)", "PSNR"):
        assert part in said, part


def test_json_is_the_record(made, folder, capsys):
    assert run(*command(folder, made, "--json")) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((made / "record.json").read_text())


def test_scan_opens_what_was_made(made, folder, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("BEZOAR_CACHE", str(tmp_path))
    scan = ["scan", made / "model.safetensors", "--arch", f"{folder / 'net.py'}:make", "--data", made / "poisoned"]
    assert run(*scan, "--seeds", "1", "--images", "60", "--threads", "1", "--json", "--budget", "60s") in (0, 1, 3)
    assert json.loads(capsys.readouterr().out)["preflight"]["acc"] > 0.9


def test_settings_reach_the_attack_and_the_training(folder, tmp_path, capsys):
    more = ["--rate", "0.2", "--set", "pattern=noise", "--set", "sources=0,1", "--set", "alpha=1/2", "--images", "80"]
    recipe = ["--recipe", "cutout=0", "--recipe", "gamma=0.5", "--optimizer", "adam", "--epochs", "1", "--flip"]
    tokens = _without(command(folder, tmp_path), "--epochs")
    assert run(*tokens, *more, *recipe, "--seed", "3", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    expected = {"rate": 0.2, "pattern": "noise", "sources": [0, 1], "alpha": 0.5, "seed": 3, "target": 2}
    assert {key: record["config"][key] for key in expected} == expected
    expected = {"gamma": 0.5, "optimizer": "adam", "epochs": 1, "flip": True, "weight_decay": 0}
    assert {key: record["recipe"][key] for key in expected} == expected
    assert (record["train"]["count"], record["seed"], record["poisoned"]) == (80, 3, 16)


@pytest.mark.parametrize(
    ("name", "more", "fragment"),
    [
        ("badnet", [], "badnets"),
        ("badnets", ["--set", "patern=noise"], "'pattern'"),
        ("badnets", ["--set", "pattern=nois"], "'noise'"),
        ("badnets", ["--set", "size=big"], "big"),
        ("badnets", ["--set", "size"], "key=value"),
        ("badnets", ["--set", "size=0"], "at least 1"),
        ("badnets", ["--recipe", "epoch=3"], "'epochs'"),
        ("badnets", ["--recipe", "gamma=7"], "gamma"),
        ("badnets", ["--epochs", "0"], "epochs"),
        ("badnets", ["--rate", "1.5"], "rate"),
        ("badnets", ["--rate", "0.9"], "may be chosen"),
        ("badnets", ["--target", "4"], "target 4"),
        ("badnets", ["--data", "no-such-folder"], "no-such-folder"),
        ("badnets", ["--test", "no-such-folder"], "no-such-folder"),
        ("badnets", ["--arch", "wrn-16"], "wrn-16"),
        ("badnets", ["--device", "nonsense"], "nonsense"),
        ("badnets", ["--size", "big"], "--size"),
        ("badnets", ["--export", "zip"], "zip"),
        ("lira", ["--rate", "0.1"], "rate"),
        ("trojan", ["--set", "layer=nowhere"], "no layer"),
    ],
)
def test_bad_input_is_one_clear_error(name, more, fragment, folder, tmp_path, capsys):
    tokens = command(folder, tmp_path / "out", name=name)
    for flag, text in zip(more[::2], more[1::2], strict=True):
        tokens = [*tokens, flag, text] if flag not in tokens else [*_without(tokens, flag), flag, text]
    assert run(*tokens) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert fragment in printed.err
    assert "Traceback" not in printed.err
    assert len(printed.err.strip().splitlines()) <= 4
    assert not (tmp_path / "out" / "record.json").exists()


def _without(tokens: list[str], flag: str) -> list[str]:
    place = tokens.index(flag)
    return tokens[:place] + tokens[place + 2 :]


def test_output_must_be_a_folder(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run(*command(folder, tmp_path / "file")) == 2
    assert "is a file" in capsys.readouterr().err


def test_attacks_are_listed(capsys):
    assert run("methods") == 0
    said = capsys.readouterr().out
    assert "attacks:" in said
    assert all(f"  {name} " in said for name in methods("attacks"))


def test_help_needs_no_torch():
    code = "import sys; from bezoar.cli.main import main\ntry: main(['attack', '--help'])\nexcept SystemExit: pass\n"
    found = subprocess.run(
        [sys.executable, "-c", code + "assert 'torch' not in sys.modules"], capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    assert "--clean-twin" in found.stdout


def test_killed_command_goes_on_to_the_same_bytes(folder, tmp_path):
    long = ("--epochs", "25", "--quiet")
    tokens = _without(command(folder, tmp_path / "killed"), "--epochs")
    whole = [tokens[i] if t != str(tmp_path / "killed") else str(tmp_path / "whole") for i, t in enumerate(tokens)]
    start = [sys.executable, "-m", "bezoar.cli.main"]
    environment = {"BEZOAR_CHECKPOINT_SECONDS": "0.1", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    process = subprocess.Popen([*start, *tokens, *long], env=environment)
    checkpoints = tmp_path / "killed" / ".checkpoints"
    deadline = time.monotonic() + 120
    while not list(checkpoints.rglob("*.pt")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was finished before it was killed"
    assert list(checkpoints.rglob("*.pt")), "no checkpoint was kept"
    assert {p.name for p in (tmp_path / "killed").iterdir()} == {".checkpoints"}
    for one in (tokens, whole):
        done = subprocess.run([*start, *one, *long], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    for name in ("model.safetensors", "truth.safetensors", "truth.json", "index.json", "examples.png"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.parametrize(
    ("text", "kind", "expected"),
    [
        ("3", int, 3),
        ("1e-3", float, 1e-3),
        ("16/255", float, 16 / 255),
        ("yes", bool, True),
        ("3", str, "3"),
        ("1, 2", tuple[int, ...], (1, 2)),
        ("", tuple[int, ...], ()),
        ("a:b=1,c=2; d", tuple[str, ...], ("a:b=1,c=2", "d")),
        ("none", float | None, None),
        ("0.5", float | None, 0.5),
    ],
)
def test_text_becomes_a_value(text, kind, expected):
    assert value("--set", text, kind) == expected


@pytest.mark.parametrize(
    ("text", "kind"), [("1.5", int), ("1/0", float), ("none", float), ("maybe", bool), ("1", dict), ("a", tuple[int])]
)
def test_text_that_is_no_value(text, kind):
    with pytest.raises(SettingError, match="--set"):
        value("--set", text, kind)


def test_every_setting_of_every_attack_can_be_given():
    import dataclasses
    import typing

    for attack in methods("attacks").values():
        kinds = typing.get_type_hints(attack)
        for field in dataclasses.fields(attack):
            default = getattr(attack(), field.name)
            separator = ";" if default and isinstance(default, tuple) and isinstance(default[0], str) else ","
            text = separator.join(map(str, default)) if isinstance(default, tuple) else str(default)
            assert value(field.name, text, kinds[field.name]) == default, (attack, field.name)
