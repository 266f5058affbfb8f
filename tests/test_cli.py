"""The command line as a user meets it: exit codes, one clear error, nothing half-written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bezoar.cli import _output
from bezoar.cli.main import main
from bezoar.core.errors import SettingError
from bezoar.core.results import Report

ASSETS = Path(_output.__file__).parents[1] / "demo" / "assets"
MODEL, DATA = str(ASSETS / "model.safetensors"), str(ASSETS / "clean.npz")
QUICK = ["--seeds", "1", "--images", "200", "--threads", "1"]


def run(*tokens: str) -> int:
    """Exit code of a command."""
    with pytest.raises(SystemExit) as left:
        main([str(token) for token in tokens])
    return int(left.value.code or 0)


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BEZOAR_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def scanned(tmp_path_factory) -> Path:
    """A scan of the demo model, as a folder."""
    out = tmp_path_factory.mktemp("scan") / "out"
    assert run("scan", MODEL, "--data", DATA, "--out", str(out), "--quiet", *QUICK) == 1
    return out


def test_scan_writes_everything(scanned):
    assert {p.name for p in scanned.iterdir()} == {
        "report.html",
        "report.json",
        "report.sarif",
        "triggers.safetensors",
    }
    report = Report.from_json((scanned / "report.json").read_text())
    truth = json.loads((ASSETS / "truth.json").read_text())
    assert (report.verdict, report.target) == ("backdoored", truth["target"])


def test_scan_prints_json(capsys, scanned):
    assert run("scan", MODEL, "--data", DATA, "--json", *QUICK) == 1
    printed = Report.from_json(capsys.readouterr().out)
    assert printed.stable() == Report.from_json((scanned / "report.json").read_text()).stable()


def test_purify_uses_an_earlier_scan(scanned, tmp_path, capsys):
    out = tmp_path / "cleaned"
    common = ("--scan", str(scanned), "--out", str(out), "--images", "200", "--method", "unlearn")
    code = run("purify", MODEL, "--data", DATA, *common)
    assert code == 0
    said = capsys.readouterr().out
    assert "unlearn" in said
    changes = json.loads((out / "changes.json").read_text())
    assert changes["asr_after"] < 0.2 < 0.8 < changes["asr_before"]
    assert (out / "model.safetensors").exists()
    assert Report.from_json((out / "report.json").read_text()).cleaning is not None


def test_purify_refuses_a_scan_of_another_model(scanned, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    other = tmp_path / "other.safetensors"
    save_file({k: v * 1.001 for k, v in load_file(MODEL).items()}, other)
    code = run("purify", str(other), "--data", DATA, "--scan", str(scanned), "--out", str(tmp_path / "out"))
    assert code == 2
    assert "another model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_report_is_made_from_json_alone(scanned, tmp_path):
    copy = tmp_path / "run.json"
    copy.write_text((scanned / "report.json").read_text())
    assert run("report", str(copy), "--out", str(tmp_path / "again.html")) == 0
    assert (tmp_path / "again.html").read_text() == (scanned / "report.html").read_text()


@pytest.mark.parametrize(
    ("tokens", "fragment"),
    [
        (["scan", "no-such-file.pth", "--data", DATA], "does not exist"),
        (["scan", MODEL, "--data", "no-such-folder"], "no-such-folder"),
        (["scan", MODEL], "--data"),
        (["scna"], "scan"),
        (["scan", MODEL, "--data", DATA, "--mode", "slow"], "slow"),
        (["scan", MODEL, "--data", DATA, "--budget", "soon"], "soon"),
        (["scan", MODEL, "--data", DATA, "--labels", "77"], "77"),
        (["scan", MODEL, "--data", DATA, "--labels", "x"], "x"),
        (["scan", MODEL, "--data", DATA, "--mean", "a,b"], "--mean"),
        (["scan", MODEL, "--data", DATA, "--std", "0"], "std"),
        (["scan", MODEL, "--data", DATA, "--size", "big"], "--size"),
        (["scan", MODEL, "--data", DATA, "--device", "nonsense"], "nonsense"),
        (["scan", MODEL, "--data", DATA, "--set", "stepz=3"], "steps"),
        (["scan", MODEL, "--data", DATA, "--set", "steps=many"], "many"),
        (["scan", MODEL, "--data", DATA, "--seeds", "0"], "seeds"),
        (["scan", MODEL, "--data", DATA, "--arch", "resnet-81"], "resnet-81"),
        (["scan", MODEL, "--data", DATA, "--json", "--sarif"], "--sarif"),
        (["purify", MODEL, "--data", DATA, "--method", "unlern", "--out", "unwritten"], "unlearn"),
        (["report", "no-such.json"], "no-such.json"),
    ],
)
def test_bad_input_is_one_clear_error(tokens, fragment, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*tokens) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert fragment in printed.err
    assert "Traceback" not in printed.err
    assert len(printed.err.strip().splitlines()) <= 4
    assert list(tmp_path.iterdir()) == []


def test_output_folder_is_checked_before_the_work(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run("scan", MODEL, "--data", DATA, "--out", str(tmp_path / "file" / "out")) == 2
    assert "is a file" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "value"), [("", None), ("90", 90), ("90s", 90), ("2m", 120), ("1.5h", 5400)])
def test_budget(text, value):
    assert _output.seconds(text) == value


def test_labels():
    assert _output.label_list("3, 7,10-12") == (3, 7, 10, 11, 12)
    with pytest.raises(SettingError):
        _output.label_list("5-3")


def test_methods_are_listed(capsys):
    assert run("methods") == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("neural-cleanse", "unlearn", "finetune"))


def test_a_method_is_explained(capsys):
    assert run("methods", "neural-cleanse") == 0
    printed = capsys.readouterr().out
    assert "neural-cleanse (scanner)" in printed
    assert "IEEE S&P 2019" in printed
    assert "    steps = 120" in printed.splitlines()
    assert run("methods", "neural-clense") == 2
    assert "Did you mean 'neural-cleanse'?" in capsys.readouterr().err


def test_killed_scan_goes_on_where_it_stopped(tmp_path):
    command = [sys.executable, "-m", "bezoar.cli.main", "scan", MODEL, "--data", DATA, "--json", *QUICK]
    environment = {"BEZOAR_CACHE": str(tmp_path / "cache"), "PATH": "/usr/bin:/bin", "BEZOAR_CHECKPOINT_SECONDS": "0"}
    environment["OMP_NUM_THREADS"] = "1"
    whole = subprocess.run(command, env=environment | {"BEZOAR_CACHE": str(tmp_path / "b")}, capture_output=True)
    assert whole.returncode == 1, whole.stderr.decode()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    import time

    for _ in range(600):
        if list((tmp_path / "cache").rglob("seed-0.pt")):
            break
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert list((tmp_path / "cache").rglob("seed-0.pt")), "no checkpoint was kept"
    again = subprocess.run(command, env=environment, capture_output=True)
    first, second = (Report.from_json(r.stdout.decode()) for r in (whole, again))
    assert first.stable() == second.stable()
    assert second.run.image_gradients < first.run.image_gradients
    assert not list((tmp_path / "cache").rglob("*.pt"))


@pytest.mark.parametrize(
    ("flags", "asked"),
    [
        ([], ()),
        (["--source-specific"], ("source-specific",)),
        (["--evidence", "mm-bd, k-arm", "--source-specific"], ("mm-bd", "k-arm", "source-specific")),
        (["--evidence", "all", "--source-specific"], ("all",)),
    ],
)
def test_evidence_that_is_asked_for_reaches_the_scan(monkeypatch, flags, asked):
    told = []

    def scan(*_, options, **__):
        told.append(options.evidence)
        raise SettingError("far enough")

    monkeypatch.setattr("bezoar.api.scan", scan)
    assert run("scan", MODEL, "--data", DATA, *flags) == 2
    assert told == [asked]
