"""Ray behind the executor: two nodes on one host, one of them killed; same answers as here."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bezoar.core.cluster import check_address
from bezoar.core.errors import BezoarError, SettingError
from tests.conftest import ROOT

with_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, Any]:
    """What ``tests/cluster_run.py`` saw; a process of its own, since Ray speaks to all addresses of the host."""
    home = tmp_path_factory.mktemp("home")
    env = os.environ | {"HOME": str(home), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    env.pop("RAY_ADDRESS", None)
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "cluster_run.py")],
        capture_output=True,
        text=True,
        timeout=170,
        env=env,
        cwd=home,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert not (Path(home) / ".ray").exists()
    last: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return last


@with_ray
def test_two_nodes_and_no_piece_larger_than_one(found):
    assert (found["workers"], found["cpus"]) == (2, 1)


@with_ray
def test_classes_of_the_users_files_reach_the_workers(found):
    assert found["by_value"] == [2 * n * 3 * 64 for n in range(3)]


@with_ray
@pytest.mark.parametrize("mode", ["fast", "reference"])
def test_scan_says_the_same_as_here(found, mode):
    assert found["scan"][mode] == {"equal": True, "gradients": True, "sizes": 6}


@with_ray
def test_errors_of_a_piece_come_back_whole(found):
    assert found["error"] == ["piece 2 is wrong", "Mend it"]


@with_ray
def test_a_piece_that_kills_its_workers_is_given_up_alone(found):
    assert found["lost"] == [[0, 0], [1, -1], [2, 2]]
    assert "was lost 4 times" in found["given_up"]


@with_ray
def test_what_cannot_be_sent_is_told(found):
    assert "cannot be sent to other processes" in found["unsent"]


@with_ray
def test_pieces_that_nobody_waits_for_are_cancelled(found):
    assert found["interrupted"] <= 4


@with_ray
def test_a_killed_node_costs_only_its_pieces(found):
    told = found["killed_node"]
    assert told["right"]
    assert (told["killed"], told["nodes"], told["workers_left"]) == (True, 2, 1)
    assert 1 <= told["repeated"] <= 3


@pytest.mark.parametrize("text", ["", "auto", "local", "10.0.0.1:6379", "ray://head:10001"])
def test_addresses(text):
    assert check_address(text) == text


def test_what_is_no_address():
    with pytest.raises(SettingError, match="no address"):
        check_address("everywhere")


def test_errors_survive_the_way_between_processes():
    import pickle

    error = pickle.loads(pickle.dumps(SettingError("what", "do")))
    assert isinstance(error, BezoarError)
    assert (error.message, error.hint, str(error)) == ("what", "do", "what. do")
