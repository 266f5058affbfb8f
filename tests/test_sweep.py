"""Sweeps: every model has a record, nothing is scanned twice, and what breaks takes nothing else with it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import save_file

from bezoar import sweeping
from bezoar.apart import Limits
from bezoar.cli.main import main
from bezoar.core.errors import DataError, ModelError, SettingError
from bezoar.core.results import Report
from bezoar.core.swept import Swept, exit_code
from bezoar.options import ModelOptions, RunOptions
from bezoar.scanners.neural_cleanse import NeuralCleanse
from tests import toys

NET = """
import os
from torch import nn
class Net(nn.Sequential):
    pass
def net(num_classes):
    return Net(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * 9, num_classes))
def hangs(num_classes):
    import time
    time.sleep(600)
def dies(num_classes):
    os.abort()
"""

ASSETS = Path(sweeping.__file__).parent / "demo" / "assets"
MODEL, DATA = str(ASSETS / "model.safetensors"), str(ASSETS / "clean.npz")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory) -> Path:
    """A backdoored and a clean toy net, a net as a file, and clean images."""
    folder = tmp_path_factory.mktemp("zoo")
    (folder / "models").mkdir()
    for name, backdoored in (("bad", True), ("good", False)):
        save_file(toys.trained(backdoored).state_dict(), folder / "models" / f"{name}.safetensors")
    (folder / "models" / "junk.pth").write_text("not a model")
    (folder / "net.py").write_text(NET)
    x, y = toys.images(240, seed=5)
    np.savez(folder / "clean.npz", x=(x * 255).round().byte().permute(0, 2, 3, 1).numpy(), y=y.numpy())
    return folder


QUICK = ["--seeds", "1", "--no-additive", "--threads", "1", "--set", "refine=0"]


def run(*tokens: object) -> int:
    with pytest.raises(SystemExit) as left:
        main([str(token) for token in tokens])
    return int(left.value.code or 0)


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "sweep.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def swept(zoo, tmp_path_factory) -> Path:
    """A sweep of all kinds of models, two at a time, as a folder."""
    out = tmp_path_factory.mktemp("swept") / "out"
    lines = ["model,arch"]
    lines += [f"models/{name},net.py:net" for name in ("bad.safetensors", "junk.pth")]
    lines += ["models/good.safetensors,net.py:dies", "models/bad.safetensors,net.py:net"]
    (zoo / "list.csv").write_text("\n".join(lines))
    code = run(
        *("sweep", zoo / "list.csv", "--data", zoo / "clean.npz", "--out", out, "--workers", 2, "--limit", "2m"),
        *(*QUICK, "--quiet"),
    )
    assert code == 1
    return out


def test_every_kind_of_outcome_is_a_record(swept):
    found = rows(swept)
    assert [row["outcome"] for row in found] == ["backdoored", "refused", "crashed", "backdoored"]
    assert found[0]["target"] == toys.TARGET
    assert found[0]["asr"] > 0.9
    assert "text file" in found[1]["error"]
    assert found[2]["error"].startswith("died of SIGABRT")
    assert found[0]["key"] == found[3]["key"]  # equal models are scanned once
    assert len({row["key"] for row in found}) == 3


def test_each_verdict_has_its_own_report(swept):
    folder = swept / "models" / rows(swept)[0]["key"][:2] / rows(swept)[0]["key"]
    report = Report.from_json((folder / "report.json").read_text())
    assert (report.verdict, report.target) == ("backdoored", toys.TARGET)
    assert {path.name for path in folder.iterdir()} == {
        *("record.json", "report.html", "report.json", "report.sarif", "triggers.safetensors"),
    }


def test_the_page_links_the_reports(swept):
    page = (swept / "index.html").read_text()
    links = re.findall(r'<a href="(models/[^"]+)"', page)
    assert len(links) == 2
    assert all((swept / link).is_file() for link in links)
    assert "2 of 4 models backdoored" in page


def test_nothing_is_left_beside_the_records(swept):
    assert list((swept / ".locks").iterdir()) == []
    assert not [path for path in swept.rglob("*") if path.suffix == ".part"]


# --- with a scan that is only pretended: what is scanned, and when -------------------------------------------------


@pytest.fixture
def pretended(monkeypatch):
    """Models that were scanned; their names say what comes out."""
    seen: list[str] = []

    def scan(limits: Limits, job: Any) -> tuple[Swept, dict[str, bytes]]:
        name = Path(job.facts["model"]).stem
        seen.append(name)
        outcome = next((one for one in ("backdoored", "killed", "crashed") if one in name), "clean")
        files = {} if outcome in ("killed", "crashed") else {"report.json": b"{}"}
        return Swept(key=job.key, **job.facts, outcome=outcome, limit=limits.seconds), files

    monkeypatch.setattr(sweeping, "scan_apart", scan)
    return seen


@pytest.fixture
def many(tmp_path):
    for name in ("a", "b-backdoored", "c-killed", "d-crashed", "e"):
        (tmp_path / f"{name}.pt").write_bytes(name.encode())
    (tmp_path / "data.npz").write_bytes(b"images")
    return tmp_path


def sweep(folder: Path, **given: Any) -> sweeping.Sweep:
    models = given.pop("models", sorted(folder.glob("*.pt")))
    return sweeping.sweep(models, str(folder / "data.npz"), folder / "out", **given)


def test_what_was_scanned_is_not_scanned_again(many, pretended):
    first = sweep(many)
    assert (first.scanned, len(first.rows), first.missing, first.exit_code) == (5, 5, 0, 1)
    second = sweep(many)
    assert (second.scanned, second.rows) == (0, first.rows)
    assert len(pretended) == 5


@pytest.mark.parametrize(
    ("change", "anew"),
    [
        (lambda folder: (folder / "a.pt").write_bytes(b"other"), 1),
        (lambda folder: (folder / "data.npz").write_bytes(b"other"), 5),
        (lambda folder: (folder / "a.pt").rename(folder / "z.pt"), 0),
        (lambda folder: shutil.rmtree(folder / "out" / "models" / next((folder / "out" / "models").iterdir()).name), 1),
        (lambda folder: next((folder / "out").rglob("record.json")).write_text("{"), 1),
    ],
    ids=["weights", "data", "renamed", "lost", "damaged"],
)
def test_what_changed_is_scanned_again(many, pretended, change, anew):
    sweep(many)
    change(many)
    assert sweep(many).scanned == anew
    assert len(pretended) == 5 + anew


@pytest.mark.parametrize(
    "given",
    [
        {"method": NeuralCleanse(steps=60)},
        {"options": RunOptions(images=50)},
        {"options": RunOptions(seed=1)},
        {"model_options": ModelOptions(num_classes=10)},
    ],
    ids=lambda given: next(iter(given)),
)
def test_other_settings_are_another_scan(many, pretended, given):
    sweep(many)
    assert sweep(many, **given).scanned == 5


@pytest.mark.parametrize("given", [{"workers": 2}, {"options": RunOptions(threads=1, device="cpu", resume=True)}])
def test_other_means_are_the_same_scan(many, pretended, given):
    sweep(many)
    assert sweep(many, **given).scanned == 0


def test_failures_are_repeated_when_asked_or_with_more_time(many, pretended):
    sweep(many, limits=Limits(seconds=10))
    assert sweep(many, limits=Limits(seconds=5)).scanned == 0
    del pretended[:]
    sweep(many, limits=Limits(seconds=20))
    assert pretended == ["c-killed"]
    del pretended[:]
    sweep(many, again=True)
    assert sorted(pretended) == ["c-killed", "d-crashed"]


def test_a_fault_of_ours_ends_the_sweep_but_keeps_what_is_done(many, pretended, monkeypatch):
    scan = sweeping.scan_apart

    def breaks(limits: Limits, job: Any) -> Any:
        if Path(job.facts["model"]).stem == "c-killed":
            raise OSError("the disk is full")
        return scan(limits, job)

    monkeypatch.setattr(sweeping, "scan_apart", breaks)
    with pytest.raises(OSError, match="full"):
        sweep(many)
    assert [row["outcome"] for row in rows(many / "out")] == ["clean", "backdoored"]
    assert list((many / "out" / ".locks").iterdir()) == []
    monkeypatch.setattr(sweeping, "scan_apart", scan)
    assert sweep(many).scanned == 3


def test_what_another_sweep_is_at_is_left_to_it(many, pretended):
    sweep(many, models=[many / "a.pt"])
    record = next((many / "out" / "models").rglob("record.json"))
    key = record.parent.name
    record.unlink()
    other = sweeping.Claims(many / "out" / ".locks")
    assert other.take(key)
    done = sweep(many)
    assert (done.scanned, done.missing, len(done.rows)) == (4, 1, 4)
    other.release_all()


def test_settings_of_the_list_come_first(many, monkeypatch):
    payloads = []

    def look(limits: Limits, job: Any) -> tuple[Swept, dict[str, bytes]]:
        payloads.append(job.payload)
        return Swept(key=job.key, **job.facts, outcome="clean"), {}

    monkeypatch.setattr(sweeping, "scan_apart", look)
    row = {"model": "a.pt", "arch": "wrn-16-1", "mean": "0.5,0.25", "std": [1, 2], "size": "55x47", "num_classes": "7"}
    (many / "list.jsonl").write_text(json.dumps(row))
    sweep(many, models=many / "list.jsonl", model_options=ModelOptions(arch="resnet-18", channels=1))
    assert payloads[0]["model_options"] == {
        "arch": "wrn-16-1",
        "num_classes": 7,
        "mean": (0.5, 0.25),
        "std": (1.0, 2.0),
        "size": (55, 47),
        "channels": 1,
        "allow_code": False,
    }
    assert os.path.isabs(payloads[0]["model"])


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({"allow_code": 1}, SettingError),
        ({"num_classes": "many"}, SettingError),
        ({"size": "1x2x3x"}, SettingError),
    ],
)
def test_bad_settings_of_a_list_are_told_before_the_work(many, pretended, row, error):
    (many / "list.jsonl").write_text(json.dumps({"model": "a.pt"}) + "\n" + json.dumps({"model": "e.pt"} | row))
    with pytest.raises(error, match=re.escape("e.pt")):
        sweep(many, models=many / "list.jsonl")
    assert pretended == []


@pytest.mark.parametrize(
    "given", [{"options": RunOptions(evidence=("nobody",))}, {"model_options": ModelOptions(arch="resnet-999")}]
)
def test_what_would_fail_for_all_is_told_before_the_work(many, pretended, given):
    with pytest.raises((SettingError, ModelError)):
        sweep(many, **given)
    with pytest.raises(DataError, match="does not exist"):
        sweeping.sweep([many / "a.pt"], str(many / "gone.npz"), many / "out")
    assert pretended == []
    assert not (many / "out").exists()


def test_no_data_is_told_before_the_work(many, pretended):
    with pytest.raises(DataError, match="no clean images"):
        sweeping.sweep([many / "a.pt"], None, many / "out")


@pytest.mark.parametrize("given", [{"seconds": 0}, {"seconds": float("nan")}, {"memory_mib": -1}])
def test_bad_limits(given):
    with pytest.raises(SettingError):
        Limits(**given)


@pytest.mark.parametrize(
    ("counts", "code"),
    [
        ({"clean": 3}, 0),
        ({"clean": 3, "inconclusive": 1}, 3),
        ({"inconclusive": 1, "refused": 1}, 2),
        ({"lost": 1, "clean": 1}, 2),
        ({"killed": 1, "backdoored": 1}, 1),
        ({}, 0),
    ],
)
def test_exit_codes(counts, code):
    assert exit_code(counts) == code


@pytest.mark.parametrize("flag", [("--memory", "much"), ("--limit", "soon"), ("--workers", "0"), ("--ray", "nowhere")])
def test_bad_flags(many, flag, capsys):
    assert run("sweep", many, "--data", many / "data.npz", "--out", many / "out", *flag) == 2
    assert flag[0].strip("-") in capsys.readouterr().err.replace("address of a Ray", "ray")


def test_a_model_that_was_exchanged_meanwhile_gets_no_verdict(tmp_path):
    job = {"name": "x", "model": MODEL, "sha256": "0" * 64, "hub": None, "data": DATA, "method": "neural-cleanse"}
    job |= {"config": {"seeds": 1, "steps": 1, "refine": 0}, "model_options": {}, "folder": str(tmp_path)}
    job |= {"options": {"images": 40, "additive": False, "threads": 1}}
    with subprocess.Popen([sys.executable, "-m", "bezoar.one_scan"], stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write(json.dumps(job).encode() + b"\n")
        process.stdin.flush()
        assert process.wait(120) == 0
    assert "changed between" in json.loads((tmp_path / "error.json").read_text())["error"]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_a_killed_sweep_goes_on(zoo, tmp_path):
    mark = {**os.environ, "BEZOAR_TEST": str(tmp_path)}
    (tmp_path / "list.csv").write_text(
        f"model,arch\n{zoo}/models/junk.pth,\n{zoo}/models/good.safetensors,{zoo}/net.py:hangs\n"
    )
    command = [sys.executable, "-m", "bezoar.cli.main", "sweep", str(tmp_path / "list.csv")]
    command += ["--data", str(zoo / "clean.npz"), "--out", str(tmp_path / "out"), "--quiet", *QUICK]
    with subprocess.Popen([*command, "--limit", "10m"], env=mark) as first:
        try:
            _until(lambda: list((tmp_path / "out").rglob("record.json")))
            _until(lambda: len(_children(tmp_path)) > 0)
        finally:
            first.kill()
    _until(lambda: not _children(tmp_path))  # the model that hangs is not left behind
    stamp = next((tmp_path / "out").rglob("record.json")).stat().st_mtime_ns
    done = subprocess.run([*command, "--limit", "4s"], check=False, env=mark)
    assert done.returncode == 2
    assert [row["outcome"] for row in rows(tmp_path / "out")] == ["refused", "killed"]
    assert stamp in [path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("record.json")]


def _children(folder: Path) -> list[int]:
    """Processes that scan for a sweep of this test."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if b"bezoar.one_scan" in (entry / "cmdline").read_bytes() and (
                str(folder).encode() in (entry / "environ").read_bytes()
            ):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def _until(holds: Any, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.05)
